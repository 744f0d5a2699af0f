"""SHA-256 of files, in bounded memory."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from ckptavg.checkpoint.files import open_descriptor


class FileHash(NamedTuple):
    """A file's size in bytes, and its SHA-256 in hexadecimal digits."""

    nbytes: int
    sha256: str


def hash_of(content: bytes) -> FileHash:
    """Return the hash of a file with that content."""
    return FileHash(len(content), hashlib.sha256(content).hexdigest())


def hash_file(path: Path) -> FileHash:
    """Read a file and return its hash; holds 256 KiB of it.

    Raises:
        OSError: If it cannot be read.
    """
    # O_NONBLOCK: a FIFO in the place of a file must not wait for a writer
    descriptor = open_descriptor(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - it is open already
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # other threads run meanwhile
        return FileHash(os.lseek(descriptor, 0, os.SEEK_CUR), digest)
