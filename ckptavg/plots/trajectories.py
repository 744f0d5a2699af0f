"""Pictures of how checkpoints lie to each other."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ckptavg.geometry import TrajectoryResult
from ckptavg.plots.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    SURFACE,
    open_up,
    pictures,
    short,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LAYERS = 24
_MOST_NAMES = 12


@styled()
def trajectory_pictures(result: TrajectoryResult) -> dict[str, bytes]:
    """Draw the plane of the first two principal components, distances, lengths and layers.

    Returns:
        ``trajectory.png`` and ``trajectory.svg``.
    """
    from matplotlib.figure import Figure

    layers = sorted(result.layers, key=lambda layer: -layer.variance_share)[:_MOST_LAYERS]
    figure = Figure(figsize=(12, 4.4 + max(3.2, 0.24 * len(layers))), layout="constrained")
    heights = [4.4, max(3.2, 0.24 * len(layers))]
    (plane, matrix), (lengths, bars) = figure.subplots(
        2, 2, height_ratios=heights, width_ratios=[1, 1]
    )
    _draw_plane(plane, result)
    _draw_distances(matrix, result)
    _draw_lengths(lengths, result)
    place = range(len(layers))
    bars.barh(place, [100 * layer.variance_share for layer in layers[::-1]], color=BLUE, height=0.7)
    bars.set_yticks(place, [short(layer.name) for layer in layers[::-1]], fontsize="small")
    bars.set_xlabel("part of the variance of all weights (%)")
    more = "" if len(layers) == len(result.layers) else f", the {len(layers)} largest"
    bars.set_title(f"where they differ, by layer{more}")
    open_up(figure)
    matrix.grid(visible=False)
    return pictures("trajectory", figure)


def _draw_plane(axes: Axes, result: TrajectoryResult) -> None:
    from matplotlib.ticker import MaxNLocator

    places = [
        ((*point.coordinates, 0.0)[0], (*point.coordinates, 0.0)[1]) for point in result.checkpoints
    ]
    for start, stop in pairwise(places):
        axes.annotate(
            "", xy=stop, xytext=start,
            arrowprops={"arrowstyle": "->", "color": GREY, "alpha": 0.7, "linewidth": 0.8},
        )  # fmt: skip
    along, across = zip(*places, strict=True)
    dots = axes.scatter(along, across, c=range(1, len(places) + 1), cmap=SURFACE, zorder=3, s=36)
    axes.scatter([0], [0], marker="*", s=160, color=ORANGE, zorder=4, label="their mean")
    shares = [100 * share for share in (*result.explained, 0.0)[:2]]
    axes.set_xlabel(f"1st principal component ({shares[0]:.0f} % of the variance)")
    axes.set_ylabel(f"2nd principal component ({shares[1]:.0f} %)")
    axes.set_title(f"the checkpoints, seen from where they spread most: {result.kind}")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="best")
    bar = axes.figure.colorbar(dots, ax=axes, shrink=0.8)
    bar.set_label("checkpoint, oldest first")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_distances(axes: Axes, result: TrajectoryResult) -> None:
    image = axes.imshow(np.asarray(result.distances), cmap=SURFACE)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("distance")
    count = len(result.checkpoints)
    every = max(1, -(-count // _MOST_NAMES))
    numbers = range(0, count, every)
    names = [_when(result, at) for at in numbers]
    axes.set_xticks(numbers, names, rotation=90, fontsize="small")
    axes.set_yticks(numbers, names, fontsize="small")
    axes.set_title("distances between checkpoints")


def _draw_lengths(axes: Axes, result: TrajectoryResult) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = range(1, len(result.checkpoints) + 1)
    steps = [point.step_length for point in result.checkpoints]
    axes.plot(
        numbers, [point.deviation for point in result.checkpoints], "o-", color=BLUE,
        markersize=4, label="from their mean",
    )  # fmt: skip
    axes.plot(
        list(numbers)[1:], [step for step in steps if step is not None], "s--", color=ORANGE,
        markersize=4, label="from the one before",
    )  # fmt: skip
    axes.axhline(result.spread, color=BLACK, linestyle=":", linewidth=1, label="spread (rms)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("checkpoint, oldest first")
    axes.set_ylabel(f"distance (the mean's norm is {result.mean_norm:.4g})")
    count, worth = len(result.checkpoints), result.effective_count
    axes.set_title(f"{count} checkpoints, worth {worth:.1f} independent ones")
    axes.legend(loc="best")


def _when(result: TrajectoryResult, at: int) -> str:
    point = result.checkpoints[at]
    if point.step is not None:
        return str(point.step)
    return str(at + 1) if point.epoch is None else str(point.epoch)
