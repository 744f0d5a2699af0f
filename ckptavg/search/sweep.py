"""Many averages from one read, each judged; the best is kept, with the evidence beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from ckptavg._version import __version__
from ckptavg.average_options import AverageOptions, Request
from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import ModelError, UsageError, told_storage_errors
from ckptavg.evaluation_log import EvaluationLog, judge_text
from ckptavg.journal import EVALUATIONS_NAME
from ckptavg.metrics import Judge, Mode
from ckptavg.output import OutputDirectory
from ckptavg.pipeline import average_checkpoints
from ckptavg.plan import AveragePlan
from ckptavg.prepare import Prepared, chosen_schemes
from ckptavg.processes import joined_processes
from ckptavg.provenance import weight_file_metadata
from ckptavg.results import BnPass, SweepResult, SweepRow
from ckptavg.schemes import Scheme
from ckptavg.search.checks import check_search
from ckptavg.search.contest import Contest
from ckptavg.search.evidence import sweep_files, told_rows, verdict
from ckptavg.sources import SingleCheckpoint, Source
from ckptavg.staging import temporary_directory
from ckptavg.steps import (
    Averaged,
    Clock,
    average_together,
    enter_together,
    finish,
    outcome_notes,
    prepare_together,
    result_of,
)

Keep = Literal["best", "all"]
Controls = Literal["all", "last", "none"]


@told_storage_errors()
def sweep(
    sources: Source | Sequence[Source],
    output: str | Path,
    *,
    schemes: str | Scheme | Sequence[str | Scheme],
    evaluation: BnPass,
    metric: str | None = None,
    mode: Mode | None = None,
    keep: Keep = "best",
    singles: bool = True,
    plot: bool = False,
    **options: Unpack[AverageOptions],
) -> SweepResult:
    """Make many averages from one read, judge each, and publish the best.

    Each average gets a BatchNorm pass of its own where ``evaluation`` has batches. As controls the
    last checkpoint and every single one are judged, as they are and with a BatchNorm pass of their
    own: otherwise averaging would get the credit for the pass (Izmailov et al. 2018, section 3.2,
    makes it for averages only). Pick by a validation set; what was picked by a metric looks better
    by that metric than it is.

    An interrupted sweep is continued by the same call: what was averaged and evaluated is not done
    again (evaluations by a command after a BatchNorm pass are).

    Args:
        sources: As in ``average_checkpoints``.
        output: The model directory to make: the best average, with ``sweep.json`` and
            ``sweep.csv`` in it; with ``keep="all"`` the directory of one for each average.
        schemes: What to average; ``uniform:last=1..10`` stands for ten averages.
        evaluation: The metric, the model, and data for the BatchNorm pass.
        metric: Name of the metric that decides; None where there is only one.
        mode: ``min`` or ``max``; None goes by the metric's name.
        keep: ``best`` or ``all``.
        singles: Judge every checkpoint by itself, too, beside the last.
        plot: Add ``sweep.png``, which needs the extra ``plots``.
        options: As in ``average_checkpoints``.

    Raises:
        UsageError: If nothing judges, the metric is not clear, or options make no sense.
        ModelError: If the evaluation fails.
        CkptavgError: As ``average_checkpoints`` does.
    """
    evaluation = check_sweep(evaluation, schemes=schemes, keep=keep, plot=plot)
    request = Request.of(chosen_schemes(schemes, None), options, metric=metric, mode=mode)
    judge = Judge(metric, mode)
    controls: Controls = "all" if singles else "last"

    def files(plan: AveragePlan, rows: Sequence[SweepRow]) -> dict[str, bytes]:
        return sweep_files(judge, plan, rows, command=request.command, plot=plot)

    return contested(
        sources, Path(output), request, evaluation, judge, files, keep=keep, controls=controls
    )


def contested(
    sources: Source | Sequence[Source],
    output: Path,
    request: Request,
    evaluation: BnPass,
    judge: Judge,
    evidence: Callable[[AveragePlan, Sequence[SweepRow]], dict[str, bytes]],
    *,
    keep: Keep,
    controls: Controls,
    judged: Callable[[int, Mapping[str, float]], None] = lambda number, metrics: None,
) -> SweepResult:
    """Make the averages of a request from one read, judge them, and publish.

    Args:
        sources: As in ``average_checkpoints``.
        output: Likewise.
        request: What to average, and how.
        evaluation: Who judges.
        judge: What decides.
        evidence: Returns the files to publish along, from the plan and all rows, best first.
        keep: ``best`` or ``all``.
        controls: Which checkpoints are judged by themselves.
        judged: Told number and metrics of each average as soon as it is judged.
    """
    started = time.perf_counter()
    with joined_processes(distributed=request.distributed) as processes, ExitStack() as stack:
        prepared = prepare_together(
            processes, stack, sources, output, request.recipe,
            batchnorm=evaluation, **request.preparing,
        )  # fmt: skip
        plan = prepared.plan
        if request.planned is not None:
            request.planned(plan)
        directory = OutputDirectory(
            output,
            plan,
            metadata=[weight_file_metadata(plan, one, __version__) for one in plan.outputs],
            overwrite=request.overwrite,
            rank=processes.rank,
            hash_along=False,  # most of it is not kept
        )
        contest = Contest(
            evaluation=evaluation,
            prepared=prepared,
            processes=processes,
            judge=judge,
            progress=request.progress,
            by_command=lambda checkpoint, judge: _judged_by_command(
                checkpoint, judge, output, request.preparing
            ),
            judged=judged,
        )
        if controls != "none":  # first what shows whether the evaluation works at all
            contest.judge_checkpoint(prepared.checkpoints[-1], "last")
        before = enter_together(processes, stack, directory)
        if processes.size == 1:
            contest.log = EvaluationLog(
                directory.partial / EVALUATIONS_NAME, judge_text(evaluation), directory.failed
            )
        averaging = time.perf_counter()
        averaged = average_together(processes, prepared, directory, before, request.progress)
        average_seconds = time.perf_counter() - averaging
        contest.judge_averages(directory)
        if controls == "all":
            for checkpoint in prepared.checkpoints:
                contest.judge_checkpoint(checkpoint, "single")
        best, rows = contest.best, contest.rows()
        if math.isnan(judge.value(rows[0].metrics)):
            raise ModelError(f"no average has a {judge.metric} that is a number")
        kept = [best] if keep == "best" else range(len(plan.outputs))
        outcomes = contest.settle(kept, directory)
        outcomes[best] = replace(outcomes[best], comparison=tuple(told_rows(rows, judge)))
        notes = [
            *plan.notes, *prepared.notes, *directory.notes, *averaged.notes, *verdict(rows, judge),
            *outcome_notes([outcomes[at] for at in kept]),
        ]  # fmt: skip
        notes = list(dict.fromkeys(notes))
        files = evidence(plan, rows)
        publishing = time.perf_counter()

        def publish() -> None:
            directory.end_journal()
            if keep == "best":
                directory.keep_only(best)
                finish(
                    *_only(best, prepared, directory, averaged), notes, [outcomes[best]],
                    request.command, files,
                )  # fmt: skip
                return
            for name, content in files.items():
                directory.add_file(name, content)
            finish(prepared, directory, averaged, notes, outcomes, request.command)

        processes.first(publish)
        publish_seconds = time.perf_counter() - publishing
    result = result_of(
        processes, prepared, averaged, outcomes, output,
        before=before,
        clock=Clock(
            started=started, average_seconds=average_seconds, publish_seconds=publish_seconds
        ),
        notes=notes,
    )  # fmt: skip
    if keep == "best":
        result = replace(result, outputs=(replace(result.outputs[best], path=output),))
    metric, mode = judge.settled
    return SweepResult(
        metric=metric,
        mode=mode,
        best=contest.names[best],
        rows=rows,
        result=result,
        files=tuple(files),
    )


def check_sweep(evaluation: BnPass | None, *, schemes: object, keep: str, plot: bool) -> BnPass:
    """Refuse what cannot become a sweep; return the evaluation.

    Raises:
        UsageError: If nothing judges, or what is wanted cannot be had.
    """
    evaluation = check_search("a sweep", evaluation, plot=plot)
    if not schemes:
        raise UsageError("a sweep needs something to try: schemes (--scheme)")
    if keep not in get_args(Keep):
        raise UsageError(f"keep is '{keep}', expected one of {', '.join(get_args(Keep))}")
    return evaluation


def _only(
    number: int, prepared: Prepared, directory: OutputDirectory, averaged: Averaged
) -> tuple[Prepared, OutputDirectory, Averaged]:
    """Return what was prepared and averaged as if one output were the only one."""
    plan = prepared.plan
    return (
        replace(
            prepared,
            plan=replace(plan, outputs=(replace(plan.outputs[number], name=""),)),
            side_files=[prepared.side_files[number]],
            inherited_cards=[prepared.inherited_cards[number]],
        ),
        directory,
        replace(
            averaged,
            differing=[averaged.differing[number]],
            adapters=[averaged.adapters[number]],
        ),
    )


def _judged_by_command(
    checkpoint: Checkpoint, evaluation: BnPass, output: Path, options: Mapping[str, Any]
) -> Mapping[str, float]:
    """Write one checkpoint as a model directory beside the output, judge it, and remove it."""
    source = checkpoint.hub or SingleCheckpoint(checkpoint.label)
    kept = (
        "state_key", "strip_prefixes", "keep_prefix", "device", "memory_budget_bytes", "n_threads",
        "max_shard_bytes", "output_format", "include_code", "cache",
    )  # fmt: skip
    with temporary_directory(output, "single") as scratch:
        result = average_checkpoints(
            [source],
            scratch / "model",
            allow_nonfinite=True,
            batchnorm=evaluation,
            **{name: value for name, value in options.items() if name in kept},
        )
    return result.outputs[0].metrics or {}
