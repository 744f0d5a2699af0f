"""Broken and hostile checkpoint files, put together byte by byte from the rules of their formats.

Nothing here goes through the libraries that write such files: they refuse to write bad ones.
"""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32


def whole(message: str) -> str:
    """Return a pattern for ``pytest.raises`` that matches exactly this message."""
    return rf"\A{re.escape(message)}\Z"


# -- safetensors


def safetensors_bytes(
    header: Mapping[str, Any] | str | bytes, data: bytes = b"", *, header_bytes: int | None = None
) -> bytes:
    """Return a safetensors file.

    Args:
        header: A mapping, or the raw header where no mapping can say it.
        data: What follows the header.
        header_bytes: The length that the file states; the true one if None.
    """
    if isinstance(header, Mapping):
        header = json.dumps(header)
    raw = header.encode("utf-8") if isinstance(header, str) else header
    length = len(raw) if header_bytes is None else header_bytes
    return length.to_bytes(8, "little") + raw + data


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    """Return what a safetensors header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# -- zip


@dataclass(frozen=True, kw_only=True)
class Member:
    """One zip member; None stands for the true value, ``local_`` for its own header."""

    name: str | bytes
    content: bytes = b""
    flags: int = 0
    method: int = 0
    crc: int | None = None
    stored: int | None = None
    size: int | None = None
    offset: int | None = None
    extra: bytes = b""
    comment: bytes = b""
    signature: bytes = b"PK\x01\x02"
    local_signature: bytes = b"PK\x03\x04"
    local_flags: int | None = None
    local_method: int | None = None
    local_name: bytes | None = None
    local_extra: bytes = b""
    descriptor: bytes = b""

    @property
    def raw_name(self) -> bytes:
        """The name as it is stored."""
        return self.name.encode("utf-8") if isinstance(self.name, str) else self.name


def zip_bytes(
    members: Sequence[Member],
    *,
    before: bytes = b"",
    gap: bytes = b"",
    after: bytes = b"",
    comment: bytes = b"",
    count: int | None = None,
    directory_bytes: int | None = None,
    start: int | None = None,
    disk: int = 0,
    zip64: Mapping[str, Any] | None = None,
) -> bytes:
    """Return a zip archive.

    Args:
        members: In order.
        before: Bytes in front of the first member.
        gap: Bytes between the central directory and the end record.
        after: Bytes after the end record.
        comment: The archive's comment.
        count: Entries, as the end record states them.
        directory_bytes: Size of the central directory, as the end record states it.
        start: Its position, as the end record states it.
        disk: Number of this disk.
        zip64: Not None writes a zip64 end record and locator; its values override ``count``,
            ``directory_bytes``, ``start``, ``signature``, ``disks`` and ``at``.
    """
    body, directory = bytearray(before), bytearray()
    for member in members:
        checksum = crc32(member.content) if member.crc is None else member.crc
        offset = len(body) if member.offset is None else member.offset
        size = len(member.content) if member.size is None else member.size
        stored = size if member.stored is None else member.stored
        local_name = member.raw_name if member.local_name is None else member.local_name
        body += struct.pack(
            "<4sHHHHHIIIHH",
            member.local_signature,
            20,
            member.flags if member.local_flags is None else member.local_flags,
            member.method if member.local_method is None else member.local_method,
            0,
            0,
            checksum,
            len(member.content),
            len(member.content),
            len(local_name),
            len(member.local_extra),
        )
        body += local_name + member.local_extra + member.content + member.descriptor
        directory += struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            member.signature,
            20,
            20,
            member.flags,
            member.method,
            0,
            0,
            checksum,
            stored,
            size,
            len(member.raw_name),
            len(member.extra),
            len(member.comment),
            0,
            0,
            0,
            offset,
        )
        directory += member.raw_name + member.extra + member.comment
    true_start, true_bytes = len(body), len(directory)
    body += directory + gap
    if zip64 is not None:
        at = len(body)
        body += struct.pack(
            "<4sQHHIIQQQQ",
            zip64.get("signature", b"PK\x06\x06"),
            44,
            45,
            45,
            0,
            0,
            zip64.get("here", zip64.get("count", len(members))),
            zip64.get("count", len(members)),
            zip64.get("directory_bytes", true_bytes),
            zip64.get("start", true_start),
        )
        body += struct.pack("<4sIQI", b"PK\x06\x07", 0, zip64.get("at", at), zip64.get("disks", 1))
    body += struct.pack(
        "<4sHHHHIIH",
        b"PK\x05\x06",
        disk,
        disk,
        len(members) if count is None else count,
        len(members) if count is None else count,
        true_bytes if directory_bytes is None else directory_bytes,
        true_start if start is None else start,
        len(comment),
    )
    return bytes(body + comment + after)


def zip64_extra(*values: int) -> bytes:
    """Return the extra field that holds the 64-bit values of a directory entry."""
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)


# -- pickles: each function returns the operations that push one value


def name(module: str, attribute: str) -> bytes:
    """Push a global, as protocol 2 writes it."""
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def stack_name(module: str, attribute: str) -> bytes:
    """Push a global, as protocol 4 writes it."""
    return text(module) + text(attribute) + b"\x93"


def text(value: str) -> bytes:
    """Push a string."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Push an integer of any size up to 255 bytes."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def group(*values: bytes) -> bytes:
    """Push a tuple."""
    return b"(" + b"".join(values) + b"t"


def sizes(values: Sequence[int]) -> bytes:
    """Push a tuple of integers."""
    return group(*map(number, values))


def mapping(pairs: Mapping[str, bytes] | Sequence[tuple[bytes, bytes]]) -> bytes:
    """Push a dict; keys of a sequence of pairs are operations, too."""
    if isinstance(pairs, Mapping):
        pairs = [(text(key), value) for key, value in pairs.items()]
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    """Push what a function returns."""
    return function + group(*arguments) + b"R"


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage") -> bytes:
    """Push a persistent reference to a storage."""
    return group(text("storage"), name("torch", kind), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(
    shape: Sequence[int] = (4,),
    strides: Sequence[int] | None = None,
    *,
    offset: int = 0,
    stored: bytes | None = None,
    metadata: bytes = b"",
) -> bytes:
    """Push a tensor; ``strides`` None are row-major, ``stored`` None is four float32."""
    if strides is None:
        strides = row_major(shape)
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        storage() if stored is None else stored,
        number(offset),
        sizes(shape),
        sizes(strides),
        b"\x89",
        name("collections", "OrderedDict") + b")R",
        metadata,
    )


def row_major(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def pickled(value: bytes, *, protocol: int = 2) -> bytes:
    """Return a whole pickle."""
    return b"\x80" + bytes([protocol]) + value + b"."


# -- torch files


def torch_members(
    pickle: bytes, storages: Mapping[str, bytes] | None = None, *, root: str = "archive"
) -> list[Member]:
    """Return the members of a torch file around a whole pickle; default storage: 0, 1, 2, 3."""
    if storages is None:
        storages = {"0": struct.pack("<4f", 0, 1, 2, 3)}
    return [
        Member(name=f"{root}/data.pkl", content=pickle),
        Member(name=f"{root}/byteorder", content=b"little"),
        *(Member(name=f"{root}/data/{key}", content=raw) for key, raw in storages.items()),
        Member(name=f"{root}/version", content=b"3\n"),
    ]


def torch_bytes(value: bytes, storages: Mapping[str, bytes] | None = None) -> bytes:
    """Return a torch file whose root is the value that these operations push."""
    return zip_bytes(torch_members(pickled(value), storages))


# -- torch files of the old format


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def legacy_bytes(
    value: bytes,
    storages: Sequence[tuple[str, int, bytes]] = (("0", 4, struct.pack("<4f", 0, 1, 2, 3)),),
    *,
    magic: bytes | None = None,
    version: bytes | None = None,
    machine: bytes | None = None,
    keys: bytes | None = None,
    after: bytes = b"",
) -> bytes:
    """Return a torch file of the old format.

    Args:
        value: Operations that push its root.
        storages: (key, stated number of elements, bytes) of each, in order.
        magic: Operations of the first pickle; None for the true ones, as for those below.
        version: Of the second.
        machine: Of the third.
        keys: Of the fifth.
        after: Bytes behind the last storage.
    """
    if keys is None:
        keys = b"](" + b"".join(text(key) for key, _, _ in storages) + b"e"
    pickles = (
        number(LEGACY_MAGIC) if magic is None else magic,
        number(1001) if version is None else version,
        mapping({"little_endian": b"\x88"}) if machine is None else machine,
        value,
        keys,
    )
    stored = (struct.pack("<q", count) + raw for _, count, raw in storages)
    return b"".join((*map(pickled, pickles), *stored, after))
