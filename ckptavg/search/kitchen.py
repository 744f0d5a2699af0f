"""Who goes into a soup: judges checkpoints and means of them, and remembers what came of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckptavg.average.chunks import take_chunk
from ckptavg.average.work import Job
from ckptavg.blocks import Action, Differing
from ckptavg.bn_pass import BnOutcome
from ckptavg.errors import ModelError
from ckptavg.eval_command import EvalCommand
from ckptavg.metrics import Judge
from ckptavg.plan import AveragePlan
from ckptavg.prepare import Prepared
from ckptavg.results import BnPass, ComparisonRow, Progress, SoupStep
from ckptavg.schemes import Positions, Scheme, coefficient_rows
from ckptavg.scratch import Scratch
from ckptavg.search.pot import Pot
from ckptavg.side_files import copy_side_files
from ckptavg.steps import stage_of
from ckptavg.writer import ModelWriter

Metrics = Mapping[str, float]
_REPEATS = 1e-6


@dataclass
class Kitchen:
    """Judges checkpoints and means of them, and remembers what came of it.

    Attributes:
        prepared: The checkpoints.
        evaluation: Who judges.
        judge: What decides.
        scratch: Where it is remembered.
        progress: As in ``average_checkpoints``.
        pot: The sum of those that were accepted.
        accepted: Their numbers, in the order in which they were.
        read_nbytes: Bytes of weights that were read from checkpoints.
    """

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
        newest_first = sorted(self._singles, reverse=True)
        return self.judge.ranked({index: self._singles[index] for index in newest_first})

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
        directory = self.scratch.path / "candidate"
        shutil.rmtree(directory, ignore_errors=True)  # the last one
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
        plan = plan_of(self.prepared, sorted(used))
        copy_taken(plan, self.prepared, [model])

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


def plan_of(prepared: Prepared, used: Sequence[int]) -> AveragePlan:
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


def copy_taken(
    plan: AveragePlan, prepared: Prepared, sinks: Sequence[ModelWriter]
) -> dict[int, Differing]:
    """Copy integer and bool tensors; return their blocks, with what differed in each."""
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
    return differing
