"""What an average is, as numbers: the multiplier of every checkpoint, and formulas for them.

All formulas are float64 and return one coefficient a checkpoint, oldest first, summing to 1 but for
rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

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


def linear(n: int) -> list[float]:
    """Return weights that grow with recency: c_i = i / sum_j j, i = 1..n.

    The weighted moving average (WMA) of "Model Merging in Pre-training" (PMA, Li et al. 2025).
    """
    return [2 * i / (n * (n + 1)) for i in range(1, n + 1)]


def ema(n: int, decay: float) -> list[float]:
    """Return an exponential moving average over snapshots.

    E_1 = theta_1, then E <- D E + (1-D) theta_i, unrolled with alpha = 1 - D:
    c_1 = (1 - alpha)^(n-1), c_i = alpha (1 - alpha)^(n-i), as in PMA (Li et al. 2025), whose alpha
    is 0.1 and 0.2.

    Args:
        n: Number of snapshots.
        decay: D, between 0 and 1.
    """
    return [decay ** (n - 1), *((1 - decay) * decay ** (n - i) for i in range(2, n + 1))]


def ema_of_steps(steps: Sequence[float], decay: float) -> list[float]:
    """Return an exponential moving average with a decay per training step, out of snapshots.

    The EMA of all iterates, E <- B E + (1-B) theta at every step, if the weights are those of a
    snapshot from the one before it (exclusive) on: c_i = B^(T - t_i) (1 - B^(t_i - t_(i-1))), where
    T = t_n; all before the first snapshot counts as the first: c_1 = B^(T - t_1).

    Args:
        steps: Training steps t_1 < ... < t_n.
        decay: B, between 0 and 1.
    """
    log_decay, end = math.log(decay), steps[-1]
    return [
        math.exp(log_decay * (end - steps[0])),
        *(
            -math.exp(log_decay * (end - step)) * math.expm1(log_decay * (step - before))
            for before, step in pairwise(steps)
        ),
    ]


def mean_between(n_older: int, n_newer: int) -> list[float]:
    """Return what makes the mean of the iterates between out of two running means.

    The older is the mean of the first M iterates, the newer of the first N: (N S_N - M S_M) /
    (N - M), from the running average of Izmailov et al. 2018, Algorithm 1.

    Args:
        n_older: M, at least 1.
        n_newer: N > M.
    """
    between = n_newer - n_older
    return [-n_older / between, n_newer / between]


def ema_between(decay: float, updates: float) -> list[float]:
    """Return what makes the EMA of the iterates between out of two EMAs of one run.

    (E_t - B^d E_(t-d)) / (1 - B^d): what is left of the older one after d updates is taken out.

    Args:
        decay: B, of one update, between 0 and 1.
        updates: d, their number.
    """
    exponent = math.log(decay) * updates
    taken = -math.expm1(exponent)
    return [-math.exp(exponent) / taken, 1 / taken]


def swag_means(n: int, rank: int, seed: int, sample: int, scale: float) -> list[float]:
    """Return the mean and the low-rank noise of one SWAG sample.

    theta_bar + 1 / sqrt(2 (K-1)) sum_k z_k (theta_k - theta_bar), with z standard normal and k over
    the last K snapshots (Maddox et al. 2019, eq. 1 and Algorithm 1); deviations are from the final
    mean, where the algorithm has the running one. The diagonal noise is not linear.

    Args:
        n: Number of snapshots that are averaged.
        rank: K, from 2 to n.
        seed: Of Philox, together with the number of the sample.
        sample: Number of the sample.
        scale: What the noise is multiplied with.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sample])))
    noise = generator.standard_normal(rank) * (scale / math.sqrt(2 * (rank - 1)))
    common = (1 - math.fsum(noise)) / n
    return [*[common] * (n - rank), *(common + float(one) for one in noise)]
