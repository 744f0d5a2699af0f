"""The hash of a whole file, read from its beginning to its end; zip members' checksums, too.

A torch file holds a CRC-32 of every storage, which torch computes and never looks at.
"""

import hashlib
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from ckptavg.checkpoint.zip_directory import ZipDirectory
from ckptavg.errors import CheckpointError

if TYPE_CHECKING:
    from ckptavg.checkpoint.files import PositionalFile

SHA256 = "sha256"
_GIT = "git-sha1"
BUFFER_NBYTES = 2**18
_ZIP = b"PK\x03\x04"


class _Region(NamedTuple):
    """Bytes of a file that have a CRC-32, as the file says."""

    start: int
    stop: int
    crc: int
    name: str


class FileDigest:
    """The digest of one file, as far as it was read; one call at a time.

    Attributes:
        file: What is hashed.
        position: How many bytes of it were hashed.
    """

    def __init__(self, file: "PositionalFile") -> None:
        """Read nothing yet.

        Args:
            file: What is hashed, with the kind of hash that its source tells, or else SHA-256.
        """
        self.file = file
        self._kind = file.expected_digest.partition(":")[0] or SHA256
        self.position = 0
        self._regions: deque[_Region] | None = None
        self._crc = 0
        self._hash: Any = hashlib.sha256()
        if self._kind == _GIT:  # of what git calls a blob
            self._hash = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def advance(
        self, stop: int, buffer: memoryview | None = None, *, at_most: int | None = None
    ) -> None:
        """Hash the file up to a position.

        Args:
            stop: First byte that is not read.
            buffer: Room to read into; None makes some.
            at_most: An earlier one that must not be passed; None is the end of the file.

        Raises:
            CheckpointError: If it cannot be read, or a zip member is not what its CRC-32 says.
        """
        if self._regions is None:
            self._regions = deque(_checked_regions(self.file))
        buffer = memoryview(bytearray(BUFFER_NBYTES)) if buffer is None else buffer
        if self.file.digest:  # it is known
            self.position = self.file.size
            return
        stop = min(stop, self.file.size, self.file.size if at_most is None else at_most)
        while self.position < stop:
            content = buffer[: min(len(buffer), stop - self.position)]
            self.file.read_into(self.position, [content])
            self._hash.update(content)
            self._check(content)
            self.position += len(content)

    def finish(self) -> str:
        """Hash what is left, and return the digest, such as ``sha256:...``.

        Raises:
            CheckpointError: As ``advance`` does.
        """
        if self.file.digest:
            return self.file.digest
        self.advance(self.file.size)
        return f"{self._kind}:{self._hash.hexdigest()}"

    def _check(self, content: memoryview) -> None:
        """Go on with the CRC-32 of the members that these bytes belong to."""
        regions, end = self._regions, self.position + len(content)
        while regions and regions[0].start < end:
            region = regions[0]
            first = max(region.start, self.position)
            last = min(region.stop, end)
            self._crc = crc32(content[first - self.position : last - self.position], self._crc)
            if last < region.stop:
                return
            if self._crc != region.crc:
                raise CheckpointError(
                    f"{self.file.label}: its {region.name} is damaged (CRC-32 differs)"
                )
            self._crc = 0
            regions.popleft()


def _checked_regions(file: "PositionalFile") -> list[_Region]:
    """Return the members of a zip file whose CRC-32 it tells, in order; 0 is one that it does not.

    Raises:
        CheckpointError: If its directory is damaged.
    """
    if file.size < len(_ZIP) or file.read(0, len(_ZIP)) != _ZIP:
        return []
    try:
        directory = ZipDirectory(file)
    except CheckpointError:  # it was opened: several in one file, as in distributed checkpoints
        return []
    found = []
    for member in directory.members.values():
        if member.crc32 and member.nbytes:
            start = directory.data_offset(member)
            found.append(_Region(start, start + member.nbytes, member.crc32, member.name))
    return sorted(found)
