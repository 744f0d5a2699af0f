"""Hashes of files, whole or being written."""

import hashlib
from pathlib import Path

import pytest

from ckptavg import hashing
from ckptavg.hashing import FollowingHash, Part, hash_file, hash_of


def never() -> bool:
    return False


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a header of 10 bytes, three blocks and a gap; read 7 bytes at once."""
    monkeypatch.setattr(hashing, "_BUFFER_NBYTES", 7)
    path = tmp_path / "model"
    path.write_bytes(b"h" * 10 + b"a" * 20 + b"b" * 20 + b"-" * 5 + b"c" * 20)
    return path


PARTS = (Part(30, 20, 1), Part(10, 20, 0), Part(55, 20, 2))


def test_a_file_is_hashed_whole(path: Path) -> None:
    content = path.read_bytes()
    assert hash_file(path) == hash_of(content)
    assert hash_of(content) == (75, hashlib.sha256(content).hexdigest())


def test_only_what_is_finished_is_read(path: Path) -> None:
    hashed = FollowingHash(PARTS)
    hashed.follow(path, {1, 2}, never)  # the first block is not there yet
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a", b"A"))
    hashed.follow(path, {0, 2}, never)
    path.write_bytes(path.read_bytes().replace(b"b", b"B"))
    hashed.follow(path, {0, 1, 2}, never)
    path.write_bytes(path.read_bytes().replace(b"-", b"+"))  # no block covers it
    assert hashed.finish(path) == hash_of(path.read_bytes())


def test_what_was_hashed_is_not_read_again(path: Path) -> None:
    before = hash_of(path.read_bytes())
    hashed = FollowingHash(PARTS)
    hashed.follow(path, {0, 1}, never)
    path.write_bytes(path.read_bytes().replace(b"a", b"A"))
    assert hashed.finish(path) == before


def test_a_restart_reads_all_of_it_again(path: Path) -> None:
    hashed = FollowingHash(PARTS)
    hashed.follow(path, {0, 1}, never)
    path.write_bytes(path.read_bytes().replace(b"a", b"A"))
    hashed.restart()
    hashed.follow(path, {0}, never)
    assert hashed.finish(path) == hash_of(path.read_bytes())


def test_following_ends_when_told_and_the_rest_is_hashed_at_the_end(path: Path) -> None:
    answers = iter([False, True])
    hashed = FollowingHash(PARTS)
    hashed.follow(path, {0, 1, 2}, lambda: next(answers))
    assert hashed.finish(path) == hash_of(path.read_bytes())


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        hash_file(tmp_path)
