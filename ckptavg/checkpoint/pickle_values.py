"""What a pickle is read as: inert values, whatever it asked for."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ckptavg.tensors import DType


@dataclass(frozen=True, slots=True)
class Name:
    """A global the pickle mentions: ``module.attribute``, never looked up."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


@dataclass(slots=True)
class Pairs:
    """A mapping: its (key, value) pairs in the order they were set."""

    items: list[tuple[Any, Any]] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """Return the value set last for a string key, or None."""
        for name, value in reversed(self.items):
            if type(name) is str and name == key:
                return value
        return None

    def string_items(self) -> Iterator[tuple[str, Any]]:
        """Yield the pairs whose key is a string."""
        for key, value in self.items:
            if type(key) is str:
                yield key, value


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements that the file stores under a key; dtype None means raw bytes."""

    key: str
    dtype: DType | None
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return self.numel * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor: a strided view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A tensor of a kind that is not a plain array: quantised, sparse, on no device, ..."""

    what: str


@dataclass(slots=True)
class Inert:
    """An instance of a known harmless class; its content is kept only where it is a mapping."""

    name: str
    state: Any = None
