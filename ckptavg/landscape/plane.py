"""A plane in weight space through three sets of weights: what loss and error are on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ckptavg.errors import UsageError, told_storage_errors
from ckptavg.landscape.points import Put
from ckptavg.landscape.session import (
    LandscapeOptions,
    Session,
    best_of,
    landscape_session,
    mode_of,
)
from ckptavg.landscape.subspace import Row
from ckptavg.landscape.view import OWN, View
from ckptavg.landscape_results import Mark, PlaneResult
from ckptavg.results import BnPass
from ckptavg.sources import Source

DEFAULT_POINTS = 21
DEFAULT_MARGIN = 0.2
COMPONENTS = "pca"


@told_storage_errors()
def plane(
    sources: Source | Sequence[Source],
    output: str | Path,
    *,
    evaluation: BnPass,
    through: str | Sequence[Source] = ("first", "middle", "last"),
    marks: Sequence[Source] = (),
    points: int = DEFAULT_POINTS,
    margin: float = DEFAULT_MARGIN,
    **options: Unpack[LandscapeOptions],
) -> PlaneResult:
    """Measure loss and error on a plane in weight space, and see where checkpoints lie on it.

    The plane of Izmailov et al. 2018, Figures 1 and 3: u = (w3 - w1) / |w3 - w1|, v the part of
    w2 - w1 at a right angle to u, of length 1, and w(x, y) = w1 + x u + y v; with ``pca`` the mean
    of the sources and their first two principal components. BatchNorm statistics are recomputed at
    every point. Everything else is projected, with its distance from the plane.

    An interrupted run is continued by the same call: what was evaluated is not done again.

    Args:
        sources: Checkpoints, as in ``average_checkpoints``; all are projected, and so is their
            mean.
        output: Directory to make, with ``plane.json``, ``plane.csv``, ``plane.png``, ``plane.svg``.
        evaluation: The model, what judges it (``evaluate``: a ``LabelledEvaluation`` on any number
            of loaders, or a function), and data for the BatchNorm pass where it has such layers.
        through: ``pca``, or three of ``first``, ``middle``, ``last`` (of the sources), ``mean`` and
            further checkpoints.
        marks: Further checkpoints to project.
        points: Grid points along each side.
        margin: How far the grid goes beyond what is projected, relative to that.
        options: As in ``average_checkpoints``; ``selection``, ``plot`` (pictures, which need the
            extra ``plots``), ``overwrite`` (replace a directory that this wrote).

    Raises:
        UsageError: If the three do not span a plane, nothing judges, or options make no sense.
        ModelError: If model, data or evaluation fail.
        CkptavgError: As ``average_checkpoints`` does.
    """
    if points < 2:
        raise UsageError(f"points is {points}, expected at least 2 along each side")
    if not 0 <= margin < 100:
        raise UsageError(f"margin is {margin}, expected a share such as {DEFAULT_MARGIN}")
    if not sources:
        raise UsageError("a plane shows where checkpoints lie: name at least one")
    corners = _corners(through)
    further = [one for one in corners if one not in OWN]
    with landscape_session(
        "plane", sources, [*further, *marks], output, evaluation, options
    ) as session:
        view = View.of(session, corners, n_further=len(further))
        x, y = view.axes(points, margin)
        vectors = session.vectors(view.rows)
        n_extra = len(view.corners) + 1
        parameters = [corners, len(marks), points, margin]
        with session.survey(points**2 + n_extra, parameters) as survey:
            exact = survey.metrics(
                {
                    **{
                        f"corner {number}": _put(session, vectors, row)
                        for number, row in enumerate(view.exact)
                    },
                    "mean": _put(session, vectors, view.coefficients(*view.mean[:2])),
                }
            )
            found = survey.metrics(
                {
                    f"{column},{row}": _put(
                        session, vectors, view.coefficients(float(x[column]), float(y[row]))
                    )
                    for row in range(points)
                    for column in range(points)
                }
            )
            grids = {
                metric: np.array(
                    [[found[f"{column},{row}"][metric] for column in range(points)]
                     for row in range(points)]
                )
                for metric in found["0,0"]
            }  # fmt: skip
            seen = view.marks(x, y, grids, exact)
            similarity = _similarity(x, y, grids)
            summary = _summary(view, x, y, grids, seen, similarity)
            details = {
                "through": [view.label(corner) for corner in view.corners] or [COMPONENTS],
                "x": x.tolist(),
                "y": y.tolist(),
                "axes": list(view.axis_names),
                "grids": {name: grid.tolist() for name, grid in grids.items()},
                "marks": [asdict(mark) for mark in seen],
                "similarity": {
                    name: {"correlation": one[0], "distance_of_best": one[1]}
                    for name, one in similarity.items()
                },
            }
            stacked = np.stack([*grids.values()], axis=2)
            table: list[list[object]] = [["x", "y", *grids]]
            for at_y, rows in zip(y.tolist(), stacked.tolist(), strict=True):
                table += [
                    [at_x, at_y, *values] for at_x, values in zip(x.tolist(), rows, strict=True)
                ]

            def pictures() -> dict[str, bytes]:
                from ckptavg.plots import plane_pictures

                return plane_pictures(x, y, grids, seen, view.axis_names)

            told = session.publish(
                f"plane through {', '.join(details['through'])}",
                summary,
                details,
                table,
                pictures,
                metrics=list(grids),
                n_points=points**2 + n_extra,
            )
    return PlaneResult(
        **told,
        through=tuple(details["through"]),
        x=tuple(x.tolist()),
        y=tuple(y.tolist()),
        grids={name: tuple(map(tuple, grid.tolist())) for name, grid in grids.items()},
        marks=tuple(seen),
        similarity=similarity,
    )


def _corners(through: str | Sequence[Source]) -> list[Source]:
    """Return the three corners; none for principal components."""
    given: list[Source] = [through] if isinstance(through, str) else list(through)
    if given == [COMPONENTS]:
        return []
    if len(given) != 3:
        raise UsageError(
            f"through names {len(given)}, expected three of {', '.join(OWN)} and checkpoints, or "
            f"{COMPONENTS}"
        )
    return given


def _put(session: Session, vectors: Sequence[object], coefficients: Row) -> Put:
    def put(model: nn.Module) -> None:
        session.space.put(model, vectors, coefficients)  # type: ignore[arg-type]  # tensors

    return put


def _best(x: Row, y: Row, grid: NDArray[np.float64], metric: str) -> tuple[float, float, float]:
    """Return where a surface is best, and its value there."""
    worse = np.where(np.isnan(grid), np.inf, grid if mode_of(metric) == "min" else -grid)
    row, column = np.unravel_index(int(np.argmin(worse)), grid.shape)
    return float(x[column]), float(y[row]), float(grid[row, column])


def _similarity(
    x: Row, y: Row, grids: Mapping[str, NDArray[np.float64]]
) -> dict[str, tuple[float, float]]:
    """Return how alike the surfaces of pairs of metrics are, and how far apart their best points.

    The paper's claim is that train loss and test error are alike, but shifted against each other.
    """
    found = {}
    for one, other in combinations(grids, 2):
        first, second = grids[one].ravel(), grids[other].ravel()
        finite = np.isfinite(first) & np.isfinite(second)
        if finite.sum() < 3 or not np.ptp(first[finite]) or not np.ptp(second[finite]):
            continue
        correlation = float(np.corrcoef(first[finite], second[finite])[0, 1])
        here, there = _best(x, y, grids[one], one), _best(x, y, grids[other], other)
        distance = float(np.hypot(here[0] - there[0], here[1] - there[1]))
        found[f"{one} and {other}"] = correlation, distance
    return found


def _summary(
    view: View,
    x: Row,
    y: Row,
    grids: Mapping[str, NDArray[np.float64]],
    marks: Sequence[Mark],
    similarity: Mapping[str, tuple[float, float]],
) -> list[str]:
    """Say what the plane shows."""
    mean = marks[-1]
    iterates = [mark for mark in marks[: view.n_sources] if mark.surface is not None]
    off = max((mark.off_plane for mark in marks[: view.n_sources]), default=0.0)
    sentences = [
        f"the mean of the {view.n_sources} checkpoints lies {mean.off_plane:.3g} off the plane, "
        f"single ones up to {off:.3g}"
    ]
    for metric, grid in grids.items():
        best = _best(x, y, grid, metric)
        at_mean = (mean.metrics or {}).get(metric)
        at_iterates = [mark.surface[metric] for mark in iterates if mark.surface is not None]
        if at_mean is None or not at_iterates:
            continue
        where = "where the mean is seen" if mean.kind == "mean" else "at the mean"
        sentences.append(
            f"{metric}: {at_mean:.4g} {where}, {float(np.median(at_iterates)):.4g} in the middle "
            f"of the checkpoints' projections; the {best_of(metric)} of the grid is {best[2]:.4g}, "
            f"{float(np.hypot(best[0] - mean.x, best[1] - mean.y)):.3g} away from the mean"
        )
    for one, other in combinations(grids, 2):
        pair = f"{one} and {other}"
        if pair not in similarity or _same_loader(one, other):
            continue
        correlation, distance = similarity[pair]
        if one.endswith("_loss") and other.endswith("_error"):
            sentences.append(
                f"the surfaces of {pair} correlate by {correlation:.2f}; their best points are "
                f"{distance:.3g} apart"
            )
    return sentences


def _same_loader(one: str, other: str) -> bool:
    return one.rpartition("_")[0] == other.rpartition("_")[0]
