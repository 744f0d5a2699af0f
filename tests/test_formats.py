"""Formats are told by content; what is none of them is named, so that the user knows what to do."""

import bz2
import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import entry, safetensors_bytes, whole
from safetensors.torch import save_file

from ckptavg.checkpoint import open_checkpoint
from ckptavg.errors import CheckpointError


def refused(path: Path, what: str) -> None:
    """Check that a file is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=whole(f"{path}: {what}")):
        open_checkpoint(path)


def gzipped() -> bytes:
    return gzip.compress(b"weights")


def tarred(*names: str, format: int = tarfile.GNU_FORMAT) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=format) as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 700
            archive.addfile(entry, io.BytesIO(bytes(700)))
    return raw.getvalue()


def array() -> bytes:
    raw = io.BytesIO()
    np.save(raw, np.arange(3))
    return raw.getvalue()


HTML = "is an HTML page, not a checkpoint: the download went wrong"
PICKLE = "is a plain pickle, which is never run; save the weights with torch.save or safetensors"
UNKNOWN = "is neither a safetensors file nor a torch or numpy file, or its beginning is damaged"
READABLE = "only safetensors, torch and numpy files are read"
NEMO = (
    "is a NeMo archive; unpack it (tar -xf) and average the model_weights.ckpt files in such "
    "archives"
)
ONNX = "is an ONNX model, exported for inference; average the checkpoints it was made from"
MSGPACK = (
    "is a msgpack file, as Flax writes; flatten its mapping and save it with "
    "safetensors.flax.save_file or np.savez"
)
GGML = "is a ggml file, quantised for inference; average the original checkpoints"
FOREIGN = {
    "empty": (b"", "is empty (0 bytes)"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "is a Git LFS pointer, not the file itself; run: git lfs pull",
    ),
    "HTML": (b"<!DOCTYPE html>\n<html>", HTML),
    "HTML of another case": (b"<!doctype HTML>", HTML),
    "HTML after blank lines": (b"\n\n  <!DOCTYPE html>", HTML),
    "HTML without a doctype": (b"<html lang=en>", HTML),
    "gzip": (gzipped(), "is compressed with gzip; unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd....", "is compressed with zstd; unpack it first"),
    "xz": (b"\xfd7zXZ\x00", "is compressed with xz; unpack it first"),
    "bzip2": (bz2.compress(b"weights"), "is compressed with bzip2; unpack it first"),
    "tar": (tarred("weights"), "is a tar archive; unpack it first"),
    "tar of many": (tarred(*map(str, range(99))), "is a tar archive; unpack it first"),
    "tar cut short": (
        tarred("a", "model_weights.ckpt")[:1000],
        "is a tar archive; unpack it first",
    ),
    "tar with a damaged size": (
        tarred("a", "model_weights.ckpt").replace(b"00000001274", b"0000000z274"),
        "is a tar archive; unpack it first",
    ),
    "NeMo": (tarred("./model_config.yaml", "./model_weights.ckpt"), NEMO),
    "NeMo of another order": (tarred("a.model", "b.txt", "model_weights.ckpt"), NEMO),
    "NeMo in POSIX tar": (tarred("model_weights.ckpt", format=tarfile.USTAR_FORMAT), NEMO),
    "oldest torch": (
        tarred("sys_info", "pickle", "tensors", "storages"),
        "is a torch file of the oldest format, a tar archive; load it once with "
        "torch.load(..., weights_only=True) and save it again with torch.save",
    ),
    "HDF5": (
        b"\x89HDF\r\n\x1a\n\x00",
        f"is an HDF5 file, as Keras writes; {READABLE}: save the weights with np.savez",
    ),
    "ONNX of torch": (b"\x08\x08\x12\x07pytorch\x1a\x052.4.0", ONNX),
    "ONNX of others": (b"\x08\x0a:\xa1\x02\x0a\x10", ONNX),
    "msgpack": (b"\x81\xa6params\x82\xa7Dense_0\x82\xa4bias\xc7", MSGPACK),
    "msgpack of many keys": (b"\xde\x00\x40\xd9\x22encoder", MSGPACK),
    "TensorFlow index": (
        b"\x00\x00\x08\x08\x01\x1a\x02\x08\x01",
        f"is the index of a TensorFlow checkpoint; {READABLE}: save the weights with np.savez",
    ),
    "TensorFlow list": (
        b'model_checkpoint_path: "ckpt-1"\n',
        f"is the list of a TensorFlow checkpoint; {READABLE}: save the weights with np.savez",
    ),
    "ggml": (b"lmgg\x00", GGML),
    "ggjt": (b"tjgg\x00", GGML),
    "GGUF": (
        b"GGUF\x03\x00\x00\x00",
        "is a GGUF file, quantised for inference; average the original checkpoints",
    ),
    "numpy": (
        array(),
        "is a single numpy array without a name; save all arrays of a model with np.savez",
    ),
    "pickle 1": (pickle.dumps({"w": [1.0]}, 1), PICKLE),
    "pickled list 0": (pickle.dumps([1.0], 0), PICKLE),
    "pickled object 0": (pickle.dumps(Path("a"), 0), PICKLE),
    "pickle 2": (pickle.dumps({"w": [1.0]}, 2), PICKLE),
    "pickle 3": (pickle.dumps({"w": [1.0]}, 3), PICKLE),
    "pickle 4": (pickle.dumps({"w": [1.0]}, 4), PICKLE),
    "pickle 5": (pickle.dumps({"w": [1.0]}, 5), PICKLE),
    "pickle 0": (pickle.dumps({"w": [1.0]}, 0), PICKLE),
    "one byte": (b"\x80", UNKNOWN),
    "text": (b"hello, this is not a checkpoint", UNKNOWN),
    "zeros": (bytes(1000), UNKNOWN),
}


@pytest.mark.parametrize(("raw", "what"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_named(tmp_path: Path, raw: bytes, what: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    refused(path, what)


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    assert open_checkpoint(tmp_path / "a.pt").layout == "safetensors file"
    assert open_checkpoint(tmp_path / "b.safetensors").layout == "torch file"


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\x1f\x8b", b"GGUF", b"\x80\x02"])
def test_a_header_length_that_looks_like_another_format_is_still_safetensors(
    tmp_path: Path, magic: bytes
) -> None:
    length = int.from_bytes(magic[:2], "little")
    path = tmp_path / "w.safetensors"
    header = '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    path.write_bytes(safetensors_bytes(header, b"\x07"))
    assert path.read_bytes()[:2] == magic[:2]
    assert list(open_checkpoint(path).tensors) == ["w"]


def test_a_state_key_is_refused_for_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(2)}, path)
    message = f"{path}: --state-key is for torch files, this is a safetensors file"
    with pytest.raises(CheckpointError, match=whole(message)):
        open_checkpoint(path, state_key="ema")


def test_messages_use_the_label(tmp_path: Path) -> None:
    (tmp_path / "w").touch()
    with pytest.raises(CheckpointError, match=whole("mine: is empty (0 bytes)")):
        open_checkpoint(tmp_path / "w", label="mine")


@pytest.mark.parametrize("source", ["absent", "a" * 300, "a\0b", "a" * 300 + "/b"])
def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened: "):
        open_checkpoint(f"{tmp_path}/{source}")


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(safetensors_bytes({"w": entry("X", [1], 0, 1)}, b"x"))
    before = os.listdir("/proc/self/fd")  # noqa: PTH208  # what is open, by number
    for _ in range(5):
        refused(path, "tensor 'w' has the unknown dtype 'X'")
    assert len(os.listdir("/proc/self/fd")) == len(before)  # noqa: PTH208  # likewise
