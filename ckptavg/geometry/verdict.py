"""Whether checkpoints are points of one trajectory that is worth averaging, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal

import numpy as np

from ckptavg.geometry.geometry import Geometry

Kind = Literal["unrelated", "equal", "converging", "drifting", "bouncing", "pair"]

_RELATED = 0.5  # cosine of the weights of one run, from one checkpoint to the next
_OUTLYING = 3.0  # nearest neighbours, in medians
_FEWEST = 4  # checkpoints that outliers are looked for among
_DUPLICATE = 1e-6  # distances, in medians
_CONVERGED = 5.0  # how much smaller the last third's steps are than the first's
_NOISE = 0.1  # part of a way that the next one takes back
_DRIFT = 0.5  # part of the variance that a line in time explains
_WORTH = 1e-4  # spread, relative to the weights
_ROUNDING = 1e-12  # likewise
_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What inner products say of checkpoints.

    Attributes:
        kind: ``unrelated``: not of one run; ``equal``: there is nothing to average; ``converging``:
            the later ones are nearly one point; ``bouncing``: each step is partly taken back by
            the next, as around a valley's floor; ``drifting``: the steps go on; ``pair``: two
            checkpoints of one run, which tell no more.
        sentences: What that means, with the numbers behind it.
        runs: Indices of checkpoints that belong together.
        outliers: Indices of checkpoints far from all others.
        duplicates: Pairs of indices with the same weights.
    """

    kind: Kind
    sentences: tuple[str, ...]
    runs: tuple[tuple[int, ...], ...]
    outliers: tuple[int, ...]
    duplicates: tuple[tuple[int, int], ...]


def judge(
    geometry: Geometry, matrices: Geometry | None, labels: Sequence[str], times: Sequence[float]
) -> Verdict:
    """Say what checkpoints are to each other.

    Args:
        geometry: Of all weights.
        matrices: Of those with two dimensions or more, whose directions are random where runs
            begin; None if there are none.
        labels: What the checkpoints are called, oldest first.
        times: When they were saved, such as training steps.
    """
    runs = _runs(matrices or geometry)
    duplicates = _duplicates(geometry)
    outliers = _outliers(geometry)
    found = partial(Verdict, runs=runs, outliers=outliers, duplicates=duplicates)
    if len(runs) > 1:
        return found(kind="unrelated", sentences=_unrelated(geometry, matrices, runs, labels))
    sentences: list[str] = []
    taken_back = geometry.taken_back()
    relative = geometry.spread / geometry.mean_norm if geometry.mean_norm else 0.0
    if relative < _WORTH:
        kind: Kind = "equal"
        sentences.append(
            "the checkpoints are equal: there is nothing to average"
            if relative < _ROUNDING
            else f"the checkpoints are nearly one point (spread {relative:.2g} of the weights' "
            "norm): their mean is that point, and averaging can bring next to nothing"
        )
    elif (fall := _fall_of_steps(geometry)) >= _CONVERGED:
        kind = "converging"
        sentences.append(
            f"the steps between checkpoints get smaller by a factor of {fall:.2g} from the first "
            "third to the last, as when the learning rate falls: early ones hold the mean back, "
            "and late ones are nearly one point; average those from before the decay, or the last "
            "few"
        )
    elif taken_back is None:
        kind = "pair"
        sentences.append(
            f"two checkpoints of one run, {geometry.distances[0, 1]:.3g} apart "
            f"({2 * relative:.2g} of the weights' norm); what their mean is worth, an evaluation "
            "tells"
        )
    else:
        kind = "bouncing" if taken_back[0] >= _NOISE else "drifting"
        sentences += _moving(geometry, times, taken_back)
    if outliers:
        names = _some([labels[index] for index in outliers])
        sentences.append(f"far from all others: {names}; leave out what diverged")
    if duplicates:
        pairs = _some([f"{labels[one]} = {labels[other]}" for one, other in duplicates])
        sentences.append(f"the same weights, which count twice: {pairs}")
    return found(kind=kind, sentences=tuple(sentences))


def _moving(geometry: Geometry, times: Sequence[float], taken_back: tuple[float, int]) -> list[str]:
    """Say how one trajectory moves, and what that means for its mean."""
    share, lag = taken_back
    way = "each step" if lag == 1 else f"each way of {lag} checkpoints"
    drift = geometry.drift_share(times)
    from_last = geometry.deviations[-1] / geometry.spread
    bounces = (
        f"one trajectory that bounces: {share:.0%} of {way} is taken back by the next (100% around "
        "a fixed centre, 0% on the way), and that is what averaging removes"
        if share >= _NOISE
        else f"one trajectory that goes its way: {share:.0%} of {way} is taken back by the next, "
        "no more (100% around a fixed centre), so these checkpoints do not show a centre; "
        "more of them, or of a longer part of the training, may"
    )
    moves = (
        f"it moves on meanwhile: a straight line in time explains {drift:.0%} of the variance, and "
        f"the mean lies {from_last:.2g} times the spread from the last checkpoint; whether the "
        "older ones still help, an evaluation tells (sweep --scheme uniform:last=...)"
        if drift > _DRIFT
        else f"it stays where it is: a straight line in time explains {drift:.0%} of the variance"
    )
    relative = geometry.spread / geometry.mean_norm
    return [
        bounces,
        moves,
        f"the checkpoints lie about {geometry.spread:.3g} from their mean ({relative:.2g} of its "
        f"norm), which is {geometry.norm_ratio:.4f} times as long as they are; but for the drift, "
        f"the {geometry.n_points} are worth {geometry.effective_count(times):.1f} independent ones",
    ]


def _runs(geometry: Geometry) -> tuple[tuple[int, ...], ...]:
    """Return the checkpoints that hang together, each with some other nearer than unrelated ones.

    Points of one run may be far apart at its ends; neighbours are not.
    """
    related = geometry.cosines > _RELATED
    left, runs = set(range(geometry.n_points)), []
    while left:
        found, border = set[int](), {min(left)}
        while border:
            found |= border
            border = {
                other for one in border for other in np.flatnonzero(related[one]).tolist()
            } - found
        left -= found
        runs.append(tuple(sorted(found)))
    return tuple(runs)


def _unrelated(
    geometry: Geometry,
    matrices: Geometry | None,
    runs: Sequence[Sequence[int]],
    labels: Sequence[str],
) -> tuple[str, ...]:
    cosines = (matrices or geometry).cosines
    between = max(
        float(cosines[one, other])
        for first, second in combinations(runs, 2)
        for one in first
        for other in second
    )
    told = "; ".join(_some([labels[index] for index in run], 2) for run in runs[:_MOST_NAMED])
    more = "" if len(runs) <= _MOST_NAMED else f"; and {len(runs) - _MOST_NAMED} more"
    return (
        f"not one trajectory: {len(runs)} groups that have little to do with each other (cosine at "
        f"most {between:.2g} between them, 1 for equal weights): {told}{more}",
        f"the mean has {geometry.norm_ratio:.2f} times their length; the mean of unrelated "
        "networks works hardly better than chance, whatever BatchNorm statistics it gets: average "
        "within one group, or ensemble their predictions",
    )


def _duplicates(geometry: Geometry) -> tuple[tuple[int, int], ...]:
    distances = geometry.distances
    pairs = list(combinations(range(geometry.n_points), 2))
    scale = float(np.median([distances[pair] for pair in pairs])) if pairs else 0.0
    return tuple(pair for pair in pairs if distances[pair] <= _DUPLICATE * scale)


def _outliers(geometry: Geometry) -> tuple[int, ...]:
    if geometry.n_points < _FEWEST:
        return ()
    distances = geometry.distances + np.diag(np.full(geometry.n_points, np.inf))
    nearest = distances.min(axis=1)
    median = float(np.median(nearest))
    return tuple(np.flatnonzero(nearest > _OUTLYING * median).tolist()) if median else ()


def _fall_of_steps(geometry: Geometry) -> float:
    """Return how much longer the first third's steps are than the last's; 1 for few points."""
    steps = np.diag(geometry.distances, 1)
    third = len(steps) // 3
    if not third:
        return 1.0
    first, last = float(np.median(steps[:third])), float(np.median(steps[-third:]))
    return first / last if last else float("inf")


def _some(names: Sequence[str], count: int = _MOST_NAMED) -> str:
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
