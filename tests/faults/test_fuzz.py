"""Inputs that nobody wrote are refused in one line, or read as others read them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.errors import CheckpointError
from ckptavg.tensors import BOOL, TensorInfo
from faults import fuzz, judging
from faults.in_memory import MemoryFile
from faults.judging import Tally, judge
from faults.mutations import KINDS, mutant
from faults.tally import CountCases

SEED = 1
PER_KIND = 8_500  # more than 100,000 in all
PROCESSES = 2
Rows = dict[str, dict[str, Any]]

# prints a digest of some mutants of every kind, and whether memory is limited
REPRODUCED = """
from faults import fuzz, test_fuzz
fuzz._prepare_process()
print(test_fuzz.digest())
try:
    bytearray(fuzz._MAX_GROWTH_BYTES)
except MemoryError:
    print("limited")
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": tests, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def digest() -> str:
    made = [mutant(kind, SEED, number) for kind in KINDS for number in range(20)]
    return sha256(repr([sorted(one.files.items()) for one in made]).encode()).hexdigest()


@pytest.fixture(scope="session")
def rows() -> Rows:
    """Run the command once for all kinds, and return what it says of each."""
    command = ("-m", "faults.fuzz", "--json", "--seed", str(SEED), "--processes", str(PROCESSES))
    run = run_python(*command, "--count", str(PER_KIND * len(KINDS)))
    assert run.returncode in (0, 1), run.stderr
    return {row["kind"]: row for row in json.loads(run.stdout)}


@pytest.mark.promise(3)
@pytest.mark.parametrize("kind", KINDS)
def test_no_mutant_is_judged_wrongly(kind: str, rows: Rows, count_cases: CountCases) -> None:
    row = rows[kind]
    failures = [f"{(kind, SEED, number)}: {what[:300]}" for number, what in row["failures"]]
    assert not row["causes"], "\n".join(failures)
    assert row["mutants"] == row["accepted"] + row["refused"] == PER_KIND
    # mutants are neither all hopeless nor all harmless
    assert row["accepted"] > PER_KIND // 100
    assert row["refused"] > PER_KIND // 4
    count_cases(row["mutants"])


def test_every_rule_that_is_stricter_than_that_of_safetensors_is_met(rows: Rows) -> None:
    met = set(rows["safetensors-header"]["stricter"]) | set(rows["safetensors-bytes"]["stricter"])
    assert met == {
        "a name twice",
        "other fields",
        "white space before the header",
        "more than 64 dimensions",
        "an overflow hidden by a 0",
        "null metadata",
    }


def test_a_mutant_is_made_again_by_another_process_whose_memory_is_limited() -> None:
    run = run_python("-c", REPRODUCED, PYTHONHASHSEED="7")
    assert run.stdout.split() == [digest(), "limited"], run.stderr


def test_the_command_names_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = Tally("npz-bytes", mutants=3, refused=2)
    failed.fail(7, "KeyError: 1")
    monkeypatch.setattr(fuzz, "fuzz", lambda *_, **__: [failed])
    assert fuzz.main(["--seed", "5"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "kind       mutants  accepted  refused  stricter  tolerated  slowest ms  failures",
        "npz-bytes        3         0        2         0          0         0.0         1",
        "all              3         0        2         0          0         0.0         1",
        "failure: ('npz-bytes', 5, 7): KeyError: 1",
    ]


def test_a_process_that_ended_is_a_failure() -> None:
    future: Future[Tally] = Future()
    future.set_exception(BrokenProcessPool())
    assert fuzz._result("torch-zip", range(500, 1000), future).failures == [
        (500, "a process ended while mutants 500 to 999 were to be judged")
    ]


# -- what is wrong is found


def opened_wrongly(content: bytes) -> StoredCheckpoint:
    file = MemoryFile(content, "mutant")
    return StoredCheckpoint(label="mutant", layout="", tensors={}, places={}, open_files=[file])


def raises(error: BaseException) -> Callable[..., StoredCheckpoint]:
    def open_file(*_: Any, **__: Any) -> StoredCheckpoint:
        raise error

    return open_file


def two_lines() -> CheckpointError:
    error = CheckpointError("mutant: is bad")
    error.args = ("mutant: is\nbad",)
    return error


def lasts(*_: Any, **__: Any) -> StoredCheckpoint:
    while True:
        pass


def describes_too_much(*_: Any, **__: Any) -> StoredCheckpoint:
    checkpoint = opened_wrongly(b"")
    checkpoint.tensors = {"w": TensorInfo(BOOL, (10**6,))}
    return checkpoint


@pytest.mark.parametrize(
    ("open_file", "what"),
    [
        pytest.param(raises(KeyError("w")), "KeyError: 'w'", id="another error"),
        pytest.param(raises(RecursionError("deep")), "RecursionError: deep", id="recursion"),
        pytest.param(raises(MemoryError()), "MemoryError: ", id="memory"),
        pytest.param(raises(two_lines()), "not one printable line", id="two lines"),
        pytest.param(raises(CheckpointError("it is bad")), "what it is about", id="no name"),
        pytest.param(
            raises(CheckpointError("mutant: it changed while being read")),
            "nothing changed",
            id="a false message",
        ),
        pytest.param(lasts, "takes more than 0.02 s", id="no end"),
        pytest.param(
            lambda *_, **__: opened_wrongly(b""), "accepted, but safetensors refuses", id="accepts"
        ),
        pytest.param(describes_too_much, "'w' would have 1000000 bytes", id="too much"),
    ],
)
def test_a_reader_that_does_wrong_is_found_out(
    monkeypatch: pytest.MonkeyPatch, open_file: Callable[..., StoredCheckpoint], what: str
) -> None:
    monkeypatch.setattr(judging, "open_file", open_file)
    monkeypatch.setattr(judging, "_STOP_AFTER_SECONDS", 0.02)
    tally = judge("safetensors-bytes", SEED, range(20))
    assert tally.causes.total() >= 19  # what accepts everything is right about a few
    assert what in tally.failures[0][1]


def test_a_reader_that_takes_long_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "MAX_SECONDS", 0.0)
    tally = judge("safetensors-bytes", SEED, range(5))
    assert [what for _, what in tally.failures] == ["takes 0.0 s"] * 5


@pytest.mark.parametrize(
    "message",
    [
        "mutant: is bad",
        "mutant: its header names 'w' twice",
        "mutant: tensor 'w' has other fields than dtype, shape and data_offsets",
        "mutant: tensor 'w' has an impossible size",
        "mutant: __metadata__ in its header is not a map of strings",
        "mutant: tensor 'w' has 65 dimensions, at most 64 are allowed",
        "mutant: is neither a safetensors file nor a torch file",
    ],
)
def test_a_refusal_of_what_safetensors_reads_needs_a_rule_that_is_broken(
    monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    rightly = judge("safetensors-header", SEED, range(1000))
    monkeypatch.setattr(judging, "open_file", raises(CheckpointError(message)))
    tally = judge("safetensors-header", SEED, range(1000))
    assert tally.causes.total() >= rightly.accepted - rightly.causes.total()
    assert "no stricter rule is broken" in tally.failures[0][1]


@pytest.mark.filterwarnings("ignore")  # torch and numpy warn of what they read
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_value_is_found_in_every_kind(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    read_into = StoredCheckpoint.read_into

    def read_wrongly(self: StoredCheckpoint, pieces: Any, buffer: memoryview) -> None:
        read_into(self, pieces, buffer)
        if buffer:
            buffer[-1] ^= 1

    before = judge(kind, SEED, range(400))
    monkeypatch.setattr(StoredCheckpoint, "read_into", read_wrongly)
    tally = judge(kind, SEED, range(400))
    assert tally.causes.total() >= before.accepted / 2  # some hold nothing but empty tensors
