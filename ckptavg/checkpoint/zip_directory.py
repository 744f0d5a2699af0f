"""The directory of a zip file as torch writes it: stored members at known offsets, nothing else.

A torch checkpoint is a zip whose members are stored uncompressed, so every tensor is a byte range
of the file. Anything a torch archive never has (compression, encryption, duplicate names,
overlapping members, leading or trailing bytes) is refused.
"""

import struct
from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ckptavg.checkpoint.limits import MAX_ZIP_DIRECTORY_BYTES, MAX_ZIP_MEMBERS
from ckptavg.errors import CheckpointError, IncompleteCheckpointError

if TYPE_CHECKING:
    from ckptavg.checkpoint.files import ReadableFile

_END = struct.Struct("<4sHHHHIIH")
_END_SIGNATURE = b"PK\x05\x06"
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_ZIP64_END = struct.Struct("<4sQHHIIQQQQ")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_MAX_COMMENT_BYTES = 65_535
_DESCRIPTOR_FLAG = 0x8
_KNOWN_FLAGS = _DESCRIPTOR_FLAG | 0x800  # names in UTF-8; others are encryption, patches, ...
_DIRECTORY_ATTRIBUTE = 0x10  # of MS-DOS; torch reads such a member as nothing
_DESCRIPTOR_BYTES = (16, 24)  # signature, CRC-32 and both sizes, of 4 or 8 bytes each
_ZIP64_EXTRA = 0x0001


class Member(NamedTuple):
    """One member: the position of its local header, its size in bytes and its CRC-32."""

    name: str
    header_offset: int
    nbytes: int
    crc32: int


class ZipDirectory:
    """The checked central directory of one zip file."""

    def __init__(self, file: "ReadableFile") -> None:
        """Read the central directory.

        Raises:
            CheckpointError: If it is not a whole zip file of stored members.
        """
        self._file = file
        count, start, nbytes = self._find_directory()
        self._directory_start = start
        self.members = self._read_members(count, start, nbytes)
        self._header_offsets = sorted(member.header_offset for member in self.members.values())
        if len(set(self._header_offsets)) != len(self._header_offsets):
            raise self._refuse("two members of the zip archive lie at the same place")

    def data_offset(self, member: Member) -> int:
        """Return where a member's data begins in the file; reads its local header.

        Raises:
            CheckpointError: If the local header contradicts the directory, or the data does not
                fill the room up to what comes next.
        """
        refusal = f"the zip archive's member '{member.name}'"
        raw = self._file.read(member.header_offset, _LOCAL.size)
        signature, _, flags, method, _, _, crc32, stored, size, name_bytes, extra_bytes = (
            _LOCAL.unpack(raw)
        )
        told = (crc32, stored, size) == (member.crc32, member.nbytes, member.nbytes)
        is_elsewhere = flags & _DESCRIPTOR_FLAG or 0xFFFFFFFF in (stored, size)
        if signature != b"PK\x03\x04" or method != 0 or flags & ~_KNOWN_FLAGS:
            raise self._refuse(f"{refusal} has a damaged header")
        name = member.name.encode("utf-8")  # a stated length may lead anywhere
        if name_bytes != len(name) or name != self._file.read(
            member.header_offset + _LOCAL.size, len(name)
        ):
            raise self._refuse(f"{refusal} has another name in its own header")
        start = member.header_offset + _LOCAL.size + int(name_bytes) + int(extra_bytes)
        limit = self._limit(member)
        # without gaps, a damaged header cannot shift the data by a few bytes
        gap = limit - (start + member.nbytes)
        if gap < 0:
            raise self._refuse(f"{refusal} overlaps what comes after it")
        if flags & _DESCRIPTOR_FLAG:
            is_tight = gap in _DESCRIPTOR_BYTES and self._file.read(limit - gap, 4) == b"PK\x07\x08"
        else:
            is_tight = gap == 0
        if not is_tight:
            raise self._refuse(f"{refusal} does not end where the next one begins")
        if not (told or is_elsewhere):
            raise self._refuse(f"{refusal} has another size or CRC-32 in its own header")
        return start

    @property
    def start(self) -> int:
        """Where the first member begins."""
        return self._header_offsets[0] if self._header_offsets else 0

    def prefetch_headers(self, members: Iterable[Member]) -> None:
        """Have the headers read at once of members whose ``data_offset`` will be asked for."""
        ranges: list[tuple[int, int]] = []
        for member in members:
            header_bytes = _LOCAL.size + len(member.name.encode("utf-8"))
            ranges.append((member.header_offset, header_bytes))
            descriptor_bytes = max(_DESCRIPTOR_BYTES)
            ranges.append((self._limit(member) - descriptor_bytes, descriptor_bytes))
        self._file.prefetch(ranges)

    def _limit(self, member: Member) -> int:
        """Return where begins what comes after a member."""
        position = bisect_right(self._header_offsets, member.header_offset)
        if position < len(self._header_offsets):
            return self._header_offsets[position]
        return self._directory_start

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file.label}: {what}")

    def _find_directory(self) -> tuple[int, int, int]:
        """Return the number of entries, and position and size of the central directory."""
        size = self._file.size
        widest = min(size, _END.size + _MAX_COMMENT_BYTES)
        self._file.prefetch([(size - widest, widest)])  # from a Hub all that follows in one request
        tail_bytes = min(size, _END.size)
        tail = self._file.read(size - tail_bytes, tail_bytes)
        at = tail.rfind(_END_SIGNATURE)
        if at != 0 or tail[-2:] != b"\0\0":  # not an end record without a comment
            tail_bytes = widest
            tail = self._file.read(size - tail_bytes, tail_bytes)
            at = tail.rfind(_END_SIGNATURE)
        if at < 0 or len(tail) - at < _END.size:
            raise IncompleteCheckpointError(
                f"{self._file.label}: has {size} bytes, but no zip directory at its end: the torch "
                "file is truncated"
            )
        _, disk, first_disk, here, count, nbytes, start, comment = _END.unpack_from(tail, at)
        if len(tail) - at != _END.size + comment:
            raise self._refuse("has bytes after the end of its zip archive")
        end = size - len(tail) + at
        if disk or first_disk or here != count:
            raise self._refuse("is part of a zip archive in several files")
        if end >= _ZIP64_LOCATOR.size:
            raw = self._file.read(end - _ZIP64_LOCATOR.size, _ZIP64_LOCATOR.size)
            signature, _, zip64_end, disks = _ZIP64_LOCATOR.unpack(raw)
            if signature == b"PK\x06\x07":
                if disks > 1 or zip64_end + _ZIP64_END.size != end - _ZIP64_LOCATOR.size:
                    raise self._refuse("has a damaged zip64 directory")
                raw = self._file.read(zip64_end, _ZIP64_END.size)
                fields = _ZIP64_END.unpack(raw)
                if fields[0] != b"PK\x06\x06" or fields[6] != fields[7]:
                    raise self._refuse("has a damaged zip64 directory")
                count, nbytes, start = fields[7:10]
                end = zip64_end
        if (
            start + nbytes != end
            or nbytes > MAX_ZIP_DIRECTORY_BYTES
            or count * _ENTRY.size > nbytes
        ):
            raise self._refuse("has a zip directory that is not where its end record says")
        if count > MAX_ZIP_MEMBERS:
            raise self._refuse(f"has {count} zip members, at most {MAX_ZIP_MEMBERS} are allowed")
        return count, start, nbytes

    def _read_members(self, count: int, start: int, nbytes: int) -> dict[str, Member]:
        raw = self._file.read(start, nbytes)
        members: dict[str, Member] = {}
        position = 0
        for _ in range(count):
            if position + _ENTRY.size > nbytes:
                raise self._refuse("has a truncated zip directory")
            entry = _ENTRY.unpack_from(raw, position)
            flags, method, crc32, stored, size, name_bytes, extra_bytes, comment_bytes = (
                entry[3], entry[4], entry[7], entry[8], entry[9], entry[10], entry[11], entry[12],
            )  # fmt: skip
            offset = entry[16]
            position += _ENTRY.size
            name_end = position + name_bytes
            extra_end = name_end + extra_bytes
            if entry[0] != b"PK\x01\x02" or extra_end + comment_bytes > nbytes:
                raise self._refuse("has a damaged zip directory")
            try:
                name = raw[position:name_end].decode("utf-8")
            except UnicodeDecodeError as error:
                raise self._refuse("has a zip member whose name is not UTF-8") from error
            size, stored, offset = self._zip64_sizes(
                raw[name_end:extra_end], size, stored, offset, name
            )
            position = extra_end + comment_bytes
            if method != 0 or flags & ~_KNOWN_FLAGS or stored != size:
                hint = ", which torch.save never does"
                if "/code/" in name:
                    hint += (
                        "; a TorchScript archive is a program: save its state_dict() with "
                        "torch.save"
                    )
                if name.endswith(".npy"):
                    hint = "; save the arrays with np.savez, which does not compress"
                raise self._refuse(
                    f"the zip archive's member '{name}' is compressed or encrypted{hint}"
                )
            if name in members:
                raise self._refuse(f"the zip archive holds '{name}' twice")
            if entry[15] & _DIRECTORY_ATTRIBUTE or name.endswith("/"):
                raise self._refuse(f"the zip archive's member '{name}' is a directory")
            if offset + _LOCAL.size + size > start:
                raise self._refuse(f"the zip archive's member '{name}' lies outside the file")
            members[name] = Member(name, offset, size, crc32)
        if position != nbytes:
            raise self._refuse("has a zip directory with bytes left over")
        return members

    def _zip64_sizes(
        self, extra: bytes, size: int, stored: int, offset: int, name: str
    ) -> tuple[int, int, int]:
        """Replace 32-bit fields that overflowed by the values in the zip64 extra field."""
        if 0xFFFFFFFF not in (size, stored, offset):
            return size, stored, offset
        position = 0
        while position + 4 <= len(extra):
            tag, nbytes = struct.unpack_from("<HH", extra, position)
            position += 4
            if tag == _ZIP64_EXTRA:
                values = [
                    int.from_bytes(extra[at : at + 8], "little")
                    for at in range(position, min(position + nbytes, len(extra)) - 7, 8)
                ]
                wanted = [value == 0xFFFFFFFF for value in (size, stored, offset)]
                if len(values) >= sum(wanted):
                    size, stored, offset = (
                        values.pop(0) if is_wanted else value
                        for is_wanted, value in zip(wanted, (size, stored, offset), strict=True)
                    )
                    return size, stored, offset
            position += nbytes
        raise self._refuse(f"the zip archive's member '{name}' lacks its zip64 sizes")
