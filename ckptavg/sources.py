"""What was typed -> paths, and revisions on the Hub."""

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ckptavg.errors import HubError, SourceError
from ckptavg.hub import SCHEME, HubReference, is_glob, natural_order, parse_reference
from ckptavg.tensors import HubRevision

if TYPE_CHECKING:  # importing huggingface_hub takes longer than averaging many models
    from ckptavg.hub.connection import HubConnection

Source = str | Path | HubRevision


class SingleCheckpoint(str):
    """A path that is taken for one checkpoint, whatever else lies in its directory."""


_NUMBER_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_MAX_EXPANSION = 10_000


class HubAccess:
    """A connection to the Hub that is made once something there is named."""

    def __init__(self, *, cache: bool = False, connections: int | None = None) -> None:
        """Ask nothing yet; arguments as of ``HubConnection``."""
        self._cache = cache
        self._connections = connections

    @cached_property
    def connection(self) -> "HubConnection":
        """The connection; made now if it was not yet."""
        from ckptavg.hub.connection import HubConnection

        return HubConnection(cache=self._cache, connections=self._connections)

    @property
    def is_used(self) -> bool:
        """Whether it was made."""
        return "connection" in self.__dict__

    @property
    def fetched_nbytes(self) -> int:
        """Bytes that were fetched through it."""
        return self.connection.fetched_nbytes if self.is_used else 0

    def cancel(self) -> None:
        """Make everything that waits for the Hub fail soon."""
        if self.is_used:
            self.connection.cancel()


def expand_sources(
    sources: Source | Sequence[Source], hub: HubAccess | None = None
) -> list[str | HubRevision]:
    """Return the paths and the revisions on the Hub that sources stand for, in the order typed.

    ``{a..b..step}`` and ``{a,b,c}`` are expanded as a shell would; ``*``, ``?`` and ``[...]``
    match existing paths, or branches and tags, numbers in names compared as numbers. A path that
    exists as it is written is never expanded. ``org/name@revision`` and ``hf://org/name`` are on
    the Hub, whatever is there locally (``./org/name@revision`` is a path); ``org/name`` is, where
    there is no directory ``org``.

    Raises:
        SourceError: If nothing is named, a pattern matches nothing, or something is not there.
        HubError: If the Hub cannot be asked.
    """
    if isinstance(sources, (str, os.PathLike, HubRevision)):
        sources = [sources]
    if not sources:
        raise SourceError("no checkpoints were named")
    hub = hub or HubAccess()
    found: list[str | HubRevision] = []
    for source in sources:
        if isinstance(source, HubRevision):
            found.append(source)
            continue
        text = os.fspath(source)
        may_be_on_hub = isinstance(source, str)
        if os.path.lexists(text) and not (may_be_on_hub and hub_reference(text)):
            found.append(text)
            continue
        for pattern in _expand_braces(text):
            reference = hub_reference(pattern) if may_be_on_hub else None
            if reference is not None:
                found.extend(_find_on_hub(reference, pattern, hub))
            else:
                found.extend(_expand_glob(pattern, text))
            if len(found) > _MAX_EXPANSION:
                raise SourceError(f"{text}: names more than {_MAX_EXPANSION} checkpoints")
    for one in found:
        if isinstance(one, str) and not os.path.exists(one):
            raise SourceError(_missing(one))
    return found


def hub_repository(text: str) -> str | None:
    """Return ``org/name`` if the text names a whole repository on the Hub; None if it does not."""
    reference = hub_reference(text)
    if reference is None or reference.has_revision or reference.path:
        return None
    return reference.repo


def hub_reference(text: str) -> HubReference | None:
    """Take a reference to the Hub apart; None if the text is a local path."""
    reference = parse_reference(text)
    if text.startswith(SCHEME) and reference is None:
        raise SourceError(f"{text}: is not of the form {SCHEME}org/name@revision/folder")
    if reference is None or text.startswith(SCHEME) or reference.has_revision:
        return reference
    return None if os.path.lexists(text.partition("/")[0]) else reference


def _find_on_hub(reference: HubReference, typed: str, hub: HubAccess) -> list[HubRevision]:
    try:
        return hub.connection.find(reference)
    except (SourceError, HubError) as error:
        if os.path.lexists(typed):
            error.add_note(f"for the local path write ./{typed}")
        elif not typed.startswith(SCHEME) and not reference.has_revision:
            error.add_note(f"there is no local {typed} either")
        raise


def _expand_glob(pattern: str, text: str) -> list[str]:
    if os.path.lexists(pattern) or not is_glob(pattern):
        return [pattern]
    matches = sorted(glob.glob(pattern, recursive=True), key=natural_order)
    if not matches:
        raise SourceError(f"{text}: matches nothing")
    return matches


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
    return f"{path}: no such file or directory{hint}"
