"""Several models through one BatchNorm pass: each gets what it would get by itself, bit for bit."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from landscape_fixtures import Counted, drawn
from test_batchnorm import snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ckptavg import BatchNormError, BnReport, recompute_bn_stats
from ckptavg.batchnorm import recompute_side_by_side
from ckptavg.bn_options import BnOptions, Estimator

pytestmark = pytest.mark.usefixtures("one_thread")

CLOCKS = {"seconds", "wait_seconds"}


class Net(nn.Module):
    """Convolutions with a layer that is used twice, dropout, and a second layer that notices."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv1d(2, 3, 3)
        self.bn = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(3, 5)
        self.late = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.first(x))
        out: Tensor = self.late(self.second(self.dropout(self.bn(x.relu()).mean(dim=2))))
        return out


def nets(count: int = 3) -> list[nn.Module]:
    return [Net(seed) for seed in range(count)]


def batches(*sizes: int) -> list[Tensor]:
    return [drawn(number, size, 2, 7) + 0.1 * number for number, size in enumerate(sizes)]


def statistics(model: nn.Module) -> dict[str, list[Any]]:
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


def told(report: BnReport) -> dict[str, Any]:
    return {one.name: getattr(report, one.name) for one in fields(report)
            if one.name not in CLOCKS}  # fmt: skip


def assert_as_alone(
    models: Sequence[nn.Module], data: Any, **options: Any
) -> tuple[list[BnReport], list[BnReport]]:
    """Compare with passes of their own; return the reports of both."""
    alone = [copy.deepcopy(model) for model in models]
    make = data if callable(data) else lambda: data
    together = recompute_side_by_side(models, make, BnOptions(**options))
    apart = [recompute_bn_stats(model, Lazy(make), **options) for model in alone]
    for model, other in zip(models, alone, strict=True):
        assert statistics(model) == statistics(other)
    assert [told(one) for one in together] == [told(one) for one in apart]
    return together, apart


class Lazy:
    """Batches that are made when they are asked for: once the random numbers are seeded."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self._make())


@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("sizes", [(16, 9, 5), (16,)])
def test_statistics_are_those_of_each_model_alone(estimator: Any, sizes: tuple[int, ...]) -> None:
    models = nets()
    before = [statistics(model) for model in models]
    reports, _ = assert_as_alone(models, batches(*sizes), estimator=estimator)
    assert [report.n_samples for report in reports] == [sum(sizes)] * 3
    found = [statistics(model) for model in models]
    assert all(one != other for one, other in zip(before, found, strict=True))
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("sizes", [(8, 1, 7), (1, 8), (8, 1), (1, 1, 8, 8, 1)])
def test_batches_too_small_are_joined_for_all(estimator: Any, sizes: tuple[int, ...]) -> None:
    reports, _ = assert_as_alone(nets(), batches(*sizes), estimator=estimator)
    assert all("too small for a layer joined to a neighbour" in one.notes[-1] for one in reports)


@pytest.mark.parametrize("options", [{"max_batches": 2}, {"max_samples": 20}])
def test_limits_count_once(options: dict[str, int]) -> None:
    reports, _ = assert_as_alone(nets(), batches(16, 9, 5, 4), **options)
    assert [report.n_batches for report in reports] == [2, 2, 2]


class Drifting(nn.Module):
    """Sees more or less of an input that changes for some time."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.bn = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(x[:, :1] + self.share * x[:, 1:])
        return out


class Asked:
    """Batches that count how many were taken."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.count = 0
        self._values = list(values)

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self.count += 1
            yield value


def test_each_stops_where_it_would_have_stopped_alone() -> None:
    data = []
    for number in range(120):
        values = drawn(number, 64, 2)
        values[:, 1] = max(10 - number, 0)
        data.append(values)
    models: list[nn.Module] = [Drifting(share) for share in (0.2, 0.0, 0.1, 5.0)]
    reports, _ = assert_as_alone(models, data, until_converged=0.03)
    stops = [report.n_batches for report in reports]
    assert stops[1] < stops[2] < stops[0] < stops[3] == 120
    assert reports[-1].notes == ("the pass ended before the statistics changed by less than 0.03",)
    asked = Asked(data)
    recompute_side_by_side(models[:3], lambda: asked, BnOptions(until_converged=0.03))
    assert asked.count == max(stops[:3]) < 120


def test_a_small_batch_where_statistics_have_converged_is_still_joined() -> None:
    data = batches(*[8] * 9, 1, *[8] * 4)
    for until_converged in (0.99, 0.5, 0.3, 0.2):
        assert_as_alone(nets(), data, until_converged=until_converged)


@pytest.mark.parametrize("seed", [0, 7, None])
def test_what_is_drawn_at_random_is_what_each_would_have_seen_alone(seed: int | None) -> None:
    rows = TensorDataset(drawn(1, 40, 2, 7))

    def shuffled() -> Iterator[Tensor]:
        for (batch,) in DataLoader(rows, 8, shuffle=True):
            yield batch + torch.randn(())

    models, state = nets(), torch.get_rng_state()
    assert_as_alone(models, shuffled, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_give_other_statistics() -> None:
    found = []
    for seed in (1, 2, 1):
        models = nets(2)
        recompute_side_by_side(models, lambda: [torch.randn(9, 2, 7)], BnOptions(seed=seed))
        found.append([statistics(model) for model in models])
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("amp", ["bfloat16", None])
def test_other_options_hold_for_all(amp: Any) -> None:
    assert_as_alone(nets(), batches(16, 9), amp=amp, channels_last=True)


def test_data_is_loaded_once_and_progress_told_once_a_batch() -> None:
    data, calls = Counted(batches(16, 9, 5)), list[int]()
    recompute_side_by_side(nets(4), lambda: data, BnOptions(), progress=calls.append)
    assert (data.count, calls) == (1, [16, 9, 5])


@pytest.mark.parametrize("failing", ["data", "one model", "statistics", "small"])
def test_all_models_are_as_before_if_one_fails(failing: str) -> None:
    models = nets()
    models[1].eval()
    data: Any = batches(16, 9, 5)
    if failing == "data":
        data = Failing(data)
    elif failing == "one model":
        models[2].second = nn.Linear(4, 5)
    elif failing == "statistics":
        with torch.no_grad():
            models[1].get_parameter("first.weight").fill_(float("inf"))
    else:
        data = batches(1)
    before = [snapshot(model) for model in models]
    with pytest.raises((BatchNormError, RuntimeError)):
        recompute_side_by_side(models, lambda: data, BnOptions())
    after = [snapshot(model) for model in models]
    if failing != "statistics":  # what was whole before that is stored
        assert after == before
    else:
        assert after[1:] == before[1:]


class Failing:
    def __init__(self, data: Sequence[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        yield from self._data
        raise RuntimeError("no more")


def test_models_without_such_layers_are_left_alone() -> None:
    data = Counted(batches(8))
    reports = recompute_side_by_side([nn.Linear(2, 2), nn.Linear(2, 2)], lambda: data, BnOptions())
    assert [report.layers for report in reports] == [(), ()]
    assert data.count == 0


def test_what_wraps_the_models_is_taken_out() -> None:
    from torch.optim.swa_utils import AveragedModel

    models = nets(2)
    wrapped = [AveragedModel(model) for model in models]
    recompute_side_by_side(wrapped, lambda: batches(8), BnOptions())
    alone = nets(2)
    for model, other in zip(wrapped, alone, strict=True):
        recompute_bn_stats(other, batches(8))
        assert statistics(model.module) == statistics(other)
