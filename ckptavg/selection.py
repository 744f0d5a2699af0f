"""Which of many checkpoints are taken: the last N, every M-th, those where the rate is low."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

from ckptavg.cycles import Recorded
from ckptavg.errors import SourceError, UsageError
from ckptavg.metrics import Mode, best_mode

_STEPS = re.compile(r"(\d{0,18}):(\d{0,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is taken from the checkpoints that sources stand for, oldest first.

    The conditions apply in this order: ``match``, ``steps``, one of ``at_lr_minima``,
    ``constant_lr`` and ``swad``, then ``best``, ``every``, and ``last`` or ``first``.

    Attributes:
        last: The newest so many.
        first: The oldest so many.
        every: Every so-manyth, counted back from the newest, which is always taken.
        steps: First and last training step, both included; None leaves an end open.
        match: Patterns such as ``checkpoint-*`` for the last part of a name; one has to match.
        at_lr_minima: Those at the minimum of each cycle of the learning rate.
        constant_lr: The last stretch of those that were trained at one learning rate.
        swad: Those in SWAD's window of validation losses.
        swad_tolerance: By what part losses may exceed those at its beginning; None is 0.3.
        best: So many with the best ``metric``.
        metric: What ``best`` and ``swad`` go by; None, for ``swad``, is the only loss there is.
        mode: Whether less or more of it is better; None goes by its name.
        log: File that tells learning rates and metrics by step or epoch: CSV, JSONL or JSON.
        lr_recorded: Whether learning rates on record are those of the update before (``used``) or
            after (``next``) a checkpoint; None finds out.

    Raises:
        UsageError: If a value makes no sense, or would not be used.
    """

    last: int | None = None
    first: int | None = None
    every: int | None = None
    steps: tuple[int | None, int | None] | None = None
    match: tuple[str, ...] = ()
    at_lr_minima: bool = False
    constant_lr: bool = False
    swad: bool = False
    swad_tolerance: float | None = None
    best: int | None = None
    metric: str | None = None
    mode: Mode | None = None
    log: str | Path | None = None
    lr_recorded: Recorded | None = None

    def __post_init__(self) -> None:
        for name in ("last", "first", "every", "best"):
            count = getattr(self, name)
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
        self._refuse_what_is_not_used()

    def _refuse_what_is_not_used(self) -> None:
        stages = [f"--{name}" for name, given in self._stages() if given]
        if len(stages) > 1:
            raise UsageError(f"{' and '.join(stages)} exclude each other")
        uses_rates = self.at_lr_minima or self.constant_lr
        uses_metric = self.best is not None or self.swad
        if self.best is not None and self.metric is None:
            raise UsageError("--best needs the name of a metric, for example --metric eval_loss")
        for name, value, is_used, needs in (
            ("metric", self.metric, uses_metric, "--best or --swad"),
            ("mode", self.mode, uses_metric, "--best or --swad"),
            ("swad-tolerance", self.swad_tolerance, self.swad, "--swad"),
            ("lr-recorded", self.lr_recorded, uses_rates, "--at-lr-minima or --constant-lr"),
            ("log", self.log, self.uses_training,
             "--at-lr-minima, --constant-lr, --best or --swad"),
        ):  # fmt: skip
            if value is not None and not is_used:
                raise UsageError(f"--{name} is for {needs}")
        if self.best is not None and self.metric is not None:
            best_mode(self.metric, self.mode)
        if self.lr_recorded not in (None, *get_args(Recorded)):
            raise UsageError(f"lr_recorded is '{self.lr_recorded}', expected used or next")
        tolerance = self.swad_tolerance
        if tolerance is not None and not 0 <= tolerance < 1e6:
            raise UsageError(f"swad_tolerance is {tolerance}, expected 0 or more, such as 0.3")

    @property
    def is_given(self) -> bool:
        """Whether anything is left out on purpose."""
        return self != Selection()

    @property
    def uses_training(self) -> bool:
        """Whether it goes by what a trainer recorded of the training."""
        return self.best is not None or any(given for _, given in self._stages())

    @property
    def is_by_metric_alone(self) -> bool:
        """Whether what it goes by is told by each checkpoint itself, of whichever run."""
        return self.log is None and not any(given for _, given in self._stages())

    def matches(self, name: str) -> bool:
        """Tell whether the name of a checkpoint is among those asked for."""
        return not self.match or any(fnmatchcase(name, pattern) for pattern in self.match)

    def chosen(
        self,
        steps: Sequence[int | None],
        labels: Sequence[str],
        by_training: Callable[[list[int]], list[int]] | None = None,
    ) -> list[int]:
        """Return the indices of those taken, among checkpoints in the order of training.

        Args:
            steps: Their training steps; None where nothing tells.
            labels: What messages call them.
            by_training: Applies what ``uses_training`` speaks of; needed if that is so.

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
        if by_training is not None and indices:
            indices = by_training(indices)
        if self.every is not None:
            indices = indices[::-1][:: self.every][::-1]
        if not indices:
            raise SourceError(f"none of the {len(steps)} checkpoints is within {self}")
        wanted = self.last or self.first
        if wanted is not None and wanted > len(indices):
            what = "last" if self.last else "first"
            raise too_few(f"--{what} {wanted}", len(indices))
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
        told += [f"--{name}" for name, given in self._stages() if given]
        for name in (
            "swad_tolerance", "best", "metric", "mode", "log", "lr_recorded", "every", "last",
            "first",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                told.append(f"--{name.replace('_', '-')} {value}")
        return " ".join(told)

    def _stages(self) -> tuple[tuple[str, bool], ...]:
        return (
            ("at-lr-minima", self.at_lr_minima),
            ("constant-lr", self.constant_lr),
            ("swad", self.swad),
        )


def too_few(option: str, n_there: int) -> SourceError:
    """Return the error of asking for more checkpoints than there are."""
    there = "is only 1 checkpoint" if n_there == 1 else f"are only {n_there}"
    return SourceError(f"{option}: there {there}")


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
