"""Pictures of planes, rays and paths, as in Figures 1, 3, 4 and 5 of the SWA paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ckptavg.landscape_results import Mark, Ray, Segment
from ckptavg.plots.style import (
    BLACK,
    MARKERS,
    ORANGE,
    SERIES,
    SURFACE,
    open_up,
    pictures,
    plain,
    short,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]

_LEVELS = 14
_PANEL_WIDTH = 4.6  # inches, of a plane
_RAY_ALPHA = 0.25
_ROUNDING = 1e-12  # of values: what is closer is the same
_UNITS = (("_error", " (%)"), ("_loss", " (nats)"))


@styled()
def plane_pictures(
    x: Values,
    y: Values,
    grids: Mapping[str, Values],
    marks: Sequence[Mark],
    axis_names: tuple[str, str],
) -> dict[str, bytes]:
    """Draw the contours of every metric on a plane, with everything that is seen from it.

    Returns:
        ``plane.png`` and ``plane.svg``.
    """
    height = min(max(_PANEL_WIDTH * float((y[-1] - y[0]) / (x[-1] - x[0])), 2.0), 6.0) + 1.0
    figure, panels = _figure(len(grids), _PANEL_WIDTH + 1.6, height)
    for panel, (metric, grid) in zip(panels, grids.items(), strict=True):
        levels = _levels(grid)
        filled = panel.contourf(x, y, grid, levels=levels, cmap=SURFACE, extend="both")
        panel.contour(x, y, grid, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
        bar = figure.colorbar(filled, ax=panel, format="%.3g")
        bar.set_label(named(metric))
        _draw_marks(panel, marks)
        panel.set_aspect("equal", adjustable="box")
        panel.set_xlabel(axis_names[0])
        panel.set_ylabel(axis_names[1])
        panel.set_title(plain(metric))
    return _finished("plane", figure, n_columns=4)


def _draw_marks(panel: Axes, marks: Sequence[Mark]) -> None:
    """Draw the iterates as a path, corners and further weights under their names, the mean."""
    *marks, mean = marks
    iterates = [mark for mark in marks if mark.is_source]
    edge = {"edgecolors": "white", "linewidths": 0.8}
    if iterates:
        along, across = [mark.x for mark in iterates], [mark.y for mark in iterates]
        panel.plot(along, across, "-", color="white", linewidth=0.7, alpha=0.8)
        panel.scatter(along, across, s=26, color=BLACK, label="checkpoints", zorder=3, **edge)  # type: ignore[arg-type]  # keywords
    corners = [mark for mark in iterates if mark.kind == "corner"]
    if corners:
        panel.scatter(
            [mark.x for mark in corners], [mark.y for mark in corners], s=64, marker="s",
            color=SERIES[4], label="checkpoints that are corners of the plane", zorder=4, **edge,  # type: ignore[arg-type]  # likewise
        )  # fmt: skip
    others = [mark for mark in marks if not mark.is_source]
    for number, mark in enumerate(others):
        panel.scatter(
            [mark.x], [mark.y], s=70, marker=MARKERS[(number + 2) % len(MARKERS)],
            color=SERIES[(number + 5) % len(SERIES)], label=short(mark.name), zorder=4, **edge,  # type: ignore[arg-type]  # likewise
        )  # fmt: skip
    panel.scatter(
        [mean.x], [mean.y], s=190, marker="*", color=ORANGE, zorder=5,
        label="mean of the checkpoints", **edge,  # type: ignore[arg-type]  # likewise
    )  # fmt: skip


@styled()
def width_pictures(
    solutions: Sequence[str],
    distances: Mapping[str, Values],
    rays: Sequence[Ray],
    means: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
) -> dict[str, bytes]:
    """Draw every metric over the distance from solutions: single rays, and their mean.

    Returns:
        ``width.png`` and ``width.svg``.
    """
    from matplotlib.figure import Figure

    metrics = list(rays[0].metrics)
    figure = Figure(figsize=(5.4 * len(distances), 3.6 * len(metrics) + 0.4), layout="constrained")
    panels = figure.subplots(len(metrics), len(distances), squeeze=False)
    for row, metric in enumerate(metrics):
        for column, (kind, places) in enumerate(distances.items()):
            panel = panels[row, column]
            for ray in rays:
                if ray.kind == kind:
                    color = SERIES[solutions.index(ray.solution) % len(SERIES)]
                    panel.plot(
                        places, ray.metrics[metric], color=color, alpha=_RAY_ALPHA, linewidth=0.8
                    )
            for number, name in enumerate(solutions):
                panel.plot(
                    places, means[kind][name][metric], color=SERIES[number % len(SERIES)],
                    marker=MARKERS[number % len(MARKERS)], markersize=4, linewidth=2,
                    label=f"{short(name)} (mean of the rays)",
                )  # fmt: skip
            panel.set_ylabel(named(metric))
            panel.set_xlabel(
                "distance from the solution"
                if kind == "sphere"
                else "distance, in norms of the filters"
            )
            panel.set_title(
                "random directions, uniform on the sphere"
                if kind == "sphere"
                else "random directions, filter-normalised"
            )
    return _finished("width", figure, n_columns=3)


@styled()
def path_pictures(places: Values, segments: Sequence[Segment]) -> dict[str, bytes]:
    """Draw every metric along straight lines between weights.

    Returns:
        ``path.png`` and ``path.svg``.
    """
    metrics = list(segments[0].metrics)
    figure, panels = _figure(len(metrics), 5.6, 3.8)
    for panel, metric in zip(panels, metrics, strict=True):
        for number, one in enumerate(segments):
            panel.plot(
                places, one.metrics[metric], color=SERIES[number % len(SERIES)],
                marker=MARKERS[number % len(MARKERS)], markersize=4,
                label=f"to {short(one.stop)}",
            )  # fmt: skip
        panel.axvline(0, color=BLACK, linewidth=1, linestyle=":")
        panel.axvline(1, color=BLACK, linewidth=1, linestyle=":")
        ends = {0.0: "start", 1.0: "stop"}
        for place, name in ends.items():
            panel.annotate(
                name, (place, 1), xycoords=("data", "axes fraction"), xytext=(3, -3),
                textcoords="offset points", va="top", fontsize="small",
            )  # fmt: skip
        panel.set_xlabel("t: (1 - t) start + t stop")
        panel.set_ylabel(named(metric))
        panel.set_title(f"from {short(segments[0].start)}")
    return _finished("path", figure, n_columns=2)


def _figure(n_panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels, in two columns where there are several.

    Args:
        n_panels: How many.
        width: Of a panel, in inches.
        height: Likewise.
    """
    from matplotlib.figure import Figure

    columns = min(n_panels, 2)
    rows = -(-n_panels // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for panel in panels[n_panels:]:
        panel.set_axis_off()
    return figure, panels[:n_panels]


def _finished(name: str, figure: Figure, *, n_columns: int) -> dict[str, bytes]:
    """Give a figure the legend of its first panel, and return it as files."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns)
    open_up(figure)
    return pictures(name, figure)


def named(metric: str) -> str:
    """Return a metric's name, with the unit where it is known."""
    unit = next((unit for ending, unit in _UNITS if metric.endswith(ending)), "")
    return plain(metric) + unit


def _levels(grid: Values) -> Values:
    """Return contour levels that are close where a surface is near its best, as in the paper.

    Equal steps of the surface's own values would leave the valley without a line: they are those
    of the sorted values, and what is far above the rest has no levels of its own.
    """
    finite = np.sort(grid[np.isfinite(grid)].ravel())
    lowest, highest = (float(finite[0]), float(finite[-1])) if len(finite) else (0.0, 0.0)
    if highest - lowest <= _ROUNDING * max(abs(lowest), abs(highest)):
        room = max(abs(lowest), 1.0) / 2
        return np.array([lowest - room, lowest + room])
    low, high = float(finite[0]), float(np.quantile(finite, 0.95))
    if high - low <= _ROUNDING * max(abs(low), abs(highest)):
        high = highest
    steps: Any = np.linspace(0, 1, _LEVELS) ** 1.7
    levels: Values = low + (high - low) * steps
    return levels
