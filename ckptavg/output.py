"""The directory being made: locked, journaled, continued after an interruption, published at once.

Everything is written into ``OUT.partial-<fingerprint>/`` beside the output, synced to storage,
and renamed. OUT either does not exist, is what it was before, or is complete.
"""

import errno
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
from ckptavg.directories import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    abandoned,
    bottom_up,
    can_lock,
    identity,
    make_parents,
    open_lock,
    remove_empty,
    rename,
    sync_directory,
)
from ckptavg.errors import AfterPublishError, OutputError, ProcessEndedError
from ckptavg.hashing import FileHash
from ckptavg.hub.threads import in_parallel
from ckptavg.journal import (
    EVALUATIONS_NAME,
    JOURNAL_PREFIX,
    Journal,
    read_journals,
    remove_journals,
)
from ckptavg.plan import AveragePlan
from ckptavg.writer import ModelWriter, write_small_file

_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


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
        # the directory itself, not a link to it, is what gets replaced
        self.output = Path(
            os.path.realpath(output) if output.is_symlink() else os.path.abspath(output)
        )
        self.partial = self.output.with_name(f"{self.output.name}.partial-{plan.fingerprint}")
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
        # what holds the name of the partial directory, whatever bears it
        self._lock_path = self.partial.with_name(f"{self.partial.name}.lock")
        self._lock = -1
        self._has_locks = False
        self._owns_partial = False
        self._identity: tuple[int, int] | None = None  # of the partial directory
        self._made_parents: list[Path] = []
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
        except OSError as error:
            self._abandon()
            raise self.failed(error) from error
        except BaseException as error:
            self._leave_unpublished(error)
            raise
        self._background = Background(
            self.models, self.finished, self._journal, self.partial, hashes=self._hash_along
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_journal()
        if not self._published and not self._is_in_place():
            self._leave_unpublished(error)
        elif error is not None and not isinstance(error, AfterPublishError):
            self._close()
            raise self._after_publishing(error) from error

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
        self._end_journal()
        try:
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
        self._end_journal()
        try:
            remove_journals(self.partial)
            (self.partial / EVALUATIONS_NAME).unlink(missing_ok=True)
            for directory in bottom_up(self.partial):
                sync_directory(directory)
            replaced = self._rename()
        except OSError as error:
            raise self.failed(error) from error
        except BaseException as error:
            if not self._is_in_place():
                raise
            raise self._after_publishing(error) from error
        self._published = True
        try:
            for parent in {self.output.parent, *(made.parent for made in self._made_parents)}:
                sync_directory(parent)
            if replaced:
                shutil.rmtree(self.partial)
        except OSError as error:
            left = f"; what it replaced is in {self.partial}" if replaced else ""
            raise AfterPublishError(
                f"{self._shown}: is published and whole, but then: {error.strerror}{left}"
            ) from error
        finally:
            self._close()

    def _rename(self) -> bool:
        """Move the partial directory into place; return whether it now holds the replaced one."""
        exists = os.path.lexists(self.output)
        if exists and not self._overwrite:
            raise OutputError(
                f"{self._shown}: appeared while it was being written; nothing replaced"
            )
        if exists:
            check_replaceable(self.output)
        try:
            rename(self.partial, self.output, RENAME_EXCHANGE if exists else RENAME_NOREPLACE)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise OutputError(
                    f"{self._shown}: appeared while it was being written; nothing replaced"
                ) from error
            if error.errno not in _NOT_SUPPORTED:
                raise
            if exists:
                raise self._cannot_exchange() from error
            self.partial.rename(self.output)  # fails on anything but an empty directory
        return exists

    # -- making and recovering

    def _make(self) -> None:
        self._made_parents = make_parents(self.output)
        self._make_partial()
        if self._overwrite and os.path.lexists(self.output):
            self._try_exchange()
        if self._has_locks:
            self._clear_others()
            if self._recover():
                return
            for entry in self.partial.iterdir():  # of a run that was killed before it got anywhere
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for model in self.models:
            model.create()

    def _make_partial(self) -> None:
        """Make the partial directory, or take over a dead run's; hold its name alone."""
        lock = open_lock(self._lock_path)
        if lock is None:
            raise OutputError(f"{self._shown}: another ckptavg run is writing it at this moment")
        self._lock = lock
        self._has_locks = can_lock(lock)
        try:
            self.partial.mkdir()
        except FileExistsError as error:
            if not self._has_locks or self.partial.is_symlink() or not self.partial.is_dir():
                raise OutputError(
                    f"{self.partial}: is there already; if no other run writes it, remove it"
                ) from error
        self._owns_partial = True
        self._identity = identity(self.partial)

    def _try_exchange(self) -> None:
        """See before the work whether the file system can do what replacing an output takes."""
        pair = one, other = self.partial / ".exchange-1", self.partial / ".exchange-2"
        try:
            for directory in pair:
                directory.mkdir(exist_ok=True)
            rename(one, other, RENAME_EXCHANGE)
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                raise self._cannot_exchange() from error
            raise
        finally:
            for directory in pair:
                with suppress(OSError):
                    directory.rmdir()

    def _clear_others(self) -> None:
        """Remove what runs with other inputs or options left behind, unless they are alive."""
        for stale in abandoned(self.partial):
            if stale.is_symlink():
                continue
            was_continuable = bool(read_journals(stale))
            shutil.rmtree(stale, ignore_errors=True)
            if was_continuable and not stale.exists():
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
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _leave_unpublished(self, error: BaseException | None) -> None:
        """After an interruption keep what can be continued; else leave nothing behind."""
        is_failure = error is None or (
            isinstance(error, Exception) and not isinstance(error, ProcessEndedError)
        )
        can_continue = (
            self._owns_partial and self._has_locks and not is_failure and not self._is_streamed
        )
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

    def _is_in_place(self) -> bool:
        """Tell whether the rename happened, also if a signal came right after it."""
        return self._identity is not None and identity(self.output) == self._identity

    def _abandon(self) -> None:
        for model in self.models:
            model.close()
        if self._owns_partial:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._close()
        remove_empty(self._made_parents)

    def _close(self) -> None:
        for model in self.models:
            model.close()
        if self._lock >= 0:
            with suppress(OSError):
                self._lock_path.unlink()
            os.close(self._lock)  # and unlock
            self._lock = -1

    def _cannot_exchange(self) -> OutputError:
        return OutputError(
            f"{self._shown}: this file system cannot exchange two directories in one step; "
            "remove the old output first"
        )

    def _after_publishing(self, error: BaseException) -> AfterPublishError:
        return AfterPublishError(
            f"{self._shown}: is published and whole, but then: {str(error) or type(error).__name__}"
        )
