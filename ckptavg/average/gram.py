"""Inner products of deviations in numpy: a chunk of every checkpoint, tile by tile.

``CudaGram`` does the same on a GPU. Sums over many elements depend on how they are cut: the last
digits of float64 may differ, unlike those of averages.
"""

from __future__ import annotations

import numpy as np

from ckptavg.average.buffers import Buffers
from ckptavg.average.chunks import first_name, nonfinite_error
from ckptavg.average.floats import BITS, NUMPY_DTYPES, SIXTEEN, Array
from ckptavg.average.work import Job, MiB
from ckptavg.blocks import Chunk
from ckptavg.geometry import GramTable
from ckptavg.tensors import BFLOAT16, DType

_TILE_NUMEL = 2**15  # of each checkpoint, where they are few: a thread holds Python's lock for each
_TILES_NBYTES = 5 * MiB  # of all checkpoints, as float64
_STRIP_NUMEL = 512  # of a tile: products so small are left to one thread by the libraries


class Gram:
    """Keeps a chunk of every checkpoint, and adds its products to a table.

    Use: ``start(chunk)``; for each checkpoint, newest first, fill ``row`` and call ``add``.
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
            size = len(self._table.members)
            self._tile = np.empty((size, _tile_numel(size)))
            self._words = np.empty(self._tile.shape, np.uint32)

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk."""
        self._chunk = chunk
        self._runs = [] if self._table is None else self._table.runs(chunk)
        if self._table is not None and self._runs:
            self._buffers.start(chunk.nbytes)
            shape = len(self._table.members), chunk.numel
            stack = self._buffers.array("gram", BITS[chunk.dtype], shape[0] * shape[1])
            self._stack = stack.reshape(shape)

    def row(self, index: int) -> Array | None:
        """Return where the bits of checkpoint number ``index`` belong; None if nowhere."""
        if self._table is None or not self._runs:
            return None
        row: Array = self._stack[self._table.members.index(index)]
        return row

    def add(self, index: int) -> None:
        """Take what was put into ``row(index)``."""
        table = self._table
        if table is not None and self._runs and index == table.members[0]:
            for group, place in self._runs:
                table.add(group, self._products(table, place), place.stop - place.start)

    @np.errstate(all="ignore")  # what is not finite is looked for
    def _products(self, table: GramTable, place: slice) -> Array:
        size, middle = len(table.members), table.reference
        total, step = np.zeros((size, size)), self._tile.shape[1]
        for first in range(place.start, place.stop, step):
            numel = min(step, place.stop - first)
            padded = -(-numel // _STRIP_NUMEL) * _STRIP_NUMEL
            tile = self._tile[:, :padded]
            tile[:, numel:] = 0
            self._decode(self._stack[:, first : first + numel], tile[:, :numel])
            for rows in (tile[:middle], tile[middle + 1 :]):
                np.subtract(rows, tile[middle], out=rows)
            strips = tile.reshape(size, -1, _STRIP_NUMEL).transpose(1, 0, 2)
            products = np.matmul(strips, strips.transpose(0, 2, 1)).sum(axis=0)
            if not np.isfinite(products).all():
                self._leave_out_nonfinite(table, tile, first, numel)
                products = np.matmul(strips, strips.transpose(0, 2, 1)).sum(axis=0)
            total += products
        return total

    def _decode(self, bits: Array, values: Array) -> None:
        dtype = self._chunk.dtype
        if dtype is BFLOAT16:
            words = self._words[:, : bits.shape[1]]
            np.left_shift(bits, SIXTEEN, out=words, dtype=np.uint32)
            np.copyto(values, words.view(np.float32))
        else:
            np.copyto(values, bits.view(NUMPY_DTYPES[dtype]))

    def _leave_out_nonfinite(self, table: GramTable, tile: Array, first: int, numel: int) -> None:
        """Pass over infinities that all checkpoints share, as in masks, and refuse the others.

        Raises:
            IncompatibleCheckpointsError: Naming the checkpoint and the tensor.
        """
        values = np.empty((len(table.members), numel))
        self._decode(self._stack[:, first : first + numel], values)
        columns = np.flatnonzero(~np.isfinite(values).all(axis=0))
        values = values[:, columns]
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
    tile_numel = _tile_numel(n_members)
    tiles = n_members * tile_numel * (8 + (4 if dtype is BFLOAT16 else 0))
    strips = tile_numel // _STRIP_NUMEL * n_members**2 * 8
    return n_members * numel * dtype.itemsize + tiles + 3 * strips


def _tile_numel(n_members: int) -> int:
    """Return how many elements of each checkpoint are worked on at once: whole strips."""
    fitting = _TILES_NBYTES // (8 * n_members)
    return max(min(fitting, _TILE_NUMEL) // _STRIP_NUMEL, 1) * _STRIP_NUMEL
