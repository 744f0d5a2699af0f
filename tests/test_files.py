"""Positional reading of regular files, and of nothing else."""

import os
import resource
import socket
from pathlib import Path

import pytest
from hostile import whole

from ckptavg.checkpoint.files import PositionalFile
from ckptavg.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    return path


def refused(path: str | Path, what: str) -> None:
    """Check that opening is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=whole(f"it: {what}")):
        PositionalFile(path, "it")


def test_a_file_reads_by_position(path: Path) -> None:
    file = PositionalFile(path, "it")
    assert file.size == 100
    assert file.read(10, 3) == b"\x0a\x0b\x0c"
    assert file.read(100, 0) == b""
    one, none, two = bytearray(2), bytearray(0), bytearray(3)
    file.read_into(5, [memoryview(one), memoryview(none), memoryview(two)])
    assert one + two == bytes(range(5, 10))
    file.close()


def test_a_link_to_a_file_is_followed(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    file = PositionalFile(link, "it")
    assert file.read(1, 1) == b"\x01"
    assert file.stamp.inode == path.stat().st_ino
    file.close()


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory, expected a checkpoint file")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "is not a regular file, expected a checkpoint file")
    for device in ("/dev/zero", "/dev/null"):
        refused(device, "is not a regular file, expected a checkpoint file")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        refused(tmp_path / "s", "cannot be opened: no such device or address")


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    refused(tmp_path / "dangling", "cannot be opened: no such file or directory")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", "cannot be opened: too many levels of symbolic links")


def test_paths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "cannot be opened: no such file or directory")
    refused("a\0b", "cannot be opened: embedded null byte")
    refused("a" * 300, "cannot be opened: file name too long")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "below", "cannot be opened: not a directory")


def test_refusing_leaves_no_file_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208  # what is open, by number
    for _ in range(5):
        refused(tmp_path, "is a directory, expected a checkpoint file")
    assert len(os.listdir("/proc/self/fd")) == len(before)  # noqa: PTH208  # likewise


def test_the_end_of_the_file_is_an_error_that_says_where(path: Path) -> None:
    file = PositionalFile(path, "it")
    os.truncate(path, 50)
    message = (
        "it: ends at byte 50, 100 bytes were there when it was opened: it changed while being read"
    )
    with pytest.raises(CheckpointError, match=whole(message)):
        file.read(40, 20)
    file.close()


def test_a_read_error_is_an_error_that_says_where(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    file = PositionalFile(path, "it")
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(
        CheckpointError, match=whole("it: cannot be read at byte 7: input/output error")
    ):
        file.read(7, 1)
    file.close()


@pytest.mark.parametrize("most", [1, 2, 3, 7, 11])
def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    preadv = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        scratch = bytearray(min(most, sum(map(len, buffers))))
        count = preadv(descriptor, [scratch], offset)
        at = 0
        for buffer in buffers:
            part = scratch[at : min(at + len(buffer), count)]
            buffer[: len(part)] = part
            at += len(part)
        return count

    file = PositionalFile(path, "it")
    monkeypatch.setattr(os, "preadv", short)
    parts = [bytearray(size) for size in (3, 1, 0, 10, 2, 20)]
    file.read_into(20, [memoryview(part) for part in parts])
    assert b"".join(parts) == bytes(range(20, 56))
    file.close()


def test_a_change_is_noticed(path: Path) -> None:
    file = PositionalFile(path, "it")
    file.check_unchanged()
    os.utime(path, ns=(0, 5))
    with pytest.raises(
        CheckpointError, match=whole("it: changed while being read; nothing was published")
    ):
        file.check_unchanged()
    file.close()
    with pytest.raises(CheckpointError, match=whole("it: cannot be read: bad file descriptor")):
        file.check_unchanged()


def test_more_files_than_the_soft_limit_can_be_open(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        files = [PositionalFile(path, "it") for _ in range(100)]
        assert files[-1].read(0, 1) == b"\x00"
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_files_than_the_hard_limit_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", none_left)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    refused(path, "cannot be opened: too many open files")


@pytest.mark.parametrize(("age", "waits"), [(0.0, 2.0), (1.5, 0.5), (2.5, 0.0), (-60.0, 0.0)])
def test_a_file_of_this_very_second_is_waited_for_where_times_are_that_coarse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, waits: float
) -> None:
    """Written again within the second, it would have the same time, and nobody would notice."""
    path = tmp_path / "w"
    path.write_bytes(b"1234")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    waited: list[float] = []
    monkeypatch.setattr("time.time", lambda: 1_000_000_000 + age)
    monkeypatch.setattr("time.sleep", waited.append)
    PositionalFile(path, "w").close()
    assert sum(waited) == pytest.approx(waits)


def test_a_file_that_is_written_while_it_is_waited_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    path.write_bytes(b"1234")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    monkeypatch.setattr("time.time", lambda: 1_000_000_000.5)
    monkeypatch.setattr("time.sleep", lambda seconds: path.write_bytes(b"5678"))
    with pytest.raises(CheckpointError, match="w: changed while being read: it is being written"):
        PositionalFile(path, "w")
