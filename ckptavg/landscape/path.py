"""The straight line from one set of weights to another: what loss and error are along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np

from ckptavg.errors import UsageError, told_storage_errors
from ckptavg.landscape.session import LandscapeOptions, best_of, landscape_session, mode_of
from ckptavg.landscape.subspace import Row
from ckptavg.landscape_results import PathResult, Segment
from ckptavg.results import BnPass
from ckptavg.sources import Source
from ckptavg.tensors import HubRevision

DEFAULT_POINTS = 26
DEFAULT_RANGE = (-1.0, 1.5)


@told_storage_errors()
def path(
    start: Source,
    stops: Source | Sequence[Source],
    output: str | Path,
    *,
    evaluation: BnPass,
    t: tuple[float, float] = DEFAULT_RANGE,
    points: int = DEFAULT_POINTS,
    **options: Unpack[LandscapeOptions],
) -> PathResult:
    """Measure loss and error along the straight line between two sets of weights, and beyond.

    w(t) = (1 - t) start + t stop, as from SWA to SGD in Izmailov et al. 2018, Figure 5. BatchNorm
    statistics are recomputed at every point. Both ends are among the points, whatever ``t`` and
    ``points`` are.

    An interrupted run is continued by the same call: what was evaluated is not done again.

    Args:
        start: The weights at t = 0: a checkpoint.
        stops: Those at t = 1; several make a line each.
        output: Directory to make, with ``path.json``, ``path.csv``, ``path.png``, ``path.svg``.
        evaluation: As in ``plane``.
        t: Where the line begins and ends.
        points: Points along each line.
        options: As in ``plane``, without ``selection``.

    Raises:
        UsageError: If two ends are the same weights, nothing judges, or options make no sense.
        ModelError: If model, data or evaluation fail.
        CkptavgError: As ``average_checkpoints`` does.
    """
    if points < 2:
        raise UsageError(f"points is {points}, expected at least 2")
    if not -float("inf") < t[0] < t[1] < float("inf"):
        raise UsageError(f"t goes from {t[0]:g} to {t[1]:g}, expected an increasing range")
    ends = [start, *([stops] if isinstance(stops, (str, Path, HubRevision)) else stops)]
    if len(ends) < 2:
        raise UsageError("a path needs where to go: a second checkpoint")
    inner = [at for at in np.linspace(*t, points) if min(abs(at), abs(at - 1)) > 1e-9]
    places = np.array(sorted([0.0, 1.0, *map(float, inner)]))
    with landscape_session("path", (), ends, output, evaluation, options) as session:
        labels, lengths = session.labels, session.geometry.distances[0]
        for number in range(1, len(ends)):
            if not lengths[number]:
                raise UsageError(f"{labels[0]} and {labels[number]} are the same weights")
        unit = np.eye(len(ends))
        n_points = len(places) * (len(ends) - 1)
        segments = []
        with session.survey(n_points, [*t, points]) as survey:
            for number in range(1, len(ends)):
                vectors = session.vectors([unit[0], unit[number]])
                put = partial(session.space.put, vectors=vectors)
                found = survey.metrics(
                    {
                        f"{number}: {at!r}": partial(put, coefficients=np.array([1 - at, at]))
                        for at in places.tolist()
                    }
                )
                values = {
                    metric: tuple(one[metric] for one in found.values())
                    for metric in next(iter(found.values()))
                }
                segments.append(
                    Segment(
                        start=labels[0],
                        stop=labels[number],
                        length=float(lengths[number]),
                        metrics=values,
                        barriers={
                            metric: _barrier(places, np.array(one), metric)
                            for metric, one in values.items()
                        },
                    )
                )
            metrics = list(segments[0].metrics)
            details = {"t": places.tolist(), "segments": [asdict(one) for one in segments]}
            table: list[list[object]] = [
                ["start", "stop", "t", "distance", *metrics],
                *(
                    [one.start, one.stop, at, at * one.length,
                     *(one.metrics[metric][number] for metric in metrics)]
                    for one in segments
                    for number, at in enumerate(places.tolist())
                ),
            ]  # fmt: skip

            def pictures() -> dict[str, bytes]:
                from ckptavg.plots import path_pictures

                return path_pictures(places, segments)

            told = session.publish(
                f"path from {labels[0]} to {', '.join(labels[1:])}",
                [sentence for one in segments for sentence in _summary(places, one)],
                details,
                table,
                pictures,
                metrics=metrics,
                n_points=n_points,
            )
    return PathResult(**told, t=tuple(places.tolist()), segments=tuple(segments))


def _barrier(places: Row, values: Row, metric: str) -> float:
    """Return the largest excess over the straight line between the values of both ends.

    NaN if it is not known: there is no point between them, or a value that is not a number.
    """
    between = (places >= 0) & (places <= 1)
    ends = values[np.searchsorted(places, [0.0, 1.0])]
    with np.errstate(invalid="ignore"):  # infinite values have no difference
        line = ends[0] + (ends[1] - ends[0]) * places[between]
        excess = values[between] - line if mode_of(metric) == "min" else line - values[between]
    inside = excess[1:-1]  # at the ends it is 0
    return float(inside.max()) if len(inside) else float("nan")


def _summary(places: Row, segment: Segment) -> list[str]:
    """Say what a line shows."""
    sentences = [f"{segment.start} and {segment.stop} are {segment.length:.4g} apart"]
    for metric, values in segment.metrics.items():
        ends = [values[int(np.searchsorted(places, end))] for end in (0.0, 1.0)]
        signed = np.array(values) if mode_of(metric) == "min" else -np.array(values)
        best = int(np.argmin(np.where(np.isnan(signed), np.inf, signed)))
        barrier = segment.barriers[metric]
        if np.isnan(barrier):
            between = "whether a barrier lies between them is not known"
        elif barrier > 0:
            between = f"a barrier of {barrier:.4g} lies between them"
        else:
            between = "no barrier lies between them"
        sentences.append(
            f"{metric}: {ends[0]:.4g} at the start, {ends[1]:.4g} at the stop; {between}; "
            f"{best_of(metric)} {values[best]:.4g} at t = {places[best]:.2g}"
        )
    return sentences
