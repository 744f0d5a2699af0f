"""The checkpoints that a scheme counts: its window, and where they stand in training."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import Any, NamedTuple

from ckptavg.coefficients import CoefficientRow, GaussianNoise, Trimmed, combination
from ckptavg.errors import UsageError
from ckptavg.schemes.options import Option, Whole
from ckptavg.schemes.power_ema import MAX_SIGMA

WINDOW_OPTIONS = (
    Option("from", Whole(0)),
    Option("to", Whole(0)),
    Option("every", Whole()),
    Option("last", Whole()),
    Option("first", Whole()),
)

_AFTER_SIGMA = re.compile(r"(?:sigma(?:[-_]?rel)?|std)[-_=]?(0?\.\d+)", re.IGNORECASE)
_DECIMAL = re.compile(r"(?<![\d.])0\.\d+(?!\.?\d)")


class Positions(NamedTuple):
    """What is known of checkpoints before any is read, oldest first.

    Attributes:
        labels: What messages call them.
        steps: Training steps; None where nothing tells.
        epochs: Likewise.
    """

    labels: tuple[str, ...]
    steps: tuple[int | None, ...]
    epochs: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """Some of the checkpoints, oldest first.

    Attributes:
        scheme: What messages call the scheme.
        positions: All checkpoints.
        indices: Those that count.
        notes: What the user should know is added here.
    """

    scheme: str
    positions: Positions
    indices: tuple[int, ...]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> list[str]:
        """What messages call them."""
        return [self.positions.labels[index] for index in self.indices]

    def refusal(self, reason: str) -> UsageError:
        """Return the error that names the scheme."""
        return UsageError(f"scheme '{self.scheme}': {reason}")

    def note(self, text: str) -> None:
        """Tell the user something about the scheme."""
        self.notes.append(f"scheme '{self.scheme}' {text}")

    def steps(self, *, increasing: bool = True) -> list[int]:
        """Return the training step of each.

        Raises:
            UsageError: If one is not known, or they do not increase where they have to.
        """
        steps = self._known(self.positions.steps)
        if steps is None:
            index = next(i for i in self.indices if self.positions.steps[i] is None)
            raise self.refusal(
                f"neither the name nor the metadata of {self.positions.labels[index]} tells a "
                "training step, which it needs"
            )
        if increasing:
            self._check_increasing(steps, "step")
        return steps

    def times(self) -> tuple[list[int], str] | None:
        """Return training steps and ``step``; where not all are known, epochs and ``epoch``.

        None where not all epochs are known either.

        Raises:
            UsageError: If they do not increase.
        """
        for values, what in ((self.positions.steps, "step"), (self.positions.epochs, "epoch")):
            times = self._known(values)
            if times is not None:
                self._check_increasing(times, what)
                if what == "epoch":
                    self.note("goes by epochs: not all training steps are known")
                return times, what
        return None

    def sigmas(self, stored: Sequence[float] | None) -> list[float]:
        """Return the sigma of each stored average: as given, or as names tell.

        Args:
            stored: One for all, or one for each of all checkpoints; None reads names.

        Raises:
            UsageError: If there are not as many as checkpoints, or a name does not tell.
        """
        if stored is None:
            return [self._sigma_in_name(label) for label in self.labels]
        if len(stored) == 1:
            return [stored[0]] * len(self)
        return [stored[index] for index in self.indices]

    def row(self, coefficients: Sequence[float]) -> CoefficientRow:
        """Return a linear combination, with a note if it leaves the convex hull."""
        row = combination(coefficients, self.indices, len(self.positions.labels))
        smallest = min(row.coefficients)
        if smallest < 0:
            label = self.positions.labels[row.coefficients.index(smallest)]
            self.note(
                f"has negative coefficients (smallest {smallest:.3g} for {label}): it extrapolates"
            )
        return row

    def statistic_row(
        self, multipliers: Sequence[float], statistic: Trimmed | GaussianNoise
    ) -> CoefficientRow:
        """Return a row with a statistic; the multipliers are all 1, or sum to 1."""
        row = combination(multipliers, self.indices, len(self.positions.labels))
        return CoefficientRow(row.multipliers, row.divisor, statistic)

    def _known(self, values: Sequence[int | None]) -> list[int] | None:
        found = [value for index in self.indices if (value := values[index]) is not None]
        return found if len(found) == len(self) else None

    def _check_increasing(self, times: Sequence[int], what: str) -> None:
        labels = pairwise(self.labels)
        for (one, other), (before, after) in zip(labels, pairwise(times), strict=True):
            if before == after:
                raise self.refusal(f"{one} and {other} are both of {what} {before}; leave one out")
            if before > after:
                raise self.refusal(
                    f"{other} of {what} {after} comes after {one} of {what} {before}; name them "
                    "in the order of training"
                )

    def _sigma_in_name(self, label: str) -> float:
        for part in reversed(PurePath(label).parts[-2:]):
            for pattern in (_AFTER_SIGMA, _DECIMAL):
                matches = pattern.finditer(part)
                found = {float(match[match.lastindex or 0]) for match in matches}
                if len(found) == 1 and 0 < max(found) <= MAX_SIGMA:
                    return found.pop()
                if found:
                    numbers = ", ".join(f"{one:.6g}" for one in sorted(found))
                    raise self.refusal(
                        f"the name of {label} does not tell one sigma of a stored average (at most "
                        f"{MAX_SIGMA:.4g}), but {numbers}; say it with stored=, for example "
                        "stored=0.05"
                    )
        raise self.refusal(
            f"the name of {label} does not tell the sigma of a stored average, as in "
            "'...-0.050.pt'; say it with stored=, for example stored=0.05"
        )


def window_of(
    scheme: str,
    options: Mapping[str, Any],
    positions: Positions,
    notes: list[str],
    *,
    by_step: bool = False,
) -> Window:
    """Take the checkpoints that a scheme counts: by step, then every M-th, then last or first.

    Args:
        scheme: What messages call the scheme.
        options: Values of ``WINDOW_OPTIONS`` by field; those that are missing leave all.
        positions: All checkpoints.
        by_step: Whether they count in the order of their steps, where all are known, also if they
            came otherwise: stored averages of several profiles may come one profile by another.
        notes: What the user should know is added here.

    Raises:
        UsageError: If none is left, fewer than asked for, or a step has to be known and is not.
    """
    window = Window(scheme, positions, tuple(range(len(positions.labels))), notes)
    indices = list(window.indices)
    if by_step and None not in positions.steps:
        indices.sort(key=lambda index: positions.steps[index] or 0)
    low, high = options.get("from_step"), options.get("to_step")
    if low is not None or high is not None:
        steps = window.steps(increasing=False)
        indices = [
            index
            for index in indices
            if (low is None or low <= steps[index]) and (high is None or steps[index] <= high)
        ]
        if not indices:
            raise window.refusal(f"none of the {len(window)} checkpoints is of these steps")
    if (every := options.get("every")) is not None:
        indices = indices[::-1][::every][::-1]
    last, first = options.get("last"), options.get("first")
    if (last or first or 0) > len(indices):
        only = (
            "is only 1 checkpoint" if len(indices) == 1 else f"are only {len(indices)} checkpoints"
        )
        raise window.refusal(f"there {only}")
    if last is not None:
        indices = indices[-last:]
    if first is not None:
        indices = indices[:first]
    return Window(scheme, positions, tuple(indices), notes)
