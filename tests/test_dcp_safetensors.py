"""safetensors files of several processes: their parts are whole tensors here, or refused."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_contract import (
    CheckpointContract,
    bytes_of,
    read_if_accepted,
    read_tensor,
    same_content,
)
from dcp_files import Box, cut, grid, part_of, whole
from hostile import entry, safetensors_bytes
from hostile import whole as exactly
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ckptavg import average_checkpoints
from ckptavg.checkpoint import open_checkpoint
from ckptavg.errors import CheckpointError

LAYOUT = "torch.distributed.checkpoint safetensors directory"
NAME = "shard-{:05d}-model-{:05d}-of-{:05d}.safetensors"
FIRST, SECOND, THIRD = (NAME.format(number, 1, 1) for number in (1, 2, 3))


def save_shards(
    directory: Path,
    tensors: Mapping[str, Tensor],
    boxes: Callable[[str, Tensor], Sequence[Box]] = lambda _, value: whole(value.shape),
    *,
    n_processes: int = 3,
) -> Path:
    """Write the file of each process; the parts of a tensor are dealt to them in turn."""
    directory.mkdir(exist_ok=True)
    held: list[dict[str, Tensor]] = [{} for _ in range(n_processes)]
    offsets: list[dict[str, Any]] = [{} for _ in range(n_processes)]
    for number, (name, value) in enumerate(tensors.items()):
        for turn, box in enumerate(boxes(name, value)):
            process = (number + turn) % n_processes
            held[process][name] = part_of(value, box)
            offsets[process][name] = {"saved_offsets": list(box[0])}
    for process in range(n_processes):
        told = {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps(offsets[process]),
        }
        save_file(held[process], directory / NAME.format(process + 1, 1, 1), metadata=told)
    return directory


def refused(path: Path, what: str) -> None:
    """Check that a checkpoint is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=exactly(f"{path}{what}")):
        open_checkpoint(path)


# -- the contract


class ShardsContract(CheckpointContract):
    layout = LAYOUT

    def data_file(self, path: Path) -> Path:
        return path / FIRST

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_shards(directory / "run", tensors, self.boxes)

    def boxes(self, name: str, value: Tensor) -> Sequence[Box]:
        raise NotImplementedError


class TestRowsOfProcesses(ShardsContract):
    """Uneven rows; the last process has none."""

    def boxes(self, name: str, value: Tensor) -> Sequence[Box]:
        if not value.dim():
            return whole(value.shape)
        rows = value.shape[0]
        return cut(value.shape, 0, [min(2, rows), rows])


class TestColumnsOfProcesses(ShardsContract):
    def boxes(self, name: str, value: Tensor) -> Sequence[Box]:
        if not value.dim():
            return whole(value.shape)
        return cut(value.shape, value.dim() - 1, [value.shape[-1] // 2])


class TestWholesOfProcesses(ShardsContract):
    def boxes(self, name: str, value: Tensor) -> Sequence[Box]:
        return whole(value.shape)


class TestSavedByTorchForHuggingFace(ShardsContract):
    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = directory / "run"
        path.mkdir()
        save_by_torch(path, tensors)
        return path


def save_by_torch(path: Path, tensors: Mapping[str, Tensor], **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other processes
        writer = HuggingFaceStorageWriter(str(path), save_distributed=True, **options)
        save(dict(tensors), storage_writer=writer, no_dist=True)


TENSORS = {
    "embed.weight": torch.arange(24.0).reshape(6, 4),
    "norm.weight": torch.arange(7).to(torch.bfloat16),
    "count": torch.tensor(3),
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return a directory of three processes' files: rows of each tensor."""
    return save_shards(tmp_path / "run", TENSORS, rows)


def rows(_name: str, value: Tensor) -> Sequence[Box]:
    return cut(value.shape, 0, [2, 4]) if value.dim() else whole(value.shape)


def rewritten(path: Path, **changes: Any) -> None:
    """Write a file anew: other tensors or metadata, None for as they are."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        metadata = file.metadata()
    save_file(changes.get("tensors", tensors), path, metadata=metadata | changes.get("told", {}))


# -- which files


def test_grids_are_put_together(tmp_path: Path) -> None:
    path = save_shards(tmp_path / "run", TENSORS, lambda _, value: grid(value.shape), n_processes=4)
    assert same_content(open_checkpoint(path), TENSORS)


def test_how_many_processes_there_were_is_not_known_and_said(shards: Path) -> None:
    said = "was put together from the files of {}; they do not tell whether there were more"
    assert open_checkpoint(shards).notes == [said.format("3 processes")]
    path = save_shards(shards.with_name("one"), TENSORS, n_processes=1)
    assert open_checkpoint(path).notes == [said.format("1 process")]


def test_a_missing_process_is_named(shards: Path) -> None:
    (shards / SECOND).unlink()
    refused(shards, ": the file of process 2 is missing; there are 3 of them (shard-00002-...)")
    (shards / FIRST).unlink()
    refused(shards, ": the file of process 1 is missing; there are 3 of them (shard-00001-...)")


def test_a_process_of_a_huge_number_is_no_work(shards: Path) -> None:
    (shards / FIRST).rename(shards / NAME.format(99999, 1, 1))
    refused(shards, ": the file of process 1 is missing; there are 99999 of them (shard-00001-...)")


def test_a_model_in_several_files_needs_each_of_them(tmp_path: Path) -> None:
    parts = {1: {"a": torch.ones(4)}, 2: {"b": torch.zeros(3, 2)}}
    for number, tensors in parts.items():
        save_shards(tmp_path, tensors, rows_of_two, n_processes=2)
        for process in (1, 2):
            (tmp_path / NAME.format(process, 1, 1)).rename(
                tmp_path / NAME.format(process, number, 2)
            )
    assert same_content(open_checkpoint(tmp_path), parts[1] | parts[2])
    for process in (1, 2):
        (tmp_path / NAME.format(process, 2, 2)).unlink()
    refused(tmp_path, ": no process's file 2 of 00002 of the model is there")


def rows_of_two(_name: str, value: Tensor) -> Sequence[Box]:
    return cut(value.shape, 0, [1])


def test_a_single_such_file_is_refused(shards: Path) -> None:
    what = (
        ": holds one process's parts of tensors, not whole ones; name the folder with the files of "
        "all processes"
    )
    for name in (FIRST, SECOND):
        refused(shards / name, what)
    (shards / FIRST).rename(shards / "model.safetensors")
    # a first process's parts begin where the tensors do, so that only its name tells
    (shards / SECOND).rename(shards.with_name("weights.safetensors"))
    refused(shards.with_name("weights.safetensors"), what)


def test_a_model_directory_of_such_files_is_refused(shards: Path) -> None:
    weight_map = dict.fromkeys(TENSORS, SECOND)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"/{SECOND}: holds one process's parts of tensors"):
        open_checkpoint(shards)


def test_a_file_of_whole_tensors_may_say_so(tmp_path: Path) -> None:
    path = save_shards(tmp_path / "run", TENSORS, n_processes=1)
    (path / FIRST).rename(path / "model.safetensors")
    assert same_content(open_checkpoint(path), TENSORS)
    assert same_content(open_checkpoint(path / "model.safetensors"), TENSORS)


def test_the_parts_win_over_what_torch_put_together(tmp_path: Path) -> None:
    """torch's consolidation writes 0 for every tensor without dimensions."""
    tensors = {name: value for name, value in TENSORS.items() if value.is_floating_point()}
    tensors["scale"] = torch.tensor(1.5)
    save_by_torch(tmp_path, tensors, enable_consolidation=True)  # which fails for integers
    whole = tmp_path / "model-00001-of-00001.safetensors"
    whole.write_bytes(b"damaged, and not looked at")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == "torch.distributed.checkpoint safetensors directory"
    assert checkpoint.label == str(tmp_path)
    assert same_content(checkpoint, tensors)
    assert any("rather than what torch put together" in note for note in checkpoint.notes)


def test_a_state_key_is_refused_for_the_parts_beside_the_whole(tmp_path: Path) -> None:
    tensors = {name: value for name, value in TENSORS.items() if value.is_floating_point()}
    save_by_torch(tmp_path, tensors, enable_consolidation=True)
    with pytest.raises(CheckpointError, match="--state-key is for torch files"):
        open_checkpoint(tmp_path, state_key="ema")


def test_parts_of_which_nothing_was_put_together_need_no_note(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    tensors = {"weight": torch.arange(6.0).reshape(3, 2)}
    save_shards(tmp_path / "step-1/sharded", tensors, rows_of_two)
    checkpoint = open_checkpoint(tmp_path / "step-1")
    assert same_content(checkpoint, tensors)
    assert not any("rather than what torch put together" in note for note in checkpoint.notes)


def test_a_single_consolidated_file_beside_the_parts_wins(shards: Path) -> None:
    whole_tensors = {name: value + 1 for name, value in TENSORS.items()}
    save_file(whole_tensors, shards / "model.safetensors")
    checkpoint = open_checkpoint(shards)
    assert checkpoint.layout == "safetensors directory"
    assert same_content(checkpoint, whole_tensors)


def test_config_and_tied_names_apply(shards: Path) -> None:
    path = save_shards(
        shards.with_name("tied"),
        {"model.embed_tokens.weight": torch.arange(12.0).reshape(3, 4)},
        rows_of_two,
    )
    (path / "config.json").write_text('{"tie_word_embeddings": true}')
    checkpoint = open_checkpoint(path)
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert read_tensor(checkpoint, "lm_head.weight") == bytes_of(torch.arange(12.0))


def test_an_average_does_not_depend_on_how_its_checkpoints_were_sharded(tmp_path: Path) -> None:
    values = [{"w": torch.randn(5, 4), "b": torch.randn(6)} for _ in range(2)]
    outputs = []
    for name, boxes in {"rows": rows, "whole": lambda _, value: whole(value.shape)}.items():
        paths = [save_shards(tmp_path / f"{name}{at}", one, boxes) for at, one in enumerate(values)]
        average_checkpoints(paths, tmp_path / name)
        outputs.append(load_file(tmp_path / name / "model.safetensors"))
    for name, value in outputs[0].items():
        assert bytes_of(value) == bytes_of(outputs[1][name])


def test_a_state_key_is_refused(shards: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=exactly(f"{shards}: --state-key is for torch files, these are safetensors files"),
    ):
        open_checkpoint(shards, state_key="ema")


# -- parts that do not fit


def test_parts_that_leave_a_hole_are_refused(shards: Path) -> None:
    told = {"embed.weight": {"saved_offsets": [3, 0]}, "norm.weight": {"saved_offsets": [2]}}
    rewritten(shards / SECOND, told={"DCP_SHARDING_INFO": json.dumps(told)})
    refused(shards, ": tensor 'embed.weight' has parts that overlap, one of them at [4, 0]")
    path = shards / SECOND
    save_file(
        {"norm.weight": TENSORS["norm.weight"][2:4]},
        path,
        metadata={"DCP_SHARDING_INFO": json.dumps(told)},
    )
    refused(
        shards,
        ": tensor 'embed.weight' has 24 elements, but its parts hold 16: a file of the checkpoint "
        "is missing or unfinished",
    )


@pytest.mark.parametrize(
    "other", [torch.zeros(2, 4).double(), torch.zeros(8), torch.zeros(2, 4, 1)]
)
def test_parts_of_another_kind_are_refused(shards: Path, other: Tensor) -> None:
    told = {"embed.weight": {"saved_offsets": [2, 0, 0][: other.dim()]}}
    save_file(
        {"embed.weight": other},
        shards / SECOND,
        metadata={"DCP_SHARDING_INFO": json.dumps(told)},
    )
    refused(
        shards,
        ": tensor 'embed.weight' has parts of different dtypes or numbers of dimensions",
    )


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "3", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"],
    ids=range(8),
)
def test_a_file_without_offsets_is_refused(shards: Path, text: str | None) -> None:
    told = {} if text is None else {"DCP_SHARDING_INFO": text}
    save_file({"embed.weight": TENSORS["embed.weight"][2:4]}, shards / SECOND, metadata=told)
    refused(
        shards,
        f"/{SECOND}: has no DCP_SHARDING_INFO that says where in their tensors its parts begin",
    )


@pytest.mark.parametrize(
    "saved",
    [
        None, 3, "x", [], {}, {"saved_offsets": None}, {"saved_offsets": 3}, {"saved_offsets": {}},
        {"saved_offsets": [2]}, {"saved_offsets": [2, 0, 0]}, {"saved_offsets": [2, -1]},
        {"saved_offsets": [2, 0.0]}, {"saved_offsets": [True, 0]}, {"saved_offsets": ["2", 0]},
        {"saved_offsets": [2**63, 0]}, {"saved_offsets": [None, 0]},
    ],
)  # fmt: skip
def test_offsets_that_are_none_are_refused(shards: Path, saved: Any) -> None:
    for told in ({"embed.weight": saved}, {}):
        save_file(
            {"embed.weight": TENSORS["embed.weight"][2:4]},
            shards / SECOND,
            metadata={"DCP_SHARDING_INFO": json.dumps(told)},
        )
        refused(
            shards,
            f"/{SECOND}: its DCP_SHARDING_INFO does not say where the part of tensor "
            "'embed.weight' begins",
        )


def test_offsets_beyond_every_tensor_are_refused(shards: Path) -> None:
    told = {
        "DCP_SHARDING_INFO": json.dumps(
            {
                "count": {"saved_offsets": []},
                "embed.weight": {"saved_offsets": [2**63 - 1, 0]},
                "norm.weight": {"saved_offsets": [2]},
            }
        )
    }
    rewritten(shards / SECOND, told=told)
    refused(shards, ": tensor 'embed.weight' has an impossible size")


def test_elements_of_a_few_bits_are_refused(tmp_path: Path) -> None:
    told = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [0]}})}
    raw = safetensors_bytes({"__metadata__": told, "w": entry("F4", [4], 0, 2)}, bytes(2))
    (tmp_path / FIRST).write_bytes(raw)
    with pytest.raises(CheckpointError, match="float4_e2m1fn_x2, whose elements are no whole"):
        open_checkpoint(tmp_path)


def test_a_damaged_file_is_refused_by_its_name(shards: Path) -> None:
    raw = (shards / SECOND).read_bytes()
    for content, what in {
        b"": "has 0 bytes, too short for a safetensors file",
        raw[:-1]: f"has {len(raw) - 1} bytes, but its header describes {len(raw)}: it is truncated",
        raw + b"x": f"has {len(raw) + 1} bytes, but its header describes {len(raw)}: it is longer "
        "than it should be",
    }.items():
        (shards / SECOND).write_bytes(content)
        refused(shards, f"/{SECOND}: {what}")
    (shards / SECOND).unlink()
    (shards / SECOND).symlink_to("absent")
    refused(shards, f"/{SECOND}: cannot be opened: no such file or directory")


def test_every_truncation_and_changed_byte_is_refused_or_leaves_a_checkpoint(
    tmp_path: Path,
) -> None:
    path = save_shards(tmp_path, {"w": torch.arange(4.0).reshape(2, 2)}, rows_of_two, n_processes=2)
    raw = (path / SECOND).read_bytes()
    for length in range(len(raw)):
        (path / SECOND).write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    for at in range(len(raw)):
        for change in (0x01, 0x10, 0xFF):
            changed = bytearray(raw)
            changed[at] ^= change
            (path / SECOND).write_bytes(changed)
            read_if_accepted(path)
