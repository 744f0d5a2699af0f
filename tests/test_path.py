"""Straight lines between sets of weights: values, barriers, how they are continued, the command."""

import csv
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_checkpoint, tree
from landscape_fixtures import (
    TRAIN,
    Counted,
    Net,
    Plain,
    directly,
    judged,
    look,
    loss_of,
    save_run,
    states_of,
    train,
    vector,
    with_vector,
)
from safetensors.torch import load_file, save_file
from search_fixtures import Evaluations
from torch import Tensor, nn

from ckptavg import PathResult, UsageError, average_checkpoints, path
from ckptavg.cli import run
from ckptavg.landscape import points as points_module

pytestmark = pytest.mark.usefixtures("one_thread")


def lined(folder: Path, evaluation: Any = None, **options: Any) -> PathResult:
    ends = options.pop("ends", None) or save_run(folder, count=2)
    settings: dict[str, Any] = {"points": 6, "plot": False}
    return path(
        ends[0], ends[1:], folder / "out", evaluation=evaluation or judged(),
        **{**settings, **options},
    )  # fmt: skip


def files_beside(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir() if not one.name.startswith("step"))


# ---- values --------------------------------------------------------------------------------------


def test_both_ends_have_the_values_of_a_direct_evaluation(tmp_path: Path) -> None:
    ends = save_run(tmp_path, count=2)
    found = lined(tmp_path, ends=ends)
    assert found.t == pytest.approx((-1, -0.5, 0, 0.5, 1, 1.5))
    (segment,) = found.segments
    assert (segment.start, segment.stop) == tuple(map(str, ends))
    for at, state in zip((2, 4), states_of(ends), strict=True):
        assert found.t[at] in (0, 1)
        assert {name: values[at] for name, values in segment.metrics.items()} == directly(state)


def test_points_are_those_of_weights_that_were_computed_by_hand(tmp_path: Path) -> None:
    ends = save_run(tmp_path, count=2)
    found = lined(tmp_path, ends=ends, points=11)
    states = states_of(ends)
    start, stop = map(vector, states)
    for at, t in enumerate(found.t):
        expected = directly(with_vector(states[0], (1 - t) * start + t * stop))
        assert {name: values[at] for name, values in found.segments[0].metrics.items()} == (
            pytest.approx(expected, rel=1e-5)
        )
    length = float(np.linalg.norm(stop - start))
    assert found.segments[0].length == pytest.approx(length, rel=1e-9)
    assert found.summary[0] == f"{ends[0]} and {ends[1]} are {length:.4g} apart"


@pytest.mark.parametrize(
    ("t", "points", "expected"),
    [
        ((0, 1), 3, (0, 0.5, 1)),
        ((0, 1), 2, (0, 1)),
        ((-1, 1.5), 2, (-1, 0, 1, 1.5)),
        ((0.2, 0.4), 3, (0, 0.2, 0.3, 0.4, 1)),
        ((2, 3), 2, (0, 1, 2, 3)),
        ((-3, -2), 2, (-3, -2, 0, 1)),
    ],
)
def test_both_ends_are_among_the_points_whatever_the_range_is(
    tmp_path: Path, t: tuple[float, float], points: int, expected: tuple[float, ...]
) -> None:
    found = lined(tmp_path, t=t, points=points)
    assert found.t == pytest.approx(expected)
    assert {0.0, 1.0} <= set(found.t)
    assert found.n_points == len(expected)


def test_several_stops_make_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = save_run(tmp_path, count=3)
    whole = lined(tmp_path, ends=paths)
    assert [(one.start, one.stop) for one in whole.segments] == [
        (str(paths[0]), str(paths[1])), (str(paths[0]), str(paths[2])),
    ]  # fmt: skip
    for segment, stop in zip(whole.segments, paths[1:], strict=True):
        alone = lined(tmp_path, ends=[paths[0], stop], overwrite=True)
        assert alone.segments[0].metrics == segment.metrics
        assert alone.segments[0].length == pytest.approx(segment.length)  # last digits may differ
    for most in (1, 3):
        monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", most)
        assert lined(tmp_path, ends=paths, overwrite=True).segments == whole.segments


def test_every_line_has_the_integers_of_its_own_stop_however_many_stand_side_by_side(
    tmp_path: Path,
) -> None:
    class Stepped(Net):
        step: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    seen: list[int] = []

    def keep(model: nn.Module) -> float:
        seen.append(int(model.get_buffer("step")))
        return 0.0

    paths = save_run(tmp_path, Stepped, 3)
    for number, one in enumerate(paths):
        save_file({**load_file(one), "step": torch.tensor(number)}, one)
    lined(tmp_path, judged(Stepped, evaluate=keep), ends=paths)
    assert seen == [1] * 6 + [2] * 6


def test_an_average_is_one_of_the_ends(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    average = average_checkpoints(paths, tmp_path / "swa", batchnorm=judged())
    found = lined(tmp_path, ends=[tmp_path / "swa", paths[-1]], t=(0, 1), points=2)
    assert {name: values[0] for name, values in found.segments[0].metrics.items()} == (
        average.outputs[0].metrics
    )


def test_data_is_loaded_once_for_points_side_by_side(tmp_path: Path) -> None:
    data = Counted(TRAIN)
    lined(tmp_path, judged(batches=data), points=26)
    assert data.count == 2  # of sixteen at a time


# ---- barriers ------------------------------------------------------------------------------------


def along(folder: Path, values: list[float], metric: str = "loss", **options: Any) -> PathResult:
    """Return a path whose points have given values, from t = -0.5 to 1.5 in quarters."""
    left = iter(values)
    return lined(
        folder, judged(evaluate=lambda model: {metric: next(left)}), t=(-0.5, 1.5), points=9,
        **options,
    )  # fmt: skip


def test_a_barrier_is_the_largest_excess_over_the_line_between_the_ends(tmp_path: Path) -> None:
    found = along(tmp_path, [9, 9, 1, 2, 4, 3, 3, 9, 0.5])
    assert found.segments[0].barriers == {"loss": pytest.approx(4 - 2)}
    assert found.summary[1] == (
        "loss: 1 at the start, 3 at the stop; a barrier of 2 lies between them; best 0.5 at t = 1.5"
    )


def test_a_valley_between_the_ends_is_a_negative_barrier(tmp_path: Path) -> None:
    found = along(tmp_path, [9, 9, 1, 0.5, 0.25, 0.5, 1, 9, 9])
    assert found.segments[0].barriers == {"loss": pytest.approx(-0.5)}
    assert "no barrier lies between them; best 0.25 at t = 0.5" in found.summary[1]


def test_barriers_of_what_is_best_when_large_lie_below_the_line(tmp_path: Path) -> None:
    found = along(tmp_path, [0, 0, 90, 80, 60, 85, 80, 0, 0], "accuracy")
    assert found.segments[0].barriers == {"accuracy": pytest.approx(25)}
    assert "a barrier of 25 lies between them; best 90 at t = 0" in found.summary[1]


def test_metrics_whose_names_tell_no_direction_have_a_lowest_and_no_best(tmp_path: Path) -> None:
    found = along(tmp_path, [9, 9, 1, 2, 4, 3, 3, 9, 0.5], "thing")
    assert found.summary[1].endswith("lowest 0.5 at t = 1.5")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_far_points_without_a_number_leave_the_barrier_as_it_is(tmp_path: Path, bad: float) -> None:
    found = along(tmp_path, [bad, 9, 1, 2, 4, 3, 3, 9, bad], plot=True)
    assert found.segments[0].barriers == {"loss": pytest.approx(2)}
    told = json.loads((tmp_path / "out" / "path.json").read_text())
    assert told["segments"][0]["metrics"]["loss"][0] is None


@pytest.mark.parametrize(
    "values",
    [
        [9, 9, 1, math.nan, 4, 3, 3, 9, 9],
        [9, 9, math.nan, 2, 4, 3, 3, 9, 9],
        [math.nan] * 9,
    ],
)
def test_where_there_is_no_number_between_the_ends_no_barrier_is_known(
    tmp_path: Path, values: list[float]
) -> None:
    found = along(tmp_path, values, plot=True)
    assert math.isnan(found.segments[0].barriers["loss"])
    assert "whether a barrier lies between them is not known" in found.summary[1]
    told = json.loads((tmp_path / "out" / "path.json").read_text())
    assert told["segments"][0]["barriers"] == {"loss": None}


def test_without_a_point_between_the_ends_no_barrier_is_known(tmp_path: Path) -> None:
    found = lined(tmp_path, t=(0, 1), points=2)
    assert math.isnan(found.segments[0].barriers["test_loss"])


def test_points_so_far_away_that_statistics_overflow_have_no_numbers(tmp_path: Path) -> None:
    found = lined(tmp_path, t=(-1e39, 1e39), points=3)
    (segment,) = found.segments
    assert list(found.t) == [-1e39, 0, 1, 1e39]
    for values in segment.metrics.values():
        assert [math.isnan(value) for value in values] == [True, False, False, True]


def test_layers_that_are_stored_by_parts_are_pointed_out(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    ends = []
    for seed in range(2):
        torch.manual_seed(seed)
        ends.append(save_checkpoint(tmp_path / str(seed), Normed().state_dict(), "safetensors"))
    found = lined(tmp_path, judged(Normed, batches=None), ends=ends)
    (note,) = [note for note in found.notes if "stored by parts" in note]
    assert "stored by parts (1), such as 'body.parametrizations.weight' (weight_norm)" in note


# ---- interrupted and continued -------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 7, 12])
def test_an_interrupted_call_is_continued_without_evaluating_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[..., None], at: int
) -> None:
    monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", 1)
    paths = save_run(tmp_path, count=3)
    evaluation = judged(Net, train, look)
    whole = lined(tmp_path, evaluation, ends=paths)
    (tmp_path / "out").rename(tmp_path / "step-whole")
    Evaluations.count = 0
    stop(at)
    with pytest.raises(KeyboardInterrupt):
        lined(tmp_path, evaluation, ends=paths)
    found = lined(tmp_path, evaluation, ends=paths)
    assert Evaluations.count == found.n_points + 1 == 13
    assert (found.n_resumed, found.segments) == (at - 1, whole.segments)
    assert tree(tmp_path / "out") == tree(tmp_path / "step-whole")
    assert files_beside(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "changed", [{"points": 5}, {"t": (-1, 2)}, {"order": [1, 0]}, {"order": [0, 1, 2]}]
)
def test_what_another_call_left_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[..., None],
    changed: dict[str, Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", 1)
    paths = save_run(tmp_path, count=3)
    evaluation = judged(Net, train, look)
    stop(4)
    with pytest.raises(KeyboardInterrupt):
        lined(tmp_path, evaluation, ends=paths[:2])
    options = dict(changed)
    ends = [paths[number] for number in options.pop("order", [0, 1])]
    assert lined(tmp_path, evaluation, ends=ends, **options).n_resumed == 0
    assert files_beside(tmp_path) == ["out"]


# ---- what stands in the directory, and what goes wrong -------------------------------------------


def test_json_and_csv_hold_every_number_that_is_drawn(tmp_path: Path) -> None:
    paths = save_run(tmp_path, count=3)
    found = lined(tmp_path, ends=paths, plot=True, command="ckptavg path")
    assert found.files == ("path.json", "path.csv", "path.png", "path.svg")
    assert sorted(tree(tmp_path / "out")) == sorted(found.files)
    told = json.loads((tmp_path / "out" / "path.json").read_text())
    assert (told["format_version"], told["kind"], told["command"]) == (1, "path", "ckptavg path")
    assert told["title"] == f"path from {paths[0]} to {paths[1]}, {paths[2]}"
    assert told["t"] == list(found.t)
    for kept, segment in zip(told["segments"], found.segments, strict=True):
        assert kept["metrics"] == {name: list(one) for name, one in segment.metrics.items()}
        assert (kept["barriers"], kept["length"]) == (segment.barriers, segment.length)
    with (tmp_path / "out" / "path.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["start", "stop", "t", "distance", "test_loss", "test_error"]
    assert [(*row[:2], *map(float, row[2:])) for row in rows] == [
        (one.start, one.stop, t, t * one.length, *(values[at] for values in one.metrics.values()))
        for one in found.segments
        for at, t in enumerate(found.t)
    ]
    first = tree(tmp_path / "out")
    lined(tmp_path, ends=paths, plot=True, command="ckptavg path", overwrite=True)
    assert tree(tmp_path / "out") == first


def test_the_same_weights_are_no_path(tmp_path: Path) -> None:
    first, second = save_run(tmp_path, count=2)
    copy = save_checkpoint(tmp_path / "copy", load_file(first), "torch")
    with pytest.raises(UsageError) as caught:
        lined(tmp_path, ends=[first, second, copy])
    assert str(caught.value) == f"{first} and {copy} are the same weights"
    with pytest.raises(UsageError, match="are the same weights"):
        lined(tmp_path, ends=[first, first])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 1}, "points is 1, expected at least 2"),
        ({"t": (1, 0)}, "t goes from 1 to 0, expected an increasing range"),
        ({"t": (0, 0)}, "t goes from 0 to 0, expected an increasing range"),
        ({"t": (0, math.inf)}, "t goes from 0 to inf, expected an increasing range"),
        ({"t": (math.nan, 1)}, "t goes from nan to 1, expected an increasing range"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        lined(tmp_path, **options)
    assert message in str(caught.value)
    assert files_beside(tmp_path) == []


def test_a_path_goes_somewhere(tmp_path: Path) -> None:
    (start,) = save_run(tmp_path, count=1)
    with pytest.raises(UsageError, match="a path needs where to go: a second checkpoint"):
        path(start, [], tmp_path / "out", evaluation=judged())


def test_a_stop_may_be_given_by_itself(tmp_path: Path) -> None:
    start, stop = save_run(tmp_path, Plain, 2)
    for one in (stop, str(stop)):
        found = path(
            start, one, tmp_path / "out", evaluation=judged(Plain, None, loss_of), points=2,
            plot=False, overwrite=True,
        )  # fmt: skip
        assert [segment.stop for segment in found.segments] == [str(stop)]


# ---- the command line ----------------------------------------------------------------------------

ARGUMENTS = [
    "path", "step1.safetensors", "step2.safetensors", "-o", "out", "--model",
    "landscape_fixtures:Net", "--data", "landscape_fixtures:train", "--loader",
    "test=landscape_fixtures:test", "--t", "-1:1.5", "--points", "6", "--no-plot",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    save_run(tmp_path, count=3)
    return tmp_path


def test_the_command_line_shows_every_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS[:3], "step3.safetensors", *ARGUMENTS[3:]]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads((here / "out" / "path.json").read_text())
    assert re.fullmatch(r"out: 6 points a line, 12 evaluations, \d+\.\d s on cpu", lines[0])
    assert [line.strip() for line in lines[1:7]] == told["summary"]
    expected: list[list[str]] = [[""]]
    for segment in told["segments"]:
        expected += [[f"to {segment['stop']}"], ["t", "test_loss", "test_error"]]
        expected += [
            [f"{t:.3g}", *(f"{values[at]:.4g}" for values in segment["metrics"].values())]
            for at, t in enumerate(told["t"])
        ]
        expected.append([""])
    assert [re.split(r" {2,}", line) for line in lines[7:]] == [
        *expected, ["files: path.json, path.csv"],
    ]  # fmt: skip


def test_json_is_what_python_returns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--json", "--t", "0:1", "--points", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["t"], told["n_points"]) == ([0, 0.5, 1], 3)
    assert told["segments"][0]["stop"] == "step2.safetensors"
    assert told["segments"][0]["barriers"].keys() == {"test_loss", "test_error"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ARGUMENTS[:2], *ARGUMENTS[3:]], "TO is missing: name at least two checkpoints"),
        ([*ARGUMENTS[:1], *ARGUMENTS[3:]], "Missing argument 'FROM TO...'"),
        ([*ARGUMENTS[:5], *ARGUMENTS[7:]], "--model is missing"),
        ([*ARGUMENTS[:9], *ARGUMENTS[11:]], "nothing judges the weights"),
        ([*ARGUMENTS, "--t", "1"], "'1' is not of the form A:B, such as 0:1"),
        ([*ARGUMENTS, "--t", "1:0"], "'1:0': expected the smaller number first"),
        ([*ARGUMENTS[:2], *ARGUMENTS[1:2], *ARGUMENTS[3:]], "are the same weights"),
    ],
)
def test_wrong_usage_exits_with_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


def test_an_end_that_is_not_there_exits_with_1(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*ARGUMENTS[:2], "nothing.pt", *ARGUMENTS[3:]]) == 1
    assert "nothing.pt" in capsys.readouterr().err
