"""A checkpoint whose tensors are byte ranges of files: what every reader builds."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptavg.checkpoint.digests import FileDigest
from ckptavg.checkpoint.files import PositionalFile, ReadableFile
from ckptavg.checkpoint.folder import Folder
from ckptavg.checkpoint.limits import MAX_NAME_CHARACTERS
from ckptavg.checkpoint.protocol import READ_SCRATCH_BYTES
from ckptavg.checkpoint.scheduler_state import SchedulerState
from ckptavg.checkpoint.sharded import AnyPlace, Boxes, Place, Rows
from ckptavg.checkpoint.strided import is_impossible, read_strided
from ckptavg.errors import CheckpointError
from ckptavg.tensors import FileStamp, HubRevision, Piece, TensorInfo

if TYPE_CHECKING:  # importing huggingface_hub takes longer than averaging many models
    from ckptavg.hub.connection import HubConnection

_SHOWN_CHARACTERS = 60
_MAX_GAP_BYTES = 4096  # torch archives pad between tensors; reading the gap is cheaper than a call


@dataclass(kw_only=True)
class StoredCheckpoint:
    """Implements the ``Checkpoint`` protocol over positional reads of files.

    Raises:
        CheckpointError: When it is made, if a name is longer than any model needs.
    """

    label: str
    layout: str
    tensors: Mapping[str, TensorInfo]
    places: Mapping[str, AnyPlace]
    open_files: Sequence[ReadableFile]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    step: int | None = None
    epoch: int | None = None
    learning_rate: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    scheduler: SchedulerState | None = None
    n_updates: int | None = None
    seed: int | None = None
    notes: Sequence[str] = ()
    folder: Folder | None = None
    revision: HubRevision | None = None
    connection: "HubConnection | None" = None
    files: Sequence[FileStamp] = field(init=False)

    def __post_init__(self) -> None:
        self.files = [file.stamp for file in self.open_files]
        longest = max(self.tensors, key=len, default="")
        if len(longest) > MAX_NAME_CHARACTERS:
            raise CheckpointError(
                f"{self.label}: the name of tensor '{longest[:_SHOWN_CHARACTERS]}...' has "
                f"{len(longest)} characters, at most {MAX_NAME_CHARACTERS} are allowed"
            )
        for name, info in self.tensors.items():
            if is_impossible(info):
                raise CheckpointError(f"{self.label}: tensor '{name}' has an impossible size")

    def is_described_by(self, file: ReadableFile) -> None:
        """Take care of a file that says how to read the others: an index, an adapter's config."""
        self.open_files = [*self.open_files, file]
        self.files = [*self.files, file.stamp]

    @property
    def hub(self) -> HubRevision | None:
        """The revision of a single file, or of its folder."""
        return self.revision or (None if self.folder is None else self.folder.hub)

    @property
    def read_scratch_nbytes(self) -> int:
        """Nothing, unless a tensor has to be put into row-major order."""
        scattered = any(map(_is_scattered, self.places.values()))
        return 2 * READ_SCRATCH_BYTES if scattered else 0  # the allocator keeps what was freed

    @property
    def places_digest(self) -> str:
        """Digits that change with the file, the offset and the strides of any name."""
        number = {id(file): index for index, file in enumerate(self.open_files)}

        def told(place: AnyPlace) -> object:
            if isinstance(place, Place):
                return number[id(place.file)], place.offset, place.strides
            return [(part.first, part.shape, told(part.place)) for part in place.parts]

        places = [(name, told(place)) for name, place in sorted(self.places.items())]
        what = places, sorted(self.aliases.items())
        return hashlib.sha256(repr(what).encode("utf-8", "surrogatepass")).hexdigest()

    def read_into(self, pieces: Sequence[Piece], buffer: memoryview) -> None:
        """Fill ``buffer`` with the pieces; see the protocol."""
        run: _Run | None = None
        filled = 0
        for name, start, stop in pieces:
            owner = name if name in self.places else self.aliases[name]
            place = self.places[owner]
            if _is_scattered(place):
                begin, filled = filled, filled + (stop - start)
                self._read_scattered(owner, start, stop, buffer[begin:filled])
                continue
            for file, offset, nbytes in _ranges(place, start, stop):
                begin, filled = filled, filled + nbytes
                if run is None or not run.extend(file, offset, begin, filled):
                    if run is not None:
                        run.read(buffer)
                    run = _Run(file, offset, begin, filled)
        if run is not None:
            run.read(buffer)

    def _read_scattered(self, name: str, start: int, stop: int, out: memoryview) -> None:
        info, place = self.tensors[name], self.places[name]
        itemsize = info.dtype.itemsize
        position = start
        while position < stop:
            first, skipped = divmod(position, itemsize)
            whole_bytes = 0 if skipped else (stop - position) // itemsize * itemsize
            # an element that the range cuts in two is read apart
            elements = out[:whole_bytes] if whole_bytes else memoryview(bytearray(itemsize))
            if isinstance(place, Boxes):
                place.read(first, elements)
            elif isinstance(place, Place) and place.strides is not None:
                read_strided(
                    place.file, place.offset, itemsize, info.shape, place.strides, first, elements
                )
            if not whole_bytes:
                elements = elements[skipped : skipped + (stop - position)]
                out[: len(elements)] = elements
            position += len(elements)
            out = out[len(elements) :]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if any file changed since it was opened."""
        for file in self.open_files:
            file.check_unchanged()

    def verify(self) -> None:
        """Compare the files with the hashes that their source tells; see the protocol."""
        for file in self.open_files:
            file.verify()

    def digests(self, *, all_files: bool) -> Sequence[FileDigest]:
        """Return what hashes its local files; see the protocol."""
        return [
            FileDigest(file)
            for file in self.open_files
            if isinstance(file, PositionalFile) and (all_files or file.expected_digest)
        ]

    def cancel(self) -> None:
        """Make reads from the Hub fail soon; see the protocol."""
        if self.connection is not None:
            self.connection.cancel()

    def close(self) -> None:
        """Close all files."""
        for file in self.open_files:
            file.close()
        if self.folder is not None:
            self.folder.close()


def _is_scattered(place: AnyPlace) -> bool:
    """Tell whether a range of a tensor's bytes lies in many ranges of files."""
    return isinstance(place, Boxes) or (isinstance(place, Place) and place.strides is not None)


def _ranges(place: AnyPlace, start: int, stop: int) -> Iterable[tuple[ReadableFile, int, int]]:
    """Return file, first byte and number of bytes of what makes up a byte range of a tensor."""
    if isinstance(place, Rows):
        return place.cut(start, stop)
    assert isinstance(place, Place)  # the others are scattered
    return [(place.file, place.offset + start, stop - start)]


class _Run:
    """Pieces that lie side by side in one file, but for small gaps: one system call."""

    def __init__(self, file: ReadableFile, offset: int, begin: int, end: int) -> None:
        self._file = file
        self._offset = offset
        self._next_offset = offset + (end - begin)
        self._targets: list[tuple[int, int] | int] = [(begin, end)]  # buffer range, or gap bytes
        self._filled = end

    def extend(self, file: ReadableFile, offset: int, begin: int, end: int) -> bool:
        """Add a piece if it follows in the same file; tell whether it did."""
        gap = offset - self._next_offset
        if file is not self._file or not 0 <= gap <= _MAX_GAP_BYTES:
            return False
        last = self._targets[-1]
        if gap == 0 and begin == self._filled and isinstance(last, tuple):
            self._targets[-1] = (last[0], end)
        else:
            if gap:
                self._targets.append(gap)
            self._targets.append((begin, end))
        self._next_offset = offset + (end - begin)
        self._filled = end
        return True

    def read(self, buffer: memoryview) -> None:
        self._file.read_into(
            self._offset,
            [
                memoryview(bytearray(target)) if isinstance(target, int) else buffer[slice(*target)]
                for target in self._targets
            ],
        )
