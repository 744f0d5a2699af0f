"""Tensors that lie in several places: rectangular parts, each saved by the process that held it."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.strided import blocks, is_row_major, read_box, row_major_strides
from ckptavg.errors import CheckpointError, IncompleteCheckpointError
from ckptavg.tensors import TensorInfo

MAX_PARTS = 100_000
_MAX_CELLS = 10_000_000


class Place(NamedTuple):
    """Where a tensor lies: first byte in a file, and strides in elements if not row-major."""

    file: ReadableFile
    offset: int
    strides: tuple[int, ...] | None = None


class Part(NamedTuple):
    """A rectangular part of a tensor: the index of its first element, its shape, its place."""

    first: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


class Rows:
    """Parts that follow each other in row-major order: a byte range is made of theirs."""

    def __init__(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        """Take parts that ``is_rows`` accepts, in order."""
        self.parts = parts
        nbytes = [TensorInfo(info.dtype, part.shape).nbytes for part in parts]
        self._starts = [0]
        for count in nbytes:
            self._starts.append(self._starts[-1] + count)

    def cut(self, start: int, stop: int) -> Iterator[tuple[ReadableFile, int, int]]:
        """Yield file, first byte in it and number of bytes of what makes up a byte range."""
        at = bisect_right(self._starts, start) - 1
        while start < stop:
            begin, end = self._starts[at], self._starts[at + 1]
            place, count = self.parts[at].place, min(stop, end) - start
            if count:
                yield place.file, place.offset + start - begin, count
            start, at = start + count, at + 1


class Boxes:
    """Parts that lie side by side within rows, or not in row-major order."""

    def __init__(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._info = info

    def read(self, start: int, out: memoryview) -> None:
        """Read elements from ``start`` on, counted in row-major order, into ``out``."""
        target = np.frombuffer(out, dtype=f"V{self._info.dtype.itemsize}")
        done = 0
        for block in blocks(self._info.shape, start, start + len(target)):
            sizes = tuple(high - low for low, high in block)
            filled = target[done : done + prod(sizes)].reshape(sizes)
            done += prod(sizes)
            for first, shape, place in self.parts:
                overlap = [
                    (max(low, begin), min(high, begin + size))
                    for (low, high), begin, size in zip(block, first, shape, strict=True)
                ]
                if any(low >= high for low, high in overlap):
                    continue
                read_box(
                    place.file,
                    place.offset,
                    place.strides or row_major_strides(shape),
                    tuple(
                        (low - begin, high - begin)
                        for (low, high), begin in zip(overlap, first, strict=True)
                    ),
                    filled[
                        tuple(
                            slice(low - base, high - base)
                            for (low, high), (base, _) in zip(overlap, block, strict=True)
                        )
                    ],
                )


AnyPlace = Place | Rows | Boxes


def assembled(info: TensorInfo, parts: Sequence[Part], what: str) -> AnyPlace:
    """Return where a tensor lies that was saved in parts.

    Args:
        info: Of the whole tensor.
        parts: In any order; empty ones are left out.
        what: What messages call the tensor: the checkpoint and its name.

    Raises:
        CheckpointError: If the parts do not cover the tensor, each element once.
    """
    parts = sorted((part for part in parts if prod(part.shape)), key=lambda part: part.first)
    check_cover(info, [(part.first, part.shape) for part in parts], what)
    if not parts:
        raise AssertionError("the caller places empty tensors")
    if len(parts) == 1:
        return parts[0].place
    if all(part.place.strides is None and _is_run(info.shape, part.shape) for part in parts):
        return Rows(info, parts)
    return Boxes(info, parts)


def _is_run(whole: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Tell whether the elements of a part lie back to back in the whole tensor."""
    return is_row_major(part, row_major_strides(whole))


def check_cover(
    info: TensorInfo, parts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], what: str
) -> None:
    """Check that parts cover a tensor without overlap: on the grid that their edges draw.

    Args:
        info: Of the whole tensor.
        parts: The index of the first element, and the shape, of each that is not empty.
        what: What messages call the tensor: the checkpoint and its name.

    Raises:
        CheckpointError: If they do not.
    """
    if len(parts) > MAX_PARTS:
        raise CheckpointError(f"{what} is saved in {len(parts)} parts, at most {MAX_PARTS} work")
    if info.dtype.bits % 8:
        raise CheckpointError(f"{what} is of {info.dtype}, whose elements are no whole bytes")
    for first, shape in parts:
        if not len(first) == len(shape) == len(info.shape) or any(
            begin < 0 or begin + size > whole
            for begin, size, whole in zip(first, shape, info.shape, strict=True)
        ):
            raise CheckpointError(
                f"{what} of shape {list(info.shape)} has a part of shape {list(shape)} at "
                f"{list(first)}, which lies outside it"
            )
    cells: list[tuple[int, dict[int, int]]] = []  # axes that are cut: edge -> its number
    for axis in range(len(info.shape)):
        edges = {first[axis] for first, _ in parts}
        edges |= {first[axis] + shape[axis] for first, shape in parts}
        if len(edges) > 2:  # numpy has fewer axes than a tensor may have
            cells.append((axis, {edge: number for number, edge in enumerate(sorted(edges))}))
    sizes = [len(numbers) - 1 for _, numbers in cells]
    if prod(sizes) > _MAX_CELLS:
        raise CheckpointError(f"{what} is saved in {len(parts)} parts that form no grid")
    covered = np.zeros((*sizes, 1), dtype=bool)
    for first, shape in parts:
        inside = covered[
            tuple(
                slice(numbers[first[axis]], numbers[first[axis] + shape[axis]])
                for axis, numbers in cells
            )
        ]
        if inside.any():
            raise CheckpointError(f"{what} has parts that overlap, one of them at {list(first)}")
        inside[...] = True
    found = sum(prod(shape) for _, shape in parts)
    if found != info.numel:
        raise IncompleteCheckpointError(
            f"{what} has {info.numel} elements, but its parts hold {found}: a file of the "
            "checkpoint is missing or unfinished"
        )
