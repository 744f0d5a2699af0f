"""What follows from the inner products of checkpoints: distances, angles, coordinates, spread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ckptavg.errors import UsageError
from ckptavg.geometry.table import Matrix

Vector = NDArray[np.float64]

_ROUNDING = 1e-12  # of a squared length, relative to what it is the difference of
_LEAST_EFFECTIVE = 1.0 + 1e-6
_ITERATIONS = 200
_AS_GOOD = 0.02  # shares that differ by less are alike


class Geometry:
    """K checkpoints as points in the space of weights, known by their inner products.

    With weights w_i, their mean m and deviations d_i = w_i - m. Everything is float64.

    Attributes:
        products: Shape (K + 1, K + 1): of the deviations and, as number K, of the mean.
    """

    def __init__(self, products: Matrix) -> None:
        """Take the products of one layer group, or the sum of several."""
        self.products = (products + products.T) / 2

    @property
    def n_points(self) -> int:
        """How many checkpoints."""
        return len(self.products) - 1

    def of(self, indices: Sequence[int]) -> Geometry:
        """Return the geometry of some of the checkpoints, about their own mean."""
        count, size = len(indices), self.n_points
        change = np.zeros((count + 1, size + 1))
        share = np.zeros(size + 1)
        share[list(indices)] = 1 / count
        for row, index in enumerate(indices):
            change[row, index] = 1
            change[row] -= share
        change[count] = share
        change[count, size] = 1
        return Geometry(change @ self.products @ change.T)

    # -- lengths and angles

    @property
    def gram(self) -> Matrix:
        """Inner products of the deviations, shape (K, K)."""
        return self.products[:-1, :-1]

    @cached_property
    def norms(self) -> Vector:
        """Lengths of the weights, shape (K,)."""
        squares = np.diag(self.gram) + 2 * self.products[:-1, -1] + self.products[-1, -1]
        norms: Vector = np.sqrt(np.maximum(squares, 0))
        return norms

    @property
    def mean_norm(self) -> float:
        """Length of the mean."""
        return float(np.sqrt(max(self.products[-1, -1], 0)))

    @cached_property
    def distances(self) -> Matrix:
        """Distances between the weights, shape (K, K)."""
        diagonal = np.diag(self.gram)
        sums = diagonal[:, None] + diagonal[None, :]
        squares = sums - 2 * self.gram
        squares[squares <= _ROUNDING * sums] = 0  # equal, but for rounding
        distances: Matrix = np.sqrt(squares)
        return distances

    @cached_property
    def cosines(self) -> Matrix:
        """Cosines of the angles between the weights, shape (K, K); 0 where one is zero."""
        cross = self.products[:-1, -1]
        inner = self.gram + cross[:, None] + cross[None, :] + self.products[-1, -1]
        lengths = np.outer(self.norms, self.norms)
        cosines: Matrix = np.divide(inner, lengths, out=np.zeros_like(inner), where=lengths > 0)
        cosines.clip(-1, 1, out=cosines)
        return cosines

    @property
    def deviations(self) -> Vector:
        """Distances from the mean, shape (K,)."""
        return np.sqrt(np.maximum(np.diag(self.gram), 0))

    @property
    def spread(self) -> float:
        """Root mean square distance from the mean."""
        return float(np.sqrt(max(np.trace(self.gram), 0) / self.n_points))

    @property
    def norm_ratio(self) -> float:
        """Length of the mean over the mean length of the weights: 1 if all are equal.

        For n unrelated points of equal length it is 1/sqrt(n), .71 for two.
        """
        mean = float(self.norms.mean())
        return self.mean_norm / mean if mean else 1.0

    # -- movement in time

    def step_cosines(self) -> Vector:
        """Return the cosines between each step and the next one, shape (K - 2,).

        Near -1/2 for independent points around a centre, near 0 for a random walk, 1 on a straight
        line.
        """
        steps = np.diff(np.eye(self.n_points), axis=0)
        inner = steps @ self.gram @ steps.T
        lengths = np.sqrt(np.maximum(np.diag(inner), 0))
        scale = lengths[:-1] * lengths[1:]
        cosines: Vector = np.zeros_like(scale)
        np.divide(np.diag(inner, 1), scale, out=cosines, where=scale > 0)
        return cosines

    def taken_back(self) -> tuple[float, int] | None:
        """Return the part of a way that the next one takes back, from 0 to 1, and how long it is.

        Of ways of k checkpoints, with k up to a third of them, the shortest of which about the
        largest part is taken back: twice the negative inner product of neighbouring ways over their
        mean squared length. Where each checkpoint is a point that moves slowly, plus noise of its
        own, that is the noise's part of it: 1 for independent points around a centre, 0 for a
        random walk or a straight line. None for fewer than three points.
        """
        if self.n_points < 3:
            return None
        found = []
        for lag in range(1, max(self.n_points // 3, 1) + 1):
            ways = np.eye(self.n_points)[lag:] - np.eye(self.n_points)[:-lag]
            inner = ways @ self.gram @ ways.T
            scale = float(np.diag(inner).mean())
            share = -2 * float(np.diag(inner, lag).mean()) / scale if scale > 0 else 0.0
            found.append((min(max(share, 0.0), 1.0), lag))
        largest = max(share for share, _ in found)
        return next(one for one in found if one[0] >= largest - _AS_GOOD)

    def drift_share(self, times: Sequence[float]) -> float:
        """Return the part of the variance that a straight line in time explains: from 0 to 1.

        For n independent points it is near 1 / (n - 1).
        """
        total = float(np.trace(self.gram))
        line = _line(times)
        return min(max(float(line @ self.gram @ line) / total, 0.0), 1.0) if total else 0.0

    def effective_count(self, times: Sequence[float]) -> float:
        """Return how many independent points would give a mean as good as these: from 1 to K.

        What a straight line in time explains is taken out first. Then it is
        K / (1 + 2 sum_k (1 - k/K) r_k) with the autocorrelations r_k = 1 - V_k / (2 s^2) from the
        variogram V_k, the mean squared distance of points k apart, and the variance s^2 (Gelman et
        al., Bayesian Data Analysis, 3rd ed., section 11.5); the sum ends before the first pair of
        autocorrelations that is negative (Geyer 1992, "Practical Markov chain Monte Carlo"). The
        variance about the points' own mean is too small by 1 - 1/(effective count), which is put
        right by iteration.
        """
        count, line = self.n_points, _line(times)
        left = np.eye(count) - np.outer(line, line)
        gram = left @ self.gram @ left
        variance = float(np.trace(gram)) / count
        if variance <= _ROUNDING * max(float(np.trace(self.gram)), 1e-300):
            return 1.0 if count < 3 or not np.trace(self.gram) else float(count)
        squares = np.add.outer(np.diag(gram), np.diag(gram)) - 2 * gram
        variogram = np.array([np.diag(squares, lag).mean() for lag in range(1, count)])
        effective = float(count)
        for _ in range(_ITERATIONS):
            corrected = variance / (1 - 1 / effective)
            last, effective = effective, _effective(1 - variogram / (2 * corrected), count)
            if abs(last - effective) < 1e-9 * count:
                break
            effective = (effective + last) / 2
        return effective

    # -- directions

    @cached_property
    def _components(self) -> tuple[Vector, Matrix]:
        values, vectors = np.linalg.eigh(self.gram)
        values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
        largest = np.argmax(np.abs(vectors), axis=0)
        signs = np.sign(vectors[largest, np.arange(len(values))])
        return values, vectors * np.where(signs, signs, 1)

    @property
    def explained(self) -> Vector:
        """Part of the variance that each principal component explains, the largest first."""
        values = self._components[0]
        total = values.sum()
        return values / total if total else np.zeros_like(values)

    def coordinates(self, n_components: int) -> Matrix:
        """Return the coordinates along the first principal components, shape (K, components)."""
        values, vectors = self._components
        scaled: Matrix = vectors[:, :n_components] * np.sqrt(values[:n_components])
        return scaled

    def component(self, number: int) -> Vector:
        """Return the coefficients of the deviations that make a principal direction of length 1.

        Raises:
            UsageError: If the points do not spread in so many directions.
        """
        values, vectors = self._components
        if number >= len(values) or values[number] <= _ROUNDING * max(values[0], 1e-300):
            raise UsageError(f"the checkpoints spread in {number} directions only")
        direction: Vector = vectors[:, number] / np.sqrt(values[number])
        return direction

    def product(self, one: Vector, other: Vector) -> float:
        """Return the inner product of two combinations of the weights.

        Args:
            one: Coefficients of the K weights; they sum to 0 for a difference, to 1 for a point.
            other: Likewise.
        """
        return float(self._of_weights(one) @ self.products @ self._of_weights(other))

    def _of_weights(self, coefficients: Vector) -> Vector:
        return np.append(coefficients, coefficients.sum())


def _line(times: Sequence[float]) -> Vector:
    """Return times about their mean, of length 1; zeros where they are all the same."""
    centred: Vector = np.asarray(times, float) - np.mean(times)
    length = float(np.sqrt(centred @ centred))
    return centred / length if length else centred


def _effective(autocorrelations: Vector, count: int) -> float:
    """Return the effective count, with the sum ended before the first negative pair."""
    total = 0.0
    for lag in range(1, len(autocorrelations), 2):
        pair = autocorrelations[lag - 1 : lag + 1]
        if pair.sum() < 0:
            break
        total += float(sum((1 - (lag + at) / count) * one for at, one in enumerate(pair)))
    return min(max(count / (1 + 2 * total), _LEAST_EFFECTIVE), float(count))
