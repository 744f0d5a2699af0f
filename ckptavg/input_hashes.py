"""Hashes of the files that are averaged, taken while they are read."""

from collections.abc import Sequence
from threading import Thread
from types import TracebackType
from typing import Self

from ckptavg.checkpoint.digests import BUFFER_NBYTES, FileDigest
from ckptavg.hub.threads import Latch, start

_STEP_NBYTES = 8 * 2**20
_MAX_THREADS = 4
HASHING_NBYTES = _MAX_THREADS * BUFFER_NBYTES  # what they hold
_PAUSE_SECONDS = 0.02


class InputHashes:
    """Threads that follow an average through its inputs; a context manager.

    All files are read at the same pace, so what was just read is still in memory. What is left
    when the average is done, such as optimizer state, is read then.

    Attributes:
        found: Path of each file -> its digest, once ``finish`` has returned.
    """

    def __init__(self, digests: Sequence[FileDigest]) -> None:
        """Prepare; nothing is read before the context is entered."""
        self.found: dict[str, str] = {}
        self._shares = [digests[number::_MAX_THREADS] for number in range(_MAX_THREADS)]
        self._done = 0.0
        self._is_over = Latch()
        self._is_given_up = False
        self._error: BaseException | None = None
        self._threads = [
            Thread(target=self._work, args=(share,), daemon=True) for share in self._shares if share
        ]

    def __enter__(self) -> Self:
        try:
            for thread in self._threads:
                start(thread)
        except BaseException:
            self._is_given_up = True
            self._is_over.set()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_given_up = True
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def follow(self, done: float) -> None:
        """Hear what part of the inputs was read, from 0 to 1."""
        self._done = done

    def finish(self) -> dict[str, str]:
        """Wait until all is hashed, and return the digests by path.

        Raises:
            CheckpointError: If a file cannot be read, or is not what it says of itself.
        """
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return self.found

    def _work(self, share: Sequence[FileDigest]) -> None:
        buffer = memoryview(bytearray(BUFFER_NBYTES))
        try:
            while not self._is_over.wait(_PAUSE_SECONDS):
                self._catch_up(share, self._done, buffer)
            self._catch_up(share, 1.0, buffer)
            for one in share if not self._is_given_up else ():
                digest = one.finish()
                one.file.note_digest(digest)
                self.found[one.file.path] = digest
        except BaseException as error:  # told by finish
            self._error = error

    def _catch_up(self, share: Sequence[FileDigest], done: float, buffer: memoryview) -> None:
        """Hash all files up to that part of them, a step of each in turn."""
        waiting = list(share)
        while waiting and not self._is_given_up:
            for one in waiting:
                one.advance(one.position + _STEP_NBYTES, buffer, at_most=int(done * one.file.size))
            waiting = [one for one in waiting if one.position < int(done * one.file.size)]
