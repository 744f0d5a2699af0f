"""Every place where a checkpoint can be cut, and every byte of it that can change."""

from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import NamedTuple

import hostile
import pytest
import torch
from dcp_files import cut, dcp_files, whole

from ckptavg.errors import CheckpointError, IncompleteCheckpointError
from faults import good_inputs
from faults.good_inputs import INDEX, SHARDS, Files
from faults.judging import Tally, check_message, examine, read_whole
from faults.mutations import Mutant
from faults.stand_ins import Content
from faults.tally import CountCases

MAX_SHOWN = 20
SINGLE = "mutant"


class Sample(NamedTuple):
    """A good checkpoint, and the file of it that is damaged.

    Attributes:
        kind: As mutants have.
        files: Name -> content.
        damaged: Name of the file that is cut or changed.
        is_sealed: Whether something in the format tells of changes outside of tensor data: a
            checksum, or other files that say the same.
    """

    kind: str
    files: Files
    damaged: str
    is_sealed: bool = True

    def replaced(self, content: bytes) -> Mutant:
        """Return the checkpoint with another content of that file."""
        single = SINGLE if SINGLE in self.files else None
        return Mutant({**self.files, self.damaged: content}, single)

    @property
    def content(self) -> bytes:
        """Of the file, as it is good."""
        return self.files[self.damaged]


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors whose elements are all different, most of them also in their bytes."""
    rng = Random(5)

    def of_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        return torch.frombuffer(bytearray(rng.randbytes(nbytes)), dtype=dtype).reshape(shape)

    weight = of_bits(torch.float32, 3, 4)
    return {
        "weight": weight,
        "tied": weight,
        "transposed": of_bits(torch.float32, 2, 3).t(),
        "column": of_bits(torch.float64, 3, 2)[:, 1],
        "half": of_bits(torch.bfloat16, 9),
        "number": of_bits(torch.int64),
        "empty": torch.empty(0, 2),
    }


def torch_zip() -> bytes:
    return good_inputs.saved({"state_dict": tensors(), "epoch": 3})


def torch_legacy() -> bytes:
    return good_inputs.as_legacy(good_inputs.taken_apart(torch_zip())).whole


def npz() -> bytes:
    arrays = {
        name: value.numpy()
        for name, value in tensors().items()
        if value.dtype is not torch.bfloat16 and name != "tied"
    }
    members = []
    for name, array in arrays.items():
        is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        header = good_inputs.npy_header(array.dtype.str, is_fortran, array.shape)
        data = array.tobytes("F" if is_fortran else "C")
        members.append(hostile.Member(name=f"{name}.npy", content=good_inputs.npy(header, data)))
    return hostile.zip_bytes(members)


def safetensors() -> bytes:
    header, data = {}, b""
    codes = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64"}
    for name, value in tensors().items():
        if name != "tied":
            raw = good_inputs.row_major(value)
            end = len(data) + len(raw)
            header[name] = hostile.entry(codes[value.dtype], list(value.shape), len(data), end)
            data += raw
    return hostile.safetensors_bytes({"__metadata__": {"tied": "weight"}, **header}, data)


def dcp() -> Files:
    """Return a directory in which every matrix is cut in two, also the one without elements."""
    chosen = {name: tensors()[name] for name in ("weight", "transposed", "number", "empty")}
    made = dcp_files(
        chosen,
        lambda _, value: cut(value.shape, 1, [1]) if value.dim() > 1 else whole(value.shape),
        names=good_inputs.DISTCP,
    )
    return good_inputs.dcp_contents(made)


def sharded() -> Files:
    """Return a directory whose JSON files end with a new line, which may be missing."""
    files = good_inputs.sharded_directories()[0]
    return {name: content + b"\n" * name.endswith(".json") for name, content in files.items()}


SAMPLES: Mapping[str, Callable[[], Sample]] = {
    "torch": lambda: Sample("torch", {SINGLE: torch_zip()}, SINGLE),
    "legacy torch": lambda: Sample("legacy", {SINGLE: torch_legacy()}, SINGLE, is_sealed=False),
    "safetensors": lambda: Sample("safetensors", {SINGLE: safetensors()}, SINGLE, is_sealed=False),
    "npz": lambda: Sample("npz", {SINGLE: npz()}, SINGLE),
    "DCP metadata": lambda: Sample("dcp", dcp(), ".metadata", is_sealed=False),
    "first DCP file": lambda: Sample("dcp", dcp(), good_inputs.DISTCP[0]),
    "second DCP file": lambda: Sample("dcp", dcp(), good_inputs.DISTCP[1]),
    "first shard": lambda: Sample("json", sharded(), SHARDS[0], is_sealed=False),
    "second shard": lambda: Sample("json", sharded(), SHARDS[1], is_sealed=False),
    "index": lambda: Sample("json", sharded(), INDEX),
    "config": lambda: Sample("json", sharded(), "config.json"),
    "trainer state": lambda: Sample("json", sharded(), "trainer_state.json"),
}


@pytest.fixture(params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> Sample:
    name: str = request.param
    return SAMPLES[name]()


def told(failures: list[str]) -> str:
    more = [f"and {len(failures) - MAX_SHOWN} more"] if len(failures) > MAX_SHOWN else []
    return "\n".join([*failures[:MAX_SHOWN], *more])


@pytest.mark.promise(4)
def test_every_truncation_is_refused_or_cuts_a_last_new_line(
    sample: Sample, count_cases: CountCases
) -> None:
    before = read_whole(sample.replaced(sample.content))
    failures = []
    for length in range(len(sample.content)):
        try:
            content = read_whole(sample.replaced(sample.content[:length]))
        except CheckpointError as error:
            check_message(str(error))
        except Exception as error:
            failures.append(f"cut to {length} bytes: {type(error).__name__}: {error}")
        else:
            if sample.content[length:] != b"\n" or content != before:
                failures.append(f"cut to {length} bytes: accepted")
    count_cases(len(sample.content))
    assert not failures, told(failures)


@pytest.mark.promise(4)
@pytest.mark.filterwarnings("ignore")  # torch and numpy warn of what they read
def test_every_changed_byte_is_refused_or_changes_nothing_but_its_element(
    sample: Sample, count_cases: CountCases
) -> None:
    before = read_whole(sample.replaced(sample.content))
    owners = owners_of_bytes(sample.content, before)
    tally = Tally(sample.kind)
    failures = []
    n_cases = 0
    for position, value in changes(sample.content):
        n_cases += 1
        changed = bytearray(sample.content)
        changed[position] = value
        try:
            content = examine(sample.kind, sample.replaced(bytes(changed)), tally)
        except Exception as error:
            failures.append(f"byte {position} is {value}: {type(error).__name__}: {error}")
            continue
        is_told = sample.is_sealed or position in owners
        if content is not None and is_told:
            expected = with_byte(before, owners.get(position, []), value)
            if content != expected:
                failures.append(f"byte {position} is {value}: {differences(content, expected)}")
    count_cases(n_cases)
    assert not failures, told(failures)
    assert tally.refused > 0
    assert tally.accepted >= 2 * len(owners)


def changes(content: bytes) -> Iterable[tuple[int, int]]:
    for position, byte in enumerate(content):
        yield position, byte ^ 0xFF
        yield position, (byte + 1) % 256


def owners_of_bytes(raw: bytes, content: Content) -> dict[int, list[tuple[str, int]]]:
    """Return the tensors that a byte of a file is part of, and which of their bytes it is.

    Elements are found by their bytes, which are nowhere else; tensors of small ones as a whole.
    """
    owners: dict[int, list[tuple[str, int]]] = {}
    for name, stored in content.items():
        itemsize = getattr(torch, stored.dtype).itemsize
        step = itemsize if itemsize >= 4 else max(len(stored.raw), 1)
        for first in range(0, len(stored.raw), step):
            element = stored.raw[first : first + step]
            places = raw.count(element)
            if places == 0:
                continue  # it lies in another file
            assert places == 1
            start = raw.index(element)
            for at in range(step):
                owners.setdefault(start + at, []).append((name, first + at))
    return owners


def with_byte(content: Content, owners: list[tuple[str, int]], value: int) -> Content:
    """Return the content after one byte of some tensors has changed."""
    changed = dict(content)
    for name, at in owners:
        raw = bytearray(changed[name].raw)
        raw[at] = value
        changed[name] = changed[name]._replace(raw=bytes(raw))
    return changed


def differences(content: Content, expected: Content) -> str:
    names = sorted({*content, *expected})
    return "; ".join(
        f"'{name}' is {content.get(name)}, expected {expected.get(name)}"
        for name in names
        if content.get(name) != expected.get(name)
    )


@pytest.mark.parametrize("name", ["torch", "legacy torch", "npz", "second DCP file"])
def test_data_of_tensors_is_told_from_the_rest(name: str) -> None:
    sample = SAMPLES[name]()
    before = read_whole(sample.replaced(sample.content))
    owned = owners_of_bytes(sample.content, before)
    assert 24 <= len(owned) < len(sample.content) / 2


def test_a_file_that_is_cut_short_can_be_waited_for() -> None:
    raw = safetensors()
    sample = Sample("safetensors", {SINGLE: raw}, SINGLE)
    for length in (0, len(raw) // 2, len(raw) - 1):
        with pytest.raises(IncompleteCheckpointError):
            read_whole(sample.replaced(raw[:length]))
