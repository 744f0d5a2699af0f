"""Run directories as trainers leave them, of tiny checkpoints whose values are their steps."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save


def weights(value: float) -> dict[str, Tensor]:
    """Return the smallest state dict: four equal values."""
    return {"w": torch.full((4,), float(value))}


def torch_file(path: str, value: float = 1, key: str = "model", **more: Any) -> None:
    """Save a torch file; ``more`` lies beside the weights."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: weights(value), **more}, path)


def model_directory(path: str, value: float = 1, **files: str) -> None:
    """Save a safetensors directory, and text files beside the weights."""
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file(weights(value), Path(path, "model.safetensors"))
    for name, content in files.items():
        text(f"{path}/{name.replace('__', '.')}", content)


def text(path: str, content: str = "") -> None:
    """Write a text file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)


def trainer_state(step: int) -> str:
    """Return what transformers' Trainer writes of a step."""
    history = [
        {
            "step": step - 1,
            "epoch": 0.5,
            "loss": 2.0,
            "learning_rate": round(1e-3 - step * 1e-7, 7),
        },
        {"step": step, "epoch": 1.0, "eval_loss": 1 + 1 / step, "eval_runtime": 3.0},
    ]
    return json.dumps({"global_step": step, "log_history": history})


def trainer_run(run: str, steps: Sequence[int] = (500, 1000, 1500)) -> None:
    """Save what transformers' Trainer leaves after each of its saves."""
    for step in steps:
        path = f"{run}/checkpoint-{step}"
        model_directory(path, step, config__json="{}", trainer_state__json=trainer_state(step))
        text(f"{path}/optimizer.pt", "no weights")
        text(f"{path}/rng_state.pth", "no weights")


def final_model(run: str) -> None:
    """Save what transformers' Trainer leaves at the end, beside its checkpoints."""
    model_directory(run, 7, config__json="{}", trainer_state__json=trainer_state(1500))
    text(f"{run}/training_args.bin")
    text(f"{run}/runs/Dec24/events.out.tfevents.1")


def lightning_run(folder: str, epochs: Sequence[int] = (1, 2, 3)) -> None:
    """Save what Lightning's ModelCheckpoint leaves: 300 steps an epoch."""
    for epoch in epochs:
        lightning_file(f"{folder}/epoch={epoch}-step={epoch * 300}.ckpt", epoch, epoch * 300)
    text(f"{Path(folder).parent}/hparams.yaml")


def lightning_file(path: str, epoch: int, step: int) -> None:
    """Save one checkpoint of Lightning."""
    torch_file(path, step, "state_dict", epoch=epoch, global_step=step, hyper_parameters={"a": 1})


def dcp_directory(path: str, value: float = 1) -> None:
    """Save a torch.distributed.checkpoint directory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is one process
        save({"model": weights(value)}, checkpoint_id=path, no_dist=True)


def cut(path: str, nbytes: int = 60) -> None:
    """Cut a file short."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:-nbytes])
