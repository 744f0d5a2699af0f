"""BatchNorm statistics of one model, recomputed exactly over batches of data.

After averaging weights, the running statistics of BatchNorm layers belong to no network: they must
be computed anew with one pass over the training data (Izmailov et al. 2018, Section 3.2). What is
computed, ``moments`` says; by default it is the mean and unbiased variance of all elements of all
batches, as if they had been one batch for each layer's own statistics.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ckptavg.batchnorm.collect import BnProgress, Collection, collect_side_by_side
from ckptavg.batchnorm.layers import NormLayer, find_layers, unwrapped
from ckptavg.batchnorm.report import BnConvergence, BnLayerReport, BnReport
from ckptavg.bn_options import Amp, BnOptions, Estimator, Forward, TrainMode
from ckptavg.errors import ProcessError, UsageError
from ckptavg.processes import Processes, joined_processes

__all__ = [
    "Amp",
    "BnConvergence",
    "BnLayerReport",
    "BnOptions",
    "BnReport",
    "Estimator",
    "Forward",
    "TrainMode",
    "recompute_bn_stats",
    "recompute_side_by_side",
    "recompute_together",
    "refuse_together",
    "unwrapped",
]

_WAITING_SHARE = 0.5  # of a pass, from which on the loader is what it waits for
_COPYING_SHARE = 0.8  # likewise; less is hidden behind the work
_WAITING_SECONDS = 1.0


def recompute_bn_stats(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    estimator: Estimator = "population",
    train_mode: TrainMode = "bn",
    max_batches: int | None = None,
    max_samples: int | None = None,
    until_converged: float | None = None,
    allow_unreached: bool = False,
    amp: Amp | None = None,
    channels_last: bool = False,
    compile: bool = False,
    seed: int | None = None,
    distributed: bool = False,
    data_per_process: bool = False,
    progress: BnProgress | None = None,
) -> BnReport:
    """Replace the running statistics of every BatchNorm layer by those of the given batches.

    Only the layers concerned run in training mode, so dropout stays off. Layers that the user froze
    (in evaluation mode inside a model in training mode, or with ``track_running_stats`` turned
    off) are left alone. A batch too small for a layer is joined to its neighbour. Training modes,
    momenta, hooks, random states and all buffers but the statistics are as before when this returns
    or raises; if it raises, so are the statistics.

    Args:
        model: Any module; runs where its parameters are. What DDP, ``AveragedModel`` or
            ``torch.compile`` wraps is taken out, and runs as it was written.
        batches: Yields a tensor, a tuple or list (its first item is the input), a mapping
            (keyword arguments), or anything that ``forward`` takes. Moved to the model's device.
        forward: As in ``BnOptions``, like all that follow.
        estimator: Likewise.
        train_mode: Likewise.
        max_batches: Likewise.
        max_samples: Likewise.
        until_converged: Likewise.
        allow_unreached: Likewise.
        amp: Likewise.
        channels_last: Likewise.
        compile: Likewise.
        seed: Likewise.
        distributed: Share the pass with the other processes of torchrun, or of the process group
            that there is; all of them call this alike, and all get the same statistics. Where
            they take turns in the same data, limits count the batches of all; where each has a
            share of its own, those of each.
        data_per_process: As in ``BnOptions``.
        progress: Called with the samples of each batch.

    Returns:
        How far each layer moved. Without BatchNorm layers, a report without layers.

    Raises:
        BatchNormError: If there are no batches, a batch has one value per channel and cannot be
            joined to another, a layer is never reached, a statistic is not finite or does not fit
            the dtype of its buffer, ``max_samples`` is given and a batch does not tell its size, or
            the device runs out of memory.
        UsageError: If an option makes no sense.
        ProcessError: If another process failed.
    """
    options = BnOptions(
        forward=forward,
        estimator=estimator,
        train_mode=train_mode,
        max_batches=max_batches,
        max_samples=max_samples,
        until_converged=until_converged,
        allow_unreached=allow_unreached,
        amp=amp,
        channels_last=channels_last,
        compile=compile,
        seed=seed,
        data_per_process=data_per_process,
    )
    with joined_processes(distributed=distributed) as processes:
        return recompute_together(
            model, lambda: batches, options, processes=processes, progress=progress
        )


def recompute_together(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    options: BnOptions,
    *,
    processes: Processes,
    progress: BnProgress | None = None,
) -> BnReport:
    """Do what ``recompute_bn_stats`` does, in processes that are joined already.

    ``batches`` is called once the random numbers are seeded. What it raises, and what the model
    does, ends the pass in all processes.
    """
    model = unwrapped(model)
    refuse_together(options, processes)
    layers, skipped = find_layers(model)
    started = time.perf_counter()
    if not layers:
        return _nothing_done(skipped, options, started)
    if processes.size > 1 and options.seed is None and not options.data_per_process:
        # they take turns in the same data: it must come in the same order everywhere
        seed = processes.together(lambda: secrets.randbelow(2**63))[0]
        options = replace(options, seed=seed)
    collection = Collection(layers, options)

    def advance(n_samples: int) -> None:
        processes.look_out()
        if progress is not None:
            progress(n_samples)

    def collect() -> dict[str, Any]:
        collection.collect(model, batches, processes.rank, processes.size, advance)
        return collection.to_words() if processes.size > 1 else {}

    told = processes.together(collect)
    if processes.size > 1:  # merged in the same order everywhere, so that all get the same bits
        collection = Collection(layers, options)
        for words in told:
            if words["layers"] != list(layers):
                raise ProcessError("the processes have models with different BatchNorm layers")
            collection.add_words(words)
    return _report(collection, layers, skipped, options, started, processes.size)


def recompute_side_by_side(
    models: Sequence[nn.Module],
    batches: Callable[[], Iterable[Any]],
    options: BnOptions,
    *,
    progress: BnProgress | None = None,
) -> list[BnReport]:
    """Do what ``recompute_bn_stats`` does for several models, with one load of the data for all.

    Args:
        models: Of one architecture, on one device; they must not change their inputs.
        batches: Returns the batches; called once the random numbers are seeded.
        options: How the passes run.
        progress: Called with the samples of each batch.
    """
    models = [unwrapped(model) for model in models]
    started = time.perf_counter()
    found = [find_layers(model) for model in models]
    if not all(layers for layers, _ in found):
        return [_nothing_done(skipped, options, started) for _, skipped in found]
    collections = [Collection(layers, options) for layers, _ in found]
    collect_side_by_side(list(zip(models, collections, strict=True)), batches, progress)
    return [
        _report(collection, layers, skipped, options, started, 1)
        for collection, (layers, skipped) in zip(collections, found, strict=True)
    ]


def _nothing_done(skipped: dict[str, str], options: BnOptions, started: float) -> BnReport:
    seconds = time.perf_counter() - started
    return BnReport((), 0, 0, skipped, seconds, estimator=options.estimator)


def _report(
    collection: Collection,
    layers: Mapping[str, NormLayer],
    skipped: dict[str, str],
    options: BnOptions,
    started: float,
    n_processes: int,
) -> BnReport:
    """Store what was collected, and tell what that changed."""
    reports = collection.store()
    reached = {report.name for report in reports}
    for name in layers:
        if name not in reached:
            skipped[name] = "was never reached by the data; its statistics are left as they were"
    seconds = time.perf_counter() - started
    return BnReport(
        reports,
        collection.n_batches,
        collection.n_samples,
        skipped,
        seconds,
        estimator=options.estimator,
        convergence=collection.convergence,
        wait_seconds=collection.wait_seconds,
        n_processes=n_processes,
        notes=(*collection.notes, *_what_it_waited_for(collection, seconds)),
        options=options.chosen(),
    )


def refuse_together(options: BnOptions, processes: Processes) -> None:
    """Refuse what several processes cannot do.

    Raises:
        UsageError: If they are asked to stop when the statistics have converged.
    """
    if processes.size > 1 and options.until_converged is not None:
        raise UsageError("until_converged: several processes cannot decide when to stop")


def _what_it_waited_for(collection: Collection, seconds: float) -> list[str]:
    if seconds < _WAITING_SECONDS:
        return []
    if collection.wait_seconds > _WAITING_SHARE * seconds:
        return [
            f"the pass waited for the data {collection.wait_seconds / seconds:.0%} of its time: "
            "more workers of the loader would make it faster"
        ]
    if collection.copy_seconds > _COPYING_SHARE * seconds:
        return [
            f"copying the data to the GPU took {collection.copy_seconds / seconds:.0%} of the "
            "pass's time: pinned memory or smaller inputs (such as 8-bit images) would make it "
            "faster"
        ]
    return []
