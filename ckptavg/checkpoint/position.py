"""Where in training a checkpoint was saved, as file and directory names tell it."""

import re
from pathlib import PurePath
from typing import NamedTuple

_STEP = re.compile(
    r"(?:global[_-]?step|step|iteration|iter|update|checkpoint|ckpt)s?[-_=]?(\d{1,18})(?!\d)",
    re.IGNORECASE,
)
_EPOCH = re.compile(r"(?:epoch|(?<![a-z])ep)s?[-_=]?(\d{1,18})(?!\d)", re.IGNORECASE)


class Position(NamedTuple):
    """Training step and epoch; None where nothing tells."""

    step: int | None
    epoch: int | None


def position_from_name(path: str) -> Position:
    """Read step and epoch from the last part of a path, or from the folder above a generic name.

    ``checkpoint-500``, ``step_1000.pt``, ``epoch=3-step=900.ckpt`` and ``epoch-012.pt`` are
    understood, as is ``checkpoint-500/model.safetensors``.
    """
    parts = PurePath(path).parts
    for part in reversed(parts[-2:]):
        step, epoch = _last(_STEP, part), _last(_EPOCH, part)
        if step is not None or epoch is not None:
            return Position(step, epoch)
    return Position(None, None)


def _last(pattern: re.Pattern[str], text: str) -> int | None:
    matches = pattern.findall(text)
    return int(matches[-1]) if matches else None
