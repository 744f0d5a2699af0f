"""What a search found: as files beside the model, and in words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ckptavg.errors import without_token
from ckptavg.evidence_files import FORMAT_VERSION, data_files
from ckptavg.metrics import Judge
from ckptavg.plan import AveragePlan
from ckptavg.results import ComparisonRow, SoupStep, SweepRow, Trial


def sweep_files(
    judge: Judge, plan: AveragePlan, rows: Sequence[SweepRow], *, command: str | None, plot: bool
) -> dict[str, bytes]:
    """Return name and content of the files that hold what a sweep found.

    ``plot`` adds a picture, which needs the extra ``plots``.
    """
    names = _metric_names(row.metrics for row in rows)
    coefficients = {one.name or str(one.scheme): one.row.told_coefficients for one in plan.outputs}
    told = [
        asdict(row) | ({"coefficients": coefficients[row.name]} if row.kind == "average" else {})
        for row in rows
    ]
    header = ["name", "kind", "scheme", "n_checkpoints", "bn_pass", *names]
    table = [
        [
            row.name,
            row.kind,
            row.scheme or "",
            row.n_checkpoints,
            row.bn_pass,
            *(row.metrics.get(name, "") for name in names),
        ]
        for row in rows
    ]

    def picture() -> bytes:
        from ckptavg.plots import sweep_plot

        averages = rows_of(rows, "average")
        return sweep_plot(averages, told_rows(rows, judge)[len(averages) :], judge)

    content = _content(judge, plan, {"best": rows[0].name}, {"rows": told}, command)
    return _files("sweep", content, [header, *table], picture if plot else None)


def soup_files(
    judge: Judge,
    plan: AveragePlan,
    steps: Sequence[SoupStep],
    *,
    command: str | None,
    plot: bool,
) -> dict[str, bytes]:
    """Return name and content of the files that hold how a soup was made."""
    names = _metric_names(step.metrics for step in steps)
    header = ["candidate", "accepted", *names, *(f"mean {name}" for name in names)]
    rows = [
        [
            step.candidate,
            step.accepted,
            *(step.metrics.get(name, "") for name in names),
            *(step.mean_metrics.get(name, "") for name in names),
        ]
        for step in steps
    ]

    def picture() -> bytes:
        from ckptavg.plots import soup_plot

        return soup_plot(steps, judge)

    told = {"steps": [asdict(step) for step in steps]}
    content = _content(judge, plan, {}, told, command)
    return _files("soup", content, [header, *rows], picture if plot else None)


def tune_files(
    judge: Judge,
    plan: AveragePlan,
    trials: Sequence[Trial],
    *,
    command: str | None,
    plot: bool,
) -> dict[str, bytes]:
    """Return name and content of the files that hold a search over coefficients."""
    names = _metric_names(trial.metrics for trial in trials)
    header = ["trial", *names, *(f"coefficient {label}" for label in plan.labels)]
    rows = [
        [number, *(trial.metrics.get(name, "") for name in names), *trial.coefficients]
        for number, trial in enumerate(trials, 1)
    ]

    def picture() -> bytes:
        from ckptavg.plots import tune_plot

        return tune_plot(trials, judge)

    told = {"trials": [asdict(trial) for trial in trials]}
    content = _content(judge, plan, {}, told, command)
    return _files("tune", content, [header, *rows], picture if plot else None)


def _metric_names(all_of: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for metrics in all_of for name in metrics))


def _content(
    judge: Judge,
    plan: AveragePlan,
    result: Mapping[str, Any],
    details: Mapping[str, Any],
    command: str | None,
) -> dict[str, Any]:
    """Return what JSON tells: the result, on what, and what was tried."""
    metric, mode = judge.settled
    checkpoints = [
        {"source": label, "step": step, "epoch": epoch}
        for label, step, epoch in zip(plan.labels, plan.steps, plan.epochs, strict=True)
    ]
    return {
        "format_version": FORMAT_VERSION,
        "metric": metric,
        "mode": mode,
        **result,
        "checkpoints": checkpoints,
        **details,
        "command": command and without_token(command),
    }


def _files(
    name: str,
    content: Mapping[str, Any],
    table: Iterable[Sequence[object]],
    picture: Callable[[], bytes] | None,
) -> dict[str, bytes]:
    """Return ``name`` with each ending, and the content of that file."""
    files = data_files(name, content, table)
    return files if picture is None else files | {f"{name}.png": picture()}


def told_rows(rows: Sequence[SweepRow], judge: Judge) -> list[ComparisonRow]:
    """Return the rows to show to people: all averages, the last checkpoint, the best single one."""
    found = [ComparisonRow(name=row.name, metrics=row.metrics) for row in rows_of(rows, "average")]
    for bn_pass in (False, True):
        suffix = " + BN pass" if bn_pass else ""
        for row in rows_of(rows, "last", bn_pass):
            found.append(ComparisonRow(name=f"last checkpoint{suffix}", metrics=row.metrics))
        single = best_of(rows_of(rows, "single", bn_pass), judge)
        if single is not None:
            name = f"best single checkpoint{suffix}: {single.name}"
            found.append(ComparisonRow(name=name, metrics=single.metrics))
    return found


def rows_of(rows: Sequence[SweepRow], kind: str, bn_pass: bool | None = None) -> list[SweepRow]:
    """Return the rows of one kind, in their order; ``bn_pass`` None takes both."""
    return [row for row in rows if row.kind == kind and bn_pass in (None, row.bn_pass)]


def best_of(rows: Sequence[SweepRow], judge: Judge) -> SweepRow | None:
    """Return the best row, of equals the first; None if there are none."""
    if not rows:
        return None
    return rows[judge.best({at: row.metrics for at, row in enumerate(rows)})]


def verdict(rows: Sequence[SweepRow], judge: Judge) -> list[str]:
    """Return notes on what the best average brings over what one has without averaging."""
    best, notes = rows[0], []
    controls = {
        "the last checkpoint": best_of(rows_of(rows, "last", best.bn_pass), judge),
        "the best single checkpoint": best_of(rows_of(rows, "single", best.bn_pass), judge),
    }
    for what, control in controls.items():
        if control is not None and not judge.is_better(best.metrics, control.metrics):
            with_pass = " (+ BN pass)" if control.bn_pass else ""
            notes.append(
                f"the best average, {best.name}, is not better than {what}{with_pass}, "
                f"{control.name}: {judge.metric} {judge.value(best.metrics):.6g} against "
                f"{judge.value(control.metrics):.6g}"
            )
    return notes
