"""How a BatchNorm pass runs: modes, small batches, wrapped models, compiled code, seeds, limits."""

import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_batchnorm import (
    N_CHANNELS,
    N_SAMPLES,
    Net,
    StopError,
    assert_statistics,
    mean_of,
    population,
    raising_progress,
    samples,
    snapshot,
    split,
    used_net,
    variance_of,
    without_statistics,
)
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from ckptavg import BatchNormError, UsageError, recompute_bn_stats
from ckptavg.batchnorm import BnOptions, Estimator, TrainMode

ESTIMATORS: tuple[Estimator, ...] = ("population", "paper", "torch")


def statistics(model: nn.Module) -> list[list[float]]:
    """Return the statistics of every layer, in the order of the model."""
    found = []
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            found += [mean_of(layer).tolist(), variance_of(layer).tolist()]
    return found


class Shapes(nn.Module):
    """Convolutions, pooling and a layer behind it, for which one image is one value a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(N_CHANNELS, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.late = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.late(functional.relu(self.bn(self.conv(x))).mean((2, 3)))
        return out


def shapes() -> Shapes:
    torch.manual_seed(2)
    return Shapes()


# ---- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train_mode", "is_on"), [("model", True), ("bn", False)])
@pytest.mark.parametrize("was_training", [True, False])
def test_dropout_runs_in_train_mode_model_only(
    train_mode: TrainMode, is_on: bool, was_training: bool
) -> None:
    model = used_net().train(was_training)
    changed: list[bool] = []
    model.dropout.register_forward_hook(
        lambda module, inputs, output: changed.append(not torch.equal(inputs[0], output))
    )
    before = snapshot(model)
    recompute_bn_stats(model, split(samples(), 32), train_mode=train_mode)
    assert changed == [is_on] * 3
    assert without_statistics(snapshot(model)) == without_statistics(before)


def test_train_mode_model_leaves_alone_what_is_frozen_in_a_model_in_training_mode() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(N_CHANNELS), nn.Dropout(), nn.Dropout(), nn.BatchNorm1d(N_CHANNELS)
    ).train()
    model[0].eval()
    model[1].eval()
    during: list[list[bool]] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        during.append([module.training for module in model.modules()])
        model(batch)

    frozen = [buffer.clone() for buffer in model[0].buffers()]
    report = recompute_bn_stats(model, split(samples(), 32), forward=forward, train_mode="model")
    assert during == [[True, False, False, True, True]] * 3
    assert [module.training for module in model.modules()] == during[0]
    assert all(map(torch.equal, frozen, model[0].buffers()))
    assert report.skipped == {"0": "is frozen: in evaluation mode inside a model in training mode"}
    assert [one.name for one in report.layers] == ["3"]


def test_train_mode_model_turns_on_all_of_a_model_in_evaluation_mode() -> None:
    model = used_net().eval()
    during: list[list[bool]] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        during.append([module.training for module in model.modules()])
        model(batch)

    recompute_bn_stats(model, split(samples(), 32), forward=forward, train_mode="model")
    assert during == [[True] * len(list(model.modules()))] * 3
    assert not any(module.training for module in model.modules())


def test_train_mode_model_is_as_torchs_update_bn_with_the_same_dropout() -> None:
    ours, theirs = used_net().train(), used_net().train()
    ours.linear.train()
    batches = split(samples(), 32)
    recompute_bn_stats(ours, batches, train_mode="model", estimator="torch", seed=4)
    torch.manual_seed(4)
    torch.optim.swa_utils.update_bn(batches, theirs)
    for one, other in zip(statistics(ours), statistics(theirs), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


# ---- small batches -------------------------------------------------------------------------------

# name: sizes, the sizes that they amount to, how many batches were joined to others
SMALL: dict[str, tuple[list[int], list[int], int]] = {
    "the last one": ([32, 32, 31, 1], [32, 32, 32], 1),
    "the first one": ([1, 31, 32, 32], [32, 32, 32], 1),
    "one in the middle": ([32, 1, 31, 32], [32, 32, 32], 1),
    "the first and the last one": ([1, 47, 47, 1], [48, 48], 2),
    "all of an even number": ([1] * 96, [2] * 48, 48),
    "all of an odd number": ([1] * 5, [2, 3], 3),
    "three in the middle": ([47, 1, 1, 1, 46], [47, 2, 47], 2),
}
EMPTY: dict[str, tuple[list[int], list[int], int]] = {
    "the first one": ([0, 48, 48], [48, 48], 1),
    "one in the middle": ([40, 0, 56], [40, 56], 1),
    "the last one": ([40, 56, 0], [40, 56], 1),
    "two in a row": ([40, 0, 0, 56], [40, 56], 2),
    "before one of one sample": ([40, 0, 1, 55], [40, 56], 2),
}


def note_of(n_joined: int) -> str:
    batches = "batch" if n_joined == 1 else "batches"
    return f"{n_joined} {batches} too small for a layer joined to a neighbour"


def assert_joined(sizes: list[int], amount_to: list[int], n_joined: int, **options: Any) -> None:
    values = samples()[: sum(sizes)]
    model, expected = used_net(), used_net()
    done: list[int] = []
    report = recompute_bn_stats(model, split(values, sizes), progress=done.append, **options)
    reference = recompute_bn_stats(expected, split(values, amount_to), **options)
    assert statistics(model) == statistics(expected)
    assert report.notes == (note_of(n_joined),)
    assert (report.n_batches, report.n_samples) == (len(sizes), len(values))
    assert [one.n_elements for one in report.layers] == [len(values)] * 2
    assert done == sizes
    assert model.bn.num_batches_tracked is not None
    assert int(model.bn.num_batches_tracked) == len(sizes)
    assert reference.notes == ()
    if options.get("estimator", "population") == "population":
        assert_statistics(model.bn, values)


@pytest.mark.parametrize("which", SMALL)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_of_one_sample_counts_as_part_of_its_neighbour(
    which: str, estimator: Estimator
) -> None:
    assert_joined(*SMALL[which], estimator=estimator)


@pytest.mark.parametrize("which", EMPTY)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_empty_batch_changes_nothing(which: str, estimator: Estimator) -> None:
    assert_joined(*EMPTY[which], estimator=estimator)


def test_an_empty_batch_changes_nothing_when_samples_are_limited() -> None:
    model, values = used_net(), samples()
    report = recompute_bn_stats(model, [values[:0], values[:40], values[40:]], max_samples=40)
    assert_statistics(model.bn, values[:40])
    assert report.n_samples == 40


@pytest.mark.parametrize("where", [0, 1, 2])
def test_an_empty_batch_changes_nothing_for_instancenorm(where: int) -> None:
    def layer() -> nn.InstanceNorm1d:
        return nn.InstanceNorm1d(N_CHANNELS, track_running_stats=True)

    batches = list(split(samples(1), 48))
    ours, expected = layer(), layer()
    recompute_bn_stats(nn.Sequential(expected), batches)
    recompute_bn_stats(nn.Sequential(ours), [*batches[:where], batches[0][:0], *batches[where:]])
    for one, other in zip(ours.buffers(), expected.buffers(), strict=True):
        assert torch.equal(one, other)


def test_a_sample_too_small_for_a_deep_layer_only_is_counted_once_everywhere() -> None:
    values = samples(2)
    model, expected = shapes(), shapes()
    report = recompute_bn_stats(model, split(values, [1, 30, 1, 63, 1]))
    recompute_bn_stats(expected, split(values, [31, 65]))
    assert statistics(model) == statistics(expected)
    assert_statistics(model.bn, model.conv(values).detach())
    assert [one.n_elements for one in report.layers] == [N_SAMPLES * 12, N_SAMPLES]
    assert report.notes == (note_of(3),)


def test_a_batch_small_for_the_second_use_of_a_layer_is_counted_once() -> None:
    def twice(model: nn.Module, x: Tensor) -> None:
        model(x.repeat(2, 1))
        model(x)

    layer, values = nn.BatchNorm1d(N_CHANNELS), samples()
    report = recompute_bn_stats(nn.Sequential(layer), split(values, [48, 47, 1]), forward=twice)
    assert_statistics(layer, [values, values, values])
    assert report.layers[0].n_elements == 3 * N_SAMPLES


def test_a_limit_that_leaves_one_sample_is_an_error() -> None:
    model = used_net()
    before = snapshot(model)
    with pytest.raises(BatchNormError, match="^layer 'bn' got a batch with 1 value per channel"):
        recompute_bn_stats(model, split(samples(), [1, 95]), max_batches=1)
    assert snapshot(model) == before


class Labelled(NamedTuple):
    x: Tensor
    label: Tensor


LABELS = torch.arange(N_SAMPLES)
# name: how a batch of some samples is made, and what its input is
JOINED: dict[str, tuple[Callable[[slice], Any], Callable[[Any], Tensor]]] = {
    "tensors": (lambda rows: samples()[rows], lambda batch: batch),
    "tuples": (lambda rows: (samples()[rows], LABELS[rows]), lambda batch: batch[0]),
    "lists of tensors": (lambda rows: [samples()[rows], LABELS[rows]], lambda batch: batch[0]),
    "named tuples": (lambda rows: Labelled(samples()[rows], LABELS[rows]), lambda batch: batch.x),
    "dicts": (
        lambda rows: {"label": LABELS[rows], "x": samples()[rows], "scale": 1.0, "note": None},
        lambda batch: batch["x"],
    ),
    "tuples with names of samples": (
        lambda rows: (samples()[rows], [f"image {row}" for row in LABELS[rows].tolist()]),
        lambda batch: batch[0],
    ),
}
ROWS = [slice(0, 1), slice(1, 60), slice(60, 95), slice(95, 96)]


def parts_of(batch: Any) -> list[Any]:
    """Return everything in a batch as plain values and types, to compare batches by."""
    if isinstance(batch, Tensor):
        return [batch.tolist()]
    if isinstance(batch, dict):
        return [dict, *((key, parts_of(value)) for key, value in batch.items())]
    if isinstance(batch, (tuple, list)):
        return [type(batch), *map(parts_of, batch)]
    return [batch]


@pytest.mark.parametrize("form", JOINED)
def test_small_batches_are_joined_that_are(form: str) -> None:
    make, input_of = JOINED[form]
    received: list[Any] = []

    def forward(model: nn.Module, batch: Any) -> None:
        received.append(batch)
        model(input_of(batch))

    model = used_net()
    report = recompute_bn_stats(model, [make(rows) for rows in ROWS], forward=forward)
    assert_statistics(model.bn, samples())
    assert report.n_samples == N_SAMPLES
    assert report.notes == (note_of(2),)
    joined = [make(slice(0, 60)), make(slice(60, 96))]
    assert parts_of(received[1]) == parts_of(joined[0])
    assert parts_of(received[-1]) == parts_of(joined[1])


# name: inputs and labels that are no tensors themselves; the model takes the first
NESTED: dict[str, Callable[[slice], Any]] = {
    "dicts": lambda rows: ({"x": samples()[rows]}, {"label": LABELS[rows]}),
    "named tuples": lambda rows: (Labelled(samples()[rows], LABELS[rows]), LABELS[rows].tolist()),
    "tuples": lambda rows: [(samples()[rows], LABELS[rows]), (LABELS[rows], LABELS[rows])],
}


@pytest.mark.parametrize("form", NESTED)
def test_a_small_last_batch_is_joined_or_refused_but_not_lost_in_pairs_of(form: str) -> None:
    def forward(model: nn.Module, batch: Any) -> None:
        inputs = batch[0]
        model(inputs["x"] if isinstance(inputs, dict) else inputs[0])

    model = used_net()
    batches = [NESTED[form](rows) for rows in (slice(0, 60), slice(60, 95), slice(95, 96))]
    before = snapshot(model)
    try:
        report = recompute_bn_stats(model, batches, forward=forward)
    except BatchNormError:
        assert snapshot(model) == before
    else:
        assert report.layers[0].n_elements == report.n_samples == N_SAMPLES
        assert_statistics(model.bn, samples())


class Opaque:
    """A batch of the user's own kind."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def first_row(model: nn.Module, batch: Tensor) -> object:
    return model(batch[:1] if len(batch) == 2 else batch)


# name: a large batch and one of one sample, forward, why they cannot be joined
APART: dict[str, tuple[Any, Any, Callable[[nn.Module, Any], object] | None, str]] = {
    "of other types": (
        samples()[:8], (samples()[8:9],), None, "other types"),
    "tuples of other lengths": (
        (samples()[:8], LABELS[:8]), (samples()[8:9],), None, "other lengths"),
    "dicts with other keys": (
        {"x": samples()[:8]}, {"x": samples()[8:9], "scale": 1.0}, None, "other keys"),
    "dicts with other values": (
        {"x": samples()[:8], "scale": 1.0}, {"x": samples()[8:9], "scale": 2.0}, None,
        "values that are no tensors"),
    "tensors of other shapes": (
        samples(1)[:8].movedim(1, 2), samples(1)[8:9, :, :1].movedim(1, 2),
        lambda model, x: model(x.movedim(1, 2).flatten(2).mean(2) if len(x) > 1 else x[:, 0]),
        "tensors of other shapes"),
    "objects": (
        Opaque(samples()[:8]), Opaque(samples()[8:9]), lambda model, batch: model(batch.x),
        "values that are no tensors"),
    "of two samples, of which the model takes one": (
        samples()[:8], samples()[8:10], first_row, "more than one sample"),
}  # fmt: skip


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("order", ["small last", "small first"])
def test_batches_are_an_error_that_cannot_be_joined(kind: str, order: str) -> None:
    large, small, forward, reason = APART[kind]
    model = used_net()
    before = snapshot(model)
    batches = [large, small] if order == "small last" else [small, large]
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(model, batches, forward=forward)
    assert str(caught.value) == (
        "layer 'bn' got a batch with 1 value per channel, which has no variance; use larger "
        "batches, or drop the last small one (it cannot be joined to the batch beside it: "
        f"{reason})"
    )
    assert snapshot(model) == before


def test_the_batch_of_the_user_is_not_changed_by_joining() -> None:
    batches = [[samples()[rows], LABELS[rows]] for rows in ROWS]
    before = [parts_of(batch) for batch in batches]
    recompute_bn_stats(used_net(), batches)
    assert [parts_of(batch) for batch in batches] == before


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_number_that_goes_with_a_batch_is_not_taken_for_its_samples(estimator: Estimator) -> None:
    model, expected, parts = used_net(), used_net(), split(samples(), [50, 30, 16])
    report = recompute_bn_stats(
        model, [{"scale": torch.tensor(1.0), "x": part} for part in parts], estimator=estimator
    )
    recompute_bn_stats(expected, parts, estimator=estimator)
    assert statistics(model) == statistics(expected)
    assert report.n_samples == N_SAMPLES


# ---- layers that are left alone ------------------------------------------------------------------


def test_layers_that_the_data_never_reaches_can_be_left_as_they_are() -> None:
    model = used_net()
    late = [buffer.clone() for buffer in model.late.buffers()]
    report = recompute_bn_stats(
        model,
        split(samples(), 32),
        forward=lambda model, x: model.get_submodule("bn")(x),
        allow_unreached=True,
    )
    assert_statistics(model.bn, samples())
    assert all(map(torch.equal, late, model.late.buffers()))
    assert [one.name for one in report.layers] == ["bn"]
    assert report.skipped == {
        "late": "was never reached by the data; its statistics are left as they were"
    }


def test_data_that_reaches_no_layer_at_all_can_be_allowed() -> None:
    model = used_net()
    before = snapshot(model)
    report = recompute_bn_stats(
        model, split(samples(), 32), forward=lambda model, x: None, allow_unreached=True
    )
    assert snapshot(model) == before
    assert report.layers == ()
    assert set(report.skipped) == {"bn", "late"}
    assert report.n_samples == N_SAMPLES


def test_layers_that_the_data_never_reaches_are_an_error_that_names_them() -> None:
    model = used_net()
    before = snapshot(model)
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(
            model,
            split(samples(), 32),
            forward=lambda model, x: model.get_submodule("late")(x[:, :4]),
        )
    assert str(caught.value) == "1 of 2 BatchNorm layers were never reached by the data: 'bn'"
    assert snapshot(model) == before


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's and detectron2's: buffers, and no way to change them."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(N_CHANNELS))
        self.register_buffer("running_var", torch.full((N_CHANNELS,), 9.0))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return (x - self.running_mean.reshape(shape)) / self.running_var.reshape(shape).sqrt()


class RenormLayer(FrozenBatchNorm2d):
    """Of a kind that ckptavg does not know."""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (FrozenBatchNorm2d, "is frozen: a FrozenBatchNorm2d"),
        (
            RenormLayer,
            "is a RenormLayer, of no kind that is known; its statistics are left alone",
        ),
    ],
)
@pytest.mark.parametrize("train_mode", ["bn", "model"])
def test_modules_of_other_kinds_keep_their_statistics_and_are_reported(
    kind: type[FrozenBatchNorm2d], reason: str, train_mode: TrainMode
) -> None:
    other, live = kind(), nn.BatchNorm2d(N_CHANNELS)
    values = samples(2)
    report = recompute_bn_stats(
        nn.Sequential(other, live), split(values, 32), train_mode=train_mode
    )
    assert report.skipped == {"0": reason}
    assert other.running_mean.tolist() == [0.0] * N_CHANNELS
    assert other.running_var.tolist() == [9.0] * N_CHANNELS
    assert_statistics(live, other(values))


def test_a_model_of_frozen_layers_only_is_not_run_and_says_so() -> None:
    def forward(model: nn.Module, batch: object) -> None:
        raise AssertionError("there is nothing to compute")

    report = recompute_bn_stats(
        nn.Sequential(FrozenBatchNorm2d()), split(samples(2), 32), forward=forward
    )
    assert (report.layers, report.n_batches) == ((), 0)
    assert report.skipped == {"0": "is frozen: a FrozenBatchNorm2d"}


# ---- wrapped models ------------------------------------------------------------------------------


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """Start a process group of this process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_inside(model: nn.Module) -> nn.Module:
    """Compile only a layer, as a part of the model."""
    model.get_submodule("bn").compile(backend="eager")
    return model


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": compiled,
    "module.compile": compiled_in_place,
    "module.compile of a layer": compiled_inside,
    "DataParallel": lambda model: nn.DataParallel(model),
    "AveragedModel": lambda model: AveragedModel(model),
    "AveragedModel of torch.compile": lambda model: AveragedModel(compiled(model)),
    "torch.compile of DataParallel": lambda model: compiled(nn.DataParallel(model)),
}


def assert_as_plain(wrapped: nn.Module) -> None:
    expected = used_net().eval()
    batches = split(samples(), [40, 55, 1])
    recompute_bn_stats(wrapped, split(3 - samples(), [40, 56]))  # code of this pass may be kept
    report = recompute_bn_stats(wrapped, batches)
    recompute_bn_stats(expected, batches)
    assert statistics(wrapped) == statistics(expected)
    assert [one.name.split(".")[-1] for one in report.layers] == ["bn", "late"]


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("was_run", [True, False])
def test_statistics_are_those_of_the_plain_model_when_wrapped_by(how: str, was_run: bool) -> None:
    wrapped = WRAPPERS[how](used_net().eval())
    if was_run:
        with torch.no_grad():
            wrapped(samples())  # then there is code that was compiled already
    assert_as_plain(wrapped)
    with torch.no_grad():  # and it still runs afterwards
        expected = used_net().eval()
        recompute_bn_stats(expected, split(samples(), [40, 55, 1]))
        torch.testing.assert_close(wrapped(samples()), expected(samples()))


@pytest.mark.parametrize("which", ["the model", "a part of the model", "a function"])
def test_code_that_the_user_compiled_is_not_compiled_for_the_pass(which: str) -> None:
    n_graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        n_graphs.append(1)
        return graph.forward

    model, expected = shapes(), shapes()
    outer = nn.Sequential(nn.Identity(), model)
    halved: Callable[[Tensor], Tensor] = lambda x: x / 2  # noqa: E731 - one that can be replaced
    if which == "the model":
        outer.compile(backend=backend)
    elif which == "a part of the model":
        model.compile(backend=backend)
    else:
        halved = torch.compile(halved, backend=backend)

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(halved(2 * batch))

    recompute_bn_stats(expected, split(samples(2), 32))
    recompute_bn_stats(outer, split(samples(2), 32), forward=forward)
    assert statistics(outer) == statistics(expected)
    assert n_graphs == []
    with torch.no_grad():
        forward(outer, samples(2))
    assert n_graphs  # compiled as ever when used again


@pytest.mark.usefixtures("gloo")
def test_statistics_are_those_of_the_plain_model_when_wrapped_by_ddp() -> None:
    assert_as_plain(nn.parallel.DistributedDataParallel(used_net().eval()))


def test_layers_of_a_wrapped_model_have_the_names_that_its_checkpoints_have() -> None:
    for wrapper in (WRAPPERS["torch.compile"], WRAPPERS["DataParallel"], WRAPPERS["AveragedModel"]):
        report = recompute_bn_stats(wrapper(used_net()), split(samples(), 32))
        assert [one.name for one in report.layers] == ["bn", "late"]


def test_a_custom_forward_gets_the_model_that_was_wrapped() -> None:
    model = used_net()
    received: list[nn.Module] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        received.append(model)
        model(batch)

    wrapped = WRAPPERS["torch.compile of DataParallel"](model)
    recompute_bn_stats(wrapped, split(samples(), 32), forward=forward)
    assert all(one is model for one in received)
    assert len(received) == 3


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm's: an activation behind the layer, in the same module."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x))


@pytest.mark.usefixtures("gloo")
def test_synchronised_layers_run_alone_inside_a_process_group() -> None:
    layer, values = nn.SyncBatchNorm(N_CHANNELS), samples(2)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        layer.train()(values)  # by itself it would look for the others
    recompute_bn_stats(nn.Sequential(layer), split(values, 17))
    assert_statistics(layer, values)
    assert "forward" not in vars(layer)


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.promise(14)
def test_the_forward_of_synchronised_layers_is_restored(fails: bool) -> None:
    plain, patched = nn.SyncBatchNorm(N_CHANNELS), nn.SyncBatchNorm(N_CHANNELS)
    own = functools.partial(nn.SyncBatchNorm.forward, patched)
    patched.forward = own  # type: ignore[method-assign]
    batches = split(samples(2), 32)
    if fails:
        with pytest.raises(BatchNormError):
            recompute_bn_stats(nn.Sequential(plain, patched), [*batches, 3])
    else:
        recompute_bn_stats(nn.Sequential(plain, patched), batches)
    assert "forward" not in vars(plain)
    assert vars(patched)["forward"] is own


@pytest.mark.usefixtures("gloo")
def test_an_activation_in_a_synchronised_layer_is_kept_inside_a_process_group() -> None:
    assert_activation_is_kept()


def test_an_activation_in_a_synchronised_layer_is_kept() -> None:
    assert_activation_is_kept()


def assert_activation_is_kept() -> None:
    model = nn.Sequential(SyncBatchNormAct(N_CHANNELS), nn.BatchNorm2d(N_CHANNELS))
    batches = split(samples(2), 24)
    recompute_bn_stats(model, batches)
    assert_statistics(model[0], samples(2))
    fresh = nn.BatchNorm2d(N_CHANNELS).train()
    with torch.no_grad():
        assert_statistics(model[1], [functional.relu(fresh(batch)) for batch in batches])


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("train_mode", ["bn", "model"])
def test_synchronised_layers_without_statistics_wait_for_nobody(train_mode: TrainMode) -> None:
    untracked = nn.SyncBatchNorm(N_CHANNELS, track_running_stats=False)
    live = nn.BatchNorm2d(N_CHANNELS)
    model = nn.Sequential(untracked, live).eval()
    batches = split(samples(2), 32)
    recompute_bn_stats(model, batches, train_mode=train_mode)
    fresh = nn.BatchNorm2d(N_CHANNELS).train()
    with torch.no_grad():
        assert_statistics(live, [fresh(batch) for batch in batches])


# ---- precision and layout ------------------------------------------------------------------------


def test_under_autocast_statistics_are_near_and_still_merged_in_float64() -> None:
    values = samples(2)
    batches = split(values, 6)
    model, expected, by_hand = shapes(), shapes(), shapes()
    report = recompute_bn_stats(model, batches, amp="bfloat16")
    recompute_bn_stats(expected, batches)
    assert statistics(model) != statistics(expected)
    for name, layer, exact in (("bn", model.bn, expected.bn), ("late", model.late, expected.late)):
        deviation = variance_of(exact).sqrt()
        assert float(((mean_of(layer) - mean_of(exact)).abs() / deviation).max()) < 0.02, name
        assert float((variance_of(layer) / variance_of(exact) - 1).abs().max()) < 0.02, name
        assert mean_of(layer).dtype == variance_of(layer).dtype == torch.float32
    assert all(math.isfinite(value) for values in statistics(model) for value in values)
    assert all(math.isfinite(one.mean_shift) for one in report.layers)
    # a bfloat16 sum of 16 batches would be wrong by far more than 1e-6
    seen = []
    by_hand.bn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].float()))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in batches:
            by_hand.train()(batch)
    assert_statistics(model.bn, seen)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast_is_on_during_the_pass_only(amp: Any) -> None:
    dtypes: list[torch.dtype] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        dtypes.append((batch[:, 0] @ batch[:, 0].mT).dtype)
        model(batch)

    recompute_bn_stats(nn.Sequential(nn.BatchNorm2d(5)), [samples(2)], forward=forward, amp=amp)
    assert dtypes == [getattr(torch, amp)]
    assert not torch.is_autocast_enabled("cpu")


class Volumes(nn.Module):
    """A convolution of volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(N_CHANNELS, 4, 2, padding=1)
        self.bn = nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


def volumes() -> Volumes:
    torch.manual_seed(2)
    return Volumes()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("make_model", "dims", "layout"),
    [(shapes, 2, torch.channels_last), (volumes, 3, torch.channels_last_3d)],
    ids=["images", "volumes"],
)
def test_channels_last_is_for_the_pass_only(
    make_model: Callable[[], Shapes | Volumes], dims: int, layout: torch.memory_format, fails: bool
) -> None:
    model, expected, batches = make_model(), make_model(), split(samples(dims), 32)
    during: list[bool] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        weight = model.get_parameter("conv.weight")
        during.append(
            weight.is_contiguous(memory_format=layout) and batch.is_contiguous(memory_format=layout)
        )
        if fails and len(during) == 3:
            raise KeyboardInterrupt
        model(batch)

    def weights() -> list[tuple[int, int, tuple[int, ...]]]:
        return [(id(one), one.data_ptr(), one.stride()) for one in model.parameters()]

    before, state = weights(), snapshot(model)
    assert not model.conv.weight.is_contiguous(memory_format=layout)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            recompute_bn_stats(model, batches, forward=forward, channels_last=True)
        assert snapshot(model) == state
    else:
        recompute_bn_stats(model, batches, forward=forward, channels_last=True)
        recompute_bn_stats(expected, batches)
        for one, other in zip(statistics(model), statistics(expected), strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-5)  # another order of summing
    assert during == [True] * 3
    assert weights() == before


# ---- compiled code -------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Forget what other tests compiled: torch compiles the same code a few times only."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiler:
    """Stands for ``torch.compile``: notes what it is given, and returns what it is told to."""

    def __init__(self, change: Callable[[nn.Module], nn.Module] = lambda model: model) -> None:
        self.change = change
        self.models: list[nn.Module] = []
        self.n_runs = 0

    def __call__(self, model: nn.Module, **options: object) -> nn.Module:
        self.models.append(model)
        changed = self.change(model)
        compiler = self

        class Compiled(nn.Module):
            def forward(self, *inputs: Any, **named: Any) -> object:
                compiler.n_runs += 1
                return changed(*inputs, **named)

        return Compiled()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    monkeypatch.setattr(torch, "compile", stand_in)
    return stand_in


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_code_gives_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model, expected = shapes(), shapes()
    batches = split(samples(2), [16, 16, 16, 8, 16, 8, 8, 8])  # two shapes
    report = recompute_bn_stats(model, batches, compile=True)
    reference = recompute_bn_stats(expected, batches)
    assert statistics(model) == statistics(expected)
    assert [one.n_elements for one in report.layers] == [one.n_elements for one in reference.layers]
    assert report.notes == ()
    assert int(model.bn.num_batches_tracked or 0) == 8


@pytest.mark.usefixtures("nothing_compiled")
def test_models_are_compiled_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    n_runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            n_runs[-1] += 1
            return graph.forward(*inputs)

        return run

    with torch.no_grad():
        compiled(shapes().eval())(samples(2))  # this may not keep later models from being compiled
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for _ in range(2):
        n_runs.append(0)
        recompute_bn_stats(shapes(), split(samples(2), 16), compile=True)
    assert n_runs[0] >= 5
    assert n_runs[1] >= 5


def test_code_is_compiled_for_shapes_seen_before_and_once(compiler: Compiler) -> None:
    model = shapes()
    recompute_bn_stats(model, split(samples(2), [16, 16, 16, 8, 16, 8, 16]), compile=True)
    assert compiler.models == [model]
    assert compiler.n_runs == 5


def test_nothing_is_compiled_unless_asked_or_needed(compiler: Compiler) -> None:
    recompute_bn_stats(shapes(), split(samples(2), 16))
    recompute_bn_stats(shapes(), split(samples(2), [50, 40, 6]), compile=True)
    assert compiler.models == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_gives_the_same_with_compiled_code(
    compiler: Compiler, estimator: Estimator
) -> None:
    model, expected = used_net(), used_net()
    batches = split(samples(), [30, 20, 30, 15, 1])
    report = recompute_bn_stats(model, batches, compile=True, estimator=estimator)
    recompute_bn_stats(expected, batches, estimator=estimator)
    assert statistics(model) == statistics(expected)
    assert report.notes == (note_of(1),)
    assert compiler.n_runs == 1


def reused(model: nn.Module, x: Tensor) -> None:
    model(x)
    model(x + 1)


@pytest.mark.parametrize(
    ("make_model", "forward", "reason"),
    [
        (
            lambda: nn.InstanceNorm2d(N_CHANNELS, track_running_stats=True),
            None,
            "InstanceNorm layers count by instances",
        ),
        (
            lambda: nn.BatchNorm2d(N_CHANNELS),
            reused,
            "layers are used several times in one forward",
        ),
        (
            lambda: nn.BatchNorm2d(N_CHANNELS).bfloat16(),
            lambda model, x: model(x.bfloat16()),
            "buffers do not hold what a layer saw",
        ),
    ],
    ids=["InstanceNorm", "a layer used twice", "16-bit buffers"],
)
def test_what_compiled_code_would_hide_runs_as_it_is_and_a_note_says_so(
    compiler: Compiler, make_model: Callable[[], nn.Module], forward: Any, reason: str
) -> None:
    model, expected = nn.Sequential(make_model()), nn.Sequential(make_model())
    batches = split(samples(2), 24)
    report = recompute_bn_stats(model, batches, forward=forward, compile=True)
    recompute_bn_stats(expected, batches, forward=forward)
    assert report.notes == (f"the model was not compiled: {reason}",)
    assert compiler.models == []
    for one, other in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(one, other)


# what else is in a batch, besides the input, that tells one from the other
EXTRAS: dict[str, Callable[[int], object]] = {
    "names": lambda index: [f"{index}.png"],
    "a number": lambda index: index,
    "a tensor of no dimension": lambda index: torch.tensor(index),
}


@pytest.mark.parametrize("what", EXTRAS)
def test_models_are_compiled_or_a_note_says_why_not_where_batches_differ_in(
    compiler: Compiler, what: str
) -> None:
    batches = [(part, EXTRAS[what](i)) for i, part in enumerate(split(samples(2), 24))]
    report = recompute_bn_stats(shapes(), batches, compile=True)
    assert compiler.n_runs or report.notes


def test_compiled_code_that_skips_a_layer_is_an_error(compiler: Compiler) -> None:
    def skipping(model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        return model[:1]

    compiler.change = skipping
    model = nn.Sequential(nn.BatchNorm2d(N_CHANNELS), nn.BatchNorm2d(N_CHANNELS))
    before = snapshot(model)
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(model, split(samples(2), 24), compile=True)
    assert str(caught.value) == (
        "layer '1' got other numbers of values than before from a batch of equal shape: what the "
        "model does depends on the data; leave out compile"
    )
    assert snapshot(model) == before


class Routed(nn.Module):
    """Takes another way for large values."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.BatchNorm1d(N_CHANNELS)
        self.high = nn.BatchNorm1d(N_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.high(x) if float(x[:, 0].mean()) > 3 else self.low(x)
        return out


class Masked(nn.Module):
    """Normalises some of the samples, as with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(N_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(x[x[:, 0] > 1])
        return out


class Halving(nn.Module):
    """Uses its layer once or, for large values, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(N_CHANNELS)

    def forward(self, x: Tensor) -> None:
        for part in split(x, len(x) // 2 if float(x[:, 0].mean()) > 3 else len(x)):
            self.bn(part)


LOW, HIGH = samples()[:24], samples()[-24:]
# name: model, batches, forward
HIDDEN: dict[str, tuple[Callable[[], nn.Module], list[Any], Any]] = {
    "another way for a shape seen before": (Routed, [LOW[:8], LOW[8:16], HIGH[:8]], None),
    "other ways that make up for each other": (
        Routed, [LOW[:8], HIGH[:9], HIGH[9:17], LOW[8:17]], None),
    "as many samples, of which others are masked": (Masked, list(split(samples(), 16)), None),
    "as many samples, for which a layer is used twice": (
        Halving, [LOW[:8], LOW[8:16], HIGH[:8], HIGH[8:16]], None),
    "objects of other sizes": (
        lambda: nn.Sequential(nn.BatchNorm1d(N_CHANNELS)),
        [Opaque(part) for part in split(samples(), [40, 30, 20, 6])],
        lambda model, batch: model(batch.x)),
    "numbers that say how much of a batch counts": (
        lambda: nn.Sequential(nn.BatchNorm1d(N_CHANNELS)),
        [{"x": part, "length": length} for part, length in
         zip(split(samples(), 24), (24, 12, 6, 3), strict=True)],
        lambda model, batch: model(batch["x"][: batch["length"]])),
}  # fmt: skip


@pytest.mark.parametrize("case", HIDDEN)
def test_compiled_code_gives_an_error_or_the_right_statistics_for(
    compiler: Compiler, case: str
) -> None:
    make_model, batches, forward = HIDDEN[case]
    model, expected = make_model(), make_model()
    reference = recompute_bn_stats(expected, batches, forward=forward, allow_unreached=True)
    before = snapshot(model)
    try:
        report = recompute_bn_stats(
            model, batches, forward=forward, allow_unreached=True, compile=True
        )
    except BatchNormError:
        assert snapshot(model) == before
    else:
        assert statistics(model) == statistics(expected)
        assert [one.n_elements for one in report.layers] == [
            one.n_elements for one in reference.layers
        ]


# ---- random numbers ------------------------------------------------------------------------------


def random_states() -> tuple[object, list[int], list[int]]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return (
        random.getstate(),
        [hash(kind), *map(int, keys), *map(int, rest)],
        (torch.get_rng_state().tolist()),
    )


def first_samples(loader: Iterable[Any], **options: Any) -> list[float]:
    """Return a number of each batch, in the order in which the pass gets them."""
    seen: list[float] = []

    def forward(model: nn.Module, batch: list[Tensor]) -> None:
        seen.append(float(batch[0][0, 0]))
        model(batch[0])

    recompute_bn_stats(used_net(), loader, forward=forward, **options)
    return seen


def test_equal_seeds_give_equal_orders_and_other_seeds_others() -> None:
    loader = DataLoader(TensorDataset(samples()), batch_size=12, shuffle=True)
    torch.manual_seed(10)
    first = first_samples(loader, seed=1)
    torch.manual_seed(20)
    assert first_samples(loader, seed=1) == first
    assert first_samples(loader, seed=2) != first
    assert first_samples(loader, seed=2**31 + 1) != first


def test_equal_seeds_give_equal_results() -> None:
    loader = DataLoader(TensorDataset(samples()), batch_size=12, shuffle=True)
    models = [used_net() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(7)
        recompute_bn_stats(model, loader, seed=seed, max_batches=4)
    assert statistics(models[0]) == statistics(models[1])
    assert statistics(models[0]) != statistics(models[2])


def test_a_seed_is_for_the_random_numbers_of_python_numpy_and_torch() -> None:
    def draws(seed: int) -> list[float]:
        drawn: list[float] = []

        def loader() -> Iterator[Tensor]:
            drawn.extend([random.random(), float(np.random.rand()), float(torch.rand(()))])
            yield samples()

        recompute_bn_stats(used_net(), loader(), seed=seed)
        return drawn

    first, other = draws(1), draws(2)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert draws(1) == first
    assert all(one != two for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", [None, 0, 7, 2**64 - 1])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.promise(14)
def test_random_states_are_restored(seed: int | None, error: type[BaseException] | None) -> None:
    def loader() -> Iterator[Tensor]:
        for part in split(samples(), 32):
            random.random()
            np.random.rand(3)
            yield part + torch.rand(())
        if error is not None:
            raise error

    model = used_net()
    before = random_states()
    if error is None:
        recompute_bn_stats(model, loader(), seed=seed)
    else:
        with pytest.raises(error):
            recompute_bn_stats(model, loader(), seed=seed)
    assert random_states() == before


# ---- convergence ---------------------------------------------------------------------------------


def noise(n_batches: int, size: int = 64) -> list[Tensor]:
    """Return batches of independent samples of one distribution."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(size, N_CHANNELS, generator=generator) for _ in range(n_batches)]


def one_layer() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(N_CHANNELS))


def test_nothing_is_known_of_convergence_after_a_single_batch() -> None:
    report = recompute_bn_stats(one_layer(), noise(1))
    assert report.convergence is None
    assert report.layers[0].late_change is None


@pytest.mark.parametrize(("n_batches", "share"), [(2, 0.5), (4, 0.25), (10, 0.1), (100, 0.1)])
def test_convergence_is_about_the_last_tenth_or_the_last_batch(
    n_batches: int, share: float
) -> None:
    convergence = recompute_bn_stats(one_layer(), noise(n_batches)).convergence
    assert convergence is not None
    # snapshots are 2 % apart
    assert share <= convergence.share + 1e-9 <= share + 0.03


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_independent_samples_change_little_at_the_end(estimator: Estimator) -> None:
    report = recompute_bn_stats(one_layer(), noise(100), estimator=estimator)
    assert report.convergence is not None
    # the mean of 640 of 6400 samples lies 0.04 from that of all, of which a tenth counts
    assert 0 < report.convergence.change < 0.03
    assert report.layers[0].late_change == report.convergence.change


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("channel", range(N_CHANNELS))
def test_a_drift_of_one_channel_at_the_end_is_told(estimator: Estimator, channel: int) -> None:
    batches = noise(50)
    for batch in batches[45:]:
        batch[:, channel] += 5
    report = recompute_bn_stats(one_layer(), batches, estimator=estimator)
    assert report.convergence is not None
    assert report.convergence.change > 0.2


def test_the_change_at_the_end_is_that_of_the_statistics() -> None:
    batches = noise(50)
    batches[48] += 2
    report = recompute_bn_stats(one_layer(), batches)
    assert report.convergence is not None
    n_before = round(50 * (1 - report.convergence.share))
    mean, variance = population(batches)
    old_mean, old_variance = population(batches[:n_before])
    shift = (mean - old_mean).abs() / variance.sqrt()
    change = max(float(shift.max()), float((1 - old_variance / variance).abs().max()))
    assert report.convergence.change == pytest.approx(change, rel=1e-4)  # eps is added to both


def test_every_layer_has_its_own_change_and_the_largest_counts() -> None:
    model = nn.Sequential(nn.BatchNorm1d(N_CHANNELS), nn.BatchNorm1d(N_CHANNELS))
    steady, drifting = noise(40), [batch + 10 * (i > 37) for i, batch in enumerate(noise(40))]
    report = recompute_bn_stats(
        model,
        list(zip(steady, drifting, strict=True)),
        forward=lambda _, pair: (model[0](pair[0]), model[1](pair[1])),
    )
    low, high = (one.late_change for one in report.layers)
    assert low is not None
    assert high is not None
    assert low < 0.05 < 0.5 < high
    assert report.convergence is not None
    assert report.convergence.change == high


class Pulled:
    """A loader that counts what was asked of it."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches, self.n_pulled = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            self.n_pulled += 1
            yield batch


def test_a_pass_until_converged_stops_early() -> None:
    loader, batches = Pulled(noise(200)), noise(200)
    layer = nn.BatchNorm1d(N_CHANNELS)
    report = recompute_bn_stats(nn.Sequential(layer), loader, until_converged=0.02)
    assert 10 <= report.n_batches < 100
    assert loader.n_pulled == report.n_batches
    assert_statistics(layer, batches[: report.n_batches])
    assert report.n_samples == 64 * report.n_batches
    assert report.notes == ()


@pytest.mark.parametrize("limit", [0.1, 0.05, 0.02, 0.01])
def test_a_pass_that_converged_reports_a_change_below_the_limit(limit: float) -> None:
    report = recompute_bn_stats(one_layer(), noise(200), until_converged=limit)
    assert report.n_batches < 200
    assert report.convergence is not None
    assert report.convergence.change < limit


def test_a_stricter_limit_takes_more_batches() -> None:
    counts = [
        recompute_bn_stats(one_layer(), noise(200), until_converged=limit).n_batches
        for limit in (0.3, 0.01, 0.003)
    ]
    assert counts == sorted(set(counts))


def test_convergence_is_not_believed_before_ten_batches() -> None:
    loader = Pulled([noise(1)[0]] * 50)  # nothing ever changes
    report = recompute_bn_stats(one_layer(), loader, until_converged=0.9)
    assert report.n_batches == 10
    assert loader.n_pulled == 10


@pytest.mark.parametrize("n_batches", [1, 3, 30])
def test_data_that_ends_before_it_converged_is_used_whole_and_a_note_says_so(
    n_batches: int,
) -> None:
    layer, batches = nn.BatchNorm1d(N_CHANNELS), noise(n_batches)
    report = recompute_bn_stats(nn.Sequential(layer), batches, until_converged=1e-6)
    assert_statistics(layer, batches)
    assert report.n_batches == n_batches
    assert report.notes == ("the pass ended before the statistics changed by less than 1e-06",)


# in the first two the batches before the last seem enough, until the last is in as well
@pytest.mark.parametrize(("limit", "n_batches"), [(0.02, 10), (0.01, 31), (1e-6, 20), (1e-6, 3)])
def test_one_sample_at_the_end_is_joined_when_looking_for_convergence(
    limit: float, n_batches: int
) -> None:
    layer, batches = nn.BatchNorm1d(N_CHANNELS), [*noise(n_batches), samples()[:1]]
    report = recompute_bn_stats(nn.Sequential(layer), batches, until_converged=limit)
    assert report.n_batches == n_batches + 1
    assert_statistics(layer, batches)


def test_data_that_drifts_does_not_stop_a_pass() -> None:
    batches = [batch + 3 * index for index, batch in enumerate(noise(30))]
    report = recompute_bn_stats(one_layer(), batches, until_converged=0.05)
    assert report.n_batches == 30
    assert len(report.notes) == 1


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_batch", [1, 3])
@pytest.mark.promise(14)
def test_running_out_of_memory_names_the_batch_and_leaves_the_model_as_before(
    n_batch: int,
) -> None:
    seen: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(1)
        if len(seen) == n_batch:
            model.get_submodule("bn")(batch)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        model(batch)

    model = used_net()
    before = snapshot(model)
    with pytest.raises(BatchNormError) as caught:
        recompute_bn_stats(model, split(samples(), 16), forward=forward)
    assert str(caught.value) == (
        f"cpu: out of memory in batch {n_batch}; use smaller batches, or amp (--amp bfloat16)"
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert snapshot(model) == before


NONSENSE: list[tuple[str, Any, str]] = [
    ("estimator", "mean", "estimator: 'mean' is not one of population, paper, torch"),
    ("estimator", "", "estimator: '' is not one of population, paper, torch"),
    ("train_mode", "eval", "train_mode: 'eval' is not one of bn, model"),
    ("train_mode", True, "train_mode: 'True' is not one of bn, model"),
    ("amp", "float32", "amp: 'float32' is not one of bfloat16, float16"),
    ("amp", "", "amp: '' is not one of bfloat16, float16"),
    ("max_batches", 0, "max_batches is 0, expected at least 1"),
    ("max_batches", -1, "max_batches is -1, expected at least 1"),
    ("max_samples", 0, "max_samples is 0, expected at least 1"),
    ("max_samples", -5, "max_samples is -5, expected at least 1"),
    ("until_converged", 0, "until_converged is 0, expected a share such as 0.01"),
    ("until_converged", 0.0, "until_converged is 0.0, expected a share such as 0.01"),
    ("until_converged", -0.1, "until_converged is -0.1, expected a share such as 0.01"),
    ("until_converged", 1.0, "until_converged is 1.0, expected a share such as 0.01"),
    ("until_converged", math.nan, "until_converged is nan, expected a share such as 0.01"),
    ("seed", -1, f"seed is -1, expected 0 to {2**64 - 1}"),
    ("seed", 2**64, f"seed is {2**64}, expected 0 to {2**64 - 1}"),
    ("until_converged", math.inf, "until_converged is inf, expected a share such as 0.01"),
]


@pytest.mark.parametrize(("name", "value", "message"), NONSENSE)
def test_options_that_make_no_sense_are_refused_before_any_batch(
    name: str, value: Any, message: str
) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(UsageError) as caught:
        BnOptions(**options)
    assert str(caught.value) == message
    loader, model = Pulled(split(samples(), 32)), used_net()
    before = snapshot(model)
    with pytest.raises(UsageError) as caught:
        recompute_bn_stats(model, loader, **options)
    assert str(caught.value) == message
    assert loader.n_pulled == 0
    assert snapshot(model) == before


def test_options_are_refused_that_do_not_exist() -> None:
    with pytest.raises(TypeError, match="momentum"):
        BnOptions(momentum=0.1)  # type: ignore[call-arg]


# ---- loaders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [32, 19, 1])
def test_the_lists_of_a_dataloader_are_batches(batch_size: int) -> None:
    loader = DataLoader(
        TensorDataset(samples(), LABELS), batch_size=batch_size, shuffle=True, pin_memory=False
    )
    assert isinstance(next(iter(loader)), list)
    model = used_net()
    report = recompute_bn_stats(model, loader)
    assert_statistics(model.bn, samples())
    assert report.n_batches == math.ceil(N_SAMPLES / batch_size)
    assert report.n_samples == N_SAMPLES
    assert report.notes == {32: (), 19: (note_of(1),), 1: (note_of(48),)}[batch_size]


class Clock:
    """Stands still, but for what it is told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock()
    monkeypatch.setattr(time, "perf_counter", stand_in)
    monkeypatch.setattr("ckptavg.batchnorm.batches.perf_counter", stand_in)
    return stand_in


def timed_pass(clock: Clock, *, of_loader: float, of_model: float) -> Any:
    def loader() -> Iterator[Tensor]:
        for part in split(samples(), 32):
            clock.seconds += of_loader
            yield part

    def forward(model: nn.Module, batch: Tensor) -> None:
        clock.seconds += of_model
        model(batch)

    return recompute_bn_stats(used_net(), loader(), forward=forward)


def test_the_time_that_a_loader_takes_is_told(clock: Clock) -> None:
    report = timed_pass(clock, of_loader=3.0, of_model=1.0)
    assert (report.wait_seconds, report.seconds) == (9.0, 12.0)
    assert report.notes == (
        "the pass waited for the data 75% of its time: more workers of the loader would make it "
        "faster",
    )


def test_a_fast_loader_or_a_short_pass_needs_no_note(clock: Clock) -> None:
    report = timed_pass(clock, of_loader=1.0, of_model=3.0)
    assert (report.wait_seconds, report.seconds) == (3.0, 12.0)
    assert report.notes == ()
    report = timed_pass(clock, of_loader=0.25, of_model=0.0)
    assert (report.wait_seconds, report.seconds) == (0.75, 0.75)
    assert report.notes == ()


def test_what_a_loader_does_to_begin_counts_as_waiting(clock: Clock) -> None:
    class Slow:
        def __iter__(self) -> Iterator[Tensor]:
            clock.seconds += 8.0  # starts its workers
            return iter(split(samples(), 32))

    report = recompute_bn_stats(used_net(), Slow())
    assert (report.wait_seconds, report.seconds) == (8.0, 8.0)


def test_models_other_than_the_first_are_run_alike() -> None:
    loader = DataLoader(TensorDataset(samples()), batch_size=32)  # goes round more than once
    models = [Net(), Net()]
    for model in models:
        recompute_bn_stats(model, loader)
        assert_statistics(model.bn, samples())


# ---- what models and loaders do in their own way -------------------------------------------------


class GhostBatchNorm(nn.BatchNorm1d):
    """Normalises every eighth of a batch by itself, and so leaves the last one's statistics."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([nn.BatchNorm1d.forward(self, part) for part in input.chunk(8)])


@pytest.mark.parametrize("compile", [False, True])
def test_a_layer_that_leaves_something_else_in_its_buffers_is_watched_at_its_input(
    compiler: Compiler,
    compile: bool,
) -> None:
    layer = GhostBatchNorm(N_CHANNELS)
    report = recompute_bn_stats(nn.Sequential(layer), split(samples(), 48), compile=compile)
    assert_statistics(layer, samples())
    note = "the model was not compiled: buffers do not hold what a layer saw"
    assert report.notes == ((note,) if compile else ())


def test_a_loader_that_uses_the_memory_of_a_batch_again_is_not_joined_to_itself() -> None:
    memory, values = torch.empty(40, N_CHANNELS), samples()

    def loader() -> Iterator[Tensor]:
        for part in split(values, [40, 40, 15, 1]):
            memory[: len(part)] = part
            yield memory[: len(part)]

    model = used_net()
    before = snapshot(model)
    with pytest.raises(BatchNormError, match="uses the memory of one batch for the next"):
        recompute_bn_stats(model, loader())
    assert snapshot(model) == before


@pytest.mark.promise(14)
def test_buffers_that_cannot_be_written_do_not_keep_others_from_being_restored() -> None:
    model = used_net()
    model.register_buffer("mask", torch.zeros(1).expand(4))
    model.register_buffer("after", torch.ones(2))
    before = snapshot(model)
    with pytest.raises(StopError):
        recompute_bn_stats(model, split(samples(), 32), progress=raising_progress)
    assert snapshot(model) == before
    recompute_bn_stats(model, split(samples(), 32))
    assert_statistics(model.bn, samples())


def test_a_small_batch_is_not_lost_where_the_users_forward_catches_errors() -> None:
    def forward(model: nn.Module, batch: Tensor) -> None:
        with contextlib.suppress(Exception):
            model(batch)

    layer = nn.BatchNorm1d(N_CHANNELS)
    recompute_bn_stats(nn.Sequential(layer), split(samples(), [60, 35, 1]), forward=forward)
    assert_statistics(layer, samples())


def test_tensors_of_other_dtypes_are_not_cast_to_be_joined() -> None:
    batches = [torch.ones(4, N_CHANNELS, dtype=torch.int64), samples()[:1]]
    with pytest.raises(BatchNormError, match="tensors of other dtypes"):
        recompute_bn_stats(used_net(), batches, forward=lambda model, x: model(x.float()))


def test_the_report_tells_the_options_that_are_not_the_default() -> None:
    report = recompute_bn_stats(
        used_net(), split(samples(), 32), amp="bfloat16", max_batches=2, seed=3
    )
    assert report.options == {"amp": "bfloat16", "max_batches": 2, "seed": 3}


@pytest.mark.parametrize("limit", ["max_batches", "max_samples"])
@pytest.mark.parametrize("value", [2.5, True, "3"])
def test_limits_are_whole_numbers(limit: str, value: Any) -> None:
    options: dict[str, Any] = {limit: value}
    with pytest.raises(UsageError, match=f"^{limit} is {value}, expected at least 1$"):
        BnOptions(**options)
