"""The cycles of a learning rate: which checkpoints lie at their minima, or on a plateau.

Stochastic weight averaging takes the weights at the minimum of each cycle (Izmailov et al. 2018,
Algorithm 1: where ``mod(i, c) = 0``); Fast Geometric Ensembling (Garipov et al. 2018) saves every
half cycle, so every second of its checkpoints lies at a maximum.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

Recorded = Literal["used", "next"]

_EQUAL = 1e-12  # of the highest rate: less than this apart is the same rate
_SAME_LEVEL = 0.01  # of a cycle's range: minima of one run may differ by so much
_NEAR = 0.1  # of a cycle's range: what lies higher above the minimum is not at it
_AT_PEAK = 1e-6  # relative
_PLATEAU = 1e-6  # relative to its first rate
_MIN_SMOOTH_CYCLE = 20  # of shorter cycles neighbouring rates tell nothing
_RESTART_GAPS = 3  # a rise in one of so many gaps of a cycle is a jump


class Sample(NamedTuple):
    """The learning rate of one update (or epoch), by its index; the first is 0."""

    when: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to understand what was recorded of the learning rate.

    Attributes:
        samples: Rates that are known, by rising index; at least one.
        used: For each checkpoint, oldest first, the index of the rate that its last update was
            made with; below 0 before any update.
        recorded: Whether that is taken to be the rate on record for it, or the one before.
        peak: The rate that a restart jumps to, where that is known.
        is_stepwise: Whether the rate stays as it was from one sample to the next.
        is_gradual: Whether a rise to the peak, of which the samples do not tell it, is no restart.
        is_by_update: Whether an index is an update, so that one past a minimum is as good as at it.
        is_of_checkpoints: Whether the samples are what checkpoints tell, and nothing is known of
            the rates before the first and between them.
    """

    samples: Sequence[Sample]
    used: Sequence[int]
    recorded: Recorded
    peak: float | None = None
    is_stepwise: bool = False
    is_gradual: bool = False
    is_by_update: bool = False
    is_of_checkpoints: bool = False

    @cached_property
    def highest(self) -> float:
        """The highest rate."""
        return max(sample.rate for sample in self.samples)


class Minimum(NamedTuple):
    """A checkpoint at the minimum of a cycle.

    Attributes:
        checkpoint: Its number.
        rate: The one that its last update was made with, or the least that it is known to be under.
        is_past: Whether it was saved one update after the minimum, by that of a restart.
    """

    checkpoint: int
    rate: float
    is_past: bool = False


@dataclass(frozen=True, kw_only=True)
class Minima:
    """What was found of the cycles.

    Attributes:
        taken: The checkpoints at minima, oldest first.
        missed: Minima between the first and the last checkpoint that none is near to.
        is_flat: Whether all rates are equal, so that every checkpoint is at the minimum.
        is_unfinished: Whether the last cycle is left out, its minimum being still to come.
        has_cycles: Whether the rate rises after it fell, or comes back to where it was low.
    """

    taken: tuple[Minimum, ...]
    missed: tuple[Sample, ...] = ()
    is_flat: bool = False
    is_unfinished: bool = False
    has_cycles: bool = True


class Plateau(NamedTuple):
    """Checkpoints, by number, that were trained at one rate alone from the first of them on."""

    checkpoints: tuple[int, ...]
    rate: float


class _Turn(NamedTuple):
    position: int  # among the samples; of equal ones the last
    is_bottom: bool


def cycle_minima(reading: Reading) -> Minima:
    """Return the checkpoints that lie at the minimum of each cycle.

    A rise from the start, as in a warm-up, ends no cycle. A last cycle without a rise at its end
    counts if it has come down to the level of the other minima. Of equally low checkpoints of a
    cycle the last is taken.
    """
    samples = reading.samples
    turns = _turns(samples, _EQUAL * reading.highest)
    if not turns:
        there = [number for number, index in enumerate(reading.used) if index >= 0]
        return Minima(
            taken=tuple(Minimum(number, samples[0].rate) for number in there), is_flat=True
        )
    triples = zip(turns, turns[1:], turns[2:], strict=False)
    whole = [(before, turn, after) for before, turn, after in triples if turn.is_bottom]
    levels = [samples[turn.position].rate for _, turn, _ in whole]
    head, tail = _low_head(reading, turns), turns[-1]
    last = samples[tail.position].rate
    allowed = _SAME_LEVEL * (reading.highest - min([last, *levels]))
    is_low = tail.is_bottom and any(last <= one + allowed for one in levels)
    if head is not None:
        first = samples[head.position].rate
        others = levels or ([last] if tail.is_bottom else [])
        if any(abs(first - one) <= allowed for one in others):
            whole.insert(0, (head, head, turns[1]))
            is_low |= not levels
    if is_low:
        whole.append((turns[-2], tail, tail))
    taken, missed = [], []
    for before, turn, after in whole:
        lowest = min(levels) if levels and reading.is_of_checkpoints else math.inf
        found = _lowest_between(reading, before.position, turn.position, after.position, lowest)
        if found is not None:
            taken.append(found)
        elif reading.used[0] <= samples[turn.position].when <= reading.used[-1]:
            missed.append(samples[turn.position])
    return Minima(
        taken=tuple(taken),
        missed=tuple(missed),
        is_unfinished=tail.is_bottom
        and not is_low
        and reading.used[-1] > samples[turns[-2].position].when,
        has_cycles=bool(whole),
    )


def last_plateau(reading: Reading) -> Plateau | None:
    """Return the last two or more checkpoints between which the rate was constant; None if none.

    The first of them is one at whose last update the rate was constant already.
    """
    stretches: list[tuple[Sample, Sample]] = []
    for sample in reading.samples:
        anchor = stretches[-1][0] if stretches else None
        if anchor is not None and abs(sample.rate - anchor.rate) <= _PLATEAU * anchor.rate:
            stretches[-1] = (stretches[-1][0], sample)
        else:
            stretches.append((sample, sample))
    for begin, end in reversed(stretches):
        # nothing is known to differ before the first sample
        is_open = begin is reading.samples[0] and end.when > begin.when
        low = max(begin.when - 1, 0) if is_open else begin.when
        inside = [number for number, at in enumerate(reading.used) if low <= at <= end.when]
        if len(inside) > 1 and begin.rate > 0:
            return Plateau(tuple(inside), begin.rate)
    return None


def _turns(samples: Sequence[Sample], equal: float) -> list[_Turn]:
    """Return peaks and bottoms in turn, beginning and ending with the ends; none if it is flat."""
    turns: list[_Turn] = []
    rises: bool | None = None
    for position in range(1, len(samples)):
        change = samples[position].rate - samples[position - 1].rate
        if abs(change) <= equal:
            continue
        if rises is not (change > 0):
            rises = change > 0
            turns.append(_Turn(position - 1, rises))
    return [*turns, _Turn(len(samples) - 1, not rises)] if turns else []


def _low_head(reading: Reading, turns: Sequence[_Turn]) -> _Turn | None:
    """Return the first sample if it may be a minimum: the next one is a peak, as FGE saves them."""
    begins_low = turns[0].is_bottom and turns[0].position == 0 and turns[1].position == 1
    is_first = reading.used[0] == reading.samples[0].when
    return turns[0] if begins_low and is_first and reading.is_of_checkpoints else None


def _lowest_between(
    reading: Reading, start: int, bottom: int, stop: int, known: float
) -> Minimum | None:
    """Return the checkpoint nearest to the minimum between two peaks; None if it is not near.

    Args:
        reading: What is known.
        start: Position of the peak before, among the samples.
        bottom: Of the lowest.
        stop: Of the peak after.
        known: A rate that minima are known to come down to; infinity if none is.
    """
    samples = reading.samples
    begin, end = samples[start].when, samples[stop].when
    found: Minimum | None = None
    for number in range(bisect_left(reading.used, begin), bisect_right(reading.used, end)):
        rate = _rate_at(reading, reading.used[number], begin, end)
        if rate is not None and (found is None or rate <= found.rate + _EQUAL * reading.highest):
            found = Minimum(number, rate)
    lowest = min(samples[bottom].rate, known)
    near = lowest + _NEAR * (max(samples[start].rate, samples[stop].rate) - lowest)
    if found is not None and found.rate <= near:
        return found
    if reading.is_by_update and bottom < stop:
        restart = samples[bottom + 1]
        at = bisect_left(reading.used, restart.when)
        is_there = at < len(reading.used) and reading.used[at] == restart.when
        if is_there and _is_restart(reading, samples[bottom], restart, begin):
            return Minimum(at, restart.rate, is_past=True)
    return None


def _rate_at(reading: Reading, index: int, begin: int, end: int) -> float | None:
    """Return the rate with an index, or the least that it can be told to be at most; else None."""
    samples = reading.samples
    at = bisect_left(samples, index, key=lambda sample: sample.when)
    if at < len(samples) and samples[at].when == index:
        return samples[at].rate
    if at in (0, len(samples)):
        return None
    left, right = samples[at - 1], samples[at]
    if right.rate <= left.rate + _EQUAL * reading.highest:
        if reading.is_stepwise:
            return left.rate
        part = (index - left.when) / (right.when - left.when)
        return left.rate + part * (right.rate - left.rate)
    if _is_restart(reading, left, right, begin):
        return left.rate  # the restart comes with the next update: until then it fell
    if reading.is_stepwise:
        return left.rate
    is_smooth = end - begin >= _MIN_SMOOTH_CYCLE or not reading.is_gradual
    return right.rate if right.when - index == 1 and is_smooth else None


def _is_restart(reading: Reading, left: Sample, right: Sample, begin: int) -> bool:
    """Tell whether the rate jumped to its peak with a sample; ``begin`` is of the peak before.

    Where nothing but sparse samples tells the peak, the highest of them may lie as many updates
    after a restart as the first sample lies after the start: then it is the first, too, or that is
    not known.
    """
    first, gap = reading.samples[0], right.when - left.when
    if reading.peak is None and gap > 1 and not reading.is_of_checkpoints:
        is_below = first.rate < reading.highest * (1 - _AT_PEAK)
        if first.when > 0 and not (is_below and first.when <= gap):
            return False
    peak = max(reading.highest, reading.peak or 0.0)
    is_short = (right.when - left.when) * _RESTART_GAPS <= right.when - begin
    return right.rate >= peak * (1 - _AT_PEAK) and (is_short or not reading.is_gradual)
