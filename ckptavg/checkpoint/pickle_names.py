"""The names that a pickle may mention, and the inert values that calling them yields.

Nothing here imports or looks up what a name stands for; every other name is refused.
"""

from collections.abc import Callable
from typing import Any

from ckptavg.checkpoint.limits import MAX_DIMENSIONS
from ckptavg.checkpoint.pickle_values import Inert, Name, Pairs, Storage, TensorView, Unsupported
from ckptavg.tensors import DTYPE_BY_NAME, DType

_MAX_ARGUMENTS = 16  # no function below takes more; a shared tuple must not be unpacked repeatedly
_MAX_SIZE = 2**63

STORAGE_DTYPES = {
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


# values that are named, not called
_VALUES = frozenset(
    {f"torch.{name}" for name in DTYPE_BY_NAME}
    | {f"torch.{name}" for name in ("per_tensor_affine", "per_channel_affine", "contiguous_format")}
)
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
        "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
        "torch.device",
        "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
        "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
        "torch.distributed.checkpoint.metadata.Metadata",
        "torch.distributed.checkpoint.metadata.MetadataIndex",
        "torch.distributed.checkpoint.metadata.StorageMeta",
        "torch.distributed.checkpoint.metadata.TensorProperties",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
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
    | _VALUES
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


def is_known(name: Name) -> bool:
    """Tell whether a pickle may mention a name."""
    full = str(name)
    return (
        full in _INERT_NAMES
        or full in _CALLS
        or full in _UNSUPPORTED_TENSORS
        or (name.module in ("torch", "torch.storage") and _is_storage(name.attribute))
    )


def called(function: Name, arguments: tuple[Any, ...]) -> Any:
    """Return what calling a known name yields.

    Raises:
        TypeError: If it cannot be called, or not with such arguments.
    """
    full = str(function)
    if full in _CALLS:
        return _CALLS[full](*_bounded(arguments))
    if full in _UNSUPPORTED_TENSORS:
        return Unsupported(_UNSUPPORTED_TENSORS[full])
    if full in _INERT_NAMES and full not in _VALUES:
        return Inert(full)
    raise TypeError("calls what is not a function")


def storage(kind: Any, key: Any, numel: Any) -> Storage | Unsupported:
    """Return the storage that a persistent reference describes.

    Raises:
        TypeError: If it is damaged.
    """
    if (
        type(kind) is not Name
        or not _is_storage(kind.attribute)
        or type(key) is not str
        or type(numel) is not int
        or numel < 0
    ):
        raise TypeError("a damaged storage reference")
    if kind.attribute in _QUANTISED_STORAGES:
        return Unsupported("quantised")
    dtype_name = STORAGE_DTYPES.get(kind.attribute)
    return Storage(key, DTYPE_BY_NAME[dtype_name] if dtype_name else None, numel)


def _is_storage(attribute: str) -> bool:
    return (
        attribute in STORAGE_DTYPES
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
    if len(shape) > MAX_DIMENSIONS:
        return Unsupported(f"of more than {MAX_DIMENSIONS} dimensions")
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


def instance(cls: Any, *_rest: Any) -> Any:
    """Return what making an instance of a class yields.

    Raises:
        TypeError: If it is not a class that may be named.
    """
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
    "torch.Size": lambda size=(): size if type(size) is tuple else Inert("torch.Size"),
    "copyreg._reconstructor": instance,
    "copy_reg._reconstructor": instance,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Tensor": lambda *_: Unsupported("of a tensor subclass"),
    "torch.nn.parameter.Parameter": lambda *_: Unsupported("of a tensor subclass"),
}
