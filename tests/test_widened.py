"""Checkpoints of several float dtypes are averaged where the output's dtype is named."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from checkpoint_contract import CheckpointContract, bytes_of, read, same_content
from conftest import float64_mean, save_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptavg import IncompatibleCheckpointsError, average_checkpoints
from ckptavg.checkpoint import READ_SCRATCH_BYTES, Checkpoint, open_checkpoint, widen_dtypes
from ckptavg.checkpoint.widened import WidenedCheckpoint
from ckptavg.tensors import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Piece

CONVERSIONS = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float32),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
]
DTYPES = {
    torch.float16: FLOAT16, torch.bfloat16: BFLOAT16, torch.float32: FLOAT32,
    torch.float64: FLOAT64,
}  # fmt: skip


def bits(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return values of every exponent, also subnormal and infinite ones, but NaN."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator).to(torch.uint8)
    value = raw.view(dtype)
    return torch.where(value.isnan(), torch.ones((), dtype=dtype), value)


class TestWidenedCheckpoint(CheckpointContract):
    layout = "torch file"

    @pytest.fixture
    def saved(self) -> dict[str, Tensor]:
        """Return what is read; what is stored is narrower where that is in its name."""
        tensors: dict[str, Tensor] = {"long": torch.arange(3000).to(torch.uint8)}
        for number, (stored, wide) in enumerate(CONVERSIONS * 2):
            for shape in ((3, 5), (), (0,), (33,)):
                numel = torch.Size(shape).numel()
                value = bits(numel, stored, number).reshape(shape)
                tensors[f"{number}.{len(tensors)}.{stored}"] = value.to(wide)
                tensors[f"{number}.{len(tensors)}.same"] = value
        return tensors

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = directory / "model.pt"
        torch.save({name: self.stored(name, value) for name, value in tensors.items()}, path)
        self.wide = {
            name: DTYPES[value.dtype] for name, value in tensors.items() if "torch." in name
        }
        return path

    @staticmethod
    def stored(name: str, value: Tensor) -> Tensor:
        narrow = name.partition("torch.")[2]
        return value.to(getattr(torch, narrow)) if narrow else value

    def open(self, path: Path) -> Checkpoint:
        return WidenedCheckpoint(open_checkpoint(path), self.wide)


def opened(tmp_path: Path, *checkpoints: Mapping[str, Tensor]) -> list[Checkpoint]:
    return [
        open_checkpoint(save_checkpoint(tmp_path / letter, tensors, "torch"), label=letter)
        for letter, tensors in zip("abcdefgh", checkpoints, strict=False)
    ]


@pytest.mark.parametrize(("stored", "wide"), CONVERSIONS, ids=str)
def test_any_range_of_a_large_tensor_is_widened_exactly(
    tmp_path: Path, stored: torch.dtype, wide: torch.dtype
) -> None:
    value = bits(200_001, stored)
    (checkpoint, _), _ = widen_dtypes(
        opened(tmp_path, {"w": value, "v": value.clone()}, {"w": value.to(wide), "v": value})
    )
    raw = bytes_of(value.to(wide))
    rng = random.Random(5)
    ranges = [(0, len(raw)), (3, len(raw) - 1), (5, 6), (1, 9), (8, 16)]
    ranges += [tuple(sorted(rng.choices(range(len(raw)), k=2))) for _ in range(20)]  # type: ignore[misc]  # pairs
    assert all(
        read(checkpoint, [Piece("w", start, stop)]) == raw[start:stop] for start, stop in ranges
    )
    pieces = [Piece("w", *one) for one in ranges[:5]] + [Piece("v", 0, 10), Piece("w", 0, 16)]
    expected = b"".join(raw[start:stop] for start, stop in ranges[:5])
    assert read(checkpoint, pieces) == expected + bytes_of(value)[:10] + raw[:16]


def test_nan_stays_nan(tmp_path: Path) -> None:
    value = torch.tensor([0x7C01, 0x7E00, 0x3C00], dtype=torch.int32).to(torch.int16)
    (checkpoint, _), _ = widen_dtypes(
        opened(tmp_path, {"w": value.view(torch.float16)}, {"w": torch.ones(3)})
    )
    found = torch.frombuffer(bytearray(read(checkpoint, [Piece("w", 0, 12)])), dtype=torch.float32)
    assert found.isnan().tolist() == [True, True, False]


def test_neighbours_are_read_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {f"w{n}": torch.full((5,), float(n)).bfloat16() for n in range(100)}
    (checkpoint, _), _ = widen_dtypes(
        opened(tmp_path, narrow, {name: value.float() for name, value in narrow.items()})
    )
    calls: list[int] = []
    inner = type(open_checkpoint(tmp_path / "a.pt")).read_into

    def noted(self: Checkpoint, pieces: Sequence[Piece], buffer: memoryview) -> None:
        calls.append(len(pieces))
        inner(self, pieces, buffer)

    monkeypatch.setattr("ckptavg.checkpoint.stored.StoredCheckpoint.read_into", noted)
    found = read(checkpoint, [Piece(name, 0, 20) for name in narrow])
    assert found == b"".join(bytes_of(value.float()) for value in narrow.values())
    assert calls == [100]


def test_the_narrowest_dtype_that_holds_all_is_taken(tmp_path: Path) -> None:
    half, brain, single, double = (
        torch.ones(2, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    )
    count = torch.tensor(3)
    first = {"a": half, "b": half, "c": half, "d": single, "e": half, "n": count}
    last = {"a": brain, "b": half, "c": single, "d": double, "e": count, "n": count}
    checkpoints = opened(
        tmp_path,
        *(  # of one storage each: tied tensors get one dtype
            {name: value.clone() for name, value in tensors.items()} for tensors in (first, last)
        ),
    )
    widened, notes = widen_dtypes(checkpoints)
    for checkpoint in widened:
        dtypes = {name: info.dtype for name, info in checkpoint.tensors.items()}
        assert (dtypes["a"], dtypes["b"]) == (FLOAT32, FLOAT16)
        assert (dtypes["c"], dtypes["d"]) == (FLOAT32, FLOAT64)
    assert widened[0].tensors["e"].dtype is FLOAT16  # and the plan refuses it
    assert notes == [
        "a: 3 tensors are widened to float32 and float64, which hold them exactly: the checkpoints "
        "differ in dtype",
        "b: 1 tensors are widened to float32, which holds them exactly: the checkpoints differ in "
        "dtype",
    ]
    assert widened[0].read_scratch_nbytes == READ_SCRATCH_BYTES
    assert widened[0].places_digest != checkpoints[0].places_digest
    assert (widened[0].label, widened[0].hub, widened[0].folder) == ("a", None, None)


def test_checkpoints_that_agree_are_left_alone(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, {"w": torch.ones(2)}, {"w": torch.ones(2)}, {"v": torch.ones(2)})
    assert widen_dtypes(checkpoints) == (checkpoints, [])
    assert widen_dtypes([]) == ([], [])


def test_tied_tensors_stay_alike(tmp_path: Path) -> None:
    """One checkpoint stores one of the two, the other both, in two dtypes."""
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.ones(2).half()}, path, metadata={"b": "a"})
    stored, tied = torch.ones(2).half(), torch.ones(2).bfloat16()
    both = save_checkpoint(tmp_path / "two", {"a": stored, "b": tied}, "torch")
    widened, _ = widen_dtypes([open_checkpoint(path), open_checkpoint(both)])
    assert {info.dtype for one in widened for info in one.tensors.values()} == {FLOAT32}
    assert read(widened[0], [Piece("b", 0, 8)]) == bytes_of(torch.ones(2))
    assert same_content(widened[1], {"a": torch.ones(2), "b": torch.ones(2)})


def mixed(numel: int) -> list[dict[str, Tensor]]:
    """Return checkpoints whose tensors have each float dtype in turn."""
    generator = torch.Generator().manual_seed(3)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return [
        {
            name: torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
            for name, dtype in {
                "half": dtypes[step % 2],
                "single": dtypes[step % 3],
                "same": torch.float32,
            }.items()
        }
        | {"n": torch.tensor(step)}
        for step in range(4)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_mean_of_mixed_dtypes_is_rounded_once(tmp_path: Path, device: str, dtype: str) -> None:
    checkpoints = mixed(3001)
    paths = [
        save_checkpoint(tmp_path / f"step_{step}", tensors, layout)
        for step, (tensors, layout) in enumerate(
            zip(checkpoints, ("torch", "safetensors", "sharded torch", "torch"), strict=True)
        )
    ]
    result = average_checkpoints(paths, tmp_path / "out", dtype=dtype, device=device)  # type: ignore[arg-type]  # one of the literals
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("half", "single", "same"):
        # exact in float64: four values, each of at most 24 bits and of like magnitude
        exact = float64_mean([one[name] for one in checkpoints])
        assert torch.equal(found[name], exact.to(getattr(torch, dtype))), name
    assert found["n"].item() == 3
    notes = [note for note in result.notes if "widened" in note]
    assert len(notes) == 4
    assert notes[0].startswith(f"{paths[0]}: 2 tensors are widened to float32, which holds them")


def test_mixed_dtypes_without_a_dtype_are_refused_with_what_to_do(tmp_path: Path) -> None:
    paths = [
        save_checkpoint(tmp_path / f"step_{step}", tensors, "torch")
        for step, tensors in enumerate(mixed(5))
    ]
    with pytest.raises(IncompatibleCheckpointsError, match=r"\(pass --dtype to say which one"):
        average_checkpoints(paths, tmp_path / "out")


def test_integers_beside_floats_are_refused_whatever_the_dtype(tmp_path: Path) -> None:
    paths = [
        save_checkpoint(tmp_path / f"step_{step}", {"w": value, "v": torch.ones(2)}, "torch")
        for step, value in enumerate((torch.ones(2), torch.ones(2).long()))
    ]
    message = r"\(average checkpoints of one dtype\)$"
    with pytest.raises(IncompatibleCheckpointsError, match=message):
        average_checkpoints(paths, tmp_path / "out", dtype="float32")


def test_the_result_does_not_depend_on_the_memory(tmp_path: Path) -> None:
    paths = [
        save_checkpoint(tmp_path / f"step_{step}", tensors, "torch")
        for step, tensors in enumerate(mixed(300_001))
    ]
    for name, budget in (("small", 16 * 2**20), ("large", 256 * 2**20)):
        average_checkpoints(
            paths, tmp_path / name, dtype="float32", device="cpu", memory_budget_bytes=budget
        )
    files = [tmp_path / name / "model.safetensors" for name in ("small", "large")]
    assert files[0].read_bytes() == files[1].read_bytes()
