"""Inner products of deviations in numpy: a chunk of every checkpoint, tile by tile.

``CudaGram`` does the same on a GPU. Sums over many elements depend on how they are cut: the last
digits of float64 may differ, unlike those of averages.
"""

from __future__ import annotations

import numpy as np

from ckptavg.average.buffers import Buffers
from ckptavg.average.chunks import first_name, nonfinite_error
from ckptavg.average.floats import BITS, NUMPY_DTYPES, SIXTEEN, Array
from ckptavg.average.work import Job
from ckptavg.blocks import Chunk
from ckptavg.geometry import GramTable
from ckptavg.tensors import BFLOAT16, DType

_TILE_NUMEL = 2048  # of each checkpoint: twenty of them, as float64, stay in the second cache
_STRIP_NUMEL = 512  # of a tile: products so small are left to one thread by the libraries


class Gram:
    """Keeps a chunk of every checkpoint, and adds its products to a table.

    Use: ``start(chunk)``; ``add`` for each checkpoint, newest first.
    """

    def __init__(self, job: Job, buffers: Buffers) -> None:
        """Prepare for any number of chunks; does nothing if the job has no table.

        Args:
            job: What is done.
            buffers: Where arrays come from.
        """
        self._job = job
        self._table = job.gram
        self._buffers = buffers
        if self._table is not None:
            self._tile = np.empty((len(self._table.members) + 1, _TILE_NUMEL))
            self._words = np.empty(_TILE_NUMEL, np.uint32)

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk."""
        self._chunk = chunk
        self._buffers.start(chunk.nbytes)
        self._runs = [] if self._table is None else self._table.runs(chunk)

    def add(self, index: int, bits: Array) -> None:
        """Add the chunk of checkpoint number ``index``."""
        table = self._table
        if table is None or not self._runs:
            return
        np.copyto(self._row(index), bits)
        if index == table.members[0]:
            for group, place in self._runs:
                table.add(group, self._products(table, place), place.stop - place.start)

    def _row(self, index: int) -> Array:
        chunk = self._chunk
        return self._buffers.array(f"gram{index}", BITS[chunk.dtype], chunk.numel)

    @np.errstate(all="ignore")  # what is not finite is looked for
    def _products(self, table: GramTable, place: slice) -> Array:
        rows = [self._row(index) for index in table.members]
        size = len(rows) + 1
        total = np.zeros((size, size))
        for first in range(place.start, place.stop, _TILE_NUMEL):
            numel = min(_TILE_NUMEL, place.stop - first)
            padded = -(-numel // _STRIP_NUMEL) * _STRIP_NUMEL
            tile = self._tile[:, :padded]
            tile[:, numel:] = 0
            for row, values in zip(rows, tile, strict=False):
                self._decode(row[first : first + numel], values[:numel])
            mean = tile[-1]
            np.add.reduce(tile[:-1], axis=0, out=mean)
            mean /= len(rows)
            if not np.isfinite(mean).all():
                self._leave_out_nonfinite(table, tile, first)
            tile[:-1] -= mean
            strips = tile.reshape(size, -1, _STRIP_NUMEL).transpose(1, 0, 2)
            total += np.matmul(strips, strips.transpose(0, 2, 1)).sum(axis=0)
        return total

    def _decode(self, bits: Array, values: Array) -> None:
        dtype = self._chunk.dtype
        if dtype is BFLOAT16:
            words = self._words[: len(bits)]
            np.left_shift(bits, SIXTEEN, out=words, dtype=np.uint32)
            np.copyto(values, words.view(np.float32))
        else:
            np.copyto(values, bits.view(NUMPY_DTYPES[dtype]))

    def _leave_out_nonfinite(self, table: GramTable, tile: Array, first: int) -> None:
        """Pass over infinities that all checkpoints share, as in masks, and refuse the others.

        Raises:
            IncompatibleCheckpointsError: Naming the checkpoint and the tensor.
        """
        columns = np.flatnonzero(~np.isfinite(tile).all(axis=0))
        values = tile[:-1, columns]
        shared = np.isinf(values).all(axis=0) & (values == values[0]).all(axis=0)
        if not self._job.plan.recipe.allow_nonfinite and not shared.all():
            for index, row in zip(table.members, values, strict=True):
                bad = ~np.isfinite(row) & ~shared
                if bad.any():
                    name = first_name(self._chunk, first + columns[bad])
                    raise nonfinite_error(self._job.plan, self._job.checkpoints, index, name)
        tile[:, columns] = 0


def gram_nbytes(chunk_nbytes: int, dtype: DType, n_members: int) -> int:
    """Return the bytes that ``Gram`` allocates for such chunks."""
    if not n_members:
        return 0
    numel = chunk_nbytes // dtype.itemsize + 2
    tiles = (n_members + 1) * _TILE_NUMEL * 8
    strips = _TILE_NUMEL // _STRIP_NUMEL * (n_members + 1) ** 2 * 8
    return n_members * numel * dtype.itemsize + 2 * tiles + strips + 4 * _TILE_NUMEL
