"""What searches tried: the tables of sweeps, soups and coefficient searches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckptavg.metrics import Mode, badness
from ckptavg.report.figures import counted, finite, label, number, short_labels
from ckptavg.report.gather import SEARCHES, Evidence
from ckptavg.report.markup import (
    OPEN_ROWS,
    TOP_ROWS,
    Column,
    Html,
    block,
    code,
    element,
    folded,
    joined,
    paragraph,
)
from ckptavg.report.pictures import Picture, figure
from ckptavg.report.sections import Section, metrics_table
from ckptavg.report.summary import modes
from ckptavg.schemes import shortened

_Judged = tuple[object, Mapping[str, Any]]
_TITLES = {"sweep": "Sweep", "soup": "Greedy soup", "tune": "Coefficient search"}


def search_section(one: Evidence, pictures: Sequence[Picture], where: str) -> Section:
    """Return what a search found.

    Args:
        one: Its file.
        pictures: What lies beside it.
        where: What the page calls the file.
    """
    told = one.told
    ((metric, mode),) = modes(told).items()
    found = told[SEARCHES[one.kind]]
    tell: Callable[[Sequence[Mapping[str, Any]], str, Mode], tuple[str, Html]] = {
        "sweep": _sweep, "soup": _soup, "tune": _tune,
    }[one.kind]  # fmt: skip
    summary, tables = tell(found, metric, mode)
    parts = [paragraph(summary, class_="finding")]
    own = (picture for picture in pictures if picture.path.stem == one.path.stem)
    title = _TITLES[one.kind]
    parts += [figure(picture, code(picture.path.name), f"{title}. {summary}") for picture in own]
    parts.append(tables)
    numbers = [code(where), code(f"{one.path.stem}.csv")]
    parts.append(paragraph("All figures: ", joined(numbers, ", "), class_="numbers"))
    if told.get("command"):
        parts.append(folded("The command", block(str(told["command"]))))
    return Section(title, joined(parts))


def _by(metric: str, mode: Mode) -> str:
    return f"{metric} ({'lower' if mode == 'min' else 'higher'} is better)"


def _value(metrics: Mapping[str, Any], metric: str) -> float:
    value = finite(metrics.get(metric))
    return float("nan") if value is None else value


def _best(rows: Sequence[Mapping[str, Any]], metric: str, mode: Mode) -> Mapping[str, Any] | None:
    ranked = sorted(rows, key=lambda row: badness(_value(row["metrics"], metric), mode))
    return ranked[0] if ranked else None


def _table(
    title: str,
    rows: Sequence[_Judged],
    known: Mapping[str, Mode],
    own: set[int],
    before: Sequence[tuple[Column, Sequence[object]]] = (),
    rows_are_sorted: bool = True,
) -> Html:
    """Return a table, the best first; of a long one only the beginning is unfolded."""
    whole = metrics_table(title, rows, own, known, before)
    if len(rows) <= OPEN_ROWS:
        return whole
    some = [(column, cells[:TOP_ROWS]) for column, cells in before]
    first = metrics_table(f"{title}, best", rows[:TOP_ROWS], own, known, some)
    return joined([first, folded(f"All {len(rows)} {title.lower()}", whole)])


# ---- sweeps


def _sweep(rows: Sequence[Mapping[str, Any]], metric: str, mode: Mode) -> tuple[str, Html]:
    averages = [row for row in rows if row["kind"] == "average"]
    others = {kind: [row for row in rows if row["kind"] == kind] for kind in ("last", "single")}
    best = averages[0]
    text = (
        f"Of {counted(len(averages), 'average')}, {shortened(str(best['name']))} is best by "
        f"{_by(metric, mode)}: {number(best['metrics'].get(metric))}."
    )
    with_pass = " with a BatchNorm pass of its own" if best["bn_pass"] else ""
    like_best = {
        kind: _best([row for row in found if row["bn_pass"] == best["bn_pass"]], metric, mode)
        for kind, found in others.items()
    }
    told = [
        f"the {'last' if kind == 'last' else 'best single'} checkpoint{with_pass} has "
        f"{number(row['metrics'].get(metric))}"
        for kind, row in like_best.items()
        if row is not None
    ]
    if told:
        sentence = ", ".join(told)
        text += f" {sentence[:1].upper()}{sentence[1:]}."
    known = {metric: mode}
    names = [shortened(str(row["name"])) for row in averages]
    counts = [number(row["n_checkpoints"]) for row in averages]
    column = Column("checkpoints")
    parts = [
        _table(
            "Averages", list(zip(names, (row["metrics"] for row in averages), strict=True)),
            known, {0}, [(column, counts)],
        )
    ]  # fmt: skip
    for kind, title in (("last", "The last checkpoint"), ("single", "Single checkpoints")):
        if others[kind]:
            shown = metrics_table(title, _checkpoint_rows(others[kind]), set(), known)
            parts.append(folded(f"{title}, judged alone", shown))
    return text, joined(parts)


def _checkpoint_rows(rows: Sequence[Mapping[str, Any]]) -> list[_Judged]:
    _, short = short_labels([str(row["name"]) for row in rows])
    return [
        (
            joined([label(name, str(row["name"])), " + BN pass" if row["bn_pass"] else ""]),
            row["metrics"],
        )
        for name, row in zip(short, rows, strict=True)
    ]


# ---- soups


def _soup(steps: Sequence[Mapping[str, Any]], metric: str, mode: Mode) -> tuple[str, Html]:
    accepted = [step for step in steps if step["accepted"]]
    text = (
        f"{len(accepted)} of {counted(len(steps), 'checkpoint')} went in, by {_by(metric, mode)}: "
        f"{number(accepted[-1]['mean_metrics'].get(metric))}, against "
        f"{number(steps[0]['metrics'].get(metric))} of the best single one."
    )
    _, short = short_labels([str(step["candidate"]) for step in steps])
    names = [label(one, str(step["candidate"])) for one, step in zip(short, steps, strict=True)]
    rows: list[_Judged] = [
        (
            name,
            {
                f"{metric} alone": step["metrics"].get(metric),
                f"{metric} of the mean": step["mean_metrics"].get(metric),
            },
        )
        for name, step in zip(names, steps, strict=True)
    ]
    verdicts = ["accepted" if step["accepted"] else "rejected" for step in steps]
    own = {at for at, step in enumerate(steps) if step["accepted"]}
    known = {f"{metric} alone": mode, f"{metric} of the mean": mode}
    shown = _table("Steps", rows, known, own, [(Column("", "text"), verdicts)])
    return text, joined(
        [
            paragraph("In the order in which they were tried, best first; those set off went in."),
            shown,
        ]
    )


# ---- coefficient searches


def _tune(trials: Sequence[Mapping[str, Any]], metric: str, mode: Mode) -> tuple[str, Html]:
    numbered = sorted(
        enumerate(trials, 1), key=lambda one: badness(_value(one[1]["metrics"], metric), mode)
    )
    best = numbered[0][1]["metrics"].get(metric)
    text = (
        f"Of {counted(len(trials), 'trial')}, the best by {_by(metric, mode)} has {number(best)}; "
        f"the uniform mean, which was the first, has {number(trials[0]['metrics'].get(metric))}."
    )
    rows: list[_Judged] = [
        (element("span", f"trial {at}" + (", the uniform mean" if at == 1 else "")), one["metrics"])
        for at, one in numbered
    ]
    return text, _table("Trials", rows, {metric: mode}, {0})
