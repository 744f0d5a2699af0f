"""Signals at any moment: the documented exit code, one line, and an output that is whole or not.

What is kept to go on with is taken up by the same command.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from faults.arena import CHANGING, Arena, Point
from faults.runs import CAN_TRACE, WHY_NOT_TRACED, Finished, Runner, Runners, Tracing
from faults.scenarios import KINDS, Kind, Scenario
from faults.tally import CountCases

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MOMENTS = 24
_WRITTEN = [
    f"out.partial-{{fingerprint}}{name}"
    for name in ("", ".lock", "/model-00001-of-00003.safetensors", "/.ckptavg-journal-0")
]
_KINDS = [kind for kind in KINDS if kind.name in ("sharded", "overwrite", "resume")]


def wrong(scenario: Scenario, number: signal.Signals, finished: Finished) -> str:
    """Return what is wrong after a signal; empty if nothing is."""
    state = scenario.state()
    lines = finished.stderr.splitlines()
    if finished.code == 128 + number:
        expected = f"ckptavg: error: ended by {number.name}; nothing was published"
        if not lines or not lines[-1].startswith(expected):
            return f"says {finished.stderr}"
        if state not in ("old", "absent"):
            return f"ended, but is {state}"
    elif finished.code in (0, 3):
        if (
            finished.code == 3
            and "is published and whole, but then: ended by" not in finished.stderr
        ):
            return f"says {finished.stderr}"
        if state not in ("new", "same"):
            return f"done, but is {state}"
    else:
        return f"exit code {finished.code}: {finished.stderr}"
    if sum(line.startswith("ckptavg: error:") for line in lines) > 1 or "Traceback" in lines:
        return f"says {finished.stderr}"
    return ""


def continued(scenario: Scenario, runner: Runner) -> str:
    """Run it again; return what is wrong then."""
    again = scenario.run(runner)
    if again.code not in (0, 1) or (again.code == 1 and "already exists" not in again.stderr):
        return f"then {again}"
    state, left = scenario.state(), scenario.left_over()
    return "" if state in ("new", "same") and not left else f"then {state}, left {left}"


@pytest.mark.promise(5)
@pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.name)
def test_a_signal_at_any_call_ends_the_run_in_order(
    kind: Kind, number: signal.Signals, runners: Runners, arena: Arena, count_cases: CountCases
) -> None:
    def send(runner: Runner, point: Point) -> str:
        scenario = arena.scenario(kind, runner)
        scenario.reset()
        finished = scenario.run(
            runner,
            tracing=Tracing(
                calls=(point.call,),
                paths=(scenario.path(point.path),),
                fault=f"signal={number.name}",
                when=point.when,
            ),
        )
        found = wrong(scenario, number, finished) or continued(scenario, runner)
        return found and f"{point}: {found}"

    every = [one for one in arena.points(kind, CHANGING) if one.call != "close"]
    points = runners.some(every)
    found = runners.map(send, points)
    assert not [one for one in found if one]
    count_cases(len(found))


@pytest.mark.promise(5)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_at_any_moment_ends_the_run_in_order(
    number: signal.Signals, runners: Runners, arena: Arena, count_cases: CountCases
) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == "sharded")

    def send(runner: Runner, moment: int) -> str:
        scenario = arena.scenario(kind, runner)
        scenario.reset()

        def after_a_while(process: int) -> None:
            time.sleep(0.002 * moment)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(process, number)

        finished = scenario.run(runner, meanwhile=after_a_while)
        if finished.code == -number:  # before the command line had begun
            return "" if scenario.state() == "absent" else "not in order"
        return wrong(scenario, number, finished) or continued(scenario, runner)

    found = runners.map(send, runners.some(range(_MOMENTS)))
    assert not [one for one in found if one]
    count_cases(len(found))


@pytest.mark.promise(5)
@pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)
def test_a_second_signal_does_not_disturb_the_clean_up(
    runners: Runners, arena: Arena, count_cases: CountCases
) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == "sharded")

    def twice(runner: Runner, calls: tuple[str, str]) -> str:
        scenario = arena.scenario(kind, runner)
        scenario.reset()
        beside = [scenario.path(name) for name in _WRITTEN]
        tracing = Tracing(calls=calls, paths=beside, fault="signal=SIGTERM")
        finished = scenario.run(runner, tracing=tracing)
        return wrong(scenario, signal.SIGTERM, finished)

    cases = [
        ("pwrite64", "unlink"), ("fsync", "unlinkat"), ("fallocate", "rmdir"), ("write", "close"),
    ]  # fmt: skip
    found = runners.map(twice, cases)
    assert not [one for one in found if one]
    count_cases(len(cases))


def test_an_interrupt_while_the_command_line_loads_is_one_line(tmp_path: Path) -> None:
    """Python itself would show where it was; before it is there, it does."""
    codes = set[int]()
    for delay in (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2):
        with subprocess.Popen(
            [sys.executable, "-m", "ckptavg", "average", "nothing", "-o", "out"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        codes.add(process.returncode)
        assert "/ckptavg/" not in said, (delay, said)
    assert codes <= {-signal.SIGINT, 130, 1}
