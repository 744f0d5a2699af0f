"""How revisions on the Hub are written: ``org/name@revision/folder``, with patterns in it.

============================  ====================================================================
``org/name@step1000``         a branch, a tag, a commit; ``org/name`` alone is ``main``
``org/name@rev/folder``       a folder or a file in it
``hf://org/name@rev/folder``  the same, and never a local path
``org/name@step*``            every branch and tag that matches
``org/name@rev/step-*``       every folder or file that matches
``org/name@main~10..main``    the commits after the first up to the last, as git writes it
``org/name@main~3``           the third commit before
``org/name@step1000:COMMIT``  what was ``step1000`` when it was that commit, for ever
============================  ====================================================================

A slash in a branch's name is written ``%2F``; ``refs/pr/N`` may be written as it is.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote

from ckptavg.tensors import HubRevision

CARD_NAME = "README.md"  # what the Hub shows of a repository
DEFAULT_REVISION = "main"
SCHEME = "hf://"
_ID = r"[\w-][\w.-]{0,95}"
_REFERENCE = re.compile(
    rf"(?P<repo>{_ID}/{_ID})(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_OTHER_KINDS = ("datasets/", "spaces/")
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_ANCESTOR = re.compile(r"(?P<name>.+?)~(?P<back>\d{0,6})")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


class Ancestor(NamedTuple):
    """A commit, told by how many commits it lies behind a branch, tag or commit."""

    name: str
    back: int


@dataclass(frozen=True, slots=True)
class HubReference:
    """What was typed, taken apart; nothing is known yet of what is there.

    Attributes:
        repo: ``org/name``.
        revision: Name of a branch, tag or commit, or a pattern of them.
        path: Folder or file in the repository, or a pattern of them; empty for its root.
        has_revision: Whether the revision was typed.
    """

    repo: str
    revision: str
    path: str
    has_revision: bool

    def __str__(self) -> str:
        return reference_text(self.repo, self.revision, self.path)

    @property
    def revision_is_glob(self) -> bool:
        """Whether the revision is a pattern."""
        return is_glob(self.revision)

    @property
    def path_is_glob(self) -> bool:
        """Whether the path is a pattern."""
        return is_glob(self.path)

    @property
    def commit_range(self) -> tuple[Ancestor, Ancestor] | None:
        """The two ends of ``A..B``."""
        first, dots, last = self.revision.partition("..")
        return (_ancestor(first), _ancestor(last)) if dots and first and last else None

    @property
    def pinned(self) -> tuple[str, str] | None:
        """The name and the commit of ``NAME:COMMIT``."""
        name, colon, commit = self.revision.rpartition(":")  # git allows no colon in a name
        return (name, commit) if colon else None

    @property
    def ancestor(self) -> Ancestor:
        """The revision as a number of commits behind another, which may be none."""
        return _ancestor(self.revision)


def parse_reference(text: str) -> HubReference | None:
    """Take a reference apart; None if the text is not one.

    ``org/name`` may as well be a local path: whether it is there has to be looked at first.
    """
    is_marked = text.startswith(SCHEME)
    match = _REFERENCE.fullmatch(text.removeprefix(SCHEME))
    if not match or (not is_marked and match["revision"] is None and match["path"] is not None):
        return None
    path = (match["path"] or "").strip("/")
    if ".." in path.split("/") or match["repo"].startswith(_OTHER_KINDS):
        return None
    return HubReference(
        repo=match["repo"],
        revision=unquote(match["revision"] or DEFAULT_REVISION),
        path=path,
        has_revision=match["revision"] is not None,
    )


def reference_text(repo: str, revision: str, path: str = "") -> str:
    """Write a reference, so that ``parse_reference`` reads it."""
    is_plain = revision.startswith("refs/")
    escaped = revision if is_plain else revision.replace("%", "%25").replace("/", "%2F")
    return f"{repo}@{escaped}" + (f"/{path}" if path else "")


def pinned_reference(found: HubRevision) -> str:
    """Write a reference that means the same for ever; a name, which may tell a step, is kept."""
    is_named = found.revision != found.commit
    revision = f"{found.revision}:{found.commit}" if is_named else found.commit
    return SCHEME + reference_text(found.repo, revision, found.path)


def label_of(found: HubRevision) -> str:
    """Write a revision as it was asked for: what messages call it."""
    return reference_text(found.repo, found.revision, found.path)


def is_glob(text: str) -> bool:
    """Tell whether a text holds ``*``, ``?`` or ``[``."""
    return bool(_GLOB_CHARACTERS.search(text))


def is_commit(revision: str) -> bool:
    """Tell whether a name can be that of a commit."""
    return bool(_COMMIT.fullmatch(revision))


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that compares numbers in names as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)]


def _ancestor(text: str) -> Ancestor:
    match = _ANCESTOR.fullmatch(text)
    if not match:
        return Ancestor(text, 0)
    return Ancestor(match["name"], int(match["back"] or 1))
