"""Memory of this process: its peak, as system and torch count it, and what its limits leave."""

import mmap
import re
import resource
from pathlib import Path

from ckptavg.errors import MemoryBudgetError

_STACK_NBYTES = 8 * 2**20  # of a thread, where nothing bounds it
_THREAD_NBYTES = 2**20  # what else it takes
_SPARE_NBYTES = 8 * 2**20
BLAS_NBYTES = 40 * 2**20  # what a thread that multiplies matrices may take


def peak_host_bytes() -> int | None:
    """Return the largest resident set so far in bytes, or None where the system does not tell."""
    # not getrusage: after fork and exec it still counts the parent's memory
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def check_room(nbytes: int, n_threads: int) -> None:
    """See whether the limits of this process leave room for what it is about to do.

    Without limits nothing is tried: the system may promise more than it has.

    Args:
        nbytes: What it will allocate.
        n_threads: How many threads it will start, each with a stack.

    Raises:
        MemoryBudgetError: If not.
    """
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    if all(limit == resource.RLIM_INFINITY for limit in limits):
        return
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if stack == resource.RLIM_INFINITY:
        stack = _STACK_NBYTES
    needed = nbytes + n_threads * (stack + _THREAD_NBYTES) + _SPARE_NBYTES
    try:
        mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        raise MemoryBudgetError(
            f"needs {needed} bytes, {n_threads} threads among them, which the limits of this "
            "process do not allow (ulimit -d, ulimit -v); lower --memory or --io-threads"
        ) from error


def peak_device_bytes(device: str) -> int | None:
    """Return the most memory that torch had allocated on a CUDA device; None for the CPU."""
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))
