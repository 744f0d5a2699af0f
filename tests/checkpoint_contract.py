"""What every reader must do, whatever the layout: one class of tests, subclassed per layout."""

import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckptavg.checkpoint import Checkpoint, open_checkpoint
from ckptavg.errors import CheckpointError, CkptavgError
from ckptavg.tensors import Piece

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def sample_tensors() -> dict[str, Tensor]:
    """Return tensors of every dtype, also scalars, empty ones, and sizes that need padding."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((3, 5), (), (0,), (2, 0, 3), (1,), (7, 1, 2), (33,))
    tensors = {}
    for index, (dtype, shape) in enumerate(itertools.product(DTYPES, shapes)):
        bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator).to(torch.uint8)
        if dtype is torch.bool:
            tensors[f"layer.{index}.weight"] = (bits.squeeze(-1) % 2).to(torch.bool)
        else:
            raw = bits.reshape(-1).view(dtype) if bits.numel() else torch.empty(0, dtype=dtype)
            tensors[f"layer.{index}.weight"] = raw.reshape(shape)
    tensors["long"] = torch.arange(3000).to(torch.uint8)
    return tensors


def bytes_of(value: Tensor) -> bytes:
    """Return the row-major bytes of a tensor."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> bytes:
    """Return what one call reads."""
    buffer = bytearray(sum(piece.stop - piece.start for piece in pieces))
    checkpoint.read_into(pieces, memoryview(buffer))
    return bytes(buffer)


def read_tensor(checkpoint: Checkpoint, name: str) -> bytes:
    """Return the row-major bytes of one stored or tied tensor."""
    stored = checkpoint.tensors[checkpoint.aliases.get(name, name)]
    return read(checkpoint, [Piece(name, 0, stored.nbytes)])


def same_content(checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> bool:
    """Tell whether a checkpoint holds exactly these tensors, bit for bit."""
    return {
        name: (str(tensor.dtype), tensor.shape, read_tensor(checkpoint, name))
        for name, tensor in checkpoint.tensors.items()
    } == {
        name: (str(value.dtype).removeprefix("torch."), tuple(value.shape), bytes_of(value))
        for name, value in expected.items()
    }


def refused_at_every_length(path: Path) -> None:
    """Check that a file is refused wherever it is cut short; it is not put back."""
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def read_if_accepted(path: Path) -> None:
    """Check that a damaged checkpoint is refused, or can be read; nothing else may happen."""
    try:
        checkpoint = open_checkpoint(path)
    except CkptavgError:
        return
    for name in checkpoint.tensors:
        read_tensor(checkpoint, name)
    checkpoint.close()


class CheckpointContract:
    """The tests; a subclass says how its layout is saved and which file to damage."""

    layout: str

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        """Save tensors in this layout and return what to open."""
        raise NotImplementedError

    def data_file(self, path: Path) -> Path:
        """Return a file of the checkpoint that holds tensor data."""
        return path

    def open(self, path: Path) -> Checkpoint:
        """Open the checkpoint."""
        return open_checkpoint(path)

    @pytest.fixture
    def saved(self) -> dict[str, Tensor]:
        return sample_tensors()

    @pytest.fixture
    def path(self, tmp_path: Path, saved: dict[str, Tensor]) -> Path:
        return self.save(tmp_path, saved)

    @pytest.fixture
    def checkpoint(self, path: Path) -> Iterator[Checkpoint]:
        checkpoint = self.open(path)
        yield checkpoint
        checkpoint.close()

    def test_layout_and_label_are_named(self, checkpoint: Checkpoint, path: Path) -> None:
        assert checkpoint.layout == self.layout
        assert checkpoint.label == str(path)

    def test_every_tensor_comes_back_with_dtype_shape_and_bits(
        self, checkpoint: Checkpoint, saved: dict[str, Tensor]
    ) -> None:
        assert same_content(checkpoint, saved)

    def test_any_byte_range_can_be_read(
        self, checkpoint: Checkpoint, saved: dict[str, Tensor]
    ) -> None:
        rng = random.Random(1)
        for name, value in saved.items():
            raw = bytes_of(value)
            for _ in range(4):
                start = rng.randint(0, len(raw))
                stop = rng.randint(start, len(raw))
                assert read(checkpoint, [Piece(name, start, stop)]) == raw[start:stop]

    def test_many_pieces_in_any_order_fill_the_buffer_back_to_back(
        self, checkpoint: Checkpoint, saved: dict[str, Tensor]
    ) -> None:
        rng = random.Random(2)
        raw = {name: bytes_of(value) for name, value in saved.items()}
        for names in (list(saved), rng.sample(list(saved), len(saved)), list(saved)[::-1]):
            pieces = []
            for name in names:
                start = rng.choice((0, rng.randint(0, len(raw[name]))))
                pieces.append(Piece(name, start, len(raw[name])))
            expected = b"".join(raw[name][start:stop] for name, start, stop in pieces)
            assert read(checkpoint, pieces) == expected

    def test_more_pieces_than_one_system_call_takes(
        self, checkpoint: Checkpoint, saved: dict[str, Tensor]
    ) -> None:
        raw = bytes_of(saved["long"])
        ranges = [(at, at + 1) for at in range(0, len(raw), 2)]  # a gap after each
        assert len(ranges) > 1024
        pieces = [Piece("long", start, stop) for start, stop in ranges]
        assert read(checkpoint, pieces) == b"".join(raw[start:stop] for start, stop in ranges)

    def test_the_same_piece_can_be_read_twice_in_one_call(
        self, checkpoint: Checkpoint, saved: dict[str, Tensor]
    ) -> None:
        name = next(iter(saved))
        raw = bytes_of(saved[name])
        pieces = [Piece(name, 0, len(raw)), Piece(name, 0, len(raw)), Piece(name, 3, 5)]
        assert read(checkpoint, pieces) == raw + raw + raw[3:5]

    def test_no_piece_reads_nothing(self, checkpoint: Checkpoint) -> None:
        assert read(checkpoint, []) == b""

    def test_several_threads_read_at_once(
        self, checkpoint: Checkpoint, saved: dict[str, Tensor]
    ) -> None:
        names = list(saved) * 8
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda name: read_tensor(checkpoint, name), names))
        assert found == [bytes_of(saved[name]) for name in names]

    def test_files_are_stamped_with_what_identifies_them(
        self, checkpoint: Checkpoint, path: Path
    ) -> None:
        stamp = {file.path: file for file in checkpoint.files}[str(self.data_file(path))]
        status = self.data_file(path).stat()
        assert stamp[1:5] == (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def test_a_file_cut_short_after_opening_is_an_error_not_a_crash(
        self, checkpoint: Checkpoint, path: Path
    ) -> None:
        os.truncate(self.data_file(path), 0)
        every = [Piece(name, 0, info.nbytes) for name, info in checkpoint.tensors.items()]
        with pytest.raises(CheckpointError, match="ends at byte .*: it changed while being read$"):
            read(checkpoint, every)

    def test_an_unchanged_file_passes_the_check(self, checkpoint: Checkpoint) -> None:
        for name in checkpoint.tensors:
            read_tensor(checkpoint, name)
        checkpoint.check_unchanged()

    @pytest.mark.parametrize("change", ["grown", "shrunk", "rewritten in place"])
    def test_a_changed_file_is_noticed(
        self, checkpoint: Checkpoint, path: Path, change: str
    ) -> None:
        file = self.data_file(path)
        before = file.stat()
        raw = file.read_bytes()
        if change == "grown":
            file.write_bytes(raw + b"\0")
        elif change == "shrunk":
            os.truncate(file, len(raw) - 1)
        else:
            file.write_bytes(raw)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        with pytest.raises(
            CheckpointError, match="changed while being read; nothing was published"
        ):
            checkpoint.check_unchanged()

    def test_a_file_replaced_by_rename_still_reads_as_opened(
        self, checkpoint: Checkpoint, path: Path, saved: dict[str, Tensor]
    ) -> None:
        file = self.data_file(path)
        other = file.with_name("other")
        other.write_bytes(b"something else")
        other.replace(file)
        assert same_content(checkpoint, saved)

    def test_closing_twice_is_allowed_and_reading_afterwards_is_an_error(
        self, path: Path, saved: dict[str, Tensor]
    ) -> None:
        checkpoint = self.open(path)
        checkpoint.close()
        checkpoint.close()
        name = next(iter(saved))
        with pytest.raises(CheckpointError, match="cannot be read at byte .*: bad file descriptor"):
            read_tensor(checkpoint, name)

    def test_opening_reads_no_tensor_data(
        self, path: Path, saved: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "ckptavg.checkpoint.stored.StoredCheckpoint.read_into",
            lambda *_: pytest.fail("tensor data was read"),
        )
        checkpoint = self.open(path)
        assert set(checkpoint.tensors) == set(saved)
        checkpoint.close()
