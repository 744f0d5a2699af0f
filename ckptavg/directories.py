"""Locks, and syncs and renames of directories, as Linux has them."""

import ctypes
import errno
import fcntl
import glob
import os
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # flags of renameat2(2)
_AT_FDCWD = -100
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
_LOCK_ATTEMPTS = 100
_N_HEX_DIGITS = 16


def bottom_up(root: Path) -> Iterator[Path]:
    """Yield a directory and those in it, the inner ones first."""
    for entry in root.iterdir():
        if entry.is_dir():
            yield from bottom_up(entry)
    yield root


def make_parents(path: Path) -> list[Path]:
    """Make the directories above a path that are missing; return them, the outermost first.

    Raises:
        OSError: If one cannot be made; none is left then.
    """
    missing = list(takewhile(lambda parent: not parent.exists(), path.parents))
    made: list[Path] = []
    try:
        for directory in reversed(missing):
            if not directory.is_dir():
                directory.mkdir(exist_ok=True)
                made.append(directory)
    except BaseException:
        remove_empty(made)
        raise
    return made


def remove_empty(directories: Sequence[Path]) -> None:
    """Remove directories that ``make_parents`` made, up to the first that holds something else."""
    for directory in reversed(directories):
        try:
            directory.rmdir()
        except OSError:
            return


def abandoned(current: Path) -> Iterator[Path]:
    """Yield what other runs left beside a directory, each locked while it is looked at.

    The names end in 16 hexadecimal digits, and differ in those alone; ``NAME.lock`` is the lock.
    What a living process has locked is passed over. Of some there may be no more than the lock,
    which is removed.
    """
    stem = current.name[:-_N_HEX_DIGITS]
    like = re.compile(re.escape(stem) + f"[0-9a-f]{{{_N_HEX_DIGITS}}}")
    found = current.parent.glob(f"{glob.escape(stem)}*")
    names = {path.name.removesuffix(".lock") for path in found} - {current.name}
    for name in sorted(filter(like.fullmatch, names)):
        lock_path = current.with_name(f"{name}.lock")
        try:
            lock = open_lock(lock_path)
        except OSError:  # not ours to open
            continue
        if lock is None:
            continue
        try:
            yield current.with_name(name)
            lock_path.unlink(missing_ok=True)
        finally:
            os.close(lock)


def open_lock(path: Path) -> int | None:
    """Open a lock file, made if need be, and hold its lock; None if another process holds it.

    On a file system without locks the file is open and not locked. A file, because network file
    systems lock files for all hosts, but directories for one alone.

    Raises:
        OSError: If it cannot be made.
    """
    for _ in range(_LOCK_ATTEMPTS):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                return None
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        if identity(path) == identity(descriptor):
            return descriptor
        os.close(descriptor)  # who held it has removed it meanwhile
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def can_lock(descriptor: int) -> bool:
    """Tell whether the file system has locks, given an open, locked file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def identity(file: Path | int) -> tuple[int, int] | None:
    """Return what tells a file or directory from every other there is; None if it is not there."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the storage."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync directories
            raise
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path, flags: int) -> None:
    """Call renameat2(2): a rename that refuses to replace, or exchanges two names, in one step.

    Raises:
        OSError: If the rename fails; ENOSYS or EINVAL where the system does not have it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, "renameat2 is not available")
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
