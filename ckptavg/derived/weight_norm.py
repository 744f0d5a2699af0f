"""Weight normalisation: layers that store magnitude and direction are averaged as weights.

w = g v / ||v|| (Salimans & Kingma 2016, eq. 2). The mean of g and the mean of v are not magnitude
and direction of the mean weight, since v counts by its length, which means nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ckptavg.coefficients import CoefficientRow
from ckptavg.derived.protocol import PART_NUMEL, Array, Deviation, Inputs, Part, flat, spans_of
from ckptavg.errors import IncompatibleCheckpointsError
from ckptavg.tensors import TensorInfo

# torch.nn.utils.weight_norm, and torch.nn.utils.parametrizations.weight_norm
_MAGNITUDE = re.compile(
    r"(?P<old>(?:.*\.)?weight\w*)_g|(?P<new>(?:.*\.)?parametrizations\.\w+)\.original0"
)
_WORKING_COPIES = 6  # float64 arrays of a part: two tensors, their weight, the sum, temporaries


@dataclass(frozen=True, kw_only=True)
class WeightNormGroup:
    """Magnitude g and direction v of one weight; implements ``Group``.

    The output is v = the mean weight, g = its norm, so that the module's weight is the mean.
    Channels whose g and v are equal in all checkpoints are kept to the bit.
    """

    module: str
    magnitude: str
    direction: str
    magnitude_info: TensorInfo
    direction_info: TensorInfo
    labels: tuple[str, ...] = field(repr=False)  # how paths are typed changes no plan
    kind: str = "weight_norm"

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Both tensors, as they are in the checkpoints."""
        return {self.magnitude: self.magnitude_info, self.direction: self.direction_info}

    @property
    def working_nbytes(self) -> int:
        """That of a run of channels, or of the whole tensor where the norm runs over dim 0."""
        return _WORKING_COPIES * 8 * self._rows_at_once * self._row_numel

    def read_nbytes(self, row: CoefficientRow) -> int:
        """Each tensor once."""
        return len(row.used) * sum(info.nbytes for info in self.outputs.values())

    @property
    def _magnitude_shape(self) -> tuple[int, ...]:
        """The shape of g with as many dimensions as v; it is 0-dimensional for ``dim=None``."""
        return self.magnitude_info.shape or (1,) * len(self.direction_info.shape)

    @property
    def _row_numel(self) -> int:
        return prod(self.direction_info.shape[1:])

    @property
    def _rows_at_once(self) -> int:
        n_rows = self.direction_info.shape[0]
        if self._magnitude_shape[0] == 1:
            return n_rows
        return min(n_rows, max(PART_NUMEL // max(self._row_numel, 1), 1))

    def compute(
        self, inputs: Inputs, row: CoefficientRow, found: list[Deviation]
    ) -> Iterator[Part]:
        """Yield g and v by channels; see ``Group``."""
        per_row = 0 if self._magnitude_shape[0] == 1 else prod(self._magnitude_shape[1:])
        for first, last in spans_of(self.direction_info.shape[0], self._rows_at_once):
            in_magnitude = (
                (first * per_row, last * per_row) if per_row else (0, self.magnitude_info.numel)
            )
            in_direction = (first * self._row_numel, last * self._row_numel)
            magnitude, direction = self._mean(inputs, row, in_magnitude, in_direction)
            yield Part(self.magnitude, in_magnitude[0], flat(magnitude))
            yield Part(self.direction, in_direction[0], flat(direction))

    @np.errstate(all="ignore")  # what is not finite is found when it is written
    def _mean(
        self,
        inputs: Inputs,
        row: CoefficientRow,
        in_magnitude: tuple[int, int],
        in_direction: tuple[int, int],
    ) -> tuple[Array, Array]:
        """Return g and v of the mean weight, for the channels in two spans of elements."""
        axes = tuple(axis for axis, size in enumerate(self._magnitude_shape) if size == 1)
        total = newest_g = newest_v = None
        equal: Any = np.True_  # which channels are the same everywhere
        for index in reversed(row.used):
            g = inputs.values(index, self.magnitude, in_magnitude)
            g = g.reshape(-1, *self._magnitude_shape[1:])
            v = inputs.values(index, self.direction, in_direction)
            v = v.reshape(-1, *self.direction_info.shape[1:])
            norm = np.sqrt(np.sum(v * v, axis=axes, keepdims=True))
            if not norm.all():
                raise IncompatibleCheckpointsError(
                    f"{self.labels[index]}: '{self.direction}' has a direction of length 0, so the "
                    "weight-normed layer has no weight; leave that checkpoint out"
                )
            weight = v * (g / norm) * row.multipliers[index]
            if total is None or newest_g is None or newest_v is None:
                total, newest_g, newest_v = weight, g, v
            else:
                total += weight
                same_v = np.all(v == newest_v, axis=axes, keepdims=True)
                equal = equal & (g == newest_g) & same_v
        assert total is not None  # some are used
        assert newest_g is not None
        assert newest_v is not None
        total /= row.divisor
        norm = np.sqrt(np.sum(total * total, axis=axes, keepdims=True))
        kept = equal | (norm == 0)  # a weight of 0 has g = 0 and any direction
        return np.where(equal, newest_g, norm), np.where(kept, newest_v, total)


def find_weight_norms(
    tensors: Mapping[str, TensorInfo], labels: Sequence[str]
) -> Iterator[WeightNormGroup]:
    """Yield the weight-normed layers of a checkpoint, told by names and shapes of their parts."""
    for name, info in tensors.items():
        match = _MAGNITUDE.fullmatch(name)
        if match is None:
            continue
        stem = match["old"] or match["new"]
        direction = f"{stem}_v" if match["old"] else f"{stem}.original1"
        other = tensors.get(direction)
        if other is not None and _fit(info, other):
            yield WeightNormGroup(
                module=stem,
                magnitude=name,
                direction=direction,
                magnitude_info=info,
                direction_info=other,
                labels=tuple(labels),
            )


def _fit(magnitude: TensorInfo, direction: TensorInfo) -> bool:
    """Tell whether two shapes can be those of g and v: g has a number for each channel, or one.

    Parametrisations with two tensors of other shapes are something else, and with two vectors
    nobody can tell.
    """
    if magnitude.dtype.kind != "float" or direction.dtype.kind != "float":
        return False
    if not direction.shape or not direction.numel:
        return False
    if sum(size != 1 for size in magnitude.shape) > 1:
        return False
    if len(direction.shape) == 1 and magnitude.numel != 1:
        return False
    return not magnitude.shape or (
        len(magnitude.shape) == len(direction.shape)
        and all(
            one in (1, other) for one, other in zip(magnitude.shape, direction.shape, strict=True)
        )
    )
