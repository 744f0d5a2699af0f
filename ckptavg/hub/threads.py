"""Calls beside each other, and calls that can be left: in threads that nobody has to wait for.

Pools of the standard library are joined when the interpreter ends; a thread that waits for a silent
server would keep it from ending.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import TypeVar

_POLL_SECONDS = 0.2

A = TypeVar("A")
B = TypeVar("B")


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


def _started(function: Callable[[], None]) -> Thread:
    thread = Thread(target=function, daemon=True)
    thread.start()
    return thread
