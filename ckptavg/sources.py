"""What was typed -> opened checkpoints, oldest first."""

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from ckptavg.checkpoint import Checkpoint, open_checkpoint
from ckptavg.errors import SourceError

_NUMBER_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_HUB_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(@\S+)?")
_MAX_EXPANSION = 100_000


def expand_sources(sources: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the paths that sources stand for, in the order typed.

    ``{a..b..step}`` and ``{a,b,c}`` are expanded as a shell would; ``*``, ``?`` and ``[...]``
    match existing paths, numbers in names compared as numbers. A path that exists as it is
    written is never expanded.

    Raises:
        SourceError: If nothing is named, a pattern matches nothing, or a path does not exist.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    if not sources:
        raise SourceError("no checkpoints were named")
    paths: list[str] = []
    for source in sources:
        text = os.fspath(source)
        if os.path.lexists(text):
            paths.append(text)
            continue
        for pattern in _expand_braces(text):
            if os.path.lexists(pattern) or not _GLOB_CHARACTERS.search(pattern):
                paths.append(pattern)
            else:
                matches = sorted(glob.glob(pattern), key=_natural_order)
                if not matches:
                    raise SourceError(f"{text}: matches nothing")
                paths.extend(matches)
            if len(paths) > _MAX_EXPANSION:
                raise SourceError(f"{text}: names more than {_MAX_EXPANSION} checkpoints")
    for path in paths:
        if not os.path.exists(path):
            raise SourceError(_missing(path))
    return paths


def open_sources(
    sources: str | Path | Sequence[str | Path], *, state_key: str | None = None
) -> tuple[list[Checkpoint], list[str]]:
    """Open what the sources stand for, in the order typed.

    Returns:
        The checkpoints, and what a user should know about how they were found.

    Raises:
        SourceError: If a source leads nowhere.
        CheckpointError: If one cannot be read. Those opened before it are closed.
    """
    checkpoints: list[Checkpoint] = []
    try:
        for path in expand_sources(sources):
            checkpoints.append(open_checkpoint(path, state_key=state_key))
    except BaseException:
        close_all(checkpoints)
        raise
    return checkpoints, _duplicates(checkpoints)


def order_by_position(checkpoints: Sequence[Checkpoint]) -> list[int]:
    """Return the indices of the checkpoints, oldest first.

    By training step if every checkpoint tells its own, else by epoch; in the order given if
    neither is known for all, or two are equal.
    """
    identity = list(range(len(checkpoints)))
    positions: Sequence[Callable[[Checkpoint], int | None]] = (
        lambda checkpoint: checkpoint.step,
        lambda checkpoint: checkpoint.epoch,
    )
    for position in positions:
        values = [position(checkpoint) for checkpoint in checkpoints]
        known = [value for value in values if value is not None]
        if len(known) == len(values) == len(set(known)):
            return sorted(identity, key=known.__getitem__)
    return identity


def close_all(checkpoints: Sequence[Checkpoint]) -> None:
    """Close the files of all checkpoints."""
    for checkpoint in checkpoints:
        checkpoint.close()


def _expand_braces(text: str, start: int = 0) -> Iterator[str]:
    """Expand the groups of braces that begin at ``start`` or later, as a shell would."""
    opening = text.find("{", start)
    while opening >= 0:
        cuts = _cuts(text, opening)
        if cuts:
            head, inside, tail = text[:opening], text[opening + 1 : cuts[-1]], text[cuts[-1] + 1 :]
            number_range = _NUMBER_RANGE.fullmatch(inside)
            values = (
                _number_range(number_range, text)
                if number_range
                else [text[first + 1 : last] for first, last in pairwise(cuts)]
            )
            if number_range or len(values) > 1:
                for value in values:
                    yield from _expand_braces(f"{head}{value}{tail}", opening)
                return
        opening = text.find("{", opening + 1)  # this one stands for itself
    yield text


def _cuts(text: str, opening: int) -> list[int]:
    """Return where the brace at ``opening``, its own commas and its partner stand, in order."""
    depth, cuts = 0, list[int]()
    for at in range(opening, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if at == opening or depth == 0 or (depth == 1 and text[at] == ","):
            cuts.append(at)
        if depth == 0:
            return cuts
    return []


def _number_range(match: re.Match[str], text: str) -> list[str]:
    first, last = int(match[1]), int(match[2])
    step = abs(int(match[3])) if match[3] else 1
    if step == 0:
        raise SourceError(f"{text}: a range with step 0")
    if abs(last - first) // step >= _MAX_EXPANSION:
        raise SourceError(f"{text}: names more than {_MAX_EXPANSION} checkpoints")
    width = max(
        (len(part.lstrip("-")) for part in (match[1], match[2]) if part.lstrip("-")[0] == "0"),
        default=0,
    )
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return [f"{'-' if number < 0 else ''}{abs(number):0{width}d}" for number in numbers]


def _natural_order(path: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path)
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)]


def _missing(path: str) -> str:
    if os.path.islink(path):
        return f"{path}: is a symbolic link that leads nowhere"
    parent = Path(path).parent
    try:
        siblings = [entry.name for entry in parent.iterdir()]
    except (OSError, ValueError):  # no such directory, no right to list it, a NUL byte
        siblings = []
    near = difflib.get_close_matches(Path(path).name, siblings, n=1)
    hint = f"; did you mean {parent / near[0]}?" if near else ""
    if path.startswith("hf://") or (not siblings and _HUB_REPOSITORY.fullmatch(path)):
        hint = "; repositories on the Hub are not read yet: download the revision first"
    return f"{path}: no such file or directory{hint}"


def _duplicates(checkpoints: Sequence[Checkpoint]) -> list[str]:
    seen: dict[tuple[tuple[int, int], ...], str] = {}
    notes = []
    for checkpoint in checkpoints:
        identity = tuple((file.device, file.inode) for file in checkpoint.files)
        if identity in seen:
            notes.append(
                f"{checkpoint.label} is the same checkpoint as {seen[identity]}: it counts twice"
            )
        seen.setdefault(identity, checkpoint.label)
    return notes
