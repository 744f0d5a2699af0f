"""Random rays from solutions: directions, values, how they are continued, files, the command."""

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
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
    State,
    directly,
    judged,
    look,
    save_run,
    states_of,
    train,
    vector,
)
from search_fixtures import Evaluations
from torch import Tensor, nn

from ckptavg import ModelError, Selection, UsageError, WidthResult, average_checkpoints, width
from ckptavg.cli import run
from ckptavg.landscape import points as points_module
from ckptavg.landscape.subspace import WeightSpace

pytestmark = pytest.mark.usefixtures("one_thread")


def rayed(folder: Path, evaluation: Any = None, **options: Any) -> WidthResult:
    solutions = options.pop("solutions", None)
    if solutions is None:
        first, second = save_run(folder, count=2)
        solutions = {"a": first, "b": second}
    settings: dict[str, Any] = {"rays": 2, "points": 3, "plot": False}
    return width(
        solutions, folder / "out", evaluation=evaluation or judged(), **{**settings, **options}
    )


def files_beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("step"))


class Recorder:
    """Keeps the weights of every model that is evaluated, with the names of parameters."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module) -> float:
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})
        return float(len(self.states))

    def steps(self, at: int, start: State) -> dict[str, Tensor]:
        return {name: self.states[at][name].double() - start[name].double() for name in start}


# ---- directions ----------------------------------------------------------------------------------


class Buffered(Net):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))


def test_directions_on_the_sphere_have_length_one_over_the_parameters_only(tmp_path: Path) -> None:
    record = Recorder()
    first, second = save_run(tmp_path, Buffered, 2)
    found = rayed(
        tmp_path, judged(Buffered, evaluate=record), solutions={"a": first, "b": second},
        directions="sphere", rays=2, points=2, distance=3.0,
    )  # fmt: skip
    assert dict(found.distances) == {"sphere": (0, 3)}
    states = states_of([first, second])
    parameters = [name for name, _ in Buffered().named_parameters()]
    flat = []
    for at, start in ((2, states[0]), (3, states[1]), (4, states[0]), (5, states[1])):
        steps = record.steps(at, start)
        assert not steps["scale"].any()
        flat.append(torch.cat([steps[name].flatten() for name in parameters]))
        assert flat[-1].norm().item() == pytest.approx(3, rel=1e-6)
    torch.testing.assert_close(flat[0], flat[1], rtol=0, atol=1e-6)  # the same for both solutions
    assert abs(torch.dot(flat[0], flat[2]).item()) < 3  # of 9


def test_directions_by_filters_have_the_norms_of_the_solutions_filters(tmp_path: Path) -> None:
    record = Recorder()
    first, second = save_run(tmp_path, Buffered, 2)
    found = rayed(
        tmp_path, judged(Buffered, evaluate=record), solutions={"a": first, "b": second},
        directions="filter", rays=1, points=2, relative=0.5,
    )  # fmt: skip
    assert dict(found.distances) == {"filter": (0, 0.5)}
    taken = []
    for at, start in ((2, states_of([first])[0]), (3, states_of([second])[0])):
        steps = record.steps(at, start)
        for name in ("body.weight", "head.weight"):
            torch.testing.assert_close(
                steps[name].norm(dim=1), 0.5 * start[name].double().norm(dim=1), rtol=1e-5, atol=0
            )
        for name in ("body.bias", "bn.weight", "bn.bias", "head.bias", "scale"):
            assert not steps[name].any()
        taken.append(steps["body.weight"] / steps["body.weight"].norm(dim=1, keepdim=True))
    torch.testing.assert_close(taken[0], taken[1], rtol=0, atol=1e-5)


def test_filters_may_be_empty_zero_or_complex() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.zero = nn.Parameter(torch.zeros(2, 3))
            self.bias = nn.Parameter(torch.ones(4, dtype=torch.complex64))
            self.phases = nn.Parameter(torch.full((2, 3), 1j, dtype=torch.complex64))

    model = Odd()
    space = WeightSpace(model)
    assert space.size == 6 + 8 + 12
    weights = space.vector(model)
    direction = space.random_direction(weights, 0)
    assert torch.linalg.vector_norm(direction).item() == pytest.approx(1)
    scaled = space.filter_normalised(direction, weights)
    assert not scaled[:14].any()
    assert scaled[14:].view(2, 6).norm(dim=1).tolist() == pytest.approx([3**0.5] * 2)
    space.put(model, [weights, scaled], np.array([1.0, 2.0]))
    assert torch.equal(space.vector(model), weights + 2 * scaled)


def test_tied_weights_and_statistics_count_once_and_not_at_all() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(4, 6)
            self.second.weight = self.body.weight

    assert WeightSpace(Tied()).size == WeightSpace(Net()).size + 6
    assert WeightSpace(Net()).size == sum(one.numel() for one in Net().parameters())


def test_seeds_give_the_directions_and_each_adds_one(tmp_path: Path) -> None:
    solutions = {"a": save_run(tmp_path, count=1)[0]}
    whole = rayed(tmp_path, solutions=solutions, rays=3)
    rest = rayed(tmp_path, solutions=solutions, rays=2, ray_seed=1, overwrite=True)
    for kind in ("sphere", "filter"):
        later = [ray.metrics for ray in whole.rays if (ray.kind, ray.direction > 0) == (kind, True)]
        assert later == [ray.metrics for ray in rest.rays if ray.kind == kind]
    assert len({str(ray.metrics) for ray in whole.rays}) == 6


# ---- values --------------------------------------------------------------------------------------


def test_values_are_those_of_a_direct_evaluation(tmp_path: Path) -> None:
    record = Recorder()
    first, second = save_run(tmp_path, count=2)
    solutions = {"a": first, "b": second}
    rayed(tmp_path, judged(evaluate=record), solutions=solutions)
    found = rayed(tmp_path, solutions=solutions, overwrite=True)
    starts = dict(zip("ab", states_of([first, second]), strict=True))
    at = 2
    for ray in found.rays:
        here = [record.states[at], record.states[at + 1]]
        expected = [directly(one) for one in (starts[ray.solution], *here)]
        assert dict(ray.metrics) == {
            name: tuple(one[name] for one in expected) for name in ("test_loss", "test_error")
        }
        way = [vector(one) - vector(starts[ray.solution]) for one in here]
        np.testing.assert_allclose(way[1], 2 * way[0], atol=1e-6)
        at += 2
    assert at == len(record.states) == found.n_points == 2 + 2 * 2 * 2 * 2
    for kind in ("sphere", "filter"):
        for name in "ab":
            rays = [ray for ray in found.rays if (ray.kind, ray.solution) == (kind, name)]
            assert found.means[kind][name]["test_loss"] == pytest.approx(
                tuple(np.mean([ray.metrics["test_loss"] for ray in rays], axis=0))
            )


def test_a_solution_itself_is_evaluated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", 1)
    data = Counted(TRAIN)
    found = rayed(tmp_path, judged(batches=data), rays=3, points=4)
    assert data.count == found.n_points == 2 + 2 * 2 * 3 * 3


def test_points_side_by_side_give_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = save_run(tmp_path, count=2)
    found = []
    for most in (1, 3, 16):
        monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", most)
        found.append(
            rayed(tmp_path, solutions={"a": first, "b": second}, points=6, overwrite=True).rays
        )
    assert found[0] == found[1] == found[2]


def test_rays_go_half_as_far_again_as_solutions_are_apart(tmp_path: Path) -> None:
    paths = save_run(tmp_path, count=3)
    found = rayed(tmp_path, solutions=dict(zip("abc", paths, strict=True)))
    weights = [vector(state) for state in states_of(paths)]
    for row, one in zip(found.solution_distances, weights, strict=True):
        assert row == pytest.approx([np.linalg.norm(one - other) for other in weights], rel=1e-9)
    furthest = max(map(max, found.solution_distances))
    assert found.distances["sphere"] == pytest.approx((0, 0.75 * furthest, 1.5 * furthest))
    assert found.distances["filter"] == (0, 0.25, 0.5)


@pytest.mark.parametrize("count", [1, 2])
def test_where_nothing_is_apart_rays_go_a_tenth_of_the_weights_length(
    tmp_path: Path, count: int
) -> None:
    (path,) = save_run(tmp_path, count=1)
    found = rayed(tmp_path, solutions={f"s{number}": path for number in range(count)})
    length = np.linalg.norm(vector(states_of([path])[0]))
    assert found.distances["sphere"][-1] == pytest.approx(0.1 * length)
    assert found.solution_distances == ((0.0,) * count,) * count
    assert found.sources == (str(path),) * count
    assert found.rays[0].metrics["test_loss"][0] == directly(states_of([path])[0])["test_loss"]


def test_a_valley_that_is_wider_is_told_first(tmp_path: Path) -> None:
    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(50, dtype=torch.float64))
            self.curvature = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

    def bowl(model: nn.Module) -> dict[str, float]:
        curvature = model.get_parameter("curvature").round().item()
        return {"loss": curvature * model.get_parameter("w").square().sum().item()}

    solutions = {
        name: save_checkpoint(
            tmp_path / name,
            {"w": torch.zeros(50).double(), "curvature": torch.full((1, 1), curvature).double()},
            "safetensors",
        )
        for name, curvature in (("sharp", 4.0), ("flat", 1.0))
    }
    found = rayed(
        tmp_path, judged(Bowl, None, bowl), solutions=solutions, directions="sphere", distance=0.5,
        points=2,
    )  # fmt: skip
    means = found.means["sphere"]
    assert means["sharp"]["loss"][1] == pytest.approx(4 * means["flat"]["loss"][1])
    assert means["flat"]["loss"][1] == pytest.approx(0.25, rel=0.1)  # but for the curvature's part
    assert found.summary == (
        "loss, 0.5 away in random directions (sphere) (widest first): flat 0 -> "
        f"{means['flat']['loss'][1]:.4g}, sharp 0 -> {means['sharp']['loss'][1]:.4g}",
    )


def test_a_solution_that_breaks_down_on_the_way_is_the_narrowest(tmp_path: Path) -> None:
    count = iter([1.0, 1.0, math.nan, math.nan, 5.0, 5.0])
    found = rayed(
        tmp_path, judged(evaluate=lambda model: {"loss": next(count)}), directions="sphere",
        rays=1, points=3, plot=True,
    )  # fmt: skip
    assert found.summary[0].endswith("(widest first): b 1 -> 5, a 1 -> nan")


def test_averages_and_single_iterates_can_be_compared(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    average_checkpoints(paths, tmp_path / "swa", batchnorm=judged())
    found = rayed(tmp_path, solutions={"swa": tmp_path / "swa", "last": paths[-1]})
    assert found.solutions == ("swa", "last")
    average = states_of([tmp_path / "swa" / "model.safetensors"])[0]
    assert found.means["sphere"]["swa"]["test_loss"][0] == directly(average)["test_loss"]


# ---- interrupted and continued -------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 3, 9])
def test_an_interrupted_call_is_continued_without_evaluating_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[..., None], at: int
) -> None:
    monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", 1)
    first, second = save_run(tmp_path, count=2)
    solutions = {"a": first, "a sphere 0 1": second}
    evaluation = judged(Net, train, look)
    whole = rayed(tmp_path, evaluation, solutions=solutions)
    (tmp_path / "out").rename(tmp_path / "step-whole")
    Evaluations.count = 0
    stop(at)
    with pytest.raises(KeyboardInterrupt):
        rayed(tmp_path, evaluation, solutions=solutions)
    found = rayed(tmp_path, evaluation, solutions=solutions)
    assert Evaluations.count == found.n_points + 1
    assert (found.n_resumed, found.rays) == (at - 1, whole.rays)
    assert tree(tmp_path / "out") == tree(tmp_path / "step-whole")
    assert files_beside(tmp_path) == ["out"]


def test_the_last_digits_of_the_distance_between_solutions_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[..., None]
) -> None:
    monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", 1)
    solutions = dict(zip("ab", save_run(tmp_path, count=2), strict=True))
    evaluation = judged(Net, train, look)
    stop(12)
    with pytest.raises(KeyboardInterrupt):
        rayed(tmp_path, evaluation, solutions=solutions)
    monkeypatch.setattr("ckptavg.landscape.width._BEYOND", 1.5 * (1 + 1e-14))
    found = rayed(tmp_path, evaluation, solutions=solutions)
    assert (found.n_resumed, Evaluations.count) == (11, found.n_points + 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"rays": 3},
        {"points": 4},
        {"directions": "sphere"},
        {"distance": 1.0},
        {"relative": 0.4},
        {"ray_seed": 1},
        {"names": "xy"},
        {"names": "ba"},
    ],
)
def test_what_another_call_left_is_not_taken_over(
    tmp_path: Path, stop: Callable[..., None], changed: dict[str, Any]
) -> None:
    paths = save_run(tmp_path, count=2)
    evaluation = judged(Net, train, look)
    stop(4)
    with pytest.raises(KeyboardInterrupt):
        rayed(tmp_path, evaluation, solutions=dict(zip("ab", paths, strict=True)))
    options = dict(changed)
    solutions = dict(zip(options.pop("names", "ab"), paths, strict=True))
    found = rayed(tmp_path, evaluation, solutions=solutions, **options)
    assert found.n_resumed == 0
    assert files_beside(tmp_path) == ["out"]


# ---- what stands in the directory, and what goes wrong -------------------------------------------


def test_json_and_csv_hold_every_number_that_is_drawn(tmp_path: Path) -> None:
    found = rayed(tmp_path, plot=True)
    assert found.files == ("width.json", "width.csv", "width.png", "width.svg")
    assert sorted(tree(tmp_path / "out")) == sorted(found.files)
    told = json.loads((tmp_path / "out" / "width.json").read_text())
    assert (told["format_version"], told["kind"]) == (1, "width")
    assert told["solutions"] == dict(zip(found.solutions, found.sources, strict=True))
    assert told["distances"] == {kind: list(one) for kind, one in found.distances.items()}
    assert [ray["metrics"]["test_loss"] for ray in told["rays"]] == [
        list(ray.metrics["test_loss"]) for ray in found.rays
    ]
    assert told["means"]["filter"]["b"]["test_error"] == list(
        found.means["filter"]["b"]["test_error"]
    )
    assert told["solution_distances"] == [list(row) for row in found.solution_distances]
    with (tmp_path / "out" / "width.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["solution", "kind", "direction", "distance", "test_loss", "test_error"]
    assert [(*row[:2], *map(float, row[2:])) for row in rows] == [
        (ray.solution, ray.kind, ray.direction, at, *(one[number] for one in ray.metrics.values()))
        for ray in found.rays
        for number, at in enumerate(found.distances[ray.kind])
    ]
    first = tree(tmp_path / "out")
    rayed(tmp_path, plot=True, overwrite=True)
    assert tree(tmp_path / "out") == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "up"}, "directions is 'up', expected one of sphere, filter, both"),
        ({"rays": 0}, "rays is 0, expected at least 1"),
        ({"points": 1}, "points is 1, expected at least 2"),
        ({"ray_seed": -1}, "ray_seed is -1, expected at least 0"),
        ({"distance": 0.0}, "distance is 0.0, expected a positive number"),
        ({"relative": math.inf}, "relative is inf, expected a positive number"),
        ({"distance": math.nan}, "distance is nan, expected a positive number"),
        ({"solutions": {}}, "name at least one checkpoint"),
        ({"selection": Selection(last=2)}, "a width goes by single checkpoints: leave selection"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        rayed(tmp_path, **options)
    assert message in str(caught.value)
    assert files_beside(tmp_path) == []


def test_solutions_of_another_architecture_are_refused(tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", Plain().state_dict(), "safetensors")
    (path,) = save_run(tmp_path, count=1)
    with pytest.raises(ModelError, match="does not fit the model"):
        rayed(tmp_path, solutions={"a": path, "b": other})


def test_models_without_batchnorm_need_no_data(tmp_path: Path) -> None:
    paths = save_run(tmp_path, Plain, 2)
    solutions: Mapping[str, Path] = dict(zip("ab", paths, strict=True))
    found = rayed(tmp_path, judged(Plain, None), solutions=solutions)
    assert (
        found.rays[0].metrics["test_loss"][0] == directly(states_of(paths)[0], Plain)["test_loss"]
    )


# ---- the command line ----------------------------------------------------------------------------

ARGUMENTS = [
    "width", "one=step1.safetensors", "step2.safetensors", "-o", "out", "--model",
    "landscape_fixtures:Net", "--data", "landscape_fixtures:train", "--loader",
    "test=landscape_fixtures:test", "--rays", "2", "--points", "3", "--no-plot",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    save_run(tmp_path, count=2)
    return tmp_path


def test_the_command_line_shows_the_means(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ARGUMENTS) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads((here / "out" / "width.json").read_text())
    assert re.fullmatch(r"out: 2 rays of each kind, 18 evaluations, \d+\.\d s on cpu", lines[0])
    n_sentences = len(told["summary"])
    assert [line.strip() for line in lines[1 : 1 + n_sentences]] == told["summary"]
    rest = lines[2 + n_sentences :]
    expected = []
    for kind, places in told["distances"].items():
        expected.append([f"mean of the rays ({kind}), at", *(f"{at:.3g}" for at in places)])
        expected += [
            [f"{name}: {metric}", *(f"{value:.4g}" for value in values)]
            for name, metrics in told["means"][kind].items()
            for metric, values in metrics.items()
        ]
        expected.append([""])
    assert [re.split(r" {2,}", line) for line in rest] == [
        *expected, ["files: width.json, width.csv"],
    ]  # fmt: skip
    assert list(told["solutions"]) == ["one", "step2.safetensors"]


def test_json_is_what_python_returns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--json", "--directions", "filter", "--relative", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["solutions"] == ["one", "step2.safetensors"]
    assert told["distances"] == {"filter": [0, 0.5, 1]}
    assert (told["n_points"], told["files"]) == (10, ["width.json", "width.csv"])


def test_one_solution_will_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS[:2], *ARGUMENTS[3:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["solutions"] == ["one"]


def test_a_path_with_an_equals_sign_is_a_path(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / "lr=0.1"
    folder.mkdir()
    (here / "step1.safetensors").rename(folder / "x.safetensors")
    arguments = [ARGUMENTS[0], "./lr=0.1/x.safetensors", *ARGUMENTS[2:], "--json"]
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["solutions"][0] == "./lr=0.1/x.safetensors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ARGUMENTS[:2], "one=step2.safetensors", *ARGUMENTS[3:]], "two solutions are called"),
        ([*ARGUMENTS[:2], "two=", *ARGUMENTS[3:]], "'two=' names no checkpoint"),
        ([*ARGUMENTS[:5], *ARGUMENTS[7:]], "--model is missing"),
        ([*ARGUMENTS[:9], *ARGUMENTS[11:]], "nothing judges the weights"),
        ([*ARGUMENTS[:1], *ARGUMENTS[3:]], "Missing argument '[NAME=]CKPT...'"),
        ([*ARGUMENTS, "--distance", "0"], "0.0 is not in the range"),
        ([*ARGUMENTS, "--last", "3"], "No such option"),
    ],
)
def test_wrong_usage_exits_with_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


def test_a_solution_that_is_not_there_exits_with_1(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*ARGUMENTS[:2], "two=nothing.pt", *ARGUMENTS[3:]]) == 1
    assert "nothing.pt" in capsys.readouterr().err
