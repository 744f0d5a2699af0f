"""What a group of tensors offers that is computed together, not element by element."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptavg.coefficients import CoefficientRow
from ckptavg.tensors import TensorInfo

Array = NDArray[np.float64]

PART_NUMEL = 2**15  # elements that are worked on at once where a group goes row by row


class Part(NamedTuple):
    """Consecutive elements of an output tensor, from ``first`` on; a float64 vector.

    They are rounded to the output dtype by whoever writes them, once.
    """

    name: str
    first: int
    values: Array


class Deviation(NamedTuple):
    """How far what is written is from the exact mean, as squared Frobenius norms.

    Attributes:
        module: The module whose product it is.
        error: Square of the norm of the difference.
        total: Square of the norm of the exact mean.
    """

    module: str
    error: float
    total: float


class Inputs(Protocol):
    """Reads tensors of the checkpoints."""

    def values(self, index: int, name: str, *spans: tuple[int, int]) -> Array:
        """Return elements ``[start, stop)`` of each span, back to back, as a new float64 vector.

        Without spans it is the whole tensor.

        Raises:
            CheckpointError: If they cannot be read.
            IncompatibleCheckpointsError: If one is not finite and the recipe does not allow it.
        """


class Group(Protocol):
    """Output tensors that are computed together from tensors of all checkpoints.

    Attributes:
        kind: ``weight_norm``, ``spectral_norm``, ...: what messages and provenance call it.
        module: Name of the module that the tensors belong to.
    """

    @property
    def kind(self) -> str:
        """See the class."""

    @property
    def module(self) -> str:
        """See the class."""

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Name -> shape in the output, dtype in the checkpoints; empty if it only measures."""

    @property
    def working_nbytes(self) -> int:
        """Bytes that ``compute`` holds at once."""

    def read_nbytes(self, row: CoefficientRow) -> int:
        """Bytes that ``compute`` reads from all checkpoints together."""

    def compute(
        self, inputs: Inputs, row: CoefficientRow, found: list[Deviation]
    ) -> Iterator[Part]:
        """Yield every element of every output once.

        Args:
            inputs: Where the checkpoints' tensors come from.
            row: The coefficients of the output.
            found: What deviates from the exact mean is added here.

        Raises:
            CheckpointError: If something cannot be read.
            IncompatibleCheckpointsError: If the group has no mean, saying which tensor and why.
        """


def spans_of(numel: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut ``[0, numel)`` into spans of at most ``step``."""
    for first in range(0, numel, step):
        yield first, min(first + step, numel)


def flat(values: Any) -> Array:
    """Return an array as a contiguous float64 vector."""
    return np.ascontiguousarray(values, np.float64).reshape(-1)
