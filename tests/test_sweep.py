"""Sweeps: what is judged, what is kept, what stands beside it."""

import csv
import errno
import importlib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FORMATS, save_checkpoint, tree
from hub_fixtures import REPO, save_steps, upload
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from search_fixtures import BATCHES, Net, batches, enter_with_module
from test_processes import torchrun
from torch import nn

from ckptavg import (
    BnPass,
    EvalCommand,
    ModelError,
    OutputError,
    Scheme,
    SweepResult,
    UsageError,
    average_checkpoints,
    sweep,
)
from ckptavg.cli import run
from ckptavg.line_log import LineLog
from ckptavg.metrics import Judge, best_mode

WEIGHTS = (1.0, 4.0, 2.0, 5.0)  # means of the last n: 5, 3.5, 3.67, 3
SCHEMES = ["uniform:last=2", "uniform:last=3", "uniform"]


def save_run(folder: Path, layout: str = "safetensors") -> list[Path]:
    paths = []
    for step, weight in enumerate(WEIGHTS, 1):
        model = Net()
        nn.init.constant_(model.linear.weight, weight)
        model.bn.running_mean = torch.full((1,), -10.0 * step)
        paths.append(save_checkpoint(folder / f"step{step}", model.state_dict(), layout))
    return paths


def look(model: nn.Module) -> dict[str, float]:
    """Return the mean weight, and the mean of the statistics."""
    state = model.state_dict()
    return {
        "weight": state["linear.weight"].mean().item(),
        "mean": state["bn.running_mean"].item(),
    }


def judged(
    sources: Path | list[Path], evaluate: Callable[[nn.Module], Any] = look, **options: Any
) -> SweepResult:
    settings: dict[str, Any] = {"metric": "weight", "mode": "max", "schemes": SCHEMES}
    if isinstance(sources, Path):
        sources = save_run(sources)
    return sweep(
        sources,
        sources[0].parent / "out",
        evaluation=BnPass(model=Net, batches=batches, evaluate=evaluate),
        **settings | options,
    )


def table(found: SweepResult, kind: str) -> list[tuple[str, bool, Mapping[str, float]]]:
    return [
        (Path(row.name).stem, row.bn_pass, row.metrics) for row in found.rows if row.kind == kind
    ]


def after_pass(weight: float) -> dict[str, Any]:
    return {"weight": pytest.approx(weight), "mean": pytest.approx(6 * weight)}


# ---- what is judged ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["max", "min"])
def test_averages_are_ranked_by_the_metric(tmp_path: Path, mode: str) -> None:
    found = judged(tmp_path, mode=mode)
    expected = [
        ("uniform-last3", True, after_pass(11 / 3)),
        ("uniform-last2", True, after_pass(3.5)),
        ("uniform", True, after_pass(3.0)),
    ]
    assert table(found, "average") == (expected if mode == "max" else expected[::-1])
    assert (found.best, found.metric, found.mode) == (found.rows[0].name, "weight", mode)


def test_checkpoints_are_judged_as_stored_and_with_a_pass_of_their_own(tmp_path: Path) -> None:
    found = judged(tmp_path)
    expected = []
    for step, weight in enumerate(WEIGHTS, 1):
        expected.append((f"step{step}", False, {"weight": weight, "mean": -10.0 * step}))
        expected.append((f"step{step}", True, after_pass(weight)))
    assert table(found, "single") == expected
    assert table(found, "last") == expected[-2:]


def test_without_singles_only_the_last_checkpoint_is_judged(tmp_path: Path) -> None:
    found = judged(tmp_path, singles=False)
    assert table(found, "single") == []
    assert len(table(found, "last")) == 2


def test_without_data_nothing_is_recomputed(tmp_path: Path) -> None:
    found = sweep(
        save_run(tmp_path),
        tmp_path / "out",
        schemes=SCHEMES,
        evaluation=BnPass(model=Net, evaluate=look),
        metric="mean",
        mode="max",
    )
    assert [(row.name, row.metrics["mean"]) for row in found.rows if row.kind == "average"] == [
        ("uniform", -25.0),
        ("uniform-last3", -30.0),
        ("uniform-last2", -35.0),
    ]
    assert {row.bn_pass for row in found.rows} == {False}
    published = load_file(tmp_path / "out" / "model.safetensors")
    assert published["bn.running_mean"].item() == -25.0


def test_an_evaluation_that_spoils_the_model_spoils_nothing_else(tmp_path: Path) -> None:
    def spoil(model: nn.Module) -> dict[str, float]:
        found = look(model)
        for value in model.state_dict().values():
            value.fill_(77)
        return found

    assert judged(tmp_path, spoil).rows == judged(tmp_path, look, overwrite=True).rows


def test_the_checkpoints_are_read_once_for_all_averages(tmp_path: Path) -> None:
    found = judged(tmp_path, schemes=[f"uniform:last={n}" for n in (1, 2, 3, 4)])
    one = average_checkpoints(save_run(tmp_path), tmp_path / "one")
    assert found.result.read_nbytes == one.read_nbytes


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("output_format", ["safetensors", "torch"])
def test_the_best_is_published_as_if_it_had_been_made_alone(
    tmp_path: Path, layout: str, output_format: Any
) -> None:
    sources = save_run(tmp_path, layout)
    evaluation = BnPass(model=Net, batches=BATCHES, evaluate=look)
    sweep(
        sources, tmp_path / "out", schemes=SCHEMES, evaluation=evaluation, metric="weight",
        mode="max", output_format=output_format,
    )  # fmt: skip
    average_checkpoints(
        sources, tmp_path / "alone", schemes=Scheme(last=3, label="x"), batchnorm=evaluation,
        output_format=output_format,
    )  # fmt: skip
    out, alone = tree(tmp_path / "out"), tree(tmp_path / "alone")
    assert out.keys() - alone.keys() == {"sweep.json", "sweep.csv"}
    weights = "model.pt" if output_format == "torch" else "model.safetensors"
    assert out[weights] == alone[weights]
    told, expected = (json.loads(one["ckptavg.json"]) for one in (out, alone))
    for key in ("scheme", "checkpoints", "tensors", "metrics"):
        assert told[key] == expected[key]
    assert told["output"]["siblings"] == []
    assert [row["name"] for row in told["comparison"]] == [
        "uniform-last3", "uniform-last2", "uniform",
        "last checkpoint", f"best single checkpoint: {sources[3]}",
        "last checkpoint + BN pass", f"best single checkpoint + BN pass: {sources[3]}",
    ]  # fmt: skip


def test_all_are_published_in_directories_of_their_own(tmp_path: Path) -> None:
    found = judged(tmp_path, keep="all")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "sweep.csv", "sweep.json", "uniform", "uniform-last2", "uniform-last3",
    ]  # fmt: skip
    assert [one.path.name for one in found.result.outputs] == [
        "uniform-last2", "uniform-last3", "uniform",
    ]  # fmt: skip
    for one in found.result.outputs:
        state = load_file(one.path / "model.safetensors")
        assert one.metrics == {
            "weight": state["linear.weight"].mean().item(),
            "mean": state["bn.running_mean"].item(),
        }


@pytest.mark.parametrize("keep", ["best", "all"])
def test_a_sweep_may_replace_another(tmp_path: Path, keep: str) -> None:
    first = judged(tmp_path, keep=keep)
    assert judged(tmp_path, keep=keep, overwrite=True).rows == first.rows
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_label_may_be_the_name_of_a_file_in_the_model(tmp_path: Path) -> None:
    judged(tmp_path, schemes=["model.safetensors=uniform", "sweep.json=uniform:last=1"])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "sweep.json").is_file()


def test_sharded_winners_keep_their_index(tmp_path: Path) -> None:
    judged(tmp_path, max_shard_bytes=16)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    assert files <= set(tree(tmp_path / "out"))


def test_of_equals_the_first_wins(tmp_path: Path) -> None:
    found = judged(tmp_path, lambda model: 1.0, metric=None, schemes=SCHEMES[::-1])
    assert [row.name for row in found.rows[:3]] == ["uniform", "uniform-last3", "uniform-last2"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_that_is_not_a_number_never_wins(tmp_path: Path, mode: str) -> None:
    def evaluate(model: nn.Module) -> float:
        weight = look(model)["weight"]
        return math.nan if weight > 3.6 else weight

    found = judged(tmp_path, evaluate, metric=None, mode=mode)
    assert found.rows[2].name == "uniform-last3"
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert told["rows"][2]["metrics"] == {"metric": None}


# ---- what stands beside it -----------------------------------------------------------------------


def test_the_evidence_tells_all_rows(tmp_path: Path) -> None:
    found = judged(tmp_path, command="ckptavg sweep ...")
    told = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (told["metric"], told["mode"], told["best"]) == ("weight", "max", "uniform-last3")
    assert [one["step"] for one in told["checkpoints"]] == [1, 2, 3, 4]
    assert told["rows"][0]["coefficients"] == [0, *3 * [pytest.approx(1 / 3)]]
    assert [row["metrics"] for row in told["rows"]] == [row.metrics for row in found.rows]
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").read_text().splitlines()))
    assert [float(row["weight"]) for row in rows] == [row.metrics["weight"] for row in found.rows]
    assert [row["kind"] for row in rows] == 3 * ["average"] + 2 * ["last"] + 8 * ["single"]


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    found = judged(tmp_path, plot=True, schemes=[*SCHEMES, "uniform:last=1", "uniform:first=2"])
    assert found.files == ("sweep.json", "sweep.csv", "sweep.png")
    image = (tmp_path / "out" / "sweep.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert width > height > 300


def test_a_plot_without_matplotlib_is_refused_before_anything_is_read(
    tmp_path: Path, without_matplotlib: None
) -> None:
    with pytest.raises(UsageError, match=r"pip install 'ckptavg\[plots\]'"):
        judged(tmp_path, plot=True)
    assert not (tmp_path / "out").exists()


def test_an_average_that_brings_nothing_is_pointed_out(tmp_path: Path) -> None:
    notes = judged(tmp_path).result.notes
    assert (
        "the best average, uniform-last3, is not better than the last checkpoint (+ BN pass), "
        f"{tmp_path / 'step4.safetensors'}: weight 3.66667 against 5" in notes
    )
    assert any("not better than the best single checkpoint" in note for note in notes)
    notes = judged(tmp_path, mode="min", overwrite=True).result.notes
    assert any("not better than the best single checkpoint" in note for note in notes)
    assert not any("not better than the last" in note for note in notes)


# ---- commands ------------------------------------------------------------------------------------

JUDGE = """
import json, sys
from safetensors.torch import load_file
state = load_file(sys.argv[1] + "/model.safetensors")
print(json.dumps({"weight": state["linear.weight"].mean().item(),
                  "mean": state["bn.running_mean"].item()}))
"""


@pytest.fixture
def command(tmp_path: Path) -> EvalCommand:
    (tmp_path / "judge.py").write_text(JUDGE)
    script = shlex.join([sys.executable, str(tmp_path / "judge.py")])
    return EvalCommand(f"{script} {{model}}")


@pytest.mark.parametrize("has_pass", [True, False])
def test_a_command_says_what_a_function_says(
    tmp_path: Path, command: EvalCommand, has_pass: bool
) -> None:
    sources = save_run(tmp_path)[1:]
    batches = BATCHES if has_pass else None
    options: Any = {"schemes": ["uniform", "uniform:last=2"], "metric": "weight", "mode": "min"}
    by_function = BnPass(model=Net, batches=batches, evaluate=look)
    expected = sweep(sources, tmp_path / "out", evaluation=by_function, **options)
    by_command = BnPass(model=Net if has_pass else None, batches=batches, evaluate=command)
    found = sweep(sources, tmp_path / "out", evaluation=by_command, overwrite=True, **options)
    assert found.rows == expected.rows
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "judge.py", "out", *(f"step{n}.safetensors" for n in (1, 2, 3, 4)),
    ]  # fmt: skip


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": None}, "which metric decides? Say it with --metric: weight, mean"),
        ({"metric": "wieght"}, "there is no metric 'wieght', but weight, mean; did you mean"),
        ({"mode": None}, "whether 'weight' is best when small or when large"),
        ({"mode": "up"}, "mode is 'up', expected min or max"),
        ({"keep": "none"}, "keep is 'none', expected one of best, all"),
        ({"schemes": ["uniform", "uniform"]}, "two outputs would be called 'uniform'"),
    ],
)
def test_what_is_not_clear_is_refused_before_anything_is_averaged(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    save_run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UsageError) as caught:
        judged(tmp_path, **options)
    assert message in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "evaluation",
    [
        BnPass(model=Net, batches=BATCHES),
        BnPass(model=Net, batches=BATCHES, evaluate=look, compare=True),
    ],
)
def test_a_sweep_needs_an_evaluation_and_makes_its_own_comparison(
    tmp_path: Path, evaluation: BnPass
) -> None:
    with pytest.raises(UsageError, match="a sweep"):
        sweep(save_run(tmp_path), tmp_path / "out", schemes=SCHEMES, evaluation=evaluation)


def test_data_that_can_be_gone_through_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can be gone through only once"):
        sweep(
            save_run(tmp_path), tmp_path / "out", schemes=SCHEMES, metric="weight", mode="max",
            evaluation=BnPass(model=Net, batches=iter(BATCHES), evaluate=look),
        )  # fmt: skip


def test_an_evaluation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    calls: list[float] = []

    def fail(model: nn.Module) -> float:
        calls.append(0)
        if len(calls) == 4:
            raise OSError("no such test set")
        return 1.0

    save_run(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ModelError, match="no such test set"):
        judged(tmp_path, fail, metric=None)
    assert tree(tmp_path) == before


class Counted:
    calls = 0
    stop_at = -1


def counted(model: nn.Module) -> dict[str, float]:
    """Judge as ``look`` does, under a name that tells it from others; stop at one of the calls."""
    if Counted.calls == Counted.stop_at:
        raise KeyboardInterrupt
    Counted.calls += 1
    return look(model)


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counted, "calls", 0)
    monkeypatch.setattr(Counted, "stop_at", 7)
    sources = save_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        judged(sources, counted)
    assert Counted.calls == 2 + 3 + 2
    monkeypatch.setattr(Counted, "stop_at", -1)
    found = judged(sources, counted)
    assert found.result.resumed_nbytes == found.result.read_nbytes
    # the last checkpoint is judged first, which shows that the evaluation works; then what is left
    # of the single ones; then the winner, whose statistics were lost
    assert Counted.calls == 7 + 2 + 6 + 1
    result = tree(tmp_path / "out")
    fresh = judged(tmp_path, look, overwrite=True)
    assert found.rows == fresh.rows
    assert tree(tmp_path / "out")["model.safetensors"] == result["model.safetensors"]
    assert not [name for name in result if name.startswith(".")]


def test_a_storage_that_takes_no_evaluations_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: LineLog, entry: Mapping[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sources = save_run(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr(LineLog, "add", full)
    with pytest.raises(OutputError, match="out: cannot be written: no space left on device"):
        judged(sources)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_judge_without_a_name_said_is_not_taken_again(tmp_path: Path, number: int) -> None:
    sources, calls = save_run(tmp_path), [0]

    def unnamed(model: nn.Module) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 7 and number == 1:
            raise KeyboardInterrupt
        return {"weight": 1.0, "mean": 0.0}

    if number == 1:
        with pytest.raises(KeyboardInterrupt):
            judged(sources, unnamed)
        number, calls[0] = 2, 0
    judged(sources, unnamed)
    assert calls[0] == 2 + 3 + 8


def test_another_judge_does_not_take_what_the_first_one_said(tmp_path: Path) -> None:
    def stop(model: nn.Module) -> dict[str, float]:
        stop.calls += 1  # type: ignore[attr-defined]
        if stop.calls == 6:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return {"weight": -1.0, "mean": 0.0}

    stop.calls = 0  # type: ignore[attr-defined]
    sources = save_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        judged(sources, stop)
    found = judged(sources)
    assert found.result.resumed_nbytes > 0
    assert found.rows[0].metrics == after_pass(11 / 3)


# ---- the command line, the Hub, several processes ------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_with_module(tmp_path, monkeypatch, "swept")
    save_run(tmp_path)
    return tmp_path


ARGUMENTS = [
    "sweep", "step*.safetensors", "-o", "out", "--scheme", "uniform", "--scheme",
    "pair=uniform:last=2", "--model", "swept:Net", "--data", "swept:batches", "--eval",
    "swept:look",
]  # fmt: skip


def test_the_command_line_shows_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ARGUMENTS) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "out: uniform, the best of 2 averages of 4 checkpoints by loss (min)"
    assert len({len(line) for line in lines[-7:]}) == 1  # aligned
    assert [re.split(r" {2,}", line.strip()) for line in lines[-7:]] == [
        ["average", "loss"],
        ["uniform", "3"],
        ["pair", "3.5"],
        ["last checkpoint", "5"],
        ["best single checkpoint: step1.safetensors", "1"],
        ["last checkpoint + BN pass", "5"],
        ["best single checkpoint + BN pass: step1.safetensors", "1"],
    ]
    assert "looking" in err
    assert "note: the best average, uniform, is not better than the best single" in err


def test_json_holds_every_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--json", "--keep", "all", "--plot"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["best"], told["metric"], told["mode"]) == ("uniform", "loss", "min")
    assert told["files"] == ["sweep.json", "sweep.csv", "sweep.png"]
    assert len(told["rows"]) == 2 + 2 + 8
    assert [Path(one["path"]).name for one in told["outputs"]] == ["uniform", "pair"]


def test_a_dry_run_reads_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--dry-run"]) == 0
    assert "would average 4 checkpoints (2 averages) into out" in capsys.readouterr().out
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (ARGUMENTS[:-2], "a sweep needs a metric"),
        ([*ARGUMENTS, "--metric", "los"], "did you mean 'loss'?"),
        ([*ARGUMENTS, "--keep", "all", "--push", "me/x@y"], "go to a branch each"),
    ],
)
def test_wrong_usage_exits_with_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_revisions_on_the_hub_are_swept_and_the_winner_is_pushed(
    here: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = save_steps(here / "local", (1, 2, 3))
    for step, path in enumerate(paths, 1):
        upload(hub, path, f"step{step}")
    script = "import os,sys; print(os.path.getsize(sys.argv[1] + '/model.safetensors'))"
    code = run([
        "sweep", f"{REPO}@step*", "-o", "best", "--scheme", "uniform", "--scheme",
        "uniform:last=2", "--eval-command", f'{sys.executable} -c "{script}" {{model}}',
        "--mode", "max", "--push", "tester/best",
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    files = hub.files("tester/best", "main")
    assert files["sweep.csv"] == (here / "best" / "sweep.csv").read_bytes()
    assert "uniform-last2" in files["README.md"].decode()


def test_several_processes_give_the_rows_of_one(here: Path) -> None:
    script = """
import json, sys
sys.path.insert(0, sys.argv[1])
import os; os.chdir(sys.argv[1])
import swept
from ckptavg import BnPass, sweep
found = sweep("step*.safetensors", "out", schemes=["uniform", "uniform:last=2"],
              evaluation=BnPass(model=swept.Net, batches=swept.batches * 2, evaluate=swept.look),
              distributed=True)
if os.environ["RANK"] == "0":
    open("rows", "w").write(repr(found.rows))
"""
    (here / "script.py").write_text(script)
    completed = torchrun(str(here / "script.py"), str(here))
    assert completed.returncode == 0, completed.stderr
    sys.path.insert(0, str(here))
    swept: Any = importlib.import_module("swept")
    alone = sweep(
        "step*.safetensors",
        "alone",
        schemes=["uniform", "uniform:last=2"],
        evaluation=BnPass(model=swept.Net, batches=swept.batches * 2, evaluate=swept.look),
    )
    assert (here / "rows").read_text() == repr(alone.rows)


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("loss", "min"), ("eval_loss", "min"), ("val/nll", "min"), ("Perplexity", "min"),
        ("top1_err", "min"), ("WER", "min"), ("valLoss", "min"), ("mae", "min"),
        ("accuracy", "max"), ("val_acc", "max"), ("eval/F1", "max"), ("arc/acc,none", "max"),
        ("bleu", "max"), ("rougeL", "max"), ("top1", "max"), ("mAP", "max"), ("exact_match", "max"),
    ],
)  # fmt: skip
def test_names_tell_which_way_is_better(name: str, mode: str) -> None:
    assert best_mode(name) == mode


@pytest.mark.parametrize("name", ["metric", "glossary", "lossless", "loss_accuracy", "", "x"])
def test_names_that_do_not_tell_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--mode"):
        best_mode(name)


def test_a_judge_keeps_to_its_metric() -> None:
    judge = Judge()
    assert judge.best({"a": {"loss": 2.0}, "b": {"loss": 1.0}, "c": {"loss": 1.0}}) == "b"
    assert (judge.metric, judge.mode) == ("loss", "min")
    with pytest.raises(UsageError, match="there is no metric 'loss', but acc"):
        judge.value({"acc": 1.0})
