"""SHA-256 of files, in bounded memory; also of files that are being written."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import NamedTuple

from ckptavg.directories import close_quietly, open_descriptor

_BUFFER_NBYTES = 2**18


class FileHash(NamedTuple):
    """A file's size in bytes, and its SHA-256 in hexadecimal digits."""

    nbytes: int
    sha256: str


class Part(NamedTuple):
    """Bytes of a file that are there once a block of the work is finished."""

    offset: int
    nbytes: int
    block: int


def hash_of(content: bytes) -> FileHash:
    """Return the hash of a file with that content."""
    return FileHash(len(content), hashlib.sha256(content).hexdigest())


def hash_file(path: Path) -> FileHash:
    """Read a file and return its hash.

    Raises:
        OSError: If it cannot be read.
    """
    return FollowingHash().finish(path)


class FollowingHash:
    """The hash of a file that follows its writing, from the beginning to where it is whole.

    What was just written is still in memory, and hashing it keeps a core busy while others wait
    for the storage: little is left to do at the end. One call at a time.
    """

    def __init__(self, parts: Iterable[Part] = ()) -> None:
        """Read nothing yet.

        Args:
            parts: What will be written, and when it is there; in any order, gaps are allowed.
        """
        self._parts = sorted(parts)
        self.restart()

    def restart(self) -> None:
        """Forget what was hashed: the file changes where it was whole before."""
        self._hash = hashlib.sha256()
        self._position = 0
        self._waiting = deque(self._parts)
        self._whole_nbytes = self._waiting[0].offset if self._waiting else 0  # the header

    def follow(self, path: Path, finished: Container[int], is_over: Callable[[], bool]) -> None:
        """Hash what has become whole since the last call, unless it is over meanwhile.

        Args:
            path: Where the file is at this moment.
            finished: The finished blocks.
            is_over: Tells when to return soon; what is left is done by ``finish``.

        Raises:
            OSError: If the file cannot be read.
        """
        while self._waiting:
            offset, nbytes, block = self._waiting[0]
            if offset != self._whole_nbytes or block not in finished:
                break
            self._whole_nbytes += nbytes
            self._waiting.popleft()
        if self._position < self._whole_nbytes:
            self._read(path, self._whole_nbytes, is_over)

    def finish(self, path: Path) -> FileHash:
        """Hash the rest of the file, which is whole now, and return the hash of all of it.

        Raises:
            OSError: If it cannot be read.
        """
        self._read(path, None, lambda: False)
        return FileHash(self._position, self._hash.hexdigest())

    def _read(self, path: Path, end: int | None, is_over: Callable[[], bool]) -> None:
        # O_NONBLOCK: a FIFO in the place of a file must not wait for a writer
        descriptor = open_descriptor(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            buffer = memoryview(bytearray(_BUFFER_NBYTES))
            while not is_over() and (end is None or self._position < end):
                room = len(buffer) if end is None else min(len(buffer), end - self._position)
                count = os.preadv(descriptor, [buffer[:room]], self._position)
                if count == 0:
                    return
                self._hash.update(buffer[:count])  # other threads run meanwhile
                self._position += count
        finally:
            close_quietly(descriptor)
