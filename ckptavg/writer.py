"""The sink: weight files, headers first, preallocated, written by position."""

import ctypes
import errno
import json
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ckptavg.blocks import Action, TensorPlan
from ckptavg.directories import close_quietly, open_descriptor, write_all, write_synced
from ckptavg.errors import OutputError
from ckptavg.hashing import FileHash, FollowingHash, Part, hash_of
from ckptavg.plan import AveragePlan
from ckptavg.torch_writer import TorchFile

INDEX_NAME = "model.safetensors.index.json"
_HEADER_ALIGNMENT = 8
_SYNC_FILE_RANGE_WRITE = 2


class WeightFile(Protocol):
    """What one weight file of some format holds beside the data of its tensors.

    Attributes:
        nbytes: Size of the file.
        known: Position and content of all that does not depend on the data.
    """

    nbytes: int
    known: Sequence[tuple[int, bytes]]

    def places(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield position and size of the parts of the file that bytes of the data go to."""

    def sealed(self, path: Path, n_threads: int) -> Iterator[tuple[int, bytes]]:
        """Yield position and content of what depends on the data, which is in the file by now."""


class SafetensorsFile:
    """A header, then the data, in one piece; nothing depends on that."""

    def __init__(self, tensors: Sequence[TensorPlan], metadata: Mapping[str, str]) -> None:
        """Lay out a file."""
        header = _header(tensors, metadata)
        self._header_nbytes = len(header)
        self.known: Sequence[tuple[int, bytes]] = [(0, header)]
        self.nbytes = max((one.offset + one.nbytes for one in tensors), default=0) + len(header)

    def places(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield the one place."""
        yield self._header_nbytes + offset, nbytes

    def sealed(self, path: Path, n_threads: int) -> Iterator[tuple[int, bytes]]:
        """Yield nothing."""
        return iter(())


class ModelWriter:
    """Writes the files of one model into a directory that is not published yet.

    Use: ``create`` or ``reopen``, any number of ``write`` calls from any thread, then ``patch``,
    ``seal`` and ``add_file``, ``sync``, ``close``.

    Attributes:
        directory: Where the files go.
        descriptors: The open weight files.
        small_files: What ``add_file`` wrote.
    """

    def __init__(
        self,
        directory: Path,
        plan: AveragePlan,
        *,
        metadata: Mapping[str, str],
        failed: Callable[[OSError], OutputError],
    ) -> None:
        """Prepare to write; nothing is touched yet.

        Args:
            directory: Where the files go.
            plan: What will be written.
            metadata: String map for the header of every weight file that has one.
            failed: Makes the error to raise when the storage refuses.
        """
        self.directory = directory
        self._plan = plan
        self._failed = failed
        by_shard: list[list[TensorPlan]] = [[] for _ in plan.shards]
        for tensor in plan.tensors:
            by_shard[tensor.shard].append(tensor)
        self._files: list[WeightFile] = [
            TorchFile(tensors, plan.names, plan.metadata, Path(shard.filename).stem)
            if plan.output_format == "torch"
            else SafetensorsFile(tensors, metadata)
            for shard, tensors in zip(plan.shards, by_shard, strict=True)
        ]
        self.descriptors: list[int] = []
        self.small_files: dict[str, FileHash] = {}
        self._hashes = [FollowingHash(self._parts_of(one)) for one in range(len(plan.shards))]

    def create(self) -> None:
        """Make the weight files, with headers and room for the data.

        Raises:
            OSError: If the storage refuses; FileExistsError if they are there already.
        """
        self.directory.mkdir(exist_ok=True)
        for shard, file in zip(self._plan.shards, self._files, strict=True):
            descriptor = _create_file(self.directory / shard.filename)
            self.descriptors.append(descriptor)
            reserve(descriptor, file.nbytes)
            for position, content in file.known:
                write_all(descriptor, memoryview(content), position)

    def reopen(self) -> bool:
        """Open the weight files that another run or process made; tell whether they are right."""
        for shard, file in zip(self._plan.shards, self._files, strict=True):
            try:
                path = self.directory / shard.filename
                descriptor = open_descriptor(path, os.O_RDWR | os.O_NOFOLLOW)
                self.descriptors.append(descriptor)
                is_right = os.fstat(descriptor).st_size == file.nbytes and all(
                    os.pread(descriptor, len(content), position) == content
                    for position, content in file.known
                )
            except OSError:
                is_right = False
            if not is_right:
                self.close()
                return False
        return True

    def weight_filenames(self) -> list[str]:
        """Return the names of the weight files."""
        return [shard.filename for shard in self._plan.shards]

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at an offset in the data of one shard; from any thread, in any order.

        Raises:
            OutputError: If the storage refuses.
        """
        data = data.cast("B")
        try:
            for position, nbytes in self._files[shard].places(offset, data.nbytes):
                write_all(self.descriptors[shard], data[:nbytes], position)
                data = data[nbytes:]
        except OSError as error:
            raise self._failed(error) from error

    def patch(self, name: str, data: bytes) -> None:
        """Replace the bytes of one tensor, under all its tied names."""
        for tensor in self._plan.tensors:
            if tensor.name == name or tensor.owner == name:
                if len(data) != tensor.nbytes:
                    raise AssertionError("the caller gives the tensor's own dtype and shape")
                self._hashes[tensor.shard].restart()
                self.write(tensor.shard, tensor.offset, memoryview(data))

    def seal(self, n_threads: int) -> None:
        """Add to the weight files what depends on their data, such as checksums; the last write.

        A run that ends meanwhile may be continued: what is written here does not count as done.

        Raises:
            OutputError: If the storage refuses.
        """
        try:
            for shard, file, descriptor in zip(
                self._plan.shards, self._files, self.descriptors, strict=True
            ):
                for position, content in file.sealed(self.directory / shard.filename, n_threads):
                    write_all(descriptor, memoryview(content), position)
        except OSError as error:
            raise self._failed(error) from error

    def add_index(self) -> None:
        """Add the index of the weight files, where there are several; once is enough."""
        if len(self._plan.shards) > 1 and not (self.directory / INDEX_NAME).exists():
            self.add_file(INDEX_NAME, _index(self._plan))

    def add_file(self, name: str, content: bytes) -> None:
        """Add a small file beside the weights.

        Raises:
            OutputError: If it cannot be written.
        """
        try:
            write_small_file(self.directory / name, content)
        except OSError as error:
            raise self._failed(error) from error
        self.small_files[name] = hash_of(content)

    def hash_along(self, finished: Container[int], is_over: Callable[[], bool]) -> None:
        """Hash what has become whole of the weight files; see ``FollowingHash.follow``."""
        for shard, one in zip(self._plan.shards, self._hashes, strict=True):
            one.follow(self.directory / shard.filename, finished, is_over)

    def hash_weights(self, shard: int) -> FileHash:
        """Hash what is left of a weight file that is sealed, and return its hash.

        Raises:
            OutputError: If it cannot be read.
        """
        try:
            return self._hashes[shard].finish(self.directory / self._plan.shards[shard].filename)
        except OSError as error:
            raise self._failed(error) from error

    def start_writeback(self) -> None:
        """Let the system begin to bring what is written so far to the storage; do not wait."""
        for descriptor in tuple(self.descriptors):
            _start_writeback(descriptor)

    def sync(self) -> None:
        """Bring the weight files to the storage.

        Raises:
            OutputError: If the storage refuses.
        """
        try:
            for descriptor in self.descriptors:
                os.fsync(descriptor)
        except OSError as error:
            raise self._failed(error) from error

    def _parts_of(self, shard: int) -> Iterator[Part]:
        """Yield what of a weight file is there when; nothing where sealing changes it again."""
        if self._plan.output_format == "torch":
            return
        for block in self._plan.blocks:
            for at, offset in block.destinations:
                if at == shard:
                    nbytes = block.numel * block.output_dtype.itemsize
                    for position, count in self._files[shard].places(offset, nbytes):
                        yield Part(position, count, block.block)

    def close_synced(self) -> None:
        """Close the weight files, which are on the storage.

        Raises:
            OSError: If the storage refuses even now.
        """
        while self.descriptors:
            os.close(self.descriptors.pop())

    def close(self) -> None:
        """Close the weight files, whatever becomes of them; closing twice is allowed."""
        while self.descriptors:
            close_quietly(self.descriptors.pop())


def write_small_file(path: Path, content: bytes) -> None:
    """Make a file, and bring it to the storage.

    Raises:
        OSError: If it cannot be written, or is there already.
    """
    path.parent.mkdir(exist_ok=True)
    write_synced(path, content)


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


def _create_file(path: Path) -> int:
    return open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def reserve(descriptor: int, nbytes: int) -> None:
    """Take the disk space now, so that a full disk shows before the work.

    Raises:
        OSError: If there is not enough.
    """
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        os.ftruncate(descriptor, nbytes)


def _start_writeback(descriptor: int) -> None:
    """Call sync_file_range(2) on a whole file, where the system has it; errors show at fsync."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
