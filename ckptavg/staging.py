"""What is made beside its place and then moved there: locked, and removed if its process died.

``NAME.<kind>-<16 hexadecimal digits>`` is being made, ``NAME.<kind>-<digits>.lock`` says by whom.
A name whose lock is free was left by a process that died: it is taken over or removed. Nothing that
lies under such a name without a lock is ever touched, but what ``is_own`` knows.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptavg.directories import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    can_lock,
    close_quietly,
    entries,
    identity,
    make_parents,
    open_lock,
    remove_empty,
    rename,
    sync_directory,
    write_synced,
)
from ckptavg.errors import AfterPublishError, OutputError

PARTIAL = "partial"
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_N_DIGITS = 16
_LOCK = ".lock"
STAGED_BYTES = len(f".{PARTIAL}-{_LOCK}") + _N_DIGITS  # how much longer names become
_STAGED = re.compile(rf".+\.[a-z]+-[0-9a-f]{{{_N_DIGITS}}}({re.escape(_LOCK)})?")


published: list[Path] = []  # what has its place, in this process


def is_staged(name: str) -> bool:
    """Tell by its name whether something is being made, or locks that."""
    return _STAGED.fullmatch(name) is not None


def remove_orphaned_locks(target: Path) -> None:
    """Remove the locks of processes that died after they had moved all to its place."""
    for lock_path in entries(target.parent, f"{target.name}."):
        staged = lock_path.with_name(lock_path.name.removesuffix(_LOCK))
        if staged == lock_path or not is_staged(staged.name) or os.path.lexists(staged):
            continue
        with suppress(OSError):
            if not _is_lock(lock_path):
                continue
            lock = open_lock(lock_path)
            if lock is not None and can_lock(lock):
                lock_path.unlink(missing_ok=True)
            close_quietly(lock)


class Stage:
    """One name beside a target, held by this process alone.

    Attributes:
        path: Where to make what will be moved to the target.
        has_locks: Whether the file system has locks; without, nothing is taken over or removed.
        identity: What tells what is made from everything else; None before it is there.
    """

    def __init__(
        self,
        target: Path,
        kind: str = PARTIAL,
        digits: str | None = None,
        *,
        shown: Path | None = None,
        is_own: Callable[[Path], bool] = lambda path: False,
    ) -> None:
        """Prepare; nothing is made before ``hold``.

        Args:
            target: Where it will be.
            kind: What is made, in small letters; those of another kind are left alone.
            digits: 16 hexadecimal digits that tell it from others of its kind; None draws some.
            shown: What messages call the target.
            is_own: Tells by its content whether a directory whose lock is gone was made by a run.
        """
        # the directory itself, not a link to it, is what gets replaced
        self.target = Path(
            os.path.realpath(target) if target.is_symlink() else os.path.abspath(target)
        )
        digits = digits or secrets.token_hex(_N_DIGITS // 2)
        self._stem = f"{self.target.name}.{kind}-"
        self.path = self.target.with_name(self._stem + digits)
        self.has_locks = False
        self.identity: tuple[int, int] | None = None
        self._shown = shown or target
        self._is_own = is_own
        self._lock_path = _lock_of(self.path)
        self._lock: int | None = None
        self._had_lock = False
        self._owns = False
        self._made_parents: list[Path] = []

    def hold(self, *, makes_parents: bool = True) -> None:
        """Make the target's parents, if so wanted, and hold the name.

        Raises:
            OutputError: If another process holds it.
            OSError: If the storage refuses.
        """
        if makes_parents:
            self._made_parents = make_parents(self.target)
        self._had_lock = _is_lock(self._lock_path)
        self._lock = open_lock(self._lock_path)
        if self._lock is None:
            raise OutputError(f"{self._shown}: another ckptavg run is writing it at this moment")
        self.has_locks = can_lock(self._lock)

    def make(self) -> bool:
        """Make a directory under the name, or take over a dead run's; tell whether it was there.

        Raises:
            OutputError: If something else has that name.
            OSError: If the storage refuses.
        """
        was_there = os.path.lexists(self.path)
        self._owns = not was_there  # also if a signal comes right after it is made
        try:
            self.path.mkdir()
        except FileExistsError as error:
            self._owns = False
            is_directory = self.path.is_dir() and not self.path.is_symlink()
            is_left = is_directory and (self._had_lock or self._is_left(self.path))
            if not (self.has_locks and is_left):
                raise OutputError(
                    f"{self.path}: is there already; if no other run writes it, remove it"
                ) from error
            was_there = True
        self._owns = True
        self.identity = identity(self.path)
        return was_there

    def make_file(self, content: bytes) -> None:
        """Make a file under the name, and bring it to the storage.

        Raises:
            OSError: If the storage refuses, or something has that name.
        """
        if os.path.lexists(self.path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path))
        self._owns = True
        write_synced(self.path, content)
        self.identity = identity(self.path)

    def left_by_others(self) -> Iterator[Path]:
        """Yield what dead runs left of this kind beside the target, then remove it.

        Of some there may be no more than the lock. What a living process holds is passed over.
        """
        if not self.has_locks:
            return
        found = entries(self.path.parent, self._stem)
        names = {path.name.removesuffix(_LOCK) for path in found} - {self.path.name}
        for name in sorted(filter(is_staged, names)):
            path = self.path.with_name(name)
            lock_path = _lock_of(path)
            if not _is_lock(lock_path) and not self._is_left(path):
                continue
            try:
                lock = open_lock(lock_path)
            except OSError:  # not ours to open
                continue
            if lock is None:
                continue
            try:
                if not path.is_symlink():
                    yield path
                    _remove(path)
                lock_path.unlink(missing_ok=True)
            except OSError:  # somebody else's: it stays
                continue
            finally:
                close_quietly(lock)

    def clear_others(self) -> int:
        """Remove what dead runs left of this kind beside the target; return how many they were."""
        return sum(os.path.lexists(path) for path in self.left_by_others())

    def check_exchange(self) -> None:
        """See before the work whether the file system can do what replacing the target takes.

        Raises:
            OutputError: If it cannot.
            OSError: If the storage refuses.
        """
        pair = one, other = self.path / ".exchange-1", self.path / ".exchange-2"
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

    def move(self, *, replaces: bool) -> None:
        """Give what was made its name, in one step; what was replaced has the other name then.

        Raises:
            OutputError: If the target appeared meanwhile, or cannot be replaced in one step.
            OSError: If the storage refuses.
        """
        try:
            rename(self.path, self.target, RENAME_EXCHANGE if replaces else RENAME_NOREPLACE)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise self.appeared() from error
            if error.errno not in _NOT_SUPPORTED:
                raise
            if replaces:
                raise self._cannot_exchange() from error
            if os.path.lexists(self.target):
                raise self.appeared() from error
            self.path.rename(self.target)  # of directories: fails on all but an empty one
        finally:
            if self.is_in_place():  # also if a signal came right after it
                published.append(self.target)

    def confirm(self, *, replaced: bool) -> None:
        """Bring the move to the storage, then let go of what was replaced, and of the name.

        Raises:
            OSError: If the storage refuses. The target is in place all the same, and what it
                replaced may still be there, locked by nobody, for the next run to remove.
        """
        try:
            for parent in {self.target.parent, *(made.parent for made in self._made_parents)}:
                sync_directory(parent)
            if replaced:
                _remove(self.path)
        finally:
            if not (replaced and os.path.lexists(self.path)):
                self._lock_path.unlink(missing_ok=True)
            self.release()

    def left(self) -> str:
        """Say where what was replaced is, if it is still there; a part of a sentence."""
        return f"; what it replaced is in {self.path}" if os.path.lexists(self.path) else ""

    def is_in_place(self) -> bool:
        """Tell whether the move happened, also if a signal came right after it."""
        return self.identity is not None and identity(self.target) == self.identity

    def abandon(self) -> None:
        """Remove all that was made; errors are passed over, there was one before."""
        if self._lock is not None and self._owns:
            with suppress(OSError):
                _remove(self.path)
        if self._lock is not None:
            with suppress(OSError):
                self._lock_path.unlink()
        self.release()
        remove_empty(self._made_parents)

    def release(self) -> None:
        """Let go of the name; what is there stays, for a later run to take over."""
        with suppress(OSError):
            if self._lock is not None and self._is_left(
                self.path
            ):  # which tells itself whose it is
                self._lock_path.unlink()
        close_quietly(self._lock)  # and unlock
        self._lock = None

    def appeared(self) -> OutputError:
        """Return the error for a target that was not there before."""
        return OutputError(f"{self._shown}: appeared while it was being written; nothing replaced")

    def _is_left(self, path: Path) -> bool:
        """Tell whether a directory without a lock is what a run made."""
        return path.is_dir() and not path.is_symlink() and self._is_own(path)

    def _cannot_exchange(self) -> OutputError:
        return OutputError(
            f"{self._shown}: this file system cannot exchange two directories in one step; "
            "remove the old output first"
        )


def check_exchange_beside(target: Path) -> None:
    """See before the work whether a directory can be replaced in one step where it lies.

    Raises:
        OutputError: If not.
        OSError: If the storage refuses.
    """
    stage = Stage(target)
    try:
        stage.hold()
        stage.make()
        stage.check_exchange()
    finally:
        stage.abandon()


@contextmanager
def temporary_directory(target: Path, kind: str) -> Iterator[Path]:
    """Yield a directory beside a target; it is removed at the end, or by the next of its kind.

    Raises:
        OSError: If the storage refuses.
    """
    stage = Stage(target, kind)
    try:
        stage.hold()
        stage.clear_others()
        stage.make()
        yield stage.path
    finally:
        stage.abandon()


def publish_directory(
    target: Path, files: Mapping[str, bytes], *, overwrite: bool, check: Callable[[], None]
) -> None:
    """Write small files into a directory that appears whole or not at all.

    Args:
        target: The directory.
        files: Content by name.
        overwrite: Whether one that is there is replaced, in one step.
        check: Raises if what is there must not be replaced; called right before that.

    Raises:
        OutputError: If it appeared meanwhile, or cannot be replaced in one step.
        AfterPublishError: If it is in place, but the storage did not confirm it.
        OSError: If the storage refuses.
    """
    stage = Stage(target)
    try:
        stage.hold()
        stage.clear_others()
        stage.make()
        for name, content in files.items():
            write_synced(stage.path / name, content)
        sync_directory(stage.path)
        check()
        replaces = overwrite and os.path.lexists(stage.target)
        stage.move(replaces=replaces)
        try:
            stage.confirm(replaced=replaces)
        except OSError as error:
            raise after_publishing(target, error, stage.left()) from error
    finally:
        stage.abandon()


def publish_file(
    target: Path, content: bytes, *, overwrite: bool, check: Callable[[], None]
) -> None:
    """Write a file into a directory; it appears whole or not at all, and is on the storage.

    Args:
        target: The file.
        content: What is in it.
        overwrite: Whether one that is there is replaced.
        check: Raises if what is there must not be replaced; called right before that.

    Raises:
        OutputError: If it appeared meanwhile and may not be replaced.
        AfterPublishError: If it is in place, but the storage did not confirm it.
        OSError: If the storage refuses.
    """
    stage = Stage(target)
    try:
        stage.hold(makes_parents=False)
        stage.clear_others()
        stage.make_file(content)
        if overwrite:
            check()
            stage.path.replace(stage.target)
            published.append(stage.target)
        else:
            stage.move(replaces=False)
        try:
            stage.confirm(replaced=False)
        except OSError as error:
            raise after_publishing(target, error) from error
    finally:
        stage.abandon()


def after_publishing(target: Path, error: BaseException, left: str = "") -> AfterPublishError:
    """Return the error for what went wrong once a target was in place."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return AfterPublishError(
        f"{target}: is published and whole, but then: {reason or type(error).__name__}{left}"
    )


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + _LOCK)


def _is_lock(path: Path) -> bool:
    """Tell whether a file may be a lock of ours: they are empty."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
