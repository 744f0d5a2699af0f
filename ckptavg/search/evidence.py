"""What a sweep found, as files beside the model: ``sweep.json``, ``sweep.csv``, ``sweep.png``."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ckptavg.errors import without_token
from ckptavg.metrics import Judge
from ckptavg.plan import AveragePlan
from ckptavg.provenance import json_text
from ckptavg.results import ComparisonRow, SoupStep, SweepRow, Trial

_FORMAT_VERSION = 1


def sweep_files(
    judge: Judge, plan: AveragePlan, rows: Sequence[SweepRow], *, command: str | None, plot: bool
) -> dict[str, bytes]:
    """Return name and content of the files that hold what a sweep found.

    ``plot`` adds a picture, which needs the extra ``plots``.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    coefficients = {one.name or str(one.scheme): one.row.told_coefficients for one in plan.outputs}
    content: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "metric": judge.metric,
        "mode": judge.mode,
        "best": rows[0].name,
        "checkpoints": _checkpoints(plan),
        "rows": [
            asdict(row)
            | ({"coefficients": coefficients[row.name]} if row.kind == "average" else {})
            for row in rows
        ],
        "command": command and without_token(command),
    }
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
    files = {
        "sweep.json": f"{json_text(content)}\n".encode(),
        "sweep.csv": _csv(header, table),
    }
    if plot:
        from ckptavg.plots import sweep_plot

        averages = rows_of(rows, "average")
        files["sweep.png"] = sweep_plot(averages, told_rows(rows, judge)[len(averages) :], judge)
    return files


def soup_files(
    judge: Judge,
    plan: AveragePlan,
    steps: Sequence[SoupStep],
    *,
    command: str | None,
    plot: bool,
) -> dict[str, bytes]:
    """Return name and content of the files that hold how a soup was made."""
    names = list(dict.fromkeys(name for step in steps for name in step.metrics))
    content: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "metric": judge.metric,
        "mode": judge.mode,
        "checkpoints": _checkpoints(plan),
        "steps": [asdict(step) for step in steps],
        "command": command and without_token(command),
    }
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
    files = {
        "soup.json": f"{json_text(content)}\n".encode(),
        "soup.csv": _csv(header, rows),
    }
    if plot:
        from ckptavg.plots import soup_plot

        files["soup.png"] = soup_plot(steps, judge)
    return files


def tune_files(
    judge: Judge,
    plan: AveragePlan,
    trials: Sequence[Trial],
    *,
    command: str | None,
    plot: bool,
) -> dict[str, bytes]:
    """Return name and content of the files that hold a search over coefficients."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    content: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "metric": judge.metric,
        "mode": judge.mode,
        "checkpoints": _checkpoints(plan),
        "trials": [asdict(trial) for trial in trials],
        "command": command and without_token(command),
    }
    header = ["trial", *names, *(f"coefficient {label}" for label in plan.labels)]
    rows = [
        [number, *(trial.metrics.get(name, "") for name in names), *trial.coefficients]
        for number, trial in enumerate(trials, 1)
    ]
    files = {
        "tune.json": f"{json_text(content)}\n".encode(),
        "tune.csv": _csv(header, rows),
    }
    if plot:
        from ckptavg.plots import tune_plot

        files["tune.png"] = tune_plot(trials, judge)
    return files


def _checkpoints(plan: AveragePlan) -> list[dict[str, Any]]:
    return [
        {"source": label, "step": step, "epoch": epoch}
        for label, step, epoch in zip(plan.labels, plan.steps, plan.epochs, strict=True)
    ]


def _csv(header: Sequence[object], rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


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
    return rows[int(judge.best({str(at): row.metrics for at, row in enumerate(rows)}))]


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
