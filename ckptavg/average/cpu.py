"""The engine on a CPU: every thread takes a chunk, reads it from each checkpoint, sums, writes.

It never imports torch: importing that takes longer than averaging most models.
"""

import math
from threading import Lock, Semaphore
from time import thread_time

import numpy as np

from ckptavg.average.buffers import Buffers
from ckptavg.average.chunks import repair_nonfinite, take_chunk
from ckptavg.average.gram import Gram, gram_nbytes
from ckptavg.average.numpy_arithmetic import NumpyArithmetic, workspace_nbytes
from ckptavg.average.work import (
    Job,
    Ledger,
    MiB,
    SharedIterator,
    Stopwatch,
    Timings,
    Workspace,
    averaged_chunk_nbytes,
    run_threads,
)
from ckptavg.blocks import Action, Chunk
from ckptavg.errors import MemoryBudgetError
from ckptavg.plan import AveragePlan, gram_table

_CHUNK_NBYTES = 1 * MiB  # input, sums and output stay in the caches
_FEW_THREADS = 4  # more of them get larger chunks: they would wait for Python's lock too often
_MIN_CHUNK_NBYTES = 64 * 1024
_STACK_OF_CHUNKS_NBYTES = 8 * MiB  # of all checkpoints, where they are compared
_MAX_THREADS = 8  # more gain nothing, for the same reason
_MAX_WAITING_THREADS = 16
FIXED_NBYTES = 8_500 * 1024  # code, threads, headers and plan of a usual model
_RANDOM_NBYTES = 1_800 * 1024  # numpy's random numbers, which are loaded where they are drawn
_PRODUCTS_NBYTES = 2_000 * 1024  # what numpy multiplies matrices with
_STACK_NBYTES = 256 * 1024  # of a thread: its stack, its arena
_TRIAL_SECONDS = 0.25  # of reading, after which it is clear whether it waits for the storage


def size_cpu_workspace(
    plan: AveragePlan, cpus: int, *, memory_budget_bytes: int, n_threads: int | None = None
) -> Workspace:
    """Choose thread count and chunk size so that all buffers fit the budget.

    Raises:
        MemoryBudgetError: If not even one thread with the smallest chunk fits.
    """
    threads = n_threads or min(cpus, _MAX_THREADS)
    chunk_nbytes = _CHUNK_NBYTES * (1 if threads <= _FEW_THREADS else 2)
    if plan.compares:
        stack_nbytes = _STACK_OF_CHUNKS_NBYTES * (1 if threads <= _FEW_THREADS else 2)
        chunk_nbytes = min(chunk_nbytes, stack_nbytes // len(plan.used_checkpoints))
        chunk_nbytes = max(chunk_nbytes, _MIN_CHUNK_NBYTES)

    table = gram_table(plan)
    comparing = 0 if table is None else _PRODUCTS_NBYTES + 3 * 8 * math.prod(table.shape)

    def needed(threads: int) -> int:
        code = FIXED_NBYTES + (_RANDOM_NBYTES if plan.draws_noise else 0) + comparing
        return code + threads * _thread_nbytes(plan, chunk_nbytes)

    while needed(threads) > memory_budget_bytes and chunk_nbytes > _MIN_CHUNK_NBYTES:
        chunk_nbytes //= 2
    while needed(threads) > memory_budget_bytes and threads > 1 and n_threads is None:
        threads -= 1
    if needed(threads) > memory_budget_bytes:
        raise MemoryBudgetError(
            f"a memory budget of {memory_budget_bytes} bytes is too small: "
            f"at least {needed(threads)} bytes are needed (--memory)"
        )
    most = n_threads or _MAX_WAITING_THREADS
    while needed(most) > memory_budget_bytes:
        most -= 1
    return Workspace(
        device="cpu",
        n_threads=threads,
        max_threads=most,
        chunk_nbytes=chunk_nbytes,
        host_nbytes=needed(threads),
        max_host_nbytes=needed(most),
    )


def average_on_cpu(job: Job, workspace: Workspace) -> Timings:
    """Carry out a job with numpy, several chunks at a time.

    Raises:
        CheckpointError: If a read fails or a file changed.
        IncompatibleCheckpointsError: If a result is not finite and the recipe does not allow it,
            or integer tensors differ and the recipe refuses that.
        OutputError: If a sink cannot write.
    """
    crew = _Crew(job, workspace)
    run_threads([crew.work] * workspace.max_threads, stop=crew.abort)
    return crew.timings


class _Crew:
    """Threads that work alike; some of them begin only where reading waits for the storage."""

    def __init__(self, job: Job, workspace: Workspace) -> None:
        self.timings = Timings()
        self._job = job
        self._ledger = Ledger(job)
        self._chunk_nbytes = workspace.chunk_nbytes
        self._chunks = SharedIterator(job.chunks(workspace.chunk_nbytes))
        self._may_begin = Semaphore(workspace.n_threads)
        self._max_threads = workspace.max_threads
        self._begun = workspace.n_threads
        self._lock = Lock()  # timings, and the trial
        self._trial_seconds = self._trial_cpu_seconds = 0.0

    def stop(self) -> None:
        self._chunks.stop()
        self._may_begin.release(self._max_threads)

    def abort(self) -> None:
        """Stop, and let nobody wait for a network any more."""
        self.stop()
        self._job.cancel()

    @np.errstate(all="ignore")  # what is not finite is found in the output
    def work(self) -> None:
        self._may_begin.acquire()
        plan = self._job.plan
        largest = averaged_chunk_nbytes(plan, self._chunk_nbytes)
        arithmetic = NumpyArithmetic(plan.rows, plan.recipe.accumulate, largest)
        gram = Gram(self._job, Buffers(largest))
        timings = Timings()
        for chunk in self._chunks:
            if chunk.action is Action.TAKE:
                self._ledger.enter(chunk, take_chunk(self._job, chunk))
            else:
                self._average(chunk, arithmetic, gram, timings)
                self._ledger.enter(chunk)
        with self._lock:
            self.timings.add(timings, share=1 / self._begun)
        self.stop()  # those that wait need not begin any more

    def _average(
        self, chunk: Chunk, arithmetic: NumpyArithmetic, gram: Gram, timings: Timings
    ) -> None:
        job = self._job
        watch, read_seconds, read_cpu_seconds = Stopwatch(), 0.0, 0.0
        arithmetic.start(chunk)
        gram.start(chunk)
        for index in reversed(job.plan.used_checkpoints):
            timings.arithmetic_seconds += watch.lap()
            cpu_seconds = thread_time()
            kept = gram.row(index)
            into = arithmetic.input
            if kept is not None and not job.sinks:  # nothing else is done with it
                into = kept.view(np.uint8).data
            job.checkpoints[index].read_into(chunk.pieces, into)
            read_cpu_seconds += thread_time() - cpu_seconds
            read_seconds += watch.lap()
            if kept is not None and job.sinks:
                np.copyto(kept, np.frombuffer(arithmetic.input, kept.dtype))
            gram.add(index)
            for row in arithmetic.add(index):
                output, finite = arithmetic.finish(row)
                if not finite:
                    output = memoryview(repair_nonfinite(job, chunk, row, output))
                timings.arithmetic_seconds += watch.lap()
                job.write(row, chunk, output)
                timings.write_seconds += watch.lap()
        timings.arithmetic_seconds += watch.lap()
        timings.read_seconds += read_seconds
        self._try(read_seconds, read_cpu_seconds)

    def _try(self, read_seconds: float, read_cpu_seconds: float) -> None:
        """Let one more thread begin if reading has mostly waited for the storage of late."""
        if self._begun == self._max_threads:
            return
        with self._lock:
            self._trial_seconds += read_seconds
            self._trial_cpu_seconds += read_cpu_seconds
            if self._trial_seconds < _TRIAL_SECONDS:
                return
            if (
                self._trial_cpu_seconds < self._trial_seconds / 4
                and self._begun < self._max_threads
            ):
                self._begun += 1
                self._may_begin.release()
            self._trial_seconds = self._trial_cpu_seconds = 0.0


def _thread_nbytes(plan: AveragePlan, chunk_nbytes: int) -> int:
    """Bytes of all buffers that one thread comes to hold."""
    averaged_nbytes = averaged_chunk_nbytes(plan, chunk_nbytes)
    arithmetic = [
        workspace_nbytes(averaged_nbytes, dtype, output_dtype, plan.recipe.accumulate, plan.rows)
        for dtype, output_dtype in plan.arithmetic_dtypes
    ]
    n_compared = len(plan.used_checkpoints) if plan.compares else 0
    compared = [
        gram_nbytes(averaged_nbytes, dtype, n_compared) for dtype, _ in plan.arithmetic_dtypes
    ]
    taking = plan.taking_nbytes(chunk_nbytes)
    working = max(arithmetic, default=0) + max(compared, default=0)
    return _STACK_NBYTES + working + taking + plan.read_scratch_nbytes
