"""Regular files read by position: no mmap, no shared offset, every short read an error.

A memory-mapped file that is truncated kills the process with SIGBUS; a positional read of it is
an ordinary error. Positional reads also go straight into the caller's buffer.
"""

import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ckptavg.checkpoint.digests import FileDigest
from ckptavg.directories import close_quietly, open_descriptor
from ckptavg.errors import CheckpointError
from ckptavg.tensors import FileStamp

_COARSE_SECONDS = 2.0  # how far apart two times are where they are that coarse
_MAX_BUFFERS_PER_CALL = 1024  # IOV_MAX on Linux and macOS


class ReadableFile(Protocol):
    """One file, wherever it lies, read by position from any number of threads.

    Attributes:
        path: What tells it from every other file.
        label: What messages call it.
        size: Bytes.
        stamp: What identifies its content.
    """

    path: str
    label: str
    size: int
    stamp: FileStamp

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes that belong to a header."""

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Hear which small ranges (offset, bytes) ``read`` will be asked for next."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from ``offset`` on."""

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file changed since it was opened."""

    def verify(self) -> None:
        """Raise CheckpointError if the content is not what its source says, where that tells."""

    def close(self) -> None:
        """Close the file; closing twice is allowed."""


class PositionalFile:
    """One regular file, opened for positional reading from any number of threads."""

    def __init__(self, path: str | Path, label: str, expected_digest: str = "") -> None:
        """Open a file without reading it.

        Args:
            path: A regular file, or a symbolic link that ends at one.
            label: What messages call it.
            expected_digest: Of its content, as ``sha256:...`` or ``git-sha1:...``; empty if
                nothing tells.

        Raises:
            CheckpointError: If it cannot be opened or is not a regular file.
        """
        self.path = os.fspath(path)
        self.label = label
        self.expected_digest = expected_digest
        self.digest = ""  # of the whole, once it is known
        self._descriptor = -1
        try:
            # O_NONBLOCK: a FIFO must fail the check for a regular file, not wait for a writer
            self._descriptor = open_descriptor(self.path, os.O_RDONLY | os.O_NONBLOCK)
            status = os.fstat(self._descriptor)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            self.close()
            raise CheckpointError(f"{label}: cannot be opened: {_reason(error)}") from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise CheckpointError(f"{label}: is {kind}, expected a checkpoint file")
        self._settle(status)
        self.size = status.st_size
        self.stamp = _stamp(self.path, status)

    def _settle(self, status: os.stat_result) -> None:
        """Where times are whole seconds, wait until a file that is written again has another.

        Raises:
            CheckpointError: If it is written again meanwhile.
        """
        age = time.time() - status.st_mtime
        if status.st_mtime_ns % 1_000_000_000 or not 0 <= age < _COARSE_SECONDS:
            return
        time.sleep(_COARSE_SECONDS - age)
        if _stamp(self.path, os.fstat(self._descriptor)) != _stamp(self.path, status):
            self.close()
            raise CheckpointError(f"{self.label}: changed while being read: it is being written")

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes from ``offset`` on."""
        buffer = bytearray(nbytes)
        self.read_into(offset, [memoryview(buffer)])
        return bytes(buffer)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing: the system reads ahead."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from ``offset`` on.

        Args:
            offset: First byte in the file.
            buffers: Writable, contiguous bytes.

        Raises:
            CheckpointError: On a read error, or if the file ends before the buffers are full.
        """
        pending = [buffer for buffer in buffers if buffer.nbytes]
        while pending:
            try:
                count = os.preadv(self._descriptor, pending[:_MAX_BUFFERS_PER_CALL], offset)
            except OSError as error:
                raise CheckpointError(
                    f"{self.label}: cannot be read at byte {offset}: {_reason(error)}"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.label}: ends at byte {offset}, {self.size} bytes were there when it "
                    "was opened: it changed while being read"
                )
            offset += count
            while pending and count >= pending[0].nbytes:
                count -= pending.pop(0).nbytes
            if count:
                pending[0] = pending[0][count:]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if size, inode or modification time differ from the opening."""
        try:
            now = _stamp(self.path, os.fstat(self._descriptor))
        except OSError as error:
            raise CheckpointError(f"{self.label}: cannot be read: {_reason(error)}") from error
        if now != self.stamp:
            raise CheckpointError(f"{self.label}: changed while being read; nothing was published")

    def note_digest(self, digest: str) -> None:
        """Hear what the whole file was found to be, by who read all of it."""
        self.digest = digest

    def verify(self) -> None:
        """Compare the content with the digest that was expected, if any was.

        Raises:
            CheckpointError: If they differ, or the file cannot be read.
        """
        if not self.expected_digest:
            return
        self.digest = self.digest or FileDigest(self).finish()
        if self.digest != self.expected_digest:
            raise CheckpointError(
                f"{self.label}: has {self.digest}, expected {self.expected_digest}: its copy in "
                f"the cache is damaged; remove it ({os.path.realpath(self.path)})"
            )

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self._descriptor >= 0:
            close_quietly(self._descriptor)
            self._descriptor = -1


def _stamp(path: str, status: os.stat_result) -> FileStamp:
    return FileStamp(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]
