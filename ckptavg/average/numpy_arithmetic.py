"""The arithmetic of averaging in numpy: what the CPU does, one instance a thread.

``CudaArithmetic`` does the same on a GPU; both give the same bits.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ckptavg.average.buffers import Buffers
from ckptavg.average.floats import (
    BITS,
    HIGH_HALF,
    INFINITY_BITS,
    NAN_FLOAT32_BITS,
    NUMPY_DTYPES,
    OVERFLOWS_BFLOAT16_BITS,
    SIXTEEN,
    Array,
    decode_float16_halves,
    round_to_bfloat16,
    round_to_odd,
)
from ckptavg.average.noisy_means import NoisyMeans, noisy_nbytes
from ckptavg.average.order_statistics import OrderStatistics, order_nbytes
from ckptavg.average.sums import (
    accumulate_dtype,
    keeps_equal_by_rounding,
    needs_products,
    running_sums,
    sum_of_row,
)
from ckptavg.blocks import Chunk
from ckptavg.coefficients import CoefficientRow
from ckptavg.tensors import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, DType

_TILE_NUMEL = 2**14  # of float64 values that are rounded to bfloat16 at once


class NumpyArithmetic:
    """Sums chunks of several checkpoints and rounds the results; owns all buffers it needs.

    Rows that take a statistic are computed by ``OrderStatistics`` and ``NoisyMeans``.

    Use: ``start(chunk)``; for each checkpoint, newest first, fill ``input`` and call ``add``, and
    ``finish`` the rows that it returns. Arrays are allocated once, at the size of the largest
    chunk.
    """

    def __init__(
        self, rows: Sequence[CoefficientRow], accumulate: str, max_chunk_nbytes: int
    ) -> None:
        """Prepare for any number of chunks.

        Args:
            rows: The coefficients, one row an output.
            accumulate: The recipe's choice: ``auto``, ``float32`` or ``float64``.
            max_chunk_nbytes: Input bytes of the largest chunk that will come.
        """
        self._rows = rows
        self._sums = running_sums(rows)
        self._sum_of_row = sum_of_row(self._sums)
        self._accumulate = accumulate
        self._buffers = Buffers(max_chunk_nbytes)
        self._widened: Array | None = None
        self._ordered = OrderStatistics(rows, self._buffers)
        self._noisy = NoisyMeans(rows, self._buffers)

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk: an action AVERAGE, a float dtype."""
        self._chunk = chunk
        self._sum_dtype = accumulate_dtype(chunk.dtype, self._accumulate)
        # 16-bit values are worked on in pairs: low halves first, then high halves
        self._pairs = (chunk.numel + 1) // 2 if chunk.dtype.bits == 16 else 0
        numel = 2 * self._pairs or chunk.numel
        nbytes = numel * chunk.dtype.itemsize
        self._buffers.start(nbytes)
        self._raw = self._buffers.array("input", np.uint8, nbytes)
        self._raw[chunk.nbytes :] = 0  # the missing partner of an odd last element
        self.input = self._raw.data[: chunk.nbytes]
        self._totals = [
            self._buffers.array(f"sum{number}", NUMPY_DTYPES[self._sum_dtype], numel)
            for number in range(len(self._sums))
        ]
        self._keep_equal = not keeps_equal_by_rounding(chunk.dtype, self._sum_dtype)
        self._ordered.start(chunk)
        self._noisy.start(chunk)

    def add(self, index: int) -> list[int]:
        """Add the content of ``input``, which is checkpoint number ``index``, to every sum.

        Returns:
            The rows whose total is complete now: finish them before the next call.
        """
        bits = self._raw.view(BITS[self._chunk.dtype])[: self._chunk.numel]
        complete = [*self._ordered.add(index, bits), *self._noisy.add(index, bits)]
        going = [number for number, one in enumerate(self._sums) if index in one.multipliers]
        if not going:
            return complete
        if self._keep_equal:
            for number in going:
                self._compare_with_first(number, starts=index == self._sums[number].newest)
        begun = (number for number in going if self._begins_as_decoded(number, index))
        straight = next(begun, None)
        for place, values in self._decoded(None if straight is None else self._totals[straight]):
            for number in going:
                if number == straight:
                    continue  # decoded where it belongs
                one, total = self._sums[number], self._totals[number]
                self._add_values(
                    total[place], values, one.multipliers[index], first=index == one.newest
                )
        for number in going:
            complete.extend(self._sums[number].complete.get(index, ()))
        return complete

    def finish(self, row: int) -> tuple[memoryview, bool]:
        """Divide, round once, and return the bytes of one output and whether all are finite.

        The bytes are valid until the next call.
        """
        if row in self._ordered:
            finite = self._ordered.is_finite(row)
            if self._chunk.dtype is self._chunk.output_dtype:
                value = self._ordered.one_value(row)
                if value is not None:
                    return value.view(np.uint8).data, finite
            output, fits = self._rounded(self._ordered.mean(row), pairs=0)
            return output, finite and fits
        if row in self._noisy:
            return self._rounded(self._noisy.value(row), pairs=0)
        number, divisor = self._sum_of_row[row], self._rows[row].divisor
        total = self._totals[number]
        goes_on = self._sums[number].goes_on
        quotient = self._buffers.array("product", total.dtype, len(total)) if goes_on else total
        if divisor != 1 or goes_on:
            np.divide(total, total.dtype.type(divisor), out=quotient)
        if self._keep_equal:
            self._restore_equal(number, quotient)
        return self._rounded(quotient, self._pairs)

    # -- inputs

    def _begins_as_decoded(self, number: int, index: int) -> bool:
        """Tell whether 16-bit values, decoded, are what a sum begins with."""
        one = self._sums[number]
        is_plain = one.multipliers[index] == 1 and self._sum_dtype is FLOAT32
        return self._pairs > 0 and index == one.newest and is_plain

    def _decoded(self, into: Array | None) -> Iterator[tuple[slice, Array]]:
        """Yield the input as float arrays, each with its place in the sums.

        16-bit inputs are decoded into the sum ``into`` if it is given. The input is used up.
        """
        if not self._pairs:
            yield slice(None), self._raw.view(NUMPY_DTYPES[self._chunk.dtype])
            return
        words = self._raw.view(np.uint32)
        buffer = self._buffers.array("decoded", np.uint32, self._pairs)
        finite = self._chunk.dtype is BFLOAT16 or (
            self._largest_magnitude(self._raw.view(np.uint16)) < INFINITY_BITS[FLOAT16]
        )
        for place, shift in ((slice(0, self._pairs), SIXTEEN), (slice(self._pairs, None), None)):
            halves = buffer if into is None else into[place].view(np.uint32)
            if not finite:  # the slow way, which knows infinity and NaN
                start = 0 if shift else 1
                np.copyto(halves.view(np.float32), self._raw.view(np.float16)[start::2])
            elif self._chunk.dtype is FLOAT16:
                decode_float16_halves(words, shift, halves)
            elif shift:
                np.left_shift(words, shift, out=halves)
            else:
                halves = words if into is None else halves  # half the memory to touch
                np.bitwise_and(words, HIGH_HALF, out=halves)
            yield place, halves.view(np.float32)

    def _add_values(self, total: Array, values: Array, multiplier: float, *, first: bool) -> None:
        if multiplier != 1:
            target = total if first else self._buffers.array("product", total.dtype, len(total))
            np.multiply(
                values, total.dtype.type(multiplier), out=target, dtype=total.dtype, casting="safe"
            )
            values = target
        if first:
            if multiplier == 1:
                np.copyto(total, values)  # not 0 + values: that would lose the sign of -0
        else:
            np.add(total, values, out=total)

    def _compare_with_first(self, number: int, *, starts: bool) -> None:
        bits = self._raw.view(BITS[self._chunk.dtype])
        first = self._buffers.array(f"first{number}", bits.dtype, len(bits))
        equal = self._buffers.array(f"equal{number}", np.bool_, len(bits))
        if starts:
            np.copyto(first, bits)
            equal[:] = True
            return
        same = self._buffers.array("same", np.bool_, len(bits))
        np.equal(first, bits, out=same)
        np.logical_and(equal, same, out=equal)

    def _restore_equal(self, number: int, quotient: Array) -> None:
        numel = len(quotient)
        first = self._buffers.array(f"first{number}", NUMPY_DTYPES[self._chunk.dtype], numel)
        equal = self._buffers.array(f"equal{number}", np.bool_, numel)
        np.copyto(quotient, first, where=equal)

    # -- outputs

    def _rounded(self, values: Array, pairs: int) -> tuple[memoryview, bool]:
        """Round once to the output dtype; return the bytes and whether all are finite.

        Args:
            values: The results, which are used up.
            pairs: If not 0: their even elements come first, so many, then the odd ones.
        """
        output_dtype, numel = self._chunk.output_dtype, self._chunk.numel
        bits = self._buffers.array("output", BITS[output_dtype], len(values))
        if output_dtype is BFLOAT16:
            finite = self._encode_bfloat16(values, bits, pairs)
        else:
            rounded = bits.view(NUMPY_DTYPES[output_dtype])
            if pairs:
                np.copyto(rounded[0::2], values[:pairs], casting="same_kind")
                np.copyto(rounded[1::2], values[pairs:], casting="same_kind")
            else:
                np.copyto(rounded, values, casting="same_kind")
            finite = self._largest_magnitude(bits[:numel]) < INFINITY_BITS[output_dtype]
        return bits[:numel].view(np.uint8).data, finite

    def _encode_bfloat16(self, total: Array, bits: Array, pairs: int) -> bool:
        """Round to bfloat16; return whether all results are finite."""
        words = self._float32_bits(total)
        # a NaN that comes from bfloat16 has no low bits that rounding could carry into its sign
        is_plain = self._chunk.dtype is BFLOAT16 and total.dtype == np.float32
        finite = is_plain or self._largest_magnitude(words) < OVERFLOWS_BFLOAT16_BITS
        if not finite:
            words[(words & np.uint32(0x7FFFFFFF)) > INFINITY_BITS[FLOAT32]] = NAN_FLOAT32_BITS
        round_to_bfloat16(words, self._buffers.array("carry", words.dtype, len(words)))
        if pairs:
            low, high = words[:pairs], words[pairs:]
            np.right_shift(low, SIXTEEN, out=low)
            np.bitwise_and(high, HIGH_HALF, out=high)
            np.bitwise_or(low, high, out=bits.view(np.uint32))
        else:
            np.right_shift(words, SIXTEEN, out=words)
            np.copyto(bits, words, casting="unsafe")
        if is_plain:  # half as much to look at
            finite = self._largest_magnitude(bits) < INFINITY_BITS[BFLOAT16]
        return finite

    def _float32_bits(self, total: Array) -> Array:
        """Return float32 bits to round further; float64 is rounded to odd, so that once is once."""
        if total.dtype == np.float32:
            return total.view(np.uint32)
        narrow = self._buffers.array("narrow", np.float32, len(total))
        if self._widened is None:
            self._widened = np.empty(_TILE_NUMEL, np.float64)
        for first in range(0, len(total), _TILE_NUMEL):  # it takes temporaries
            values = total[first : first + _TILE_NUMEL]
            place = slice(first, first + len(values))
            round_to_odd(values, narrow[place], self._widened[: len(values)])
        return narrow.view(np.uint32)

    def _largest_magnitude(self, bits: Array) -> int:
        magnitude = self._buffers.array("magnitude", bits.dtype, len(bits))
        without_sign = (1 << (8 * bits.itemsize - 1)) - 1
        np.bitwise_and(bits, bits.dtype.type(without_sign), out=magnitude)
        return int(magnitude.max())


def workspace_nbytes(
    chunk_nbytes: int,
    dtype: DType,
    output_dtype: DType,
    accumulate: str,
    rows: Sequence[CoefficientRow],
) -> int:
    """Return the bytes that one ``NumpyArithmetic`` allocates for such chunks."""
    total, sums = accumulate_dtype(dtype, accumulate), running_sums(rows)
    n_sums = len(sums)
    numel = chunk_nbytes // dtype.itemsize + 2
    per_element = dtype.itemsize + n_sums * total.itemsize + output_dtype.itemsize
    if needs_products(sums) or any(one.goes_on for one in sums):
        per_element += total.itemsize
    has_statistics = len(rows) > sum(row.statistic is None for row in rows)
    per_element += 8 if has_statistics else 0
    is_float64 = has_statistics or total is FLOAT64  # at least some of what is rounded
    is_plain = output_dtype is not BFLOAT16 or (dtype is BFLOAT16 and not is_float64)
    magnitudes = [output_dtype.itemsize if is_plain else 4]
    if dtype.bits == 16:
        per_element += 2  # decoded: a 32-bit word for one half of the elements
        if dtype is FLOAT16:
            magnitudes.append(2)
    per_element += max(magnitudes)
    per_element += 4 if output_dtype is BFLOAT16 else 0  # carry
    rounding = 0
    if is_float64 and output_dtype is BFLOAT16:
        per_element += 4  # narrow
        rounding = _TILE_NUMEL * (8 + 2 + 16)  # rounding to odd, with its temporaries
    if not keeps_equal_by_rounding(dtype, total):
        per_element += n_sums * (dtype.itemsize + 1) + 1  # first, equal, same
    statistics = order_nbytes(chunk_nbytes, dtype, rows) + noisy_nbytes(chunk_nbytes, dtype, rows)
    return numel * per_element + rounding + statistics
