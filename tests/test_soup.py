"""Greedy soups: which checkpoints stay, what it costs to find out, what an interruption costs."""

import csv
import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FORMATS, save_checkpoint, tree
from hub_fixtures import REPO, save_steps, upload
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from search_fixtures import BATCHES, Evaluations, Net, batches, enter_with_module
from torch import nn

from ckptavg import (
    BnPass,
    EvalCommand,
    IncompatibleCheckpointsError,
    ModelError,
    OutputError,
    SoupResult,
    UsageError,
    average_checkpoints,
    greedy_soup,
    verify_output,
)
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.cli import run
from ckptavg.live_model import LiveModel
from ckptavg.tensors import Piece

TARGET = 3.0


def save_run(folder: Path, weights: Sequence[float], layout: str = "safetensors") -> list[Path]:
    paths = []
    for step, weight in enumerate(weights, 1):
        model = Net()
        nn.init.constant_(model.linear.weight, weight)
        state = model.state_dict() | {"bn.num_batches_tracked": torch.tensor(step)}
        paths.append(save_checkpoint(folder / f"step{step:02}", state, layout))
    return paths


def distance(model: nn.Module) -> dict[str, float]:
    """Return how far the weights are from what is wanted."""
    return {"error": abs(model.state_dict()["linear.weight"].mean().item() - TARGET)}


def soup(
    sources: list[Path], evaluate: Callable[[nn.Module], Any] = distance, **options: Any
) -> SoupResult:
    evaluation = BnPass(model=Net, batches=batches, evaluate=evaluate)
    settings: dict[str, Any] = {"evaluation": evaluation} | options
    return greedy_soup(sources, sources[0].parent / "out", **settings)


def told(found: SoupResult) -> list[tuple[str, float, float, bool]]:
    return [
        (
            Path(step.candidate).stem,
            round(step.metrics[found.metric], 6),
            round(step.mean_metrics[found.metric], 6),
            step.accepted,
        )
        for step in found.steps
    ]


def by_hand(weights: Sequence[float], judge: Callable[[float], float]) -> list[int]:
    """Return the indices that Recipe 1 of the paper accepts; smaller is better."""
    order = sorted(range(len(weights)), key=lambda index: (judge(weights[index]), -index))
    accepted = [order[0]]
    for index in order[1:]:
        mean = sum(weights[one] for one in [*accepted, index]) / (len(accepted) + 1)
        now = sum(weights[one] for one in accepted) / len(accepted)
        if judge(mean) <= judge(now):
            accepted.append(index)
    return accepted


# ---- what goes in --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
def test_candidates_stay_as_long_as_the_mean_does_not_get_worse(
    tmp_path: Path, layout: str
) -> None:
    # 2.5 is best alone; with 4 the mean is 3.25, with 1.25 then 2.58, with 5.5 it is 4
    found = soup(save_run(tmp_path, [5.5, 4.0, 2.5, 1.25], layout))
    assert told(found) == [
        ("step03", 0.5, 0.5, True),
        ("step02", 1.0, 0.25, True),
        ("step04", 1.75, round(abs(7.75 / 3 - 3), 6), False),
        ("step01", 2.5, 1.0, False),
    ]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["linear.weight"].tolist() == [[3.25, 3.25]]
    assert weights["bn.running_mean"].item() == pytest.approx(6 * 3.25)
    (output,) = found.result.outputs
    assert list(output.coefficients) == [0, 0.5, 0.5, 0]
    assert output.metrics == {"error": 0.25}


@pytest.mark.parametrize("seed", range(12))
def test_a_soup_is_that_of_the_papers_recipe_and_never_below_the_best_single(
    tmp_path: Path, seed: int
) -> None:
    generator = random.Random(seed)
    weights = [round(generator.uniform(0, 6), 3) for _ in range(generator.randint(2, 9))]
    found = soup(save_run(tmp_path, weights))
    accepted = by_hand(weights, lambda weight: abs(float(np.float32(weight)) - TARGET))
    assert {index for index, one in enumerate(found.result.outputs[0].coefficients) if one} == (
        set(accepted)
    )
    metrics = found.result.outputs[0].metrics
    assert metrics is not None
    assert metrics["error"] <= min(step.metrics["error"] for step in found.steps)
    assert verify_output(tmp_path / "out").ok


def test_larger_may_be_better(tmp_path: Path) -> None:
    def gain(model: nn.Module) -> float:
        return -distance(model)["error"]

    found = soup(save_run(tmp_path, [5.5, 4.0, 2.5, 1.25]), gain, mode="max")
    assert [step.accepted for step in found.steps] == [True, True, False, False]
    assert (found.metric, found.mode) == ("metric", "max")


def test_of_equals_the_newer_is_first_and_all_stay(tmp_path: Path) -> None:
    found = soup(save_run(tmp_path, [2.0, 2.0, 2.0]))
    assert told(found) == [
        ("step03", 1.0, 1.0, True), ("step02", 1.0, 1.0, True), ("step01", 1.0, 1.0, True),
    ]  # fmt: skip
    assert load_file(tmp_path / "out" / "model.safetensors")["linear.weight"].eq(2).all()


def test_a_mean_whose_metric_is_not_a_number_is_rejected(tmp_path: Path) -> None:
    def evaluate(model: nn.Module) -> float:
        weight = model.state_dict()["linear.weight"].mean().item()
        return math.nan if weight == 3.25 else abs(weight - TARGET)

    found = soup(save_run(tmp_path, [4.0, 2.5]), evaluate, mode="min")
    assert [step.accepted for step in found.steps] == [True, False]


def test_the_published_bits_are_those_of_average_checkpoints(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = []
    for step in range(1, 8):
        state = {
            "linear.weight": torch.randn(1, 2, generator=generator) * 10**step,
            **{name: one for name, one in Net().state_dict().items() if name != "linear.weight"},
        }
        sources.append(save_checkpoint(tmp_path / f"step{step}", state, "safetensors"))
    count = 0

    def improving(model: nn.Module) -> float:
        nonlocal count
        count += 1
        return -float(count)

    found = soup(sources, improving, mode="min")
    assert all(step.accepted for step in found.steps)
    evaluation = BnPass(model=Net, batches=BATCHES)
    average_checkpoints(sources, tmp_path / "alone", batchnorm=evaluation, accumulate="float64")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == (
        load_file(tmp_path / "alone" / "model.safetensors").keys()
    )
    for name, value in load_file(tmp_path / "alone" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_means_of_any_dtype_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(70_001, generator=generator).to(dtype) for _ in range(3)]
    sources = [
        save_checkpoint(tmp_path / f"step{step}", {"w": value, "odd": value[:7].clone()}, "torch")
        for step, value in enumerate(values, 1)
    ]
    command = EvalCommand("echo 1 # {model}")
    found = greedy_soup(
        sources, tmp_path / "out", evaluation=BnPass(evaluate=command), mode="max", n_threads=3
    )
    assert all(step.accepted for step in found.steps)
    expected = (torch.stack([value.double() for value in values]).sum(0) / 3).to(dtype)
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(result["w"], expected)
    assert torch.equal(result["odd"], expected[:7])


# ---- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("by_command", [False, True])
def test_twenty_checkpoints_are_read_twice_each_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_command: bool
) -> None:
    weights = [TARGET + (-1) ** step * (0.5 + step / 10) for step in range(20)]
    sources = save_run(tmp_path, weights)
    nbytes: Counter[str] = Counter()
    read_into = StoredCheckpoint.read_into

    def counted(self: StoredCheckpoint, pieces: Sequence[Piece], buffer: memoryview) -> None:
        nbytes[self.label] += sum(
            piece.stop - piece.start for piece in pieces if "tracked" not in piece.name
        )
        read_into(self, pieces, buffer)

    monkeypatch.setattr(StoredCheckpoint, "read_into", counted)
    options: dict[str, Any] = {}
    if by_command:
        options = {"evaluation": BnPass(evaluate=command(tmp_path))}
    found = soup(sources, **options)
    each = sum(
        value.nbytes for name, value in load_file(sources[0]).items() if "tracked" not in name
    )
    reads = {path.stem: nbytes[str(path)] / each for path in sources}
    assert sum(step.accepted for step in found.steps) > 1
    assert max(reads.values()) <= 2, reads
    assert sum(reads.values()) <= 2 * 20


def command(folder: Path) -> EvalCommand:
    (folder / "judge.py").write_text(
        "import sys\n"
        "from safetensors.numpy import load_file\n"
        "weight = load_file(sys.argv[1] + '/model.safetensors')['linear.weight'].mean().item()\n"
        f"print('{{\"error\": %r}}' % abs(weight - {TARGET}))\n"
    )
    return EvalCommand(f"{shlex.quote(sys.executable)} {folder}/judge.py {{model}}")


def test_a_command_says_what_a_function_says(tmp_path: Path) -> None:
    sources = save_run(tmp_path, [5.5, 4.0, 2.5])
    by_function = soup(sources)
    evaluation = BnPass(model=Net, batches=BATCHES, evaluate=command(tmp_path))
    by_command = soup(sources, evaluation=evaluation, overwrite=True)
    assert by_command.steps == by_function.steps
    alone = soup(sources, evaluation=BnPass(evaluate=command(tmp_path)), overwrite=True)
    assert alone.steps == by_function.steps
    assert not [path for path in tmp_path.iterdir() if ".soup-" in path.name]


# ---- integers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("buffers", "expected"), [("last", 3), ("first", 2)])
def test_integers_come_from_the_accepted_ones(tmp_path: Path, buffers: Any, expected: int) -> None:
    evaluation = BnPass(model=Net, evaluate=distance)
    found = soup(save_run(tmp_path, [5.5, 4.0, 2.5, 1.25]), evaluation=evaluation, buffers=buffers)
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert result["bn.num_batches_tracked"].item() == expected
    assert found.result.outputs[0].differing == ("bn.num_batches_tracked",)


def test_integers_that_differ_may_be_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleCheckpointsError, match="num_batches_tracked"):
        soup(save_run(tmp_path, [4.0, 2.5]), buffers="refuse")
    assert not (tmp_path / "out").exists()


# ---- what is not finite --------------------------------------------------------------------------


def masked(folder: Path, masks: Sequence[Sequence[float]]) -> list[Path]:
    return [
        save_checkpoint(
            folder / f"step{step}", {"w": torch.ones(3), "mask": torch.tensor(mask)}, "safetensors"
        )
        for step, mask in enumerate(masks, 1)
    ]


def test_infinities_that_all_have_are_kept_and_others_are_refused(tmp_path: Path) -> None:
    evaluation = BnPass(evaluate=EvalCommand("echo 1 # {model}"))
    same = masked(tmp_path, [[0, -math.inf]] * 3)
    greedy_soup(same, tmp_path / "out", evaluation=evaluation, mode="max")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert result["mask"].tolist() == [0, -math.inf]
    (tmp_path / "other").mkdir()
    for number, odd in enumerate(([0.0, math.nan], [math.inf, -math.inf], [0.0, 0.0])):
        (folder := tmp_path / f"other{number}").mkdir()
        sources = masked(folder, [[0, -math.inf], odd, [0, -math.inf]])
        with pytest.raises(IncompatibleCheckpointsError, match="'mask'"):
            greedy_soup(sources, folder / "out", evaluation=evaluation, mode="max")
        assert not (folder / "out").exists()
        assert len(kept(folder)) == 2  # what was judged is kept


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluation": BnPass(model=Net, batches=BATCHES)}, "needs a metric"),
        ({"evaluation": BnPass(model=Net, batches=BATCHES, evaluate=distance, compare=True)},
         "a comparison of its own"),
        ({"distributed": True}, "made by one process"),
        ({"accumulate": "float32"}, "summed in float64"),
        ({"metric": "eror"}, "did you mean 'error'?"),
        ({"mode": "up"}, "mode is 'up'"),
        ({"last": 1}, "at least 2 checkpoints"),
    ],
)  # fmt: skip
def test_what_cannot_become_a_soup_is_a_usage_error(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    sources = save_run(tmp_path, [4.0, 2.5])
    before = tree(tmp_path)
    with pytest.raises(UsageError) as caught:
        soup(sources, **options)
    assert message in str(caught.value)
    assert tree(tmp_path) == before


def test_normed_layers_are_refused(tmp_path: Path) -> None:
    sources = [
        save_checkpoint(
            tmp_path / f"step{step}",
            {"fc.weight_g": torch.ones(4, 1) * step, "fc.weight_v": torch.ones(4, 3)},
            "safetensors",
        )
        for step in (1, 2)
    ]
    with pytest.raises(UsageError, match=r"'fc.weight' \(weight_norm\).* use sweep"):
        soup(sources, evaluation=BnPass(evaluate=EvalCommand("echo {model}")))


# ---- interruptions -------------------------------------------------------------------------------


def interrupted(model: nn.Module) -> dict[str, float]:
    """Judge as ``distance`` does; raise at one of the calls."""
    Evaluations.next()
    return distance(model)


WEIGHTS = [5.5, 4.0, 2.5, 1.25, 3.2, 2.9]
N_EVALUATIONS = 6 + 5 + 1  # singles, means, the soup that is published


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".soup-" in path.name]


@pytest.mark.parametrize("at", [1, 2, 6, 7, 8, 11, 12])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_a_soup_goes_on_where_it_was_interrupted_or_where_the_evaluation_failed(
    tmp_path: Path, stop: Callable[..., None], kind: type[BaseException], at: int
) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    stop(at, kind("stopped"))
    with pytest.raises((ModelError, KeyboardInterrupt)) as caught:
        soup(sources, interrupted)
    assert len(kept(tmp_path)) == (0 if at == 1 else 2)  # the directory and its lock
    notes = getattr(caught.value, "__notes__", [])
    assert any("the same command goes on from it" in note for note in notes) is (at > 1)
    stop(-1)
    found = soup(sources, interrupted)
    assert Evaluations.count == N_EVALUATIONS + 1  # each once, but for the one that failed
    result = tree(tmp_path / "out")["model.safetensors"]
    fresh = soup(sources, overwrite=True)
    assert fresh.steps == found.steps
    assert tree(tmp_path / "out")["model.safetensors"] == result
    assert not kept(tmp_path)


def test_a_torn_log_loses_no_more_than_its_last_line(
    tmp_path: Path, stop: Callable[..., None]
) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    fresh = soup(sources)
    for torn in (5, 20):
        stop(9)
        Evaluations.count = 0
        with pytest.raises(KeyboardInterrupt):
            soup(sources, interrupted, overwrite=True)
        (log,) = tmp_path.glob("out.soup-*/log.jsonl")
        os.truncate(log, log.stat().st_size - torn)
        stop(Evaluations.count + 2)
        with pytest.raises(KeyboardInterrupt):
            soup(sources, interrupted, overwrite=True)
        assert all(isinstance(json.loads(line), dict) for line in log.read_text().splitlines())
        stop(-1)
        found = soup(sources, interrupted, overwrite=True)
        assert found.steps == fresh.steps
        assert found.result.outputs[0].metrics == fresh.result.outputs[0].metrics


def test_a_lost_sum_is_made_anew(tmp_path: Path, stop: Callable[..., None]) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    stop(10)
    with pytest.raises(KeyboardInterrupt):
        soup(sources, interrupted)
    for path in tmp_path.glob("out.soup-*/sum-*"):
        path.unlink()
    stop(-1)
    found = soup(sources, interrupted)
    assert found.steps == soup(sources, overwrite=True).steps


def test_a_judge_without_a_name_starts_afresh_and_leaves_nothing(tmp_path: Path) -> None:
    sources, calls = save_run(tmp_path, WEIGHTS), [0]

    def unnamed(model: nn.Module) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return distance(model)

    with pytest.raises(KeyboardInterrupt):
        soup(sources, unnamed)
    assert not kept(tmp_path)


def test_what_a_search_with_other_inputs_left_is_removed_with_a_word(
    tmp_path: Path, stop: Callable[..., None]
) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    stop(9)
    with pytest.raises(KeyboardInterrupt):
        soup(sources, interrupted)
    assert kept(tmp_path)
    stop(-1)
    found = soup(sources[1:], interrupted)
    assert any("had other inputs or options" in note for note in found.result.notes)
    assert not kept(tmp_path)


def test_another_dtype_is_judged_as_it_is_published(tmp_path: Path) -> None:
    found = soup(save_run(tmp_path, [2.99, 3.3, 2.5]), dtype="bfloat16")
    metrics = found.result.outputs[0].metrics
    assert metrics is not None
    accepted = [step for step in found.steps if step.accepted]
    assert metrics["error"] == accepted[-1].mean_metrics["error"]
    assert metrics["error"] <= min(step.metrics["error"] for step in found.steps)


def test_an_evaluation_that_does_not_repeat_is_pointed_out(tmp_path: Path) -> None:
    calls = [0]

    def drifting(model: nn.Module) -> float:
        calls[0] += 1
        return float(calls[0])

    found = soup(save_run(tmp_path, [1.0, 2.0]), drifting, mode="max")
    assert any("does not repeat: metric was 3 when" in note for note in found.result.notes)


def test_metrics_that_are_all_nan_make_no_soup(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no checkpoint has a metric that is a number"):
        soup(save_run(tmp_path, [1.0, 2.0]), lambda model: math.nan, mode="min")
    assert not (tmp_path / "out").exists()


def test_another_judge_starts_afresh(tmp_path: Path, stop: Callable[..., None]) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    stop(9)
    with pytest.raises(KeyboardInterrupt):
        soup(sources, interrupted)
    assert soup(sources).steps == soup(sources, overwrite=True).steps


def test_the_same_soup_twice_at_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = save_run(tmp_path, [4.0, 2.5])
    inner: list[str] = []

    def load(self: LiveModel, checkpoint: Any) -> Any:
        if not inner:
            inner.append("")
            with pytest.raises(OutputError) as caught:
                soup(sources)
            inner[0] = str(caught.value)
        return load_before(self, checkpoint)

    load_before = LiveModel.load
    monkeypatch.setattr(LiveModel, "load", load)
    soup(sources)
    assert "another ckptavg run is writing it at this moment" in inner[0]


KILLING = """
import os, signal
from test_soup import distance

at = int(os.environ["KILLED_AT"])
calls = 0

def evaluate(model):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return distance(model)
"""
KILLED = """
import sys
from pathlib import Path
import killing, test_soup
from ckptavg import BnPass, greedy_soup

folder = Path(sys.argv[1])
greedy_soup(
    sorted(folder.glob("step*")), folder / "out",
    evaluation=BnPass(
        model=test_soup.Net, batches=test_soup.batches, evaluate=killing.evaluate
    ),
)
"""


def test_a_soup_goes_on_after_it_was_killed(tmp_path: Path) -> None:
    sources = save_run(tmp_path, WEIGHTS)
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "killing.py").write_text(KILLING)
    paths = [str(tmp_path), str(Path(__file__).parent), *sys.path]
    codes = [
        subprocess.run(
            [sys.executable, str(tmp_path / "killed.py"), str(tmp_path)],
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "KILLED_AT": str(at)},
        ).returncode
        for at in (5, 4, -1)  # of the singles; of the candidates; none
    ]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    result = tree(tmp_path / "out")
    fresh = soup(sources, overwrite=True)
    assert json.loads(result["soup.json"])["steps"] == [
        {
            "candidate": step.candidate, "metrics": step.metrics,
            "mean_metrics": step.mean_metrics, "accepted": step.accepted,
        }
        for step in fresh.steps
    ]  # fmt: skip
    assert tree(tmp_path / "out")["model.safetensors"] == result["model.safetensors"]


# ---- evidence, the command line, the Hub ---------------------------------------------------------


def test_the_evidence_tells_every_step(tmp_path: Path) -> None:
    found = soup(save_run(tmp_path, [5.5, 4.0, 2.5]), plot=True)
    assert found.files == ("soup.json", "soup.csv", "soup.png")
    assert (tmp_path / "out" / "soup.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "out" / "soup.csv").read_text().splitlines()))
    assert [(row["accepted"], float(row["mean error"])) for row in rows] == [
        ("True", 0.5), ("True", 0.25), ("False", 1.0),
    ]  # fmt: skip
    provenance = json.loads((tmp_path / "out" / "ckptavg.json").read_text())
    assert [row["name"].partition(":")[0] for row in provenance["comparison"]] == [
        "last checkpoint + BN pass", "best single checkpoint + BN pass",
        "greedy soup of 2 + BN pass",
    ]  # fmt: skip
    assert provenance["recipe"]["accumulate"] == "float64"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_with_module(tmp_path, monkeypatch, "cooked")
    save_run(tmp_path, [5.5, 4.0, 2.5])
    return tmp_path


ARGUMENTS = [
    "soup", "step*.safetensors", "-o", "out", "--model", "cooked:Net", "--data", "cooked:batches",
    "--eval", "cooked:error",
]  # fmt: skip


def test_the_command_line_shows_the_steps(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--save-recipe", "soup.toml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "out: greedy soup of 2 out of 3 checkpoints by error (min)"
    assert [line.split() for line in lines[-3:]] == [
        ["step03.safetensors", "0.5", "0.5", "accepted"],
        ["step02.safetensors", "1", "0.25", "accepted"],
        ["step01.safetensors", "2.5", "1", "rejected"],
    ]
    first = (here / "out" / "model.safetensors").read_bytes()
    assert run(["run", "soup.toml", "-o", "again"]) == 0
    assert (here / "again" / "model.safetensors").read_bytes() == first
    capsys.readouterr()
    assert run(["verify", "out", "--reproduce", "--trust-code"]) == 0


def test_json_holds_every_step(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [step["accepted"] for step in found["steps"]] == [True, True, False]
    assert (found["metric"], found["mode"], found["files"]) == (
        "error", "min", ["soup.json", "soup.csv"],
    )  # fmt: skip


def test_a_dry_run_reads_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in here.iterdir() if path.name != "__pycache__")
    assert run([*ARGUMENTS, "--dry-run"]) == 0
    assert "would average 3 checkpoints" in capsys.readouterr().out
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == before


def test_revisions_on_the_hub_become_a_soup(here: Path, hub: LoopbackHub) -> None:
    paths = save_steps(here / "local", (1, 2, 3))
    for step, path in enumerate(paths, 1):
        upload(hub, path, f"step{step}")
    evaluation = BnPass(evaluate=EvalCommand("echo 1 # {model}"))
    local = greedy_soup(paths, here / "local-soup", evaluation=evaluation, mode="max")
    remote = greedy_soup(f"{REPO}@step*", here / "remote-soup", evaluation=evaluation, mode="max")
    assert [step.accepted for step in remote.steps] == [step.accepted for step in local.steps]
    name = "model.safetensors"
    weights = {one: tree(here / one) for one in ("local-soup", "remote-soup")}
    assert weights["remote-soup"][name][8:][-1000:] == weights["local-soup"][name][-1000:]
