"""The three estimators: against their formulas in float64, against torch, the SWA authors, fvcore.

Tolerances are in standard deviations: float32 buffers hold 24 bits, so 1e-6 of one is what a value
a few standard deviations from 0 can be stored to.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from test_batchnorm import N_CHANNELS, N_SAMPLES, TOLERANCE, population, samples, split
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim.swa_utils import update_bn

from ckptavg import BatchNormError, recompute_bn_stats
from ckptavg.batchnorm import BnOptions, Estimator, recompute_together
from ckptavg.batchnorm.layers import NormLayer
from ckptavg.batchnorm.moments import BatchMoments, Moments
from ckptavg.processes import Processes

ESTIMATORS: tuple[Estimator, ...] = ("population", "paper", "torch")
UNEVEN = [2, 50, 3, 30, 11]

Norm = _BatchNorm | _InstanceNorm


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: a forward of its own, with an activation behind it."""

    def forward(self, input: Tensor) -> Tensor:
        share = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        out = functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or self.running_mean is None, share, self.eps,
        )  # fmt: skip
        return functional.relu_(out)


def instance_norm(kind: type[_InstanceNorm]) -> Callable[[], Norm]:
    return lambda: kind(N_CHANNELS, track_running_stats=True)


# name: how to make the layer, dimensions of its input beyond samples and channels
KINDS: dict[str, tuple[Callable[[], Norm], int]] = {
    "BatchNorm1d on (N, C)": (lambda: nn.BatchNorm1d(N_CHANNELS), 0),
    "BatchNorm1d on (N, C, L)": (lambda: nn.BatchNorm1d(N_CHANNELS), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(N_CHANNELS), 2),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(N_CHANNELS), 3),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(N_CHANNELS), 2),
    "BatchNormAct2d": (lambda: BatchNormAct2d(N_CHANNELS), 2),
    "InstanceNorm1d": (instance_norm(nn.InstanceNorm1d), 1),
    "InstanceNorm2d": (instance_norm(nn.InstanceNorm2d), 2),
    "InstanceNorm3d": (instance_norm(nn.InstanceNorm3d), 3),
}


def shuffled(values: Tensor) -> Tensor:
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))]


def direct(
    batches: Sequence[Tensor], estimator: Estimator, *, instance: bool = False
) -> tuple[Tensor, Tensor]:
    """Return mean and variance per channel in float64 as the formulas in ``moments`` say."""
    if instance:
        means = [batch.double().flatten(2).mean(2) for batch in batches]  # (instances, channels)
        variances = [batch.double().flatten(2).var(2) for batch in batches]
        if estimator == "torch":
            means = [one.mean(0, keepdim=True) for one in means]
            variances = [one.mean(0, keepdim=True) for one in variances]
        return torch.cat(means).mean(0), torch.cat(variances).mean(0)
    if estimator == "population":
        return population(batches)
    counts = [1 if estimator == "torch" else len(batch) for batch in batches]
    weights = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    statistics = [population(batch) for batch in batches]
    return (
        weights @ torch.stack([mean for mean, _ in statistics]),
        weights @ torch.stack([variance for _, variance in statistics]),
    )


def buffers(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return copies of a layer's running mean and variance, in float64."""
    assert isinstance(layer, (_BatchNorm, _InstanceNorm))
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean.double(), layer.running_var.double()


def error(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], spread: Tensor | None = None
) -> float:
    """Return the largest error of a mean in standard deviations, or of a variance relative to it.

    A variance may be off by twice as much, as the square of a standard deviation. ``spread`` is the
    variance to measure means by, where it is another.
    """
    (mean, variance), (expected_mean, expected_variance) = found, expected
    deviation = (expected_variance if spread is None else spread).sqrt()
    of_mean = float(((mean - expected_mean).abs() / deviation).max())
    of_variance = float((variance / expected_variance - 1).abs().max())
    return max(of_mean, of_variance / 2)


def recomputed(
    layer: Norm, batches: Iterable[Tensor], estimator: Estimator
) -> tuple[Tensor, Tensor]:
    recompute_bn_stats(nn.Sequential(layer), batches, estimator=estimator)
    return buffers(layer)


# ---- against the formulas ------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [UNEVEN, [24] * 4, [N_SAMPLES]], ids=str)
@pytest.mark.parametrize("order", ["sorted by class", "shuffled"])
def test_every_estimator_gives_what_its_formula_says_for_every_kind_of_layer(
    estimator: Estimator, kind: str, sizes: list[int], order: str
) -> None:
    make_layer, dims = KINDS[kind]
    values = samples(dims) if order == "sorted by class" else shuffled(samples(dims))
    batches, layer = split(values, sizes), make_layer()
    found = recomputed(layer, batches, estimator)
    expected = direct(batches, estimator, instance=isinstance(layer, _InstanceNorm))
    # within an instance or a class the spread can be 16 times smaller than the mean
    assert error(found, expected, spread=population(batches)[1]) < TOLERANCE


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
def test_float64_models_keep_the_precision_of_float64(estimator: Estimator, kind: str) -> None:
    make_layer, dims = KINDS[kind]
    batches, layer = split(samples(dims).double(), UNEVEN), make_layer().double()
    found = recomputed(layer, batches, estimator)
    expected = direct(batches, estimator, instance=isinstance(layer, _InstanceNorm))
    assert error(found, expected) < 1e-12


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["BatchNorm1d on (N, C, L)", "InstanceNorm1d"])
def test_batches_of_other_lengths_count_by_elements_by_samples_or_alike(
    estimator: Estimator, kind: str
) -> None:
    values = samples(3).flatten(2)  # (samples, channels, 24)
    batches = [values[:10], values[10:60, :, :3], values[60:, :, :11]]
    layer = KINDS[kind][0]()
    found = recomputed(layer, batches, estimator)
    expected = direct(batches, estimator, instance=isinstance(layer, _InstanceNorm))
    assert error(found, expected) < TOLERANCE


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_layer_behind_others_counts_its_own_input(estimator: Estimator) -> None:
    torch.manual_seed(0)
    first, conv, late = BatchNormAct2d(N_CHANNELS), nn.Conv2d(N_CHANNELS, 3, 1), nn.BatchNorm2d(3)
    batches = split(samples(2), UNEVEN)
    recompute_bn_stats(nn.Sequential(first, conv, late), batches, estimator=estimator)
    fresh = BatchNormAct2d(N_CHANNELS).train()
    with torch.no_grad():
        inputs = [conv(fresh(batch)) for batch in batches]
    assert error(buffers(late), direct(inputs, estimator)) < TOLERANCE


def test_the_report_names_the_estimator() -> None:
    for estimator in ESTIMATORS:
        layer = nn.BatchNorm1d(N_CHANNELS)
        report = recompute_bn_stats(
            nn.Sequential(layer), split(samples(), UNEVEN), estimator=estimator
        )
        assert report.estimator == estimator
        assert report.layers[0].n_elements == N_SAMPLES


# ---- Moments -------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What one layer saw in one batch."""

    weight: float
    n_elements: int
    mean: Tensor
    variance: Tensor


LAYERS: dict[str, NormLayer] = {
    "a": NormLayer("a", nn.BatchNorm1d(3)),
    "b": NormLayer("b", nn.InstanceNorm1d(2, track_running_stats=True)),
    "c": NormLayer("c", nn.BatchNorm1d(1)),
}
# which layers each batch reaches, in which order
REACHED = ["abc", "abc", "ca", "b", "abc", "cba", "a", "bc"]


def seen_in(index: int, estimator: Estimator, distance: float) -> dict[str, Seen]:
    """Return made-up statistics of one batch; means differ by so many standard deviations."""
    generator = torch.Generator().manual_seed(index)
    n_samples = [64, 2, 31, 7, 2, 100, 5, 3][index]
    seen = {}
    for name in REACHED[index]:
        layer = LAYERS[name]
        mean = torch.randn(layer.n_features, generator=generator, dtype=torch.float64)
        variance = 0.5 + torch.rand(layer.n_features, generator=generator, dtype=torch.float64)
        n_elements = 6 * n_samples
        weight = {"population": n_elements, "paper": n_samples, "torch": 1}[estimator]
        if layer.is_instance and estimator == "population":
            weight = n_samples
        seen[name] = Seen(weight, n_elements, mean * distance, variance)
    return seen


def vectors(seen: dict[str, Seen]) -> BatchMoments:
    return BatchMoments(
        weights={name: one.weight for name, one in seen.items()},
        n_elements={name: one.n_elements for name, one in seen.items()},
        mean=torch.cat([one.mean for one in seen.values()]),
        variance=torch.cat([one.variance for one in seen.values()]),
    )


def exactly(seen: Sequence[Seen], *, pools: bool) -> tuple[Tensor, Tensor]:
    """Merge one layer's statistics in rational numbers, without any rounding on the way."""
    means, variances = [], []
    for channel in range(seen[0].mean.numel()):
        rows = [
            (Fraction(one.weight), *(Fraction(float(of[channel])) for of in (one[2], one[3])))
            for one in seen
        ]
        total = sum((weight for weight, _, _ in rows), Fraction(0))
        mean = sum((weight * mean for weight, mean, _ in rows), Fraction(0)) / total
        if pools:
            second = sum(
                ((weight - 1) * v + weight * (m - mean) ** 2 for weight, m, v in rows), Fraction(0)
            )
            variance = second / (total - 1)
        else:
            variance = sum((weight * v for weight, _, v in rows), Fraction(0)) / total
        means.append(float(mean))
        variances.append(float(variance))
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def assert_exact(moments: Moments, estimator: Estimator, distance: float) -> None:
    batches = [seen_in(index, estimator, distance) for index in range(len(REACHED))]
    for name, layer in LAYERS.items():
        seen = [batch[name] for batch in batches if name in batch]
        pools = estimator == "population" and not layer.is_instance
        mean, variance = exactly(seen, pools=pools)
        found_mean, found_variance = (one[moments.place(name)] for one in moments.finished())
        largest = max(float(one.mean.abs().max()) for one in seen)
        torch.testing.assert_close(found_mean, mean, rtol=0, atol=1e-12 * largest)
        torch.testing.assert_close(found_variance, variance, rtol=1e-12, atol=0)
        assert moments.n_elements[name] == sum(one.n_elements for one in seen)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("distance", [1.0, 1e4])
def test_moments_merge_statistics_of_batches_to_the_precision_of_float64(
    estimator: Estimator, distance: float
) -> None:
    moments = Moments(LAYERS, estimator)
    for index in range(len(REACHED)):
        moments.merge(vectors(seen_in(index, estimator, distance)))
    assert_exact(moments, estimator, distance)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("distance", [1.0, 1e4])
@pytest.mark.parametrize("n_shares", [1, 2, 4])
def test_moments_of_several_processes_merge_through_words(
    estimator: Estimator, distance: float, n_shares: int
) -> None:
    shares = [Moments(LAYERS, estimator) for _ in range(n_shares)]
    for index in range(len(REACHED)):
        shares[index % n_shares].merge(vectors(seen_in(index, estimator, distance)))
    words = [json.loads(json.dumps(share.to_words())) for share in shares]
    fresh = Moments(LAYERS, estimator)
    for one in words:
        fresh.add_words(one)
    assert_exact(fresh, estimator, distance)
    for one in words[1:]:
        shares[0].add_words(one)
    assert_exact(shares[0], estimator, distance)


def test_words_of_a_process_without_batches_change_nothing() -> None:
    moments = Moments(LAYERS, "population")
    moments.merge(vectors(seen_in(0, "population", 1.0)))
    before = moments.to_words()
    moments.add_words(Moments(LAYERS, "population").to_words())
    assert moments.to_words() == before


class StopError(Exception):
    """Raised to end a pass at the point where processes would meet."""


class Pretended(Processes):
    """One of several processes that run one after the other and leave their words behind."""

    def __init__(self, rank: int, words: list[Any]) -> None:
        self.rank, self.size, self._words = rank, len(words), words

    def together(self, work: Callable[[], Any]) -> list[Any]:
        self._words[self.rank] = json.loads(json.dumps(work()))
        if None in self._words:
            raise StopError
        return self._words


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_process_gets_the_same_bits(estimator: Estimator) -> None:
    batches = split(samples().double(), 8)
    words: list[Any] = [None] * 3
    layers = [nn.BatchNorm1d(N_CHANNELS).double() for _ in words]
    options = BnOptions(estimator=estimator, seed=0)  # else they agree on one first

    def run(rank: int) -> None:
        recompute_together(
            nn.Sequential(layers[rank]), lambda: batches, options, processes=Pretended(rank, words)
        )

    for rank in (0, 1):
        with pytest.raises(StopError):
            run(rank)
    for rank in (2, 0, 1):
        run(rank)
    expected = direct(batches, estimator)
    assert all(error(buffers(layer), expected) < 1e-12 for layer in layers)
    found = [[one.tolist() for one in buffers(layer)] for layer in layers]
    assert found[1] == found[0]
    assert found[2] == found[0]


# ---- peers ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions with three BatchNorm layers, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(N_CHANNELS), nn.Conv2d(N_CHANNELS, 4, 3, padding=1),
            BatchNormAct2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
            nn.BatchNorm1d(3, momentum=0.3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def make_net() -> Net:
    torch.manual_seed(5)
    return Net()


def layers_of(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def bn_update(loader: Iterable[Tensor], model: nn.Module) -> None:
    """Do what the SWA authors' ``bn_update`` does (github.com/timgaripov/swa, utils.py)."""
    model.train()
    for layer in layers_of(model):
        layer.reset_running_stats()
    n = 0
    with torch.no_grad():
        for batch in loader:
            b = batch.size(0)
            for layer in layers_of(model):
                layer.momentum = b / float(n + b)
            model(batch)
            n += b


def assert_equal_statistics(ours: nn.Module, theirs: nn.Module) -> None:
    pairs = list(zip(layers_of(ours), layers_of(theirs), strict=True))
    assert len(pairs) == 3
    for one, other in pairs:
        # they round to float32 after each batch
        assert error(buffers(one), buffers(other)) < 5 * TOLERANCE


@pytest.mark.parametrize("sizes", [UNEVEN, [24] * 4], ids=str)
def test_estimator_torch_is_torchs_update_bn(sizes: list[int]) -> None:
    batches, ours, theirs = split(samples(2), sizes), make_net(), make_net()
    recompute_bn_stats(ours, batches, estimator="torch")
    update_bn(batches, theirs)
    assert_equal_statistics(ours, theirs)


@pytest.mark.parametrize("sizes", [UNEVEN, [24] * 4], ids=str)
def test_estimator_paper_is_the_bn_update_of_the_authors(sizes: list[int]) -> None:
    batches, ours, theirs = split(samples(2), sizes), make_net(), make_net()
    recompute_bn_stats(ours, batches, estimator="paper")
    bn_update(batches, theirs)
    assert_equal_statistics(ours, theirs)


def test_the_estimators_differ_on_uneven_batches() -> None:
    batches = split(samples(2), UNEVEN)
    found = [recomputed(nn.BatchNorm2d(N_CHANNELS), batches, one) for one in ESTIMATORS]
    assert error(found[0], found[1]) > 0.1
    assert error(found[0], found[2]) > 0.1
    assert error(found[1], found[2]) > 0.1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_estimators_are_one_on_a_single_batch(estimator: Estimator) -> None:
    layer = nn.BatchNorm2d(N_CHANNELS)
    assert error(recomputed(layer, [samples(2)], estimator), population(samples(2))) < TOLERANCE


@pytest.mark.parametrize(
    ("order", "sizes"),
    [("shuffled", UNEVEN), ("sorted by class", [24] * 4), ("shuffled", [31, 31, 31, 3])],
    ids=["uneven batches", "sorted by class", "a ragged last batch"],
)
@pytest.mark.parametrize("other", ["paper", "torch"])
def test_population_is_nearer_to_the_statistics_of_all_samples_than(
    other: Estimator, order: str, sizes: list[int]
) -> None:
    values = samples() if order == "sorted by class" else shuffled(samples())
    batches, expected = split(values, sizes), population(values)
    ours = error(recomputed(nn.BatchNorm1d(N_CHANNELS), batches, "population"), expected)
    theirs = error(recomputed(nn.BatchNorm1d(N_CHANNELS), batches, other), expected)
    # the others are wrong by per cents, float32 by less than a millionth
    assert ours < TOLERANCE
    assert theirs > 1000 * ours
    assert theirs > 0.005


@pytest.mark.filterwarnings("default")  # what importing fvcore warns of is not ours
def test_a_loader_shorter_than_the_limit_is_used_whole_and_fvcore_asserts() -> None:
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    batches, ours, theirs = split(samples(2), [24] * 4), make_net(), make_net().train()
    report = recompute_bn_stats(ours, batches, max_batches=5)
    assert report.n_batches == 4
    assert error(buffers(layers_of(ours)[0]), population(batches)) < TOLERANCE
    with pytest.raises(AssertionError, match="is meant to run for 5 iterations"):
        precise_bn.update_bn_stats(theirs, batches, 5)
    assert layers_of(theirs)[0].momentum == 1.0  # and is left that way


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("sizes", [UNEVEN, [24] * 4, [31, 31, 31, 3]], ids=str)
def test_fvcore_agrees_with_population(sizes: list[int]) -> None:
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    batches = split(samples(2), sizes)
    ours, theirs = make_net().double(), make_net().double().train()
    batches = tuple(batch.double() for batch in batches)
    report = recompute_bn_stats(ours, batches)
    precise_bn.update_bn_stats(theirs, batches, len(batches))
    for one, layer, other in zip(report.layers, layers_of(ours), layers_of(theirs), strict=True):
        mean, variance = buffers(other)
        unbiased = variance * one.n_elements / (one.n_elements - 1)  # theirs is biased
        # fvcore takes the difference of two squares
        assert error(buffers(layer), (mean, unbiased)) < 1e-10


# ---- counters, InstanceNorm, 16 bits -------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Batch" in kind])
def test_batchnorm_counts_the_batches_of_the_pass(estimator: Estimator, kind: str) -> None:
    make_layer, dims = KINDS[kind]
    layer = make_layer()
    assert layer.num_batches_tracked is not None
    counter = layer.num_batches_tracked.fill_(1234)
    recomputed(layer, split(samples(dims), UNEVEN), estimator)
    assert layer.num_batches_tracked is counter
    assert int(counter) == len(UNEVEN)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Instance" in kind])
def test_instancenorm_counts_nothing(estimator: Estimator, kind: str) -> None:
    make_layer, dims = KINDS[kind]
    layer = make_layer()
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.fill_(1234)
    recomputed(layer, split(samples(dims), UNEVEN), estimator)
    assert int(layer.num_batches_tracked) == 1234


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_instancenorm_takes_input_without_a_batch_dimension(estimator: Estimator) -> None:
    values = samples(1)[:12]
    layer = nn.InstanceNorm1d(N_CHANNELS, track_running_stats=True)
    found = recomputed(layer, list(values), estimator)  # (channels, length) each
    assert error(found, direct([values], estimator, instance=True)) < TOLERANCE


def test_an_instance_without_batch_dimension_counts_as_one_among_batches() -> None:
    values = samples(1)
    batches = [values[0], values[1:90], *values[90:]]
    layer = nn.InstanceNorm1d(N_CHANNELS, track_running_stats=True)
    found = recomputed(layer, batches, "population")
    assert error(found, direct([values], "population", instance=True)) < TOLERANCE


def test_instances_of_one_element_are_refused() -> None:
    layer = nn.InstanceNorm1d(N_CHANNELS, track_running_stats=True)
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(nn.Sequential(layer), [samples(1)[:, :, :1]])
    assert str(caught.value) == (
        "layer '0' got 1 value per channel and instance, which has no variance; use larger inputs"
    )


def test_instancenorm_and_batchnorm_in_one_model_keep_their_own_statistics() -> None:
    instance = nn.InstanceNorm2d(N_CHANNELS, track_running_stats=True)
    batch = nn.BatchNorm2d(N_CHANNELS)
    batches = split(samples(2), UNEVEN)
    report = recompute_bn_stats(
        nn.Sequential(instance, batch), batches, forward=lambda _, x: (instance(x), batch(x))
    )
    assert error(buffers(instance), direct(batches, "population", instance=True)) < TOLERANCE
    assert error(buffers(batch), direct(batches, "population")) < TOLERANCE
    assert [one.n_elements for one in report.layers] == [N_SAMPLES * 12] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "kind", ["BatchNorm1d on (N, C)", "BatchNorm2d", "BatchNormAct2d", "InstanceNorm2d"]
)
def test_sixteen_bit_buffers_get_what_float64_gives_rounded_once(
    dtype: torch.dtype, estimator: Estimator, kind: str
) -> None:
    make_layer, dims = KINDS[kind]
    layer = make_layer().to(dtype)
    batches = split(samples(dims).to(dtype), UNEVEN)
    mean, variance = recomputed(layer, batches, estimator)
    expected = direct(batches, estimator, instance=isinstance(layer, _InstanceNorm))
    assert layer.running_mean is not None
    assert layer.running_mean.dtype == dtype
    assert torch.equal(mean, expected[0].to(dtype).double())
    assert torch.equal(variance, expected[1].to(dtype).double())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sixteen_bit_instancenorm_takes_input_without_a_batch_dimension(
    estimator: Estimator,
) -> None:
    values = samples(1)[:12].bfloat16()
    layer = nn.InstanceNorm1d(N_CHANNELS, track_running_stats=True).bfloat16()
    found = recomputed(layer, list(values), estimator)
    for one, expected in zip(found, direct([values], estimator, instance=True), strict=True):
        assert torch.equal(one, expected.bfloat16().double())
