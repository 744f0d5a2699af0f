"""Inputs that change while they are read: noticed, never a mix, and never a process that dies.

What was opened stays what it is when its name is taken away: then the average is that of what was
opened. What cannot be read is told with the file and the byte.
"""

import json
import os
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Event, Thread

import pytest
from hostile import entry, legacy_bytes, mapping, safetensors_bytes, storage, tensor, torch_bytes

from faults.arena import Point
from faults.pausing import run_paused
from faults.runs import CAN_TRACE, THOROUGH, WHY_NOT_TRACED, Finished, Runner, Runners, Tracing
from faults.scenarios import OUTPUT, summary
from faults.tally import CountCases

_BLOCK_NBYTES = 250
_NUMEL, _N_TENSORS = 500, 3
_FIRST, _SECOND = 1, 2  # which values the checkpoints have
_VERSIONS = (2, 5, 7, 11)  # that the second one goes through
_N_MOMENTS, _MANY = (3, 12) if THOROUGH else (2, 4)  # of headers, and of tensors
_N_RUNS = 100 if THOROUGH else 24  # while it is written again and again
_MAX_PAUSE_SECONDS = 0.015
_READ = re.compile(r"(?P<thread>\d+) +preadv2\(\d+<[^>]+>, .*\], \d+, (?P<offset>\d+), \d+\) += ")
_CHANGED = (
    r"(changed while being read; nothing was published|ends at byte \d+, [^\n]*changed[^\n]*)"
)
_SHARDS = tuple(f"model-{one}-of-00002.safetensors" for one in ("00001", "00002"))
_INDEX = "model.safetensors.index.json"
_RESOLUTION_SECONDS = 1.0  # of times on ext3, and on ext4 with small inodes
_REASONS = {
    "error=EIO": r"cannot be read at byte (\d+): input/output error",
    "error=ESTALE": r"cannot be read at byte (\d+): stale file handle",
    "retval=0": r"ends at byte (\d+), \d+ bytes were there when it was opened: [^\n]*",
}

needs_tracing = pytest.mark.skipif(not CAN_TRACE, reason=WHY_NOT_TRACED)

Files = Mapping[str, bytes]


def values(number: int, index: int) -> bytes:
    """Return the data of a tensor."""
    return struct.pack(f"<{_NUMEL}f", *[number + index] * _NUMEL)


def as_safetensors(number: int, indices: Sequence[int] = range(_N_TENSORS)) -> bytes:
    """Return a safetensors file with some of the tensors."""
    data = [values(number, index) for index in indices]
    size = len(data[0])
    header = {
        f"w{index}": entry("F32", [_NUMEL], at * size, (at + 1) * size)
        for at, index in enumerate(indices)
    }
    return safetensors_bytes(header, b"".join(data))


def _pickled_tensors() -> bytes:
    return mapping(
        {
            f"w{index}": tensor((_NUMEL,), stored=storage(str(index), _NUMEL))
            for index in range(_N_TENSORS)
        }
    )


def as_torch(number: int) -> bytes:
    """Return a torch file with the tensors."""
    data = {str(index): values(number, index) for index in range(_N_TENSORS)}
    return torch_bytes(_pickled_tensors(), data)


def as_legacy(number: int) -> bytes:
    """Return a torch file of the old format with the tensors."""
    data = [(str(index), _NUMEL, values(number, index)) for index in range(_N_TENSORS)]
    return legacy_bytes(_pickled_tensors(), data)


def as_shards(number: int) -> Files:
    """Return a directory with two shards."""
    parts = dict(zip(_SHARDS, ([0], [1, 2]), strict=True))
    weight_map = {f"w{index}": name for name, indices in parts.items() for index in indices}
    told = {"metadata": {"total_size": _N_TENSORS * _NUMEL * 4}, "weight_map": weight_map}
    shards = {name: as_safetensors(number, indices) for name, indices in parts.items()}
    return {**shards, _INDEX: json.dumps(told).encode()}


@dataclass(frozen=True)
class Layout:
    """How checkpoints are stored.

    Attributes:
        name: What messages call it.
        suffix: Of their names.
        files: Returns name -> content by number; the name is empty where a checkpoint is one file.
        changing: Which of these files changes.
    """

    name: str
    suffix: str
    files: Callable[[int], Files]
    changing: str = ""


LAYOUTS = (
    Layout("safetensors", ".safetensors", lambda number: {"": as_safetensors(number)}),
    Layout("torch", ".pt", lambda number: {"": as_torch(number)}),
    Layout("shards", "", as_shards, _SHARDS[1]),
)
LEGACY = Layout("torch legacy", ".pt", lambda number: {"": as_legacy(number)})


class Place:
    """Two checkpoints in a directory; the second is what changes.

    Attributes:
        directory: Where all lies, and where commands run.
        second: The second checkpoint.
        changing: The file of it that changes.
        name: What messages call that.
        arguments: What follows ``ckptavg``.
        is_sharded: Whether some tensors are in another file.
    """

    def __init__(self, layout: Layout, directory: Path) -> None:
        self.directory = directory
        self._layout = layout
        first, self.second = (directory / f"step-{number}{layout.suffix}" for number in (1, 2))
        self.changing = self.second / layout.changing
        self.name = str(self.changing.relative_to(directory))
        self.arguments = ["average", first.name, self.second.name, "-o", OUTPUT]
        self.arguments += ["--io-threads", "1"]
        self.is_sharded = bool(layout.changing)
        directory.mkdir()
        self.lay(first, _FIRST)

    def lay(self, path: Path, number: int) -> None:
        """Write a checkpoint."""
        for name, content in self._layout.files(number).items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(content)

    def content(self, number: int) -> bytes:
        """Return what the file holds that changes."""
        return self._layout.files(number)[self._layout.changing]

    def reset(self) -> None:
        """Put back what was there in the beginning."""
        shutil.rmtree(self.directory / OUTPUT, ignore_errors=True)
        self.changing.unlink(missing_ok=True)
        self.lay(self.second, _SECOND)

    def left(self) -> list[str]:
        """Return names that are neither inputs nor the output."""
        names = {path.name for path in self.directory.iterdir()}
        return sorted(names - {*self.arguments[1:3], OUTPUT})

    def run(self, runner: Runner, tracing: Tracing | None = None) -> Finished:
        """Average them."""
        return runner.run(
            self.arguments, self.directory, tracing=tracing, block_nbytes=_BLOCK_NBYTES
        )

    def published(self) -> Mapping[str, str]:
        """Return what the output holds; empty if there is none."""
        return summary(self.directory / OUTPUT)


class Places:
    """A place for every runner and layout, and what comes of undisturbed runs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._places: dict[tuple[str, int], Place] = {}
        self._wholes: dict[str, Mapping[int, Mapping[str, str]]] = {}
        self._n_reads: dict[str, tuple[int, int]] = {}

    def of(self, layout: Layout, runner: Runner) -> Place:
        """Return the place where a runner finds such checkpoints, as they are in the beginning."""
        key = layout.name, id(runner)
        if key not in self._places:
            name = f"{layout.name.replace(' ', '-')}-{len(self._places)}"
            self._places[key] = Place(layout, self._directory / name)
        self._places[key].reset()
        return self._places[key]

    def wholes(self, layout: Layout, runner: Runner) -> Mapping[int, Mapping[str, str]]:
        """Return what an output holds for each version of what changes."""
        if layout.name not in self._wholes:
            found = {}
            for number in _VERSIONS:
                place = self.of(layout, runner)
                place.changing.write_bytes(place.content(number))
                finished = place.run(runner)
                assert finished.code == 0, finished.stderr
                check_values(place, number)
                found[number] = place.published()
            self._wholes[layout.name] = found
        return self._wholes[layout.name]

    def n_reads(self, layout: Layout, runner: Runner) -> tuple[int, int]:
        """Return how often the file that changes is read for headers, and then, for tensors.

        Different threads do so, the latter more often.
        """
        if layout.name not in self._n_reads:
            place = self.of(layout, runner)
            tracing = Tracing(calls=("preadv2",), paths=(str(place.changing),))
            reads = map(_READ.match, place.run(runner, tracing).trace)
            counts = Counter(found["thread"] for found in reads if found)
            *_, of_headers, of_tensors = sorted(counts.values())
            self._n_reads[layout.name] = of_headers, of_tensors
        return self._n_reads[layout.name]

    def moments(self, layout: Layout, runner: Runner, n_each: int) -> Sequence[int]:
        """Return numbers of reads: some of those of headers, and some of those of tensors."""
        of_headers, of_tensors = self.n_reads(layout, runner)
        return [
            *range(1, of_headers + 1, max(of_headers // n_each, 1)),
            *range(of_headers + 1, of_tensors, max((of_tensors - of_headers) // n_each, 1)),
            of_tensors,
        ]


def check_values(place: Place, number: int) -> None:
    """See that the output is the mean, for those tensors that are in the file that changes."""
    raw = (place.directory / OUTPUT / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for index in range(_N_TENSORS):
        begin, end = header[f"w{index}"]["data_offsets"]
        found = struct.unpack(f"<{_NUMEL}f", raw[start + begin : start + end])
        is_there = not place.is_sharded or index > 0
        assert {*found} == {(_FIRST + (number if is_there else _SECOND)) / 2 + index}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Return where runners find checkpoints."""
    return Places(tmp_path_factory.mktemp("changing"))


# -- at a chosen moment


@dataclass(frozen=True)
class Change:
    """What happens to a file: given its path, and another content of the same size."""

    name: str
    make: Callable[[Path, bytes], object]
    is_noticed: bool = True


def _rewrite(path: Path, other: bytes) -> None:
    with path.open("r+b") as file:
        file.write(other)


def _grow(path: Path, other: bytes) -> None:
    with path.open("ab") as file:
        file.write(other[:8])


def _replace(path: Path, other: bytes) -> None:
    beside = path.with_name("beside")
    beside.write_bytes(other)
    beside.replace(path)


CHANGES = (
    Change("truncated", lambda path, other: os.truncate(path, len(other) // 2)),
    Change("emptied", lambda path, other: os.truncate(path, 0)),
    Change("grown", _grow),
    Change("rewritten", _rewrite),
    Change("written afresh", lambda path, other: path.write_bytes(other)),
    Change("replaced", _replace, is_noticed=False),
    Change("deleted", lambda path, other: path.unlink(), is_noticed=False),
)


def wrong_after(
    place: Place, finished: Finished, whole: Mapping[str, str], *, notices: bool, may_refuse: bool
) -> str:
    """Return what is wrong after a file was changed; empty if nothing is.

    Args:
        place: Where it is.
        finished: How the run ended.
        whole: What the average holds of what was opened.
        notices: Whether it must be noticed.
        may_refuse: Whether it may be refused, in any words.
    """
    if place.left():
        return f"left {place.left()}"
    if finished.code == 0 and not notices:
        return "" if place.published() == whole else "publishes something else"
    reason = _CHANGED if notices and not may_refuse else r"[^\n]+"
    named = {re.escape(place.name), re.escape(place.second.name)}  # the file, or its directory
    line = rf"ckptavg: error: ({'|'.join(named)}): {reason}\n"
    is_refused = finished.code == 1 and re.fullmatch(line, finished.stderr)
    is_right = is_refused and (notices or may_refuse) and not place.published()
    return "" if is_right else str(finished)


@pytest.mark.promise(8)
@needs_tracing
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_file_that_changes_at_any_read_is_noticed(
    layout: Layout, change: Change, runners: Runners, places: Places, count_cases: CountCases
) -> None:
    with runners.one() as runner:
        whole = places.wholes(layout, runner)[_SECOND]
        reads = places.moments(layout, runner, _N_MOMENTS)
        of_headers, _ = places.n_reads(layout, runner)

    def try_one(runner: Runner, when: int) -> str:
        place = places.of(layout, runner)
        other = place.content(_VERSIONS[-1])
        finished = run_paused(
            runner,
            place.arguments,
            place.directory,
            after=Point("preadv2", str(place.changing), when),
            then=lambda: change.make(place.changing, other),
            opened=place.changing,
            block_nbytes=_BLOCK_NBYTES,
        )
        found = wrong_after(
            place,
            finished,
            whole,
            notices=change.is_noticed,
            may_refuse=when <= of_headers,  # headers that make no sense, or other files
        )
        return found and f"after read {when}: {found}"

    found = runners.map(try_one, reads)
    assert not [one for one in found if one]
    count_cases(len(found))


@pytest.mark.promise(8)
@needs_tracing
@pytest.mark.parametrize(
    "at", [(_INDEX, 1), (_INDEX, 2), (_SHARDS[0], 1), (_SHARDS[0], 3)], ids=str
)
def test_a_directory_that_is_replaced_while_it_is_opened_is_no_mix(
    at: tuple[str, int], runners: Runners, places: Places
) -> None:
    *_, layout = LAYOUTS
    name, when = at
    with runners.one() as runner:
        place = places.of(layout, runner)
        old, new, aside = place.second, place.directory / "new", place.directory / "aside"
        wholes = []
        for number in (_VERSIONS[-1], _SECOND):
            place.lay(old, number)
            assert place.run(runner).code == 0
            wholes.append(place.published())
            shutil.rmtree(place.directory / OUTPUT)
        place.lay(new, _VERSIONS[-1])
        finished = run_paused(
            runner,
            place.arguments,
            place.directory,
            after=Point("preadv2", str(old / name), when),
            then=lambda: (old.rename(aside), new.rename(old)),
            opened=old / name,
            block_nbytes=_BLOCK_NBYTES,
        )
        shutil.rmtree(aside)
        if finished.code == 0:
            assert place.published() in wholes
        else:
            assert finished.code == 1
            assert re.fullmatch(rf"ckptavg: error: {old.name}[/:][^\n]+\n", finished.stderr)
            assert not place.published()
        assert not place.left()


# -- at random moments


@contextmanager
def written_again_and_again(place: Place, seed: int) -> Iterator[None]:
    """Let another thread write other values into the file, in place, at random moments."""
    over = Event()

    def write() -> None:
        random = Random(seed)
        contents = [place.content(number) for number in _VERSIONS]
        descriptor = os.open(place.changing, os.O_WRONLY)
        while not over.wait(random.uniform(0, _MAX_PAUSE_SECONDS)):
            os.pwrite(descriptor, random.choice(contents), 0)
        os.close(descriptor)

    thread = Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.promise(8)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_file_that_is_rewritten_all_the_time_is_noticed_or_read_whole(
    layout: Layout, runners: Runners, places: Places, count_cases: CountCases
) -> None:
    with runners.one() as runner:
        wholes = places.wholes(layout, runner).values()

    def try_one(runner: Runner, seed: int) -> str:
        place = places.of(layout, runner)
        with written_again_and_again(place, seed):
            finished = place.run(runner)
        if place.left():
            return f"left {place.left()}"
        if finished.code == 0:
            return "" if place.published() in wholes else "a mix is published"
        line = rf"ckptavg: error: {re.escape(place.name)}: [^\n]+\n"
        is_told = finished.code == 1 and re.fullmatch(line, finished.stderr)
        return "" if is_told and not place.published() else str(finished)

    found = runners.map(try_one, range(_N_RUNS // len(LAYOUTS) + 1))
    assert not [one for one in found if one]
    count_cases(len(found))


# -- what cannot be read


@pytest.mark.promise(8)
@needs_tracing
@pytest.mark.parametrize("fault", _REASONS)
@pytest.mark.parametrize("layout", [*LAYOUTS, LEGACY], ids=lambda layout: layout.name)
def test_what_cannot_be_read_is_told_with_the_byte(
    layout: Layout, fault: str, runners: Runners, places: Places, count_cases: CountCases
) -> None:
    with runners.one() as runner:
        n_each = _MANY if fault == "error=EIO" else _N_MOMENTS
        reads = places.moments(layout, runner, n_each)

    def try_one(runner: Runner, when: int) -> str:
        place = places.of(layout, runner)
        tracing = Tracing(calls=("preadv2",), paths=(str(place.changing),), fault=fault, when=when)
        finished = place.run(runner, tracing)
        failed = [one for one in finished.trace if "(INJECTED)" in one]
        offsets = {found["offset"] for found in map(_READ.match, failed) if found}
        line = rf"ckptavg: error: {re.escape(place.name)}: {_REASONS[fault]}\n"
        told = re.fullmatch(line, finished.stderr)
        if finished.code != 1 or told is None or told[1] not in offsets:
            return f"read {when} at byte {offsets}: {finished}"
        left = [*place.left(), *place.published()]
        return f"read {when}: left {left}" if left else ""

    found = runners.map(try_one, reads)
    assert not [one for one in found if one]
    count_cases(len(found))


@pytest.mark.promise(8)
@needs_tracing
@pytest.mark.parametrize("layout", [*LAYOUTS, LEGACY], ids=lambda layout: layout.name)
def test_no_input_is_mapped_into_memory(layout: Layout, runners: Runners, places: Places) -> None:
    """Whoever maps a file that is then truncated dies of SIGBUS."""
    with runners.one() as runner:
        place = places.of(layout, runner)
        for command in ("average", "trajectory", "inspect"):
            arguments = [command, *place.arguments[1:3]]
            if command == "average":
                arguments += ["-o", OUTPUT, "--checksum"]
            tracing = Tracing(calls=("mmap", "remap_file_pages"))
            finished = runner.run(arguments, place.directory, tracing=tracing)
            assert finished.code == 0, finished.stderr
            assert finished.trace
            assert not [line for line in finished.trace if f"<{place.directory}/step-" in line]
