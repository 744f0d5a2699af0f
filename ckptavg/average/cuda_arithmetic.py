"""The arithmetic of averaging in torch on a CUDA device; the same bits as ``NumpyArithmetic``.

Every operation is one that rounds as IEEE 754 says. Two are chosen with care: the divisor is a
tensor on the device, because torch multiplies by the reciprocal of a number; and products are
rounded before they are added, because a fused multiply-add would round once less.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ckptavg.average.sums import accumulate_dtype, keeps_equal_by_rounding
from ckptavg.plan import Chunk
from ckptavg.recipe import CoefficientRow
from ckptavg.tensors import BFLOAT16, FLOAT16, FLOAT64, DType

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype object."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found


class CudaArithmetic:
    """Sums chunks of several checkpoints on a device and rounds the results.

    Use: ``start(chunk)``; ``add`` for each checkpoint; ``finish`` for each row. All work is queued
    on the current stream.
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
        self._accumulate = accumulate
        self._device = device
        self._arrays: dict[str, Tensor] = {}
        self._divisors: dict[tuple[int, torch.dtype], Tensor] = {}

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk: an action AVERAGE, a float dtype."""
        self._chunk = chunk
        self._dtype = torch_dtype(chunk.dtype)
        sum_dtype = accumulate_dtype(chunk.dtype, self._accumulate)
        self._sum_dtype = torch_dtype(sum_dtype)
        self._sums = [
            self._array(f"sum{row}", self._sum_dtype, chunk.numel) for row in range(len(self._rows))
        ]
        self._started = [False] * len(self._rows)
        self._keep_equal = not keeps_equal_by_rounding(chunk.dtype, sum_dtype)
        self._n_added = 0

    def add(self, raw: Tensor, index: int) -> None:
        """Add checkpoint number ``index``, given as bytes (uint8 on the device), to every row."""
        values = raw.view(self._dtype)
        if self._keep_equal:
            self._compare_with_first(values)
        for row, coefficients in enumerate(self._rows):
            multiplier = coefficients.multipliers[index]
            if multiplier == 0:
                continue
            total, first = self._sums[row], not self._started[row]
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
            self._started[row] = True
        self._n_added += 1

    def finish(self, row: int, output: Tensor) -> Tensor:
        """Divide, round once into ``output``, and return whether all of it is finite.

        Args:
            row: Which output.
            output: Bytes for it, uint8 on the device.

        Returns:
            A bool tensor without dimensions, on the device.
        """
        total, divisor = self._sums[row], self._rows[row].divisor
        if divisor != 1:
            total.div_(self._divisor(divisor))
        if self._keep_equal:
            first = self._array("first", self._dtype, len(total))
            equal = self._array("equal", torch.bool, len(total))
            torch.where(equal, first.to(total.dtype), total, out=total)
        rounded = output.view(torch_dtype(self._chunk.output_dtype))
        if total.dtype is torch.float64 and self._chunk.output_dtype in (BFLOAT16, FLOAT16):
            total = _round_to_odd(total)
        rounded.copy_(total)
        return torch.isfinite(rounded).all()

    def _compare_with_first(self, values: Tensor) -> None:
        bits_dtype = _INTEGER_OF_SIZE[values.element_size()]
        bits = values.view(bits_dtype)
        first = self._array("first", self._dtype, len(values)).view(bits_dtype)
        equal = self._array("equal", torch.bool, len(values))
        if self._n_added == 0:
            first.copy_(bits)
            equal.fill_(True)
        else:
            equal.logical_and_(first == bits)

    def _divisor(self, value: int) -> Tensor:
        key = (value, self._sum_dtype)
        if key not in self._divisors:
            self._divisors[key] = torch.tensor(value, dtype=self._sum_dtype, device=self._device)
        return self._divisors[key]

    def _array(self, role: str, dtype: torch.dtype, numel: int) -> Tensor:
        """Return a view of the buffer for one role, allocated when it is first needed or grows."""
        nbytes = numel * dtype.itemsize
        array = self._arrays.get(role)
        if array is None or array.nbytes < nbytes:
            array = torch.empty(-(-nbytes // 8) * 8, dtype=torch.uint8, device=self._device)
            self._arrays[role] = array
        return array[:nbytes].view(dtype)


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


def workspace_nbytes(
    chunk_nbytes: int, dtype: DType, output_dtype: DType, accumulate: str, n_rows: int
) -> int:
    """Return an upper bound for the device memory one ``CudaArithmetic`` allocates."""
    total = accumulate_dtype(dtype, accumulate)
    numel = chunk_nbytes // dtype.itemsize
    per_element = (n_rows + 1) * total.itemsize + 2  # sums, products, finite or not
    if total is FLOAT64 and output_dtype in (BFLOAT16, FLOAT16):
        per_element += 4 + 8 + 16 + 8 + 2  # rounding to odd, with its temporaries
    if not keeps_equal_by_rounding(dtype, total):
        per_element += dtype.itemsize + total.itemsize + 2  # first (twice), equal
    return numel * per_element
