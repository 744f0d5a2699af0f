"""Which format one file has, told by its first bytes, never by its name."""

from ckptavg.checkpoint.dcp_safetensors import refuse_part
from ckptavg.checkpoint.files import PositionalFile, ReadableFile
from ckptavg.checkpoint.foreign import foreign_format
from ckptavg.checkpoint.npz_file import is_npz, open_npz_file
from ckptavg.checkpoint.safetensors import read_header
from ckptavg.checkpoint.sharded import Place
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.checkpoint.torch_file import open_torch_file
from ckptavg.checkpoint.torch_legacy import is_legacy
from ckptavg.errors import CheckpointError, IncompleteCheckpointError


def open_file(file: ReadableFile, *, state_key: str | None) -> StoredCheckpoint:
    """Open one checkpoint file in whatever supported format it has.

    Raises:
        CheckpointError: If it is broken, hostile or of another format; the file is closed then.
    """
    try:
        head = file.read(0, min(file.size, 512))
        if not head:
            raise IncompleteCheckpointError(f"{file.label}: is empty (0 bytes)")
        # first: a header length can begin with the same bytes as another format's magic
        is_safetensors = head[8:9] == b"{"
        is_zip = not is_safetensors and head.startswith((b"PK\x03\x04", b"PK\x05\x06"))
        if (is_zip and not is_npz(head)) or is_legacy(head):
            return open_torch_file(file, is_legacy=not is_zip, state_key=state_key)
        if not is_safetensors and not is_zip:
            kind = CheckpointError if any(head) else IncompleteCheckpointError  # room, no content
            raise kind(f"{file.label}: {foreign_format(file, head)}")
        if state_key is not None:
            what = "safetensors" if is_safetensors else "numpy"
            raise CheckpointError(
                f"{file.label}: --state-key is for torch files, this is a {what} file"
            )
        return open_safetensors_file(file) if is_safetensors else open_npz_file(file)
    except CheckpointError:
        try:
            if isinstance(file, PositionalFile):
                file.check_unchanged()  # which may be why
                file.verify()  # a copy whose source tells what it must be
        finally:
            file.close()
        raise
    except BaseException:
        file.close()
        raise


def open_safetensors_file(file: ReadableFile) -> StoredCheckpoint:
    """Open a safetensors file.

    Names that ``safetensors.torch.save_model`` dropped as tied are declared as aliases: it
    records ``dropped name -> kept name`` in the metadata.

    Raises:
        CheckpointError: If it is broken, or holds parts of tensors.
    """
    header = read_header(file)
    refuse_part(header, file)
    aliases = {
        dropped: kept
        for dropped, kept in header.metadata.items()
        if kept in header.tensors and dropped not in header.tensors
    }
    return StoredCheckpoint(
        label=file.label,
        layout="safetensors file",
        tensors=header.tensors,
        places={name: Place(file, offset) for name, offset in header.offsets.items()},
        open_files=[file],
        aliases=aliases,
        metadata=header.metadata,
    )
