"""What the user's metric says of a model."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ckptavg.errors import ModelError

Evaluate = Callable[[nn.Module], "float | Mapping[str, float]"]


def evaluated(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Return what ``evaluate`` says of a model, by the names of its metrics; one is ``metric``.

    It runs in evaluation mode and without gradients; the training modes are restored.

    Raises:
        ModelError: If it returns anything but a number, or several by name.
        Exception: Whatever it raises.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:  # by attribute: eval() of a user's module may do more than that
            module.training = False
        with torch.no_grad():
            value = evaluate(model)
    finally:
        for module, mode in modes:
            module.training = mode
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
