"""What the ``.metadata`` of a torch.distributed.checkpoint (DCP) directory says.

It is a pickle of a few dataclasses (torch/distributed/checkpoint/metadata.py); torch's own reader
runs whatever code that pickle names, here it is read by the restricted reader.
"""

from dataclasses import dataclass
from typing import Any

from ckptavg.checkpoint.folder import is_plain_file_name
from ckptavg.checkpoint.limits import MAX_DIMENSIONS
from ckptavg.checkpoint.pickle_values import Inert, Name, Pairs
from ckptavg.checkpoint.pickles import DCP_LIMITS, read_pickle
from ckptavg.checkpoint.sharded import MAX_PARTS
from ckptavg.errors import CheckpointError
from ckptavg.tensors import DTYPE_BY_NAME, DType

METADATA_NAME = ".metadata"
_MAX_SIZE = 2**63
_MAX_DEPTH = 16
_MAX_ALL_PARTS = 1_000_000  # many tensors may share one list of them
_MAX_FIELDS = 64

_MODULE = "torch.distributed.checkpoint.metadata"
_ROOTS = (
    f"{_MODULE}.Metadata",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
)


@dataclass(frozen=True, slots=True)
class SavedEntry:
    """One entry of ``.metadata``: a tensor in parts; other values have no dtype."""

    dtype: DType | None
    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # first index and shape of each


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Where the torch file lies that holds one part."""

    file_name: str
    offset: int
    nbytes: int


class DcpMetadata:
    """What ``.metadata`` says, checked.

    Attributes:
        saved: Name -> entry.
        paths: Name -> the keys that lead to it in what was saved, where the file tells.
        stored: ``part_key`` of a part -> where it lies.
    """

    def __init__(self, raw: bytes, label: str) -> None:
        self._label = label
        self._n_parts = 0
        root = read_pickle(raw, label, DCP_LIMITS)
        if type(root) is not Inert or root.name not in _ROOTS:
            raise self._damaged("it does not hold checkpoint metadata")
        saved = self._pairs(root, "state_dict_metadata").items
        self.saved = {
            self._text(name): self._saved(self._text(name), value) for name, value in saved
        }
        if len(self.saved) != len(saved):
            raise self._damaged("it describes an entry twice")
        self.paths: dict[str, tuple[str, ...]] = {}
        planned = _field(root, "planner_data")
        if type(planned) is Pairs:
            for name, path in planned.string_items():
                if name in self.paths:
                    raise self._damaged(f"it places '{name}' twice")
                if type(path) is tuple and 0 < len(path) <= _MAX_DEPTH:
                    self.paths[name] = tuple(map(self._key, path))
        self.stored: dict[tuple[str, str], StoredPart] = {}
        for index, info in self._pairs(root, "storage_data").items:
            offset = _field(index, "offset")
            first = () if offset is None else self._numbers(offset)
            key, stored = part_key(self._text(_field(index, "fqn")), first), self._stored(info)
            if key in self.stored:
                raise self._damaged(f"a part of '{key[0]}' is stored twice")
            self.stored[key] = stored

    def _saved(self, name: str, value: Any) -> SavedEntry:
        if type(value) is not Inert:
            raise self._damaged(f"'{name}' is described by a {type(value).__name__}")
        if value.name == f"{_MODULE}.BytesStorageMetadata":
            return SavedEntry(None, (), ())
        if value.name != f"{_MODULE}.TensorStorageMetadata":
            raise self._damaged(f"'{name}' is described by a {value.name}")
        chunks = _field(value, "chunks")
        if type(chunks) is not list:
            raise self._damaged(f"'{name}' has no list of parts")
        self._n_parts += len(chunks)
        if len(chunks) > MAX_PARTS or self._n_parts > _MAX_ALL_PARTS:
            raise CheckpointError(
                f"{self._label}: '{name}' is saved in {len(chunks)} parts; at most {MAX_PARTS} of "
                f"a tensor work, {_MAX_ALL_PARTS} of all"
            )
        parts: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for one in chunks:  # replicas that were saved more than once are listed so
            first = self._numbers(_field(one, "offsets"))
            shape = self._numbers(_field(one, "sizes"))
            parts[f"{first} {shape}"] = first, shape
        return SavedEntry(
            self._dtype(name, _field(value, "properties")),
            self._numbers(_field(value, "size")),
            tuple(parts.values()),
        )

    def _dtype(self, name: str, properties: Any) -> DType:
        told = properties.state if type(properties) is Inert else None
        first = told[0] if type(told) is tuple and told else _field(properties, "dtype")
        is_torch = type(first) is Name and first.module == "torch"
        found = DTYPE_BY_NAME.get(first.attribute) if is_torch else None
        if found is None:
            raise self._damaged(f"'{name}' has no dtype that is known")
        return found

    def _stored(self, info: Any) -> StoredPart:
        file_name = _field(info, "relative_path")
        offset, nbytes = self._numbers((_field(info, "offset"), _field(info, "length")))
        if type(file_name) is not str or not is_plain_file_name(file_name):
            raise CheckpointError(
                f"{self._label}: names '{file_name}' as a file: only plain file names are allowed"
            )
        if _field(info, "transform_descriptors"):
            raise CheckpointError(
                f"{self._label}: {file_name} is compressed or encrypted by an extension; save the "
                "checkpoint without extensions"
            )
        return StoredPart(file_name, offset, nbytes)

    def _pairs(self, owner: Any, name: str) -> Pairs:
        value = _field(owner, name)
        if type(value) is not Pairs:
            raise self._damaged(f"its {name} is not a mapping")
        return value

    def _text(self, value: Any) -> str:
        if type(value) is not str:
            raise self._damaged("a name is not a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._damaged("a name is not valid Unicode") from error
        return value

    def _key(self, value: Any) -> str:
        return str(value) if type(value) is int else self._text(value)

    def _numbers(self, value: Any) -> tuple[int, ...]:
        if type(value) not in (tuple, list) or len(value) > MAX_DIMENSIONS:
            raise self._damaged("a shape is not a tuple of sizes")
        if not all(type(size) is int and 0 <= size < _MAX_SIZE for size in value):
            raise self._damaged("a shape is not a tuple of sizes")
        return tuple(value)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._label}: is damaged: {what}")


def part_key(name: str, first: tuple[int, ...]) -> tuple[str, str]:
    """Return what a part is found by: its tensor's name and its first index, as text.

    Python's hashes of integers are no secret: a file could choose many that collide.
    """
    return name, str(first)


def _field(owner: Any, name: str) -> Any:
    """Return a field of an instance that the pickle describes; None if it has no such field."""
    state = owner.state if type(owner) is Inert else None
    if type(state) is not Pairs or len(state.items) > _MAX_FIELDS:
        return None
    return state.get(name)
