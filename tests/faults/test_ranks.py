"""Several processes that write one output, and a BatchNorm pass: killed or failed at any call."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from faults.arena import CHANGING, Point, points, with_fault
from faults.runs import CAN_TRACE, WHY_NOT_TRACED, Finished, Runner, Runners, Tracing
from faults.scenarios import Kind, Scenario
from faults.tally import CountCases

pytestmark = pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)

_RANKS = 2
_MODEL = """
import torch
from torch import nn


def build():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return model


def batches():
    return [torch.arange(24.0).reshape(8, 3) + at for at in range(2)]
"""
_EVERY = 3  # one rank's calls, so many at a time: each run takes as long as a barrier


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Runner]]:
    runners = [Runner(loads=["torch", "torch.distributed"]) for _ in range(_RANKS)]
    yield runners
    for runner in runners:
        runner.__exit__(None, None, None)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Together(Scenario):
    """A run of several processes; the fault is put into one of them."""

    def __init__(self, directory: Path, ranks: list[Runner], faulty: int) -> None:
        self._ranks = ranks
        self._faulty = faulty
        super().__init__(
            Kind(name="ranks", options=("--max-shard-size", "3KB")), directory, ranks[0]
        )

    def run(self, runner: Runner, **options: object) -> Finished:
        """Run all of them; return how the faulty one ended."""
        port = str(free_port())

        def run_one(rank: int) -> Finished:
            tracing = options.get("tracing") if rank == self._faulty else None
            assert tracing is None or isinstance(tracing, Tracing)
            return self._ranks[rank].run(
                self.arguments,
                self.directory,
                tracing=tracing,
                block_nbytes=1000,
                environment={
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(_RANKS),
                    "LOCAL_WORLD_SIZE": str(_RANKS), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "faults", "OMP_NUM_THREADS": "1",
                },
            )  # fmt: skip

        with ThreadPoolExecutor(_RANKS) as threads:
            self.ended = list(threads.map(run_one, range(_RANKS)))
        return self.ended[self._faulty]


@pytest.mark.promise(5)
@pytest.mark.parametrize("faulty", range(_RANKS))
def test_a_rank_that_is_killed_at_any_call_leaves_the_old_or_the_new_output(
    faulty: int, ranks: list[Runner], tmp_path: Path, count_cases: CountCases
) -> None:
    scenario = Together(tmp_path / "run", ranks, faulty)
    calls = [one for one in points(scenario, ranks[0], CHANGING) if one.call != "close"]
    wanted = Runners.some(calls[::_EVERY])
    tried = 0
    for point in wanted:
        if with_fault(scenario, ranks[0], point, "signal=KILL") is None:
            continue
        tried += 1
        other = scenario.ended[1 - faulty]
        state = scenario.state()
        assert state in ("absent", "new"), (point, state)
        assert other.code in (0, 1, 3), (point, other)
        assert other.code != 0 or state == "new", (point, other)
        again = scenario.run(ranks[0])
        assert again.code == 0 or "already exists" in again.stderr, (point, again)
        assert scenario.state() == "new", (point, again)
        assert not scenario.left_over(), point
    assert tried >= len(wanted) // 2
    count_cases(tried)


@pytest.mark.promise(7)
@pytest.mark.parametrize("faulty", range(_RANKS))
def test_an_error_in_a_rank_ends_all_of_them(
    faulty: int, ranks: list[Runner], tmp_path: Path, count_cases: CountCases
) -> None:
    scenario = Together(tmp_path / "run", ranks, faulty)
    calls = ("pwrite64", "write", "fsync", "fdatasync", "preadv2", "renameat2")
    wanted = Runners.some(points(scenario, ranks[0], calls)[::_EVERY])
    tried = 0
    for point in wanted:
        if with_fault(scenario, ranks[0], point, "error=EIO") is None:
            continue
        tried += 1
        codes = {one.code for one in scenario.ended}
        state = scenario.state()
        assert codes <= {1, 3}, (point, scenario.ended)
        assert (3 in codes) == (state == "new"), (point, state, scenario.ended)
        assert not scenario.left_over(), point
    assert tried >= len(wanted) // 2
    count_cases(tried)


class WithStatistics(Scenario):
    """An average with a BatchNorm pass, whose model is found beside the inputs."""

    output = "../out"

    def __init__(self, directory: Path, runner: Runner) -> None:
        import torch
        from torch import nn

        directory.mkdir()
        sources = []
        (directory / "inputs").mkdir()
        for number in range(2):
            torch.manual_seed(number)
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
            sources.append(str(directory / "inputs" / f"step-{number + 1}.pt"))
            torch.save(model.state_dict(), sources[-1])
        (directory / "inputs" / "bn_model.py").write_text(_MODEL)
        self._sources = sources
        super().__init__(
            Kind(name="bn", options=("--model", "bn_model:build", "--data", "bn_model:batches")),
            directory,
            runner,
        )

    def lay_inputs(self) -> list[str]:
        """Return the sources, which are there."""
        return self._sources

    def run(self, runner: Runner, **options: object) -> Finished:
        """Run it."""
        tracing = options.get("tracing")
        assert tracing is None or isinstance(tracing, Tracing)
        return runner.run(
            self.arguments, self.directory / "inputs", tracing=tracing, block_nbytes=50,
            environment={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


@pytest.mark.promise(5)
def test_a_batchnorm_pass_that_is_killed_at_any_call_is_made_again(
    ranks: list[Runner], tmp_path: Path, count_cases: CountCases
) -> None:
    scenario = WithStatistics(tmp_path / "run", ranks[0])
    calls = [one for one in points(scenario, ranks[0], CHANGING) if one.call != "close"]
    wanted = Runners.some(calls)

    def kill(point: Point) -> bool:
        if with_fault(scenario, ranks[0], point, "signal=KILL") is None:
            return False
        assert scenario.state() in ("absent", "new"), point
        again = scenario.run(ranks[0])
        assert again.code == 0 or "already exists" in again.stderr, (point, again)
        assert scenario.state() == "new", point
        assert not scenario.left_over(), point
        return True

    tried = sum(map(kill, wanted))
    assert tried >= len(wanted) // 2
    count_cases(tried)
