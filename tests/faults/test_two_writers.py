"""Several runs that make one output at the same time: one of them does, the others say so.

Where outputs may be replaced, more than one may succeed; whoever reads the output meanwhile finds
it whole. Nothing is left over.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from random import Random
from threading import Barrier
from typing import NamedTuple, Protocol

import pytest

from ckptavg.directories import identity
from faults.arena import Arena, Point
from faults.pausing import run_paused
from faults.runs import CAN_TRACE, THOROUGH, WHY_NOT_TRACED, Runner, Runners
from faults.scenarios import KINDS, OUTPUT, Scenario, checkpoint_bytes, summary
from faults.tally import CountCases

_N_WRITERS = 6
_ROUNDS, _SOME_ROUNDS, _FEW_ROUNDS = (20, 12, 4) if THOROUGH else (4, 3, 2)
_MAX_DELAY_SECONDS = 0.01
_LOOK_SECONDS = 0.01
_BLOCK_NBYTES = 1000
_INPUTS = "inputs"
_SOURCES = tuple(f"../{_INPUTS}/step-{number}.safetensors" for number in (1, 2))
_AVERAGE = ("average", *_SOURCES, "--io-threads", "1", "-o")
_TRAJECTORY = ("trajectory", *_SOURCES, "--no-plot", "-o", OUTPUT)
_REPORT = ("report", OUTPUT)
_OLD = (*_AVERAGE, OUTPUT, "--dtype", "bfloat16")
_DEEP = ("made", "by", "them")
_OTHER = ("--scheme", "coefficients:0.25,0.75")
_SCHEMES = [("--scheme", f"coefficients:{one / 8},{1 - one / 8}") for one in range(_N_WRITERS)]
_STEPS = ("mkdir", "rmdir", "unlink", "unlinkat", "renameat2", "openat", "flock")
_LOST = re.compile(
    r"ckptavg: error: [\w./-]+: (already exists|is there already|appeared while it was being "
    r"written|another ckptavg run is writing it)[^\n]*\n"
)
_KIND = {kind.name: kind for kind in KINDS}

Summary = Mapping[str, str]


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    stderr: str


class Start(Protocol):
    """Runs the command line of one of the writers, to its end."""

    def __call__(self, writer: int, arguments: Sequence[str], directory: Path) -> Ended: ...


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What several processes do at once.

    Attributes:
        name: What messages call it.
        commands: One for each process.
        place: The one name that is there in the end, in the directory where all run.
        before: Commands that make what is there in the beginning.
        replaces: Whether they may replace what is there.
        is_whole_directory: Whether what they replace is the whole place, in one step.
        rounds: How often it is held.
    """

    name: str
    commands: Sequence[Sequence[str]]
    place: str = OUTPUT
    before: Sequence[Sequence[str]] = ()
    replaces: bool = False
    is_whole_directory: bool = False
    rounds: int = _FEW_ROUNDS


def alike(*command: str) -> Sequence[Sequence[str]]:
    """Return the same command for every process."""
    return [command] * _N_WRITERS


CONTESTS = (
    Contest(name="average", commands=alike(*_AVERAGE, OUTPUT), rounds=_ROUNDS),
    Contest(
        name="different averages",
        commands=[(*_AVERAGE, "/".join(_DEEP), *scheme) for scheme in _SCHEMES],
        place=_DEEP[0],
        rounds=_SOME_ROUNDS,
    ),
    Contest(
        name="average --overwrite",
        commands=alike(*_AVERAGE, OUTPUT, "--overwrite"),
        before=[_OLD],
        replaces=True,
        is_whole_directory=True,
        rounds=_ROUNDS,
    ),
    Contest(
        name="different averages --overwrite",
        commands=[(*_AVERAGE, OUTPUT, "--overwrite", *scheme) for scheme in _SCHEMES],
        before=[_OLD],
        replaces=True,
        is_whole_directory=True,
        rounds=_SOME_ROUNDS,
    ),
    Contest(
        name="different averages --overwrite where nothing is",
        commands=[(*_AVERAGE, OUTPUT, "--overwrite", *scheme) for scheme in _SCHEMES],
        replaces=True,
    ),
    Contest(name="trajectory", commands=alike(*_TRAJECTORY)),
    Contest(
        name="trajectory --overwrite",
        commands=alike(*_TRAJECTORY, "--overwrite"),
        before=[(*_TRAJECTORY, "--last", "2")],  # which is written down
        replaces=True,
        is_whole_directory=True,
    ),
    Contest(name="report", commands=alike(*_REPORT), before=[_OLD]),
    Contest(
        name="report --overwrite",
        commands=alike(*_REPORT, "--overwrite"),
        before=[_OLD, _REPORT],
        replaces=True,
    ),
)


@pytest.fixture(scope="module")
def writers() -> Iterator[Sequence[Runner]]:
    """Return what runs several processes at the same time."""
    with ExitStack() as stack, ThreadPoolExecutor(_N_WRITERS) as threads:
        yield [*map(stack.enter_context, threads.map(lambda _: Runner(), range(_N_WRITERS)))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with inputs; contests are held in directories in it."""
    place = tmp_path_factory.mktemp("writers")
    (place / _INPUTS).mkdir()
    for number, source in enumerate(_SOURCES):
        (place / _INPUTS / Path(source).name).write_bytes(checkpoint_bytes(number))
    return place


def read_while_replaced(directory: Path) -> Summary:
    """Return what a directory holds at some moment, though others replace it meanwhile."""
    while True:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)  # no other gets its number
        try:
            found = summary(directory)
            if identity(directory) == identity(descriptor):
                return found
        except FileNotFoundError:
            if identity(directory) == identity(descriptor):
                raise
        finally:
            os.close(descriptor)


def wrong(
    ended: Sequence[Ended],
    wholes: Sequence[Summary],
    output: Path,
    *,
    replaces: bool,
    known: Sequence[str] = (),
) -> str:
    """Return what is wrong when all have ended; empty if nothing is.

    Args:
        ended: How each ended.
        wholes: What each makes if it is alone.
        output: What is there in the end.
        replaces: Whether they may replace what another made.
        known: Other names beside it.
    """
    for one in ended:
        if one.code != 0 and (one.code != 1 or not _LOST.fullmatch(one.stderr)):
            return f"exit code {one.code}: {one.stderr}"
        if "interrupted" in one.stderr:  # none was
            return f"says {one.stderr}"
    made = [whole for whole, one in zip(wholes, ended, strict=True) if one.code == 0]
    if not made or (len(made) > 1 and not replaces):
        return f"{len(made)} succeeded"
    if summary(output) not in made:
        return "what is there is not what any of them made"
    left = {one.name for one in output.parent.iterdir()} - {output.name, *known}
    return f"left {sorted(left)}" if left else ""


class Arrangement:
    """A contest, with what may come of it."""

    def __init__(self, contest: Contest, runner: Runner, place: Path) -> None:
        """Make what is there in the beginning, and run every command alone."""
        self._contest = contest
        self._stem = place / contest.name.replace(" ", "-")
        self._initial = self._stem.with_name(f"{self._stem.name}-initial")
        self._initial.mkdir()
        for command in contest.before:
            assert runner.run(command, self._initial).code == 0
        self._old = summary(self._initial / contest.place)
        made = dict[Sequence[str], Summary]()
        for command in contest.commands:
            if command not in made:
                directory = self._laid(f"alone-{len(made)}")
                assert runner.run(command, directory, block_nbytes=_BLOCK_NBYTES).code == 0
                made[command] = summary(directory / contest.place)
        self._wholes = [made[command] for command in contest.commands]

    def _laid(self, name: str) -> Path:
        directory = self._stem.with_name(f"{self._stem.name}-{name}")
        shutil.copytree(self._initial, directory)
        return directory

    def hold(self, start: Start, number: int) -> str:
        """Let all begin at once; return what is wrong then, empty if nothing is."""
        directory = self._laid(f"round-{number}")
        barrier = Barrier(_N_WRITERS)
        random = Random(number)
        late = _MAX_DELAY_SECONDS * (number % 2)  # every second time they begin together
        delays = [random.uniform(0, late) for _ in range(_N_WRITERS)]

        def run(writer: int) -> Ended:
            barrier.wait()
            time.sleep(delays[writer])
            return start(writer, self._contest.commands[writer], directory)

        found = ""
        with ThreadPoolExecutor(_N_WRITERS) as threads:
            running = [threads.submit(run, writer) for writer in range(_N_WRITERS)]
            while self._contest.is_whole_directory and not all(one.done() for one in running):
                if read_while_replaced(directory / OUTPUT) not in (self._old, *self._wholes):
                    found = "a reader finds neither old nor new"
                time.sleep(_LOOK_SECONDS)
            ended = [one.result() for one in running]
        output = directory / self._contest.place
        found = found or wrong(ended, self._wholes, output, replaces=self._contest.replaces)
        shutil.rmtree(directory)
        return found and f"round {number}: {found}"


@pytest.mark.promise(13)
@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: contest.name)
def test_of_six_at_once_one_makes_the_output(
    contest: Contest, writers: Sequence[Runner], place: Path, count_cases: CountCases
) -> None:
    def start(writer: int, arguments: Sequence[str], directory: Path) -> Ended:
        found = writers[writer].run(arguments, directory, block_nbytes=_BLOCK_NBYTES)
        return Ended(found.code, found.stderr)

    arrangement = Arrangement(contest, writers[0], place)
    found = [arrangement.hold(start, number) for number in range(contest.rounds)]
    assert not [one for one in found if one]
    count_cases(contest.rounds * _N_WRITERS)


@pytest.mark.promise(13)
@pytest.mark.parametrize("contest", CONTESTS[0:4:3], ids=lambda contest: contest.name)
def test_of_six_processes_without_anything_in_common_one_makes_the_output(
    contest: Contest,
    writers: Sequence[Runner],
    tmp_path: Path,
    place: Path,
    count_cases: CountCases,
) -> None:
    def start(writer: int, arguments: Sequence[str], directory: Path) -> Ended:
        found = subprocess.run(
            [sys.executable, "-m", "ckptavg", *arguments],
            cwd=directory, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return Ended(found.returncode, found.stderr)

    shutil.copytree(place / _INPUTS, tmp_path / _INPUTS)
    assert not Arrangement(contest, writers[0], tmp_path).hold(start, 0)
    count_cases(_N_WRITERS)


@dataclass(frozen=True)
class Pair:
    """A kind of run, and options of another one that comes between two of its steps."""

    kind: str
    options: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.kind}, {'another plan' if self.options else 'the same plan'}"


def steps(arena: Arena, kind: str) -> list[Point]:
    """Return the calls of a run after which others may find something else than before."""
    return [
        one
        for one in arena.points(_KIND[kind], _STEPS)
        if not one.path.startswith(_INPUTS)
        if one.call != "openat" or one.creates
        if one.call != "mkdir" or one.when == 1  # then it is there
        if one.call != "renameat2" or one.path == OUTPUT  # the other name of the same call
    ]


def wrong_between(
    pair: Pair, scenario: Scenario, held: Runner, rival: Runner, step: Point, rivals_whole: Summary
) -> str:
    """Let one run stand still after a step while another runs; return what is wrong then."""
    ended = list[Ended]()

    def run_rival() -> None:
        arguments = [*scenario.arguments, *pair.options]
        found = rival.run(arguments, scenario.directory, block_nbytes=_BLOCK_NBYTES)
        ended.append(Ended(found.code, found.stderr))

    scenario.reset()
    found = run_paused(
        held,
        scenario.arguments,
        scenario.directory,
        after=step._replace(path=scenario.path(step.path)),
        then=run_rival,
        block_nbytes=_BLOCK_NBYTES,
    )
    ended.append(Ended(found.code, found.stderr))
    return wrong(
        ended,
        [rivals_whole, scenario.whole],
        scenario.directory / OUTPUT,
        replaces=pair.kind == "overwrite",
        known=[_INPUTS],
    )


@pytest.mark.promise(13)
@pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)
@pytest.mark.parametrize(
    "pair",
    [Pair(kind, options) for kind in ("single file", "overwrite") for options in ((), _OTHER)],
    ids=str,
)
def test_a_run_may_come_between_any_two_steps_of_another(
    pair: Pair,
    writers: Sequence[Runner],
    runners: Runners,
    arena: Arena,
    count_cases: CountCases,
) -> None:
    rivals = SimpleQueue[Runner]()
    for writer in writers:
        rivals.put(writer)

    def come_between(runner: Runner, step: Point) -> str:
        rival = rivals.get()
        try:
            scenario = arena.scenario(_KIND[pair.kind], runner)
            found = wrong_between(pair, scenario, runner, rival, step, rivals_whole)
        finally:
            rivals.put(rival)
        return found and f"{step}: {found}"

    with runners.one() as runner:
        scenario = arena.scenario(_KIND[pair.kind], runner)
        scenario.reset()
        alone = runner.run([*scenario.arguments, *pair.options], scenario.directory)
        assert alone.code == 0, alone.stderr
        rivals_whole = summary(scenario.directory / OUTPUT)
    found = runners.map(come_between, runners.some(steps(arena, pair.kind)))
    assert not [one for one in found if one]
    count_cases(len(found))
