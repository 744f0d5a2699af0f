"""A kill, and an error, at every system call with which a run changes or reads a file.

After a kill the output is old or new, and whole; the same command then finishes, and nothing is
left over. After an error the run says so in one line, and leaves things as they were.
"""

import re
from pathlib import Path

import pytest

from faults.arena import CHANGING, READING, Arena, Point, with_fault
from faults.runs import CAN_TRACE, WHY_NOT_TRACED, Finished, Runner, Runners
from faults.scenarios import KINDS, Kind, Scenario
from faults.tally import CountCases

pytestmark = pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)

_ERRORS = {
    "openat": ("EMFILE", "EACCES", "EIO"),
    "mkdir": ("ENOSPC", "EROFS"),
    "pwrite64": ("ENOSPC", "EIO", "EDQUOT"),
    "write": ("ENOSPC", "EIO"),
    "fallocate": ("ENOSPC", "EFBIG"),
    "renameat2": ("EIO", "ENOSPC", "EXDEV"),
    "fsync": ("EIO", "ENOSPC"),
    "flock": ("EIO",),
    "preadv2": ("EIO", "ESTALE"),
}
_USUAL_ERRORS = ("EIO",)
_TELLING = frozenset(
    {"mkdir", "write", "pwrite64", "preadv2", "fallocate", "ftruncate", "fsync", "fdatasync",
     "rename", "renameat2", "unlink", "unlinkat"}
)  # fmt: skip
_LINE = re.compile(r"ckptavg: error: [^\n]+\n")


@pytest.mark.promise(5)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_output_whole(
    kind: Kind, runners: Runners, arena: Arena, count_cases: CountCases
) -> None:
    def kill(runner: Runner, point: Point) -> str | None:
        """Return what is wrong; empty if nothing is, None if the call was not made."""
        scenario = arena.scenario(kind, runner)
        if with_fault(scenario, runner, point, "signal=KILL") is None:
            return None
        state = scenario.state()
        if state not in ("old", "new", "absent", "same"):
            return f"{point}: {state}"
        again = scenario.run(runner)
        if again.code not in (0, 1) or (again.code == 1 and "already exists" not in again.stderr):
            return f"{point}: then {again}"
        if (state := scenario.state()) not in ("new", "same"):
            return f"{point}: then {state}"
        if left := scenario.left_over():
            return f"{point}: left {left}"
        return ""

    wanted = runners.some(arena.points(kind, CHANGING))
    found = runners.map(kill, wanted)
    tried = [one for one in found if one is not None]
    assert not [one for one in tried if one]
    assert len(tried) > 0.9 * len(wanted)
    count_cases(len(tried))


@pytest.mark.promise(7)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_error_of_any_call_is_told_in_one_line_and_leaves_things_as_they_were(
    kind: Kind, runners: Runners, arena: Arena, count_cases: CountCases
) -> None:
    def fail(runner: Runner, case: tuple[Point, str]) -> str | None:
        point, error = case
        scenario = arena.scenario(kind, runner)
        finished = with_fault(scenario, runner, point, f"error={error}")
        if finished is None:
            return None
        wrong = _wrong(scenario, point, finished)
        return wrong and f"{point} {error}: {wrong}: {finished.code} {finished.stderr}"

    wanted = runners.some(
        [
            (point, error)
            for point in arena.points(kind, sorted({*CHANGING, *READING}))
            for error in _ERRORS.get(point.call, _USUAL_ERRORS)
        ]
    )
    found = runners.map(fail, wanted)
    tried = [one for one in found if one is not None]
    assert not [one for one in tried if one]
    assert len(tried) > 0.9 * len(wanted)
    count_cases(len(tried))


def _wrong(scenario: Scenario, point: Point, finished: Finished) -> str:
    """Return what is wrong after an error at a point; empty if nothing is."""
    state = scenario.state()
    errors = [line for line in finished.stderr.splitlines(keepends=True) if _LINE.fullmatch(line)]
    if finished.code == 1 and state not in ("old", "absent"):
        return f"failed, but is {state}"
    if finished.code in (0, 3) and state not in ("new", "same"):
        return f"done, but is {state}"
    if finished.code not in (0, 1, 3):
        return "another exit code"
    if finished.code != 0 and len(errors) != 1:
        return "not one line"
    if "unexpected" in finished.stderr:
        return "an error that nobody foresaw"
    if finished.code == 0 and not _is_tolerated(point):
        return "nothing is said of it"
    left = {one for one in scenario.left_over() if one not in scenario.left_before}
    if point.call.startswith(("unlink", "rmdir")):  # what cannot be removed stays
        left.discard(Path(scenario.path(point.path)).relative_to(scenario.directory).parts[0])
    if "what it replaced is in" in finished.stderr:
        left = {one for one in left if f"{one.removesuffix('.lock')}" not in finished.stderr}
    return f"left {sorted(left)}" if left else ""


def _is_tolerated(point: Point) -> bool:
    """Tell whether a run may go on as if nothing was, if what it makes is whole and right.

    It looked for what was not needed, or lost nothing by it: what was written is synced before it
    is closed, and without locks it runs as on a file system that has none.
    """
    if point.call == "mkdir" and point.when > 1:  # it is there
        return True
    return not point.creates and point.call not in _TELLING
