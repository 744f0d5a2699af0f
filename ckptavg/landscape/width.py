"""How wide the valley around a solution is: loss and error along random rays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal, Unpack, get_args

import numpy as np

from ckptavg.errors import UsageError, told_storage_errors
from ckptavg.landscape.points import Put
from ckptavg.landscape.session import LandscapeOptions, Session, landscape_session
from ckptavg.landscape.subspace import Row
from ckptavg.landscape_results import Ray, WidthResult
from ckptavg.metrics import badness
from ckptavg.results import BnPass
from ckptavg.sources import Source

Directions = Literal["sphere", "filter", "both"]
Evaluate = Callable[[Mapping[str, Put]], dict[str, dict[str, float]]]

DEFAULT_RAYS = 10
DEFAULT_POINTS = 11
DEFAULT_RELATIVE = 0.5
_BEYOND = 1.5  # times the distance between solutions, and
_PART_OF_NORM = 0.1  # of the weights' length, where there is only one


@told_storage_errors()
def width(
    solutions: Mapping[str, Source],
    output: str | Path,
    *,
    evaluation: BnPass,
    directions: Directions = "both",
    rays: int = DEFAULT_RAYS,
    points: int = DEFAULT_POINTS,
    distance: float | None = None,
    relative: float = DEFAULT_RELATIVE,
    ray_seed: int = 0,
    **options: Unpack[LandscapeOptions],
) -> WidthResult:
    """Measure loss and error along random rays from one or several solutions.

    w + s d with a random direction d, the same for all solutions, as in Izmailov et al. 2018,
    Figure 4; BatchNorm statistics are recomputed at every point. On the ``sphere`` d is uniform
    over all parameters together, of length 1. Where norm layers follow, the loss does not change
    with the scale of the weights, so that equal distances favour the solution with the larger
    ones; ``filter`` gives each filter of d the norm of the solution's (Li et al. 2018) and leaves
    out what has one dimension.

    An interrupted run is continued by the same call: what was evaluated is not done again.

    Args:
        solutions: Name -> checkpoint.
        output: Directory to make, with ``width.json``, ``width.csv``, ``width.png``, ``width.svg``.
        evaluation: As in ``plane``.
        directions: ``sphere``, ``filter`` or ``both``.
        rays: How many directions of each kind.
        points: Points along each ray, the solution itself among them.
        distance: How far rays on the sphere go; None is one and a half times the largest distance
            between solutions, or a tenth of the weights' length where there is one.
        relative: How far filter-normalised rays go, in lengths of the filters.
        ray_seed: Seed of the first direction; each further one adds 1.
        options: As in ``plane``, without ``selection``.

    Raises:
        UsageError: If there are no solutions, nothing judges, or options make no sense.
        ModelError: If model, data or evaluation fail.
        CkptavgError: As ``average_checkpoints`` does.
    """
    if directions not in get_args(Directions):
        raise UsageError(
            f"directions is '{directions}', expected one of {', '.join(get_args(Directions))}"
        )
    for name, value, least in (("rays", rays, 1), ("points", points, 2), ("ray_seed", ray_seed, 0)):
        if value < least:
            raise UsageError(f"{name} is {value}, expected at least {least}")
    for name, length in (("distance", distance), ("relative", relative)):
        if length is not None and not 0 < length < float("inf"):
            raise UsageError(f"{name} is {length}, expected a positive number")
    if not solutions:
        raise UsageError("a width is that of a solution: name at least one checkpoint")
    names, kinds = list(solutions), ["sphere", "filter"] if directions == "both" else [directions]
    with landscape_session(
        "width", (), list(solutions.values()), output, evaluation, options
    ) as session:
        geometry = session.geometry
        # what was asked for: the last digits of a distance may differ when it is continued
        parameters = [names, directions, rays, points, distance, relative, ray_seed]
        if distance is None:
            apart = float(geometry.distances.max())
            distance = _BEYOND * apart if apart else _PART_OF_NORM * float(geometry.norms[0])
        distances = {
            kind: np.linspace(0, distance if kind == "sphere" else relative, points)
            for kind in kinds
        }
        n_points = len(names) * (1 + rays * (points - 1) * len(kinds))
        with session.survey(n_points, parameters) as survey:
            found = _Rays(session, names, distances, rays, ray_seed).measured(survey.metrics)
            metrics = list(found[0].metrics)
            means = {
                kind: {
                    name: {metric: _mean(found, kind, name, metric) for metric in metrics}
                    for name in names
                }
                for kind in kinds
            }
            labels = session.labels
            details = {
                "solutions": dict(zip(names, labels, strict=True)),
                "distances": {kind: one.tolist() for kind, one in distances.items()},
                "solution_distances": geometry.distances.tolist(),
                "rays": [asdict(ray) for ray in found],
                "means": means,
            }
            table: list[list[object]] = [
                ["solution", "kind", "direction", "distance", *metrics],
                *(
                    [ray.solution, ray.kind, ray.direction, float(at),
                     *(ray.metrics[metric][number] for metric in metrics)]
                    for ray in found
                    for number, at in enumerate(distances[ray.kind])
                ),
            ]  # fmt: skip

            def pictures() -> dict[str, bytes]:
                from ckptavg.plots import width_pictures

                return width_pictures(names, distances, found, means)

            told = session.publish(
                f"width around {', '.join(names)}",
                _summary(names, distances, means),
                details,
                table,
                pictures,
                metrics=metrics,
                n_points=n_points,
            )
    return WidthResult(
        **told,
        solutions=tuple(names),
        sources=tuple(labels),
        distances={kind: tuple(one.tolist()) for kind, one in distances.items()},
        solution_distances=tuple(map(tuple, geometry.distances.tolist())),
        rays=tuple(found),
        means=means,
    )


class _Rays:
    """Goes along every ray from every solution."""

    def __init__(
        self,
        session: Session,
        names: Sequence[str],
        distances: Mapping[str, Row],
        rays: int,
        seed: int,
    ) -> None:
        self._session = session
        self._names = names
        self._distances = distances
        self._n_rays = rays
        self._seed = seed
        self._solutions = session.vectors(list(np.eye(len(session.checkpoints))))

    def measured(self, evaluate: Evaluate) -> list[Ray]:
        """Return the metrics along all rays; the solutions themselves are evaluated once."""
        put = self._session.space.put
        starts = evaluate(
            {
                repr(name): partial(put, vectors=[solution], coefficients=np.ones(1))
                for name, solution in zip(self._names, self._solutions, strict=True)
            }
        )
        rays = []
        for kind in self._distances:
            for number in range(self._n_rays):
                rays += self._along(kind, number, starts, evaluate)
        return rays

    def _along(
        self,
        kind: str,
        number: int,
        starts: Mapping[str, Mapping[str, float]],
        evaluate: Evaluate,
    ) -> list[Ray]:
        space = self._session.space
        with space.room():
            random = space.random_direction(self._solutions[0], self._seed + number)
        rays = []
        for name, solution in zip(self._names, self._solutions, strict=True):
            direction = random
            if kind == "filter":
                with space.room():
                    direction = space.filter_normalised(random, solution)
            put = partial(space.put, vectors=[solution, direction])
            found = evaluate(
                {
                    f"{name!r} {kind} {number} {place}": partial(
                        put, coefficients=np.array([1.0, at])
                    )
                    for place, at in enumerate(self._distances[kind].tolist())
                    if place
                }
            )
            along = [starts[repr(name)], *found.values()]
            rays.append(
                Ray(
                    solution=name,
                    kind=kind,
                    direction=number,
                    metrics={metric: tuple(one[metric] for one in along) for metric in along[0]},
                )
            )
        return rays


def _mean(rays: Sequence[Ray], kind: str, solution: str, metric: str) -> tuple[float, ...]:
    values = [ray.metrics[metric] for ray in rays if (ray.kind, ray.solution) == (kind, solution)]
    return tuple(np.mean(values, axis=0).tolist())


def _summary(
    names: Sequence[str],
    distances: Mapping[str, Row],
    means: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...]]]],
) -> list[str]:
    """Say how much each solution loses on the way, the widest first."""
    sentences = []
    for kind, by_solution in means.items():
        far = distances[kind][-1]
        how_far = f"{far:.3g} away" if kind == "sphere" else f"{far:.3g} filter norms away"
        for metric in next(iter(by_solution.values())):
            changes = {name: one[metric][-1] - one[metric][0] for name, one in by_solution.items()}
            ranked = sorted(names, key=lambda name: badness(abs(changes[name]), "min"))
            told = ", ".join(
                f"{name} {by_solution[name][metric][0]:.4g} -> {by_solution[name][metric][-1]:.4g}"
                for name in ranked
            )
            order = " (widest first)" if len(names) > 1 else ""
            sentences.append(f"{metric}, {how_far} in random directions ({kind}){order}: {told}")
    return sentences
