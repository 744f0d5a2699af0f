"""The values that cross module borders: dtypes, tensor descriptions, pieces of tensors."""

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

Kind = Literal["float", "complex", "integer", "bool", "quantised"]
OutputFormat = Literal["safetensors", "torch"]


@dataclass(frozen=True, slots=True)
class DType:
    """A tensor's element type.

    Attributes:
        name: torch's name, such as ``bfloat16``.
        code: safetensors' code, such as ``BF16``; None if safetensors cannot store the type.
        bits: Bits per element; 4 and 6 occur among the quantised types.
        kind: What may be done with it: only ``float`` and ``complex`` are averaged.
    """

    name: str
    code: str | None
    bits: int
    kind: Kind

    @property
    def itemsize(self) -> int:
        """Bytes per element (of a whole number of bytes)."""
        return self.bits // 8

    @property
    def part(self) -> "DType":
        """What arithmetic works on: a complex number is a pair of them, any other one itself."""
        return _PARTS.get(self, self)

    def __str__(self) -> str:
        return self.name


BOOL = DType("bool", "BOOL", 8, "bool")
UINT8 = DType("uint8", "U8", 8, "integer")
INT8 = DType("int8", "I8", 8, "integer")
FLOAT16 = DType("float16", "F16", 16, "float")
BFLOAT16 = DType("bfloat16", "BF16", 16, "float")
FLOAT32 = DType("float32", "F32", 32, "float")
FLOAT64 = DType("float64", "F64", 64, "float")
COMPLEX32 = DType("complex32", None, 32, "complex")
COMPLEX64 = DType("complex64", "C64", 64, "complex")
COMPLEX128 = DType("complex128", None, 128, "complex")
_PARTS = {COMPLEX64: FLOAT32, COMPLEX128: FLOAT64}

_DTYPES = (
    BOOL,
    UINT8,
    INT8,
    DType("uint16", "U16", 16, "integer"),
    DType("int16", "I16", 16, "integer"),
    DType("uint32", "U32", 32, "integer"),
    DType("int32", "I32", 32, "integer"),
    DType("uint64", "U64", 64, "integer"),
    DType("int64", "I64", 64, "integer"),
    FLOAT16,
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    COMPLEX32,
    COMPLEX64,
    COMPLEX128,
    DType("float8_e5m2", "F8_E5M2", 8, "quantised"),
    DType("float8_e4m3fn", "F8_E4M3", 8, "quantised"),
    DType("float8_e8m0fnu", "F8_E8M0", 8, "quantised"),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 8, "quantised"),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 8, "quantised"),
    DType("float4_e2m1fn_x2", "F4", 4, "quantised"),
    DType("float6_e2m3", "F6_E2M3", 6, "quantised"),
    DType("float6_e3m2", "F6_E3M2", 6, "quantised"),
)
DTYPE_BY_NAME = {dtype.name: dtype for dtype in _DTYPES}
DTYPE_BY_CODE = {dtype.code: dtype for dtype in _DTYPES if dtype.code is not None}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype and shape of one stored tensor."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-dimensional tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the row-major data."""
        return self.numel * self.dtype.bits // 8


class Piece(NamedTuple):
    """Bytes ``[start, stop)`` of the row-major data of the tensor ``name``."""

    name: str
    start: int
    stop: int


class FileStamp(NamedTuple):
    """What identifies one input file's content without reading it.

    ``mtime_ns`` is nanoseconds since the epoch; ``size`` is bytes; ``digest`` is what the Hub
    tells of a file's content, as ``sha256:...`` or ``git-sha1:...``, and empty for local files.
    """

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    digest: str = ""

    @property
    def identity(self) -> tuple[int, int] | str:
        """What two names of one content have in common."""
        return self.digest or (self.device, self.inode)

    @property
    def holds_weights(self) -> bool:
        """Whether it is more than a description of other files."""
        return not self.path.endswith(".json")


class HubRevision(NamedTuple):
    """A model on the Hub, at one commit.

    Attributes:
        repo: ``org/name``.
        revision: What was asked for: a branch, a tag, ``main~3`` or a commit.
        commit: The full commit SHA it stands for.
        path: Folder or file in the repository; empty for its root.
        title: First line of the commit's message, where it was looked up.
    """

    repo: str
    revision: str
    commit: str
    path: str = ""
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What is on the Hub now.

    Attributes:
        repo: ``org/name``.
        revision: The branch; for a pull request its reference, such as ``refs/pr/1``.
        commit: The full SHA of its last commit.
        url: Where to look at it.
        changed: Whether a commit was made; False if all was there already.
    """

    repo: str
    revision: str
    commit: str
    url: str
    changed: bool
