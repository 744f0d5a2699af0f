"""Linear combinations with normal noise of each coordinate's own variance: samples of SWAG.

Only in numpy: the random numbers are the same on every device because one kind of device draws
them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ckptavg.average.buffers import Buffers
from ckptavg.average.floats import BITS, Array, decode_to_float64
from ckptavg.average.normal_numbers import standard_normal
from ckptavg.blocks import Chunk
from ckptavg.coefficients import CoefficientRow, GaussianNoise
from ckptavg.plan import is_batchnorm_statistic
from ckptavg.tensors import DType

_TILE_NUMEL = 2**15  # smaller ones make threads wait for Python's lock
_TILE_ARRAYS = 12  # float64 ones that are held at once while a tile is worked on


@dataclass(frozen=True)
class Spread:
    """The checkpoints that one or more noisy rows take, and those whose variance they have.

    Attributes:
        members: All of them, oldest first.
        moments: Those of the variance; some of the members.
        rows: Row -> its coefficients and its noise.
    """

    members: tuple[int, ...]
    moments: tuple[int, ...]
    rows: dict[int, tuple[CoefficientRow, GaussianNoise]]


def spreads_of(rows: Sequence[CoefficientRow]) -> list[Spread]:
    """Return what must be added up: one spread for all rows that take the same checkpoints."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Spread] = {}
    for number, row in enumerate(rows):
        noise = row.statistic
        if isinstance(noise, GaussianNoise):
            moments = tuple(sorted(set(noise.moments)))
            spread = found.setdefault((row.used, moments), Spread(row.used, moments, {}))
            spread.rows[number] = row, noise
    return list(found.values())


class Tile(NamedTuple):
    """A part of a chunk: its place, and of each tensor in it name, place in it, first element."""

    place: slice
    pieces: list[tuple[str, slice, int]]


class NoisyMeans:
    """Adds up chunks of several checkpoints in float64, and adds noise to the means.

    Use: ``start(chunk)``; ``add`` for each checkpoint, newest first, and ``value`` for the rows
    that it returns. Every coordinate has two sums of its own: of its values, and of the squares of
    their differences from the newest one, because the mean of plain squares less the square of the
    mean loses the variance of values that are close together; with these sums, equal values have
    none.
    """

    def __init__(self, rows: Sequence[CoefficientRow], buffers: Buffers) -> None:
        """Prepare for any number of chunks.

        Args:
            rows: The coefficients, one row an output; those without noise do not count.
            buffers: Where arrays come from.
        """
        self._buffers = buffers
        self._spreads = spreads_of(rows)
        self._spread_of_row = {
            row: number for number, spread in enumerate(self._spreads) for row in spread.rows
        }

    def __contains__(self, row: int) -> bool:
        """Tell whether a row has noise."""
        return row in self._spread_of_row

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk."""
        self._chunk = chunk
        self._tiles = list(_tiles(chunk)) if self._spreads else []

    def add(self, index: int, bits: Array) -> list[int]:
        """Add the elements of checkpoint number ``index``, given as their bits, to every sum.

        Returns:
            The rows that can be computed now.
        """
        complete: list[int] = []
        for number, spread in enumerate(self._spreads):
            if index not in spread.members:
                continue
            if index == spread.members[-1]:
                np.copyto(self._newest(number), bits)
                self._equal(number)[:] = True
            for tile in self._tiles:
                self._add_tile(number, index, bits[tile.place], tile.place)
            if index == spread.members[0]:
                complete.extend(spread.rows)
        return complete

    def value(self, row: int) -> Array:
        """Return a row's mean with its noise, float64; of BatchNorm statistics the plain mean.

        theta + scale * sqrt(max(mean(theta^2) - mean(theta)^2, 0)) * z, z standard normal (Maddox
        et al. 2019, equation 1 without its low-rank term, which is linear in the checkpoints). A
        running variance must not become negative. Coordinates that are equal in all checkpoints
        stay as they are.
        """
        number = self._spread_of_row[row]
        value = self._buffers.array("statistic", np.float64, self._chunk.numel)
        for tile in self._tiles:
            self._finish_tile(number, row, tile, value[tile.place])
        return value

    def _add_tile(self, number: int, index: int, bits: Array, place: slice) -> None:
        spread, dtype = self._spreads[number], self._chunk.dtype
        newest, equal = self._newest(number)[place], self._equal(number)[place]
        np.logical_and(equal, bits == newest, out=equal)
        values = decode_to_float64(bits.view(np.uint8), dtype)
        if index in spread.moments:
            total, squares = (one[place] for one in self._moments(number))
            difference = values - decode_to_float64(newest.view(np.uint8), dtype)
            np.multiply(difference, difference, out=difference)
            if index == spread.moments[-1]:
                np.copyto(total, values)
                np.copyto(squares, difference)
            else:
                np.add(total, values, out=total)
                np.add(squares, difference, out=squares)
        for row, (coefficients, _) in spread.rows.items():
            total = self._linear(row)[place]
            product = values * coefficients.multipliers[index]
            if index == spread.members[-1]:
                np.copyto(total, product)
            else:
                np.add(total, product, out=total)

    def _finish_tile(self, number: int, row: int, tile: Tile, value: Array) -> None:
        spread, dtype, place = self._spreads[number], self._chunk.dtype, tile.place
        coefficients, noise = spread.rows[row]
        newest = decode_to_float64(self._newest(number)[place].view(np.uint8), dtype)
        total, squares = (one[place] for one in self._moments(number))
        mean = total / len(spread.moments)
        np.divide(self._linear(row)[place], coefficients.divisor, out=value)
        for name, where, first in tile.pieces:
            if is_batchnorm_statistic(name):
                value[where] = mean[where]
                continue
            shift = mean[where] - newest[where]
            variance = squares[where] / len(spread.moments) - shift * shift
            deviation = np.sqrt(np.maximum(variance, 0))
            deviation *= noise.scale
            deviation *= standard_normal(
                noise.seed, noise.sample, name, first, first + where.stop - where.start
            )
            value[where] += deviation
        np.copyto(value, newest, where=self._equal(number)[place])

    def _newest(self, number: int) -> Array:
        return self._buffers.array(f"newest{number}", BITS[self._chunk.dtype], self._chunk.numel)

    def _equal(self, number: int) -> Array:
        return self._buffers.array(f"unchanged{number}", np.bool_, self._chunk.numel)

    def _moments(self, number: int) -> tuple[Array, Array]:
        numel = self._chunk.numel
        return (
            self._buffers.array(f"values{number}", np.float64, numel),
            self._buffers.array(f"squares{number}", np.float64, numel),
        )

    def _linear(self, row: int) -> Array:
        return self._buffers.array(f"linear{row}", np.float64, self._chunk.numel)


def _tiles(chunk: Chunk) -> Iterator[Tile]:
    done = 0
    for part in chunk.cut(_TILE_NUMEL * chunk.dtype.itemsize):
        pieces, start = [], 0
        for name, first_byte, last_byte in part.pieces:
            first, last = (one // chunk.dtype.itemsize for one in (first_byte, last_byte))
            pieces.append((name, slice(start, start + last - first), first))
            start += last - first
        yield Tile(slice(done, done + part.numel), pieces)
        done += part.numel


def noisy_nbytes(chunk_nbytes: int, dtype: DType, rows: Sequence[CoefficientRow]) -> int:
    """Return the bytes that ``NoisyMeans`` allocates for such chunks, but for its results."""
    spreads = spreads_of(rows)
    if not spreads:
        return 0
    numel = chunk_nbytes // dtype.itemsize + 2
    per_element = sum(dtype.itemsize + 1 + 8 * (2 + len(spread.rows)) for spread in spreads)
    return numel * per_element + _TILE_ARRAYS * 8 * min(numel, _TILE_NUMEL)
