"""Means and variances of every channel of every layer, merged batch by batch in float64.

Three estimators. With ``m_b`` and ``v_b`` the mean and the unbiased variance of batch b in one
channel, ``n_b`` its elements in that channel and ``s_b`` its samples:

population
    The mean and unbiased variance of all elements of all batches together, whatever the batches
    (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", Section 3.1). Merged without cancellation
    (Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", equations 2.1a and 2.1b)::

        delta = m_b - m_a
        mean  = m_a + delta * n_b / n
        M2    = M2_a + M2_b + delta^2 * n_a * n_b / n          (variance = M2 / (n - 1))

    The last term is the variance between batches, which the other two leave out.
paper
    ``mean = sum s_b m_b / sum s_b``, ``variance = sum s_b v_b / sum s_b``: what a momentum of
    ``b / (n + b)`` gives, as in the authors' ``bn_update`` (Izmailov et al. 2018,
    github.com/timgaripov/swa, ``utils.py``).
torch
    ``mean = sum m_b / B``, ``variance = sum v_b / B``: every batch counts alike, however few
    samples it has, as in ``torch.optim.swa_utils.update_bn`` (momentum None).

An InstanceNorm layer normalises every instance by itself, so its statistics are those of a typical
instance: ``m`` and ``v`` are means over a batch's instances, weighed by the number of instances
(``population``, ``paper``) or alike (``torch``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptavg.batchnorm.layers import NormLayer
from ckptavg.bn_options import Estimator

_LATE_SHARE = 0.1  # of the data at the end, whose effect tells whether there was enough
_SNAPSHOT_GROWTH = 1.02
_MAX_VECTORS = 16
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class BatchMoments:
    """What some layers saw in one batch, end to end in one vector each.

    Attributes:
        weights: Layer name -> how much its batch counts, for the estimator.
        n_elements: Layer name -> elements per channel.
        mean: float64, all channels of these layers.
        variance: float64, likewise; unbiased within the batch.
    """

    weights: Mapping[str, float]
    n_elements: Mapping[str, int]
    mean: Tensor
    variance: Tensor


class Moments:
    """Weight, mean and spread of every channel so far."""

    def __init__(self, layers: Mapping[str, NormLayer], estimator: Estimator) -> None:
        """Begin with nothing; the vectors are on the first layer's device."""
        self._layers = layers
        self.device = next(iter(layers.values())).device
        ends = torch.tensor([layer.n_features for layer in layers.values()]).cumsum(0).tolist()
        self._place = {
            name: slice(end - layer.n_features, end)
            for (name, layer), end in zip(layers.items(), ends, strict=True)
        }
        self._pools = {
            name: estimator == "population" and not layer.is_instance
            for name, layer in layers.items()
        }
        self.n_elements = dict.fromkeys(layers, 0)
        self._mean = torch.zeros(ends[-1], dtype=torch.float64, device=self.device)
        self._second = torch.zeros_like(self._mean)  # M2, or the weighted sum of variances
        self._weight = torch.zeros_like(self._mean)
        # a copy to a GPU makes it wait: what is the same in every batch is copied once
        self._vectors: dict[tuple[object, ...], Tensor] = {}
        self._pools_vector = self._vector(self._pools, layers)
        self._epsilon = self._vector({name: one.epsilon for name, one in layers.items()}, layers)
        self._snapshots: deque[tuple[float, Tensor, Tensor]] = deque()

    def merge(self, batch: BatchMoments) -> None:
        """Add what layers saw in a batch, all of them in a few operations."""
        where = self._where(batch.weights)
        weight_b = self._vector(batch.weights, batch.weights)
        second_b = batch.variance * (weight_b - self._pools_vector[where])
        self._merge(where, batch.mean, second_b, weight_b)
        for name, count in batch.n_elements.items():
            self.n_elements[name] += count

    def _merge(self, where: Any, mean_b: Tensor, second_b: Tensor, weight_b: Tensor) -> None:
        weight_a, mean_a, second_a = self._weight[where], self._mean[where], self._second[where]
        total = weight_a + weight_b
        delta = mean_b - mean_a
        between = delta * delta * (weight_a * weight_b / total)
        self._mean[where] = mean_a + delta * (weight_b / total)
        # where, not a product: an infinite difference times 0 would be NaN
        self._second[where] = (
            second_a + second_b + torch.where(self._pools_vector[where] > 0, between, 0.0)
        )
        self._weight[where] = total

    def finished(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of all channels of all layers, float64, end to end.

        Those of a layer that saw nothing mean nothing.
        """
        return self._mean, self._variance()

    def place(self, name: str) -> slice:
        """Return where a layer's channels are."""
        return self._place[name]

    def state(self) -> tuple[Any, ...]:
        """Return what ``restore`` takes to undo what is merged from here on."""
        vectors = self._mean.clone(), self._second.clone(), self._weight.clone()
        return (*vectors, dict(self.n_elements), self._snapshots.copy())

    def restore(self, state: tuple[Any, ...]) -> None:
        """Undo what was merged since ``state``."""
        self._mean, self._second, self._weight, self.n_elements, self._snapshots = state

    # -- convergence

    def remember(self, amount: float) -> None:
        """Note the statistics after so many samples (or batches), to compare with later ones.

        Keeps a few that lie about a tenth back.
        """
        if self._snapshots and amount < self._snapshots[-1][0] * _SNAPSHOT_GROWTH:
            return
        self._snapshots.append((amount, self._mean.clone(), self._variance()))
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= (1 - _LATE_SHARE) * amount:
            self._snapshots.popleft()

    def late_change(self, amount: float) -> tuple[float, dict[str, float]] | None:
        """Tell how far the last tenth of the data moved each layer.

        Returns:
            The share of the data that is meant, and for each layer the largest change of a mean in
            standard deviations or of a variance relative to itself; None if too little is known.
        """
        before = [one for one in self._snapshots if one[0] < amount]
        if not before:
            return None
        due = (1 - _LATE_SHARE) * amount
        then, mean, variance = next((one for one in reversed(before) if one[0] <= due), before[0])
        now = self._variance() + self._epsilon
        shift = (self._mean - mean).abs() / now.sqrt()
        change = torch.maximum(shift, (now - variance - self._epsilon).abs() / now).cpu()
        changes = {
            name: float(change[place].max())
            for name, place in self._place.items()
            if self.n_elements[name]
        }
        return 1 - then / amount, changes

    def _variance(self) -> Tensor:
        return self._second / (self._weight - self._pools_vector).clamp_min(_TINY)

    # -- between processes

    def to_words(self) -> dict[str, Any]:
        """Return all of it as numbers in lists, exact."""
        return {
            "weight": self._weight.tolist(),
            "n_elements": list(self.n_elements.values()),
            "mean": self._mean.tolist(),
            "second": self._second.tolist(),
        }

    def add_words(self, words: Mapping[str, Any]) -> None:
        """Merge what another process, with the same layers, has found."""
        counts = dict(zip(self._layers, words["n_elements"], strict=True))
        seen = [name for name, count in counts.items() if count]
        if not seen:
            return
        where = self._where(seen)
        mean_b, second_b, weight_b = (
            torch.tensor(words[key], dtype=torch.float64).to(self.device)[where]
            for key in ("mean", "second", "weight")
        )
        self._merge(where, mean_b, second_b, weight_b)
        for name, count in counts.items():
            self.n_elements[name] += count

    # -- vectors

    def _where(self, names: Iterable[str]) -> Any:
        """Return the places of some layers' channels, in the order of the names."""
        listed = tuple(names)
        if listed == tuple(self._layers):
            return slice(None)
        if listed not in self._vectors:
            places = [self._place[name] for name in listed]
            index = torch.cat([torch.arange(place.start, place.stop) for place in places])
            self._keep(listed, index)
        return self._vectors[listed]

    def _vector(self, value_of: Mapping[str, float], names: Iterable[str]) -> Tensor:
        """Return a layer's value for each of its channels, in the order of the names."""
        listed = tuple(names)
        values = [float(value_of[name]) for name in listed]
        key = (listed, *values)
        if key not in self._vectors:
            sizes = torch.tensor([self._layers[name].n_features for name in listed])
            self._keep(key, torch.tensor(values, dtype=torch.float64).repeat_interleave(sizes))
        return self._vectors[key]

    def _keep(self, key: tuple[object, ...], vector: Tensor) -> None:
        if len(self._vectors) >= _MAX_VECTORS:  # batches of ever other sizes
            self._vectors.clear()
        self._vectors[key] = vector.to(self.device)
