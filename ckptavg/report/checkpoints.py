"""What went into a model: checkpoints, and how much each counts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ckptavg.report.figures import (
    bar,
    counted,
    finite,
    label,
    number,
    plain,
    short_labels,
    strip,
)
from ckptavg.report.markup import (
    OPEN_ROWS,
    Column,
    Html,
    Row,
    code,
    element,
    folded,
    joined,
    paragraph,
    table,
)
from ckptavg.report.summary import when
from ckptavg.schemes import shortened
from ckptavg.units import size

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = "https://huggingface.co"
_SHORT_COMMIT = 10


def checkpoints_section(told: Mapping[str, Any]) -> Html:
    """Return the checkpoints with their coefficients; many are folded."""
    checkpoints = told["checkpoints"]
    labels = [str(one["source"]) for one in checkpoints]
    prefix, short = short_labels(labels)
    values = [one["coefficient"] for one in checkpoints]
    statistic = told.get("statistic") or {}
    drawn = [value for value in map(finite, values) if value is not None]
    all_alike = len(set(values)) == 1
    columns = [Column("checkpoint", "text")]
    cells = [[label(text, full) for text, full in zip(short, labels, strict=True)]]
    for noun in ("step", "epoch"):
        if any(one.get(noun) is not None for one in checkpoints):
            columns.append(Column(noun))
            cells.append([Html(plain(one.get(noun))) for one in checkpoints])
    columns.append(Column("coefficient", "number" if all_alike else "bar"))
    cells.append(
        [
            _coefficient(value, [] if all_alike else drawn, str(statistic.get("name")))
            for value in values
        ]
    )
    if any(one["files"] for one in checkpoints):
        columns.append(Column("size"))
        nbytes = [sum(file["nbytes"] for file in one["files"]) for one in checkpoints]
        cells.append([Html(size(one)) for one in nbytes])
    if any(one["hub"] for one in checkpoints):
        columns.append(Column("commit", "text"))
        cells.append([_commit(one["hub"]) for one in checkpoints])
    if any(one.get("made_by_ckptavg") for one in checkpoints):
        columns.append(Column("itself", "text"))
        cells.append([_itself(one.get("made_by_ckptavg")) for one in checkpoints])
    rows = [Row(row) for row in zip(*cells, strict=True)]
    whole = table("Checkpoints", columns, rows)
    where = ["All from ", code(prefix), ". "] if prefix else []
    intro = [*where, _in_short(told, values)]
    parts = [paragraph(*intro)]
    if len(rows) <= OPEN_ROWS:
        return joined([*parts, whole])
    if not all_alike and drawn:
        told_of = f"Coefficients, oldest first: {_ends(drawn)}"
        parts.append(strip(list(map(finite, values)), told_of))
    return joined([*parts, folded(f"All {len(rows)} checkpoints", whole)])


def _in_short(told: Mapping[str, Any], values: Sequence[object]) -> str:
    which = when(told)
    count = counted(len(values), "checkpoint") + (f", {which}" if which else "")
    if None in values:
        return f"{count}; of every value the {told['statistic']['name']} is taken."
    if len(values) == 1:
        return f"{count}."
    if len(set(values)) == 1:
        return f"{count}, with the same coefficient, {number(values[0])}."
    drawn = [value for value in map(finite, values) if value is not None]
    negative = sum(value < 0 for value in drawn)
    more = f"; {counted(negative, 'coefficient')} below zero" if negative else ""
    return f"{count}, with coefficients of {_ends(drawn)}{more}."


def _ends(values: Sequence[float]) -> str:
    return f"{number(min(values))} to {number(max(values))}"


def _coefficient(value: object, drawn: Sequence[float], statistic: str) -> Html:
    if value is None or not drawn:
        return joined([statistic if value is None else number(value)])
    return bar(number(value), finite(value), drawn)


def _commit(hub: Mapping[str, Any] | None) -> Html:
    if not hub:
        return Html("")
    repo, commit = str(hub["repo"]), str(hub["commit"])
    shown = element("code", commit[:_SHORT_COMMIT], title=commit)
    if not (_REPO.fullmatch(repo) and _COMMIT.fullmatch(commit)):
        return shown
    return element("a", shown, href=f"{_HUB}/{quote(repo)}/tree/{commit}", rel="noreferrer")


def _itself(made: Mapping[str, Any] | None) -> Html:
    if not made:
        return Html("")
    count = len(made["checkpoints"])
    return joined([code(shortened(str(made["scheme"]))), f" of {counted(count, 'checkpoint')}"])
