"""Repositories in memory: commits, branches, tags and pull requests, without a git underneath."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

LFS_SUFFIXES = (
    ".bin", ".ckpt", ".gguf", ".h5", ".model", ".msgpack", ".npz", ".onnx", ".pt", ".pth",
    ".safetensors",
)  # fmt: skip
LARGEST_REGULAR_NBYTES = 10_000_000


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit: a regular one has its content here, an LFS one its sha256."""

    n_bytes: int
    git_oid: str  # of the pointer file, if it is LFS
    content: bytes | None = None
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def etag(self) -> str:
        """Return what identifies the content."""
        return self.sha256 or self.git_oid


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one time."""

    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    files: Mapping[str, StoredFile]


@dataclass(frozen=True)
class PullRequest:
    """A branch ``refs/pr/<number>`` with a title."""

    number: int
    title: str

    @property
    def ref(self) -> str:
        """Return the branch it is."""
        return f"refs/pr/{self.number}"


@dataclass
class Repository:
    """A model repository."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    def find_commit(self, revision: str) -> Commit | None:
        """Return what a branch, a tag, a pull request or a (shortened) commit id names."""
        oid = (
            self.branches.get(revision.removeprefix("refs/heads/"))
            or self.tags.get(revision.removeprefix("refs/tags/"))
            or revision
        )
        if oid in self.commits:
            return self.commits[oid]
        if re.fullmatch("[0-9a-f]{7,39}", oid):
            found = [commit for commit in self.commits if commit.startswith(oid)]
            if len(found) == 1:
                return self.commits[found[0]]
        return None

    def commit_at(self, revision: str) -> Commit:
        """Return what a revision names.

        Raises:
            KeyError: If there is no such revision.
        """
        commit = self.find_commit(revision)
        if commit is None:
            raise KeyError(f"{self.id}: no revision {revision}")
        return commit

    def history(self, commit: Commit) -> list[Commit]:
        """Return a commit and the ones before it, newest first."""
        commits = [commit]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits

    def last_change(self, commit: Commit, path: str) -> Commit:
        """Return the commit that gave a file the content it has."""
        history = self.history(commit)
        for newer, older in itertools.pairwise(history):
            if older.files.get(path) != newer.files.get(path):
                return newer
        return history[-1]

    def add_commit(
        self,
        branch: str,
        parent: Commit | None,
        changes: Mapping[str, StoredFile | None],
        title: str,
        message: str = "",
    ) -> Commit:
        """Put a commit on a branch; None deletes a file."""
        files = dict(parent.files) if parent is not None else {}
        for path, file in changes.items():
            if file is None:
                files.pop(path, None)
            else:
                files[path] = file
        parent_oid = parent.oid if parent is not None else None
        date = timestamp()
        identity = [
            self.id, len(self.commits), parent_oid, title, date,
            [(path, file.git_oid) for path, file in sorted(files.items())],
        ]  # fmt: skip
        oid = hashlib.sha1(json.dumps(identity).encode(), usedforsecurity=False).hexdigest()
        commit = Commit(oid, parent_oid, title, message, date, files)
        self.commits[oid] = commit
        self.branches[branch] = oid
        return commit

    def add_pull_request(self, base: str, title: str) -> PullRequest:
        """Open a pull request, with nothing changed yet."""
        pull_request = PullRequest(len(self.pull_requests) + 1, title)
        self.pull_requests.append(pull_request)
        self.branches[pull_request.ref] = self.commit_at(base).oid
        return pull_request


def is_lfs(path: str, n_bytes: int) -> bool:
    """Return whether the Hub keeps a file outside git."""
    return n_bytes > LARGEST_REGULAR_NBYTES or (n_bytes > 0 and path.endswith(LFS_SUFFIXES))


def regular_file(content: bytes) -> StoredFile:
    """Describe a file that git holds itself."""
    return StoredFile(len(content), _git_blob_oid(content), content=content)


def lfs_file(sha256: str, n_bytes: int, xet_hash: str | None) -> StoredFile:
    """Describe a file of which git holds a pointer."""
    return StoredFile(
        n_bytes, _git_blob_oid(_pointer(sha256, n_bytes)), sha256=sha256, xet_hash=xet_hash
    )


def file_entry(path: str, file: StoredFile) -> dict[str, Any]:
    """Return how the Hub lists a file."""
    entry: dict[str, Any] = {
        "type": "file",
        "oid": file.git_oid,
        "size": file.n_bytes,
        "path": path,
    }
    if file.sha256 is not None:
        entry["lfs"] = {
            "oid": file.sha256,
            "size": file.n_bytes,
            "pointerSize": len(_pointer(file.sha256, file.n_bytes)),
        }
    if file.xet_hash is not None:
        entry["xetHash"] = file.xet_hash
    return entry


def directory_entry(path: str) -> dict[str, Any]:
    """Return how the Hub lists a directory."""
    oid = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def timestamp() -> str:
    """Return the present time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _pointer(sha256: str, n_bytes: int) -> bytes:
    version = "https://git-lfs.github.com/spec/v1"
    return f"version {version}\noid sha256:{sha256}\nsize {n_bytes}\n".encode()


def _git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
