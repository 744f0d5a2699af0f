"""Runs that are held up right after a system call, so that something else happens in between."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event, Thread

from faults.arena import Point
from faults.runs import Finished, Runner, Tracing

_LOOK_SECONDS = 0.001
_N_LOOKS = 4  # at which it stands still
_GO_SECONDS = 0.003
_WAIT_SECONDS = 20


def run_paused(
    runner: Runner,
    arguments: Sequence[str],
    directory: Path,
    *,
    after: Point,
    then: Callable[[], object],
    opened: Path | None = None,
    block_nbytes: int | None = None,
) -> Finished:
    """Run a command line that stops after a call, do something, and let it go on.

    Args:
        runner: What runs it.
        arguments: What follows ``ckptavg``.
        directory: Where it runs.
        after: The call, with the path in full.
        then: What happens while it stands still; also if it ended without making the call.
        opened: A file that it must have opened before; None does not look.
        block_nbytes: As for ``Runner.run``.
    """
    over = Event()

    def meanwhile(process: int) -> None:
        _wait_until_stopped(process, opened)
        try:
            then()
        finally:  # again and again: other threads may come by the same call
            threads.append(Thread(target=_let_go, args=(process, over)))
            threads[-1].start()

    threads: list[Thread] = []
    try:
        return runner.run(
            arguments,
            directory,
            tracing=Tracing(
                calls=(after.call,), paths=(after.path,), fault="signal=SIGSTOP", when=after.when
            ),
            meanwhile=meanwhile,
            block_nbytes=block_nbytes,
        )
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _wait_until_stopped(process: int, opened: Path | None) -> None:
    """Wait until a traced process stands still, or has ended."""
    deadline = time.monotonic() + _WAIT_SECONDS
    n_looks = 0
    while n_looks < _N_LOOKS and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        state = _state(process)
        if state in ("", "Z"):
            return
        stands_still = state == "t" and (opened is None or opened in _open_files(process))
        n_looks = n_looks + 1 if stands_still else 0


def _state(process: int) -> str:
    """Return the letter that proc(5) has for it; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1]
    return ""


def _open_files(process: int) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield descriptor.readlink()


def _let_go(process: int, over: Event) -> None:
    while not over.is_set():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)
        over.wait(_GO_SECONDS)
