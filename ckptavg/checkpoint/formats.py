"""Which format one file has, told by its first bytes, never by its name."""

from ckptavg.checkpoint.dcp_safetensors import refuse_part
from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.safetensors import read_header
from ckptavg.checkpoint.sharded import Place
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.checkpoint.torch_file import open_torch_file
from ckptavg.errors import CheckpointError

_LEGACY_TORCH_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # pickled long 0x1950a86a20f9469cfc6c
_FOREIGN_MAGIC = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run: git lfs pull"),
    (b"GGUF", "is a GGUF file, quantised for inference; average the original checkpoints"),
    (b"\x89HDF", "is an HDF5 file; only safetensors and torch files are read"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it first"),
    (b"\x93NUMPY", "is a single numpy array; only safetensors and torch files are read"),
)


def open_file(file: ReadableFile, *, state_key: str | None) -> StoredCheckpoint:
    """Open one checkpoint file in whatever supported format it has.

    Raises:
        CheckpointError: If it is broken, hostile or of another format; the file is closed then.
    """
    try:
        head = file.read(0, min(file.size, 512))
        if not head:
            raise CheckpointError(f"{file.label}: is empty (0 bytes)")
        # first: a header length can begin with the same bytes as another format's magic
        is_safetensors = head[8:9] == b"{"
        if not is_safetensors and head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return open_torch_file(file, state_key=state_key)
        if not is_safetensors:
            raise CheckpointError(f"{file.label}: {_foreign_format(head)}")
        if state_key is not None:
            raise CheckpointError(
                f"{file.label}: --state-key is for torch files, this is a safetensors file"
            )
        return open_safetensors_file(file)
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


def _foreign_format(head: bytes) -> str:
    """Say what a file is that is neither a safetensors file nor a torch zip file."""
    if _LEGACY_TORCH_MAGIC in head[:32]:
        return (
            "is a torch file of the old format (before torch 1.6); load it once with "
            "torch.load(..., weights_only=True) and save it again with torch.save"
        )
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it first"
    for magic, what in _FOREIGN_MAGIC:
        if head.startswith(magic):
            return what
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is an HTML page, not a checkpoint: the download went wrong"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return (
            "is a plain pickle, which is never run; save the weights with torch.save or safetensors"
        )
    return "is neither a safetensors file nor a torch file, or its beginning is damaged"
