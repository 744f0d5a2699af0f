"""torch files of the format before torch 1.6, from the files torch writes to hostile ones."""

import pickle
import random
import struct
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_contract import CheckpointContract, refused_at_every_length, same_content
from conftest import save_checkpoint
from hostile import (
    call,
    group,
    legacy_bytes,
    mapping,
    name,
    number,
    storage,
    tensor,
    text,
    whole,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from ckptavg import average_checkpoints
from ckptavg.checkpoint import open_checkpoint
from ckptavg.checkpoint.pickles import FoundPickle, read_pickle_at
from ckptavg.errors import CheckpointError, CkptavgError


def save_legacy(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False, **options)
    return path


class TestTorchLegacy(CheckpointContract):
    layout = "torch file"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_legacy({"state_dict": dict(tensors), "epoch": 3}, directory / "model.pt")


class TestShardsOfTheOldFormat(CheckpointContract):
    layout = "sharded torch directory"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = save_checkpoint(directory / "model", tensors, "sharded torch")
        for shard in path.glob("*.bin"):
            save_legacy(torch.load(shard, weights_only=True), shard)
        return path

    def data_file(self, path: Path) -> Path:
        return path / "pytorch_model-00001-of-00003.bin"


def written(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "w.pt"
    path.write_bytes(raw)
    return path


def refused(path: Path, what: str) -> None:
    """Check that a file is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=whole(f"{path}: {what}")):
        open_checkpoint(path)


ONE = mapping({"w": tensor()})
IDENTITY = (text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(4))


# -- what torch writes


@pytest.mark.parametrize("protocol", range(2, 6))
def test_files_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    tensors = {
        "w": torch.randn(3, 4),
        "b": torch.randn(4).bfloat16(),
        "u": torch.arange(3).to(torch.uint16),
        "t": torch.randn(4, 5).T,
        "none": torch.empty(0),
    }
    path = save_legacy({"model": tensors, "step": 7}, tmp_path / "w", pickle_protocol=protocol)
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, tensors)
    assert (checkpoint.layout, checkpoint.step) == ("torch file", 7)
    checkpoint.close()


def test_a_trainers_file_with_optimizer_and_shared_storages_is_read(tmp_path: Path) -> None:
    first, last = nn.Linear(40, 30), nn.Linear(30, 40)
    last.weight = nn.Parameter(first.weight.T)
    model = nn.Sequential(first, nn.BatchNorm1d(30), last)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}
    checkpoint = open_checkpoint(save_legacy(content, tmp_path / "w.pt"))
    assert same_content(checkpoint, model.state_dict())
    assert checkpoint.epoch == 2


def test_a_pickle_longer_than_what_is_read_first_is_read_on(tmp_path: Path) -> None:
    tensors = {f"layer.{index}.weight": torch.full((3,), float(index)) for index in range(2000)}
    path = save_legacy(tensors, tmp_path / "w.pt")
    assert same_content(open_checkpoint(path), tensors)


def test_old_and_new_files_are_averaged_together(tmp_path: Path) -> None:
    values = [torch.full((3,), float(index)) for index in range(2)]
    save_legacy({"w": values[0]}, tmp_path / "step_1.pt")
    torch.save({"w": values[1]}, tmp_path / "step_2.pt")
    average_checkpoints([f"{tmp_path}/*.pt"], tmp_path / "out", device="cpu")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [0.5] * 3


def test_a_whole_module_is_refused_by_its_name(tmp_path: Path) -> None:
    path = save_legacy(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"needs Python code 'torch\.nn\.modules\.linear"):
        open_checkpoint(path)


# -- damaged and hostile ones


def test_the_files_made_here_are_as_torch_reads_them(tmp_path: Path) -> None:
    content = mapping({"w": tensor(stored=group(*IDENTITY, b"N") + b"Q")})
    path = written(tmp_path, legacy_bytes(content))
    expected = {"w": torch.arange(4.0)}
    assert same_content(open_checkpoint(path), expected)
    assert torch.equal(torch.load(path, weights_only=True)["w"], expected["w"])


SYSTEM = call(name("os", "system"), text("touch canary"))
NEEDS_CODE = (
    "needs Python code 'os.system', which is never run; save the weights alone "
    "(torch.save(model.state_dict(), ...)) and average those files"
)


@pytest.mark.parametrize("which", ["version", "machine", "value", "keys"])
def test_code_in_any_pickle_is_refused(
    tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = legacy_bytes(SYSTEM) if which == "value" else legacy_bytes(ONE, **{which: SYSTEM})  # type: ignore[arg-type]  # operations, all of them
    refused(written(tmp_path, raw), NEEDS_CODE)
    assert not (tmp_path / "canary").exists()


def test_code_behind_the_magic_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = legacy_bytes(ONE)
    magic = raw[2 : raw.index(b".")]
    refused(written(tmp_path, legacy_bytes(ONE, magic=magic + SYSTEM)), NEEDS_CODE)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (
            legacy_bytes(ONE, magic=number(0x1950A86A20F9469CFC6C) + b"0N"),
            "does not begin with the magic number of torch files",
        ),
        (
            legacy_bytes(ONE, version=number(1002)),
            "is not of protocol version 1001 of torch files",
        ),
        (legacy_bytes(ONE, machine=mapping({"little_endian": b"\x89"})), "big-endian"),
        (legacy_bytes(ONE, machine=b"N"), "big-endian"),
        (legacy_bytes(ONE, keys=b"N"), "has a damaged list of storages"),
        (legacy_bytes(ONE, keys=b"]Na"), "has a damaged list of storages"),
        (
            legacy_bytes(ONE, [("1", 4, bytes(16))]),
            "lists a storage '1' that its pickle does not mention once",
        ),
        (
            legacy_bytes(ONE, [("0", 4, bytes(16))] * 2),
            "lists a storage '0' that its pickle does not mention once",
        ),
        (legacy_bytes(ONE, []), "the storage of tensor 'w' is missing"),
        (
            legacy_bytes(ONE, [("0", 5, bytes(16))]),
            "the storage of tensor 'w' has 5 elements, expected 4",
        ),
        (
            legacy_bytes(ONE, [("0", -4, bytes(16))]),
            "the storage of tensor 'w' has -4 elements, expected 4",
        ),
        (
            legacy_bytes(ONE, [("0", 2**63 - 1, bytes(16))]),
            "the storage of tensor 'w' has 9223372036854775807 elements, expected 4",
        ),
        (
            legacy_bytes(mapping({"w": tensor(), "v": tensor([40], stored=storage(numel=40))})),
            "refers to the storage '0' in two ways",
        ),
        (
            legacy_bytes(mapping({"w": tensor(stored=storage(kind="QInt8Storage"))})),
            "holds quantised tensors; average the full-precision weights",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:40],
)
def test_a_damaged_file_is_refused(tmp_path: Path, raw: bytes, what: str) -> None:
    if what == "big-endian":
        what = "was written on a big-endian machine"
    refused(written(tmp_path, raw), what)


def test_views_of_storages_are_refused_by_name(tmp_path: Path) -> None:
    view = group(text("1"), number(0), number(4))
    content = mapping({"w": tensor(stored=group(*IDENTITY, view) + b"Q")})
    refused(
        written(tmp_path, legacy_bytes(content)),
        "holds views of storages (view_metadata), which torch no longer writes; load it once with "
        "torch.load(..., weights_only=True) and save it again with torch.save",
    )


def test_storages_that_do_not_fill_the_file_are_refused(tmp_path: Path) -> None:
    size = len(legacy_bytes(ONE))
    refused(
        written(tmp_path, legacy_bytes(ONE, after=b"x")),
        f"has {size + 1} bytes, expected {size}: it has bytes left over",
    )
    refused(
        written(tmp_path, legacy_bytes(ONE)[:-1]),
        f"has {size - 1} bytes, expected {size}: the torch file is truncated",
    )
    refused(
        written(tmp_path, legacy_bytes(ONE)[:50]),
        "has 50 bytes, which end inside its pickles: the torch file is truncated",
    )


@pytest.mark.parametrize("numel", [2**40, 2**62, 2**400], ids=str)
def test_huge_storages_are_refused_without_allocating_them(tmp_path: Path, numel: int) -> None:
    content = mapping({"w": tensor([numel % 2**62], stored=storage(numel=numel))})
    path = written(tmp_path, legacy_bytes(content))
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="the torch file is truncated$"):
        open_checkpoint(path)
    assert time.perf_counter() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_argument_past_the_end_of_the_file_is_a_truncation(tmp_path: Path) -> None:
    raw = legacy_bytes(b"B" + struct.pack("<I", 2**32 - 1))
    refused(
        written(tmp_path, raw),
        f"has {len(raw)} bytes, which end inside its pickles: the torch file is truncated",
    )


def test_pickles_that_are_too_long_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptavg.checkpoint.torch_legacy.MAX_PICKLE_BYTES", 100)
    refused(
        written(tmp_path, legacy_bytes(ONE)),
        "its pickles have more than the 100 bytes that are allowed",
    )


def test_a_pickle_that_is_refused_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, legacy_bytes(ONE, version=b"R") + bytes(10**6))
    read: list[int] = []

    def noted(raw: bytes, start: int, label: str) -> FoundPickle | None:
        read.append(len(raw))
        return read_pickle_at(raw, start, label)

    monkeypatch.setattr("ckptavg.checkpoint.torch_legacy.read_pickle_at", noted)
    refused(path, "its pickle is damaged (IndexError)")
    assert read == [512, 512]


# -- whatever the bytes


def small_file(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors = {"a": torch.arange(5).to(torch.int16), "b": torch.arange(6.0).reshape(3, 2).T}
    return save_legacy(tensors, tmp_path / "w.pt"), tensors


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    refused_at_every_length(small_file(tmp_path)[0])


def test_changed_bytes_of_the_structure_are_refused_or_harmless(tmp_path: Path) -> None:
    path, tensors = small_file(tmp_path)
    raw = path.read_bytes()
    n_structure = len(raw) - 2 * 8 - 10 - 24
    expected = {name: tuple(value.shape) for name, value in tensors.items()}
    rng = random.Random(3)
    refusals = 0
    for at in [*range(n_structure), *rng.choices(range(n_structure), k=1000)]:
        changed = bytearray(raw)
        changed[at] ^= rng.randint(1, 255)
        path.write_bytes(changed)
        try:
            checkpoint = open_checkpoint(path)
        except CkptavgError:
            refusals += 1
            continue
        # the pickle has no checksum: another name, dtype or place may be described, inside the file
        assert len(checkpoint.tensors) <= len(expected)
        for info in checkpoint.tensors.values():
            assert info.nbytes <= len(raw)
        checkpoint.close()
    assert refusals > 500


def test_a_plain_pickle_is_no_torch_file(tmp_path: Path) -> None:
    refused(
        written(tmp_path, pickle.dumps({"w": [1.0]})),
        "is a plain pickle, which is never run; save the weights with torch.save or safetensors",
    )
