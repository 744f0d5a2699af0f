"""Which of many checkpoints are taken: the last N, every M-th, a range of steps, some names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ckptavg.errors import SourceError, UsageError

_STEPS = re.compile(r"(\d{0,18}):(\d{0,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is taken from the checkpoints that sources stand for, oldest first.

    The conditions apply in this order: ``match``, ``steps``, ``every``, then ``last`` or ``first``.

    Attributes:
        last: The newest so many.
        first: The oldest so many.
        every: Every so-manyth, counted back from the newest, which is always taken.
        steps: First and last training step, both included; None leaves an end open.
        match: Patterns such as ``checkpoint-*`` for the last part of a name; one has to match.

    Raises:
        UsageError: If a value makes no sense.
    """

    last: int | None = None
    first: int | None = None
    every: int | None = None
    steps: tuple[int | None, int | None] | None = None
    match: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, count in (("last", self.last), ("first", self.first), ("every", self.every)):
            if count is not None and (type(count) is not int or count < 1):
                raise UsageError(f"{name} is {count}, expected a number of at least 1")
        if self.last is not None and self.first is not None:
            raise UsageError("--last and --first exclude each other")
        given: object = self.steps  # a caller without types may pass anything
        if isinstance(given, str):
            object.__setattr__(self, "steps", parse_steps(given))
        elif given is not None and not (isinstance(given, tuple) and len(given) == 2):
            raise UsageError(f"steps is {given!r}, expected two ends, such as (1000, None)")
        if self.steps is not None:
            low, high = self.steps
            if low is not None and high is not None and low > high:
                raise UsageError(f"steps {low}:{high}: the first step is after the last")

    @property
    def is_given(self) -> bool:
        """Whether anything is left out on purpose."""
        return self != Selection()

    def matches(self, name: str) -> bool:
        """Tell whether the name of a checkpoint is among those asked for."""
        return not self.match or any(fnmatchcase(name, pattern) for pattern in self.match)

    def chosen(self, steps: Sequence[int | None], labels: Sequence[str]) -> list[int]:
        """Return the indices of those taken, among checkpoints in the order of training.

        Args:
            steps: Their training steps; None where nothing tells.
            labels: What messages call them.

        Raises:
            SourceError: If none is left, fewer than asked for, or a step has to be known and is
                not.
        """
        indices = list(range(len(steps)))
        if self.steps is not None:
            low, high = self.steps
            unknown = [label for label, step in zip(labels, steps, strict=True) if step is None]
            if unknown:
                raise SourceError(
                    f"{unknown[0]}: neither its name nor its metadata tells a training step, which "
                    "--steps needs; choose by names with --match"
                )
            indices = [
                index
                for index in indices
                if (step := steps[index]) is not None
                and (low is None or low <= step)
                and (high is None or step <= high)
            ]
        if self.every is not None:
            indices = indices[::-1][:: self.every][::-1]
        if not indices:
            raise SourceError(f"none of the {len(steps)} checkpoints is within {self}")
        wanted = self.last or self.first
        if wanted is not None and wanted > len(indices):
            what = "last" if self.last else "first"
            there = "is only 1 checkpoint" if len(indices) == 1 else f"are only {len(indices)}"
            raise SourceError(f"--{what} {wanted}: there {there}")
        if self.last is not None:
            indices = indices[-self.last :]
        if self.first is not None:
            indices = indices[: self.first]
        return indices

    def __str__(self) -> str:
        """Return the options as they are typed."""
        told = [f"--match {pattern}" for pattern in self.match]
        if self.steps is not None:
            ends = ("" if end is None else str(end) for end in self.steps)
            told.append(f"--steps {':'.join(ends)}")
        for name, count in (("every", self.every), ("last", self.last), ("first", self.first)):
            if count is not None:
                told.append(f"--{name} {count}")
        return " ".join(told)


def parse_steps(text: str) -> tuple[int | None, int | None]:
    """Read ``A:B``, ``A:`` or ``:B``: training steps, both ends included.

    Raises:
        UsageError: If it is not of that form.
    """
    match = _STEPS.fullmatch(text.replace("_", ""))
    if match is None or not any(match.groups()):
        raise UsageError(f"'{text}' is not a range of steps such as 1000:9000 or 1000:")
    low, high = (int(part) if part else None for part in match.groups())
    return low, high
