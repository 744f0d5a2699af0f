"""Greedy soup: checkpoints are added, best first, as long as the mean does not get worse."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from ckptavg._version import __version__
from ckptavg.average.chunks import take_chunk
from ckptavg.average.work import Job, Timings
from ckptavg.average_options import AverageOptions, Request
from ckptavg.blocks import Action, Differing
from ckptavg.bn_pass import BnOutcome
from ckptavg.errors import ModelError, UsageError
from ckptavg.eval_command import EvalCommand
from ckptavg.live_model import check_repeatable
from ckptavg.metrics import Judge, Mode, best_mode
from ckptavg.output import OutputDirectory
from ckptavg.plan import AveragePlan
from ckptavg.prepare import Prepared
from ckptavg.processes import Processes, started_by_torchrun
from ckptavg.provenance import weight_file_metadata
from ckptavg.results import BnPass, ComparisonRow, Progress, SoupResult, SoupStep
from ckptavg.schemes import Positions, Scheme, coefficient_rows
from ckptavg.search.evaluation_log import judge_text
from ckptavg.search.evidence import soup_files
from ckptavg.search.pot import Pot, emptied
from ckptavg.search.scratch import Scratch
from ckptavg.side_files import copy_side_files, find_side_files, inherited_front_matter
from ckptavg.sources import Source
from ckptavg.steps import (
    Averaged,
    Clock,
    average_together,
    complete_all,
    enter_together,
    evaluate_by_command,
    finish,
    prepare_together,
    recompute_statistics,
    report_notes,
    result_of,
    stage_of,
)
from ckptavg.tensors import FLOAT64
from ckptavg.writer import ModelWriter

Metrics = Mapping[str, float]
_REPEATS = 1e-6


def greedy_soup(
    sources: Source | Sequence[Source],
    output: str | Path,
    *,
    evaluation: BnPass,
    metric: str | None = None,
    mode: Mode | None = None,
    plot: bool = False,
    **options: Unpack[AverageOptions],
) -> SoupResult:
    """Average the checkpoints that help each other, by the user's metric.

    Every checkpoint is judged by itself. From the best on (of equals the newer one), each is added
    to the mean of those accepted before, and stays if the metric does not get worse (Wortsman et
    al. 2022, "Model soups", Recipe 1: greedy soup). Every mean, and every single one, gets a
    BatchNorm pass of its own where ``evaluation`` has batches. The result is never worse by the
    metric than the best single checkpoint; by another metric, or on other data, it may be.

    The weights of each checkpoint are read twice at most: to judge it, and to add it to a running
    sum, which lies beside the output (8 bytes a weight, twice); float64 ones of those accepted once
    more, since the order of summation shows in their bits. A soup that was interrupted, or failed,
    is continued by the same call, and nothing is judged again, if what judges can be imported by
    name.

    Args:
        sources: As in ``average_checkpoints``.
        output: The model directory to make, with ``soup.json`` and ``soup.csv`` in it.
        evaluation: The metric, the model, and data for the BatchNorm passes.
        metric: Name of the metric that decides; None where there is only one.
        mode: ``min`` or ``max``; None goes by the metric's name.
        plot: Add ``soup.png``, which needs the extra ``plots``.
        options: As in ``average_checkpoints``; sums are float64 always, and one process does all.

    Raises:
        UsageError: If nothing judges, the metric is not clear, there is but one checkpoint, or they
            have tensors that are averaged together (LoRA adapters, normed layers).
        ModelError: If the evaluation fails.
        CkptavgError: As ``average_checkpoints`` does.
    """
    started = time.perf_counter()
    output = Path(output)
    evaluation = check_soup(evaluation, distributed=options.get("distributed", False), plot=plot)
    request = Request.of((Scheme(),), options, metric=metric, mode=mode)
    processes, judge = Processes(), Judge(metric, mode)
    with ExitStack() as stack:
        prepared = prepare_together(
            processes, stack, sources, output, request.recipe,
            batchnorm=evaluation, **request.preparing,
        )  # fmt: skip
        refuse_soup(prepared, evaluation)
        if request.planned is not None:
            request.planned(prepared.plan)
        named = judge_text(evaluation)
        identity = named and repr((prepared.plan.fingerprint, named, metric, mode))
        scratch = stack.enter_context(Scratch(output, "soup", identity))
        pot = Pot(scratch.path, prepared, scratch.failed)
        stack.callback(pot.close)
        kitchen = _Kitchen(prepared, evaluation, judge, scratch, request.progress, pot)
        averaging = time.perf_counter()
        kitchen.cook()
        final = _served(prepared, kitchen.accepted)
        directory = OutputDirectory(
            output,
            final.plan,
            metadata=[weight_file_metadata(final.plan, final.plan.outputs[0], __version__)],
            overwrite=request.overwrite,
            hash_along=False,
        )
        enter_together(processes, stack, directory)
        if any(dtype is FLOAT64 for dtype, _ in final.plan.arithmetic_dtypes):
            # the order of the sum shows in its bits: the one that the recipe has is made anew
            averaged = average_together(processes, final, directory, (), request.progress)
        else:
            averaged = _pour(final, directory, pot)
        average_seconds = time.perf_counter() - averaging
        outcomes = recompute_statistics(processes, final, directory, evaluation, request.progress)
        complete_all(final, directory)
        outcomes = evaluate_by_command(processes, evaluation, directory, outcomes)
        steps = kitchen.steps()
        outcomes = [
            None if one is None else replace(one, comparison=kitchen.comparison())
            for one in outcomes
        ]
        notes = list(dict.fromkeys([
            *final.plan.notes, *final.notes, *directory.notes, *scratch.notes,
            *kitchen.doubts(outcomes[0]),
            *(note for one in outcomes if one is not None for note in report_notes(one.report)),
        ]))  # fmt: skip
        files = soup_files(judge, prepared.plan, steps, command=request.command, plot=plot)
        publishing = time.perf_counter()
        finish(final, directory, averaged, notes, outcomes, request.command, files)
        publish_seconds = time.perf_counter() - publishing
    result = result_of(
        processes, final, averaged, outcomes, output,
        before=(),
        clock=Clock(
            started=started, average_seconds=average_seconds, publish_seconds=publish_seconds
        ),
        notes=notes,
    )  # fmt: skip
    return SoupResult(
        metric=judge.metric or "",
        mode=best_mode(judge.metric or "", judge.mode),
        steps=steps,
        result=replace(result, read_nbytes=kitchen.read_nbytes),
        files=tuple(files),
    )


def check_soup(evaluation: BnPass | None, *, distributed: bool, plot: bool) -> BnPass:
    """Refuse what cannot become a soup; return the evaluation.

    Raises:
        UsageError: If nothing judges, or what is wanted cannot be had.
    """
    if evaluation is None or evaluation.evaluate is None:
        raise UsageError("a soup needs a metric: evaluate (--eval or --eval-command)")
    if evaluation.compare:
        raise UsageError("a soup makes a comparison of its own: leave compare out")
    if distributed or started_by_torchrun():
        raise UsageError("a soup is made by one process: leave torchrun out")
    if plot:
        from ckptavg.plots import require_matplotlib

        require_matplotlib()
    return evaluation


def refuse_soup(prepared: Prepared, evaluation: BnPass) -> None:
    """Refuse checkpoints that cannot become a soup.

    Raises:
        UsageError: If so.
    """
    plan = prepared.plan
    if plan.recipe.accumulate == "float32":
        raise UsageError("a soup is summed in float64: leave accumulate out")
    if plan.n_checkpoints < 2:
        raise UsageError("a soup needs at least 2 checkpoints")
    if plan.derived.groups:
        group = plan.derived.groups[0]
        raise UsageError(
            f"'{group.module}' ({group.kind}) is averaged from several tensors together, which a "
            "running sum cannot do: use sweep"
        )
    if evaluation.batches is not None:
        check_repeatable(evaluation, 2 * plan.n_checkpoints)


@dataclass
class _Kitchen:
    """Judges checkpoints and means of them, and remembers what came of it."""

    prepared: Prepared
    evaluation: BnPass
    judge: Judge
    scratch: Scratch
    progress: Progress | None
    pot: Pot
    accepted: list[int] = field(default_factory=list)
    read_nbytes: int = 0

    def __post_init__(self) -> None:
        self._singles: dict[int, Metrics] = {}
        self._tried: dict[int, tuple[Metrics, bool]] = {}
        for entry in self.scratch.entries:  # of a run that was interrupted
            if "single" in entry:
                self._singles[int(entry["single"])] = entry["metrics"]
            elif "candidate" in entry:
                self._take_over(entry)
            else:
                self._start_over()
        # hashes of what is streamed are known at its end only: half a sum proves nothing
        if self._tried and (self.pot.is_new or self.prepared.plan.is_streamed):
            self._start_over()
            self.scratch.note({"start over": True})

    def _start_over(self) -> None:
        self._tried.clear()
        self.accepted.clear()
        self.pot.count = self.pot.current = 0

    def _take_over(self, entry: Mapping[str, Any]) -> None:
        index, is_accepted = int(entry["candidate"]), bool(entry["accepted"])
        self._tried[index] = entry["metrics"], is_accepted
        if is_accepted:
            self.accepted.append(index)
            self.pot.count, self.pot.current = len(self.accepted), int(entry["sum"])

    def cook(self) -> None:
        """Judge every checkpoint, then every candidate."""
        plan = self.prepared.plan
        report = stage_of(self.progress, "judging single checkpoints", plan.n_checkpoints)
        for index in reversed(range(plan.n_checkpoints)):
            if index not in self._singles:
                metrics = self._judged_single(index)
                self.judge.value(metrics)  # it is there
                self.scratch.note({"single": index, "metrics": metrics})
                self._singles[index] = metrics
            report(1)
        if all(math.isnan(self.judge.value(one)) for one in self._singles.values()):
            raise ModelError(f"no checkpoint has a {self.judge.metric} that is a number")
        report = stage_of(self.progress, "adding candidates", plan.n_checkpoints)
        for index in self.order():
            if index not in self._tried:
                self._try(index)
            report(1)

    def order(self) -> list[int]:
        """Return the checkpoints, best first; of equals the newer one first."""
        left = {str(index): self._singles[index] for index in sorted(self._singles, reverse=True)}
        found = []
        while left:
            best = self.judge.best(left)
            del left[best]
            found.append(int(best))
        return found

    def _try(self, index: int) -> None:
        is_first = not self.accepted
        if is_first:  # as the model that is made of it alone, it was judged before
            self._stir(index, None)
            metrics = self._singles[index]
        else:
            metrics = self._judged_mean(index)
        best = self._tried[self.accepted[-1]][0] if self.accepted else metrics
        value = self.judge.value(metrics)
        is_accepted = is_first or (
            not self.judge.is_better(best, metrics) and value == value  # not a NaN
        )
        if is_accepted:
            self.pot.accept()
            self.accepted.append(index)
        self._tried[index] = metrics, is_accepted
        self.scratch.note(
            {
                "candidate": index, "metrics": metrics, "accepted": is_accepted,
                "sum": self.pot.current,
            }
        )  # fmt: skip

    # -- judging

    def _judged_single(self, index: int) -> Metrics:
        plan, live = self.prepared.plan, self.prepared.live
        checkpoint = self.prepared.checkpoints[index]
        # a command sees a model directory, and what is rounded is judged as it will be published
        if isinstance(self.evaluation.evaluate, EvalCommand) or plan.changed_dtype is not None:
            return self._judged_mean(index)  # of one
        if live is None:
            raise AssertionError("a function judges a model")
        live.load(checkpoint)
        self.read_nbytes += self._each_nbytes
        live.recompute(stage_of(self.progress, "batchnorm", self.evaluation.max_samples))
        return live.evaluated(checkpoint.label) or {}

    def _judged_mean(self, index: int) -> Metrics:
        """Judge the mean of what is accepted and one more checkpoint."""
        plan, live = self.prepared.plan, self.prepared.live
        command, label = self.evaluation.evaluate, self.prepared.checkpoints[index].label
        directory = emptied(self.scratch.path / "candidate")
        model = ModelWriter(directory, plan, metadata={"format": "pt"}, failed=self.scratch.failed)
        try:
            try:
                model.create()
            except OSError as error:
                raise self.scratch.failed(error) from error
            self._stir(index, model)
            self._copy_integers(model, [*self.accepted, index])
            model.add_index()
            metrics: Metrics | None = None
            if live is not None:
                model.seal(1)
                fit = live.load_written(directory, f"the mean with {label}")
                report = live.recompute(
                    stage_of(self.progress, "batchnorm", self.evaluation.max_samples)
                )
                for name, data in live.statistics_bytes(report, plan, fit):
                    model.patch(name, data)
                metrics = live.evaluated(f"the mean with {label}")
            if isinstance(command, EvalCommand):
                model.seal(1)
                copy_side_files(
                    self.prepared.side_files[0], model, output_dtype=plan.changed_dtype,
                    rewritten={},
                )  # fmt: skip
                metrics = command.evaluated(directory)
        finally:
            model.close()
        return metrics or {}

    def _stir(self, index: int, model: ModelWriter | None) -> None:
        report = stage_of(self.progress, "average", self._each_nbytes)
        self.pot.stir(index, model, report)
        self.read_nbytes += self._each_nbytes

    @property
    def _each_nbytes(self) -> int:
        return self.prepared.plan.read_nbytes // self.prepared.plan.n_checkpoints

    def _copy_integers(self, model: ModelWriter, used: Iterable[int]) -> None:
        plan = _plan_of(self.prepared, sorted(used))
        for _ in _taken(plan, self.prepared, [model]):
            pass

    # -- telling

    def steps(self) -> tuple[SoupStep, ...]:
        """Return what was tried, in order."""
        labels = self.prepared.plan.labels
        return tuple(
            SoupStep(
                candidate=labels[index],
                metrics=self._singles[index],
                mean_metrics=self._tried[index][0],
                accepted=self._tried[index][1],
            )
            for index in self.order()
        )

    def comparison(self) -> tuple[ComparisonRow, ...]:
        """Return the rows that tell what the soup brought."""
        suffix = "" if self.evaluation.batches is None else " + BN pass"
        labels = self.prepared.plan.labels
        best, last = self.order()[0], len(labels) - 1
        return (
            ComparisonRow(name=f"last checkpoint{suffix}", metrics=self._singles[last]),
            ComparisonRow(
                name=f"best single checkpoint{suffix}: {labels[best]}", metrics=self._singles[best]
            ),
            ComparisonRow(
                name=f"greedy soup of {len(self.accepted)}{suffix}",
                metrics=self._tried[self.accepted[-1]][0],
            ),
        )

    def doubts(self, outcome: BnOutcome | None) -> list[str]:
        """Say whether what is published was judged otherwise than when it was chosen."""
        chosen = self.judge.value(self._tried[self.accepted[-1]][0])
        published = chosen
        if outcome is not None and outcome.metrics is not None:
            published = self.judge.value(outcome.metrics)
        if math.isclose(chosen, published, rel_tol=_REPEATS, abs_tol=_REPEATS):
            return []
        return [
            f"the evaluation does not repeat: {self.judge.metric} was {chosen:.6g} when the soup "
            f"was chosen, and is {published:.6g} as it is published"
        ]


def _plan_of(prepared: Prepared, used: Sequence[int]) -> AveragePlan:
    """Return the plan of the mean of some checkpoints."""
    plan = prepared.plan
    share = 1 / len(used)
    scheme = Scheme(
        name="coefficients",
        coefficients=tuple(share if index in used else 0.0 for index in range(plan.n_checkpoints)),
    )
    ((_, row),) = coefficient_rows(scheme, Positions(plan.labels, plan.steps, plan.epochs))
    recipe = replace(plan.recipe, schemes=(scheme,), accumulate="float64")
    take_from = row.used[0 if recipe.buffers == "first" else -1]
    output = replace(plan.outputs[0], name="", scheme=scheme, row=row, take_from=take_from)
    return replace(plan, recipe=recipe, outputs=(output,))


def _served(prepared: Prepared, accepted: Sequence[int]) -> Prepared:
    """Return what is prepared for the mean of those that were accepted."""
    plan = _plan_of(prepared, sorted(accepted))
    folder = prepared.checkpoints[max(accepted)].folder
    files, _ = find_side_files(folder, include_code=prepared.asked.include_code)
    return replace(
        prepared,
        plan=plan,
        side_files=[files],
        inherited_cards=[inherited_front_matter(folder)],
        workspace=replace(prepared.workspace, device="cpu"),  # sums are added there
    )


def _taken(
    plan: AveragePlan, prepared: Prepared, sinks: Sequence[ModelWriter]
) -> Iterable[tuple[int, Differing]]:
    """Copy integer and bool tensors; yield each block of them with what differed in it."""
    blocks = [block.block for block in plan.blocks if block.action is Action.TAKE]
    job = Job(
        plan=plan,
        checkpoints=prepared.checkpoints,
        sinks=sinks,
        blocks=blocks,
        finished=lambda block, differing: None,
        progress=lambda done: None,
    )
    differing: dict[int, Differing] = {block: set() for block in blocks}
    for chunk in job.chunks(prepared.workspace.chunk_nbytes):
        differing[chunk.block] |= take_chunk(job, chunk)
    yield from differing.items()


def _pour(final: Prepared, directory: OutputDirectory, pot: Pot) -> Averaged:
    """Write the soup, and see that nothing changed while it was made."""
    plan = final.plan
    pot.pour(directory.models[0], lambda block: directory.finish_block(block, set()))
    found: Differing = set()
    for block, differing in _taken(plan, final, directory.models):
        directory.finish_block(block, differing)
        found |= differing
    for checkpoint in final.checkpoints:
        checkpoint.check_unchanged()
    for index in plan.used_checkpoints:
        final.checkpoints[index].verify()
    names = {name for _, name in found}
    return Averaged(
        differing=[[tensor.name for tensor in plan.tensors if tensor.name in names]],
        adapters=[None],
        timings=Timings(),
    )
