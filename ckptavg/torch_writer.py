"""The layout of a torch file: a state dict as ``torch.save`` writes it, known before the data is.

The file is a zip of stored members: a pickle that says what the tensors are, and one member a
storage, its data aligned. All of it follows from names, dtypes and shapes, except the CRC-32 of
storages, which is left out until the data is written.
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from ckptavg.blocks import Action, TensorPlan
from ckptavg.checkpoint.pickle_names import STORAGE_DTYPES
from ckptavg.checkpoint.strided import row_major_strides
from ckptavg.directories import open_descriptor
from ckptavg.hub.threads import in_parallel

_STORAGE_CLASSES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_ALIGNMENT = 64  # of data, as torch aligns it
_ID_DIGITS = 40

_LOCAL_CRC_OFFSET = 14
_LOCAL_START = struct.Struct("<4sHHHHH")  # up to the CRC-32
_LOCAL_REST = struct.Struct("<IIHH")
_ENTRY_START = struct.Struct("<4sHHHHHH")  # up to the CRC-32
_ENTRY_REST = struct.Struct("<IIHHHHHII")
_ZIP64_END = struct.Struct("<4sQHHIIQQQQ")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_EXTRA = struct.Struct("<HH")
_ZIP64_EXTRA = 0x0001
_PADDING_EXTRA = int.from_bytes(b"FB", "little")  # torch's own
_MAX_32, _MAX_16 = 0xFFFFFFFF, 0xFFFF  # larger numbers are in zip64 fields
_VERSION, _ZIP64_VERSION = 20, 45
_UTF8_FLAG = 0x800
_NO_DATE = 0x21  # the first of January 1980: equal runs give equal files

_READ_NBYTES = 256 * 1024
_TASK_NBYTES = 16 * 2**20


class _Member(NamedTuple):
    """A member of the archive; ``crc`` is None until its data is known."""

    name: bytes
    header_offset: int
    data_offset: int
    nbytes: int
    crc: int | None


class _Known:
    """Collects what is known of a file, from its beginning on, and leaves out the rest."""

    def __init__(self) -> None:
        self.position = 0
        self.runs: list[tuple[int, bytes]] = []
        self._run = bytearray()

    def put(self, data: bytes) -> None:
        """Append bytes."""
        self._run += data
        self.position += len(data)

    def leave_out(self, nbytes: int) -> int:
        """Leave room for bytes that are not known yet; return where it begins."""
        if self._run:
            self.runs.append((self.position - len(self._run), bytes(self._run)))
            self._run.clear()
        self.position += nbytes
        return self.position - nbytes


class TorchFile:
    """The bytes around the tensors' data in one torch file; see ``ckptavg.writer.WeightFile``.

    Attributes:
        nbytes: Size of the file.
        known: Position and content of all that does not depend on the data.
    """

    def __init__(
        self, tensors: Sequence[TensorPlan], names: Sequence[str], ties: Mapping[str, str], top: str
    ) -> None:
        """Lay out a file.

        Args:
            tensors: Its tensors.
            names: Their names in the order of the state dict.
            ties: Further names, each with the one whose storage it shares.
            top: What the members' names begin with: the file's own name, as torch has it.
        """
        storages = sorted(
            (one for one in tensors if one.action is not Action.ALIAS), key=lambda one: one.offset
        )
        layout, self._top, self._members = _Known(), top, list[_Member]()
        self._add(layout, "data.pkl", content=_pickle(tensors, storages, names, ties))
        self._add(layout, "byteorder", content=b"little")
        first = len(self._members)
        for key, storage in enumerate(storages):
            self._add(layout, f"data/{key}", storage.nbytes)
        held = [
            (one.offset, member.data_offset)
            for one, member in zip(storages, self._members[first:], strict=True)
            if one.nbytes
        ]
        self._data_offsets, self._positions = [one for one, _ in held], [one for _, one in held]
        self._data_nbytes = max((one.offset + one.nbytes for one in storages), default=0)
        self._add(layout, "version", content=b"3\n")
        self._add(layout, ".data/serialization_id", _ID_DIGITS)
        self._crc_offsets = self._add_directory(layout)
        layout.leave_out(0)
        self.nbytes = layout.position
        self.known: Sequence[tuple[int, bytes]] = layout.runs

    def places(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield position and size of the parts of the file that bytes of the data go to."""
        index = bisect_right(self._data_offsets, offset) - 1
        while nbytes:
            ends = self._data_offsets[index + 1 : index + 2] or [self._data_nbytes]
            count = min(nbytes, ends[0] - offset)
            yield self._positions[index] + offset - self._data_offsets[index], count
            offset, nbytes, index = offset + count, nbytes - count, index + 1

    def sealed(self, path: Path, n_threads: int) -> Iterator[tuple[int, bytes]]:
        """Yield position and content of what depends on the data; reads all of that.

        Args:
            path: The file, all data written.
            n_threads: How many threads read, each with 256 KiB of memory.

        Raises:
            OSError: If it cannot be read.
        """
        *storages, identity = [one for one in self._members if one.crc is None]
        crcs = _crcs_of(path, storages, n_threads)
        for member, crc in zip(storages, crcs, strict=True):
            yield from self._crc_fields(member, crc)
        # as torch does it: a number that goes with the names, and one with the contents
        names = crc32(b"\0".join(member.name for member in self._members))
        contents = crc32(b"".join(crc.to_bytes(4, "little") for crc in crcs))
        content = f"{names:0{_ID_DIGITS // 2}d}{contents:0{_ID_DIGITS // 2}d}".encode()
        yield identity.data_offset, content
        yield from self._crc_fields(identity, crc32(content))

    def _crc_fields(self, member: _Member, crc: int) -> Iterator[tuple[int, bytes]]:
        yield member.header_offset + _LOCAL_CRC_OFFSET, crc.to_bytes(4, "little")
        yield self._crc_offsets[member.name], crc.to_bytes(4, "little")

    def _add(
        self, layout: _Known, name: str, nbytes: int = 0, *, content: bytes | None = None
    ) -> None:
        """Add a member: its local header and its content, where that is known already."""
        if content is None and not nbytes:
            content = b""
        nbytes = nbytes if content is None else len(content)
        crc = None if content is None else crc32(content)
        full_name = f"{self._top}/{name}".encode()
        header_offset = layout.position
        extra = b""
        if nbytes >= _MAX_32:
            extra = _EXTRA.pack(_ZIP64_EXTRA, 16) + struct.pack("<QQ", nbytes, nbytes)
        header_bytes = _LOCAL_START.size + 4 + _LOCAL_REST.size + len(full_name) + len(extra)
        padding = -(header_offset + header_bytes + _EXTRA.size) % _ALIGNMENT
        extra += _EXTRA.pack(_PADDING_EXTRA, padding) + b"Z" * padding
        version = _ZIP64_VERSION if nbytes >= _MAX_32 else _VERSION
        layout.put(_LOCAL_START.pack(b"PK\x03\x04", version, _UTF8_FLAG, 0, 0, _NO_DATE))
        _put_crc(layout, crc)
        size = min(nbytes, _MAX_32)
        layout.put(_LOCAL_REST.pack(size, size, len(full_name), len(extra)) + full_name + extra)
        self._members.append(_Member(full_name, header_offset, layout.position, nbytes, crc))
        if content is None:
            layout.leave_out(nbytes)
        else:
            layout.put(content)

    def _add_directory(self, layout: _Known) -> dict[bytes, int]:
        """Add the central directory; return where in it the CRC-32 of each member is."""
        start, crc_offsets = layout.position, {}
        for member in self._members:
            large = [number for number in (member.nbytes,) * 2 if number >= _MAX_32]
            large += [member.header_offset] if member.header_offset >= _MAX_32 else []
            extra = _EXTRA.pack(_ZIP64_EXTRA, 8 * len(large)) if large else b""
            extra += struct.pack(f"<{len(large)}Q", *large)
            version = _ZIP64_VERSION if large else _VERSION
            layout.put(
                _ENTRY_START.pack(b"PK\x01\x02", version, version, _UTF8_FLAG, 0, 0, _NO_DATE)
            )
            crc_offsets[member.name] = _put_crc(layout, member.crc)
            size, header_offset = min(member.nbytes, _MAX_32), min(member.header_offset, _MAX_32)
            layout.put(
                _ENTRY_REST.pack(
                    size, size, len(member.name), len(extra), 0, 0, 0, 0, header_offset
                )
            )
            layout.put(member.name + extra)
        end, count = layout.position, len(self._members)
        layout.put(
            _ZIP64_END.pack(
                b"PK\x06\x06", _ZIP64_END.size - 12, _ZIP64_VERSION, _ZIP64_VERSION, 0, 0,
                count, count, end - start, start,
            )
        )  # fmt: skip
        layout.put(_ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, end, 1))
        few = min(count, _MAX_16)
        layout.put(
            _END.pack(
                b"PK\x05\x06", 0, 0, few, few, min(end - start, _MAX_32), min(start, _MAX_32), 0
            )
        )
        return crc_offsets


def _put_crc(layout: _Known, crc: int | None) -> int:
    """Add a CRC-32, or room for it; return where it is."""
    if crc is None:
        return layout.leave_out(4)
    layout.put(crc.to_bytes(4, "little"))
    return layout.position - 4


def _crcs_of(path: Path, members: Sequence[_Member], n_threads: int) -> list[int]:
    """Return the CRC-32 of each member's data, from the file."""
    tasks: list[list[_Member]] = []
    room = 0
    for member in members:
        if room <= 0:
            tasks.append([])
            room = _TASK_NBYTES
        tasks[-1].append(member)
        room -= member.nbytes

    def crcs(task: Sequence[_Member]) -> list[int]:
        buffer = memoryview(bytearray(_READ_NBYTES))
        # opened anew in each thread: what other hosts wrote is seen, and nobody need wait for it
        descriptor = open_descriptor(path, os.O_RDONLY)
        try:
            return [_crc_of(descriptor, member, buffer) for member in task]
        finally:
            os.close(descriptor)

    return [crc for found in in_parallel(crcs, tasks, n_threads) for crc in found]


def _crc_of(descriptor: int, member: _Member, buffer: memoryview) -> int:
    crc, position, end = 0, member.data_offset, member.data_offset + member.nbytes
    while position < end:
        count = os.preadv(descriptor, [buffer[: min(end - position, len(buffer))]], position)
        if count == 0:
            raise OSError(f"{member.name.decode()} ended at byte {position}")
        crc = crc32(buffer[:count], crc)
        position += count
    return crc


def _pickle(
    tensors: Sequence[TensorPlan],
    storages: Sequence[TensorPlan],
    names: Sequence[str],
    ties: Mapping[str, str],
) -> bytes:
    """Return the pickle of an OrderedDict of tensors, in the opcodes that torch itself uses."""
    by_name = {tensor.name: tensor for tensor in tensors}
    keys = {storage.name: str(key) for key, storage in enumerate(storages)}
    memo: dict[bytes, bytes] = {}

    def shared(opcodes: bytes) -> bytes:
        """Make a value, or get it again; there are far fewer of them than 256."""
        if opcodes in memo:
            return b"h" + memo[opcodes]  # BINGET
        memo[opcodes] = bytes([len(memo)])
        return opcodes + b"q" + memo[opcodes]  # BINPUT

    def tensor_of(name: str) -> bytes:
        tensor = by_name.get(name) or by_name[ties[name]]
        dtype, shape = tensor.output_dtype.name, tensor.info.shape
        storage_class = _STORAGE_CLASSES.get(dtype)
        numel = tensor.info.numel if storage_class else tensor.nbytes
        storage = _tuple(
            shared(_text("storage")),
            shared(_global("torch", storage_class) if storage_class else _UNTYPED),
            _text(keys[tensor.owner or tensor.name]),
            shared(_text("cpu")),
            _integer(numel),
        )
        arguments = [
            storage + b"Q",  # BINPERSID
            _integer(0),
            _tuple(*map(_integer, shape)),
            _tuple(*map(_integer, row_major_strides(shape))),
            b"\x89",  # NEWFALSE: it requires no gradient
            shared(_ORDERED_DICT) + b")R",
        ]
        if storage_class:
            return shared(_REBUILD) + _tuple(*arguments) + b"R"
        arguments.append(shared(_global("torch", dtype)))
        return shared(_REBUILD_UNTYPED) + _tuple(*arguments) + b"R"

    parts = [b"\x80\x02", shared(_ORDERED_DICT), b")R("]  # PROTO 2, REDUCE of (), MARK
    for name in (*names, *(tied for tied in ties if tied not in by_name)):
        parts += [_text(name), tensor_of(name)]
    return b"".join(parts) + b"u."  # SETITEMS, STOP


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


_ORDERED_DICT = _global("collections", "OrderedDict")
_UNTYPED = _global("torch.storage", "UntypedStorage")
_REBUILD = _global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = _global("torch._utils", "_rebuild_tensor_v3")  # it is told the dtype


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return b"X" + len(encoded).to_bytes(4, "little") + encoded  # BINUNICODE


def _integer(number: int) -> bytes:
    if number < 2**8:
        return b"K" + number.to_bytes(1, "little")  # BININT1
    if number < 2**31:
        return b"J" + number.to_bytes(4, "little")  # BININT
    encoded = number.to_bytes(number.bit_length() // 8 + 1, "little")
    return b"\x8a" + len(encoded).to_bytes(1, "little") + encoded  # LONG1


def _tuple(*items: bytes) -> bytes:
    if not items:
        return b")"  # EMPTY_TUPLE
    if len(items) <= 3:
        return b"".join(items) + b"\x85\x86\x87"[len(items) - 1 : len(items)]  # TUPLE1, 2, 3
    return b"(" + b"".join(items) + b"t"  # MARK, TUPLE
