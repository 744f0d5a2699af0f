"""Row-major bytes out of tensors whose storage is laid out otherwise.

Models trained channels-last, or with transposed parameters, leave views whose strides are not
row-major. Any range of their row-major data is put together from blocks small enough to read
through a bounded scratch buffer.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.protocol import READ_SCRATCH_BYTES
from ckptavg.tensors import TensorInfo

_MAX_BITS = 2**64
_MAX_SIZE = 2**63
Block = tuple[tuple[int, int], ...]  # one half-open index range a dimension


def is_impossible(info: TensorInfo) -> bool:
    """Tell whether sizes or strides of a tensor leave what libraries compute in.

    Element by element: a 0 further on must not hide an overflow.
    """
    bits = info.dtype.bits
    for size in info.shape:
        bits *= max(size, 1)
        if bits >= _MAX_BITS or size >= _MAX_SIZE:
            return True
    return False


def is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether a view's elements lie back to back in row-major order."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, that torch gives a tensor in row-major order."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return how many storage elements a view spans, from its first to its last element."""
    if prod(shape) == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def read_strided(
    file: ReadableFile,
    data_offset: int,
    itemsize: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    start: int,
    out: memoryview,
) -> None:
    """Read elements of a strided view in row-major order.

    Args:
        file: Where the storage lies.
        data_offset: Position in the file of the view's first element.
        itemsize: Bytes per element.
        shape: The view's shape.
        strides: Its strides, in elements.
        start: First element, counted in row-major order.
        out: Writable bytes for the elements from there on; a whole number of elements.
    """
    target = np.frombuffer(out, dtype=f"V{itemsize}")
    done = 0
    for block in blocks(shape, start, start + len(target)):
        sizes = tuple(high - low for low, high in block)
        count = prod(sizes)
        read_box(file, data_offset, strides, block, target[done : done + count].reshape(sizes))
        done += count


def read_box(
    file: ReadableFile,
    data_offset: int,
    strides: tuple[int, ...],
    box: Block,
    out: NDArray[Any],
) -> None:
    """Read a rectangular part of a strided view.

    Args:
        file: Where the storage lies.
        data_offset: Position in the file of the view's first element.
        strides: The view's strides, in elements.
        box: Index ranges in the view.
        out: Receives the elements; of the box's shape, and of a dtype as wide as an element.
    """
    itemsize = out.itemsize
    for part, place in _split(box, strides, READ_SCRATCH_BYTES // itemsize):
        sizes = tuple(stop - first for first, stop in part)
        first_element = sum(low * stride for (low, _), stride in zip(part, strides, strict=True))
        scratch = bytearray(extent(sizes, strides) * itemsize)
        file.read_into(data_offset + first_element * itemsize, [memoryview(scratch)])
        out[place] = np.ndarray(
            sizes, out.dtype, scratch, strides=tuple(stride * itemsize for stride in strides)
        )


def blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Block]:
    """Cut a row-major range of elements into rectangular blocks, in order."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if first == last:
        yield from (((first, first + 1), *rest) for rest in blocks(shape[1:], head, tail))
        return
    if head:
        yield from (((first, first + 1), *rest) for rest in blocks(shape[1:], head, inner))
        first += 1
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    if tail:
        yield from (((last, last + 1), *rest) for rest in blocks(shape[1:], 0, tail))


def _split(
    block: Block, strides: tuple[int, ...], max_elements: int
) -> Iterator[tuple[Block, tuple[slice, ...]]]:
    """Halve a block along its widest dimension until each part spans few storage elements.

    Yields each part with its place inside the block.
    """
    pending = [block]
    while pending:
        part = pending.pop()
        sizes = tuple(high - low for low, high in part)
        if extent(sizes, strides) <= max_elements or prod(sizes) == 1:
            place = tuple(
                slice(low - base, high - base)
                for (low, high), (base, _) in zip(part, block, strict=True)
            )
            yield part, place
            continue
        spans = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)]
        widest = spans.index(max(spans))
        low, high = part[widest]
        middle = (low + high) // 2
        for half in ((low, middle), (middle, high)):
            pending.append((*part[:widest], half, *part[widest + 1 :]))
