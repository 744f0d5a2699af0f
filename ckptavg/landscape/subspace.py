"""Points in the space of weights, put together on the device where the model is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import MemoryBudgetError, ModelError
from ckptavg.landscape.weight_mean import rounded
from ckptavg.live_model import LiveModel
from ckptavg.model import tied_names
from ckptavg.plan import is_batchnorm_statistic

Row = NDArray[np.float64]

_PART_NUMEL = 2**22  # of a tensor that is put together at once


class WeightSpace:
    """Which tensors of a model are its weights, and in what order they make one vector.

    Floating-point parameters and buffers but BatchNorm statistics, tied ones once: what
    ``trajectory`` compares, so that distances are the same.

    Attributes:
        size: Number of weights; a complex one counts as two.
        dtype: Of vectors; it holds every weight exactly.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at a model, whose weights do not matter."""
        state = model.state_dict()
        tied = tied_names(state)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._names: list[str] = []
        self._places: list[slice] = []
        self._shapes: list[torch.Size] = []
        self._is_parameter: list[bool] = []
        start, seen = 0, set[str]()
        self.dtype = torch.float32
        for name, value in state.items():
            if name in seen or not isinstance(value, Tensor) or is_batchnorm_statistic(name):
                continue
            if not (value.is_floating_point() or value.is_complex()):
                continue
            seen.update(tied.get(name, [name]))
            values = _as_real(value)
            if values.dtype is torch.float64:
                self.dtype = torch.float64
            self._names.append(name)
            self._places.append(slice(start, start + values.numel()))
            self._shapes.append(value.shape)
            self._is_parameter.append(name in parameters)
            start += values.numel()
        self.size = start

    def vector(self, model: nn.Module) -> Tensor:
        """Return a model's weights as one vector on its device, a copy."""
        device = next(iter(self._tensors(model))).device
        vector = torch.empty(self.size, dtype=self.dtype, device=device)
        for tensor, place in zip(self._tensors(model), self._places, strict=True):
            vector[place].copy_(tensor.reshape(-1))
        return vector

    @contextmanager
    def room(self) -> Iterator[None]:
        """Say what was too large for the device, where anything is.

        Raises:
            MemoryBudgetError: If so.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MemoryBudgetError(
                f"no room on the device for another copy of the weights, {self.size} of them"
            ) from error

    def put(self, model: nn.Module, vectors: Sequence[Tensor], coefficients: Row) -> None:
        """Make a combination of vectors the weights of a model: summed in float64, rounded once."""
        used = [(c, one) for c, one in zip(coefficients, vectors, strict=True) if c]
        for tensor, place in zip(self._tensors(model), self._places, strict=True):
            flat = tensor.view(-1) if tensor.is_contiguous() else torch.empty_like(tensor).view(-1)
            for first in range(place.start, place.stop, _PART_NUMEL):
                stop = min(first + _PART_NUMEL, place.stop)
                total = torch.zeros(stop - first, dtype=torch.float64, device=flat.device)
                for coefficient, vector in used:
                    total.add_(vector[first:stop], alpha=float(coefficient))
                flat[first - place.start : stop - place.start] = rounded(total, flat.dtype)
            if not tensor.is_contiguous():
                tensor.copy_(flat.view(tensor.shape))

    def random_direction(self, like: Tensor, seed: int) -> Tensor:
        """Return a random direction of length 1, uniform on the sphere of all parameters.

        A normalised Gaussian (Izmailov et al. 2018, section 3.4); buffers are left out. Drawn on
        the CPU, so that a seed gives the same direction on every machine.

        Args:
            like: A vector of weights, where the direction is to be.
            seed: Which direction.
        """
        random = torch.Generator().manual_seed(seed)
        direction = torch.zeros(self.size, dtype=torch.float32)
        for place, is_parameter in zip(self._places, self._is_parameter, strict=True):
            if is_parameter:
                numel = place.stop - place.start
                direction[place] = torch.randn(numel, generator=random)
        direction = direction.to(like.device, like.dtype)
        direction /= torch.linalg.vector_norm(direction, dtype=torch.float64)
        return direction

    def filter_normalised(self, direction: Tensor, weights: Tensor) -> Tensor:
        """Return a direction whose filters have the norms of those of the weights.

        What has one dimension is left out (Li et al. 2018, "Visualizing the Loss Landscape of
        Neural Nets", section 4): where a norm layer follows, the scale of a filter changes nothing,
        so that distances are comparable relative to it only.
        """
        scaled = torch.zeros_like(direction)
        for place, shape, is_parameter in zip(
            self._places, self._shapes, self._is_parameter, strict=True
        ):
            if not is_parameter or len(shape) < 2 or not shape.numel():
                continue
            filters = direction[place].view(shape[0], -1)
            norms = filters.norm(dim=1, keepdim=True)
            wanted = weights[place].view(shape[0], -1).norm(dim=1, keepdim=True)
            scaled[place] = (filters * torch.where(norms > 0, wanted / norms, 0.0)).view(-1)
        return scaled

    def _tensors(self, model: nn.Module) -> list[Tensor]:
        state = model.state_dict()
        return [_as_real(state[name]) for name in self._names]


def vectors_of(
    live: LiveModel,
    space: WeightSpace,
    checkpoints: Sequence[Checkpoint],
    rows: Sequence[Row],
    report: Callable[[int], None],
) -> list[Tensor]:
    """Return combinations of the weights of checkpoints, from one pass over them.

    Args:
        live: The model, which has the weights of the last checkpoint that was used afterwards.
        space: Its weights.
        checkpoints: Oldest first.
        rows: One a vector: the coefficient of each checkpoint. Equal ones are summed and divided
            by their number, as ``average`` does.
        report: Told each checkpoint that is loaded.
    """
    vectors: list[Tensor | None] = [None] * len(rows)
    for index, checkpoint in enumerate(checkpoints):
        wanted = [number for number, row in enumerate(rows) if row[index]]
        if not wanted:
            continue
        live.load(checkpoint)
        weights = space.vector(live.module)
        if not bool(torch.isfinite(weights).all()):
            raise ModelError(f"{checkpoint.label}: holds infinity or NaN, which has no direction")
        for number in wanted:
            used, total = rows[number][rows[number] != 0], vectors[number]
            if len(used) == 1 and used[0] == 1:
                vectors[number] = weights.clone() if len(wanted) > 1 else weights
                continue
            scale = 1.0 if (used == used[0]).all() else float(rows[number][index])
            exact = weights.to(torch.float64).mul_(scale)
            vectors[number] = exact if total is None else total.add_(exact)
        report(1)
    found: list[Tensor] = []
    for row, vector in zip(rows, vectors, strict=True):
        if vector is None:
            raise AssertionError("every row uses a checkpoint")
        used = row[row != 0]
        if len(used) > 1 and (used == used[0]).all():
            is_mean = np.isclose(used.sum(), 1)
            vector = vector.div_(len(used)) if is_mean else vector.mul_(float(used[0]))
        found.append(vector.to(space.dtype))
    return found


def _as_real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value
