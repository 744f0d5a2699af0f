"""Coefficients searched by a metric: never worse than the uniform mean, and nothing twice."""

import contextlib
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from safetensors.torch import load_file
from search_fixtures import Evaluations, Net, batches, enter_with_module
from test_soup import save_run
from torch import nn

from ckptavg import BnPass, ModelError, TuneResult, UsageError, tune, verify_output
from ckptavg.cli import run

pytest.importorskip("cma", reason="needs the extra 'tune'")

WEIGHTS = [0.0, 1.0, 4.0]
TARGET = 3.4  # 0.2 of the second and 0.8 of the third, among others


def distance(model: nn.Module) -> dict[str, float]:
    return {"error": abs(model.state_dict()["linear.weight"].mean().item() - TARGET)}


def tuned(
    sources: list[Path], evaluate: Callable[[nn.Module], Any] = distance, **options: Any
) -> TuneResult:
    settings: dict[str, Any] = {"trials": 40} | options
    evaluation = BnPass(model=Net, batches=batches, evaluate=evaluate)
    return tune(sources, sources[0].parent / "out", evaluation=evaluation, **settings)


def test_the_search_finds_coefficients_that_fit(tmp_path: Path) -> None:
    found = tuned(save_run(tmp_path, WEIGHTS))
    assert len(found.trials) == 40
    assert found.trials[0].coefficients == pytest.approx([1 / 3] * 3)
    assert found.trials[1].coefficients == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert found.best.metrics["error"] < 0.1
    assert found.best in found.trials
    for trial in found.trials:
        assert math.fsum(trial.coefficients) == pytest.approx(1)
        assert min(trial.coefficients) >= 0
        mean = sum(c * w for c, w in zip(trial.coefficients, WEIGHTS, strict=True))
        assert trial.metrics["error"] == pytest.approx(abs(mean - TARGET), abs=1e-5)
    assert found.result.outputs[0].metrics == found.best.metrics
    weight = load_file(tmp_path / "out" / "model.safetensors")["linear.weight"].mean().item()
    assert abs(weight - TARGET) == pytest.approx(found.best.metrics["error"], abs=1e-6)
    assert verify_output(tmp_path / "out").ok
    assert not [path for path in tmp_path.iterdir() if "tune-" in path.name]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_result_is_never_worse_than_the_uniform_mean(tmp_path: Path, mode: Any) -> None:
    def noise(model: nn.Module) -> float:
        return float(hash(model.state_dict()["linear.weight"].mean().item()) % 1000)

    found = tuned(save_run(tmp_path, WEIGHTS), noise, mode=mode, trials=12)
    best, uniform = (one.metrics["metric"] for one in (found.best, found.trials[0]))
    assert best <= uniform if mode == "min" else best >= uniform


def test_each_generation_is_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptavg.checkpoint.stored import StoredCheckpoint

    sources, nbytes = save_run(tmp_path, WEIGHTS), [0]
    read_into = StoredCheckpoint.read_into

    def counted(self: StoredCheckpoint, pieces: Any, buffer: memoryview) -> None:
        if self.label == str(sources[0]):
            nbytes[0] += sum(one.stop - one.start for one in pieces if one.name.endswith("weight"))
        read_into(self, pieces, buffer)

    monkeypatch.setattr(StoredCheckpoint, "read_into", counted)
    tuned(sources, trials=16)  # 2 and 7 of the first generation, 7 of the second
    weights = [name for name in load_file(sources[0]) if name.endswith("weight")]
    each = sum(load_file(sources[0])[name].nbytes for name in weights)
    assert nbytes[0] / each == 3  # two generations, and what is published


def test_the_same_seed_tries_the_same(tmp_path: Path) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    one = tuned(sources, trials=12)
    other = tuned(sources, trials=12, overwrite=True)
    third = tuned(sources, trials=12, seed=1, overwrite=True)
    assert one.trials == other.trials
    assert one.trials != third.trials


def interrupted(model: nn.Module) -> dict[str, float]:
    """Judge as ``distance`` does; raise at one of the calls."""
    Evaluations.next()
    return distance(model)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", [1, 4, 11, 18, 23])
def test_an_interrupted_search_goes_on(
    tmp_path: Path, stop: Callable[..., None], kind: type[BaseException], at: int
) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    stop(at, kind("stopped"))
    with pytest.raises((ModelError, KeyboardInterrupt)):
        tuned(sources, interrupted, trials=20)
    found = tuned(sources, interrupted, trials=20)
    fresh = tuned(sources, trials=20, overwrite=True)
    assert found.trials == fresh.trials
    # of an interrupted generation all is kept (but the best is judged for its statistics again),
    # of one whose evaluation failed nothing
    n_lost = {KeyboardInterrupt: 1 + 3 + 1, OSError: 1 + 9}[kind]
    assert Evaluations.count <= 20 + 3 + n_lost
    assert not [path for path in tmp_path.iterdir() if "tune-" in path.name]


@pytest.mark.parametrize("at", [9, 17])  # in the first and in the second generation
def test_no_evaluation_of_an_unfinished_generation_is_lost(
    tmp_path: Path, stop: Callable[..., None], at: int
) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    evaluation = BnPass(model=Net, batches=batches, evaluate=interrupted)

    def calls(output: str) -> int:
        Evaluations.count = 0
        with contextlib.suppress(KeyboardInterrupt):
            tune(sources, tmp_path / output, evaluation=evaluation, trials=24)
        return Evaluations.count

    stop(-1)
    whole = calls("whole")
    stop(at)
    assert calls("out") == at
    stop(-1)
    assert (at - 1) + calls("out") == whole


def test_a_metric_that_is_not_a_number_is_the_worst(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> float:
        weight = model.state_dict()["linear.weight"].mean().item()
        return math.nan if weight > 2 else -weight

    found = tuned(save_run(tmp_path, WEIGHTS), evaluate, mode="min", trials=20)
    assert found.best.metrics["metric"] >= -2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 1}, "trials is 1, expected at least 2"),
        ({"distributed": True}, "made by one process"),
        ({"metric": "eror"}, "did you mean 'error'?"),
        ({"last": 1}, "at least 2 checkpoints"),
    ],
)
def test_what_cannot_be_searched_is_a_usage_error(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    before = tree(tmp_path)
    with pytest.raises(UsageError) as caught:
        tuned(sources, **options)
    assert message in str(caught.value)
    assert tree(tmp_path) == before


def test_without_the_optimiser_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ckptavg\[tune\]'"):
        tuned(save_run(tmp_path, WEIGHTS))


def test_the_command_line_tells_the_coefficients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter_with_module(tmp_path, monkeypatch, "cooked")
    save_run(tmp_path, WEIGHTS)
    arguments = [
        "tune", "step*.safetensors", "-o", "out", "--model", "cooked:Net", "--eval",
        "cooked:error", "--trials", "12", "--plot",
    ]  # fmt: skip
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("out: the best of 12 averages by error (min), coefficients 0.")
    rows = [line.split("  ")[1].strip() for line in out.splitlines()[-3:]]
    assert rows == ["tuned", "uniform mean", "last checkpoint"]
    assert (tmp_path / "out" / "tune.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "out" / "tune.json").read_text())
    table = list(csv.DictReader((tmp_path / "out" / "tune.csv").read_text().splitlines()))
    assert len(told["trials"]) == len(table) == 12
    assert run([*arguments, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == told["trials"]
    assert torch.isfinite(load_file("out/model.safetensors")["linear.weight"]).all()
