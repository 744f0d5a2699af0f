"""Directories of numbers and pictures: what is in them, and that they appear whole or never."""

import csv
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tree

from ckptavg import AfterPublishError, OutputError, directories, staging
from ckptavg.evidence_files import (
    check_evidence_destination,
    data_files,
    evidence,
    publish_evidence,
)

FILES = {"plane.json": b"{}\n", "plane.csv": b"x\n"}
OLD = {"plane.json": b"old", "plane.png": b"old"}


def holding(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_numbers_stand_in_json_and_in_csv() -> None:
    found = data_files(
        "width", {"a": [0.1, math.nan], "b": None}, [["x", "y, z"], ["a\nb", 0.1], [math.inf, 2]]
    )
    assert list(found) == ["width.json", "width.csv"]
    assert found["width.json"].endswith(b"}\n")
    assert json.loads(found["width.json"]) == {"a": [0.1, None], "b": None}
    text = found["width.csv"].decode()
    assert list(csv.reader(text.splitlines(keepends=True))) == [
        ["x", "y, z"], ["a\nb", "0.1"], ["inf", "2"],
    ]  # fmt: skip
    assert "\r" not in text


def test_names_that_are_no_text_can_be_written() -> None:
    assert b"\\udcff" in data_files("path", {}, [["run-\udcff"]])["path.csv"]


@pytest.mark.promise(11)
def test_evidence_says_what_it_is_and_hides_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "my-secret-token")
    found = evidence(
        "plane", "a title", ("one",), ("two",), {"x": 1}, command="ckptavg --t my-secret-token"
    )
    assert found == {
        "format_version": 1,
        "kind": "plane",
        "title": "a title",
        "summary": ["one"],
        "notes": ["two"],
        "x": 1,
        "command": "ckptavg --t hf_***",
    }
    assert evidence("plane", "", (), (), {}, command=None)["command"] is None


def test_a_directory_appears_with_all_files_and_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    publish_evidence(target, FILES, overwrite=False)
    assert {name: (target / name).read_bytes() for name in FILES} == FILES
    assert [one.name for one in target.parent.iterdir()] == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask


def test_an_empty_directory_and_our_own_files_are_replaced_when_asked(tmp_path: Path) -> None:
    target = holding(tmp_path / "out", OLD)
    with pytest.raises(OutputError) as caught:
        publish_evidence(target, FILES, overwrite=False)
    assert str(caught.value) == f"{target}: already exists; pass --overwrite to replace it"
    publish_evidence(target, FILES, overwrite=True)
    publish_evidence(holding(tmp_path / "empty", {}), FILES, overwrite=True)
    assert tree(tmp_path) == {
        f"{folder}/{name}": content for folder in ("out", "empty") for name, content in
        FILES.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["planet.json", "plane-notes.json", "plane.txt", "plane", "pathology.csv", "a", "path.json",
     "ensemble.png", ".plane.json"],
)  # fmt: skip
def test_whatever_else_is_there_is_kept(tmp_path: Path, name: str) -> None:
    target = holding(tmp_path / "out", {**OLD, name: b"mine"})
    before = tree(tmp_path)
    refusals: list[Callable[[], None]] = [
        lambda: check_evidence_destination(target, overwrite=True, kind="plane"),
        lambda: publish_evidence(target, FILES, overwrite=True),
    ]
    for refuse in refusals:
        with pytest.raises(OutputError) as caught:
            refuse()
        assert str(caught.value) == (
            f"{target}: also holds '{name}'; --overwrite replaces nothing but what this command "
            "writes: remove it yourself, or choose another output"
        )
    assert tree(tmp_path) == before


def test_without_a_kind_files_of_all_commands_are_ours(tmp_path: Path) -> None:
    target = holding(tmp_path / "out", {**OLD, "path.json": b"", "trajectory.svg": b""})
    check_evidence_destination(target, overwrite=True)


def test_files_and_links_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(holding(tmp_path / "out", OLD))
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="is not a directory; --overwrite replaces direct"):
            publish_evidence(tmp_path / name, FILES, overwrite=True)
    with pytest.raises(OutputError, match=r"out: .*file is not a directory"):
        publish_evidence(tmp_path / "file" / "out", FILES, overwrite=True)


def test_a_parent_that_may_not_be_written_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match=f"out: {tmp_path} is not writable"):
        check_evidence_destination(tmp_path / "new" / "out", overwrite=False)


def test_a_directory_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = holding(tmp_path / "out", OLD)

    def refuse(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(OutputError, match="out: cannot be read: Permission denied"):
        check_evidence_destination(target, overwrite=True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("failing", ["fsync", "rename", "mkdir"])
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, exists: bool,
    failing: str,
) -> None:  # fmt: skip
    parent = tmp_path if exists else tmp_path / "deep" / "er"
    target = holding(tmp_path / "out", OLD) if exists else parent / "out"
    before = tree(tmp_path)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    where: Any = {"fsync": os, "rename": staging, "mkdir": Path}
    with monkeypatch.context() as patched:
        patched.setattr(where[failing], failing, fail)
        with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt) as got:
            publish_evidence(target, FILES, overwrite=True)
    if isinstance(error, OSError):
        assert str(got.value) == f"{target}: cannot be written: no space left"
    assert tree(tmp_path) == before
    assert [one.name for one in tmp_path.iterdir()] == (["out"] if exists else [])


def without_flags(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Let renames fail as on a file system that has no flags for them."""

    def rename(source: Path, target: Path, flags: int) -> None:
        raise OSError(code, "not supported")

    monkeypatch.setattr(staging, "rename", rename)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL])
def test_file_systems_whose_renames_have_no_flags_will_do_for_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    without_flags(monkeypatch, code)
    publish_evidence(tmp_path / "out", FILES, overwrite=True)
    assert tree(tmp_path) == {f"out/{name}": content for name, content in FILES.items()}
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_replaced_in_one_step_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flags(monkeypatch, errno.EINVAL)
    holding(tmp_path / "out", OLD)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="cannot exchange two directories in one step; remove"):
        check_evidence_destination(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_failure_after_the_exchange_is_told_as_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding(tmp_path / "out", OLD)
    sync = directories.sync_directory

    def fail_on_parent(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(staging, "sync_directory", fail_on_parent)
    with pytest.raises(AfterPublishError, match="out: is published and whole, but then: Input/out"):
        publish_evidence(tmp_path / "out", FILES, overwrite=True)
    assert tree(tmp_path / "out") == FILES
    (replaced,) = (path for path in tmp_path.iterdir() if path.is_dir() and path.name != "out")
    assert tree(replaced) == OLD
    monkeypatch.undo()
    publish_evidence(tmp_path / "out", FILES, overwrite=True)  # and removes that
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
