"""Computes what is computed in groups of tensors, and writes it beside what the engine wrote."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ckptavg.average import Sink
from ckptavg.average.chunks import nonfinite_error, overflow_error
from ckptavg.average.cpu import FIXED_NBYTES
from ckptavg.average.floats import decode_to_float64, encode_from_float64, is_nonfinite
from ckptavg.blocks import Action, TensorPlan
from ckptavg.checkpoint import Checkpoint
from ckptavg.derived import Deviation, Part
from ckptavg.derived.protocol import PART_NUMEL, Array, spans_of
from ckptavg.errors import MemoryBudgetError
from ckptavg.plan import AveragePlan
from ckptavg.tensors import Piece

_FIXED_NBYTES = FIXED_NBYTES + 8 * 8 * PART_NUMEL  # of the engine; what a part is rounded with


class Place(NamedTuple):
    """Where an output tensor goes, and under which names it is found."""

    tensor: TensorPlan
    also: tuple[TensorPlan, ...]


def refuse_too_large(plan: AveragePlan, memory_budget_bytes: int, reading_nbytes: int) -> None:
    """Refuse groups that do not fit the memory, before anything is read.

    Args:
        plan: What will be done.
        memory_budget_bytes: Upper bound for the host memory of all buffers.
        reading_nbytes: How much of it reading ahead takes.

    Raises:
        MemoryBudgetError: Saying which, and what it needs.
    """
    for group in plan.derived.groups:
        needed = _FIXED_NBYTES + group.working_nbytes + plan.read_scratch_nbytes + reading_nbytes
        if needed > memory_budget_bytes:
            raise MemoryBudgetError(
                f"a memory budget of {memory_budget_bytes} bytes is too small: averaging "
                f"'{group.module}' ({group.kind}) needs {needed} bytes (--memory)"
            )


def derive(
    plan: AveragePlan,
    checkpoints: Sequence[Checkpoint],
    sinks: Sequence[Sink],
    progress: Callable[[int], None],
) -> list[list[Deviation]]:
    """Compute every group for every output and write it, each value rounded once.

    Args:
        plan: What to do.
        checkpoints: Those it was made from.
        sinks: One an output.
        progress: Called with bytes read since the last call.

    Returns:
        For each output what deviates from the exact mean.

    Raises:
        CheckpointError: If a checkpoint cannot be read.
        IncompatibleCheckpointsError: If a value is not finite and the recipe does not allow it,
            or a group has no mean.
        OutputError: If the output cannot be written.
    """
    inputs = _Inputs(plan, checkpoints, progress)
    tied: dict[str, list[TensorPlan]] = {}
    for tensor in plan.with_action(Action.ALIAS):
        tied.setdefault(tensor.owner or "", []).append(tensor)
    places = {
        tensor.name: Place(tensor, tuple(tied.get(tensor.name, ())))
        for tensor in plan.with_action(Action.DERIVE)
    }
    found: list[list[Deviation]] = []
    for output, sink in zip(plan.outputs, sinks, strict=True):
        found.append([])
        for group in plan.derived.groups:
            for part in group.compute(inputs, output.row, found[-1]):
                _write(plan, places[part.name], part, sink)
    return found


def _write(plan: AveragePlan, place: Place, part: Part, sink: Sink) -> None:
    dtype = place.tensor.output_dtype
    for first, last in spans_of(len(part.values), PART_NUMEL):
        bits = encode_from_float64(part.values[first:last], dtype)
        if not plan.recipe.allow_nonfinite and is_nonfinite(bits, dtype).any():
            raise overflow_error(part.name, dtype)
        for tensor in (place.tensor, *place.also):
            at = tensor.offset + (part.first + first) * dtype.itemsize
            sink.write(tensor.shard, at, bits.data)


class _Inputs:
    """Implements ``Inputs`` over opened checkpoints."""

    def __init__(
        self,
        plan: AveragePlan,
        checkpoints: Sequence[Checkpoint],
        progress: Callable[[int], None],
    ) -> None:
        self._plan = plan
        self._checkpoints = checkpoints
        self._progress = progress

    def values(self, index: int, name: str, *spans: tuple[int, int]) -> Array:
        checkpoint = self._checkpoints[index]
        info = checkpoint.tensors.get(name) or checkpoint.tensors[checkpoint.aliases[name]]
        size = info.dtype.itemsize
        pieces = [
            Piece(name, first * size, last * size) for first, last in spans or ((0, info.numel),)
        ]
        raw = np.empty(sum(stop - start for _, start, stop in pieces), np.uint8)
        checkpoint.read_into(pieces, raw.data)
        values = decode_to_float64(raw, info.dtype)
        if not self._plan.recipe.allow_nonfinite and not np.isfinite(values).all():
            raise nonfinite_error(self._plan, self._checkpoints, index, name)
        self._progress(len(raw))
        return values
