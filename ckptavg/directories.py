"""Files and directories as Linux has them: locks, syncs, renames, lists that are whole."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # flags of renameat2(2)
_AT_FDCWD = -100
_LOCK_ATTEMPTS = 100


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


def entries(directory: Path, prefix: str = "") -> list[Path]:
    """Return what lies in a directory under names that begin so, in order.

    Raises:
        OSError: If it cannot be listed; ``Path.glob`` would return nothing.
    """
    return sorted(path for path in directory.iterdir() if path.name.startswith(prefix))


def files_below(directory: Path) -> Iterator[Path]:
    """Yield all files below a directory, in order; links are not followed.

    Raises:
        OSError: If one cannot be listed; ``Path.rglob`` would pass it over.
    """
    for entry in entries(directory):
        if entry.is_dir() and not entry.is_symlink():
            yield from files_below(entry)
        else:
            yield entry


def open_descriptor(path: str | Path, flags: int, mode: int = 0o777) -> int:
    """Open a file, close-on-exec, lifting the soft limit on open files where it is in the way."""
    flags |= os.O_CLOEXEC
    try:
        return os.open(path, flags, mode)
    except OSError as error:
        if error.errno != errno.EMFILE or not _raise_open_file_limit():
            raise
        return os.open(path, flags, mode)


def _raise_open_file_limit() -> bool:
    """Lift the soft limit on open files to the hard one: K checkpoints of S shards need K x S."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def write_synced(path: Path, content: bytes) -> None:
    """Make a file, and bring it to the storage.

    Raises:
        OSError: If it cannot be written, or is there already.
    """
    descriptor = open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    is_closed = False
    try:
        write_all(descriptor, memoryview(content), 0)
        os.fsync(descriptor)
        is_closed = True
        os.close(descriptor)
    finally:
        if not is_closed:
            close_quietly(descriptor)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes at an offset of a file.

    Raises:
        OSError: If the storage refuses.
    """
    data = data.cast("B")
    while data.nbytes:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def close_quietly(descriptor: int | None) -> None:
    """Close a file from which nothing was lost: it was only read, synced before, or given up."""
    if descriptor is not None:
        with suppress(OSError):
            os.close(descriptor)


def open_lock(path: Path) -> int | None:
    """Open a lock file, made if need be, and hold its lock; None if another process holds it.

    On a file system without locks, or whose locks fail, the file is open and not locked. A file,
    because network file systems lock files for all hosts, but directories for one alone.

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
                close_quietly(descriptor)
                return None
        if identity(path) == identity(descriptor):
            return descriptor
        close_quietly(descriptor)  # who held it has removed it meanwhile
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
        close_quietly(descriptor)


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
