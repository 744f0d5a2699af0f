"""What the engines of all devices share: workspaces, sinks, outcomes, threads."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock, Thread
from typing import Protocol

from ckptavg.plan import Action, AveragePlan, Chunk

MiB = 2**20

Progress = Callable[[int], None]  # called with the input bytes done since the last call


class Sink(Protocol):
    """Where one output goes: positional, in any order, from any thread."""

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at an offset in the data of one shard."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """How the work is cut for one device, and what memory that takes.

    Attributes:
        device: ``cpu``, or a CUDA device such as ``cuda:0``.
        n_threads: Threads that read (and on a CPU add and write).
        chunk_nbytes: Input bytes of one chunk from one checkpoint.
        n_slots: Buffers in flight; CUDA only.
        host_nbytes: Host memory the buffers take at most.
        device_nbytes: Device memory they take at most; 0 on a CPU.
    """

    device: str
    n_threads: int
    chunk_nbytes: int
    n_slots: int
    host_nbytes: int
    device_nbytes: int


@dataclass(slots=True)
class Outcome:
    """What only the data could tell: names of copied tensors that differed, in output order."""

    differing: list[str] = field(default_factory=list)


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def input_nbytes(plan: AveragePlan, chunk: Chunk) -> int:
    """Return the bytes that a chunk reads from all checkpoints together."""
    take = chunk.action is Action.TAKE
    return chunk.nbytes * (plan.n_checkpoints if take else len(plan.used_checkpoints))


def in_output_order(plan: AveragePlan, outcome: Outcome) -> Outcome:
    """Sort the outcome's names: threads finish in any order."""
    found = set(outcome.differing)
    return Outcome([tensor.name for tensor in plan.tensors if tensor.name in found])


class SharedIterator:
    """Hands the items of an iterator to several threads until it ends or is stopped."""

    def __init__(self, items: Iterator[Chunk]) -> None:
        self._items = items
        self._lock = Lock()
        self._stopped = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._items)

    def stop(self) -> None:
        """End the iteration for all threads."""
        self._stopped = True


def run_threads(functions: Sequence[Callable[[], None]], *, stop: Callable[[], None]) -> None:
    """Run functions in threads and wait for all; the first exception is raised here.

    ``stop`` is called when one of them fails, or the wait is interrupted.
    """
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)
            stop()

    threads = [Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C or a signal while waiting: let the threads end first
        stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if errors:
        raise errors[0]
