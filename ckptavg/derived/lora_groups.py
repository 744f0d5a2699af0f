"""The mean of LoRA products: exactly, at a chosen rank, or how far the mean of factors is from it.

An adapter changes a weight by scale x B A (Hu et al. 2021, eq. 3), so the mean of K adapters with
coefficients c_k changes it by sum_k c_k s_k B_k A_k. The product of the mean factors is another
matrix: it leaves out what the factors have in common beside their means (their covariance).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ckptavg.coefficients import CoefficientRow
from ckptavg.derived.adapter_config import alpha_at_rank
from ckptavg.derived.lora_modules import LoraModule
from ckptavg.derived.protocol import PART_NUMEL, Array, Deviation, Inputs, Part, flat, spans_of
from ckptavg.errors import IncompatibleCheckpointsError
from ckptavg.tensors import TensorInfo


@dataclass(frozen=True, kw_only=True)
class _LoraGroup:
    """What the groups of one module have in common.

    Attributes:
        lora: The module.
        used: Indices of the checkpoints that go into any output, oldest first.
        rank: That of the output.
    """

    lora: LoraModule
    used: tuple[int, ...]
    rank: int
    kind: str = "LoRA"

    @property
    def module(self) -> str:
        """Its name."""
        return self.lora.name

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """Both factors at the output's rank, and B's bias."""
        found = {
            self.lora.a: self.lora.a_info(self.rank),
            self.lora.b: self.lora.b_info(self.rank),
        }
        if self.lora.bias is not None and self.lora.bias_info is not None:
            found[self.lora.bias] = self.lora.bias_info
        return found

    def read_nbytes(self, row: CoefficientRow) -> int:
        """Each factor and bias once."""
        bias = 0 if self.lora.bias_info is None else self.lora.bias_info.nbytes
        return sum(self.lora.nbytes(index) + bias for index in row.used)

    def _bias(self, inputs: Inputs, row: CoefficientRow, scale: float) -> Iterator[Part]:
        """Yield B's bias: its mean is sum_k c_k s_k b_k / s, since the scale multiplies it, too.

        Args:
            inputs: Where the tensors come from.
            row: The coefficients.
            scale: s, the output's scale; 0 for one that is applied to equal scales.
        """
        if self.lora.bias is None or self.lora.bias_info is None:
            return
        total = np.zeros(self.lora.bias_info.numel)
        for index in row.used:
            share = 1.0 if scale == 0 else _share(row, index) * self.lora.scales[index] / scale
            total += inputs.values(index, self.lora.bias) * share
        yield Part(self.lora.bias, 0, total)


@dataclass(frozen=True, kw_only=True)
class ConcatenatedGroup(_LoraGroup):
    """The exact mean by concatenated ranks: B = [B_1 ... B_K], A = [c_1 s_1 A_1; ...; c_K s_K A_K].

    Where all checkpoints of an output have the same scale and coefficient, the factors are copied
    and the output's scale is coefficient x scale: nothing is rounded. The rows of a checkpoint
    that goes into another output only are 0.
    """

    @property
    def working_nbytes(self) -> int:
        """Those of a part, its pieces and what it is rounded with, or of one row of B."""
        return 8 * 8 * max(PART_NUMEL, self.rank)

    def is_copied(self, row: CoefficientRow) -> bool:
        """Tell whether one scale for all replaces multiplying."""
        return len({(row.multipliers[index], self.lora.scales[index]) for index in row.used}) == 1

    def alpha(self, row: CoefficientRow, *, use_rslora: bool) -> Fraction:
        """Return the alpha that gives an output its scale."""
        if not self.is_copied(row):  # the scale 1
            return alpha_at_rank(1, 1, self.rank, use_rslora=use_rslora)
        last = row.used[-1]
        share = Fraction(row.multipliers[last]) / row.divisor
        old = self.lora.alphas[last], self.lora.ranks[last]
        return share * alpha_at_rank(*old, self.rank, use_rslora=use_rslora)

    def compute(
        self, inputs: Inputs, row: CoefficientRow, found: list[Deviation]
    ) -> Iterator[Part]:
        """Yield rows of A, then rows of B; see ``Group``."""
        lora, copied = self.lora, self.is_copied(row)
        done = 0
        for index in self.used:
            numel = lora.a_infos[index].numel
            factor = 1.0 if copied else _share(row, index) * lora.scales[index]
            for first, last in spans_of(numel, PART_NUMEL):
                if index in row.used:
                    values = inputs.values(index, lora.a, (first, last))
                    yield Part(lora.a, done + first, values if copied else values * factor)
                else:
                    yield Part(lora.a, done + first, np.zeros(last - first))
            done += numel
        for first, last in spans_of(lora.n_out, max(PART_NUMEL // self.rank, 1)):
            rows = np.zeros((last - first, self.rank))
            column = 0
            for index in self.used:
                rank = lora.ranks[index]
                if index in row.used:
                    values = inputs.values(index, lora.b, (first * rank, last * rank))
                    rows[:, column : column + rank] = values.reshape(-1, rank)
                column += rank
            yield Part(lora.b, first * self.rank, flat(rows))
        yield from self._bias(inputs, row, 0 if copied else 1)


@dataclass(frozen=True, kw_only=True)
class TruncatedGroup(_LoraGroup):
    """The best approximation of the mean at a lower rank (Eckart & Young 1936).

    B = [c_1 s_1 B_1 ...] = Q_B R_B and A^T = [A_1^T ...] = Q_A R_A, so the singular values of B A
    are those of the small R_B R_A^T; each factor gets their square roots.

    Attributes:
        scale: That of the output.
    """

    scale: float

    @property
    def working_nbytes(self) -> int:
        """Those of the factors of all checkpoints, their decompositions, and the core's."""
        total = sum(self.lora.ranks[index] for index in self.used)
        n_in, n_out = self.lora.n_in, self.lora.n_out
        core = min(total, n_in) * min(total, n_out)
        return 8 * (5 * total * (n_in + n_out) + 8 * core)

    def alpha(self, row: CoefficientRow, *, use_rslora: bool) -> Fraction:
        """Return the alpha that gives the output its scale."""
        return alpha_at_rank(1, 1, self.rank, use_rslora=use_rslora) * Fraction(self.scale)

    def compute(
        self, inputs: Inputs, row: CoefficientRow, found: list[Deviation]
    ) -> Iterator[Part]:
        """Yield A and B whole; see ``Group``."""
        lora = self.lora
        left, right = [], []
        for index in row.used:
            share = _share(row, index) * lora.scales[index]
            rank = lora.ranks[index]
            left.append(inputs.values(index, lora.b).reshape(-1, rank) * share)
            right.append(inputs.values(index, lora.a).reshape(rank, -1).T)
        try:
            q_left, r_left = np.linalg.qr(np.concatenate(left, axis=1))
            del left
            q_right, r_right = np.linalg.qr(np.concatenate(right, axis=1))
            del right
            u, sigma, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        except np.linalg.LinAlgError as error:
            raise IncompatibleCheckpointsError(
                f"module '{lora.name}': its product has no singular value decomposition; are its "
                "factors finite?"
            ) from error
        kept = sigma[: self.rank]
        found.append(
            Deviation(lora.name, float(np.sum(sigma[self.rank :] ** 2)), float(np.sum(sigma**2)))
        )
        roots = np.zeros(self.rank)  # an output may have fewer ranks than another has
        roots[: len(kept)] = np.sqrt(kept / abs(self.scale))
        a, b = np.zeros((self.rank, lora.n_in)), np.zeros((lora.n_out, self.rank))
        a[: len(kept)] = vt[: len(kept)] @ q_right.T
        b[:, : len(kept)] = q_left @ u[:, : len(kept)]
        yield Part(lora.a, 0, flat(a * roots[:, None]))
        yield Part(lora.b, 0, flat(b * np.copysign(roots, self.scale)))
        yield from self._bias(inputs, row, self.scale)


@dataclass(frozen=True, kw_only=True)
class MeasuredGroup(_LoraGroup):
    """How far the product of mean factors is from the mean product; the engine makes the factors.

    With one scale s, the mean product less the product of the means is the covariance
    s sum_k c_k (B_k - B)(A_k - A), which keeps its digits where a difference would lose them. Its
    squared norm is the sum of the elementwise product of two small Gram matrices.
    """

    @property
    def outputs(self) -> Mapping[str, TensorInfo]:
        """None: it only measures."""
        return {}

    @property
    def working_nbytes(self) -> int:
        """Those of some rows or columns of all checkpoints, twice, and of four Gram matrices."""
        total = sum(self.lora.ranks[index] for index in self.used)
        return 8 * (8 * max(PART_NUMEL, total) + 6 * total * total)

    def read_nbytes(self, row: CoefficientRow) -> int:
        """Each factor once."""
        return sum(self.lora.nbytes(index) for index in row.used)

    def compute(
        self, inputs: Inputs, row: CoefficientRow, found: list[Deviation]
    ) -> Iterator[Part]:
        """Yield nothing; see ``Group``."""
        lora, rank = self.lora, self.rank
        shares = np.array([_share(row, index) for index in row.used])
        n_used = len(row.used)
        step = max(PART_NUMEL // (rank * n_used), 1)

        def rows_of_b(first: int, last: int) -> Iterator[Array]:
            for index in row.used:
                values = inputs.values(index, lora.b, (first * rank, last * rank))
                yield values.reshape(-1, rank)

        def columns_of_a(first: int, last: int) -> Iterator[Array]:
            spans = [(line * lora.n_in + first, line * lora.n_in + last) for line in range(rank)]
            for index in row.used:
                yield inputs.values(index, lora.a, *spans).reshape(rank, -1).T

        size = n_used * rank
        grams = np.zeros((4, size, size))
        for kind, (numel, read) in enumerate(((lora.n_out, rows_of_b), (lora.n_in, columns_of_a))):
            for first, last in spans_of(numel, step):
                values = np.stack(list(read(first, last)), axis=1)  # (rows, checkpoints, rank)
                mean = np.tensordot(values, shares, axes=(1, 0))
                apart = (values - mean[:, None]).reshape(last - first, size)
                whole = values.reshape(last - first, size)
                grams[kind] += whole.T @ whole
                grams[2 + kind] += apart.T @ apart
        ones = np.repeat(shares * lora.scales[row.used[-1]], rank)
        weights = np.outer(ones, ones)
        total, error = (float(np.sum(weights * grams[n] * grams[n + 1])) for n in (0, 2))
        found.append(Deviation(lora.name, max(error, 0.0), max(total, 0.0)))
        return iter(())


def _share(row: CoefficientRow, index: int) -> float:
    return row.multipliers[index] / row.divisor
