"""Where in training a checkpoint was saved, as file and directory names tell it."""

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

_STEP = re.compile(
    r"(?:global[_-]?step|step|iteration|iter|update|batch|checkpoint|ckpt|snapshot|(?<![a-z])ba)s?[-_=]?(\d{1,18})(?!\d)",
    re.IGNORECASE,
)
_EPOCH = re.compile(
    r"(?:(?:epoch|(?<![a-z])ep)s?[-_=]?(\d{1,18})(?!\d)|(?<!\d)(\d{1,18})[-_]?ep(?:och)?s?(?![a-z]))",
    re.IGNORECASE,
)
# fairseq's checkpoint_<epoch>_<updates>.pt
_EPOCH_AND_STEP = re.compile(
    r"(?:checkpoint|ckpt)[-_](\d{1,18})[-_](\d{1,18})(?=\.[a-z]|$)", re.IGNORECASE
)
_NUMBER = re.compile(r"(\d{1,18})(?:\.(?:pt|pth|ckpt|bin|tar|safetensors|npz))*", re.IGNORECASE)


class Position(NamedTuple):
    """Training step and epoch; None where nothing tells."""

    step: int | None
    epoch: int | None


def position_from_name(path: str) -> Position:
    """Read step and epoch from the last part of a path, or from the folder above a generic name.

    ``checkpoint-500``, ``step_1000.pt``, ``epoch=3-step=900.ckpt``, ``epoch-012.pt``,
    ``12epoch.pth``, ``checkpoint_<epoch>_<step>.pt`` and a plain number such as ``1000.pt`` are
    understood, as is ``checkpoint-500/model.safetensors``.
    """
    parts = PurePath(path).parts
    number = _NUMBER.fullmatch(parts[-1]) if parts else None
    if number is not None:
        return Position(int(number[1]), None)
    for part in reversed(parts[-2:]):
        both = _EPOCH_AND_STEP.search(part)
        if both is not None:
            return Position(int(both[2]), int(both[1]))
        step, epoch = _last(_STEP, part), _last(_EPOCH, part)
        if step is not None or epoch is not None:
            return Position(step, epoch)
    return Position(None, None)


def training_order(positions: Sequence[Position]) -> list[int]:
    """Return the indices of checkpoints, oldest first.

    By training step if every checkpoint tells its own, else by epoch; in the order given if
    neither is known for all, or two are equal.
    """
    for values in zip(*positions, strict=True):
        if None not in values and len(set(values)) == len(values):
            return sorted(range(len(values)), key=values.__getitem__)
    return list(range(len(positions)))


def _last(pattern: re.Pattern[str], text: str) -> int | None:
    matches = list(pattern.finditer(text))
    return int(next(filter(None, matches[-1].groups()))) if matches else None
