"""What the engines of all devices share: workspaces, sinks, finished blocks, timings, threads."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from time import perf_counter
from typing import Generic, Protocol, TypeVar

from ckptavg.blocks import Action, Chunk, Differing
from ckptavg.checkpoint import Checkpoint
from ckptavg.geometry import GramTable
from ckptavg.hub.threads import start
from ckptavg.plan import AveragePlan

MiB = 2**20
Item = TypeVar("Item")

Progress = Callable[[int], None]  # called with the input bytes done since the last call


class Sink(Protocol):
    """Where one output goes: positional, in any order, from any thread."""

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at an offset in the data of one shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """How the work is cut for one device, and what memory that takes.

    Attributes:
        device: ``cpu``, or a CUDA device such as ``cuda:0``.
        n_threads: Threads that read (and on a CPU add and write).
        max_threads: On a CPU, how many there may be where reading mostly waits for the storage.
        chunk_nbytes: Input bytes of one chunk from one checkpoint.
        n_slots: Chunks in flight; CUDA only.
        host_nbytes: Host memory that the buffers of ``n_threads`` take.
        max_host_nbytes: Host memory that those of ``max_threads`` take.
        device_nbytes: Device memory they take; 0 on a CPU.
    """

    device: str
    n_threads: int
    max_threads: int
    chunk_nbytes: int
    n_slots: int = 0
    host_nbytes: int
    max_host_nbytes: int
    device_nbytes: int = 0


@dataclass(slots=True)
class Timings:
    """Seconds that each kind of work kept a run busy; work done by n threads counts 1/n.

    Attributes:
        read_seconds: Reading inputs.
        arithmetic_seconds: Decoding, adding, dividing, rounding; on a GPU waiting for it, too.
        write_seconds: Writing outputs into the page cache.
    """

    read_seconds: float = 0.0
    arithmetic_seconds: float = 0.0
    write_seconds: float = 0.0

    def add(self, other: "Timings", *, share: float = 1.0) -> None:
        """Add what another thread or process measured."""
        self.read_seconds += other.read_seconds * share
        self.arithmetic_seconds += other.arithmetic_seconds * share
        self.write_seconds += other.write_seconds * share


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an engine is to do.

    Attributes:
        plan: From ``plan_average``.
        checkpoints: Those the plan was made from, in the same order.
        sinks: One an output of the plan.
        blocks: Numbers of the plan's blocks to work on.
        finished: Called once a block is written to all sinks, with what differed in it; from any
            thread, one at a time.
        progress: Called with input bytes done, from one thread at a time.
        gram: Where inner products of the checkpoints are added, for a plan that compares them.
    """

    plan: AveragePlan
    checkpoints: Sequence[Checkpoint]
    sinks: Sequence[Sink]
    blocks: Sequence[int]
    finished: Callable[[int, Differing], None]
    progress: Progress
    gram: GramTable | None = None

    def chunks(self, max_nbytes: int) -> Iterator[Chunk]:
        """Cut the blocks into chunks; see ``AveragePlan.chunks``."""
        return self.plan.chunks(max_nbytes, self.blocks)

    def cancel(self) -> None:
        """Make reads that wait for a network fail soon."""
        for checkpoint in self.checkpoints:
            checkpoint.cancel()

    def write(self, row: int, chunk: Chunk, data: memoryview) -> None:
        """Write a finished chunk of one output, under every name it has."""
        for shard, offset in chunk.destinations:
            self.sinks[row].write(shard, offset, data)


@dataclass(slots=True)
class Ledger:
    """Counts the parts of blocks that are done, and reports each block when it is whole."""

    job: Job
    _done_numel: Counter[int] = field(default_factory=Counter)
    _differing: dict[int, Differing] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def enter(self, chunk: Chunk, differing: Iterable[tuple[int, str]] = ()) -> None:
        """Note that a chunk is written to all sinks."""
        with self._lock:
            self._differing.setdefault(chunk.block, set()).update(differing)
            self._done_numel[chunk.block] += chunk.numel
            if self._done_numel[chunk.block] == self.job.plan.blocks[chunk.block].numel:
                del self._done_numel[chunk.block]
                self.job.finished(chunk.block, self._differing.pop(chunk.block))
            self.job.progress(chunk.nbytes * len(self.job.plan.used_checkpoints))


class SharedIterator(Generic[Item]):
    """Hands the items of an iterator to several threads until it ends or is stopped."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._lock = Lock()
        self._stopped = False

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._items)

    def stop(self) -> None:
        """End the iteration for all threads."""
        self._stopped = True


class Stopwatch:
    """Measures one thing after the other in one thread."""

    def __init__(self) -> None:
        self._last = perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, or the start."""
        last, self._last = self._last, perf_counter()
        return self._last - last


def usable_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, and its control group's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpu_quota()
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def _cgroup_cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return how many CPUs' time the control group of a container may use; None if unlimited."""
    try:  # version 2, then version 1
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such files; "max"
        return None


def averaged_chunk_nbytes(plan: AveragePlan, max_nbytes: int) -> int:
    """Return the input bytes of the largest chunk to be averaged, from one checkpoint."""
    averaged = (block.nbytes for block in plan.blocks if block.action is Action.AVERAGE)
    return min(max(averaged, default=0), max_nbytes)


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
    interruption: BaseException | None = None
    try:
        for thread in threads:
            start(thread)
    except BaseException as error:
        interruption = error
        stop()
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as error:  # Ctrl-C, perhaps twice: let the threads end first
                interruption = interruption or error
                stop()
    if interruption is not None:
        raise interruption
    if errors:
        raise errors[0]
