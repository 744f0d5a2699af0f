"""Factories that several test modules use, and the devices that tests run on."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]

FORMATS = ("safetensors", "sharded safetensors", "torch", "sharded torch")

MakeCheckpoint = Callable[..., Path]

pytest_plugins = [
    "hub_fixtures", "search_fixtures", "landscape_fixtures", "statistic_rows", "faults.tally",
]  # fmt: skip


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Return each device that averaging can run on here."""
    name: str = request.param
    return name


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the work into blocks of 4000 bytes, so that small checkpoints have several."""
    monkeypatch.setattr("ckptavg.blocks.BLOCK_NBYTES", 4000)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Return ``make(name, tensors, layout="safetensors")``, which saves a checkpoint."""

    def make(name: str, tensors: Mapping[str, Tensor], layout: str = "safetensors") -> Path:
        return save_checkpoint(tmp_path / name, tensors, layout)

    return make


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], layout: str) -> Path:
    """Save tensors in one of ``FORMATS``; a file for the single ones, a directory for shards."""
    if layout == "safetensors":
        path = path.with_name(f"{path.name}.safetensors")
        save_file(dict(tensors), path)
    elif layout == "torch":
        path = path.with_name(f"{path.name}.pt")
        torch.save({"epoch": 3, "state_dict": dict(tensors), "optimizer": {"lr": 0.1}}, path)
    elif layout == "sharded safetensors":
        path.mkdir()
        for filename, part in _shards(tensors, "model-{:05d}-of-{:05d}.safetensors"):
            save_file(part, path / filename)
        _write_index(
            path / "model.safetensors.index.json", tensors, "model-{:05d}-of-{:05d}.safetensors"
        )
    elif layout == "sharded torch":
        path.mkdir()
        for filename, part in _shards(tensors, "pytorch_model-{:05d}-of-{:05d}.bin"):
            torch.save(part, path / filename)
        _write_index(
            path / "pytorch_model.bin.index.json", tensors, "pytorch_model-{:05d}-of-{:05d}.bin"
        )
    else:
        raise ValueError(layout)
    return path


def tree(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def copy_of(path: Path, target: Path) -> Path:
    """Copy a checkpoint file or directory."""
    if path.is_dir():
        shutil.copytree(path, target)
    else:
        shutil.copyfile(path, target)
    return target


def _shards(tensors: Mapping[str, Tensor], pattern: str) -> list[tuple[str, dict[str, Tensor]]]:
    names = list(tensors)
    count = min(3, len(names))
    return [
        (
            pattern.format(number + 1, count),
            {name: tensors[name] for name in names[number::count]},
        )
        for number in range(count)
    ]


def _write_index(path: Path, tensors: Mapping[str, Tensor], pattern: str) -> None:
    weight_map = {name: filename for filename, part in _shards(tensors, pattern) for name in part}
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    path.write_text(json.dumps(index))


def float64_mean(values: Sequence[Tensor], coefficients: Sequence[float] | None = None) -> Tensor:
    """Return the reference: float64 sums in order, divided once."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for index, value in enumerate(values):
        coefficient = 1.0 if coefficients is None else coefficients[index]
        term = value.double() * coefficient
        total = term if index == 0 else total + term
    return total / len(values) if coefficients is None else total
