"""Checkpoints that differ in float dtypes, read in one that holds every value of all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptavg.checkpoint.protocol import READ_SCRATCH_BYTES, Checkpoint
from ckptavg.checkpoint.wrapped import WrappedCheckpoint
from ckptavg.tensors import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    DType,
    Piece,
    TensorInfo,
)

Array = NDArray[Any]

_BLOCK_NUMEL = READ_SCRATCH_BYTES // 32  # of at most 20 bytes each while they are widened
_NUMPY_DTYPES = {FLOAT16: np.float16, FLOAT32: np.float32, FLOAT64: np.float64}


def widen_dtypes(checkpoints: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
    """Read tensors whose float dtypes differ in the narrowest dtype that holds them all exactly.

    Args:
        checkpoints: Opened checkpoints, under names that agree.

    Returns:
        The checkpoints, and one note for each that is widened; integers, complex numbers and
        quantised tensors stay as they are.
    """
    common = _common_dtypes(checkpoints)
    found: list[Checkpoint] = []
    notes = []
    for checkpoint in checkpoints:
        wide = {
            name: common[name]
            for name in (*checkpoint.tensors, *checkpoint.aliases)
            if name in common and common[name] is not _dtype(checkpoint, name)
        }
        if not wide:
            found.append(checkpoint)
            continue
        found.append(WidenedCheckpoint(checkpoint, wide))
        into = sorted({dtype.name for dtype in wide.values()})
        notes.append(
            f"{checkpoint.label}: {sum(name in wide for name in checkpoint.tensors)} tensors are "
            f"widened to {' and '.join(into)}, which {'holds' if len(into) == 1 else 'hold'} them "
            "exactly: the checkpoints differ in dtype"
        )
    return found, notes


def _common_dtypes(checkpoints: Sequence[Checkpoint]) -> dict[str, DType]:
    """Return the common dtype of what is a float everywhere; that of tied tensors is one, too."""
    common: dict[str, DType] = {}
    others: set[str] = set()  # not a float everywhere

    def join(name: str, dtype: DType) -> bool:
        known = common.setdefault(name, dtype)
        common[name] = _joined(known, dtype)
        return common[name] is not known

    for checkpoint in checkpoints:
        for name in (*checkpoint.tensors, *checkpoint.aliases):
            dtype = _dtype(checkpoint, name)
            if dtype is not None and dtype.kind == "float":
                join(name, dtype)
            else:
                others.add(name)
    ties = {tie for checkpoint in checkpoints for tie in checkpoint.aliases.items()}
    is_settled = False
    while not is_settled:  # soon: dtypes only widen
        widenings = [
            join(one, common[other])
            for tie in ties
            for one, other in (tie, tie[::-1])
            if other in common
        ]
        is_settled = not any(widenings)
    return {name: dtype for name, dtype in common.items() if name not in others}


def _joined(one: DType, other: DType) -> DType:
    if {one, other} == {FLOAT16, BFLOAT16}:  # neither holds the other
        return FLOAT32
    return max(one, other, key=lambda dtype: dtype.bits)


def _dtype(checkpoint: Checkpoint, name: str) -> DType | None:
    info = checkpoint.tensors.get(name) or checkpoint.tensors.get(checkpoint.aliases.get(name, ""))
    return info.dtype if info else None


class WidenedCheckpoint(WrappedCheckpoint):
    """A checkpoint some of whose tensors are widened while they are read."""

    def __init__(self, checkpoint: Checkpoint, wide: Mapping[str, DType]) -> None:
        """Read the tensors named in ``wide``, stored or tied, in the dtypes given there."""
        super().__init__(checkpoint)
        self._conversion = {
            name: (_dtype(checkpoint, name) or dtype, dtype) for name, dtype in wide.items()
        }
        self.tensors = {
            name: TensorInfo(wide.get(name, info.dtype), info.shape)
            for name, info in checkpoint.tensors.items()
        }

    @property
    def read_scratch_nbytes(self) -> int:
        """That of the checkpoint, and what widening a block takes."""
        return self._checkpoint.read_scratch_nbytes + READ_SCRATCH_BYTES

    def _changes(self) -> object:
        return sorted((name, dtype.name) for name, (_, dtype) in self._conversion.items())

    def read_into(self, pieces: Sequence[Piece], buffer: memoryview) -> None:
        """Fill ``buffer`` with the pieces; see the protocol."""
        run: list[Piece] = []  # neighbours that are converted alike, to be read in one go
        of_run: tuple[DType, DType] | None = None
        begin = end = 0
        for piece in pieces:
            conversion = self._conversion.get(piece.name)
            for part in [piece] if conversion is None else _cut_at_elements(piece, conversion[1]):
                if conversion != of_run:
                    self._read_run(run, of_run, buffer[begin:end])
                    run, of_run, begin = [], conversion, end
                nbytes = part.stop - part.start
                if conversion is not None and nbytes % conversion[1].itemsize:
                    self._read_run(run, of_run, buffer[begin:end])
                    self._read_part(part, conversion, buffer[end : end + nbytes])
                    run, begin = [], end + nbytes
                else:
                    run.append(part)
                end += nbytes
        self._read_run(run, of_run, buffer[begin:end])

    def _read_run(
        self, run: Sequence[Piece], conversion: tuple[DType, DType] | None, out: memoryview
    ) -> None:
        if not run:
            return
        if conversion is None:
            self._checkpoint.read_into(run, out)
            return
        stored, wide = conversion
        narrow = [
            Piece(
                name,
                start // wide.itemsize * stored.itemsize,
                stop // wide.itemsize * stored.itemsize,
            )
            for name, start, stop in run
        ]
        # at the end of the buffer, so that it can be widened from the front
        tail = out[len(out) - len(out) // wide.itemsize * stored.itemsize :]
        self._checkpoint.read_into(narrow, tail)
        _widen(tail, out, stored, wide)

    def _read_part(self, part: Piece, conversion: tuple[DType, DType], out: memoryview) -> None:
        """Read a part of one element."""
        itemsize = conversion[1].itemsize
        first = part.start // itemsize * itemsize
        element = memoryview(bytearray(itemsize))
        self._read_run([Piece(part.name, first, first + itemsize)], conversion, element)
        out[:] = element[part.start - first : part.stop - first]


def _cut_at_elements(piece: Piece, dtype: DType) -> list[Piece]:
    """Cut a piece into whole elements and what the range holds of the first and the last one."""
    name, start, stop = piece
    first = min(-(-start // dtype.itemsize) * dtype.itemsize, stop)
    last = max(stop // dtype.itemsize * dtype.itemsize, first)
    cuts = ((start, first), (first, last), (last, stop))
    return [Piece(name, low, high) for low, high in cuts if low < high]


def _widen(narrow: memoryview, out: memoryview, stored: DType, wide: DType) -> None:
    """Widen values that lie at the end of ``out`` into all of it, a block at a time.

    What a block is written over was read before: a wide element ends where the narrow ones that
    are still to come begin, or before.
    """
    source, target = np.frombuffer(narrow, np.uint8), np.frombuffer(out, np.uint8)
    for first in range(0, len(out) // wide.itemsize, _BLOCK_NUMEL):
        stop = first + _BLOCK_NUMEL
        values = widened(source[first * stored.itemsize : stop * stored.itemsize], stored, wide)
        target[first * wide.itemsize : stop * wide.itemsize] = values.view(np.uint8)


@np.errstate(invalid="ignore")  # a signalling NaN stays a NaN
def widened(raw: Array, stored: DType, wide: DType) -> Array:
    """Return the values of raw bytes in a dtype that holds them exactly, as a new array."""
    if stored is BFLOAT16:
        words = raw.copy().view(np.uint16).astype(np.uint32)
        words <<= np.uint32(16)
        values: Array = words.view(np.float32)
    else:
        values = raw.copy().view(_NUMPY_DTYPES[stored])
    return values.astype(_NUMPY_DTYPES[wide], copy=False)
