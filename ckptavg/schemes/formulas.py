"""The coefficients of moving averages, of averages undone, and of SWAG's samples.

All formulas are float64 and return one coefficient a checkpoint, oldest first, summing to 1 but for
rounding.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np


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
