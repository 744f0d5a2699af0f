"""Selection by what a trainer recorded: minima and plateaus of the learning rate, metrics, SWAD."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

from ckptavg.cycles import Minima, Plateau, Reading, cycle_minima, last_plateau
from ckptavg.errors import SourceError
from ckptavg.loss_valley import OPTIMUM_PATIENCE, TOLERANCE, swad_window
from ckptavg.metrics import badness, best_mode, chosen_metric
from ckptavg.rates import Saved, Told, positions, told_rates
from ckptavg.selection import Selection, too_few
from ckptavg.training_log import Row, TrainingLog, read_log

_MAX_NAMED = 8


class LogSelection:
    """Applies what of a selection goes by the training, to the checkpoints of a run.

    Attributes:
        notes: What was taken and why, one sentence each; filled by ``narrow``.
    """

    def __init__(
        self,
        selection: Selection,
        saved: Sequence[Saved],
        read_history: Callable[[], TrainingLog | None],
    ) -> None:
        """Keep what is needed; nothing is read yet.

        Args:
            selection: What is asked for.
            saved: All checkpoints there are, oldest first.
            read_history: Returns what a trainer keeps beside its checkpoints.
        """
        self.notes: list[str] = []
        self._selection = selection
        self._saved = saved
        self._read_history = read_history

    @cached_property
    def _log(self) -> TrainingLog | None:
        return None if self._selection.log is None else read_log(self._selection.log)

    @cached_property
    def _history(self) -> TrainingLog | None:
        return self._read_history()

    def narrow(self, indices: list[int]) -> list[int]:
        """Return those of some checkpoints that are taken.

        Cycles are found among all checkpoints, be they among those some or not.

        Raises:
            SourceError: If what is asked for is not there, or cannot be told.
            UsageError: If there is no metric of that name.
        """
        if self._selection.at_lr_minima:
            indices = self._at_minima(indices)
        elif self._selection.constant_lr:
            indices = self._on_plateau(indices)
        elif self._selection.swad:
            indices = self._in_valley(indices)
        return indices if self._selection.best is None else self._best(indices)

    # -- the learning rate

    def _told(self) -> Told:
        return told_rates(self._saved, self._log, self._history, self._selection.lr_recorded)

    def _at_minima(self, indices: Sequence[int]) -> list[int]:
        told = self._told()
        found = [(reading, cycle_minima(reading)) for reading in told.readings]
        self._refuse_ambiguous(told, found)
        reading, minima = found[0]
        rates = [sample.rate for sample in reading.samples]
        if not minima.has_cycles:
            low, high = min(rates), max(rates)
            if rates[-1] == high:
                raise SourceError(
                    f"the learning rate rises from {_short(rates[0])} to {_short(high)} and never "
                    f"falls ({told.source}): it has no minima; --constant-lr takes checkpoints at "
                    "one rate"
                )
            raise SourceError(
                f"the learning rate falls from {_short(high)} to {_short(low)} without rising "
                f"again ({told.source}): there is one minimum, the end; take checkpoints at one "
                "rate with --constant-lr, or the newest with --last"
            )
        if not minima.taken:
            raise SourceError(
                f"no checkpoint was saved near a minimum of the learning rate ({told.source}), "
                f"which goes down to {_short(min(rates))}"
            )
        within = set(indices)
        taken = [one for one in minima.taken if one.checkpoint in within]
        if minima.is_flat:
            self.notes.append(
                f"the learning rate is {_short(rates[0])} at all {len(taken)} checkpoints "
                f"({told.source}): each of them is taken to be at the minimum"
            )
        else:
            named = [
                f"{self._name(one.checkpoint)} "
                f"({'one update after it, ' if one.is_past else ''}{_short(one.rate)})"
                for one in taken
            ]
            self.notes.append(f"at the minima of the learning rate ({told.source}): {_some(named)}")
        if minima.missed:
            whole = len(minima.missed) + len(minima.taken)
            self.notes.append(
                f"left out {len(minima.missed)} of {whole} cycles of the learning rate: no "
                "checkpoint was saved near their minimum"
            )
        if minima.is_unfinished:
            self.notes.append(
                "left out the last cycle of the learning rate: it is still falling at "
                f"{self._name(len(self._saved) - 1)}"
            )
        return [one.checkpoint for one in taken]

    def _refuse_ambiguous(self, told: Told, found: Sequence[tuple[Reading, Minima]]) -> None:
        taken = [(reading, [one.checkpoint for one in minima.taken]) for reading, minima in found]
        first, expected = taken[0]
        for reading, other in taken[1:]:
            if other == expected:
                continue
            one_way, other_way = (
                _some([self._name(at) for at in numbers], 3) or "none"
                for numbers in (expected, other)
            )
            if reading.recorded != first.recorded:
                raise SourceError(
                    f"nothing tells whether the learning rates on record ({told.source}) are those "
                    f"of the update before a checkpoint (then the minima are at {one_way}) or of "
                    f"the one after it ({other_way}): say it with --lr-recorded used or "
                    "--lr-recorded next"
                )
            raise SourceError(
                f"the learning rates on record ({told.source}) are too far apart to tell whether "
                f"the minima are at {one_way} or at {other_way}: name a log with more of them "
                "(--log FILE)"
            )

    def _on_plateau(self, indices: Sequence[int]) -> list[int]:
        told = self._told()
        within, found = set(indices), list[Plateau]()
        for reading in told.readings:
            plateau = last_plateau(reading)
            if plateau is not None:
                found.append(plateau)
        # trained at the one rate, whichever way the record is read
        taken = sorted(within.intersection(*(one.checkpoints for one in found))) if found else []
        if len(found) < len(told.readings) or len(taken) < 2:
            rates = [sample.rate for sample in told.readings[0].samples]
            shown = [_short(rate) for rate in (*rates[:3], *rates[-2:])]
            raise SourceError(
                "there are no two checkpoints between which the learning rate was constant "
                f"({told.source}: {', '.join(shown[:3])}, ... {', '.join(shown[3:])})"
            )
        self.notes.append(
            f"at the constant learning rate {_short(found[0].rate)} ({told.source}): "
            f"{self._name(taken[0])} to {self._name(taken[-1])}"
        )
        return taken

    # -- metrics

    def _best(self, indices: Sequence[int]) -> list[int]:
        wanted = self._selection.best or len(indices)
        metric = chosen_metric(self._metric_names(), self._selection.metric)
        mode = best_mode(metric, self._selection.mode)
        values, source = self._values(metric, indices)
        for index in [index for index in indices if math.isnan(values[index])]:
            self.notes.append(f"left out {self._name(index)}: its {metric} is not a number")
        there = [index for index in indices if not math.isnan(values[index])]
        if wanted > len(there):
            raise too_few(f"--best {wanted}", len(there))
        newest_first = there[::-1]  # of equally good ones the newest
        best = sorted(newest_first, key=lambda index: badness(values[index], mode))[:wanted]
        named = [f"{self._name(index)} ({_short(values[index])})" for index in best]
        how = "lowest" if mode == "min" else "highest"
        self.notes.append(f"with the {how} {metric} ({source}): {_some(named)}")
        return sorted(best)

    def _in_valley(self, indices: Sequence[int]) -> list[int]:
        names = self._metric_names()
        metric = self._selection.metric
        if metric is None:
            losses = [name for name in names if _is_validation_loss(name)]
            metric = losses[0] if len(losses) == 1 else None
        metric = chosen_metric(names, metric)
        if best_mode(metric, self._selection.mode) != "min":
            raise SourceError(f"--swad goes by a validation loss, and of {metric} more is better")
        points, there, source = self._series(metric, indices)
        for point, loss in points:
            if loss <= 0:
                raise SourceError(
                    f"{metric} is {_short(loss)} at {point} ({source}): SWAD compares losses by "
                    "their ratio, so they have to be positive"
                )
        tolerance = self._selection.swad_tolerance
        window = swad_window(
            [loss for _, loss in points], tolerance=TOLERANCE if tolerance is None else tolerance
        )
        if window is None:
            raise SourceError(
                f"{metric} ({source}) is never lowest at the first of {OPTIMUM_PATIENCE} "
                f"validations in a row: it is still falling after {len(points)}, so SWAD's window "
                "has not begun; take the newest with --last"
            )
        begin, end = points[window[0]][0], points[window[1]][0]
        taken = [index for index in indices if begin <= there[index] <= end]
        if not taken:
            raise SourceError(
                f"no checkpoint lies in SWAD's window, {begin} to {end}, of {metric} ({source})"
            )
        self.notes.append(
            f"in SWAD's window of {metric} ({source}), {begin} to {end}: {self._name(taken[0])} to "
            f"{self._name(taken[-1])}; SWAD averages every step of it, these are "
            f"{len(taken)} of them"
        )
        return taken

    def _metric_names(self) -> list[str]:
        logs = [log for log in (self._log, self._history) if log is not None]
        names = [name for log in logs for row in log.rows for name in row.values]
        told = [one.checkpoint for one in self._saved if one.checkpoint is not None]
        return list(dict.fromkeys([*names, *(name for one in told for name in one.metrics)]))

    def _values(self, metric: str, indices: Sequence[int]) -> tuple[dict[int, float], str]:
        """Return a metric of some checkpoints, and where it was found.

        Raises:
            SourceError: If that of one of them is not known.
        """
        points, there, source = self._series(metric, indices)
        by_position = dict(points)
        for index in indices:
            if there[index] not in by_position:
                at = ", ".join(str(position) for position, _ in points[:4])
                raise SourceError(
                    f"{self._saved[index].label}: its {metric} is not known (by {source} it is at "
                    f"{at}{', ...' if points[4:] else ''}); leave it out with --match or --steps"
                )
        return {index: by_position[there[index]] for index in indices}, source

    def _series(
        self, metric: str, indices: Sequence[int]
    ) -> tuple[list[tuple[int, float]], dict[int, int], str]:
        """Return the values of a metric by position, the positions of checkpoints, and the source.

        A log that the user named is believed first, then the checkpoints themselves, then what a
        trainer keeps beside them.
        """
        rows = _rows_with(self._log, metric)
        saved = [self._saved[index] for index in indices]
        if rows and self._log is not None:
            return self._matched(rows, metric, saved, indices, self._log.label)
        own = {
            index: one.checkpoint.metrics[metric]
            for index, one in zip(indices, saved, strict=True)
            if one.checkpoint is not None and metric in one.checkpoint.metrics
        }
        rows = _rows_with(self._history, metric)
        if rows and self._history is not None and len(own) < len(saved):
            return self._matched(rows, metric, saved, indices, self._history.label)
        there = dict(zip(indices, _shown_positions(saved), strict=True))
        return [(there[index], own[index]) for index in own], there, "the checkpoints"

    def _matched(
        self,
        rows: Sequence[Row],
        metric: str,
        saved: Sequence[Saved],
        indices: Sequence[int],
        label: str,
    ) -> tuple[list[tuple[int, float]], dict[int, int], str]:
        """Find the rows of a log that are of the same step (or epoch) as checkpoints."""
        is_epoch, there = positions(rows, saved, label, metric)
        values: dict[int, float] = {}
        for row in rows:
            position = row.epoch if is_epoch else row.step
            if position is not None:
                values[position] = row.values[metric]
        if not is_epoch and not values.keys() & set(there):
            before = [step - 1 for step in there]
            if values.keys() >= set(before):  # Lightning's rows count steps from 0
                values = {step + 1: value for step, value in values.items()}
                label = f"{label}, whose steps begin with 0"
        return sorted(values.items()), dict(zip(indices, there, strict=True)), label

    def _name(self, index: int) -> str:
        return self._saved[index].name


def _rows_with(log: TrainingLog | None, metric: str) -> list[Row]:
    return [] if log is None else [row for row in log.rows if metric in row.values]


def _shown_positions(saved: Sequence[Saved]) -> list[int]:
    """Return steps, or epochs, or plain numbers, whichever tell checkpoints apart."""
    for values in ([one.step for one in saved], [one.epoch for one in saved]):
        known = [value for value in values if value is not None]
        if len(set(known)) == len(saved):
            return known
    return list(range(1, len(saved) + 1))


def _is_validation_loss(name: str) -> bool:
    return "loss" in name.lower() and "train" not in name.lower() and name != "loss"


def _short(value: float) -> str:
    return f"{value:.6g}"


def _some(names: Sequence[str], count: int = _MAX_NAMED) -> str:
    if len(names) <= count:
        return ", ".join(names)
    return f"{', '.join(names[: count - 1])}, ... {names[-1]}"
