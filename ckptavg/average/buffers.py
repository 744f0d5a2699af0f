"""The memory that one thread's arithmetic works in: every array allocated once."""

from typing import Any

import numpy as np

from ckptavg.average.floats import Array

_CACHE_LINE_NBYTES = 64


class Buffers:
    """Hands out arrays by role, made for the largest chunk when they are first needed.

    What is freed to grow may stay with the process.
    """

    def __init__(self, max_chunk_nbytes: int) -> None:
        """Prepare for chunks of at most so many input bytes."""
        self._max_chunk_nbytes = max_chunk_nbytes
        self._chunk_nbytes = 1
        self._arrays: dict[str, Array] = {}

    def start(self, chunk_nbytes: int) -> None:
        """Note the input bytes of the chunk that the arrays asked for from now on belong to."""
        self._chunk_nbytes = max(chunk_nbytes, 1)

    def array(self, role: str, dtype: np.dtype[Any] | type[Any], numel: int) -> Array:
        """Return the array for one role; it holds what it held when it was last asked for."""
        dtype = np.dtype(dtype)
        nbytes = numel * dtype.itemsize
        array = self._arrays.get(role)
        if array is None or array.nbytes < nbytes:
            whole = -(-nbytes * self._max_chunk_nbytes // self._chunk_nbytes)
            array = self._arrays[role] = _aligned_empty(max(whole, nbytes))
        return array[:nbytes].view(dtype)


def _aligned_empty(nbytes: int) -> Array:
    """Return bytes that begin on a cache line.

    Measured on an AMD EPYC: the kernel copies file pages five times slower to some other addresses.
    """
    room = np.empty(nbytes + _CACHE_LINE_NBYTES, np.uint8)
    start = -room.ctypes.data % _CACHE_LINE_NBYTES
    return room[start : start + nbytes]
