"""What a BatchNorm pass did: how far the statistics of each layer moved."""

from collections.abc import Mapping, Sequence
from typing import Any

from ckptavg.report.figures import bar, counted, finite, label, number, range_bar
from ckptavg.report.markup import (
    OPEN_ROWS,
    TOP_ROWS,
    Column,
    Html,
    Row,
    code,
    folded,
    items,
    joined,
    paragraph,
    table,
)


def batchnorm_section(told: Mapping[str, Any]) -> Html:
    """Return how far the statistics of each layer moved; of many layers those that moved most."""
    layers = told["layers"]
    parts = [paragraph(_pass_in_short(told))]
    if layers:
        shifts = [finite(one["mean_shift"]) for one in layers]
        ratios = [_ratio(one["variance_ratio"]) for one in layers]
        shift_scale = [one for one in shifts if one is not None]
        ratio_scale = [end for ends in ratios if ends is not None for end in ends]
        rows = [
            Row(
                [
                    label(str(one["name"]) or "(the model itself)"),
                    number(one["n_features"]),
                    bar(_shift(one["mean_shift"]), shift, shift_scale),
                    range_bar(_factors(one["variance_ratio"]), ends, ratio_scale),
                ]
            )
            for one, shift, ends in zip(layers, shifts, ratios, strict=True)
        ]
        columns = [
            Column("layer", "text"),
            Column("channels"),
            Column("mean moved by up to", "bar"),
            Column("variance changed by a factor of", "bar wide"),
        ]
        is_long = len(rows) > OPEN_ROWS
        if is_long:
            order = sorted(range(len(rows)), key=lambda at: -(shifts[at] or 0.0))[:TOP_ROWS]
            parts.append(paragraph(f"The {len(order)} layers whose means moved furthest:"))
            parts.append(table("Layers that moved furthest", columns, [rows[at] for at in order]))
        whole = table("BatchNorm layers", columns, rows)
        parts.append(folded(f"All {len(rows)} layers", whole) if is_long else whole)
    skipped = told.get("skipped") or {}
    if skipped:
        names = [joined([code(name), f" {why}"]) for name, why in skipped.items()]
        parts.append(folded(f"{counted(len(names), 'layer')} left alone", items(names)))
    return joined(parts)


def _pass_in_short(told: Mapping[str, Any]) -> str:
    how = [
        f"{counted(told['n_samples'], 'sample')} in "
        f"{counted(told['n_batches'], 'batch', 'batches')}",
        f"estimator “{told['estimator']}”",
    ]
    if told.get("n_processes", 1) > 1:
        how.append(counted(told["n_processes"], "process", "processes"))
    how += [
        f"{str(key).replace('_', ' ')} {value}"
        for key, value in (told.get("options") or {}).items()
    ]
    text = f"{counted(len(told['layers']), 'layer')} recomputed: {', '.join(how)}."
    convergence = told.get("convergence")
    if convergence:
        share, change = finite(convergence["share"]), finite(convergence["change"])
        if share is not None and change is not None:
            text += (
                f" The last {share:.0%} of the data moved no mean by more than {change:.2g} sd and "
                f"no variance by more than {change:.2%}."
            )
    return text


def _shift(value: object) -> str:
    text = number(value, 3)
    return text if finite(value) is None else f"{text} sd"


def _ratio(ends: Sequence[object]) -> tuple[float, float] | None:
    low, high = map(finite, ends)
    return None if low is None or high is None or low <= 0 else (low, high)


def _factors(ends: Sequence[object]) -> str:
    low, high = (number(end, 3) for end in ends)
    return f"{low} to {high}"
