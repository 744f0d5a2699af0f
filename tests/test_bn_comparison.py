"""The metric of a published model, and the table that tells what the pass and averaging bring.

One weight, one channel, whole numbers: every row says exactly which weights and which statistics
the model had.
"""

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FORMATS, save_checkpoint, tree
from safetensors.torch import load_file
from torch import Tensor, nn

from ckptavg import (
    AverageResult,
    BnPass,
    CheckpointError,
    ModelError,
    OutputResult,
    SourceError,
    UsageError,
    average_checkpoints,
    recompute_bn,
)
from ckptavg.cli import run

Row = tuple[str, float, float]

# weight and running_mean of the checkpoints; batches of mean 2 pass through the weight
RUN = [(1.0, 10.0), (2.0, 20.0), (6.0, 60.0)]
BATCHES = [torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0], [4.0]])]
FIVE_ROWS: list[Row] = [
    ("last checkpoint", 6.0, 60.0),
    ("last checkpoint + BN pass", 6.0, 12.0),
    ("average, BN statistics of the last", 3.0, 60.0),
    ("average, BN statistics averaged", 3.0, 30.0),
    ("average + BN pass", 3.0, 6.0),
]
# of an average that was published before, whose statistics may come from a pass already
FIVE_ROWS_AS_STORED: list[Row] = [
    *FIVE_ROWS[:3],
    ("average, BN statistics as stored", 3.0, 30.0),
    FIVE_ROWS[4],
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        self.bn = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.linear(x))
        return out


def state(weight: float, mean: float) -> dict[str, Tensor]:
    return {
        "linear.weight": torch.tensor([[weight]]),
        "bn.weight": torch.ones(1),
        "bn.bias": torch.zeros(1),
        "bn.running_mean": torch.tensor([mean]),
        "bn.running_var": torch.tensor([mean / 2]),
        "bn.num_batches_tracked": torch.tensor(100),
    }


def save_run(folder: Path, layout: str = "safetensors") -> list[Path]:
    return [
        save_checkpoint(folder / f"step{number}", state(*values), layout)
        for number, values in enumerate(RUN, 1)
    ]


def identify(model: nn.Module) -> dict[str, Any]:
    """Tell which weights and statistics a model has."""
    now = model.state_dict()
    return {"weight": now["linear.weight"], "mean": now["bn.running_mean"]}


def rows_of(output: OutputResult) -> list[Row]:
    return [(row.name, row.metrics["weight"], row.metrics["mean"]) for row in output.comparison]


def bn_pass(**options: Any) -> BnPass:
    return BnPass(**{"model": Net, "batches": BATCHES, "evaluate": identify, **options})


def comparing(**options: Any) -> BnPass:
    return bn_pass(compare=True, **options)


def published(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def provenance(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "ckptavg.json").read_text())
    return found


# ---- averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
def test_five_rows_tell_weights_from_statistics(tmp_path: Path, layout: str) -> None:
    result = average_checkpoints(
        save_run(tmp_path, layout), tmp_path / "out", batchnorm=comparing()
    )
    (output,) = result.outputs
    assert rows_of(output) == FIVE_ROWS
    assert output.metrics == {"weight": 3.0, "mean": 6.0}


def test_variances_go_along_with_the_means(tmp_path: Path) -> None:
    result = average_checkpoints(
        save_run(tmp_path),
        tmp_path / "out",
        batchnorm=comparing(evaluate=lambda model: model.state_dict()["bn.running_var"]),
    )
    # 0, 1, 2, 3, 4 have the variance 2.5
    assert [row.metrics["metric"] for row in result.outputs[0].comparison] == [
        30.0, 6.0**2 * 2.5, 30.0, 15.0, 3.0**2 * 2.5,
    ]  # fmt: skip


def test_the_last_checkpoint_is_the_newest_not_the_one_typed_last(tmp_path: Path) -> None:
    first, second, third = save_run(tmp_path)
    result = average_checkpoints([third, first, second], tmp_path / "out", batchnorm=comparing())
    assert rows_of(result.outputs[0]) == FIVE_ROWS


def test_every_scheme_is_compared_with_the_last_checkpoint_that_goes_into_it(
    tmp_path: Path,
) -> None:
    result = average_checkpoints(
        save_run(tmp_path),
        tmp_path / "out",
        schemes=["uniform", "early=uniform:first=2", "newest=uniform:last=1",
                 "own=coefficients:0.5,0.5,0"],
        batchnorm=comparing(),
    )  # fmt: skip
    names = [name for name, _, _ in FIVE_ROWS]
    expected: dict[str, list[tuple[float, float]]] = {
        "uniform": [(6, 60), (6, 12), (3, 60), (3, 30), (3, 6)],
        "early": [(2, 20), (2, 4), (1.5, 20), (1.5, 15), (1.5, 3)],
        "newest": [(6, 60), (6, 12), (6, 60), (6, 60), (6, 12)],
        "own": [(2, 20), (2, 4), (1.5, 20), (1.5, 15), (1.5, 3)],
    }
    for output in result.outputs:
        values = expected[output.path.name]
        assert rows_of(output) == [
            (name, *pair) for name, pair in zip(names, values, strict=True)
        ], output.path.name
        assert provenance(output.path)["metrics"] == output.metrics


def test_the_metric_alone_is_that_of_the_published_model(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def evaluate(model: nn.Module) -> dict[str, Any]:
        calls.append({name: value.clone() for name, value in model.state_dict().items()})
        return identify(model)

    result = average_checkpoints(
        save_run(tmp_path), tmp_path / "out", batchnorm=bn_pass(evaluate=evaluate)
    )
    (output,) = result.outputs
    assert output.metrics == {"weight": 3.0, "mean": 6.0}
    assert output.comparison == ()
    (seen,) = calls
    found = published(tmp_path / "out")
    assert seen.keys() == found.keys()
    assert all(torch.equal(seen[name], value) for name, value in found.items())


def test_several_schemes_have_metrics_of_their_own(tmp_path: Path) -> None:
    result = average_checkpoints(
        save_run(tmp_path),
        tmp_path / "out",
        schemes=["uniform", "uniform:first=2"],
        batchnorm=bn_pass(),
    )
    assert [output.metrics for output in result.outputs] == [
        {"weight": 3.0, "mean": 6.0},
        {"weight": 1.5, "mean": 3.0},
    ]


def test_without_an_evaluation_there_are_no_metrics(tmp_path: Path) -> None:
    result = average_checkpoints(
        save_run(tmp_path), tmp_path / "out", batchnorm=bn_pass(evaluate=None)
    )
    assert (result.outputs[0].metrics, result.outputs[0].comparison) == (None, ())
    recorded = provenance(tmp_path / "out")
    assert (recorded["metrics"], recorded["comparison"]) == (None, [])


def test_the_provenance_holds_metrics_and_comparison(tmp_path: Path) -> None:
    average_checkpoints(save_run(tmp_path), tmp_path / "out", batchnorm=comparing())
    recorded = provenance(tmp_path / "out")
    assert recorded["metrics"] == {"weight": 3.0, "mean": 6.0}
    assert recorded["comparison"] == [
        {"name": name, "metrics": {"weight": weight, "mean": mean}}
        for name, weight, mean in FIVE_ROWS
    ]


def test_metrics_that_are_not_finite_are_null_in_the_provenance(tmp_path: Path) -> None:
    result = average_checkpoints(
        save_run(tmp_path),
        tmp_path / "out",
        batchnorm=bn_pass(evaluate=lambda model: {"loss": float("nan"), "gain": float("inf")}),
    )
    assert result.outputs[0].metrics is not None
    assert result.outputs[0].metrics["gain"] == float("inf")
    assert provenance(tmp_path / "out")["metrics"] == {"loss": None, "gain": None}


@pytest.mark.parametrize(
    "options", [{"evaluate": identify}, {"evaluate": identify, "compare": True}]
)
def test_weights_and_statistics_are_published_alike_with_and_without_a_comparison(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    sources = save_run(tmp_path)
    average_checkpoints(sources, tmp_path / "plain", batchnorm=bn_pass(evaluate=None))
    average_checkpoints(sources, tmp_path / "told", batchnorm=bn_pass(**options))
    plain, told = tree(tmp_path / "plain"), tree(tmp_path / "told")
    assert plain.keys() == told.keys()
    assert plain["model.safetensors"] == told["model.safetensors"]


def test_progress_tells_the_two_passes_apart(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    average_checkpoints(
        save_run(tmp_path),
        tmp_path / "out",
        batchnorm=comparing(),
        progress=lambda stage, done, total: told.append((stage, done)),
    )
    assert [one for one in told if one[0] != "average"] == [
        ("batchnorm of the last checkpoint", 2),
        ("batchnorm of the last checkpoint", 3),
        ("batchnorm", 2),
        ("batchnorm", 3),
    ]


def test_prefixes_of_the_checkpoints_do_not_change_the_rows(tmp_path: Path) -> None:
    sources = [
        save_checkpoint(
            tmp_path / f"step{number}",
            {f"model.{name}": value for name, value in state(*values).items()},
            "torch",
        )
        for number, values in enumerate(RUN, 1)
    ]
    result = average_checkpoints(sources, tmp_path / "out", batchnorm=comparing())
    assert rows_of(result.outputs[0]) == FIVE_ROWS


class Two(Net):
    """A second layer, which ``frozen`` leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.late(super().forward(x))
        return out


def frozen() -> nn.Module:
    model = Two()
    model.late.eval()
    return model


def test_layers_that_are_frozen_stay_so_between_evaluations(tmp_path: Path) -> None:
    sources = []
    for number, values in enumerate(RUN, 1):
        late = {
            "late.weight": torch.ones(1),
            "late.bias": torch.zeros(1),
            "late.running_mean": torch.tensor([float(number)]),
            "late.running_var": torch.ones(1),
            "late.num_batches_tracked": torch.tensor(3),
        }
        sources.append(
            save_checkpoint(tmp_path / f"step{number}", {**state(*values), **late}, "safetensors")
        )
    result = average_checkpoints(sources, tmp_path / "out", batchnorm=comparing(model=frozen))
    (output,) = result.outputs
    assert rows_of(output) == FIVE_ROWS
    assert output.batchnorm is not None
    assert list(output.batchnorm.skipped) == ["late"]
    assert published(tmp_path / "out")["late.running_mean"].item() == 2.0


def test_a_last_checkpoint_that_is_named_is_taken(tmp_path: Path) -> None:
    sources = save_run(tmp_path)
    other = save_checkpoint(tmp_path / "other", state(7.0, 70.0), "torch")
    result = average_checkpoints(
        sources, tmp_path / "out", batchnorm=comparing(last_checkpoint=other)
    )
    assert rows_of(result.outputs[0]) == [
        ("last checkpoint", 7.0, 70.0),
        ("last checkpoint + BN pass", 7.0, 14.0),
        ("average, BN statistics of the last", 3.0, 70.0),
        *FIVE_ROWS[3:],
    ]


# ---- recompute_bn --------------------------------------------------------------------------------


def test_recompute_bn_finds_the_last_checkpoint_of_a_published_average(tmp_path: Path) -> None:
    average_checkpoints(save_run(tmp_path), tmp_path / "swa")
    result = recompute_bn(tmp_path / "swa", tmp_path / "out", comparing())
    assert rows_of(result.outputs[0]) == FIVE_ROWS_AS_STORED
    assert len(provenance(tmp_path / "out")["comparison"]) == 5


def test_recompute_bn_finds_the_last_checkpoint_of_the_scheme(tmp_path: Path) -> None:
    average_checkpoints(
        save_run(tmp_path), tmp_path / "all", schemes=["uniform", "early=uniform:first=2"]
    )
    result = recompute_bn(tmp_path / "all" / "early", tmp_path / "out", comparing())
    assert rows_of(result.outputs[0])[:2] == [
        ("last checkpoint", 2.0, 20.0),
        ("last checkpoint + BN pass", 2.0, 4.0),
    ]


def test_a_last_checkpoint_that_is_gone_is_told_with_the_remedy(tmp_path: Path) -> None:
    sources = save_run(tmp_path)
    average_checkpoints(sources, tmp_path / "swa")
    sources[-1].rename(tmp_path / "moved.safetensors")
    before = tree(tmp_path)
    built: list[str] = []

    def build() -> nn.Module:
        built.append("model")
        return Net()

    with pytest.raises(SourceError) as caught:
        recompute_bn(tmp_path / "swa", tmp_path / "out", comparing(model=build))
    assert str(caught.value) == (
        f"{tmp_path / 'swa'}: the last checkpoint that went into it, {sources[-1]}, is not there; "
        "say where it is (--last-checkpoint)"
    )
    assert tree(tmp_path) == before
    assert built == []
    result = recompute_bn(
        tmp_path / "swa",
        tmp_path / "out",
        comparing(last_checkpoint=str(tmp_path / "moved.safetensors")),
    )
    assert rows_of(result.outputs[0]) == FIVE_ROWS_AS_STORED


def test_a_last_checkpoint_that_is_gone_does_not_matter_without_a_comparison(
    tmp_path: Path,
) -> None:
    sources = save_run(tmp_path)
    average_checkpoints(sources, tmp_path / "swa")
    for source in sources:
        source.unlink()
    result = recompute_bn(tmp_path / "swa", tmp_path / "out", bn_pass())
    assert result.outputs[0].metrics == {"weight": 3.0, "mean": 6.0}


@pytest.mark.parametrize("layout", FORMATS)
def test_a_single_model_has_two_rows(tmp_path: Path, layout: str) -> None:
    source = save_run(tmp_path, layout)[-1]
    result = recompute_bn(source, tmp_path / "out", comparing())
    assert rows_of(result.outputs[0]) == [
        ("as stored", 6.0, 60.0),
        ("as stored + BN pass", 6.0, 12.0),
    ]


def test_a_single_model_with_a_last_checkpoint_has_five_rows(tmp_path: Path) -> None:
    sources = save_run(tmp_path)
    average = save_checkpoint(tmp_path / "average", state(3.0, 30.0), "safetensors")
    result = recompute_bn(average, tmp_path / "out", comparing(last_checkpoint=sources[-1]))
    assert rows_of(result.outputs[0]) == FIVE_ROWS_AS_STORED


@pytest.mark.parametrize("checkpoints", [[], None, [{}], ["step3"], {}])
def test_a_provenance_that_names_no_checkpoint_is_no_average(
    tmp_path: Path, checkpoints: object
) -> None:
    average_checkpoints(save_run(tmp_path), tmp_path / "swa")
    recorded = {**provenance(tmp_path / "swa"), "checkpoints": checkpoints}
    (tmp_path / "swa" / "ckptavg.json").write_text(json.dumps(recorded))
    result = recompute_bn(tmp_path / "swa", tmp_path / "out", comparing())
    assert rows_of(result.outputs[0]) == [
        ("as stored", 3.0, 30.0),
        ("as stored + BN pass", 3.0, 6.0),
    ]


def test_an_average_of_one_checkpoint_is_a_single_model(tmp_path: Path) -> None:
    source = save_run(tmp_path)[0]
    result = average_checkpoints(source, tmp_path / "out", batchnorm=comparing())
    assert rows_of(result.outputs[0]) == [
        ("as stored", 1.0, 10.0),
        ("as stored + BN pass", 1.0, 2.0),
    ]


def averaged_without_prefix(folder: Path) -> Path:
    """Average checkpoints some of whose names have a prefix to strip; return the output."""
    for number, values in enumerate(RUN, 1):
        tensors = state(*values)
        tensors["net.linear.weight"] = tensors.pop("linear.weight")
        save_checkpoint(folder / f"step{number}", tensors, "safetensors")
    average_checkpoints(folder / "step{1..3}.safetensors", folder / "swa", strip_prefixes=["net."])
    return folder / "swa"


def test_prefixes_that_were_stripped_are_stripped_from_a_last_checkpoint_that_is_named(
    tmp_path: Path,
) -> None:
    averaged_without_prefix(tmp_path)
    result = average_checkpoints(
        tmp_path / "step{1..2}.safetensors",
        tmp_path / "out",
        strip_prefixes=["net."],
        batchnorm=comparing(last_checkpoint=tmp_path / "step3.safetensors"),
    )
    assert rows_of(result.outputs[0])[:2] == FIVE_ROWS[:2]


def test_prefixes_that_were_stripped_are_stripped_from_the_last_checkpoint_again(
    tmp_path: Path,
) -> None:
    swa = averaged_without_prefix(tmp_path)
    result = recompute_bn(swa, tmp_path / "out", comparing())
    assert rows_of(result.outputs[0]) == FIVE_ROWS_AS_STORED


def test_a_last_checkpoint_that_is_named_is_read_from_the_entry_that_was_averaged(
    tmp_path: Path,
) -> None:
    for number, (weight, mean) in enumerate(RUN, 1):
        entries = {"model": state(weight + 100, mean + 100), "ema": state(weight, mean)}
        torch.save(entries, tmp_path / f"step{number}.pt")
    average_checkpoints(tmp_path / "step{1..3}.pt", tmp_path / "swa", state_key="ema")
    (tmp_path / "step3.pt").rename(tmp_path / "moved.pt")
    result = recompute_bn(
        tmp_path / "swa", tmp_path / "out", comparing(last_checkpoint=tmp_path / "moved.pt")
    )
    assert rows_of(result.outputs[0]) == FIVE_ROWS_AS_STORED


def test_several_averages_of_one_checkpoint_are_single_models(tmp_path: Path) -> None:
    source = save_run(tmp_path)[0]
    result = average_checkpoints(
        source,
        tmp_path / "out",
        schemes=["uniform", "again=uniform:last=1"],
        batchnorm=comparing(),
    )
    for output in result.outputs:
        assert [name for name, _, _ in rows_of(output)] == ["as stored", "as stored + BN pass"]


def test_a_second_pass_still_compares_with_the_last_checkpoint_of_the_average(
    tmp_path: Path,
) -> None:
    average_checkpoints(save_run(tmp_path), tmp_path / "swa")
    recompute_bn(tmp_path / "swa", tmp_path / "once", bn_pass())
    result = recompute_bn(tmp_path / "once", tmp_path / "twice", comparing())
    assert rows_of(result.outputs[0])[:2] == FIVE_ROWS[:2]


def test_a_second_pass_over_a_single_model_does_not_call_it_an_average(tmp_path: Path) -> None:
    recompute_bn(save_run(tmp_path)[-1], tmp_path / "once", bn_pass())
    result = recompute_bn(tmp_path / "once", tmp_path / "twice", comparing())
    assert not [name for name, _, _ in rows_of(result.outputs[0]) if "average" in name]


def test_the_last_checkpoint_is_read_from_the_entry_that_was_averaged(tmp_path: Path) -> None:
    for number, (weight, mean) in enumerate(RUN, 1):
        entries = {"model": state(weight + 100, mean + 100), "ema": state(weight, mean)}
        torch.save(entries, tmp_path / f"step{number}.pt")
    average_checkpoints(tmp_path / "step{1..3}.pt", tmp_path / "swa", state_key="ema")
    result = recompute_bn(tmp_path / "swa", tmp_path / "out", comparing())
    assert rows_of(result.outputs[0]) == FIVE_ROWS_AS_STORED


# ---- what is refused -----------------------------------------------------------------------------


def test_a_comparison_without_a_metric_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        BnPass(model=Net, batches=BATCHES, compare=True)
    assert str(caught.value) == "compare needs a metric: evaluate (--eval)"


def test_a_last_checkpoint_without_a_comparison_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        BnPass(model=Net, batches=BATCHES, evaluate=identify, last_checkpoint="last.pt")
    assert str(caught.value) == (
        "last_checkpoint (--last-checkpoint) belongs to compare (--compare, --compare-bn)"
    )


def generator() -> Iterator[Tensor]:
    yield from BATCHES


@pytest.mark.parametrize(
    ("schemes", "compare", "n_passes"),
    [
        (["uniform"], True, 2),
        (["uniform", "uniform:last=2"], False, 2),
        (["uniform", "uniform:last=2", "uniform:first=2"], True, 5),  # two lasts, three averages
    ],
)
def test_data_that_can_be_gone_through_once_is_refused_for_several_passes(
    tmp_path: Path, schemes: list[str], compare: bool, n_passes: int
) -> None:
    sources = save_run(tmp_path)
    before, told = tree(tmp_path), list[str]()
    batches = generator()
    with pytest.raises(UsageError) as caught:
        average_checkpoints(
            sources,
            tmp_path / "out",
            schemes=schemes,
            batchnorm=bn_pass(batches=batches, compare=compare),
            progress=lambda stage, done, total: told.append(stage),
        )
    assert str(caught.value) == (
        "the data is a generator, which can be gone through only once, and there are "
        f"{n_passes} passes to make: give a function that returns it"
    )
    assert told == []
    assert tree(tmp_path) == before
    assert len(list(batches)) == 2  # nothing was taken


@pytest.mark.parametrize("n_sources", [1, 3])
def test_data_that_can_be_gone_through_once_is_enough_for_one_pass(
    tmp_path: Path, n_sources: int
) -> None:
    result = average_checkpoints(
        save_run(tmp_path)[:n_sources],
        tmp_path / "out",
        batchnorm=bn_pass(batches=generator(), compare=n_sources == 1),
    )
    assert result.outputs[0].batchnorm is not None
    assert result.outputs[0].batchnorm.n_samples == 5


@pytest.mark.parametrize("batches", [generator, BATCHES, tuple(BATCHES)])
def test_data_that_can_be_gone_through_again_serves_several_passes(
    tmp_path: Path, batches: Any
) -> None:
    result = average_checkpoints(
        save_run(tmp_path), tmp_path / "out", batchnorm=comparing(batches=batches)
    )
    assert rows_of(result.outputs[0]) == FIVE_ROWS


def test_what_is_no_data_at_all_is_told_so_for_several_passes_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        average_checkpoints(save_run(tmp_path), tmp_path / "out", batchnorm=comparing(batches=3))
    assert str(caught.value) == "the data is a int, expected an iterable of batches"


def test_a_last_checkpoint_that_is_not_there_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    sources = save_run(tmp_path)
    told: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        average_checkpoints(
            sources,
            tmp_path / "out",
            batchnorm=comparing(last_checkpoint=tmp_path / "nope.pt"),
            progress=lambda stage, done, total: told.append(stage),
        )
    assert str(caught.value) == (
        f"{tmp_path / 'nope.pt'}: cannot be opened: no such file or directory"
    )
    assert told == []


def test_a_last_checkpoint_that_does_not_fit_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    sources = save_run(tmp_path)
    other = save_checkpoint(tmp_path / "other", {"head": torch.ones(2)}, "safetensors")
    before, told = tree(tmp_path), list[str]()
    with pytest.raises(ModelError) as caught:
        average_checkpoints(
            sources,
            tmp_path / "out",
            batchnorm=comparing(last_checkpoint=other),
            progress=lambda stage, done, total: told.append(stage),
        )
    assert str(caught.value).startswith(f"{other}: does not fit the model: ")
    assert tree(tmp_path) == before
    assert told == []


# ---- what an evaluation does ---------------------------------------------------------------------


class TestSetError(Exception):
    """Raised by the user's own evaluation."""

    __test__ = False


def failing_at(call: int) -> Callable[[nn.Module], Any]:
    """Return an evaluation that fails when it is called for that time."""
    calls: list[int] = []

    def evaluate(model: nn.Module) -> Any:
        calls.append(len(calls))
        if len(calls) == call:
            raise TestSetError("no\ntest set")
        return identify(model)

    return evaluate


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", range(1, 6))
def test_an_evaluation_that_fails_publishes_nothing(
    tmp_path: Path, call: int, overwrite: bool
) -> None:
    sources = save_run(tmp_path)
    if overwrite:
        average_checkpoints(sources[:2], tmp_path / "out")
    before = tree(tmp_path)
    model = Net()
    with pytest.raises(ModelError) as caught:
        average_checkpoints(
            sources,
            tmp_path / "out",
            batchnorm=comparing(model=model, evaluate=failing_at(call)),
            overwrite=overwrite,
        )
    assert str(caught.value) == (
        f"evaluating '{FIVE_ROWS[call - 1][0]}' failed: TestSetError: no\\ntest set"
    )
    assert type(caught.value.__cause__) is TestSetError
    assert tree(tmp_path) == before
    assert not list(tmp_path.glob("*partial*"))
    assert all(module.training for module in model.modules())


def quit_instead(model: nn.Module) -> float:
    sys.exit("usage: evaluate DIR")


def nothing(model: nn.Module) -> Any:
    return None


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (quit_instead, "evaluating 'average + BN pass' failed: SystemExit: usage: evaluate DIR"),
        (nothing, "the evaluation returned a NoneType for 'metric', expected a number"),
        (lambda model: {}, "the evaluation returned no metric"),
    ],
)
def test_an_evaluation_without_a_metric_publishes_nothing(
    tmp_path: Path, evaluate: Callable[[nn.Module], Any], message: str
) -> None:
    sources = save_run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ModelError) as caught:
        average_checkpoints(sources, tmp_path / "out", batchnorm=bn_pass(evaluate=evaluate))
    assert str(caught.value) == message
    assert tree(tmp_path) == before


def draws_numbers(model: nn.Module) -> float:
    return random.random() + np.random.rand() + float(torch.rand(()))


def seeds_numbers(model: nn.Module) -> float:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0.0


def leaves_it_training(model: nn.Module) -> float:
    model.train()
    return 0.0


def freezes_it(model: nn.Module) -> float:
    model.eval()
    return 0.0


def runs_it_in_training_mode(model: nn.Module) -> float:
    """As for dropout at test time: the statistics move."""
    model.train()
    model(torch.full((8, 1), 100.0))
    return 0.0


def prunes_it(model: nn.Module) -> float:
    """As for the metric of a smaller model: the weights change."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return 0.0


def turns_gradients_on(model: nn.Module) -> float:
    torch.set_grad_enabled(True)
    return float(model(torch.ones(2, 1)).detach().sum())


def augmented() -> Iterator[Tensor]:
    """Yield batches that depend on all of the random numbers there are."""
    for _ in range(4):
        shift = random.random() + np.random.rand()
        yield torch.randn(6, 1) + shift


def drawn_numbers() -> list[float]:
    return [random.random(), np.random.rand(), float(torch.rand(()))]


DISTURBANCES = [
    draws_numbers, seeds_numbers, leaves_it_training, freezes_it, runs_it_in_training_mode,
    turns_gradients_on, prunes_it,
]  # fmt: skip


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize("evaluate", DISTURBANCES)
def test_what_an_evaluation_does_leaves_no_trace_in_the_published_statistics(
    tmp_path: Path, evaluate: Callable[[nn.Module], float], compare: bool, seed: int | None
) -> None:
    sources = save_run(tmp_path)
    found, drawn = [], []
    for name, options in (
        ("plain", {"evaluate": None}),
        ("told", {"evaluate": evaluate, "compare": compare}),
    ):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        average_checkpoints(
            sources, tmp_path / name, batchnorm=bn_pass(batches=augmented, seed=seed, **options)
        )
        found.append((tmp_path / name / "model.safetensors").read_bytes())
        drawn.append(drawn_numbers())
    assert found[0] == found[1]
    assert drawn[0] == drawn[1]


class Behind(Two):
    """The frozen layer comes first: what it holds decides the statistics of the other."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.late(self.linear(x)))
        return out


@pytest.mark.parametrize("evaluate", [leaves_it_training, runs_it_in_training_mode])
def test_an_evaluation_leaves_no_trace_in_frozen_layers_before_those_recomputed(
    tmp_path: Path, evaluate: Callable[[nn.Module], float]
) -> None:
    def behind_frozen() -> nn.Module:
        model = Behind()
        model.late.eval()
        return model

    late = {f"late.{name.removeprefix('bn.')}": value for name, value in state(1, 4).items()}
    del late["late.linear.weight"]
    sources = [
        save_checkpoint(tmp_path / f"step{number}", {**state(*values), **late}, "safetensors")
        for number, values in enumerate(RUN, 1)
    ]
    found = []
    for name, options in (
        ("plain", {"evaluate": None}),
        ("told", {"evaluate": evaluate, "compare": True}),
    ):
        average_checkpoints(
            sources, tmp_path / name, batchnorm=bn_pass(model=behind_frozen, **options)
        )
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    # means of 6 pass through the frozen layer, of mean 4 and variance 2
    assert published(tmp_path / "told")["bn.running_mean"].item() == pytest.approx(
        (6 - 4) / (2 + 1e-5) ** 0.5
    )


def test_the_rows_do_not_depend_on_what_earlier_evaluations_draw(tmp_path: Path) -> None:
    sources = save_run(tmp_path)
    rows = []
    for name, noise in (("quiet", 0), ("noisy", 5)):
        torch.manual_seed(3)

        def evaluate(model: nn.Module, noise: int = noise) -> dict[str, Any]:
            torch.rand(noise)
            return identify(model)

        result = average_checkpoints(
            sources,
            tmp_path / name,
            batchnorm=comparing(batches=augmented, evaluate=evaluate, seed=1),
        )
        rows.append(rows_of(result.outputs[0]))
    assert rows[0] == rows[1]


def test_the_metric_is_that_of_a_model_in_evaluation_mode(tmp_path: Path) -> None:
    modes: list[bool] = []

    def evaluate(model: nn.Module) -> float:
        modes.extend(module.training for module in model.modules())
        assert not model(torch.ones(2, 1)).requires_grad
        return 0.0

    average_checkpoints(
        save_run(tmp_path), tmp_path / "out", batchnorm=comparing(evaluate=evaluate)
    )
    assert modes == [False] * (5 * 3)


def test_the_users_model_is_in_its_modes_afterwards(tmp_path: Path) -> None:
    model = Net()
    model.linear.eval()
    average_checkpoints(save_run(tmp_path), tmp_path / "out", batchnorm=comparing(model=model))
    assert [module.training for module in model.modules()] == [True, False, True]


# ---- the command line ----------------------------------------------------------------------------

CODE = """
import torch
from test_bn_comparison import BATCHES as batches, Net, identify

def generate():
    print("loading")
    yield from batches

def accuracy(model):
    print("evaluating")
    return 0.25 + model.linear.weight.item()

def several(model):
    found = {"top-1": 0.125, "loss": 1e-7 * model.linear.weight.item()}
    return found if model.linear.weight.item() == 3 else {**found, "loss": 12345678.9}

def sometimes(model):
    return {"always": 1, **({"average only": 2} if model.linear.weight.item() == 3 else {})}

def broken(model):
    raise ValueError("the test set is\\non fire")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with three checkpoints of a run, and the user's code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    (tmp_path / "compared.py").write_text(CODE)
    save_run(tmp_path)
    yield tmp_path
    sys.modules.pop("compared", None)


MODEL = ["--model", "compared:Net", "--data", "compared:batches"]
AVERAGE = ["average", "step{1..3}.safetensors", "-o", "swa", *MODEL]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(arguments)
    captured = capsys.readouterr()
    return code, without_numbers(captured.out), captured.err


def without_numbers(text: str) -> str:
    """Replace what differs from run to run: times, rates and peak memory."""
    text = re.sub(r"[\d.]+ s (\([^)]*\)|in all)", "T s", text)
    text = re.sub(r"at [\d.]+ [kMG]?B/s", "at R", text)
    text = re.sub(r"bottleneck: \w+", "bottleneck: S", text)
    return re.sub(r"peak memory [\d.]+ [kMG]B", "peak memory M", text)


TIMES = "  reading T s, arithmetic T s, writing T s, syncing T s; bottleneck: S\n"
FEW_SAMPLES = (
    "note: BatchNorm statistics come from batches of about 2 samples; batches of 128 or more are "
    "closer to what the model will meet\n"
)


def test_average_prints_the_comparison_below_the_pass(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *AVERAGE, "--eval", "compared:identify", "--compare-bn")
    first, last = "step1.safetensors", "step3.safetensors"
    told = f"coefficients: uniform: 0.333333 each of 3 checkpoints ({first} to {last})\n"
    assert (code, err) == (0, told + FEW_SAMPLES)
    head, _, table = out.partition("  evaluation")
    assert head == (
        "swa: average of 3 checkpoints\n"
        "  read 84 B at R on cpu, wrote 28 B; T s, peak memory M\n"
        f"{TIMES}"
        "  BatchNorm: 1 layers recomputed over 5 samples in 2 batches, T s\n"
        "    layer  channels  mean moved by up to  variance changed by a factor of\n"
        "    bn            1              5.06 sd                       1.5 to 1.5\n"
        f"{late_line(head)}"
    )
    assert f"  evaluation{table}" == (
        "  evaluation                          weight  mean\n"
        "  last checkpoint                          6    60\n"
        "  last checkpoint + BN pass                6    12\n"
        "  average, BN statistics of the last       3    60\n"
        "  average, BN statistics averaged          3    30\n"
        "  average + BN pass                        3     6\n"
    )


def late_line(text: str) -> str:
    """Return the line on convergence, which other tests look at, if there is one."""
    return "".join(line + "\n" for line in text.splitlines() if line.startswith("    the last "))


def test_the_metric_alone_is_one_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *AVERAGE, "--eval", "compared:accuracy")
    assert code == 0
    assert out.endswith("  evaluation  metric\n  model         3.25\n")


def test_several_metrics_are_columns_with_six_digits(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, *AVERAGE, "--eval", "compared:several", "--compare-bn")
    assert code == 0
    assert out.endswith(
        "  evaluation                          top-1         loss\n"
        "  last checkpoint                     0.125  1.23457e+07\n"
        "  last checkpoint + BN pass           0.125  1.23457e+07\n"
        "  average, BN statistics of the last  0.125        3e-07\n"
        "  average, BN statistics averaged     0.125        3e-07\n"
        "  average + BN pass                   0.125        3e-07\n"
    )


def test_a_metric_that_only_some_rows_have_is_nan_in_the_others(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, *AVERAGE, "--eval", "compared:sometimes", "--compare-bn")
    assert code == 0
    assert out.endswith(
        "  evaluation                          always  average only\n"
        "  last checkpoint                          1           nan\n"
        "  last checkpoint + BN pass                1           nan\n"
        "  average, BN statistics of the last       1             2\n"
        "  average, BN statistics averaged          1             2\n"
        "  average + BN pass                        1             2\n"
    )


def test_several_averages_have_a_table_each(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys, *AVERAGE, "--scheme", "uniform", "--scheme", "early=uniform:first=2",
        "--eval", "compared:identify", "--compare-bn",
    )  # fmt: skip
    assert code == 0
    assert out.index("  swa/uniform: ") < out.index("average + BN pass                        3 ")
    assert out.index("  swa/early: ") < out.index("average + BN pass                      1.5 ")
    assert out.count("  evaluation  ") == 2


def test_recompute_bn_prints_two_rows_for_a_single_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(
        capsys, "recompute-bn", "step3.safetensors", "-o", "fixed", *MODEL,
        "--eval", "compared:identify", "--compare",
    )  # fmt: skip
    assert (code, err) == (0, FEW_SAMPLES)
    assert out == (
        "fixed: step3.safetensors with recomputed BatchNorm statistics\n"
        "  read 28 B at R on cpu, wrote 28 B; T s, peak memory M\n"
        f"{TIMES}"
        "  BatchNorm: 1 layers recomputed over 5 samples in 2 batches, T s\n"
        "    layer  channels  mean moved by up to  variance changed by a factor of\n"
        "    bn            1              5.06 sd                           3 to 3\n"
        f"{late_line(out)}"
        "  evaluation           weight  mean\n"
        "  as stored                 6    60\n"
        "  as stored + BN pass       6    12\n"
    )


def test_recompute_bn_prints_five_rows_for_an_average(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["average", "step{1..3}.safetensors", "-o", "swa", "--quiet"]) == 0
    capsys.readouterr()
    arguments = ["recompute-bn", "swa", *MODEL, "--eval", "compared:identify", "--compare"]
    code, out, _ = call(capsys, *arguments, "-o", "fixed")
    assert code == 0
    rows = [line.rsplit(maxsplit=2) for line in out.splitlines()[-5:]]
    assert [
        (name.strip(), float(weight), float(mean)) for name, weight, mean in rows
    ] == FIVE_ROWS_AS_STORED
    Path("step3.safetensors").rename("moved.safetensors")
    assert call(capsys, *arguments, "-o", "again") == (
        1,
        "",
        "ckptavg: error: swa: the last checkpoint that went into it, step3.safetensors, is not "
        "there; say where it is (--last-checkpoint)\n",
    )
    code, again, _ = call(
        capsys, *arguments, "-o", "again", "--last-checkpoint", "moved.safetensors"
    )
    assert code == 0
    assert again.splitlines()[-6:] == out.splitlines()[-6:]


def test_json_holds_metrics_and_comparison(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*AVERAGE, "--eval", "compared:identify", "--compare-bn", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["outputs"]
    assert told["metrics"] == {"weight": 3.0, "mean": 6.0}
    assert told["comparison"] == [
        {"name": name, "metrics": {"weight": weight, "mean": mean}}
        for name, weight, mean in FIVE_ROWS
    ]
    shutil.rmtree("swa")
    assert run([*AVERAGE, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["outputs"]
    assert (told["metrics"], told["comparison"]) == (None, [])


def test_what_evaluations_print_does_not_mix_with_the_result(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*AVERAGE[:-1], "compared:generate", "--eval", "compared:accuracy", "--compare-bn"]
    assert run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["outputs"][0]["metrics"] == {"metric": 3.25}
    assert err.split() == [
        "evaluating", "loading", "evaluating", "evaluating", "evaluating", "loading", "evaluating",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--eval", "compared:broken"], 1,
         "evaluating 'average + BN pass' failed: ValueError: the test set is\\non fire"),
        (["--eval", "compared:broken", "--compare-bn"], 1,
         "evaluating 'last checkpoint' failed: ValueError: the test set is\\non fire"),
        (["--compare-bn"], 2, "compare needs a metric: evaluate (--eval)"),
        (["--eval", "compared:identify", "--compare-bn", "--last-checkpoint", "nope.pt"], 1,
         "nope.pt: cannot be opened: no such file or directory"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line_and_nothing_is_published(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    options: Sequence[str],
    code: int,
    message: str,
) -> None:
    found = call(capsys, *AVERAGE, *options, "--quiet")
    assert found == (code, "", f"ckptavg: error: {message}\n")
    assert not list(here.glob("swa*"))


def test_a_dry_run_evaluates_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(
        capsys, *AVERAGE, "--eval", "compared:broken", "--compare-bn", "--dry-run"
    )
    assert (code, err) == (0, "")
    assert "then BatchNorm statistics are recomputed: the model fits the average\n" in out


def test_a_dry_run_refuses_a_comparison_that_could_not_be_made(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = ["--eval", "compared:identify", "--compare-bn", "--dry-run"]
    assert call(capsys, *AVERAGE, *metric, "--last-checkpoint", "nope.pt")[::2] == (
        1, "ckptavg: error: nope.pt: cannot be opened: no such file or directory\n",
    )  # fmt: skip


def test_results_are_equal_in_python_and_on_the_command_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*AVERAGE, "--eval", "compared:identify", "--compare-bn", "--quiet"]) == 0
    capsys.readouterr()
    result: AverageResult = average_checkpoints(
        "step{1..3}.safetensors", "python", batchnorm=comparing()
    )
    typed, python = provenance(here / "swa"), provenance(here / "python")
    assert typed["comparison"] == python["comparison"]
    assert python["metrics"] == result.outputs[0].metrics


def test_a_last_checkpoint_that_has_changed_is_not_compared_with(tmp_path: Path) -> None:
    sources = save_run(tmp_path)
    average_checkpoints(sources, tmp_path / "swa")
    changed = sources[-1]
    os.utime(changed, ns=(1, 1))
    with pytest.raises(SourceError) as caught:
        recompute_bn(tmp_path / "swa", tmp_path / "out", comparing())
    assert str(caught.value) == (
        f"{tmp_path}/swa: the last checkpoint that went into it, {changed}, has changed; say where "
        "it is (--last-checkpoint)"
    )


def test_the_pass_of_the_last_checkpoint_runs_once_for_several_averages(tmp_path: Path) -> None:
    stages: list[str] = []
    result = average_checkpoints(
        save_run(tmp_path),
        tmp_path / "out",
        schemes=["uniform", "uniform:last=2"],
        batchnorm=comparing(),
        progress=lambda stage, done, total: stages.append(stage),
    )
    of_last = stages.count("batchnorm of the last checkpoint")
    assert stages.count("batchnorm") == 2 * of_last > 0
    first, second = (rows_of(output) for output in result.outputs)
    assert first[:2] == second[:2] == FIVE_ROWS[:2]
    assert first[2:] != second[2:]
