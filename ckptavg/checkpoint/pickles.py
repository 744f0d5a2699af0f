"""A reader of the pickles inside torch files that cannot run code, whatever the file says.

The opcodes of a pickle describe a program for a stack machine. This machine builds only inert
values: numbers, strings, containers, and descriptions of tensors. A name such as ``os.system`` is
never looked up anywhere; a name outside the list below ends the reading with an error.

Mappings become lists of pairs, so nothing from the file is ever hashed but short scalars; nothing
is copied, so the size of the pickle bounds the memory.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.tensors import DTYPE_BY_NAME, DType

_MAX_OPERATIONS = 10_000_000
_MAX_INTEGER_BYTES = 64
_MAX_ARGUMENTS = (
    16  # no function below takes more; a shared tuple must not be unpacked over and over
)
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**63

_STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "Float8_e5m2Storage": "float8_e5m2",
    "Float8_e4m3fnStorage": "float8_e4m3fn",
}
_QUANTISED_STORAGES = {
    "QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage",
}  # fmt: skip


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
    """A run of elements in the member ``data/<key>``; dtype None means raw bytes."""

    key: str
    dtype: DType | None
    numel: int


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


class _Mark:
    """The marker that opens a group of stack items."""


_MARK = _Mark()

# Classes and functions that only describe data. Calling one makes an Inert value.
_INERT_NAMES = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "types.SimpleNamespace",
        "collections.Counter",
        "collections.deque",
        "collections.defaultdict",
        "datetime.date",
        "datetime.datetime",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "decimal.Decimal",
        "fractions.Fraction",
        "uuid.UUID",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib.PurePath",
        "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.numeric._frombuffer",
        "numpy.core.numeric._frombuffer",
        "numpy.dtype",
        "numpy.ndarray",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "omegaconf.nodes.BooleanNode",
        "omegaconf.nodes.BytesNode",
        "omegaconf.nodes.EnumNode",
        "omegaconf.nodes.FloatNode",
        "omegaconf.nodes.IntegerNode",
        "omegaconf.nodes.PathNode",
        "omegaconf.nodes.StringNode",
        "lightning_fabric.utilities.data.AttributeDict",
        "lightning.fabric.utilities.data.AttributeDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "lightning_utilities.core.enums.StrEnum",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "typing.Any",
        "typing.Dict",
        "typing.List",
        "typing.Optional",
        "typing.Union",
    }
    | {
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in (
            "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list",
            "object", "range", "xrange", "set", "slice", "str", "tuple", "unicode", "long",
        )
    }
    | {f"torch.{name}" for name in DTYPE_BY_NAME}
    | {f"torch.{name}" for name in ("per_tensor_affine", "per_channel_affine", "contiguous_format")}
)  # fmt: skip

_UNSUPPORTED_TENSORS = {
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "on the meta device: it has no values",
    "torch._utils._rebuild_wrapper_subclass": "of a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "stored as a numpy array",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "stored through another device",
    "torch._utils._rebuild_xla_tensor": "stored as a numpy array",
}


def read_pickle(raw: bytes, label: str) -> Any:
    """Return the inert value that a pickle describes.

    Args:
        raw: The whole pickle.
        label: What messages call the file.

    Returns:
        Numbers, strings, bytes, None, lists, tuples, ``Pairs``, ``TensorView``, ``Storage``,
        ``Unsupported``, ``Name`` or ``Inert`` values, nested. Nesting may be deep or cyclic.

    Raises:
        CheckpointError: If the pickle is damaged, or needs anything beyond describing data.
    """
    try:
        return _Machine(raw, label).run()
    except (IndexError, KeyError, ValueError, TypeError, struct.error, OverflowError) as error:
        # every malformed program ends here: an empty stack, a missing memo entry, a cut argument
        raise CheckpointError(f"{label}: its pickle is damaged ({type(error).__name__})") from error


class _Machine:
    def __init__(self, raw: bytes, label: str) -> None:
        self._raw = raw
        self._label = label
        self._at = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        raw, operations = self._raw, _OPERATIONS
        for _ in range(_MAX_OPERATIONS):
            code = raw[self._at]
            self._at += 1
            if code == _STOP:
                value = self.pop()
                if self._stack:
                    raise ValueError("values left over")
                return value
            operation = operations.get(code)
            if operation is None:
                raise self._refuse(
                    f"uses the pickle operation 0x{code:02x}, which torch never writes"
                )
            operation(self)
        raise self._refuse(f"its pickle has more than {_MAX_OPERATIONS} operations")

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._label}: {what}")

    # -- arguments in the byte stream

    def take(self, count: int) -> bytes:
        end = self._at + count
        if count < 0 or end > len(self._raw):
            raise ValueError("argument reaches past the end")
        value = self._raw[self._at : end]
        self._at = end
        return value

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self, encoding: str = "utf-8") -> str:
        end = self._raw.index(b"\n", self._at)
        value = self._raw[self._at : end].decode(encoding)
        self._at = end + 1
        return value

    def quoted_line(self) -> str:
        text = self.line("ascii")
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or "\\" in text:
            raise ValueError("a text that is not quoted, or needs unescaping")
        return text[1:-1]

    # -- the stack

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value is expected")
        return value

    def pop_group(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        group = stack[at + 1 :]
        del stack[at:]
        return group

    def top(self) -> Any:
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("a mark where a value is expected")
        return value

    # -- operations with a meaning of their own

    def mark(self) -> None:
        self._stack.append(_MARK)

    def store(self, index: int) -> None:
        self._memo[index] = self.top()

    def load(self, index: int) -> None:
        self.push(self._memo[index])

    def integer(self, nbytes: int) -> None:
        if nbytes > _MAX_INTEGER_BYTES:
            raise self._refuse(f"its pickle holds an integer of {nbytes} bytes")
        self.push(int.from_bytes(self.take(nbytes), "little", signed=True))

    def integer_line(self) -> None:
        text = self.line().removesuffix("L")
        if len(text) > 3 * _MAX_INTEGER_BYTES:
            raise self._refuse("its pickle holds an integer that is too long")
        self.push({"00": False, "01": True}.get(text) if text in ("00", "01") else int(text))

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(values)
        elif type(target) is not Inert:  # content of sets and other harmless containers is dropped
            raise TypeError("appends to a value that is not a list")

    def set_items(self, flat: list[Any]) -> None:
        target = self.top()
        if type(target) is Inert:
            return
        if type(target) is not Pairs or len(flat) % 2:
            raise TypeError("sets items of a value that is not a mapping")
        target.items.extend(zip(flat[::2], flat[1::2], strict=True))

    def mapping(self) -> None:
        flat = self.pop_group()
        self.push(Pairs())
        self.set_items(flat)

    def inert_group(self) -> None:
        self.pop_group()
        self.push(Inert("frozenset"))

    def find_name(self, module: str, attribute: str) -> None:
        name = Name(module, attribute)
        full = str(name)
        if not (
            full in _INERT_NAMES
            or full in _CALLS
            or full in _UNSUPPORTED_TENSORS
            or (module in ("torch", "torch.storage") and _is_storage(attribute))
        ):
            raise self._refuse(
                f"needs Python code '{full}', which is never run; save the weights alone "
                "(torch.save(model.state_dict(), ...)) and average those files"
            )
        self.push(name)

    def stack_name(self) -> None:
        attribute, module = self.pop(), self.pop()
        if type(module) is not str or type(attribute) is not str:
            raise TypeError("a name that is not a string")
        self.find_name(module, attribute)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise TypeError("calls a value that is not a name")
        full = str(function)
        if full in _CALLS:
            self.push(_CALLS[full](*_bounded(arguments)))
        elif full in _UNSUPPORTED_TENSORS:
            self.push(Unsupported(_UNSUPPORTED_TENSORS[full]))
        elif full in _INERT_NAMES:
            self.push(Inert(full))
        else:
            raise TypeError("calls a storage")

    def new_object(self) -> None:
        _arguments, cls = self.pop(), self.pop()
        self.push(_instance(cls))

    def new_object_with_keywords(self) -> None:
        self.pop()
        self.new_object()

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is Inert:
            target.state = state
        elif not isinstance(target, (Pairs, TensorView, Unsupported)):
            raise TypeError("sets the state of a plain value")

    def persistent(self) -> None:
        identity = self.pop()
        if type(identity) is not tuple or len(identity) < 5 or identity[0] != "storage":
            raise TypeError("an unknown persistent reference")
        _, kind, key, _location, numel = identity[:5]
        if type(kind) is not Name or type(key) is not str or type(numel) is not int or numel < 0:
            raise TypeError("a damaged storage reference")
        if kind.attribute in _QUANTISED_STORAGES:
            self.push(Unsupported("quantised"))
            return
        dtype_name = _STORAGE_DTYPES.get(kind.attribute)
        self.push(Storage(key, DTYPE_BY_NAME[dtype_name] if dtype_name else None, numel))


def _is_storage(attribute: str) -> bool:
    return (
        attribute in _STORAGE_DTYPES
        or attribute in _QUANTISED_STORAGES
        or attribute in ("UntypedStorage", "_UntypedStorage")
    )


def _ordered_mapping(items: Any = (), *_rest: Any) -> Pairs:
    pairs = Pairs()
    if type(items) is list:  # OrderedDict([[key, value], ...]), as Python 2 wrote it
        for item in items:
            if type(item) not in (list, tuple) or len(item) != 2:
                raise TypeError("a damaged mapping")
            pairs.items.append((item[0], item[1]))
        items.clear()  # moved, not copied: many mappings made of one list must not multiply it
    return pairs


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any = None,
    _hooks: Any = None,
    metadata: Any = None,
) -> Any:
    dtype = storage.dtype if type(storage) is Storage else None
    return _view(storage, offset, shape, strides, dtype, metadata)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    known = DTYPE_BY_NAME.get(dtype.attribute) if type(dtype) is Name else None
    return _view(storage, offset, shape, strides, known, metadata)


def _view(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: DType | None, metadata: Any
) -> Any:
    if type(storage) is Unsupported:
        return storage
    if type(storage) is not Storage or dtype is None or type(offset) is not int or offset < 0:
        raise TypeError("a damaged tensor")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise TypeError("a damaged tensor")
    if len(shape) > _MAX_DIMENSIONS:
        return Unsupported(f"of more than {_MAX_DIMENSIONS} dimensions")
    if not all(type(size) is int and 0 <= size < _MAX_SIZE for size in (*shape, *strides)):
        raise TypeError("a damaged tensor")
    if dtype.bits < 8:
        return Unsupported("quantised")
    if type(metadata) is Pairs and metadata.items:  # {"conj": True}: the bytes are not the values
        return Unsupported("stored with a conjugation or negation still to be applied")
    return TensorView(storage, dtype, offset, shape, strides)


def _bounded(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(arguments) > _MAX_ARGUMENTS:
        raise TypeError("too many arguments")
    return arguments


def _rebuild_parameter(tensor: Any, *_rest: Any) -> Any:
    return tensor


def _rebuild_from_type(function: Any, _cls: Any, arguments: Any, *_rest: Any) -> Any:
    # a tensor with attributes of its own: the function and arguments are those of a plain one
    if type(function) is not Name or type(arguments) is not tuple:
        raise TypeError("a damaged tensor")
    rebuild = _REBUILDERS.get(str(function))
    return rebuild(*_bounded(arguments)) if rebuild else Unsupported("of a tensor subclass")


def _instance(cls: Any, *_rest: Any) -> Any:
    full = str(cls) if type(cls) is Name else ""
    if full in _MAPPINGS:
        return Pairs()
    if full in _INERT_NAMES:
        return Inert(full)
    if full in _TENSOR_CLASSES:
        return Unsupported("of a tensor subclass")
    raise TypeError("makes an instance of a value that is not a class")


_MAPPINGS = frozenset(
    {"collections.OrderedDict", "builtins.dict", "__builtin__.dict", "collections.defaultdict"}
)
_TENSOR_CLASSES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
_REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
}
_CALLS: dict[str, Callable[..., Any]] = _REBUILDERS | {
    "collections.OrderedDict": _ordered_mapping,
    "collections.defaultdict": lambda *_: Pairs(),
    "builtins.dict": _ordered_mapping,
    "__builtin__.dict": _ordered_mapping,
    "copyreg._reconstructor": _instance,
    "copy_reg._reconstructor": _instance,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Tensor": lambda *_: Unsupported("of a tensor subclass"),
    "torch.nn.parameter.Parameter": lambda *_: Unsupported("of a tensor subclass"),
}

_STOP = ord(".")
_OPERATIONS: dict[int, Callable[[_Machine], object]] = {
    ord(code): operation
    for code, operation in {
        "\x80": lambda m: m.take(1),  # PROTO
        "\x95": lambda m: m.take(8),  # FRAME
        "(": _Machine.mark,  # MARK
        "0": lambda m: m._stack.pop(),  # POP: a value or a mark
        "1": lambda m: m.pop_group(),  # POP_MARK
        "2": lambda m: m.push(m.top()),  # DUP
        "N": lambda m: m.push(None),  # NONE
        "\x88": lambda m: m.push(True),  # NEWTRUE
        "\x89": lambda m: m.push(False),  # NEWFALSE
        "I": _Machine.integer_line,  # INT
        "L": _Machine.integer_line,  # LONG
        "J": lambda m: m.push(m.number("<i")),  # BININT
        "K": lambda m: m.push(m.number("<B")),  # BININT1
        "M": lambda m: m.push(m.number("<H")),  # BININT2
        "\x8a": lambda m: m.integer(m.number("<B")),  # LONG1
        "\x8b": lambda m: m.integer(m.number("<I")),  # LONG4
        "F": lambda m: m.push(float(m.line())),  # FLOAT
        "G": lambda m: m.push(m.number(">d")),  # BINFLOAT
        "V": lambda m: m.push(m.line("raw-unicode-escape")),  # UNICODE
        "X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
        "\x8c": lambda m: m.push(m.take(m.number("<B")).decode("utf-8", "surrogatepass")),
        "\x8d": lambda m: m.push(m.take(m.number("<Q")).decode("utf-8", "surrogatepass")),
        "S": lambda m: m.push(m.quoted_line()),  # STRING
        "T": lambda m: m.push(m.take(m.number("<I")).decode("latin-1")),  # BINSTRING
        "U": lambda m: m.push(m.take(m.number("<B")).decode("latin-1")),  # SHORT_BINSTRING
        "B": lambda m: m.push(m.take(m.number("<I"))),  # BINBYTES
        "C": lambda m: m.push(m.take(m.number("<B"))),  # SHORT_BINBYTES
        "\x8e": lambda m: m.push(m.take(m.number("<Q"))),  # BINBYTES8
        "\x96": lambda m: m.push(m.take(m.number("<Q"))),  # BYTEARRAY8
        "]": lambda m: m.push([]),  # EMPTY_LIST
        "l": lambda m: m.push(m.pop_group()),  # LIST
        "a": lambda m: m.append([m.pop()]),  # APPEND
        "e": lambda m: m.append(m.pop_group()),  # APPENDS
        ")": lambda m: m.push(()),  # EMPTY_TUPLE
        "t": lambda m: m.push(tuple(m.pop_group())),  # TUPLE
        "\x85": lambda m: m.push((m.pop(),)),  # TUPLE1
        "\x86": lambda m: m.push((m.pop(), m.pop())[::-1]),  # TUPLE2
        "\x87": lambda m: m.push((m.pop(), m.pop(), m.pop())[::-1]),  # TUPLE3
        "}": lambda m: m.push(Pairs()),  # EMPTY_DICT
        "d": _Machine.mapping,  # DICT
        "s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),  # SETITEM
        "u": lambda m: m.set_items(m.pop_group()),  # SETITEMS
        "\x8f": lambda m: m.push(Inert("set")),  # EMPTY_SET
        "\x90": lambda m: m.append(m.pop_group()),  # ADDITEMS
        "\x91": _Machine.inert_group,  # FROZENSET
        "g": lambda m: m.load(int(m.line())),  # GET
        "h": lambda m: m.load(m.number("<B")),  # BINGET
        "j": lambda m: m.load(m.number("<I")),  # LONG_BINGET
        "p": lambda m: m.store(int(m.line())),  # PUT
        "q": lambda m: m.store(m.number("<B")),  # BINPUT
        "r": lambda m: m.store(m.number("<I")),  # LONG_BINPUT
        "\x94": lambda m: m.store(len(m._memo)),  # MEMOIZE
        "c": lambda m: m.find_name(m.line(), m.line()),  # GLOBAL
        "\x93": _Machine.stack_name,  # STACK_GLOBAL
        "R": _Machine.call,  # REDUCE
        "b": _Machine.build,  # BUILD
        "\x81": _Machine.new_object,  # NEWOBJ
        "\x92": _Machine.new_object_with_keywords,  # NEWOBJ_EX
        "Q": _Machine.persistent,  # BINPERSID
    }.items()
}
