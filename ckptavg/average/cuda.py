"""The engine on a GPU: reader threads, a copy stream, a compute stream, writer threads.

::

    readers ──► pinned slots ──copy stream──► device inputs ──compute stream──► device outputs
       ▲           │ freed when copied                                             │ copied back
       └───────────┘                              pinned outputs ◄──return stream──┘
                                                        └──► writers ──► sink

Checkpoints arrive in order, chunk after chunk. Nothing waits on the host for the device but the
threads that release or write a buffer; every buffer is allocated once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Condition, Event, Lock
from typing import TypeVar

import torch
from torch import Tensor

from ckptavg.average.chunks import repair_nonfinite, take_chunk
from ckptavg.average.cuda_arithmetic import CudaArithmetic, workspace_nbytes
from ckptavg.average.work import (
    MiB,
    Outcome,
    Progress,
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

_CHUNK_NBYTES = 16 * MiB
_MIN_CHUNK_NBYTES = 256 * 1024
_MAX_SLOTS = 32
_MIN_SLOTS = 4
_MAX_READERS = 12
_WRITERS = 4
_OUTPUT_SLOTS = 6
_DEVICE_INPUTS = 4
_DEVICE_OUTPUTS = 3
_FIXED_NBYTES = 8 * MiB
_POLL_SECONDS = 0.1

T = TypeVar("T")


def size_cuda_workspace(
    plan: AveragePlan, device: str, *, memory_budget_bytes: int, n_threads: int | None
) -> Workspace:
    """Choose readers, chunk size and pinned slots so that host buffers fit the budget.

    Raises:
        MemoryBudgetError: If not even the smallest buffers fit.
    """
    largest = max((tensor.info.nbytes for tensor in plan.tensors), default=0)
    largest = max(largest, plan.read_nbytes // max(1, plan.n_checkpoints))
    chunk_nbytes = _CHUNK_NBYTES
    while chunk_nbytes >= 2 * max(largest, _MIN_CHUNK_NBYTES):  # a small model: pin less
        chunk_nbytes //= 2
    growth = max(
        (output.itemsize / dtype.itemsize for dtype, output in plan.arithmetic_dtypes), default=1
    )

    n_readers = n_threads or min(usable_cpus(), _MAX_READERS)

    def host_nbytes(slots: int) -> int:
        outputs = int(_OUTPUT_SLOTS * growth * chunk_nbytes)
        reading = n_readers * (READ_SCRATCH_BYTES + 2 * TAKE_CHUNK_NBYTES)
        return _FIXED_NBYTES + slots * chunk_nbytes + outputs + reading

    while host_nbytes(_MIN_SLOTS) > memory_budget_bytes and chunk_nbytes > _MIN_CHUNK_NBYTES:
        chunk_nbytes //= 2
    if host_nbytes(_MIN_SLOTS) > memory_budget_bytes:
        raise MemoryBudgetError(
            f"a memory budget of {memory_budget_bytes} bytes is too small: "
            f"at least {host_nbytes(_MIN_SLOTS)} bytes are needed (--memory)"
        )
    slots = _MAX_SLOTS
    while host_nbytes(slots) > memory_budget_bytes:
        slots -= 1
    arithmetic = max(
        (
            workspace_nbytes(chunk_nbytes, dtype, output, plan.recipe.accumulate, len(plan.rows))
            for dtype, output in plan.arithmetic_dtypes
        ),
        default=0,
    )
    return Workspace(
        device=device,
        n_threads=n_readers,
        chunk_nbytes=chunk_nbytes,
        n_slots=slots,
        host_nbytes=host_nbytes(slots),
        device_nbytes=arithmetic
        + int((_DEVICE_INPUTS + _DEVICE_OUTPUTS * growth) * chunk_nbytes)
        + 2 * MiB,
    )


def average_on_cuda(
    plan: AveragePlan,
    checkpoints: Sequence[Checkpoint],
    sinks: Sequence[Sink],
    workspace: Workspace,
    *,
    progress: Progress,
) -> Outcome:
    """Carry out a plan on a GPU; raises as ``average`` says."""
    torch.empty(0, device=workspace.device)  # starts CUDA: there are no statistics before
    torch.cuda.reset_peak_memory_stats(workspace.device)
    return _Pipeline(plan, checkpoints, sinks, workspace, progress).run()


@dataclass(frozen=True, slots=True)
class _Result:
    """An output chunk on its way back: written once ``arrived`` has happened."""

    arrived: torch.cuda.Event
    buffer: Tensor  # pinned, uint8
    finite: Tensor  # pinned, bool, (1,)
    nbytes: int
    chunk: Chunk
    row: int


class _StoppedError(Exception):
    """Another thread failed; this one ends quietly."""


class _Pipeline:
    def __init__(
        self,
        plan: AveragePlan,
        checkpoints: Sequence[Checkpoint],
        sinks: Sequence[Sink],
        workspace: Workspace,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._checkpoints = checkpoints
        self._sinks = sinks
        self._workspace = workspace
        self._progress = progress
        self._outcome = Outcome()
        self._lock = Lock()  # outcome and progress
        self._stop = Event()

        self._device = torch.device(workspace.device)
        self._items = self._reading_order()
        self._items_lock = Lock()
        self._free: Queue[Tensor] = Queue()
        self._ready: dict[int, Tensor] = {}
        self._ready_changed = Condition()
        self._copied: Queue[tuple[torch.cuda.Event, Tensor] | None] = Queue()
        self._free_outputs: Queue[tuple[Tensor, Tensor]] = Queue()
        self._results: Queue[_Result | None] = Queue()

    def run(self) -> Outcome:
        readers = [self._read] * self._workspace.n_threads
        writers = [self._write] * _WRITERS
        functions = [self._compute, self._release, *readers, *writers]
        run_threads([self._quietly(function) for function in functions], stop=self._stop.set)
        return in_output_order(self._plan, self._outcome)

    # -- one method a kind of thread

    def _read(self) -> None:
        """Fill free slots in the order in which they will be needed."""
        while True:
            slot = self._take(self._free)  # before the item, so that the next one needed has a slot
            with self._items_lock:
                item = next(self._items, None)
            if item is None:
                self._free.put(slot)
                return
            number, chunk, index = item
            if index is None:
                differing = take_chunk(self._plan, chunk, self._checkpoints, self._sinks)
                self._free.put(slot)
                self._done(chunk, differing)
                continue
            buffer = slot.numpy().data[: chunk.nbytes]
            self._checkpoints[index].read_into(chunk.pieces, buffer)
            with self._ready_changed:
                self._ready[number] = slot
                self._ready_changed.notify_all()

    def _compute(self) -> None:
        """Queue copies and sums on the device, chunk after chunk."""
        torch.cuda.set_device(self._device)
        self._allocate_pinned()
        copying, computing, returning = (_stream(self._device) for _ in range(3))
        inputs = deque(
            (self._on_device(self._workspace.chunk_nbytes), _event()) for _ in range(_DEVICE_INPUTS)
        )
        outputs = deque(
            (self._on_device(self._largest_output()), _event()) for _ in range(_DEVICE_OUTPUTS)
        )
        torch.cuda.current_stream(self._device).synchronize()
        arithmetic = CudaArithmetic(self._plan.rows, self._plan.recipe.accumulate, self._device)
        number = 0
        for chunk in self._plan.chunks(self._workspace.chunk_nbytes):
            if chunk.action is Action.TAKE:
                continue
            with torch.cuda.stream(computing):
                arithmetic.start(chunk)
            for index in self._plan.used_checkpoints:
                slot = self._await_slot(number)
                number += 1
                device_input, used = inputs[0]
                inputs.rotate(-1)
                device_input = device_input[: chunk.nbytes]
                with torch.cuda.stream(copying):
                    copying.wait_event(used)
                    device_input.copy_(slot[: chunk.nbytes], non_blocking=True)
                    copied = _event(blocking=True)
                    copied.record(copying)
                self._copied.put((copied, slot))
                with torch.cuda.stream(computing):
                    computing.wait_event(copied)
                    arithmetic.add(device_input, index)
                    used.record(computing)
            for row in range(len(self._plan.rows)):
                output, returned = outputs[0]
                outputs.rotate(-1)
                output = output[: chunk.numel * chunk.output_dtype.itemsize]
                with torch.cuda.stream(computing):
                    computing.wait_event(returned)
                    finite = arithmetic.finish(row, output)
                    rounded = _event()
                    rounded.record(computing)
                buffer, finite_buffer = self._take(self._free_outputs)
                with torch.cuda.stream(returning):
                    returning.wait_event(rounded)
                    buffer[: output.nbytes].copy_(output, non_blocking=True)
                    finite_buffer.copy_(finite.reshape(1), non_blocking=True)
                    finite.record_stream(returning)
                    returned.record(returning)
                    arrived = _event(blocking=True)
                    arrived.record(returning)
                self._results.put(
                    _Result(arrived, buffer, finite_buffer, output.nbytes, chunk, row)
                )
        self._copied.put(None)
        for _ in range(_WRITERS):
            self._results.put(None)

    def _release(self) -> None:
        """Give slots back to the readers once they have been copied to the device."""
        while (item := self._take(self._copied)) is not None:
            copied, slot = item
            copied.synchronize()
            self._free.put(slot)

    def _write(self) -> None:
        """Hand results to the sinks once they have arrived."""
        while (result := self._take(self._results)) is not None:
            result.arrived.synchronize()
            output = result.buffer.numpy().data[: result.nbytes]
            if not bool(result.finite[0]):
                output = memoryview(
                    repair_nonfinite(
                        self._plan, result.chunk, self._checkpoints, result.row, output
                    )
                )
            for shard, offset in result.chunk.destinations:
                self._sinks[result.row].write(shard, offset, output)
            self._free_outputs.put((result.buffer, result.finite))
            if result.row == len(self._plan.rows) - 1:
                self._done(result.chunk, [])

    # -- what they share

    def _reading_order(self) -> Iterator[tuple[int, Chunk, int | None]]:
        """Yield (number, chunk, checkpoint index); the index is None for a chunk to be copied."""
        number = 0
        for chunk in self._plan.chunks(self._workspace.chunk_nbytes):
            if chunk.action is Action.TAKE:
                yield -1, chunk, None
                continue
            for index in self._plan.used_checkpoints:
                yield number, chunk, index
                number += 1

    def _await_slot(self, number: int) -> Tensor:
        with self._ready_changed:
            while not self._stop.is_set():
                if number in self._ready:
                    return self._ready.pop(number)
                self._ready_changed.wait(_POLL_SECONDS)
        raise _StoppedError

    def _take(self, queue: "Queue[T]") -> T:
        while not self._stop.is_set():
            with suppress(Empty):
                return queue.get(timeout=_POLL_SECONDS)
        raise _StoppedError

    def _done(self, chunk: Chunk, differing: list[str]) -> None:
        with self._lock:
            self._outcome.differing.extend(differing)
            self._progress(input_nbytes(self._plan, chunk))

    def _quietly(self, function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with suppress(_StoppedError):
                function()

        return run

    def _allocate_pinned(self) -> None:
        for _ in range(self._workspace.n_slots):  # readers start with the first one
            self._free.put(_pinned(self._workspace.chunk_nbytes))
        for _ in range(_OUTPUT_SLOTS):
            self._free_outputs.put((_pinned(self._largest_output()), _pinned(1).view(torch.bool)))

    def _largest_output(self) -> int:
        growth = max(
            (output.itemsize / dtype.itemsize for dtype, output in self._plan.arithmetic_dtypes),
            default=1,
        )
        return int(growth * self._workspace.chunk_nbytes)

    def _on_device(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it


def _event(*, blocking: bool = False) -> torch.cuda.Event:
    """Return an event; waiting on a blocking one does not keep a CPU busy."""
    return torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]  # likewise
