"""Power-function averages (EDM2): out of snapshots of the weights, or out of stored averages.

Equation numbers are those of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models" (arXiv 2312.02696).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptavg.errors import UsageError

MAX_SIGMA = 1 / math.sqrt(12)  # the relative standard deviation at gamma = 0, the plain mean

_SINGULAR = 1e-12  # smallest over largest eigenvalue; 600 snapshots of two sigmas have 1e-8
_ROUNDING = 1e-12  # a coefficient below this share of the largest is what rounding left of 0


class Fit(NamedTuple):
    """A profile put together from stored ones.

    Attributes:
        coefficients: One a stored snapshot; they may be negative.
        error: ||sum_i x_i p_i - p|| / ||p||, L2 norms of functions of training time.
    """

    coefficients: list[float]
    error: float


def gamma_of_sigma(sigma: float) -> float:
    """Return the exponent of the profile with a relative standard deviation.

    sigma = sqrt((gamma+1) / ((gamma+2)^2 (gamma+3))) (eq. 123), so gamma is the largest real root
    of g^3 + 7 g^2 + (16 - sigma^-2) g + 12 - sigma^-2 (eq. 126, Algorithm 2). That polynomial is
    convex for g > 0 and positive at 1 / sigma, so Newton's method goes down to the root from there.

    Args:
        sigma: In units of the training time; above 0, at most ``MAX_SIGMA``, where gamma is 0.
    """
    inverse = sigma**-2
    gamma = 1 / sigma
    while True:
        value = ((gamma + 7) * gamma + 16 - inverse) * gamma + 12 - inverse
        slope = (3 * gamma + 14) * gamma + 16 - inverse
        lower = gamma - value / slope
        if not lower < gamma:
            return max(gamma, 0.0)
        gamma = lower


def power_ema(times: Sequence[float], sigma: float) -> list[float]:
    """Return a power-function EMA out of snapshots of the weights.

    The recursion E <- b E + (1-b) theta with b = (1 - 1/t)^(gamma+1) (eq. 127), unrolled, if the
    weights are those of a snapshot from the one before it (exclusive) on:
    c_i = (t_i/T)^(gamma+1) - (t_(i-1)/T)^(gamma+1), t_0 = 0, T = t_n. None is negative; the first
    snapshot stands for all training before it.

    Args:
        times: Training steps or epochs t_1 < ... < t_n, none below 0.
        sigma: Relative standard deviation of the profile; see ``gamma_of_sigma``.
    """
    if times[-1] == 0:
        return [1.0]
    shares = [(time / times[-1]) ** (gamma_of_sigma(sigma) + 1) for time in times]
    return [share - before for before, share in zip([0.0, *shares], shares, strict=False)]


def fit_power_ema(times: Sequence[float], sigmas: Sequence[float], sigma: float) -> Fit:
    """Return the power-function EMA nearest in L2 that stored ones can be put together to.

    Post-hoc EMA (section 3, Algorithm 3): x = A^-1 b with A_ij = <p_i, p_j>, b_i = <p_i, p>,
    normalised to sum 1, where p is the profile of ``sigma`` at the newest snapshot's time. Rows and
    columns are scaled to profiles of norm 1 before the system is solved.

    Args:
        times: Training step of each stored snapshot, above 0, in any order.
        sigmas: Relative standard deviation of each; see ``gamma_of_sigma``.
        sigma: The one that is wanted.

    Raises:
        UsageError: If the profiles are linearly dependent, as when one is there twice.
    """
    end = max(times)
    t = np.array([time / end for time in times])
    gammas = np.array([gamma_of_sigma(one) for one in sigmas])
    wanted = np.array([gamma_of_sigma(sigma)])
    gram = _inner_products(t[:, None], gammas[:, None], t, gammas)
    target = _inner_products(t, gammas, np.ones(1), wanted)
    norm = float(_inner_products(np.ones(1), wanted, np.ones(1), wanted)[0])
    scale = 1 / np.sqrt(np.diag(gram))
    scaled = gram * scale[:, None] * scale
    eigenvalues = np.linalg.eigvalsh(scaled)
    if eigenvalues[0] <= _SINGULAR * eigenvalues[-1]:
        raise UsageError("the stored averages depend on each other: is one of them there twice?")
    solution = scale * np.linalg.solve(scaled, scale * target)
    solution[np.abs(solution) < _ROUNDING * np.max(np.abs(solution))] = 0
    solution /= math.fsum(solution)
    square = solution @ gram @ solution - 2 * target @ solution + norm
    return Fit(solution.tolist(), math.sqrt(max(float(square), 0.0) / norm))


def _inner_products(
    t_a: NDArray[np.float64],
    gamma_a: NDArray[np.float64],
    t_b: NDArray[np.float64],
    gamma_b: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the integrals of p_a p_b over training time, p(t) = (gamma+1) t^gamma / T^(gamma+1).

    (gamma_a+1)(gamma_b+1)(T_a/T_b)^e / ((gamma_a+gamma_b+1) max(T_a, T_b)), with e = gamma_b where
    T_a < T_b, else -gamma_a (eq. 151).
    """
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    above: NDArray[np.float64] = (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent
    return above / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))
