"""The sink: header-first safetensors files, written by position, published by one rename.

Everything is written into ``OUT.partial-<fingerprint>/`` beside the output, synced to storage,
and renamed. OUT either does not exist, is what it was before, or is complete.
"""

import ctypes
import errno
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptavg.checkpoint.files import open_descriptor
from ckptavg.destination import check_replaceable
from ckptavg.errors import AfterPublishError, OutputError
from ckptavg.plan import Action, AveragePlan, TensorPlan

INDEX_NAME = "model.safetensors.index.json"
_HEADER_ALIGNMENT = 8
_PARTIAL_SUFFIX = re.compile(r"\.partial-[0-9a-f]{16}$")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
_RENAME_NOREPLACE, _RENAME_EXCHANGE, _AT_FDCWD = 1, 2, -100


class ModelWriter:
    """Writes one model directory; a context manager that leaves nothing behind unless published.

    Use: ``with ModelWriter(...) as writer:``, any number of ``write``, ``patch`` and ``add_file``
    calls, then ``publish``.
    """

    def __init__(
        self, output: Path, plan: AveragePlan, *, metadata: Mapping[str, str], overwrite: bool
    ) -> None:
        """Prepare to write; nothing is created before the context is entered.

        Args:
            output: The model directory to publish.
            plan: What will be written.
            metadata: String map for the header of every weight file.
            overwrite: Whether an existing output is replaced.
        """
        # the directory itself, not a link to it, is what gets replaced
        self.output = Path(
            os.path.realpath(output) if output.is_symlink() else os.path.abspath(output)
        )
        self.partial = self.output.with_name(f"{self.output.name}.partial-{plan.fingerprint}")
        self._shown = output
        self._plan = plan
        self._overwrite = overwrite
        by_shard: list[list[TensorPlan]] = [[] for _ in plan.shards]
        for tensor in plan.tensors:
            by_shard[tensor.shard].append(tensor)
        self._headers = [_header(tensors, metadata) for tensors in by_shard]
        self._descriptors: list[int] = []
        self._directory = -1  # the partial directory, locked where the file system can
        self._replaced = -1  # the directory being replaced, likewise
        self._owns_partial = False
        self._made_parents: list[Path] = []
        self._published = False

    def __enter__(self) -> Self:
        try:
            self._create()
        except OSError as error:
            self._abandon()
            raise self._failed(error) from error
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._published and not self._is_in_place():
            self._abandon()
        elif error is not None and not isinstance(error, AfterPublishError):
            self._close()
            raise AfterPublishError(
                f"{self._shown}: is published and whole, but then: "
                f"{str(error) or type(error).__name__}"
            ) from error

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at an offset in the data of one shard; from any thread, in any order.

        Raises:
            OutputError: If the storage refuses.
        """
        try:
            _write_all(self._descriptors[shard], data, len(self._headers[shard]) + offset)
        except OSError as error:
            raise self._failed(error) from error

    def patch(self, name: str, data: bytes) -> None:
        """Replace the bytes of one tensor, under all its tied names."""
        for tensor in self._plan.tensors:
            if tensor.name == name or tensor.owner == name:
                if len(data) != tensor.nbytes:
                    raise AssertionError("the caller gives the tensor's own dtype and shape")
                self.write(tensor.shard, tensor.offset, memoryview(data))

    def add_file(self, name: str, content: bytes) -> None:
        """Add a small file beside the weights.

        Raises:
            OutputError: If it cannot be written.
        """
        path = self.partial / name
        try:
            path.parent.mkdir(exist_ok=True)
            descriptor = _create_file(path)
            try:
                _write_all(descriptor, memoryview(content), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._failed(error) from error

    def publish(self) -> None:
        """Sync everything to storage and give the directory its name, in one step.

        Raises:
            OutputError: If anything fails; what was there before is untouched.
            AfterPublishError: If the output is in place, but the storage did not confirm it or
                the replaced directory could not be removed.
        """
        try:
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            for entry in self.partial.iterdir():
                if entry.is_dir():
                    _sync_directory(entry)
            _sync_directory(self.partial)
            replaced = self._rename()
        except OSError as error:
            raise self._failed(error) from error
        self._published = True
        try:
            for parent in {self.output.parent, *(made.parent for made in self._made_parents)}:
                _sync_directory(parent)
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
            # after the exchange it bears the partial directory's name: no other run may take it
            replaced = _locked(self.output)
            if replaced is None:
                raise OutputError(
                    f"{self._shown}: another ckptavg run is publishing it at this moment"
                )
            self._replaced = replaced
        try:
            _renameat2(self.partial, self.output, _RENAME_EXCHANGE if exists else _RENAME_NOREPLACE)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise OutputError(
                    f"{self._shown}: appeared while it was being written; nothing replaced"
                ) from error
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
            if exists:
                raise OutputError(
                    f"{self._shown}: this file system cannot exchange two directories in one step; "
                    "remove the old output first"
                ) from error
            self.partial.rename(self.output)  # fails on anything but an empty directory
        return exists

    def _create(self) -> None:
        missing = []
        parent = self.output.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for directory in reversed(missing):
            if not directory.is_dir():
                directory.mkdir(exist_ok=True)
                self._made_parents.append(directory)
        self._lock_partial()
        for shard, header in zip(self._plan.shards, self._headers, strict=True):
            try:
                descriptor = _create_file(self.partial / shard.filename)
            except FileExistsError as error:  # only where the file system has no locks
                raise OutputError(
                    f"{self.partial}: is there already; if no other run writes it, remove it"
                ) from error
            self._descriptors.append(descriptor)
            _reserve(descriptor, len(header) + shard.nbytes)
            _write_all(descriptor, memoryview(header), 0)
        if len(self._plan.shards) > 1:
            self.add_file(INDEX_NAME, _index(self._plan))

    def _lock_partial(self) -> None:
        """Make the partial directory, empty and held by this process alone; clear dead ones."""
        while True:
            try:
                self.partial.mkdir()
                self._owns_partial = True
            except FileExistsError:
                self._owns_partial = False
            descriptor = _locked(self.partial)
            if descriptor is None:
                self._owns_partial = False
                raise OutputError(
                    f"{self._shown}: another ckptavg run is writing it at this moment"
                )
            self._directory = descriptor
            if _is_same(descriptor, self.partial):  # else it was moved or removed meanwhile
                break
            os.close(descriptor)
            self._directory = -1
        if not _can_lock(self._directory):
            return  # the rename still lets one writer win
        self._owns_partial = True
        for entry in self.partial.iterdir():  # left behind by a run that was killed
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for stale in self.output.parent.glob(f"{glob.escape(self.output.name)}.partial-*"):
            if stale != self.partial and _PARTIAL_SUFFIX.search(stale.name):
                _remove_if_free(stale)

    def _is_in_place(self) -> bool:
        """Tell whether the rename happened, also if a signal came right after it."""
        return self._directory >= 0 and _is_same(self._directory, self.output)

    def _abandon(self) -> None:
        self._close_files()
        if self._owns_partial:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._close()
        for directory in reversed(self._made_parents):
            try:
                directory.rmdir()
            except OSError:
                break

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _close(self) -> None:
        self._close_files()
        for descriptor in (self._directory, self._replaced):
            if descriptor >= 0:
                os.close(descriptor)  # and unlock
        self._directory = self._replaced = -1

    def _failed(self, error: OSError) -> OutputError:
        reason = (error.strerror or str(error)).lower()
        return OutputError(f"{self._shown}: cannot be written: {reason}; nothing was published")


def _header(tensors: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """Return the 8-byte length and the padded JSON header of one weight file."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.output_dtype.code,
            "shape": list(tensor.info.shape),
            "data_offsets": [tensor.offset, tensor.offset + tensor.nbytes],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _index(plan: AveragePlan) -> bytes:
    weight_map = {tensor.name: plan.shards[tensor.shard].filename for tensor in plan.tensors}
    stored = [tensor for tensor in plan.tensors if tensor.action is not Action.ALIAS]
    index = {
        "metadata": {
            "total_size": plan.total_nbytes,
            "total_parameters": sum(tensor.info.numel for tensor in stored),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _locked(directory: Path) -> int | None:
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


def _can_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _remove_if_free(stale: Path) -> None:
    """Remove what a killed run left behind, unless a living one holds it."""
    try:
        descriptor = _locked(stale)
    except OSError:
        return
    if descriptor is not None:
        if _can_lock(descriptor) and _is_same(descriptor, stale):
            shutil.rmtree(stale, ignore_errors=True)
        os.close(descriptor)


def _create_file(path: Path) -> int:
    return open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Take the disk space now, so that a full disk shows before the work."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(descriptor, nbytes)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    data = data.cast("B")
    while data.nbytes:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync directories
            raise
    finally:
        os.close(descriptor)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    """Call renameat2(2): a rename that refuses to replace, or exchanges two names, in one step."""
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, "renameat2 is not available")
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
