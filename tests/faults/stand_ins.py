"""A second reader of torch files: Python's own unpickler, with every name replaced by a stand-in.

Nothing that a pickle names is ever looked up. It is for what is accepted already: it trusts sizes.
"""

import io
import pickle
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

MAX_NBYTES = 2**20  # of a tensor; files are much smaller


class Stored(NamedTuple):
    """A tensor: torch's name of its dtype, its shape and its row-major bytes."""

    dtype: str
    shape: tuple[int, ...]
    raw: bytes


Content = Mapping[str, Stored]

# -- zip files


class _Member(NamedTuple):
    name: str
    data: bytes
    attributes: int


def _zip_entries(raw: bytes) -> list[_Member]:
    """Return the members of a zip file, by what its directory says of name, size and place alone.

    zipfile is not asked: it looks at versions, checksums and numbers of disks, too.
    """
    end = raw.rindex(b"PK\x05\x06")
    (position,) = struct.unpack_from("<I", raw, end + 16)
    if raw[end - 20 : end - 16] == b"PK\x06\x07":
        (position,) = struct.unpack_from("<Q", raw, end - 20 - 56 + 48)
    members = []
    while raw[position : position + 4] == b"PK\x01\x02":
        stored, size, *lengths = struct.unpack_from("<IIHHH", raw, position + 20)
        attributes, offset = struct.unpack_from("<II", raw, position + 38)
        begins = list(accumulate(lengths, initial=position + 46))
        name, extra = raw[begins[0] : begins[1]], raw[begins[1] : begins[2]]
        if 2**32 - 1 in (stored, size, offset):
            _, size, offset = _wide(extra, (stored, size, offset))
        start = offset + 30 + sum(struct.unpack_from("<HH", raw, offset + 26))
        members.append(_Member(name.decode(), raw[start : start + size], attributes))
        position = begins[3]
    return members


def _wide(extra: bytes, narrow: Sequence[int]) -> list[int]:
    """Return sizes and place, those of 64 bits from the field that has them."""
    while (tag := int.from_bytes(extra[:2], "little")) != 1:
        if not extra:
            raise ValueError(f"no field 1 after field {tag}")
        extra = extra[4 + int.from_bytes(extra[2:4], "little") :]
    values = iter(struct.unpack_from(f"<{len(extra[4:]) // 8}Q", extra, 4))
    return [next(values) if one == 2**32 - 1 else one for one in narrow]


def zip_members(raw: bytes) -> dict[str, bytes]:
    return {member.name: member.data for member in _zip_entries(raw)}


def marks_folders(raw: bytes) -> bool:
    """Tell whether a zip file marks a member as a folder, as MS-DOS does."""
    return raw.startswith(b"PK") and any(member.attributes & 0x10 for member in _zip_entries(raw))


# -- pickles


class StandIn:
    """An instance of whatever a pickle names, with its state."""

    full_name = ""

    def __new__(cls, *_: Any, **__: Any) -> "StandIn":
        made = super().__new__(cls)
        made.state = None
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Drop it."""

    def append(self, value: Any) -> None:
        """Drop it."""

    extend = add = append

    def field(self, name: str) -> Any:
        """Return an attribute that its state gives it."""
        items = self.state.items if isinstance(self.state, Items) else []
        return next((value for key, value in reversed(items) if key == name), None)


class Items(StandIn):
    """A mapping: its pairs, hashed nowhere."""

    def __new__(cls, *_: Any, **__: Any) -> "Items":
        made = object.__new__(cls)
        made.items = []
        return made

    def __init__(self, items: Any = (), *_: Any) -> None:
        pairs = items if isinstance(items, list) else []
        self.items: list[tuple[Any, Any]] = [(key, value) for key, value in pairs]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __setstate__(self, state: Any) -> None:
        """Drop it."""


class View(NamedTuple):
    """A tensor as its arguments describe it."""

    storage: tuple[str, str, int]  # kind, key, elements
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None

    def __setstate__(self, state: Any) -> None:
        """Drop it."""


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> View:
    return View(storage, offset, tuple(shape), tuple(strides), None)


def _rebuilt_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any
) -> View:
    return View(storage, offset, tuple(shape), tuple(strides), dtype.full_name)


_FUNCTIONS: Mapping[str, Any] = {
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_tensor_v3": _rebuilt_v3,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda function, _, arguments, *__: function(*arguments),
    "torch.Size": lambda sizes=(): sizes,
    "collections.OrderedDict": Items,
    "collections.defaultdict": type("defaultdict", (Items,), {"__init__": lambda *_: None}),
    "builtins.dict": Items,
    "__builtin__.dict": Items,
    "copyreg._reconstructor": lambda cls, *_: cls(),
    "copy_reg._reconstructor": lambda cls, *_: cls(),
}


_PythonUnpickler: Any = vars(pickle)["_Unpickler"]  # not the one in C: operations are replaced


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]  # its class is private
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.storages: dict[str, tuple[str, str, int]] = {}

    def find_class(self, module: str, attribute: str) -> Any:
        full_name = f"{module}.{attribute}"
        if full_name in _FUNCTIONS:
            return _FUNCTIONS[full_name]
        return type("Named", (StandIn,), {"full_name": full_name})

    def persistent_load(self, identity: Any) -> tuple[str, str, int]:
        _, kind, key, _, numel, *_ = identity
        storage = kind.full_name.rpartition(".")[2], key, numel
        self.storages.setdefault(key, storage)
        return storage

    def load_empty_dictionary(self) -> None:
        self.append(Items())

    def load_dict(self) -> None:
        flat = self.pop_mark()
        self.append(Items(list(zip(flat[::2], flat[1::2], strict=True))))

    def load_nothing(self) -> None:
        self.append(StandIn())

    def load_protocol(self) -> None:
        self.read(1)

    def load_frame(self) -> None:
        self.read(8)

    def load_new_object(self) -> None:
        self.stack.pop()  # arguments, whatever they are
        self.append(self.stack.pop()())

    def load_new_object_with_keywords(self) -> None:
        self.stack.pop()
        self.load_new_object()

    def load_add_items(self) -> None:
        items = self.pop_mark()
        self.stack[-1].extend(items)

    dispatch[pickle.ADDITEMS[0]] = load_add_items
    dispatch[pickle.NEWOBJ[0]] = load_new_object
    dispatch[pickle.NEWOBJ_EX[0]] = load_new_object_with_keywords
    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.EMPTY_SET[0]] = load_nothing
    dispatch[pickle.PROTO[0]] = load_protocol
    dispatch[pickle.FRAME[0]] = load_frame


def unpickled(file: io.BytesIO) -> Any:
    return _Unpickler(file).load()


def zip_root(raw: bytes) -> tuple[Any, Mapping[str, bytes]]:
    members = zip_members(raw)
    (name,) = [one for one in members if one.endswith("/data.pkl") and one.count("/") == 1]
    top = name.removesuffix("data.pkl")
    root = unpickled(io.BytesIO(members[name]))
    prefix = f"{top}data/"
    return root, {
        one.removeprefix(prefix): content
        for one, content in members.items()
        if one.startswith(prefix)
    }


def legacy_root(raw: bytes) -> tuple[Any, Mapping[str, bytes]]:
    """Return the root of a torch file of the old format, and its storages by key."""
    file = io.BytesIO(raw)
    for _ in range(3):
        unpickled(file)
    unpickler = _Unpickler(file)
    root = unpickler.load()
    storages = {}
    for key in unpickled(file):
        file.read(8)
        kind, _, numel = unpickler.storages[key]
        storages[key] = file.read(numel * itemsize_of(_storage_dtype(kind)))
    return root, storages


def storages_named(raw: bytes) -> dict[str, int]:
    """Return the elements of every storage that a pickle refers to, by key."""
    unpickler = _Unpickler(io.BytesIO(raw))
    unpickler.load()
    return {key: numel for key, (_, _, numel) in unpickler.storages.items()}


def _storage_dtype(kind: str) -> str | None:
    """Return the dtype of a kind of storage; None for bytes of no kind."""
    if kind in ("UntypedStorage", "_UntypedStorage"):
        return None
    return str(getattr(torch, kind).dtype).removeprefix("torch.")


def itemsize_of(dtype: str | None) -> int:
    found: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    return 1 if found is None else found.itemsize


def viewed(view: View, storages: Mapping[str, bytes]) -> Stored:
    """Return the tensor that a view is, if its storage holds all of it.

    Raises:
        ValueError: If it does not.
    """
    kind, key, numel = view.storage
    dtype = (view.dtype or "").removeprefix("torch.") or _storage_dtype(kind)
    if dtype is None:
        raise ValueError("a tensor without a dtype")
    if prod(view.shape) == 0:
        return Stored(dtype, view.shape, b"")
    itemsize = itemsize_of(dtype)
    elements = np.frombuffer(storages[key], np.uint8)
    last = view.offset + sum(
        (size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)
    )
    if (
        len(elements) != numel * itemsize_of(_storage_dtype(kind))
        or (last + 1) * itemsize > len(elements)
        or prod(view.shape) * itemsize > min(len(elements), MAX_NBYTES)
    ):
        raise ValueError("reaches past its storage")
    strided = np.lib.stride_tricks.as_strided(
        elements[view.offset * itemsize :],
        (*view.shape, itemsize),
        (*(stride * itemsize for stride in view.strides), 1),
    )
    return Stored(dtype, view.shape, strided.tobytes())
