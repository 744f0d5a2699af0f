"""Power that fails at telling moments of a run: the output is old or new and whole, or not there.

Runs are killed at a system call on a file system of their own, which then loses what is not on its
storage. In between another process may sync a file, and the file system's journal with it.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckptavg.journal import JOURNAL_PREFIX
from faults.arena import CHANGING, Point, points
from faults.mounts import Disk, MissingError, Places, disk
from faults.runs import CAN_TRACE, THOROUGH, WHY_NOT_TRACED, Finished, Runner, Runners, Tracing
from faults.scenarios import KINDS, OUTPUT, Kind, Scenario, summary
from faults.tally import CountCases

_FILE_SYSTEMS = ("ext4", "xfs")
_KIND = {kind.name: kind for kind in KINDS}
_SINGLE = ("renameat2", "unlink", "rmdir", "mkdir", "fsync", "fdatasync")
_IN_SERIES = ("openat", "fallocate", "pwrite64", "write", "unlinkat")  # the first and last of each
_JOURNAL = f"{OUTPUT}.partial-{{fingerprint}}/{JOURNAL_PREFIX}0"
_SYNCING = ("fsync", "fdatasync")
_MIN_POINTS = 8
_OTHER_BOOT = "00000000-0000-0000-0000-000000000000"

needs_tracing = pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)


@pytest.fixture(scope="module", params=_FILE_SYSTEMS)
def places(
    request: pytest.FixtureRequest, runners: Runners, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Places[Disk]]:
    """Return a disk for every runner."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp(request.param)
        places = Places(stack, directory, lambda place: disk(place, request.param))
        try:
            with runners.one() as runner:
                places.mount(runner).cut_power()
        except MissingError as error:
            pytest.skip(str(error))
        yield places


def telling_points(found: list[Point]) -> list[Point]:
    """Return the calls before which the storage may hold something else than before the others."""
    series = {call: [one for one in found if one.call == call] for call in _IN_SERIES}
    series["openat"] = [one for one in series["openat"] if one.creates]
    some = {one for those in series.values() for one in (*those[:1], *those[-1:])}
    return [
        one
        for one in found
        if one in some
        or (one.call in _SINGLE and not (one.call == "mkdir" and one.when > 1))  # it is there
        if one.path != OUTPUT  # is also named by its other path
    ]


def boot_again(directory: Path) -> None:
    """Let journals of runs be of another boot of the system, as after a real loss of power."""
    for journal in directory.glob(f"*.partial-*/{JOURNAL_PREFIX}*"):
        first, _, rest = journal.read_bytes().partition(b"\n")
        if first.startswith(b'{"boot": "'):
            journal.write_bytes(json.dumps({"boot": _OTHER_BOOT}).encode() + b"\n" + rest)


def kill_before(scenario: Scenario, runner: Runner, point: Point) -> bool:
    """Run, but no further than to a call; tell whether the run came by."""
    tracing = Tracing(
        calls=(point.call,),
        paths=(scenario.path(point.path),),
        fault="signal=KILL",
        when=point.when,
    )
    return scenario.run(runner, tracing=tracing).code == -signal.SIGKILL


def wrong_then(scenario: Scenario, again: Finished) -> str:
    """Return what is wrong after another run without faults; empty if nothing is."""
    if again.code != 0 and not (again.code == 1 and "already exists" in again.stderr):
        return f"then {again}"
    if (state := scenario.state()) not in ("new", "same"):
        return f"then {state}"
    left = scenario.left_over()
    return f"left {left}" if left else ""


@needs_tracing
@pytest.mark.promise(6)
@pytest.mark.parametrize("name", ["single file", "sharded", "overwrite", "resume"])
def test_an_output_is_old_or_new_and_whole_after_a_loss_of_power(
    name: str, places: Places[Disk], runners: Runners, count_cases: CountCases
) -> None:
    def wrong(runner: Runner, case: tuple[Point, bool]) -> tuple[bool, str]:
        point, commits = case
        disk, scenario = places.mount(runner), places.scenario(_KIND[name], runner)
        scenario.reset()
        disk.sync()
        is_killed = kill_before(scenario, runner, point)
        if commits:
            disk.commit()
        disk.cut_power()
        boot_again(scenario.directory)
        state = scenario.state()
        if state not in ("old", "absent", "new", "same"):
            return is_killed, f"{point}, {commits}: {state}"
        found = wrong_then(scenario, scenario.run(runner))
        return is_killed, found and f"{point}, {commits}: {found}"

    with runners.one() as runner:
        wanted = telling_points(points(places.scenario(_KIND[name], runner), runner, CHANGING))
    cases = [(one, True) for one in wanted]
    if name in ("single file", "overwrite"):
        cases += [(one, False) for one in wanted if one.call in _SYNCING]
    cases = cases if THOROUGH else cases[::2]
    found = runners.map(wrong, cases)
    assert not [one for _, one in found if one]
    assert sum(is_killed for is_killed, _ in found) > 0.9 * len(cases)
    assert len(wanted) >= _MIN_POINTS
    count_cases(len(cases))


@pytest.mark.promise(6)
def test_an_output_that_is_done_outlasts_a_loss_of_power(
    places: Places[Disk], runners: Runners, count_cases: CountCases
) -> None:
    def wrong(runner: Runner, kind: Kind) -> str:
        disk, scenario = places.mount(runner), places.scenario(kind, runner)
        scenario.reset()
        disk.sync()
        done = scenario.run(runner)
        disk.cut_power()
        state = scenario.state()
        return "" if done.code == 0 and state in ("new", "same") else f"{kind.name}: {done} {state}"

    found = runners.map(wrong, KINDS)
    assert not [one for one in found if one]
    count_cases(len(found))


@pytest.mark.promise(6)
def test_directories_made_for_an_output_outlast_a_loss_of_power(
    places: Places[Disk], runners: Runners
) -> None:
    with runners.one() as runner:
        disk, scenario = places.mount(runner), places.scenario(_KIND["sharded"], runner)
        disk.sync()
        arguments = ["made/along/the/way" if one == OUTPUT else one for one in scenario.arguments]
        done = runner.run(arguments, scenario.directory)
        disk.cut_power()
        assert done.code == 0
        assert summary(scenario.directory / "made/along/the/way") == scenario.whole


@needs_tracing
@pytest.mark.promise(6)
def test_only_what_was_on_the_storage_is_continued_after_a_loss_of_power(
    places: Places[Disk], runners: Runners, count_cases: CountCases
) -> None:
    """Three runs: the second syncs what the first had done, goes on, and is killed.

    What it noted after that may be on the storage sooner than what was written.
    """

    def wrong(runner: Runner, point: Point) -> str:
        disk, scenario = places.mount(runner), places.scenario(_KIND["resume"], runner)
        scenario.reset()
        disk.sync()
        scenario.reset()  # what the first run wrote is in memory only
        kill_before(scenario, runner, point)
        disk.sync_file(Path(scenario.path(_JOURNAL)))
        disk.cut_power()
        boot_again(scenario.directory)
        again = scenario.run(runner)
        found = wrong_then(scenario, again)
        if not found and f"{share} of it was done" not in again.stderr:
            found = f"goes on otherwise: {again.stderr}"
        return found and f"{point}: {found}"

    with runners.one() as runner:
        scenario = places.scenario(_KIND["resume"], runner)
        all_points = points(scenario, runner, CHANGING)
        scenario.reset()
        share = scenario.run(runner).stderr.partition("run; ")[2].partition(" of it")[0]
    journal = next(one for one in all_points if one.call == "fdatasync")
    begun = all_points[all_points.index(journal) + 1 :]
    ended = next(at for at, one in enumerate(begun) if one.call == "unlink")
    wanted = [one for one in begun[: ended + 1] if one.call in ("pwrite64", "write", "fsync")]
    assert share.endswith("%")
    assert len(wanted) >= _MIN_POINTS
    found = runners.map(wrong, wanted)
    assert not [one for one in found if one]
    count_cases(len(wanted))
