"""Chunks that need more than a sum: copied integers, and results that are not finite."""

from collections.abc import Iterator, Sequence

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
        for name, elements in _tensors_of(chunk, chunk.dtype.itemsize):
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


@np.errstate(all="ignore")
def repair_nonfinite(
    plan: AveragePlan,
    chunk: Chunk,
    checkpoints: Sequence[Checkpoint],
    row: int,
    output: memoryview,
) -> bytes:
    """Put right, or refuse, the elements of an output chunk that are infinite or NaN.

    Reads the inputs of the chunk again. Infinities that all checkpoints share (masks) are kept;
    a sum that overflowed although its mean does not is taken again in float64.

    Raises:
        IncompatibleCheckpointsError: If a checkpoint holds a non-finite value, or the mean
            overflows the output dtype, and the recipe does not allow it.
    """
    bits = bits_view(np.frombuffer(output, np.uint8), chunk.output_dtype).copy()
    suspects = np.flatnonzero(is_nonfinite(bits, chunk.output_dtype))
    coefficients = plan.rows[row]
    used = [index for index, value in enumerate(coefficients.multipliers) if value != 0]
    raw = np.empty(chunk.nbytes, np.uint8)

    def suspects_of(index: int) -> tuple[Array, Array]:  # bits and values
        checkpoints[index].read_into(chunk.pieces, raw.data)
        return bits_view(raw, chunk.dtype)[suspects], decode_to_float64(raw, chunk.dtype)[suspects]

    first_bits, first_values = suspects_of(used[0])
    equal = np.ones(len(suspects), np.bool_)
    total = first_values * coefficients.multipliers[used[0]]
    for index in used[1:]:
        other_bits, values = suspects_of(index)
        equal &= other_bits == first_bits
        total = total + values * coefficients.multipliers[index]
    total = total / coefficients.divisor
    shared_infinity = equal & np.isinf(first_values)
    total[shared_infinity] = first_values[shared_infinity]
    if not plan.recipe.allow_nonfinite:
        for index in used:
            values = suspects_of(index)[1]
            bad = ~np.isfinite(values) & ~shared_infinity
            if bad.any():
                name, count = _first_name(chunk, suspects[bad])
                position = f"checkpoint {index + 1} of {plan.n_checkpoints}"
                raise IncompatibleCheckpointsError(
                    f"{checkpoints[index].label}: tensor '{name}' in {position} has {count} "
                    "non-finite values (infinity or NaN); leave that checkpoint out, or pass "
                    "--allow-nonfinite"
                )
    repaired = encode_from_float64(total, chunk.output_dtype)
    overflowed = is_nonfinite(repaired, chunk.output_dtype) & ~shared_infinity
    if overflowed.any() and not plan.recipe.allow_nonfinite:
        name, count = _first_name(chunk, suspects[overflowed])
        raise IncompatibleCheckpointsError(
            f"tensor '{name}': {count} averaged values overflow {chunk.output_dtype}; choose a "
            "wider --dtype, or pass --allow-nonfinite"
        )
    bits[suspects] = repaired
    return bits.tobytes()


def _tensors_of(chunk: Chunk, itemsize: int) -> Iterator[tuple[str, slice]]:
    """Yield the tensors in a chunk, each with its elements' place in the chunk."""
    start = 0
    for name, first, last in chunk.pieces:
        stop = start + (last - first) // itemsize
        yield name, slice(start, stop)
        start = stop


def _first_name(chunk: Chunk, elements: NDArray[np.intp]) -> tuple[str, int]:
    """Return the tensor that the first of some elements belongs to, and how many of them it has."""
    for name, place in _tensors_of(chunk, chunk.dtype.itemsize):
        count = int(((elements >= place.start) & (elements < place.stop)).sum())
        if count:
            return name, count
    raise AssertionError("elements lie inside the chunk")  # they were found in it
