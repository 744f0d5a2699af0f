"""Storage that is full, or may not be written: one line, and all is as it was before.

Nothing is left beside the output, an old output and the inputs are untouched, and once there is
room again the same command succeeds.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ckptavg.directories import identity
from faults.arena import Arena, Point, with_fault
from faults.mounts import Disk, MissingError, Mount, MountT, Places, disk, immutable, tmpfs
from faults.runs import CAN_TRACE, WHY_NOT_TRACED, Finished, Runner, Runners, Tracing
from faults.scenarios import KINDS, OUTPUT, Kind, Scenario
from faults.tally import CountCases

_KIND = {kind.name: kind for kind in KINDS}
_SPARE_BYTES = 64 * 2**20  # what a run wants free beside its output
_PAGE_BYTES = 4096
_MAX_PAGES, _MIN_PAGES = 16, 3  # that a run takes
_MANY_INODES = 10**6
_MAX_FILES = 18  # that a run makes, with directories
_FILE_BYTES = (*range(400, 4000, 400), *range(4000, 9000, 1000))
_TAKING_ROOM = (
    "mkdir", "openat", "fallocate", "ftruncate", "pwrite64", "write", "fsync", "fdatasync",
    "renameat2",
)  # fmt: skip
_PARTIAL = "out.partial-{fingerprint}"
_READ = re.compile(r"preadv2\(\d+<(?P<path>[^>]+)>.*\], \d+, (?P<offset>\d+), \d+\) = \d+")
_LINE = re.compile(r"ckptavg: error: [^\n]+\n")

needs_tracing = pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)


def wrong_after(scenario: Scenario, finished: Finished, reason: str) -> str:
    """Return what is wrong after a run that the storage refused; empty if nothing is."""
    if finished.code != 1 or _LINE.fullmatch(finished.stderr) is None:
        return f"exit code {finished.code}: {finished.stderr}"
    if re.search(reason, finished.stderr) is None:
        return f"says {finished.stderr}"
    if (state := scenario.state()) not in ("old", "absent"):
        return f"failed, but is {state}"
    left = set(scenario.left_over()) - set(scenario.left_before)
    return f"left {sorted(left)}" if left else ""


def wrong_with_room(scenario: Scenario, runner: Runner) -> str:
    """Run it again where nothing is in the way; return what is wrong then."""
    again = scenario.run(runner)
    state, left = scenario.state(), scenario.left_over()
    is_right = again.code == 0 and state in ("new", "same") and not left
    return "" if is_right else f"then {again}, {state}, left {left}"


@pytest.fixture(scope="module")
def memory_places(
    runners: Runners, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Places[Mount]]:
    """Return a file system in memory for every runner."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("tmpfs")
        places = Places(stack, directory, lambda place: tmpfs(place, "size=72m"))
        mount_or_skip(places, runners)
        yield places


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def disk_places(
    request: pytest.FixtureRequest, runners: Runners, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Places[Disk]]:
    """Return a disk for every runner."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp(request.param)
        places = Places(stack, directory, lambda place: disk(place, request.param))
        mount_or_skip(places, runners)
        yield places


def mount_or_skip(places: Places[MountT], runners: Runners) -> None:
    """See whether this machine can mount what a test needs."""
    try:
        with runners.one() as runner:
            places.mount(runner)
    except MissingError as error:
        pytest.skip(str(error))


class Filler:
    """Another process, which fills the storage while a run is about to make its directory."""

    def __init__(self, scenario: Scenario, mount: Mount, left_bytes: int) -> None:
        self.partial = Path(scenario.path(_PARTIAL))
        self.was_in_time = False
        self._lock = self.partial.with_name(f"{self.partial.name}.lock")
        self._output = scenario.directory / OUTPUT
        self._before = identity(self._output)
        self._mount = mount
        self._left_bytes = left_bytes

    def __call__(self, process: int) -> None:
        while not self._lock.exists() and identity(Path(f"/proc/{process}/exe")) is not None:
            time.sleep(0.001)
        self._mount.fill(self._left_bytes)
        is_published = identity(self._output) != self._before
        self.was_in_time = self._lock.exists() and not self.partial.exists() and not is_published


def run_while_it_fills_up(
    scenario: Scenario, runner: Runner, mount: Mount, left_bytes: int
) -> Finished:
    """Run, and fill the storage once the run has seen that there is room, before it takes some.

    The run waits before it makes its directory; if not long enough, it waits longer next time.
    """
    for delay_seconds in (0.05, 0.2, 1.0, 5.0):
        scenario.reset()
        filler = Filler(scenario, mount, left_bytes)
        tracing = Tracing(
            calls=("mkdir",),
            paths=(str(filler.partial),),
            fault=f"delay_enter={round(1e6 * delay_seconds)}",
            when=1,
        )
        finished = scenario.run(runner, tracing=tracing, meanwhile=filler)
        if filler.was_in_time:
            return finished
        mount.empty()
    raise TimeoutError("the storage takes longer to fill than a run waits")


@needs_tracing
@pytest.mark.promise(7)
@pytest.mark.parametrize("name", ["single file", "sharded", "overwrite", "torch file"])
def test_storage_that_fills_up_meanwhile(
    name: str, memory_places: Places[Mount], runners: Runners, count_cases: CountCases
) -> None:
    """Each page of memory less is missing somewhere else: weights, side files, provenance."""
    codes = fill_up(memory_places, runners, _KIND[name], range(_MAX_PAGES))
    assert codes.count(1) > _MIN_PAGES
    assert codes[-1] == 0
    count_cases(len(codes))


@needs_tracing
@pytest.mark.promise(7)
def test_a_disk_that_fills_up_meanwhile(
    disk_places: Places[Disk], runners: Runners, count_cases: CountCases
) -> None:
    codes = fill_up(disk_places, runners, _KIND["overwrite"], range(0, 2 * _MAX_PAGES, 2))
    assert 1 in codes
    count_cases(len(codes))


def fill_up(
    places: Places[MountT], runners: Runners, kind: Kind, n_pages: Sequence[int]
) -> list[int]:
    """Run with so many pages left; see that all is well, and return the exit codes."""

    def wrong(runner: Runner, pages: int) -> tuple[int, str]:
        mount, scenario = places.mount(runner), places.scenario(kind, runner)
        finished = run_while_it_fills_up(scenario, runner, mount, pages * _PAGE_BYTES)
        mount.empty()
        found = "" if finished.code == 0 else wrong_after(scenario, finished, "no space left")
        found = found or (wrong_with_room(scenario, runner) if finished.code else "")
        return finished.code, found and f"{pages} pages: {found}"

    found = runners.map(wrong, n_pages)
    assert not [one for _, one in found if one]
    return [code for code, _ in found]


@pytest.mark.promise(7)
@pytest.mark.parametrize("name", ["single file", "overwrite"])
def test_too_little_room_is_seen_before_anything_is_written(
    name: str, memory_places: Places[Mount], runners: Runners, count_cases: CountCases
) -> None:
    def wrong(runner: Runner, free_bytes: int) -> str:
        mount, scenario = memory_places.mount(runner), memory_places.scenario(_KIND[name], runner)
        scenario.reset()
        before = scenario.directory.stat().st_mtime_ns
        mount.fill(free_bytes)
        finished = scenario.run(runner)
        mount.empty()
        found = wrong_after(scenario, finished, r"needs \d+ bytes, but only \d+ are free")
        if scenario.directory.stat().st_mtime_ns != before:
            found = "something was made"
        found = found or wrong_with_room(scenario, runner)
        return found and f"{free_bytes} bytes: {found}"

    sizes = [0, _PAGE_BYTES, 10**5, 10**6, 10**7, _SPARE_BYTES - _PAGE_BYTES, _SPARE_BYTES]
    found = runners.map(wrong, sizes)
    assert not [one for one in found if one]
    count_cases(len(found))


@pytest.mark.promise(7)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_more_files_than_so_many(
    kind: Kind, memory_places: Places[Mount], runners: Runners, count_cases: CountCases
) -> None:
    """Each file and directory of a run is once the one that cannot be made."""

    def wrong(runner: Runner, n_more: int) -> tuple[int, str]:
        mount, scenario = memory_places.mount(runner), memory_places.scenario(kind, runner)
        scenario.reset()
        mount.remount(f"nr_inodes={mount.n_inodes() + n_more}")
        finished = scenario.run(runner)
        mount.remount(f"nr_inodes={_MANY_INODES}")
        found = "" if finished.code == 0 else wrong_after(scenario, finished, "no space left")
        found = found or (wrong_with_room(scenario, runner) if finished.code else "")
        return finished.code, found and f"{n_more} files: {found}"

    found = runners.map(wrong, range(_MAX_FILES))
    codes = [code for code, _ in found]
    assert not [one for _, one in found if one]
    assert codes == sorted(codes, reverse=True)
    assert codes[0] == 1
    assert codes[-1] == 0
    count_cases(len(found))


@pytest.mark.promise(7)
@pytest.mark.parametrize("name", ["single file", "sharded", "overwrite", "torch file"])
def test_no_file_may_be_larger(
    name: str, arena: Arena, runners: Runners, count_cases: CountCases
) -> None:
    def wrong(runner: Runner, max_bytes: int) -> tuple[int, str]:
        scenario = arena.scenario(_KIND[name], runner)
        scenario.reset()
        finished = runner.run(scenario.arguments, scenario.directory, limits={"fsize": max_bytes})
        found = "" if finished.code == 0 else wrong_after(scenario, finished, "file too large")
        found = found or (wrong_with_room(scenario, runner) if finished.code else "")
        return finished.code, found and f"{max_bytes} bytes: {found}"

    found = runners.map(wrong, _FILE_BYTES)
    codes = [code for code, _ in found]
    assert not [one for _, one in found if one]
    assert codes[0] == 1
    assert codes[-1] == 0
    count_cases(len(found))


@needs_tracing
@pytest.mark.promise(7)
def test_a_quota_that_is_reached_at_any_call(
    arena: Arena, runners: Runners, count_cases: CountCases
) -> None:
    kind = _KIND["overwrite"]

    def wrong(runner: Runner, point: Point) -> str:
        scenario = arena.scenario(kind, runner)
        finished = with_fault(scenario, runner, point, "error=EDQUOT")
        if finished is None:
            return f"{point}: not made"
        found = wrong_after(scenario, finished, "quota") or wrong_with_room(scenario, runner)
        return found and f"{point}: {found}"

    made = arena.points(kind, _TAKING_ROOM)
    moved = next(
        at for at, one in enumerate(made) if one.path == OUTPUT and one.call == "renameat2"
    )
    wanted = [
        one
        for one in made[: moved + 1]
        if not (one.call == "openat" and not one.creates)
        and not (one.call == "mkdir" and one.when > 1)  # it is there
    ]
    found = runners.map(wrong, wanted)
    assert not [one for one in found if one]
    count_cases(len(found))


@needs_tracing
@pytest.mark.promise(7)
@pytest.mark.parametrize("name", ["single file", "overwrite"])
@pytest.mark.parametrize("how", ["mounted read-only", "immutable"])
def test_what_may_not_be_written_is_refused_before_the_inputs_are_read(
    name: str, how: str, memory_places: Places[Mount], runners: Runners
) -> None:
    with runners.one() as runner:
        mount, scenario = memory_places.mount(runner), memory_places.scenario(_KIND[name], runner)
        scenario.reset()
        inputs = [str(path) for path in scenario.directory.glob("inputs/**/*.safetensors")]
        tracing = Tracing(calls=("preadv2",), paths=inputs)
        try:
            with read_only(mount) if how == "mounted read-only" else immutable(scenario.directory):
                finished = scenario.run(runner, tracing=tracing)
        except MissingError as error:
            pytest.skip(str(error))
        assert not wrong_after(scenario, finished, "is not writable")
        assert not any(map(reads_tensors, finished.trace))
        finished = scenario.run(runner, tracing=tracing)
        assert any(map(reads_tensors, finished.trace))
        assert scenario.state() == "new"


@pytest.mark.promise(7)
def test_an_old_output_that_may_not_be_moved(arena: Arena, runners: Runners) -> None:
    with runners.one() as runner:
        scenario = arena.scenario(_KIND["overwrite"], runner)
        scenario.reset()
        try:
            with immutable(scenario.directory / OUTPUT):
                finished = scenario.run(runner)
        except MissingError as error:
            pytest.skip(str(error))
        assert not wrong_after(scenario, finished, "not permitted")
        assert not wrong_with_room(scenario, runner)


@contextmanager
def read_only(mount: Mount) -> Iterator[None]:
    """Let a file system be read, not written."""
    mount.remount("ro")
    try:
        yield
    finally:
        mount.remount("rw")


def reads_tensors(line: str) -> bool:
    """Tell from strace's line whether a read of a safetensors file begins after its header."""
    match = _READ.search(line)
    if match is None:
        return False
    with Path(match["path"]).open("rb") as file:
        return int(match["offset"]) >= 8 + int.from_bytes(file.read(8), "little")
