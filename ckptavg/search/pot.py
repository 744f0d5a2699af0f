"""Running sums on the storage: one more checkpoint costs one read of it, not one of all.

The sum of the checkpoints that were accepted lies in a file of float64 values, in the order of the
plan's averaged blocks. A candidate is added into a second file, and its mean rounded into a model
directory; accepting it makes the second file the first.
"""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptavg.average.chunks import first_name, nonfinite_error, overflow_error
from ckptavg.average.floats import decode_to_float64, encode_from_float64
from ckptavg.average.work import SharedIterator, Sink, run_threads
from ckptavg.blocks import Action, Chunk
from ckptavg.errors import OutputError
from ckptavg.prepare import Prepared
from ckptavg.writer import reserve

Values = NDArray[np.float64]

_SUM_ITEMSIZE = 8
_SHARE_OF_CHUNK = 4  # float64 values, sums and what encoding takes are several times the input


class Pot:
    """The sum of some checkpoints, and how to add one more.

    Attributes:
        count: How many checkpoints are in the sum.
        current: Which of the two files holds it.
        is_new: Whether there were no such files before.
    """

    def __init__(
        self, directory: Path, prepared: Prepared, failed: Callable[[OSError], OutputError]
    ) -> None:
        """Make the two files, or take them over.

        Args:
            directory: Where they are.
            prepared: What is summed, and in what pieces.
            failed: Makes the error to raise when the storage refuses.

        Raises:
            OutputError: If there is no room for them.
        """
        self.count, self.current = 0, 0
        self._prepared = prepared
        plan = prepared.plan
        self._chunk_nbytes = max(prepared.workspace.chunk_nbytes // _SHARE_OF_CHUNK, 2**16)
        self._starts: dict[int, int] = {}
        numel = 0
        for block in plan.blocks:
            if block.action is Action.AVERAGE:
                self._starts[block.block] = numel
                numel += block.numel
        self.is_new = False
        self._failed = failed
        self._descriptors: list[int] = []
        for number in (0, 1):
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                descriptor = os.open(directory / f"sum-{number}", flags, 0o666)
                self._descriptors.append(descriptor)
                if os.fstat(descriptor).st_size != numel * _SUM_ITEMSIZE:
                    self.is_new = True
                    os.ftruncate(descriptor, 0)
                    if numel:
                        reserve(descriptor, numel * _SUM_ITEMSIZE)
            except OSError as error:
                self.close()
                raise failed(error) from error

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def stir(self, index: int, sink: Sink | None, progress: Callable[[int], None]) -> None:
        """Read a checkpoint once; put the sum with it aside, and write its mean into a sink.

        Args:
            index: Number of the checkpoint.
            sink: Where the mean goes, rounded once; None writes none.
            progress: Called with bytes read, from one thread at a time.

        Raises:
            IncompatibleCheckpointsError: If a value is not finite, or a mean does not fit.
            CheckpointError: If it cannot be read.
            OutputError: If the storage refuses.
        """
        checkpoint = self._prepared.checkpoints[index]

        def work(chunk: Chunk, place: slice) -> None:
            raw = np.empty(chunk.nbytes, np.uint8)
            checkpoint.read_into(chunk.pieces, raw.data)
            values = decode_to_float64(raw, chunk.dtype)
            before = self._load(place) if self.count else None
            self._check_finite(index, chunk, values, before)
            total = values if before is None else values + before
            self._store(place, total)
            if sink is not None:
                self._write(chunk, total, self.count + 1, sink)

        self._for_each_chunk(work, progress)

    def accept(self) -> None:
        """Make what was stirred in last part of the sum; it is on the storage then.

        Raises:
            OutputError: If the storage refuses.
        """
        try:
            os.fdatasync(self._descriptors[1 - self.current])
        except OSError as error:
            raise self._failed(error) from error
        self.current = 1 - self.current
        self.count += 1

    def pour(self, sink: Sink, finished: Callable[[int], None]) -> None:
        """Write the mean of the sum into a sink; ``finished`` is told each block that is done."""

        def work(chunk: Chunk, place: slice) -> None:
            self._write(chunk, self._load(place), self.count, sink)

        self._for_each_chunk(work, lambda done: None)
        for block in self._starts:
            finished(block)

    def _for_each_chunk(
        self, work: Callable[[Chunk, slice], None], progress: Callable[[int], None]
    ) -> None:
        def placed() -> Iterator[tuple[Chunk, slice]]:
            positions = dict(self._starts)
            for chunk in self._prepared.plan.chunks(self._chunk_nbytes, list(self._starts)):
                start = positions[chunk.block]
                positions[chunk.block] = start + chunk.numel
                progress(chunk.nbytes)
                yield chunk, slice(start, start + chunk.numel)

        items = SharedIterator(placed())

        @np.errstate(all="ignore")  # what is not finite is looked for
        def run() -> None:
            for chunk, place in items:
                work(chunk, place)

        run_threads([run] * self._prepared.workspace.n_threads, stop=items.stop)

    def _load(self, place: slice) -> Values:
        """Return a part of the sum."""
        values = np.empty(place.stop - place.start)
        data, position = values.view(np.uint8).data, place.start * _SUM_ITEMSIZE
        while data:
            count = os.preadv(self._descriptors[self.current], [data], position)
            if not count:
                raise self._failed(OSError(errno.EIO, "the sum is cut short"))
            data, position = data[count:], position + count
        return values

    def _store(self, place: slice, values: Values) -> None:
        """Put a part of the next sum aside."""
        data, position = values.view(np.uint8).data, place.start * _SUM_ITEMSIZE
        try:
            while data:
                count = os.pwrite(self._descriptors[1 - self.current], data, position)
                data, position = data[count:], position + count
        except OSError as error:
            raise self._failed(error) from error

    def _check_finite(
        self, index: int, chunk: Chunk, values: Values, before: Values | None
    ) -> None:
        """Refuse what is not finite, unless it is an infinity that all have, as in masks."""
        plan = self._prepared.plan
        odd = ~np.isfinite(values)
        if before is not None:
            odd |= ~np.isfinite(before)
        if plan.recipe.allow_nonfinite or not odd.any():
            return
        shared = np.isinf(values) if before is None else np.isinf(values) & (values == before)
        bad = odd & ~shared
        if bad.any():
            name = first_name(chunk, np.flatnonzero(bad))
            raise nonfinite_error(plan, self._prepared.checkpoints, index, name)

    def _write(self, chunk: Chunk, total: Values, count: int, sink: Sink) -> None:
        mean = total / count
        bits = encode_from_float64(mean, chunk.output_dtype)
        if not self._prepared.plan.recipe.allow_nonfinite:
            narrowed = decode_to_float64(bits.view(np.uint8), chunk.output_dtype)
            lost = np.isfinite(mean) & ~np.isfinite(narrowed)
            if lost.any():
                name = first_name(chunk, np.flatnonzero(lost))
                raise overflow_error(name, chunk.output_dtype)
        data = bits.view(np.uint8).data
        for shard, offset in chunk.destinations:
            sink.write(shard, offset, data)
