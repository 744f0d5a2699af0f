"""Row-major bytes out of storages laid out otherwise."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ckptavg.checkpoint import strided
from ckptavg.checkpoint.files import PositionalFile
from ckptavg.checkpoint.strided import extent, is_row_major, read_strided


def test_row_major_views_are_told_from_others() -> None:
    for shape, strides in [
        ((), ()), ((1,), (1,)), ((4,), (1,)), ((2, 3), (3, 1)), ((1, 3), (99, 1)),
        ((2, 1, 3), (3, 7, 1)), ((1, 1), (5, 9)), ((3, 1), (1, 99)),
    ]:  # fmt: skip
        assert is_row_major(shape, strides)
    for shape, strides in [
        ((4,), (2,)), ((2, 3), (1, 2)), ((2, 3), (4, 1)), ((4,), (0,)), ((2, 2, 2), (4, 1, 2)),
    ]:  # fmt: skip
        assert not is_row_major(shape, strides)


def test_the_extent_spans_first_to_last_element() -> None:
    assert extent((), ()) == 1
    assert extent((0, 5), (99, 99)) == 0
    assert extent((3,), (4,)) == 9
    assert extent((2, 3), (1, 2)) == 6
    assert extent((7,), (0,)) == 1
    assert extent((2**40, 2), (2**40, 1)) == (2**40 - 1) * 2**40 + 2


class Counted(PositionalFile):
    """A file that remembers how much was asked for at once."""

    most_bytes = 0

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.most_bytes = max(self.most_bytes, *(buffer.nbytes for buffer in buffers))
        super().read_into(offset, buffers)


def random_view(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return shape, strides and offset of a view as slicing and permuting make them."""
    shape = [rng.choice((1, 2, 3, 5, 8)) for _ in range(rng.randint(0, 4))]
    order = rng.sample(range(len(shape)), len(shape))
    strides, step = [0] * len(shape), rng.choice((1, 1, 2, 3))
    for axis in order:
        strides[axis] = step
        step *= shape[axis] + rng.choice((0, 0, 1, 4))
    return tuple(shape), tuple(strides), rng.choice((0, 1, 5))


@pytest.mark.parametrize("scratch_bytes", [1, 40, 300, 2**20])
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_any_range_of_any_view_reads_as_numpy_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, itemsize: int, scratch_bytes: int
) -> None:
    monkeypatch.setattr(strided, "READ_SCRATCH_BYTES", max(scratch_bytes, itemsize))
    rng = random.Random(itemsize + scratch_bytes)
    path = tmp_path / "storage"
    raw = rng.randbytes(7 + 60_000 * itemsize)
    path.write_bytes(raw)
    file = Counted(path, "storage")
    storage = np.frombuffer(raw, dtype=f"V{itemsize}", offset=7)
    for _ in range(60):
        shape, strides, offset = random_view(rng)
        expected = np.lib.stride_tricks.as_strided(
            storage[offset:], shape, [stride * itemsize for stride in strides]
        ).reshape(-1)
        start = rng.randint(0, len(expected))
        stop = rng.choice((len(expected), rng.randint(start, len(expected))))
        out = bytearray((stop - start) * itemsize)
        data_offset = 7 + offset * itemsize
        read_strided(file, data_offset, itemsize, shape, strides, start, memoryview(out))
        assert bytes(out) == expected[start:stop].tobytes()
    assert file.most_bytes <= max(scratch_bytes, itemsize)
    file.close()


def test_every_range_of_one_view_reads_right(tmp_path: Path) -> None:
    path = tmp_path / "storage"
    path.write_bytes(bytes(range(24)))
    file = PositionalFile(path, "storage")
    expected = np.arange(24, dtype=np.uint8).reshape(4, 3, 2).transpose(2, 0, 1).tobytes()
    for start, stop in itertools.combinations_with_replacement(range(25), 2):
        out = bytearray(stop - start)
        read_strided(file, 0, 1, (2, 4, 3), (1, 6, 2), start, memoryview(out))
        assert bytes(out) == expected[start:stop]
    file.close()


def test_steps_wider_than_the_scratch_buffer_skip_what_lies_between(tmp_path: Path) -> None:
    path = tmp_path / "storage"
    with path.open("wb") as sparse:
        for index in range(4):
            sparse.seek(index * 2**34)
            sparse.write(bytes([index]))
    file = Counted(path, "storage")
    out = bytearray(4)
    read_strided(file, 0, 1, (4,), (2**34,), 0, memoryview(out))
    assert bytes(out) == bytes(range(4))
    assert file.most_bytes == 1
    file.close()
    path.unlink()


def test_a_stride_of_zero_repeats_elements(tmp_path: Path) -> None:
    path = tmp_path / "storage"
    path.write_bytes(bytes(range(6)))
    file = PositionalFile(path, "storage")
    out = bytearray(4)
    read_strided(file, 0, 1, (2, 2), (0, 5), 0, memoryview(out))
    assert bytes(out) == bytes([0, 5, 0, 5])
    file.close()
