"""Several processes that share one run, as torchrun starts them; or the one there usually is.

They exchange what fits in a line of JSON: that each has made the same plan, what it found, why it
failed. If one fails, all stop; if one dies, the others notice when they next meet.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from ckptavg.errors import CkptavgError, ProcessEndedError, ProcessError, UsageError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup

T = TypeVar("T")

_MEETING_TIMEOUT = timedelta(days=7)  # a rank may wait that long for one with more to do
_LOOK_SECONDS = 0.5
_FAILED_KEY = "failed"
_RUN_NUMBERS = itertools.count()
_MEMBERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    """Tell whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_process() -> bool:
    """Tell whether this is the process that speaks: the only one, or torchrun's first."""
    return not started_by_torchrun() or os.environ.get("RANK") == "0"


def check_alone(what: str, *, distributed: bool) -> None:
    """Refuse several processes.

    Raises:
        UsageError: If there are, or are to be, several.
    """
    if distributed or started_by_torchrun():
        raise UsageError(f"{what} is made by one process: leave torchrun out")


class Processes:
    """One process: nobody to wait for.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        local_rank: Number of this process on its host.
        local_size: How many there are on its host.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do something in every process, and return what each one got, in the order of ranks.

        Args:
            work: Its result must be expressible in JSON; tuples come back as lists.

        Raises:
            ProcessError: If it failed in another process; ProcessEndedError if one has ended.
            Exception: Whatever ``work`` raised in this one.
        """
        return [work()]

    def first(self, work: Callable[[], T]) -> None:
        """Do something in the first process while the others wait; raises as ``together``."""

        def work_of_the_first() -> None:
            if self.rank == 0:
                work()

        self.together(work_of_the_first)

    def share(self, items: list[int]) -> list[int]:
        """Return this process's part of some work, in one piece."""
        return items[
            len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size
        ]

    def look_out(self) -> None:
        """Raise ProcessError if another process has failed or ended; cheap, to be called often."""


class _TorchProcesses(Processes):
    """Those of one torchrun; gloo carries their words, a store tells of failures at once."""

    def __init__(
        self, store: PrefixStore, rank: int, size: int, group: ProcessGroup | None
    ) -> None:
        self.rank, self.size = rank, size
        self._group = group
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        self._store = store
        self._next_look = 0.0

    def together(self, work: Callable[[], T]) -> list[T]:
        try:
            mine: dict[str, Any] = {"result": work()}
        except ProcessError:
            raise  # it is known everywhere already
        except (Exception, SystemExit) as error:  # the user's code may call sys.exit
            kind = "" if isinstance(error, CkptavgError) else f"unexpected {type(error).__name__}: "
            self._tell(f"{kind}{error}")
            self._exchange({"failed": True})
            raise
        told = self._exchange(mine)
        for rank, one in enumerate(told):
            if "failed" in one:
                raise ProcessError(f"{self._failure(rank)}; nothing was published")
        return [one["result"] for one in told]

    def look_out(self) -> None:
        if monotonic() < self._next_look:
            return
        self._next_look = monotonic() + _LOOK_SECONDS
        try:
            failed = self._store.check([_FAILED_KEY])
        except RuntimeError as error:
            raise ProcessEndedError("the first process ended; nothing was published") from error
        if failed:
            self._exchange({"failed": True})
            raise ProcessError(f"{self._failure(None)}; nothing was published")

    def _tell(self, reason: str) -> None:
        with suppress(RuntimeError):  # the meeting that follows fails as well, and says so
            self._store.set(_FAILED_KEY, json.dumps([self.rank, reason]))

    def _failure(self, rank: int | None) -> str:
        try:
            rank, reason = json.loads(self._store.get(_FAILED_KEY))
        except (RuntimeError, ValueError):
            return f"rank {rank} failed"
        return f"rank {rank} failed: {reason}"

    def _exchange(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """Give every process's words to every process; not pickled, so nothing can run."""
        import torch
        from torch import distributed

        try:
            words = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            distributed.all_gather(lengths, torch.tensor([len(words)]), self._group)
            longest = int(max(lengths))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(words)] = words
            gathered = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            distributed.all_gather(gathered, padded, self._group)
        except RuntimeError as error:  # what torch raises when a connection breaks
            raise ProcessEndedError("another process ended; nothing was published") from error
        return [
            json.loads(bytes(one[: int(length)].tolist()))
            for one, length in zip(gathered, lengths, strict=True)
        ]


@contextmanager
def joined_processes(*, distributed: bool) -> Iterator[Processes]:
    """Join the processes that torchrun started, or those of the process group there is.

    Args:
        distributed: Whether to look for others; if not, this process is the only one.

    Raises:
        UsageError: If there is nobody to join: the process was not started by torchrun.
        ProcessError: If the others cannot be reached.
    """
    if not distributed:
        yield Processes()
        return
    from torch import distributed as torch_distributed
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
    from torch.distributed.rendezvous import rendezvous

    is_ours = not torch_distributed.is_initialized()
    if is_ours and (missing := [name for name in _MEMBERS if name not in os.environ]):
        raise UsageError(f"distributed: {missing[0]} is not set; start the processes with torchrun")
    # words of an earlier run in these processes must not be taken for those of this one
    prefix = f"ckptavg/{next(_RUN_NUMBERS)}"
    group: ProcessGroup | None = None
    try:
        if is_ours:
            store, rank, size = next(rendezvous("env://"))
            store = PrefixStore(prefix, store)
            torch_distributed.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=_MEETING_TIMEOUT
            )
        else:  # a training script's, perhaps for GPUs only
            store = PrefixStore(prefix, _get_default_store())
            rank, size = torch_distributed.get_rank(), torch_distributed.get_world_size()
            group = torch_distributed.new_group(backend="gloo", timeout=_MEETING_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"cannot join the other processes: {error}") from error
    try:
        yield _TorchProcesses(store, rank, size, group)
    finally:
        torch_distributed.destroy_process_group(group)
