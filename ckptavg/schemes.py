"""What to average, as it is typed: schemes and the names of their outputs."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ckptavg.coefficients import CoefficientRow
from ckptavg.errors import UsageError

_SUM_TOLERANCE = 1e-6
_SCHEME_NAMES = ("uniform", "coefficients")
_LABEL = re.compile(r"\w[\w.+-]{0,99}", re.ASCII)  # a directory that needs no quoting


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Which checkpoints go into one average, and how much each of them counts.

    Attributes:
        name: ``uniform`` or ``coefficients``.
        last: For ``uniform``: average the last so many checkpoints only.
        first: For ``uniform``: average the first so many only.
        coefficients: For ``coefficients``: one multiplier a checkpoint, in the order of the
            sources. They must sum to 1 within 1e-6 and are divided by their sum.
        label: What the output's directory is called among several; None derives it.

    Raises:
        UsageError: If the options do not belong to the scheme or make no sense.
    """

    name: str = "uniform"
    last: int | None = None
    first: int | None = None
    coefficients: tuple[float, ...] | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if self.name not in _SCHEME_NAMES:
            raise UsageError(
                f"scheme '{self.name}' is not known; there are {', '.join(_SCHEME_NAMES)}"
            )
        if self.coefficients is not None:  # numpy's numbers, too
            object.__setattr__(self, "coefficients", tuple(float(c) for c in self.coefficients))
        if (self.coefficients is not None) != (self.name == "coefficients"):
            raise UsageError("coefficients belong to the scheme of that name, which needs them")
        for key, count in (("last", self.last), ("first", self.first)):
            if count is not None and (self.name != "uniform" or type(count) is not int):
                raise UsageError(f"scheme '{self.name}': {key} must be a number, with uniform")
            if count is not None and count < 1:
                raise UsageError(f"scheme 'uniform:{key}={count}': expected at least 1")
        if self.last is not None and self.first is not None:
            raise UsageError("scheme 'uniform': takes last or first, not both")
        if self.label is not None and not _LABEL.fullmatch(self.label):
            raise UsageError(
                f"'{self.label}' cannot name an output: use letters, digits, '_', '-', '.' and '+'"
            )

    def __str__(self) -> str:
        """Return the scheme as it is typed, without label and coefficients."""
        for key, count in (("last", self.last), ("first", self.first)):
            if count is not None:
                return f"{self.name}:{key}={count}"
        return self.name


def parse_scheme(text: str) -> Scheme:
    """Read ``[LABEL=]NAME[:option,…]``.

    ``uniform``, ``uniform:last=5``, ``uniform:first=3``, ``coefficients:0.2,0.8``,
    ``late=uniform:last=5``. Coefficients may be fractions such as ``1/3``.

    Raises:
        UsageError: If it is not of that form.
    """
    head, _, options = text.partition(":")
    label, equals, name = head.rpartition("=")
    if equals and not label:
        raise UsageError(f"scheme '{text}': nothing stands before '='")
    chosen: dict[str, int] = {}
    coefficients: tuple[float, ...] | None = None
    if name == "coefficients":
        coefficients = parse_coefficients(options)
    elif options or head != text:
        for option in options.split(","):
            key, _, value = option.partition("=")
            if key not in ("last", "first") or not value.isdecimal() or key in chosen:
                raise UsageError(
                    f"scheme '{text}': '{option}' is not an option of {name}; "
                    "there are last=N and first=N"
                )
            chosen[key] = int(value)
    return Scheme(name=name, coefficients=coefficients, label=label or None, **chosen)


def parse_coefficients(text: str) -> tuple[float, ...]:
    """Read comma-separated numbers or fractions: ``0.2,0.3,0.5`` or ``1/3,1/3,1/3``.

    Raises:
        UsageError: If it is not a list of them.
    """
    try:
        return tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UsageError(f"'{text}' is not a list of numbers such as 0.2,0.3,0.5") from error


def coefficient_row(scheme: Scheme, n_checkpoints: int) -> CoefficientRow:
    """Return a scheme's coefficients for a number of checkpoints.

    Uniform: theta = (1/n) sum_k theta_k (Izmailov et al. 2018, Algorithm 1, unrolled).

    Raises:
        UsageError: If the scheme asks for more checkpoints than there are, or explicit
            coefficients do not match the checkpoints or do not sum to 1.
    """
    if scheme.coefficients is None:
        used = scheme.last or scheme.first or n_checkpoints
        if used > n_checkpoints:
            raise UsageError(f"scheme '{scheme}': there are only {n_checkpoints} checkpoints")
        unused = (0.0,) * (n_checkpoints - used)
        ones = (1.0,) * used
        return CoefficientRow(ones + unused if scheme.first else unused + ones, used)
    values = scheme.coefficients
    check_count(values, n_checkpoints)
    if not all(math.isfinite(value) for value in values):
        raise UsageError("coefficients must be finite numbers")
    total = math.fsum(values)
    if abs(total - 1) > _SUM_TOLERANCE:
        raise UsageError(
            f"the coefficients sum to {total:.9g}, not 1; divide each of them by their sum"
            if total
            else "the coefficients sum to 0, not 1"
        )
    return CoefficientRow(tuple(value / total for value in values), 1)


def output_names(schemes: Sequence[Scheme]) -> tuple[str, ...]:
    """Name the directories of several outputs: by label, else by scheme; one output needs none.

    ``uniform:last=5`` becomes ``uniform-last5``; a second ``coefficients`` ``coefficients-2``.

    Raises:
        UsageError: If two schemes have the same label, or are the same without having labels.
    """
    if len(schemes) == 1:
        return ("",)
    names: list[str] = []
    for scheme in schemes:
        name = scheme.label or str(scheme).replace(":", "-").replace("=", "")
        if name in names and scheme.label is None and scheme.coefficients is not None:
            numbered = (f"{name}-{count}" for count in range(2, len(schemes) + 1))
            name = next(candidate for candidate in numbered if candidate not in names)
        if name.lower() in [other.lower() for other in names]:
            raise UsageError(
                f"two outputs would be called '{name}'; name them, for example "
                f"--scheme other={scheme}"
            )
        names.append(name)
    return tuple(names)


def check_count(coefficients: Sequence[float], n_checkpoints: int) -> None:
    """Refuse explicit coefficients that do not go with the checkpoints.

    Raises:
        UsageError: If there are more or fewer.
    """
    if len(coefficients) != n_checkpoints:
        raise UsageError(f"{len(coefficients)} coefficients for {n_checkpoints} checkpoints")
