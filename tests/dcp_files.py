"""torch.distributed.checkpoint directories, put together by hand: any parts in any files.

torch writes them from several processes; here the parts of tensors are chosen freely, and what
``.metadata`` says of them, too.
"""

import io
import pickle
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import hostile
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

FILES = ("__0_0.distcp", "__1_0.distcp", "__2_0.distcp")
Box = tuple[tuple[int, ...], tuple[int, ...]]  # index of the first element, and shape


# -- parts of tensors


def whole(shape: Sequence[int]) -> list[Box]:
    """Return a tensor's one part."""
    return [((0,) * len(shape), tuple(shape))]


def cut(shape: Sequence[int], axis: int, edges: Sequence[int]) -> list[Box]:
    """Return the parts that an axis is cut into; equal edges leave an empty one between them."""
    bounds = [0, *edges, shape[axis]]
    boxes = []
    for low, high in pairwise(bounds):
        first, size = [0] * len(shape), list(shape)
        first[axis], size[axis] = low, high - low
        boxes.append((tuple(first), tuple(size)))
    return boxes


def grid(shape: Sequence[int], steps: int = 2) -> list[Box]:
    """Return the parts that a tensor has if every axis is cut into a few."""
    axes = [
        [(size * at // steps, size * (at + 1) // steps) for at in range(min(steps, size))]
        if size >= steps
        else [(at, at + 1) for at in range(size)]
        for size in shape
    ]
    return [
        (tuple(low for low, _ in cell), tuple(high - low for low, high in cell))
        for cell in product(*axes)
    ]


def guillotine(shape: Sequence[int], rng: random.Random, cuts: int) -> list[Box]:
    """Return parts that come of cutting one part in two, again and again."""
    boxes = whole(shape)
    for _ in range(cuts):
        first, size = boxes.pop(rng.randrange(len(boxes)))
        axes = [axis for axis, length in enumerate(size) if length > 1]
        if not axes:
            boxes.append((first, size))
            continue
        axis = rng.choice(axes)
        for begin, inner in cut(size, axis, [rng.randint(1, size[axis] - 1)]):
            moved = tuple(at + more for at, more in zip(first, begin, strict=True))
            boxes.append((moved, inner))
    rng.shuffle(boxes)
    return boxes


def part_of(value: Tensor, box: Box) -> Tensor:
    """Return one part, in storage of its own."""
    first, shape = box
    inside = tuple(slice(begin, begin + size) for begin, size in zip(first, shape, strict=True))
    return value[inside].clone(memory_format=torch.contiguous_format)


def columns_first(value: Tensor) -> Tensor:
    """Return the same values laid out column by column."""
    axes = range(value.dim() - 1, -1, -1)
    return value.permute(*axes).contiguous().permute(*axes) if value.dim() > 1 else value


def saved_bytes(value: Any) -> bytes:
    """Return what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# -- directories


@dataclass
class DcpFiles:
    """What a directory will hold; to be changed before it is written."""

    metadata: Metadata
    contents: dict[str, bytearray] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        """Write everything, and return the directory."""
        directory.mkdir(exist_ok=True, parents=True)
        for name, content in self.contents.items():
            (directory / name).write_bytes(content)
        (directory / ".metadata").write_bytes(pickle.dumps(self.metadata))
        return directory

    def stored(self, name: str, first: Sequence[int] = ()) -> _StorageInfo:
        """Return where a part lies."""
        info: _StorageInfo = self.metadata.storage_data[MetadataIndex(name, torch.Size(first))]
        return info


def dcp_files(
    saved: Mapping[str, Any],
    boxes: Callable[[str, Tensor], Sequence[Box]] = lambda _, value: whole(value.shape),
    *,
    planner: Mapping[str, tuple[str | int, ...]] | None = None,
    names: Sequence[str] = FILES,
    laid_out: Callable[[Tensor], Tensor] = lambda value: value,
) -> DcpFiles:
    """Put a directory together.

    Args:
        saved: Flat name -> tensor, or another value, as the planner flattens what is saved.
        boxes: Chooses the parts of each tensor.
        planner: Flat name -> the keys that led there; None writes none.
        names: The files, over which the parts are dealt in turn.
        laid_out: Chooses how a part lies in memory.
    """
    described: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    contents = {name: bytearray() for name in names}
    turn = 0

    def store(index: MetadataIndex, raw: bytes) -> None:
        nonlocal turn
        name = names[turn % len(names)]
        storage[index] = _StorageInfo(name, len(contents[name]), len(raw))
        contents[name] += raw
        turn += 1

    for name, value in saved.items():
        if not isinstance(value, Tensor):
            described[name] = BytesStorageMetadata()
            store(MetadataIndex(name), saved_bytes(value))
            continue
        parts = boxes(name, value)
        described[name] = TensorStorageMetadata(
            TensorProperties(dtype=value.dtype),
            value.shape,
            [ChunkStorageMetadata(torch.Size(first), torch.Size(shape)) for first, shape in parts],
        )
        for first, shape in parts:
            raw = saved_bytes(laid_out(part_of(value, (first, shape))))
            store(MetadataIndex(name, torch.Size(first)), raw)
    return DcpFiles(
        Metadata(described, None if planner is None else dict(planner), storage), contents
    )


def save_dcp(directory: Path, saved: Mapping[str, Any], *args: Any, **options: Any) -> Path:
    """Write what ``dcp_files`` puts together."""
    return dcp_files(saved, *args, **options).write(directory)


def nested_dcp(
    directory: Path, saved: Mapping[str, Mapping[str, Any] | Any], **options: Any
) -> Path:
    """Write a mapping of mappings as torch's planner flattens it."""
    flat: dict[str, Any] = {}
    planner: dict[str, tuple[str | int, ...]] = {}

    def walk(path: tuple[str | int, ...], value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk((*path, key), inner)
        else:
            name = ".".join(map(str, path))
            flat[name], planner[name] = value, path

    walk((), saved)
    return save_dcp(directory, flat, planner=planner, **options)


# -- .metadata byte by byte


@dataclass(frozen=True)
class Global:
    """A name that the pickle mentions."""

    module: str
    attribute: str


@dataclass(frozen=True)
class Call:
    """What a function returns."""

    function: Any
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Object:
    """An instance with its state; it may be a key of a dict."""

    cls: Any
    state: Any


@dataclass(frozen=True)
class Operations:
    """Operations that push a value, as they are."""

    raw: bytes


METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"


def operations(value: Any) -> bytes:
    """Return the operations that push a value."""
    match value:
        case Operations():
            return value.raw
        case Global():
            return hostile.name(value.module, value.attribute)
        case Call():
            return operations(value.function) + operations(value.arguments) + b"R"
        case Object():
            return operations(value.cls) + b")\x81" + operations(value.state) + b"b"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return hostile.number(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return hostile.text(value)
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case list():
            return b"](" + b"".join(map(operations, value)) + b"e"
        case tuple():
            return hostile.group(*map(operations, value))
        case dict():
            return hostile.mapping(
                [(operations(key), operations(inner)) for key, inner in value.items()]
            )
    raise TypeError(type(value))


def pickled(value: Any) -> bytes:
    """Return a whole pickle."""
    return hostile.pickled(operations(value))


def size(*lengths: int) -> Call:
    """Return a ``torch.Size``."""
    return Call(Global("torch", "Size"), (lengths,))


def chunk(first: Any, shape: Any) -> Object:
    """Return what is said of one part."""
    return Object(Global(METADATA, "ChunkStorageMetadata"), {"offsets": first, "sizes": shape})


def described(shape: Any, chunks: Any, dtype: Any = Global("torch", "float32")) -> Object:
    """Return what is said of one tensor."""
    properties = Object(
        Global(METADATA, "TensorProperties"),
        (
            dtype,
            Call(Global("torch.serialization", "_get_layout"), ("torch.strided",)),
            False,
            Call(Global(METADATA, "_MEM_FORMAT_ENCODING"), (0,)),
            False,
        ),
    )
    return Object(
        Global(METADATA, "TensorStorageMetadata"),
        {"properties": properties, "size": shape, "chunks": chunks},
    )


def index(name: Any, first: Any = None) -> Object:
    """Return the key of one part."""
    return Object(Global(METADATA, "MetadataIndex"), {"fqn": name, "offset": first, "index": None})


def place(file_name: Any, offset: Any, length: Any, **more: Any) -> Object:
    """Return where one part lies."""
    return Object(
        Global(FILESYSTEM, "_StorageInfo"),
        {"relative_path": file_name, "offset": offset, "length": length, **more},
    )


def metadata(state: Any, storage: Any, planner: Any = None, **more: Any) -> Object:
    """Return the whole."""
    return Object(
        Global(METADATA, "Metadata"),
        {"state_dict_metadata": state, "planner_data": planner, "storage_data": storage, **more},
    )
