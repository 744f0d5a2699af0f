"""The ensemble of saved checkpoints against the average of their weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from torch import nn

from ckptavg.average import DEFAULT_MEMORY_BUDGET_BYTES, choose_device
from ckptavg.bn_pass import BnOutcome
from ckptavg.checkpoint import Checkpoint
from ckptavg.derived import Group
from ckptavg.derived.spectral_norm import find_spectral_norms
from ckptavg.derived.weight_norm import find_weight_norms
from ckptavg.ensemble_results import EnsembleMember, EnsembleResult, Members, Order
from ckptavg.errors import (
    IncompatibleCheckpointsError,
    SourceError,
    UsageError,
    told_storage_errors,
)
from ckptavg.evidence_files import check_evidence_destination, publish_evidence
from ckptavg.labelled import LabelledEvaluation, device_of
from ckptavg.landscape.ensemble_evidence import ensemble_files, summary_of
from ckptavg.landscape.predictions import Predictions, Room
from ckptavg.landscape.weight_mean import WeightMean
from ckptavg.live_model import LiveModel, check_repeatable
from ckptavg.opening import fetched_notes, opened_in_order
from ckptavg.processes import Processes, check_alone
from ckptavg.results import BnPass, Progress
from ckptavg.selection import Selection
from ckptavg.sources import Source
from ckptavg.steps import outcome_notes


@told_storage_errors()
def ensemble(
    sources: Source | Sequence[Source],
    output: str | Path,
    *,
    evaluation: BnPass,
    members: Members = "stored",
    order: Order = "oldest",
    plot: bool = True,
    overwrite: bool = False,
    selection: Selection | None = None,
    state_key: str | None = None,
    strip_prefixes: Sequence[str] = (),
    keep_prefix: bool = False,
    cache: bool = False,
    device: str = "auto",
    memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
    n_threads: int | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> EnsembleResult:
    """Compare the ensemble of saved checkpoints with the average of their weights.

    The ensemble predicts the mean of the probabilities of its members: k predictions, where the
    average of the weights makes one. Fast Geometric Ensembling (Garipov et al. 2018) does it with
    the checkpoints of one run; that averaging their weights comes close to it is the argument of
    Izmailov et al. 2018, section 3.5: probabilities of members differ by O(D), D being the distance
    of their weights, those of ensemble and average by O(D^2) only. Both are measured here, for the
    first 1, 2, ... members, with accuracy, likelihood and calibration.

    Checkpoints are in memory one at a time; they are read a second time for their distances from
    the average. Averages get a BatchNorm pass each. Of integer and bool buffers an average has
    those of its newest member.

    Args:
        sources: As in ``average_checkpoints``.
        output: The directory to make, with ``ensemble.json``, ``ensemble.csv`` and pictures.
        evaluation: The model; ``evaluate`` is a ``LabelledEvaluation`` with the loaders to compare
            on; ``batches`` are needed where the model has BatchNorm layers.
        members: Whether members run with the BatchNorm statistics that they were stored with, or
            with recomputed ones, as the average does.
        order: Which checkpoint is the first member.
        plot: Add ``ensemble.png`` and ``ensemble.svg``, which need the extra ``plots``.
        overwrite: Replace the output if it holds nothing but such files.
        selection: Which of the checkpoints are taken.
        state_key: As in ``average_checkpoints``, like all that follow.
        strip_prefixes: Likewise.
        keep_prefix: Likewise.
        cache: Likewise.
        device: Likewise.
        memory_budget_bytes: Bounds the probabilities that are held where the model runs on a CPU:
            12 bytes for each label and class.
        n_threads: Likewise.
        progress: Likewise.
        command: Likewise.

    Raises:
        UsageError: If there are no loaders, statistics cannot be recomputed for want of data, or
            options make no sense.
        ModelError: If model, data or loaders fail, or a loader gives others in another pass.
        IncompatibleCheckpointsError: If weights have no mean.
        MemoryBudgetError: If the probabilities need too much memory.
        CkptavgError: As ``average_checkpoints`` does.
    """
    started = time.perf_counter()
    labelled = check_ensemble(evaluation, members=members, order=order, plot=plot)
    output = Path(output)
    check_evidence_destination(output, overwrite=overwrite, kind="ensemble")
    for name, value in (("n_threads", n_threads), ("memory_budget_bytes", memory_budget_bytes)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
    with opened_in_order(
        sources,
        selection=selection,
        state_key=state_key,
        strip_prefixes=strip_prefixes,
        keep_prefix=keep_prefix,
        n_threads=n_threads,
        cache=cache,
    ) as found:
        checkpoints = list(found.checkpoints)
        notes = [*found.notes, *fetched_notes(found.hub)]
        _refuse(checkpoints)
        chosen = choose_device(device, read_nbytes=0, runs_model=True)
        run = _Run(
            checkpoints if order == "oldest" else checkpoints[::-1],
            evaluation, labelled, chosen, members, order,
            memory_budget_bytes=memory_budget_bytes, progress=progress,
        )  # fmt: skip
        for checkpoint in checkpoints:
            run.live.check(checkpoint)
        distances = run.compare()
        told = tuple(
            EnsembleMember(
                source=one.label, step=one.step, epoch=one.epoch, weight_distance=distance
            )
            for one, distance in zip(run.checkpoints, distances, strict=True)
        )
    loaders = tuple(one.found() for one in run.predictions)
    result = EnsembleResult(
        output=output,
        members=told,
        order=order,
        bn_statistics=members if run.has_batchnorm else None,
        loaders=loaders,
        summary=tuple(sentence for one in loaders for sentence in summary_of(one)),
        notes=(*notes, *run.notes),
        files=(),
        device=chosen,
        held_nbytes=run.room.held_nbytes,
        seconds=time.perf_counter() - started,
    )
    files = ensemble_files(result, command=command, plot=plot)
    publish_evidence(output, files, overwrite=overwrite)
    return replace(result, files=tuple(files), seconds=time.perf_counter() - started)


def check_ensemble(
    evaluation: BnPass | None, *, members: str, order: str, plot: bool
) -> LabelledEvaluation:
    """Refuse what cannot become an ensemble; return the evaluation on its loaders.

    Raises:
        UsageError: If there are no loaders, or what is wanted cannot be had.
    """
    check_alone("an ensemble", distributed=False)
    for name, value, allowed in (
        ("members", members, get_args(Members)),
        ("order", order, get_args(Order)),
    ):
        if value not in allowed:
            raise UsageError(f"{name} is '{value}', expected one of {', '.join(allowed)}")
    labelled = None if evaluation is None else evaluation.evaluate
    if evaluation is None or not isinstance(labelled, LabelledEvaluation):
        raise UsageError(
            "an ensemble needs labelled batches: a LabelledEvaluation with loaders (--loader)"
        )
    if labelled.also is not None:
        raise UsageError(
            "an evaluation (--eval) judges one model, and an ensemble is several: leave it out"
        )
    if labelled.weight_decay:
        raise UsageError(
            "weight_decay (--weight-decay) belongs to the loss of one model, and an ensemble is "
            "several: leave it out"
        )
    if members == "recomputed" and evaluation.batches is None:
        raise UsageError(
            "members with recomputed BatchNorm statistics need training data: batches (--data)"
        )
    if plot:
        from ckptavg.plots import require_matplotlib

        require_matplotlib("--no-plot")
    return labelled


def _refuse(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints of which there is no ensemble, or whose parameters have no mean."""
    if len(checkpoints) < 2:
        raise SourceError(
            f"an ensemble needs at least two checkpoints, and there is one: {checkpoints[0].label}"
        )
    tensors, labels = checkpoints[-1].tensors, [one.label for one in checkpoints]
    groups: list[Group] = [
        *find_weight_norms(tensors, labels), *find_spectral_norms(tensors, labels),
    ]  # fmt: skip
    for group in groups[:1]:
        raise IncompatibleCheckpointsError(
            f"'{group.module}' is a {group.kind} layer: the mean of its parts is not that of its "
            "weights; average with ckptavg average, and compare its output by itself"
        )


@dataclass(kw_only=True)
class _Judged:
    """An evaluation whose purpose changes: ``LiveModel`` calls it with the model made ready."""

    look: Callable[[nn.Module], None] = lambda model: None

    def __call__(self, model: nn.Module) -> float:
        self.look(model)
        return 0.0


class _Run:
    """Members in their order, and the averages of the first ones.

    Attributes:
        checkpoints: In that order.
        live: The model.
        predictions: What is predicted, one for each loader.
        room: What that takes.
        has_batchnorm: Whether there are statistics to recompute.
        notes: What the user should know.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        evaluation: BnPass,
        labelled: LabelledEvaluation,
        device: str,
        members: Members,
        order: Order,
        *,
        memory_budget_bytes: int,
        progress: Progress | None,
    ) -> None:
        self.checkpoints = checkpoints
        self._judged = _Judged()
        newest = checkpoints[-1 if order == "oldest" else 0]
        evaluation = replace(evaluation, evaluate=self._judged)
        self.live = LiveModel(evaluation, newest, device, Processes())
        self._newest = newest
        self._order = order
        self._progress = progress
        self.has_batchnorm = self.live.must_recompute(of_what="average until they are recomputed")
        self._recomputes_members = members == "recomputed" and self.has_batchnorm
        self.notes: list[str] = []
        n_members = len(checkpoints)
        if self.has_batchnorm:
            check_repeatable(evaluation, n_members * (2 if self._recomputes_members else 1))
        labelled.check_repeatable(2 * n_members)
        self.room = Room(device_of(self.live.module), memory_budget_bytes)
        self.predictions = [
            Predictions(loader, labelled, n_members, self.room) for loader in labelled.loaders
        ]

    def compare(self) -> list[float]:
        """Let all predict; return how far the weights of each member are from their mean."""
        mean = WeightMean()
        live = self.live
        for number, checkpoint in enumerate(self.checkpoints, 1):
            live.load(checkpoint)
            is_newest_so_far = self._order == "oldest" or number == 1
            mean.add(live.module, checkpoint.label, is_newest=is_newest_so_far)
            if self._recomputes_members:
                self._recompute()
            is_newest = checkpoint is self._newest
            add_member = partial(Predictions.add_member, is_newest=is_newest)
            self._look(f"member {number}, {checkpoint.label}", add_member)
            mean.put_into(live.module)
            self._recompute()
            self._look(f"the average of {number}", Predictions.add_average)
        distances = []
        for checkpoint in self.checkpoints:
            live.load(checkpoint)
            distances.append(mean.distance(live.module))
            self._report("distances", len(self.checkpoints))
        return distances

    def _recompute(self) -> None:
        report = self.live.recompute(lambda n_samples: None)  # a small part of a stage
        if not self.notes:  # one pass is like another
            self.notes += outcome_notes([BnOutcome(report=report, statistics=[], metrics=None)])

    def _look(self, what: str, look: Callable[[Predictions, nn.Module], None]) -> None:
        def look_at_all(model: nn.Module) -> None:
            for one in self.predictions:
                look(one, model)

        self._judged.look = look_at_all
        self.live.evaluated(what)
        self._report("ensemble", 2 * len(self.checkpoints))

    def _report(self, stage: str, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, 1, total)
