"""Medians and trimmed means in numpy: a chunk of every checkpoint, sorted coordinate by coordinate.

``CudaOrderStatistics`` does the same on a GPU; both give the same bits.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ckptavg.average.buffers import Buffers
from ckptavg.average.floats import (
    INFINITY_BITS,
    NUMPY_DTYPES,
    Array,
    decode_to_float64,
    encode_from_float64,
    widen_16_bit,
)
from ckptavg.average.sorting_network import sort_rows, stacks_of
from ckptavg.blocks import Chunk
from ckptavg.coefficients import CoefficientRow
from ckptavg.tensors import FLOAT16, FLOAT64, DType

_VIEW_NBYTES = 160  # of a tile of one checkpoint, as an object
_TILE_NBYTES = 128 * 1024  # of each checkpoint: twenty of them stay in the caches while sorted


class OrderStatistics:
    """Keeps a chunk of every checkpoint, sorts it and takes the means of what rows keep.

    Use: ``start(chunk)``; ``add`` for each checkpoint, newest first, and for the rows that it
    returns ``is_finite`` and ``one_value`` or ``mean``.
    """

    def __init__(self, rows: Sequence[CoefficientRow], buffers: Buffers) -> None:
        """Prepare for any number of chunks.

        Args:
            rows: The coefficients, one row an output; those without order statistic do not count.
            buffers: Where arrays come from.
        """
        self._buffers = buffers
        self._stacks = stacks_of(rows)
        self._stack_of_row = {
            row: number for number, stack in enumerate(self._stacks) for row in stack.kept
        }
        self._finite = [True for _ in self._stacks]
        self._tiles: list[list[tuple[slice, list[Array]]]] = [[] for _ in self._stacks]
        if self._stacks:
            self._tile = np.empty(_TILE_NBYTES, np.uint8)
            self._words = np.empty(_TILE_NBYTES // 2, np.uint32)

    def __contains__(self, row: int) -> bool:
        """Tell whether a row takes an order statistic."""
        return row in self._stack_of_row

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk."""
        self._chunk = chunk
        self._keys = _KEYS[chunk.dtype.itemsize]

    def add(self, index: int, bits: Array) -> list[int]:
        """Keep the elements of checkpoint number ``index``, given as their bits.

        Returns:
            The rows that can be computed now.
        """
        complete: list[int] = []
        for number, stack in enumerate(self._stacks):
            if index not in stack.members:
                continue
            keys = self._row(number, stack.members.index(index))
            turn_over(bits.view(self._keys), keys)
            infinity = INFINITY_BITS[self._chunk.dtype]
            finite = keys.max() < infinity and keys.min() > ~infinity
            starts = index == stack.members[-1]
            self._finite[number] = bool(finite) and (starts or self._finite[number])
            if index == stack.members[0]:
                self._sort(number)
                complete.extend(stack.kept)
        return complete

    def is_finite(self, row: int) -> bool:
        """Tell whether all values among which a row chooses are finite."""
        return self._finite[self._stack_of_row[row]]

    def one_value(self, row: int) -> Array | None:
        """Return the bits of a row that keeps one value of each coordinate; None if it has more."""
        number = self._stack_of_row[row]
        kept = self._stacks[number].kept[row]
        if len(kept) > 1:
            return None
        bits = self._buffers.array("output", self._keys, self._chunk.numel)
        for place, sorted_rows in self._tiles[number]:
            turn_over(sorted_rows[kept[0]], bits[place])
        return bits

    def mean(self, row: int) -> Array:
        """Return the mean of what a row keeps, float64, added up from the smallest on."""
        number = self._stack_of_row[row]
        kept = self._stacks[number].kept[row]
        total = self._buffers.array("statistic", np.float64, self._chunk.numel)
        for place, sorted_rows in self._tiles[number]:
            part = total[place]
            for rank in kept:
                values = self._decoded(sorted_rows[rank])
                if rank == kept[0]:
                    np.copyto(part, values)  # not 0 + values: that would lose the sign of -0
                else:
                    np.add(part, values, out=part)
            if len(kept) > 1:
                np.divide(part, np.float64(len(kept)), out=part)
            if self._chunk.dtype is FLOAT64:  # elsewhere the sum of equal values is exact
                smallest, largest = sorted_rows[kept[0]], sorted_rows[kept[-1]]
                np.copyto(part, self._decoded(smallest), where=smallest == largest)
        return total

    def _row(self, number: int, member: int) -> Array:
        return self._buffers.array(f"stack{number}.{member}", self._keys, self._chunk.numel)

    def _sort(self, number: int) -> None:
        stack = self._stacks[number]
        rows = [self._row(number, member) for member in range(len(stack.members))]
        spare = self._row(number, len(rows))
        self._tiles[number] = [
            (
                place,
                sort_rows(
                    stack.comparators,
                    [row[place] for row in rows],
                    spare[place],
                    np.minimum,
                    np.maximum,
                ),
            )
            for place in self._places()
        ]

    def _places(self) -> Iterator[slice]:
        step = _TILE_NBYTES // self._chunk.dtype.itemsize
        for first in range(0, self._chunk.numel, step):
            yield slice(first, min(first + step, self._chunk.numel))

    def _decoded(self, keys: Array) -> Array:
        """Return the values of some keys, valid until the next call; float16 must be finite."""
        bits = self._tile[: keys.nbytes].view(keys.dtype)
        turn_over(keys, bits)
        dtype = self._chunk.dtype
        if dtype.bits == 16:
            return widen_16_bit(bits.view(np.uint16), self._words[: len(keys)], dtype is FLOAT16)
        return bits.view(NUMPY_DTYPES[dtype])


_KEYS = {2: np.int16, 4: np.int32, 8: np.int64}


def turn_over(bits: Array, out: Array) -> None:
    """Turn the bits of floats into keys, or keys into bits; see ``sorting_network``.

    Args:
        bits: Signed integers.
        out: The same; another array.
    """
    width = 8 * bits.itemsize
    np.right_shift(bits, bits.dtype.type(width - 1), out=out)
    np.bitwise_and(out, bits.dtype.type((1 << (width - 1)) - 1), out=out)
    np.bitwise_xor(out, bits, out=out)


def order_statistic(bits: Array, n_cut: int, dtype: DType, output_dtype: DType) -> Array:
    """Return the mean without the smallest and the largest values, also of infinities and NaN.

    Infinities have their place in the order; where any value is NaN the result is.

    Args:
        bits: (checkpoints, elements), unsigned, of ``dtype``.
        n_cut: How many values are left out at each end.
        dtype: What the bits mean.
        output_dtype: What the result is rounded to, once.

    Returns:
        The bits of ``output_dtype``.
    """
    keys = np.empty(bits.shape, _KEYS[bits.itemsize])
    turn_over(bits.view(keys.dtype), keys)
    keys.sort(axis=0)
    turn_over(keys.copy(), keys)
    kept = keys[n_cut : len(keys) - n_cut].view(bits.dtype)
    values = np.stack([decode_to_float64(row, dtype) for row in kept])
    mean, divided_first = np.zeros((2, values.shape[1]))
    for row in values:
        mean += row
        divided_first += row / len(values)
    mean /= len(values)
    overflowed = ~np.isfinite(mean)  # the sum of float64 values may, though their mean fits
    mean[overflowed] = divided_first[overflowed]
    same = kept[0] == kept[-1]
    mean[same] = values[0][same]
    magnitudes = bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    has_nan = (magnitudes > INFINITY_BITS[dtype]).any(axis=0)
    mean[has_nan] = np.nan
    return encode_from_float64(mean, output_dtype)


def order_nbytes(chunk_nbytes: int, dtype: DType, rows: Sequence[CoefficientRow]) -> int:
    """Return the bytes that ``OrderStatistics`` allocates for such chunks, but for its results."""
    stacks = stacks_of(rows)
    if not stacks:
        return 0
    numel = chunk_nbytes // dtype.itemsize + 2
    n_rows = sum(len(stack.members) + 1 for stack in stacks)
    n_tiles = chunk_nbytes // _TILE_NBYTES + 1
    return n_rows * (numel * dtype.itemsize + n_tiles * _VIEW_NBYTES) + 3 * _TILE_NBYTES
