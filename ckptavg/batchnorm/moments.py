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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptavg.batchnorm.layers import NormLayer
from ckptavg.bn_options import Estimator

_LATE_SHARE = 0.1  # of the data at the end, whose effect tells whether there was enough
_SNAPSHOT_GROWTH = 1.02


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
        self.weights = dict.fromkeys(layers, 0.0)
        self.n_elements = dict.fromkeys(layers, 0)
        self._mean = torch.zeros(ends[-1], dtype=torch.float64, device=self.device)
        self._second = torch.zeros_like(self._mean)  # M2, or the weighted sum of variances
        self._epsilon = torch.cat(
            [
                torch.full((layer.n_features,), layer.epsilon, dtype=torch.float64)
                for layer in layers.values()
            ]
        ).to(self.device)
        self._snapshots: deque[tuple[float, Tensor, Tensor]] = deque()

    def merge(self, batch: BatchMoments) -> None:
        """Add what layers saw in a batch, all of them in a few operations."""
        pools = self._vector(self._pools, batch.weights)
        weight_b = self._vector(batch.weights, batch.weights)
        second_b = batch.variance * (weight_b - pools)
        self._merge(batch.weights, batch.mean, second_b, weight_b, pools)
        for name, count in batch.n_elements.items():
            self.n_elements[name] += count

    def _merge(
        self,
        weights: Mapping[str, float],
        mean_b: Tensor,
        second_b: Tensor,
        weight_b: Tensor,
        pools: Tensor,
    ) -> None:
        where = self._where(weights)
        weight_a = self._vector(self.weights, weights)
        mean_a, second_a = self._mean[where], self._second[where]
        total = weight_a + weight_b
        delta = mean_b - mean_a
        self._mean[where] = mean_a + delta * (weight_b / total)
        between = delta * delta * (weight_a * weight_b / total)
        # where, not a product: an infinite difference times 0 would be NaN
        self._second[where] = second_a + second_b + torch.where(pools > 0, between, 0.0)
        for name, weight in weights.items():
            self.weights[name] += weight

    def finished(self, name: str) -> tuple[Tensor, Tensor]:
        """Return mean and variance of one layer, float64."""
        place = self._place[name]
        weight = self.weights[name] - self._pools[name]
        return self._mean[place].clone(), self._second[place] / weight

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
        everything = self._layers
        weight = self._vector(self.weights, everything) - self._vector(self._pools, everything)
        return self._second / weight.clamp_min(1e-300)

    # -- between processes

    def to_words(self) -> dict[str, Any]:
        """Return all of it as numbers in lists, exact."""
        return {
            "weights": list(self.weights.values()),
            "n_elements": list(self.n_elements.values()),
            "mean": self._mean.tolist(),
            "second": self._second.tolist(),
        }

    def add_words(self, words: Mapping[str, Any]) -> None:
        """Merge what another process, with the same layers, has found."""
        names = [
            name for name, weight in zip(self._layers, words["weights"], strict=True) if weight
        ]
        if not names:
            return
        weights = dict(zip(self._layers, words["weights"], strict=True))
        where = self._where(names)
        mean_b, second_b = (
            torch.tensor(words[key], dtype=torch.float64).to(self.device)[where]
            for key in ("mean", "second")
        )
        self._merge(
            {name: weights[name] for name in names},
            mean_b,
            second_b,
            self._vector(weights, names),
            self._vector(self._pools, names),
        )
        for name, count in zip(self._layers, words["n_elements"], strict=True):
            self.n_elements[name] += count

    # -- vectors

    def _where(self, names: Mapping[str, Any] | Sequence[str]) -> Any:
        """Return the places of some layers' channels, in the order of the names."""
        if list(names) == list(self._layers):
            return slice(None)
        places = [self._place[name] for name in names]
        index = torch.cat([torch.arange(place.start, place.stop) for place in places])
        return index.to(self.device)

    def _vector(
        self, value_of: Mapping[str, float], names: Mapping[str, Any] | Sequence[str]
    ) -> Tensor:
        """Return a layer's value for each of its channels, in the order of the names."""
        values = torch.tensor([float(value_of[name]) for name in names], dtype=torch.float64)
        sizes = torch.tensor([self._layers[name].n_features for name in names])
        return values.repeat_interleave(sizes).to(self.device, non_blocking=True)
