"""The learning rate over a run: what its checkpoints and logs tell, and what that may mean.

A rate on record is that of the update before a checkpoint (``used``: timm, hand-set rates, loops
that save before ``scheduler.step()``) or that of the update after it (``next``: loops that step the
scheduler first, transformers' ``scheduler.pt``). Where nothing tells which, there are two readings.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from ckptavg.checkpoint import Checkpoint
from ckptavg.checkpoint.scheduler_state import SchedulerState, read_scheduler_file
from ckptavg.cycles import Reading, Recorded, Sample
from ckptavg.errors import SourceError
from ckptavg.schedules import Counted, schedule_of, was_stepped
from ckptavg.training_log import Row, TrainingLog

_EQUAL = 1e-9  # relative: two records of one rate


class Told(NamedTuple):
    """What is known of the learning rate.

    Attributes:
        readings: All that it may mean; at least one.
        source: Where it was found, as messages say it.
    """

    readings: tuple[Reading, ...]
    source: str


class Saved(NamedTuple):
    """A checkpoint of a run whose learning rate is asked for.

    Attributes:
        name: The last part of its name.
        label: What errors call it.
        step: Training step, where known.
        epoch: Likewise.
        checkpoint: It, opened; None where its name is all that is known.
    """

    name: str
    label: str
    step: int | None
    epoch: int | None
    checkpoint: Checkpoint | None


def told_rates(
    saved: Sequence[Saved],
    log: TrainingLog | None,
    history: TrainingLog | None,
    recorded: Recorded | None,
) -> Told:
    """Return what is known of the learning rate at each checkpoint of a run.

    Args:
        saved: The checkpoints, oldest first.
        log: What the user named, which is believed first, if it tells rates.
        history: What a trainer keeps beside its checkpoints.
        recorded: What the user said of the rates on record.

    Raises:
        SourceError: If nothing tells them, of all checkpoints.
    """
    if log is not None and log.has_rates:
        return Told(_of_log(log, saved, recorded), log.label)
    if history is not None and history.has_rates:
        return _of_history(history, saved, recorded)
    return _of_checkpoints(saved, recorded)


def positions(
    rows: Sequence[Row], saved: Sequence[Saved], label: str, what: str
) -> tuple[bool, list[int]]:
    """Return whether rows and checkpoints are matched by epoch, and where each checkpoint is.

    Raises:
        SourceError: If there is a checkpoint of which neither step nor epoch is known and in the
            log.
    """
    by_step = any(row.step is not None for row in rows)
    by_epoch = any(row.epoch is not None for row in rows)
    steps = [one.step for one in saved]
    if by_step and None not in steps:
        return False, [step for step in steps if step is not None]
    epochs = [one.epoch for one in saved]
    if by_epoch and None not in epochs:
        return True, [epoch for epoch in epochs if epoch is not None]
    unknown = steps if by_step else epochs
    raise SourceError(
        f"{saved[unknown.index(None)].label}: neither its name nor its metadata tells a training "
        f"{'step' if by_step else 'epoch'}, by which {what} finds it in {label}; choose by names "
        "with --match"
    )


def _of_log(
    log: TrainingLog, saved: Sequence[Saved], recorded: Recorded | None
) -> tuple[Reading, ...]:
    rows = [row for row in log.rows if row.rate is not None]
    is_epoch, there = positions(rows, saved, log.label, "the learning rate")
    # a checkpoint of step s was made by update s - 1, of epoch e in epoch e
    used = there if is_epoch else [step - 1 for step in there]
    points = _by_position(rows, is_epoch=is_epoch)
    readings: list[Reading] = []
    for one in _ways(recorded or log.recorded or _by_first_row(points, is_epoch=is_epoch)):
        later = int(one == "next") - int(not is_epoch)
        samples = [Sample(point + later, rate) for point, rate in points]
        is_each = all(b.when - a.when == 1 for a, b in pairwise(samples))
        for stepwise in (False,) if is_each else (False, True):
            readings += _either(
                Reading(
                    samples=samples,
                    used=used,
                    recorded=one,
                    is_stepwise=stepwise,
                    is_by_update=not is_epoch,
                )
            )
    return tuple(readings)


def _of_history(history: TrainingLog, saved: Sequence[Saved], recorded: Recorded | None) -> Told:
    """Read transformers' ``log_history``; versions before 5 logged the rate of the next update."""
    rows = [row for row in history.rows if row.rate is not None and row.step is not None]
    points = _by_position(rows, is_epoch=False)
    _, steps = positions(rows, saved, history.label, "the learning rate")
    states = [_scheduler(one) for one in saved]
    beside = {  # after that many updates, so of the next one
        state.last_epoch: state.rate
        for state, step in zip(states, steps, strict=True)
        if state is not None and state.rate is not None and state.last_epoch == step
    }
    bases = [state.base_rate for state in states if state is not None]
    told = recorded or _by_scheduler(points, beside)
    told = told or _by_first_row(points, is_epoch=False)
    readings: list[Reading] = []
    for one in _ways(told):
        rates = {point - int(one == "used"): rate for point, rate in points} | beside
        readings += _either(
            Reading(
                samples=[Sample(when, rates[when]) for when in sorted(rates)],
                used=[step - 1 for step in steps],
                recorded=one,
                peak=bases[-1] if bases else None,
                is_by_update=True,
            )
        )
    return Told(tuple(readings), history.label)


def _of_checkpoints(saved: Sequence[Saved], recorded: Recorded | None) -> Told:
    states = [_scheduler(one) for one in saved]
    rates = []
    for one, state in zip(saved, states, strict=True):
        rate = state.rate if state is not None else None
        if rate is None and one.checkpoint is not None:
            rate = one.checkpoint.learning_rate
        if rate is None:
            raise SourceError(
                f"{one.label}: tells no learning rate; name a log that does, with its steps "
                "(--log FILE)"
            )
        rates.append(rate)
    known = [state for state in states if state is not None]
    counts = [state.last_epoch for state in known]
    is_counted = len(known) == len(saved) and all(
        later > count for count, later in pairwise(counts)
    )
    if is_counted:
        return Told(_of_schedulers(saved, known, rates, recorded), "the checkpoints' schedulers")
    # nothing tells how far apart they are: samples at even places, updates at even or odd ones
    is_next = recorded == "next"
    readings: list[Reading] = []
    for stepwise in (False, True) if is_next else (False,):
        readings += _either(
            Reading(
                samples=[Sample(2 * at + is_next, rate) for at, rate in enumerate(rates)],
                used=[2 * at if one.step != 0 else -1 for at, one in enumerate(saved)],
                recorded=recorded or "used",
                is_stepwise=stepwise,
                is_of_checkpoints=True,
            )
        )
    return Told(tuple(readings), "the checkpoints")


def _of_schedulers(
    saved: Sequence[Saved],
    states: Sequence[SchedulerState],
    rates: Sequence[float],
    recorded: Recorded | None,
) -> tuple[Reading, ...]:
    counted = [
        Counted(
            state,
            None if one.checkpoint is None else one.checkpoint.n_updates,
            one.step,
            one.epoch,
        )
        for one, state in zip(saved, states, strict=True)
    ]
    stepped = was_stepped(counted)
    if any(not state.values.get("T_cur", 0.0).is_integer() for state in states):
        stepped = False  # by parts of epochs: the rate on record is one of the epoch before
    if stepped is None and all(_is_of_transformers(one) for one in saved):
        stepped = True
    told: Recorded | None = None if stepped is None else "next" if stepped else "used"
    counts = [state.last_epoch for state in states]
    schedule = schedule_of(states)
    samples = [Sample(count, rate) for count, rate in zip(counts, rates, strict=True)]
    readings: list[Reading] = []
    for one in _ways(recorded or told):
        used = [count - int(one == "next") for count in counts]
        if schedule is not None:  # up to the rate after the last one used, to see it rise
            samples = [Sample(step, schedule(step)) for step in range(used[-1] + 2)]
        readings += _either(
            Reading(
                samples=samples,
                used=used,
                recorded=one,
                peak=states[-1].base_rate if states[-1].max_rate is None else None,
                is_of_checkpoints=schedule is None,
            )
        )
    return tuple(readings)


def _ways(recorded: Recorded | None) -> tuple[Recorded, ...]:
    return ("used", "next") if recorded is None else (recorded,)


def _either(reading: Reading) -> tuple[Reading, ...]:
    """Return a reading for restarts and one for gradual rises."""
    return reading, replace(reading, is_gradual=True)


def _by_position(rows: Sequence[Row], *, is_epoch: bool) -> list[tuple[int, float]]:
    """Return the rate at each step (or epoch), the last one on record."""
    found: dict[int, float] = {}
    for row in rows:
        position = row.epoch if is_epoch else row.step
        if position is not None and row.rate is not None:
            found[position] = row.rate
    return sorted(found.items())


def _by_scheduler(points: Sequence[tuple[int, float]], beside: dict[int, float]) -> Recorded | None:
    """Tell by the scheduler's own rate of the next update which one a log has of the same step."""
    logged = dict(points)
    same = [
        abs(logged[step] - rate) <= _EQUAL * max(logged[step], rate)
        for step, rate in beside.items()
        if step in logged
    ]
    if not same:
        return None
    return "next" if all(same) else "used"


def _by_first_row(points: Sequence[tuple[int, float]], *, is_epoch: bool) -> Recorded | None:
    """Tell by the first of all updates or epochs, where a restart shows how a cycle begins.

    Its rate is the peak itself if it is the one that was used. A step 0 may count checkpoints as
    the log does, or not.
    """
    rates = [rate for _, rate in points]
    high = max(rates) * (1 - _EQUAL)
    jumps = [at for at in range(1, len(rates)) if rates[at] >= high > rates[at - 1]]
    is_first = points[0][0] in ((0, 1) if is_epoch else (1,))
    if not is_first or not jumps or jumps[0] + 1 >= len(rates):
        return None
    if rates[0] >= high > rates[1]:
        return "used"
    second = rates[jumps[0] + 1]
    return "next" if abs(rates[0] - second) <= _EQUAL * second and second < high else None


def _scheduler(one: Saved) -> SchedulerState | None:
    if one.checkpoint is None:
        return None
    if one.checkpoint.scheduler is None and one.checkpoint.folder is not None:
        return read_scheduler_file(one.checkpoint.folder)
    return one.checkpoint.scheduler


def _is_of_transformers(one: Saved) -> bool:
    """Tell whether transformers' Trainer saved it, which steps the scheduler first."""
    folder = None if one.checkpoint is None else one.checkpoint.folder
    return folder is not None and folder.has("trainer_state.json")
