"""What every checkpoint reader offers, whatever the format."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from ckptavg.checkpoint.digests import FileDigest
from ckptavg.checkpoint.folder import Folder
from ckptavg.checkpoint.scheduler_state import SchedulerState
from ckptavg.tensors import FileStamp, HubRevision, Piece, TensorInfo

READ_SCRATCH_BYTES = 2**20  # bound for what a reader may hold beside the caller's buffer


class Checkpoint(Protocol):
    """One saved checkpoint, opened: its headers are read and checked, its tensor data is not.

    Attributes:
        label: What messages call it: the path as typed.
        layout: The name of its layout, for people: ``safetensors file``, ``torch file``, ...
        tensors: Name -> dtype and shape of every tensor that is stored, in file order.
        aliases: Tied name -> the name that owns the storage. A tied name that the layout stores
            (torch files hold both) is in ``tensors`` too; one that it leaves out (safetensors
            files hold one of them) is not.
        metadata: The file's own string map, where the format has one.
        step: Training step, where metadata or name tell; None otherwise.
        epoch: Training epoch, likewise.
        learning_rate: What the trainer wrote of it; the first parameter group's, where several.
        metrics: What the trainer measured at this step, by name: ``eval_loss``, ...
        scheduler: The state of the learning-rate scheduler, where it is saved with the weights.
        n_updates: How often its optimizer was stepped, where there is a scheduler and Adam tells.
        seed: Of the run, where its options are plain to read.
        notes: What a user should know about how this checkpoint was read, one sentence each.
        files: The files read, with what identifies their content.
        folder: The folder whose side files (config, tokenizer) belong to this checkpoint; None
            for a single file.
        hub: The revision on the Hub that it is; None if it is local.
        read_scratch_nbytes: What one call of ``read_into`` may hold beside the caller's buffer.
        places_digest: Hexadecimal digits that change with the bytes of ``files`` that a name
            stands for: two sets of weights in one file have different digests.
    """

    label: str
    layout: str
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    step: int | None
    epoch: int | None
    learning_rate: float | None
    metrics: Mapping[str, float]
    scheduler: SchedulerState | None
    n_updates: int | None
    seed: int | None
    notes: Sequence[str]
    files: Sequence[FileStamp]
    folder: Folder | None

    @property
    def hub(self) -> HubRevision | None:
        """See the class."""

    @property
    def read_scratch_nbytes(self) -> int:
        """See the class."""

    @property
    def places_digest(self) -> str:
        """See the class."""

    def read_into(self, pieces: Sequence[Piece], buffer: memoryview) -> None:
        """Fill ``buffer`` with the given pieces, back to back.

        Safe to call from several threads at once. Pieces that lie side by side in a file are
        read in one system call.

        Args:
            pieces: Byte ranges of row-major tensor data; names are in ``tensors`` or ``aliases``.
            buffer: Writable bytes, exactly as long as all pieces together.

        Raises:
            CheckpointError: If the file ends early, cannot be read, or changed since opening.
        """

    def check_unchanged(self) -> None:
        """Raise CheckpointError if any file changed since it was opened."""

    def verify(self) -> None:
        """Read what is left of the files, and compare their content with the Hub's hashes.

        Raises:
            CheckpointError: If a hash differs: the transfer went wrong, or a cached copy is
                damaged. Other local files have none.
        """

    def digests(self, *, all_files: bool) -> Sequence[FileDigest]:
        """Return what hashes its local files: all, or those whose source tells a hash."""

    def cancel(self) -> None:
        """Make reads that wait for a network fail soon; from any thread."""

    def close(self) -> None:
        """Close all files; reading afterwards is an error."""
