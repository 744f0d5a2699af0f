"""The calls that a run makes, one by one, and scenarios in which a fault is put at one of them."""

import re
import signal
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from faults.runs import Finished, Runner, Runners, Tracing
from faults.scenarios import Kind, Scenario

CHANGING = (
    "mkdir", "rmdir", "unlink", "unlinkat", "rename", "renameat2", "openat", "write", "pwrite64",
    "fallocate", "ftruncate", "fsync", "fdatasync", "flock", "close",
)  # fmt: skip
READING = ("openat", "preadv2", "pread64", "read", "newfstatat", "getdents64", "statfs", "lseek")
_CALL = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\((?P<rest>.*)")
_HERE = re.compile(r"AT_FDCWD<[^>]*>")
_PATH = re.compile(r'[<"](/[^">]*)[">]')


class Point(NamedTuple):
    """A call that a thread makes: what, on which path, which of them; whether it makes a file."""

    call: str
    path: str
    when: int
    creates: bool = False


def points(scenario: Scenario, runner: Runner, calls: Sequence[str]) -> list[Point]:
    """Return every call of a run that concerns a file in the scenario's directory."""
    scenario.reset()
    counts: Counter[tuple[str, str, str]] = Counter()
    found: dict[Point, None] = {}
    for line in scenario.run(runner, tracing=Tracing(calls=calls)).trace:
        match = _CALL.match(line)
        if match is None:
            continue
        for path in {*_PATH.findall(_HERE.sub("", match["rest"]))}:
            if path.startswith(f"{scenario.directory}/") or path == str(scenario.directory):
                one = match["thread"], match["name"], scenario.template(path)
                counts[one] += 1
                found[Point(*one[1:], counts[one], "O_CREAT" in match["rest"])] = None
    return list(found)


def with_fault(scenario: Scenario, runner: Runner, point: Point, fault: str) -> Finished | None:
    """Run with a fault at a point; None if the run went another way and did not come by."""
    scenario.reset()
    tracing = Tracing(
        calls=(point.call,), paths=(scenario.path(point.path),), fault=fault, when=point.when
    )
    finished = scenario.run(runner, tracing=tracing)
    is_hit = finished.code == -signal.SIGKILL or any("(INJECTED)" in one for one in finished.trace)
    return finished if is_hit else None


class Arena:
    """Every runner with a scenario of its own."""

    def __init__(self, runners: Runners, directory: Path) -> None:
        self._runners = runners
        self._directory = directory
        self._scenarios: dict[tuple[str, int], Scenario] = {}
        self._numbers = count()

    def scenario(self, kind: Kind, runner: Runner) -> Scenario:
        key = kind.name, id(runner)
        if key not in self._scenarios:
            place = self._directory / f"{kind.name.replace(' ', '-')}-{next(self._numbers)}"
            self._scenarios[key] = Scenario(kind, place, runner)
        return self._scenarios[key]

    def points(self, kind: Kind, calls: Sequence[str]) -> list[Point]:
        with self._runners.one() as runner:
            return points(self.scenario(kind, runner), runner, calls)
