"""In which dtype and order values are summed, and what that promises; the same on every device."""

from collections.abc import Sequence
from dataclasses import dataclass

from ckptavg.coefficients import CoefficientRow
from ckptavg.tensors import FLOAT32, FLOAT64, DType


def accumulate_dtype(dtype: DType, accumulate: str) -> DType:
    """Return the dtype in which inputs of a dtype are summed.

    float32 sums of 16-bit values, divided once, are correctly rounded wherever the sum is exact;
    float32 inputs need float64 sums for that. float64 inputs are never summed in less.
    """
    if dtype is FLOAT64:
        return FLOAT64
    if accumulate == "auto":
        return FLOAT64 if dtype is FLOAT32 else FLOAT32
    return FLOAT64 if accumulate == "float64" else FLOAT32


def keeps_equal_by_rounding(dtype: DType, accumulate: DType) -> bool:
    """Tell whether the mean of equal values is that value without further care.

    It is where the sum has more bits than the values. Elsewhere the equal ones are put back.
    """
    return accumulate.bits > dtype.bits


@dataclass(frozen=True, slots=True)
class RunningSum:
    """A sum over checkpoints, newest first, that passes through the totals of one or more rows.

    The mean of the last 5 checkpoints is on the way to the mean of the last 20: both rows share
    one sum, with the same bits as a sum of each one's own.

    Attributes:
        multipliers: Checkpoint index -> multiplier, in the order of summation.
        complete: Checkpoint index -> the rows whose total is there once it has been added.
    """

    multipliers: dict[int, float]
    complete: dict[int, tuple[int, ...]]

    @property
    def newest(self) -> int:
        """Index of the checkpoint that starts the sum."""
        return next(iter(self.multipliers))

    @property
    def goes_on(self) -> bool:
        """Whether a row's total must be left as it is, for another row."""
        return sum(map(len, self.complete.values())) > 1


def running_sums(rows: Sequence[CoefficientRow]) -> list[RunningSum]:
    """Return as few sums as give the totals of all rows but those that take a statistic."""
    terms = {
        number: [(index, row.multipliers[index]) for index in reversed(row.used)]
        for number, row in enumerate(rows)
        if row.statistic is None
    }
    sums: list[RunningSum] = []
    for row in sorted(terms, key=lambda row: -len(terms[row])):  # longest first
        for found in sums:
            if list(found.multipliers.items())[: len(terms[row])] == terms[row]:
                break
        else:
            found = RunningSum(dict(terms[row]), {})
            sums.append(found)
        last = terms[row][-1][0]
        found.complete[last] = (*found.complete.get(last, ()), row)
    return sums


def needs_products(sums: Sequence[RunningSum]) -> bool:
    """Tell whether values are multiplied before they are added."""
    return any(value != 1 for one in sums for value in list(one.multipliers.values())[1:])


def sum_of_row(sums: Sequence[RunningSum]) -> dict[int, int]:
    """Return for each row the number of the sum that passes through its total."""
    return {
        row: number
        for number, one in enumerate(sums)
        for rows in one.complete.values()
        for row in rows
    }
