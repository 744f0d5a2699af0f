"""BatchNorm statistics: against float64 on concatenated data, against torch, and what is restored.

Tolerances are in standard deviations: float32 buffers hold 24 bits, so 1e-6 of one is what a value
a few standard deviations from 0 can be stored to.
"""

import math
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from ckptavg import BatchNormError, UsageError, recompute_bn_stats

N_SAMPLES, N_CHANNELS = 96, 5
TOLERANCE = 1e-6


def samples(dims: int = 0, *, seed: int = 0) -> Tensor:
    """Return samples with other means and spreads in each channel, in order of their mean."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N_SAMPLES, N_CHANNELS, *(4, 3, 2)[:dims])
    per_channel = (1, N_CHANNELS, *(1,) * dims)
    offsets = torch.tensor([0.0, 1.0, -2.0, 5.0, 0.1]).reshape(per_channel)
    scales = torch.tensor([1.0, 0.1, 3.0, 1.0, 0.01]).reshape(per_channel)
    classes = torch.arange(N_SAMPLES).div(N_SAMPLES / 4, rounding_mode="floor")  # class-sorted
    values = torch.randn(shape, generator=generator)
    return (values + 2 * classes.reshape(-1, *(1,) * (dims + 1))) * scales + offsets


def population(values: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance per channel in float64, of all values together."""
    parts = [values] if isinstance(values, Tensor) else values
    rows = torch.cat([part.double().movedim(1, -1).flatten(0, -2) for part in parts])
    return rows.mean(0), rows.var(0, unbiased=True)


def assert_statistics(layer: nn.Module, values: Tensor | Sequence[Tensor]) -> None:
    """Compare a layer's buffers with float64 statistics, in standard deviations."""
    mean, variance = population(values)
    assert float(((mean_of(layer) - mean).abs() / variance.sqrt()).max()) < TOLERANCE
    assert float((variance_of(layer) / variance - 1).abs().max()) < 2 * TOLERANCE


def split(values: Tensor, sizes: int | list[int]) -> tuple[Tensor, ...]:
    return torch.split(values, sizes)


def mean_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer, _BatchNorm)
    assert layer.running_mean is not None
    return layer.running_mean


def variance_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer, _BatchNorm)
    assert layer.running_var is not None
    return layer.running_var


class Net(nn.Module):
    """BatchNorm, dropout and a second BatchNorm that would notice the dropout."""

    n_calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(N_CHANNELS)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(N_CHANNELS, 4)
        self.late = nn.BatchNorm1d(4, momentum=0.3)
        self.register_buffer("n_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.n_calls = self.n_calls + 1
        out: Tensor = self.late(self.linear(self.dropout(self.bn(x * scale))))
        return out


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything that a failed pass must leave as it was, bit for bit."""
    state: dict[str, Any] = {"rng": torch.get_rng_state().tolist()}
    for name, buffer in model.named_buffers():
        state[f"buffer {name}"] = (id(buffer), buffer.dtype, buffer.numpy().tobytes())
    for name, parameter in model.named_parameters():
        state[f"parameter {name}"] = (id(parameter), parameter.detach().numpy().tobytes())
    for name, module in model.named_modules():
        state[f"training {name}"] = module.training
        state[f"momentum {name}"] = getattr(module, "momentum", "none")
        state[f"attributes {name}"] = sorted(vars(module))
        state[f"hooks {name}"] = [
            list(hooks)
            for attribute, hooks in sorted(vars(module).items())
            if "hooks" in attribute and hooks is not None
        ]
    return state


def without_statistics(state: dict[str, Any]) -> dict[str, Any]:
    tracked = ("running_mean", "running_var", "num_batches_tracked")
    return {key: value for key, value in state.items() if not key.endswith(tracked)}


def used_net() -> Net:
    """Return a model as a training loop leaves it: modes, momenta and buffers of all kinds."""
    torch.manual_seed(3)
    model = Net()
    model.train()
    for _ in range(3):
        model(torch.randn(8, N_CHANNELS) * 3 + 1)
    model.linear.eval()
    model.bn.momentum = None
    model.bn.register_forward_hook(lambda module, inputs, output: None)
    return model


# ---- the statistics -----------------------------------------------------------------------------

LAYERS: list[tuple[type[_BatchNorm], int]] = [
    (nn.BatchNorm1d, 0),
    (nn.BatchNorm1d, 1),
    (nn.BatchNorm2d, 2),
    (nn.BatchNorm3d, 3),
]
SPLITS = {
    "evenly": [16] * 6,
    "unevenly": [2, 50, 3, 30, 11],
    "in one batch": [N_SAMPLES],
    "with a ragged last batch": [31, 31, 31, 3],
    "in batches of two": [2] * 48,
}


@pytest.mark.parametrize(("kind", "dims"), LAYERS)
@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("order", ["sorted by class", "shuffled"])
def test_statistics_are_those_of_all_samples_together_however_they_are_split(
    kind: type[_BatchNorm], dims: int, how: str, order: str
) -> None:
    values = samples(dims)
    if order == "shuffled":
        values = values[torch.randperm(N_SAMPLES, generator=torch.Generator().manual_seed(1))]
    model = nn.Sequential(kind(N_CHANNELS))
    report = recompute_bn_stats(model, split(values, SPLITS[how]))
    assert_statistics(model[0], values)
    assert report.n_batches == len(SPLITS[how])
    assert report.n_samples == N_SAMPLES
    assert report.layers[0].n_elements == values.numel() // N_CHANNELS


def test_batches_whose_means_differ_by_ten_thousand_standard_deviations_are_merged_exactly() -> (
    None
):
    generator = torch.Generator().manual_seed(0)
    sizes, offsets = (40, 3, 17, 2), (0.0, 1e4, -1e4, 5e3)
    batches = [
        torch.randn(size, N_CHANNELS, generator=generator) + offset
        for size, offset in zip(sizes, offsets, strict=True)
    ]
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS))
    recompute_bn_stats(model, batches)
    assert_statistics(model[0], batches)


def test_a_small_spread_around_a_large_mean_does_not_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(N_SAMPLES, N_CHANNELS, generator=generator, dtype=torch.float64) + 1e7
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS)).double()
    recompute_bn_stats(model, split(values, 12))
    mean, variance = population(values)
    # 1e7 has a spacing of 2e-9 in float64; E[x^2] - E[x]^2 would be wrong by 0.01
    torch.testing.assert_close(mean_of(model[0]), mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(variance_of(model[0]), variance, rtol=1e-7, atol=0)


def test_deeper_layers_see_what_earlier_layers_give_with_the_statistics_of_each_batch() -> None:
    torch.manual_seed(0)
    first, linear, second = nn.BatchNorm1d(N_CHANNELS), nn.Linear(N_CHANNELS, 3), nn.BatchNorm1d(3)
    batches = split(samples(), [40, 40, 16])
    model = nn.Sequential(first, linear, second)
    recompute_bn_stats(model, batches)
    fresh = nn.BatchNorm1d(N_CHANNELS).train()
    with torch.no_grad():
        assert_statistics(second, [linear(fresh(batch)) for batch in batches])


def test_running_it_again_gives_the_same_bits() -> None:
    model = used_net()
    model.bn.reset_running_stats()
    batches = split(samples(), 20)
    recompute_bn_stats(model, batches)
    first = [buffer.clone() for buffer in model.buffers()]
    recompute_bn_stats(model, batches)
    assert all(map(torch.equal, first, model.buffers()))


def test_a_layer_used_twice_in_one_forward_counts_both_inputs() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.BatchNorm1d(N_CHANNELS)
            self.bn = nn.BatchNorm1d(N_CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            self.before(x)
            return self.bn(x) + self.bn(7 - 3 * x)  # type: ignore[no-any-return]  # Module.__call__

    model = Shared()
    values = samples()
    report = recompute_bn_stats(model, split(values, [50, 40, 6]))
    assert_statistics(model.bn, [values, 7 - 3 * values])
    assert_statistics(model.before, values)
    assert [layer.n_elements for layer in report.layers] == [N_SAMPLES, 2 * N_SAMPLES]


def test_a_layer_registered_under_two_names_is_one_layer() -> None:
    layer = nn.BatchNorm1d(N_CHANNELS)
    model = nn.ModuleDict({"a": layer, "b": layer})
    values = samples()
    report = recompute_bn_stats(
        model, split(values, 32), forward=lambda model, x: (layer(x), layer(x + 1))
    )
    assert_statistics(layer, [values, values + 1])
    assert [one.name for one in report.layers] == ["a"]


def test_layers_reached_by_some_batches_only_take_their_statistics_from_those() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.BatchNorm1d(N_CHANNELS)
            self.mid = nn.BatchNorm1d(N_CHANNELS)
            self.high = nn.BatchNorm1d(N_CHANNELS)

        def forward(self, x: Tensor) -> None:
            if float(x[:, 0].mean()) > 3:
                self.high(x)
                self.mid(x)  # not in the order of the model
            else:
                self.low(x)

    model = Routed()
    values = samples()
    batches = split(values, 12)
    report = recompute_bn_stats(model, batches)
    high = [batch for batch in batches if float(batch[:, 0].mean()) > 3]
    low = [batch for batch in batches if float(batch[:, 0].mean()) <= 3]
    assert high
    assert low
    assert_statistics(model.high, high)
    assert_statistics(model.mid, high)
    assert_statistics(model.low, low)
    assert [layer.n_elements for layer in report.layers] == [
        12 * len(part) for part in (low, high, high)
    ]


def test_layers_called_in_another_order_than_they_were_made_keep_their_own_statistics() -> None:
    model = nn.ModuleDict({name: nn.BatchNorm1d(N_CHANNELS) for name in ("a", "b", "c")})
    inputs = {"c": samples(seed=3), "a": samples(seed=1), "b": 2 * samples(seed=2)}

    def forward(model: nn.Module, rows: Tensor) -> None:
        for name, values in inputs.items():
            model.get_submodule(name)(values[rows])

    recompute_bn_stats(model, split(torch.arange(N_SAMPLES), [50, 40, 6]), forward=forward)
    for name, values in inputs.items():
        assert_statistics(model[name], values)


def test_input_given_by_keyword_counts() -> None:
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS))
    values = samples()
    recompute_bn_stats(
        model, split(values, 32), forward=lambda model, x: model.get_submodule("0")(input=x)
    )
    assert_statistics(model[0], values)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
@pytest.mark.parametrize("affine", [True, False])
def test_momentum_and_affine_change_nothing(momentum: float | None, affine: bool) -> None:
    layer = nn.BatchNorm1d(N_CHANNELS, momentum=momentum, affine=affine)
    values = samples()
    recompute_bn_stats(nn.Sequential(layer), split(values, 13))
    assert_statistics(layer, values)
    assert layer.momentum == momentum


def test_a_layer_can_be_the_whole_model() -> None:
    layer = nn.BatchNorm1d(N_CHANNELS)
    values = samples()
    report = recompute_bn_stats(layer, split(values, 32))
    assert_statistics(layer, values)
    assert [one.name for one in report.layers] == [""]


def test_synchronised_layers_work_in_one_process() -> None:
    layer = nn.SyncBatchNorm(N_CHANNELS)
    values = samples(2)
    recompute_bn_stats(nn.Sequential(layer), split(values, 17))
    assert_statistics(layer, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_get_statistics_rounded_once(dtype: torch.dtype) -> None:
    values = samples().to(dtype)
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS)).to(dtype)
    recompute_bn_stats(model, split(values, [50, 40, 6]))
    mean, variance = population(values)
    assert torch.equal(mean_of(model[0]), mean.to(dtype))
    assert torch.equal(variance_of(model[0]), variance.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_to_float32_statistics_keep_their_precision(dtype: torch.dtype) -> None:
    values = samples().to(dtype)
    layer = nn.BatchNorm1d(N_CHANNELS)
    recompute_bn_stats(nn.Sequential(layer), split(values, [50, 40, 6]))
    assert_statistics(layer, values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_buffers_before_the_pass_leave_no_trace(value: float) -> None:
    layer = nn.BatchNorm1d(N_CHANNELS)
    mean_of(layer).fill_(value)
    variance_of(layer).fill_(value)
    values = samples()
    recompute_bn_stats(nn.Sequential(layer), split(values, 16))
    assert_statistics(layer, values)


def test_a_channel_that_never_varies_has_variance_zero() -> None:
    values = samples()
    values[:, 2] = 4.0
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS))
    recompute_bn_stats(model, split(values, 32))
    assert float(mean_of(model[0])[2]) == 4.0
    assert float(variance_of(model[0])[2]) == 0.0


# ---- which layers --------------------------------------------------------------------------------


def test_layers_without_running_statistics_are_skipped_and_reported() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(N_CHANNELS), nn.BatchNorm1d(N_CHANNELS, track_running_stats=False)
    )
    report = recompute_bn_stats(model, split(samples(), 32))
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.skipped == {"1": "keeps no running statistics"}


def test_a_layer_whose_tracking_was_turned_off_later_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS), nn.BatchNorm1d(N_CHANNELS))
    setattr(model[1], "track_running_stats", False)  # noqa: B010 - mypy sees a Module
    mean_of(model[1]).fill_(3.0)
    before = [buffer.clone() for buffer in model[1].buffers()]
    report = recompute_bn_stats(model, split(samples(), 32))
    assert all(map(torch.equal, before, model[1].buffers()))
    assert report.skipped == {"1": "is frozen: track_running_stats is off"}


def test_frozen_layers_keep_their_statistics_and_use_them() -> None:
    frozen, live = nn.BatchNorm1d(N_CHANNELS), nn.BatchNorm1d(N_CHANNELS)
    model = nn.Sequential(frozen, live).double().train()
    mean_of(frozen).fill_(3.0)
    variance_of(frozen).fill_(4.0)
    frozen.eval()
    before = [buffer.clone() for buffer in frozen.buffers()]
    values = samples().double()
    report = recompute_bn_stats(model, split(values, 32))
    assert all(map(torch.equal, before, frozen.buffers()))
    assert not frozen.training
    assert live.training
    with torch.no_grad():
        assert_statistics(live, frozen(values))
    assert report.skipped == {"0": "is frozen: in evaluation mode inside a model in training mode"}


def test_a_model_in_evaluation_mode_has_all_its_layers_recomputed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS), nn.BatchNorm1d(N_CHANNELS)).eval()
    values = samples()
    report = recompute_bn_stats(model, split(values, 32))
    assert_statistics(model[0], values)
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert not any(module.training for module in model.modules())


def test_a_model_without_batchnorm_is_not_run_at_all() -> None:
    loader = Counting(8)
    report = recompute_bn_stats(nn.Sequential(nn.Linear(2, 2)), loader)
    assert loader.n_pulled == 0
    assert (report.layers, report.n_batches, report.n_samples) == ((), 0, 0)


def test_dropout_stays_off() -> None:
    model = used_net()
    seen: list[bool] = []
    model.dropout.register_forward_hook(
        lambda module, inputs, output: seen.append(torch.equal(inputs[0], output))
    )
    recompute_bn_stats(model, split(samples(), 32))
    assert seen == [True, True, True]


def test_a_module_whose_eval_does_more_is_not_asked_to() -> None:
    class Merging(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> "Merging":
            raise AssertionError("weights would be merged here, and never unmerged")

    model = nn.Sequential(Merging(N_CHANNELS))
    values = samples()
    recompute_bn_stats(model, split(values, 32))
    assert_statistics(model[0], values)


# ---- batches -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    inputs: Tensor
    labels: Tensor


class Encoding(UserDict[str, Any]):
    """What transformers' BatchEncoding does: a mapping, with attributes and an in-place ``to``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: object) -> "Encoding":
        raise AssertionError("this would change the user's own batch")


LABELS = torch.zeros(32, dtype=torch.int64)
BATCH_FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda x: x,
    "a tuple": lambda x: (x, LABELS),
    "a tuple of one": lambda x: (x,),
    "a list": lambda x: [x, LABELS],
    "a list with text": lambda x: [x, ["a", None, 3]],
    "a named tuple": lambda x: Pair(x, LABELS),
    "a dict": lambda x: {"x": x, "scale": 1.0},
    "a read-only mapping": lambda x: MappingProxyType({"x": x}),
    "an encoding": lambda x: Encoding({"x": x}),
}


@pytest.mark.parametrize("form", BATCH_FORMS)
def test_batches_may_be(form: str) -> None:
    model, values = used_net(), samples()
    report = recompute_bn_stats(model, [BATCH_FORMS[form](part) for part in split(values, 32)])
    assert_statistics(model.bn, values)
    assert (report.n_batches, report.n_samples) == (3, N_SAMPLES)


def test_a_custom_forward_gets_batches_of_the_types_that_the_loader_gave() -> None:
    received: list[Any] = []

    def forward(model: nn.Module, batch: Any) -> None:
        received.append(batch)
        model(batch["pairs"][0].inputs if isinstance(batch, dict) else batch.pairs[0].inputs)

    values = samples()
    pairs = [[Pair(part, LABELS)] for part in split(values, 32)]
    batches = [{"pairs": pairs[0]}, Encoding({"pairs": pairs[1]}), Encoding({"pairs": pairs[2]})]
    model = used_net()
    report = recompute_bn_stats(model, batches, forward=forward)
    assert_statistics(model.bn, values)
    assert [type(batch) for batch in received] == [dict, Encoding, Encoding]
    assert [type(batch["pairs"][0]) for batch in received] == [Pair, Pair, Pair]
    assert report.n_samples == N_SAMPLES
    # what the user keeps is not touched
    assert all(batch["pairs"] is pair for batch, pair in zip(batches, pairs, strict=True))


def test_an_object_with_a_to_method_is_moved_by_it() -> None:
    class Graph:
        def __init__(self, x: Tensor, moved_to: object = None) -> None:
            self.x, self.moved_to = x, moved_to

        def to(self, device: torch.device) -> "Graph":
            return Graph(self.x, device)

    places: list[object] = []

    def forward(model: nn.Module, batch: Graph) -> None:
        places.append(batch.moved_to)
        model(batch.x)

    model, values = used_net(), samples()
    recompute_bn_stats(model, [Graph(part) for part in split(values, 32)], forward=forward)
    assert_statistics(model.bn, values)
    assert places == [torch.device("cpu")] * 3


def test_generators_and_one_shot_iterators_are_batches() -> None:
    values = samples()
    for batches in ((part for part in split(values, 32)), iter(split(values, 32))):
        model = used_net()
        assert recompute_bn_stats(model, batches).n_batches == 3
        assert_statistics(model.bn, values)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (3.5, "a batch is a float, expected a tensor, a tuple, a list or a mapping; say how to "
         "run the model with forward (--forward)"),
        ((), "a batch is an empty tuple or list"),
        ([], "a batch is an empty tuple or list"),
    ],
)  # fmt: skip
def test_batches_of_unknown_form_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(used_net(), [batch])
    assert str(caught.value) == message


class Counting:
    """An endless loader that counts how many batches were asked for."""

    def __init__(self, size: int) -> None:
        self.n_pulled, self._size = 0, size

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.n_pulled += 1
            yield torch.randn(self._size, N_CHANNELS)


@pytest.mark.parametrize(
    ("max_batches", "max_samples", "n_batches"),
    [(1, None, 1), (3, None, 3), (None, 8, 1), (None, 9, 2), (None, 16, 2), (None, 1, 1),
     (2, 1000, 2), (1000, 17, 3)],
)  # fmt: skip
def test_limits_stop_the_pass_without_asking_for_another_batch(
    max_batches: int | None, max_samples: int | None, n_batches: int
) -> None:
    loader = Counting(8)
    report = recompute_bn_stats(
        used_net(), loader, max_batches=max_batches, max_samples=max_samples
    )
    assert (report.n_batches, report.n_samples) == (n_batches, 8 * n_batches)
    assert loader.n_pulled == n_batches


def test_a_limited_pass_uses_the_first_batches() -> None:
    model, values = used_net(), samples()
    recompute_bn_stats(model, split(values, 16), max_batches=2)
    assert_statistics(model.bn, values[:32])


def test_limits_beyond_the_data_use_all_of_it() -> None:
    model, values = used_net(), samples()
    report = recompute_bn_stats(model, split(values, 32), max_batches=99, max_samples=10**9)
    assert_statistics(model.bn, values)
    assert report.n_samples == N_SAMPLES


@pytest.mark.parametrize("limit", ["max_batches", "max_samples"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_below_one_are_refused_before_any_batch(limit: str, value: int) -> None:
    loader = Counting(8)
    limits: dict[str, Any] = {limit: value}
    with pytest.raises(UsageError, match=f"^{limit} is {value}, expected at least 1$"):
        recompute_bn_stats(used_net(), loader, **limits)
    assert loader.n_pulled == 0


def test_samples_that_cannot_be_counted_are_not_limited_in_silence() -> None:
    class Opaque:
        x = torch.randn(8, N_CHANNELS)

    def forward(model: nn.Module, batch: Opaque) -> None:
        model(batch.x)

    assert recompute_bn_stats(used_net(), [Opaque()] * 3, forward=forward).n_batches == 3
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(used_net(), [Opaque()] * 3, forward=forward, max_samples=8)
    assert str(caught.value) == (
        "a batch is a Opaque, whose samples cannot be counted; use max_batches (--batches) "
        "instead of max_samples (--samples)"
    )


def test_progress_is_told_the_samples_of_each_batch() -> None:
    done: list[int] = []
    recompute_bn_stats(used_net(), split(samples(), [50, 40, 6]), progress=done.append)
    assert done == [50, 40, 6]


def test_data_made_during_the_pass_can_be_trained_on_afterwards() -> None:
    made: list[Tensor] = []

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(N_CHANNELS)
            self.scale = nn.Parameter(torch.ones(N_CHANNELS))
            self.table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(N_CHANNELS).float()
            out: Tensor = self.bn(x * self.scale * self.table)
            return out

    def loader() -> Iterator[Tensor]:
        made.append(torch.randn(8, N_CHANNELS))
        yield made[0]

    model = Caching()
    recompute_bn_stats(model, loader())
    model(made[0]).sum().backward()
    assert model.scale.grad is not None


def test_the_pass_records_no_gradients() -> None:
    model = used_net()
    enabled: list[bool] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        enabled.append(model(batch).requires_grad)

    recompute_bn_stats(model, split(samples(), 32), forward=forward)
    assert enabled == [False] * 3
    assert torch.is_grad_enabled()


# ---- the report ----------------------------------------------------------------------------------


def test_the_report_tells_how_far_each_layer_moved() -> None:
    layer = nn.BatchNorm1d(2, eps=0.5)
    mean_of(layer).copy_(torch.tensor([1.0, -2.0]))
    variance_of(layer).copy_(torch.tensor([4.0, 0.25]))
    # unbiased variances 2 and 8 around the means 3 and 10
    values = torch.tensor([[2.0, 8.0], [4.0, 12.0]])
    report = recompute_bn_stats(nn.Sequential(nn.Identity(), layer), [values])
    (one,) = report.layers
    assert (one.name, one.n_features, one.n_elements) == ("1", 2, 2)
    assert one.mean_shift == pytest.approx(12 / math.sqrt(8.5), rel=1e-6)
    assert one.variance_ratio == pytest.approx((2.5 / 4.5, 8.5 / 0.75), rel=1e-6)
    assert report.seconds >= 0


def test_a_second_pass_over_the_same_data_moves_nothing() -> None:
    model = used_net()
    recompute_bn_stats(model, split(samples(), 32))
    for layer in recompute_bn_stats(model, split(samples(), 32)).layers:
        assert layer.mean_shift < TOLERANCE
        assert layer.variance_ratio == pytest.approx((1, 1), abs=2 * TOLERANCE)


# ---- failures and restoring ----------------------------------------------------------------------


def failing_after(count: int, error: BaseException) -> Iterator[Tensor]:
    yield from split(samples(), 16)[:count]
    raise error


class StopError(Exception):
    """Raised by the user's own code."""


def raising_forward(error: BaseException) -> Callable[[nn.Module, Any], object]:
    """Return a forward that fails on the third batch."""
    seen: list[int] = []

    def forward(model: nn.Module, batch: Any) -> object:
        seen.append(1)
        if len(seen) == 3:
            model.get_submodule("bn")(batch)  # half of the model has seen this batch
            raise error
        return model(batch)

    return forward


def raising_progress(done: int) -> None:
    raise StopError("no more")


def to_evaluation(model: nn.Module, batch: Tensor) -> object:
    return model.eval()(batch)


def only_first(model: nn.Module, batch: Tensor) -> object:
    return model.get_submodule("bn")(batch)


SIXTEENS = split(samples(), 16)
WITH_INFINITY = [SIXTEENS[0], torch.full((4, N_CHANNELS), math.inf)]
WITH_NAN = [SIXTEENS[0], torch.full((4, N_CHANNELS), math.nan), SIXTEENS[1]]
# name: batches, options, error, the whole message
Failure = tuple[Callable[[], Iterable[Any]], Callable[[], dict[str, Any]], type[BaseException], str]
FAILURES: dict[str, Failure] = {
    "an empty loader": (
        list, dict, BatchNormError, "no batches: BatchNorm statistics need data"),
    "a loader that raises at once": (
        lambda: failing_after(0, StopError("disk")), dict, StopError, "disk"),
    "a loader that raises in the middle": (
        lambda: failing_after(3, StopError("disk")), dict, StopError, "disk"),
    "a loader that is interrupted": (
        lambda: failing_after(3, KeyboardInterrupt()), dict, KeyboardInterrupt, ""),
    "a model that raises": (
        lambda: SIXTEENS, lambda: {"forward": raising_forward(StopError("shape"))},
        StopError, "shape"),
    "a model that is interrupted": (
        lambda: SIXTEENS, lambda: {"forward": raising_forward(KeyboardInterrupt())},
        KeyboardInterrupt, ""),
    "progress that raises": (
        lambda: SIXTEENS, lambda: {"progress": raising_progress}, StopError, "no more"),
    "one value per channel in all": (
        lambda: [SIXTEENS[0][:1]], dict, BatchNormError,
        "layer 'bn' got a batch with 1 value per channel, which has no variance; use larger "
        "batches, or drop the last small one"),
    "no value per channel in all": (
        lambda: [SIXTEENS[0][:0]], dict, BatchNormError,
        "layer 'bn' got a batch with no value per channel, which has no variance; use larger "
        "batches, or drop the last small one"),
    "one value per channel that fits no other batch": (
        lambda: [{"x": SIXTEENS[0]}, SIXTEENS[0][:1]], dict, BatchNormError,
        "layer 'bn' got a batch with 1 value per channel, which has no variance; use larger "
        "batches, or drop the last small one (it cannot be joined to the batch beside it: other "
        "types)"),
    "infinity in the data": (
        lambda: WITH_INFINITY, dict, BatchNormError,
        "layer 'bn': 5 of 5 channels have non-finite statistics; the data or the weights hold "
        "infinity or NaN"),
    "NaN in the data": (
        lambda: WITH_NAN, dict, BatchNormError,
        "layer 'bn': 5 of 5 channels have non-finite statistics; the data or the weights hold "
        "infinity or NaN"),
    "a layer that is never reached": (
        lambda: SIXTEENS, lambda: {"forward": only_first}, BatchNormError,
        "1 of 2 BatchNorm layers were never reached by the data: 'late'"),
    "a forward that turns to evaluation": (
        lambda: SIXTEENS, lambda: {"forward": to_evaluation}, BatchNormError,
        "layer 'bn' was put into evaluation mode during the pass; forward must leave the training "
        "modes alone"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_the_model_is_as_before_bit_for_bit_after(failure: str, mode: str) -> None:
    make_batches, make_options, error, message = FAILURES[failure]
    model = used_net()
    if mode == "evaluation":
        model.eval()
        model.linear.train()
    before = snapshot(model)
    with pytest.raises(error) as caught:
        recompute_bn_stats(model, make_batches(), **make_options())
    assert str(caught.value) == message
    assert snapshot(model) == before


def test_individually_frozen_layers_are_as_before_after_a_failure() -> None:
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS), nn.Dropout(), nn.BatchNorm1d(N_CHANNELS))
    model[0].eval()
    before = snapshot(model)

    def forward(model: nn.Module, batch: Tensor) -> object:
        return model.train()(batch)  # thaws the frozen layer, which then updates itself

    with pytest.raises(StopError):
        recompute_bn_stats(model, failing_after(3, StopError()), forward=forward)
    assert snapshot(model) == before


def test_on_success_everything_but_the_statistics_is_as_before() -> None:
    model = used_net()
    before = snapshot(model)

    def noisy() -> Iterator[Tensor]:
        for part in split(samples(), 16):
            torch.manual_seed(0)
            yield part + torch.rand(())

    recompute_bn_stats(model, noisy())
    after = snapshot(model)
    assert without_statistics(after) == without_statistics(before)
    assert after != before
    assert all(
        after[f"buffer {name}"][:2] == before[f"buffer {name}"][:2]  # the same tensor objects
        for name, _ in model.named_buffers()
    )
    assert model.bn.num_batches_tracked is not None
    assert int(model.bn.num_batches_tracked) == 6


def test_hooks_of_the_user_run_during_the_pass_and_stay() -> None:
    model = used_net()
    calls: list[int] = []
    handle = model.bn.register_forward_hook(lambda *_: calls.append(1))
    recompute_bn_stats(model, split(samples(), 32))
    assert len(calls) == 3
    handle.remove()


def test_unreached_layers_are_named_three_at_most() -> None:
    model = nn.ModuleList(nn.BatchNorm1d(N_CHANNELS) for _ in range(6))
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(
            model, split(samples(), 32), forward=lambda model, x: model.get_submodule("1")(x)
        )
    assert str(caught.value) == (
        "5 of 6 BatchNorm layers were never reached by the data: '0', '2', '3', ..."
    )


def test_statistics_that_float16_buffers_cannot_hold_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS)).half()
    values = (samples()[:, :1] * torch.tensor([1.0, 1.0, 1.0, 1.0, 2000.0])).half()
    before = snapshot(model)
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(model, split(values, 32))
    assert str(caught.value) == (
        "layer '0': 1 of 5 channels have statistics too large for the float16 of its buffers"
    )
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_layers_are_refused_with_a_remedy() -> None:
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(nn.Sequential(nn.LazyBatchNorm1d()), split(samples(), 32))
    assert str(caught.value) == "layer '0' is lazy and was never run: run one batch first"


# ---- the peer: torch.optim.swa_utils.update_bn ---------------------------------------------------


def both_ways(make_batches: Callable[[], Iterable[Any]]) -> tuple[nn.BatchNorm1d, nn.BatchNorm1d]:
    """Return our layer and torch's after a pass over the same batches."""
    ours, theirs = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    recompute_bn_stats(nn.Sequential(ours), make_batches())
    update_bn(make_batches(), nn.Sequential(theirs))
    return ours, theirs


def test_update_bn_weighs_a_batch_of_two_like_one_of_64_and_we_do_not() -> None:
    batches = [torch.zeros(64, 1), torch.full((2, 1), 10.0)]
    ours, theirs = both_ways(lambda: batches)
    assert float(mean_of(theirs)) == pytest.approx(5.0)
    assert float(mean_of(ours)) == pytest.approx(20 / 66)
    assert_statistics(ours, batches)


def test_update_bn_loses_the_variance_between_classes_and_we_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = [torch.randn(64, 1, generator=generator) + 3 * label for label in range(4)]
    ours, theirs = both_ways(lambda: classes)
    assert float(variance_of(theirs)) == pytest.approx(1.0, abs=0.2)  # within a class
    assert float(variance_of(ours)) == pytest.approx(1 + 9 * 1.25, rel=0.1)
    assert_statistics(ours, classes)


def test_update_bn_resets_the_statistics_on_an_empty_loader_and_we_refuse() -> None:
    model = used_net()
    before = mean_of(model.bn).clone()
    with pytest.raises(BatchNormError):
        recompute_bn_stats(model, [])
    assert torch.equal(mean_of(model.bn), before)
    update_bn([], model)
    assert torch.equal(mean_of(model.bn), torch.zeros(N_CHANNELS))
    assert torch.equal(variance_of(model.bn), torch.ones(N_CHANNELS))


def test_update_bn_overwrites_frozen_layers_and_we_do_not() -> None:
    def frozen_model() -> nn.Sequential:
        model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS), nn.BatchNorm1d(N_CHANNELS)).train()
        mean_of(model[0]).fill_(3.0)
        model[0].eval()
        return model

    ours, theirs = frozen_model(), frozen_model()
    recompute_bn_stats(ours, split(samples(), 32))
    update_bn(split(samples(), 32), theirs)
    assert torch.equal(mean_of(ours[0]), torch.full((N_CHANNELS,), 3.0))
    assert not torch.equal(mean_of(theirs[0]), torch.full((N_CHANNELS,), 3.0))
    assert not ours[0].training
    assert theirs[0].training


def test_update_bn_fails_on_dict_batches_and_leaves_momentum_none_and_we_do_neither() -> None:
    batches = [{"x": part} for part in split(samples(), 32)]
    ours, theirs = used_net().eval(), used_net().eval()
    ours.late.momentum = theirs.late.momentum = 0.3
    recompute_bn_stats(ours, batches)
    with pytest.raises((AttributeError, TypeError)):  # whatever the model makes of a dict
        update_bn(batches, theirs)
    assert_statistics(ours.bn, samples())
    assert [model.late.momentum for model in (ours, theirs)] == [0.3, None]
    assert [model.training for model in (ours, theirs)] == [False, True]


def test_update_bn_runs_dropout_and_moves_the_random_state_and_we_do_not() -> None:
    state = torch.get_rng_state()
    ours, theirs = used_net(), used_net()
    torch.set_rng_state(state)
    recompute_bn_stats(ours, split(samples(), 32))
    assert torch.equal(torch.get_rng_state(), state)
    update_bn(split(samples(), 32), theirs)
    assert not torch.equal(torch.get_rng_state(), state)


def test_update_bn_agrees_with_us_on_one_batch() -> None:
    ours, theirs = both_ways(lambda: [samples()[:, :1]])
    torch.testing.assert_close(mean_of(ours), mean_of(theirs), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance_of(ours), variance_of(theirs), rtol=1e-6, atol=0)
