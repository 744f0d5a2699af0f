"""Memory that is bounded, whatever the checkpoints: it is enough, or one line says it is not.

Limits are set from outside: on what a process maps (``RLIMIT_DATA``), and on the memory and the
threads of its control group.
"""

import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Timer

import pytest
from hostile import entry

from faults.mounts import MissingError
from faults.runs import Finished, Runner, Runners
from faults.tally import CountCases

_MB = 2**20
_BUDGET_BYTES = 64 * _MB
_BUDGET = ("--memory", "64MiB")
_MAX_THREADS = 8  # where two read: those that work, those that go on beside, the first
_STACK_BYTES = 8 * _MB
_INTERPRETER_BYTES = 64 * _MB  # Python, numpy, and their libraries
_MAX_SECONDS = 10
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_GROUP_NUMBERS = count()
_IN_GROUP = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
_TAKE_BYTES = "import sys; taken = b'x' * int(sys.argv[1])"
_LINE = re.compile(r"ckptavg: error: (?!unexpected)[^\n]*(memory|thread)[^\n]*\n")

# numbers of checkpoints, and elements of each tensor: of 24 MiB in all, and of 96 MiB in one
SHAPES: Mapping[str, tuple[int, Sequence[int]]] = {
    "2 checkpoints": (2, [_MB] * 6),
    "8 checkpoints": (8, [_MB] * 6),
    "32 checkpoints": (32, [_MB] * 6),
    "large tensors": (3, [24 * _MB, 3]),
}
OPTIONS: Mapping[str, Sequence[str]] = {
    "plain": (),
    "one thread": ("--io-threads", "1"),
    "torch file": ("--output-format", "torch"),
    "compared": ("--check-trajectory", "--io-threads", "2"),
}
MARGINS_BYTES = (
    *(n * 2**14 for n in (0, 1, 2, 4, 8, 12, 16, 24, 32, 48)),
    *(n * _MB for n in (1, 2, 3, 4, 6, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80)),
    *(n * _MB for n in (96, 112, 128, 160, 192, 256)),
)
N_PROCESSES = (1, 2, 3, 4, 6, 10)


class Checkpoints:
    """Safetensors files with tensors that are zero but for the first and the last value.

    They take no room on the disk but for these.
    """

    def __init__(self, directory: Path, n_checkpoints: int, numels: Sequence[int]) -> None:
        self.directory = directory
        self.sources = [f"step-{number}.safetensors" for number in range(n_checkpoints)]
        self._numels = numels
        directory.mkdir()
        for number, source in enumerate(self.sources):
            self._write(directory / source, number)

    def is_mean(self, output: str) -> bool:
        """Tell whether an output is the mean of all."""
        mean = struct.pack("<f", (len(self.sources) - 1) / 2)
        with (self.directory / output / "model.safetensors").open("rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(nbytes))
            for index in range(len(self._numels)):
                start, stop = header[f"w{index}"]["data_offsets"]
                for position in (start, stop - len(mean)):
                    file.seek(8 + nbytes + position)
                    if file.read(len(mean)) != mean:
                        return False
        return True

    def left(self, output: str) -> list[str]:
        """Return what there is of an output, or of making it."""
        found = {path.name for path in self.directory.iterdir()}
        return sorted(name for name in found if name == output or name.startswith(f"{output}."))

    def clear(self, output: str) -> None:
        """Remove that."""
        for name in self.left(output):
            path = self.directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write(self, path: Path, number: int) -> None:
        header, position = {}, 0
        for index, numel in enumerate(self._numels):
            header[f"w{index}"] = entry("F32", [numel], position, position + 4 * numel)
            position += 4 * numel
        text, value = json.dumps(header).encode(), struct.pack("<f", number)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            position = file.tell()
            for numel in self._numels:
                file.seek(position)
                file.write(value)
                position += 4 * numel
                file.seek(position - len(value))
                file.write(value)


@pytest.fixture(scope="session")
def tmp_path_factory(request: pytest.FixtureRequest) -> pytest.TempPathFactory:
    """Return pytest's own: files in memory would count as memory here."""
    return pytest.TempPathFactory.from_config(request.config, _ispytest=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Checkpoints]:
    """Return checkpoints of all shapes, by name."""
    directory = tmp_path_factory.mktemp("memory")
    return {
        name: Checkpoints(directory / name.replace(" ", "-"), *shape)
        for name, shape in SHAPES.items()
    }


def run_in_time(
    runner: Runner, arguments: Sequence[str], directory: Path, margin_bytes: int
) -> Finished:
    """Run with so much more memory to map than at the beginning; what takes too long is killed."""
    timers: list[Timer] = []

    def watch(process: int) -> None:
        timers.append(Timer(_MAX_SECONDS, os.kill, (process, signal.SIGKILL)))
        timers[0].start()

    try:
        limits = {"data_margin": margin_bytes}
        return runner.run(arguments, directory, limits=limits, meanwhile=watch)
    finally:
        for timer in timers:
            timer.cancel()


@contextmanager
def control_group(controller: str, limit: str, value: int) -> Iterator[Path]:
    """Make a group of processes that take no more than so much together.

    Args:
        controller: ``memory`` or ``pids``.
        limit: Name of the limit in version 2.
        value: What it is.

    Raises:
        MissingError: If this process may not, or the system has no such groups.
    """
    name = f"ckptavg-tests-{os.getpid()}-{next(_GROUP_NUMBERS)}"
    if (_CONTROL_GROUPS / "cgroup.controllers").exists():
        group = _CONTROL_GROUPS / name
    else:
        group = _CONTROL_GROUPS / controller / name
        limit = {"memory.max": "memory.limit_in_bytes"}.get(limit, limit)
    try:
        group.mkdir()
    except OSError as error:
        raise MissingError(f"needs a control group for {controller}: {error.strerror}") from error
    try:
        try:
            (group / limit).write_text(str(value))
        except OSError as error:
            raise MissingError(f"needs to set {limit}: {error.strerror}") from error
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Remove a group as soon as its last process is gone."""
    for _ in range(100):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"{group}: is in use")


def run_in_group(group: Path, arguments: Sequence[str], directory: Path) -> tuple[int | None, str]:
    """Run Python in a group; return the exit code, None if it takes too long, and stderr."""
    command = ["sh", "-c", _IN_GROUP, str(group), sys.executable, *arguments]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False,
            timeout=_MAX_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stderr


def wrong_after(code: int | None, stderr: str, left: Sequence[str]) -> str:
    """Return what is wrong after a run that had too little; empty if nothing is."""
    if code in (None, -signal.SIGKILL):
        return f"takes too long: {stderr}"
    if code != 1 or _LINE.fullmatch(stderr) is None:
        return f"exit code {code}: {stderr}"
    return f"left {left}" if left else ""


@pytest.mark.promise(9)
def test_the_same_memory_is_enough_for_any_number_of_checkpoints(
    checkpoints: Mapping[str, Checkpoints], runners: Runners, count_cases: CountCases
) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    stack_bytes = _STACK_BYTES if soft == resource.RLIM_INFINITY else soft
    margin_bytes = _BUDGET_BYTES + _MAX_THREADS * stack_bytes

    def wrong(runner: Runner, name: str) -> str:
        some = checkpoints[name]
        arguments = ["average", *some.sources, "-o", "mapped", *_BUDGET, "--io-threads", "2"]
        finished = run_in_time(runner, arguments, some.directory, margin_bytes)
        return "" if finished.code == 0 and some.is_mean("mapped") else f"{name}: {finished}"

    found = runners.map(wrong, SHAPES)
    assert not [one for one in found if one]
    count_cases(len(found))


@pytest.mark.promise(9)
def test_a_control_group_of_the_same_size_is_enough_for_any_number_of_checkpoints(
    checkpoints: Mapping[str, Checkpoints], tmp_path: Path, count_cases: CountCases
) -> None:
    """One that takes more is killed; what the system keeps of files does not count for long."""
    most_bytes = _BUDGET_BYTES + _INTERPRETER_BYTES

    def wrong(name: str) -> str:
        some = checkpoints[name]
        arguments = ["-m", "ckptavg", "average", *some.sources, "-o", "grouped", *_BUDGET]
        with control_group("memory", "memory.max", most_bytes) as group:
            code, stderr = run_in_group(group, arguments, some.directory)
        return "" if code == 0 and some.is_mean("grouped") else f"{name}: {code} {stderr}"

    if _is_in_memory(tmp_path):
        pytest.skip("needs temporary files on a disk: others count as memory")
    try:
        with control_group("memory", "memory.max", most_bytes) as group:
            code, _ = run_in_group(group, ["-c", _TAKE_BYTES, str(most_bytes)], tmp_path)
        assert code == -signal.SIGKILL
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(wrong, SHAPES))
    except MissingError as error:
        pytest.skip(str(error))
    assert not [one for one in found if one]
    count_cases(len(found))


def _is_in_memory(path: Path) -> bool:
    command = ["stat", "--file-system", "--format", "%T", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found in ("tmpfs", "ramfs")


@pytest.mark.promise(9)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_too_little_memory_is_told_in_one_line(
    options: Sequence[str],
    checkpoints: Mapping[str, Checkpoints],
    runners: Runners,
    count_cases: CountCases,
) -> None:
    some = checkpoints["8 checkpoints"]

    def wrong(runner: Runner, margin_bytes: int) -> tuple[int, str]:
        output = f"with-{margin_bytes}-more"
        arguments = ["average", *some.sources, "-o", output, *_BUDGET, *options]
        done = run_in_time(runner, arguments, some.directory, margin_bytes)
        found = "" if done.code == 0 else wrong_after(done.code, done.stderr, some.left(output))
        some.clear(output)
        return done.code, found and f"{margin_bytes} bytes: {found}"

    found = runners.map(wrong, MARGINS_BYTES)
    assert not [one for _, one in found if one]
    assert found[0][0] == 1
    assert found[-1][0] == 0
    count_cases(len(found))


@pytest.mark.promise(9)
def test_threads_that_cannot_be_started_are_told_in_one_line(
    checkpoints: Mapping[str, Checkpoints], count_cases: CountCases
) -> None:
    some = checkpoints["2 checkpoints"]

    def wrong(n_processes: int) -> tuple[int | None, str]:
        output = f"with-{n_processes}-threads"
        arguments = ["-m", "ckptavg", "average", *some.sources, "-o", output]
        with control_group("pids", "pids.max", n_processes) as group:
            code, stderr = run_in_group(group, arguments, some.directory)
        found = "" if code == 0 else wrong_after(code, stderr, some.left(output))
        some.clear(output)
        return code, found and f"{n_processes} processes: {found}"

    try:
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(wrong, N_PROCESSES))
    except MissingError as error:
        pytest.skip(str(error))
    assert not [one for _, one in found if one]
    assert found[0][0] == 1
    count_cases(len(found))
