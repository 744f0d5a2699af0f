"""What is sorted for order statistics, and by which comparisons; the same on every device.

Floats are sorted as signed integers of their width, the keys: the bits of a float, where it is
negative all but the sign turned over. Their order is that of the values, -0 before +0, with NaN at
both ends by its sign: -NaN < -inf < ... < -0 < +0 < ... < +inf < NaN. Turning over twice gives the
bits back.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from ckptavg.coefficients import CoefficientRow, Trimmed

Row = TypeVar("Row")


class Comparator(NamedTuple):
    """Puts the smaller of two values at ``low``, the larger at ``high``.

    Only one of them is computed where nothing later needs the other.
    """

    low: int
    high: int
    keeps_low: bool
    keeps_high: bool


def sorting_network(n: int, ranks: Collection[int]) -> list[Comparator]:
    """Return comparators that bring the values of some ranks to their places among n.

    Batcher's odd-even merge sort (Knuth, The Art of Computer Programming 3, 5.2.2, Algorithm M),
    which takes any n, without what the ranks do not need.

    Args:
        n: How many values.
        ranks: The places, from 0, that must come out right.
    """
    pairs = [
        (first, first + step)
        for size in _powers_below(n)
        for step in (size >> shift for shift in range(size.bit_length()))
        for start in range(step % size, n - step, 2 * step)
        for first in range(start, min(start + step, n - step))
        if first // (2 * size) == (first + step) // (2 * size)
    ]
    needed, comparators = set(ranks), []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            comparators.append(Comparator(low, high, low in needed, high in needed))
            needed |= {low, high}
    return comparators[::-1]


def sort_rows(
    comparators: Sequence[Comparator],
    rows: Sequence[Row],
    spare: Row,
    minimum: Callable[..., Any],
    maximum: Callable[..., Any],
) -> list[Row]:
    """Sort across rows, element by element, in place.

    Args:
        comparators: From ``sorting_network``.
        rows: One array of keys a value.
        spare: Another one of that size; its content is lost.
        minimum: ``numpy.minimum`` or ``torch.minimum``.
        maximum: Likewise.

    Returns:
        The rows, and the spare one among them, in their new order.
    """
    rows = list(rows)
    for low, high, keeps_low, keeps_high in comparators:
        if keeps_low and keeps_high:
            minimum(rows[low], rows[high], out=spare)
            maximum(rows[low], rows[high], out=rows[high])
            rows[low], spare = spare, rows[low]
        elif keeps_low:
            minimum(rows[low], rows[high], out=rows[low])
        else:
            maximum(rows[low], rows[high], out=rows[high])
    return rows


@dataclass(frozen=True)
class Stack:
    """A chunk of several checkpoints that is sorted for one or more rows.

    Attributes:
        members: The checkpoints, oldest first.
        kept: Row -> the ranks whose mean it is.
    """

    members: tuple[int, ...]
    kept: dict[int, range]

    @cached_property
    def comparators(self) -> list[Comparator]:
        """What sorts it, as far as its rows need."""
        ranks = {rank for kept in self.kept.values() for rank in kept}
        return sorting_network(len(self.members), ranks)


def stacks_of(rows: Sequence[CoefficientRow]) -> list[Stack]:
    """Return what must be sorted: one stack for all rows that take the same checkpoints."""
    kept: dict[tuple[int, ...], dict[int, range]] = {}
    for number, row in enumerate(rows):
        if isinstance(row.statistic, Trimmed):
            n, n_cut = len(row.used), row.statistic.n_cut
            kept.setdefault(row.used, {})[number] = range(n_cut, n - n_cut)
    return [Stack(members, rows_of) for members, rows_of in kept.items()]


def _powers_below(n: int) -> list[int]:
    """Return 1, 2, 4, ... below n."""
    return [1 << power for power in range((n - 1).bit_length())] if n > 1 else []
