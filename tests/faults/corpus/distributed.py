"""torch.distributed.checkpoint directories: what ``.metadata`` says, and the files that it names.

The ``.metadata`` of bad ones is put together operation by operation; ``w`` is a float32 tensor of
shape [4, 2], the numbers 0 to 7, in ``__0_0.distcp``.
"""

import json
import os
import random
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import torch
from dcp_files import (
    FILES,
    FILESYSTEM,
    METADATA,
    Box,
    Call,
    Global,
    Object,
    Operations,
    chunk,
    columns_first,
    cut,
    dcp_files,
    described,
    grid,
    guillotine,
    index,
    metadata,
    operations,
    part_of,
    pickled,
    place,
    save_dcp,
    saved_bytes,
    size,
    whole,
)
from hostile import entry, safetensors_bytes
from torch import Tensor

from faults.case import Build, Case, good_safetensors
from faults.corpus.pickled_code import SOURCE
from faults.corpus.torch_files import COMMAND, EVIL, EVIL_PICKLE

FILE, HALVES = FILES[:2]
VALUE = torch.arange(8.0).reshape(4, 2)
STORED = saved_bytes(VALUE)
TOP, BOTTOM = saved_bytes(VALUE[:2].clone()), saved_bytes(VALUE[2:].clone())
SHAPE, ORIGIN = size(4, 2), size(0, 0)
FAR = 2**62
HARM = "torch's own reader loads .metadata with plain pickle: whoever wrote it chooses what runs."
Told = tuple[str, str, Any, str]  # name, why, .metadata as a value or its bytes, refusal


def cases() -> Sequence[Case]:
    """Return the cases of this module."""
    return [
        *_refused("dcp-code", _code(), ".metadata"),
        *_refused("dcp-path", _paths(), ".metadata"),
        *_refused("dcp-metadata", [*_contents(), *_fields()], ".metadata"),
        *_refused("dcp-place", _places(), FILE),
        *_refused("dcp-parts", _parts(), "bad: tensor 'w'"),
        *_refused("dcp-stored", _stored(), "bad: "),
        *_part_files(),
        *_files(),
        *_shards(),
        *_good(),
    ]


def one_part(
    *,
    shape: Any = SHAPE,
    first: Any = ORIGIN,
    part: Any = SHAPE,
    stored: Object | None = None,
    planner: Any = None,
    **fields: Any,
) -> Object:
    """Return what ``.metadata`` says of ``w`` in one part."""
    return metadata(
        {"w": described(shape, [chunk(first, part)], **fields)},
        {index("w", first): place(FILE, 0, len(STORED)) if stored is None else stored},
        planner,
    )


def with_fields(**fields: Any) -> Object:
    """Return the whole of ``.metadata`` with some fields replaced."""
    told = one_part()
    return Object(told.cls, told.state | fields)


def directory_of(
    told: Any, data: bytes = STORED, change: Callable[[Path], object] = lambda _: None
) -> Build:
    """Return what builds a good checkpoint, and the directory ``bad`` around a ``.metadata``."""

    def build(directory: Path) -> Sequence[str]:
        header = {"w": entry("F32", [4, 2], 0, 32)}
        good = safetensors_bytes(header, struct.pack("<8f", *range(8)))
        (directory / "good.safetensors").write_bytes(good)
        (directory / "x.distcp").write_bytes(STORED)
        bad = directory / "bad"
        (bad / "sub").mkdir(parents=True)
        (bad / "sub" / "x.distcp").write_bytes(STORED)
        (bad / ".metadata").write_bytes(told if isinstance(told, bytes) else pickled(told))
        (bad / FILE).write_bytes(data)
        (bad / HALVES).write_bytes(TOP + BOTTOM)
        change(bad)
        return ["good.safetensors", "bad"]

    return build


def _refused(kind: str, rows: Sequence[Told], culprit: str) -> list[Case]:
    culprit = culprit if culprit.startswith("bad") else f"bad/{culprit}"
    return [
        Case(
            name=f"{kind}/{one}", why=why, build=directory_of(told), refusal=refusal,
            culprit=culprit,
        )
        for one, why, told, refusal in rows
    ]  # fmt: skip


# -- code


def _code() -> list[Told]:
    bad = Operations(EVIL)
    key = Operations(hostile.mapping([(EVIL, b"N")]))
    named = r"needs Python code 'os\.system'"
    places = {
        "root": bad,
        "state": Object(Global(METADATA, "Metadata"), bad),
        "entry": with_fields(state_dict_metadata={"w": bad}),
        "name": with_fields(state_dict_metadata=key),
        "dtype": one_part(dtype=bad),
        "shape": one_part(shape=bad),
        "parts": metadata({"w": described(SHAPE, bad)}, {}),
        "index": with_fields(storage_data=key),
        "file-name": one_part(stored=place(bad, 0, 1)),
        "extension": one_part(stored=place(FILE, 0, 1, transform_descriptors=[bad])),
        "planner": one_part(planner={"w": ("w", bad)}),
        "storage-meta": with_fields(storage_meta=bad),
        "unknown-field": with_fields(surprise=bad),
    }
    names = (
        ("builtins", "eval", SOURCE),
        ("builtins", "getattr", COMMAND),
        ("posix", "system", COMMAND),
        ("torch", "load", COMMAND),
        (FILESYSTEM, "FileSystem", b""),
        (METADATA, "os.system", COMMAND),
        ("torch.distributed.checkpoint.default_planner", "DefaultLoadPlanner", b""),
        ("torch.distributed.checkpoint.planner", "WriteItem", b""),
        ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor", b""),
        ("megatron.core.dist_checkpointing.mapping", "ShardedObject", b""),
    )
    return [
        *((f"in-the-{where}", HARM, told, named) for where, told in places.items()),
        *(
            (f"{module}.{attribute}", "Metadata needs 13 names, and no other.",
             with_fields(storage_meta=Operations(
                 hostile.call(hostile.stack_name(module, attribute), argument))),
             rf"needs Python code '{re.escape(f'{module}.{attribute}')}'")
            for module, attribute, argument in names
        ),
    ]  # fmt: skip


# -- names of files


def _paths() -> list[Told]:
    why = "A file that .metadata names lies in the directory itself, and nowhere else."
    plain = r"only plain file names"
    names = {
        "parent": "../x.distcp", "parent-of-parent": "../../x.distcp", "parent-itself": "..",
        "itself": ".", "nothing": "", "root": "/", "absolute": "/etc/passwd",
        "device": "/dev/zero", "below": "sub/x.distcp", "below-and-up": "sub/../x.distcp",
        "dot": "./__0_0.distcp", "slash-at-the-end": f"{FILE}/", "two-slashes": "//x",
        "backslash": "..\\x.distcp", "drive": "C:\\x.distcp", "relative-to-a-drive": "C:x.distcp",
        "share": "\\\\host\\share\\x", "NUL": f"{FILE}\0.txt", "url": "file:///etc/passwd",
        "hub": "hf://org/model/x", "home": "~/x",
    }  # fmt: skip
    others: Mapping[str, Any] = {
        "none": None, "number": 3, "bytes": FILE.encode(), "list": [FILE], "tuple": (FILE,),
        "path": Call(Global("pathlib", "PosixPath"), ("..", "x.distcp")),
    }  # fmt: skip
    length = len(STORED)
    return [
        *(
            (one, why, one_part(stored=place(path, 0, length)), plain)
            for one, path in names.items()
        ),
        *(
            (f"no-string-{one}", "The name of a file is a string.",
             one_part(stored=place(path, 0, length)), plain)
            for one, path in others.items()
        ),
    ]  # fmt: skip


def _files() -> list[Case]:
    """Return directories whose files are not what they should be."""

    def link(target: str, name: str = FILE) -> Callable[[Path], object]:
        def change(bad: Path) -> None:
            (bad / name).unlink(missing_ok=True)
            (bad / name).symlink_to(target)

        return change

    def outside(make: Callable[[Path], object], name: str = FILE) -> Callable[[Path], object]:
        def change(bad: Path) -> None:
            make(bad.parent / "other")
            link("../other", name)(bad)

        return change

    def instead(make: Callable[[Path], object], name: str = FILE) -> Callable[[Path], object]:
        def change(bad: Path) -> None:
            (bad / name).unlink()
            make(bad / name)

        return change

    regular, missing = r"not a regular file", r"is missing"
    rows: Sequence[tuple[str, Callable[[Path], object], str, str]] = (
        ("missing", lambda bad: (bad / FILE).unlink(), missing, FILE),
        ("link-to-nothing", link("absent"), r"no such file", FILE),
        ("link-to-itself", link(FILE), r"too many levels", FILE),
        ("link-to-a-device", link("/dev/zero"), regular, FILE),
        ("link-to-the-terminal", link("/dev/stdin"), regular, FILE),
        ("link-out-to-a-fifo", outside(os.mkfifo), regular, FILE),
        ("link-out-to-a-directory", outside(Path.mkdir), r"is a directory", FILE),
        ("fifo", instead(os.mkfifo), regular, FILE),
        ("directory", instead(Path.mkdir), r"is a directory", FILE),
        ("metadata-fifo", instead(os.mkfifo, ".metadata"), regular, ".metadata"),
        ("metadata-directory", instead(Path.mkdir, ".metadata"), r"is a directory", ".metadata"),
        ("metadata-link-to-nothing", link("absent", ".metadata"), r"no such file", ".metadata"),
        ("metadata-link-out-to-a-fifo", outside(os.mkfifo, ".metadata"), regular, ".metadata"),
        ("metadata-missing", lambda bad: (bad / ".metadata").unlink(), r"no \.metadata", ""),
    )
    return [
        Case(
            name=f"dcp-file/{one}",
            why="Every file that makes up a checkpoint is a regular one, and is there.",
            build=directory_of(one_part(), change=change),
            refusal=refusal,
            culprit=f"bad/{culprit}" if culprit else "bad",
        )
        for one, change, refusal, culprit in rows
    ]


# -- .metadata


def _contents() -> list[Told]:
    good = pickled(one_part())
    early = r"ends early"
    unread = r"(pickle is damaged|pickle operation|does not hold checkpoint metadata)"
    no_metadata = r"does not hold checkpoint metadata"
    return [
        ("empty", "An empty .metadata says nothing.", b"", early),
        *(
            (f"cut-{what}", "The pickle ends inside a value.", good[:end], early)
            for what, end in (("after-a-byte", 1), ("in-the-middle", 400), ("before-STOP", -1))
        ),
        ("html", "A web page is no .metadata.", b"<!DOCTYPE html><html>", unread),
        ("json", "The metadata is a pickle.", b"{}", unread),
        ("lfs-pointer", "The metadata is a pickle.",
         b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", unread),
        ("torch-file", "The metadata is a pickle of its own.", STORED, unread),
        ("zeros", "The metadata is a pickle.", bytes(4096), unread),
        ("dict", "The root is an object of the class Metadata.", pickled({}), no_metadata),
        ("another-class", "The root is an object of the class Metadata.",
         chunk(ORIGIN, SHAPE), no_metadata),
        ("class-itself", "The root is an object of the class Metadata.",
         Global(METADATA, "Metadata"), no_metadata),
        ("without-fields", "An object of Metadata has fields.",
         Object(Global(METADATA, "Metadata"), {}), r"state_dict_metadata is not a mapping"),
    ]  # fmt: skip


def _fields() -> list[Told]:
    sizes = r"shape is not a tuple of sizes"
    no_string = r"name is not a string"
    w = operations(described(SHAPE, [chunk(ORIGIN, SHAPE)]))
    other = operations(described(size(2, 2), [chunk(ORIGIN, size(2, 2))]))
    at, later = operations(place(FILE, 0, len(STORED))), operations(place(FILE, 8, 8))
    key = operations(index("w", ORIGIN))
    name = hostile.text("w")
    twice = r"(twice|two|more than once)"
    mappings: Sequence[tuple[str, Mapping[str, Any], str]] = (
        ("entries-are-a-list", {"state_dict_metadata": []}, r"state_dict_metadata is not"),
        ("places-are-a-list", {"storage_data": []}, r"storage_data is not"),
        ("places-are-missing", {"storage_data": None}, r"storage_data is not"),
        ("entry-is-a-number", {"state_dict_metadata": {"w": 3}}, r"'w' is described by a int"),
        ("entry-is-a-chunk", {"state_dict_metadata": {"w": chunk(ORIGIN, SHAPE)}},
         r"'w' is described by a .*ChunkStorageMetadata"),
        ("parts-are-a-number", {"state_dict_metadata": {"w": described(SHAPE, 3)}},
         r"list of parts"),
        ("part-is-a-number", {"state_dict_metadata": {"w": described(SHAPE, [3])}}, sizes),
        ("name-is-a-number", {"state_dict_metadata": {3: described(SHAPE, [])}}, no_string),
        ("name-is-no-unicode", {"state_dict_metadata": {"\ud800": described(SHAPE, [])}},
         r"not valid Unicode"),
        ("index-is-a-name", {"storage_data": {"w": place(FILE, 0, 1)}}, no_string),
        ("index-of-a-number", {"storage_data": {index(3, ORIGIN): place(FILE, 0, 1)}}, no_string),
        ("place-is-a-number", {"storage_data": {index("w", ORIGIN): 3}}, r"sizes|file names"),
        ("path-of-none", {"planner_data": {"w": (None,)}}, no_string),
        ("path-no-unicode", {"planner_data": {"w": ("\ud800",)}}, r"not valid Unicode"),
        ("name-twice",
         {"state_dict_metadata": Operations(hostile.mapping([(name, other), (name, w)]))}, twice),
        ("place-twice",
         {"storage_data": Operations(hostile.mapping([(key, later), (key, at)]))}, twice),
        ("path-twice",
         {"planner_data": Operations(hostile.mapping(
             [(name, operations(("v",))), (name, operations(("w",)))]))}, twice),
    )  # fmt: skip
    values: Sequence[tuple[str, Object, str]] = (
        ("shape-negative", one_part(shape=(-4, 2)), sizes),
        ("shape-negative-twice", one_part(shape=(-4, -2)), sizes),
        ("shape-of-2**63", one_part(shape=(2**63, 2)), sizes),
        ("shape-of-truth-values", one_part(shape=(True, True)), sizes),
        ("shape-of-floats", one_part(shape=(4.0, 2.0)), sizes),
        ("shape-in-words", one_part(shape="4, 2"), sizes),
        ("shape-of-none", one_part(shape=None), sizes),
        ("65-dimensions", one_part(shape=(1,) * 65, first=(0,) * 65, part=(1,) * 65), sizes),
        ("part-negative", one_part(part=(4, -2)), sizes),
        ("part-begins-before", one_part(first=(-1, 0)), sizes),
        ("offset-negative", one_part(stored=place(FILE, -1, 10)), sizes),
        ("length-negative", one_part(stored=place(FILE, 0, -1)), sizes),
        ("offset-of-2**63", one_part(stored=place(FILE, 2**63, 1)), sizes),
        ("length-of-2**200", one_part(stored=place(FILE, 0, 2**200)), sizes),
        ("offset-of-a-truth-value", one_part(stored=place(FILE, True, len(STORED) - 1)), sizes),
        ("offset-of-a-float", one_part(stored=place(FILE, 0.0, len(STORED))), sizes),
        ("length-of-none", one_part(stored=place(FILE, 0, None)), sizes),
        *(
            (f"dtype-{what}", one_part(dtype=dtype), r"'w' has no dtype")
            for what, dtype in (
                ("in-words", "torch.float32"), ("none", None), ("number", 6),
                ("of-Python", Global("builtins", "float")),
                ("unknown", Global("torch", "per_tensor_affine")),
                ("storage-class", Global("torch", "FloatStorage")),
            )
        ),
        ("compressed",
         one_part(stored=place(FILE, 0, len(STORED), transform_descriptors=["zstd"])),
         r"compressed or encrypted"),
    )  # fmt: skip
    parts = Operations(
        b"](" + operations(chunk(size(0), size(1))) + b"q\x05" + b"h\x05" * 100_000 + b"e"
    )
    paths: Sequence[tuple[str, Any]] = (
        ("one-path-of-two", {"w": ("w",), "v": ("w",)}),
        ("one-path-below-another", {"w": ("model",), "v": ("model", "v")}),
        ("number-and-its-text", {"w": (1,), "v": ("1",)}),
    )
    two = {one: described(size(0), []) for one in ("w", "v")}
    return [
        *(
            (one, "Each field of .metadata has one type, and each name stands once.",
             with_fields(**fields), refusal)
            for one, fields, refusal in mappings
        ),
        *(
            (one, "Sizes, offsets and lengths are whole numbers below 2**63.", told, refusal)
            for one, told, refusal in values
        ),
        *(
            (f"planner-{one}", "Two tensors cannot have one place in the state dict.",
             metadata(two, {}, planner), r"not the only entry in its place")
            for one, planner in paths
        ),
        ("parts-beyond-counting", "A tensor in 100,001 parts is an attack, not a checkpoint.",
         metadata({"w": described(size(100_001), parts)}, {}), r"saved in 100001 parts"),
    ]  # fmt: skip


# -- places


def _places() -> list[Told]:
    length = len(STORED)
    cut, broken = r"is truncated", r"(no whole torch file|zip|truncated|safetensors)"
    why = "A part is a whole torch file at its offset, of its length."
    return [
        *(
            (one, why, one_part(stored=place(FILE, offset, nbytes)), refusal)
            for one, offset, nbytes, refusal in (
                ("one-byte-past-the-end", 1, length, cut),
                ("length-too-large", 0, length + 1, cut),
                ("far-past-the-end", FAR, FAR, cut),
                ("sum-that-wraps-around", 2**63 - 8, 2**63 - 8, cut),
                ("no-bytes", 0, 0, broken),
                ("no-bytes-at-the-end", length, 0, broken),
                ("one-byte", 0, 1, broken),
                ("length-too-small", 0, length - 1, broken),
                ("offset-too-large", 1, length - 1, broken),
                ("in-the-middle", 64, 200, broken),
            )
        ),
        *(
            (f"dtype-{dtype}", "The part itself says that it is float32.",
             one_part(dtype=Global("torch", dtype)), r"holds something else at byte 0")
            for dtype in ("float64", "float16", "int32", "bool", "complex64")
        ),
        *(
            (f"shape-{'x'.join(map(str, shape))}", "The part itself says that it is [4, 2].",
             one_part(shape=size(*shape), first=size(*(0 for _ in shape)), part=size(*shape)),
             r"holds something else at byte 0")
            for shape in ((2, 4), (8,), (2, 2), (8, 2), (4, 2, 1))
        ),
    ]  # fmt: skip


def _in_boxes(shape: Sequence[int], *boxes: Box, missing: int = 0) -> Object:
    """Return a ``.metadata`` whose parts all lie in the one file, the last ones nowhere."""
    stored = {
        index("w", size(*first)): place(FILE, 0, len(STORED))
        for first, _ in boxes[: len(boxes) - missing]
    }
    chunks = [chunk(size(*first), size(*part)) for first, part in boxes]
    return metadata({"w": described(size(*shape), chunks)}, stored)


def _parts() -> list[Told]:
    hold, overlap, outside = r"its parts hold {}:", r"parts that overlap", r"lies outside it"
    boxes: Sequence[tuple[str, tuple[int, ...], Sequence[Box], str]] = (
        ("rows-missing", (6, 2), [((0, 0), (4, 2))], hold.format(8)),
        ("columns-missing", (4, 4), [((0, 0), (4, 2))], hold.format(8)),
        ("all-missing", (4, 2), [], hold.format(0)),
        ("exabytes-missing", (FAR, FAR), [((0, 0), (4, 2))], hold.format(8)),
        ("rows-overlap", (6, 2), [((0, 0), (4, 2)), ((2, 0), (4, 2))], overlap),
        ("columns-overlap", (4, 3), [((0, 0), (4, 2)), ((0, 1), (4, 2))], overlap),
        ("corners-overlap", (7, 3), [((0, 0), (4, 2)), ((3, 1), (4, 2))], overlap),
        ("overlap-of-the-right-size", (8, 2),
         [((0, 0), (4, 2)), ((2, 0), (4, 2))], overlap),
        ("outside", (4, 2), [((1, 0), (4, 2))], outside),
        ("far-outside", (4, 2), [((FAR, 0), (4, 2))], outside),
        ("one-inside-one-outside", (4, 2), [((0, 0), (4, 2)), ((4, 0), (4, 2))], outside),
        ("larger-than-the-whole", (2, 2), [((0, 0), (4, 2))], outside),
        ("fewer-dimensions", (8,), [((0, 0), (4, 2))], outside),
        ("more-dimensions", (4, 2, 1), [((0, 0), (4, 2))], outside),
        ("index-of-fewer-dimensions", (4, 2), [((0,), (4, 2))], outside),
        ("something-in-nothing", (0, 2), [((0, 0), (4, 2))], outside),
    )  # fmt: skip
    return [
        (one, "The parts of a tensor cover it, each element once.",
         _in_boxes(shape, *parts), refusal)
        for one, shape, parts, refusal in boxes
    ]  # fmt: skip


def _stored() -> list[Told]:
    nowhere = r"a part of tensor 'w' is stored nowhere"
    boxes = cut((8, 2), 0, [4])
    halves = [size(0, 0), size(2, 0)]
    shared = {one: described(SHAPE, [chunk(ORIGIN, SHAPE)]) for one in ("v", "w")}
    at = place(FILE, 0, len(STORED))
    optimizer = {"w.exp_avg": described(SHAPE, [chunk(ORIGIN, SHAPE)])}
    diagonal = [((at, at), (4, 2)) for at in range(0, 9_600, 4)]
    return [
        ("nowhere", "Every part lies somewhere.", with_fields(storage_data={}), nowhere),
        ("one-of-two-nowhere", "Every part lies somewhere.",
         _in_boxes((8, 2), *boxes, missing=1), nowhere),
        ("under-another-name", "Every part lies somewhere.",
         with_fields(storage_data={index("v", ORIGIN): at}), nowhere),
        ("at-another-index", "Every part lies somewhere.",
         with_fields(storage_data={index("w", size(1, 0)): at}), nowhere),
        ("without-an-index", "Every part lies somewhere.",
         with_fields(storage_data={index("w"): at}), nowhere),
        ("two-parts-at-one-place", "torch writes each part anew; one of the two is lost.",
         metadata({"w": described(SHAPE, [chunk(first, size(2, 2)) for first in halves])},
                  {index("w", first): place(HALVES, 0, len(TOP)) for first in halves}),
         r"'w'.*(same|one) (place|bytes)|overlap"),
        ("two-tensors-at-one-place", "torch writes each tensor anew; one of the two is lost.",
         metadata(shared, {index(one, ORIGIN): at for one in shared}),
         r"'[vw]'.*(same|one) (place|bytes)|overlap"),
        ("no-grid", "2,400 parts that form no grid must not be painted cell by cell.",
         _in_boxes((10_000, 10_000), *diagonal), r"form no grid"),
        ("no-tensors", "An empty state dict holds no weights.", metadata({}, {}), r"no weights"),
        ("only-numbers", "A step is no weight.",
         metadata({"step": Object(Global(METADATA, "BytesStorageMetadata"), None)}, {}),
         r"no weights"),
        ("only-moments", "The moments of an optimizer are no weights.",
         metadata(optimizer, {index("w.exp_avg", ORIGIN): at}), r"optimizer state"),
    ]  # fmt: skip


# -- the files of parts


def _part_files() -> list[Case]:
    def sharded(
        info: object = '{"w": {"saved_offsets": [0, 0]}}', *, dtype: str = "F32", name: str = "w"
    ) -> bytes:
        told = {} if info is None else {"__metadata__": {"DCP_SHARDING_INFO": info}}
        header = told | {name: entry(dtype, [4, 2], 0, 32)}
        return safetensors_bytes(header, struct.pack("<8f", *range(8)))

    elsewhere, no_info = r"holds something else", r"DCP_SHARDING_INFO"
    expanded = saved_bytes(torch.ones(1, 2).expand(4, 2))
    contents: Sequence[tuple[str, bytes, str]] = (
        ("empty", b"", r"is truncated"),
        ("html", b"<!DOCTYPE html>" + bytes(3000), r"zip"),
        ("zeros", bytes(3000), r"zip"),
        ("plain-pickle", EVIL_PICKLE + bytes(3000), r"zip"),
        ("code", hostile.torch_bytes(EVIL), r"needs Python code 'os\.system'"),
        ("code-beside-a-tensor",
         hostile.torch_bytes(hostile.group(hostile.tensor((4, 2)), EVIL)),
         r"needs Python code 'os\.system'"),
        ("old-format", hostile.legacy_bytes(hostile.tensor((4,))), r"zip"),
        ("list", saved_bytes([VALUE]), elsewhere),
        ("state-dict", saved_bytes({"w": VALUE}), elsewhere),
        ("number", saved_bytes(7), elsewhere),
        ("sparse", saved_bytes(VALUE.to_sparse()), elsewhere),
        ("float64", saved_bytes(VALUE.double()), elsewhere),
        ("transposed", saved_bytes(VALUE.T.contiguous()), elsewhere),
        ("expanded", expanded, r"expanded view"),
        ("safetensors-without-places", sharded(None), no_info),
        ("safetensors-places-no-json", sharded("{"), no_info),
        ("safetensors-places-of-another", sharded('{"v": {"saved_offsets": [0, 0]}}'), no_info),
        ("safetensors-places-in-words", sharded('{"w": {"saved_offsets": "0, 0"}}'), no_info),
        ("safetensors-places-negative", sharded('{"w": {"saved_offsets": [0, -1]}}'), no_info),
        ("safetensors-places-of-one-axis", sharded('{"w": {"saved_offsets": [0]}}'), no_info),
        ("safetensors-elsewhere", sharded('{"w": {"saved_offsets": [4, 0]}}'), elsewhere),
        ("safetensors-another-dtype", sharded(dtype="I32"), elsewhere),
        ("safetensors-another-name",
         sharded('{"v": {"saved_offsets": [0, 0]}}', name="v"), elsewhere),
        ("safetensors-truncated", sharded()[:-1], r"has .* bytes"),
        ("safetensors-bytes-left-over", sharded() + b"x", r"has .* bytes"),
    )  # fmt: skip
    found = [
        Case(
            name=f"dcp-part/{one}",
            why="What lies at the place of a part is that part, and says so itself.",
            build=directory_of(one_part(stored=place(FILE, 0, len(content))), content),
            refusal=refusal,
            culprit=f"bad/{FILE}",
        )
        for one, content, refusal in contents
        if content
    ]
    cut = (("empty", b""), ("half", STORED[: len(STORED) // 2]), ("all-but-a-byte", STORED[:-1]))
    return found + [
        Case(
            name=f"dcp-part/truncated-{one}",
            why="A file that is shorter than .metadata says is cut short.",
            build=directory_of(one_part(), content),
            refusal=r"is truncated",
            culprit=f"bad/{FILE}",
        )
        for one, content in cut
    ]


# -- safetensors files of several processes, without .metadata

SHARD = "shard-{:05d}-model-{:05d}-of-{:05d}.safetensors"


def _shard(first: Any, shape: Sequence[int], *, dtype: str = "F32", info: Any = None) -> bytes:
    """Return the file of one process, with its part of ``w``."""
    told = json.dumps({"w": {"saved_offsets": first}}) if info is None else info
    count = shape[0] * shape[1]
    header = {
        "__metadata__": {"DCP_SHARDING_INFO": told},
        "w": entry(dtype, shape, 0, 4 * count),
    }
    return safetensors_bytes(header, struct.pack(f"<{count}f", *range(count)))


def _shards() -> list[Case]:
    top, bottom = _shard([0, 0], [2, 2]), _shard([2, 0], [2, 2])
    first, second, third = (SHARD.format(number, 1, 1) for number in (1, 2, 3))
    rows: Sequence[tuple[str, Mapping[str, bytes], str, str]] = (
        ("process-missing", {first: top, third: bottom}, r"file of process 2 is missing", "bad"),
        ("first-process-missing", {second: bottom}, r"file of process 1 is missing", "bad"),
        ("file-of-the-model-missing",
         {SHARD.format(1, 1, 2): top, SHARD.format(2, 1, 2): bottom}, r"file 2 of", "bad"),
        ("hole", {first: top, second: _shard([3, 0], [2, 2])}, r"its parts hold 8", "bad"),
        ("overlap", {first: top, second: _shard([1, 0], [2, 2])}, r"parts that overlap", "bad"),
        ("same-part-twice", {first: top, second: top}, r"parts that overlap", "bad"),
        ("dtypes-differ", {first: top, second: _shard([2, 0], [2, 2], dtype="I32")},
         r"different dtypes", "bad"),
        ("beyond-counting", {first: top, second: _shard([2**63 - 1, 0], [2, 2])},
         r"impossible size", "bad"),
        ("places-negative", {first: top, second: _shard([-2, 0], [2, 2])},
         r"does not say where", second),
        ("places-no-json", {first: top, second: _shard(None, [2, 2], info="[")},
         r"has no DCP_SHARDING_INFO", second),
        ("places-too-deep", {first: top, second: _shard(None, [2, 2], info="[" * 50_000)},
         r"has no DCP_SHARDING_INFO", second),
        ("places-missing", {first: top, second: good_safetensors()},
         r"has no DCP_SHARDING_INFO", second),
        ("truncated", {first: top, second: bottom[:-1]}, r"has .* bytes", second),
    )  # fmt: skip

    def build_of(files: Mapping[str, bytes]) -> Build:
        def build(directory: Path) -> Sequence[str]:
            (directory / "good.safetensors").write_bytes(good_safetensors())
            (directory / "bad").mkdir()
            for one, content in files.items():
                (directory / "bad" / one).write_bytes(content)
            return ["good.safetensors", "bad"]

        return build

    def alone_in(directory: Path) -> Sequence[str]:
        good, _ = build_of({first: top, second: bottom})(directory)
        return [good, f"bad/{second}"]

    return [
        *(
            Case(
                name=f"dcp-shards/{one}",
                why="The files of all processes together hold each element of a tensor once.",
                build=build_of(files),
                refusal=refusal,
                culprit=culprit if culprit == "bad" else f"bad/{culprit}",
            )
            for one, files, refusal, culprit in rows
        ),
        Case(
            name="dcp-shards/one-process-alone",
            why="A part of a tensor averaged as if it were whole is a fragment.",
            build=alone_in,
            refusal=r"parts of tensors, not whole ones",
        ),
    ]


# -- what must be averaged: the numbers 0 to 7 in one directory and 2 to 9 in the other

Write = Callable[[Path, Tensor], object]


def _two(write: Write) -> Build:
    def build(directory: Path) -> Sequence[str]:
        for label, more in (("a", 0), ("b", 2)):
            write(directory / label, VALUE + more)
        return ["a", "b"]

    return build


def _cut_by(boxes: Callable[[Sequence[int]], list[Box]], **options: Any) -> Write:
    def write(directory: Path, value: Tensor) -> None:
        save_dcp(directory, {"w": value}, lambda _, tensor: boxes(tensor.shape), **options)

    return write


def _with(more: Mapping[str, Any], **options: Any) -> Write:
    return lambda directory, value: save_dcp(directory, {"w": value, **more}, **options)


def _replicated(directory: Path, value: Tensor) -> None:
    files = dcp_files({"w": value})
    files.metadata.state_dict_metadata["w"].chunks *= 2  # type: ignore[union-attr]  # a tensor's
    files.write(directory)


def _linked(directory: Path, value: Tensor) -> None:
    save_dcp(directory, {"w": value}, names=[FILE])
    (directory / FILE).rename(directory.with_suffix(".blob"))
    (directory / FILE).symlink_to(f"../{directory.name}.blob")


def _evil_entries(directory: Path, value: Tensor) -> None:
    """Write entries that are not weights, with code in each of their files."""
    names = ("step", "optimizer.state", "rng")
    files = dcp_files({"w": value, **dict.fromkeys(names, 7)}, names=[FILE])
    raw = hostile.torch_bytes(EVIL)
    for key, stored in files.metadata.storage_data.items():
        if key.fqn in names:
            files.metadata.storage_data[key] = replace(
                stored, offset=len(files.contents[FILE]), length=len(raw)
            )
            files.contents[FILE] += raw
    files.write(directory)


def _evil_beside(directory: Path, value: Tensor) -> None:
    """Write what is read for its step alone, and more, with code in it."""
    save_dcp(directory, {"w": value})
    for one in ("meta.pt", "common.pt"):
        (directory / one).write_bytes(hostile.torch_bytes(EVIL))
    (directory / "x.pkl").write_bytes(EVIL_PICKLE)


def _of_two_processes(directory: Path, value: Tensor) -> None:
    directory.mkdir()
    for process, box in enumerate(cut((4, 2), 1, [1]), start=1):
        data = struct.pack("<4f", *part_of(value, box).flatten().tolist())
        header = {
            "__metadata__": {
                "DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": list(box[0])}})
            },
            "w": entry("F32", [4, 1], 0, 16),
        }
        (directory / SHARD.format(process, 1, 1)).write_bytes(safetensors_bytes(header, data))


def _nested(directory: Path, value: Tensor) -> None:
    saved = {"model.w": value, "optimizer.state.w.exp_avg": value, "step": 5}
    paths: Mapping[str, tuple[str | int, ...]] = {
        "model.w": ("model", "w"),
        "optimizer.state.w.exp_avg": ("optimizer", "state", "w", "exp_avg"),
        "step": ("step",),
    }
    save_dcp(directory, saved, planner=paths)


def _good() -> list[Case]:
    mean = [float(at) for at in range(1, 9)]
    plain = {"w": mean}
    ones = {"s": torch.tensor(3.0), "none": torch.empty(0, 3)}
    written: Sequence[tuple[str, Write, Mapping[str, Sequence[float]]]] = (
        ("one-part", _cut_by(whole), plain),
        ("along-rows", _cut_by(lambda shape: cut(shape, 0, [1, 3])), plain),
        ("along-columns", _cut_by(lambda shape: cut(shape, 1, [1])), plain),
        ("along-both", _cut_by(grid), plain),
        ("unevenly", _cut_by(lambda shape: guillotine(shape, random.Random(5), 4)), plain),
        ("with-empty-parts", _cut_by(lambda shape: cut(shape, 0, [1, 1, 4])), plain),
        ("laid-out-by-columns", _cut_by(grid, laid_out=columns_first), plain),
        ("in-one-file", _cut_by(grid, names=[FILE]), plain),
        ("parts-listed-twice", _replicated, plain),
        ("link-to-a-file", _linked, plain),
        ("numbers-and-emptiness", _with({**ones, "step": 5}), plain | {"s": [3.0], "none": []}),
        ("below-a-key", _nested, plain),
        ("safetensors-of-two-processes", _of_two_processes, plain),
        ("code-in-other-entries", _evil_entries, plain),
        ("code-beside", _evil_beside, plain),
        ("unknown-planner-paths", _with({}, planner={"v": ("x",), "w": ("w",)}), plain),
    )
    return [
        Case(
            name=f"dcp-good/{one}",
            why="Tensors that were saved in parts are whole again; nothing else is loaded.",
            build=_two(write),
            refusal=None,
            values=values,
        )
        for one, write, values in written
    ]
