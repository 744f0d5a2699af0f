"""What the user wants computed: coefficients, dtypes, and what becomes of integer buffers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ckptavg.errors import UsageError

Accumulate = Literal["auto", "float32", "float64"]
OutputDType = Literal["same", "float64", "float32", "bfloat16", "float16"]
Buffers = Literal["last", "first", "refuse"]

_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to compute from checkpoints in a given order.

    Attributes:
        coefficients: One multiplier a checkpoint, in the order of the checkpoints; None is the
            uniform mean. They must sum to 1 within 1e-6 and are divided by their sum.
        accumulate: dtype of the sums. ``auto`` is float64 for float32 and float64 inputs, float32
            for 16-bit ones.
        dtype: dtype of averaged tensors in the output; ``same`` keeps the inputs'.
        buffers: Which checkpoint gives integer and bool tensors that differ between checkpoints;
            ``refuse`` makes that an error. Equal ones are copied.
        allow_nonfinite: Keep infinities and NaN as IEEE 754 arithmetic gives them.

    Raises:
        UsageError: If a value is not among those named here.
    """

    coefficients: tuple[float, ...] | None = None
    accumulate: Accumulate = "auto"
    dtype: OutputDType = "same"
    buffers: Buffers = "last"
    allow_nonfinite: bool = False

    def reordered(self, order: Sequence[int]) -> "Recipe":
        """Return the recipe for checkpoints in another order: new[i] was old[order[i]].

        Raises:
            UsageError: If there are not as many coefficients as checkpoints.
        """
        if self.coefficients is None:
            return self
        _check_count(self.coefficients, len(order))
        return replace(self, coefficients=tuple(self.coefficients[index] for index in order))

    def __post_init__(self) -> None:
        if self.coefficients is not None:  # numpy's numbers, too
            object.__setattr__(self, "coefficients", tuple(float(c) for c in self.coefficients))
        for name, value, allowed in (
            ("accumulate", self.accumulate, get_args(Accumulate)),
            ("dtype", self.dtype, get_args(OutputDType)),
            ("buffers", self.buffers, get_args(Buffers)),
        ):
            if value not in allowed:
                raise UsageError(f"{name}: '{value}' is not one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class CoefficientRow:
    """One output as a linear combination of the checkpoints.

    The output is ``sum_k multipliers[k] * checkpoint_k / divisor``, summed in the order of the
    checkpoints. Keeping the division apart makes the uniform mean exact where the sum is: S / K
    rounded once is the correctly rounded mean, S * (1/K) is not.

    Attributes:
        name: What messages and provenance call the scheme.
        multipliers: One a checkpoint; 0 leaves the checkpoint out.
        divisor: 1 unless all multipliers are 1.
    """

    name: str
    multipliers: tuple[float, ...]
    divisor: int

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The multipliers over the divisor; they sum to 1."""
        return tuple(multiplier / self.divisor for multiplier in self.multipliers)


def coefficient_row(recipe: Recipe, n_checkpoints: int) -> CoefficientRow:
    """Return the recipe's coefficients for a number of checkpoints.

    Uniform: theta = (1/n) sum_k theta_k (Izmailov et al. 2018, Algorithm 1, unrolled).

    Raises:
        UsageError: If explicit coefficients do not match the checkpoints or do not sum to 1.
    """
    if recipe.coefficients is None:
        return CoefficientRow("uniform", (1.0,) * n_checkpoints, n_checkpoints)
    values = recipe.coefficients
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
    return CoefficientRow("coefficients", tuple(value / total for value in values), 1)


def _check_count(coefficients: Sequence[float], n_checkpoints: int) -> None:
    if len(coefficients) != n_checkpoints:
        raise UsageError(f"{len(coefficients)} coefficients for {n_checkpoints} checkpoints")
