"""What an average is, as numbers: the multiplier of every checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_EQUAL = 1e-14  # relative difference of coefficients that differ by rounding only


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Coordinate by coordinate: the mean without the smallest and the largest values.

    Attributes:
        n_cut: How many are left out at each end; the median leaves out all but one or two.
    """

    n_cut: int


@dataclass(frozen=True, slots=True)
class GaussianNoise:
    """Independent normal noise of every coordinate, added to a linear combination (SWAG).

    The variance of a coordinate is that of its values in the checkpoints of ``moments``,
    mean(theta^2) - mean(theta)^2 (Maddox et al. 2019, section 3.2).

    Attributes:
        moments: Indices of the checkpoints whose spread it has.
        scale: What standard deviations are multiplied with; 2^-1/2 in equation 1 of the paper.
        seed: Of the random numbers.
        sample: Number of the sample: samples of one seed differ.
    """

    moments: tuple[int, ...]
    scale: float
    seed: int
    sample: int


@dataclass(frozen=True, slots=True)
class CoefficientRow:
    """One output as a linear combination of the checkpoints.

    The output is ``sum_k multipliers[k] * checkpoint_k / divisor``, summed from the newest
    checkpoint to the oldest. Keeping the division apart makes the uniform mean exact where the sum
    is: S / K rounded once is the correctly rounded mean, S * (1/K) is not.

    Attributes:
        multipliers: One a checkpoint; 0 leaves the checkpoint out.
        divisor: 1 unless all multipliers are 1 or 0.
        statistic: What is taken of the checkpoints instead of the mean: an order statistic of
            those whose multiplier is not 0 (which are all 1), or a mean with noise added.
    """

    multipliers: tuple[float, ...]
    divisor: int
    statistic: Trimmed | GaussianNoise | None = None

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The multipliers over the divisor; they sum to 1."""
        return tuple(multiplier / self.divisor for multiplier in self.multipliers)

    @property
    def told_coefficients(self) -> tuple[float | None, ...]:
        """The coefficients as people read them: None where an order statistic has none."""
        if not isinstance(self.statistic, Trimmed):
            return self.coefficients
        return tuple(None if multiplier else 0.0 for multiplier in self.multipliers)

    @property
    def statistic_name(self) -> str | None:
        """``median``, ``trimmed 20%``, ``noise ...``; None for a weighted mean."""
        if isinstance(self.statistic, Trimmed):
            n, n_cut = len(self.used), self.statistic.n_cut
            return "median" if n_cut == (n - 1) // 2 else f"trimmed {100 * n_cut / n:.3g}%"
        if isinstance(self.statistic, GaussianNoise):
            noise = self.statistic
            return f"noise of {noise.scale:.3g} sd (seed {noise.seed}, sample {noise.sample})"
        return None

    @property
    def used(self) -> tuple[int, ...]:
        """Indices of the checkpoints that count, also for noise only, oldest first."""
        noise = self.statistic
        spread = noise.moments if isinstance(noise, GaussianNoise) else ()
        return tuple(
            index for index, value in enumerate(self.multipliers) if value != 0 or index in spread
        )


def combination(
    values: Sequence[float], indices: Sequence[int], n_checkpoints: int
) -> CoefficientRow:
    """Return the row of a linear combination of some checkpoints.

    The coefficients are divided by their sum, which is 1 but for rounding, and the last bit that
    is missing then goes to the largest. Where all that are not 0 are equal, they become multipliers
    1 over their number: the correctly rounded mean.

    Args:
        values: The coefficients, float64.
        indices: The checkpoint of each.
        n_checkpoints: How many checkpoints there are; the others get 0.
    """
    total = math.fsum(values)
    shares = {index: value / total for index, value in zip(indices, values, strict=True) if value}
    largest = max(shares.values(), key=abs)
    if all(abs(share - largest) <= _EQUAL * abs(largest) for share in shares.values()):
        shares = dict.fromkeys(shares, 1.0)
        divisor = len(shares)
    else:
        rest = 1 - math.fsum(shares.values())
        shares[max(shares, key=lambda index: abs(shares[index]))] += rest
        divisor = 1
    return CoefficientRow(tuple(shares.get(index, 0.0) for index in range(n_checkpoints)), divisor)
