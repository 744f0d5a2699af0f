"""Locks, syncs and renames of directories, as Linux has them."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # flags of renameat2(2)
_AT_FDCWD = -100
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


def bottom_up(root: Path) -> Iterator[Path]:
    """Yield a directory and those in it, the inner ones first."""
    for entry in root.iterdir():
        if entry.is_dir():
            yield from bottom_up(entry)
    yield root


def open_locked(directory: Path) -> int | None:
    """Open a directory and lock it; None if another process holds the lock.

    On a file system without locks the directory is open and not locked.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            return None
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    return descriptor


def can_lock(descriptor: int) -> bool:
    """Tell whether a directory's file system has locks, given an open, locked directory."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_same(descriptor: int, path: Path) -> bool:
    """Tell whether a path still names an open directory."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def remove_if_free(stale: Path) -> bool:
    """Remove what a run left behind, unless a living one holds it; tell whether it is gone."""
    try:
        descriptor = open_locked(stale)
    except OSError:
        return False
    if descriptor is None:
        return False
    if can_lock(descriptor) and is_same(descriptor, stale):
        shutil.rmtree(stale, ignore_errors=True)
    os.close(descriptor)
    return not stale.exists()


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
