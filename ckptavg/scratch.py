"""A directory beside the output for what a search has found so far; it outlives an interruption."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckptavg.errors import OutputError
from ckptavg.line_log import LineLog
from ckptavg.staging import Stage


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
        self._stage = Stage(output, kind, digest, shown=output)
        self.path = self._stage.path
        self.notes: list[str] = []
        self._shown = output
        self._log: LineLog | None = None

    def __enter__(self) -> Self:
        try:
            self._stage.hold()
            self._stage.make()
            if self._stage.clear_others():
                self.notes.append(
                    f"{self._shown}: an interrupted search had other inputs or options; what it "
                    "left was removed, and this one started afresh"
                )
            self._log = LineLog(self.path / "log.jsonl")
        except OSError as error:
            self._stage.abandon()
            raise self.failed(error) from error
        except BaseException:
            self._stage.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not self.entries or not self._is_kept:
            self._stage.abandon()
            return
        error.add_note(
            f"what was evaluated is kept in {self.path.name}; the same command goes on from it"
        )
        self._stage.release()

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
