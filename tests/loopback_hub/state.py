"""What a hub holds and how it is set up: all that its endpoints work on."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from loopback_hub.blobs import BlobStore
from loopback_hub.repositories import (
    Commit,
    Repository,
    StoredFile,
    is_lfs,
    lfs_file,
    regular_file,
)
from loopback_hub.xet import XetStore

USER = "tester"


@dataclass
class HubState:
    """The repositories, the large files, and the settings of one hub."""

    blobs: BlobStore
    xet: XetStore | None
    tokens: frozenset[str]
    page_size: int
    multipart_over_bytes: int | None
    repositories: dict[str, Repository] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    url_generation: int = 0
    hub_url: str = ""
    cdn_url: str = ""

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repository:
        """Make a repository with the first commit that the Hub puts into each."""
        attributes = regular_file(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repository = Repository(repo_id, private=private, gated=gated)
        repository.add_commit("main", None, {".gitattributes": attributes}, "initial commit")
        with self.lock:
            self.repositories[repo_id] = repository
        return repository

    def store(self, path: str, content: bytes | Path) -> StoredFile:
        """Keep a file's content; that of a path is always LFS, and never read into memory."""
        if isinstance(content, Path):
            return self._store_lfs(self.blobs.add_file(content), content.stat().st_size)
        if not is_lfs(path, len(content)):
            return regular_file(content)
        sha256 = self.blobs.add_pieces([content])
        assert sha256 is not None  # none was expected
        return self._store_lfs(sha256, len(content))

    def _store_lfs(self, sha256: str, n_bytes: int) -> StoredFile:
        xet_hash = self.xet.add(self.blobs.path(sha256), sha256) if self.xet is not None else None
        return lfs_file(sha256, n_bytes, xet_hash)

    def uploaded_file(self, sha256: str, n_bytes: int) -> StoredFile | None:
        """Describe what a client has uploaded, or None if it has not."""
        blob = self.blobs.path(sha256)
        xet_hash = self.xet.fetch(sha256, n_bytes, blob) if self.xet is not None else None
        if not self.blobs.has(sha256) or blob.stat().st_size != n_bytes:
            return None
        return lfs_file(sha256, n_bytes, xet_hash)

    def content(self, file: StoredFile) -> bytes:
        """Return a file's bytes."""
        if file.content is not None:
            return file.content
        assert file.sha256 is not None  # a file is regular or LFS
        return self.blobs.path(file.sha256).read_bytes()

    def commit(
        self,
        repo_id: str,
        branch: str,
        files: Mapping[str, bytes | Path | None],
        title: str,
        *,
        orphan: bool,
    ) -> Commit:
        """Put files on a branch; a new branch starts from main, or from nothing."""
        changes = {
            path: None if content is None else self.store(path, content)
            for path, content in files.items()
        }
        with self.lock:
            repository = self.repositories[repo_id]
            parent = None
            if not orphan:
                parent = repository.find_commit(branch) or repository.commit_at("main")
            return repository.add_commit(branch, parent, changes, title)

    def signed_url(self, path: str, **parameters: str) -> str:
        """Return an address on the CDN that is good until urls expire."""
        query = "".join(f"&{name}={quote(value)}" for name, value in parameters.items())
        return f"{self.cdn_url}{path}?generation={self.url_generation}{query}"
