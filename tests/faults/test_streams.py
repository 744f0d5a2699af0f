"""Standard streams that are closed or full, or that nobody reads: they do not change what is done.

What was published is published, whether or not it can be told; the exit code says so. Real
processes, for what Python does at its own end is part of it.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.scenarios import OUTPUT, checkpoint_bytes, summary
from faults.tally import CountCases

_PROGRAM = (sys.executable, "-m", "ckptavg")
_SECONDS = 60
_FULL, _GONE, _CLOSED = "full", "gone", "closed"
_ERROR = re.compile(r"^ckptavg: error: |^Error: ", re.MULTILINE)
_FROM_PYTHON = ("Traceback", "Exception ignored", "lost sys.std")
_MADE = "made"
_SOURCES = ("step-1.safetensors", "step-2.safetensors")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line.

    Attributes:
        name: What messages call it.
        arguments: What follows ``ckptavg``.
        code: How it ends if all can be told.
        code_if_full: How it ends if the storage takes nothing that goes to stdout.
        publishes: Whether it makes an output.
    """

    name: str
    arguments: Sequence[str]
    code: int = 0
    code_if_full: int = 1
    publishes: bool = False


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What becomes of what is printed: full, gone, closed, or read if None."""

    name: str
    stdin: str | None = None
    stdout: str | None = None
    stderr: str | None = None


AVERAGE = ("average", *_SOURCES, "-o", OUTPUT)
COMMANDS = (
    Command(name="average", arguments=AVERAGE, code_if_full=3, publishes=True),
    Command(name="average --json", arguments=(*AVERAGE, "--json"), code_if_full=3, publishes=True),
    Command(name="average --dry-run", arguments=(*AVERAGE, "--dry-run")),
    Command(name="inspect", arguments=("inspect", _SOURCES[0])),
    Command(name="verify", arguments=("verify", _MADE)),
    Command(name="average of nothing", arguments=("average", "nothing", "-o", OUTPUT), code=1),
    Command(name="wrong usage", arguments=("average", "-o", OUTPUT), code=2, code_if_full=2),
    Command(name="--help", arguments=("--help",)),
)
STREAMS = (
    Streams(name="stdout closed", stdout=_CLOSED),
    Streams(name="stdout full", stdout=_FULL),
    Streams(name="stdout gone", stdout=_GONE),
    Streams(name="stderr closed", stderr=_CLOSED),
    Streams(name="stderr full", stderr=_FULL),
    Streams(name="stderr gone", stderr=_GONE),
    Streams(name="all closed", stdin=_CLOSED, stdout=_CLOSED, stderr=_CLOSED),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with checkpoints, and an average of them."""
    place = tmp_path_factory.mktemp("streams")
    for number, name in enumerate(_SOURCES):
        (place / name).write_bytes(checkpoint_bytes(number))
    command = [*_PROGRAM, "average", *_SOURCES, "-o", _MADE, "--quiet"]
    subprocess.run(command, cwd=place, env=environment(place), check=True, capture_output=True)
    return place


@contextlib.contextmanager
def taking(what: str | None) -> Iterator[int]:
    """Yield what a process gets for an output stream."""
    if what == _FULL:
        with Path("/dev/full").open("wb") as full:
            yield full.fileno()
    elif what == _GONE:
        reading, writing = os.pipe()
        os.close(reading)
        yield writing
        os.close(writing)
    else:
        yield subprocess.PIPE if what is None else subprocess.DEVNULL


def environment(inputs: Path) -> Mapping[str, str]:
    """Return the environment without settings for Python, such as of its buffers; it may cache."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**ours, "PYTHONPYCACHEPREFIX": str(inputs / "cache"), "OPENBLAS_NUM_THREADS": "1"}


def run(command: Command, streams: Streams, directory: Path, inputs: Path) -> tuple[int, str]:
    """Run a command line; return its exit code, and what it says on stderr."""
    kinds = streams.stdin, streams.stdout, streams.stderr
    closing = " ".join(f"{number}>&-" for number, kind in enumerate(kinds) if kind == _CLOSED)
    with ExitStack() as stack:
        finished = subprocess.run(
            ["sh", "-c", f'exec "$@" {closing}', "sh", *_PROGRAM, *command.arguments],
            cwd=directory,
            env=environment(inputs),
            stdin=subprocess.DEVNULL,
            stdout=stack.enter_context(taking(streams.stdout)),
            stderr=stack.enter_context(taking(streams.stderr)),
            timeout=_SECONDS,
            check=False,
        )
    return finished.returncode, (finished.stderr or b"").decode()


def wrong(command: Command, streams: Streams, inputs: Path, directory: Path) -> str:
    """Run a command line; return what is wrong then, empty if nothing is."""
    directory.mkdir()
    for name in (*_SOURCES, _MADE):
        (directory / name).symlink_to(inputs / name)
    before = {path.name for path in directory.iterdir()}
    code, said = run(command, streams, directory, inputs)
    expected = command.code_if_full if streams.stdout == _FULL else command.code
    if command.name == "--help" and streams.stdout == _GONE:  # click ends it, without a word
        return "" if (code, said) == (1, "") else f"exit code {code}: {said}"
    if code != expected:
        return f"exit code {code}, not {expected}: {said}"
    if any(one in said for one in _FROM_PYTHON):
        return f"says {said}"
    if streams.stderr is None and len(_ERROR.findall(said)) != (expected != 0):
        return f"says {said}"
    made = {path.name for path in directory.iterdir()} - before
    if made != ({OUTPUT} if command.publishes else set()):
        return f"made {sorted(made)}"
    if command.publishes and summary(directory / OUTPUT) != summary(inputs / _MADE):
        return "its output is not whole"
    return ""


@pytest.mark.promise(7)
@pytest.mark.parametrize("streams", STREAMS, ids=lambda streams: streams.name)
def test_streams_that_take_nothing_change_nothing_but_the_exit_code(
    streams: Streams, inputs: Path, tmp_path: Path, count_cases: CountCases
) -> None:
    def try_one(command: Command) -> str:
        found = wrong(command, streams, inputs, tmp_path / command.name)
        return found and f"{command.name}: {found}"

    content = [(inputs / name).read_bytes() for name in _SOURCES]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = [*threads.map(try_one, COMMANDS)]
    assert not [one for one in found if one]
    assert [(inputs / name).read_bytes() for name in _SOURCES] == content
    count_cases(len(found))
