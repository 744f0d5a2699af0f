"""Spectral normalisation: averaged as the weights that the layers have in evaluation.

w = W / sigma with sigma = u^T W v, where u and v are what power iteration has come to (Miyato et
al. 2018, algorithm 1; torch.nn.utils.parametrizations._SpectralNorm.forward). u and v of two
checkpoints may differ in sign alone, so their mean means nothing: they are computed anew.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from ckptavg.coefficients import CoefficientRow
from ckptavg.derived.protocol import Array, Deviation, Inputs, Part, flat
from ckptavg.errors import IncompatibleCheckpointsError
from ckptavg.tensors import TensorInfo

# torch.nn.utils.spectral_norm, and torch.nn.utils.parametrizations.spectral_norm
_ORIGINAL = re.compile(
    r"(?P<old>(?:.*\.)?weight\w*)_orig|(?P<new>(?:.*\.)?parametrizations\.\w+)\.original"
)
_WORKING_COPIES = 7  # float64 arrays of the weight: its matrix, the sum, temporaries


class _Stored(NamedTuple):
    """One checkpoint's weight, as a matrix with ``dim`` in front, and its singular vectors."""

    weight: Array
    u: Array
    v: Array


@dataclass(frozen=True, kw_only=True)
class SpectralNormGroup:
    """Weight and singular vectors of one spectral-normed layer; implements ``Group``.

    The output is the mean of the effective weights with its own top singular vectors, so that the
    module's weight is that mean, scaled to the spectral norm 1 as the layer always is.

    Attributes:
        dims: The dimensions that may be the matrix's rows; where several have the length of u,
            the stored vectors tell which: only for the right one is u^T W v the largest.
    """

    module: str
    original: str
    left: str
    right: str
    infos: tuple[TensorInfo, TensorInfo, TensorInfo]
    dims: tuple[int, ...]
    labels: tuple[str, ...] = field(repr=False)  # how paths are typed changes no plan
    kind: str = "spectral_norm"

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """All three tensors, as they are in the checkpoints."""
        return dict(zip((self.original, self.left, self.right), self.infos, strict=True))

    @property
    def working_nbytes(self) -> int:
        """Those of the whole weight, and of the smaller of its two Gram matrices."""
        shorter = min(info.numel for info in self.infos[1:])
        return 8 * (_WORKING_COPIES * self.infos[0].numel + 4 * shorter * shorter)

    def read_nbytes(self, row: CoefficientRow) -> int:
        """Each tensor once, and once more where the dimension has to be found out."""
        n_reads = len(row.used) + (len(self.dims) > 1)
        return n_reads * sum(info.nbytes for info in self.infos)

    @np.errstate(all="ignore")  # what is not finite is found when it is written
    def compute(
        self, inputs: Inputs, row: CoefficientRow, found: list[Deviation]
    ) -> Iterator[Part]:
        """Yield weight and vectors; see ``Group``."""
        dim = self._dim(inputs, row.used[-1])
        total = newest = None
        equal = True
        for index in reversed(row.used):
            stored = self._read(inputs, index, dim)
            sigma = float(stored.u @ (stored.weight @ stored.v))
            if sigma == 0:
                raise IncompatibleCheckpointsError(
                    f"{self.labels[index]}: '{self.original}' has the spectral norm 0, so the "
                    "spectral-normed layer has no weight; leave that checkpoint out"
                )
            weight = stored.weight * (row.multipliers[index] / sigma)
            if total is None or newest is None:
                total, newest = weight, stored
            else:
                total += weight
                equal = equal and all(map(np.array_equal, stored, newest))
        assert total is not None  # some are used
        assert newest is not None
        result = newest
        if not equal:
            total /= row.divisor
            result = _Stored(total, *self._top_vectors(total, newest.u))
        shape = self.infos[0].shape
        moved = result.weight.reshape(shape[dim], *shape[:dim], *shape[dim + 1 :])
        yield Part(self.original, 0, flat(np.moveaxis(moved, 0, dim)))
        yield Part(self.left, 0, flat(result.u))
        yield Part(self.right, 0, flat(result.v))

    def _read(self, inputs: Inputs, index: int, dim: int) -> _Stored:
        weight = inputs.values(index, self.original).reshape(self.infos[0].shape)
        return _Stored(
            np.moveaxis(weight, dim, 0).reshape(weight.shape[dim], -1),
            inputs.values(index, self.left),
            inputs.values(index, self.right),
        )

    def _dim(self, inputs: Inputs, index: int) -> int:
        """Return the dimension whose matrix the stored vectors belong to."""
        if len(self.dims) == 1:
            return self.dims[0]
        first = self._read(inputs, index, self.dims[0])
        shape = self.infos[0].shape
        weight = np.moveaxis(
            first.weight.reshape(
                shape[self.dims[0]], *shape[: self.dims[0]], *shape[self.dims[0] + 1 :]
            ),
            0,
            self.dims[0],
        )
        sigmas = [
            first.u @ (np.moveaxis(weight, dim, 0).reshape(shape[dim], -1) @ first.v)
            for dim in self.dims
        ]
        return self.dims[int(np.argmax(sigmas))]

    def _top_vectors(self, weight: Array, seed: Array) -> tuple[Array, Array]:
        """Return the first left and right singular vectors, u on the side of ``seed``.

        From the eigenvectors of the smaller Gram matrix; what squaring costs in accuracy, two
        steps of power iteration bring back.
        """
        is_wide = weight.shape[0] <= weight.shape[1]
        if not np.isfinite(weight).all():
            raise IncompatibleCheckpointsError(
                f"'{self.original}': the mean weight is not finite, so it has no spectral norm"
            )
        values, vectors = np.linalg.eigh(weight @ weight.T if is_wide else weight.T @ weight)
        if values[-1] <= 0:
            raise IncompatibleCheckpointsError(
                f"'{self.original}': the mean weight is 0, which spectral normalisation cannot "
                "scale to norm 1"
            )
        u = vectors[:, -1] if is_wide else weight @ vectors[:, -1]
        v = weight.T @ u
        for _ in range(2):
            v = _unit(weight.T @ _unit(u))
            u = weight @ v
        u = _unit(u)
        return (u, v) if u @ seed >= 0 else (-u, -v)


def find_spectral_norms(
    tensors: Mapping[str, TensorInfo], labels: Sequence[str]
) -> Iterator[SpectralNormGroup]:
    """Yield the spectral-normed layers of a checkpoint, told by names and shapes of their parts."""
    for name, info in tensors.items():
        match = _ORIGINAL.fullmatch(name)
        if match is None:
            continue
        stem = match["old"] or match["new"]
        sides = (f"{stem}_u", f"{stem}_v") if match["old"] else (f"{stem}.0._u", f"{stem}.0._v")
        left, right = map(tensors.get, sides)
        if left is None or right is None:
            continue
        dims = _dims(info, left, right)
        if dims:
            yield SpectralNormGroup(
                module=stem,
                original=name,
                left=sides[0],
                right=sides[1],
                infos=(info, left, right),
                dims=dims,
                labels=tuple(labels),
            )


def _dims(weight: TensorInfo, left: TensorInfo, right: TensorInfo) -> tuple[int, ...]:
    """Return the dimensions that may be the rows of the matrix; none if the shapes do not fit."""
    if any(info.dtype.kind != "float" or not info.numel for info in (weight, left, right)):
        return ()
    return tuple(
        dim
        for dim, size in enumerate(weight.shape)
        if left.shape == (size,)
        and right.shape == (prod(weight.shape[:dim] + weight.shape[dim + 1 :]),)
    )


def _unit(vector: Array) -> Array:
    return vector / np.sqrt(vector @ vector)
