"""The engine: read a chunk of every checkpoint, sum, divide, round once, hand to the writer.

Chunk by chunk, checkpoint after checkpoint, so memory depends on the chunk and the number of
threads, not on how many checkpoints there are or how large they are. A chunk is summed from the
newest checkpoint to the oldest by one thread, so the same bits come out whatever the number of
threads, the chunk size or the device.
"""

import os
import sys
from pathlib import Path

from ckptavg.average.cpu import average_on_cpu, size_cpu_workspace
from ckptavg.average.work import Job, Progress, Sink, Timings, Workspace, usable_cpus
from ckptavg.errors import UsageError
from ckptavg.plan import AveragePlan

__all__ = [
    "Job",
    "Progress",
    "Sink",
    "Timings",
    "Workspace",
    "average",
    "averaging_device",
    "choose_device",
    "size_workspace",
]

DEFAULT_MEMORY_BUDGET_BYTES = 512 * 2**20
# measured with an H100 and 16 CPUs: 4 s to start, then 30 GB/s instead of 7
_WORTH_STARTING_CUDA_NBYTES = 40 * 10**9
_WORTH_CUDA_NBYTES = 10**9


def choose_device(device: str, *, read_nbytes: int, runs_model: bool, local_rank: int = 0) -> str:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:i`` into ``cpu`` or ``cuda:i``.

    ``auto`` is the first CUDA device where the machine has one and it pays: a model will run, or
    there is enough to read to make up for starting CUDA, unless this process has started it.
    Otherwise torch is not even imported.

    Args:
        device: What was asked for.
        read_nbytes: Bytes that will be read from all checkpoints together.
        runs_model: Whether a BatchNorm pass follows.
        local_rank: Number of this process among those of its host: ``auto`` and ``cuda`` give each
            its own GPU, as far as there are enough.

    Raises:
        UsageError: If the device is unknown or not there.
    """
    if device == "cpu":
        return "cpu"
    worth_nbytes = _WORTH_CUDA_NBYTES if _has_started_cuda() else _WORTH_STARTING_CUDA_NBYTES
    pays = runs_model or read_nbytes >= worth_nbytes
    if device == "auto" and not (pays and _has_nvidia_driver()):
        return "cpu"
    kind, _, index = device.partition(":")
    if device != "auto" and (kind != "cuda" or (index and not index.isdecimal())):
        raise UsageError(f"device: '{device}' is not one of auto, cpu, cuda, cuda:0, cuda:1, ...")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" and count == 0:
        return "cpu"
    number = int(index) if index else local_rank % max(count, 1)
    if number >= count:
        raise UsageError(f"device: '{device}' is not there; torch sees {count} CUDA devices")
    return f"cuda:{number}"


def averaging_device(plan: AveragePlan, device: str) -> str:
    """Return where a plan is averaged if ``device`` was chosen, which may be left to the model.

    Noise is drawn on the CPU, so that its bits are the same everywhere.
    """
    return "cpu" if plan.draws_noise else device


def size_workspace(
    plan: AveragePlan,
    device: str,
    *,
    memory_budget_bytes: int,
    n_threads: int | None = None,
    local_size: int = 1,
) -> Workspace:
    """Choose threads, chunk size and buffers for a device so that they fit the budget.

    Args:
        plan: What will be done.
        device: ``cpu`` or ``cuda:i``, from ``averaging_device``.
        memory_budget_bytes: Upper bound for the host memory of all buffers.
        n_threads: Threads that read; None chooses by the machine.
        local_size: Number of processes that share this machine.

    Raises:
        MemoryBudgetError: If not even the smallest buffers fit.
    """
    cpus = max(1, usable_cpus() // local_size)
    if device == "cpu":
        return size_cpu_workspace(
            plan, cpus, memory_budget_bytes=memory_budget_bytes, n_threads=n_threads
        )
    from ckptavg.average.cuda import size_cuda_workspace

    assert not plan.draws_noise  # averaging_device sees to it
    return size_cuda_workspace(
        plan, device, cpus, memory_budget_bytes=memory_budget_bytes, n_threads=n_threads
    )


def average(job: Job, workspace: Workspace) -> Timings:
    """Carry out a job: one pass over the checkpoints, every output at once.

    Args:
        job: What to do.
        workspace: From ``size_workspace``.

    Raises:
        CheckpointError: If a read fails or a file ends early.
        IncompatibleCheckpointsError: If a result is not finite and the recipe does not allow it,
            or integer tensors differ and the recipe refuses that.
        OutputError: If a sink cannot write.
    """
    if workspace.device == "cpu":
        return average_on_cpu(job, workspace)
    from ckptavg.average.cuda import average_on_cuda

    return average_on_cuda(job, workspace)


def _has_started_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _has_nvidia_driver() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return Path("/proc/driver/nvidia").exists() or any(Path("/dev").glob("nvidia[0-9]*"))
