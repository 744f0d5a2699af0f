"""The BatchNorm pass on an average that is written but not yet published, and what it brought."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ckptavg.batchnorm import BnReport
from ckptavg.checkpoint import Checkpoint
from ckptavg.live_model import LiveModel, Report
from ckptavg.plan import AveragePlan
from ckptavg.results import ComparisonRow


@dataclass(frozen=True, kw_only=True)
class BnOutcome:
    """What became of one average after it was written.

    Attributes:
        report: What the BatchNorm pass did; None without one.
        statistics: Names and bytes to put into the written files.
        metrics: What the evaluation says of the model with them; None without one.
        comparison: What it says of other combinations.
    """

    report: BnReport | None = None
    statistics: list[tuple[str, bytes]]
    metrics: Mapping[str, float] | None
    comparison: tuple[ComparisonRow, ...] = ()


@dataclass(frozen=True)
class LastCheckpoint:
    """What was found of a checkpoint that averages are compared with."""

    rows: tuple[ComparisonRow, ...]
    statistics: Mapping[str, Tensor]


def recompute_written(
    live: LiveModel,
    plan: AveragePlan,
    written: Path,
    label: str,
    last: Checkpoint | None,
    known: dict[str, LastCheckpoint],
    progress: Callable[[str], Report],
) -> BnOutcome:
    """Load an average that was just written into the model, run the pass, and evaluate it.

    Args:
        live: The user's model, and what was asked for.
        plan: What was averaged.
        written: The directory of the average.
        label: What messages call it.
        last: The checkpoint to compare with; None if there is none.
        known: What was found of such checkpoints for other outputs; added to.
        progress: Gives what reports the samples of a stage.
    """
    rows: list[ComparisonRow] = []
    compare = live.options.compare
    # what was averaged before is a single model here, whose statistics may be of any kind
    stored = "averaged" if plan.n_checkpoints > 1 else "as stored"
    what = "as stored" if plan.n_checkpoints == 1 and last is None else "average"

    def evaluate(name: str) -> None:
        metrics = live.evaluated(name)
        if metrics is not None:
            rows.append(ComparisonRow(name=name, metrics=metrics))

    last_statistics: Mapping[str, Tensor] = {}
    if compare and last is not None:
        if last.label not in known:
            live.load(last)
            last_statistics = live.statistics()
            evaluate("last checkpoint")
            live.load(last)  # an evaluation may have changed it
            live.recompute(progress("batchnorm of the last checkpoint"))
            evaluate("last checkpoint + BN pass")
            known[last.label] = LastCheckpoint(tuple(rows), last_statistics)
        rows[:], last_statistics = known[last.label].rows, known[last.label].statistics
    fit = live.load_written(written, label)
    if compare and last_statistics:
        live.set_statistics(last_statistics)
        evaluate("average, BN statistics of the last")
        live.load_written(written, label)
    if compare:
        evaluate(f"average, BN statistics {stored}" if what == "average" else what)
        live.load_written(written, label)
    report = live.recompute(progress("batchnorm"))
    statistics = live.statistics_bytes(report, plan, fit)
    evaluate(what if report is None else f"{what} + BN pass")
    return BnOutcome(
        report=report,
        statistics=statistics,
        metrics=rows[-1].metrics if rows else None,
        comparison=tuple(rows) if compare else (),
    )
