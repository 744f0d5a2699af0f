"""Planes through checkpoints: values, projections, what can be a corner, files, the command."""

import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_checkpoint, tree
from landscape_fixtures import (
    TEST,
    TRAIN,
    VALIDATION,
    Counted,
    Net,
    Plain,
    Vector,
    directly,
    drawn,
    judged,
    look,
    loss_of,
    on_loaders,
    save_run,
    states_of,
    train,
    vector,
    with_vector,
)
from safetensors.torch import load_file, save_file
from search_fixtures import Evaluations
from torch import Tensor, nn

from ckptavg import (
    BnPass,
    CheckpointError,
    EvalCommand,
    LabelledEvaluation,
    Loader,
    ModelError,
    OutputError,
    PlaneResult,
    Selection,
    UsageError,
    average_checkpoints,
    plane,
)
from ckptavg.cli import run
from ckptavg.landscape import points as points_module
from ckptavg.live_model import LiveModel
from ckptavg.processes import Processes

pytestmark = pytest.mark.usefixtures("one_thread")

N = 5  # checkpoints of a run


def laid(folder: Path, evaluation: BnPass | None = None, **options: Any) -> PlaneResult:
    sources = options.pop("sources", None) or save_run(folder)
    settings: dict[str, Any] = {"points": 3, "plot": False}
    return plane(
        sources, folder / "out", evaluation=evaluation or judged(), **{**settings, **options}
    )


def directions(one: Vector, two: Vector, three: Vector) -> tuple[Vector, Vector]:
    along = (three - one) / np.linalg.norm(three - one)
    across = (two - one) - ((two - one) @ along) * along
    return along, across / np.linalg.norm(across)


def files_beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("step"))


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 16])
def test_corners_have_the_values_of_a_direct_evaluation(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", most)
    paths = save_run(tmp_path)
    found = laid(tmp_path, sources=paths)
    states = states_of(paths)
    for at, mark in enumerate(found.marks[:-1]):
        expected = ("corner", directly(states[at])) if at in (0, 2, 4) else ("iterate", None)
        assert (mark.name, (mark.kind, mark.metrics)) == (str(paths[at]), expected)
    assert found.through == (str(paths[0]), str(paths[2]), str(paths[4]))


def test_a_mean_as_a_corner_is_the_model_that_an_average_publishes(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    found = laid(tmp_path, sources=paths, through=("first", "mean", "last"))
    average = average_checkpoints(paths, tmp_path / "average", batchnorm=judged())
    assert found.marks[-1].metrics == average.outputs[0].metrics
    assert (found.marks[-1].name, found.marks[-1].kind) == ("mean", "corner")
    assert found.marks[-1].off_plane == pytest.approx(0, abs=1e-6)
    assert found.through[1] == "mean"


def test_grid_values_are_those_of_weights_that_were_computed_by_hand(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    found = laid(tmp_path, sources=paths, points=4)
    states = states_of(paths)
    one, two, three = (vector(states[at]) for at in (0, 2, 4))
    along, across = directions(one, two, three)
    assert list(found.grids) == ["test_loss", "test_error"]
    for row, y in enumerate(found.y):
        for column, x in enumerate(found.x):
            expected = directly(with_vector(states[0], one + x * along + y * across))
            assert found.grids["test_loss"][row][column] == pytest.approx(
                expected["test_loss"], rel=1e-5
            )
            assert found.grids["test_error"][row][column] == expected["test_error"]


def test_the_model_has_those_weights_to_the_last_bit_but_one(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def keep(model: nn.Module) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0.0

    paths = save_run(tmp_path)
    found = laid(tmp_path, judged(evaluate=keep), sources=paths, points=2)
    states = states_of(paths)
    one, two, three = (vector(states[at]) for at in (0, 2, 4))
    along, across = directions(one, two, three)
    for state, expected in zip(seen, (one, two, three), strict=False):
        assert (vector(state) == expected).all()
    grid = [(x, y) for y in found.y for x in found.x]
    for state, (x, y) in zip(seen[4:], grid, strict=True):
        by_hand = one + x * along + y * across
        np.testing.assert_allclose(vector(state), by_hand, rtol=1.2e-7, atol=1e-12)


def test_projections_and_distances_are_those_of_a_computation_by_hand(tmp_path: Path) -> None:
    sgd = save_checkpoint(tmp_path / "sgd", Net().state_dict(), "safetensors")
    paths = save_run(tmp_path)
    found = laid(tmp_path, sources=paths, marks=[sgd])
    points = [vector(state) for state in states_of([*paths, sgd])]
    points.append(np.mean(points[:N], axis=0))
    along, across = directions(points[0], points[2], points[4])
    assert [mark.name for mark in found.marks] == [*map(str, paths), str(sgd), "mean"]
    for mark, point in zip(found.marks, points, strict=True):
        x, y = (point - points[0]) @ along, (point - points[0]) @ across
        off = np.linalg.norm(point - points[0] - x * along - y * across)
        assert mark.x == pytest.approx(x, rel=1e-9, abs=1e-9)
        assert mark.y == pytest.approx(y, rel=1e-9, abs=1e-9)
        is_corner = mark.kind == "corner"
        assert mark.off_plane == pytest.approx(0 if is_corner else off, rel=1e-9, abs=1e-9)
    assert (found.marks[0].x, found.marks[0].y) == (0, 0)
    assert found.marks[-2].kind == "mark"


def test_the_mean_of_three_lies_in_their_plane_where_algebra_says(tmp_path: Path) -> None:
    found = laid(tmp_path, sources=save_run(tmp_path, count=3))
    *corners, mean = found.marks
    assert mean.x == pytest.approx(np.mean([mark.x for mark in corners]))
    assert mean.y == pytest.approx(np.mean([mark.y for mark in corners]))
    assert mean.off_plane == 0
    assert found.summary[0] == (
        "the mean of the 3 checkpoints lies 0 off the plane, single ones up to 0"
    )


def test_the_mean_is_judged_where_it_is_seen(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    mean = laid(tmp_path, sources=paths).marks[-1]
    states = states_of(paths)
    one, two, three = (vector(states[at]) for at in (0, 2, 4))
    along, across = directions(one, two, three)
    expected = directly(with_vector(states[0], one + mean.x * along + mean.y * across))
    assert mean.kind == "mean"
    assert mean.metrics is not None
    assert mean.metrics["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)


def test_principal_components_are_those_of_numpy(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    average_checkpoints(paths, tmp_path / "average", batchnorm=judged())
    found = laid(tmp_path, sources=paths, marks=[tmp_path / "average"], through="pca", points=2)
    states = states_of(paths)
    points = np.stack([vector(state) for state in states])
    mean = points.mean(axis=0)
    _, lengths, axes = np.linalg.svd(points - mean, full_matrices=False)
    signs = [np.sign(found.marks[0].x), np.sign(found.marks[0].y)] * np.sign(
        (points[0] - mean) @ axes[:2].T
    )
    for mark, point in zip(found.marks, points, strict=False):
        assert (mark.x, mark.y) == pytest.approx(tuple(signs * ((point - mean) @ axes[:2].T)))
        assert (mark.kind, mark.metrics) == ("iterate", None)
    shares = lengths**2 / (lengths**2).sum()
    told = json.loads((tmp_path / "out" / "plane.json").read_text())
    assert told["axes"] == [
        f"{name} PC ({share:.0%} of the variance)"
        for name, share in zip(("1st", "2nd"), shares, strict=False)
    ]
    along, across = (sign * axis for sign, axis in zip(signs, axes, strict=False))
    expected = directly(with_vector(states[0], mean + found.x[1] * along + found.y[0] * across))
    assert found.grids["test_loss"][0][1] == pytest.approx(expected["test_loss"], rel=1e-4)
    average = load_file(tmp_path / "average" / "model.safetensors")
    assert found.marks[-1].metrics == directly(average)
    assert (found.through, found.marks[-1].x, found.marks[-1].off_plane) == (("pca",), 0, 0)
    assert found.marks[-2].kind == "mark"
    assert found.marks[-2].x == pytest.approx(0, abs=1e-6)


def test_checkpoints_of_any_place_may_be_corners(tmp_path: Path) -> None:
    far = Net().state_dict()
    other = save_checkpoint(tmp_path / "other", far, "torch")
    paths = save_run(tmp_path)
    found = laid(tmp_path, sources=paths, through=("mean", other, "last"), marks=[other])
    assert found.through == ("mean", str(other), str(paths[-1]))
    assert [mark.kind for mark in found.marks] == [*["iterate"] * 4, *["corner"] * 2, "mark",
                                                   "corner"]  # fmt: skip
    assert found.marks[5].metrics == directly(far)
    assert (found.marks[6].x, found.marks[6].y) == pytest.approx(
        (found.marks[5].x, found.marks[5].y)
    )
    assert (found.marks[-1].x, found.marks[-1].y) == (0, 0)


def test_a_checkpoint_may_be_called_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Path("mean"), {**Net().state_dict()}, "sharded safetensors")
    found = laid(Path(), sources=[path.name for path in save_run(tmp_path)], marks=["mean"])
    assert [(mark.name, mark.kind) for mark in found.marks[-2:]] == [
        ("mean", "mark"), ("mean", "mean"),
    ]  # fmt: skip
    assert f"lies {found.marks[-1].off_plane:.3g} off" in found.summary[0]


def test_surfaces_are_interpolated_between_grid_points(tmp_path: Path) -> None:
    def height(model: nn.Module) -> dict[str, float]:  # linear in the weights
        return {"loss": sum(one.sum().item() for one in model.parameters())}

    paths = save_run(tmp_path, lambda: Plain().double())
    evaluation = judged(lambda: Plain().double(), None, height)
    found = laid(tmp_path, evaluation, sources=paths, points=4)
    for mark in found.marks:
        assert mark.surface is not None
        if mark.metrics is not None:
            assert mark.surface == pytest.approx(mark.metrics)


def test_iterates_lie_on_the_rim_of_a_bowl_and_their_mean_in_its_middle(tmp_path: Path) -> None:
    curvature = torch.logspace(-1, 1, 60, dtype=torch.float64)
    paths = []
    for step in range(12):  # where the loss of each is 1
        point = drawn(step, 60).double() / curvature.sqrt()
        point /= (curvature * point.square()).sum().sqrt()
        paths.append(tmp_path / f"step{step}.safetensors")
        save_file({"w": point}, paths[-1])

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(60, dtype=torch.float64))

    def bowl(model: nn.Module) -> dict[str, float]:
        return {"loss": (curvature * model.get_parameter("w").square()).sum().item()}

    found = laid(tmp_path, judged(Bowl, None, bowl), sources=paths, points=15)
    *iterates, mean = found.marks
    assert mean.metrics is not None
    corners = [mark for mark in iterates if mark.kind == "corner"]
    assert all(mark.metrics == pytest.approx({"loss": 1}) for mark in corners)
    assert len(corners) == 3
    best = min(min(row) for row in found.grids["loss"])
    assert mean.metrics["loss"] < 0.5
    assert best <= mean.metrics["loss"] < best + 0.2
    assert mean.off_plane < 0.6 * min(mark.off_plane for mark in iterates if mark not in corners)
    assert found.summary[1].startswith(f"loss: {mean.metrics['loss']:.4g} where the mean is seen")
    assert f"the best of the grid is {best:.4g}" in found.summary[1]


# ---- models of any kind --------------------------------------------------------------------------


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 6)
        self.second.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.bn(self.body(x) * self.second(x))))
        return out


class Counting(Net):
    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros(2, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.step.sum()


class Scaled(Net):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Halved(Net):
    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16())


@pytest.mark.parametrize("model", [Tied, Counting, Scaled, Halved])
def test_models_may_have(tmp_path: Path, model: Callable[[], nn.Module]) -> None:
    paths = save_run(tmp_path, model)
    found = laid(tmp_path, judged(model), sources=paths, through=("first", "mean", "last"))
    states = states_of(paths)
    assert found.marks[0].metrics == directly(states[0], model)
    average = average_checkpoints(paths, tmp_path / "average", batchnorm=judged(model))
    assert found.marks[-1].metrics == average.outputs[0].metrics
    one, two, three = (vector(state) for state in (states[0], states[0], states[-1]))
    if model is not Tied:  # in files of which both names count
        two = np.mean([vector(state) for state in states], axis=0)
        along, across = directions(one, two, three)
        tolerance = 0.05 if model is Halved else 1e-5
        expected = directly(
            with_vector(states[0], one + found.x[1] * along + found.y[2] * across), model
        )
        assert found.grids["test_loss"][2][1] == pytest.approx(expected["test_loss"], rel=tolerance)


def test_integers_and_all_copies_of_the_model_are_those_of_the_last_corner(tmp_path: Path) -> None:
    seen: list[int] = []

    def keep(model: nn.Module) -> float:
        seen.append(int(model.get_buffer("step")[0]))
        return 0.0

    paths = save_run(tmp_path, Counting)
    for step, path in enumerate(paths, 1):
        state = load_file(path)
        state["step"].fill_(step)
        save_file(state, path)
    laid(tmp_path, judged(Counting, evaluate=keep), sources=paths)
    assert set(seen) == {5}


def test_models_without_batchnorm_need_no_data(tmp_path: Path) -> None:
    paths = save_run(tmp_path, Plain)
    found = laid(tmp_path, judged(Plain, None), sources=paths)
    assert found.marks[2].metrics == directly(states_of(paths)[2], Plain)
    again = laid(tmp_path, judged(Plain), sources=paths, overwrite=True)
    assert again.grids == found.grids


def test_batchnorm_layers_need_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        laid(tmp_path, judged(batches=None))
    assert str(caught.value) == (
        "the model has 1 BatchNorm layers, whose statistics belong to no other point: give "
        "training data, batches (--data)"
    )
    assert files_beside(tmp_path) == []


def test_checkpoints_may_have_other_dtypes(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in load_file(paths[2]).items()
    }
    save_file(half, paths[2])
    found = laid(tmp_path, sources=paths)
    assert found.marks[2].metrics == directly(states_of(paths)[2])
    assert any("step3" in one and "are widened to float32" in one for one in found.notes)


def test_a_run_directory_is_looked_through_and_selected_from(tmp_path: Path) -> None:
    runs = tmp_path / "run"
    for step in range(1, 6):
        (runs / f"checkpoint-{step}").mkdir(parents=True)
    for path in save_run(tmp_path):
        path.rename(runs / f"checkpoint-{path.stem[4:]}" / "model.safetensors")
    found = laid(tmp_path, sources=str(runs), selection=Selection(last=3))
    assert [Path(mark.name).name for mark in found.marks] == [
        "checkpoint-3", "checkpoint-4", "checkpoint-5", "mean",
    ]  # fmt: skip


def test_a_models_modes_and_parameters_stay_as_they_are_but_for_the_weights(tmp_path: Path) -> None:
    model = Net()
    model.head.eval()
    model.body.bias.requires_grad_(False)
    parameters = list(map(id, model.parameters()))
    laid(tmp_path, judged(model))
    assert [model.training, model.bn.training, model.head.training] == [True, True, False]
    assert list(map(id, model.parameters())) == parameters
    wanted = {"body.bias"}
    assert {name for name, one in model.named_parameters() if not one.requires_grad} == wanted


def test_layers_that_are_frozen_stay_frozen(tmp_path: Path) -> None:
    model = Net()
    model.bn.eval()
    paths = save_run(tmp_path)
    state = load_file(paths[-1])
    found = laid(tmp_path, judged(model, None), sources=paths)
    plain = Net()
    plain.load_state_dict(state)
    assert found.marks[4].metrics == on_loaders()(plain.eval())


# ---- side by side --------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", [None, loss_of])
def test_points_side_by_side_give_the_same_numbers_with_fewer_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate: Any
) -> None:
    paths, results, loads = save_run(tmp_path), [], []
    for most in (1, 4, 16):
        monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", most)
        data, test = Counted(TRAIN), Counted(TEST)
        evaluation = judged(Net, data, evaluate or on_loaders(test=test))
        found = laid(tmp_path, evaluation, sources=paths, overwrite=True)
        results.append((found.grids, found.marks))
        loads.append((data.count, test.count))
    assert results[0] == results[1] == results[2]
    expected = [(13, 13), (4, 4), (2, 2)]  # 4 of the marks first, then 9 of the grid
    assert loads == [(one, 0 if evaluate else other) for one, other in expected]


def test_memory_limits_how_many_stand_side_by_side() -> None:
    nbytes = sum(value.nbytes for value in Net().state_dict().values())
    evaluation = judged()
    model = LiveModel(evaluation, checkpoint_of(Net()), "cpu", Processes())
    for budget, expected in ((nbytes - 1, 1), (nbytes, 1), (3 * nbytes, 3), (99 * nbytes, 16)):
        judge = points_module.PointJudge(model, evaluation, budget)
        assert judge.n_side_by_side == expected


def checkpoint_of(model: nn.Module) -> Any:
    tensors = {
        name: SimpleNamespace(shape=tuple(value.shape))
        for name, value in model.state_dict().items()
    }
    return SimpleNamespace(tensors=tensors, label="x")


@pytest.mark.parametrize("kind", ["loader", "also", "function", "data"])
def test_what_is_drawn_at_random_is_the_same_at_every_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def noisy(batches: Any) -> Callable[[], Any]:
        def make() -> Any:
            yield from (
                (one[0] + torch.randn(()), one[1]) if isinstance(one, tuple) else one
                + np.random.normal() for one in batches
            )  # fmt: skip

        return make

    def random_loss(model: nn.Module) -> dict[str, float]:
        return {"loss": loss_of(model)["loss"] + torch.rand(()).item()}

    evaluations = {
        "loader": judged(evaluate=on_loaders(test=noisy(TEST))),
        "also": judged(
            evaluate=LabelledEvaluation(
                loaders=[Loader(name="test", batches=TEST)], also=random_loss
            )
        ),
        "function": judged(evaluate=random_loss),
        "data": judged(batches=noisy(TRAIN)),
    }
    paths, results = save_run(tmp_path), []
    for most, seed in ((1, 5), (16, 6)):
        monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", most)
        torch.manual_seed(seed)
        np.random.seed(seed)
        results.append(laid(tmp_path, evaluations[kind], sources=paths, overwrite=True))
    assert results[0].grids == results[1].grids
    assert results[0].marks == results[1].marks
    assert results[0].grids != laid(tmp_path, sources=paths, overwrite=True).grids


def test_a_seed_changes_what_is_drawn(tmp_path: Path) -> None:
    def noisy() -> Any:
        return (one + torch.randn(()) for one in TRAIN)

    paths = save_run(tmp_path)
    first, second = (
        laid(tmp_path, judged(batches=noisy, seed=seed), sources=paths, overwrite=True)
        for seed in (1, 2)
    )
    assert first.grids != second.grids


def test_a_model_that_cannot_be_copied_is_tried_at_one_point_after_the_other(
    tmp_path: Path,
) -> None:
    class Single(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("there is only one")

    data = Counted(TRAIN)
    paths = save_run(tmp_path)
    found = laid(tmp_path, judged(Single, data), sources=paths)
    assert data.count == found.n_points == 13
    assert found.grids == laid(tmp_path, sources=paths, overwrite=True).grids


def test_dropout_in_training_mode_is_the_same_at_every_point(tmp_path: Path) -> None:
    class Dropping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    paths = save_run(tmp_path, Dropping)
    found = laid(tmp_path, judged(Dropping, train_mode="model"), sources=paths)
    again = laid(tmp_path, judged(Dropping, train_mode="model"), sources=paths, overwrite=True)
    assert found.grids == again.grids


def test_progress_counts_checkpoints_and_points(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    laid(tmp_path, progress=lambda *call: calls.append(call))
    totals = {stage: (sum(done for one, done, _ in calls if one == stage), total)
              for stage, _, total in calls}  # fmt: skip
    assert totals["load"] == (3, 3)
    assert totals["plane"] == (13, 13)
    assert totals["compare"][0] == totals["compare"][1]


# ---- interrupted and continued -------------------------------------------------------------------


def interrupted(folder: Path, paths: list[Path], **options: Any) -> None:
    evaluation = options.pop("evaluation", judged(Net, train, look))
    with pytest.raises(KeyboardInterrupt) as caught:
        laid(folder, evaluation, sources=paths, **options)
    kept = [name for name in files_beside(folder) if not name.endswith(".lock")]
    assert len(kept) == 1
    assert re.fullmatch(r"out\.plane-[0-9a-f]{16}", kept[0])
    assert getattr(caught.value, "__notes__", []) == [
        f"what was evaluated is kept in {kept[0]}; the same command goes on from it"
    ]


@pytest.mark.parametrize("at", [2, 4, 8, 13])
def test_an_interrupted_plane_is_continued_without_evaluating_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[..., None], at: int
) -> None:
    monkeypatch.setattr(points_module, "_MOST_SIDE_BY_SIDE", 1)
    paths = save_run(tmp_path)
    whole = laid(tmp_path, judged(Net, train, look), sources=paths)
    Evaluations.count = 0
    (tmp_path / "out").rename(tmp_path / "step-whole")
    stop(at)
    interrupted(tmp_path, paths)
    found = laid(tmp_path, judged(Net, train, look), sources=paths)
    assert Evaluations.count == found.n_points + 1  # the one that was interrupted
    assert (found.n_resumed, whole.n_resumed) == (at - 1, 0)
    assert (found.grids, found.marks) == (whole.grids, whole.marks)
    assert tree(tmp_path / "out") == tree(tmp_path / "step-whole")
    assert files_beside(tmp_path) == ["out"]


def test_points_side_by_side_are_kept_together(tmp_path: Path, stop: Callable[..., None]) -> None:
    paths = save_run(tmp_path)
    stop(10)
    interrupted(tmp_path, paths)
    found = laid(tmp_path, judged(Net, train, look), sources=paths)
    assert found.n_resumed == 4
    assert Evaluations.count == 10 + 9


@pytest.mark.parametrize(
    "changed",
    [
        {"points": 4},
        {"margin": 0.3},
        {"through": ("first", "mean", "last")},
        {"through": "pca"},
        {"marks": True},
        {"selection": Selection(last=4)},
        {"evaluation": judged(Net, train, look, seed=3)},
        {"evaluation": judged(Net, train, look, max_batches=1)},
        {"evaluation": judged(Net, train, loss_of)},
        {"evaluation": judged(Net, train, LabelledEvaluation(
            loaders=[Loader(name="t", batches=train)], also=look))},
    ],
)  # fmt: skip
def test_what_another_call_left_is_not_taken_over(
    tmp_path: Path, stop: Callable[..., None], changed: dict[str, Any]
) -> None:
    paths = save_run(tmp_path)
    stop(10)
    interrupted(tmp_path, paths)
    before = files_beside(tmp_path)
    if "marks" in changed:
        changed = {"marks": [paths[0]]}
    evaluation = changed.get("evaluation", judged(Net, train, look))
    rest = {name: value for name, value in changed.items() if name != "evaluation"}
    if isinstance(evaluation.evaluate, LabelledEvaluation):
        with pytest.raises(ModelError, match="labelled batch"):
            laid(tmp_path, evaluation, sources=paths, **rest)
        assert not set(before) & set(files_beside(tmp_path))
        return
    found = laid(tmp_path, evaluation, sources=paths, **rest)
    assert found.n_resumed == 0
    assert any("an interrupted search had other inputs or options" in one for one in found.notes)
    assert files_beside(tmp_path) == ["out"]


def test_checkpoints_that_changed_are_evaluated_anew(
    tmp_path: Path, stop: Callable[..., None]
) -> None:
    paths = save_run(tmp_path)
    stop(10)
    interrupted(tmp_path, paths)
    state = load_file(paths[1])
    state["head.bias"] += 1
    save_file(state, paths[1])
    assert laid(tmp_path, judged(Net, train, look), sources=paths).n_resumed == 0


def test_what_names_do_not_tell_apart_is_not_continued(
    tmp_path: Path, stop: Callable[..., None]
) -> None:
    paths = save_run(tmp_path)
    stop(10)
    with pytest.raises(KeyboardInterrupt):
        laid(tmp_path, judged(Net, train, lambda model: look(model)), sources=paths)
    assert files_beside(tmp_path) == []


def test_an_error_before_the_first_value_leaves_nothing(
    tmp_path: Path, stop: Callable[..., None]
) -> None:
    stop(1, ValueError("no"))
    with pytest.raises(ModelError, match=r"^the evaluation failed: ValueError: no$"):
        laid(tmp_path, judged(Net, train, look))
    assert files_beside(tmp_path) == []


# ---- what stands in the directory ----------------------------------------------------------------


def test_json_and_csv_hold_every_number_that_is_drawn(tmp_path: Path) -> None:
    evaluation = judged(evaluate=on_loaders(train=labelled_train(), test=TEST))
    found = laid(tmp_path, evaluation, command="ckptavg plane hf_" + 30 * "a", margin=0.1)
    assert found.files == ("plane.json", "plane.csv")
    assert sorted(tree(tmp_path / "out")) == ["plane.csv", "plane.json"]
    told = json.loads((tmp_path / "out" / "plane.json").read_text())
    assert (told["format_version"], told["kind"]) == (1, "plane")
    assert told["command"] == "ckptavg plane hf_***"
    assert told["title"] == f"plane through {', '.join(found.through)}"
    assert told["axes"] == [
        "distance towards the third corner", "distance at a right angle to it",
    ]  # fmt: skip
    assert (told["x"], told["y"]) == (list(found.x), list(found.y))
    assert told["summary"] == list(found.summary)
    assert told["grids"] == {
        name: [list(row) for row in grid] for name, grid in found.grids.items()
    }
    assert [mark["x"] for mark in told["marks"]] == [mark.x for mark in found.marks]
    assert told["marks"][0]["metrics"] == found.marks[0].metrics
    assert told["marks"][1]["surface"] == found.marks[1].surface
    with (tmp_path / "out" / "plane.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["x", "y", "train_loss", "train_error", "test_loss", "test_error"]
    assert [list(map(float, row)) for row in rows] == [
        [x, y, *(grid[at_y][at_x] for grid in found.grids.values())]
        for at_y, y in enumerate(found.y)
        for at_x, x in enumerate(found.x)
    ]
    assert told["similarity"]["train_loss and test_error"] == dict(
        zip(("correlation", "distance_of_best"), found.similarity["train_loss and test_error"],
            strict=True)
    )  # fmt: skip
    assert any("the surfaces of train_loss and test_error correlate" in one
               for one in found.summary)  # fmt: skip


def labelled_train() -> list[tuple[Tensor, Tensor]]:
    return [(one, one[:, :3].argmax(1)) for one in TRAIN]


def test_the_grid_goes_around_everything_that_is_shown(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    tight = laid(tmp_path, sources=paths, margin=0)
    for along, ends in (("x", tight.x), ("y", tight.y)):
        seen = [getattr(mark, along) for mark in tight.marks]
        assert (min(seen), max(seen)) == (ends[0], ends[-1])
    assert all(mark.surface is not None for mark in tight.marks)
    wide = laid(tmp_path, sources=paths, margin=0.5, overwrite=True)
    for narrow, broad in ((tight.x, wide.x), (tight.y, wide.y)):
        assert broad[-1] - broad[0] >= 2 * (narrow[-1] - narrow[0]) - 1e-9
        np.testing.assert_allclose(np.diff(broad), (broad[-1] - broad[0]) / 2)


def test_pictures_are_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    evaluation = judged(evaluate=on_loaders(test=TEST, validation=VALIDATION))
    found = laid(tmp_path, evaluation, sources=paths, marks=[paths[1]], plot=True)
    assert found.files == ("plane.json", "plane.csv", "plane.png", "plane.svg")
    first = tree(tmp_path / "out")
    assert first["plane.png"].startswith(b"\x89PNG")
    laid(tmp_path, evaluation, sources=paths, marks=[paths[1]], plot=True, overwrite=True)
    assert tree(tmp_path / "out") == first


def test_names_with_dollars_are_drawn_as_they_are(tmp_path: Path) -> None:
    odd = save_checkpoint(tmp_path / "a$_{b$^", Net().state_dict(), "safetensors")
    laid(tmp_path, judged(evaluate=lambda model: {"x$^_loss$": 1.0}), marks=[odd], plot=True)
    assert (tmp_path / "out" / "plane.svg").exists()


def test_a_plot_without_matplotlib_is_refused_before_anything_is_read(
    tmp_path: Path, without_matplotlib: None
) -> None:
    with pytest.raises(UsageError, match=r"pip install 'ckptavg\[plots\]' \(or --no-plot\)"):
        laid(tmp_path, sources=["nothing"], plot=True)
    assert laid(tmp_path, plot=False).files == ("plane.json", "plane.csv")


def test_an_output_that_is_there_is_replaced_only_when_asked_and_only_if_it_is_ours(
    tmp_path: Path,
) -> None:
    paths = save_run(tmp_path)
    laid(tmp_path, sources=paths)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="already exists; pass --overwrite"):
        laid(tmp_path, sources=paths)
    for name in ("planet.json", "plane-mine.csv", "width.json", "notes.txt"):
        (tmp_path / "out" / name).write_text("mine")
        with pytest.raises(OutputError, match=f"also holds '{name}'"):
            laid(tmp_path, sources=paths, overwrite=True)
        (tmp_path / "out" / name).unlink()
    assert tree(tmp_path) == before
    laid(tmp_path, sources=paths, points=2, overwrite=True)
    assert tree(tmp_path) != before
    assert files_beside(tmp_path) == ["out"]


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "through", "message"),
    [
        (1, ("first", "middle", "last"), "the first and the third are the same"),
        (2, ("first", "middle", "last"), "three points that are not on one line"),
        (2, ("first", "mean", "last"), "three points that are not on one line"),
        (5, ("first", "last", "first"), "the first and the third are the same"),
        (5, ("first", "first", "last"), "three points that are not on one line"),
        (2, "pca", "principal components of 2 checkpoints are no plane"),
        (5, ("first", "last"), "through names 2, expected three of first, middle, last, mean and"),
        (5, "middle", "through names 1, expected three of"),
    ],
)
def test_there_is_no_plane(tmp_path: Path, count: int, through: Any, message: str) -> None:
    for model in (Net, Plain):
        paths = save_run(tmp_path, model, count)
        with pytest.raises(UsageError) as caught:
            laid(tmp_path, judged(model), sources=paths, through=through)
        assert message in str(caught.value)
    assert files_beside(tmp_path) == []


def test_points_that_are_the_same_are_no_plane_however_they_are_rounded(tmp_path: Path) -> None:
    paths = save_run(tmp_path, Plain)
    mean = np.mean([vector(state) for state in states_of(paths)], axis=0)
    middle = save_checkpoint(
        tmp_path / "average", with_vector(states_of(paths)[0], mean), "safetensors"
    )
    for through in (("mean", "first", middle), (middle, "last", "mean")):
        with pytest.raises(UsageError, match="the first and the third are the same"):
            laid(tmp_path, judged(Plain), sources=paths, through=through)


def test_points_on_one_line_are_no_plane_however_they_are_rounded(tmp_path: Path) -> None:
    for seed in range(8):
        paths = []
        for step in range(2):
            state = {name: drawn(20 * seed + step, *value.shape)
                     for name, value in Plain().state_dict().items()}  # fmt: skip
            paths.append(save_checkpoint(tmp_path / f"step{step}", state, "safetensors"))
        with pytest.raises(UsageError, match="not on one line"):
            laid(tmp_path, judged(Plain), sources=paths, through=("first", "mean", "last"))


def test_checkpoints_on_one_line_have_one_principal_component(tmp_path: Path) -> None:
    state = Net().state_dict()
    paths = []
    for step in range(3):
        moved = {name: value + step if value.is_floating_point() else value
                 for name, value in state.items()}  # fmt: skip
        paths.append(save_checkpoint(tmp_path / f"step{step}", moved, "safetensors"))
    with pytest.raises(UsageError, match="the checkpoints spread in 1 directions only"):
        laid(tmp_path, sources=paths, through="pca")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 1}, "points is 1, expected at least 2 along each side"),
        ({"margin": -0.1}, "margin is -0.1, expected a share such as 0.2"),
        ({"margin": math.nan}, "margin is nan, expected a share such as 0.2"),
        ({"device": "tpu"}, "device: 'tpu' is not one of"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        laid(tmp_path, **options)
    assert message in str(caught.value)
    assert files_beside(tmp_path) == []


def test_an_option_that_there_is_not_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"plane\(\) got an unexpected keyword argument 'point'"):
        laid(tmp_path, point=3)


def test_a_plane_needs_sources(tmp_path: Path) -> None:
    corners = save_run(tmp_path)[:3]
    with pytest.raises(UsageError, match="name at least one"):
        plane([], tmp_path / "out", evaluation=judged(), through=corners)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (lambda: BnPass(model=Net, batches=TRAIN), "a plane needs a metric: evaluate (--loader or"),
        (lambda: judged(evaluate=EvalCommand("x {model}")), "a plane has no model directories"),
        (lambda: judged(evaluate=loss_of, compare=True), "leave compare out"),
        (lambda: judged(batches=iter(TRAIN)), "the data is a list_iterator, which can be gone"),
        (lambda: judged(evaluate=on_loaders(test=iter(TEST))), "loader 'test': is a list_iterator"),
    ],
)
def test_what_cannot_judge_points_is_refused(
    tmp_path: Path, evaluation: Callable[[], BnPass], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        laid(tmp_path, evaluation())
    assert message in str(caught.value)
    assert files_beside(tmp_path) == []


def test_a_checkpoint_that_does_not_fit_the_model_is_refused_before_any_is_evaluated(
    tmp_path: Path,
) -> None:
    other = save_checkpoint(tmp_path / "other", Plain().state_dict(), "safetensors")
    with pytest.raises(ModelError, match=r"other\.safetensors: does not fit the model"):
        laid(tmp_path, marks=[other])
    with pytest.raises(CheckpointError, match="nothing-here: cannot be opened"):
        laid(tmp_path, through=("first", "nothing-here", "last"))
    assert "out" not in files_beside(tmp_path)


def test_a_corner_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    paths = save_run(tmp_path)
    state = load_file(paths[2])
    state["head.bias"][0] = float("inf")
    save_file(state, paths[2])
    with pytest.raises(Exception, match=r"step3.*'?head.bias'? .*infinity or NaN"):
        laid(tmp_path, sources=paths)


@pytest.mark.parametrize("values", ["far", "all", "infinite"])
def test_points_without_a_number_do_not_spoil_the_rest(tmp_path: Path, values: str) -> None:
    def torn(model: nn.Module) -> dict[str, float]:
        norm = sum(one.square().sum().item() for one in model.parameters())
        loss = loss_of(model)["loss"]
        bad = math.inf if values == "infinite" else math.nan
        return {"loss": bad if values == "all" or norm > 18 else loss, "flat": 0.1}

    found = laid(tmp_path, judged(evaluate=torn), points=6, margin=2, plot=True)
    values_of = np.array(found.grids["loss"])
    assert 0 < (~np.isfinite(values_of)).sum() <= 36
    if values != "all":
        assert f"the best of the grid is {np.nanmin(values_of):.4g}" in found.summary[1]
    told = json.loads((tmp_path / "out" / "plane.json").read_text())
    assert any(None in row for row in told["grids"]["loss"])


def test_a_surface_that_hardly_changes_is_drawn(tmp_path: Path) -> None:
    def flat(model: nn.Module) -> dict[str, float]:
        return {"loss": next(values), "error": 0.1}

    values = itertools.cycle([2.3, math.nextafter(2.3, 3)])
    found = laid(tmp_path, judged(evaluate=flat), points=5, plot=True)
    assert len(set(itertools.chain(*found.grids["loss"]))) == 2
    assert found.similarity == {}


def test_metrics_whose_names_tell_no_direction_have_a_lowest_and_no_best(tmp_path: Path) -> None:
    found = laid(tmp_path, judged(evaluate=lambda model: loss_of(model)["loss"]))
    lowest = min(map(min, found.grids["metric"]))
    assert f"the lowest of the grid is {lowest:.4g}" in found.summary[1]


def test_metrics_of_which_more_is_better_are_best_where_they_are_large(tmp_path: Path) -> None:
    found = laid(tmp_path, judged(evaluate=lambda model: {"accuracy": -loss_of(model)["loss"]}))
    best = max(map(max, found.grids["accuracy"]))
    assert f"the best of the grid is {best:.4g}" in found.summary[1]


def test_a_metrics_name_may_hold_any_word(tmp_path: Path) -> None:
    found = laid(
        tmp_path,
        judged(evaluate=lambda model: {"a and b_loss": loss_of(model)["loss"], "c_error": 1.0}),
    )
    assert len(found.summary) == 3


def test_other_metrics_at_another_point_are_refused(tmp_path: Path) -> None:
    names = iter(["loss"] * 5 + ["accuracy"] * 20)
    evaluation = judged(evaluate=lambda model: {next(names): 1.0})
    with pytest.raises(ModelError) as caught:
        laid(tmp_path, evaluation)
    assert str(caught.value) == (
        "the evaluation returned accuracy at one point, and loss at another: expected the same "
        "metrics everywhere"
    )


def test_unrelated_checkpoints_are_told(tmp_path: Path) -> None:
    class Large(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 400)
            self.head = nn.Linear(400, 3)

    paths = []
    for step in range(3):
        torch.manual_seed(step)
        paths.append(save_checkpoint(tmp_path / f"step{step}", Large().state_dict(), "safetensors"))
    found = laid(tmp_path, judged(Large), sources=paths)
    assert any("cosine" in note or "not of one run" in note for note in found.notes)


# ---- the command line ----------------------------------------------------------------------------

MODULE = """
from landscape_fixtures import Net, Plain, TEST, TRAIN, loss_of
import torch

def build():
    print("building")
    return Net()

def train():
    return TRAIN

def test():
    return TEST
"""
ARGUMENTS = [
    "plane", "step*.safetensors", "-o", "out", "--model", "points_of:build", "--data",
    "points_of:train", "--loader", "test=points_of:test", "--points", "3", "--no-plot",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    monkeypatch.delitem(sys.modules, "points_of", raising=False)
    (tmp_path / "points_of.py").write_text(MODULE)
    save_run(tmp_path)
    return tmp_path


def test_the_command_line_shows_what_is_seen(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ARGUMENTS) == 0
    out, err = capsys.readouterr()
    told = json.loads((here / "out" / "plane.json").read_text())
    lines = out.splitlines()
    assert re.fullmatch(r"out: 3 x 3 points, 13 evaluations, \d+\.\d s on cpu", lines[0])
    assert [line.strip() for line in lines[1:4]] == told["summary"]
    header, *rows = lines[5:12]
    assert re.split(r" {2,}", header) == [
        "seen from the plane", "as", "x", "y", "off it", "test_loss", "test_error",
    ]  # fmt: skip
    for row, mark in zip(rows, told["marks"], strict=True):
        values = mark["metrics"] or mark["surface"]
        assert re.split(r" {2,}", row) == [
            mark["name"], mark["kind"],
            *(f"{mark[name]:.4g}" for name in ("x", "y", "off_plane")),
            *(f"{values[name]:.4g}" for name in ("test_loss", "test_error")),
        ]  # fmt: skip
    assert lines[12:] == ["", "files: plane.json, plane.csv"]
    assert "building" in err
    assert told["command"].startswith("ckptavg")


def test_json_is_what_python_returns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *ARGUMENTS, "--json", "--last", "4", "--through", "first,mean", "--through", "last",
        "--mark", "step1.safetensors", "--weight-decay", "0.1", "--eval", "points_of:loss_of",
    ]  # fmt: skip
    assert run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["output"], told["n_points"], told["n_resumed"]) == ("out", 13, 0)
    assert told["metrics"] == ["test_loss", "test_error", "loss"]
    assert [mark["kind"] for mark in told["marks"]] == [
        "corner", "iterate", "iterate", "corner", "mark", "corner",
    ]  # fmt: skip
    assert told["through"] == ["step2.safetensors", "mean", "step5.safetensors"]
    assert run([*arguments, "--overwrite", "--quiet"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["grids"] == told["grids"]


def test_an_interrupted_command_says_how_to_go_on_and_does(
    here: Path, capsys: pytest.CaptureFixture[str], stop: Callable[..., None]
) -> None:
    arguments = [*ARGUMENTS[:8], "--eval", "landscape_fixtures:look", *ARGUMENTS[10:]]
    stop(9)
    assert run(arguments) == 130
    err = capsys.readouterr().err
    assert "interrupted" in err
    assert run(arguments) == 0
    assert "13 evaluations, 4 of them before, " in capsys.readouterr().out
    assert "out" in files_beside(here)
    assert not [name for name in files_beside(here) if name.startswith("out.")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ARGUMENTS[:4], *ARGUMENTS[6:]], "--model is missing"),
        ([*ARGUMENTS[:8], *ARGUMENTS[10:]], "nothing judges the weights: pass --loader or --eval"),
        ([*ARGUMENTS[:6], *ARGUMENTS[8:]], "has 1 BatchNorm layers"),
        ([*ARGUMENTS, "--through", "middel"], "through names 1, expected three of first, middle"),
        ([*ARGUMENTS, "--through", "first,middle"], "through names 2, expected three of first"),
        ([*ARGUMENTS, "--through", "first,middle,first"], "the first and the third are the same"),
        ([*ARGUMENTS, "--eval-command", "ev {model}"], "--eval-command judges model directories"),
        ([*ARGUMENTS, "--points", "1"], "1 is not in the range"),
        ([*ARGUMENTS, "--loader", "test=points_of:train"], "2 loaders are called 'test'"),
        (["plane", *ARGUMENTS[2:]], "Missing argument 'SOURCES...'"),
    ],
)
def test_wrong_usage_exits_with_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ARGUMENTS, "--mark", "nothing.pt"], "nothing.pt"),
        ([*ARGUMENTS, "--loader", "t=points_of:train"], "a labelled batch is a Tensor"),
        ([*ARGUMENTS, "--loader", "t=points_of:nothing"], "cannot be imported"),
    ],
)
def test_failures_exit_with_1(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(arguments) == 1
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize("command", ["plane", "width", "path"])
def test_help_opens_with_a_sentence_and_closes_with_examples(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run([command, "--help"]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[0].startswith(f"Usage: ckptavg {command} [OPTIONS]")
    start = next(at for at, line in enumerate(lines) if line.strip().startswith("Measure "))
    first = " ".join(line.strip() for line in lines[start : start + 3])
    assert re.match(r"Measure [a-z ,]+\. ", first)
    end = lines.index("  Examples:")
    assert all(re.match(rf"    ckptavg {command} | {{6}}--", line) for line in lines[end + 1 :])
    assert len(lines) - end > 2
