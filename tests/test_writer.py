"""The output is old, absent or complete, whatever happens."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, tree
from safetensors import safe_open
from safetensors.torch import load_file

from ckptavg import (
    AfterPublishError,
    OutputError,
    UsageError,
    average_checkpoints,
    directories,
    open_checkpoint,
    staging,
)
from ckptavg import output as output_module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5), "n": torch.tensor(7)}
    return save_checkpoint(tmp_path / "in", tensors, "safetensors")


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "in.safetensors")


def test_output_loads_with_safetensors_and_says_what_it_is(source: Path, tmp_path: Path) -> None:
    average_checkpoints([source, source], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ckptavg.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["ckptavg_checkpoints"] == "2"
        assert file.metadata()["ckptavg_scheme"] == "uniform"
        assert set(file.keys()) == {"a", "b", "n"}


def test_equal_runs_give_equal_weight_files(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        average_checkpoints([source, source], tmp_path / name)
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")
    )
    assert first == second


def test_shards_have_the_names_and_index_of_the_hub(tmp_path: Path) -> None:
    tensors = {f"w{n}": torch.full((100,), float(n)) for n in range(5)}
    source = save_checkpoint(tmp_path / "in", tensors, "torch")
    average_checkpoints([source], tmp_path / "out", max_shard_bytes=900)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000, "total_parameters": 500}
    assert list(index["weight_map"]) == sorted(tensors)
    assert set(index["weight_map"].values()) == {
        f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)
    }
    for name, filename in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / filename)[name], tensors[name])
    again = open_checkpoint(tmp_path / "out")
    assert set(again.tensors) == set(tensors)
    again.close()


def test_file_modes_follow_the_umask(source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        average_checkpoints([source], tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_existing_output_is_refused_and_untouched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("old")
    with pytest.raises(OutputError) as caught:
        average_checkpoints([source], tmp_path / "out")
    assert str(caught.value) == (f"{tmp_path}/out: already exists; pass --overwrite to replace it")
    assert tree(tmp_path / "out") == {"model.safetensors": b"old"}
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["empty directory", "file", "dangling link"])
def test_everything_that_exists_counts_as_existing(source: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "empty directory":
        out.mkdir()
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to("nowhere")
    with pytest.raises(OutputError, match="already exists; pass --overwrite to replace it$"):
        average_checkpoints([source], out)


def test_overwrite_replaces_a_model_directory(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("old")
    (tmp_path / "out" / "config.json").write_text("{}")
    average_checkpoints([source], tmp_path / "out", overwrite=True)
    assert sorted(tree(tmp_path / "out")) == ["ckptavg.json", "model.safetensors"]
    assert leftovers(tmp_path) == ["out"]


def test_overwrite_never_removes_a_folder_with_other_things(source: Path, tmp_path: Path) -> None:
    average_checkpoints([source], tmp_path / "home")
    for name in ("thesis.tex", "optimizer.pt", "trainer_state.json", ".git"):
        (tmp_path / "home" / name).write_text("years of work")
        before = tree(tmp_path / "home")
        with pytest.raises(OutputError) as caught:
            average_checkpoints([source], tmp_path / "home", overwrite=True)
        assert str(caught.value) == (
            f"{tmp_path}/home: also holds '{name}'; --overwrite replaces nothing but a model "
            "directory: remove it yourself, or choose another output"
        )
        assert tree(tmp_path / "home") == before
        (tmp_path / "home" / name).unlink()
    (tmp_path / "home" / "checkpoint-500").mkdir()
    with pytest.raises(OutputError, match="also holds 'checkpoint-500'"):
        average_checkpoints([source], tmp_path / "home", overwrite=True)


def test_overwrite_replaces_an_output_with_its_side_files(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2), "v": torch.ones(1)}
    model = save_checkpoint(tmp_path / "run", tensors, "sharded safetensors")
    (model / "licence.of.mine").write_text("free")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("tool")
    for _ in range(2):
        average_checkpoints([model], tmp_path / "out", overwrite=True)
    assert "licence.of.mine" in tree(tmp_path / "out")


def test_overwrite_does_not_replace_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(
        OutputError, match="is not a directory; --overwrite replaces model directories$"
    ):
        average_checkpoints([source], tmp_path / "out", overwrite=True)


def test_overwrite_through_a_link_replaces_what_it_points_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    average_checkpoints([source], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert "model.safetensors" in tree(tmp_path / "disk" / "real")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_missing_parents_are_made_and_removed_again_on_failure(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average_checkpoints([source], tmp_path / "deep" / "er" / "out")
    assert (tmp_path / "deep" / "er" / "out" / "model.safetensors").exists()
    monkeypatch.setattr(output_module.OutputDirectory, "publish", _raise)
    with pytest.raises(OutputError, match="^out of luck$"):
        average_checkpoints([source], tmp_path / "other" / "er" / "out")
    assert leftovers(tmp_path) == ["deep"]


def _raise(*_: Any) -> None:
    raise OutputError("out of luck")


def test_output_inside_or_around_an_input_is_refused(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2), "v": torch.ones(1)}
    model = save_checkpoint(tmp_path / "run", tensors, "sharded safetensors")
    before = tree(tmp_path)
    for output, options in (
        (model, {"overwrite": True}),
        (model / "swa", {}),
        (model / "deep" / "er", {}),
    ):
        with pytest.raises(UsageError) as caught:
            average_checkpoints([model], output, **options)  # type: ignore[arg-type]  # options
        relation = "is" if output == model else "lies inside"
        assert str(caught.value) == (
            f"{output}: {relation} the input {model}; choose another output"
        )
    with pytest.raises(UsageError) as caught:
        average_checkpoints([model], tmp_path, overwrite=True)
    assert str(caught.value).startswith(f"{tmp_path}: holds the input {model}/")
    assert tree(tmp_path) == before


def test_output_inside_an_input_is_seen_through_links(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "run", {"w": torch.ones(2)}, "sharded safetensors")
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(UsageError, match="lies inside the input"):
        average_checkpoints([model], tmp_path / "link" / "swa")


def test_full_disk_is_refused_before_reading(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError) as caught:
        average_checkpoints([source], tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/out: needs 52 bytes, but only 10 are free in {tmp_path}"
    )


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_storage_that_fails_leaves_the_old_output(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    average_checkpoints([source], tmp_path / "out")
    before = tree(tmp_path / "out")

    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"os.{call}", fail)
    with pytest.raises(OutputError) as caught:
        average_checkpoints([source], tmp_path / "out", overwrite=True)
    assert str(caught.value) == (
        f"{tmp_path}/out: cannot be written: no space left on device; nothing was published"
    )
    assert tree(tmp_path / "out") == before
    assert leftovers(tmp_path) == ["out"]


def test_short_writes_are_continued(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(
        "os.pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:3], offset)
    )
    average_checkpoints([source], tmp_path / "out")
    monkeypatch.undo()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], torch.ones(5))


def test_failure_after_publishing_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = directories.sync_directory

    def fail_on_parent(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(staging, "sync_directory", fail_on_parent)
    with pytest.raises(AfterPublishError) as caught:
        average_checkpoints([source], tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/out: is published and whole, but then: Input/output error"
    )
    assert sorted(tree(tmp_path / "out")) == ["ckptavg.json", "model.safetensors"]


def test_second_writer_of_the_same_output_is_refused(source: Path, tmp_path: Path) -> None:
    def write_again(stage: str, done: int, total: int | None) -> None:
        with pytest.raises(OutputError, match="another ckptavg run is writing it at this moment$"):
            average_checkpoints([source], tmp_path / "out")

    average_checkpoints([source], tmp_path / "out", progress=write_again)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert leftovers(tmp_path) == ["out"]


def test_output_that_appears_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    def make_output(stage: str, done: int, total: int | None) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(OutputError, match="appeared while it was being written"):
        average_checkpoints([source], tmp_path / "out", progress=make_output)
    assert tree(tmp_path / "out") == {}
    assert leftovers(tmp_path) == ["out"]


def test_what_a_killed_run_left_behind_is_cleared(source: Path, tmp_path: Path) -> None:
    partial: list[Path] = []

    def remember(stage: str, done: int, total: int | None) -> None:
        partial.extend(path for path in tmp_path.glob("out.partial-*") if path.is_dir())

    average_checkpoints([source], tmp_path / "out", progress=remember)
    (stale,) = set(partial)
    stale.mkdir()
    (stale / "model.safetensors").write_text("half written")
    (stale / "folder").mkdir()
    stale.with_name(f"{stale.name}.lock").touch()
    average_checkpoints([source], tmp_path / "out", overwrite=True)
    assert leftovers(tmp_path) == ["out"]


def test_a_directory_of_that_name_that_no_run_made_is_never_touched(
    source: Path, tmp_path: Path
) -> None:
    foreign: list[Path] = []

    def remember(stage: str, done: int, total: int | None) -> None:
        foreign.extend(path for path in tmp_path.glob("out.partial-*") if path.is_dir())

    average_checkpoints([source], tmp_path / "out", progress=remember)
    (foreign[0]).mkdir()
    (foreign[0] / "mine").write_text("kept")
    with pytest.raises(OutputError, match=f"{foreign[0].name}: is there already; if no other run"):
        average_checkpoints([source], tmp_path / "out", overwrite=True)
    average_checkpoints([source, source], tmp_path / "out", overwrite=True)
    assert (foreign[0] / "mine").read_text() == "kept"
    assert leftovers(tmp_path) == ["out", foreign[0].name]


def test_partial_directories_of_dead_runs_with_other_plans_are_removed(
    source: Path, tmp_path: Path
) -> None:
    dead, other = tmp_path / "out.partial-0123456789abcdef", tmp_path / "out.partial-notes"
    alive = tmp_path / "out.partial-fedcba9876543210"
    for folder in (dead, other, alive):
        folder.mkdir()
        (folder / "file").write_text("something")
    lock = directories.open_lock(tmp_path / f"{alive.name}.lock")
    assert lock is not None
    (tmp_path / f"{dead.name}.lock").touch()
    (tmp_path / "out.partial-00000000000000ff.lock").touch()  # killed before it made the directory
    average_checkpoints([source], tmp_path / "out")
    os.close(lock)
    assert leftovers(tmp_path) == ["out", alive.name, f"{alive.name}.lock", other.name]


def test_a_run_never_takes_the_directory_that_another_is_replacing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the exchange the old output bears the partial directory's name."""
    average_checkpoints([source], tmp_path / "out")
    sync = directories.sync_directory
    refused: list[bool] = []

    def start_the_same_run(path: Path) -> None:
        if path == tmp_path and not refused:
            refused.append(True)
            with pytest.raises(OutputError, match="another ckptavg run is writing it"):
                average_checkpoints([source], tmp_path / "out", overwrite=True)
        sync(path)

    monkeypatch.setattr(staging, "sync_directory", start_the_same_run)
    average_checkpoints([source], tmp_path / "out", overwrite=True)
    assert refused
    assert sorted(tree(tmp_path / "out")) == ["ckptavg.json", "model.safetensors"]
    assert leftovers(tmp_path) == ["out"]


def test_an_interruption_right_after_the_rename_is_told_as_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average_checkpoints([source], tmp_path / "out")
    rename = directories.rename

    def interrupted(source: Path, target: Path, flags: int) -> None:
        rename(source, target, flags)
        if target == tmp_path / "out":
            raise KeyboardInterrupt

    monkeypatch.setattr(staging, "rename", interrupted)
    with pytest.raises(
        AfterPublishError, match="out: is published and whole, but then: KeyboardInterrupt$"
    ):
        average_checkpoints([source, source], tmp_path / "out", overwrite=True)
    told = json.loads((tmp_path / "out" / "ckptavg.json").read_text())
    assert len(told["checkpoints"]) == 2


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_file_system_without_exclusive_rename_still_publishes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(staging, "rename", refuse)
    average_checkpoints([source], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(OutputError, match="cannot exchange two directories in one step"):
        average_checkpoints([source], tmp_path / "out", overwrite=True)
    assert leftovers(tmp_path) == ["out"]


def test_file_system_without_locks_still_writes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    average_checkpoints([source], tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]


def test_leftovers_on_a_file_system_without_locks_are_left_to_the_user(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial: list[Path] = []

    def remember(stage: str, done: int, total: int | None) -> None:
        partial.extend(path for path in tmp_path.glob("out.partial-*") if path.is_dir())

    average_checkpoints([source], tmp_path / "out", progress=remember)
    (stale,) = set(partial)
    stale.mkdir()
    (stale / "model.safetensors").write_text("half written")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OutputError) as caught:
        average_checkpoints([source], tmp_path / "out", overwrite=True)
    assert str(caught.value) == (f"{stale}: is there already; if no other run writes it, remove it")
    assert tree(stale) == {"model.safetensors": b"half written"}


def test_provenance_tells_how_the_output_was_made(tmp_path: Path) -> None:
    paths = [
        save_checkpoint(
            tmp_path / f"step{step}", {"w": torch.ones(3), "n": torch.tensor(step)}, "safetensors"
        )
        for step in (100, 200)
    ]
    average_checkpoints(paths, tmp_path / "out", coefficients=(0.25, 0.75), dtype="bfloat16")
    told = json.loads((tmp_path / "out" / "ckptavg.json").read_text())
    assert told["scheme"] == "coefficients:0.25,0.75"
    assert [one["coefficient"] for one in told["checkpoints"]] == [0.25, 0.75]
    assert [one["step"] for one in told["checkpoints"]] == [100, 200]
    assert told["checkpoints"][0]["files"] == [
        {
            "path": str(paths[0]),
            "nbytes": paths[0].stat().st_size,
            "mtime_ns": paths[0].stat().st_mtime_ns,
            "digest": None,
        }
    ]
    assert told["recipe"]["dtype"] == "bfloat16"
    assert told["tensors"] == {
        "averaged": 1,
        "averaged_dtypes": {"float32 to bfloat16": 1},
        "copied": ["n"],
        "derived": {},
        "tied": {},
        "differing": {"taken_from": str(paths[1]), "names": ["n"]},
    }
    assert told["batchnorm"] is None
