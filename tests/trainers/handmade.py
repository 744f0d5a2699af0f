"""Directories made by the published rules of trainers that need a GPU, saved by torch itself.

``python -m trainers.handmade DIRECTORY [RUN ...]``

Their names and keys are those that Megatron-Core, OLMo-core and NeMo document or write;
no line of them has run. Every run holds three steps.
"""

import io
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from trainers import tiny, truth

STEPS = (2, 4, 10)
EXTRA_STATE = "layers.0._extra_state/shard_0_1"


def _save(state: dict[str, Any], path: Path) -> None:
    path.mkdir(parents=True)
    save(state, storage_writer=FileSystemWriter(path), no_dist=True)


def _as_megatron(state: dict[str, Any], path: Path) -> None:
    """Save as Megatron-Core does: its own objects are bytes, and .metadata has a field more."""
    objects = {name: io.BytesIO(b"opaque") for name in ("rng_state/shard_0_1", EXTRA_STATE)}
    _save({**state, **objects}, path)
    metadata_path = path / ".metadata"
    metadata = pickle.loads(metadata_path.read_bytes())
    shapes = {name: value.shape for name, value in state.items() if name.startswith("optimizer.")}
    metadata.mcore_data = {
        name: {"nd_reformulated_orig_global_shape": tuple(shape)} for name, shape in shapes.items()
    }
    metadata_path.write_bytes(pickle.dumps(metadata))
    content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
               "common_backend": "torch", "common_backend_version": 1}  # fmt: skip
    (path / "metadata.json").write_text(json.dumps(content))


def megatron(weights: Mapping[str, Tensor], run: Path, step: int) -> Path:
    """Make iter_0000010 of the format torch_dist: the model's names at the top."""
    path = run / f"iter_{step:07}"
    moments = {f"optimizer.state.exp_avg.{name}": torch.ones(1, 1, 2) for name in weights}
    _as_megatron({**weights, **moments}, path)
    torch.save({"iteration": step, "checkpoint_version": 3.0}, path / "common.pt")
    (run / "latest_checkpointed_iteration.txt").write_text(str(step))
    return path


def olmo(weights: Mapping[str, Tensor], run: Path, step: int) -> Path:
    """Make step10/ of OLMo-core: model and optimizer in one folder, the rest beside."""
    path = run / f"step{step}"
    optimizer = {"state": {name: {"exp_avg": torch.ones(2)} for name in weights}}
    _save({"model": dict(weights), "optim": optimizer}, path / "model_and_optim")
    (path / "config.json").write_text(json.dumps({"model": {"d_model": 6}, "dataset": {}}))
    (path / ".metadata.json").write_text(json.dumps({"version": "2.3.0"}))
    (path / "train").mkdir()
    torch.save({"global_step": step, "epoch": 1}, path / "train" / "rank0.pt")
    return path


def nemo(weights: Mapping[str, Tensor], run: Path, step: int) -> Path:
    """Make a checkpoint of NeMo 2: Megatron's format in weights/, and what is needed to load it."""
    path = run / f"model--val_loss={1 / step:.2f}-step={step}-consumed_samples={step * 8}"
    state = {f"module.{name}": value for name, value in weights.items()}
    moments = {f"optimizer.state.exp_avg.{name}": torch.ones(1, 1, 2) for name in state}
    _as_megatron({**state, **moments}, path / "weights")
    torch.save({"global_step": step, "epoch": 0}, path / "weights" / "common.pt")
    (path / "context").mkdir()
    (path / "context" / "model.yaml").write_text("_target_: nemo.collections.llm.GPTModel\n")
    return path


RUNS: dict[str, Callable[[Mapping[str, Tensor], Path, int], Path]] = {
    "megatron": megatron,
    "olmo": olmo,
    "nemo": nemo,
}


def main(directory: str, names: list[str]) -> None:
    """Train once, and save each checkpoint in every layout."""
    for name in names or RUNS:
        truth.clear(directory, name)
    model = tiny.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(1, STEPS[-1] + 1):
        tiny.train_step(model, optimizer, step)
        if step in STEPS:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            weights["head.weight"] = weights["embed.weight"]
            for name in names or RUNS:
                run = Path(directory, name)
                run.mkdir(exist_ok=True)
                truth.write(RUNS[name](weights, run, step), step, weights)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
