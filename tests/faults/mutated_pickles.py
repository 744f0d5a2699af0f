"""Changes of pickles, operation by operation: most mutants are whole programs that differ."""

import pickletools
import struct
from collections.abc import Callable, Sequence
from functools import cache
from random import Random

import hostile

from faults.mutated_bytes import EDGES, n_changes, nudged

Operations = list[bytes]

_NAMES = (
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"), ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_sparse_tensor"), ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "FloatStorage"),
    ("torch", "HalfStorage"), ("torch", "DoubleStorage"), ("torch", "LongStorage"),
    ("torch", "ByteStorage"), ("torch", "BoolStorage"), ("torch", "BFloat16Storage"),
    ("torch", "QInt8Storage"), ("torch", "ComplexFloatStorage"), ("torch", "IntStorage"),
    ("torch.storage", "UntypedStorage"), ("torch.storage", "TypedStorage"), ("torch", "Size"),
    ("torch", "float32"), ("torch", "float16"), ("torch", "int64"), ("torch", "uint16"),
    ("torch", "float4_e2m1fn_x2"), ("torch", "Tensor"), ("torch", "device"),
    ("torch.nn.parameter", "Parameter"), ("collections", "OrderedDict"), ("collections", "Counter"),
    ("collections", "defaultdict"), ("builtins", "dict"), ("builtins", "set"),
    ("builtins", "bytearray"), ("builtins", "int"), ("__builtin__", "dict"), ("_codecs", "encode"),
    ("copyreg", "_reconstructor"), ("datetime", "date"), ("pathlib", "PosixPath"),
    ("numpy", "dtype"), ("numpy", "ndarray"), ("numpy._core.multiarray", "scalar"),
    ("torch.serialization", "_get_layout"), ("os", "getpid"), ("builtins", "eval"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("", ""), ("torch", ""), ("a\nb", "c"), ("torch", "nn.Module"), ("\x1b[2J", "x"),
)  # fmt: skip
_TEXTS = (
    "", "0", "1", "storage", "cpu", "cuda:0", "w", "v", "model", "state_dict", "ema", "optimizer",
    "epoch", "global_step", "fqn", "offset", "length", "relative_path", "size", "chunks", "../0",
    "a\nb", "\ud800", "\x1b]0;x\x07", "\u202egnp", "n" * 300, "0/../1", ".metadata",
    "__0_0.distcp", "state_dict_metadata", "storage_data", "conj", "little_endian",
)  # fmt: skip
_SIMPLE = tuple(b"(012N\x88\x89)]}tledsua\x85\x86\x87\x8f\x90\x91\x94\x93RboiQ\x81\x92P.\x97\x98")
_INTEGERS = frozenset(b"KMJIL\x8a\x8b")
_STRINGS = frozenset(b"XUTVSBC\x8c\x8d\x8e\x96")
_MEMO = frozenset(b"qrhjgp")


@cache
def operations_of(raw: bytes) -> Sequence[bytes]:
    """Return the operations of a pickle, without the frames that only say how long it is."""
    found = list(pickletools.genops(raw))
    starts = [position or 0 for _, _, position in found]
    return tuple(
        raw[start:end]
        for (operation, _, _), start, end in zip(
            found, starts, [*starts[1:], len(raw)], strict=True
        )
        if operation.name != "FRAME"
    )


def mutated_pickle(rng: Random, raw: bytes, others: Sequence[bytes]) -> bytes:
    """Return a pickle with some operations changed.

    Args:
        rng: Decides everything.
        raw: The pickle to begin with.
        others: Pickles that operations are taken from.
    """
    operations = list(operations_of(raw))
    for _ in range(n_changes(rng)):
        rng.choice(_CHANGES)(rng, operations, others)
    return b"".join(operations)


def integer(rng: Random, value: int) -> bytes:
    """Push an integer, in one of the ways that fit it, or nearly."""
    ways = [hostile.number(value), b"I%d\n" % value, b"L%dL\n" % value]
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    ways.append(b"\x8b" + struct.pack("<I", len(raw)) + raw)
    for code, low, high, layout in (
        (b"K", 0, 2**8, "<B"), (b"M", 0, 2**16, "<H"), (b"J", -(2**31), 2**31, "<i"),
    ):  # fmt: skip
        if low <= value < high:
            ways += 4 * [code + struct.pack(layout, value)]
    return rng.choice(ways)


def string(rng: Random, value: str) -> bytes:
    """Push a text, in one of the ways there are; some are of bytes, not of text."""
    raw = value.encode("utf-8", "surrogatepass")
    length = struct.pack("<I", len(raw))
    short = bytes([len(raw) % 256])
    return rng.choice(
        (
            b"X" + length + raw,
            b"X" + length + raw,
            b"\x8c" + short + raw,
            b"\x8d" + struct.pack("<Q", len(raw)) + raw,
            b"V" + raw + b"\n",
            b"S'" + raw + b"'\n",
            b"T" + length + raw,
            b"U" + short + raw,
            b"B" + length + raw,
            b"C" + short + raw,
            b"\x8e" + struct.pack("<Q", len(raw)) + raw,
            b"\x96" + struct.pack("<Q", len(raw)) + raw,
        )
    )


def name(rng: Random) -> bytes:
    """Push a name, mostly a known one."""
    module, attribute = rng.choice(_NAMES)
    return rng.choice((hostile.name, hostile.name, hostile.stack_name))(module, attribute)


def _any_operation(rng: Random, others: Sequence[bytes]) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return integer(rng, rng.choice((*range(-2, 12), *EDGES)))
    if kind == 1:
        return string(rng, rng.choice(_TEXTS))
    if kind == 2:
        return name(rng)
    if kind == 3:
        return rng.choice((_memo(rng, rng.choice(b"hqjrgp")), b"G" + rng.randbytes(8)))
    if kind == 4:
        return bytes([rng.choice(_SIMPLE)])
    return rng.choice(operations_of(rng.choice(others)))


def _change_argument(rng: Random, operations: Operations, others: Sequence[bytes]) -> None:
    at = rng.randrange(len(operations))
    operations[at] = _other_argument(rng, operations[at], others)


def _change_integer(rng: Random, operations: Operations, others: Sequence[bytes]) -> None:
    places = [at for at, one in enumerate(operations) if one[0] in b"KMJ\x8a"]
    if places:
        at = rng.choice(places)
        operations[at] = _other_argument(rng, operations[at], others)


def _other_argument(rng: Random, operation: bytes, others: Sequence[bytes]) -> bytes:
    """Return an operation of the same kind with another argument, or written otherwise."""
    code = operation[0]
    if code in _INTEGERS:
        value = _value(operation)
        return integer(rng, value if rng.random() < 0.1 else nudged(rng, value))
    if code in _STRINGS:
        known = _text(operation)
        return string(rng, known if rng.random() < 0.3 else rng.choice(_TEXTS))
    if code == ord("c"):
        if rng.random() < 0.2:
            module, attribute = operation[1:-1].decode("latin-1").split("\n", 1)
            return hostile.stack_name(module, attribute)
        return name(rng)
    if code in _MEMO:
        return _memo(rng, code)
    if len(operation) > 1:
        return operation[:1] + rng.randbytes(len(operation) - 1)
    return _any_operation(rng, others)


def _memo(rng: Random, code: int) -> bytes:
    """Store to the memo, or load from it."""
    at = rng.choice((*range(24), 2**31, 2**32 - 1)) if code in b"jr" else rng.randrange(24)
    if code in b"gp":
        return b"%c%d\n" % (code, at)
    return bytes([code]) + at.to_bytes(1 if code in b"hq" else 4, "little")


def _value(operation: bytes) -> int:
    code, argument = operation[0], operation[1:]
    if code in b"IL":
        return int(argument.rstrip(b"L\n") or b"0")
    if code in b"\x8a\x8b":
        return int.from_bytes(argument[1 if code == 0x8A else 4 :], "little", signed=True)
    return int.from_bytes(argument, "little", signed=code == ord("J"))


def _text(operation: bytes) -> str:
    code = operation[0]
    if code in b"VS":
        return operation[1:-1].strip(b"'").decode("latin-1")
    width = 1 if code in b"UC\x8c" else 8 if code in b"\x8d\x8e\x96" else 4
    return operation[1 + width :].decode("utf-8", "surrogateescape")


def _delete(rng: Random, operations: Operations, _: Sequence[bytes]) -> None:
    if len(operations) > 1:
        del operations[rng.randrange(len(operations))]


def _duplicate(rng: Random, operations: Operations, _: Sequence[bytes]) -> None:
    start, stop = _range(rng, operations)
    at = rng.choice((stop, rng.randrange(len(operations) + 1)))
    operations[at:at] = operations[start:stop]


def _swap(rng: Random, operations: Operations, _: Sequence[bytes]) -> None:
    one, other = rng.randrange(len(operations)), rng.randrange(len(operations))
    operations[one], operations[other] = operations[other], operations[one]


def _insert(rng: Random, operations: Operations, others: Sequence[bytes]) -> None:
    operations.insert(rng.randrange(len(operations) + 1), _any_operation(rng, others))


def _replace(rng: Random, operations: Operations, others: Sequence[bytes]) -> None:
    operations[rng.randrange(len(operations))] = _any_operation(rng, others)


def _splice(rng: Random, operations: Operations, others: Sequence[bytes]) -> None:
    other = operations_of(rng.choice(others))
    first, last = _range(rng, other)
    start, stop = _range(rng, operations)
    operations[start : rng.choice((start, stop))] = other[first:last]


def _cut(rng: Random, operations: Operations, _: Sequence[bytes]) -> None:
    start, stop = _range(rng, operations)
    if stop - start < len(operations):
        del operations[start:stop]


def _range(rng: Random, operations: Sequence[bytes]) -> tuple[int, int]:
    start = rng.randrange(len(operations))
    return start, min(len(operations), start + rng.choice((1, 2, 4, 8, 16)))


Change = Callable[[Random, Operations, Sequence[bytes]], None]
_CHANGES: Sequence[Change] = (
    *3 * (_change_argument,),
    *5 * (_change_integer,),
    _delete,
    _duplicate,
    _swap,
    _insert,
    _replace,
    _splice,
    _cut,
)
