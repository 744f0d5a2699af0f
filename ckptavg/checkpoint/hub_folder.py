"""Folders on the Hub: listed once, read by ranges, their small files fetched where asked for."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING

from ckptavg.checkpoint.files import PositionalFile, ReadableFile
from ckptavg.checkpoint.folder import (
    MAX_SIDE_FILE_BYTES,
    TEMPLATE_DIRECTORY,
    WEIGHT_SUFFIXES,
    is_side_file,
)
from ckptavg.errors import CheckpointError
from ckptavg.hub import label_of
from ckptavg.tensors import HubRevision

if TYPE_CHECKING:  # importing huggingface_hub takes longer than averaging many models
    from ckptavg.hub.catalog import Entry
    from ckptavg.hub.connection import HubConnection

_SMALL_BYTES = 2**20


class HubFolder:
    """A folder in a repository on the Hub, at one commit."""

    def __init__(self, found: HubRevision, connection: "HubConnection") -> None:
        """List the folder.

        Raises:
            SourceError: If it is not there.
            HubError: If the Hub cannot be asked.
        """
        self.label = label_of(found)
        self._found = found
        self._connection = connection
        self._entries = connection.list_folder(found)
        self._opened: dict[str, ReadableFile] = {}
        self._directory: TemporaryDirectory[str] | None = None
        self._lock = Lock()

    @property
    def hub(self) -> HubRevision | None:
        """The repository, the commit and the folder."""
        return self._found

    def names(self) -> Sequence[str]:
        """Return the names in it."""
        return sorted(self._entries)

    def has(self, name: str) -> bool:
        """Tell whether a name is there."""
        return name in self._entries

    def is_folder(self, name: str) -> bool:
        """Tell whether it is a folder."""
        return name in self._entries and self._entries[name].is_folder

    def leads_nowhere(self, name: str) -> bool:
        """Tell that it is none: links of git are small files here."""
        return False

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return self._entries[name].size if name in self._entries else 0

    def inside(self, name: str) -> "HubFolder":
        """Return a folder in it; asks the Hub what is there."""
        return HubFolder(self._found._replace(path=self._path(name)), self._connection)

    def open(self, name: str, label: str) -> ReadableFile:
        """Open a file in it, from the cache if it is there; what is read from the Hub is kept."""
        entry = self._entries.get(name)
        if entry is None or entry.is_folder:
            raise CheckpointError(f"{label}: no such file on the Hub")
        file = self._opened.get(name)
        if file is None:
            file = open_hub_file(self._connection, self._found, self._path(name), entry, label)
            if not isinstance(file, PositionalFile):  # closing it ends it
                self._opened[name] = file
        return file

    def state(self) -> object:
        """Nothing changes at a commit."""
        return None

    def local_directory(self) -> Path:
        """Fetch the small files into a temporary directory, once."""
        with self._lock:
            if self._directory is None:
                directory = TemporaryDirectory(prefix="ckptavg-side-files-")
                try:
                    self._fetch_side_files(Path(directory.name))
                except BaseException:
                    directory.cleanup()
                    raise
                self._directory = directory
            return Path(self._directory.name)

    def close(self) -> None:
        """Remove what was fetched."""
        with self._lock:
            if self._directory is not None:
                self._directory.cleanup()
                self._directory = None

    def _fetch_side_files(self, directory: Path) -> None:
        wanted = {
            entry.name: entry
            for entry in self._entries.values()
            if not entry.is_folder
            and is_side_file(entry.name)
            and entry.size <= MAX_SIDE_FILE_BYTES
        }
        if self.is_folder(TEMPLATE_DIRECTORY):
            inside = self._found._replace(path=self._path(TEMPLATE_DIRECTORY))
            (directory / TEMPLATE_DIRECTORY).mkdir()
            for entry in self._connection.list_folder(inside).values():
                if entry.name.endswith(".jinja") and entry.size <= MAX_SIDE_FILE_BYTES:
                    wanted[f"{TEMPLATE_DIRECTORY}/{entry.name}"] = entry

        def fetch(name: str) -> None:
            label = f"{self.label}/{name}"
            file = self._opened.get(name) or open_hub_file(
                self._connection, self._found, self._path(name), wanted[name], label
            )
            try:
                content = file.read(0, file.size)
                file.verify()
            finally:
                file.close()
            (directory / name).write_bytes(content)

        self._connection.map(fetch, [one for one in wanted if wanted[one].size <= _SMALL_BYTES])
        for name in wanted:  # one at a time: each is held whole
            if wanted[name].size > _SMALL_BYTES:
                fetch(name)

    def _path(self, name: str) -> str:
        return f"{self._found.path}/{name}".lstrip("/")


def names_a_file(found: HubRevision) -> bool:
    """Tell whether a path on the Hub is that of a weight file rather than of a folder."""
    return found.path.endswith(WEIGHT_SUFFIXES)


def open_hub_weights(found: HubRevision, connection: "HubConnection", label: str) -> ReadableFile:
    """Open a single weight file on the Hub.

    Raises:
        CheckpointError: If it is not there.
        HubError: If the Hub cannot be asked.
    """
    folder, _, name = found.path.rpartition("/")
    return HubFolder(found._replace(path=folder), connection).open(name, label)


def open_hub_file(
    connection: "HubConnection", found: HubRevision, path: str, entry: "Entry", label: str
) -> ReadableFile:
    """Open one file: its copy in the cache, or else the one on the Hub."""
    cached = connection.cached_file(found, path, entry, label)
    if cached is not None:
        digest = connection.digest_of(cached, entry)
        file = PositionalFile(cached, label, digest)
        if connection.was_checked(cached):
            file.note_digest(digest)
        return file
    return connection.open_file(found, path, entry, label)
