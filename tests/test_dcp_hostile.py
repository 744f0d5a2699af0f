"""Distributed checkpoints that are damaged or hostile: refused in one line, soon, nothing run."""

import os
import pickle
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from checkpoint_contract import bytes_of, read_tensor, same_content
from dcp_files import (
    FILES,
    METADATA,
    Call,
    Global,
    Object,
    Operations,
    chunk,
    cut,
    dcp_files,
    described,
    index,
    metadata,
    operations,
    pickled,
    place,
    save_dcp,
    saved_bytes,
    size,
)
from hostile import torch_bytes, whole
from test_dcp import save_by_torch
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from ckptavg.checkpoint import open_checkpoint
from ckptavg.errors import CheckpointError, CkptavgError

VALUE = torch.arange(8.0).reshape(4, 2)
TOP, BOTTOM = saved_bytes(VALUE[:3].clone()), saved_bytes(VALUE[3:].clone())
FILE = FILES[0]
SHAPE, ORIGIN = size(4, 2), size(0, 0)
MAX_SECONDS = 1.0
MAX_BYTES = 30 * 2**20


def two_parts(**fields: Any) -> Object:
    """Return what ``.metadata`` says of ``w``, in two parts of one file."""
    state: Any = {
        "w": described(size(4, 2), [chunk(size(0, 0), size(3, 2)), chunk(size(3, 0), size(1, 2))])
    }
    storage = {
        index("w", size(0, 0)): place(FILE, 0, len(TOP)),
        index("w", size(3, 0)): place(FILE, len(TOP), len(BOTTOM)),
    }
    return metadata(**({"state": state, "storage": storage, "planner": {"w": ("w",)}} | fields))


def one_part(
    *,
    shape: Any = SHAPE,
    first: Any = ORIGIN,
    part: Any = SHAPE,
    stored: Object | None = None,
    **fields: Any,
) -> Object:
    """Return what ``.metadata`` says of ``w`` in one part."""
    return metadata(
        {"w": described(shape, [chunk(first, part)], **fields)},
        {index("w", first): place(FILE, 0, len(saved_bytes(VALUE))) if stored is None else stored},
    )


def written(directory: Path, content: Any, data: bytes = TOP + BOTTOM) -> Path:
    """Write a directory of one data file around a ``.metadata``."""
    directory.mkdir(exist_ok=True)
    raw = content if isinstance(content, bytes) else pickled(content)
    (directory / ".metadata").write_bytes(raw)
    (directory / FILE).write_bytes(data)
    return directory


@contextmanager
def soon_and_small() -> Iterator[None]:
    """Check that what is done takes little time and memory."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        yield
        seconds = time.process_time() - begun
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES
    assert seconds < MAX_SECONDS * 4  # watching memory is what takes long


def refused(path: Path, what: str) -> None:
    """Check that a directory is refused with exactly this message, soon, and no file stays open."""
    before = open_descriptors()
    with pytest.raises(CheckpointError, match=whole(f"{path}{what}")), soon_and_small():
        open_checkpoint(path)
    assert open_descriptors() == before


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # numbers, not paths


def test_what_is_put_together_here_is_read(tmp_path: Path) -> None:
    assert same_content(open_checkpoint(written(tmp_path, two_parts())), {"w": VALUE})
    path = written(tmp_path, one_part(), saved_bytes(VALUE))
    assert same_content(open_checkpoint(path), {"w": VALUE})


# -- code


def payloads(canary: str) -> dict[str, tuple[bytes, str]]:
    """Return operations that would make a file, and the name that each is refused for."""
    touch = hostile.text(f"touch {canary}")
    make = hostile.text(f"open({canary!r}, 'w')")
    nested = hostile.call(
        hostile.call(
            hostile.name("builtins", "getattr"), hostile.name("os", "path"), hostile.text("x")
        ),
        touch,
    )
    return {
        "reduce": (hostile.call(hostile.name("os", "system"), touch), "os.system"),
        "posix": (hostile.call(hostile.name("posix", "system"), touch), "posix.system"),
        "eval": (hostile.call(hostile.name("builtins", "eval"), make), "builtins.eval"),
        "exec": (hostile.call(hostile.stack_name("builtins", "exec"), make), "builtins.exec"),
        "nested": (nested, "builtins.getattr"),
        "open": (
            hostile.call(hostile.name("io", "open"), hostile.text(canary), hostile.text("w")),
            "io.open",
        ),
        "new object": (
            hostile.name("subprocess", "Popen") + hostile.group(touch) + b"\x81",
            "subprocess.Popen",
        ),
        "torch's loader": (
            hostile.call(hostile.name("torch", "load"), hostile.text(canary)),
            "torch.load",
        ),
        "a name of torch's checkpoints": (
            hostile.name("torch.distributed.checkpoint.filesystem", "FileSystem") + b")\x81",
            "torch.distributed.checkpoint.filesystem.FileSystem",
        ),
        "a dotted name": (
            hostile.stack_name(METADATA, "os.system"),
            f"{METADATA}.os.system",
        ),
    }


PLACES: dict[str, Callable[[Operations], Any]] = {
    "root": lambda bad: bad,
    "entry": lambda bad: two_parts(state={"w": bad}),
    "unused field": lambda bad: two_parts(storage_meta=bad),
    "path": lambda bad: two_parts(planner={"w": ("w", bad)}),
    "file name": lambda bad: one_part(stored=place(bad, 0, 1)),
    "state": lambda bad: Object(Global(METADATA, "Metadata"), bad),
    "dtype": lambda bad: one_part(dtype=bad),
    "extension": lambda bad: one_part(stored=place(FILE, 0, 1, transform_descriptors=[bad])),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", payloads(""))
def test_code_in_the_metadata_is_refused_and_never_run(
    tmp_path: Path, kind: str, where: str
) -> None:
    canary = tmp_path / "canary"
    bad, named = payloads(str(canary))[kind]
    path = written(tmp_path / "run", PLACES[where](Operations(bad)))
    refused(
        path,
        f"/.metadata: needs Python code '{named}', which is never run; save the weights alone "
        "(torch.save(model.state_dict(), ...)) and average those files",
    )
    assert not canary.exists()


@pytest.mark.parametrize("kind", payloads(""))
@pytest.mark.parametrize("where", ["part", "step"])
def test_code_in_a_part_is_refused_and_never_run(tmp_path: Path, kind: str, where: str) -> None:
    canary = tmp_path / "canary"
    bad, named = payloads(str(canary))[kind]
    files = dcp_files({"w": VALUE, "step": 5}, names=[FILE])
    raw = torch_bytes(bad)
    if where == "part":
        files.contents[FILE] = bytearray(raw)
        files.stored("w", (0, 0)).length = len(raw)
    else:
        step = files.metadata.storage_data[MetadataIndex("step")]
        step.offset, step.length = len(files.contents[FILE]), len(raw)
        files.contents[FILE] += raw
    path = files.write(tmp_path / "run")
    if where == "part":
        with pytest.raises(CheckpointError, match=f"/{FILE}: needs Python code '{named}', which"):
            open_checkpoint(path)
    else:  # not needed, so not worth a refusal
        checkpoint = open_checkpoint(path)
        assert checkpoint.step is None
        assert same_content(checkpoint, {"w": VALUE})
    assert not canary.exists()


# -- files


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "/", "../x.distcp", "/etc/passwd", "sub/x.distcp", "./x.distcp", "x/",
        "..\\x.distcp", "C:\\x.distcp", "\\\\host\\share\\x", "x\0", "//x", "file:///etc/passwd",
        "/dev/zero", "~/x",
    ],
)  # fmt: skip
def test_a_file_outside_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "run", one_part(stored=place(name, 0, 10)))
    for outside in (tmp_path / "x.distcp", tmp_path / "run" / "sub" / "x.distcp"):
        outside.parent.mkdir(exist_ok=True)
        outside.write_bytes(saved_bytes(VALUE))
    printed = name.replace("\0", "\\x00")
    refused(path, f"/.metadata: names '{printed}' as a file: only plain file names are allowed")


@pytest.mark.parametrize("name", [None, 3, b"x", ["x"], ("x",), {"x": "x"}])
def test_a_file_name_that_is_no_string_is_refused(tmp_path: Path, name: Any) -> None:
    path = written(tmp_path, one_part(stored=place(name, 0, 10)))
    with pytest.raises(CheckpointError, match="as a file: only plain file names are allowed"):
        open_checkpoint(path)


def test_a_file_name_no_file_system_takes_is_missing(tmp_path: Path) -> None:
    for name in ("x" * 300, "\ud800"):
        path = written(tmp_path, one_part(stored=place(name, 0, 10)))
        with pytest.raises(CheckpointError, match=r"is missing; \.metadata says it is there$"):
            open_checkpoint(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "run", {"w": VALUE}, names=[FILE])
    (path / FILE).unlink()
    refused(path, f"/{FILE}: is missing; .metadata says it is there")
    (path / FILE).symlink_to("absent")
    refused(path, f"/{FILE}: cannot be opened: no such file or directory")
    (path / FILE).unlink()
    (path / FILE).symlink_to(FILE)
    refused(path, f"/{FILE}: cannot be opened: too many levels of symbolic links")
    (path / FILE).unlink()
    os.mkfifo(path / FILE)
    refused(path, f"/{FILE}: is not a regular file, expected a checkpoint file")
    (path / FILE).unlink()
    (path / FILE).mkdir()
    refused(path, f"/{FILE}: is a directory, expected a checkpoint file")
    for make, kind in ((os.mkfifo, "not a regular file"), (os.mkdir, "a directory")):
        (path / ".metadata").unlink()
        make(path / ".metadata")
        refused(path, f"/.metadata: is {kind}, expected a checkpoint file")
    (path / ".metadata").rmdir()
    (path / ".metadata").symlink_to("absent")
    refused(path, "/.metadata: cannot be opened: no such file or directory")


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "run", {"w": VALUE}, names=[FILE])
    (path / FILE).rename(tmp_path / "blob")
    (path / FILE).symlink_to("../blob")
    assert same_content(open_checkpoint(path), {"w": VALUE})


def test_metadata_over_the_bound_is_refused_unread(tmp_path: Path) -> None:
    path = written(tmp_path, b"")
    os.truncate(path / ".metadata", 256 * 2**20 + 1)
    refused(path, "/.metadata: has 268435457 bytes, at most 268435456 are allowed")


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "its pickle is damaged (it ends early)"),
        (b"{}", "uses the pickle operation 0x7b, which torch never writes"),
        (pickled({}), "is damaged: it does not hold checkpoint metadata"),
        (pickled(chunk((), ())), "is damaged: it does not hold checkpoint metadata"),
        (pickled(Global(METADATA, "Metadata")), "is damaged: it does not hold checkpoint metadata"),
        (
            pickled(Object(Global(METADATA, "Metadata"), {})),
            "is damaged: its state_dict_metadata is not a mapping",
        ),
    ],
)
def test_other_content_is_refused(tmp_path: Path, raw: bytes, what: str) -> None:
    refused(written(tmp_path, raw), f"/.metadata: {what}")


# -- lies


def test_a_part_past_the_end_of_its_file_is_refused(tmp_path: Path) -> None:
    length = len(saved_bytes(VALUE))
    for offset, nbytes, end in ((1, length, length + 1), (2**62, 2**62, 2**63), (0, 2**62, 2**62)):
        path = written(tmp_path, one_part(stored=place(FILE, offset, nbytes)), saved_bytes(VALUE))
        refused(
            path,
            f"/{FILE}: has {length} bytes, but .metadata describes {end}: it is truncated",
        )


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, -1), (2**63, 1), (0, 2**200)])
def test_places_that_cannot_be_are_refused(tmp_path: Path, offset: int, length: int) -> None:
    path = written(tmp_path, one_part(stored=place(FILE, offset, length)))
    refused(path, "/.metadata: is damaged: a shape is not a tuple of sizes")


def test_places_that_hold_no_whole_part_are_refused(tmp_path: Path) -> None:
    raw = saved_bytes(VALUE)
    for offset, length in ((0, 0), (0, 1), (0, len(raw) - 1), (1, len(raw) - 1), (64, 200)):
        path = written(tmp_path, one_part(stored=place(FILE, offset, length)), raw)
        with pytest.raises(CheckpointError, match=f"/{FILE}: "):
            open_checkpoint(path)


def described_as(found: str) -> str:
    return (
        f"/{FILE}: holds something else at byte 0 than the part of tensor 'w' of {found} that "
        ".metadata describes"
    )


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (VALUE.double(), "float32 and shape [4, 2]"),
        (VALUE.int(), "float32 and shape [4, 2]"),
        (VALUE.T.contiguous(), "float32 and shape [4, 2]"),
        (VALUE.flatten(), "float32 and shape [4, 2]"),
        (VALUE[:3].clone(), "float32 and shape [4, 2]"),
        ({"w": VALUE}, "float32 and shape [4, 2]"),
        ([VALUE], "float32 and shape [4, 2]"),
        (7, "float32 and shape [4, 2]"),
        (VALUE.to_sparse(), "float32 and shape [4, 2]"),
    ],
    ids=range(9),
)
def test_a_part_that_is_something_else_is_refused(tmp_path: Path, stored: Any, found: str) -> None:
    raw = saved_bytes(stored)
    path = written(tmp_path, one_part(stored=place(FILE, 0, len(raw))), raw)
    refused(path, described_as(found))


def test_a_part_that_repeats_what_it_stores_is_refused(tmp_path: Path) -> None:
    raw = saved_bytes(torch.ones(1, 2).expand(4, 2))
    path = written(tmp_path, one_part(stored=place(FILE, 0, len(raw))), raw)
    with pytest.raises(CheckpointError, match="tensor 'w' is an expanded view"):
        open_checkpoint(path)


def parts(shape: Sequence[int], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Object:
    """Return a ``.metadata`` whose parts lie back to back in a file, whatever they are."""
    at, storage = 0, {}
    for first, part in boxes:
        length = len(saved_bytes(torch.zeros(part)))
        storage[index("w", size(*first))] = place(FILE, at, length)
        at += length
    return metadata(
        {"w": described(size(*shape), [chunk(size(*f), size(*s)) for f, s in boxes])}, storage
    )


def content(*shapes: tuple[int, ...]) -> bytes:
    return b"".join(saved_bytes(torch.zeros(shape)) for shape in shapes)


@pytest.mark.parametrize(
    ("shape", "boxes", "what"),
    [
        (
            (4, 2),
            [((0, 0), (3, 2))],
            " has 8 elements, but its parts hold 6: a file of the checkpoint is missing or "
            "unfinished",
        ),
        (
            (4, 2),
            [],
            " has 8 elements, but its parts hold 0: a file of the checkpoint is missing or "
            "unfinished",
        ),
        (
            (4, 2),
            [((0, 0), (3, 2)), ((2, 0), (2, 2))],
            " has parts that overlap, one of them at [2, 0]",
        ),
        (
            (2, 2),
            [((0, 0), (2, 1)), ((1, 0), (1, 2))],
            " has parts that overlap, one of them at [1, 0]",
        ),
        (
            (4, 2),
            [((0, 0), (4, 2)), ((4, 0), (1, 2))],
            " of shape [4, 2] has a part of shape [1, 2] at [4, 0], which lies outside it",
        ),
        (
            (4, 2),
            [((2**62, 0), (4, 2))],
            " of shape [4, 2] has a part of shape [4, 2] at [4611686018427387904, 0], which lies "
            "outside it",
        ),
        (
            (4, 2),
            [((0,), (8,))],
            " of shape [4, 2] has a part of shape [8] at [0], which lies outside it",
        ),
        (
            (4, 2),
            [((0, 0), (8,))],
            " of shape [4, 2] has a part of shape [8] at [0, 0], which lies outside it",
        ),
        (
            (8, 1),
            [((0, 0), (8,))],
            " of shape [8, 1] has a part of shape [8] at [0, 0], which lies outside it",
        ),
        (
            (),
            [((0,), (1,))],
            " of shape [] has a part of shape [1] at [0], which lies outside it",
        ),
        (
            (0, 2),
            [((0, 0), (1, 2))],
            " of shape [0, 2] has a part of shape [1, 2] at [0, 0], which lies outside it",
        ),
        (
            (2**62, 2**62),
            [((0, 0), (1, 1))],
            f" has {2**124} elements, but its parts hold 1: a file of the checkpoint is missing or "
            "unfinished",
        ),
    ],
    ids=range(12),
)
def test_parts_that_do_not_make_the_tensor_are_refused(
    tmp_path: Path, shape: tuple[int, ...], boxes: Any, what: str
) -> None:
    path = written(tmp_path, parts(shape, *boxes), content(*(part for _, part in boxes)))
    refused(path, f": tensor 'w'{what}")


def test_a_part_that_is_stored_nowhere_is_refused(tmp_path: Path) -> None:
    what = ": a part of tensor 'w' is stored nowhere"
    refused(written(tmp_path, two_parts(storage={})), what)
    refused(written(tmp_path, two_parts(storage={index("w"): place(FILE, 0, len(TOP))})), what)
    refused(written(tmp_path, two_parts(storage={index("v", size(0, 0)): place(FILE, 0, 9)})), what)


def test_two_entries_in_one_place_are_refused(tmp_path: Path) -> None:
    """Where each had another tensor, one of the two would be lost."""
    for planner, shown in (
        ({"w": ("w",), "v": ("w",)}, "w"),
        ({"w": ("model", "w"), "v": ("model", "w")}, "model.w"),
        ({"w": ("model",), "v": ("model", "w")}, "model.w"),
        ({"w": ("model", "w"), "v": ("model",)}, "model"),
        ({"w": (1,), "v": ("1",)}, "1"),
    ):
        path = save_dcp(tmp_path / "run", {"w": VALUE, "v": VALUE}, planner=planner)
        refused(path, f"/.metadata: is damaged: '{shown}' is not the only entry in its place")


def test_names_and_keys_must_be_text(tmp_path: Path) -> None:
    entry = described(size(0), [])
    what = "/.metadata: is damaged: a name is not"
    for state in ({3: entry}, {None: entry}, {("w",): entry}):
        refused(written(tmp_path, metadata(state, {})), f"{what} a string")
    refused(written(tmp_path, metadata({"\ud800": entry}, {})), f"{what} valid Unicode")
    for planner in ({"w": (None,)}, {"w": (True,)}, {"w": ("model", 1.5)}):
        refused(written(tmp_path, metadata({"w": entry}, {}, planner)), f"{what} a string")
    path = written(tmp_path, metadata({"w": entry}, {}, {"w": ("\ud800",)}))
    refused(path, f"{what} valid Unicode")


@pytest.mark.parametrize(
    "dtype",
    [
        Global("torch", "per_tensor_affine"), Global("builtins", "bool"), Global("torch", "Size"),
        "torch.float32", None, 3, Global("torch", "FloatStorage"),
    ],
)  # fmt: skip
def test_a_dtype_that_is_none_is_refused(tmp_path: Path, dtype: Any) -> None:
    path = written(tmp_path, one_part(dtype=dtype))
    refused(path, "/.metadata: is damaged: 'w' has no dtype that is known")


def test_elements_of_a_few_bits_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, one_part(dtype=Global("torch", "float4_e2m1fn_x2")))
    with pytest.raises(CheckpointError, match="of float4_e2m1fn_x2"):
        open_checkpoint(path)


def test_extensions_are_refused(tmp_path: Path) -> None:
    for descriptors in (["zstd"], {"a": 1}, "x", 3):
        path = written(
            tmp_path, one_part(stored=place(FILE, 0, 9, transform_descriptors=descriptors))
        )
        with pytest.raises(CheckpointError, match="is compressed or encrypted by an extension"):
            open_checkpoint(path)
    nothing: tuple[Any, ...] = (None, [])
    for none in nothing:
        raw = saved_bytes(VALUE)
        stored = place(FILE, 0, len(raw), transform_descriptors=none)
        assert same_content(
            open_checkpoint(written(tmp_path, one_part(stored=stored), raw)), {"w": VALUE}
        )


def test_too_many_dimensions_are_refused(tmp_path: Path) -> None:
    what = "/.metadata: is damaged: a shape is not a tuple of sizes"
    many = (1,) * 65
    for content in (
        one_part(shape=many, first=(0,) * 65, part=many),
        one_part(first=(0,) * 65),
        one_part(part=(1,) * 100_000),
    ):
        refused(written(tmp_path, content), what)


# -- much of it


def test_a_million_parts_are_refused_soon(tmp_path: Path) -> None:
    one = operations(chunk(size(0), size(1))) + b"q\x05"
    many = Operations(b"](" + one + b"h\x05" * 999_999 + b"e")
    path = written(tmp_path, metadata({"w": described(size(10**6), many)}, {}))
    refused(
        path,
        "/.metadata: 'w' is saved in 1000000 parts; at most 100000 of a tensor work, 1000000 of "
        "all",
    )


def test_many_tensors_that_share_their_parts_are_refused_soon(tmp_path: Path) -> None:
    one = operations(chunk(size(0), size(1))) + b"q\x05"
    shared = Operations(b"](" + one + b"h\x05" * 99_999 + b"eq\x06")
    state = {"w": described(size(1), shared)}
    state |= {str(number): described(size(1), Operations(b"h\x06")) for number in range(1000)}
    path = written(tmp_path, metadata(state, {}))
    begun = time.process_time()
    with pytest.raises(CheckpointError, match="is saved in 100000 parts; at most"):
        open_checkpoint(path)
    assert time.process_time() - begun < 4 * MAX_SECONDS


def test_indices_whose_hashes_collide_do_no_harm(tmp_path: Path) -> None:
    prime = 2**61 - 1  # hash(n + prime) is hash(n)
    collisions = list(product((0, prime, 2 * prime, 3 * prime), repeat=7))[:12_000]
    assert len(set(map(hash, collisions))) == 1
    chunks = [chunk(first, first) for first in collisions]
    storage = {index("w", first): place(FILE, 0, 1) for first in collisions}
    path = written(tmp_path, metadata({"w": described((1,) * 7, chunks)}, storage))
    begun = time.process_time()
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    assert time.process_time() - begun < 2 * MAX_SECONDS


def test_a_state_of_many_fields_is_not_searched(tmp_path: Path) -> None:
    """One such state that a thousand parts share must not be searched a thousand times."""
    large = Operations(b"}q\x07(" + b"NN" * 200_000 + b"u")
    rest = Operations(b"h\x07")
    chunks = [Object(Global(METADATA, "ChunkStorageMetadata"), large)]
    chunks += [Object(Global(METADATA, "ChunkStorageMetadata"), rest) for _ in range(1000)]
    path = written(tmp_path, metadata({"w": described(size(1), chunks)}, {}))
    refused(path, "/.metadata: is damaged: a shape is not a tuple of sizes")


def test_a_path_of_many_keys_counts_as_none(tmp_path: Path) -> None:
    path = written(tmp_path, two_parts(planner={"w": ("a",) * 100_000}))
    with soon_and_small():
        assert list(open_checkpoint(path).tensors) == ["w"]


def test_a_deep_or_endless_pickle_is_refused(tmp_path: Path) -> None:
    refused(
        written(tmp_path, b"\x80\x02" + b"(" * 500_000 + b"."),
        "/.metadata: its pickle is damaged (ValueError)",
    )
    deep = Operations(b"]" * 300_000 + b"a" * 299_999)
    with soon_and_small():
        assert list(open_checkpoint(written(tmp_path, two_parts(more=deep))).tensors) == ["w"]


def test_parts_that_form_no_grid_are_refused_soon(tmp_path: Path) -> None:
    boxes = [((at, at), (1, 1)) for at in range(4000)]
    raw = saved_bytes(torch.zeros(1, 1))
    state = {"w": described(size(4000, 4000), [chunk(f, s) for f, s in boxes])}
    storage = {index("w", f): place(FILE, 0, len(raw)) for f, _ in boxes}
    path = written(tmp_path, metadata(state, storage), raw)
    with pytest.raises(CheckpointError, match="is saved in 4000 parts that form no grid"):
        open_checkpoint(path)


# -- whatever is said, and whatever the bytes

REPLACEMENTS: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**62, 2**64, 2**300, 1.5, "", "w", "\ud800", b"w", [], ["w"], [3], (),
    (3,), ((3,),), {}, {"w": 3}, Global("torch", "float32"), Global("torch", "Size"),
    size(4, 2), chunk(size(0, 0), size(4, 2)), place(FILE, 0, 9), index("w", size(0, 0)),
    Object(Global(METADATA, "BytesStorageMetadata"), None),
)  # fmt: skip


def variants(value: Any) -> Iterator[Any]:
    """Yield a value with each part of it, and it itself, replaced by each of many others."""
    for other in REPLACEMENTS:
        if type(other) is not type(value) or other != value:
            yield other
    match value:
        case Object():
            yield from (Object(value.cls, state) for state in variants(value.state))
        case Call():
            yield from (replace(value, arguments=found) for found in variants(value.arguments))
        case dict():
            for key, inner in value.items():
                yield {other: found for other, found in value.items() if other is not key}
                for found in variants(inner):
                    yield {**value, key: found}
                for found in variants(key) if isinstance(key, Object) else REPLACEMENTS[:13]:
                    hashable = found if isinstance(found, Object) else Operations(operations(found))
                    yield {(hashable if one is key else one): of for one, of in value.items()}
        case list() | tuple():
            for at, inner in enumerate(value):
                yield type(value)((*value[:at], *value[at + 1 :]))
                yield type(value)((*value[: at + 1], *value[at:]))
                for found in variants(inner):
                    yield type(value)((*value[:at], found, *value[at + 1 :]))


def opened_or_refused(path: Path) -> bool:
    """Open and read a directory; tell whether that worked; only errors for users may come."""
    try:
        checkpoint = open_checkpoint(path)
    except CkptavgError:
        return False
    try:
        for name in checkpoint.tensors:
            read_tensor(checkpoint, name)
    finally:
        checkpoint.close()
    return True


def test_any_field_of_any_type_is_refused_or_harmless(tmp_path: Path) -> None:
    original = two_parts(
        storage_meta=Object(Global(METADATA, "StorageMeta"), {"checkpoint_id": "x", "save_id": "y"})
    )
    path = written(tmp_path, original)
    expected = {bytes_of(VALUE), bytes_of(VALUE[:3]), bytes_of(VALUE[3:]), b""}
    n_opened = n_refused = 0
    for variant in variants(original):
        (path / ".metadata").write_bytes(pickled(variant))
        try:
            checkpoint = open_checkpoint(path)
        except CkptavgError:
            n_refused += 1
            continue
        for name in checkpoint.tensors:
            assert read_tensor(checkpoint, name) in expected
        checkpoint.close()
        n_opened += 1
    assert n_refused > 1000
    assert n_opened > 100


def small_directory(tmp_path: Path) -> Path:
    """Write a directory as torch pickles it: a tensor in two parts, and a step."""
    return save_dcp(
        tmp_path / "run",
        {"w": torch.arange(6).to(torch.int16).reshape(3, 2), "step": 5},
        lambda _, value: cut(value.shape, 0, [1]),
        names=[FILE],
        planner={"w": ("model", "w"), "step": ("step",)},
    )


@pytest.mark.parametrize("name", [".metadata", FILE])
def test_every_truncation_is_refused(tmp_path: Path, name: str) -> None:
    path = small_directory(tmp_path)
    raw = (path / name).read_bytes()
    for length in range(len(raw)):
        (path / name).write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [(".metadata", 0x01), (".metadata", 0x08), (".metadata", 0xFF), (FILE, 0x01), (FILE, 0xFF)],
)
def test_every_changed_byte_is_refused_or_leaves_a_checkpoint(
    tmp_path: Path, name: str, change: int
) -> None:
    path = small_directory(tmp_path)
    raw = (path / name).read_bytes()
    n_refused = 0
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= change
        (path / name).write_bytes(changed)
        n_refused += not opened_or_refused(path)
    assert n_refused > len(raw) // 8  # files are padded, so that tensors are aligned


@pytest.mark.parametrize("seed", range(4))
def test_mutated_metadata_is_refused_or_leaves_a_checkpoint(tmp_path: Path, seed: int) -> None:
    path = small_directory(tmp_path)
    raw = (path / ".metadata").read_bytes()
    rng = random.Random(seed)
    for _ in range(400):
        changed = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(changed))
            action = rng.randrange(3)
            if action == 0:
                changed[at] = rng.randrange(256)
            elif action == 1:
                del changed[at : at + rng.randint(1, 8)]
            else:
                other = rng.randrange(len(raw))
                changed[at:at] = raw[other : other + rng.randint(1, 40)]
        (path / ".metadata").write_bytes(changed)
        opened_or_refused(path)


# -- the safetensors form


def test_a_process_that_held_two_parts_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """Such a file has room for one part of a name; torch writes the last of them."""
    path = save_by_torch(
        tmp_path / "run",
        {"w": VALUE[:2].clone()},
        serialization_format=SerializationFormat.SAFETENSORS,
    )
    told = pickle.loads((path / ".metadata").read_bytes())
    told.state_dict_metadata["w"].size = VALUE.shape
    told.state_dict_metadata["w"].chunks.append(
        ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((2, 2)))
    )
    (stored,) = told.storage_data.values()
    told.storage_data[MetadataIndex("w", torch.Size((2, 0)))] = stored
    (path / ".metadata").write_bytes(pickle.dumps(told))
    refused(path, described_as("float32 and shape [2, 2]"))
