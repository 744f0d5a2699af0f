"""A checkpoint seen through another: what it says of itself is passed on, unless changed."""

import hashlib
from collections.abc import Mapping, Sequence

from ckptavg.checkpoint.digests import FileDigest
from ckptavg.checkpoint.folder import Folder
from ckptavg.checkpoint.protocol import Checkpoint
from ckptavg.checkpoint.scheduler_state import SchedulerState
from ckptavg.tensors import FileStamp, HubRevision, Piece, TensorInfo


class WrappedCheckpoint:
    """Implements the ``Checkpoint`` protocol over another checkpoint, which it closes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take everything over; subclasses change what they are made for."""
        self._checkpoint = checkpoint
        self.label: str = checkpoint.label
        self.layout: str = checkpoint.layout
        self.tensors: Mapping[str, TensorInfo] = checkpoint.tensors
        self.aliases: Mapping[str, str] = checkpoint.aliases
        self.metadata: Mapping[str, str] = checkpoint.metadata
        self.step: int | None = checkpoint.step
        self.epoch: int | None = checkpoint.epoch
        self.learning_rate: float | None = checkpoint.learning_rate
        self.metrics: Mapping[str, float] = checkpoint.metrics
        self.scheduler: SchedulerState | None = checkpoint.scheduler
        self.n_updates: int | None = checkpoint.n_updates
        self.seed: int | None = checkpoint.seed
        self.notes: Sequence[str] = checkpoint.notes
        self.files: Sequence[FileStamp] = checkpoint.files
        self.folder: Folder | None = checkpoint.folder

    @property
    def hub(self) -> HubRevision | None:
        """That of the checkpoint."""
        return self._checkpoint.hub

    @property
    def read_scratch_nbytes(self) -> int:
        """That of the checkpoint."""
        return self._checkpoint.read_scratch_nbytes

    @property
    def places_digest(self) -> str:
        """Digits that change with the checkpoint's, and with ``_changes``."""
        what = self._checkpoint.places_digest, self._changes()
        return hashlib.sha256(repr(what).encode("utf-8", "surrogatepass")).hexdigest()

    def _changes(self) -> object:
        """Return what makes this another checkpoint than the one it stands before."""
        raise NotImplementedError

    def read_into(self, pieces: Sequence[Piece], buffer: memoryview) -> None:
        """Fill ``buffer`` with the pieces; see the protocol."""
        self._checkpoint.read_into(pieces, buffer)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if any file changed since it was opened."""
        self._checkpoint.check_unchanged()

    def verify(self) -> None:
        """Verify the checkpoint's files."""
        self._checkpoint.verify()

    def digests(self, *, all_files: bool) -> Sequence[FileDigest]:
        """Those of the checkpoint."""
        return self._checkpoint.digests(all_files=all_files)

    def cancel(self) -> None:
        """Cancel the reads of the checkpoint."""
        self._checkpoint.cancel()

    def close(self) -> None:
        """Close all files."""
        self._checkpoint.close()
