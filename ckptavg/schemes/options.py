"""What an option of a scheme may be: how it is read, checked and written."""

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_RATIO = re.compile(r"(-?\d{1,18})/(\d{1,18})", re.ASCII)
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})(?:\.\.(\d{1,18}))?", re.ASCII)


def read_number(text: str) -> float:
    """Read a number or a fraction such as ``1/3``.

    Raises:
        ValueError: If it is none, or not finite.
    """
    ratio = _RATIO.fullmatch(text.strip())
    try:
        number = float(text) if ratio is None else int(ratio[1]) / int(ratio[2])
    except ZeroDivisionError as error:
        raise ValueError(text) from error
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def read_range(text: str) -> tuple[int, ...] | None:
    """Read ``A..B`` or ``A..B..STEP``, the end included; None if it is not of that form.

    Raises:
        ValueError: If it stands for nothing.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if step == 0 or last < first:
        raise ValueError(text)
    return tuple(range(first, last + 1, step))


class Values(Protocol):
    """What an option accepts; both functions raise ValueError or TypeError for what it does not."""

    @property
    def expected(self) -> str:
        """What messages call it, such as ``a whole number of at least 1``."""

    def read(self, text: str) -> Any:
        """Return what was typed, unchecked."""

    def check(self, value: Any) -> Any:
        """Return a value as it is kept."""

    def write(self, value: Any) -> str:
        """Return what one types for a value that was checked."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number of at least ``low``, at most ``high``."""

    low: int = 1
    high: int | None = None

    @property
    def expected(self) -> str:
        """See ``Values``."""
        if self.high is not None:
            return f"a whole number from {self.low} to {self.high}"
        return f"a whole number of at least {self.low}"

    def read(self, text: str) -> int:
        """See ``Values``."""
        if not (text.isascii() and text.isdecimal()):
            raise ValueError(text)
        return int(text)

    def check(self, value: Any) -> int:
        """See ``Values``."""
        number = operator.index(value)  # numpy's numbers, too
        if isinstance(value, bool) or number < self.low:
            raise ValueError(value)
        if self.high is not None and number > self.high:
            raise ValueError(value)
        return number

    def write(self, value: int) -> str:
        """See ``Values``."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Real:
    """A number above ``low`` and below ``high``, or equal to an end that is included."""

    low: float
    high: float
    with_low: bool = False
    with_high: bool = False

    @property
    def expected(self) -> str:
        """See ``Values``."""
        low = f"{'of at least' if self.with_low else 'above'} {self.low:.6g}"
        if self.high == math.inf:
            return "a finite number" if self.low == -math.inf else f"a number {low}"
        return f"a number {low} and {'at most' if self.with_high else 'below'} {self.high:.6g}"

    def read(self, text: str) -> float:
        """See ``Values``."""
        return read_number(text)

    def check(self, value: Any) -> float:
        """See ``Values``."""
        if isinstance(value, (bool, str)):
            raise TypeError(value)
        number = float(value)
        above = self.low < number or (self.with_low and number == self.low)
        if not above or not (number < self.high or (self.with_high and number == self.high)):
            raise ValueError(value)
        return number

    def write(self, value: float) -> str:
        """See ``Values``."""
        return repr(value).removesuffix(".0")


@dataclass(frozen=True, slots=True)
class Word:
    """One of some words."""

    words: tuple[str, ...]

    @property
    def expected(self) -> str:
        """See ``Values``."""
        return f"one of {', '.join(self.words)}"

    def read(self, text: str) -> str:
        """See ``Values``."""
        return text

    def check(self, value: Any) -> str:
        """See ``Values``."""
        if value not in self.words:
            raise ValueError(value)
        return str(value)

    def write(self, value: str) -> str:
        """See ``Values``."""
        return value


@dataclass(frozen=True, slots=True)
class Several:
    """One or more values of one kind, with a separator between them.

    Attributes:
        of: The kind.
        separator: What stands between them as typed.
        count: How many there are; None for any number from 1 on.
        like: An example, for messages.
    """

    of: Values
    separator: str
    like: str
    count: int | None = None

    @property
    def expected(self) -> str:
        """See ``Values``."""
        return f"a list such as {self.like}, each {self.of.expected}"

    def read(self, text: str) -> tuple[Any, ...]:
        """See ``Values``."""
        return tuple(self.of.read(part) for part in text.split(self.separator))

    def check(self, value: Any) -> tuple[Any, ...]:
        """See ``Values``."""
        given: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
        if not given or self.count not in (None, len(given)):
            raise ValueError(value)
        return tuple(map(self.of.check, given))

    def write(self, value: tuple[Any, ...]) -> str:
        """See ``Values``."""
        return self.separator.join(map(self.of.write, value))


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a scheme.

    Attributes:
        key: What one types before ``=``.
        values: What it accepts.
        required: Whether it has to be given.
        per_source: Whether several values are one a source, in their order.
    """

    key: str
    values: Values
    required: bool = False
    per_source: bool = False

    @property
    def field(self) -> str:
        """The name in Python: ``step_decay``; ``from_step``, ``to_step`` for ``from``, ``to``."""
        name = self.key.replace("-", "_")
        return f"{name}_step" if name in ("from", "to") else name

    @property
    def takes_range(self) -> bool:
        """Whether ``A..B`` may stand for several values, each a scheme of its own."""
        return isinstance(self.values, Whole)
