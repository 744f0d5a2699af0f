"""Learning-rate decay by merging (WSM): the weights that a decay would have given displacements.

Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
Pre-training" (arXiv 2507.17634). It is an identity over the displacements that were recorded, not a
simulation: the gradients stay those of the path without a decay.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

# integral from 0 to x of the decay D: [0, 1] -> [1, F], in terms of x and F
_INTEGRALS: dict[str, Callable[[float, float], float]] = {
    "linear": lambda x, final: x - (1 - final) * x**2 / 2,
    "cosine": lambda x, final: final * x + (1 - final) * (x + math.sin(math.pi * x) / math.pi) / 2,
    "1-sqrt": lambda x, final: x - (1 - final) * 2 / 3 * x**1.5,
    "1-square": lambda x, final: x - (1 - final) * x**3 / 3,
    "inverse": lambda x, final: math.log1p((1 / final - 1) * x) / (1 / final - 1),
    "exponential": lambda x, final: math.expm1(x * math.log(final)) / math.log(final),
}

DECAYS = tuple(_INTEGRALS)
NEVER_ZERO = ("inverse", "exponential")  # decays that end above 0


def merged_decay(times: Sequence[float], decay: str, final: float) -> list[float]:
    """Return the coefficients that make the newest of k+1 snapshots what a decay would have made.

    With w_i the mean of the decay D over interval i, ((t_(i-1) - t_0) / (t_k - t_0),
    (t_i - t_0) / (t_k - t_0)]: theta_0 - sum_i w_i g_i = sum_j c_j theta_j, where g_i is
    theta_(i-1) - theta_i, c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k. Since D falls from 1, none
    is negative. On even spacing a linear decay to 0 gives 1/2k, 1/k, ..., 1/k, 1/2k.

    D(x) is, from 1 at x = 0 to F at x = 1: ``linear`` in x; ``cosine`` F + (1-F)(1 + cos pi x)/2;
    ``1-sqrt`` F + (1-F)(1 - sqrt x); ``1-square`` F + (1-F)(1 - x^2); ``inverse`` with 1/D linear
    in x; ``exponential`` F^x.

    Args:
        times: t_0 < ... < t_k.
        decay: One of ``DECAYS``.
        final: F, at least 0 and below 1; above 0 for those in ``NEVER_ZERO``.
    """
    if len(times) == 1:
        return [1.0]
    integral, length = _INTEGRALS[decay], times[-1] - times[0]
    places = [(time - times[0]) / length for time in times]
    means = [
        (integral(end, final) - integral(start, final)) / (end - start)
        for start, end in pairwise(places)
    ]
    # rounding may turn a difference of 0 into less
    return [max(high - low, 0.0) for high, low in pairwise([1.0, *means, 0.0])]
