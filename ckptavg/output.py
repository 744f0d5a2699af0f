"""The directory being made: locked, journaled, continued after an interruption, published at once.

Everything is written into ``OUT.partial-<fingerprint>/`` beside the output, synced to storage,
and renamed. OUT either does not exist, is what it was before, or is complete.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptavg.background import Background
from ckptavg.blocks import Differing
from ckptavg.destination import check_replaceable
from ckptavg.directories import bottom_up, sync_directory
from ckptavg.errors import AfterPublishError, OutputError, ProcessEndedError
from ckptavg.hashing import FileHash
from ckptavg.hub.threads import in_parallel
from ckptavg.journal import (
    EVALUATIONS_NAME,
    JOURNAL_PREFIX,
    Journal,
    has_journal,
    read_journals,
    remove_journals,
)
from ckptavg.plan import AveragePlan
from ckptavg.staging import PARTIAL, Stage, after_publishing
from ckptavg.writer import ModelWriter, write_small_file


class OutputDirectory:
    """Makes one or several model directories; a context manager.

    Left by an error, it removes what it wrote; left by an interruption (of another process, too),
    it keeps that, so that the same run continues it, where the file system has locks. Several
    processes may write one output: that of rank 0 makes it, recovers it and publishes it, the
    others enter later and write into it.

    Attributes:
        models: A writer for each output of the plan.
        finished: The blocks that are written, with what differed in them.
        notes: What the user should know about what was found, one sentence each.
    """

    def __init__(
        self,
        output: Path,
        plan: AveragePlan,
        *,
        metadata: Sequence[Mapping[str, str]],
        overwrite: bool,
        rank: int = 0,
        hash_along: bool = True,
    ) -> None:
        """Prepare to write; nothing is created before the context is entered.

        Args:
            output: The directory to publish.
            plan: What will be written.
            metadata: String map for the weight files' headers, one an output of the plan.
            overwrite: Whether an existing output is replaced.
            rank: Number of this process among those that write the output.
            hash_along: Whether what is written is what will be published, so that hashing it
                meanwhile saves time.
        """
        self._stage = Stage(output, PARTIAL, plan.fingerprint, shown=output, is_own=has_journal)
        self.output, self.partial = self._stage.target, self._stage.path
        self.models = [
            ModelWriter(self.partial / one.name, plan, metadata=strings, failed=self.failed)
            for one, strings in zip(plan.outputs, metadata, strict=True)
        ]
        self.finished: dict[int, Differing] = {}
        self.notes: list[str] = []
        self._shown = output
        self._n_blocks = len(plan.blocks)
        # hashes of what is streamed are known at its end only: half a run proves nothing
        self._is_streamed = plan.is_streamed
        self._overwrite = overwrite
        self._rank = rank
        self._hash_along = hash_along and rank == 0
        self._journal: Journal | None = None
        self._background: Background | None = None
        self._published = False

    def __enter__(self) -> Self:
        try:
            if self._rank == 0:
                self._make()
            elif not all(model.reopen() for model in self.models):
                raise OutputError(
                    f"{self._shown}: rank {self._rank} does not see the files that rank 0 made; "
                    "the output must be on a file system that all processes share"
                )
            self._journal = Journal(self.partial, self._rank)
            for block, differing in self.finished.items():
                self._journal.record(block, differing)
            self._journal.sync(())  # recovered blocks were synced before
            self._background = Background(
                self.models, self.finished, self._journal, self.partial, hashes=self._hash_along
            )
        except OSError as error:
            self._abandon()
            raise self.failed(error) from error
        except BaseException as error:
            self._leave_unpublished(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # it is no more needed, or told below
            self._end_journal()
        if not self._published and not self._stage.is_in_place():
            self._leave_unpublished(error)
        elif error is not None and not isinstance(error, AfterPublishError):
            self._close()
            raise after_publishing(self._shown, error) from error

    def finish_block(self, block: int, differing: Differing) -> None:
        """Note that a block is written to every model; one call at a time.

        Raises:
            OutputError: If the storage refuses.
        """
        self.finished[block] = differing
        try:
            if (failure := self._background_error()) is not None:
                raise failure
            if self._journal is not None:
                self._journal.record(block, differing)
        except OSError as error:
            raise self.failed(error) from error

    def sync(self) -> None:
        """Bring all that this process wrote into the weight files to the storage.

        Raises:
            OutputError: If the storage refuses, or refused before.
        """
        self._end_background()
        if (failure := self._background_error()) is not None:
            raise self.failed(failure) from failure
        for model in self.models:
            model.sync()

    def sync_and_hash(self, n_threads: int) -> list[dict[str, FileHash]]:
        """Return the hashes of each model's files, while the storage takes what was written.

        Args:
            n_threads: How many threads hash weight files.

        Raises:
            OutputError: If the storage refuses.
        """
        found = [dict(model.small_files) for model in self.models]

        def hash_one(model: int, shard: int, name: str) -> None:
            found[model][name] = self.models[model].hash_weights(shard)

        self._end_background()
        tasks: list[Callable[[], None]] = [
            self.sync,
            *(
                partial(hash_one, number, shard, name)
                for number, model in enumerate(self.models)
                for shard, name in enumerate(model.weight_filenames())
            ),
        ]
        in_parallel(lambda task: task(), tasks, n_threads + 1)
        return found

    def end_journal(self) -> None:
        """Say that from here on files change which the journal calls finished: it is removed.

        Raises:
            OutputError: If the storage refuses.
        """
        try:
            self._end_journal()
            remove_journals(self.partial)
            sync_directory(self.partial)
        except OSError as error:
            raise self.failed(error) from error

    def add_file(self, name: str, content: bytes) -> None:
        """Add a small file beside all models.

        Raises:
            OutputError: If it cannot be written.
        """
        try:
            write_small_file(self.partial / name, content)
        except OSError as error:
            raise self.failed(error) from error

    def keep_only(self, index: int) -> None:
        """Leave nothing but one model, and make it the output itself; the journal is ended.

        Raises:
            OutputError: If the storage refuses.
        """
        kept = self.models[index]
        if kept.directory == self.partial:  # the only one
            return
        aside = self.partial / ".kept"
        try:
            for model in self.models:
                if model is not kept:
                    model.close()
                    shutil.rmtree(model.directory)
            kept.directory.rename(aside)  # its name may be that of a file in it
            for entry in aside.iterdir():
                entry.rename(self.partial / entry.name)
            aside.rmdir()
        except OSError as error:
            raise self.failed(error) from error
        kept.directory = self.partial
        self.models = [kept]

    def failed(self, error: OSError) -> OutputError:
        """Return the error for a storage that refuses."""
        reason = (error.strerror or str(error)).lower()
        return OutputError(f"{self._shown}: cannot be written: {reason}; nothing was published")

    def publish(self) -> None:
        """Sync everything to storage and give the directory its name, in one step.

        Raises:
            OutputError: If anything fails; what was there before is untouched.
            AfterPublishError: If the output is in place, but the storage did not confirm it or
                the replaced directory could not be removed.
        """
        self.sync()
        replaces = os.path.lexists(self.output)
        try:
            self._end_journal()
            for model in self.models:
                model.close_synced()
            remove_journals(self.partial)
            (self.partial / EVALUATIONS_NAME).unlink(missing_ok=True)
            for directory in bottom_up(self.partial):
                sync_directory(directory)
            if replaces and not self._overwrite:
                raise self._stage.appeared()
            if replaces:
                check_replaceable(self.output)
            self._stage.move(replaces=replaces)
        except OSError as error:
            raise self.failed(error) from error
        except BaseException as error:
            if not self._stage.is_in_place():
                raise
            raise after_publishing(self._shown, error) from error
        self._published = True
        try:
            self._stage.confirm(replaced=replaces)
        except OSError as error:
            raise after_publishing(self._shown, error, self._stage.left()) from error
        finally:
            self._close()

    # -- making and recovering

    def _make(self) -> None:
        self._stage.hold()
        was_there = self._stage.make()
        if self._overwrite and os.path.lexists(self.output):
            self._stage.check_exchange()
        self._clear_others()
        if was_there:
            if self._recover():
                return
            for entry in self.partial.iterdir():  # of a run that was killed before it got anywhere
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for model in self.models:
            model.create()

    def _clear_others(self) -> None:
        """Remove what runs with other inputs or options left behind, unless they are alive."""
        n_continuable = sum(bool(read_journals(one)) for one in self._stage.left_by_others())
        if n_continuable:
            self.notes.append(
                f"{self._shown}: an interrupted run had other inputs or options; what it "
                "left was removed, and this one started afresh"
            )

    def _recover(self) -> bool:
        """Take over what an interrupted run of the same plan finished; tell whether it had."""
        finished = {} if self._is_streamed else read_journals(self.partial)
        if not finished or not finished.keys() <= set(range(self._n_blocks)):
            return False
        if not all(model.reopen() for model in self.models):
            for model in self.models:
                model.close()
            return False
        for model in self.models:  # all but weights is made anew
            weights = model.weight_filenames()
            for entry in model.directory.iterdir():
                if entry.name in weights or entry.name.startswith(JOURNAL_PREFIX):
                    continue
                if entry.name == EVALUATIONS_NAME:
                    continue
                if entry.is_dir() and entry not in [other.directory for other in self.models]:
                    shutil.rmtree(entry)
                elif not entry.is_dir():
                    entry.unlink()
        for model in self.models:
            model.sync()  # the journal that begins now vouches for all of it
        self.finished = finished
        remove_journals(self.partial)
        self.notes.append(
            f"{self._shown}: continued an interrupted run; {self._share(finished)} of it was done"
        )
        return True

    # -- ending

    def _end_background(self) -> None:
        if self._background is not None:
            self._background.end()

    def _background_error(self) -> OSError | None:
        return None if self._background is None else self._background.error

    def _end_journal(self) -> None:
        self._end_background()
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()

    def _leave_unpublished(self, error: BaseException | None) -> None:
        """After an interruption keep what can be continued; else leave nothing behind."""
        is_failure = error is None or (
            isinstance(error, Exception) and not isinstance(error, ProcessEndedError)
        )
        can_continue = (
            self._stage.identity is not None
            and self._stage.has_locks
            and not is_failure
            and not self._is_streamed
        )
        finished: Mapping[int, Differing] = {}
        with suppress(OSError):
            finished = read_journals(self.partial) if can_continue else {}
        if error is None or not finished:
            self._abandon()
            return
        error.add_note(
            f"{self._share(finished)} of the average is kept in {self.partial.name}; "
            "the same command continues it"
        )
        self._close()

    def _share(self, finished: Mapping[int, Differing]) -> str:
        return f"{100 * len(finished) / max(self._n_blocks, 1):.0f} %"

    def _abandon(self) -> None:
        for model in self.models:
            model.close()
        self._stage.abandon()

    def _close(self) -> None:
        for model in self.models:
            model.close()
        self._stage.release()
