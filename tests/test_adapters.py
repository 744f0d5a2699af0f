"""LoRA adapters: the mean of the products, from adapters made by hand; PEFT is not needed."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptavg import (
    AverageResult,
    BnPass,
    CheckpointError,
    CkptavgError,
    IncompatibleCheckpointsError,
    MemoryBudgetError,
    Recipe,
    UsageError,
    average_checkpoints,
    open_checkpoint,
    plan_average,
)
from ckptavg.cli import cli
from ckptavg.derived.adapter_config import is_tame

PREFIX = "base_model.model."
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # columns of A, rows of B
    "layers.0.q": ((12,), (10,)),
    "layers.1.q": ((12,), (10,)),
    "conv": ((3, 3, 3), (8,)),
}
EMBEDDING = "embed"


def config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "use_dora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False, "lora_bias": False,
        "base_model_name_or_path": "org/base", "init_lora_weights": True, "inference_mode": False,
        "target_modules": ["q", "conv", "embed"], "modules_to_save": None, "task_type": None,
        **changes,
    }  # fmt: skip


def factors(
    seed: int,
    ranks: int | Mapping[str, int] = 4,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
) -> dict[str, Tensor]:
    """Return factors for every kind of module, with names as PEFT saves them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def rank_of(module: str) -> int:
        return ranks if isinstance(ranks, int) else ranks.get(module, 4)

    tensors = {}
    for module, (columns, rows) in SHAPES.items():
        rank, ones = rank_of(module), (1,) * (len(columns) - 1)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = random(rank, *columns)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = random(*rows, rank, *ones)
        if bias:
            tensors[f"{PREFIX}{module}.lora_B.bias"] = random(*rows)
    rank = rank_of(EMBEDDING)
    tensors[f"{PREFIX}{EMBEDDING}.lora_embedding_A"] = random(rank, 20)
    tensors[f"{PREFIX}{EMBEDDING}.lora_embedding_B"] = random(6, rank)
    return tensors


def save_adapter(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> Path:
    path.mkdir()
    save_file(dict(tensors), path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(told))
    return path


def products(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return scale x B A for every module in float64, by PEFT's rules for patterns."""

    def of_pattern(kind: str, usual: Any, module: str) -> Any:
        for key, value in (told.get(kind) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return usual

    found = {}
    for module in (*SHAPES, EMBEDDING):
        a_name, b_name = (
            ("lora_embedding_A", "lora_embedding_B")
            if module == EMBEDDING
            else ("lora_A.weight", "lora_B.weight")
        )
        a = tensors[f"{PREFIX}{module}.{a_name}"].double()
        b = tensors[f"{PREFIX}{module}.{b_name}"].double()
        rank = of_pattern("rank_pattern", told["r"], module)
        alpha = of_pattern("alpha_pattern", told["lora_alpha"], module)
        assert a.shape[0] == rank
        scale = alpha / math.sqrt(rank) if told.get("use_rslora") else alpha / rank
        found[module] = scale * (b.flatten(1) @ a.flatten(1))
        bias = tensors.get(f"{PREFIX}{module}.lora_B.bias")
        if bias is not None:
            found[f"{module} bias"] = scale * bias.double()
    return found


def output(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return (
        load_file(path / "adapter_model.safetensors"),
        json.loads((path / "adapter_config.json").read_text()),
    )


def mean(
    all_products: Sequence[Mapping[str, Tensor]], shares: Sequence[float] | None = None
) -> dict[str, Tensor]:
    shares = shares or [1 / len(all_products)] * len(all_products)
    return {
        module: torch.stack(
            [c * one[module] for c, one in zip(shares, all_products, strict=True)]
        ).sum(0)
        for module in all_products[0]
    }


def assert_products(path: Path, expected: Mapping[str, Tensor], *, rtol: float = 2**-22) -> None:
    found = products(*output(path))
    assert found.keys() == expected.keys()
    for module, value in expected.items():
        error = (found[module] - value).norm() / value.norm()
        assert error <= rtol, (module, error)


Made = tuple[list[Path], list[dict[str, Tensor]], list[dict[str, Any]]]


def make(
    tmp_path: Path,
    configs: Sequence[Mapping[str, Any]],
    ranks: Sequence[int | Mapping[str, int]] | None = None,
    **options: Any,
) -> Made:
    told = [config(**changes) for changes in configs]
    tensors = [
        factors(seed, one["r"] if ranks is None else ranks[seed], **options)
        for seed, one in enumerate(told)
    ]
    paths = [
        save_adapter(tmp_path / f"checkpoint-{seed + 1}", one, cfg)
        for seed, (one, cfg) in enumerate(zip(tensors, told, strict=True))
    ]
    return paths, tensors, told


def all_products(made: Made) -> list[dict[str, Tensor]]:
    return [products(one, cfg) for one, cfg in zip(made[1], made[2], strict=True)]


def refusal(paths: Sequence[Path], error: type[CkptavgError], **recipe: Any) -> str:
    checkpoints = [open_checkpoint(path, label=path.name) for path in paths]
    with pytest.raises(error) as caught:
        plan_average(checkpoints, Recipe(**recipe))
    return str(caught.value)


# -- the exact mean


def test_equal_ranks_and_scales_are_copied_to_the_bit(tmp_path: Path) -> None:
    made = make(tmp_path, [{}, {}, {}])
    result = average_checkpoints(made[0], tmp_path / "out")
    state, told = output(tmp_path / "out")
    for name, value in state.items():
        axis = 0 if "_A" in name else 1
        assert torch.equal(value, torch.cat([one[name] for one in made[1]], axis)), name
    assert (told["r"], told["lora_alpha"]) == (12, 8)  # 8 / 12 = (8 / 4) / 3
    assert told["rank_pattern"] == told["alpha_pattern"] == {}
    assert_products(tmp_path / "out", mean(all_products(made)), rtol=1e-14)
    assert result.notes == (
        "LoRA: the exact mean of the products of 3 adapters, by concatenation: rank 12",
        "the rank of 4 modules exceeds a side of their weights, such as 'base_model.model.conv': "
        "--adapter-rank makes a smaller adapter and tells its error",
    )
    report = result.outputs[0].adapter
    assert report is not None
    assert (report.method, report.rank, report.error) == ("concatenation", 12, 0)


def test_the_config_is_otherwise_that_of_the_last(tmp_path: Path) -> None:
    made = make(tmp_path, [{"task_type": "A"}, {"task_type": "B", "unknown": [1]}])
    average_checkpoints(made[0], tmp_path / "out")
    _, told = output(tmp_path / "out")
    assert told == {**made[2][1], "r": 8, "lora_alpha": 8, "inference_mode": True}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "ckptavg.json",
    ]  # fmt: skip


@pytest.mark.parametrize("coefficients", [(0.5, 0.3, 0.2), (1.5, -0.25, -0.25)])
def test_coefficients_weigh_the_products(tmp_path: Path, coefficients: tuple[float, ...]) -> None:
    made = make(tmp_path, [{}, {}, {}])
    average_checkpoints(made[0], tmp_path / "out", coefficients=coefficients)
    _, told = output(tmp_path / "out")
    assert (told["r"], told["lora_alpha"]) == (12, 12)
    assert_products(tmp_path / "out", mean(all_products(made), coefficients))


def test_equal_coefficients_are_copied_too(tmp_path: Path) -> None:
    made = make(tmp_path, [{}, {}])
    average_checkpoints(made[0], tmp_path / "out", coefficients=(0.5, 0.5))
    assert_products(tmp_path / "out", mean(all_products(made)), rtol=1e-14)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    made = make(tmp_path, [{"use_rslora": True}] * 4)
    average_checkpoints(made[0], tmp_path / "out")
    _, told = output(tmp_path / "out")
    assert (told["r"], told["lora_alpha"], told["use_rslora"]) == (16, 4, True)  # exactly
    assert_products(tmp_path / "out", mean(all_products(made)), rtol=1e-14)


def test_rslora_at_a_rank_without_a_root(tmp_path: Path) -> None:
    made = make(tmp_path, [{"use_rslora": True}] * 3)
    average_checkpoints(made[0], tmp_path / "out")
    assert output(tmp_path / "out")[1]["lora_alpha"] == pytest.approx(8 / math.sqrt(3))
    assert_products(tmp_path / "out", mean(all_products(made)), rtol=1e-14)


def test_different_ranks_and_alphas_are_scaled(tmp_path: Path) -> None:
    made = make(tmp_path, [{"r": 2}, {"r": 4, "lora_alpha": 3}, {"r": 3, "use_rslora": True}])
    average_checkpoints(made[0], tmp_path / "out")
    _, told = output(tmp_path / "out")
    assert (told["r"], told["use_rslora"]) == (9, True)
    assert told["lora_alpha"] == 3  # 3 / sqrt(9) = 1
    assert_products(tmp_path / "out", mean(all_products(made)))


def test_different_ranks_at_one_scale_are_copied(tmp_path: Path) -> None:
    made = make(tmp_path, [{"r": 2, "lora_alpha": 4}, {"r": 5, "lora_alpha": 10}])
    average_checkpoints(made[0], tmp_path / "out")
    assert_products(tmp_path / "out", mean(all_products(made)), rtol=1e-14)


def test_patterns_of_ranks_and_alphas(tmp_path: Path) -> None:
    changes = {
        "rank_pattern": {r"layers\.1\.q": 6, "^conv": 2},
        "alpha_pattern": {"conv": 1, r"^layers\.(0|7)\.\w+": 12},
    }
    ranks = {"layers.1.q": 6, "conv": 2}
    made = make(tmp_path, [changes, changes], [ranks, ranks])
    average_checkpoints(made[0], tmp_path / "out")
    _, told = output(tmp_path / "out")
    assert told["rank_pattern"] == {"layers.1.q": 12, "conv": 4}
    assert told["alpha_pattern"] == {"layers.0.q": 12, "conv": 1}
    assert_products(tmp_path / "out", mean(all_products(made)), rtol=1e-14)


def test_patterns_of_the_output_match_nothing_else(tmp_path: Path) -> None:
    """A plain name would match every module that ends with it."""
    tensors = {
        f"{PREFIX}{module}.lora_{part}.weight": torch.ones(*shape)
        for module, rank in (("q", 2), ("x.q", 3), ("y.q", 3))
        for part, shape in (("A", (rank, 3)), ("B", (3, rank)))
    }  # fmt: skip
    told = config(r=3, lora_alpha=3, rank_pattern={"^q": 2})
    paths = [save_adapter(tmp_path / name, tensors, told) for name in "ab"]
    average_checkpoints(paths, tmp_path / "out")
    assert output(tmp_path / "out")[1]["rank_pattern"] == {"^q": 4}


def test_names_that_are_no_patterns_are_escaped_in_the_output(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}{module}.lora_{part}.weight": torch.ones(*shape)
        for module, rank in (("x(", 2), ("y", 3), ("z", 3))
        for part, shape in (("A", (rank, 3)), ("B", (3, rank)))
    }
    told = config(r=3, rank_pattern={r"x\(": 2})
    paths = [save_adapter(tmp_path / name, tensors, told) for name in "ab"]
    average_checkpoints(paths, tmp_path / "out")
    assert output(tmp_path / "out")[1]["rank_pattern"] == {r"^x\(": 4}
    average_checkpoints([tmp_path / "out"] * 2, tmp_path / "again")


def test_the_bias_of_b_is_scaled_with_it(tmp_path: Path) -> None:
    made = make(tmp_path, [{"lora_bias": True}] * 3, bias=True)
    average_checkpoints(made[0], tmp_path / "same")
    assert_products(tmp_path / "same", mean(all_products(made)))
    average_checkpoints(made[0], tmp_path / "weighed", coefficients=(0.5, 0.3, 0.2))
    assert_products(tmp_path / "weighed", mean(all_products(made), (0.5, 0.3, 0.2)))
    average_checkpoints(made[0], tmp_path / "lower", adapter_rank=9)
    found, expected = products(*output(tmp_path / "lower")), mean(all_products(made))
    for name in found:
        if name.endswith("bias"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_equal_adapters_give_the_same_products(tmp_path: Path) -> None:
    tensors, told = factors(1), config()
    paths = [save_adapter(tmp_path / name, tensors, told) for name in "abc"]
    for name, options in (("exact", {}), ("rank", {"adapter_rank": 4}),
                          ("factors", {"adapter_factors": True})):  # fmt: skip
        average_checkpoints(paths, tmp_path / name, **options)
        assert_products(tmp_path / name, products(tensors, told), rtol=1e-6)


def test_another_gauge_gives_the_same_products(tmp_path: Path) -> None:
    """B M and M^-1 A are the same adapter, whose factors have another mean."""
    tensors, told = factors(1, dtype=torch.float64), config()
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    turned = {
        name: torch.tensordot(turn.T, value, 1)
        if "_A" in name
        else torch.movedim(torch.tensordot(value, turn, ([1], [0])), -1, 1).contiguous()
        for name, value in tensors.items()
    }
    paths = [
        save_adapter(tmp_path / name, one, told) for name, one in (("a", tensors), ("b", turned))
    ]
    average_checkpoints(paths, tmp_path / "out")
    assert_products(tmp_path / "out", products(tensors, told), rtol=1e-14)
    result = average_checkpoints(paths, tmp_path / "factors", adapter_factors=True)
    report = result.outputs[0].adapter
    assert report is not None
    assert report.error is not None
    assert report.error > 0.3


def test_one_adapter_stays_as_it_is(tmp_path: Path) -> None:
    made = make(tmp_path, [{}])
    average_checkpoints(made[0], tmp_path / "out")
    state, told = output(tmp_path / "out")
    assert all(torch.equal(state[name], value) for name, value in made[1][0].items())
    assert (told["r"], told["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    made = make(tmp_path, [{}, {}], dtype=dtype)
    average_checkpoints(made[0], tmp_path / "copied")
    assert_products(tmp_path / "copied", mean(all_products(made)), rtol=1e-14)
    shares = (0.7, 0.3)
    average_checkpoints(made[0], tmp_path / "scaled", coefficients=shares)
    state, _ = output(tmp_path / "scaled")
    name = f"{PREFIX}conv.lora_A.weight"
    rows = [2 * c * one[name].double() for c, one in zip(shares, made[1], strict=True)]
    assert torch.equal(state[name], torch.cat(rows).to(dtype))


def test_the_output_dtype_is_rounded_to(tmp_path: Path) -> None:
    made = make(tmp_path, [{}, {}])
    average_checkpoints(made[0], tmp_path / "out", dtype="bfloat16")
    state, _ = output(tmp_path / "out")
    name = f"{PREFIX}conv.lora_B.weight"
    assert torch.equal(state[name], torch.cat([one[name] for one in made[1]], 1).bfloat16())


def test_several_schemes_share_the_rank(tmp_path: Path) -> None:
    """What does not go into an output has rows of 0 in it, and its scale makes up for that."""
    made = make(tmp_path, [{}, {"lora_alpha": 4}, {}, {}])
    result = average_checkpoints(
        made[0],
        tmp_path / "out",
        schemes=["uniform", "uniform:last=2", "x=coefficients:0.5,0,0,0.5", "uniform:last=1"],
    )
    all_shares: list[list[float]] = [[0.25] * 4, [0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5], [0, 0, 0, 1]]
    for one, shares in zip(result.outputs, all_shares, strict=True):
        assert_products(one.path, mean(all_products(made), shares), rtol=2**-22)
        state, told = output(one.path)
        assert told["r"] == 16
        assert state[f"{PREFIX}conv.lora_A.weight"].shape[0] == 16
    state, _ = output(tmp_path / "out" / "uniform-last2")
    assert not state[f"{PREFIX}conv.lora_A.weight"][:8].any()
    assert not state[f"{PREFIX}conv.lora_B.weight"][:, :8].any()


def test_checkpoints_that_go_into_nothing_take_no_rank(tmp_path: Path) -> None:
    made = make(tmp_path, [{"r": 3}, {}, {}])
    average_checkpoints(made[0], tmp_path / "out", schemes="uniform:last=2")
    assert output(tmp_path / "out")[1]["r"] == 8


def test_other_tensors_are_averaged_as_ever(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        more = {
            f"{PREFIX}head.weight": torch.full((2, 3), float(seed)),
            f"{PREFIX}counter": torch.tensor(seed),
        }
        path = tmp_path / f"checkpoint-{seed}"
        paths.append(
            save_adapter(path, {**factors(seed), **more}, config(modules_to_save=["head"]))
        )
    result = average_checkpoints(paths, tmp_path / "out")
    state, _ = output(tmp_path / "out")
    assert torch.equal(state[f"{PREFIX}head.weight"], torch.full((2, 3), 0.5))
    assert state[f"{PREFIX}counter"] == 1
    assert result.outputs[0].differing == (f"{PREFIX}counter",)


def test_an_adapter_is_one_file_whatever_its_size(tmp_path: Path) -> None:
    paths, *_ = make(tmp_path, [{}, {}])
    result = average_checkpoints(paths, tmp_path / "out", max_shard_bytes=1000)
    assert not list((tmp_path / "out").glob("*index*"))
    assert any(note.startswith("an adapter is one file, here of") for note in result.notes)


def test_torch_files_and_large_factors(tmp_path: Path) -> None:
    """Factors of several parts; they are read as few rows of B and as runs of A."""
    paths, expected = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        a, b = torch.randn(40, 3000), torch.randn(2500, 40)
        path = tmp_path / f"checkpoint-{seed}"
        path.mkdir()
        tensors = {f"{PREFIX}m.lora_A.weight": a, f"{PREFIX}m.lora_B.weight": b}
        torch.save(tensors, path / "adapter_model.bin")
        (path / "adapter_config.json").write_text(json.dumps(config(r=40, lora_alpha=40)))
        paths.append(path)
        expected.append(b.double() @ a.double())
    average_checkpoints(paths, tmp_path / "out", memory_budget_bytes=16 * 2**20)
    state, told = output(tmp_path / "out")
    a, b = (state[f"{PREFIX}m.lora_{part}.weight"].double() for part in "AB")
    product = told["lora_alpha"] / told["r"] * (b @ a)
    torch.testing.assert_close(product, (expected[0] + expected[1]) / 2, rtol=1e-9, atol=1e-9)


# -- at a chosen rank


@pytest.mark.parametrize("coefficients", [None, (1.5, -0.25, -0.25)])
def test_a_chosen_rank_is_the_best_approximation(
    tmp_path: Path, coefficients: tuple[float, ...] | None
) -> None:
    made = make(tmp_path, [{}, {"lora_alpha": 5}, {"r": 2}])
    result = average_checkpoints(
        made[0], tmp_path / "out", adapter_rank=3, coefficients=coefficients
    )
    expected, errors = {}, {}
    total = left = 0.0
    for module, value in mean(all_products(made), coefficients).items():
        u, sigma, vh = torch.linalg.svd(value, full_matrices=False)
        expected[module] = u[:, :3] * sigma[:3] @ vh[:3]
        errors[module] = float(sigma[3:].norm() / sigma.norm())
        total, left = total + float((sigma**2).sum()), left + float((sigma[3:] ** 2).sum())
    assert_products(tmp_path / "out", expected, rtol=1e-6)
    _, told = output(tmp_path / "out")
    assert (told["r"], told["lora_alpha"], told["rank_pattern"]) == (3, 3, {})
    report = result.outputs[0].adapter
    assert report is not None
    assert report.method == "truncation"
    assert report.error == pytest.approx(math.sqrt(left / total))
    assert report.largest_error == pytest.approx(max(errors.values()))
    assert report.largest_error_module is not None
    assert report.largest_error_module.removeprefix(PREFIX) == max(errors, key=errors.__getitem__)
    assert any("off the exact mean by" in note for note in result.notes)
    recorded = json.loads((tmp_path / "out" / "ckptavg.json").read_text())["adapter"]
    assert recorded["error"] == report.error
    assert recorded["rank"] == 3


def test_the_factors_share_the_singular_values(tmp_path: Path) -> None:
    made = make(tmp_path, [{}, {}])
    average_checkpoints(made[0], tmp_path / "out", adapter_rank=4)
    state, _ = output(tmp_path / "out")
    a, b = (state[f"{PREFIX}layers.0.q.lora_{part}.weight"].double() for part in "AB")
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-5, atol=1e-5)


def test_a_rank_above_all_there_are_is_exact(tmp_path: Path) -> None:
    made = make(tmp_path, [{}, {}])
    result = average_checkpoints(made[0], tmp_path / "out", adapter_rank=50)
    _, told = output(tmp_path / "out")
    assert told["r"] == 8
    assert told["rank_pattern"] == {"embed": 6}
    assert_products(tmp_path / "out", mean(all_products(made)), rtol=1e-6)
    assert any("have no more than rank 8" in note for note in result.notes)


def test_a_product_of_0_has_no_error(tmp_path: Path) -> None:
    tensors = {name: torch.zeros_like(value) for name, value in factors(0).items()}
    paths = [save_adapter(tmp_path / name, tensors, config()) for name in "ab"]
    for options in ({"adapter_rank": 2}, {"adapter_factors": True}):
        result = average_checkpoints(paths, tmp_path / next(iter(options)), **options)
        report = result.outputs[0].adapter
        assert report is not None
        assert report.error == 0


def test_several_schemes_at_a_chosen_rank(tmp_path: Path) -> None:
    made = make(tmp_path, [{}, {}, {}])
    result = average_checkpoints(
        made[0], tmp_path / "out", schemes=["uniform", "uniform:last=1"], adapter_rank=8
    )
    assert_products(result.outputs[1].path, all_products(made)[2], rtol=1e-6)
    reports = [one.adapter for one in result.outputs]
    assert reports[0] is not None
    assert reports[1] is not None
    assert reports[0].error is not None
    assert reports[1].error is not None
    assert reports[0].error > 0.01 > 1e-12 > reports[1].error


def test_what_does_not_fit_the_memory_is_refused(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}m.lora_A.weight": torch.ones(16, 20000),
        f"{PREFIX}m.lora_B.weight": torch.ones(8, 16),
    }
    paths = [save_adapter(tmp_path / name, tensors, config(r=16)) for name in "ab"]
    average_checkpoints(paths, tmp_path / "exact", memory_budget_bytes=16 * 2**20)
    with pytest.raises(
        MemoryBudgetError, match=r"averaging 'base_model\.model\.m' \(LoRA\) needs \d+ bytes"
    ):
        average_checkpoints(paths, tmp_path / "out", memory_budget_bytes=16 * 2**20, adapter_rank=4)


# -- factors


def test_factors_are_averaged_and_the_difference_measured(tmp_path: Path) -> None:
    made = make(tmp_path, [{}, {}, {}])
    shares = (0.5, 0.75, -0.25)
    result = average_checkpoints(
        made[0], tmp_path / "out", adapter_factors=True, coefficients=shares
    )
    state, told = output(tmp_path / "out")
    assert told == {**made[2][2], "inference_mode": True}
    for name, value in state.items():
        expected = sum(c * one[name].double() for c, one in zip(shares, made[1], strict=True))
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-6)
    found, expected_products = products(state, told), mean(all_products(made), shares)
    errors = {
        module: float((found[module] - value).norm() / value.norm())
        for module, value in expected_products.items()
    }
    report = result.outputs[0].adapter
    assert report is not None
    assert report.largest_error == pytest.approx(max(errors.values()), rel=1e-6)
    assert report.method == "factors"
    assert result.notes[0].startswith("LoRA factors A and B are averaged apart, as asked")
    assert "of the averaged factors are off the mean of the products by" in result.notes[-1]


def test_a_small_difference_keeps_its_digits(tmp_path: Path) -> None:
    """Neighbours on one run: the difference of the products is the square of a small distance."""
    tensors = factors(0, dtype=torch.float64)
    near = {name: value * (1 + 1e-7) for name, value in tensors.items()}
    paths = [
        save_adapter(tmp_path / name, one, config()) for name, one in (("a", tensors), ("b", near))
    ]
    result = average_checkpoints(paths, tmp_path / "out", adapter_factors=True)
    report = result.outputs[0].adapter
    assert report is not None
    assert report.error == pytest.approx(1e-14 / 4, rel=1e-6)


def test_large_factors_are_measured_in_parts(tmp_path: Path) -> None:
    tensors = [
        {
            f"{PREFIX}m.lora_A.weight": torch.randn(40, 3000),
            f"{PREFIX}m.lora_B.weight": torch.randn(2500, 40),
        }
        for _ in range(2)
    ]
    paths = [save_adapter(tmp_path / f"{n}", one, config(r=40)) for n, one in enumerate(tensors)]
    result = average_checkpoints(
        paths, tmp_path / "out", adapter_factors=True, memory_budget_bytes=16 * 2**20
    )
    a = [one[f"{PREFIX}m.lora_A.weight"].double() for one in tensors]
    b = [one[f"{PREFIX}m.lora_B.weight"].double() for one in tensors]
    exact = (b[0] @ a[0] + b[1] @ a[1]) / 2
    apart = (b[0] + b[1]) / 2 @ ((a[0] + a[1]) / 2)
    report = result.outputs[0].adapter
    assert report is not None
    assert report.error == pytest.approx(float((apart - exact).norm() / exact.norm()), rel=1e-9)


def test_factors_of_other_ranks_or_scales_are_refused(tmp_path: Path) -> None:
    (tmp_path / "alphas").mkdir()
    paths, *_ = make(tmp_path / "alphas", [{}, {"lora_alpha": 4}])
    assert refusal(paths, IncompatibleCheckpointsError, adapter_factors=True) == (
        "'base_model.model.conv' has rank 4 and scale 2 in checkpoint-1, rank 4 and scale 1 in "
        "checkpoint-2: such factors cannot be averaged; leave --adapter-factors out"
    )
    (tmp_path / "ranks").mkdir()
    paths, *_ = make(tmp_path / "ranks", [{"r": 2}, {}])
    assert "has shape" in refusal(paths, IncompatibleCheckpointsError, adapter_factors=True)


# -- what is read


def test_what_is_read_is_what_was_said(tmp_path: Path) -> None:
    paths, *_ = make(tmp_path, [{}, {"r": 2}, {}])
    for number, options in enumerate(
        ({}, {"adapter_rank": 3}, {"schemes": ["uniform", "uniform:last=2"]})
    ):
        done = 0

        def progress(stage: str, n: int, total: int | None) -> None:
            nonlocal done
            done += n

        result = average_checkpoints(
            paths, tmp_path / f"out{number}", progress=progress, **options  # type: ignore[arg-type]  # options of each kind
        )  # fmt: skip
        assert done == result.read_nbytes > 0


def test_an_interrupted_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        save_adapter(
            tmp_path / f"checkpoint-{n}", {**factors(n), f"{PREFIX}h": torch.ones(3) * n}, config()
        )
        for n in range(2)
    ]

    def interrupt(*arguments: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptavg.steps.derive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        average_checkpoints(paths, tmp_path / "out")
    monkeypatch.undo()
    result = average_checkpoints(paths, tmp_path / "out")
    assert any("continued an interrupted run" in note for note in result.notes)
    average_checkpoints(paths, tmp_path / "fresh")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "fresh" / "adapter_model.safetensors"
    ).read_bytes()


def test_the_fingerprint_depends_on_options_and_configs(tmp_path: Path) -> None:
    paths, _, told = make(tmp_path, [{}, {}])

    def fingerprint(**options: Any) -> str:
        return plan_average(
            [open_checkpoint(path) for path in paths], Recipe(**options)
        ).fingerprint

    found = [fingerprint(), fingerprint(adapter_rank=3), fingerprint(adapter_rank=4),
             fingerprint(adapter_factors=True)]  # fmt: skip
    (paths[0] / "adapter_config.json").write_text(json.dumps({**told[0], "lora_alpha": 7}))
    found.append(fingerprint())
    assert len(set(found)) == 5


# -- what is refused


def test_adapters_and_others_do_not_go_together(tmp_path: Path) -> None:
    paths, *_ = make(tmp_path, [{}, {}])
    message = refusal(
        [paths[0], paths[1] / "adapter_model.safetensors"], IncompatibleCheckpointsError
    )
    assert message == (
        "checkpoint-1 is an adapter, adapter_model.safetensors is not; average adapters among "
        "themselves, each as its directory"
    )


def test_a_file_of_factors_is_averaged_with_a_note(tmp_path: Path) -> None:
    paths, *_ = make(tmp_path, [{}, {}])
    result = average_checkpoints(
        [path / "adapter_model.safetensors" for path in paths], tmp_path / "out"
    )
    assert any("tensors are LoRA factors" in note for note in result.notes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_model_name_or_path": "org/other"},
         "'base_model_name_or_path' is 'org/base' in checkpoint-1, 'org/other' in checkpoint-2"),
        ({"fan_in_fan_out": True},
         "'fan_in_fan_out' is null in checkpoint-1, true in checkpoint-2"),
        ({"peft_type": "IA3"}, "'peft_type' is 'LORA' in checkpoint-1, 'IA3' in checkpoint-2"),
    ],
)  # fmt: skip
def test_configs_that_differ_in_what_matters(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    paths, *_ = make(tmp_path, [{}, changes])
    assert refusal(paths, IncompatibleCheckpointsError) == f"the adapters differ: {told}"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"use_dora": True}, "use_dora (DoRA)"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"peft_type": "A NEW ONE"}, "A NEW ONE"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"target_parameters": ["w"]}, "target_parameters"),
    ],
)
def test_what_is_not_linear_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    paths, *_ = make(tmp_path, [changes, changes])
    assert refusal(paths, IncompatibleCheckpointsError) == (
        f"checkpoint-1: is an adapter with {name}, which is not linear in its parameters; merge "
        "each adapter into its base model with merge_and_unload and average those, or pass "
        "--adapter-factors to average the parameters as they are"
    )
    result = average_checkpoints(paths, tmp_path / "out", adapter_factors=True)
    assert result.notes
    report = result.outputs[0].adapter
    assert report is not None
    assert report.error is None


def test_dora_is_told_by_its_tensors(tmp_path: Path) -> None:
    tensors = {**factors(0), f"{PREFIX}conv.lora_magnitude_vector": torch.ones(8)}
    paths = [save_adapter(tmp_path / name, tensors, config()) for name in "ab"]
    assert "use_dora (DoRA)" in refusal(paths, IncompatibleCheckpointsError)


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    tensors = {**factors(0), f"{PREFIX}conv.lora_diag": torch.ones(4)}
    paths = [save_adapter(tmp_path / name, tensors, config()) for name in "ab"]
    assert f"the tensor '{PREFIX}conv.lora_diag'" in refusal(paths, IncompatibleCheckpointsError)


@pytest.mark.parametrize(
    ("kind", "ending"), [("IA3", "as they are"), ("PROMPT_TUNING", "with the last checkpoint")]
)
def test_ia3_and_prompts_are_plain_parameters(tmp_path: Path, kind: str, ending: str) -> None:
    told = {"peft_type": kind, "base_model_name_or_path": "org/base"}
    paths = [save_adapter(tmp_path / f"{n}", {"ia3_l": torch.ones(2) * n}, told) for n in range(2)]
    result = average_checkpoints(paths, tmp_path / "out")
    assert result.notes[0].endswith(ending)
    state, found = output(tmp_path / "out")
    assert torch.equal(state["ia3_l"], torch.full((2,), 0.5))
    assert found == {**told, "inference_mode": True}
    assert refusal(paths, UsageError, adapter_rank=2) == (
        f"--adapter-rank is for LoRA, and these are {kind}"
    )


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "a new one"])
def test_inits_that_change_the_base_keep_rank_and_scale(tmp_path: Path, init: str) -> None:
    made = make(tmp_path, [{"init_lora_weights": init}] * 2)
    message = refusal(made[0], IncompatibleCheckpointsError)
    assert message.startswith(
        f"checkpoint-1: init_lora_weights '{init}' changes the base model when the adapter is "
        "loaded, by its rank (4 for 'base_model.model.conv') and scale, so the average must keep "
        "both: pass --adapter-rank 4 or --adapter-factors"
    )
    assert refusal(made[0], IncompatibleCheckpointsError, adapter_rank=3) == message
    average_checkpoints(made[0], tmp_path / "out", adapter_rank=4)
    _, told = output(tmp_path / "out")
    assert (told["r"], told["lora_alpha"], told["init_lora_weights"]) == (4, 8, init)
    for module, value in mean(all_products(made)).items():
        u, sigma, vh = torch.linalg.svd(value, full_matrices=False)
        found = products(*output(tmp_path / "out"))[module]
        torch.testing.assert_close(found, u[:, :4] * sigma[:4] @ vh[:4], rtol=1e-5, atol=1e-5)
    average_checkpoints(made[0][:1], tmp_path / "one")


def test_inits_that_only_begin_are_not_made_at_another_rank(tmp_path: Path) -> None:
    """An orthogonal beginning is refused by PEFT at an odd rank."""
    paths, *_ = make(tmp_path, [{"init_lora_weights": "orthogonal"}] * 3)
    average_checkpoints(paths, tmp_path / "out")
    assert output(tmp_path / "out")[1]["init_lora_weights"] is True


def test_a_rank_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    paths, *_ = make(tmp_path, [{}, {}], [4, 5])
    assert refusal(paths, CheckpointError) == (
        "checkpoint-2: 'base_model.model.conv.lora_A.weight' has rank 5, adapter_config.json says 4"
    )


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}c.lora_A.weight": torch.ones(4, 6, 3, 3),
        f"{PREFIX}c.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    paths = [save_adapter(tmp_path / name, tensors, config()) for name in "ab"]
    assert "grouped convolutions are not averaged" in refusal(paths, CheckpointError)


def test_factors_without_their_partner_are_refused(tmp_path: Path) -> None:
    tensors = factors(0)
    del tensors[f"{PREFIX}conv.lora_A.weight"]
    paths = [save_adapter(tmp_path / name, tensors, config()) for name in "ab"]
    assert refusal(paths, CheckpointError) == (
        "b: module 'base_model.model.conv' has 0 LoRA factors A and 1 B, expected one of each"
    )


def test_shapes_that_differ_in_more_than_the_rank(tmp_path: Path) -> None:
    tensors = factors(0)
    other = {**tensors, f"{PREFIX}conv.lora_A.weight": torch.ones(4, 3, 5, 5)}
    paths = [
        save_adapter(tmp_path / name, one, config()) for name, one in (("a", other), ("b", tensors))
    ]
    assert refusal(paths, IncompatibleCheckpointsError) == (
        "the checkpoints differ: 'base_model.model.conv.lora_A.weight' has shape [4, 3, 5, 5] in "
        "a, [4, 3, 3, 3] in b (only ranks may differ)"
    )


def test_a_module_that_one_adapter_lacks_is_named(tmp_path: Path) -> None:
    tensors = factors(0)
    less = {name: value for name, value in tensors.items() if "conv" not in name}
    paths = [
        save_adapter(tmp_path / name, one, config()) for name, one in (("a", less), ("b", tensors))
    ]
    assert refusal(paths, IncompatibleCheckpointsError).startswith(
        "the checkpoints differ: 'base_model.model.conv.lora_A.weight' is in b, not in a"
    )


def test_dtypes_that_differ_are_named(tmp_path: Path) -> None:
    paths = [
        save_adapter(tmp_path / name, factors(0, dtype=dtype), config())
        for name, dtype in (("a", torch.float32), ("b", torch.bfloat16))
    ]
    assert "is float32 in a, bfloat16 in b" in refusal(paths, IncompatibleCheckpointsError)


@pytest.mark.parametrize("options", [{}, {"adapter_rank": 3}, {"adapter_factors": True}])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    paths, tensors, told = make(tmp_path, [{}, {}])
    bad = dict(tensors[1])
    bad[f"{PREFIX}conv.lora_B.weight"] = torch.full((8, 4, 1, 1), torch.inf)
    paths[1] = save_adapter(tmp_path / "checkpoint-9", bad, told[1])
    with pytest.raises(
        IncompatibleCheckpointsError,
        match=r"checkpoint-9: tensor 'base_model\.model\.conv\.lora_B\.weight' in checkpoint 2 of "
        r"2 has 32 non-finite values \(infinity or NaN\); leave that checkpoint out",
    ):
        average_checkpoints(paths, tmp_path / "out", **options)


def test_nan_is_copied_where_it_is_allowed_but_not_decomposed(tmp_path: Path) -> None:
    tensors = factors(0)
    tensors[f"{PREFIX}conv.lora_B.weight"][0, 0] = torch.nan
    paths = [save_adapter(tmp_path / name, tensors, config()) for name in "ab"]
    average_checkpoints(paths, tmp_path / "out", allow_nonfinite=True)
    assert output(tmp_path / "out")[0][f"{PREFIX}conv.lora_B.weight"].isnan().sum() == 2
    with pytest.raises(IncompatibleCheckpointsError, match="no singular value decomposition"):
        average_checkpoints(paths, tmp_path / "rank", allow_nonfinite=True, adapter_rank=2)


def test_values_that_overflow_are_refused(tmp_path: Path) -> None:
    tensors = {name: value * 2e4 for name, value in factors(0, dtype=torch.float16).items()}
    tensors = {name: value.clamp(-3e4, 3e4) for name, value in tensors.items()}
    paths = [save_adapter(tmp_path / name, tensors, config(lora_alpha=16)) for name in "ab"]
    with pytest.raises(IncompatibleCheckpointsError, match="averaged values overflow float16"):
        average_checkpoints(paths, tmp_path / "out", coefficients=(0.9, 0.1))


def test_the_batchnorm_pass_is_not_for_adapters(tmp_path: Path) -> None:
    paths, *_ = make(tmp_path, [{}, {}])
    with pytest.raises(UsageError, match="these are adapters: leave --model out"):
        average_checkpoints(
            paths, tmp_path / "out", batchnorm=BnPass(model=torch.nn.Linear(1, 1), batches=[])
        )


def test_options_for_adapters_need_adapters(tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        save_file({"w": torch.ones(2)}, tmp_path / name)
        paths.append(tmp_path / name)
    for options, option in (
        ({"adapter_rank": 2}, "--adapter-rank"), ({"adapter_factors": True}, "--adapter-factors"),
    ):  # fmt: skip
        message = refusal(paths, UsageError, **options)
        assert message == f"{option} is for adapters, and a is none"


def test_recipes_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="pass one"):
        Recipe(adapter_rank=2, adapter_factors=True)
    for rank in (0, -1, True, 2.5):
        with pytest.raises(UsageError, match="expected at least 1"):
            Recipe(adapter_rank=rank)  # type: ignore[arg-type]  # what a caller may pass


# -- hostile configs


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": "8"}, "'r' is no rank from 1 to 16777216"),
        ({"r": 0}, "'r' is no rank from 1 to 16777216"),
        ({"r": 10**4000}, "'r' is no rank from 1 to 16777216"),
        ({"r": True}, "'r' is no rank from 1 to 16777216"),
        ({"r": {"r": {"r": 1}}}, "'r' is no rank from 1 to 16777216"),
        ({"lora_alpha": 10**400}, "'lora_alpha' is no number up to 1e+12"),
        ({"lora_alpha": math.inf}, "'lora_alpha' is no number up to 1e+12"),
        ({"lora_alpha": math.nan}, "'lora_alpha' is no number up to 1e+12"),
        ({"lora_alpha": None}, "'lora_alpha' is no number up to 1e+12"),
        ({"use_rslora": 1}, "'use_rslora' is neither true nor false"),
        ({"use_dora": "no"}, "'use_dora' is neither true nor false"),
        ({"rank_pattern": []}, "'rank_pattern' is not an object of at most 10000 patterns"),
        ({"rank_pattern": {"q": 1.5}}, "'rank_pattern' is no rank from 1 to 16777216"),
        ({"rank_pattern": {"(": 1}}, "'rank_pattern' holds '(', which is no pattern"),
        ({"alpha_pattern": {"(a+)+": 1}}, "'alpha_pattern' holds '(a+)+', too intricate a pattern"),
        ({"alpha_pattern": {"q": "1"}}, "'alpha_pattern' is no number up to 1e+12"),
        ({"alpha_pattern": dict.fromkeys(map(str, range(10_001)), 1)},
         "'alpha_pattern' is not an object of at most 10000 patterns"),
        ({"peft_type": None}, "has no peft_type"),
        ({"peft_type": ["LORA"]}, "has no peft_type"),
    ],
)  # fmt: skip
def test_configs_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = save_adapter(tmp_path / "a", factors(0), config(**changes))
    assert refusal([path], CheckpointError) == f"a/adapter_config.json: {told}"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, "null", '{"r": ' + "1" * 5000 + "}"]
)
def test_configs_that_are_no_json_object(tmp_path: Path, text: str) -> None:
    path = save_adapter(tmp_path / "a", factors(0), config())
    (path / "adapter_config.json").write_text(text)
    assert refusal([path], CheckpointError).startswith("a/adapter_config.json: ")


def test_patterns_that_would_take_for_ever_are_refused() -> None:
    hostile = (
        "(a+)+", "(a|a)*b", "(a|aa){50}", "(.*)(.*)(.*)(.*)(.*)(.*)x", "a?" * 40 + "a" * 40,
        "(a|a)" * 40, "x" * 1001,
    )  # fmt: skip
    assert [pattern for pattern in hostile if is_tame(pattern, 80)] == []
    usual = (
        "q_proj", "model.decoder.layers.0.encoder_attn.k_proj", "^model.decoder.layers.0.q",
        r".*\.layers\.\d+\..*q_proj", r"layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\.(q|k|v)_proj",
    )  # fmt: skip
    assert all(is_tame(pattern, 80) for pattern in usual)


# -- the command


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, ["average", *map(str, arguments)])


def test_the_dry_run_shows_what_will_be_done(tmp_path: Path) -> None:
    paths, *_ = make(tmp_path, [{}, {}])
    result = run(*paths, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "4 modules computed as LoRA: base_model.model.conv" in result.output
    assert "adapter_model.safetensors (" in result.output
    assert "by concatenation: rank 8" in result.output
    assert not (tmp_path / "out").exists()


def test_the_command_tells_the_error(tmp_path: Path) -> None:
    paths, *_ = make(tmp_path, [{}, {}])
    result = run(*paths, "-o", tmp_path / "out", "--adapter-rank", "3", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)["outputs"][0]["adapter"]
    assert told["method"] == "truncation"
    assert 0 < told["error"] <= told["largest_error"] < 1
    result = run(*paths, "-o", tmp_path / "out", "--adapter-factors", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "note: LoRA: the products of the averaged factors are off" in result.output


def test_the_options_exclude_each_other(tmp_path: Path) -> None:
    paths, *_ = make(tmp_path, [{}, {}])
    result = run(*paths, "-o", tmp_path / "out", "--adapter-rank", "3", "--adapter-factors")
    assert isinstance(result.exception, UsageError)


def test_an_average_is_an_adapter_that_can_be_averaged_and_replaced(tmp_path: Path) -> None:
    made = make(tmp_path, [{}, {}, {}, {}])
    average_checkpoints(made[0][:2], tmp_path / "first")
    average_checkpoints(made[0][2:], tmp_path / "second")
    both: AverageResult = average_checkpoints(
        [tmp_path / "first", tmp_path / "second"], tmp_path / "out"
    )
    assert_products(both.output, mean(all_products(made)), rtol=1e-14)
    (tmp_path / "out" / "ckptavg.json").unlink()  # a bare adapter
    average_checkpoints(made[0], tmp_path / "out", overwrite=True)


def test_an_adapter_in_a_torch_file_can_be_replaced(tmp_path: Path) -> None:
    paths = make(tmp_path, [{}, {}])[0]
    for _ in range(2):
        average_checkpoints(paths, tmp_path / "out", output_format="torch", overwrite=True)
    assert (tmp_path / "out/adapter_model.bin").exists()
