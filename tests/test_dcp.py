"""torch.distributed.checkpoint directories: every part in its place, and nothing else read."""

import random
import tracemalloc
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_contract import (
    DTYPES,
    CheckpointContract,
    bytes_of,
    read,
    read_tensor,
    same_content,
)
from dcp_files import (
    FILES,
    Box,
    columns_first,
    cut,
    dcp_files,
    grid,
    guillotine,
    nested_dcp,
    save_dcp,
    whole,
)
from hostile import whole as exactly
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from ckptavg import average_checkpoints
from ckptavg.checkpoint import open_checkpoint
from ckptavg.checkpoint.files import PositionalFile
from ckptavg.errors import CheckpointError
from ckptavg.tensors import Piece

LAYOUT = "torch.distributed.checkpoint directory"


def save_by_torch(directory: Path, content: dict[str, Any], **options: Any) -> Path:
    """Let torch save from one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other processes
        if options:
            writer = FileSystemWriter(directory, **options)
            save(content, storage_writer=writer, no_dist=True)
        else:
            save(content, checkpoint_id=directory, no_dist=True)
    return directory


def refused(path: Path, what: str, *, state_key: str | None = None) -> None:
    """Check that a directory is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=exactly(f"{path}{what}")):
        open_checkpoint(path, state_key=state_key)


# -- the contract


class DcpContract(CheckpointContract):
    layout = LAYOUT

    def data_file(self, path: Path) -> Path:
        return path / FILES[0]


class TestSavedByTorch(DcpContract):
    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        optimizer = {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 0.1}]}
        return save_by_torch(
            directory / "run", {"model": dict(tensors), "optimizer": optimizer, "step": 5}
        )


class TestSavedByTorchInSafetensors(DcpContract):
    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_by_torch(
            directory / "run",
            {"model": dict(tensors)},
            serialization_format=SerializationFormat.SAFETENSORS,
        )


class TestSavedByTorchInManyFiles(DcpContract):
    """A file for each tensor, and those of a process in several."""

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_by_torch(directory / "run", dict(tensors), single_file_per_rank=False)

    def data_file(self, path: Path) -> Path:
        return max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)


class TestUnevenRows(DcpContract):
    """Rows dealt unevenly to three processes, of which some get none."""

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_dcp(directory / "run", tensors, self.boxes)

    def boxes(self, _name: str, value: Tensor) -> Sequence[Box]:
        if not value.dim():
            return whole(value.shape)
        rows = value.shape[0]
        return cut(value.shape, 0, [min(1, rows), rows, rows])


class TestColumns(DcpContract):
    """Tensor parallelism: columns, so that no part is a run of the tensor's bytes."""

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_dcp(directory / "run", tensors, self.boxes)

    def boxes(self, _name: str, value: Tensor) -> Sequence[Box]:
        if not value.dim():
            return whole(value.shape)
        columns = value.shape[-1]
        return cut(value.shape, value.dim() - 1, [columns // 3, columns // 3, columns])


class TestGrids(DcpContract):
    """Every axis is cut: tensor parallelism within sharding."""

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_dcp(directory / "run", tensors, lambda _, value: grid(value.shape))


class TestSingleElements(DcpContract):
    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_dcp(
            directory / "run", tensors, lambda _, value: grid(value.shape, min(value.numel(), 40))
        )


class TestStridedParts(DcpContract):
    """Parts that lie column by column in their files, as channels-last weights do."""

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_dcp(
            directory / "run", tensors, lambda _, value: grid(value.shape), laid_out=columns_first
        )


class TestStridedWholes(DcpContract):
    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_dcp(directory / "run", tensors, laid_out=columns_first)


# -- any parts of any tensor


RARE_DTYPES = (torch.uint16, torch.uint64, torch.complex128, torch.float8_e4m3fn)


@pytest.mark.parametrize("seed", range(60))
def test_any_parts_of_any_tensor_come_back_bit_for_bit(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    tensors = {}
    for number in range(4):
        dtype = rng.choice(DTYPES + RARE_DTYPES)
        shape = [rng.choice((1, 1, 2, 3, 5, 8)) for _ in range(rng.randint(0, 5))]
        numel = torch.Size(shape).numel()
        raw = torch.randint(
            0, 256, (numel * dtype.itemsize,), generator=torch.Generator().manual_seed(seed)
        ).to(torch.uint8)
        value = (raw % 2).to(torch.bool) if dtype is torch.bool else raw.view(dtype)
        tensors[f"t{number}"] = value.reshape(shape)
    path = save_dcp(
        tmp_path / "run",
        tensors,
        lambda _, value: guillotine(value.shape, rng, rng.randint(0, 12)),
        laid_out=lambda value: rng.choice((columns_first, torch.clone))(value),
    )
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, tensors)
    for name, value in tensors.items():
        expected = bytes_of(value)
        for _ in range(8):
            start = rng.randint(0, len(expected))
            stop = rng.randint(start, len(expected))
            assert read(checkpoint, [Piece(name, start, stop)]) == expected[start:stop]
    checkpoint.close()


def test_tensors_of_the_most_dimensions_torch_has(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(8.0).reshape(*[1] * 31, 2, *[1] * 29, 2, 1, 2)}
    assert tensors["w"].dim() == 64
    for number, boxes in enumerate((whole, grid)):
        path = save_dcp(tmp_path / str(number), tensors, lambda _, value, f=boxes: f(value.shape))
        if boxes is whole:
            assert same_content(open_checkpoint(path), tensors)
        else:  # numpy 1 has 32 axes at most, and parts side by side are put together with it
            assert open_checkpoint(path).tensors["w"].shape == tensors["w"].shape


def test_replicas_that_were_all_saved_count_once(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0)}
    path = save_dcp(tmp_path / "run", tensors, lambda _, value: whole(value.shape) * 3)
    assert same_content(open_checkpoint(path), tensors)


def test_an_empty_part_need_not_be_stored(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0)}
    files = dcp_files(tensors, lambda _, value: cut(value.shape, 0, [6]))
    del files.metadata.storage_data[MetadataIndex("w", torch.Size([6]))]
    assert same_content(open_checkpoint(files.write(tmp_path / "run")), tensors)


def test_what_is_held_while_reading_is_bounded(tmp_path: Path) -> None:
    value = torch.arange(2_000_000, dtype=torch.float32).reshape(1000, 2000)
    path = save_dcp(
        tmp_path / "run", {"w": value}, lambda _, value: cut(value.shape, 1, [3, 700, 1900])
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.read_scratch_nbytes > 0
    raw, buffer = bytes_of(value), memoryview(bytearray(4_000_000))
    tracemalloc.start()
    for start in (0, 3_999_999):
        checkpoint.read_into([Piece("w", start, start + len(buffer))], buffer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert buffer == raw[3_999_999:7_999_999]
    assert peak <= checkpoint.read_scratch_nbytes + 100_000


def test_rows_are_read_without_scratch_and_in_few_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.arange(60_000.0).reshape(300, 200)
    path = save_dcp(
        tmp_path / "run", {"w": value}, lambda _, value: cut(value.shape, 0, [100, 250])
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.read_scratch_nbytes == 0
    calls = recorded(monkeypatch)
    assert read_tensor(checkpoint, "w") == bytes_of(value)
    assert len(calls) == 3


# -- which entries are the weights


WEIGHTS = {"layer.0.weight": torch.arange(6.0).reshape(2, 3), "norm.bias": torch.ones(3)}
OPTIMIZER = {
    "state": {"layer.0.weight": {"exp_avg": torch.full((9,), 7.0), "step": torch.tensor(3.0)}},
    "param_groups": [{"lr": 0.1}],
}


@pytest.mark.parametrize(
    ("content", "step", "epoch"),
    [
        ({"model": WEIGHTS, "optimizer": OPTIMIZER, "step": 7}, 7, None),
        ({"model": WEIGHTS, "optim": OPTIMIZER, "train_state": {"step": 7}}, 7, None),
        ({"model": WEIGHTS, "train_state": {"step": torch.tensor(2**40)}}, 2**40, None),
        ({**WEIGHTS, "optimizer": OPTIMIZER, "train_state": {"step": torch.tensor(7)}}, 7, None),
        ({"state_dict": WEIGHTS, "optimizer_0": OPTIMIZER, "global_step": 9, "epoch": 2}, 9, 2),
        ({"app": {"model": WEIGHTS}, "lr_scheduler": {"last_epoch": 3}}, None, None),
        ({"model": WEIGHTS, "iteration": 12, "dataloader": {"rank": torch.ones(3)}}, 12, None),
        ({"model": WEIGHTS, "step": "seven", "train_state": {"step": -1}}, None, None),
        ({"model": WEIGHTS, "step": torch.tensor(1.5)}, None, None),
        ({"model": WEIGHTS, "step": bytes(100_000)}, None, None),
    ],
)  # fmt: skip
def test_weights_and_step_are_found_where_trainers_put_them(
    tmp_path: Path, content: dict[str, Any], step: int | None, epoch: int | None
) -> None:
    key = "app.model" if "app" in content else None
    for path in (nested_dcp(tmp_path / "hand", content), save_by_torch(tmp_path / "t", content)):
        checkpoint = open_checkpoint(path, state_key=key)
        assert same_content(checkpoint, WEIGHTS)
        assert (checkpoint.step, checkpoint.epoch) == (step, epoch)
        checkpoint.close()


def test_without_the_planners_paths_the_names_tell(tmp_path: Path) -> None:
    """Megatron and OLMo-core write none."""
    flat: dict[str, Any] = {f"model.{name}": value for name, value in WEIGHTS.items()}
    flat["optim.state.layer.0.weight.exp_avg"] = torch.ones(9)
    flat["optimizer"] = {"lr": 0.1}
    flat["optimizer.state.exp_avg"] = torch.ones(9)
    assert same_content(open_checkpoint(save_dcp(tmp_path / "a", flat)), WEIGHTS)
    # parts of one model keep their names in full
    flat = {"encoder.weight": torch.ones(2), "decoder.weight": torch.zeros(2)}
    state: dict[str, Any] = {"optimizer.state.exp_avg": torch.ones(9), "rng_state": b"x"}
    assert same_content(open_checkpoint(save_dcp(tmp_path / "b", flat | state)), flat)
    checkpoint = open_checkpoint(save_dcp(tmp_path / "c", flat | {"note": "text"}))
    assert checkpoint.notes == ["left out, not tensors: 'note'"]


def test_a_state_key_selects_other_weights(tmp_path: Path) -> None:
    average = {name: value + 1 for name, value in WEIGHTS.items()}
    path = nested_dcp(tmp_path / "run", {"model": WEIGHTS, "ema": average, "optimizer": OPTIMIZER})
    checkpoint = open_checkpoint(path)
    assert checkpoint.notes == ["also holds 'ema'; --state-key selects it"]
    assert same_content(checkpoint, WEIGHTS)
    other = open_checkpoint(path, state_key="ema")
    assert same_content(other, average)
    assert other.places_digest != checkpoint.places_digest
    refused(
        path,
        ": no entry 'swa': 'swa' is not among 'model', 'ema', 'optimizer'",
        state_key="swa",
    )


def test_what_there_is_is_listed_where_no_weights_are_found(tmp_path: Path) -> None:
    path = nested_dcp(tmp_path / "run", {"app": {"policy": WEIGHTS}, "optimizer": OPTIMIZER})
    refused(
        path,
        ": no weights found at its top level, which holds 'app', 'optimizer'; choose one with "
        "--state-key, for example --state-key app.policy",
    )
    path = nested_dcp(tmp_path / "two", {"model": WEIGHTS, "net": WEIGHTS})
    refused(path, ": 'model', 'net' all hold weights; choose one with --state-key")
    path = nested_dcp(tmp_path / "none", {"optimizer": OPTIMIZER, "step": 3})
    refused(path, ": no weights found at its top level, which holds 'optimizer', 'step'")
    refused(
        save_dcp(tmp_path / "empty", {}), ": no weights found at its top level, which holds nothing"
    )


def test_names_from_lists_are_numbers(tmp_path: Path) -> None:
    tensors = {"experts.0": torch.ones(2), "experts.1": torch.zeros(2)}
    path = save_by_torch(tmp_path / "run", {"model": {"experts": list(tensors.values())}})
    checkpoint = open_checkpoint(path, state_key="model.experts")
    assert same_content(checkpoint, {"0": torch.ones(2), "1": torch.zeros(2)})


def test_tied_names_that_are_stored_twice_stay_equal(tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        shared = torch.randn(7, 5, generator=torch.Generator().manual_seed(number)).bfloat16()
        tensors = {"embed.weight": shared, "lm_head.weight": shared}
        paths.append(
            save_dcp(
                tmp_path / f"step{number}",
                tensors,
                lambda name, value: cut(value.shape, int(name == "embed.weight"), [2, 4]),
            )
        )
    average_checkpoints(paths, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == {"embed.weight", "lm_head.weight"}
    assert bytes_of(written["embed.weight"]) == bytes_of(written["lm_head.weight"])


def test_an_average_does_not_depend_on_how_its_checkpoints_were_sharded(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    states = [
        {"a": torch.randn(9, 11, generator=generator), "b": torch.randn(5, generator=generator)}
        for _ in range(3)
    ]
    outputs = []
    for name, boxes in {"whole": whole, "grid": grid}.items():
        paths = [
            save_dcp(tmp_path / f"{name}{at}", one, lambda _, value, f=boxes: f(value.shape))
            for at, one in enumerate(states)
        ]
        average_checkpoints(paths, tmp_path / name)
        outputs.append((tmp_path / name / "model.safetensors").read_bytes())
    mixed = [tmp_path / "whole0", tmp_path / "grid1", tmp_path / "whole2"]
    average_checkpoints(mixed, tmp_path / "mixed")
    outputs.append((tmp_path / "mixed" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Return a list that will hold file name, first byte and number of bytes of every read."""
    calls: list[tuple[str, int, int]] = []
    read_into = PositionalFile.read_into

    def noted(self: PositionalFile, offset: int, buffers: Sequence[memoryview]) -> None:
        calls.append((Path(self.path).name, offset, sum(one.nbytes for one in buffers)))
        read_into(self, offset, buffers)

    monkeypatch.setattr(PositionalFile, "read_into", noted)
    return calls


def test_training_state_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat: dict[str, Any] = {}
    planner: dict[str, tuple[str | int, ...]] = {}
    for name, value in WEIGHTS.items():
        for keys, content in {
            ("model", name): value,
            ("optimizer", "state", name, "exp_avg"): torch.ones(3000),
            ("optimizer", "state", name, "step"): torch.ones(3000),
            ("dataloader", name): bytes(9000),
        }.items():
            flat[".".join(keys)], planner[".".join(keys)] = content, keys
    files = dcp_files(flat, planner=planner)
    path = files.write(tmp_path / "run")
    (path / "__9_0.distcp").write_bytes(b"never opened")
    calls = recorded(monkeypatch)
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, WEIGHTS)
    state = [
        info
        for key, info in files.metadata.storage_data.items()
        if not key.fqn.startswith("model.")
    ]
    assert len(state) == 6
    for name, offset, nbytes in calls:
        if (offset, nbytes) == (0, 9):  # which format the file has
            continue
        for info in state:
            is_apart = (
                name != info.relative_path
                or offset >= info.offset + info.length
                or offset + nbytes <= info.offset
            )
            assert is_apart, (name, offset, nbytes)


def test_files_that_hold_training_state_alone_may_be_missing(tmp_path: Path) -> None:
    files = dcp_files({"model.w": torch.ones(2), "optim.w": torch.ones(2)}, names=FILES[:2])
    path = files.write(tmp_path / "run")
    (path / FILES[1]).unlink()
    assert same_content(open_checkpoint(path), {"w": torch.ones(2)})


def test_the_digest_of_places_tells_parts_apart(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4)
    digests = set()
    for number, boxes in enumerate(
        (whole((3, 4)), cut((3, 4), 0, [1]), cut((3, 4), 0, [2]), cut((3, 4), 1, [2]))
    ):
        path = save_dcp(tmp_path / str(number), {"w": value}, lambda *_, found=boxes: found)
        digests.add(open_checkpoint(path).places_digest)
        assert open_checkpoint(path).places_digest in digests
    assert len(digests) == 4
    # the same parts, whose places in the files are exchanged
    files = dcp_files({"w": value}, lambda *_: cut((3, 4), 1, [2]))
    left, right = files.metadata.storage_data
    storage = files.metadata.storage_data
    storage[left], storage[right] = storage[right], storage[left]
    exchanged = open_checkpoint(files.write(tmp_path / "exchanged"))
    assert [Path(file.path).name for file in exchanged.files] == [".metadata", FILES[1], FILES[0]]
    assert read_tensor(exchanged, "w") == bytes_of(value[:, [2, 3, 0, 1]])


def test_moments_among_flat_names_are_never_taken_for_weights(tmp_path: Path) -> None:
    saved = {"layer.weight": torch.ones(2, 3), "adam.exp_avg.layer.weight": torch.zeros(2, 3)}
    path = save_dcp(tmp_path / "run", saved, planner={name: (name,) for name in saved})
    with pytest.raises(CheckpointError, match="'adam.exp_avg.layer.weight' is optimizer state"):
        open_checkpoint(path)


@pytest.mark.parametrize("head", ["opt", "optimizer", "ema"])
def test_state_and_copies_under_flat_names_are_left_out(tmp_path: Path, head: str) -> None:
    saved = {"layer.weight": torch.ones(2, 3), f"{head}.layer.weight": torch.zeros(2, 3)}
    path = save_dcp(tmp_path / "run", saved, planner={name: (name,) for name in saved})
    assert set(open_checkpoint(path).tensors) == {"layer.weight"}


def test_facts_beside_that_cannot_be_read_are_not_known(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "run", {"layer.weight": torch.ones(2, 3)})
    (path / "meta.pt").write_bytes(b"not a torch file")
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, set(checkpoint.tensors)) == (None, {"layer.weight"})
