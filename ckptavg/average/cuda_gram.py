"""Inner products of deviations in torch on a CUDA device: what ``Gram`` does on a CPU."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from ckptavg.average.chunks import nonfinite_error
from ckptavg.average.floats import BITS, decode_to_float64, is_nonfinite
from ckptavg.average.work import Job
from ckptavg.blocks import Action, Chunk
from ckptavg.geometry import GramTable, LayerGroup
from ckptavg.tensors import DType, Piece

_PART_NBYTES = 2**20  # of each checkpoint, when looking for what is not finite
_MIN_STRIP_NUMEL = 1024
_MAX_STRIPS_NUMEL = 2**21  # of all products of a chunk together
_LIBRARY_NBYTES = 48 * 2**20  # what products take for themselves


class CudaGram:
    """Keeps a chunk of every checkpoint on the device, and adds its products to a table there.

    Use: ``start(chunk)``; ``add`` for each checkpoint, newest first; ``finish`` at the end. All
    work is queued on the current stream.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        """Prepare for any number of chunks; does nothing if the job has no table.

        Args:
            job: What is done.
            device: A CUDA device.
        """
        self._job = job
        self._table = job.gram
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._runs: list[tuple[int, slice]] = []
        if self._table is not None:
            shape = self._table.shape
            self._products = torch.zeros(shape, dtype=torch.float64, device=device)
            self._n_odd = torch.zeros(shape[0], dtype=torch.int64, device=device)
            self._n_elements = np.zeros(shape[0], np.int64)

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk."""
        self._chunk = chunk
        self._runs = [] if self._table is None else self._table.runs(chunk)

    def add(self, index: int, values: Tensor) -> None:
        """Add the chunk of checkpoint number ``index``, given as elements on the device."""
        table = self._table
        if table is None or not self._runs:
            return
        numel, n_members = self._chunk.numel, len(table.members)
        whole = self._array("gram", torch.float64, n_members * numel)
        stack = whole.view(n_members, numel)
        stack[table.members.index(index)].copy_(values)
        if index != table.members[0]:
            return
        self._leave_out_nonfinite(stack)
        middle = table.reference
        for rows in (stack[:middle], stack[middle + 1 :]):
            rows.sub_(stack[middle])
        for group, place in self._runs:
            self._add_products(self._products[group], stack[:, place])
            self._n_elements[group] += place.stop - place.start

    def _add_products(self, total: Tensor, part: Tensor) -> None:
        """Add ``part @ part.T``, in strips: one long product would keep few processors busy."""
        size, numel = part.shape
        n_strips = max(1, min(_MAX_STRIPS_NUMEL // size**2, numel // _MIN_STRIP_NUMEL))
        length = numel // n_strips
        whole = part[:, : n_strips * length]
        strips = whole.view(size, n_strips, length).transpose(0, 1)
        total.add_(torch.bmm(strips, strips.transpose(1, 2)).sum(dim=0))
        rest = part[:, n_strips * length :]
        if rest.shape[1]:
            total.addmm_(rest, rest.T)

    def _leave_out_nonfinite(self, stack: Tensor) -> None:
        """Pass over what is not finite in some checkpoint, and count it."""
        total = self._array("total", torch.float64, stack.shape[1])
        torch.sum(stack, dim=0, out=total)
        odd = self._array("odd", torch.bool, stack.shape[1])
        torch.lt(total.abs_(), torch.inf, out=odd)  # which NaN is not
        odd.logical_not_()
        for group, place in self._runs:
            self._n_odd[group] += odd[place].sum()
        stack.masked_fill_(odd, 0.0)

    def _array(self, role: str, dtype: torch.dtype, numel: int) -> Tensor:
        """Return the buffer for one role, allocated when it is first needed or grows."""
        found = self._buffers.get(role)
        if found is None or len(found) < numel:
            found = torch.empty(numel, dtype=dtype, device=self._device)
            self._buffers[role] = found
        return found[:numel]

    def finish(self) -> None:
        """Add all products to the job's table; waits for the device.

        Raises:
            IncompatibleCheckpointsError: If a checkpoint holds a non-finite value that not all
                share, and the recipe does not allow it.
        """
        table = self._table
        if table is None:
            return
        odd = {table.groups[number] for number in self._n_odd.nonzero().flatten().tolist()}
        if odd and not self._job.plan.recipe.allow_nonfinite:
            self._refuse(table, odd)
        products = self._products.cpu().numpy()
        for group, one in enumerate(products):
            table.add(group, one, int(self._n_elements[group]))

    def _refuse(self, table: GramTable, groups: Collection[LayerGroup]) -> None:
        """Read the tensors of some groups again, and refuse what not all checkpoints share.

        Infinities that all have, as in masks, are passed over.
        """
        plan, checkpoints = self._job.plan, self._job.checkpoints
        for tensor in plan.with_action(Action.AVERAGE):
            if table.group_of(tensor.name) not in groups:
                continue
            dtype = tensor.info.dtype.part
            for start in range(0, tensor.info.nbytes, _PART_NBYTES):
                piece = Piece(tensor.name, start, min(start + _PART_NBYTES, tensor.info.nbytes))
                raw = np.empty((len(table.members), piece.stop - piece.start), np.uint8)
                for index, row in zip(table.members, raw, strict=True):
                    checkpoints[index].read_into([piece], row.data)
                bits = raw.view(BITS[dtype])
                bad = is_nonfinite(bits, dtype)
                bad &= ~(np.isinf(decode_to_float64(raw[0], dtype)) & (bits == bits[0]).all(axis=0))
                for index, row in zip(table.members, bad, strict=True):
                    if row.any():
                        raise nonfinite_error(plan, checkpoints, index, tensor.name)


def gram_nbytes(chunk_nbytes: int, dtype: DType, shape: tuple[int, ...]) -> int:
    """Return the device memory that ``CudaGram`` allocates for such chunks.

    Args:
        chunk_nbytes: Input bytes of the largest chunk, from one checkpoint.
        dtype: Of its elements.
        shape: Of the table: groups, checkpoints, checkpoints.
    """
    numel, size = chunk_nbytes // dtype.itemsize, shape[-1]
    flags = 8 + 1 + 1  # sums over the checkpoints, what is not finite, with temporaries
    strips = (_MAX_STRIPS_NUMEL + 2 * size**2) * 8
    return numel * (size * 8 + flags) + math.prod(shape) * 8 + strips + _LIBRARY_NBYTES
