"""What is computed in groups: its memory, from the Hub, and by several processes."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from hub_fixtures import REPO, same_as_local, upload
from loopback_hub import LoopbackHub
from safetensors.torch import save_file
from test_processes import torchrun
from torch import Tensor

from ckptavg import Recipe, average_checkpoints, open_checkpoint, plan_average
from ckptavg.derive import _FIXED_NBYTES, derive

PREFIX = "base_model.model"


class Nowhere:
    """Takes what is written and forgets it."""

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        pass


def adapters(folder: Path, m: int, n: int, rank: int, count: int) -> list[Path]:
    paths = []
    for number in range(1, count + 1):
        torch.manual_seed(number)
        directory = folder / f"step{number}"
        directory.mkdir()
        tensors = {
            f"{PREFIX}.x.lora_A.weight": torch.randn(rank, n),
            f"{PREFIX}.x.lora_B.weight": torch.randn(m, rank),
            f"{PREFIX}.head.weight": torch.randn(9, 9),
        }
        save_file(tensors, directory / "adapter_model.safetensors")
        told = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
        (directory / "adapter_config.json").write_text(json.dumps(told))
        paths.append(directory)
    return paths


def normed(folder: Path, magnitude: tuple[int, ...], direction: tuple[int, ...]) -> list[Path]:
    def tensors() -> dict[str, Tensor]:
        return {"w.weight_g": torch.rand(magnitude) + 1, "w.weight_v": torch.randn(direction)}

    return saved(folder, tensors)


def spectral(folder: Path, shape: tuple[int, ...], dim: int) -> list[Path]:
    def tensors() -> dict[str, Tensor]:
        weight = torch.randn(shape)
        u, _, v = torch.linalg.svd(weight.movedim(dim, 0).flatten(1), full_matrices=False)
        return {
            "w.weight_orig": weight,
            "w.weight_u": u[:, 0].clone(),
            "w.weight_v": v[0].clone(),
        }

    return saved(folder, tensors)


def saved(folder: Path, tensors: Callable[[], dict[str, Tensor]]) -> list[Path]:
    paths = []
    for number in range(3):
        torch.manual_seed(number)
        paths.append(folder / f"{number}.safetensors")
        save_file(tensors(), paths[-1])
    return paths


Case = tuple[Callable[[Path], list[Path]], dict[str, Any]]
CASES: dict[str, Case] = {
    "concatenation": (lambda at: adapters(at, 3000, 2000, 16, 6), {}),
    "truncation": (lambda at: adapters(at, 3000, 2000, 16, 6), {"adapter_rank": 8}),
    "truncation of many ranks": (lambda at: adapters(at, 64, 64, 256, 3), {"adapter_rank": 8}),
    "one long factor": (lambda at: adapters(at, 64, 50_000, 4, 3), {"adapter_rank": 4}),
    "factors": (lambda at: adapters(at, 3000, 2000, 16, 6), {"adapter_factors": True}),
    "factors of many ranks": (lambda at: adapters(at, 64, 64, 200, 3), {"adapter_factors": True}),
    "weight norm by rows": (lambda at: normed(at, (1500, 1), (1500, 800)), {}),
    "weight norm by columns": (lambda at: normed(at, (1, 800), (1500, 800)), {}),
    "weight norm of all": (lambda at: normed(at, (), (1500, 800)), {"dtype": "bfloat16"}),
    "spectral norm": (lambda at: spectral(at, (256, 256, 9), 0), {}),
    "spectral norm of dimension 1": (lambda at: spectral(at, (256, 256, 9), 1), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_was_said(tmp_path: Path, case: str) -> None:
    make, recipe = CASES[case]
    checkpoints = [open_checkpoint(path) for path in make(tmp_path)]
    plan = plan_average(checkpoints, Recipe(**recipe))
    assert plan.derived.groups
    tracemalloc.start()
    try:
        derive(plan, checkpoints, [Nowhere()], lambda done: None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= _FIXED_NBYTES + plan.derived.working_nbytes


def test_concatenation_needs_no_more_for_larger_factors(tmp_path: Path) -> None:
    plans = []
    for size in (100, 5000):
        (tmp_path / f"{size}").mkdir()
        paths = adapters(tmp_path / f"{size}", size, size, 8, 2)
        plans.append(plan_average([open_checkpoint(path) for path in paths], Recipe()))
    assert plans[0].derived.working_nbytes == plans[1].derived.working_nbytes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter_rank": 3},
        {"adapter_factors": True},
        {"schemes": ["uniform", "uniform:last=2"]},
    ],
)
def test_adapters_on_the_hub_average_like_local_copies(
    hub: LoopbackHub, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Streamed, read more than once, and verified after the last read."""
    (tmp_path / "local").mkdir()
    local = adapters(tmp_path / "local", 400, 300, 4, 3)
    for directory in local:
        upload(hub, directory)
    if "schemes" in options:  # a directory for each
        result = average_checkpoints(f"{REPO}@step*", tmp_path / "out", **options)
        average_checkpoints(local, tmp_path / "copies", **options)
        names = [f"{one.path.name}/adapter_model.safetensors" for one in result.outputs]
        found, expected = tree(tmp_path / "out"), tree(tmp_path / "copies")
        assert all(found[name] == expected[name] for name in names)
        return
    result = same_as_local(f"{REPO}@step*", local, tmp_path / "out", **options)
    assert result.outputs[0].adapter is not None
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_several_processes_make_the_bits_of_one(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    paths = adapters(tmp_path / "local", 400, 300, 4, 3)
    average_checkpoints(paths, tmp_path / "alone")
    arguments = ["average", *map(str, paths), "-o", str(tmp_path / "out"), "--json"]
    ended = torchrun("-m", "ckptavg", *arguments)
    assert ended.returncode == 0, ended.stderr
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        found, alone = ((tmp_path / one / name).read_bytes() for one in ("out", "alone"))
        assert found == alone
