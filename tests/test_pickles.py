"""The pickle machine: it describes data, and nothing a pickle says makes it do anything else."""

import codecs
import os
import pickle
import pickletools
import random
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hostile import (
    call,
    group,
    mapping,
    name,
    number,
    pickled,
    sizes,
    stack_name,
    storage,
    tensor,
    text,
    torch_bytes,
    torch_members,
    whole,
    zip_bytes,
)

from ckptavg.checkpoint import open_checkpoint
from ckptavg.checkpoint.pickle_values import (
    Inert,
    Name,
    Pairs,
    Storage,
    TensorView,
    Unsupported,
)
from ckptavg.checkpoint.pickles import PickleLimits, read_pickle
from ckptavg.errors import CheckpointError, CkptavgError
from ckptavg.tensors import DTYPE_BY_NAME, FLOAT32

NEVER_RUN = (
    "which is never run; save the weights alone (torch.save(model.state_dict(), ...)) and average "
    "those files"
)


def value_of(operations: bytes) -> Any:
    return read_pickle(pickled(operations), "w.pt")


def damaged(operations: bytes, error: str = "") -> None:
    """Check that a pickle is refused as damaged."""
    with pytest.raises(CheckpointError, match=rf"^w\.pt: its pickle is damaged \({error}"):
        value_of(operations)


# -- what it reads


def plain(value: Any) -> Any:
    """Return a value with mappings as dicts again, to compare with what was pickled."""
    if type(value) is Pairs:
        return {plain(key): plain(inner) for key, inner in value.items}
    if type(value) in (list, tuple):
        return type(value)(plain(inner) for inner in value)
    return value


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol_come_back(protocol: int) -> None:
    value: dict[str, Any] = {
        "none": None, "true": True, "false": False, "zero": 0, "small": 7, "short": 300,
        "negative": -5, "long": 2**40, "longer": -(2**100), "float": 1.5, "inf": float("-inf"),
        "text": "é\n\\ ünï", "empty": "", "list": [1, [2, []]],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "dict": {"a": {"b": {}}, 3: "three"}, "long text": "x" * 300, "many": list(range(1100)),
    }  # fmt: skip
    if protocol >= 3:
        value |= {"bytes": b"\x00\xff", "long bytes": b"x" * 300}
    assert plain(read_pickle(pickle.dumps(value, protocol), "w.pt")) == value


def test_bytearrays_and_big_strings_of_protocol_5_come_back_as_bytes() -> None:
    assert read_pickle(pickle.dumps(bytearray(b"abc"), 5), "w.pt") == b"abc"
    raw = b"abc"
    assert value_of(b"\x8e" + struct.pack("<Q", 3) + raw) == b"abc"
    assert value_of(b"\x8d" + struct.pack("<Q", 3) + raw) == "abc"
    assert value_of(b"\x8b" + struct.pack("<I", 2) + b"\x00\x01") == 256
    assert value_of(b"T" + struct.pack("<I", 3) + b"\xc3\xa9a") == "éa"  # as torch reads it
    assert value_of(b"U\x02\xe9a") == "\udce9a"  # no name of a tensor


def test_sharing_and_cycles_are_kept() -> None:
    shared: list[Any] = []
    found = read_pickle(pickle.dumps([shared, shared], 2), "w.pt")
    assert found[0] is found[1]
    cyclic: dict[str, Any] = {}
    cyclic["self"] = cyclic
    found = read_pickle(pickle.dumps(cyclic, 2), "w.pt")
    assert found.get("self") is found


@pytest.mark.parametrize(
    "value",
    [
        {1, 2}, frozenset({1}), Counter("aab"), deque([1]), SimpleNamespace(a=1), 1 + 2j,
        datetime(2024, 5, 17), date(2024, 5, 17), timedelta(1), PurePosixPath("a/b"), Path("a"),
        np.float64(1.5), np.arange(3), np.dtype("f4"), torch.device("cpu"),
        torch.float32, torch.int8, slice(1, 2), range(3), int, dict, bytes(3), bytearray(3),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("protocol", range(2, 6))
def test_harmless_classes_become_inert(value: Any, protocol: int) -> None:
    found = read_pickle(pickle.dumps([value], protocol), "w.pt")[0]
    assert type(found) in (Inert, Name, bytes)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_size_is_a_tuple(protocol: int) -> None:
    assert read_pickle(pickle.dumps([torch.Size([1, 2])], protocol), "w.pt") == [(1, 2)]
    assert value_of(b"ctorch\nSize\n(](K\x01etR") == Inert("torch.Size")


def test_the_state_of_a_namespace_is_kept_as_a_mapping() -> None:
    found = read_pickle(pickle.dumps(SimpleNamespace(lr=0.5), 2), "w.pt")
    assert found.name == "types.SimpleNamespace"
    assert found.state.get("lr") == 0.5


@pytest.mark.parametrize("protocol", range(2, 6))
def test_mappings_of_every_kind_become_pairs(protocol: int) -> None:
    ordered = OrderedDict(a=1)
    ordered.extra = 2  # type: ignore[attr-defined]  # as torch sets _metadata
    for value in ({"a": 1}, ordered, defaultdict(int, a=1)):
        found = read_pickle(pickle.dumps(value, protocol), "w.pt")
        assert type(found) is Pairs
        assert found.items == [("a", 1)]


def test_an_ordered_dict_of_a_list_of_pairs_becomes_pairs() -> None:
    items = b"]((" + text("a") + number(1) + b"l(" + text("b") + number(2) + b"te"
    found = value_of(call(name("collections", "OrderedDict"), items))
    assert found.items == [("a", 1), ("b", 2)]
    damaged(call(name("collections", "OrderedDict"), b"](K\x01K\x02e"), "TypeError")


def test_the_value_set_last_wins() -> None:
    found = value_of(mapping([(text("a"), b"K\x01"), (text("a"), b"K\x02")]))
    assert found.get("a") == 2
    assert found.get("b") is None


def test_a_tensor_becomes_a_view_of_a_storage() -> None:
    assert value_of(tensor([2, 2], [1, 2])) == TensorView(
        Storage("0", FLOAT32, 4), FLOAT32, 0, (2, 2), (1, 2)
    )


def test_storage_types_have_the_dtypes_that_torch_gives_them() -> None:
    for kind, dtype in {
        "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16",
        "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
        "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
        "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
        "ComplexDoubleStorage": "complex128",
    }.items():  # fmt: skip
        assert value_of(storage(kind=kind)) == Storage("0", DTYPE_BY_NAME[dtype], 4)
    assert value_of(storage(kind="UntypedStorage")) == Storage("0", None, 4)


def rebuilt(function: str, *arguments: bytes) -> Any:
    return value_of(call(name("torch._utils", function), *arguments))


def test_every_way_to_rebuild_a_tensor_gives_the_same_view() -> None:
    no_hooks = name("collections", "OrderedDict") + b")R"
    arguments = (storage(), number(0), sizes([4]), sizes([1]))
    expected = TensorView(Storage("0", FLOAT32, 4), FLOAT32, 0, (4,), (1,))
    assert rebuilt("_rebuild_tensor", *arguments) == expected
    assert rebuilt("_rebuild_tensor_v2", *arguments, b"\x89", no_hooks) == expected
    parameter = rebuilt("_rebuild_parameter", tensor(), b"\x88", no_hooks)
    with_state = rebuilt("_rebuild_parameter_with_state", tensor(), b"\x88", no_hooks, b"}")
    assert parameter == with_state == expected
    v2 = (name("torch._utils", "_rebuild_tensor_v2"), name("torch", "Tensor"))
    from_type = call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        *v2,
        group(*arguments, b"\x89", no_hooks),
        b"}",
    )
    assert value_of(from_type) == expected


def test_a_tensor_of_a_raw_storage_takes_the_dtype_it_states() -> None:
    raw = (
        storage(numel=8, kind="UntypedStorage"),
        number(0),
        sizes([4]),
        sizes([1]),
        b"\x89",
        b"N",
    )
    found = rebuilt("_rebuild_tensor_v3", *raw, name("torch", "uint16"))
    assert found.dtype is DTYPE_BY_NAME["uint16"]
    from_type = call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("torch._utils", "_rebuild_tensor_v3"),
        name("torch", "Tensor"),
        group(*raw, name("torch", "uint16")),
        b"}",
    )
    assert value_of(from_type) == found
    damaged(
        call(name("torch._utils", "_rebuild_tensor_v3"), *raw, name("torch", "device")), "TypeError"
    )
    damaged(call(name("torch._utils", "_rebuild_tensor_v2"), *raw), "TypeError")


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("_rebuild_qtensor", "quantised"),
        ("_rebuild_sparse_tensor", "sparse"),
        ("_rebuild_nested_tensor", "nested"),
        ("_rebuild_meta_tensor_no_storage", "on the meta device: it has no values"),
        ("_rebuild_wrapper_subclass", "of a tensor subclass"),
        ("_rebuild_device_tensor_from_numpy", "stored as a numpy array"),
        ("_rebuild_device_tensor_from_cpu_tensor", "stored through another device"),
        ("_rebuild_xla_tensor", "stored as a numpy array"),
    ],
)
def test_tensors_that_are_no_plain_arrays_are_unsupported(function: str, what: str) -> None:
    assert rebuilt(function, b"N") == Unsupported(what)
    from_type = call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("torch._utils", function), name("torch", "Tensor"), group(b"N"), b"}",
    )  # fmt: skip
    assert type(value_of(from_type)) is Unsupported


@pytest.mark.parametrize(
    "kind", ["QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage"]
)
def test_tensors_of_quantised_storages_are_unsupported(kind: str) -> None:
    assert value_of(tensor(stored=storage(kind=kind))) == Unsupported("quantised")


@pytest.mark.parametrize("dtype", ["float4_e2m1fn_x2", "float6_e2m3", "float6_e3m2"])
def test_elements_of_less_than_a_byte_are_unsupported(dtype: str) -> None:
    raw = (
        storage(numel=8, kind="UntypedStorage"),
        number(0),
        sizes([8]),
        sizes([1]),
        b"\x89",
        b"N",
    )
    assert rebuilt("_rebuild_tensor_v3", *raw, name("torch", dtype)) == Unsupported("quantised")


@pytest.mark.parametrize("flag", ["conj", "neg"])
def test_a_view_whose_bytes_are_not_its_values_is_unsupported(flag: str) -> None:
    metadata = mapping({flag: b"\x88"})
    expected = Unsupported("stored with a conjugation or negation still to be applied")
    assert value_of(tensor(metadata=metadata)) == expected
    raw = (
        storage(numel=8, kind="UntypedStorage"),
        number(0),
        sizes([4]),
        sizes([1]),
        b"\x89",
        b"N",
    )
    assert rebuilt("_rebuild_tensor_v3", *raw, name("torch", "uint16"), metadata) == expected


@pytest.mark.parametrize("new", [b")\x81", b")R", b")}\x92"])
@pytest.mark.parametrize("cls", [("torch", "Tensor"), ("torch.nn.parameter", "Parameter")])
def test_an_instance_of_a_tensor_class_is_unsupported_not_left_out(
    cls: tuple[str, str], new: bytes
) -> None:
    assert value_of(name(*cls) + new) == Unsupported("of a tensor subclass")


def test_more_than_sixty_four_dimensions_are_unsupported() -> None:
    assert type(value_of(tensor([1] * 64))) is TensorView
    assert value_of(tensor([1] * 65)) == Unsupported("of more than 64 dimensions")


# -- what it refuses


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (b"N", number(0), sizes([4]), sizes([1])),
        (storage(), b"N", sizes([4]), sizes([1])),
        (storage(), number(-1), sizes([4]), sizes([1])),
        (storage(), b"\x88", sizes([4]), sizes([1])),
        (storage(), number(0), b"N", sizes([1])),
        (storage(), number(0), sizes([4]), b"N"),
        (storage(), number(0), b"](K\x04e", sizes([1])),
        (storage(), number(0), sizes([-4]), sizes([1])),
        (storage(), number(0), sizes([4]), sizes([-1])),
        (storage(), number(0), sizes([4]), sizes([1, 1])),
        (storage(), number(0), group(b"\x88"), sizes([1])),
        (storage(), number(0), group(b"G" + struct.pack(">d", 4)), sizes([1])),
        (storage(), number(0), sizes([2**63]), sizes([1])),
        (storage(), number(0), sizes([4]), sizes([2**63])),
        (storage(), number(0), sizes([4]), sizes([1]), b"\x89", b"N", b"N", b"N"),
        (storage(), number(0), sizes([4]), sizes([1]), *[b"N"] * 20),
    ],
    ids=range(17),
)  # fmt: skip
def test_damaged_tensors_are_refused(arguments: tuple[bytes, ...]) -> None:
    damaged(call(name("torch._utils", "_rebuild_tensor_v2"), *arguments), "TypeError")


@pytest.mark.parametrize(
    "identity",
    [
        b"N",
        text("storage"),
        group(),
        group(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu")),
        group(text("module"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(4)),
        group(text("storage"), text("FloatStorage"), text("0"), text("cpu"), number(4)),
        group(text("storage"), name("torch", "FloatStorage"), number(0), text("cpu"), number(4)),
        group(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(-4)),
        group(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), text("4")),
    ],
    ids=range(9),
)
def test_damaged_storage_references_are_refused(identity: bytes) -> None:
    damaged(identity + b"Q", "TypeError")


DAMAGED = {
    "nothing": b"",
    "two values": b"NN",
    "a mark as the value": b"(",
    "no value to pop": b"0",
    "no mark": b"Nt",
    "no mark and no value": b"t",
    "duplicate of a mark": b"(2",
    "duplicate of nothing": b"2",
    "mark in a tuple": b"N(\x86",
    "memo of a mark": b"(q\x00",
    "memo of nothing": b"q\x00",
    "unknown memo": b"h\x05",
    "unknown long memo": b"j\x05\x00\x00\x00",
    "unknown text memo": b"g5\n",
    "text memo that is no number": b"Npx\n",
    "text memo of many digits": b"Np" + b"9" * 5000 + b"\n",
    "text too short": b"X\x05\x00\x00\x00ab",
    "text of gigabytes": b"X\xff\xff\xff\xff",
    "text of exabytes": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    "text of 2**64 bytes": b"\x8d" + b"\xff" * 8,
    "bytes of exabytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    "bytearray of exabytes": b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
    "text that is not UTF-8": b"X\x01\x00\x00\x00\xff",
    "line that is not UTF-8": b"c\xff\n\n",
    "line without an end": b"Vabc",
    "bad escape in a line": b"V\\u12\n",
    "quoted text that needs unescaping": b"S'\\x00'\n",
    "text without quotes": b"Sabc\n",
    "text of one quote": b"S'\n",
    "number cut short": b"J\x00",
    "number in words": b"Ifour\n",
    "float in words": b"Ffour\n",
    "name without an attribute": b"cos\n",
    "name of numbers": b"K\x01K\x02\x93",
    "append to a tuple": b")Na",
    "append to a mapping": b"}Na",
    "append to nothing": b"Na",
    "extend a name": name("builtins", "dict") + b"(Ne",
    "items of a list": b"]NNs",
    "items of a tensor": tensor() + text("a") + b"Ns",
    "odd items": b"}(NNNu",
    "odd dict": b"(NNNd",
    "state of a list": b"]}b",
    "state of a text": text("a") + b"}b",
    "state of a name": name("builtins", "dict") + b"}b",
    "state of a storage": storage() + b"}b",
    "call of a number": b"K\x01)R",
    "call of a text": text("os.system") + b")R",
    "call of a storage": storage() + b")R",
    "call of a storage type": name("torch", "FloatStorage") + b")R",
    "call of a tensor": tensor() + b")R",
    "call of an instance": name("builtins", "set") + b")\x81)R",
    "call without a tuple": name("builtins", "set") + b"]R",
    "instance of a function": name("torch._utils", "_rebuild_tensor_v2") + b")\x81",
    "instance of a storage type": name("torch", "FloatStorage") + b")\x81",
    "instance of a text": text("set") + b")\x81",
    "reconstructed text": call(name("copyreg", "_reconstructor"), text("set"), b"N", b"N"),
    "reconstructed function": call(
        name("copyreg", "_reconstructor"), name("torch._utils", "_rebuild_tensor"), b"N", b"N"
    ),
    "tensor of attributes without arguments": call(
        name("torch._tensor", "_rebuild_from_type_v2"), b"N", b"N", b"N", b"N"
    ),
}


@pytest.mark.parametrize("operations", DAMAGED.values(), ids=DAMAGED)
def test_a_malformed_program_is_refused(operations: bytes) -> None:
    damaged(operations)


def test_the_end_of_the_pickle_is_not_its_last_operation() -> None:
    with pytest.raises(CheckpointError, match=whole("w.pt: its pickle is damaged (it ends early)")):
        read_pickle(b"\x80\x02N", "w.pt")


@pytest.mark.parametrize("length", [65, 255])
def test_integers_of_more_than_64_bytes_are_refused(length: int) -> None:
    message = f"w.pt: its pickle holds an integer of {length} bytes"
    with pytest.raises(CheckpointError, match=whole(message)):
        value_of(b"\x8a" + bytes([length]) + b"\x01" * length)
    with pytest.raises(CheckpointError, match=whole(message)):
        value_of(b"\x8b" + struct.pack("<I", length) + b"\x01" * length)


@pytest.mark.parametrize("code", [b"I", b"L"])
def test_integers_of_many_digits_are_refused(code: bytes) -> None:
    message = "w.pt: its pickle holds an integer that is too long"
    with pytest.raises(CheckpointError, match=whole(message)):
        value_of(code + b"9" * 1_000_000 + b"L\n")


ALLOWED = frozenset(
    b"\x80\x95(012N\x88\x89ILJKM\x8a\x8bFGVX\x8c\x8dSTUBC\x8e\x96]lae)t\x85\x86\x87}dsu\x8f\x90\x91"
    b"ghjpqr\x94c\x93Rb\x81\x92Q."
)


def test_every_other_operation_is_refused() -> None:
    for code in range(256):
        if code in ALLOWED:
            continue
        message = f"w.pt: uses the pickle operation 0x{code:02x}, which torch never writes"
        with pytest.raises(CheckpointError, match=whole(message)):
            value_of(bytes([code]))
    known = {ord(operation.code) for operation in pickletools.opcodes}
    refused = {chr(code) for code in known - ALLOWED}
    assert refused == {"P", "i", "o", "\x82", "\x83", "\x84", "\x97", "\x98"}


# -- hostile ones

EVIL = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "popen"), ("os", "execv"),
    ("subprocess", "Popen"), ("subprocess", "check_output"), ("builtins", "eval"),
    ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "__import__"), ("builtins", "open"),
    ("builtins", "compile"), ("builtins", "map"), ("builtins", "apply"), ("builtins", "type"),
    ("__builtin__", "eval"), ("__builtin__", "getattr"), ("runpy", "run_path"),
    ("runpy", "_run_code"), ("torch.hub", "load"), ("torch", "load"), ("torch.jit", "load"),
    ("torch.storage", "_load_from_bytes"), ("torch.serialization", "load"),
    ("torch.utils.cpp_extension", "load_inline"), ("torch._dynamo.guards", "eval"),
    ("torch.nn.modules.linear", "Linear"), ("torch.nn.Linear", ""), ("torch", "nn.Linear"),
    ("torch", "FloatStorage.__init__"), ("torch.cuda", "FloatStorage"), ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"), ("numpy.f2py.crackfortran", "getlincoef"),
    ("numpy.core.multiarray", "_reconstruct.__class__"), ("functools", "partial"),
    ("functools", "reduce"), ("operator", "attrgetter"), ("operator", "methodcaller"),
    ("itertools", "starmap"), ("types", "FunctionType"), ("types", "CodeType"),
    ("codecs", "decode"), ("_codecs", "decode"), ("pickle", "loads"), ("_pickle", "loads"),
    ("marshal", "loads"),
    ("importlib", "import_module"), ("ctypes", "CDLL"), ("socket", "socket"), ("shutil", "rmtree"),
    ("pathlib", "Path.unlink"), ("pathlib", "os.system"), ("asyncio", "run"), ("code", "interact"),
    ("pdb", "run"), ("timeit", "timeit"), ("cProfile", "run"), ("webbrowser", "open"),
    ("collections", "OrderedDict.fromkeys"), ("collections", "_sys.modules"),
    ("__main__", "Model"), ("dill._dill", "_create_function"), ("cloudpickle", "loads"),
    ("ckptavg.checkpoint.pickles", "read_pickle"), ("", "system"), ("os", ""), ("OS", "system"),
    ("os ", "system"), (" os", "system"), ("os.system", "__call__"), ("os\x00", "system"),
]  # fmt: skip
WAYS: dict[str, Callable[[str, str], bytes]] = {"GLOBAL": name, "STACK_GLOBAL": stack_name}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("module", "attribute"), EVIL)
def test_code_is_never_run_and_the_message_names_it(
    tmp_path: Path, module: str, attribute: str, way: str
) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "w.pt"
    payload = call(WAYS[way](module, attribute), text(f"touch {canary}"))
    path.write_bytes(torch_bytes(mapping({"w": tensor(), "x": payload})))
    full = f"{module}.{attribute}".replace("\0", "\\x00")
    message = f"{path}: needs Python code '{full}', {NEVER_RUN}"
    with pytest.raises(CheckpointError, match=whole(message)):
        open_checkpoint(path)
    assert not canary.exists()


class Runs:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    ("function", "full"),
    [(os.system, "posix.system"), (eval, "builtins.eval"), (os.mkdir, "posix.mkdir")],
)
def test_payloads_that_torch_save_writes_are_refused(
    tmp_path: Path, function: Callable[..., Any], full: str, protocol: int
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "w.pt"
    argument = str(canary) if function is os.mkdir else f"__import__('os').mkdir({str(canary)!r})"
    torch.save({"w": torch.ones(2), "x": Runs(function, argument)}, path, pickle_protocol=protocol)
    full = full if protocol > 2 else full.replace("builtins", "__builtin__")
    message = f"{path}: needs Python code '{full}', {NEVER_RUN}"
    with pytest.raises(CheckpointError, match=whole(message)):
        open_checkpoint(path)
    assert not canary.exists()


def raw_bytes(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def command(canary: Path) -> bytes:
    return text(f"touch {canary}")


SYSTEM = ("os", "system")
TRICKS: dict[str, Callable[[bytes], bytes]] = {
    "instance by INST": lambda argument: b"(" + argument + b"ios\nsystem\n",
    "instance by OBJ": lambda argument: b"(" + name(*SYSTEM) + argument + b"o",
    "extension registry": lambda argument: b"\x82\x01" + argument + b"\x85R",
    "persistent id in text": lambda argument: b"Pos.system\n",
    "persistent id of a call": lambda argument: call(name(*SYSTEM), argument) + b"Q",
    "persistent id of a name": lambda argument: name(*SYSTEM) + b"Q",
    "call of a persistent id": lambda argument: storage() + argument + b"\x85R",
    "storage kind is code": lambda argument: (
        group(text("storage"), name(*SYSTEM), text("0"), text("cpu"), number(4)) + b"Q"
    ),
    "storage key leads outside": lambda argument: tensor(stored=storage("../../etc/passwd")),
    "state setter": lambda argument: (
        name("builtins", "dict") + b")\x81" + mapping({"__setstate__": name(*SYSTEM)}) + b"b"
        + argument + b"b"
    ),
    "class of the state": lambda argument: (
        name("argparse", "Namespace") + b")\x81" + mapping({"__class__": name(*SYSTEM)}) + b"b"
    ),
    "reduction in the state": lambda argument: (
        name("types", "SimpleNamespace") + b")R"
        + mapping({"__reduce__": stack_name(*SYSTEM)}) + b"b"
    ),
    "default factory": lambda argument: call(name("collections", "defaultdict"), name(*SYSTEM)),
    "decoded name": lambda argument: (
        text("os") + call(name("_codecs", "encode"), text("system"), text("latin1")) + b"\x93"
    ),
    "decoded by codecs": lambda argument: (
        call(name("codecs", "decode"), text("bf.flfgrz"), text("rot13")) + argument + b"\x85R"
    ),
    "dotted attribute": lambda argument: (
        stack_name("collections", "abc.sys.modules") + argument + b"\x85R"
    ),
    "name out of the memo": lambda argument: (
        name(*SYSTEM) + b"q\x00" + b"0" + b"h\x00" + argument + b"\x85R"
    ),
    "backward hooks": lambda argument: call(
        name("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), sizes([4]), sizes([1]),
        b"\x89", call(name("collections", "OrderedDict"), call(name(*SYSTEM), argument)),
    ),
    "rebuild function is code": lambda argument: call(
        name("torch._tensor", "_rebuild_from_type_v2"), name(*SYSTEM), name("torch", "Tensor"),
        group(argument), b"}",
    ),
    "rebuild function is text": lambda argument: call(
        name("torch._tensor", "_rebuild_from_type_v2"), text("os.system"), name("torch", "Tensor"),
        group(argument), b"}",
    ),
    "type of a rebuilt tensor is code": lambda argument: call(
        name("torch._tensor", "_rebuild_from_type_v2"), name("torch._utils", "_rebuild_tensor_v2"),
        name(*SYSTEM), group(storage(), number(0), sizes([4]), sizes([1])), b"}",
    ),
    "object dtype of an array": lambda argument: call(
        name("numpy._core.multiarray", "scalar"), call(name("numpy", "dtype"), text("O8")),
        raw_bytes(pickled(call(name(*SYSTEM), argument))),
    ),
    "pickle behind the end": lambda argument: b"N." + pickled(call(name(*SYSTEM), argument)),
}  # fmt: skip
HARMLESS = {"object dtype of an array", "pickle behind the end"}  # read as data, never as code


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_runs_code(tmp_path: Path, trick: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "w.pt"
    payload = TRICKS[trick](command(canary))
    path.write_bytes(torch_bytes(mapping({"w": tensor(), "x": payload})))
    if trick == "pickle behind the end":
        path.write_bytes(zip_bytes(torch_members(pickled(mapping({"w": tensor()})) + payload)))
    if trick in HARMLESS:
        assert list(open_checkpoint(path).tensors) == ["w"]
    else:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
    assert not canary.exists()


def test_the_object_array_of_numpy_stays_bytes() -> None:
    found = read_pickle(
        pickle.dumps(np.array([print], dtype=object), 2).replace(b"print", b"tuple"), "w.pt"
    )
    assert type(found) is Inert


def test_a_codec_trick_in_protocol_0_is_refused() -> None:
    raw = b"c_codecs\ndecode\n(Vbf.flfgrz\nVrot13\ntR."
    with pytest.raises(CheckpointError, match=r"needs Python code '_codecs\.decode'"):
        read_pickle(raw, "w.pt")
    assert codecs.decode("bf.flfgrz", "rot13") == "os.system"  # what it would have been


# -- programs made to exhaust time or memory


def test_deep_nesting_is_read_without_recursion() -> None:
    depth = 300_000
    found = value_of(b")" + b"\x85" * depth)
    for _ in range(depth):
        (found,) = found
    assert found == ()
    value_of(b"]" * depth + b"a" * (depth - 1))
    value_of(b"}" + (text("k") + b"}") * 50_000 + b"s" * 50_000)
    value_of((name("builtins", "set") + b")\x81") * 10_000 + b"b" * 9_999)


def test_a_key_that_is_slow_to_hash_is_never_hashed() -> None:
    key = b"N" + b"2\x86" * 64  # 2**64 leaves
    found = value_of(b"}" + key + b"Ns")
    assert len(found.items) == 1
    value_of(b"(" + key + b"\x91")
    value_of(b"\x8f(" + key + b"\x90")


def test_lists_that_double_in_the_memo_stay_shared() -> None:
    found = value_of(b"]" + b"".join(b"q\x000](h\x00h\x00e" for _ in range(200)))
    assert len(found) == 2


def test_one_list_made_into_many_mappings_is_not_multiplied() -> None:
    count = 2000
    items = b"](" + b"(NNt" * count + b"eq\x00"
    calls = (name("collections", "OrderedDict") + b"q\x01" + b"0") + b"h\x01h\x00\x85R" * count
    found = value_of(b"(" + items + calls + b"t")
    assert sum(len(one.items) for one in found if type(one) is Pairs) == count


def test_one_tuple_of_many_arguments_is_never_unpacked() -> None:
    many = b"(" + b"N" * 1000 + b"t"
    for function in (
        name("collections", "defaultdict"), name("torch", "Tensor"), name("builtins", "dict"),
        name("torch._utils", "_rebuild_tensor_v2"), name("torch._utils", "_rebuild_parameter"),
    ):  # fmt: skip
        damaged(function + many + b"R", "TypeError")


def test_a_pickle_of_too_many_operations_is_refused() -> None:
    limits = PickleLimits(operations=1000, values=1000)
    with pytest.raises(
        CheckpointError, match=whole("w.pt: its pickle has more than 1000 operations")
    ):
        read_pickle(pickled(b"N0" * 500 + b"N"), "w.pt", limits)
    assert read_pickle(pickled(b"N0" * 400 + b"N"), "w.pt", limits) is None


@pytest.mark.parametrize("value", [b"]", b"}", b"X\x00\x00\x00\x00", call(name("torch", "device"))])
def test_a_pickle_of_too_many_values_is_refused(value: bytes) -> None:
    limits = PickleLimits(operations=10_000, values=20)
    assert read_pickle(pickled(group(*[value] * 8)), "w.pt", limits)
    with pytest.raises(CheckpointError, match=whole("w.pt: its pickle makes more than 20 values")):
        read_pickle(pickled(group(*[value] * 22)), "w.pt", limits)


def test_long_lines_are_read_in_one_go() -> None:
    assert len(value_of(b"V" + b"x" * 1_000_000 + b"\n")) == 1_000_000
    assert value_of(b"F0." + b"3" * 100_000 + b"\n") == 1 / 3


# -- whatever the bytes


def test_every_truncation_of_a_pickle_is_refused() -> None:
    raw = pickled(mapping({"w": tensor(), "n": number(2**70), "s": text("x") + b"\x85"}))
    for length in range(len(raw)):
        with pytest.raises(CheckpointError):
            read_pickle(raw[:length], "w.pt")


def test_mutated_pickles_are_read_or_refused_never_anything_else() -> None:
    rng = random.Random(5)
    good = [
        pickled(mapping({"w": tensor([2, 2], [1, 2]), "b": tensor(), "step": number(5)})),
        pickle.dumps({"a": [1, 2.5, "x"], "b": (None, True), "c": {1, 2}}, 4),
        pickle.dumps({"a": OrderedDict(x=1), "n": np.arange(2)}, 2),
        pickle.dumps(SimpleNamespace(a=Counter("aa"), p=Path("x")), 0),
    ]
    codes = [operation.code.encode("latin-1") for operation in pickletools.opcodes]
    read = 0
    for _ in range(15_000):
        raw = bytearray(rng.choice(good))
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(2, len(raw))
            kind = rng.randrange(4)
            if kind == 0:
                raw[at] = rng.randrange(256)
            elif kind == 1:
                raw[at:at] = rng.choice(codes)
            elif kind == 2:
                raw[at : at + 1] = rng.choice(codes)
            else:
                del raw[at : at + rng.randint(1, 3)]
        try:
            read_pickle(bytes(raw), "w.pt")
            read += 1
        except CkptavgError:
            pass
    assert 500 < read < 10_000
