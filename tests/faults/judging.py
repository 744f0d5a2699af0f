"""Whether ckptavg does right by a mutant: refuses it in one line, or reads what others read."""

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ckptavg.checkpoint.directory import open_directory
from ckptavg.checkpoint.formats import open_file
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.errors import CheckpointError
from ckptavg.tensors import Piece
from faults import references
from faults.good_inputs import INDEX
from faults.in_memory import MemoryFile, MemoryFolder
from faults.mutations import Mutant, mutant
from faults.stand_ins import Content, Stored, marks_folders

MAX_SECONDS = 1.0
_STOP_AFTER_SECONDS = 10.0
_MAX_KEPT_OF_A_CAUSE = 5
_LABEL = "mutant"


class WrongError(Exception):
    """ckptavg does not do right by a mutant."""


class _StoppedError(BaseException):
    """The time is over; no reader may catch this."""


@dataclass
class Tally:
    """What became of some mutants of one kind.

    Attributes:
        kind: Of the mutants.
        mutants: How many there were.
        accepted: How many were read.
        refused: How many were not.
        stricter: Refused ones that the format's own reader accepts, by the rule they break.
        tolerated: Accepted ones that the format's own reader refuses, by its reason.
        slowest_seconds: Of processor time, to open and read one.
        causes: How many were judged wrongly, by what was wrong.
        failures: Number and fault of the first ones of each cause.
    """

    kind: str
    mutants: int = 0
    accepted: int = 0
    refused: int = 0
    stricter: Counter[str] = field(default_factory=Counter)
    tolerated: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    causes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def fail(self, number: int, what: str) -> None:
        """Add one that was judged wrongly."""
        self.causes[_shortened(what)] += 1
        self._keep(number, what)

    def _keep(self, number: int, what: str) -> None:
        known = [one for _, one in self.failures if _shortened(one) == _shortened(what)]
        if len(known) < _MAX_KEPT_OF_A_CAUSE:
            self.failures.append((number, what))

    def add(self, other: "Tally") -> None:
        """Add the mutants of another tally."""
        self.mutants += other.mutants
        self.accepted += other.accepted
        self.refused += other.refused
        self.stricter += other.stricter
        self.tolerated += other.tolerated
        self.slowest_seconds = max(self.slowest_seconds, other.slowest_seconds)
        self.causes += other.causes
        for number, what in other.failures:
            self._keep(number, what)


def judge(kind: str, seed: int, numbers: Sequence[int]) -> Tally:
    """Return what became of some mutants."""
    tally = Tally(kind)
    for number in numbers:
        tally.mutants += 1
        try:
            with _stopped_after(_STOP_AFTER_SECONDS):
                examine(kind, mutant(kind, seed, number), tally)
        except WrongError as error:
            tally.fail(number, str(error))
        except _StoppedError:
            tally.fail(number, f"takes more than {_STOP_AFTER_SECONDS} s")
        except Exception as error:
            tally.fail(number, f"{type(error).__name__}: {error}")
    return tally


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _StoppedError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def examine(kind: str, made: Mutant, tally: Tally) -> Content | None:
    """Return what is read of a mutant; None if it is refused. Adds to the tally.

    Raises:
        WrongError: If either is not right.
    """
    content: Content | None = None
    refusal = ""
    started = time.process_time()
    try:
        content = read_whole(made)
    except CheckpointError as error:
        refusal = str(error)
    seconds = time.process_time() - started
    tally.slowest_seconds = max(tally.slowest_seconds, seconds)
    if seconds > MAX_SECONDS:
        raise WrongError(f"takes {seconds:.1f} s")
    if content is None:
        tally.refused += 1
        check_message(refusal)
        if kind.startswith("safetensors"):
            tally.stricter.update(_stricter_rules(made.content, refusal))
    else:
        tally.accepted += 1
        tally.tolerated.update(_COMPARED[kind.partition("-")[0]](made, content))
    return content


def read_whole(made: Mutant) -> Content:
    """Open a checkpoint, and read every byte of every tensor.

    Raises:
        CheckpointError: If it is refused.
        WrongError: If it is said to hold more than its files.
    """
    if made.single is None:
        checkpoint = open_directory(MemoryFolder(made.files, _LABEL), state_key=None)
    else:
        checkpoint = open_file(MemoryFile(made.content, _LABEL), state_key=None)
    with closing(checkpoint):
        most = sum(map(len, made.files.values()))
        content = {
            name: Stored(info.dtype.name, info.shape, _read(checkpoint, name, info.nbytes, most))
            for name, info in checkpoint.tensors.items()
        }
        for name, stored in content.items():
            if prod(filter(None, stored.shape)) >= 2**63:
                raise WrongError(f"'{name}' of shape {stored.shape} hides an overflow behind a 0")
        for alias, owner in checkpoint.aliases.items():
            if _read(checkpoint, alias, len(content[owner].raw), most) != content[owner].raw:
                raise WrongError(f"'{alias}' is not what it is tied to")
        if not re.fullmatch("[0-9a-f]+", checkpoint.places_digest):
            raise WrongError("its places have no digest")
    return content


def _read(checkpoint: StoredCheckpoint, name: str, nbytes: int, most: int) -> bytes:
    if nbytes > most:
        raise WrongError(f"'{name}' would have {nbytes} bytes, of {most} in all")
    buffer = bytearray(nbytes)
    checkpoint.read_into([Piece(name, 0, nbytes)], memoryview(buffer))
    return bytes(buffer)


def check_message(message: str) -> None:
    """Check that a refusal is one printable line that names the input and is not false.

    Raises:
        WrongError: If it is not.
    """
    if not message.isprintable():
        raise WrongError(f"the message is not one printable line: {message!r}")
    if not re.match(rf"{_LABEL}[/:]", message):
        raise WrongError(f"the message does not begin with what it is about: {message}")
    if "changed while being read" in message:
        raise WrongError(f"nothing changed: {message}")


# -- safetensors


def _compared_with_safetensors(made: Mutant, content: Content) -> list[str]:
    expected = references.by_safetensors(made.content)
    if expected is None:
        raise WrongError("accepted, but safetensors refuses it")
    _check_equal(content, expected, "safetensors")
    return []


def _check_equal(content: Content, expected: Content, reader: str) -> None:
    if content != expected:
        names = sorted(
            name for name in {*content, *expected} if content.get(name) != expected.get(name)
        )
        raise WrongError(
            f"'{names[0]}' is {content.get(names[0])}, but {expected.get(names[0])} to {reader}"
        )


def _stricter_rules(raw: bytes, refusal: str) -> list[str]:
    """Return the rule by which a file is refused that safetensors reads, if it reads it.

    Raises:
        WrongError: If there is none.
    """
    if references.by_safetensors(raw) is None:
        return []
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode()
    header = json.loads(text, object_pairs_hook=_Pairs)
    for pattern, (rule, is_broken) in _STRICTER.items():
        if re.search(pattern, refusal) and is_broken(text, header):
            return [rule]
    raise WrongError(f"safetensors reads it, and no stricter rule is broken: {refusal}")


class _Pairs(list[tuple[str, Any]]):
    """A JSON object, with every key that it has."""


def _begins_with_space(text: str, _: Any) -> bool:
    return text[0] in " \t\r\n"


def _has_key_twice(_: str, header: Any) -> bool:
    if isinstance(header, _Pairs):
        keys = [key for key, _ in header]
        values = [value for _, value in header]
        return len(set(keys)) < len(keys) or any(_has_key_twice("", value) for value in values)
    return isinstance(header, list) and any(_has_key_twice("", value) for value in header)


def _entries(header: Any) -> list[Any]:
    return [value for key, value in header if key != "__metadata__"]


def _has_other_fields(_: str, header: Any) -> bool:
    fields = {"dtype", "shape", "data_offsets"}
    return any(
        not isinstance(entry, _Pairs) or {key for key, _ in entry} != fields
        for entry in _entries(header)
    )


def _has_null_metadata(_: str, header: Any) -> bool:
    return ("__metadata__", None) in header


def _shapes(header: Any) -> list[list[int]]:
    return [
        value
        for entry in _entries(header)
        if isinstance(entry, _Pairs)
        for key, value in entry
        if key == "shape"
    ]


def _has_many_dimensions(_: str, header: Any) -> bool:
    return any(len(shape) > 64 for shape in _shapes(header))


def _hides_an_overflow(_: str, header: Any) -> bool:
    return any(0 in shape and 4 * prod(filter(None, shape)) >= 2**64 for shape in _shapes(header))


# what is said -> the rule that is stricter than safetensors, and whether a file breaks it
_STRICTER: Mapping[str, tuple[str, Callable[[str, Any], bool]]] = {
    "neither a safetensors file nor": ("white space before the header", _begins_with_space),
    r"its header names '.*' twice$": ("a name twice", _has_key_twice),
    "other fields than dtype, shape and data_offsets$": ("other fields", _has_other_fields),
    "its header is nested more than 100 deep$": ("other fields", _has_other_fields),
    "__metadata__ in its header is not a map of strings$": ("null metadata", _has_null_metadata),
    "dimensions, at most 64 are allowed$": ("more than 64 dimensions", _has_many_dimensions),
    "has an impossible size$": ("an overflow hidden by a 0", _hides_an_overflow),
}


# -- the other formats


def _compared_with_torch(made: Mutant, content: Content) -> list[str]:
    """Check that some mapping in a torch file holds exactly this content.

    torch may refuse the file, if the reader with stand-ins reads the same. It refuses damage of

    * records that hold no tensors, such as ``version``, and fields of the zip directory that say
      nothing of where bytes lie: disk numbers, versions, attributes;
    * operations, names and arguments in the pickle that are not needed to find the weights:
      ``requires_grad``, devices, hooks, unknown containers, keys that cannot be hashed;
    * tensors that are not among the weights, and the storages of those that are empty.

    It also reads nothing, and leaves memory as it was, where a member is marked as a folder.
    """
    tolerated = []
    try:
        found = list(references.by_torch(made.content))
    except Exception as error:
        tolerated = [_reason(error)]
        try:
            found = list(references.by_stand_ins(made.content))
        except Exception as second:
            raise WrongError(
                f"accepted, but torch refuses it ({_reason(error)}), and it is not harmless "
                f"({type(second).__name__}: {second})"
            ) from second
    if content in found:
        return tolerated
    if marks_folders(made.content) and content in references.by_stand_ins(made.content):
        return ["reads no bytes of members that are marked as folders"]
    raise WrongError(f"no mapping in the file is {content}, but {found}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {_shortened(str(error))}"


def _shortened(what: str) -> str:
    """Return the beginning of a message without what differs from case to case."""
    return re.sub(r"'[^']*'|\d+|[^ -~]", "#", what.partition("\n")[0])[:40]


def _compared_with_numpy(made: Mutant, content: Content) -> list[str]:
    try:
        expected = references.by_numpy(made.content)
    except Exception as error:
        raise WrongError(
            f"accepted, but numpy refuses it ({type(error).__name__}: {error})"
        ) from error
    _check_equal(content, expected, "numpy")
    return []


def _compared_with_metadata(made: Mutant, content: Content) -> list[str]:
    described = references.by_dcp_metadata(made.files)
    for name, stored in content.items():
        if stored not in described:
            raise WrongError(f"'{name}' is {stored}, but the metadata describes {described}")
    return []


def _compared_with_shards(made: Mutant, content: Content) -> list[str]:
    if INDEX in made.files:
        _check_equal(content, references.by_index(made.files, INDEX), "its index")
    else:
        _check_equal(content, references.by_offsets(made.files), "its offsets")
    return []


_COMPARED: Mapping[str, Callable[[Mutant, Content], list[str]]] = {
    "safetensors": _compared_with_safetensors,
    "torch": _compared_with_torch,
    "legacy": _compared_with_torch,
    "npz": _compared_with_numpy,
    "dcp": _compared_with_metadata,
    "json": _compared_with_shards,
}
