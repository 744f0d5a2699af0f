"""Standard normal numbers with an address: a function of seed, sample, tensor name and element.

Whatever asks, for any part of a tensor in any order, gets the same bits, on any machine: Philox is
exact by definition, and logarithm, sine and cosine are taken here by operations that IEEE 754
rounds alike everywhere (numpy's own depend on the processor).
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from ckptavg.average.floats import Array

_WORDS_A_BLOCK = 4  # what Philox4x64 makes of one value of its counter
# Taylor coefficients, lowest first; what is left out is below 2^-53 of the sum
_ATANH = [1 / (2 * term + 1) for term in range(12)]  # in s^2, where |s| < 0.172
_SINE, _COSINE = (  # in x^2, where |x| <= pi/4
    [(-1) ** term / math.factorial(2 * term + odd) for term in range(9)] for odd in (1, 0)
)
_ONE, _SIGN_BIT = np.uint64(1), np.uint64(63)
_LOG_2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476


def standard_normal(seed: int, sample: int, name: str, first: int, last: int) -> Array:
    """Return the numbers of elements ``[first, last)`` of a tensor, float64.

    Elements 2p and 2p + 1 are a Box-Muller pair (Box & Muller 1958) of the random words 2p and
    2p + 1 of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
    keyed by a hash of seed, sample and name; block b of four words is that of the counter b + 1.

    Args:
        seed: Of all samples.
        sample: Number of the sample.
        name: The tensor's name.
        first: Index of an element; the real and the imaginary part of a complex number are two.
        last: Index behind the last element.
    """
    what = f"{seed}/{sample}/{name}".encode("utf-8", "surrogatepass")
    key = int.from_bytes(hashlib.blake2b(what, digest_size=16).digest(), "little")
    block = first // _WORDS_A_BLOCK
    n_blocks = -(-last // _WORDS_A_BLOCK) - block
    words = np.random.Philox(key=key, counter=block).random_raw(n_blocks * _WORDS_A_BLOCK)
    # 53 bits of each; the first of a pair in (0, 1], the other in [0, 1)
    uniform = (words >> np.uint64(11)).astype(np.float64)
    uniform[0::2] += 1
    uniform *= 2.0**-53
    radius = np.sqrt(-2 * _log(uniform[0::2]))
    sine, cosine = _sine_and_cosine_of_turns(uniform[1::2])
    numbers = uniform
    np.multiply(radius, cosine, out=numbers[0::2])
    np.multiply(radius, sine, out=numbers[1::2])
    skipped = first - block * _WORDS_A_BLOCK
    return numbers[skipped : skipped + last - first]


def _log(values: Array) -> Array:
    """Return the natural logarithm of positive numbers: 2 atanh(s) + e log 2."""
    mantissa, exponent = np.frexp(values)
    is_small = mantissa < _SQRT_HALF
    mantissa *= 1.0 + is_small
    exponent -= is_small
    s = (mantissa - 1) / (mantissa + 1)
    total = _polynomial(_ATANH, s * s)
    total *= 2 * s
    total += exponent * _LOG_2
    return total


def _sine_and_cosine_of_turns(turns: Array) -> tuple[Array, Array]:
    """Return sin and cos of 2 pi times numbers between 0 and 1."""
    quarters = turns * 4
    nearest = np.rint(quarters)
    angle = (quarters - nearest) * (math.pi / 2)
    square = angle * angle
    sine, cosine = _polynomial(_SINE, square), _polynomial(_COSINE, square)
    sine *= angle
    quadrant = nearest.astype(np.uint64)
    is_odd = (quadrant & _ONE).astype(np.bool_)
    sine, cosine = np.where(is_odd, cosine, sine), np.where(is_odd, sine, cosine)
    # sin is negative in quadrants 2 and 3, cos in 1 and 2
    for values, half in ((sine, quadrant), (cosine, quadrant + _ONE)):
        bits = values.view(np.uint64)
        bits ^= (half >> _ONE) << _SIGN_BIT
    return sine, cosine


def _polynomial(coefficients: Sequence[float], values: Array) -> Array:
    """Return the polynomial with these coefficients, lowest first, by Horner's rule."""
    total = np.full_like(values, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total *= values
        total += coefficient
    return total
