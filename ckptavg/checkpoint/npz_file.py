"""numpy files of named arrays (``np.savez``): a zip of arrays, each behind a header of its own.

numpy is never asked to load one: what a header says is parsed here, and nothing else is believed.
"""

import re
import struct
from math import prod
from typing import NamedTuple
from zlib import crc32

from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.limits import MAX_ARRAYS, MAX_DIMENSIONS
from ckptavg.checkpoint.sharded import Place
from ckptavg.checkpoint.state_dict import some
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.checkpoint.zip_directory import Member, ZipDirectory
from ckptavg.errors import CheckpointError
from ckptavg.tensors import DTYPE_BY_NAME, DType, TensorInfo

_MAGIC = b"\x93NUMPY"
_LENGTHS = {1: struct.Struct("<H"), 2: struct.Struct("<I"), 3: struct.Struct("<I")}
_MAX_HEADER_BYTES = 4096
_USUAL_HEADER_BYTES = 128
_MAX_SIZE = 2**63
_SUFFIX = ".npy"
# as numpy writes it, in all versions: a dict of Python, padded
_HEADER = re.compile(
    r"\{'descr': ?(?:'(?P<descr>[^'\\]*)'|(?P<fields>\[[^{}]*\])), ?"
    r"'fortran_order': ?(?P<order>True|False), ?"
    r"'shape': ?\((?P<shape>|SIZE,|SIZE(?:, ?SIZE)+,?)\),? ?\}[ \n]*".replace(
        "SIZE",
        "(?:0|[1-9][0-9]{0,19})L?",  # L: as Python 2 wrote it
    )
)
_TEXT = re.compile(r"[<>|=][US][0-9]+")
_LOCAL_HEADER_BYTES = 30

_DTYPES = {
    "b1": "bool", "u1": "uint8", "i1": "int8", "u2": "uint16", "i2": "int16", "u4": "uint32",
    "i4": "int32", "u8": "uint64", "i8": "int64", "f2": "float16", "f4": "float32",
    "f8": "float64", "c8": "complex64", "c16": "complex128",
}  # fmt: skip


class _Array(NamedTuple):
    info: TensorInfo
    strides: tuple[int, ...] | None
    offset: int


def is_npz(head: bytes) -> bool:
    """Tell whether the first member of a zip file, which begins with these bytes, is an array."""
    name_bytes = int.from_bytes(head[26:28], "little")
    return head[_LOCAL_HEADER_BYTES : _LOCAL_HEADER_BYTES + name_bytes].endswith(b".npy")


def open_npz_file(file: ReadableFile) -> StoredCheckpoint:
    """Open a file written by ``np.savez``.

    Raises:
        CheckpointError: If it is damaged, compressed, or holds arrays that are no plain numbers.
    """
    directory = ZipDirectory(file)
    members = list(directory.members.values())
    if len(members) > MAX_ARRAYS:
        raise CheckpointError(
            f"{file.label}: holds {len(members)} arrays, at most {MAX_ARRAYS} are allowed"
        )
    directory.prefetch_headers(members)
    offsets = {member.name: directory.data_offset(member) for member in members}
    file.prefetch(
        [(offsets[member.name], min(member.nbytes, _USUAL_HEADER_BYTES)) for member in members]
    )
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    left_out = []
    for member in members:
        name = member.name.removesuffix(_SUFFIX)
        if name == member.name:
            raise CheckpointError(
                f"{file.label}: the zip archive holds '{name}' beside numpy arrays, "
                "which np.savez never writes"
            )
        array = _read_header(file, member, offsets[member.name])
        if array is None:
            left_out.append(name)
            continue
        tensors[name] = array.info
        places[name] = Place(file, array.offset, array.strides)
    return StoredCheckpoint(
        label=file.label,
        layout="numpy file",
        tensors=tensors,
        places=places,
        open_files=[file],
        notes=[f"left out, not numbers: {some(left_out)}"] if left_out else [],
    )


def _read_header(file: ReadableFile, member: Member, start: int) -> _Array | None:
    """Return what an array's header says; None for texts."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file.label}: the array '{member.name}' {what}")

    begin = file.read(start, min(member.nbytes, 12))
    is_array = begin[:6] == _MAGIC and len(begin) == 12 and begin[7] == 0
    length = _LENGTHS.get(begin[6]) if is_array else None
    if length is None:
        raise refuse("has no header of numpy's format 1, 2 or 3")
    (header_bytes,) = length.unpack_from(begin, 8)
    data_start = 8 + length.size + header_bytes
    if header_bytes > _MAX_HEADER_BYTES or data_start > member.nbytes:
        raise refuse(f"has a header of {header_bytes} bytes, which is too long")
    raw = file.read(start + 8 + length.size, header_bytes)
    header = _HEADER.fullmatch(raw.decode("utf-8", "replace"))
    if header is None or (begin[6] == 3 and "L" in header["shape"]):
        raise refuse("has a damaged header")
    if header["fields"]:
        raise refuse("is of several fields, expected numbers")
    description = header["descr"]
    shape = tuple(int(size) for size in re.findall("[0-9]+", header["shape"]))
    if len(shape) > MAX_DIMENSIONS or not all(size < _MAX_SIZE for size in shape):
        raise refuse("has a damaged header")
    if _TEXT.fullmatch(description):
        return None
    dtype = _dtype(description)
    if isinstance(dtype, str):
        raise refuse(dtype)
    info = TensorInfo(dtype, shape)
    if data_start + info.nbytes != member.nbytes:
        raise refuse(f"has {member.nbytes - data_start} bytes, expected {info.nbytes}")
    if not info.nbytes and member.crc32 not in (0, crc32(file.read(start, member.nbytes))):
        raise refuse("has a damaged header")
    is_column_major = header["order"] == "True" and sum(size != 1 for size in shape) > 1
    strides = tuple(prod(shape[:axis]) for axis in range(len(shape))) if is_column_major else None
    return _Array(info, strides if info.numel else None, start + data_start)


def _dtype(description: str) -> DType | str:
    """Return the dtype that numpy describes so, or why there is none."""
    if description[1:2] == "O":
        return "holds Python objects, which are never made; save plain numbers"
    if description[:1] == ">":
        return "was written on a big-endian machine"
    name = _DTYPES.get(description[1:]) if description[:1] in ("<", "|", "=") else None
    if name is None:
        return f"has the dtype '{description}', which is not known; save float32 instead"
    return DTYPE_BY_NAME[name]
