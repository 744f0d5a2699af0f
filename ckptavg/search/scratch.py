"""A directory beside the output for what a search has found so far; it outlives an interruption."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckptavg.checkpoint.files import open_descriptor
from ckptavg.directories import open_lock
from ckptavg.errors import ModelError, OutputError


class Scratch:
    """A locked directory with a log; a context manager that removes it when all is done.

    The log is one JSON object a line, each on the storage before the next is written; a last line
    that was cut off is passed over. Left by an interruption or by an evaluation that failed, the
    directory stays, so that the same call goes on; left by any other error it is removed.

    Attributes:
        path: The directory.
        entries: What the log held when it was opened.
    """

    def __init__(self, output: Path, kind: str, identity: str) -> None:
        """Prepare; nothing is made before the context is entered.

        Args:
            output: The output that it lies beside.
            kind: What the search is called: part of the name.
            identity: What tells this search from others: inputs, options, judge.
        """
        digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        output = Path(os.path.abspath(output))
        self.path = output.with_name(f"{output.name}.{kind}-{digest}")
        self.entries: list[dict[str, Any]] = []
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
        except OSError as error:
            raise self.failed(error) from error
        with suppress(OSError):
            for line in self._log_path.read_bytes().split(b"\n")[:-1]:
                with suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, dict):
                        self.entries.append(entry)
        self._n_entries = len(self.entries)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_kept = isinstance(error, ModelError) or not isinstance(error, Exception | None)
        if error is not None and is_kept and self._n_entries:
            error.add_note(
                f"what was evaluated is kept in {self.path.name}; the same command goes on from it"
            )
        else:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):
                self._lock_path.unlink()
            with suppress(OSError):  # the first that holds something else ends it
                for parent in reversed(self._made_parents):
                    parent.rmdir()
        os.close(self._lock)

    def _make_parents(self) -> None:
        missing, parent = [], self.path.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            self._made_parents.append(one)

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add an entry to the log, and bring it to the storage.

        Raises:
            OutputError: If the storage refuses.
        """
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            descriptor = open_descriptor(self._log_path, flags, 0o666)
            try:
                os.write(descriptor, f"{json.dumps(entry)}\n".encode())  # one call: never mixed up
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
