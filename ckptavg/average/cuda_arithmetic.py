"""The arithmetic of averaging in torch on a CUDA device; the same bits as ``NumpyArithmetic``.

Every operation is one that rounds as IEEE 754 says. Two are chosen with care: the divisor is a
tensor on the device, because torch multiplies by the reciprocal of a number; and products are
rounded before they are added, because a fused multiply-add would round once less.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ckptavg.average.cuda_order_statistics import (
    INTEGER_OF_SIZE,
    CudaOrderStatistics,
    order_nbytes,
)
from ckptavg.average.sums import (
    accumulate_dtype,
    keeps_equal_by_rounding,
    needs_products,
    running_sums,
    sum_of_row,
)
from ckptavg.blocks import Chunk
from ckptavg.coefficients import CoefficientRow
from ckptavg.tensors import DType


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype object."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found


class CudaArithmetic:
    """Sums chunks of several checkpoints on a device and rounds the results.

    Use: ``start(chunk)``; ``add`` for each checkpoint, newest first, and ``finish`` for the rows
    that it returns. All work is queued on the current stream.
    """

    def __init__(
        self, rows: Sequence[CoefficientRow], accumulate: str, device: torch.device
    ) -> None:
        """Prepare for any number of chunks.

        Args:
            rows: The coefficients, one row an output.
            accumulate: The recipe's choice: ``auto``, ``float32`` or ``float64``.
            device: A CUDA device.
        """
        self._rows = rows
        self._sums = running_sums(rows)
        self._sum_of_row = sum_of_row(self._sums)
        self._accumulate = accumulate
        self._device = device
        self._arrays: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, int], Tensor] = {}
        self._divisors: dict[tuple[int, torch.dtype], Tensor] = {}
        self._ordered = CudaOrderStatistics(rows, self._array, device)

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk: an action AVERAGE, a float dtype."""
        self._chunk = chunk
        self._dtype = torch_dtype(chunk.dtype)
        sum_dtype = accumulate_dtype(chunk.dtype, self._accumulate)
        self._sum_dtype = torch_dtype(sum_dtype)
        self._totals = [
            self._array(f"sum{number}", self._sum_dtype, chunk.numel)
            for number in range(len(self._sums))
        ]
        self._keep_equal = not keeps_equal_by_rounding(chunk.dtype, sum_dtype)
        self._ordered.start(chunk)

    def add(self, values: Tensor, index: int) -> list[int]:
        """Add checkpoint number ``index``, given as elements on the device, to every sum.

        Returns:
            The rows whose total is complete now: finish them before the next call.
        """
        complete = self._ordered.add(values, index)
        for number, one in enumerate(self._sums):
            multiplier = one.multipliers.get(index)
            if multiplier is None:
                continue
            first = index == one.newest
            if self._keep_equal:
                self._compare_with_first(number, values, starts=first)
            total = self._totals[number]
            if multiplier != 1:
                product = total if first else self._array("product", total.dtype, len(total))
                product.copy_(values)
                product.mul_(multiplier)
                if not first:
                    total.add_(product)
            elif first:
                total.copy_(values)
            else:
                total.add_(values)
            complete.extend(one.complete.get(index, ()))
        return complete

    def finish(self, row: int, output: Tensor, smallest: Tensor, largest: Tensor) -> None:
        """Divide, round once into ``output``, and tell whether all of it is finite.

        Args:
            row: Which output.
            output: For the elements, in the output dtype, on the device.
            smallest: For their minimum, without dimensions; NaN if one of them is, or if an order
                statistic left out what is not finite.
            largest: For their maximum, likewise.
        """
        if row in self._ordered:
            mean = self._ordered.mean(row, lambda value: self._divisor(value, torch.float64))
            rounds_twice = needs_odd_rounding(mean.dtype, output.dtype)
            output.copy_(_round_to_odd(mean) if rounds_twice else mean)
            torch.aminmax(output, out=(smallest, largest))
            self._ordered.tell_nonfinite(row, smallest)
            return
        number = self._sum_of_row[row]
        divisor = self._divisor(self._rows[row].divisor, self._sum_dtype)
        total = self._totals[number]
        rounds_twice = needs_odd_rounding(self._sum_dtype, output.dtype)
        if self._keep_equal or rounds_twice:
            quotient = self._array("product", total.dtype, len(total))
            torch.div(total, divisor, out=quotient)
            if self._keep_equal:
                first = self._array(f"first{number}", self._dtype, len(total))
                equal = self._array(f"equal{number}", torch.bool, len(total))
                torch.where(equal, first.to(total.dtype), quotient, out=quotient)
            output.copy_(_round_to_odd(quotient) if rounds_twice else quotient)
        else:  # one kernel divides and rounds
            torch.div(total, divisor, out=output)
        torch.aminmax(output, out=(smallest, largest))

    def _compare_with_first(self, number: int, values: Tensor, *, starts: bool) -> None:
        bits_dtype = INTEGER_OF_SIZE[values.element_size()]
        bits = values.view(bits_dtype)
        first = self._array(f"first{number}", self._dtype, len(values)).view(bits_dtype)
        equal = self._array(f"equal{number}", torch.bool, len(values))
        if starts:
            first.copy_(bits)
            equal.fill_(True)
        else:
            equal.logical_and_(first == bits)

    def _divisor(self, value: int, dtype: torch.dtype) -> Tensor:
        key = (value, dtype)
        if key not in self._divisors:
            self._divisors[key] = torch.tensor(value, dtype=dtype, device=self._device)
        return self._divisors[key]

    def _array(self, role: str, dtype: torch.dtype, numel: int) -> Tensor:
        """Return a view of the buffer for one role, allocated when it is first needed or grows."""
        key = role, dtype, numel
        if key not in self._views:  # made once: each costs as much as starting a kernel
            nbytes = numel * dtype.itemsize
            array = self._arrays.get(role)
            if array is None or array.nbytes < nbytes:
                array = torch.empty(-(-nbytes // 8) * 8, dtype=torch.uint8, device=self._device)
                self._arrays[role] = array
                self._views.clear()  # of the smaller one, too
            self._views[key] = array[:nbytes].view(dtype)
        return self._views[key]


def _round_to_odd(values: Tensor) -> Tensor:
    """Round float64 to float32 so that rounding again is rounding once; see ``floats.py``."""
    narrow = values.to(torch.float32)
    widened = narrow.to(torch.float64)
    inexact = widened != values
    away = widened.abs() > values.abs()
    bits = narrow.view(torch.int32)
    bits.sub_(away.to(torch.int32))
    bits.bitwise_or_(inexact.to(torch.int32))
    return narrow


def needs_odd_rounding(total: torch.dtype, output: torch.dtype) -> bool:
    """Tell whether torch would round a total twice on its way to the output: through float32."""
    return total is torch.float64 and output in (torch.bfloat16, torch.float16)


def workspace_nbytes(
    chunk_nbytes: int,
    dtype: DType,
    output_dtype: DType,
    accumulate: str,
    rows: Sequence[CoefficientRow],
) -> int:
    """Return the device memory that one ``CudaArithmetic`` allocates for such chunks."""
    total, sums = accumulate_dtype(dtype, accumulate), running_sums(rows)
    numel = chunk_nbytes // dtype.itemsize
    rounds_twice = needs_odd_rounding(torch_dtype(total), torch_dtype(output_dtype))
    keeps_equal = not keeps_equal_by_rounding(dtype, total)
    statistics = order_nbytes(chunk_nbytes, dtype, rows)
    per_element = len(sums) * total.itemsize
    if rounds_twice or keeps_equal or needs_products(sums):
        per_element += total.itemsize  # products, quotients
    if rounds_twice or (statistics and output_dtype.bits == 16):
        per_element += 4 + 8 + 16 + 8 + 2  # with its temporaries
    if keeps_equal:
        per_element += len(sums) * (dtype.itemsize + 1)  # first, equal
        per_element += total.itemsize + 1  # first again, as a sum; equal so far
    return numel * per_element + statistics
