"""One way through the batches: what the layers saw, merged; what all processes found, together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ckptavg.batchnorm.batches import Batch, Feed, joined
from ckptavg.batchnorm.kept import ready_for_pass
from ckptavg.batchnorm.layers import NormLayer
from ckptavg.batchnorm.moments import BatchMoments, Moments
from ckptavg.batchnorm.observer import Observer, TooSmallError
from ckptavg.batchnorm.report import BnConvergence, BnLayerReport
from ckptavg.bn_options import BnOptions
from ckptavg.errors import BatchNormError

BnProgress = Callable[[int], None]  # called with the samples done since the last call
Makes = Callable[[], Iterable[Any]]

_FEWEST_BATCHES = 10  # before convergence is believed


class Collection:
    """What a pass found, of one process and, once theirs is added, of the others.

    Attributes:
        n_batches, n_samples, wait_seconds, copy_seconds: What went in, and what it waited for.
        late_changes: Layer name -> how far the end of the pass moved it.
        convergence: The largest of them; None if unknown.
        notes: What the user should know.
    """

    def __init__(self, layers: Mapping[str, NormLayer], options: BnOptions) -> None:
        """Begin with nothing."""
        self._layers = layers
        self._options = options
        self._moments = Moments(layers, options.estimator)
        self._amount = 0.0  # samples merged, or batches where samples cannot be counted
        self.n_batches = self.n_samples = 0
        self.wait_seconds = self.copy_seconds = 0.0
        self.late_changes: dict[str, float] = {}
        self.convergence: BnConvergence | None = None
        self.notes: list[str] = []

    def collect(
        self, model: nn.Module, batches: Makes, rank: int, size: int, progress: BnProgress | None
    ) -> None:
        """Run the model on this process's batches; it is as before afterwards.

        Raises:
            BatchNormError: If a batch cannot be used, or the device runs out of memory.
            Exception: Whatever the model, the data or ``progress`` raises.
        """
        collect_side_by_side([(model, self)], batches, progress, rank=rank, size=size)

    def begin(self, model: nn.Module, stack: ExitStack) -> None:
        """Make a model ready; it is as before when ``stack`` ends."""
        stack.enter_context(ready_for_pass(model, self._layers, self._options))
        self._observer = Observer(model, self._layers, self._options, self._moments.device)
        stack.enter_context(self._observer)
        self._done: tuple[Batch, list[BatchMoments]] | None = None
        self._small: tuple[Batch, TooSmallError] | None = None
        self._n_joined = 0
        self.is_over = False

    def take(self, batch: Batch, feed: Feed) -> None:
        """Run the model on a batch, and merge the one before: until then another may join it."""
        if self._small is not None:
            batch = _join(*self._small, self._small[0], batch, feed)
            self._small, self._n_joined = None, self._n_joined + 1
        try:
            seen = self._observer.observe(batch)
        except TooSmallError as error:
            self._small = batch, error
        else:
            if self._done is not None:
                self._merge(*self._done)
            self._done = replace(batch, on_device=None), seen
        if self._done is None or self._small is not None:  # which may still be joined to it
            return
        if self._has_converged(feed.n_batches):
            state, amount = self._moments.state(), self._amount
            self._merge(*self._done)
            if self._has_converged(feed.n_batches):  # the newest batch tells nothing else
                self._done, self.is_over = None, True
                self.n_batches, self.n_samples = feed.n_batches, feed.n_samples
                return
            self._moments.restore(state)  # another may join it
            self._amount = amount

    def end(self, feed: Feed) -> None:
        """Merge what is left once there are no more batches, and take over the feed's counts.

        Raises:
            BatchNormError: If a batch is too small and cannot be joined to another.
        """
        if not self.is_over and self._options.until_converged is not None:
            self.notes.append(
                f"the pass ended before the statistics changed by less than "
                f"{self._options.until_converged:g}"
            )
        if self._small is not None:
            if self._done is None:
                raise self._small[1]
            batch = _join(*self._small, self._done[0], self._small[0], feed)
            self._done, self._n_joined = (batch, self._observer.observe(batch)), self._n_joined + 1
        if self._done is not None:
            self._merge(*self._done)
        if self._n_joined:
            batches = "batch" if self._n_joined == 1 else "batches"
            self.notes.append(
                f"{self._n_joined} {batches} too small for a layer joined to a neighbour"
            )
        self._observer.check_compiled()
        self.copy_seconds = feed.copy_seconds()
        if not self.is_over:
            self.n_batches, self.n_samples = feed.n_batches, feed.n_samples
        self.wait_seconds = feed.wait_seconds
        self.notes += self._observer.notes
        self._note_convergence()

    def _merge(self, batch: Batch, seen: list[BatchMoments]) -> None:
        for one in seen:
            self._moments.merge(one)
        self._amount += 1 if batch.n_samples is None else batch.n_samples
        self._moments.remember(self._amount)

    def _has_converged(self, n_batches: int) -> bool:
        limit = self._options.until_converged
        if limit is None or n_batches < _FEWEST_BATCHES:
            return False
        late = self._moments.late_change(self._amount)
        return late is not None and max(late[1].values(), default=1.0) < limit

    def _note_convergence(self) -> None:
        late = self._moments.late_change(self._amount)
        if late is not None:
            share, self.late_changes = late
            change = max(self.late_changes.values(), default=0.0)
            self.convergence = BnConvergence(share, change)

    # -- together with other processes

    def to_words(self) -> dict[str, Any]:
        """Return all of it in a form that JSON can express, exact."""
        return {
            "layers": list(self._layers),
            "moments": self._moments.to_words(),
            "counts": [self.n_batches, self.n_samples],
            "seconds": [self.wait_seconds, self.copy_seconds],
            "late": self.late_changes,
            "share": None if self.convergence is None else self.convergence.share,
            "notes": self.notes,
        }

    def add_words(self, words: Mapping[str, Any]) -> None:
        """Merge what another process found."""
        self._moments.add_words(words["moments"])
        self.n_batches += words["counts"][0]
        self.n_samples += words["counts"][1]
        self.wait_seconds = max(self.wait_seconds, words["seconds"][0])
        self.copy_seconds = max(self.copy_seconds, words["seconds"][1])
        for name, change in words["late"].items():
            self.late_changes[name] = max(change, self.late_changes.get(name, 0.0))
        if words["share"] is not None:
            share = words["share"] if self.convergence is None else self.convergence.share
            change = max(self.late_changes.values(), default=0.0)
            self.convergence = BnConvergence(share, change)
        self.notes += [note for note in words["notes"] if note not in self.notes]

    # -- the end

    def store(self) -> tuple[BnLayerReport, ...]:
        """Put the new statistics into the buffers of every layer that was reached.

        Raises:
            BatchNormError: If there were no batches, a layer was never reached, or a statistic is
                not finite or does not fit the dtype of its buffer.
        """
        if self.n_batches == 0:
            raise BatchNormError("no batches: BatchNorm statistics need data")
        counts = self._moments.n_elements
        unreached = [f"'{name}'" for name, count in counts.items() if count == 0]
        if unreached and not self._options.allow_unreached:
            more = ", ..." if len(unreached) > 3 else ""
            raise BatchNormError(
                f"{len(unreached)} of {len(self._layers)} BatchNorm layers were never reached by "
                f"the data: {', '.join(unreached[:3])}{more}"
            )
        mean, variance = self._moments.finished()
        new = {
            layer: (mean[place], variance[place])
            for name, layer in self._layers.items()
            if counts[name]
            for place in [self._moments.place(name)]
        }
        _refuse_nonfinite(new)
        changes = _changes(new)
        for layer, (new_mean, new_variance) in new.items():
            layer.mean.copy_(new_mean)
            layer.variance.copy_(new_variance)
            counter = layer.module.num_batches_tracked
            if counter is not None and not layer.is_instance:  # which never counts
                counter.fill_(self.n_batches)
        return tuple(
            BnLayerReport(
                name=layer.name,
                n_features=layer.n_features,
                n_elements=counts[layer.name],
                mean_shift=float(shift.max()),
                variance_ratio=(float(ratio.min()), float(ratio.max())),
                late_change=self.late_changes.get(layer.name),
            )
            for layer, (shift, ratio) in changes.items()
        )


def collect_side_by_side(
    collections: Sequence[tuple[nn.Module, Collection]],
    batches: Makes,
    progress: BnProgress | None,
    *,
    rank: int = 0,
    size: int = 1,
) -> None:
    """Run several models on the same batches, one load of the data for all.

    Args:
        collections: Models, all on one device, each with what it adds to.
        batches: Returns the batches; called once the random numbers are seeded.
        progress: Called with the samples of each batch.
        rank: Number of this process.
        size: How many processes take turns in the batches.

    Raises:
        BatchNormError: If a batch cannot be used, or the device runs out of memory.
        Exception: Whatever the models, the data or ``progress`` raise.
    """
    first = collections[0][1]
    device, options = first._moments.device, first._options
    with ExitStack() as stack:
        for model, collection in collections:
            collection.begin(model, stack)
        feed = Feed(batches(), device, options, rank=rank, size=size)
        going = [collection for _, collection in collections]
        try:
            for batch in feed:
                for collection in going:
                    collection.take(batch, feed)
                if progress is not None:
                    progress(batch.n_samples or 0)
                going = [collection for collection in going if not collection.is_over]
                if not going:
                    break
            for _, collection in collections:
                collection.end(feed)
        except torch.OutOfMemoryError as error:
            raise BatchNormError(
                f"{device}: out of memory in batch {feed.n_batches}; use smaller batches, or "
                "amp (--amp bfloat16)"
            ) from error


class NonFiniteError(BatchNormError):
    """A statistic is not finite, or not in the dtype of its buffer; other weights may do."""


def _refuse_nonfinite(new: Mapping[NormLayer, tuple[Tensor, Tensor]]) -> None:
    """Refuse statistics that are not finite, or not in the dtype of their buffers.

    All layers are looked at in one go: each question to a GPU costs a wait.
    """
    fine = [
        (
            torch.isfinite(mean.to(layer.mean.dtype))
            & torch.isfinite(variance.to(layer.variance.dtype))
        ).all()
        for layer, (mean, variance) in new.items()
    ]
    if not new or bool(torch.stack(fine).all()):
        return
    for layer, (mean, variance) in new.items():
        finite = torch.isfinite(mean) & torch.isfinite(variance)
        if not finite.all():
            raise NonFiniteError(
                f"layer '{layer.name}': {int((~finite).sum())} of {layer.n_features} channels have "
                "non-finite statistics; the data or the weights hold infinity or NaN"
            )
        dtype = layer.variance.dtype
        fits = torch.isfinite(mean.to(dtype)) & torch.isfinite(variance.to(dtype))
        if not fits.all():
            raise NonFiniteError(
                f"layer '{layer.name}': {int((~fits).sum())} of {layer.n_features} channels have "
                f"statistics too large for the {str(dtype).removeprefix('torch.')} of its buffers"
            )


def _changes(
    new: Mapping[NormLayer, tuple[Tensor, Tensor]],
) -> dict[NormLayer, tuple[Tensor, Tensor]]:
    """Return how far means moved, in standard deviations, and the ratios of the variances."""
    if not new:
        return {}
    device = next(iter(new)).device
    mean, variance, old_mean, old_variance, epsilon = (
        torch.cat([one.to(device, torch.float64) for one in ones])
        for ones in (
            [mean for mean, _ in new.values()],
            [variance for _, variance in new.values()],
            [layer.mean for layer in new],
            [layer.variance for layer in new],
            [torch.full_like(variance, layer.epsilon) for layer, (_, variance) in new.items()],
        )
    )
    sizes = [layer.n_features for layer in new]
    shifts = torch.split(((mean - old_mean).abs() / (variance + epsilon).sqrt()).cpu(), sizes)
    ratios = torch.split(((variance + epsilon) / (old_variance + epsilon)).cpu(), sizes)
    return dict(zip(new, zip(shifts, ratios, strict=True), strict=True))


def _join(small: Batch, error: TooSmallError, first: Batch, second: Batch, feed: Feed) -> Batch:
    """Join a batch that is too small to the one before or behind it.

    Raises:
        BatchNormError: If they cannot be joined.
    """
    try:
        if (small.n_samples or 0) > 1:
            raise ValueError("more than one sample")
        value = joined(first.value, second.value)
    except (ValueError, RuntimeError, TypeError) as reason:
        raise BatchNormError(
            f"{error} (it cannot be joined to the batch beside it: {reason})"
        ) from error
    n_samples = None
    if first.n_samples is not None and second.n_samples is not None:
        n_samples = first.n_samples + second.n_samples
    return Batch(value, feed.placed(value), n_samples)
