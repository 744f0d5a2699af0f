"""Model directories: single files, shards with an index, and everything that looks like them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_contract import CheckpointContract, read_tensor, same_content
from hostile import mapping, safetensors_bytes, tensor, torch_bytes, whole
from safetensors.torch import save_file
from torch import Tensor

from ckptavg.checkpoint import open_checkpoint
from ckptavg.errors import CheckpointError, IncompleteCheckpointError

INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"


def halves(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = list(tensors)
    return (
        {name: tensors[name] for name in names[::2]},
        {name: tensors[name] for name in names[1::2]},
    )


def write_index(directory: Path, weight_map: Any, index_name: str = INDEX) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / index_name).write_text(json.dumps(content))


def save_shards(directory: Path, tensors: Mapping[str, Tensor], pattern: str) -> dict[str, str]:
    """Write two shards and return the weight map."""
    weight_map = {}
    for number, part in enumerate(halves(tensors), start=1):
        shard = pattern.format(number)
        if pattern.endswith(".bin"):
            torch.save(part, directory / shard)
        else:
            save_file(part, directory / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    return weight_map


class TestSafetensorsDirectory(CheckpointContract):
    layout = "safetensors directory"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        save_file(dict(tensors), directory / "model.safetensors")
        return directory

    def data_file(self, path: Path) -> Path:
        return path / "model.safetensors"


class TestTorchDirectory(CheckpointContract):
    layout = "torch directory"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        torch.save(dict(tensors), directory / "pytorch_model.bin")
        return directory

    def data_file(self, path: Path) -> Path:
        return path / "pytorch_model.bin"


class TestShardedSafetensorsDirectory(CheckpointContract):
    layout = "sharded safetensors directory"
    pattern = "model-0000{}-of-00002.safetensors"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        weight_map = save_shards(directory, tensors, self.pattern)
        write_index(directory, weight_map)
        return directory

    def data_file(self, path: Path) -> Path:
        return path / self.pattern.format(2)


class TestShardedTorchDirectory(CheckpointContract):
    layout = "sharded torch directory"
    pattern = "pytorch_model-0000{}-of-00002.bin"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        weight_map = save_shards(directory, tensors, self.pattern)
        write_index(directory, weight_map, TORCH_INDEX)
        return directory

    def data_file(self, path: Path) -> Path:
        return path / self.pattern.format(1)


TENSORS = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(1), "d": torch.zeros(1)}
FIRST, SECOND = "model-1.safetensors", "model-2.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a directory of two shards: a and c in the first, b and d in the second."""
    write_index(tmp_path, save_shards(tmp_path, TENSORS, "model-{}.safetensors"))
    return tmp_path


def refused(directory: Path, what: str, *, state_key: str | None = None) -> None:
    """Check that a directory is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=whole(f"{directory}{what}")):
        open_checkpoint(directory, state_key=state_key)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # numbers, not paths


# -- which weights


def test_the_directory_is_named_for_its_side_files(sharded: Path) -> None:
    folder = open_checkpoint(sharded).folder
    assert folder is not None
    assert folder.local_directory() == sharded


def test_a_single_file_of_another_name_is_taken_when_it_is_alone(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "weights.safetensors")
    assert same_content(open_checkpoint(tmp_path), TENSORS)


def test_safetensors_are_preferred_to_torch_files(tmp_path: Path) -> None:
    save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path).tensors) == ["new"]


def test_several_safetensors_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("d", "b", "a", "c"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    refused(
        tmp_path,
        ": holds 4 safetensors files (a.safetensors, b.safetensors, c.safetensors, ...) and no "
        "index that makes them one model; name the file itself",
    )


def test_an_index_beside_a_single_file_is_refused(sharded: Path) -> None:
    save_file(TENSORS, sharded / "model.safetensors")
    refused(
        sharded,
        ": holds both model.safetensors and model.safetensors.index.json; remove the stale one, or "
        "name the file itself",
    )
    torch_directory = sharded / "torch"
    torch_directory.mkdir()
    (torch_directory / "pytorch_model.bin").touch()
    (torch_directory / TORCH_INDEX).touch()
    refused(
        torch_directory,
        ": holds both pytorch_model.bin and pytorch_model.bin.index.json; remove the stale one, or "
        "name the file itself",
    )


def test_an_adapter_is_opened_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 30}')
    torch.save(TENSORS, tmp_path / "adapter_model.bin")
    assert open_checkpoint(tmp_path).step == 30
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == "PEFT adapter directory"
    assert checkpoint.notes == ["adapter_model.bin was passed over for adapter_model.safetensors"]
    assert [Path(file.path).name for file in checkpoint.files] == [
        "adapter_model.safetensors",
        "adapter_config.json",
    ]


def test_an_adapter_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(
        tmp_path,
        ": holds adapter_config.json, but neither adapter_model.safetensors nor adapter_model.bin",
    )


def test_a_full_model_beside_an_adapter_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for name in ("model.safetensors", "adapter_model.safetensors"):
        save_file(TENSORS, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == "safetensors directory"
    assert checkpoint.notes == [
        "the full model was read, the PEFT adapter beside it was passed over"
    ]


def test_several_torch_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("epoch1.pth", "epoch2.pth"):
        torch.save(TENSORS, tmp_path / name)
    refused(
        tmp_path,
        ": holds 2 torch files (epoch1.pth, epoch2.pth, ...) and no index that makes them one "
        "model; name the file itself",
    )


@pytest.mark.parametrize(
    "name", ["model.pt", "epoch=3-step=900.ckpt", "weights.bin", "best.pth.tar"]
)
def test_a_single_torch_file_is_taken_beside_training_state(tmp_path: Path, name: str) -> None:
    torch.save({"state_dict": TENSORS, "global_step": 900}, tmp_path / name)
    for state in ("optimizer.pt", "scheduler.bin", "rng_state_0.pth", "training_args.bin"):
        torch.save({"x": torch.ones(1)}, tmp_path / state)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.layout, checkpoint.step) == ("torch directory", 900)
    assert same_content(checkpoint, TENSORS)


def test_a_distributed_checkpoint_is_read_but_never_run(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "__0_0.distcp").touch()
    refused(
        tmp_path,
        "/.metadata: needs Python code 'os.system', which is never run; save the weights alone "
        "(torch.save(model.state_dict(), ...)) and average those files",
    )


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, ": holds no weights: it is empty")
    (tmp_path / "config.json").write_text("{}")
    refused(
        tmp_path,
        ": holds no weights (looked for model.safetensors, pytorch_model.bin, their sharded forms, "
        "and .metadata)",
    )
    (tmp_path / "optimizer.pt").touch()
    refused(tmp_path, ": holds no weights, only the state of a training (optimizer.pt)")


def test_a_directory_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    refused(tmp_path, ": cannot be read: Permission denied")
    monkeypatch.setattr(Path, "is_dir", forbidden)
    refused(tmp_path, ": cannot be opened: Permission denied")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", INDEX, TORCH_INDEX])
def test_links_that_lead_nowhere_are_not_passed_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("absent")
    torch.save(TENSORS, tmp_path / "other.pt")
    refused(tmp_path, f"/{name}: cannot be opened: no such file or directory")


def test_a_fifo_in_the_place_of_weights_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    what = "/model.safetensors: is not a regular file, expected a checkpoint file"
    refused(tmp_path, what)


def test_weights_reached_through_links_are_read(tmp_path: Path, sharded: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for entry in (FIRST, SECOND, INDEX):
        (snapshot / entry).symlink_to(sharded / entry)
    assert same_content(open_checkpoint(snapshot), TENSORS)


# -- shards


def test_metadata_and_notes_of_all_shards_are_kept(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "x": 1}, tmp_path / "1.bin")
    torch.save({"b": torch.ones(1), "y": 2}, tmp_path / "2.bin")
    write_index(tmp_path, {"a": "1.bin", "b": "2.bin"}, TORCH_INDEX)
    notes = open_checkpoint(tmp_path).notes
    assert notes == ["left out, not tensors: 'x'", "left out, not tensors: 'y'"]


def test_tensors_come_shard_by_shard(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.tensors) == ["a", "c", "b", "d"]
    assert [Path(file.path).name for file in checkpoint.files] == [FIRST, SECOND, INDEX]
    assert checkpoint.metadata == {"format": "pt"}


def test_a_missing_shard_is_refused(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    what = f": the shard {SECOND} is missing; model.safetensors.index.json lists 2 shards"
    refused(sharded, what)


def test_a_tensor_the_shard_lacks_is_refused(sharded: Path) -> None:
    save_file({"b": TENSORS["b"]}, sharded / SECOND)
    what = f"/{INDEX}: lists tensor 'd' in {SECOND}, which does not hold it"
    refused(sharded, what)


@pytest.mark.parametrize(("shard", "content"), [(FIRST, "acx"), (SECOND, "bdx")])
def test_a_tensor_the_index_does_not_list_is_refused(
    sharded: Path, shard: str, content: str
) -> None:
    save_file({name: torch.ones(1) for name in content}, sharded / shard)
    refused(sharded, f"/{INDEX}: {shard} holds tensor 'x', which the index lists in no shard")


@pytest.mark.parametrize(("shard", "other", "extra"), [(FIRST, SECOND, "b"), (SECOND, FIRST, "a")])
@pytest.mark.parametrize("change", ["value", "shape", "dtype", "nothing"])
def test_a_tensor_in_two_shards_must_be_the_same_in_both(
    sharded: Path, shard: str, other: str, extra: str, change: str
) -> None:
    """The index decides where it is read; a copy that differs is of another model."""
    again = TENSORS[extra].clone()
    if change == "value":
        again.view(-1)[-1] += 1
    names = "ac" if shard == FIRST else "bd"
    copies = {"shape": again.reshape(1, -1), "dtype": again.double()}
    save_file(
        {extra: copies.get(change, again), **{name: TENSORS[name] for name in names}},
        sharded / shard,
    )
    if change != "nothing":
        refused(
            sharded,
            f"/{INDEX}: {shard} holds tensor '{extra}', which the index lists in another shard, "
            f"{other}, and the two differ",
        )
        return
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.notes == [
        f"{shard} also holds '{extra}', with the bytes of the shard where the index lists it"
    ]
    assert read_tensor(checkpoint, extra) == TENSORS[extra].numpy().tobytes()


SHARD_FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty (0 bytes)"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointer, not the file itself; run: git lfs pull",
    ),
    "HTML": (b"<!doctype html>", "is an HTML page, not a checkpoint: the download went wrong"),
    "truncated": (
        safetensors_bytes(b'{"b":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', bytes(30)),
        "has 93 bytes, but its header describes 99: it is truncated",
    ),
}


@pytest.mark.parametrize(("raw", "what"), SHARD_FAULTS.values(), ids=SHARD_FAULTS)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_bad_shard_is_refused_by_its_name(
    tmp_path: Path, suffix: str, raw: bytes, what: str
) -> None:
    index_name = INDEX if suffix == "safetensors" else TORCH_INDEX
    write_index(tmp_path, save_shards(tmp_path, TENSORS, f"model-{{}}.{suffix}"), index_name)
    (tmp_path / f"model-2.{suffix}").write_bytes(raw)
    before = open_descriptors()
    refused(tmp_path, f"/model-2.{suffix}: {what}")
    assert open_descriptors() == before


def test_a_shard_that_is_no_file_is_refused(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    (sharded / SECOND).mkdir()
    refused(sharded, f"/{SECOND}: is a directory, expected a checkpoint file")
    (sharded / SECOND).rmdir()
    os.mkfifo(sharded / SECOND)
    refused(sharded, f"/{SECOND}: is not a regular file, expected a checkpoint file")
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(SECOND)
    what = f"/{SECOND}: cannot be opened: too many levels of symbolic links"
    refused(sharded, what)


def test_a_hostile_torch_shard_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = b"cos\nmkdir\n(V" + str(canary).encode() + b"\ntR"
    (tmp_path / "1.bin").write_bytes(torch_bytes(mapping({"w": tensor(), "x": payload})))
    write_index(tmp_path, {"w": "1.bin"}, TORCH_INDEX)
    with pytest.raises(CheckpointError, match=r"/1\.bin: needs Python code 'os\.mkdir'"):
        open_checkpoint(tmp_path)
    assert not canary.exists()


def test_a_state_key_is_refused_for_safetensors(sharded: Path) -> None:
    what = ": --state-key is for torch files, this is a safetensors file"
    refused(sharded, f"/{FIRST}{what}", state_key="ema")
    (sharded / INDEX).unlink()
    save_file(TENSORS, sharded / "model.safetensors")
    refused(sharded, f"/model.safetensors{what}", state_key="ema")


def test_a_state_key_selects_in_every_torch_shard(tmp_path: Path) -> None:
    for number, name in ((1, "a"), (2, "b")):
        content = {"ema": {name: torch.ones(1)}, "model": {"x": torch.zeros(1)}}
        torch.save(content, tmp_path / f"{number}.bin")
    write_index(tmp_path, {"a": "1.bin", "b": "2.bin"}, TORCH_INDEX)
    assert list(open_checkpoint(tmp_path, state_key="ema").tensors) == ["a", "b"]


def test_tied_names_dropped_in_a_shard_stay_aliases(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors", metadata={"tied": "a", "b": "a"})
    save_file({"b": torch.zeros(2)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.aliases == {"tied": "a"}  # b is a tensor of its own
    assert read_tensor(checkpoint, "b") == bytes(8)


# -- the index


@pytest.mark.parametrize(
    "shard_name",
    [
        "", ".", "..", "/", "../model-2.safetensors", "/etc/passwd", "sub/model.safetensors",
        "./model-2.safetensors", "model-2.safetensors/", "sub/../model-2.safetensors",
        "..\\model-2.safetensors", "C:\\model.safetensors", "C:model.safetensors",
        "\\\\host\\share\\model", "model-2.safetensors\0", "\0", "//model-2.safetensors",
        "file:///etc/passwd", "https://example.org/model-2.safetensors", "/dev/zero", "~/x",
    ],
)  # fmt: skip
def test_a_shard_outside_the_directory_is_refused(sharded: Path, shard_name: str) -> None:
    write_index(sharded, {"a": FIRST, "c": FIRST, "b": shard_name, "d": SECOND})
    printed = shard_name.replace("\0", "\\x00")
    what = f"/{INDEX}: names '{printed}' as a shard: only plain file names are allowed"
    refused(sharded, what)


@pytest.mark.parametrize("shard_name", [None, 1, True, [FIRST], {"name": FIRST}])
def test_a_shard_name_that_is_no_string_is_refused(sharded: Path, shard_name: Any) -> None:
    write_index(sharded, {"a": FIRST, "c": FIRST, "b": shard_name, "d": SECOND})
    what = f"/{INDEX}: names '{shard_name}' as a shard: only plain file names are allowed"
    refused(sharded, what)


def test_shard_names_no_file_system_takes_are_missing(sharded: Path) -> None:
    for shard_name in ("x" * 300, "\ud800"):
        write_index(sharded, {"a": FIRST, "c": FIRST, "b": shard_name, "d": shard_name})
        reasons = r"the shard .* is missing|cannot be opened|is not valid JSON"
        with pytest.raises(CheckpointError, match=reasons):
            open_checkpoint(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3, [["a", FIRST]]])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    refused(sharded, f"/{INDEX}: has no weight_map")
    (sharded / INDEX).write_text("{}")
    refused(sharded, f"/{INDEX}: has no weight_map")


NOT_JSON, NO_OBJECT = "is not valid JSON", "is not a JSON object"


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", NOT_JSON),
        (b"{", NOT_JSON),
        (b"\xff{}", NOT_JSON),
        (b"[" * 1000, NOT_JSON),
        (b'{"a": ' + b"9" * 5000 + b"}", NOT_JSON),
        (b"version https://git-lfs.github.com/spec/v1\n", NOT_JSON),
        (b"[]", NO_OBJECT),
        (b"null", NO_OBJECT),
        (b"3", NO_OBJECT),
        (b'"x"', NO_OBJECT),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("name", [INDEX, "config.json", "trainer_state.json"])
def test_a_damaged_side_file_is_refused(sharded: Path, name: str, raw: bytes, what: str) -> None:
    (sharded / name).write_bytes(raw)
    before = open_descriptors()
    refused(sharded, f"/{name}: {what}")
    assert open_descriptors() == before


def test_a_huge_side_file_is_refused_unread(sharded: Path) -> None:
    os.truncate(sharded / INDEX, 100_000_001)
    what = f"/{INDEX}: has 100000001 bytes, too many for a JSON side file"
    refused(sharded, what)


def test_too_many_shards_are_refused(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptavg.checkpoint.directory.MAX_SHARDS", 1)
    refused(sharded, f"/{INDEX}: lists more than 1 shards")


# -- config and trainer state


@pytest.mark.parametrize(
    "embedding",
    [
        "model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight",
        "bert.embeddings.word_embeddings.weight",
    ],
)  # fmt: skip
def test_the_output_embedding_that_the_config_ties_is_an_alias(
    tmp_path: Path, embedding: str
) -> None:
    save_file({embedding: torch.ones(2), "x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.aliases == {"lm_head.weight": embedding}
    assert "lm_head.weight" not in checkpoint.tensors
    assert read_tensor(checkpoint, "lm_head.weight") == read_tensor(checkpoint, embedding)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, ["wte.weight"]),
        ({"tie_word_embeddings": False}, ["wte.weight"]),
        ({"tie_word_embeddings": "true"}, ["wte.weight"]),
        ({"tie_word_embeddings": True}, ["x"]),
        ({"tie_word_embeddings": True}, ["wte.weight", "lm_head.weight"]),
        ({"tie_word_embeddings": True}, ["wte.weight", "model.lm_head.weight"]),
        ({"tie_word_embeddings": True}, ["a.wte.weight", "b.wte.weight"]),
    ],
)
def test_nothing_is_tied_where_it_would_be_a_guess(
    tmp_path: Path, config: dict[str, Any], names: list[str]
) -> None:
    save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path).aliases == {}


def test_the_trainer_state_tells_the_step_better_than_the_name(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-500"
    directory.mkdir()
    save_file(TENSORS, directory / "model.safetensors")
    assert open_checkpoint(directory).step == 500
    (directory / "trainer_state.json").write_text('{"global_step": 501, "epoch": 1.5}')
    assert open_checkpoint(directory).step == 501


@pytest.mark.parametrize("step", ["null", '"7"', "1.5", "true", "{}"])
def test_a_trainer_state_without_a_count_is_not_believed(tmp_path: Path, step: str) -> None:
    directory = tmp_path / "checkpoint-500"
    directory.mkdir()
    save_file(TENSORS, directory / "model.safetensors")
    (directory / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    assert open_checkpoint(directory).step == 500


def test_a_shard_that_is_named_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file(TENSORS, path)
    refused(path, ": is a part of a checkpoint; name the folder it lies in")


def test_several_models_in_one_directory_are_a_choice(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model_1.safetensors"):
        save_file(TENSORS, tmp_path / name)
    refused(
        tmp_path,
        ": holds several models (model_1.safetensors beside the first); name the file of one",
    )


def test_a_trainer_state_that_is_cut_short_is_unfinished(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 5')
    with pytest.raises(IncompleteCheckpointError, match="is not valid JSON"):
        open_checkpoint(tmp_path)


def test_a_single_numpy_file_is_taken(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", a=np.ones(2, np.float32))
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
