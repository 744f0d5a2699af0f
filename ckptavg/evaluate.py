"""What the user's metric says of a model."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ckptavg.batchnorm.kept import buffers_kept, modes_kept, random_state_kept, set_modes
from ckptavg.errors import ModelError

Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]


def evaluated(model: nn.Module, evaluate: Evaluate, *, seed: int | None = None) -> dict[str, float]:
    """Return what ``evaluate`` says of a model, by the names of its metrics; one is ``metric``.

    It runs in evaluation mode and without gradients. It may shuffle, sample or train: modes,
    buffers and random states are restored.

    Args:
        model: With its weights.
        evaluate: The user's function.
        seed: Seeds Python's, numpy's and torch's random numbers meanwhile; None leaves them.

    Raises:
        ModelError: If it returns anything but a number, or several by name.
        Exception: Whatever it raises.
    """
    with evaluation_state([model], seed):
        value = evaluate(model)
    return checked_metrics(value)


@contextmanager
def evaluation_state(models: Sequence[nn.Module], seed: int | None) -> Iterator[None]:
    """Put models into evaluation mode, without gradients; restore what evaluations may change."""
    with ExitStack() as stack:
        stack.enter_context(random_state_kept(seed))
        stack.enter_context(torch.no_grad())
        for model in models:
            stack.enter_context(modes_kept(model))
            stack.enter_context(buffers_kept(model))
            set_modes(model, training=False)
        yield


def checked_metrics(value: object) -> dict[str, float]:
    """Return what an evaluation returned as numbers by name.

    Raises:
        ModelError: If it is anything but a number, or several by name.
    """
    found: Mapping[Any, Any] = value if isinstance(value, Mapping) else {"metric": value}
    metrics: dict[str, float] = {}
    for name, one in found.items():
        if isinstance(one, torch.Tensor) and one.numel() == 1:
            one = one.item()
        if not isinstance(one, numbers.Real):
            raise ModelError(
                f"the evaluation returned a {type(one).__name__} for '{name}', expected a number"
            )
        metrics[str(name)] = float(one)
    if not metrics:
        raise ModelError("the evaluation returned no metric")
    return metrics
