"""What a file is that is no checkpoint that is read, told by its first bytes, and what to do."""

import re
from collections.abc import Iterator

from ckptavg.checkpoint.files import ReadableFile

_READABLE = "only safetensors, torch and numpy files are read"
_GGML = "quantised for inference; average the original checkpoints"
_MAGIC = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run: git lfs pull"),
    (b"GGUF", f"is a GGUF file, {_GGML}"),
    (b"lmgg", f"is a ggml file, {_GGML}"),
    (b"fmgg", f"is a ggml file, {_GGML}"),
    (b"tjgg", f"is a ggml file, {_GGML}"),
    (
        b"\x89HDF",
        f"is an HDF5 file, as Keras writes; {_READABLE}: save the weights with np.savez",
    ),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it first"),
    (b"BZh", "is compressed with bzip2; unpack it first"),
    (
        b"\x93NUMPY",
        "is a single numpy array without a name; save all arrays of a model with np.savez",
    ),
    (
        b"model_checkpoint_path:",
        f"is the list of a TensorFlow checkpoint; {_READABLE}: save the weights with np.savez",
    ),
)
_PATTERNS = (
    # field 1 is the version, then come the producer's name or version, or the graph
    (
        re.compile(rb"\x08[\x01-\x20][\x12\x1a\x3a]"),
        "is an ONNX model, exported for inference; average the checkpoints it was made from",
    ),
    # a mapping whose first key is a name
    (
        re.compile(rb"(?:[\x81-\x8f]|\xde..)(?:[\xa1-\xbf]|\xd9.)[A-Za-z_]", re.DOTALL),
        "is a msgpack file, as Flax writes; flatten its mapping and save it with "
        "safetensors.flax.save_file or np.savez",
    ),
    # a table whose first entry, of an empty key, counts the shards and states a version
    (
        re.compile(rb"\x00\x00[\x02-\x20]\x08.\x1a\x02\x08", re.DOTALL),
        f"is the index of a TensorFlow checkpoint; {_READABLE}: save the weights with np.savez",
    ),
    (
        re.compile(rb"\s*<(?:!doctype|html)", re.IGNORECASE),
        ("is an HTML page, not a checkpoint: the download went wrong"),
    ),
    # binary pickles state their protocol; older ones begin with a container or a global
    (
        re.compile(rb"\x80[\x02-\x05]|\([dl]p?\d*\n|[\]}]q.|c[\w.]+\n\w+\n", re.DOTALL),
        "is a plain pickle, which is never run; save the weights with torch.save or safetensors",
    ),
)
_TAR_BLOCK_BYTES = 512
_MAX_TAR_MEMBERS = 16


def foreign_format(file: ReadableFile, head: bytes) -> str:
    """Say what a file is that has no format that is read, and what to do about it.

    Args:
        file: The file, of which little more is read.
        head: Its first 512 bytes, or all.
    """
    if head[257:262] == b"ustar":
        return _tar_kind(set(_tar_names(file)))
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    for pattern, what in _PATTERNS:
        if pattern.match(head):
            return what
    return "is neither a safetensors file nor a torch or numpy file, or its beginning is damaged"


def _tar_kind(names: set[str]) -> str:
    if "model_weights.ckpt" in names or "model_config.yaml" in names:
        return (
            "is a NeMo archive; unpack it (tar -xf) and average the model_weights.ckpt files in "
            "such archives"
        )
    if {"pickle", "storages"} <= names:
        return (
            "is a torch file of the oldest format, a tar archive; load it once with "
            "torch.load(..., weights_only=True) and save it again with torch.save"
        )
    return "is a tar archive; unpack it first"


def _tar_names(file: ReadableFile) -> Iterator[str]:
    """Yield the names of a tar archive's first members, without a leading ``./``."""
    position = 0
    for _ in range(_MAX_TAR_MEMBERS):
        if position + _TAR_BLOCK_BYTES > file.size:
            return
        header = file.read(position, _TAR_BLOCK_BYTES)
        digits = header[124:136].strip(b"\0 ")
        if header[257:262] != b"ustar" or not re.fullmatch(rb"[0-7]{1,11}", digits):
            return
        yield header[:100].rstrip(b"\0").decode("utf-8", "replace").removeprefix("./")
        n_blocks = -(-int(digits, 8) // _TAR_BLOCK_BYTES)
        position += (1 + n_blocks) * _TAR_BLOCK_BYTES
