"""Page-locked host memory, which a GPU can copy from and to while the CPU does other things."""

import mmap
from typing import Any

import numpy as np
import torch

_HUGE_PAGE_NBYTES = 2 * 2**20


class PinnedBuffer:
    """Host memory that is page-locked once its pages are there.

    Locking memory that has been written to, on huge pages, takes a tenth of the time of
    ``torch.empty(pin_memory=True)``, and each thread can do it for the buffer it works with. Where
    the driver refuses, torch's own is used.

    Attributes:
        tensor: The memory, uint8.
        data: The same for reading and writing in Python.
    """

    def __init__(self, nbytes: int) -> None:
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._use(torch.from_numpy(np.frombuffer(memory, np.uint8)[:nbytes]))
        self._locked = self._is_torchs = False

    def lock(self) -> None:
        """Lock the pages; call it after the first write, before the first copy."""
        if self._locked or self._is_torchs or not self.tensor.nbytes:
            return
        result = _cuda_runtime().cudaHostRegister(self.tensor.data_ptr(), self.tensor.nbytes, 0)
        if int(result) == 0:
            self._locked = True
            return
        content = self.tensor
        self._use(torch.empty(content.nbytes, dtype=torch.uint8, pin_memory=True))
        self.tensor.copy_(content)
        self._is_torchs = True

    def unlock(self) -> None:
        """Unlock the pages; nothing may be copying any more."""
        if self._locked:
            _cuda_runtime().cudaHostUnregister(self.tensor.data_ptr())
            self._locked = False

    def _use(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.data: memoryview = tensor.numpy().data


def pinned_nbytes(nbytes: int) -> int:
    """Return the memory that a buffer takes: whole huge pages, unless it is smaller than one."""
    if nbytes < _HUGE_PAGE_NBYTES:
        return nbytes
    return -(-nbytes // _HUGE_PAGE_NBYTES) * _HUGE_PAGE_NBYTES


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no types for it
