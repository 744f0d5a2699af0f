"""The true weights of a made checkpoint, kept outside of the run that holds it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that a trainer saved, and what is in it, whole tensors under the model's names.

    Tied weights share one storage.
    """

    path: Path
    step: int
    weights: dict[str, Tensor]


def clear(directory: str, run: str) -> Path:
    """Remove a run made before and its truth, and return where to make it anew."""
    folder = Path(directory, "truth")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (Path(directory, run), folder / run):
        shutil.rmtree(path, ignore_errors=True)
    return Path(directory, run)


def write(
    checkpoint: Path, step: int, weights: Mapping[str, Tensor], run: str | None = None
) -> None:
    """Keep the weights of ``DIRECTORY/RUN/.../CHECKPOINT``, which the trainer saved just now.

    ``run`` is another name to keep them under, where a checkpoint stands for other weights, too.
    """
    directory = next(folder for folder in checkpoint.parents if (folder / "truth").is_dir())
    folder = directory / "truth" / (run or checkpoint.relative_to(directory).parts[0])
    folder.mkdir(exist_ok=True)
    content = {
        "checkpoint": str(checkpoint.relative_to(directory)),
        "weights": {name: value.detach() for name, value in weights.items()},
    }
    torch.save(content, folder / f"{step:08}.pt")


def read(directory: Path, run: str) -> list[Saved]:
    """Return the checkpoints of one run, first to last."""
    saved = []
    for path in sorted((directory / "truth" / run).iterdir()):
        content = torch.load(path, weights_only=True)
        weights = content["weights"]
        saved.append(Saved(directory / content["checkpoint"], int(path.stem), weights))
    return saved


def make(maker: str, directory: Path, *runs: str) -> Path:
    """Run a maker in a process of its own, and return the directory.

    Trainers warn, set environment variables and start processes; none of it touches the caller.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    ended = subprocess.run(
        [sys.executable, "-m", f"trainers.{maker}", str(directory), *runs],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return directory
