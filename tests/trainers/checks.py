"""Comparisons of what ckptavg made of a run with the true weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import float64_mean
from safetensors.torch import load_file
from torch import Tensor

from ckptavg import average_checkpoints
from trainers.truth import Saved

TIED = (("embed.weight", "head.weight"), ("transformer.wte.weight", "lm_head.weight"))


def averaged(sources: Path | Sequence[Path], output: Path, **options: Any) -> dict[str, Tensor]:
    """Average checkpoints, or those of a run directory, and return the model that was written."""
    result = average_checkpoints(sources, output, **options)
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(result.outputs[0].path).glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def assert_mean(found: dict[str, Tensor], saved: Sequence[Saved], *, absent: set[str]) -> None:
    """Check the mean of whole checkpoints, first to last.

    Args:
        found: What was written.
        saved: The truth.
        absent: Names that the trainer does not store.
    """
    last = saved[-1].weights
    assert set(found) == set(last) - absent
    for name, value in found.items():
        truth = last[name]
        assert (value.dtype, value.shape) == (truth.dtype, truth.shape), name
        if truth.is_floating_point():
            mean = float64_mean([each.weights[name] for each in saved]).to(truth.dtype)
            infinity = torch.tensor(float("inf"), dtype=truth.dtype)
            assert torch.all(value >= torch.nextafter(mean, -infinity)), name
            assert torch.all(value <= torch.nextafter(mean, infinity)), name
        else:
            assert torch.equal(value, truth), name
    for name, other in TIED:
        if name in found and other in found and is_tied(saved, name, other):
            assert torch.equal(found[name], found[other]), (name, other)


def is_tied(saved: Sequence[Saved], name: str, other: str) -> bool:
    """Tell whether two weights are one all along; gathering them makes two tensors of it."""
    return all(torch.equal(each.weights[name], each.weights[other]) for each in saved)


def moved(saved: Sequence[Saved]) -> set[str]:
    """Return what differs between the first and the last checkpoint."""
    first, last = saved[0].weights, saved[-1].weights
    return {name for name, value in last.items() if not torch.equal(value, first[name])}
