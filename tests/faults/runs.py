"""Runs of the command line, with system calls that fail or kill, and what they leave behind."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from faults.case import good_safetensors

_TESTS = Path(__file__).parent.parent
_STRACE = shutil.which("strace")
_ATTACH_SECONDS = 20
_RUN_SECONDS = 60

# set by ``python -m tests.faults``; every change is tried with a share, to be done in time
THOROUGH = bool(os.environ.get("FAULTS_THOROUGH"))
_SHARE = 4

Item = TypeVar("Item")
Found = TypeVar("Found")


def _can_trace() -> bool:
    if _STRACE is None:
        return False
    command = [_STRACE, "-e", "inject=getppid:error=EIO", "-o", os.devnull, "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


CAN_TRACE = _can_trace()
WHY_NOT_TRACED = "needs strace, and leave to trace processes"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a run ended.

    Attributes:
        code: Its exit code; negative is the signal that ended it.
        stdout: What it printed there.
        stderr: Likewise.
        seconds: How long it took.
        cpu_seconds: How long it computed, alone or in the kernel.
        peak_rss_bytes: The most memory it had, with what it shares with others.
        trace: What strace wrote, one line a call; empty if it was not traced.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    trace: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """What strace looks at, and what it does there.

    Attributes:
        calls: Names of system calls.
        paths: Only those that concern one of these paths; all if empty.
        fault: strace's words, such as ``error=EIO`` or ``signal=KILL``; None only looks.
        when: Which of a thread's calls is meant, from 1 on; 0 for all of them.
    """

    calls: Sequence[str]
    paths: Sequence[str] = ()
    fault: str | None = None
    when: int = 0

    def arguments(self) -> list[str]:
        """Return strace's arguments."""
        names = ",".join(self.calls)
        arguments = ["-f", "-y", "-q", "-e", f"trace={names}", "-e", "signal=none"]
        for path in self.paths:
            arguments += ["-P", path]
        if self.fault is not None:
            when = f":when={self.when}" if self.when else ""
            arguments += ["-e", f"inject={names}:{self.fault}{when}"]
        return arguments


class Runner:
    """Runs command lines one after the other, each in a fresh process; a context manager."""

    def __init__(self, *, loads: Sequence[str] = ()) -> None:
        """Start what forks them.

        Args:
            loads: Modules that it loads beforehand, such as ``torch.distributed``.
        """
        self._directory = Path(tempfile.mkdtemp(prefix="ckptavg-faults-"))
        source = self._directory / "one.safetensors"
        source.write_bytes(good_safetensors())
        warm_up = ["average", str(source), "-o", str(self._directory / "warm"), "--quiet"]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "faults.fork_server", *warm_up],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=_TESTS,
            env={
                **os.environ,
                "OPENBLAS_NUM_THREADS": "1",
                "PYTHONPATH": str(_TESTS),
                "FAULTS_LOADS": ",".join(loads),
            },
        )
        self._number = 0
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(_RUN_SECONDS)
        self._server.stdout.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def run(
        self,
        arguments: Sequence[str],
        directory: Path,
        *,
        tracing: Tracing | None = None,
        limits: Mapping[str, int] | None = None,
        environment: Mapping[str, str] | None = None,
        stdout: str | None = "",
        stderr: str | None = "",
        block_nbytes: int | None = None,
        meanwhile: Callable[[int], None] | None = None,
    ) -> Finished:
        """Run a command line to its end.

        Args:
            arguments: What follows ``ckptavg``.
            directory: Where it runs.
            tracing: What strace does to it.
            limits: ``data_margin``, ``data``, ``fsize``: see ``fork_server``; bytes.
            environment: Variables that differ.
            stdout: A file that takes it, None for a closed one; empty to have it returned.
            stderr: Likewise.
            block_nbytes: How large the blocks of the work are, if not as usual.
            meanwhile: Called with the process's number as soon as it runs.
        """
        self._number += 1
        log = self._directory / f"{self._number}.trace"
        texts = [self._directory / f"{self._number}.{name}" for name in ("out", "err")]
        request = {
            "arguments": [*arguments],
            "directory": str(directory),
            "environment": dict(environment or {}),
            "limits": dict(limits or {}),
            "block_nbytes": block_nbytes,
            "stdin": os.devnull,
            "stdout": str(texts[0]) if stdout == "" else stdout,
            "stderr": str(texts[1]) if stderr == "" else stderr,
        }
        self._tell(json.dumps(request))
        process = int(self._answer()["process"])
        with self._traced(process, tracing, log):
            self._tell("go")
            try:
                if meanwhile is not None:
                    meanwhile(process)
            finally:
                answer = self._answer()
        found = [path.read_text() if path.exists() else "" for path in texts]
        trace = log.read_text(errors="replace").splitlines() if log.exists() else []
        for path in (*texts, log):
            path.unlink(missing_ok=True)
        return Finished(stdout=found[0], stderr=found[1], trace=trace, **answer)

    @contextlib.contextmanager
    def _traced(self, process: int, tracing: Tracing | None, log: Path) -> Iterator[None]:
        if tracing is None:
            yield
            return
        assert _STRACE is not None
        command = [_STRACE, *tracing.arguments(), "-o", str(log), "-p", str(process)]
        command.remove("-q")  # it tells when it is attached
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            line = tracer.stderr.readline()
            if "attached" not in line:
                raise RuntimeError(f"strace does not attach: {line}")
            yield
            tracer.stderr.read()

    def _tell(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(line.encode() + b"\n")
        self._server.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the fork server has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Runners:
    """One runner for each core; a context manager."""

    def __init__(self) -> None:
        """Start them."""
        self._all = [Runner() for _ in range(max(len(os.sched_getaffinity(0)), 1))]
        self._free: SimpleQueue[Runner] = SimpleQueue()
        for runner in self._all:
            self._free.put(runner)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for runner in self._all:
            runner.__exit__(kind, error, traceback)

    @staticmethod
    def some(items: Sequence[Item]) -> Sequence[Item]:
        """Return a share of what there is to try; all of it where that was asked for."""
        return items if THOROUGH else items[::_SHARE]

    def map(self, task: Callable[[Runner, Item], Found], items: Iterable[Item]) -> list[Found]:
        """Return what a task finds for each item, in order; each has a runner for itself."""

        def work(item: Item) -> Found:
            runner = self._free.get()
            try:
                return task(runner, item)
            finally:
                self._free.put(runner)

        with ThreadPoolExecutor(len(self._all)) as threads:
            return list(threads.map(work, items))

    @contextlib.contextmanager
    def one(self) -> Iterator[Runner]:
        """Lend a runner."""
        runner = self._free.get()
        try:
            yield runner
        finally:
            self._free.put(runner)
