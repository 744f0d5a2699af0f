"""Files that would cost much time or memory before they are found to be bad.

Each is small on the storage, or sparse; ``MAX_SECONDS`` and ``MAX_GROWTH_BYTES`` bound what may be
spent on it. The last thing in a file is what makes it bad, where a reader could stop earlier.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from hostile import Member as ZipMember
from hostile import (
    entry,
    group,
    legacy_bytes,
    mapping,
    name,
    number,
    pickled,
    safetensors_bytes,
    tensor,
    text,
    torch_bytes,
    torch_members,
    zip_bytes,
)

from faults.case import Build, Case, alone, good_safetensors

_EVIL = name("os", "system")


def cases() -> Sequence[Case]:
    """Return the cases."""
    return [*_headers(), *_indexes(), *_pickles(), *_archives(), *_side_files()]


# -- safetensors headers


def _entries(count: int, *, first: str = "t") -> str:
    """Return the text of so many entries of empty tensors, without braces around."""
    return ",".join(
        f'"{first}{at}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for at in range(count)
    )


def _headers() -> Iterator[Case]:
    last = '"z":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}'
    texts = {
        "many-tensors": ("{" + _entries(60_000) + f",{last}" + "}", "needs 4 bytes"),
        "too-many-tensors": ("{" + _entries(300_000) + "}", "tensors, at most|are read"),
        "overlapping": (
            "{" + ",".join(f'"{at}":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
                           for at in range(60_000)) + "}",
            "overlaps",
        ),
        "many-dimensions": (
            json.dumps({"w": entry("F32", [1] * 100_000, 0, 4)}), "100000 dimensions"
        ),
        "million-dimensions": (
            json.dumps({"w": entry("F32", [1] * 1_000_000, 0, 4)}), "dimensions|at most"
        ),
        "deep": ('{"w":' + "[" * 1_000_000, "not valid JSON|at most"),
        "deep-objects": ('{"w":' * 200_000, "not valid JSON|at most"),
        "deep-and-closed": ('{"w":' + "[" * 100_000 + "]" * 100_000 + "}", "JSON|at most|nested"),
        "many-objects": ('{"w":[' + "{}," * 250_000 + "{}]}", "other fields|at most"),
        "many-lists": ('{"w":[' + "[]," * 450_000 + "[]]}", "other fields|at most"),
        "many-numbers": ('{"w":[' + "1," * 2_900_000 + "1]}", "other fields|at most"),
        "many-texts": ('{"w":[' + '"",' * 2_900_000 + '""]}', "other fields|at most"),
        "many-names": ("{" + ",".join(f'"{at}":0' for at in range(1_000_000)) + "}",
                       "other fields|at most"),
        "long-number": ('{"w":' + "9" * 4_000_000 + "}", "not valid JSON|other fields"),
        "long-fraction": ('{"w":0.' + "9" * 8_000_000 + "}", "other fields"),
        "long-text": ('{"w":"' + "x" * 11_000_000 + '"}', "other fields"),
        "long-escapes": ('{"w":"' + "\\u00e9" * 1_900_000 + '"}', "other fields"),
        "long-name": ("{" + json.dumps("x" * 10_000_000) + ':{"dtype":"F32","shape":[2],'
                      '"data_offsets":[0,8]}}', "characters"),
        "spaces": ("{" + " " * 11_000_000 + "x}", "not valid JSON"),
        "huge": ("{" + " " * 50_000_000 + "}", "are read"),
        "names-again": ('{"w":0,' * 1 + ",".join(['"w":0'] * 900_000) + "}", "twice|at most"),
    }  # fmt: skip
    for title, (header, refusal) in texts.items():
        yield Case(
            name=f"cost/header-{title}",
            why="A header is bounded before anything is made of it.",
            build=alone(safetensors_bytes(header, b"\0" * 8)),
            refusal=refusal,
        )
    yield Case(
        name="cost/header-length-of-a-sparse-file",
        why="A header of 100 MB is never read for a model.",
        build=_sparse(struct.pack("<Q", 99_999_000) + b"{", 100_000_000),
        refusal="has a header of 99999000 bytes",
    )
    yield Case(
        name="cost/shape-of-a-terabyte",
        why="Nothing is allocated by what a shape says.",
        build=alone(safetensors_bytes({"w": entry("F32", [2**38], 0, 2**40)}, b"\0" * 8)),
        refusal="truncated",
    )


def _sparse(beginning: bytes, nbytes: int) -> Build:
    """Return what builds a file that begins so and has this size, most of it holes."""

    def build(directory: Path) -> Sequence[str]:
        (directory / "good.safetensors").write_bytes(good_safetensors())
        with (directory / "bad.safetensors").open("wb") as file:
            file.write(beginning)
            file.truncate(nbytes)
        return ["good.safetensors", "bad.safetensors"]

    return build


# -- indexes


def _indexes() -> Iterator[Case]:
    shard = "model-00001-of-00002.safetensors"
    names = {f"layer.{at}.weight": shard for at in range(150_000)}
    texts = {
        "many-names": (json.dumps({"weight_map": {**names, "z": "../z"}}), "only plain file names"),
        "many-shards": (
            json.dumps({"weight_map": {f"{at}": f"{at}.safetensors" for at in range(20_000)}}),
            "more than 10000 shards",
        ),
        "too-many-names": (
            json.dumps({"weight_map": {f"{at}": shard for at in range(400_000)}}), "at most"
        ),
        "deep": ('{"weight_map":' + "[" * 400_000 + "]" * 400_000 + "}", "JSON|nested|at most"),
        "long-shard-name": (json.dumps({"weight_map": {"w": "x" * 20_000_000}}), "shard"),
        "spaces": ('{"weight_map":' + " " * 23_000_000 + "{}}", "no weight_map"),
        "too-long": ('{"weight_map":' + " " * 40_000_000 + "{}}", "too many"),
    }  # fmt: skip
    for title, (content, refusal) in texts.items():

        def build(directory: Path, content: str = content) -> Sequence[str]:
            (directory / "bad").mkdir()
            (directory / "bad" / "model.safetensors.index.json").write_text(content)
            (directory / "bad" / shard).write_bytes(good_safetensors())
            return ["bad"]

        yield Case(
            name=f"cost/index-{title}",
            why="An index is bounded before anything is made of it.",
            build=build,
            refusal=refusal,
        )


# -- pickles


def _pickles() -> Iterator[Case]:
    many = {
        "nothing": b"N",
        "numbers": b"J\xff\xff\xff\x7f",
        "floats": b"G" + struct.pack(">d", 0.1),
        "texts": text("x"),
        "lists": b"]",
        "dicts": b"}",
        "tuples": b"N\x85",
        "names": name("torch", "float32"),
        "instances": name("collections", "OrderedDict") + b")R",
        "tensors": tensor(),
        "bytes": b"C\x01x",
    }
    for title, value in many.items():
        count = min(3_000_000 // max(len(value) // 8, 1), 30_000_000 // len(value))
        for ending, refusal in (("evil", "Python code|more than"), ("cut", "damaged|more than")):
            content = b"](" + value * count + (b"e" + _EVIL if ending == "evil" else b"")
            yield Case(
                name=f"cost/pickle-many-{title}-{ending}",
                why="What a pickle makes is bounded, and so is what it may do.",
                build=alone(torch_bytes(content), "bad.pt"),
                refusal=refusal,
            )
    nested = b")" + b"2\x86" * 5000  # a tuple of itself twice, 5000 times
    bombs = {
        "hash": mapping([(nested, b"N")]),
        "hash-in-a-set": b"\x8f(" + nested + b"\x90",
        "deep-list": b"]" * 900_000 + b"a" * 899_999 + _EVIL,
        "deep-tuple": b")" + b"\x85" * 900_000 + _EVIL,
        "memo": b"".join(b"Nr" + struct.pack("<I", at) + b"0" for at in range(600_000)) + _EVIL,
        "memo-far": b"Nr\xff\xff\xff\x7f0" + _EVIL,
        "marks": b"(" * 1_900_000 + _EVIL,
        "long-text": b"X" + struct.pack("<I", 30_000_000) + b"x" * 30_000_000 + _EVIL,
        "text-beyond-the-end": b"X" + struct.pack("<I", 2**32 - 1) + b"x",
        "bytes-beyond-the-end": b"\x8e" + struct.pack("<Q", 2**62) + b"x",
        "long-integer": b"\x8b" + struct.pack("<i", 8_000_000) + b"\xff" * 8_000_000,
        "long-integer-in-text": b"I" + b"9" * 4_000_000 + b"\n",
        "frames": b"\x95" + b"\0" * 8 + (b"\x95" + b"\xff" * 8) * 1_500_000 + _EVIL,
        "doubling": b"](" + b"N" * 1000 + b"t" + b"2\x86" * 60 + _EVIL,
        "one-list-in-many-dicts": b"](" + b"N" * 100_000 + b"e"
        + (b"q\x000" + (name("builtins", "dict") + b"(h\x00tR0") * 400_000) + b"N" + _EVIL,
    }  # fmt: skip
    for title, content in bombs.items():
        yield Case(
            name=f"cost/pickle-{title}",
            why="A few bytes may not stand for work or memory without end.",
            build=alone(torch_bytes(content), "bad.pt"),
            refusal="damaged|Python code|more than|integer|no weights|tensor|ends early",
        )
    yield Case(
        name="cost/pickle-too-long",
        why="No pickle of a model has 40 MB.",
        build=alone(
            torch_bytes(b"X" + struct.pack("<I", 40_000_000) + b"x" * 40_000_000), "bad.pt"
        ),
        refusal="at most 33554432 are allowed",
    )
    yield Case(
        name="cost/legacy-pickle-too-long",
        why="The old format states no lengths; its beginning is not read without end.",
        build=alone(
            legacy_bytes(b"X" + struct.pack("<I", 40_000_000) + b"x" * 40_000_000), "bad.pt"
        ),
        refusal="more than the 33554432 bytes",
    )
    yield Case(
        name="cost/stride-0",
        why="Sixteen bytes may not become 256 GiB.",
        build=alone(torch_bytes(mapping({"w": tensor((2**36,), (0,))})), "bad.pt"),
        refusal="expanded view",
    )
    yield Case(
        name="cost/storage-of-a-terabyte",
        why="Nothing is allocated by what a storage says.",
        build=alone(
            torch_bytes(
                mapping(
                    {"w": tensor((2**38,), stored=group(
                        text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"),
                        number(2**38),
                    ) + b"Q")}
                )
            ),
            "bad.pt",
        ),
        refusal="bytes, expected",
    )  # fmt: skip


# -- zip directories


def _archives() -> Iterator[Case]:
    good = torch_members(pickled(mapping({"w": tensor()})))
    many = [ZipMember(name=f"archive/data/x{at}") for at in range(60_000)]
    yield Case(
        name="cost/zip-many-members",
        why="The directory of a zip file is bounded.",
        build=alone(
            zip_bytes([*good, *many, ZipMember(name="archive/x", method=8)], zip64={}), "bad.pt"
        ),
        refusal="compressed|members|directory",
    )
    arrays = [
        ZipMember(name=f"{at}.npy", content=b"\x93NUMPY\x01\0\x04\0{}{}") for at in range(30_000)
    ]
    yield Case(
        name="cost/npz-many-arrays",
        why="Each array has a header of its own, to be read.",
        build=alone(zip_bytes(arrays, zip64={}), "bad.npz"),
        refusal="arrays, at most",
    )
    header = b"\x93NUMPY\x02\0" + struct.pack("<I", 4000)
    hard = [
        ZipMember(name=f"{at}.npy", content=header + (b"(" * 3999 + b"\n")) for at in range(2000)
    ]
    yield Case(
        name="cost/npz-deep-headers",
        why="A header is matched, never evaluated.",
        build=alone(zip_bytes(hard), "bad.npz"),
        refusal="damaged header",
    )
    bomb = ZipMember(name="archive/data/0", content=b"x" * 100, method=8, size=2**31)
    yield Case(
        name="cost/zip-bomb",
        why="Nothing is ever decompressed.",
        build=alone(zip_bytes([*good[:2], bomb, *good[3:]]), "bad.pt"),
        refusal="compressed",
    )


# -- files beside weights


def _side_files() -> Iterator[Case]:
    texts = {
        "config.json": '{"x":' + "[" * 500_000,
        "trainer_state.json": '{"log_history":[' + '{"step":1,"loss":1.5},' * 100_000,
        "adapter_config.json": '{"x":"' + "x" * 40_000_000 + '"}',
    }
    for filename, content in texts.items():

        def build(
            directory: Path, filename: str = filename, content: str = content
        ) -> Sequence[str]:
            (directory / "bad").mkdir()
            weights = "adapter_model" if filename.startswith("adapter") else "model"
            (directory / "bad" / f"{weights}.safetensors").write_bytes(good_safetensors())
            (directory / "bad" / filename).write_text(content)
            return ["bad"]

        yield Case(
            name=f"cost/{filename.removesuffix('.json')}",
            why="What lies beside the weights is bounded, too.",
            build=build,
            refusal="JSON|at most|too many",
        )
