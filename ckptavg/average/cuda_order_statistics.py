"""Medians and trimmed means in torch on a CUDA device; the same bits as ``OrderStatistics``."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ckptavg.average.floats import INFINITY_BITS
from ckptavg.average.sorting_network import sort_rows, stacks_of
from ckptavg.blocks import Chunk
from ckptavg.coefficients import CoefficientRow
from ckptavg.tensors import FLOAT64, DType

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}

GetArray = Callable[[str, torch.dtype, int], Tensor]  # role, dtype, number of elements -> array


class CudaOrderStatistics:
    """Keeps a chunk of every checkpoint, sorts it and takes the means of what rows keep.

    Use: ``start(chunk)``; ``add`` for each checkpoint, newest first, and ``mean`` for the rows that
    it returns. All work is queued on the current stream.
    """

    def __init__(
        self, rows: Sequence[CoefficientRow], get_array: GetArray, device: torch.device
    ) -> None:
        """Prepare for any number of chunks.

        Args:
            rows: The coefficients, one row an output; those without order statistic do not count.
            get_array: Where arrays come from.
            device: A CUDA device.
        """
        self._get_array = get_array
        self._device = device
        self._stacks = stacks_of(rows)
        self._stack_of_row = {
            row: number for number, stack in enumerate(self._stacks) for row in stack.kept
        }
        self._sorted: list[list[Tensor]] = [[] for _ in self._stacks]

    def __contains__(self, row: int) -> bool:
        """Tell whether a row takes an order statistic."""
        return row in self._stack_of_row

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk."""
        self._chunk = chunk

    def add(self, values: Tensor, index: int) -> list[int]:
        """Keep checkpoint number ``index``, given as elements on the device.

        Returns:
            The rows that can be computed now.
        """
        complete: list[int] = []
        for number, stack in enumerate(self._stacks):
            if index not in stack.members:
                continue
            keys = self._row(number, stack.members.index(index), values)
            turn_over(values.view(keys.dtype), keys)
            self._note_extremes(number, keys, starts=index == stack.members[-1])
            if index == stack.members[0]:
                rows = [self._row(number, member, values) for member in range(len(stack.members))]
                self._sorted[number] = sort_rows(
                    stack.comparators,
                    rows,
                    self._row(number, len(rows), values),
                    torch.minimum,
                    torch.maximum,
                )
                complete.extend(stack.kept)
        return complete

    def mean(self, row: int, divisor_of: Callable[[int], Tensor]) -> Tensor:
        """Return the mean of what a row keeps, float64, added up from the smallest on.

        Args:
            row: Which output.
            divisor_of: Returns a float64 number on the device.
        """
        number = self._stack_of_row[row]
        kept = self._stacks[number].kept[row]
        keys = [self._sorted[number][rank] for rank in kept]
        total = self._get_array("statistic", torch.float64, self._chunk.numel)
        total.copy_(self._decoded(keys[0]))  # not 0 + values: that would lose the sign of -0
        for one in keys[1:]:
            total.add_(self._decoded(one))
        if len(keys) > 1:
            torch.div(total, divisor_of(len(keys)), out=total)
            if self._chunk.dtype is FLOAT64:  # elsewhere the sum of equal values is exact
                torch.where(keys[0] == keys[-1], self._decoded(keys[0]), total, out=total)
        return total

    def tell_nonfinite(self, row: int, smallest: Tensor) -> None:
        """Make ``smallest`` NaN if a value among which a row chooses is not finite."""
        low, high = self._extremes(self._stack_of_row[row])
        infinity = INFINITY_BITS[self._chunk.dtype]
        smallest.masked_fill_((low <= ~infinity) | (high >= infinity), torch.nan)

    def _note_extremes(self, number: int, keys: Tensor, *, starts: bool) -> None:
        low, high = self._extremes(number)
        smallest, largest = torch.aminmax(keys)
        low.copy_(smallest if starts else torch.minimum(low, smallest))
        high.copy_(largest if starts else torch.maximum(high, largest))

    def _extremes(self, number: int) -> tuple[Tensor, Tensor]:
        dtype = INTEGER_OF_SIZE[self._chunk.dtype.itemsize]
        low, high = self._get_array(f"extremes{number}", dtype, 2)
        return low, high

    def _decoded(self, keys: Tensor) -> Tensor:
        """Return the values of some keys, valid until the next call."""
        bits = self._get_array("bits", keys.dtype, len(keys))
        turn_over(keys, bits)
        values: torch.dtype = getattr(torch, self._chunk.dtype.name)
        return bits.view(values)

    def _row(self, number: int, member: int, values: Tensor) -> Tensor:
        dtype = INTEGER_OF_SIZE[values.element_size()]
        return self._get_array(f"stack{number}.{member}", dtype, len(values))


def turn_over(bits: Tensor, out: Tensor) -> None:
    """Turn the bits of floats into keys, or keys into bits; see ``sorting_network``.

    Args:
        bits: Signed integers.
        out: The same; another tensor.
    """
    width = 8 * bits.element_size()
    torch.bitwise_right_shift(bits, width - 1, out=out)
    out.bitwise_and_((1 << (width - 1)) - 1)
    out.bitwise_xor_(bits)


def order_nbytes(chunk_nbytes: int, dtype: DType, rows: Sequence[CoefficientRow]) -> int:
    """Return the device memory that ``CudaOrderStatistics`` allocates for such chunks."""
    stacks = stacks_of(rows)
    if not stacks:
        return 0
    numel = chunk_nbytes // dtype.itemsize
    n_rows = sum(len(stack.members) + 1 for stack in stacks)
    per_element = (n_rows + 1) * dtype.itemsize + 8  # keys, bits, mean
    if dtype is FLOAT64:
        per_element += 1  # where the values kept are equal
    return numel * per_element
