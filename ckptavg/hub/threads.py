"""Calls beside each other, and calls that can be left: in threads that nobody has to wait for.

Pools of the standard library are joined when the interpreter ends; a thread that waits for a silent
server would keep it from ending.
"""

import mmap
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from threading import Lock, Thread
from typing import TypeVar

from ckptavg.errors import MemoryBudgetError

_POLL_SECONDS = 0.2
_THREAD_NBYTES = 3 * 2**20  # what one takes to begin, beside its stack

A = TypeVar("A")
B = TypeVar("B")


class Latch:
    """A flag that threads wait for, and that a signal cannot leave locked.

    An exception that a signal raises inside ``Event.set`` can leave the lock in it held for ever;
    who sets the flag again on the way out would wait for it.
    """

    def __init__(self) -> None:
        """Begin unset."""
        self.is_set = False
        self._lock = Lock()
        self._lock.acquire()  # until it is set

    def set(self) -> None:
        """Set it; twice is allowed."""
        if not self.is_set:
            self.is_set = True
            self._lock.release()

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, at most so long; tell whether it is."""
        if self._lock.acquire(timeout=seconds):
            self._lock.release()  # for others who wait
        return self.is_set


def in_parallel(function: Callable[[A], B], items: Iterable[A], n_threads: int) -> list[B]:
    """Call a function for each item, several at once, and return what they give in order.

    An error ends it once the calls under way are over; an interrupt waits for none of them.
    """
    waiting = deque((item, Future[B]()) for item in items)
    futures = [future for _, future in waiting]

    def work() -> None:
        with suppress(IndexError):  # nothing waits any more
            while True:
                item, future = waiting.popleft()
                _settle(future, lambda item=item: function(item))  # type: ignore[misc]

    threads = [_started(work) for _ in range(min(n_threads, len(futures)))]
    try:
        return [future.result() for future in futures]
    except Exception:
        waiting.clear()
        for thread in threads:
            thread.join()
        raise
    except BaseException:
        waiting.clear()
        raise


def in_time(call: Callable[[], B], check: Callable[[], None]) -> B:
    """Return what a call returns, unless ``check``, which is called meanwhile, raises before."""
    future: Future[B] = Future()
    _started(lambda: _settle(future, call))
    while True:
        try:
            return future.result(timeout=_POLL_SECONDS)
        except TimeoutError:
            if future.done():  # it is the call's own
                raise
            check()


def _settle(future: "Future[B]", call: Callable[[], B]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)


def start(thread: Thread) -> None:
    """Start a thread, or fail: where memory is short, Python would wait for one that has died.

    Raises:
        MemoryBudgetError: If the system gives it no room, or allows no more threads.
    """
    try:
        mmap.mmap(-1, _THREAD_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        thread.start()
    except (OSError, RuntimeError) as error:
        raise MemoryBudgetError(
            "no thread can be started: the system limits the memory or the number of threads "
            "(--io-threads lowers the need)"
        ) from error


def _started(function: Callable[[], None]) -> Thread:
    thread = Thread(target=function, daemon=True)
    start(thread)
    return thread
