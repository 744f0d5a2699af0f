"""BatchNorm statistics of one model, recomputed exactly over batches of data.

After averaging weights, the running statistics of BatchNorm layers belong to no network: they must
be computed anew with one pass over the training data (Izmailov et al. 2018, Section 3.2).

The estimator is the population's: the mean and unbiased variance of all elements of all batches,
as if they had been one batch for each layer's own statistics. A BatchNorm layer with momentum 1
leaves the mean and unbiased variance of each batch in its buffers at no extra cost; they are
merged in float64 with their element counts (Chan, Golub & LeVeque 1979, "Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", equations 2.1a and 2.1b)::

    delta = mean_b - mean_a
    mean  = mean_a + delta * n_b / n
    M2    = M2_a + M2_b + delta^2 * n_a * n_b / n          (variance = M2 / (n - 1))

The last term is the variance between batches, which the authors' routine and
``torch.optim.swa_utils.update_bn`` leave out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ckptavg.errors import BatchNormError, UsageError

Forward = Callable[[nn.Module, Any], object]
BnProgress = Callable[[int], None]  # called with the samples done since the last call


@dataclass(frozen=True, slots=True)
class BnLayerReport:
    """How far the statistics of one layer moved.

    Attributes:
        name: Module name in the model.
        n_features: Number of channels.
        n_elements: Elements per channel that went in.
        mean_shift: Largest change of ``running_mean`` over the channels, in new standard
            deviations.
        variance_ratio: Smallest and largest ratio of new to old ``running_var``.
    """

    name: str
    n_features: int
    n_elements: int
    mean_shift: float
    variance_ratio: tuple[float, float]


@dataclass(frozen=True, slots=True)
class BnReport:
    """What a pass over batches did.

    Attributes:
        layers: The layers recomputed, in the order of the model.
        n_batches: Batches used.
        n_samples: Samples used.
        skipped: Module name -> why its statistics were left alone, as in "is frozen".
        seconds: Wall time.
    """

    layers: tuple[BnLayerReport, ...]
    n_batches: int
    n_samples: int
    skipped: Mapping[str, str]
    seconds: float


def recompute_bn_stats(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    max_samples: int | None = None,
    progress: BnProgress | None = None,
) -> BnReport:
    """Replace the running statistics of every BatchNorm layer by those of the given batches.

    Only BatchNorm layers run in training mode, so dropout stays off. Layers that the user froze
    (in evaluation mode inside a model in training mode, or with ``track_running_stats`` turned
    off) are left alone. Training modes, momenta, hooks, torch's random state and all buffers but
    the statistics are as before when this returns or raises; if it raises, so are the statistics.

    Args:
        model: Any module; runs where its parameters are.
        batches: Yields a tensor, a tuple or list (its first item is the input), a mapping
            (keyword arguments), or anything that ``forward`` takes. Moved to the model's device.
        forward: ``forward(model, batch)`` runs the model and leaves its training modes alone;
            None calls it as described above.
        max_batches: Use at most so many batches; None uses all.
        max_samples: Stop after the batch that reaches so many samples; None uses all.
        progress: Called with the samples of each batch.

    Returns:
        How far each layer moved. Without BatchNorm layers, a report without layers.

    Raises:
        BatchNormError: If there are no batches, a batch has one value per channel, a layer is
            never reached, a statistic is not finite or does not fit the dtype of its buffer, or
            ``max_samples`` is given and a batch does not tell its size.
        UsageError: If ``max_batches`` or ``max_samples`` is less than 1.
    """
    for option, value in (("max_batches", max_batches), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise UsageError(f"{option} is {value}, expected at least 1")
    layers, skipped = _layers_to_update(model)
    started = time.perf_counter()
    if not layers:
        return BnReport((), 0, 0, skipped, time.perf_counter() - started)
    run = forward or _default_forward
    device = next(iter(layers.values())).running_mean.device  # type: ignore[union-attr]  # tracked
    n_batches = n_samples = 0
    # not inference_mode: whatever the model or the loader caches would be unfit for training
    with _restored_on_exit(model, layers), torch.no_grad():
        pooled = _PooledStatistics(layers)
        with pooled.observing():
            for batch in islice(batches, max_batches):
                batch = _to_device(batch, device)
                run(model, batch)
                pooled.merge_pending()
                n_batches += 1
                count = _batch_size(batch)
                if max_samples is not None and count == 0:
                    raise BatchNormError(
                        f"a batch is a {type(batch).__name__}, whose samples cannot be counted; "
                        "use max_batches (--batches) instead of max_samples (--samples)"
                    )
                n_samples += count
                if progress is not None:
                    progress(count)
                if max_samples is not None and n_samples >= max_samples:
                    break
        if n_batches == 0:
            raise BatchNormError("no batches: BatchNorm statistics need data")
        statistics = pooled.finish()
    reports = tuple(
        _store(name, layer, statistics[name], n_batches) for name, layer in layers.items()
    )
    return BnReport(reports, n_batches, n_samples, skipped, time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class _Statistics:
    mean: Tensor  # float64, (channels,)
    variance: Tensor  # float64, (channels,), unbiased
    n_elements: int


class _PooledStatistics:
    """Count, mean and M2 of every channel of every layer, in one float64 vector each."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._layers = layers
        self._device = next(iter(layers.values())).running_mean.device  # type: ignore[union-attr]
        ends = torch.tensor([layer.num_features for layer in layers.values()]).cumsum(0).tolist()
        self._place = {
            name: slice(end - layer.num_features, end)
            for (name, layer), end in zip(layers.items(), ends, strict=True)
        }
        self._mean = torch.zeros(ends[-1], dtype=torch.float64, device=self._device)
        self._m2 = torch.zeros_like(self._mean)
        self._counts = dict.fromkeys(layers, 0)
        self._pending: dict[str, tuple[int, Tensor, Tensor]] = {}

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Watch every call of every layer; the hooks are gone afterwards."""
        handles = []
        try:
            for name, layer in self._layers.items():
                before, after = self._before(name, layer), self._after(name, layer)
                handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(layer.register_forward_hook(after, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, layer: _BatchNorm) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not layer.training:
                raise BatchNormError(
                    f"layer '{name}' was put into evaluation mode during the pass; forward must "
                    "leave the training modes alone"
                )
            if name in self._pending:  # used twice in one forward: the buffers are overwritten
                self.merge_pending()
            count = _only_input(inputs, named).numel() // layer.num_features
            if count < 2:
                raise BatchNormError(
                    f"layer '{name}' got a batch with {count or 'no'} value per channel, which has "
                    "no variance; use larger batches, or drop the last small one"
                )

        return hook

    def _after(self, name: str, layer: _BatchNorm) -> Callable[..., None]:
        def hook(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            values = _only_input(inputs, named)
            count = values.numel() // layer.num_features
            if layer.running_mean.dtype in (torch.float16, torch.bfloat16):  # type: ignore[union-attr]
                # 16-bit buffers cannot hold a batch's statistics: take them from the input
                dims = [dim for dim in range(values.dim()) if dim != 1]
                variance, mean = torch.var_mean(values.double(), dims)
            else:
                mean, variance = layer.running_mean, layer.running_var  # type: ignore[assignment]
            self._pending[name] = (count, mean, variance)

        return hook

    def merge_pending(self) -> None:
        """Merge what the layers saw since the last call, all of them in a few operations."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        sizes = [self._layers[name].num_features for name in pending]
        mean_b = self._joined([mean for _, mean, _ in pending.values()])
        variance_b = self._joined([variance for _, _, variance in pending.values()])
        n_b = _repeat([count for count, _, _ in pending.values()], sizes, self._device)
        n_a = _repeat([self._counts[name] for name in pending], sizes, self._device)
        everything = list(pending) == list(self._layers)
        where: Any = (
            slice(None)
            if everything
            else torch.cat(
                [torch.arange(place.start, place.stop) for place in map(self._place.get, pending)]  # type: ignore[union-attr]
            ).to(self._device)
        )
        mean_a, m2_a = self._mean[where], self._m2[where]
        total = n_a + n_b
        delta = mean_b - mean_a
        self._mean[where] = mean_a + delta * (n_b / total)
        self._m2[where] = m2_a + variance_b * (n_b - 1) + delta * delta * (n_a * n_b / total)
        for name, (count, _, _) in pending.items():
            self._counts[name] += count

    def finish(self) -> dict[str, _Statistics]:
        """Return the pooled statistics of every layer.

        Raises:
            BatchNormError: If a layer was never reached, or a statistic is not finite or does not
                fit the dtype of its buffer.
        """
        unreached = [f"'{name}'" for name, count in self._counts.items() if count == 0]
        if unreached:
            more = ", ..." if len(unreached) > 3 else ""
            raise BatchNormError(
                f"{len(unreached)} of {len(self._layers)} BatchNorm layers were never reached by "
                f"the data: {', '.join(unreached[:3])}{more}"
            )
        return {name: self._finished(name, place) for name, place in self._place.items()}

    def _finished(self, name: str, place: slice) -> _Statistics:
        layer, count = self._layers[name], self._counts[name]
        mean, variance = self._mean[place].clone(), self._m2[place] / (count - 1)
        bad = _n_nonfinite(mean, variance)
        if bad:
            raise BatchNormError(
                f"layer '{name}': {bad} of {layer.num_features} channels have non-finite "
                "statistics; the data or the weights hold infinity or NaN"
            )
        dtype = layer.running_var.dtype  # type: ignore[union-attr]  # tracked
        bad = _n_nonfinite(mean.to(dtype), variance.to(dtype))
        if bad:
            raise BatchNormError(
                f"layer '{name}': {bad} of {layer.num_features} channels have statistics too large "
                f"for the {str(dtype).removeprefix('torch.')} of its buffers"
            )
        return _Statistics(mean, variance, count)

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.to(self._device, torch.float64) for tensor in tensors])


def _repeat(values: list[int], sizes: list[int], device: torch.device) -> Tensor:
    counts = torch.tensor(values, dtype=torch.float64)
    return counts.repeat_interleave(torch.tensor(sizes)).to(device, non_blocking=True)


def _only_input(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    value: Tensor = inputs[0] if inputs else named["input"]
    return value


def _n_nonfinite(mean: Tensor, variance: Tensor) -> int:
    return int((~(torch.isfinite(mean) & torch.isfinite(variance))).sum())


def _layers_to_update(model: nn.Module) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    layers: dict[str, _BatchNorm] = {}
    skipped: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if layer.running_mean is None:
            skipped[name] = "keeps no running statistics"
        elif not layer.track_running_stats:  # turned off later: it uses them, but never updates
            skipped[name] = "is frozen: track_running_stats is off"
        elif model.training and not layer.training:
            skipped[name] = "is frozen: in evaluation mode inside a model in training mode"
        elif is_lazy(layer.running_mean):
            raise BatchNormError(f"layer '{name}' is lazy and was never run: run one batch first")
        else:
            layers[name] = layer
    return layers, skipped


@contextmanager
def _restored_on_exit(model: nn.Module, layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Put the model into the state for the pass; put everything back, whatever happens.

    The statistics, too: the caller stores the new ones once they are complete. Modes are set by
    attribute, there and back, because ``eval`` of a user's module may do more than that.
    """
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers.values()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            for module, _ in modes:
                module.training = False
            for layer in layers.values():
                layer.training = True
                layer.momentum = 1.0  # the buffers then hold the last batch's statistics
                layer.reset_running_stats()  # 0 x NaN would be NaN
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                setattr(module, name, buffer)


def _store(name: str, layer: _BatchNorm, new: _Statistics, n_batches: int) -> BnLayerReport:
    """Put the pooled statistics into a layer's buffers and say how far they moved."""
    old_mean, old_variance = layer.running_mean.double(), layer.running_var.double()  # type: ignore[union-attr]
    mean, variance = new.mean.to(old_mean.device), new.variance.to(old_mean.device)
    shift = (mean - old_mean).abs() / (variance + layer.eps).sqrt()
    ratio = (variance + layer.eps) / (old_variance + layer.eps)
    layer.running_mean.copy_(mean)  # type: ignore[union-attr]
    layer.running_var.copy_(variance)  # type: ignore[union-attr]
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(n_batches)
    return BnLayerReport(
        name=name,
        n_features=layer.num_features,
        n_elements=new.n_elements,
        mean_shift=float(shift.max()),
        variance_ratio=(float(ratio.min()), float(ratio.max())),
    )


def _default_forward(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise BatchNormError("a batch is an empty tuple or list")
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise BatchNormError(
        f"a batch is a {type(batch).__name__}, expected a tensor, a tuple, a list or a mapping; "
        "say how to run the model with forward (--forward)"
    )


def _to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor in nested tuples, lists and mappings to a device; types stay."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, MutableMapping):
        moved = copy.copy(batch)  # transformers' BatchEncoding.to would change the user's own
        for key, value in batch.items():
            moved[key] = _to_device(value, device)
        return moved
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(item, device) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to_device(item, device) for item in batch)
    if hasattr(batch, "to") and callable(batch.to):  # PyTorch Geometric's Data and the like
        return batch.to(device)
    return batch


def _batch_size(batch: Any) -> int:
    """Return the length of the first tensor in a batch; 0 if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    items = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(items, (tuple, list)) or isinstance(batch, Mapping):
        return next((size for size in map(_batch_size, items) if size), 0)
    return 0
