"""The engine on a GPU: reader threads, a copy stream, a compute stream, writer threads.

::

    readers ──► slots: pinned host memory ──copy stream──► its twin on the device
       ▲                                                          │ compute stream: sums
       └──────────────── free again once added ◄──────────────────┤
                                                                  ▼ finished rows
    sinks ◄── writers: pinned host memory ◄──return stream── device outputs

Chunks come one after the other, and of each chunk the newest checkpoint first. A thread waits for
the device only for a buffer it is about to use; every buffer is allocated once. Chunks are large,
because threads hold Python's lock for each: at 30 GB/s there are 500 microseconds for 16 MiB.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Condition, Event, Lock
from typing import TypeVar

import torch
from torch import Tensor

from ckptavg.average.chunks import repair_nonfinite, take_chunk
from ckptavg.average.cuda_arithmetic import CudaArithmetic, torch_dtype, workspace_nbytes
from ckptavg.average.cuda_gram import CudaGram, gram_nbytes
from ckptavg.average.floats import bits_view, is_nonfinite
from ckptavg.average.pinned import PinnedBuffer, pinned_nbytes
from ckptavg.average.work import (
    Job,
    Ledger,
    MiB,
    Stopwatch,
    Timings,
    Workspace,
    averaged_chunk_nbytes,
    run_threads,
)
from ckptavg.blocks import Action, Chunk
from ckptavg.errors import MemoryBudgetError
from ckptavg.plan import AveragePlan, gram_table
from ckptavg.tensors import DType

_CHUNK_NBYTES = 16 * MiB
_MIN_CHUNK_NBYTES = 256 * 1024
_MAX_SLOTS = 20
_MIN_SLOTS = 3
_MAX_READERS = 14
_WRITERS = 3
_MAX_WRITERS = 8
_SPARE_OUTPUTS = 2  # device outputs beyond those that writers hold
_MAX_DEVICE_NBYTES = 1000 * MiB
_ALIGNMENT = 512
_FIXED_NBYTES = 50 * MiB  # code, threads, headers, plan, and the kernels that CUDA loads
_PRODUCTS_NBYTES = 175 * MiB  # the library that multiplies matrices, and its kernels
_FIXED_DEVICE_NBYTES = 1 * MiB  # what the allocator rounds up, divisors
_POLL_SECONDS = 0.1

T = TypeVar("T")


def size_cuda_workspace(
    plan: AveragePlan, device: str, cpus: int, *, memory_budget_bytes: int, n_threads: int | None
) -> Workspace:
    """Choose readers, chunk size and slots so that host buffers fit the budget.

    Raises:
        MemoryBudgetError: If not even the smallest buffers fit.
    """
    chunk_nbytes = _aligned(max(averaged_chunk_nbytes(plan, _CHUNK_NBYTES), 1))
    readers = n_threads or min(cpus, _MAX_READERS)
    n_reads = max(1, -(-plan.read_nbytes // chunk_nbytes))
    slots = max(_MIN_SLOTS, min(_MAX_SLOTS, n_reads))
    table = gram_table(plan)

    def host_nbytes() -> int:
        outputs = _n_writers(plan) * pinned_nbytes(_output_nbytes(plan, chunk_nbytes))
        reading = readers * (plan.taking_nbytes(chunk_nbytes) + plan.read_scratch_nbytes)
        fixed = _FIXED_NBYTES + (0 if table is None else _PRODUCTS_NBYTES)
        return fixed + slots * pinned_nbytes(chunk_nbytes) + outputs + reading

    def device_nbytes() -> int:
        arithmetic = [
            workspace_nbytes(chunk_nbytes, dtype, output, plan.recipe.accumulate, plan.rows)
            for dtype, output in plan.arithmetic_dtypes
        ]
        compared = [
            gram_nbytes(chunk_nbytes, dtype, table.shape)
            for dtype, _ in plan.arithmetic_dtypes
            if table is not None
        ]
        outputs = (_n_writers(plan) + _SPARE_OUTPUTS) * _output_nbytes(plan, chunk_nbytes)
        inputs = slots * chunk_nbytes
        working = max(arithmetic, default=0) + max(compared, default=0)
        return _FIXED_DEVICE_NBYTES + working + inputs + outputs

    def is_too_much() -> bool:
        return host_nbytes() > memory_budget_bytes or device_nbytes() > _MAX_DEVICE_NBYTES

    while is_too_much() and slots > _MAX_SLOTS // 2:
        slots -= 1
    while is_too_much() and chunk_nbytes > _MIN_CHUNK_NBYTES:
        chunk_nbytes = _aligned(chunk_nbytes // 2)
    while is_too_much() and slots > _MIN_SLOTS:
        slots -= 1
    while is_too_much() and n_threads is None and readers > 1:
        readers -= 1
    if host_nbytes() > memory_budget_bytes:
        raise MemoryBudgetError(
            f"a memory budget of {memory_budget_bytes} bytes is too small: "
            f"at least {host_nbytes()} bytes are needed (--memory)"
        )
    return Workspace(
        device=device,
        n_threads=readers,
        max_threads=readers,
        chunk_nbytes=chunk_nbytes,
        n_slots=slots,
        host_nbytes=host_nbytes(),
        max_host_nbytes=host_nbytes(),
        device_nbytes=device_nbytes(),
    )


def average_on_cuda(job: Job, workspace: Workspace) -> Timings:
    """Carry out a job on a GPU; raises as ``average`` says."""
    try:
        torch.empty(0, device=workspace.device)  # starts CUDA: there are no statistics before
        torch.cuda.reset_peak_memory_stats(workspace.device)
        with torch.cuda.device(workspace.device):
            return _Pipeline(job, workspace).run()
    except torch.OutOfMemoryError as error:
        raise MemoryBudgetError(
            f"{workspace.device}: out of memory: {workspace.device_nbytes} bytes are needed; free "
            "some, or pass --device cpu"
        ) from error


class _Slot:
    """A chunk of one checkpoint in host memory, and its twin on the device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.host = PinnedBuffer(nbytes)
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.copied = _event()
        self.added = _event(blocking=True)
        self._views: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def copy(self, nbytes: int, dtype: DType) -> Tensor:
        """Queue the copy to the device; return the elements there."""
        key = nbytes, torch_dtype(dtype)
        if key not in self._views:  # made once: each costs as much as a copy's start
            part = self._device[:nbytes]
            self._views[key] = part, self.host.tensor[:nbytes], part.view(key[1])
        device, host, values = self._views[key]
        device.copy_(host, non_blocking=True)
        self.copied.record()
        return values


@dataclass(frozen=True, slots=True)
class _Ready:
    """A chunk of one checkpoint that has been read and is on its way to the device."""

    slot: _Slot
    values: Tensor


class _Output:
    """A finished chunk of one row on the device: its bytes, then its smallest and largest value."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.rounded = _event()
        self._views: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def parts(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Return the elements, the smallest and the largest, of the output dtype."""
        key = chunk.numel, torch_dtype(chunk.output_dtype)
        if key not in self._views:
            size, whole = _extents(chunk)
            smallest, largest = self.buffer[size:whole].view(key[1])
            elements = self.buffer[:size].view(key[1])[: chunk.numel]
            self._views[key] = elements, smallest, largest
        return self._views[key]


@dataclass(frozen=True, slots=True)
class _Result:
    output: _Output
    chunk: Chunk
    row: int


class _StoppedError(Exception):
    """Another thread failed; this one ends quietly."""


@dataclass
class _Pipeline:
    _job: Job
    _workspace: Workspace
    _timings: Timings = field(default_factory=Timings)
    _lock: Lock = field(default_factory=Lock)  # timings, rows that are written
    _stop: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self._ledger = Ledger(self._job)
        self._device = torch.device(self._workspace.device)
        self._copying, self._computing, self._returning = (
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch has no types
            for _ in range(3)
        )
        self._n_writers = _n_writers(self._job.plan)
        self._output_nbytes = _output_nbytes(self._job.plan, self._workspace.chunk_nbytes)
        self._slots = [
            _Slot(self._workspace.chunk_nbytes, self._device)
            for _ in range(self._workspace.n_slots)
        ]
        self._free: Queue[_Slot] = Queue()
        for slot in self._slots:
            self._free.put(slot)
        self._free_outputs: Queue[_Output] = Queue()
        for _ in range(self._n_writers + _SPARE_OUTPUTS):
            self._free_outputs.put(_Output(self._output_nbytes, self._device))
        torch.cuda.current_stream(self._device).synchronize()  # all of it is there
        self._reading_order = self._read_next()
        self._reading_order_lock = Lock()
        self._ready: dict[int, _Ready] = {}
        self._ready_changed = Condition()
        self._results: Queue[_Result | None] = Queue()
        self._unwritten_rows: dict[tuple[int, int], int] = {}  # first destination -> rows to come

    def run(self) -> Timings:
        readers = [self._read] * self._workspace.n_threads
        writers = [self._write] * self._n_writers
        functions = [self._quietly(one) for one in (self._compute, *readers, *writers)]
        try:
            run_threads(functions, stop=self._abort)
        finally:
            with suppress(RuntimeError):  # all results have arrived, or an error is on its way
                torch.cuda.synchronize(self._device)  # nothing copies any more
            for slot in self._slots:
                slot.host.unlock()
        return self._timings

    # -- one method a kind of thread

    def _read(self) -> None:
        """Fill free slots in the order in which they will be needed, and start their copies."""
        torch.cuda.set_stream(self._copying)
        seconds = 0.0
        while True:
            with self._reading_order_lock:
                item = next(self._reading_order, None)
            if item is None:
                break
            number, chunk, index, slot = item
            if slot is None:
                self._ledger.enter(chunk, take_chunk(self._job, chunk))
                continue
            slot.added.synchronize()
            watch = Stopwatch()
            self._job.checkpoints[index].read_into(chunk.pieces, slot.host.data[: chunk.nbytes])
            seconds += watch.lap()
            slot.host.lock()
            ready = _Ready(slot, slot.copy(chunk.nbytes, chunk.dtype))
            with self._ready_changed:
                self._ready[number] = ready
                self._ready_changed.notify()
        with self._lock:
            self._timings.read_seconds += seconds / self._workspace.n_threads

    def _compute(self) -> None:
        """Queue sums and roundings on the device, chunk after chunk."""
        torch.cuda.set_stream(self._computing)
        plan = self._job.plan
        arithmetic = CudaArithmetic(plan.rows, plan.recipe.accumulate, self._device)
        gram = CudaGram(self._job, self._device)
        watch, seconds, number = Stopwatch(), 0.0, 0
        for chunk in self._job.chunks(self._workspace.chunk_nbytes):
            if chunk.action is Action.TAKE:
                continue
            arithmetic.start(chunk)
            gram.start(chunk)
            for index in reversed(plan.used_checkpoints):
                seconds += watch.lap()
                ready = self._await(number)
                watch.lap()
                number += 1
                self._computing.wait_event(ready.slot.copied)
                gram.add(index, ready.values)
                complete = arithmetic.add(ready.values, index)
                ready.slot.added.record()
                self._free.put(ready.slot)
                for row in complete:
                    seconds += watch.lap()
                    output = self._take(self._free_outputs)
                    watch.lap()
                    arithmetic.finish(row, *output.parts(chunk))
                    output.rounded.record()
                    self._results.put(_Result(output, chunk, row))
            if not plan.outputs:
                self._ledger.enter(chunk)
        gram.finish()
        with self._lock:
            self._timings.arithmetic_seconds += seconds + watch.lap()
        for _ in range(self._n_writers):
            self._results.put(None)

    def _write(self) -> None:
        """Fetch results from the device and hand them to the sinks."""
        torch.cuda.set_stream(self._returning)
        host = PinnedBuffer(self._output_nbytes)
        host.tensor[::4096] = 0  # the pages are there
        host.lock()
        arrived, seconds = _event(blocking=True), 0.0
        try:
            while (result := self._take(self._results)) is not None:
                chunk, output = result.chunk, result.output
                size, whole = _extents(chunk)
                self._returning.wait_event(output.rounded)
                host.tensor[:whole].copy_(output.buffer[:whole], non_blocking=True)
                arrived.record()
                arrived.synchronize()
                self._free_outputs.put(output)
                data = host.data[: chunk.numel * chunk.output_dtype.itemsize]
                extremes = bits_view(host.tensor[size:whole].numpy(), chunk.output_dtype)
                if is_nonfinite(extremes, chunk.output_dtype).any():
                    data = memoryview(repair_nonfinite(self._job, chunk, result.row, data))
                watch = Stopwatch()
                self._job.write(result.row, chunk, data)
                seconds += watch.lap()
                if self._is_last_row(chunk):
                    self._ledger.enter(chunk)
        finally:
            with suppress(RuntimeError):  # likewise
                self._returning.synchronize()
            host.unlock()
        with self._lock:
            self._timings.write_seconds += seconds / self._n_writers

    # -- what they share

    def _read_next(self) -> Iterator[tuple[int, Chunk, int, _Slot | None]]:
        """Yield (number, chunk, checkpoint, free slot) in order; chunks to copy need no slot."""
        number = 0
        for chunk in self._job.chunks(self._workspace.chunk_nbytes):
            if chunk.action is Action.TAKE:
                yield -1, chunk, -1, None
                continue
            for index in reversed(self._job.plan.used_checkpoints):
                yield number, chunk, index, self._take(self._free)
                number += 1

    def _await(self, number: int) -> _Ready:
        with self._ready_changed:
            while number not in self._ready:
                if self._stop.is_set():
                    raise _StoppedError
                self._ready_changed.wait(_POLL_SECONDS)
            return self._ready.pop(number)

    def _is_last_row(self, chunk: Chunk) -> bool:
        """Count a row of a chunk as written; tell whether it was the last one missing."""
        key = chunk.destinations[0]
        with self._lock:
            left = self._unwritten_rows.pop(key, len(self._job.sinks)) - 1
            if left:
                self._unwritten_rows[key] = left
        return left == 0

    def _take(self, queue: "Queue[T]") -> T:
        while not self._stop.is_set():
            with suppress(Empty):
                return queue.get(timeout=_POLL_SECONDS)
        raise _StoppedError

    def _abort(self) -> None:
        self._stop.set()
        self._job.cancel()

    def _quietly(self, function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            torch.cuda.set_device(self._device)
            with suppress(_StoppedError):
                function()

        return run


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _extents(chunk: Chunk) -> tuple[int, int]:
    """Return the bytes of an output chunk, rounded up, and those with its two extreme values."""
    itemsize = chunk.output_dtype.itemsize
    size = _aligned(chunk.numel * itemsize)
    return size, size + 2 * itemsize


def _output_nbytes(plan: AveragePlan, chunk_nbytes: int) -> int:
    """Return the bytes of the largest output chunk, with its smallest and largest value."""
    growth = max(
        (output.itemsize / dtype.itemsize for dtype, output in plan.arithmetic_dtypes), default=1
    )
    return _aligned(int(growth * chunk_nbytes)) + _ALIGNMENT


def _n_writers(plan: AveragePlan) -> int:
    return min(max(_WRITERS, len(plan.outputs)), _MAX_WRITERS)


def _event(*, blocking: bool = False) -> torch.cuda.Event:
    """Return an event; waiting on a blocking one does not keep a CPU busy."""
    return torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]  # likewise
