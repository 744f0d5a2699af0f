"""The safetensors reader: a strict subset of what the format allows."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoint_contract import CheckpointContract, read_tensor
from hostile import entry, safetensors_bytes, whole
from safetensors import SafetensorError, deserialize
from safetensors.torch import save, save_file, save_model
from torch import Tensor, nn, ones, zeros

from ckptavg.checkpoint import open_checkpoint
from ckptavg.errors import CheckpointError, CkptavgError

ONE = {"w": entry("F32", [1], 0, 4)}
FOUR_BYTES = b"\x00\x01\x02\x03"


class TestSafetensorsFile(CheckpointContract):
    layout = "safetensors file"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = directory / "model.safetensors"
        save_file(dict(tensors), path)
        return path


def refused(tmp_path: Path, raw: bytes, what: str) -> None:
    """Check that a file is refused with exactly this message."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=whole(f"{path}: {what}")):
        open_checkpoint(path)


def header_refused(tmp_path: Path, header: Any, what: str, data: bytes = FOUR_BYTES) -> None:
    refused(tmp_path, safetensors_bytes(header, data), what)


def test_tensors_are_in_the_order_of_the_data_not_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    header = {"b": entry("U8", [3], 1, 4), "a": entry("U8", [1], 0, 1)}
    path.write_bytes(safetensors_bytes(header, FOUR_BYTES))
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert read_tensor(checkpoint, "b") == FOUR_BYTES[1:]


def test_a_file_without_tensors_is_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_bytes({"__metadata__": {"format": "pt"}}))
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors == {}
    assert checkpoint.metadata == {"format": "pt"}


def test_spaces_after_the_header_are_padding(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_bytes(json.dumps(ONE) + "   ", FOUR_BYTES))
    assert list(open_checkpoint(path).tensors) == ["w"]


@pytest.mark.parametrize(
    ("code", "dtype", "shape", "nbytes"),
    [
        ("F8_E4M3", "float8_e4m3fn", [4], 4),
        ("F8_E8M0", "float8_e8m0fnu", [4], 4),
        ("F4", "float4_e2m1fn_x2", [8], 4),
        ("F6_E2M3", "float6_e2m3", [4], 3),
        ("C64", "complex64", [1], 8),
        ("U64", "uint64", [1], 8),
    ],
)
def test_rare_dtypes_are_described(
    tmp_path: Path, code: str, dtype: str, shape: list[int], nbytes: int
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_bytes({"w": entry(code, shape, 0, nbytes)}, bytes(nbytes)))
    assert str(open_checkpoint(path).tensors["w"].dtype) == dtype


def test_tied_names_that_save_model_dropped_are_aliases(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {"embed": nn.Linear(3, 2, bias=False), "head": nn.Linear(3, 2, bias=False)}
    )
    model["head"].weight = model["embed"].weight
    save_model(model, str(tmp_path / "w.safetensors"))
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    assert len(checkpoint.tensors) == len(checkpoint.aliases) == 1
    ((tied, owner),) = checkpoint.aliases.items()
    assert {tied, owner} == {"embed.weight", "head.weight"}
    assert read_tensor(checkpoint, tied) == read_tensor(checkpoint, owner)


def test_metadata_that_names_no_tensor_declares_no_alias(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    metadata = {"format": "pt", "gone": "absent", "w": "w"}
    path.write_bytes(safetensors_bytes({"__metadata__": metadata, **ONE}, FOUR_BYTES))
    assert open_checkpoint(path).aliases == {}


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    raw = save({"a": ones(3), "b": zeros(2, 2), "c": zeros(())}, {"format": "pt"})
    path = tmp_path / "w.safetensors"
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    path.write_bytes(raw)
    open_checkpoint(path)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "is empty (0 bytes)"),
        (
            b"\x00",
            "is neither a safetensors file nor a torch or numpy file, or its beginning is damaged",
        ),
        (
            (5000).to_bytes(8, "little") + b"{}",
            "has 10 bytes, but its header alone needs 5008: it is truncated",
        ),
        (
            safetensors_bytes("{}", header_bytes=2**64 - 1),
            "is not a safetensors file: its header would have 18446744073709551615 bytes, "
            "at most 100000000 are allowed",
        ),
        (
            safetensors_bytes("{}", header_bytes=100_000_001),
            "is not a safetensors file: its header would have 100000001 bytes, "
            "at most 100000000 are allowed",
        ),
        (
            safetensors_bytes("{}", header_bytes=1),
            "its header is not valid JSON: the file is damaged",
        ),
        (
            safetensors_bytes(ONE, FOUR_BYTES[:3]),
            "has 72 bytes, but its header describes 73: it is truncated",
        ),
        (
            safetensors_bytes(ONE, FOUR_BYTES + b"\0"),
            "has 74 bytes, but its header describes 73: it is longer than it should be",
        ),
    ],
)
def test_lengths_that_lie_are_refused(tmp_path: Path, raw: bytes, what: str) -> None:
    refused(tmp_path, raw, what)


def test_a_header_length_of_zero_is_refused(tmp_path: Path) -> None:
    what = "is not a safetensors file: its header does not begin with '{'"
    refused(tmp_path, safetensors_bytes(b"", b"{}", header_bytes=0), what)


NOT_JSON = "its header is not valid JSON: the file is damaged"


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b'{"w"', NOT_JSON),
        (b"{}{}", NOT_JSON),
        (b'{"\xff": 1}', NOT_JSON),
        (b'{"a\nb": {}}', NOT_JSON),
        (b"{'w': {}}", NOT_JSON),
        (b'{"w": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", NOT_JSON),
        (b'{"w": {"a": ' + b'{"a": ' * 80_000 + b"}" * 80_001 + b"}", NOT_JSON),
        (b"{}\0", NOT_JSON),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}", NOT_JSON),
        (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', NOT_JSON),
        (b'{"__metadata__":{"a":"\\uDC00"}}', NOT_JSON),
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},}', NOT_JSON),
        (b'{"w": NaN}', "its header holds NaN, which is not JSON"),
        (b'{"w": Infinity}', "its header holds Infinity, which is not JSON"),
        (b'{"w": -Infinity}', "its header holds -Infinity, which is not JSON"),
    ],
)
def test_what_is_not_json_is_refused(tmp_path: Path, header: bytes, what: str) -> None:
    header_refused(tmp_path, header, what)


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "twice"),
    [
        (f'{{"w":{ENTRY},"w":{ENTRY}}}', "w"),
        (f'{{"w":{ENTRY},"\\u0077":{ENTRY}}}', "w"),
        (f'{{"__metadata__":{{}},"w":{ENTRY},"__metadata__":{{}}}}', "__metadata__"),
        (f'{{"__metadata__":{{"a":"b","a":"c"}},"w":{ENTRY}}}', "a"),
        ('{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "dtype"),
    ],
)
def test_a_name_that_stands_twice_is_refused(tmp_path: Path, header: str, twice: str) -> None:
    header_refused(tmp_path, header, f"its header names '{twice}' twice")


@pytest.mark.parametrize("metadata", [None, [], "x", 1, {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
def test_metadata_other_than_a_map_of_strings_is_refused(tmp_path: Path, metadata: Any) -> None:
    what = "__metadata__ in its header is not a map of strings"
    header_refused(tmp_path, {"__metadata__": metadata, **ONE}, what)


@pytest.mark.parametrize(
    "value",
    [
        ["F32", [1], [0, 4]],
        None,
        "F32",
        1,
        {},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        {**entry("F32", [1], 0, 4), "strides": [1]},
    ],
)
def test_an_entry_of_other_fields_is_refused(tmp_path: Path, value: Any) -> None:
    what = "tensor 'w' has other fields than dtype, shape and data_offsets"
    header_refused(tmp_path, {"w": value}, what)


@pytest.mark.parametrize("code", ["F33", "f32", "", "float32", "F32 "])
def test_an_unknown_dtype_is_refused(tmp_path: Path, code: str) -> None:
    what = f"tensor 'w' has the unknown dtype '{code}'"
    header_refused(tmp_path, {"w": entry(code, [1], 0, 4)}, what)


@pytest.mark.parametrize("code", [None, 1, ["F32"], {"F32": 1}, True])
def test_a_dtype_that_is_no_string_is_refused(tmp_path: Path, code: Any) -> None:
    what = "tensor 'w' has a dtype that is no string"
    header_refused(tmp_path, {"w": entry(code, [1], 0, 4)}, what)


def test_a_dtype_of_nested_lists_is_refused(tmp_path: Path) -> None:
    for depth in range(100, 1000, 10):
        nested = "[" * depth + "]" * depth
        path = tmp_path / "w.safetensors"
        header = f'{{"w":{{"dtype":{nested},"shape":[1],"data_offsets":[0,4]}}}}'
        path.write_bytes(safetensors_bytes(header, FOUR_BYTES))
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "shape",
    [
        "1",
        "null",
        '"1"',
        "{}",
        "[1.0]",
        "[true]",
        "[-1]",
        "[-0]",
        '["1"]',
        "[null]",
        "[[1]]",
        "[1e0]",
    ],
)
def test_a_shape_of_anything_but_sizes_is_refused(tmp_path: Path, shape: str) -> None:
    header = f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}'
    header_refused(tmp_path, header, "tensor 'w' has a shape that is not a list of sizes")


@pytest.mark.parametrize(
    "offsets",
    [
        "4", "null", "{}", "[]", "[0]", "[0,4,8]", "[0.0,4]", "[0,4.0]", "[false,4]", "[-4,0]",
        "[4,0]", '["0","4"]', "[-0,4]", "[0,null]", "[0,1e1]",
    ],
)  # fmt: skip
def test_offsets_that_are_no_byte_range_are_refused(tmp_path: Path, offsets: str) -> None:
    header = f'{{"w":{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}}}'
    header_refused(tmp_path, header, "tensor 'w' has data_offsets that are not a byte range")


def test_sixty_four_dimensions_are_the_limit(tmp_path: Path) -> None:
    what = "tensor 'w' has 65 dimensions, at most 64 are allowed"
    header_refused(tmp_path, {"w": entry("F32", [1] * 65, 0, 4)}, what)
    path = tmp_path / "64.safetensors"
    path.write_bytes(safetensors_bytes({"w": entry("F32", [1] * 64, 0, 4)}, FOUR_BYTES))
    assert open_checkpoint(path).tensors["w"].shape == (1,) * 64


@pytest.mark.parametrize(
    "shape",
    [
        [2**63], [2**62, 4], [2**32, 2**32], [2**62, 2**62, 0], [0, 2**64], [2**63, 0], [10**4000],
        [65536] * 5,
    ],
)  # fmt: skip
def test_sizes_that_overflow_are_refused_even_beside_a_zero(
    tmp_path: Path, shape: list[int]
) -> None:
    header_refused(
        tmp_path, {"w": entry("F32", shape, 0, 0)}, "tensor 'w' has an impossible size", b""
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "end", "needed"),
    [
        ("F32", [2], 4, 8),
        ("F32", [], 0, 4),
        ("F32", [0], 4, 0),
        ("F16", [1], 4, 2),
        ("F4", [4], 1, 2),
        ("F64", [2**30], 4, 2**33),
    ],
)
def test_a_shape_that_contradicts_the_offsets_is_refused(
    tmp_path: Path, dtype: str, shape: list[int], end: int, needed: int
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_bytes({"w": entry(dtype, shape, 0, end)}, bytes(end)))
    pattern = f"needs {needed} bytes, but its data_offsets hold {end}$"
    with pytest.raises(CheckpointError, match=pattern):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("code", "dtype", "size"), [("F4", "float4_e2m1fn_x2", 3), ("F6_E2M3", "float6_e2m3", 2)]
)
def test_a_tensor_that_ends_inside_a_byte_is_refused(
    tmp_path: Path, code: str, dtype: str, size: int
) -> None:
    what = f"tensor 'w' of {dtype} and shape [{size}] ends inside a byte"
    header_refused(tmp_path, {"w": entry(code, [size], 0, 1)}, what, b"x")


@pytest.mark.parametrize(
    ("ranges", "what"),
    [
        ([(4, 8)], "tensor 'a' leaves a hole before it: begins at byte 4, expected 0"),
        ([(0, 4), (8, 12)], "tensor 'b' leaves a hole before it: begins at byte 8, expected 4"),
        (
            [(0, 4), (2, 6)],
            "tensor 'b' overlaps the tensor before it: begins at byte 2, expected 4",
        ),
        (
            [(0, 4), (0, 4)],
            "tensor 'b' overlaps the tensor before it: begins at byte 0, expected 4",
        ),
        (
            [(10**4299, 10**4299 + 4)],
            "tensor 'a' leaves a hole before it: begins at byte 1000",
        ),
    ],
)
def test_holes_and_overlaps_are_refused(
    tmp_path: Path, ranges: list[tuple[int, int]], what: str
) -> None:
    header = {
        name: entry("F32", [1], begin, end)
        for name, (begin, end) in zip("abc", ranges, strict=False)
    }
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(12)))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {what}")


def test_names_are_printed_escaped_and_kept_as_they_are(tmp_path: Path) -> None:
    hostile_name = "w\x1b[31m\n\u202e"
    what = "tensor 'w\\x1b[31m\\n\\u202e' has the unknown dtype 'X'"
    header_refused(tmp_path, {hostile_name: entry("X", [1], 0, 4)}, what)
    path = tmp_path / "good.safetensors"
    path.write_bytes(safetensors_bytes({hostile_name: entry("F32", [1], 0, 4)}, FOUR_BYTES))
    assert list(open_checkpoint(path).tensors) == [hostile_name]


def test_a_name_of_a_megabyte_makes_a_short_message(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_bytes({"w" * 10**6: entry("X", [1], 0, 4)}, FOUR_BYTES))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 2100


# -- against the library that defines the format


def reference(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return what the safetensors library reads, None if it refuses."""
    try:
        found = deserialize(raw)  # type: ignore[no-untyped-call]  # the library has no hints here
    except SafetensorError:
        return None
    return {
        name: (value["dtype"], tuple(value["shape"]), bytes(value["data"])) for name, value in found
    }


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return what the reader reads, None if it refuses; any other exception goes through."""
    try:
        checkpoint = open_checkpoint(path)
    except CkptavgError:
        return None
    found = {
        name: (str(value.dtype.code), value.shape, read_tensor(checkpoint, name))
        for name, value in checkpoint.tensors.items()
    }
    checkpoint.close()
    return found


FRAGMENTS = [
    b"0", b"-0", b"-1", b"1", b"4", b"8", b"12", b"1.0", b"1e2", b"1e999", b"true", b"null", b"NaN",
    b"[]", b"[0]", b"[1,2]", b"{}", b'""', b'"w"', b'"\\u0000"', b'"\\ud800"', b'"\\ud83d\\ude00"',
    b"18446744073709551615", b"18446744073709551616", b"9223372036854775808", b",", b":", b"[",
    b"]", b"{", b"}", b'"', b"\\", b" ", b"\t", b"\x00", b"\xff", b"\xc3\xa9", b'"__metadata__"',
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"F16"', b'"F4"', b'"BOOL"', b'"C64"', b'"x":1,',
]  # fmt: skip


def mutations(seed: int, count: int) -> list[bytes]:
    """Return damaged headers, each a few small changes away from a good one."""
    rng = random.Random(seed)
    good = [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F16","shape":[1,2],"data_offsets":[8,12]}}',
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        b'"v":{"dtype":"U8","shape":[4,1],"data_offsets":[8,12]}}',
        b'{"a":{"dtype":"BOOL","shape":[0,3],"data_offsets":[0,0]},'
        b'"b":{"dtype":"F8_E4M3","shape":[12],"data_offsets":[0,12]}}',
        b'{"f":{"dtype":"F4","shape":[8,3],"data_offsets":[0,12]}}',
    ]
    headers = []
    for _ in range(count):
        header = bytearray(rng.choice(good))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.randrange(len(header))
            kind = rng.randrange(8)
            if kind == 0:
                header[at] = rng.randrange(256)
            elif kind == 1:
                header[at : at + rng.randint(1, 6)] = b""
            elif kind == 2:
                header[at:at] = rng.choice(FRAGMENTS)
            elif kind == 3:
                header[at : at + rng.randint(1, 4)] = rng.choice(FRAGMENTS)
            elif kind == 4:  # a value for a value
                ends = [i for i, byte in enumerate(header) if byte in b',:[]{}"']
                first, last = sorted(rng.sample(ends, 2)) if len(ends) > 1 else (0, 0)
                header[first + 1 : last] = rng.choice(FRAGMENTS)
            elif kind == 5:  # a number or a letter for another
                places = [i for i, byte in enumerate(header) if chr(byte).isalnum()]
                header[rng.choice(places or [0])] = rng.choice(b"0123489abFU")
            elif kind == 6:
                ends = [i for i, byte in enumerate(header) if byte in b",:[]{}"]
                at = rng.choice(ends or [0])
                header[at:at] = rng.choice((b" ", b"\n", b"\t ", b"\r", b"\x0b"))
            else:
                first, last = sorted((at, rng.randrange(len(header))))
                header[at:at] = header[first:last]
            if not header:
                break
        headers.append(bytes(header))
    return headers


def test_nothing_is_accepted_that_the_library_refuses_or_reads_differently(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    accepted = 0
    for header in mutations(seed=11, count=6000):
        raw = safetensors_bytes(header, bytes(range(12)))
        path.write_bytes(raw)
        found = ours(path)
        if found is not None:
            assert found == reference(raw), raw
            accepted += 1
    assert 100 < accepted < 3000  # else the mutations are too wild, or too tame, to test anything


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 1 << 20, 1 << 62, 1 << 63, (1 << 64) - 1])
def test_no_header_length_is_read_otherwise_than_by_the_library(
    tmp_path: Path, length: int
) -> None:
    raw = safetensors_bytes(ONE, FOUR_BYTES, header_bytes=length)
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw)
    assert ours(path) is reference(raw) is None


def test_real_files_are_read_as_by_the_library(tmp_path: Path) -> None:
    raw = save({"a": ones(3, 2), "b": zeros(0), "c": ones(()).bool()}, {"format": "pt"})
    path = tmp_path / "w.safetensors"
    path.write_bytes(raw)
    assert ours(path) == reference(raw) is not None
