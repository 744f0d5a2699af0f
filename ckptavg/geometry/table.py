"""Gram matrices of the deviations of checkpoints from their mean, one for each layer group."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptavg.blocks import Chunk

Matrix = NDArray[np.float64]

# up to and with the first number: layers.12, layer3.0, block2
_NUMBERED = re.compile(r"^(?:[^.]+\.)*?(?:[^.]*\d+)(?=\.)(?:\.\d+(?=\.))?")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Tensors that are looked at together.

    Attributes:
        name: What their names begin with.
        is_matrix: Whether they have two dimensions or more, as weights have that are drawn at
            random in the beginning; biases and scales of norms have one.
    """

    name: str
    is_matrix: bool


class GramTable:
    """Collects inner products of K checkpoints' weights, from any thread, in any order.

    What is added are products of differences from one of them, the reference, and of the reference
    itself: as exact as products of deviations from the mean, and nothing has to be known of the
    others to form a difference.

    Attributes:
        members: Indices of the checkpoints, oldest first.
        reference: Which of the members is the reference, by its place among them.
        groups: The layer groups, in the order of their first tensor.
        n_elements: How many elements of each group have been added.
    """

    def __init__(
        self, tensors: Iterable[tuple[str, tuple[int, ...]]], members: Sequence[int]
    ) -> None:
        """Begin with nothing.

        Args:
            tensors: Names and shapes of what counts; everything else is passed over.
            members: Indices of the checkpoints, oldest first.
        """
        self.members = tuple(members)
        self.reference = len(self.members) // 2
        numbers: dict[LayerGroup, int] = {}
        self._group_of: dict[str, int] = {}
        for name, shape in tensors:
            group = LayerGroup(layer_of(name), len(shape) > 1)
            self._group_of[name] = numbers.setdefault(group, len(numbers))
        self.groups = tuple(numbers)
        size = len(self.members)
        self._sums: Matrix = np.zeros((len(self.groups), size, size))
        self.n_elements = np.zeros(len(self.groups), np.int64)
        self._lock = Lock()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, checkpoints, checkpoints."""
        return len(self.groups), len(self.members), len(self.members)

    @property
    def products(self) -> Matrix:
        """Inner products, float64, shape (groups, K + 1, K + 1).

        Of the K deviations from the mean of all and, as number K, of the mean itself: all
        distances, norms and angles of weights, and all coordinates in planes through them, follow
        from these.
        """
        size = len(self.members)
        mean = np.full(size, 1 / size)
        mean[self.reference] = 0  # of the differences
        change = np.vstack([np.eye(size) - mean, mean])
        change[self.reference, self.reference] = 0  # its difference from itself
        change[size, self.reference] = 1
        products: Matrix = change @ self._sums @ change.T
        return products

    def group_of(self, name: str) -> LayerGroup | None:
        """Return the group of a tensor; None if it does not count."""
        number = self._group_of.get(name)
        return None if number is None else self.groups[number]

    def runs(self, chunk: Chunk) -> list[tuple[int, slice]]:
        """Return the groups in a chunk, each with the place of a run of its elements."""
        runs: list[tuple[int, slice]] = []
        start = 0
        for name, first, last in chunk.pieces:
            stop = start + (last - first) // chunk.dtype.itemsize
            group = self._group_of.get(name)
            if group is not None and stop > start:
                if runs and runs[-1][0] == group and runs[-1][1].stop == start:
                    runs[-1] = (group, slice(runs[-1][1].start, stop))
                else:
                    runs.append((group, slice(start, stop)))
            start = stop
        return runs

    def add(self, group: int, products: Matrix, n_elements: int) -> None:
        """Add the products of some elements of a group.

        Args:
            group: Its number.
            products: Shape (K, K): of the differences from the reference, in whose place the
                reference itself stands.
            n_elements: How many they are.
        """
        with self._lock:
            self._sums[group] += products
            self.n_elements[group] += n_elements

    def to_words(self) -> dict[str, Any]:
        """Return what was added, in a form that JSON can express, exact."""
        return {"products": self._sums.tolist(), "n_elements": self.n_elements.tolist()}

    def add_words(self, words: dict[str, Any]) -> None:
        """Add what another process collected."""
        self._sums += np.asarray(words["products"]).reshape(self.shape)
        self.n_elements += np.asarray(words["n_elements"], np.int64)


def layer_of(name: str) -> str:
    """Return the layer that a tensor belongs to, by its name.

    The part up to the first number (``model.layers.12``, ``layer3.0``), and the module's name
    where there is none (``head``).
    """
    numbered = _NUMBERED.match(name)
    if numbered:
        return numbered.group()
    return name.rpartition(".")[0] or name
