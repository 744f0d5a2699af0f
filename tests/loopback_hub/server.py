"""The hub that tests start: two servers, the repositories they show, and a record of requests."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from loopback_hub.blobs import BlobStore
from loopback_hub.cdn import Cdn
from loopback_hub.faults import Fault, FaultQueue
from loopback_hub.hub_api import HubApi
from loopback_hub.listener import Listener, Traffic
from loopback_hub.messages import Request, ServerName
from loopback_hub.repositories import Commit
from loopback_hub.state import HubState
from loopback_hub.xet import XetStore


class LoopbackHub:
    """A Hugging Face Hub on this machine, for models.

    The CDN has another host name than the Hub, not just another port: clients compare host names
    when they decide whether to pass on a token.
    """

    def __init__(
        self,
        root: Path,
        *,
        xet: bool = False,
        tokens: Iterable[str] = ("hf_test",),
        page_size: int = 1000,
        multipart_over_bytes: int | None = None,
    ) -> None:
        """Start serving.

        Args:
            root: A directory for large files; made if it is missing, never removed.
            xet: Whether clients with ``hf_xet`` are to use it.
            tokens: Each gives the right to everything.
            page_size: How many entries a listing shows at a time.
            multipart_over_bytes: Larger files are uploaded in parts of this size.
        """
        self.xet = xet
        self._state = HubState(
            blobs=BlobStore(root),
            xet=XetStore(root) if xet else None,
            tokens=frozenset(tokens),
            page_size=page_size,
            multipart_over_bytes=multipart_over_bytes,
        )
        self._traffic = Traffic()
        self._hub = Listener("hub", self._traffic, HubApi(self._state).respond)
        self._cdn = Listener("cdn", self._traffic, Cdn(self._state).respond)
        self._state.hub_url = f"http://127.0.0.1:{self._hub.server_port}"
        self._state.cdn_url = f"http://localhost:{self._cdn.server_port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut all connections and stop; may be called again."""
        if self._traffic.closing.is_set():
            return
        self._traffic.closing.set()
        self._hub.close()
        self._cdn.close()

    @property
    def url(self) -> str:
        """Return the address of the Hub."""
        return self._state.hub_url

    @property
    def cdn_url(self) -> str:
        """Return the address of the CDN."""
        return self._state.cdn_url

    # repositories

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> None:
        """Make a repository, with one commit on main."""
        self._state.create(repo_id, private=private, gated=gated)

    def commit(
        self,
        repo_id: str,
        branch: str,
        files: Mapping[str, bytes | Path | None],
        title: str = "commit",
        *,
        orphan: bool = False,
    ) -> str:
        """Change files on a branch and return the commit's id.

        Args:
            repo_id: The repository.
            branch: Made from the head of main if it does not exist.
            files: The content of each path, or None to delete it. A ``Path`` becomes an LFS file
                by a hard link where that is possible: do not write to it afterwards.
            title: The commit's title.
            orphan: Start from nothing: the commit has these files only and no parent.
        """
        return self._state.commit(repo_id, branch, files, title, orphan=orphan).oid

    def branch(self, repo_id: str, name: str, start: str = "main") -> None:
        """Make a branch, or move it."""
        repository = self._state.repositories[repo_id]
        repository.branches[name] = repository.commit_at(start).oid

    def tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        """Tag a revision."""
        repository = self._state.repositories[repo_id]
        repository.tags[name] = repository.commit_at(revision).oid

    def repositories(self) -> list[str]:
        """Return the ids of the repositories there are."""
        return sorted(self._state.repositories)

    def branches(self, repo_id: str) -> dict[str, str]:
        """Return the head of each branch; those of pull requests are ``refs/pr/<number>``."""
        return dict(self._state.repositories[repo_id].branches)

    def tags(self, repo_id: str) -> dict[str, str]:
        """Return the commit of each tag."""
        return dict(self._state.repositories[repo_id].tags)

    def commits(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """Return the history of a revision, newest first."""
        repository = self._state.repositories[repo_id]
        return repository.history(repository.commit_at(branch))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return all files at a revision."""
        commit = self._state.repositories[repo_id].commit_at(revision)
        return {path: self._state.content(file) for path, file in sorted(commit.files.items())}

    # trouble

    @property
    def faults(self) -> FaultQueue:
        """Return the faults that are still to come."""
        return self._traffic.faults

    def inject(self, *faults: Fault) -> None:
        """Queue faults behind those that are there."""
        for fault in faults:
            self._traffic.faults.add(fault)

    def expire_urls(self) -> None:
        """Let every address on the CDN that was handed out so far answer 403."""
        self._state.url_generation += 1

    # the record

    @property
    def requests(self) -> list[Request]:
        """Return all requests so far, in the order in which they came in; may be cleared."""
        return self._traffic.requests

    def find(self, method: str, path: str = "", server: ServerName | None = None) -> list[Request]:
        """Return the requests of a method whose path, or part of it, matches a pattern."""
        return [
            request
            for request in list(self.requests)
            if request.method == method
            and re.search(path, request.path) is not None
            and server in (None, request.server)
        ]

    def count(self, method: str, path: str = "", server: ServerName | None = None) -> int:
        """Return how many requests ``find`` finds."""
        return len(self.find(method, path, server))

    @property
    def sent_bytes(self) -> int:
        """Return how many bytes of bodies both servers have sent."""
        return sum(request.sent_bytes for request in list(self.requests))
