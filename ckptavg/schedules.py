"""Learning-rate schedules from the state that their schedulers save, and when it was saved.

A scheduler counts its steps, once an update or once an epoch. Where a loop steps it before it saves
a checkpoint, the rate on record is that of the next update; where it saves first, the rate is the
one that the weights were made with.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from ckptavg.checkpoint.scheduler_state import SchedulerState

_AGREES = 1e-6  # of the highest rate: a formula and a rate on record
_MAX_STEPS = 2_000_000  # that a schedule is computed for

Schedule = Callable[[int], float]


class Counted(NamedTuple):
    """What a checkpoint with a scheduler counts.

    Attributes:
        state: The scheduler's.
        n_updates: How often the optimizer was stepped; 0 also where it keeps no state.
        step: Training step, as the checkpoint or its name tells; it may count from 0 or from 1.
        epoch: Likewise.
    """

    state: SchedulerState
    n_updates: int | None
    step: int | None
    epoch: int | None


def schedule_of(states: Sequence[SchedulerState]) -> Schedule | None:
    """Return the learning rate by the scheduler's count of steps, where its formula is known.

    Those of ``torch.optim.lr_scheduler`` that are cyclical: CosineAnnealingWarmRestarts (SGDR,
    Loshchilov and Hutter 2017, eq. 5), CyclicLR (Smith 2017) and CosineAnnealingLR, which goes up
    again after ``T_max`` steps. All states of the run have to agree with the formula.
    """
    last = states[-1]
    if any(state.last_epoch > _MAX_STEPS for state in states):
        return None
    schedule = _warm_restarts(last) or _cyclic(last) or _cosine(last)
    if schedule is None:
        return None
    near = _AGREES * max(abs(state.rate or 0) for state in states)
    for state in states:
        if state.rate is None or abs(schedule(state.last_epoch) - state.rate) > near:
            return None
    return schedule


def _warm_restarts(state: SchedulerState) -> Schedule | None:
    base, first = state.base_rate, state.values.get("T_0")
    factor, low = state.values.get("T_mult", 1.0), state.values.get("eta_min", 0.0)
    now = state.values.get("T_cur", 0.0)
    if base is None or first is None or first < 1 or factor < 1 or now != int(now):
        return None  # stepped by parts of epochs
    high: float = base

    def rate(step: int) -> float:
        length, since = first, float(step)
        if factor == 1:
            since %= length
        while since >= length:
            since -= length
            length *= factor
        return low + (high - low) * (1 + math.cos(math.pi * since / length)) / 2

    return rate


def _cyclic(state: SchedulerState) -> Schedule | None:
    low, high = state.base_rate, state.max_rate
    length, ratio = state.values.get("total_size"), state.values.get("step_ratio")
    mode, gamma = state.texts.get("mode"), state.values.get("gamma", 1.0)
    if (
        low is None or high is None or length is None or ratio is None
        or length <= 0 or not 0 < ratio < 1
        or mode not in ("triangular", "triangular2", "exp_range")
    ):  # fmt: skip
        return None
    base, top, size, part = low, high, length, ratio

    def rate(step: int) -> float:
        cycle = math.floor(1 + step / size)
        since = 1 + step / size - cycle
        height = since / part if since <= part else (since - 1) / (part - 1)
        scale = {"triangular": 1.0, "triangular2": 0.5 ** (cycle - 1)}.get(mode, gamma**step)
        return base + (top - base) * height * scale

    return rate


def _cosine(state: SchedulerState) -> Schedule | None:
    base, length = state.base_rate, state.values.get("T_max")
    low = state.values.get("eta_min", 0.0)
    if base is None or length is None or length <= 0:
        return None
    high, half = base, length
    return lambda step: low + (high - low) * (1 + math.cos(math.pi * step / half)) / 2


def was_stepped(counted: Sequence[Counted]) -> bool | None:
    """Tell whether the scheduler had been stepped when each checkpoint of a run was saved.

    Its count is compared with Adam's of the updates, else with steps, else with epochs, of which it
    may count each or every so-manyth. None if nothing tells.

    Args:
        counted: Of each checkpoint, oldest first.
    """
    steps = [one.state.last_epoch for one in counted]
    is_initial = _is_initial(counted)
    for counts, is_exact in (
        ([one.n_updates for one in counted], True),
        ([one.step for one in counted], False),
        ([one.epoch for one in counted], False),
    ):
        known = [count for count in counts if count is not None]
        if len(known) == len(counts):
            told = _compared(known, steps, is_exact=is_exact, is_initial=is_initial)
            if told is not None:
                return told
    return None


def _is_initial(counted: Sequence[Counted]) -> bool | None:
    """Tell whether the first checkpoint is from before the first update; None if nothing tells."""
    first = counted[0]
    if first.state.last_epoch > 0 or first.n_updates:
        return False
    has_state = any(one.n_updates != 0 for one in counted)
    return first.n_updates == 0 if has_state else None


def _compared(
    counts: Sequence[int], steps: Sequence[int], *, is_exact: bool, is_initial: bool | None
) -> bool | None:
    """Compare what counts training with what counts a scheduler's steps; see ``was_stepped``.

    Args:
        counts: Updates, steps or epochs.
        steps: The scheduler's, as long.
        is_exact: Whether those are counts of what was done, and no numbers that begin with 0.
        is_initial: See ``_is_initial``.
    """
    each = _ratio(counts, steps)
    if each is None:
        return None
    found = set()
    for zero_based in (False,) if is_exact else _bases(counts, is_initial=is_initial):
        done = [count + zero_based for count in counts]
        for was_first in (True, False):
            expected = [each * (step + (not was_first)) for step in steps]
            found |= {was_first} if done == expected else set()
    return found.pop() if len(found) == 1 else None


def _ratio(counts: Sequence[int], steps: Sequence[int]) -> int | None:
    """Return how many updates, or epochs, a step of the scheduler stands for; None if it varies."""
    if len(counts) == 1:
        return 1
    ratios = set()
    for (count, later), (step, later_step) in zip(pairwise(counts), pairwise(steps), strict=True):
        if later_step <= step or later <= count or (later - count) % (later_step - step):
            return None
        ratios.add((later - count) // (later_step - step))
    return ratios.pop() if len(ratios) == 1 else None


def _bases(counts: Sequence[int], *, is_initial: bool | None) -> tuple[bool, ...]:
    """Return whether numbers begin with 0 (rather than count what was done); both if either may be.

    Checkpoints are saved at regular distances: 4, 9, 14 begins with 0, and 5, 10, 15 with 1.
    """
    if counts[0] == 0:
        return (False, True) if is_initial is None else (not is_initial,)
    gaps = [later - count for count, later in pairwise(counts)]
    period = math.gcd(*(gaps[:-1] or gaps))  # the last may be saved at the end
    if period > 1 and counts[0] % period in (0, period - 1):
        return (counts[0] % period != 0,)
    return (False,) if period <= 1 and counts[0] == 1 else (False, True)
