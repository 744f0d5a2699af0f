"""What planes, rays and paths are: values for the command line to print and for Python to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class LandscapeResult:
    """What ``plane``, ``width`` and ``path`` share.

    Attributes:
        output: The directory with the files.
        files: Their names.
        summary: What was found, one sentence each.
        metrics: Names of what was measured.
        n_points: How many points were evaluated in all.
        n_resumed: How many of them an interrupted run had evaluated before.
        device: Where the model ran.
        seconds: Wall time of everything.
        notes: What the user should know.
    """

    output: Path
    files: tuple[str, ...]
    summary: tuple[str, ...]
    metrics: tuple[str, ...]
    n_points: int
    n_resumed: int
    device: str
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A set of weights seen from a plane.

    Attributes:
        name: Its label, or ``mean``.
        kind: ``corner``: the plane goes through it; ``iterate``: one of the sources; ``mean``: of
            all sources; ``mark``: a further one.
        is_source: Whether it is one of the sources, and not a further checkpoint or a mean.
        x, y: Its projection; distances in weight space from the plane's origin.
        off_plane: Its distance from the plane.
        metrics: What the evaluation says: of a corner of it itself, of the mean of its projection;
            None for others.
        surface: What the surface says at the projection, by linear interpolation of the grid; None
            outside of it.
    """

    name: str
    kind: str
    is_source: bool
    x: float
    y: float
    off_plane: float
    metrics: Mapping[str, float] | None
    surface: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class PlaneResult(LandscapeResult):
    """Metrics on a plane in weight space.

    The origin is the first corner, or the mean for principal components; distances are Euclidean,
    over all weights.

    Attributes:
        through: What the plane goes through.
        x, y: Coordinates of the grid's columns and rows.
        grids: Metric -> values, one row for each of ``y``.
        marks: Everything that was projected.
        similarity: ``metric and metric`` -> correlation of their surfaces, and distance between
            their best points.
    """

    through: tuple[str, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    grids: Mapping[str, tuple[tuple[float, ...], ...]]
    marks: tuple[Mark, ...]
    similarity: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Metrics along one ray from one solution.

    Attributes:
        solution: Its name.
        kind: ``sphere``: the direction has length 1; ``filter``: its filters have the norms of the
            solution's.
        direction: Number of the random direction.
        metrics: Metric -> values at the distances.
    """

    solution: str
    kind: str
    direction: int
    metrics: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class WidthResult(LandscapeResult):
    """How metrics change with the distance from solutions, in random directions.

    Attributes:
        solutions: Names of the solutions.
        sources: What each is.
        distances: Kind of direction -> where along a ray metrics were taken: Euclidean distances
            for ``sphere``, multiples of the filter-normalised direction for ``filter``.
        solution_distances: Between the solutions, over all weights.
        rays: All of them.
        means: ``kind``, solution, metric -> the mean over the rays at each distance.
    """

    solutions: tuple[str, ...]
    sources: tuple[str, ...]
    distances: Mapping[str, tuple[float, ...]]
    solution_distances: tuple[tuple[float, ...], ...]
    rays: tuple[Ray, ...]
    means: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...]]]]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Metrics along the straight line through two sets of weights.

    Attributes:
        start: What t = 0 is.
        stop: What t = 1 is.
        length: Distance between them.
        metrics: Metric -> values at each t.
        barriers: Metric -> the largest excess between the ends over the straight line between their
            values (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket
            Hypothesis"); negative where all between is better, NaN where there is no number.
    """

    start: str
    stop: str
    length: float
    metrics: Mapping[str, tuple[float, ...]]
    barriers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PathResult(LandscapeResult):
    """Metrics along straight lines between sets of weights.

    Attributes:
        t: Where metrics were taken: w(t) = (1 - t) start + t stop.
        segments: One for each stop.
    """

    t: tuple[float, ...]
    segments: tuple[Segment, ...]
