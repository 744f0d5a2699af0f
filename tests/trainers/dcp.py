"""Runs of several gloo processes that save with torch.distributed.checkpoint.

``python -m trainers.dcp DIRECTORY [RUN ...]``; RUNS below names them.
"""

import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from trainers import processes, tiny, truth

STEPS = (2, 4, 10)
CPU = torch.device("cpu")

Save = Callable[[nn.Module, torch.optim.Optimizer, Path, int], Path]


# how the weights are spread over the processes


def fsdp(model: nn.Module) -> nn.Module:
    """Shard every parameter along its rows, over all processes."""
    assert isinstance(model, tiny.Tiny)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ignored = {model.scale}  # fully_shard takes no scalars
    for part in (*model.layers, model.brief):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    """Flatten the parameters of each part and shard them by elements."""
    assert isinstance(model, tiny.Tiny)
    for name in ("0", "1", "2"):
        setattr(
            model.layers, name, FullyShardedDataParallel(model.layers[int(name)], device_id=CPU)
        )
    model.brief = FullyShardedDataParallel(model.brief, device_id=CPU)  # type: ignore[assignment]
    wrapped = FullyShardedDataParallel(model, device_id=CPU, ignored_states=[model.scale])
    FullyShardedDataParallel.set_state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT)
    return wrapped


def _tensor_plan() -> dict[str, ParallelStyle]:
    # between them the values are whole, as sizes that cannot be divided demand
    return {
        "layers.0": ColwiseParallel(output_layouts=Replicate()),
        "layers.1": RowwiseParallel(input_layouts=Replicate()),
    }


def tensor_parallel(model: nn.Module) -> nn.Module:
    """Shard some matrices along their rows, some along their columns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, _tensor_plan())


def tensor_parallel_fsdp(model: nn.Module) -> nn.Module:
    """Shard along two dimensions of the mesh: rows or columns, then rows."""
    assert isinstance(model, tiny.Tiny)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], _tensor_plan())
    fully_shard(model.layers[0], mesh=mesh["data"])
    fully_shard(model.layers[1], mesh=mesh["data"])
    return model


# how they are saved


def nested(model: nn.Module, optimizer: torch.optim.Optimizer, run: Path, step: int) -> Path:
    """Save as most scripts do: every part under a name of its own."""
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "train_state": {"step": step, "loss": 0.5},
    }
    path = run / f"checkpoint-{step}"
    save(state, checkpoint_id=path)
    return path


class _Part:
    """Something with a state_dict, as torchtitan hands optimizer, schedule and trainer over."""

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self.state_dict = state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


def flat(model: nn.Module, optimizer: torch.optim.Optimizer, run: Path, step: int) -> Path:
    """Save as torchtitan does: the model's names at the top, the other parts under theirs."""
    flattened = StateDictOptions(flatten_optimizer_state_dict=True)
    loader = {f"dp_rank_{dist.get_rank()}": pickle.dumps({"sample": step}), "world_size": 4}
    state = {
        "optimizer": _Part(lambda: get_optimizer_state_dict(model, optimizer, options=flattened)),
        "lr_scheduler": _Part(lambda: {"last_epoch": step, "base_lrs": [0.1]}),
        "dataloader": _Part(lambda: loader),
        "train_state": _Part(lambda: {"step": step, "ntokens_seen": 20 * step}),
        **get_model_state_dict(model),
    }
    path = run / "checkpoint" / f"step-{step}"
    save(state, checkpoint_id=path)
    return path


def weights_only(model: nn.Module, _: torch.optim.Optimizer, run: Path, step: int) -> Path:
    """Save the state dict of the model and nothing else."""
    path = run / f"step-{step}"
    save(get_model_state_dict(model), checkpoint_id=path)
    return path


def by_fsdp1(model: nn.Module, optimizer: torch.optim.Optimizer, run: Path, step: int) -> Path:
    """Save what FSDP1's own state_dict returns, and the learning rate as plain data."""
    state = {"model": model.state_dict(), "step": step, "lr": optimizer.param_groups[0]["lr"]}
    path = run / f"checkpoint-{step}"
    save(state, checkpoint_id=path)
    return path


def file_per_tensor(model: nn.Module, _: torch.optim.Optimizer, run: Path, step: int) -> Path:
    """Save every shard of every tensor into a file of its own."""
    path = run / f"checkpoint-{step}"
    writer = FileSystemWriter(path, single_file_per_rank=False)
    save({"model": get_model_state_dict(model)}, storage_writer=writer)
    return path


def several_files_per_rank(
    model: nn.Module, _: torch.optim.Optimizer, run: Path, step: int
) -> Path:
    """Save with two threads, and so two files, in every process."""
    path = run / f"checkpoint-{step}"
    writer = FileSystemWriter(path, thread_count=2)
    save({"model": get_model_state_dict(model)}, storage_writer=writer)
    return path


def asynchronous(model: nn.Module, _: torch.optim.Optimizer, run: Path, step: int) -> Path:
    """Save while training could go on."""
    path = run / f"checkpoint-{step}"
    saving = async_save({"model": get_model_state_dict(model)}, checkpoint_id=path)
    assert not isinstance(saving, AsyncSaveResponse)
    saving.result()
    return path


def _untied(model: nn.Module) -> dict[str, Any]:
    """Return the state without the second name of the tied weight, which safetensors refuses."""
    return {name: v for name, v in get_model_state_dict(model).items() if name != "head.weight"}


def as_safetensors(model: nn.Module, _: torch.optim.Optimizer, run: Path, step: int) -> Path:
    """Save shards that are safetensors files, with a .metadata as ever."""
    path = run / f"checkpoint-{step}"
    writer = FileSystemWriter(path, serialization_format=SerializationFormat.SAFETENSORS)
    save({"model": _untied(model)}, storage_writer=writer)
    return path


def hugging_face(model: nn.Module, _: torch.optim.Optimizer, run: Path, step: int) -> Path:
    """Save safetensors files of shards, each telling where in the whole it belongs."""
    path = run / f"step-{step}"
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    save(_untied(model), storage_writer=writer)
    return path


def hugging_face_consolidated(
    model: nn.Module, _: torch.optim.Optimizer, run: Path, step: int
) -> Path:
    """Save such shards, and whole tensors above them."""
    path = run / f"step-{step}"
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True, enable_consolidation=True)
    state = _untied(model)
    for integer in ("seen", "norm.num_batches_tracked"):  # consolidation fails on them
        del state[integer]
    save(state, storage_writer=writer)
    return path


Spread = Callable[[nn.Module], nn.Module]

# name of the run: how spread, how saved
RUNS: dict[str, tuple[Spread, Save]] = {
    "nested": (fsdp, nested),
    "flat": (fsdp, flat),
    "weights-only": (fsdp, weights_only),
    "file-per-tensor": (fsdp, file_per_tensor),
    "files-per-rank": (fsdp, several_files_per_rank),
    "async": (fsdp, asynchronous),
    "safetensors": (fsdp, as_safetensors),
    "hugging-face": (fsdp, hugging_face),
    "hugging-face-consolidated": (fsdp, hugging_face_consolidated),
    "tensor-parallel": (tensor_parallel, nested),
    "tensor-parallel-fsdp": (tensor_parallel_fsdp, nested),
    "fsdp1": (fsdp1, by_fsdp1),
}
PROCESSES: dict[Spread, int] = {fsdp: 4, tensor_parallel: 4, tensor_parallel_fsdp: 4, fsdp1: 2}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights as one process would hold them; every process must call it."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            state: dict[str, Tensor] = model.state_dict()
        return state
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def train(directory: str, names: list[str]) -> None:
    """Train, in one of several processes, each kind of model once, and save it in each way."""
    dist.init_process_group("cpu:gloo")
    for spread in PROCESSES:
        runs = [name for name in names if RUNS[name][0] is spread]
        if not runs:
            continue
        model = spread(tiny.build())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for step in range(1, STEPS[-1] + 1):
            tiny.train_step(model, optimizer, step)
            if step not in STEPS:
                continue
            weights = whole(model)
            for name in runs:
                path = RUNS[name][1](model, optimizer, Path(directory, name), step)
                if dist.get_rank() == 0:
                    truth.write(path, step, weights)
                dist.barrier()
    dist.destroy_process_group()


def main(directory: str, names: list[str]) -> None:
    """Start the processes that the runs need."""
    for size in (4, 2):
        runs = [name for name in names or RUNS if PROCESSES[RUNS[name][0]] == size]
        for name in runs:
            truth.clear(directory, name)
        if runs:
            processes.start(size, train, directory, runs)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
