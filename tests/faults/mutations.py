"""Mutants: inputs that nobody wrote, each of them made again by its kind, a seed and its number.

What is mutated are small good checkpoints. Where a format has checksums or lengths around what is
changed, they are put right, so that mutants get past them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from random import Random
from typing import Any

import hostile

from faults import good_inputs
from faults.mutated_bytes import mutated
from faults.mutated_json import Pairs, mutate, parsed, rendered
from faults.mutated_pickles import mutated_pickle
from faults.mutated_zips import mutated_zip, patched

Files = Mapping[str, bytes]

_DTYPE_BITS = {
    "F32": 32, "F64": 64, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8,
    "U16": 16, "U32": 32, "U64": 64, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F128": 128,
}  # fmt: skip
_TENSOR_NAMES = ("w", "b", "", "layer.0.weight", "\u00e9", "\U0001f600", 'a"b', "a\\b", "a/b")
_MAX_FITTED_BYTES = 4096


@dataclass(frozen=True)
class Mutant:
    """One mutated checkpoint.

    Attributes:
        files: Name -> content.
        single: The file that is opened; None if it is the folder of all.
    """

    files: Files
    single: str | None

    @property
    def content(self) -> bytes:
        """Of the single file."""
        return self.files[self.single or ""]


def mutant(kind: str, seed: int, number: int) -> Mutant:
    """Return a mutant; the same for the same arguments."""
    return KINDS[kind](Random(f"{kind} {seed} {number}"))


def _single(content: bytes) -> Mutant:
    return Mutant({"mutant": content}, "mutant")


# -- safetensors


def _safetensors_bytes(rng: Random) -> Mutant:
    raw = rng.choice(good_inputs.safetensors_files())
    header_end = 8 + int.from_bytes(raw[:8], "little")
    others = [good_inputs.some_bytes(rng)]
    return _single(mutated(rng, raw, others, focus=rng.choice(((0, 8), (8, header_end), None))))


def _safetensors_header(rng: Random) -> Mutant:
    header = _random_header(rng)
    whole_bytes = _described_bytes(header)
    if rng.random() < 0.95:
        mutate(rng, header)
    raw = rendered(rng, header)
    described = _described_bytes(header)
    n_bytes = rng.choice((described, described, described, whole_bytes))
    if rng.random() < 0.05:
        n_bytes = max(0, n_bytes + rng.choice((-1, 1, 8)))
    length = len(raw) + (rng.choice((-1, 1, 8)) if rng.random() < 0.02 else 0)
    data = rng.randbytes(min(n_bytes, _MAX_FITTED_BYTES))
    return _single(hostile.safetensors_bytes(raw, data, header_bytes=length))


def _random_header(rng: Random) -> Pairs:
    """Return a header in which everything is right."""
    header = Pairs()
    position = 0
    for name in rng.sample(_TENSOR_NAMES, rng.randint(0, 4)):
        dtype = rng.choice(tuple(_DTYPE_BITS)[: rng.choice((4, len(_DTYPE_BITS)))])
        shape: list[Any] = [rng.choice((0, 1, 1, 2, 3, 4)) for _ in range(rng.randint(0, 4))]
        if rng.random() < 0.01:
            shape = rng.choice(
                ([1] * 64, [1] * 65, [0, 2**62, 2**62], [2**62, 2**62, 0], [2**63, 0])
            )
        nbytes = _nbytes(dtype, shape)
        entry = [
            ("dtype", dtype),
            ("shape", shape),
            ("data_offsets", [position, position + nbytes]),
        ]
        if rng.random() < 0.2:
            rng.shuffle(entry)
        header.items.append([name, Pairs(entry)])
        position += nbytes
    if rng.random() < 0.4:
        texts = rng.sample((("format", "pt"), ("w2", "w"), ("", ""), ("step", "5")), 2)
        metadata = Pairs(texts) if rng.random() < 0.95 else None
        header.items.insert(0, ["__metadata__", metadata])
    if rng.random() < 0.2:
        rng.shuffle(header.items)
    return header


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    bits = _DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return bits // 8


def _described_bytes(header: Pairs) -> int:
    """Return the largest offset that a header states, where that is a small number."""
    largest = 0
    for _, entry in header.items:
        fields = entry.items if type(entry) is Pairs else []
        for key, value in fields:
            if key == "data_offsets" and type(value) is list:
                ends = [int(end) for end in value if type(end) is int]
                largest = max([largest, *(end for end in ends if end <= _MAX_FITTED_BYTES)])
    return largest


# -- torch files of today's format


def _torch_bytes(rng: Random) -> Mutant:
    raw = rng.choice(good_inputs.torch_files())
    return _single(mutated(rng, raw, good_inputs.torch_files()))


def _torch_pickle(rng: Random) -> Mutant:
    parts = rng.choice(good_inputs.torch_parts())
    pickle = mutated_pickle(rng, parts.pickle, _pickles())
    storages = dict(parts.storages)
    if rng.random() < 0.2:
        key = rng.choice(list(storages))
        storages[key] = rng.randbytes(rng.choice((0, 1, 2, 4, 8, 12, 16, 24, 32)))
    return _single(hostile.zip_bytes(hostile.torch_members(pickle, storages)))


@cache
def _pickles() -> Sequence[bytes]:
    return tuple(parts.pickle for parts in good_inputs.torch_parts())


def _torch_zip(rng: Random) -> Mutant:
    if rng.random() < 0.3:
        return _single(patched(rng, rng.choice(good_inputs.torch_files())))
    parts = rng.choice(good_inputs.torch_parts())
    return _single(mutated_zip(rng, hostile.torch_members(*parts)))


# -- torch files of the old format


def _legacy_bytes(rng: Random) -> Mutant:
    raw = rng.choice(good_inputs.legacy_files())
    return _single(mutated(rng, raw, good_inputs.legacy_files()))


def _legacy_pickle(rng: Random) -> Mutant:
    parts = rng.choice(good_inputs.legacy_parts())
    pickles = list(parts.pickles)
    at = rng.choice((0, 1, 2, 3, 3, 3, 3, 3, 4, 4))
    pickles[at] = mutated_pickle(rng, pickles[at], pickles)
    if rng.random() < 0.05:
        rng.shuffle(pickles)
    storages = parts.storages
    if rng.random() < 0.2:
        storages = mutated(rng, storages, [storages])
    return _single(b"".join((*pickles, storages)))


# -- numpy files


def _npz_bytes(rng: Random) -> Mutant:
    raw = rng.choice(good_inputs.npz_files())
    return _single(mutated(rng, raw, good_inputs.npz_files()))


_GOOD_DESCRIPTIONS = {
    "'<f4'": 4, "'<f8'": 8, "'<f2'": 2, "'|b1'": 1, "'<i8'": 8, "'<u2'": 2, "'<c8'": 8,
    "'<c16'": 16,
}  # fmt: skip
_GOOD_SHAPES = ((4,), (2, 2), (), (0,), (1, 4, 1), (2, 0, 3), (3, 2))
_DESCRIPTIONS = (
    *_GOOD_DESCRIPTIONS, "'>f4'", "'|O'", "'<U3'", "'|S4'", "'<V4'", "'<M8[ns]'", "'<f16'", "'f4'",
    "'=f4'", "'<f'", "''", "'<'", "None", "4", "b'<f4'", "[('a', '<f4')]", "('<f4', (2,))",
    "'<f4\\x00'", "'\\udc80'", "'<f0'", "'|f4'", "'<b1'", "'|u1'",
)  # fmt: skip
_SHAPES = (
    *map(str, _GOOD_SHAPES), "(4)", "[4]", "(-4,)", "(4.0,)", "(True,)",
    "(4, -1)", "(9223372036854775807,)", "(9223372036854775808,)", "(0, 9223372036854775807, 4)",
    "(4294967296, 4294967296)", "(" + "1, " * 64 + ")", "(" + "1, " * 65 + ")", "'4'", "None",
    "(4L,)", "(2**2,)", "(0x4,)", "(4,),", "({},)", "(1_0,)", "(04,)", "(\u0664,)", "(4, )",
    "(4j,)",
)  # fmt: skip
_ORDERS = ("False", "True", "0", "1", "None", "false", "'C'", "not True", "[]")


def _npz_header(rng: Random) -> Mutant:
    contents = [_mutated_array(rng) for _ in range(rng.randint(1, 2))]
    members = [
        hostile.Member(name=f"a{number}.npy", content=content)
        for number, content in enumerate(contents)
    ]
    if rng.random() < 0.1:
        return _single(mutated_zip(rng, members))
    return _single(hostile.zip_bytes(members))


def _mutated_array(rng: Random) -> bytes:
    descr, itemsize = rng.choice(list(_GOOD_DESCRIPTIONS.items()))
    shape = rng.choice(_GOOD_SHAPES)
    fields = [("descr", descr), ("fortran_order", rng.choice(_ORDERS[:2])), ("shape", str(shape))]
    if rng.random() < 0.5:
        at = rng.randrange(3)
        fields[at] = fields[at][0], rng.choice((_DESCRIPTIONS, _ORDERS, _SHAPES)[at])
    if rng.random() < 0.1:
        rng.shuffle(fields)
    if rng.random() < 0.05:
        fields.insert(rng.randint(0, 3), rng.choice((*fields, ("other", "1"), ("descr", "'<f8'"))))
    if rng.random() < 0.03:
        del fields[rng.randrange(len(fields))]
    header = "{" + "".join(f"'{key}': {value}, " for key, value in fields) + "}"
    if rng.random() < 0.05:
        header = rng.choice(
            (
                "[" * 200 + "]" * 200, "(" * 5000, "-" * 3000 + "1", header * 2, header + " # x",
                "", " " + header, "\n" + header, header.replace(" ", ""), header + " " * 4100,
                "{1: " * 90,
                "__import__('os').getpid()", "{'a': 1}", header.replace("'", '"'), header + "\0",
                header.replace("'", "\u2019"), "1" * 5000, f"({header})", f"{header} if 1 else 0",
            )
        )  # fmt: skip
    nbytes = itemsize * prod(shape)
    if rng.random() < 0.2:
        nbytes = rng.choice((0, 1, 2, 4, 8, 16, 64))
    version = rng.choice((1, 1, 2, 3)) if rng.random() < 0.98 else 4
    raw = good_inputs.npy(header, rng.randbytes(nbytes), version)
    return mutated(rng, raw, [raw]) if rng.random() < 0.2 else raw


# -- directories


def _dcp_metadata(rng: Random) -> Mutant:
    files = dict(rng.choice(good_inputs.dcp_directories()))
    raw, others = files[".metadata"], _metadata_pickles()
    change = mutated if rng.random() < 0.2 else mutated_pickle
    files[".metadata"] = change(rng, raw, others)
    return Mutant(files, None)


@cache
def _metadata_pickles() -> Sequence[bytes]:
    return tuple(files[".metadata"] for files in good_inputs.dcp_directories())


def _dcp_parts(rng: Random) -> Mutant:
    files = dict(rng.choice(good_inputs.dcp_directories()))
    name = rng.choice([name for name in files if name != ".metadata"])
    files[name] = mutated(rng, files[name], list(files.values()))
    if rng.random() < 0.02:
        del files[name]
    return Mutant(files, None)


def _json_files(rng: Random) -> Mutant:
    sharded, parts = good_inputs.sharded_directories()
    if rng.random() < 0.3:
        return Mutant(_mutated_parts(rng, parts), None)
    files = dict(sharded)
    names = [name for name in files if name.endswith(".json")]
    name = rng.choice((good_inputs.INDEX, *names))
    if rng.random() < 0.2:
        files[name] = mutated(rng, files[name], list(files.values()))
    else:
        value = parsed(files[name])
        mutate(rng, value)
        files[name] = rendered(rng, value)
    return Mutant(files, None)


def _mutated_parts(rng: Random, parts: Files) -> Files:
    """Change what files of parts say of where in their tensors the parts begin."""
    files = dict(parts)
    name = rng.choice(list(files))
    raw = files[name]
    data_start = 8 + int.from_bytes(raw[:8], "little")
    header = parsed(raw[8:data_start])
    metadata = next(value for key, value in header.items if key == "__metadata__")
    told = parsed(metadata.items[0][1])
    mutate(rng, told)
    metadata.items[0][1] = rendered(rng, told).decode("utf-8", "replace")
    if rng.random() < 0.2:
        mutate(rng, header)
    files[name] = hostile.safetensors_bytes(rendered(rng, header), raw[data_start:])
    return files


KINDS: Mapping[str, Callable[[Random], Mutant]] = {
    "safetensors-bytes": _safetensors_bytes,
    "safetensors-header": _safetensors_header,
    "torch-bytes": _torch_bytes,
    "torch-pickle": _torch_pickle,
    "torch-zip": _torch_zip,
    "legacy-bytes": _legacy_bytes,
    "legacy-pickle": _legacy_pickle,
    "npz-bytes": _npz_bytes,
    "npz-header": _npz_header,
    "dcp-metadata": _dcp_metadata,
    "dcp-parts": _dcp_parts,
    "json-files": _json_files,
}
