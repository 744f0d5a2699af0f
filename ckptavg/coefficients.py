"""What an average is, as numbers: the multiplier of every checkpoint."""

from dataclasses import dataclass


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
    def used(self) -> tuple[int, ...]:
        """Indices of the checkpoints that count, also for noise only, oldest first."""
        noise = self.statistic
        spread = noise.moments if isinstance(noise, GaussianNoise) else ()
        return tuple(
            index for index, value in enumerate(self.multipliers) if value != 0 or index in spread
        )
