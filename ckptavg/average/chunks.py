"""Chunks that need more than a sum: copied integers, and results that are not finite."""

from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ckptavg.average.floats import (
    Array,
    bits_view,
    decode_to_float64,
    encode_from_float64,
    is_nonfinite,
)
from ckptavg.average.work import Sink
from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import IncompatibleCheckpointsError
from ckptavg.plan import AveragePlan, Chunk
from ckptavg.tensors import COMPLEX64, FLOAT32, FLOAT64, Piece

_PART_NUMEL = 2**16
_REPAIRING = Lock()


def take_chunk(
    plan: AveragePlan, chunk: Chunk, checkpoints: Sequence[Checkpoint], sinks: Sequence[Sink]
) -> list[str]:
    """Copy a chunk from the checkpoint that the recipe names; return names of tensors that differ.

    Raises:
        IncompatibleCheckpointsError: If they differ and the recipe refuses that.
    """
    chosen = np.empty(chunk.nbytes, np.uint8)
    other = np.empty(chunk.nbytes, np.uint8)
    checkpoints[plan.take_from].read_into(chunk.pieces, chosen.data)
    differing: dict[str, None] = {}
    for index, checkpoint in enumerate(checkpoints):
        if index == plan.take_from:
            continue
        checkpoint.read_into(chunk.pieces, other.data)
        if np.array_equal(chosen, other):
            continue
        for name, elements in _tensors_of(chunk.pieces, chunk.dtype.itemsize):
            bytes_ = slice(
                elements.start * chunk.dtype.itemsize, elements.stop * chunk.dtype.itemsize
            )
            if not np.array_equal(chosen[bytes_], other[bytes_]):
                differing[name] = None
                if plan.recipe.buffers == "refuse":
                    raise IncompatibleCheckpointsError(
                        f"'{name}' of {chunk.dtype} differs between {checkpoint.label} and "
                        f"{checkpoints[plan.take_from].label} (--buffers last takes the last)"
                    )
    for sink in sinks:
        for shard, offset in chunk.destinations:
            sink.write(shard, offset, chosen.data)
    return list(differing)


def repair_nonfinite(
    plan: AveragePlan,
    chunk: Chunk,
    checkpoints: Sequence[Checkpoint],
    row: int,
    output: memoryview,
) -> bytes:
    """Put right, or refuse, the elements of an output chunk that are infinite or NaN.

    Reads the inputs of the chunk again, a part at a time and in one thread at a time, so that it
    needs little memory. Infinities that all checkpoints share (masks) are kept; a sum that
    overflowed although its mean does not is taken again in float64.

    Raises:
        IncompatibleCheckpointsError: If a checkpoint holds a non-finite value, or the mean
            overflows the output dtype, and the recipe does not allow it.
    """
    bits = bits_view(np.frombuffer(output, np.uint8), chunk.output_dtype).copy()
    with _REPAIRING:
        for start in range(0, chunk.numel, _PART_NUMEL):
            part = bits[start : start + _PART_NUMEL]
            suspects = np.flatnonzero(is_nonfinite(part, chunk.output_dtype))
            if len(suspects):
                pieces = _cut_pieces(chunk, start, start + len(part))
                part[suspects] = _repaired(plan, chunk, pieces, checkpoints, row, suspects)
    return bits.tobytes()


@np.errstate(all="ignore")
def _repaired(
    plan: AveragePlan,
    chunk: Chunk,
    pieces: Sequence[Piece],
    checkpoints: Sequence[Checkpoint],
    row: int,
    suspects: NDArray[np.intp],
) -> Array:
    """Return the right bits for the suspect elements of some pieces of a chunk."""
    coefficients = plan.rows[row]
    used = [index for index, value in enumerate(coefficients.multipliers) if value != 0]
    raw = np.empty(sum(stop - start for _, start, stop in pieces), np.uint8)
    # float64 values are divided before they are added: their sum may overflow though the mean fits
    before, after = (
        (coefficients.divisor, 1) if chunk.dtype is FLOAT64 else (1, coefficients.divisor)
    )

    def suspect_bits(index: int) -> Array:
        checkpoints[index].read_into(pieces, raw.data)
        return bits_view(raw, chunk.dtype)[suspects]

    def values_of(some: Array) -> Array:
        return decode_to_float64(some.view(np.uint8), chunk.dtype)

    first = suspect_bits(used[0])
    total = values_of(first) * (coefficients.multipliers[used[0]] / before)
    equal = np.ones(len(suspects), np.bool_)
    bad_in: dict[int, Array] = {used[0]: ~np.isfinite(values_of(first))}
    for index in used[1:]:
        other = suspect_bits(index)
        values = values_of(other)
        equal &= other == first
        total += values * (coefficients.multipliers[index] / before)
        if not np.isfinite(values).all():
            bad_in[index] = ~np.isfinite(values)
    total /= after
    shared = equal & (plan.recipe.allow_nonfinite | np.isinf(values_of(first)))
    if not plan.recipe.allow_nonfinite:
        for index, bad in bad_in.items():
            bad &= ~shared
            if bad.any():
                name = _first_name(pieces, chunk.dtype.itemsize, suspects[bad])
                raise IncompatibleCheckpointsError(
                    f"{checkpoints[index].label}: tensor '{name}' in checkpoint {index + 1} of "
                    f"{plan.n_checkpoints} has {_count_nonfinite(checkpoints[index], name)} "
                    "non-finite values (infinity or NaN); leave that checkpoint out, or pass "
                    "--allow-nonfinite"
                )
    total[shared] = values_of(first)[shared]
    repaired = encode_from_float64(total, chunk.output_dtype)
    overflowed = is_nonfinite(repaired, chunk.output_dtype) & ~shared
    if overflowed.any() and not plan.recipe.allow_nonfinite:
        name = _first_name(pieces, chunk.dtype.itemsize, suspects[overflowed])
        remedy = "" if chunk.output_dtype is FLOAT64 else "choose a wider --dtype, or "
        raise IncompatibleCheckpointsError(
            f"tensor '{name}': averaged values overflow {chunk.output_dtype}; {remedy}pass "
            "--allow-nonfinite"
        )
    if chunk.dtype is chunk.output_dtype:  # to the bit, also the payload of a NaN
        repaired[shared] = first[shared]
    return repaired


def _count_nonfinite(checkpoint: Checkpoint, name: str) -> int:
    """Return how many elements of one tensor are infinite or NaN."""
    info = checkpoint.tensors.get(name) or checkpoint.tensors[checkpoint.aliases[name]]
    dtype = FLOAT32 if info.dtype is COMPLEX64 else info.dtype
    count, step = 0, _PART_NUMEL * dtype.itemsize
    for start in range(0, info.nbytes, step):
        raw = np.empty(min(step, info.nbytes - start), np.uint8)
        checkpoint.read_into([Piece(name, start, start + len(raw))], raw.data)
        count += int(is_nonfinite(bits_view(raw, dtype), dtype).sum())
    return count


def _cut_pieces(chunk: Chunk, first: int, last: int) -> list[Piece]:
    """Return the pieces of a chunk's elements ``[first, last)``."""
    begin, end = first * chunk.dtype.itemsize, last * chunk.dtype.itemsize
    pieces, at = [], 0
    for name, start, stop in chunk.pieces:
        low, high = max(begin - at, 0), min(end - at, stop - start)
        if low < high:
            pieces.append(Piece(name, start + low, start + high))
        at += stop - start
    return pieces


def _tensors_of(pieces: Sequence[Piece], itemsize: int) -> Iterator[tuple[str, slice]]:
    """Yield the tensors in some pieces, each with its elements' place among them."""
    start = 0
    for name, first, last in pieces:
        stop = start + (last - first) // itemsize
        yield name, slice(start, stop)
        start = stop


def _first_name(pieces: Sequence[Piece], itemsize: int, elements: NDArray[np.intp]) -> str:
    """Return the tensor that the first of some elements belongs to."""
    return next(name for name, place in _tensors_of(pieces, itemsize) if elements[0] < place.stop)
