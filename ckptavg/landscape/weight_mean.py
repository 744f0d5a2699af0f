"""The mean of the weights that a live model has had, kept where the model is."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ckptavg.errors import IncompatibleCheckpointsError


class WeightMean:
    """Running sums in float64 of all floating-point weights of a model.

    Attributes:
        count: How many sets of weights went in.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._newest: dict[str, Any] = {}  # what has no mean: integers, bools, what is no tensor

    def add(self, model: nn.Module, label: str, *, is_newest: bool) -> None:
        """Add the weights that a model has now.

        Args:
            model: With the weights of a checkpoint.
            label: What messages call the checkpoint.
            is_newest: Whether it is the newest so far: it gives what has no mean.

        Raises:
            IncompatibleCheckpointsError: If a weight is not finite.
        """
        finite: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                if is_newest or name not in self._newest:
                    self._newest[name] = value.clone() if isinstance(value, Tensor) else value
                continue
            exact = value.detach().to(torch.float64, copy=True)
            finite[name] = torch.isfinite(exact).all()
            self._sums[name] = exact if self.count == 0 else self._sums[name].add_(exact)
        if finite and not torch.stack([one.cpu() for one in finite.values()]).all():
            name = next(name for name, is_finite in finite.items() if not is_finite)
            raise IncompatibleCheckpointsError(
                f"{label}: '{name}' holds infinity or NaN, which has no mean"
            )
        self.count += 1

    def put_into(self, model: nn.Module) -> None:
        """Load the mean into a model, rounded once to the dtype of each weight."""
        state: Mapping[str, Any] = model.state_dict()
        values = {
            name: rounded(self._sums[name] / self.count, state[name].dtype) for name in self._sums
        }
        model.load_state_dict({**self._newest, **values}, strict=True)

    def distance(self, model: nn.Module) -> float:
        """Return how far a model's parameters are from their mean: the norm of the difference."""
        squares = [
            (value.detach().to(torch.float64) - self._sums[name] / self.count).square().sum()
            for name, value in model.named_parameters()
            if name in self._sums
        ]
        return math.sqrt(sum(float(one) for one in squares))


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 values once.

    torch makes 16-bit floats of float32 values, which would be a second rounding: values are
    rounded to an odd last bit there, which cannot be mistaken for a tie.
    """
    if dtype.itemsize > 2:
        return value.to(dtype)
    single = value.to(torch.float32)
    back, bits = single.to(torch.float64), single.view(torch.int32)
    bits = torch.where(back.abs() > value.abs(), bits - 1, bits)  # towards zero
    bits = torch.where(back != value, bits | 1, bits)
    return bits.view(torch.float32).to(dtype)
