"""What other readers make of bytes that ckptavg accepted, or refused.

safetensors, torch and numpy read their own formats. Where torch refuses what ckptavg accepts, and
for distributed checkpoints, which torch reads with plain pickle, the reader with stand-ins does.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, deserialize

from faults.stand_ins import (
    MAX_NBYTES,
    Content,
    Items,
    Stored,
    View,
    itemsize_of,
    legacy_root,
    unpickled,
    viewed,
    zip_members,
    zip_root,
)

Files = Mapping[str, bytes]

_DTYPE_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F4": "float4_e2m1fn_x2", "F6_E2M3": "float6_e2m3",
    "F6_E3M2": "float6_e3m2",
}  # fmt: skip
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,
}
_MAX_LEVELS = 6


def by_safetensors(raw: bytes) -> Content | None:
    """Return what the safetensors package reads; None if it refuses the file."""
    try:
        found = deserialize(raw)  # type: ignore[no-untyped-call]  # the package has no types
    except SafetensorError:
        return None
    return {
        name: Stored(_DTYPE_NAMES[told["dtype"]], tuple(told["shape"]), bytes(told["data"]))
        for name, told in found
    }


def by_torch(raw: bytes) -> Iterator[Content]:
    """Yield what every mapping in a torch file holds, as torch reads it.

    Raises:
        Exception: Of any class, if torch refuses the file.
    """
    root = torch.load(io.BytesIO(raw), weights_only=True, mmap=False)
    for mapping in _mappings(root, dict, lambda value: value.items(), set(), _MAX_LEVELS):
        yield {
            name: _stored(value)
            for name, value in mapping
            if isinstance(name, str) and isinstance(value, torch.Tensor)
        }


def _stored(value: torch.Tensor) -> Stored:
    flat = value.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return Stored(str(value.dtype).removeprefix("torch."), tuple(value.shape), raw)


def _mappings(
    value: Any,
    kind: type,
    items: Callable[[Any], Any],
    seen: set[int],
    levels: int,
) -> Iterator[list[tuple[Any, Any]]]:
    """Yield the pairs of every mapping, the outermost first."""
    if not isinstance(value, kind) or id(value) in seen or levels == 0:
        return
    seen.add(id(value))
    pairs = list(items(value))
    yield pairs
    for _, inner in pairs:
        yield from _mappings(inner, kind, items, seen, levels - 1)


def by_numpy(raw: bytes) -> Content:
    """Return what numpy reads of an ``.npz`` file, texts left out.

    Checksums are not looked at.

    Raises:
        Exception: Of any class, if numpy refuses an array.
    """
    content = {}
    for name, member in zip_members(raw).items():
        file = io.BytesIO(member)
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"there is no format {version}")
        _, _, dtype = _NPY_HEADERS[version](file)
        if dtype.kind not in "US":
            array = np.lib.format.read_array(io.BytesIO(member), allow_pickle=False)
            content[name.removesuffix(".npy")] = Stored(dtype.name, array.shape, array.tobytes())
    return content


def by_stand_ins(raw: bytes) -> Iterator[Content]:
    """Yield what every mapping in a torch file holds, of either format.

    Raises:
        Exception: Of any class, if it cannot be read so.
    """
    root, storages = zip_root(raw) if raw.startswith(b"PK") else legacy_root(raw)
    for pairs in _mappings(root, Items, lambda value: value.items, set(), _MAX_LEVELS):
        try:
            yield {
                name: viewed(value, storages)
                for name, value in pairs
                if isinstance(name, str) and isinstance(value, View)
            }
        except (ValueError, TypeError, KeyError):  # not the mapping that was read, then
            continue


# -- directories


def by_index(files: Files, index_name: str) -> Content:
    """Return what the shards hold that an index names.

    Raises:
        Exception: Of any class, if it cannot be read so.
    """
    weight_map = json.loads(files[index_name])["weight_map"]
    content: dict[str, Stored] = {}
    for shard in set(weight_map.values()):
        content |= by_safetensors(files[shard]) or {}
    if content.keys() != weight_map.keys():
        raise ValueError("the index names other tensors than the shards hold")
    return content


def by_offsets(files: Files) -> Content:
    """Return the tensors whose parts are in safetensors files that say where each begins.

    Raises:
        Exception: Of any class, if it cannot be read so.
    """
    parts: dict[str, list[tuple[Sequence[int], Stored]]] = {}
    for raw in files.values():
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        told = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        for name, stored in (by_safetensors(raw) or {}).items():
            parts.setdefault(name, []).append((told[name]["saved_offsets"], stored))
    content = {}
    for name, found in parts.items():
        reach = [np.add(first, stored.shape) for first, stored in found]
        shape = tuple(int(size) for size in np.max(reach, axis=0)) if reach[0].size else ()
        content[name] = _joined(found[0][1].dtype, shape, found)
    return content


def by_dcp_metadata(files: Files) -> Sequence[Stored]:
    """Return the tensors that the metadata of a torch.distributed.checkpoint directory describes.

    Those that cannot be put together are left out.

    Raises:
        Exception: Of any class, if it cannot be read so.
    """
    root = unpickled(io.BytesIO(files[".metadata"]))
    places = {}
    for index, info in root.field("storage_data").items:
        key = index.field("fqn"), tuple(index.field("offset") or ())
        places[key] = info
    found = []
    for name, told in root.field("state_dict_metadata").items:
        try:
            found.append(_described(name, told, places, files))
        except Exception:  # of any class: nothing here checks anything beforehand
            continue
    return found


def _described(name: str, told: Any, places: Mapping[Any, Any], files: Files) -> Stored:
    state = told.field("properties").state
    dtype = state[0] if isinstance(state, tuple) else told.field("properties").field("dtype")
    parts: dict[tuple[int, ...], tuple[Sequence[int], Stored]] = {}
    for chunk in told.field("chunks"):
        first, shape = tuple(chunk.field("offsets")), tuple(chunk.field("sizes"))
        if 0 in shape:
            continue
        place = places[name, first]
        start = place.field("offset")
        raw = files[place.field("relative_path")][start : start + place.field("length")]
        root, storages = zip_root(raw)
        stored = viewed(root, storages)
        if stored.shape != shape or stored.dtype != dtype.full_name.removeprefix("torch."):
            raise ValueError("another part")
        parts[first] = first, stored
    dtype_name = dtype.full_name.removeprefix("torch.")
    return _joined(dtype_name, tuple(told.field("size")), list(parts.values()))


def _joined(
    dtype: str, shape: tuple[int, ...], parts: Sequence[tuple[Sequence[int], Stored]]
) -> Stored:
    """Put a tensor together from parts that cover it, each element once.

    Raises:
        ValueError: If they do not.
    """
    itemsize = itemsize_of(dtype)
    if prod(shape) * itemsize > MAX_NBYTES:
        raise ValueError("much larger than the files")
    whole = np.zeros((*shape, itemsize), np.uint8)
    covered = np.zeros(shape, np.uint8)
    for first, stored in parts:
        if len(first) != len(shape) or stored.dtype != dtype:
            raise ValueError("parts that do not fit together")
        inside = tuple(
            slice(begin, begin + size) for begin, size in zip(first, stored.shape, strict=True)
        )
        part = np.frombuffer(stored.raw, np.uint8).reshape((*stored.shape, itemsize))
        whole[inside] = part
        covered[inside] += 1
    if not (covered == 1).all():
        raise ValueError("parts that overlap, or leave a hole")
    return Stored(dtype, shape, whole.tobytes())
