"""numpy files of named arrays: what np.savez writes, and nothing that only pretends to be one."""

import io
import random
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_contract import (
    CheckpointContract,
    bytes_of,
    read_if_accepted,
    read_tensor,
    refused_at_every_length,
    same_content,
    sample_tensors,
)
from hostile import Member, whole, zip_bytes
from safetensors.torch import load_file
from torch import Tensor

from ckptavg import average_checkpoints
from ckptavg.checkpoint import open_checkpoint
from ckptavg.errors import CheckpointError


class TestNpzFile(CheckpointContract):
    layout = "numpy file"

    @pytest.fixture
    def saved(self) -> dict[str, Tensor]:
        return {  # numpy has no bfloat16
            name: value
            for name, value in sample_tensors().items()
            if value.dtype is not torch.bfloat16
        }

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = directory / "model.npz"
        return savez(path, **{name: value.numpy() for name, value in tensors.items()})


def savez(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def npy(
    header: str, data: bytes = bytes(16), *, version: int = 1, length: int | None = None
) -> bytes:
    """Return an array file; ``length`` is what it states of its header."""
    raw = header.encode("latin-1") + b"\n"
    stated = len(raw) if length is None else length
    layout = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(layout, stated) + raw + data


def described(descr: str = "'<f4'", order: str = "False", shape: str = "(4,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def written(tmp_path: Path, *contents: bytes) -> Path:
    members = [Member(name=f"a{n}.npy", content=content) for n, content in enumerate(contents)]
    path = tmp_path / "w.npz"
    path.write_bytes(zip_bytes(members))
    return path


def refused(path: Path, what: str, **options: Any) -> None:
    """Check that a file is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=whole(f"{path}: {what}")):
        open_checkpoint(path, **options)


def test_arrays_of_either_order_come_back_row_major(tmp_path: Path) -> None:
    base = np.arange(60.0).reshape(3, 4, 5)
    arrays: dict[str, Any] = {
        "rows": base,
        "columns": np.asfortranarray(base),
        "transposed": base.T,
        "vector": np.asfortranarray(base[0, 0]),
        "one row": np.asfortranarray(base[:1, :1]),
        "empty": np.empty((0, 3), order="F"),
        "scalar": np.float64(3),
    }
    checkpoint = open_checkpoint(savez(tmp_path / "w.npz", **arrays))
    assert list(checkpoint.tensors) == list(arrays)
    for name, array in arrays.items():
        assert checkpoint.tensors[name].shape == np.shape(array)
        assert read_tensor(checkpoint, name) == np.asarray(array).tobytes()  # in row-major order


@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_of_every_version_are_read(tmp_path: Path, version: int) -> None:
    raw = io.BytesIO()
    np.lib.format.write_array(raw, np.arange(4, dtype=np.float32), version=(version, 0))
    for content in (raw.getvalue(), npy(described(), bytes(16), version=version)):
        checkpoint = open_checkpoint(written(tmp_path, content))
        assert list(checkpoint.tensors) == ["a0"]


def test_numpy_and_safetensors_files_are_averaged_together(tmp_path: Path) -> None:
    savez(tmp_path / "step_1.npz", w=np.full(3, 1, np.float32))
    savez(tmp_path / "step_2.npz", w=np.full(3, 2, np.float32))
    average_checkpoints([f"{tmp_path}/*.npz"], tmp_path / "out", device="cpu")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [1.5] * 3


def test_texts_are_left_out_with_a_note(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(savez(tmp_path / "w.npz", w=np.ones(1), a="x", b=np.bytes_(b"y")))
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.notes == ["left out, not numbers: 'a', 'b'"]


def test_compressed_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    np.savez_compressed(path, w=np.ones(100))
    refused(
        path,
        "the zip archive's member 'w.npy' is compressed or encrypted; save the arrays with "
        "np.savez, which does not compress",
    )


def test_python_objects_are_refused(tmp_path: Path) -> None:
    path = savez(tmp_path / "w.npz", w=np.array([{"a": 1}], dtype=object))
    refused(
        path, "the array 'w.npy' holds Python objects, which are never made; save plain numbers"
    )


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.ones(2, ">f4"), "was written on a big-endian machine"),
        (np.ones(2, "<f4,<i4"), "is of several fields, expected numbers"),
        (
            np.ones(2, "V2"),
            "has the dtype '|V2', which is not known; save float32 instead",
        ),
        (
            np.ones(2, "M8[s]"),
            "has the dtype '<M8[s]', which is not known; save float32 instead",
        ),
    ],
    ids=lambda value: value.dtype.str if isinstance(value, np.ndarray) else "",
)
def test_arrays_of_no_plain_numbers_are_refused(tmp_path: Path, array: Any, what: str) -> None:
    refused(savez(tmp_path / "w.npz", w=array), f"the array 'w.npy' {what}")


def test_a_state_key_is_refused(tmp_path: Path) -> None:
    path = savez(tmp_path / "w.npz", w=np.ones(1))
    refused(path, "--state-key is for torch files, this is a numpy file", state_key="ema")


def test_another_member_beside_arrays_is_refused(tmp_path: Path) -> None:
    members = [Member(name="a.npy", content=npy(described())), Member(name="code.py")]
    path = tmp_path / "w.npz"
    path.write_bytes(zip_bytes(members))
    refused(
        path,
        "the zip archive holds 'code.py' beside numpy arrays, which np.savez never writes",
    )


NO_HEADER = "has no header of numpy's format 1, 2 or 3"
DAMAGED = "has a damaged header"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", NO_HEADER),
        (b"\x93NUMPY\x01", NO_HEADER),
        (npy(described(), version=4), NO_HEADER),
        (npy(described(), length=60_000), "has a header of 60000 bytes, which is too long"),
        (
            npy(described(), version=2, length=2**32 - 1),
            "has a header of 4294967295 bytes, which is too long",
        ),
        (
            npy(described().ljust(5000), version=2),
            "has a header of 5001 bytes, which is too long",
        ),
        (npy("__import__('os').system('touch canary')"), DAMAGED),
        (npy("(" * 4000), DAMAGED),
        (npy("-" * 4000 + "1"), DAMAGED),
        (npy("[" * 90 + "]" * 90), DAMAGED),
        (npy("1+1j" * 1000), DAMAGED),
        (npy("{[]: 1}"), DAMAGED),
        (npy("{}"), DAMAGED),
        (npy("[]"), DAMAGED),
        (npy("\xff"), DAMAGED),
        (npy("\0"), DAMAGED),
        (npy(described(order="1")), DAMAGED),
        (npy(described(shape="4")), DAMAGED),
        (npy(described(shape="[4]")), DAMAGED),
        (npy(described(shape="(-4,)")), DAMAGED),
        (npy(described(shape="(True,)")), DAMAGED),
        (npy(described(shape="(4.0,)")), DAMAGED),
        (npy(described(shape=f"({2**63},)")), DAMAGED),
        (npy(described(shape=f"({'1,' * 65})")), DAMAGED),
        (npy(described(descr="''")), "has the dtype '', which is not known; save float32 instead"),
        (npy(described(descr="None")), DAMAGED),
        (npy(described(descr="[('a', '<f4')]")), "is of several fields, expected numbers"),
        (npy(described(shape="(5,)")), "has 16 bytes, expected 20"),
        (npy(described(shape="(3,)")), "has 16 bytes, expected 12"),
        (npy(described(shape=f"({2**62},)")), f"has 16 bytes, expected {2**64}"),
    ],
    ids=range(30),
)
def test_damaged_and_hostile_headers_are_refused(
    tmp_path: Path, content: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    refused(written(tmp_path, content), f"the array 'a0.npy' {what}")
    assert time.perf_counter() - started < 1
    assert not (tmp_path / "canary").exists()


def small_file(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors = {"a": torch.arange(5).to(torch.int16), "b": torch.arange(6.0).reshape(3, 2)}
    arrays = {name: value.numpy() for name, value in tensors.items()}
    return savez(tmp_path / "w.npz", **arrays), tensors


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    refused_at_every_length(small_file(tmp_path)[0])


def test_changed_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    path, tensors = small_file(tmp_path)
    assert same_content(open_checkpoint(path), tensors)
    assert bytes_of(tensors["a"]) in path.read_bytes()
    raw = path.read_bytes()
    rng = random.Random(4)
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= rng.randint(1, 255)
        path.write_bytes(changed)
        read_if_accepted(path)
