"""Where weights are seen from a plane in weight space, and what its points are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ckptavg.errors import UsageError
from ckptavg.geometry import Geometry
from ckptavg.landscape.session import Session
from ckptavg.landscape.subspace import Row
from ckptavg.landscape_results import Mark
from ckptavg.sources import Source

OWN = ("first", "middle", "last", "mean")  # corners that the sources give
_ROUNDING = 1e-12  # of a squared length, relative to what it is the difference of


@dataclass(frozen=True, kw_only=True)
class View:
    """How points of a plane are put together, and where weights are seen from it.

    Attributes:
        geometry: Of all checkpoints.
        labels: What they are called.
        n_sources: How many of them are sources; the others are further ones.
        corners: Their coefficients on the checkpoints; none for principal components.
        rows: What the vectors are that points are combinations of.
        exact: The corners as combinations of these vectors.
        origin, along, across: Coefficients on the checkpoints: a point, and two directions of
            length 1.
        combine: Turns (1, x, y) into coefficients of the vectors.
        axis_names: What the axes are.
    """

    geometry: Geometry
    labels: Sequence[str]
    n_sources: int
    corners: Sequence[Row]
    rows: Sequence[Row]
    exact: Sequence[Row]
    origin: Row
    along: Row
    across: Row
    combine: NDArray[np.float64]
    axis_names: tuple[str, str]

    @classmethod
    def of(cls, session: Session, corners: Sequence[Source], *, n_further: int) -> View:
        """Lay the plane.

        Raises:
            UsageError: If there is none.
        """
        n_sources, count = session.n_sources, len(session.checkpoints)
        geometry, labels = session.geometry, session.labels
        mean = np.zeros(count)
        mean[:n_sources] = 1 / n_sources
        view = partial(cls, geometry=geometry, labels=labels, n_sources=n_sources)
        if not corners:
            own = geometry.of(range(n_sources))
            if n_sources < 3:
                raise UsageError(f"principal components of {n_sources} checkpoints are no plane")
            along, across = (
                np.append(own.component(number), np.zeros(count - n_sources)) for number in (0, 1)
            )
            shares = own.explained
            names = tuple(
                f"{name} PC ({share:.0%} of the variance)"
                for name, share in (("1st", shares[0]), ("2nd", shares[1]))
            )
            return view(
                corners=[], rows=[mean, along, across], exact=[], origin=mean,
                along=along, across=across, combine=np.eye(3), axis_names=(names[0], names[1]),
            )  # fmt: skip
        own_rows = {
            "first": np.eye(count)[0],
            "middle": np.eye(count)[n_sources // 2],
            "last": np.eye(count)[n_sources - 1],
            "mean": mean,
        }
        further = iter(range(n_sources, n_sources + n_further))
        rows = [
            own_rows[one]
            if isinstance(one, str) and one in own_rows
            else np.eye(count)[next(further)]
            for one in corners
        ]
        first, second, third = rows
        noise = _ROUNDING * float(np.diag(geometry.gram).max())
        square = geometry.product(third - first, third - first)
        side = second - first
        if square <= noise:
            raise UsageError("a plane needs three points, and the first and the third are the same")
        base = float(np.sqrt(square))
        along = (third - first) / base
        foot = geometry.product(side, along)
        square = geometry.product(side, side) - foot**2
        if square <= max(noise, _ROUNDING * base**2):
            raise UsageError("a plane needs three points that are not on one line")
        height = float(np.sqrt(square))
        across = (side - foot * along) / height
        # w1 + x u + y v, with u = (w3 - w1) / base and v = (w2 - w1 - foot u) / height
        combine = np.array(
            [
                [1, -1 / base, -1 / height + foot / (base * height)],
                [0, 0, 1 / height],
                [0, 1 / base, -foot / (base * height)],
            ]
        )
        return view(
            corners=rows, rows=rows, exact=list(np.eye(3)), origin=first, along=along,
            across=across, combine=combine,
            axis_names=("distance towards the third corner", "distance at a right angle to it"),
        )  # fmt: skip

    def coefficients(self, x: float, y: float) -> Row:
        """Return a point of the plane as a combination of the vectors."""
        found: Row = self.combine @ np.array([1.0, x, y])
        return found

    def seen(self, weights: Row) -> tuple[float, float, float]:
        """Return the projection of weights, and their distance from the plane."""
        geometry, offset = self.geometry, weights - self.origin
        x, y = geometry.product(offset, self.along), geometry.product(offset, self.across)
        square = geometry.product(offset, offset)
        x, y = (at if at**2 > _ROUNDING * square else 0.0 for at in (x, y))
        off = max(square - x**2 - y**2, 0.0)
        return x, y, float(np.sqrt(off)) if off > _ROUNDING * square else 0.0

    @property
    def mean(self) -> tuple[float, float, float]:
        """The projection of the mean of the sources, and its distance from the plane."""
        weights = np.zeros(len(self.labels))
        weights[: self.n_sources] = 1 / self.n_sources
        return self.seen(weights)

    def label(self, corner: Row) -> str:
        """Return what a corner is called."""
        used = np.flatnonzero(corner)
        return self.labels[used[0]] if len(used) == 1 else "mean"

    def axes(self, points: int, margin: float) -> tuple[Row, Row]:
        """Return the coordinates of a grid around everything that is projected."""
        weights = [*np.eye(len(self.labels)), *self.corners]
        seen = np.array([self.seen(one)[:2] for one in weights])
        low, high = seen.min(axis=0), seen.max(axis=0)
        room = margin * np.maximum(high - low, (high - low).max() / 4)
        x, y = (
            np.linspace(low[axis] - room[axis], high[axis] + room[axis], points) for axis in (0, 1)
        )
        return x, y

    def marks(
        self,
        x: Row,
        y: Row,
        grids: Mapping[str, NDArray[np.float64]],
        exact: Mapping[str, Mapping[str, float]],
    ) -> list[Mark]:
        """Return everything that is projected, with what is known of it; the mean comes last."""
        found, numbers = [], list(enumerate(self.corners))
        corners = {
            int(np.flatnonzero(row)[0]): number
            for number, row in numbers
            if np.count_nonzero(row) == 1
        }
        corner_of_mean = [number for number, row in numbers if np.count_nonzero(row) > 1]
        for at, label in enumerate(self.labels):
            kind = "corner" if at in corners else "iterate" if at < self.n_sources else "mark"
            place = self.seen(np.eye(len(self.labels))[at])
            metrics = exact[f"corner {corners[at]}"] if at in corners else None
            mark = _mark(label, kind, place, metrics, x, y, grids)
            found.append(replace(mark, is_source=at < self.n_sources))
        kind = "corner" if corner_of_mean else "mean"
        metrics = exact[f"corner {corner_of_mean[0]}" if corner_of_mean else "mean"]
        return [*found, _mark("mean", kind, self.mean, metrics, x, y, grids)]


def _mark(
    name: str,
    kind: str,
    place: tuple[float, float, float],
    metrics: Mapping[str, float] | None,
    x: Row,
    y: Row,
    grids: Mapping[str, NDArray[np.float64]],
) -> Mark:
    surface = {metric: _interpolated(x, y, grid, *place[:2]) for metric, grid in grids.items()}
    inside = x[0] <= place[0] <= x[-1] and y[0] <= place[1] <= y[-1]
    return Mark(
        name=name,
        kind=kind,
        is_source=False,
        x=place[0],
        y=place[1],
        off_plane=place[2],
        metrics=metrics,
        surface=surface if inside else None,
    )


def _interpolated(x: Row, y: Row, grid: NDArray[np.float64], at_x: float, at_y: float) -> float:
    """Return a surface's value by linear interpolation along both axes."""
    column = min(max(int(np.searchsorted(x, at_x)) - 1, 0), len(x) - 2)
    row = min(max(int(np.searchsorted(y, at_y)) - 1, 0), len(y) - 2)
    right = (at_x - x[column]) / (x[column + 1] - x[column])
    up = (at_y - y[row]) / (y[row + 1] - y[row])
    with np.errstate(invalid="ignore"):  # where the surface is infinite
        lower = grid[row, column] * (1 - right) + grid[row, column + 1] * right
        upper = grid[row + 1, column] * (1 - right) + grid[row + 1, column + 1] * right
        return float(lower * (1 - up) + upper * up)
