"""Run directories: which of the things in them are checkpoints, and which of those are whole.

Told by names first; what a checkpoint says of itself once it is open wins.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from ckptavg.checkpoint import Checkpoint, holds_weights
from ckptavg.checkpoint.directory import indexed_files
from ckptavg.checkpoint.folder import (
    PROVENANCE_NAME,
    SHARD_NAME,
    WEIGHT_SUFFIXES,
    Folder,
    is_training_state,
)
from ckptavg.checkpoint.position import Position, position_from_name, training_order
from ckptavg.checkpoint.trainer_layouts import DEEPSPEED_STEP
from ckptavg.errors import CheckpointError, IncompleteCheckpointError, SourceError
from ckptavg.hub import natural_order
from ckptavg.tensors import HubRevision

_MAX_DEPTH = 3
_UNFINISHED = re.compile(
    r"(tmp|temp|_tmp)([-_.].*)?|.*[-_.](tmp|temp|part|partial|incomplete|lock)|.*\.partial-[0-9a-f]+",
    re.IGNORECASE,
)
# names for a checkpoint that is there under its number, too, and for what was made of several
_SECOND_NAME = re.compile(
    r"(.*[-_.])?(last|latest|best|recovery|current|final|ave|avg|average|averaged)([-_.].*)?|\D*",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?|(?<==)-?(nan|inf)", re.IGNORECASE)
_NOWHERE = Position(None, None)


class Run(NamedTuple):
    """What was found in a run directory.

    Attributes:
        label: What messages call it.
        names: Of the checkpoints, relative to the directory that was looked at, in natural order.
        unfinished: Names that say that something is not there yet.
        has_weights: Whether the directory is a checkpoint itself.
    """

    label: str
    names: tuple[str, ...]
    unfinished: tuple[str, ...]
    has_weights: bool


def find_run(folder: Folder) -> Run | None:
    """Look for checkpoints in a folder, or in the one folder inside it that has any.

    Files whose names end as weights do count, and folders that hold weights or are named after a
    step or an epoch. Nothing is opened.

    Returns:
        None if there are none.

    Raises:
        SourceError: If several folders inside hold checkpoints: several runs.
    """
    return _find(folder, "", _MAX_DEPTH if folder.hub is None else 1)


def _find(folder: Folder, prefix: str, depth: int) -> Run | None:
    has_weights = holds_weights(folder)
    names, others, unfinished = [], [], []
    listed = indexed_files(folder) if has_weights else frozenset[str]()
    steps: list[str] = []  # beside weights, where they may be pictures
    for name in folder.names():
        is_folder = folder.is_folder(name)
        is_step = _tells_step(name)
        is_weights = not is_folder and name.endswith(WEIGHT_SUFFIXES)
        if name.startswith(".") or is_training_state(name) or _is_output(folder, name):
            continue
        if name in listed:
            continue
        if _UNFINISHED.fullmatch(name):
            unfinished += [name] if is_folder or is_weights or is_step else []
        elif is_weights:
            names += (
                [name] if not SHARD_NAME.fullmatch(name) and (is_step or not has_weights) else []
            )
        elif not is_folder and is_step and folder.leads_nowhere(name):
            names.append(name)  # to pass over it would be to guess
        elif not is_folder or (has_weights and DEEPSPEED_STEP.fullmatch(name)):
            continue  # what DeepSpeed keeps beside a model's own weights
        elif is_step and has_weights:
            steps.append(name)
        elif is_step or (not has_weights and _is_model(folder, name)):
            names.append(name)
        else:
            others.append(name)
    if any(_holds_weights(folder, name) for name in steps):
        names += steps
    run = Run(
        folder.label,
        tuple(prefix + name for name in sorted(names, key=natural_order)),
        tuple(prefix + name for name in unfinished),
        has_weights,
    )
    if depth == 0 or _is_numbered(names) or (has_weights and folder.hub is not None):
        return run if names else None
    inner = _inside(folder, prefix, others, depth - 1)
    if has_weights:  # a final model, with its run in a folder beside it
        beside = [one for _, one in inner if any(map(_tells_step, one.names))]
        if len(beside) != 1:
            return None
        return beside[0]._replace(label=folder.label, has_weights=True)
    if inner and len(inner) + len(names) > 1:
        found = [*(name for name, _ in inner), *names]
        raise SourceError(
            f"{folder.label}: holds several runs ({', '.join(found[:4])}"
            f"{', ...' if len(found) > 4 else ''}); name one of them, for example "
            f"{folder.label}/{inner[-1][0]}"
        )
    return inner[0][1] if inner else run if names else None


def _inside(folder: Folder, prefix: str, names: Sequence[str], depth: int) -> list[tuple[str, Run]]:
    """Return the folders in a folder that are runs; those that may not be listed are not."""
    found = []
    for name in names:
        with suppress(PermissionError):
            run = _find(folder.inside(name), f"{prefix}{name}/", depth)
            found += [] if run is None else [(name, run)]
    return found


def _is_numbered(names: Sequence[str]) -> bool:
    """Tell whether names are those of a run's checkpoints, rather than of single models."""
    return any(not _SECOND_NAME.fullmatch(name.rpartition("/")[2]) for name in names)


def _tells_step(name: str) -> bool:
    return position_from_name(name) != _NOWHERE


def _is_model(folder: Folder, name: str) -> bool:
    """Tell whether a folder holds weights; on the Hub that is not asked."""
    return folder.hub is None and _holds_weights(folder, name)


def _holds_weights(folder: Folder, name: str) -> bool:
    with suppress(PermissionError):
        return holds_weights(folder.inside(name))
    return False


def _is_output(folder: Folder, name: str) -> bool:
    """Tell whether a folder is what ckptavg made; on the Hub that is not asked."""
    return folder.hub is None and folder.inside(name).has(PROVENANCE_NAME)


@dataclass(kw_only=True, eq=False)
class Candidate:
    """Something that may be a checkpoint to average.

    Attributes:
        source: Its path, or where it is on the Hub.
        name: The last part of its name, which ``--match`` is compared with.
        run: The run it was found in; None if it was named itself.
        checkpoint: It, opened; None if that failed, or was not tried.
        problem: Why it cannot be opened.
        left_out: Why it is not among those to choose from.
        passed_over: Those of its run whose names do not match.
    """

    source: str | HubRevision
    name: str
    run: Run | None = None
    checkpoint: Checkpoint | None = None
    problem: CheckpointError | None = None
    left_out: str | None = None
    passed_over: Sequence["Candidate"] = ()

    @property
    def label(self) -> str:
        """What messages call it."""
        if self.checkpoint is not None:
            return self.checkpoint.label
        return self.source if isinstance(self.source, str) else self.name

    @property
    def position(self) -> Position:
        """Where in training it was saved; from its name, if it could not be opened."""
        if self.checkpoint is None:
            return position_from_name(self.name)
        return Position(self.checkpoint.step, self.checkpoint.epoch)


def in_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates in the order of ``training_order``."""
    return [candidates[at] for at in training_order([one.position for one in candidates])]


def settle(members: Sequence[Candidate]) -> None:
    """Decide which of the checkpoints of one run are left out, and note why in each.

    Those are: the newest ones that are not whole, since they are still being written or were
    interrupted; folders named after a step that hold no weights, as pictures and evaluations do;
    second names, such as ``last.ckpt``, unless that is newer than all that have a number.
    """
    second = _second_names(members)
    numbered = [one for one in members if one not in second]
    kinds = {_kind(one.name) for one in numbered if one.problem is None}
    for one in numbered:
        is_file = one.name.endswith(WEIGHT_SUFFIXES)
        if _is_unfinished(one) and not is_file and kinds and _kind(one.name) not in kinds:
            one.left_out = f"it is no checkpoint, as none of its kind is: {one.problem}"
    numbered = [one for one in numbered if one.left_out is None]
    for one in reversed(_by_age(numbered)):
        if _is_unfinished(one) and not _is_followed(one):
            one.left_out = f"it is not whole: {one.problem}"
        elif one.problem is None and _lacks_state(one, numbered):
            one.left_out = "it is not finished: it has no trainer_state.json, which the others have"
        else:
            break
    there = [one for one in numbered if one.left_out is None]
    for one in [one for one in members if there and one in second]:
        one.left_out = _why_not(one, there)
        if one.left_out is None:
            there.append(one)


def mixture(members: Sequence[Candidate]) -> str | None:
    """Say what is wrong if the checkpoints of a directory cannot all be of one run; else None."""
    second = _second_names(members)
    kinds: dict[str, Candidate] = {}
    seen: dict[Position, Candidate] = {}
    for one in members:
        if one.left_out is not None:
            continue
        if one not in second:
            kinds.setdefault(_kind(one.name), one)
        twin = seen.setdefault(one.position, one)
        step, epoch = one.position
        if twin is not one and one.position != _NOWHERE:
            where = f"step {step}" if step is not None else f"epoch {epoch}"
            return (
                f"holds two checkpoints of {where}, {twin.name} and {one.name}: of two runs? "
                f"move one away, or choose with --match{_example(one, twin)}"
            )
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        return (
            f"holds checkpoints of several kinds, such as {one.name} and {other.name}: of two "
            f"runs? choose with --match{_example(one, other)}, or name the files themselves"
        )
    return None


def _second_names(members: Sequence[Candidate]) -> set[Candidate]:
    """Return those whose names are second names, where others have a number."""
    numbered = {one for one in members if not _SECOND_NAME.fullmatch(one.name)}
    if not numbered:  # best-epoch=3.ckpt, where there is no epoch=3.ckpt
        numbered = {one for one in members if _tells_step(one.name)}
    return set(members) - numbered if numbered else set()


def _by_age(members: Sequence[Candidate]) -> list[Candidate]:
    """Return checkpoints, oldest first; by names where one cannot be asked."""
    if all(one.checkpoint is not None for one in members):
        return in_order(members)
    return [members[at] for at in training_order([position_from_name(one.name) for one in members])]


def _why_not(second: Candidate, there: Sequence[Candidate]) -> str | None:
    """Say why a checkpoint with a second name is not taken beside those with numbers."""
    if second.problem is not None:
        return f"it cannot be read: {second.problem}"
    for one in there:
        if _is_same(one, second):
            return f"it is the same as {one.name}"
    for values in zip(*(one.position for one in (*there, second)), strict=True):
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            newest = max(range(len(there)), key=known.__getitem__)
            if known[-1] > known[newest]:
                return None
            return f"it is older than {there[newest].name}; name it to take it"
    return "nothing tells its place in training; name it to take it"


def _is_same(one: Candidate, other: Candidate) -> bool:
    """Tell whether two are links to the same files, or of the same step (or epoch)."""
    if one.checkpoint is not None and other.checkpoint is not None:
        files = [
            [file.identity for file in each.files if file.holds_weights]
            for each in (one.checkpoint, other.checkpoint)
        ]
        if files[0] == files[1]:
            return True
    for value, second in zip(one.position, other.position, strict=True):
        if value is not None and second is not None:
            return value == second
    return False


def _is_followed(one: Candidate) -> bool:
    """Tell whether its run has a newer one, by name, that does not match."""
    pairs = ([one.position, other.position] for other in one.passed_over)
    return any(training_order(pair) == [0, 1] and pair[0] != pair[1] for pair in pairs)


def _is_unfinished(one: Candidate) -> bool:
    return isinstance(one.problem, IncompleteCheckpointError)


def _kind(name: str) -> str:
    """Return what the names of one run's checkpoints have in common."""
    return _NUMBER.sub("#", name)


def _example(one: Candidate, other: Candidate) -> str:
    """Return a pattern for the kind of one of two names, if it does not match the other."""
    for name, avoided in ((one.name, other.name), (other.name, one.name)):
        pattern = _NUMBER.sub("*", name)
        if not fnmatchcase(avoided, pattern):
            return f", for example --match '{pattern}'"
    return ""


def _lacks_state(one: Candidate, others: Sequence[Candidate]) -> bool:
    """Tell whether the newest checkpoint of a Trainer lacks what is written last."""
    rest = [other for other in others if other is not one and other.problem is None]
    return not _has_state(one) and bool(rest) and all(map(_has_state, rest))


def _has_state(one: Candidate) -> bool:
    folder = None if one.checkpoint is None else one.checkpoint.folder
    return folder is not None and folder.has("trainer_state.json")
