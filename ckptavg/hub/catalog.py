"""What is on the Hub: the revisions of a repository, and the files of a folder at one commit.

Without a network (HF_HUB_OFFLINE) the same questions are answered from the cache, as far as it
goes.
"""

import difflib
import fnmatch
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import hexdigits
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from ckptavg.errors import HubError, SourceError
from ckptavg.hub.references import (
    Ancestor,
    HubReference,
    is_commit,
    is_glob,
    label_of,
    natural_order,
)
from ckptavg.hub.transport import get_json, is_offline
from ckptavg.tensors import HubRevision

_FULL_COMMIT_DIGITS = 40
_KIND_BY_DIGITS = {64: "sha256", 40: "git-sha1"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One file or folder in a folder on the Hub.

    Attributes:
        name: Its name in the folder.
        size: Bytes; 0 for a folder.
        digest: ``sha256:...``, or ``git-sha1:...`` for a file that git itself holds; empty for a
            folder, and where it is not known.
        is_folder: Whether it is a folder.
    """

    name: str
    size: int = 0
    digest: str = ""
    is_folder: bool = False


@dataclass
class HubRepository:
    """The revisions of one repository; everything is asked for at most once."""

    repo: str
    _commits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @cached_property
    def revisions(self) -> Mapping[str, str]:
        """Name -> commit of every tag and branch; a branch wins over a tag of its name."""
        if is_offline():
            return _cached_revisions(self.repo)
        told = get_json(f"/api/models/{self.repo}/refs", self.repo)
        try:
            return {
                str(one["name"]): str(one["targetCommit"])
                for one in (*told.get("tags", ()), *told["branches"])
            }
        except (LookupError, TypeError, AttributeError) as error:
            raise HubError(f"{self.repo}: the Hub's list of revisions makes no sense") from error

    def find(self, reference: HubReference) -> list[HubRevision]:
        """Return the revisions that a reference stands for, patterns in the order of numbers.

        Raises:
            SourceError: If there are none.
            HubError: If the Hub cannot be asked.
        """
        if reference.pinned is not None:
            found = [self._pinned(*reference.pinned, reference)]
        elif reference.commit_range is not None:
            found = self._between(*reference.commit_range, reference)
        elif reference.revision_is_glob:
            names = [
                name for name in self.revisions if fnmatch.fnmatchcase(name, reference.revision)
            ]
            if not names:
                raise SourceError(f"{reference}: no branch or tag matches{self._hint('*')}")
            found = [
                HubRevision(self.repo, name, self.revisions[name])
                for name in sorted(names, key=natural_order)
            ]
        else:
            commit, title = self._ancestor(reference.ancestor, reference)
            found = [HubRevision(self.repo, reference.revision, commit, title=title)]
        if not reference.path_is_glob:
            return [one._replace(path=reference.path) for one in found]
        return [match for one in found for match in _matching_paths(one, reference)]

    def _pinned(self, name: str, commit: str, reference: HubReference) -> HubRevision:
        if not is_commit(commit) or len(commit) != _FULL_COMMIT_DIGITS:
            raise SourceError(f"{reference}: '{commit}' is not the full SHA of a commit")
        # a commit that was found in a history was looked up, with its title
        title = self._history(commit, reference)[0][1] if "~" in name else ""
        return HubRevision(self.repo, name, commit, title=title)

    def _between(
        self, first: Ancestor, last: Ancestor, reference: HubReference
    ) -> list[HubRevision]:
        start, _ = self._ancestor(first, reference)
        history = self._history(last.name, reference)[last.back :]
        commits = [commit for commit, _ in history]
        if start not in commits:
            raise SourceError(f"{reference}: {first.name} is no earlier commit of {last.name}")
        found = [
            HubRevision(self.repo, f"{last.name}~{last.back + back}", commit, title=title)
            for back, (commit, title) in enumerate(history[: commits.index(start)])
        ]
        if not found:
            raise SourceError(f"{reference}: holds no commits")
        return found[::-1]

    def _ancestor(self, wanted: Ancestor, reference: HubReference) -> tuple[str, str]:
        """Return commit and title; the title only where the history was looked up."""
        if not wanted.back:
            return self._commit(wanted.name, reference), ""
        history = self._history(wanted.name, reference)
        if wanted.back >= len(history):
            raise SourceError(f"{reference}: {wanted.name} has only {len(history)} commits")
        return history[wanted.back]

    def _commit(self, name: str, reference: HubReference) -> str:
        """Return the full SHA of a branch, a tag, a pull request or a commit."""
        if is_commit(name) and len(name) == _FULL_COMMIT_DIGITS:
            return name
        if name in self.revisions:
            return self.revisions[name]
        if is_commit(name) or name.startswith("refs/"):
            return self._asked_commit(name, reference)
        raise SourceError(f"{reference}: no such branch or tag{self._hint(name)}")

    def _asked_commit(self, name: str, reference: HubReference) -> str:
        if is_offline():
            raise SourceError(f"{reference}: is not in the cache, and HF_HUB_OFFLINE is set")
        told = get_json(f"/api/models/{self.repo}/revision/{quote(name, safe='')}", str(reference))
        commit = told.get("sha") if isinstance(told, dict) else None
        if not isinstance(commit, str):
            raise HubError(f"{reference}: the Hub does not tell the commit")
        return commit

    def _history(self, name: str, reference: HubReference) -> list[tuple[str, str]]:
        """Return (commit, title) from a revision back to the first commit."""
        if name not in self._commits:
            if is_offline():
                raise SourceError(f"{reference}: the cache does not hold the history of {name}")
            revision = quote(self._commit(name, reference), safe="")
            told = get_json(f"/api/models/{self.repo}/commits/{revision}", str(reference))
            try:
                self._commits[name] = [(str(one["id"]), str(one["title"])) for one in told]
            except (LookupError, TypeError) as error:
                raise HubError(f"{reference}: the Hub's list of commits makes no sense") from error
        return self._commits[name]

    def _hint(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.revisions, n=3)
        near = sorted(near, key=natural_order) or sorted(self.revisions, key=natural_order)[-3:]
        return f"; there are {len(self.revisions)}, for example {', '.join(near)}" if near else ""


def list_folder(found: HubRevision) -> dict[str, Entry]:
    """Return what is in a folder, by name; nothing that lies deeper.

    Raises:
        SourceError: If there is no such folder.
        HubError: If the Hub cannot be asked.
    """
    if is_offline():
        return _cached_folder(found)
    path = f"/{quote(found.path)}" if found.path else ""
    what = label_of(found)
    told = get_json(f"/api/models/{found.repo}/tree/{found.commit}{path}", what)
    try:
        entries = [_entry(one, found.path) for one in told]
    except (LookupError, TypeError, ValueError) as error:
        raise HubError(f"{what}: the Hub's list of files makes no sense") from error
    return {entry.name: entry for entry in entries}


def cached_file(found: HubRevision, path: str) -> Path | None:
    """Return where the cache holds a file at a commit; None if it does not."""
    where = try_to_load_from_cache(found.repo, path, revision=found.commit)
    return Path(where) if isinstance(where, str) and os.path.exists(where) else None


def digest_by_name(cached: Path) -> str:
    """Return the digest that the name of a copy in the cache tells, or nothing."""
    name = Path(os.path.realpath(cached)).name
    kind = _KIND_BY_DIGITS.get(len(name)) if set(name) <= set(hexdigits.lower()) else None
    return f"{kind}:{name}" if kind else ""


def remember_revision(found: HubRevision) -> None:
    """Note in the cache what a branch or tag stands for, so that its name is known offline.

    huggingface_hub does so for what it downloads by name; files are asked for by commit here.
    """
    name = found.revision
    if is_commit(name) or "~" in name or ".." in name or name.startswith("/"):
        return
    path = _cached_repository(found.repo) / "refs" / name
    with suppress(OSError):  # a cache that may only be read, or one that is being written
        if not path.is_file() or path.read_text() != found.commit:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
            partial.write_text(found.commit)
            partial.replace(path)


def _matching_paths(found: HubRevision, reference: HubReference) -> list[HubRevision]:
    """Return the files and folders that match a pattern, each part of it by itself."""
    matches = [found]
    for pattern in reference.path.split("/"):
        inside: list[HubRevision] = []
        for folder in matches:
            if not is_glob(pattern):
                names = [pattern]
            else:
                names = sorted(
                    (name for name in list_folder(folder) if fnmatch.fnmatchcase(name, pattern)),
                    key=natural_order,
                )
            inside += [folder._replace(path=f"{folder.path}/{name}".lstrip("/")) for name in names]
        matches = inside
    if not matches:
        raise SourceError(f"{reference}: no file or folder matches at {found.revision}")
    return matches


def _entry(told: Mapping[str, Any], folder: str) -> Entry:
    name = str(told["path"]).removeprefix(f"{folder}/" if folder else "")
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(name)  # it becomes a name on this machine: never one that leads elsewhere
    if told["type"] == "directory":
        return Entry(name, is_folder=True)
    lfs = told.get("lfs")
    digest = f"sha256:{lfs['oid']}" if lfs else f"git-sha1:{told['oid']}"
    size = int(told["size"])
    if size < 0:
        raise ValueError(size)
    return Entry(name, size, digest)


def _cached_repository(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _cached_revisions(repo: str) -> dict[str, str]:
    root = _cached_repository(repo) / "refs"
    found = {
        path.relative_to(root).as_posix(): path.read_text().strip()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".tmp"
    }
    if not found and not _cached_repository(repo).is_dir():
        raise SourceError(f"{repo}: is not in the cache, and HF_HUB_OFFLINE is set")
    return found


def _cached_folder(found: HubRevision) -> dict[str, Entry]:
    folder = _cached_repository(found.repo) / "snapshots" / found.commit / found.path
    # a link to what was removed from the cache is not there
    names = [path for path in sorted(folder.iterdir()) if path.exists()] if folder.is_dir() else []
    if not names:
        what = label_of(found)
        raise SourceError(f"{what}: is not in the cache, and HF_HUB_OFFLINE is set")
    return {
        path.name: Entry(
            path.name, 0 if path.is_dir() else path.stat().st_size, is_folder=path.is_dir()
        )
        for path in names
    }
