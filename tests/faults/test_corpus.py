"""Every bad input is refused in one line that names it, before anything is written, at once.

Each case runs through the command line, in a process of its own that may take 100 MB more than it
begins with, and through the library.
"""

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest

from ckptavg import CkptavgError, average_checkpoints
from ckptavg.errors import printable
from faults.case import MAX_GROWTH_BYTES, MAX_SECONDS, Case
from faults.corpus import all_cases
from faults.runs import Finished, Runner, Runners

CASES = all_cases()
_LINE = re.compile(r"ckptavg: error: [^\n]+\n")
_CODES = {"F32": "f", "F64": "d", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b",
          "U8": "B", "BOOL": "?", "C64": "f"}  # fmt: skip
_CANARY = "canary"
_PLANNED = ("set/", "name/")  # each file is fine, or nearly so
_LIMITS = {"data_margin": MAX_GROWTH_BYTES}
_EVIL = ("pickle", "code")  # groups whose files would run something


@dataclass(frozen=True)
class Outcome:
    """What came of a case: how the run ended, and what was there before and after."""

    finished: Finished
    arguments: Sequence[str]
    before: Sequence[tuple[str, int]]
    after: Sequence[tuple[str, int]]
    values: Mapping[str, Sequence[float]]
    output: str


def seen(directory: Path) -> list[tuple[str, int]]:
    """Return every name below a directory, with its inode."""
    return sorted(
        (os.fsencode(path.relative_to(directory)).decode("latin-1"), path.lstat().st_ino)
        for path in directory.rglob("*")
    )


def read_weights(path: Path) -> dict[str, list[float]]:
    """Read a safetensors file with nothing but the format's rules."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, told in json.loads(raw[8:start]).items():
        kind = _CODES.get(told["dtype"]) if name != "__metadata__" else None
        if kind is not None:
            begin, end = told["data_offsets"]
            count = (end - begin) // struct.calcsize(kind)
            found[name] = [*struct.unpack_from(f"<{count}{kind}", raw, start + begin)]
    return found


def tried(runner: Runner, case: Case, directory: Path) -> Outcome:
    """Build a case and run it."""
    directory.mkdir()
    arguments = [*case.build(directory)]
    output = "out"
    if "-o" in arguments:
        output = arguments[arguments.index("-o") + 1]
    else:
        arguments += ["-o", output]
    before = seen(directory)
    # what is refused by its headers; an average takes what its plan says
    is_planned = case.name.startswith(_PLANNED) or "--checksum" in arguments
    limits = {} if case.refusal is None or is_planned else _LIMITS
    finished = runner.run(["average", *arguments], directory, limits=limits)
    weights = [*(directory / output).rglob("*.safetensors")] if case.refusal is None else []
    values = {name: one for path in weights for name, one in read_weights(path).items()}
    return Outcome(finished, arguments, before, seen(directory), values, output)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, runners: Runners) -> Mapping[str, Outcome]:
    place = tmp_path_factory.mktemp("corpus")
    numbered = [*enumerate(CASES)]
    found = runners.map(lambda runner, one: tried(runner, one[1], place / str(one[0])), numbered)
    return {case.name: outcome for case, outcome in zip(CASES, found, strict=True)}


def last_source(arguments: Sequence[str]) -> str:
    """Return the last of the sources, which come first."""
    return [*takewhile(lambda one: not one.startswith("-"), arguments)][-1]


@pytest.mark.promise(2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_command_line_says_what_is_wrong_and_changes_nothing(
    case: Case, outcomes: Mapping[str, Outcome], is_timed: bool
) -> None:
    outcome = outcomes[case.name]
    finished = outcome.finished
    assert not [name for name, _ in outcome.after if name.endswith(_CANARY)]
    assert finished.stdout.isprintable() or case.refusal is None
    if case.refusal is None:
        assert case.values is not None
        assert finished.code == 0, finished.stderr
        assert {name: [*outcome.values[name]] for name in case.values} == {
            name: pytest.approx([*values], rel=0, abs=0, nan_ok=True)
            for name, values in case.values.items()
        }
        return
    assert _LINE.fullmatch(finished.stderr), finished.stderr
    assert finished.stderr.removesuffix("\n").isprintable()
    assert "unexpected" not in finished.stderr
    assert re.search(case.refusal, finished.stderr), finished.stderr
    culprit = last_source(outcome.arguments) if case.culprit is None else case.culprit
    assert printable(culprit) in finished.stderr
    assert finished.code == case.exit_code
    assert outcome.after == outcome.before
    if is_timed:
        assert finished.cpu_seconds < MAX_SECONDS


@pytest.mark.promise(2)
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.refusal is not None and case.exit_code == 1],
    ids=lambda case: case.name,
)
def test_the_library_raises_the_same(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*case.build(tmp_path)]
    if any(one.startswith("-") for one in arguments):
        pytest.skip("needs options of the command line")
    monkeypatch.chdir(tmp_path)
    before = seen(tmp_path)
    with pytest.raises(CkptavgError, match=case.refusal) as caught:
        average_checkpoints(arguments, "out")
    assert str(caught.value).isprintable()
    assert seen(tmp_path) == before


def test_there_are_enough_and_each_says_why() -> None:
    assert sum(case.refusal is not None for case in CASES) >= 350
    assert all(case.why.strip() for case in CASES)
