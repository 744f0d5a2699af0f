"""Run contenders in turn, each as a fresh process, and take the medians of what they needed."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .inputs import file_sizes

ROOT = Path(__file__).resolve().parents[2]
_RSS_ANON = re.compile(rb"RssAnon:\s*(\d+)")
_WHOLE = 0.99  # an output smaller than this part of what is due is not one


class BenchmarkError(Exception):
    """A contender failed, or did not write what it should have."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One or more commands, run one after another, that write below ``output``."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    output: Path
    due_nbytes: int  # that the output has at least
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a contender needed once; of several commands the sums, and the largest peak.

    Attributes:
        seconds: Wall time, the start of the processes included.
        cpu_seconds: User and system time.
        anonymous_bytes: Largest RssAnon of the process and its descendants together, sampled every
            2 ms (a search for new descendants every 100 ms), so short peaks can be missed.
        reports: The JSON that each command printed, empty where it printed none.
    """

    seconds: float
    cpu_seconds: float
    anonymous_bytes: int
    reports: tuple[dict[str, Any], ...]


def measure(
    contenders: Sequence[Contender], repeats: int, say: Callable[[str], None]
) -> dict[str, list[Run]]:
    """Run A B C, B C A, C A B, ... ``repeats`` times after a round that does not count.

    Each is first in its turn: what one leaves behind (free memory, a busy disk) meets all others.

    That first round also brings the inputs into the page cache. Before each run earlier outputs
    are deleted and the system is synced, so that nobody pays for what another left to write.

    Raises:
        BenchmarkError: If a contender fails; its stderr is in the message.
    """
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for number in range(repeats + 1):
        say(f"round {number} of {repeats}" if number else "warm-up round")
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            shutil.rmtree(contender.output, ignore_errors=True)
            os.sync()
            runs[contender.name].append(_run(contender))
            shutil.rmtree(contender.output)
    return {name: counted for name, (_, *counted) in runs.items()}


def typical(runs: Sequence[Run], field: str = "seconds") -> float:
    """Return the median of a field over runs."""
    values: list[float] = [getattr(run, field) for run in runs]
    return median(values)


def ratio(runs: Sequence[Run], others: Sequence[Run]) -> float:
    """Return the median of the ratios of wall times, round by round."""
    return median(one.seconds / two.seconds for one, two in zip(runs, others, strict=True))


def memory_warning(nbytes: int) -> str | None:
    """Tell if the page cache is unlikely to hold so much."""
    text = Path("/proc/meminfo").read_text()
    available = int(re.findall(r"MemAvailable:\s*(\d+)", text)[0]) * 1024
    if available >= nbytes:
        return None
    return (
        f"warning: inputs and two outputs take {nbytes / 1e9:.1f} GB, {available / 1e9:.1f} GB of "
        "memory are available: the disk will be measured, not the contenders"
    )


def _run(contender: Contender) -> Run:
    runs = [_run_command(command, contender.environment) for command in contender.commands]
    written = sum(file_sizes([contender.output]))
    if written < _WHOLE * contender.due_nbytes:
        raise BenchmarkError(f"{contender.name} wrote {written} of {contender.due_nbytes} bytes")
    return Run(
        seconds=sum(run.seconds for run in runs),
        cpu_seconds=sum(run.cpu_seconds for run in runs),
        anonymous_bytes=max(run.anonymous_bytes for run in runs),
        reports=tuple(report for run in runs for report in run.reports),
    )


def _run_command(command: Sequence[str], more: Mapping[str, str]) -> Run:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **more}
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)
        with _MemorySampler(process.pid) as sampler:
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
            seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode != 0:
            message = stderr.read().decode(errors="replace")
            raise BenchmarkError(f"{' '.join(command)}: exit {process.returncode}\n{message}")
        try:
            report = json.loads(stdout.read())
        except ValueError:
            report = {}
    return Run(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        anonymous_bytes=sampler.peak_bytes,
        reports=(report,),
    )


class _MemorySampler:
    """Watches the anonymous memory of a process and its descendants while the context lasts."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        family, searched = {self._pid}, 0.0
        while not self._ended.wait(0.002):
            if time.perf_counter() - searched > 0.1:
                family, searched = _family(self._pid), time.perf_counter()
            self.peak_bytes = max(self.peak_bytes, sum(map(_anonymous_bytes, family)))


def _anonymous_bytes(pid: int) -> int:
    try:
        found = _RSS_ANON.search(Path(f"/proc/{pid}/status").read_bytes())
    except OSError:  # it has ended
        return 0
    return int(found[1]) * 1024 if found else 0


def _family(pid: int) -> set[int]:
    """Return a process and its descendants; not every kernel lists the children of one."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    family = {pid}
    while more := {one for one, parent in parents.items() if parent in family} - family:
        family |= more
    return family
