"""What ``plane``, ``width`` and ``path`` do before the first point and after the last one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from ckptavg._version import __version__
from ckptavg.average import DEFAULT_MEMORY_BUDGET_BYTES, choose_device
from ckptavg.checkpoint import Checkpoint
from ckptavg.comparing import Compared, compare
from ckptavg.derived import Group
from ckptavg.derived.spectral_norm import find_spectral_norms
from ckptavg.derived.weight_norm import find_weight_norms
from ckptavg.errors import UsageError
from ckptavg.eval_command import EvalCommand
from ckptavg.evaluation_log import judge_text
from ckptavg.evidence_files import (
    check_evidence_destination,
    data_files,
    evidence,
    publish_evidence,
)
from ckptavg.geometry import Geometry
from ckptavg.labelled import LabelledEvaluation
from ckptavg.landscape.points import PointJudge, Survey
from ckptavg.landscape.subspace import Row, WeightSpace, vectors_of
from ckptavg.live_model import LiveModel, check_repeatable
from ckptavg.metrics import Mode, best_mode
from ckptavg.opening import fetched_notes, opened_in_order
from ckptavg.processes import Processes, check_alone
from ckptavg.results import BnPass, Progress
from ckptavg.scratch import Scratch
from ckptavg.selection import Selection
from ckptavg.sources import Source
from ckptavg.steps import stage_of


class LandscapeOptions(TypedDict, total=False):
    """Reading, machine and output; see ``plane``."""

    selection: Selection | None
    state_key: str | None
    strip_prefixes: Sequence[str]
    keep_prefix: bool
    cache: bool
    device: str
    memory_budget_bytes: int
    n_threads: int | None
    plot: bool
    overwrite: bool
    progress: Progress | None
    command: str | None


@dataclass(kw_only=True)
class Session:
    """Checkpoints that were compared with each other, in a model that is ready for any point.

    Attributes:
        checkpoints: Those of the sources in the order of training, then the further ones.
        n_sources: How many the former are.
        compared: Their inner products.
        live: The model.
        space: Its weights.
        notes: What the user should know, one sentence each.
    """

    checkpoints: Sequence[Checkpoint]
    n_sources: int
    compared: Compared
    live: LiveModel
    space: WeightSpace
    notes: list[str]
    device: str
    judge: PointJudge
    started: float
    output: Path
    evaluation: BnPass
    kind: str
    options: Mapping[str, Any]
    _n_resumed: int = field(default=0, init=False)

    @property
    def geometry(self) -> Geometry:
        """Of all weights."""
        return self.compared.geometry

    @property
    def labels(self) -> Sequence[str]:
        """What the checkpoints are called."""
        return self.compared.plan.labels

    def vectors(self, rows: Sequence[Row]) -> list[Any]:
        """Return combinations of the checkpoints' weights, on the device.

        Raises:
            MemoryBudgetError: If there is no room for them.
        """
        used = sum(any(row[at] for row in rows) for at in range(len(self.checkpoints)))
        report = stage_of(self.options.get("progress"), "load", used)
        with self.space.room():
            return vectors_of(self.live, self.space, self.checkpoints, rows, report)

    @contextmanager
    def survey(self, n_points: int, parameters: Sequence[object]) -> Iterator[Survey]:
        """Begin to evaluate points, or go on; what is known is removed at the end.

        Args:
            n_points: How many there will be.
            parameters: What the points depend on beside the checkpoints.
        """
        check_repeatable(self.evaluation, n_points)
        judges = judge_text(self.evaluation)
        identity = None
        if judges is not None:
            plan = self.compared.plan
            identity = repr((__version__, self.kind, plan.fingerprint, judges, *parameters))
        with Scratch(self.output, self.kind, identity) as scratch:
            self.notes += scratch.notes
            survey = Survey(self.judge, scratch, self.options.get("progress"), self.kind, n_points)
            self._n_resumed = survey.n_resumed
            yield survey

    def publish(
        self,
        title: str,
        summary: Sequence[str],
        details: Mapping[str, Any],
        table: Sequence[Sequence[object]],
        pictures: Callable[[], dict[str, bytes]],
        *,
        metrics: Sequence[str],
        n_points: int,
    ) -> dict[str, Any]:
        """Write the files; return what ``LandscapeResult`` tells."""
        options = self.options
        content = evidence(
            self.kind, title, summary, self.notes, details, command=options.get("command")
        )
        files = data_files(self.kind, content, table)
        if options.get("plot", True):
            files |= pictures()
        publish_evidence(self.output, files, overwrite=options.get("overwrite", False))
        return {
            "output": self.output,
            "files": tuple(files),
            "summary": tuple(summary),
            "metrics": tuple(metrics),
            "n_points": n_points,
            "n_resumed": self._n_resumed,
            "device": self.device,
            "seconds": time.perf_counter() - self.started,
            "notes": tuple(dict.fromkeys(self.notes)),
        }


@contextmanager
def landscape_session(
    kind: str,
    sources: Source | Sequence[Source],
    further: Sequence[Source],
    output: str | Path,
    evaluation: BnPass,
    options: LandscapeOptions,
) -> Iterator[Session]:
    """Refuse what cannot be done, open and compare the checkpoints, and build the model.

    Integers, and what else has no place in a plane, are those of the last checkpoint that was
    loaded.

    Args:
        kind: What is made, such as ``plane``.
        sources: As in ``average_checkpoints``.
        further: Single checkpoints that no selection concerns.
        output: The directory to make.
        evaluation: Model, data and what judges. Without a seed it gets one, so that every point
            sees the same data.
        options: As in ``plane``.

    Raises:
        CkptavgError: As ``plane`` does.
    """
    started = time.perf_counter()
    output = Path(output)
    _check_options(kind, options, selects=bool(sources))
    check_landscape(kind, evaluation, plot=options.get("plot", True))
    check_evidence_destination(output, overwrite=options.get("overwrite", False), kind=kind)
    if evaluation.batches is not None and evaluation.seed is None:
        evaluation = replace(evaluation, seed=0)
    n_threads = options.get("n_threads")
    memory_budget_bytes = options.get("memory_budget_bytes", DEFAULT_MEMORY_BUDGET_BYTES)
    with opened_in_order(
        sources,
        further=further,
        selection=options.get("selection"),
        state_key=options.get("state_key"),
        strip_prefixes=options.get("strip_prefixes", ()),
        keep_prefix=options.get("keep_prefix", False),
        n_threads=n_threads,
        cache=options.get("cache", False),
    ) as opened:
        device = choose_device(options.get("device", "auto"), read_nbytes=0, runs_model=True)
        live = LiveModel(evaluation, opened.checkpoints[-1], device, Processes())
        for checkpoint in opened.checkpoints[:-1]:
            live.check(checkpoint)
        judge = PointJudge(live, evaluation, memory_budget_bytes)
        compared = compare(
            opened,
            device=device,
            memory_budget_bytes=memory_budget_bytes,
            n_threads=n_threads,
            progress=options.get("progress"),
        )
        verdict = compared.verdict
        doubts = verdict.sentences[:1] if verdict.kind == "unrelated" else ()
        yield Session(
            checkpoints=opened.checkpoints,
            n_sources=len(opened.order),
            compared=compared,
            live=live,
            space=WeightSpace(live.module),
            notes=[
                *compared.plan.notes,
                *fetched_notes(opened.hub),
                *doubts,
                *_stored_in_parts(opened.checkpoints),
            ],
            device=device,
            judge=judge,
            started=started,
            output=output,
            evaluation=evaluation,
            kind=kind,
            options=options,
        )


def _stored_in_parts(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Point out layers whose weights are no linear function of what is stored."""
    tensors, labels = checkpoints[-1].tensors, [one.label for one in checkpoints]
    groups: list[Group] = [
        *find_weight_norms(tensors, labels), *find_spectral_norms(tensors, labels),
    ]  # fmt: skip
    if not groups:
        return []
    return [
        f"layers are stored by parts ({len(groups)}), such as '{groups[0].module}' "
        f"({groups[0].kind}): points are combinations of the parts, and the mean is not the one "
        "that average publishes"
    ]


def _check_options(kind: str, options: LandscapeOptions, *, selects: bool) -> None:
    """Refuse options that there are not, or that would change nothing."""
    unknown = sorted(options.keys() - LandscapeOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"{kind}() got an unexpected keyword argument '{unknown[0]}'")
    if not selects and options.get("selection") not in (None, Selection()):
        raise UsageError(f"a {kind} goes by single checkpoints: leave selection out")


def check_landscape(kind: str, evaluation: BnPass, *, plot: bool) -> None:
    """Refuse an evaluation that cannot judge points.

    Raises:
        UsageError: If so, or pictures are wanted and matplotlib is missing.
    """
    check_alone(f"a {kind}", distributed=False)
    function = evaluation.evaluate
    if function is None:
        raise UsageError(f"a {kind} needs a metric: evaluate (--loader or --eval)")
    if isinstance(function, EvalCommand):
        raise UsageError(
            f"a {kind} has no model directories that a command could judge: evaluate with a "
            "function (--loader or --eval)"
        )
    if evaluation.compare:
        raise UsageError(f"a {kind} makes comparisons of its own: leave compare out")
    if isinstance(function, LabelledEvaluation):
        function.check_repeatable(2)
    if plot:
        from ckptavg.plots import require_matplotlib

        require_matplotlib("--no-plot")


def mode_of(metric: str) -> Mode:
    """Return what is better of a metric, by its name; less where that does not tell."""
    try:
        return best_mode(metric)
    except UsageError:
        return "min"


def best_of(metric: str) -> str:
    """Say what ``mode_of`` looks for: the lowest, where a name does not tell what is better."""
    try:
        best_mode(metric)
    except UsageError:
        return "lowest"
    return "best"
