"""Run directories: which of the things in them are checkpoints, and which of those are whole.

Told by names first; what a checkpoint says of itself once it is open wins.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckptavg.checkpoint import Checkpoint, holds_weights
from ckptavg.checkpoint.folder import WEIGHT_SUFFIXES, Folder, is_training_state
from ckptavg.checkpoint.position import Position, position_from_name, training_order
from ckptavg.errors import CheckpointError, IncompleteCheckpointError, SourceError
from ckptavg.hub import natural_order
from ckptavg.tensors import HubRevision

PROVENANCE_NAME = "ckptavg.json"
_MAX_DEPTH = 3
_UNFINISHED = re.compile(
    r"(tmp|temp|_tmp)([-_.].*)?|.*[-_.](tmp|temp|part|partial|incomplete|lock)|.*\.partial-[0-9a-f]+",
    re.IGNORECASE,
)
_SHARD = re.compile(r".*-\d+-of-\d+\.\w+")
_DEEPSPEED_STEP = re.compile(r"global_step\d+")
# names for a checkpoint that is there under its number, too
_SECOND_NAME = re.compile(r"(.*[-_.])?(last|latest|best|recovery|current|final)([-_.].*)?", re.I)
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?", re.IGNORECASE)


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
    for name in folder.names():
        is_folder = folder.is_folder(name)
        is_step = position_from_name(name) != Position(None, None)
        is_weights = not is_folder and name.endswith(WEIGHT_SUFFIXES)
        if name.startswith(".") or is_training_state(name) or _is_output(folder, name):
            continue
        if _UNFINISHED.fullmatch(name):
            unfinished += [name] if is_folder or is_weights or is_step else []
        elif is_weights:
            names += [] if has_weights or _SHARD.fullmatch(name) else [name]
        elif not is_folder or (has_weights and _DEEPSPEED_STEP.fullmatch(name)):
            continue  # what DeepSpeed keeps beside a model's own weights
        elif is_step or (not has_weights and _is_model(folder, name)):
            names.append(name)
        else:
            others.append(name)
    if names:
        return Run(
            folder.label,
            tuple(prefix + name for name in sorted(names, key=natural_order)),
            tuple(prefix + name for name in unfinished),
            has_weights,
        )
    if has_weights or depth == 0:
        return None
    inner = [(name, _find(folder.inside(name), f"{prefix}{name}/", depth - 1)) for name in others]
    found = [(name, run) for name, run in inner if run is not None]
    if len(found) > 1:
        raise SourceError(
            f"{folder.label}: holds several runs ({', '.join(name for name, _ in found[:4])}); "
            f"name one of them, for example {folder.label}/{found[-1][0]}"
        )
    return found[0][1] if found else None


def _is_model(folder: Folder, name: str) -> bool:
    """Tell whether a folder holds weights; on the Hub that is not asked."""
    return folder.hub is None and holds_weights(folder.inside(name))


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
    """

    source: str | HubRevision
    name: str
    run: Run | None = None
    checkpoint: Checkpoint | None = None
    problem: CheckpointError | None = None
    left_out: str | None = None

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
    interrupted; second names, such as ``last.ckpt``, of checkpoints that are there under their
    number.
    """
    whole = [one for one in members if one.problem is None]
    for one in reversed(in_order(members)):
        is_second = _SECOND_NAME.fullmatch(one.name) is not None
        if isinstance(one.problem, IncompleteCheckpointError):
            one.left_out = f"it is not whole: {one.problem}"
        elif one.problem is None and _lacks_state(one, whole):
            one.left_out = "it is not finished: it has no trainer_state.json, which the others have"
        elif not is_second:
            break
    numbered = {
        one.position: one
        for one in whole
        if one.left_out is None and not _SECOND_NAME.fullmatch(one.name)
    }
    for one in members:
        if one.left_out is None and numbered and _SECOND_NAME.fullmatch(one.name):
            twin = numbered.get(one.position)
            if twin is not None:
                one.left_out = f"it is of the same step as {twin.name}"
            elif one.position == Position(None, None) or one.problem is not None:
                one.left_out = "nothing tells its place in training; name it to take it"


def mixture(members: Sequence[Candidate]) -> str | None:
    """Say what is wrong if the checkpoints of a directory cannot all be of one run; else None."""
    families: dict[str, list[Candidate]] = {}
    seen: dict[Position, Candidate] = {}
    for one in members:
        if one.left_out is not None:
            continue
        if not _SECOND_NAME.fullmatch(one.name):
            families.setdefault(_NUMBER.sub("#", one.name), []).append(one)
        twin = seen.setdefault(one.position, one)
        if twin is not one and one.position != Position(None, None):
            step, epoch = one.position
            where = f"step {step}" if step is not None else f"epoch {epoch}"
            return (
                f"holds two checkpoints of {where}, {twin.name} and {one.name}: of two runs? "
                f"choose with --match, for example --match '{_pattern(one.name)}'"
            )
    if len(families) > 1:
        (first, *_), (second, *_) = list(families.values())[:2]
        return (
            f"holds checkpoints of several kinds, such as {first.name} and {second.name}: of two "
            f"runs? choose with --match, for example --match '{_pattern(first.name)}'"
        )
    return None


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)


def _lacks_state(one: Candidate, whole: Sequence[Candidate]) -> bool:
    """Tell whether the newest checkpoint of a Trainer lacks what is written last."""
    others = [other for other in whole if other is not one]
    return (
        bool(others)
        and one is in_order(whole)[-1]
        and not _has_state(one)
        and all(map(_has_state, others))
    )


def _has_state(one: Candidate) -> bool:
    folder = None if one.checkpoint is None else one.checkpoint.folder
    return folder is not None and folder.has("trainer_state.json")
