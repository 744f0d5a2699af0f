"""A directory beside the output for what a search has found so far; it outlives an interruption."""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckptavg.checkpoint.files import open_descriptor
from ckptavg.directories import open_lock
from ckptavg.errors import OutputError

_SUFFIX = re.compile(r"-[0-9a-f]{16}$")


class Scratch:
    """A locked directory with a log; a context manager that removes it when all is done.

    The log is one JSON object a line, each on the storage before the next is written; what follows
    a line that was cut off is cut off as well. Left by an error or an interruption, the directory
    stays if it holds anything worth keeping, so that the same call goes on.

    Attributes:
        path: The directory.
        entries: What the log held when it was opened.
        notes: What the user should know about what was found, one sentence each.
    """

    def __init__(self, output: Path, kind: str, identity: str | None) -> None:
        """Prepare; nothing is made before the context is entered.

        Args:
            output: The output that it lies beside.
            kind: What the search is called: part of the name.
            identity: What tells this search from others: inputs, options, judge. None if nothing
                does: it can not be continued then.
        """
        self._is_kept = identity is not None
        identity = identity or os.urandom(16).hex()
        digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        output = Path(os.path.abspath(output))
        self.path = output.with_name(f"{output.name}.{kind}-{digest}")
        self.entries: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._prefix = f"{output.name}.{kind}"
        self._shown = output
        self._lock_path = self.path.with_name(f"{self.path.name}.lock")
        self._lock = -1
        self._log_path = self.path / "log.jsonl"
        self._n_entries = 0
        self._made_parents: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._make_parents()
            lock = open_lock(self._lock_path)
            if lock is None:
                raise OutputError(f"{self._shown}: the same search is under way at this moment")
            self._lock = lock
            self.path.mkdir(exist_ok=True)
            self._clear_others()
            self._read_log()
        except OSError as error:
            self._remove()
            raise self.failed(error) from error
        self._n_entries = len(self.entries)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not self._n_entries or not self._is_kept:
            self._remove()
            return
        error.add_note(
            f"what was evaluated is kept in {self.path.name}; the same command goes on from it"
        )
        os.close(self._lock)

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add an entry to the log, and bring it to the storage.

        Raises:
            OutputError: If the storage refuses.
        """
        line = memoryview(f"{json.dumps(entry)}\n".encode())
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            descriptor = open_descriptor(self._log_path, flags, 0o666)
            try:
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self.failed(error) from error
        self._n_entries += 1

    def failed(self, error: OSError) -> OutputError:
        """Return the error for a storage that refuses."""
        reason = (error.strerror or str(error)).lower()
        return OutputError(f"{self._shown}: {self.path.name} cannot be written: {reason}")

    def _read_log(self) -> None:
        if not self._log_path.exists():
            return
        content, good = self._log_path.read_bytes(), 0
        for line in content.split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict):
                break
            self.entries.append(entry)
            good += len(line) + 1
        if good < len(content):
            os.truncate(self._log_path, good)

    def _clear_others(self) -> None:
        """Remove what searches with other inputs or options left behind, unless they are alive."""
        found = self.path.parent.glob(f"{glob.escape(self._prefix)}-*")
        names = {path.name.removesuffix(".lock") for path in found} - {self.path.name}
        for name in sorted(filter(_SUFFIX.search, names)):
            lock_path = self.path.with_name(f"{name}.lock")
            try:
                lock = open_lock(lock_path)
            except OSError:  # not ours to open
                continue
            if lock is None:
                continue
            stale = self.path.with_name(name)
            if stale.is_dir() and not stale.is_symlink():
                shutil.rmtree(stale, ignore_errors=True)
                self.notes.append(
                    f"{self._shown}: an interrupted search had other inputs or options; what it "
                    "left was removed, and this one started afresh"
                )
            lock_path.unlink(missing_ok=True)
            os.close(lock)

    def _remove(self) -> None:
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):
                self._lock_path.unlink()
            os.close(self._lock)
            self._lock = -1
        with suppress(OSError):  # the first that holds something else ends it
            for parent in reversed(self._made_parents):
                parent.rmdir()

    def _make_parents(self) -> None:
        missing, parent = [], self.path.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            self._made_parents.append(one)
