"""The engine on a CPU: every thread takes a chunk, reads it from each checkpoint, sums, writes.

It never imports torch: importing that takes longer than averaging most models.
"""

from collections.abc import Sequence
from threading import Lock

import numpy as np

from ckptavg.average.chunks import repair_nonfinite, take_chunk
from ckptavg.average.numpy_arithmetic import NumpyArithmetic, workspace_nbytes
from ckptavg.average.work import (
    MiB,
    Outcome,
    Progress,
    SharedIterator,
    Sink,
    Workspace,
    in_output_order,
    input_nbytes,
    run_threads,
    usable_cpus,
)
from ckptavg.checkpoint import READ_SCRATCH_BYTES, Checkpoint
from ckptavg.errors import MemoryBudgetError
from ckptavg.plan import TAKE_CHUNK_NBYTES, Action, AveragePlan, Chunk

_CHUNK_NBYTES = 1 * MiB  # input, sums and output stay in the caches
_MIN_CHUNK_NBYTES = 64 * 1024
_MAX_THREADS = 16
_FIXED_NBYTES = 4 * MiB  # interpreter objects: threads, pieces, headers of a large model


def size_cpu_workspace(
    plan: AveragePlan, *, memory_budget_bytes: int, n_threads: int | None = None
) -> Workspace:
    """Choose thread count and chunk size so that all buffers fit the budget.

    Raises:
        MemoryBudgetError: If not even one thread with the smallest chunk fits.
    """
    threads = n_threads or min(usable_cpus(), _MAX_THREADS)
    chunk_nbytes = _CHUNK_NBYTES

    def needed() -> int:
        return _FIXED_NBYTES + threads * _thread_nbytes(plan, chunk_nbytes)

    while needed() > memory_budget_bytes and chunk_nbytes > _MIN_CHUNK_NBYTES:
        chunk_nbytes //= 2
    while needed() > memory_budget_bytes and threads > 1 and n_threads is None:
        threads -= 1
    if needed() > memory_budget_bytes:
        raise MemoryBudgetError(
            f"a memory budget of {memory_budget_bytes} bytes is too small: "
            f"at least {needed()} bytes are needed (--memory)"
        )
    return Workspace("cpu", threads, chunk_nbytes, 0, needed(), 0)


def average_on_cpu(
    plan: AveragePlan,
    checkpoints: Sequence[Checkpoint],
    sinks: Sequence[Sink],
    workspace: Workspace,
    *,
    progress: Progress,
) -> Outcome:
    """Carry out a plan with numpy, several chunks at a time.

    Raises:
        CheckpointError: If a read fails or a file changed.
        IncompatibleCheckpointsError: If a result is not finite and the recipe does not allow it,
            or integer tensors differ and the recipe refuses that.
        OutputError: If a sink cannot write.
    """
    chunks = SharedIterator(plan.chunks(workspace.chunk_nbytes))
    outcome = Outcome()
    lock = Lock()

    @np.errstate(all="ignore")  # what is not finite is found in the output
    def work() -> None:
        arithmetic = NumpyArithmetic(plan.rows, plan.recipe.accumulate)
        for chunk in chunks:
            if chunk.action is Action.TAKE:
                differing = take_chunk(plan, chunk, checkpoints, sinks)
            else:
                _average_chunk(plan, chunk, checkpoints, arithmetic, sinks)
                differing = []
            with lock:
                outcome.differing.extend(differing)
                progress(input_nbytes(plan, chunk))

    run_threads([work] * workspace.n_threads, stop=chunks.stop)
    return in_output_order(plan, outcome)


def _average_chunk(
    plan: AveragePlan,
    chunk: Chunk,
    checkpoints: Sequence[Checkpoint],
    arithmetic: NumpyArithmetic,
    sinks: Sequence[Sink],
) -> None:
    arithmetic.start(chunk)
    for index in plan.used_checkpoints:
        checkpoints[index].read_into(chunk.pieces, arithmetic.input)
        arithmetic.add(index)
    for row, sink in enumerate(sinks):
        output, finite = arithmetic.finish(row)
        if not finite:
            output = memoryview(repair_nonfinite(plan, chunk, checkpoints, row, output))
        for shard, offset in chunk.destinations:
            sink.write(shard, offset, output)


def _thread_nbytes(plan: AveragePlan, chunk_nbytes: int) -> int:
    """Bytes of all buffers that one thread may come to hold."""
    per_role = [
        workspace_nbytes(chunk_nbytes, dtype, output_dtype, plan.recipe.accumulate, len(plan.rows))
        for dtype, output_dtype in plan.arithmetic_dtypes
    ]
    comparing = 2 * min(chunk_nbytes, TAKE_CHUNK_NBYTES)
    return max(per_role, default=0) + comparing + READ_SCRATCH_BYTES
