"""One run's dealings with the Hub: what it asked, what it reads, what it keeps."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import TypeVar

from huggingface_hub import hf_hub_download

from ckptavg.errors import CheckpointError, SourceError
from ckptavg.hub import catalog
from ckptavg.hub.catalog import Entry, HubRepository
from ckptavg.hub.read_ahead import CONNECTIONS, ReadAhead
from ckptavg.hub.references import HubReference
from ckptavg.hub.remote_file import HubFile, content_hash
from ckptavg.hub.threads import in_parallel
from ckptavg.hub.transport import is_offline, traffic, tried
from ckptavg.tensors import HubRevision

_HASHED_AT_ONCE_BYTES = 2**20

A = TypeVar("A")
B = TypeVar("B")


class HubConnection:
    """What checkpoints on the Hub are found and read through."""

    def __init__(self, *, cache: bool = False, connections: int | None = None) -> None:
        """Ask nothing yet.

        Args:
            cache: Keep whole files in the cache of huggingface_hub instead of streaming them.
            connections: Requests that may be under way at once; None for the usual number.
        """
        self._cache = cache
        self._read_ahead = ReadAhead(connections or CONNECTIONS)
        self._repositories: dict[str, HubRepository] = {}
        self._checked: set[Path] = set()  # copies whose hash was looked at
        self._folders: dict[tuple[str, str, str], dict[str, Entry]] = {}
        self._lock = Lock()
        self._n_bytes_before = traffic.nbytes

    @property
    def fetched_nbytes(self) -> int:
        """Bytes that were fetched since the beginning."""
        return traffic.nbytes - self._n_bytes_before

    def repository(self, repo: str) -> HubRepository:
        """Return what is known of a repository, and will be asked for once."""
        with self._lock:
            return self._repositories.setdefault(repo, HubRepository(repo))

    def find(self, reference: HubReference) -> list[HubRevision]:
        """Return what a reference stands for; see ``HubRepository.find``."""
        return self.repository(reference.repo).find(reference)

    def list_folder(self, found: HubRevision) -> dict[str, Entry]:
        """Return what is in a folder, asked once; see ``catalog.list_folder``."""
        key = found.repo, found.commit, found.path
        if key not in self._folders:
            self._folders[key] = catalog.list_folder(found)
        return self._folders[key]

    def open_file(self, found: HubRevision, path: str, entry: Entry, label: str) -> HubFile:
        """Open a file that is read by ranges."""
        return HubFile(found, path, entry, label, self._read_ahead)

    def cached_file(self, found: HubRevision, path: str, entry: Entry, label: str) -> Path | None:
        """Return a file's copy in the cache, fetching it where that was asked for; else None.

        Raises:
            SourceError: If it is not there, and there is no network.
            CheckpointError: If what arrived is not what the Hub says.
        """
        there = catalog.cached_file(found, path)
        if there is None and is_offline():
            raise SourceError(f"{label}: is not in the cache, and HF_HUB_OFFLINE is set")
        if not self._cache:
            return there
        if there is None:
            there = Path(
                tried(
                    lambda: hf_hub_download(found.repo, path, revision=found.commit),
                    label,
                    has_deadline=False,  # a whole file; it has timeouts of its own
                )
            )
            if not _is_whole(there, entry):
                Path(os.path.realpath(there)).unlink()
                there.unlink(missing_ok=True)
                raise CheckpointError(
                    f"{label}: what arrived is not what the Hub says (its hash differs): the "
                    "transfer went wrong, try again; it is gone from the cache"
                )
            self._checked.add(there)
        catalog.remember_revision(found)
        return there

    def digest_of(self, cached: Path, entry: Entry) -> str:
        """Return what a copy in the cache must have as its digest; empty if nothing tells.

        Offline the name of the copy tells: huggingface_hub calls it by its hash.
        """
        return entry.digest or catalog.digest_by_name(cached)

    def was_checked(self, cached: Path) -> bool:
        """Tell whether a copy was compared with its digest when it arrived."""
        return cached in self._checked

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Call a function for each item, several at once, and return what they give in order."""
        return in_parallel(function, items, self._read_ahead.connections)

    def fit(self, max_bytes: int, n_files: int, largest_bytes: int) -> int:
        """Fit what is read ahead into memory; see ``ReadAhead.fit``."""
        return self._read_ahead.fit(max_bytes, n_files, largest_bytes)

    def cancel(self) -> None:
        """Make everything that waits for the Hub fail soon; from any thread."""
        self._read_ahead.cancel()


def _is_whole(path: Path, entry: Entry) -> bool:
    """Tell whether a file has the hash that the Hub tells, if it tells one."""
    found = content_hash(entry)
    if found is None:
        return True
    with path.open("rb") as file:
        while content := file.read(_HASHED_AT_ONCE_BYTES):
            found.update(content)
    return bool(found.hexdigest() == entry.digest.partition(":")[2])
