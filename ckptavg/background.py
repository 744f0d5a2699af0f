"""What goes on beside an average: the storage takes what is written, and it is hashed."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import monotonic

from ckptavg.blocks import Differing
from ckptavg.hub.threads import Latch, start
from ckptavg.journal import Journal, remove_journals
from ckptavg.writer import ModelWriter

_PAUSE_SECONDS = 0.05
_SYNC_SECONDS = 30.0  # how much work a failure of the machine may cost


class Background:
    """Threads that keep the storage busy, vouch for what it holds, and hash what is whole.

    Attributes:
        error: What the storage refused; the system tells of it only once.
    """

    def __init__(
        self,
        models: Sequence[ModelWriter],
        finished: Mapping[int, Differing],
        journal: Journal,
        partial: Path,
        *,
        hashes: bool,
    ) -> None:
        """Start.

        Args:
            models: What is written.
            finished: The blocks that are, which others add to.
            journal: Where synced blocks are noted.
            partial: The directory of the journals.
            hashes: Whether to hash, too.
        """
        self.error: OSError | None = None
        self._models = models
        self._finished = finished
        self._journal = journal
        self._partial = partial
        self._is_over = Latch()
        works = [self._write_back, self._hash_along] if hashes else [self._write_back]
        self._threads = [Thread(target=work, daemon=True) for work in works]
        try:
            for thread in self._threads:
                start(thread)
        except BaseException:
            self._is_over.set()
            raise

    def end(self) -> None:
        """Stop; twice is allowed."""
        self._is_over.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _write_back(self) -> None:
        next_sync = monotonic() + _SYNC_SECONDS
        while not self._is_over.wait(_PAUSE_SECONDS):
            for model in self._models:
                model.start_writeback()
            if monotonic() > next_sync:
                try:
                    self._journal.sync(
                        descriptor for model in self._models for descriptor in model.descriptors
                    )
                except OSError as error:  # the next sync would not tell it again
                    self.error = error
                    with suppress(OSError):
                        remove_journals(self._partial)
                    return
                next_sync = monotonic() + _SYNC_SECONDS

    def _hash_along(self) -> None:
        while not self._is_over.wait(_PAUSE_SECONDS):
            for model in self._models:
                try:
                    model.hash_along(self._finished, lambda: self._is_over.is_set)
                except (OSError, MemoryError):  # it shows again at the end, where it can be told
                    return
