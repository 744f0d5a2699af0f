"""What the user wants computed: schemes, dtypes, and what becomes of integer buffers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from ckptavg.errors import UsageError

Accumulate = Literal["auto", "float32", "float64"]
OutputDType = Literal["same", "float64", "float32", "bfloat16", "float16"]
Buffers = Literal["last", "first", "refuse"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to compute from checkpoints in a given order.

    Attributes:
        schemes: One an output.
        accumulate: dtype of the sums. ``auto`` is float64 for float32 and float64 inputs, float32
            for 16-bit ones.
        dtype: dtype of averaged tensors in the output; ``same`` keeps the inputs'.
        buffers: Which checkpoint of an average gives integer and bool tensors that differ between
            its checkpoints; ``refuse`` makes that an error. Equal ones are copied.
        allow_nonfinite: Keep infinities and NaN as IEEE 754 arithmetic gives them.
        adapter_rank: Rank of averaged LoRA adapters; None is the exact mean of their products,
            whose rank is the sum of theirs.
        adapter_factors: Average the parameters of adapters as they are instead, and measure how
            far the product of mean factors is from the mean product.

    Raises:
        UsageError: If a value is not among those named here.
    """

    schemes: tuple[Scheme, ...] = (Scheme(),)
    accumulate: Accumulate = "auto"
    dtype: OutputDType = "same"
    buffers: Buffers = "last"
    allow_nonfinite: bool = False
    adapter_rank: int | None = None
    adapter_factors: bool = False

    def reordered(self, order: Sequence[int]) -> "Recipe":
        """Return the recipe for checkpoints in another order: new[i] was old[order[i]].

        Raises:
            UsageError: If there are not as many coefficients as checkpoints.
        """
        schemes = []
        for scheme in self.schemes:
            if scheme.coefficients is not None:
                _check_count(scheme.coefficients, len(order))
                scheme = replace(
                    scheme, coefficients=tuple(scheme.coefficients[index] for index in order)
                )
            schemes.append(scheme)
        return replace(self, schemes=tuple(schemes))

    def __post_init__(self) -> None:
        if not self.schemes:
            raise UsageError("no scheme says what to average")
        for name, value, allowed in (
            ("accumulate", self.accumulate, get_args(Accumulate)),
            ("dtype", self.dtype, get_args(OutputDType)),
            ("buffers", self.buffers, get_args(Buffers)),
        ):
            if value not in allowed:
                raise UsageError(f"{name}: '{value}' is not one of {', '.join(allowed)}")
        if self.adapter_rank is not None and self.adapter_factors:
            raise UsageError("adapter_rank is for products, adapter_factors for factors: pass one")
        if self.adapter_rank is not None and (
            type(self.adapter_rank) is not int or self.adapter_rank < 1
        ):
            raise UsageError(f"adapter_rank is {self.adapter_rank}, expected at least 1")


@dataclass(frozen=True, slots=True)
class CoefficientRow:
    """One output as a linear combination of the checkpoints.

    The output is ``sum_k multipliers[k] * checkpoint_k / divisor``, summed from the newest
    checkpoint to the oldest. Keeping the division apart makes the uniform mean exact where the sum
    is: S / K rounded once is the correctly rounded mean, S * (1/K) is not.

    Attributes:
        multipliers: One a checkpoint; 0 leaves the checkpoint out.
        divisor: 1 unless all multipliers are 1 or 0.
    """

    multipliers: tuple[float, ...]
    divisor: int

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The multipliers over the divisor; they sum to 1."""
        return tuple(multiplier / self.divisor for multiplier in self.multipliers)

    @property
    def used(self) -> tuple[int, ...]:
        """Indices of the checkpoints that count, oldest first."""
        return tuple(index for index, value in enumerate(self.multipliers) if value != 0)


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
    _check_count(values, n_checkpoints)
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


def _check_count(coefficients: Sequence[float], n_checkpoints: int) -> None:
    if len(coefficients) != n_checkpoints:
        raise UsageError(f"{len(coefficients)} coefficients for {n_checkpoints} checkpoints")
