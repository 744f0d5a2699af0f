"""safetensors files: a strict reader of the header, a subset of what the format allows.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes of header length, little
endian; a JSON header of that length that begins with ``{``; then the data, without holes. Values
are not interpreted here.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.limits import (
    HEADER_BOUNDS,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
)
from ckptavg.checkpoint.strict_json import Pairs, parse_object
from ckptavg.checkpoint.strided import is_impossible
from ckptavg.errors import CheckpointError, IncompleteCheckpointError
from ckptavg.tensors import DTYPE_BY_CODE, TensorInfo

_FORMAT_HEADER_BYTES = 100_000_000  # what the format allows


class SafetensorsHeader:
    """What one safetensors file says of itself.

    Attributes:
        tensors: Name -> dtype and shape, in the order of the data.
        offsets: Name -> position of its first byte in the file.
        metadata: The ``__metadata__`` string map.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        offsets: Mapping[str, int],
        metadata: Mapping[str, str],
    ) -> None:
        self.tensors = tensors
        self.offsets = offsets
        self.metadata = metadata


def read_header(file: ReadableFile) -> SafetensorsHeader:
    """Read and completely check the header of a safetensors file.

    Raises:
        CheckpointError: If the file is not exactly what the format describes.
    """

    def refuse(what: str, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
        return kind(f"{file.label}: {what}")

    if file.size < 8:
        raise refuse(f"has {file.size} bytes, too short for a safetensors file")
    header_bytes = int.from_bytes(file.read(0, 8), "little")
    if header_bytes > _FORMAT_HEADER_BYTES:
        raise refuse(
            f"is not a safetensors file: its header would have {header_bytes} bytes, "
            f"at most {_FORMAT_HEADER_BYTES} are allowed"
        )
    data_start = 8 + header_bytes
    if header_bytes > MAX_HEADER_BYTES and data_start <= file.size:
        raise refuse(f"has a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read")
    if data_start > file.size:
        raise refuse(
            f"has {file.size} bytes, but its header alone needs {data_start}: it is truncated",
            IncompleteCheckpointError,
        )
    raw = file.read(8, header_bytes)
    if not raw.startswith(b"{"):
        raise refuse("is not a safetensors file: its header does not begin with '{'")
    if (count := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        raise refuse(f"has {count} tensors, at most {MAX_TENSORS} are allowed")
    header = parse_object(raw, file.label, HEADER_BOUNDS, what="its header", made_of=_entry)
    metadata = _parse_metadata(header.pop("__metadata__", {}), refuse)

    entries = []
    for name, entry in header.items():
        info, begin, end = _parse_entry(name, entry, refuse)
        entries.append((begin, end, name, info))
    entries.sort(key=lambda item: item[:2])

    position = 0
    for begin, end, name, _info in entries:
        if begin != position:
            fault = (
                "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            )
            raise refuse(f"tensor '{name}' {fault}: begins at byte {begin}, expected {position}")
        position = end
    if data_start + position != file.size:
        is_cut = data_start + position > file.size
        relation = "truncated" if is_cut else "longer than it should be"
        raise refuse(
            f"has {file.size} bytes, but its header describes {data_start + position}: "
            f"it is {relation}",
            IncompleteCheckpointError if is_cut else CheckpointError,
        )
    return SafetensorsHeader(
        tensors={name: info for _, _, name, info in entries},
        offsets={name: data_start + begin for begin, _, name, _ in entries},
        metadata=metadata,
    )


class _Entry(NamedTuple):
    """What a header says of a tensor, as it says it; lists are tuples, which take less room."""

    dtype: Any
    shape: Any
    data_offsets: Any


def _entry(pairs: Pairs) -> _Entry | None:
    """Return the entry that names and values make; None if they make another object."""
    told = {name: tuple(value) if type(value) is list else value for name, value in pairs}
    return _Entry(**told) if len(pairs) == 3 and told.keys() == {*_Entry._fields} else None


def _parse_metadata(value: Any, refuse: Any) -> dict[str, str]:
    if type(value) is not dict or not all(type(text) is str for text in value.values()):
        raise refuse("__metadata__ in its header is not a map of strings")
    return value


def _parse_entry(name: str, entry: Any, refuse: Any) -> tuple[TensorInfo, int, int]:
    if type(entry) is not _Entry:
        raise refuse(f"tensor '{name}' has other fields than dtype, shape and data_offsets")
    code, shape, offsets = entry
    dtype = DTYPE_BY_CODE.get(code) if type(code) is str else None
    if dtype is None:
        what = f"the unknown dtype '{code}'" if type(code) is str else "a dtype that is no string"
        raise refuse(f"tensor '{name}' has {what}")
    if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
        raise refuse(f"tensor '{name}' has a shape that is not a list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise refuse(
            f"tensor '{name}' has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are allowed"
        )
    if (
        type(offsets) is not tuple
        or len(offsets) != 2
        or not all(type(offset) is int and offset >= 0 for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        raise refuse(f"tensor '{name}' has data_offsets that are not a byte range")
    bits = dtype.bits
    if is_impossible(TensorInfo(dtype, shape)):
        raise refuse(f"tensor '{name}' has an impossible size")
    bits *= prod(shape)
    begin, end = offsets
    if bits % 8:
        raise refuse(f"tensor '{name}' of {dtype} and shape {[*shape]} ends inside a byte")
    if bits // 8 != end - begin:
        raise refuse(
            f"tensor '{name}' of {dtype} and shape {[*shape]} needs {bits // 8} bytes, "
            f"but its data_offsets hold {end - begin}"
        )
    return TensorInfo(dtype, shape), begin, end
