"""What trainers leave: read where the files say all, refused by name where they do not."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_contract import CheckpointContract, same_content
from dcp_files import FILES, cut, nested_dcp, save_dcp, whole
from hostile import whole as exactly
from safetensors.torch import save_file
from test_dcp_safetensors import save_shards
from torch import Tensor

from ckptavg import average_checkpoints
from ckptavg.checkpoint import open_checkpoint
from ckptavg.errors import CheckpointError

WEIGHTS = {
    "embed.weight": torch.arange(12.0).reshape(4, 3),
    "norm.bias": torch.ones(3, dtype=torch.bfloat16),
}
OPTIMIZER = {"state": {"embed.weight": {"exp_avg": torch.ones(12)}}, "param_groups": [{"lr": 1.0}]}
DCP_LAYOUT = "torch.distributed.checkpoint directory"
RANK = "mp_rank_00_model_states.pt"


def rows(_name: str, value: Tensor) -> Any:
    return cut(value.shape, 0, [value.shape[0] // 2]) if value.dim() else whole(value.shape)


def refused(path: Path | str, what: str) -> None:
    """Check that a checkpoint is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=exactly(f"{path}{what}")):
        open_checkpoint(path)


def touched(directory: Path, *names: str) -> Path:
    """Make empty files; names that end in a slash are folders."""
    directory.mkdir(exist_ok=True, parents=True)
    for name in names:
        if name.endswith("/"):
            (directory / name).mkdir()
        else:
            (directory / name).write_bytes(b"")
    return directory


def deepspeed_states(module: Mapping[str, Tensor], **changes: Any) -> dict[str, Any]:
    """Return what ``DeepSpeedEngine._save_checkpoint`` puts into the file of a rank."""
    return {
        "module": dict(module),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: value.shape for name, value in module.items()}],
        "frozen_param_shapes": None,
        "shared_params": {},
        "lr_scheduler": {"last_batch_iteration": 5},
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 5,
        "global_samples": 40,
        "dp_world_size": 4,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        "ds_version": "0.18.0",
        **changes,
    }


def save_deepspeed(directory: Path, module: Mapping[str, Tensor], step: int = 5) -> Path:
    """Write a checkpoint as DeepSpeed does up to ZeRO-2."""
    inner = directory / f"global_step{step}"
    inner.mkdir(parents=True)
    torch.save(deepspeed_states(module, global_steps=step), inner / RANK)
    for rank in range(2):
        torch.save({"optimizer_state_dict": OPTIMIZER},
                   inner / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")  # fmt: skip
    (directory / "latest").write_text(inner.name)
    (directory / "zero_to_fp32.py").write_text("raise SystemExit('never run')")
    return directory


# -- the contract


class TestAccelerateShards(CheckpointContract):
    layout = DCP_LAYOUT

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = touched(directory / "checkpoint", "scheduler.bin", "random_states_0.pkl")
        nested_dcp(path / "pytorch_model_fsdp_0", {"model": tensors}, boxes=rows)
        nested_dcp(path / "optimizer_0", {"optimizer": OPTIMIZER})
        return path

    def data_file(self, path: Path) -> Path:
        return path / "pytorch_model_fsdp_0" / FILES[0]


class TestAccelerateFullStateDict(CheckpointContract):
    layout = "accelerate FSDP directory"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = touched(directory / "checkpoint", "optimizer.bin", "random_states_0.pkl")
        torch.save(dict(tensors), path / "pytorch_model_fsdp.bin")
        return path

    def data_file(self, path: Path) -> Path:
        return path / "pytorch_model_fsdp.bin"


class TestDeepSpeed(CheckpointContract):
    layout = "DeepSpeed directory"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return save_deepspeed(directory / "checkpoint", tensors)

    def data_file(self, path: Path) -> Path:
        return path / "global_step5" / RANK


class TestDeepSpeedFromWithin(TestDeepSpeed):
    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        return super().save(directory, tensors) / "global_step5"

    def data_file(self, path: Path) -> Path:
        return path / RANK


class TestShardsInAFolder(CheckpointContract):
    """torchtitan's and torch's ``sharded``, not consolidated."""

    layout = "torch.distributed.checkpoint safetensors directory"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = touched(directory / "step-10")
        save_shards(path / "sharded", tensors)
        return path

    def data_file(self, path: Path) -> Path:
        return path / "sharded" / "shard-00001-model-00001-of-00001.safetensors"


# -- distributed checkpoints in a folder


def test_olmo_cores_folder_is_read(tmp_path: Path) -> None:
    path = touched(tmp_path / "step1000", "train/", ".metadata.json")
    (path / "config.json").write_text('{"model": {"d_model": 3}}')
    torch.save({"global_step": 1000}, path / "train" / "rank0.pt")
    flat = {f"model.{name}": value for name, value in WEIGHTS.items()}
    flat |= {f"optim.state.{name}.exp_avg": torch.ones(12) for name in WEIGHTS}
    save_dcp(path / "model_and_optim", flat, rows)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.layout, checkpoint.step, checkpoint.label) == (DCP_LAYOUT, 1000, str(path))
    assert same_content(checkpoint, WEIGHTS)
    assert same_content(open_checkpoint(path / "model_and_optim"), WEIGHTS)


def test_nemos_folder_is_read(tmp_path: Path) -> None:
    path = touched(tmp_path / "model--step=500", "context/")
    (path / "context" / "model.yaml").write_text("seq_length: 8")
    flat: dict[str, Any] = {f"module.{name}": value for name, value in WEIGHTS.items()}
    save_dcp(path / "weights", flat | {"optimizer.state.exp_avg": torch.ones(12)}, rows)
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, WEIGHTS)
    assert checkpoint.step == 500


def test_a_state_key_reaches_the_folder(tmp_path: Path) -> None:
    path = touched(tmp_path / "run")
    average = {name: value + 1 for name, value in WEIGHTS.items()}
    nested_dcp(path / "weights", {"model": WEIGHTS, "ema": average})
    assert same_content(open_checkpoint(path, state_key="ema"), average)


def test_several_distributed_checkpoints_are_a_choice(tmp_path: Path) -> None:
    for name in ("actor", "critic", "reference", "reward"):
        save_dcp(tmp_path / name, WEIGHTS)
    refused(
        tmp_path,
        ": holds 4 distributed checkpoints (actor, critic, reference, ...); name one of them",
    )


def test_side_files_come_from_the_outer_folder(tmp_path: Path) -> None:
    for step in (1, 2):
        path = touched(tmp_path / f"step{step}")
        (path / "config.json").write_text('{"tie_word_embeddings": true}')
        (path / "tokenizer.json").write_text("{}")
        save_dcp(path / "sharded", {"wte.weight": torch.full((2, 3), float(step))}, rows)
        (path / "sharded" / "config.json").write_text("never read")
    checkpoint = open_checkpoint(tmp_path / "step1")
    assert checkpoint.aliases == {"lm_head.weight": "wte.weight"}
    average_checkpoints([tmp_path / "step1", tmp_path / "step2"], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "ckptavg.json",
    }  # fmt: skip
    deepspeed = save_deepspeed(tmp_path / "deepspeed", {"wte.weight": torch.ones(2, 3)})
    (deepspeed / "config.json").write_text('{"tie_word_embeddings": true}')
    checkpoint = open_checkpoint(deepspeed)
    assert checkpoint.aliases == {"lm_head.weight": "wte.weight"}
    assert checkpoint.folder is not None
    assert checkpoint.folder.local_directory() == deepspeed


def test_optimizers_alone_are_no_weights(tmp_path: Path) -> None:
    nested_dcp(tmp_path / "optimizer_0", {"optimizer": OPTIMIZER})
    torch.save(OPTIMIZER, tmp_path / "optimizer.bin")
    touched(tmp_path, "scheduler.pt", "rng_state_0.pth", "training_args.bin")
    refused(
        tmp_path,
        ": holds no weights, only the state of a training (optimizer.bin, rng_state_0.pth, "
        "scheduler.pt)",
    )
    refused(
        tmp_path / "optimizer_0",
        ": no weights found at its top level, which holds 'optimizer'",
    )


def test_an_empty_folder_is_called_so(tmp_path: Path) -> None:
    refused(tmp_path, ": holds no weights: it is empty")
    touched(tmp_path, "notes.md")
    refused(
        tmp_path,
        ": holds no weights (looked for model.safetensors, pytorch_model.bin, their sharded forms, "
        "and .metadata)",
    )


# -- DeepSpeed


def test_deepspeed_is_read_from_its_folder_and_from_within(tmp_path: Path) -> None:
    path = save_deepspeed(tmp_path / "run", WEIGHTS)
    for where in (path, path / "global_step5"):
        checkpoint = open_checkpoint(where)
        assert same_content(checkpoint, WEIGHTS)
        assert (checkpoint.step, checkpoint.label) == (5, str(where))
        assert checkpoint.notes == [
            "holds the 16-bit weights; DeepSpeed's float32 ones are in its optimizer files "
            "(zero_to_fp32.py puts them together)"
        ]


def test_float32_weights_of_deepspeed_have_no_better_ones(tmp_path: Path) -> None:
    path = save_deepspeed(tmp_path / "run", {"w": torch.ones(2)})
    assert open_checkpoint(path).notes == []


def test_the_latest_of_several_steps_is_the_checkpoint(tmp_path: Path) -> None:
    path = save_deepspeed(tmp_path / "run", {"w": torch.ones(2)}, 5)
    save_deepspeed(path, {"w": torch.zeros(2)}, 10)
    assert open_checkpoint(path).step == 10
    (path / "latest").write_text("global_step5\n")
    checkpoint = open_checkpoint(path)
    assert checkpoint.step == 5
    assert same_content(checkpoint, {"w": torch.ones(2)})
    (path / "latest").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(path)
    (path / "global_step10" / RANK).unlink()
    (path / "global_step10" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    (path / "global_step10" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    (path / "global_step10").rmdir()
    assert open_checkpoint(path).step == 5


@pytest.mark.parametrize(
    "latest", [b"", b"../../etc", b"/etc/passwd", b"global_step7", b"\xff\0", b"x" * 5000]
)
def test_a_latest_that_leads_elsewhere_is_not_followed(tmp_path: Path, latest: bytes) -> None:
    path = save_deepspeed(tmp_path / "run", {"w": torch.ones(2)}, 5)
    save_deepspeed(path, {"w": torch.zeros(2)}, 10)
    (path / "latest").write_bytes(latest)
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(path)
    (path / "latest").unlink()
    os.mkfifo(path / "latest")
    with pytest.raises(CheckpointError, match="/latest: is not a regular file"):
        open_checkpoint(path)


def zero3(directory: Path) -> Path:
    """Write a ZeRO-3 checkpoint."""
    inner = directory / "global_step5"
    inner.mkdir(parents=True)
    for rank in range(2):
        states = deepspeed_states({"w": torch.ones(0)})
        torch.save(states, inner / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (directory / "latest").write_text("global_step5")
    return directory


def needs_command(command: str) -> str:
    return (
        ": is a DeepSpeed ZeRO-3 checkpoint, whose weights lie in the optimizer files of all "
        f"processes; put them together first: {command}"
    )


def test_zero_3_is_refused_with_the_command_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zero3(tmp_path / "run")
    command = f"python {path}/zero_to_fp32.py {path}"
    inner = f"{path}/global_step5"
    refused(path, needs_command(f"{command} {path} -t global_step5"))
    refused(path / "global_step5", needs_command(f"{command} {inner} -t global_step5"))
    refused(f"{path}/", needs_command(f"{command} {path} -t global_step5"))
    refused(f"{inner}/", needs_command(f"{command} {inner} -t global_step5"))
    monkeypatch.chdir(path)
    refused("global_step5", needs_command("python zero_to_fp32.py . global_step5 -t global_step5"))
    refused(".", needs_command("python zero_to_fp32.py . . -t global_step5"))
    monkeypatch.chdir(path / "global_step5")
    refused(".", needs_command("python ../zero_to_fp32.py .. ."))
    monkeypatch.chdir(path)
    (path / "global_step6").mkdir()
    (path / "latest").write_text("global_step5")
    refused(".", needs_command("python zero_to_fp32.py . global_step5 -t global_step5"))


def test_the_command_is_quoted_for_the_shell(tmp_path: Path) -> None:
    path = zero3(tmp_path / "my run; rm x")
    refused(path, needs_command(
        f"python '{path}/zero_to_fp32.py' '{path}' '{path}' -t global_step5"
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("names", "first", "kind"),
    [
        ([RANK, "mp_rank_01_model_states.pt"], RANK, "tensor-parallel ranks"),
        (
            [RANK, "layer_00-model_00-model_states.pt", "layer_01-model_00-model_states.pt"],
            "layer_00-model_00-model_states.pt",
            "pipeline stages or experts",
        ),
        (
            [RANK, "layer_0_expert_0_mp_rank_00_model_states.pt"],
            "layer_0_expert_0_mp_rank_00_model_states.pt",
            "pipeline stages or experts",
        ),
        (
            [RANK, "expert_0_mp_rank_00_model_states.pt"],
            "expert_0_mp_rank_00_model_states.pt",
            "pipeline stages or experts",
        ),
    ],
)
def test_models_that_deepspeed_parted_are_refused(
    tmp_path: Path, names: list[str], first: str, kind: str
) -> None:
    path = touched(tmp_path / "run", "global_step5/")
    touched(path / "global_step5", *names)
    for where in (path, path / "global_step5"):
        refused(
            where,
            f": is a DeepSpeed checkpoint of {kind} ({first}), which only its trainer can put "
            "together; save or convert it to one model first",
        )


def test_weights_in_the_usual_files_win(tmp_path: Path) -> None:
    path = zero3(tmp_path / "checkpoint-5")
    save_file(WEIGHTS, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    assert checkpoint.layout == "safetensors directory"
    assert same_content(checkpoint, WEIGHTS)
    path = touched(tmp_path / "accelerate")
    save_file(WEIGHTS, path / "model.safetensors")
    save_dcp(path / "pytorch_model_fsdp_0", {"other": torch.ones(1)})
    torch.save({"other": torch.ones(1)}, path / "pytorch_model_fsdp.bin")
    assert same_content(open_checkpoint(path), WEIGHTS)


def test_code_in_deepspeeds_file_is_never_run(tmp_path: Path) -> None:
    path = save_deepspeed(tmp_path / "run", WEIGHTS)
    states = deepspeed_states(WEIGHTS, client=Evil(tmp_path / "canary"))
    torch.save(states, path / "global_step5" / RANK)
    with pytest.raises(CheckpointError, match=f"/global_step5/{RANK}: needs Python code"):
        open_checkpoint(path)
    assert not (tmp_path / "canary").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# -- what is refused by name


FOREIGN = {
    "mp_rank_00/": (
        "holds Megatron-LM's model-parallel shards (mp_rank_00), which only Megatron can put "
        "together; convert it with tools/checkpoint/convert.py, or save with --ckpt-format "
        "torch_dist, which is read as it is"
    ),
    "mp_rank_00_001/": (
        "holds Megatron-LM's model-parallel shards (mp_rank_00_001), which only Megatron can put "
        "together; convert it with tools/checkpoint/convert.py, or save with --ckpt-format "
        "torch_dist, which is read as it is"
    ),
    "pytorch_model_fsdp_rank0.bin": (
        "holds the flat shards of single FSDP processes (pytorch_model_fsdp_rank0.bin), which do "
        "not say what they are part of; save with SHARDED_STATE_DICT or FULL_STATE_DICT"
    ),
    "model_rank_0.pt": (
        "holds the flat shards of single FSDP processes (model_rank_0.pt), which do not say what "
        "they are part of; save with SHARDED_STATE_DICT or FULL_STATE_DICT"
    ),
    "consolidated.01.pth": (
        "holds model-parallel shards (consolidated.01.pth); convert them to the Hugging Face format"
    ),
    "model-Q4.gguf": (
        "holds a GGUF model (model-Q4.gguf), quantised for inference; average the original "
        "checkpoints"
    ),
    "model.onnx": (
        "holds an ONNX model (model.onnx), which is a program; average the checkpoints it came from"
    ),
    "model.nemo": (
        "holds a NeMo archive (model.nemo); unpack it with tar, and average what it holds"
    ),
    "flax_model.msgpack": (
        "holds Flax weights (flax_model.msgpack), which are not read; save them as safetensors"
    ),
    "tf_model.h5": (
        "holds TensorFlow weights (tf_model.h5), which are not read; save them as safetensors"
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    touched(tmp_path, name, "config.json", "optimizer.pt")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, f": {FOREIGN[name]}")


def test_parts_beside_others_are_never_taken_for_a_model(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model_fsdp_rank0.bin")
    with pytest.raises(CheckpointError, match="holds the flat shards of single FSDP processes"):
        open_checkpoint(tmp_path)
    path = touched(tmp_path / "llama", "params.json")
    for number in range(2):
        torch.save(WEIGHTS, path / f"consolidated.0{number}.pth")
    with pytest.raises(CheckpointError, match=r"model-parallel shards \(consolidated\.01\.pth\)"):
        open_checkpoint(path)
    (path / "consolidated.01.pth").unlink()
    assert same_content(open_checkpoint(path), WEIGHTS)


@pytest.mark.parametrize("other", ["model.onnx", "model.gguf", "flax_model.msgpack", "tf_model.h5"])
def test_another_format_beside_the_weights_does_no_harm(tmp_path: Path, other: str) -> None:
    touched(tmp_path, other)
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert same_content(open_checkpoint(tmp_path), WEIGHTS)
