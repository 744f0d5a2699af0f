"""A directory beside the output for what a search has found so far; it outlives an interruption."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckptavg.directories import abandoned, make_parents, open_lock, remove_empty
from ckptavg.errors import OutputError
from ckptavg.line_log import LineLog


class Scratch:
    """A locked directory with a log; a context manager that removes it when all is done.

    Left by an error or an interruption, the directory stays if the log holds anything, so that the
    same call goes on.

    Attributes:
        path: The directory.
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
        self.notes: list[str] = []
        self._shown = output
        self._lock_path = self.path.with_name(f"{self.path.name}.lock")
        self._lock = -1
        self._log: LineLog | None = None
        self._made_parents: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._made_parents = make_parents(self.path)
            lock = open_lock(self._lock_path)
            if lock is None:
                raise OutputError(f"{self._shown}: the same search is under way at this moment")
            self._lock = lock
            self.path.mkdir(exist_ok=True)
            self._clear_others()
            self._log = LineLog(self.path / "log.jsonl")
        except OSError as error:
            self._remove()
            raise self.failed(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not self.entries or not self._is_kept:
            self._remove()
            return
        error.add_note(
            f"what was evaluated is kept in {self.path.name}; the same command goes on from it"
        )
        os.close(self._lock)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What the log holds."""
        return [] if self._log is None else self._log.entries

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add an entry to the log, and bring it to the storage.

        Raises:
            OutputError: If the storage refuses.
        """
        if self._log is None:
            raise AssertionError("the context is entered")
        try:
            self._log.add(entry)
        except OSError as error:
            raise self.failed(error) from error

    def failed(self, error: OSError) -> OutputError:
        """Return the error for a storage that refuses."""
        reason = (error.strerror or str(error)).lower()
        return OutputError(f"{self._shown}: {self.path.name} cannot be written: {reason}")

    def _clear_others(self) -> None:
        """Remove what searches with other inputs or options left behind, unless they are alive."""
        for stale in abandoned(self.path):
            if stale.is_dir() and not stale.is_symlink():
                shutil.rmtree(stale, ignore_errors=True)
                self.notes.append(
                    f"{self._shown}: an interrupted search had other inputs or options; what it "
                    "left was removed, and this one started afresh"
                )

    def _remove(self) -> None:
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):
                self._lock_path.unlink()
            os.close(self._lock)
            self._lock = -1
        remove_empty(self._made_parents)
