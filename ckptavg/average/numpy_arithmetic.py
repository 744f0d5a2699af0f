"""The arithmetic of averaging in numpy: what the CPU does, one instance a thread.

``CudaArithmetic`` does the same on a GPU; both give the same bits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ckptavg.average.floats import (
    BITS,
    HIGH_HALF,
    INFINITY_BITS,
    NAN_FLOAT32_BITS,
    NUMPY_DTYPES,
    OVERFLOWS_BFLOAT16_BITS,
    SIXTEEN,
    Array,
    round_to_bfloat16,
    round_to_odd,
)
from ckptavg.average.sums import accumulate_dtype, keeps_equal_by_rounding
from ckptavg.plan import Chunk
from ckptavg.recipe import CoefficientRow
from ckptavg.tensors import BFLOAT16, FLOAT32, FLOAT64, DType


class NumpyArithmetic:
    """Sums chunks of several checkpoints and rounds the results; owns all buffers it needs.

    Use: ``start(chunk)``; for each checkpoint fill ``input`` and call ``add``; then ``finish`` for
    each row. Arrays are allocated once, at the size of the largest chunk.
    """

    def __init__(self, rows: Sequence[CoefficientRow], accumulate: str) -> None:
        """Prepare for any number of chunks.

        Args:
            rows: The coefficients, one row an output.
            accumulate: The recipe's choice: ``auto``, ``float32`` or ``float64``.
        """
        self._rows = rows
        self._accumulate = accumulate
        self._arrays: dict[str, Array] = {}

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk: an action AVERAGE, a float dtype."""
        self._chunk = chunk
        self._sum_dtype = accumulate_dtype(chunk.dtype, self._accumulate)
        # bfloat16 is worked on in pairs: low halves first, then high halves
        self._pairs = (chunk.numel + 1) // 2 if chunk.dtype is BFLOAT16 else 0
        numel = 2 * self._pairs or chunk.numel
        itemsize = chunk.dtype.itemsize
        self._raw = self._array("input", np.dtype(np.uint8), numel * itemsize)
        self._raw[chunk.nbytes :] = 0  # the missing partner of an odd last element
        self.input = self._raw.data[: chunk.nbytes]
        self._sums = [
            self._array(f"sum{index}", np.dtype(NUMPY_DTYPES[self._sum_dtype]), numel)
            for index in range(len(self._rows))
        ]
        self._started = [False] * len(self._rows)
        self._keep_equal = not keeps_equal_by_rounding(chunk.dtype, self._sum_dtype)
        self._n_added = 0

    def add(self, index: int) -> None:
        """Add the content of ``input``, which is checkpoint number ``index``, to every row."""
        if self._keep_equal:
            self._compare_with_first()
        for place, values in self._decoded():
            for row, (coefficients, total) in enumerate(zip(self._rows, self._sums, strict=True)):
                multiplier = coefficients.multipliers[index]
                if multiplier != 0:
                    self._add_values(total[place], values, multiplier, first=not self._started[row])
        for row, coefficients in enumerate(self._rows):
            self._started[row] |= coefficients.multipliers[index] != 0
        self._n_added += 1

    def finish(self, row: int) -> tuple[memoryview, bool]:
        """Divide, round once, and return the bytes of one output and whether all are finite.

        The bytes are valid until the next call.
        """
        total, divisor = self._sums[row], self._rows[row].divisor
        if divisor != 1:
            np.divide(total, total.dtype.type(divisor), out=total)
        if self._keep_equal:
            self._restore_equal(total)
        output_dtype, numel = self._chunk.output_dtype, self._chunk.numel
        bits = self._array("output", np.dtype(BITS[output_dtype]), len(total))
        if output_dtype is BFLOAT16:
            finite = self._encode_bfloat16(total, bits)
        else:
            if self._pairs:
                total = self._interleave(total)
            np.copyto(bits.view(NUMPY_DTYPES[output_dtype]), total, casting="same_kind")
            finite = self._largest_magnitude(bits[:numel]) < INFINITY_BITS[output_dtype]
        return bits[:numel].view(np.uint8).data, finite

    # -- inputs

    def _decoded(self) -> Iterator[tuple[slice, Array]]:
        """Yield the input as float arrays, each with its place in the sums."""
        if not self._pairs:
            values = self._raw.view(NUMPY_DTYPES[self._chunk.dtype])
            yield slice(None), values
            return
        words = self._raw.view(np.uint32)
        halves = self._array("decoded", np.dtype(np.uint32), self._pairs)
        np.left_shift(words, SIXTEEN, out=halves)
        yield slice(0, self._pairs), halves.view(np.float32)
        np.bitwise_and(words, HIGH_HALF, out=halves)
        yield slice(self._pairs, None), halves.view(np.float32)

    def _add_values(self, total: Array, values: Array, multiplier: float, *, first: bool) -> None:
        if multiplier != 1:
            target = total if first else self._array("product", total.dtype, len(total))
            np.multiply(
                values, total.dtype.type(multiplier), out=target, dtype=total.dtype, casting="safe"
            )
            values = target
        if first:
            if multiplier == 1:
                np.copyto(total, values)  # not 0 + values: that would lose the sign of -0
        else:
            np.add(total, values, out=total)

    def _compare_with_first(self) -> None:
        bits = self._raw.view(BITS[self._chunk.dtype])
        first = self._array("first", bits.dtype, len(bits))
        equal = self._array("equal", np.dtype(np.bool_), len(bits))
        if self._n_added == 0:
            np.copyto(first, bits)
            equal[:] = True
            return
        same = self._array("same", np.dtype(np.bool_), len(bits))
        np.equal(first, bits, out=same)
        np.logical_and(equal, same, out=equal)

    def _restore_equal(self, total: Array) -> None:
        numel = len(total)
        first = self._arrays["first"].view(NUMPY_DTYPES[self._chunk.dtype])[:numel]
        np.copyto(total, first, where=self._arrays["equal"].view(np.bool_)[:numel])

    # -- outputs

    def _interleave(self, total: Array) -> Array:
        whole = self._array("interleaved", total.dtype, len(total))
        whole[0::2] = total[: self._pairs]
        whole[1::2] = total[self._pairs :]
        return whole

    def _encode_bfloat16(self, total: Array, bits: Array) -> bool:
        """Round to bfloat16; return whether all results are finite."""
        words = self._float32_bits(total)
        finite = self._largest_magnitude(words) < OVERFLOWS_BFLOAT16_BITS
        if not finite:  # rounding must not carry a NaN's payload into its sign
            words[(words & np.uint32(0x7FFFFFFF)) > INFINITY_BITS[FLOAT32]] = NAN_FLOAT32_BITS
        round_to_bfloat16(words, self._array("carry", words.dtype, len(words)))
        if self._pairs:
            low, high = words[: self._pairs], words[self._pairs :]
            np.right_shift(low, SIXTEEN, out=low)
            np.bitwise_and(high, HIGH_HALF, out=high)
            np.bitwise_or(low, high, out=bits.view(np.uint32))
        else:
            np.right_shift(words, SIXTEEN, out=words)
            np.copyto(bits, words, casting="unsafe")
        return finite

    def _float32_bits(self, total: Array) -> Array:
        """Return float32 bits to round further; float64 is rounded to odd, so that once is once."""
        if total.dtype == np.float32:
            return total.view(np.uint32)
        return round_to_odd(
            total,
            self._array("narrow", np.dtype(np.float32), len(total)),
            self._array("widened", np.dtype(np.float64), len(total)),
        ).view(np.uint32)

    def _largest_magnitude(self, bits: Array) -> int:
        magnitude = self._array("magnitude", bits.dtype, len(bits))
        without_sign = (1 << (8 * bits.itemsize - 1)) - 1
        np.bitwise_and(bits, bits.dtype.type(without_sign), out=magnitude)
        return int(magnitude.max())

    def _array(self, role: str, dtype: np.dtype[Any], numel: int) -> Array:
        """Return a view of the buffer for one role, allocated when it is first needed or grows."""
        nbytes = numel * dtype.itemsize
        array = self._arrays.get(role)
        if array is None or array.nbytes < nbytes:
            array = self._arrays[role] = np.empty(-(-nbytes // 8), np.uint64).view(np.uint8)
        return array[:nbytes].view(dtype)


def workspace_nbytes(
    chunk_nbytes: int, dtype: DType, output_dtype: DType, accumulate: str, n_rows: int
) -> int:
    """Return an upper bound for the bytes one ``NumpyArithmetic`` allocates for such chunks."""
    total = accumulate_dtype(dtype, accumulate)
    numel = chunk_nbytes // dtype.itemsize + 2
    per_element = dtype.itemsize + n_rows * total.itemsize  # input, sums
    per_element += output_dtype.itemsize + max(output_dtype.itemsize, 4)  # output, magnitude
    per_element += total.itemsize  # products
    per_element += 4 if dtype is BFLOAT16 else 0  # decoded
    per_element += 4 if output_dtype is BFLOAT16 else 0  # carry
    if dtype is BFLOAT16 and output_dtype is not BFLOAT16:
        per_element += total.itemsize  # interleaved
    if total is FLOAT64 and output_dtype is BFLOAT16:
        per_element += 4 + 8 + 2 + 16  # rounding to odd, with its temporaries
    if not keeps_equal_by_rounding(dtype, total):
        per_element += dtype.itemsize + 2  # first, equal, same
    return numel * per_element
