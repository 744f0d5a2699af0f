"""Chunks that need more than a sum: copied integers, and results that are not finite."""

from collections.abc import Iterator, Mapping, Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ckptavg.average.floats import (
    BITS,
    Array,
    bits_view,
    decode_to_float64,
    encode_from_float64,
    is_nonfinite,
)
from ckptavg.average.order_statistics import order_statistic
from ckptavg.average.work import Job
from ckptavg.blocks import Chunk, Differing
from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import GaussianNoise, Trimmed
from ckptavg.errors import IncompatibleCheckpointsError
from ckptavg.plan import AveragePlan
from ckptavg.tensors import FLOAT64, DType, Piece

_PART_NUMEL = 2**16
_REPAIRING = Lock()


def take_chunk(job: Job, chunk: Chunk) -> Differing:
    """Copy a chunk from the checkpoints that the plan names; return what differs from them.

    Raises:
        IncompatibleCheckpointsError: If something differs and the recipe refuses that.
    """
    plan = job.plan
    kept = {output.take_from: np.empty(chunk.nbytes, np.uint8) for output in plan.outputs}
    for index, raw in kept.items():
        job.checkpoints[index].read_into(chunk.pieces, raw.data)
    differing: Differing = set()
    other = np.empty(chunk.nbytes, np.uint8)
    for index in plan.used_checkpoints:
        raw = kept.get(index, other)
        if raw is other:
            job.checkpoints[index].read_into(chunk.pieces, other.data)
        for taken_from, chosen in kept.items():
            rows = [
                row
                for row, output in enumerate(plan.outputs)
                if output.take_from == taken_from and index in output.row.used
            ]
            if not rows or raw is chosen or np.array_equal(raw, chosen):
                continue
            names = _differing_names(chunk, raw, chosen)
            if plan.recipe.buffers == "refuse":
                raise IncompatibleCheckpointsError(
                    f"'{names[0]}' of {chunk.dtype} differs between {plan.labels[index]} and "
                    f"{plan.labels[taken_from]} (--buffers last takes the last)"
                )
            differing.update((row, name) for row in rows for name in names)
    for row, output in enumerate(plan.outputs):
        job.write(row, chunk, kept[output.take_from].data)
    return differing


def repair_nonfinite(job: Job, chunk: Chunk, row: int, output: memoryview) -> bytes:
    """Put right, or refuse, the elements of an output chunk that infinity or NaN had a part in.

    Reads the inputs of the chunk again, a part at a time and in one thread at a time, so that it
    needs little memory. Infinities that all checkpoints share (masks) are kept; a sum that
    overflowed although its mean does not is taken again in float64. An order statistic may be
    finite where checkpoints are not.

    Raises:
        IncompatibleCheckpointsError: If a checkpoint holds a non-finite value, or the mean
            overflows the output dtype, and the recipe does not allow it.
    """
    bits = bits_view(np.frombuffer(output, np.uint8), chunk.output_dtype).copy()
    coefficients = job.plan.outputs[row].row
    order = coefficients.statistic if isinstance(coefficients.statistic, Trimmed) else None
    numel = _PART_NUMEL if order is None else _PART_NUMEL // len(coefficients.used)
    done = 0
    with _REPAIRING:
        for chunk_part in chunk.cut(numel * chunk.dtype.itemsize):
            part = bits[done : done + chunk_part.numel]
            done += chunk_part.numel
            if order is not None:
                _repair_order(job, chunk_part, coefficients.used, order, part)
                continue
            suspects = np.flatnonzero(is_nonfinite(part, chunk.output_dtype))
            if len(suspects):
                part[suspects] = _repaired(job, chunk_part, row, suspects, part[suspects])
    return bits.tobytes()


@np.errstate(all="ignore")
def _repair_order(
    job: Job, chunk: Chunk, used: Sequence[int], statistic: Trimmed, output: Array
) -> None:
    """Put right the elements of an order statistic where any checkpoint is not finite."""
    allow_nonfinite = job.plan.recipe.allow_nonfinite
    stack = np.empty((len(used), chunk.numel), BITS[chunk.dtype])
    for number, index in enumerate(used):
        job.checkpoints[index].read_into(chunk.pieces, stack[number].view(np.uint8).data)
    bad = is_nonfinite(stack, chunk.dtype)
    suspects = np.flatnonzero(bad.any(axis=0) | is_nonfinite(output, chunk.output_dtype))
    if not len(suspects):
        return
    stack, bad = np.ascontiguousarray(stack[:, suspects]), bad[:, suspects]
    first = stack[0]
    is_infinite = np.isinf(decode_to_float64(first.view(np.uint8), chunk.dtype))
    shared = (stack == first).all(axis=0) & (allow_nonfinite | is_infinite)
    if not allow_nonfinite:
        _refuse_nonfinite(job, chunk, suspects, dict(zip(used, bad, strict=True)), shared)
    repaired = order_statistic(stack, statistic.n_cut, chunk.dtype, chunk.output_dtype)
    _refuse_overflow(job, chunk, suspects, repaired, shared)
    if chunk.dtype is chunk.output_dtype:
        repaired[shared] = first[shared]
    output[suspects] = repaired


@np.errstate(all="ignore")
def _repaired(job: Job, chunk: Chunk, row: int, suspects: NDArray[np.intp], output: Array) -> Array:
    """Return the right bits for the suspect elements of a chunk, whose output so far is given."""
    plan, checkpoints, pieces = job.plan, job.checkpoints, chunk.pieces
    coefficients = plan.outputs[row].row
    used = coefficients.used
    raw = np.empty(chunk.nbytes, np.uint8)
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
        _refuse_nonfinite(job, chunk, suspects, bad_in, shared)
    if isinstance(coefficients.statistic, GaussianNoise):  # there is no noise without a variance
        total = decode_to_float64(output.view(np.uint8), chunk.output_dtype)
    total[shared] = values_of(first)[shared]
    repaired = encode_from_float64(total, chunk.output_dtype)
    _refuse_overflow(job, chunk, suspects, repaired, shared)
    if chunk.dtype is chunk.output_dtype:  # to the bit, also the payload of a NaN
        repaired[shared] = first[shared]
    return repaired


def _refuse_nonfinite(
    job: Job,
    chunk: Chunk,
    suspects: NDArray[np.intp],
    bad_in: Mapping[int, Array],
    shared: Array,
) -> None:
    """Refuse what is not finite in a checkpoint, unless all share it."""
    for index, bad in bad_in.items():
        refused = bad & ~shared
        if refused.any():
            name = first_name(chunk, suspects[refused])
            raise nonfinite_error(job.plan, job.checkpoints, index, name)


def _refuse_overflow(
    job: Job, chunk: Chunk, suspects: NDArray[np.intp], output: Array, shared: Array
) -> None:
    """Refuse an output that is not finite though the checkpoints are."""
    overflowed = is_nonfinite(output, chunk.output_dtype) & ~shared
    if overflowed.any() and not job.plan.recipe.allow_nonfinite:
        name = first_name(chunk, suspects[overflowed])
        raise overflow_error(name, chunk.output_dtype)


def nonfinite_error(
    plan: AveragePlan, checkpoints: Sequence[Checkpoint], index: int, name: str
) -> IncompatibleCheckpointsError:
    """Return the error for a tensor of a checkpoint that holds infinity or NaN."""
    return IncompatibleCheckpointsError(
        f"{checkpoints[index].label}: tensor '{name}' in checkpoint {index + 1} of "
        f"{plan.n_checkpoints} has {_count_nonfinite(checkpoints[index], name)} "
        "non-finite values (infinity or NaN); leave that checkpoint out, or pass "
        "--allow-nonfinite"
    )


def overflow_error(name: str, dtype: DType) -> IncompatibleCheckpointsError:
    """Return the error for a tensor whose average has values that its output dtype has not."""
    remedy = "" if dtype is FLOAT64 else "choose a wider --dtype, or "
    return IncompatibleCheckpointsError(
        f"tensor '{name}': averaged values overflow {dtype}; {remedy}pass --allow-nonfinite"
    )


def _count_nonfinite(checkpoint: Checkpoint, name: str) -> int:
    """Return how many elements of one tensor are infinite or NaN."""
    info = checkpoint.tensors.get(name) or checkpoint.tensors[checkpoint.aliases[name]]
    dtype = info.dtype.part
    count, step = 0, _PART_NUMEL * dtype.itemsize
    for start in range(0, info.nbytes, step):
        raw = np.empty(min(step, info.nbytes - start), np.uint8)
        checkpoint.read_into([Piece(name, start, start + len(raw))], raw.data)
        count += int(is_nonfinite(bits_view(raw, dtype), dtype).sum())
    return count


def _differing_names(chunk: Chunk, one: Array, other: Array) -> list[str]:
    """Return the names of the tensors in a chunk whose bytes differ."""
    itemsize = chunk.dtype.itemsize
    return [
        name
        for name, elements in _tensors_of(chunk)
        if not np.array_equal(
            one[elements.start * itemsize : elements.stop * itemsize],
            other[elements.start * itemsize : elements.stop * itemsize],
        )
    ]


def _tensors_of(chunk: Chunk) -> Iterator[tuple[str, slice]]:
    """Yield the tensors in a chunk, each with its elements' place in it."""
    start = 0
    for name, first, last in chunk.pieces:
        stop = start + (last - first) // chunk.dtype.itemsize
        yield name, slice(start, stop)
        start = stop


def first_name(chunk: Chunk, elements: NDArray[np.intp]) -> str:
    """Return the tensor that the first of some elements of a chunk belongs to."""
    return next(name for name, place in _tensors_of(chunk) if elements[0] < place.stop)
