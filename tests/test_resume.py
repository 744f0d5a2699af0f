"""An interrupted run goes on where it stopped, and only if it would have done the same."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import save_file
from torch import nn

from ckptavg import BnPass, OutputError, ProcessEndedError, average_checkpoints
from ckptavg.journal import JOURNAL_PREFIX, Journal, read_journals, remove_journals

pytestmark = pytest.mark.usefixtures("small_blocks")
N_BLOCKS = 10


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    paths = []
    for step in range(1, 4):
        tensors = {
            "w": torch.randn(9000, generator=generator),
            "n": torch.full((500,), step, dtype=torch.int64),
        }
        paths.append(tmp_path / f"step-{step}.safetensors")
        save_file(tensors, paths[-1])
    return paths


class Interrupt:
    """A progress callback that interrupts the run after so many calls."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.read_nbytes = 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        self.read_nbytes += done
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def interrupted(sources: list[Path], output: Path, after: int = 4, **options: object) -> list[str]:
    """Run until it is interrupted; return what the interruption says."""
    with pytest.raises(KeyboardInterrupt) as caught:
        average_checkpoints(
            sources,
            output,
            progress=Interrupt(after),
            n_threads=1,
            **options,  # type: ignore[arg-type]
        )
    assert not output.exists()
    return list(getattr(caught.value, "__notes__", []))


def partial_of(output: Path) -> Path:
    (found,) = output.parent.glob(f"{output.name}.partial-*")
    return found


def test_an_interrupted_run_is_continued(sources: list[Path], tmp_path: Path, device: str) -> None:
    whole = average_checkpoints(sources, tmp_path / "whole")
    (told,) = interrupted(sources, tmp_path / "out")
    name = partial_of(tmp_path / "out").name
    assert told == f"40 % of the average is kept in {name}; the same command continues it"
    watch = Interrupt(10**6)
    result = average_checkpoints(sources, tmp_path / "out", progress=watch, device=device)
    assert watch.read_nbytes == result.read_nbytes - result.resumed_nbytes
    assert 0 < watch.read_nbytes < whole.read_nbytes
    assert f"{tmp_path}/out: continued an interrupted run; 40 % of it was done" in result.notes
    assert result.outputs[0].differing == whole.outputs[0].differing == ("n",)
    one, other = (tmp_path / each / "model.safetensors" for each in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ckptavg.json",
        "model.safetensors",
    ]
    assert not list(tmp_path.glob("out.partial-*"))


def test_finished_blocks_are_not_read_again(sources: list[Path], tmp_path: Path) -> None:
    """The first blocks of the files could be gone: headers and the rest are enough."""
    interrupted(sources, tmp_path / "out")
    partial = partial_of(tmp_path / "out")
    with (partial / "model.safetensors").open("r+b") as file:
        file.seek(-36_000, os.SEEK_END)
        file.write(b"what the first run wrote")
    average_checkpoints(sources, tmp_path / "out")
    assert b"what the first run wrote" in (tmp_path / "out/model.safetensors").read_bytes()


def test_it_is_continued_with_other_memory_threads_and_several_times(
    sources: list[Path], tmp_path: Path
) -> None:
    average_checkpoints(sources, tmp_path / "whole")
    interrupted(sources, tmp_path / "out", after=3)
    (told,) = interrupted(sources, tmp_path / "out", after=3, memory_budget_bytes=10 * 2**20)
    assert told.startswith("60 %")
    average_checkpoints(sources, tmp_path / "out", n_threads=3)
    one, other = (tmp_path / each / "model.safetensors" for each in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_several_outputs_are_continued(sources: list[Path], tmp_path: Path) -> None:
    schemes = ("uniform", "uniform:last=2", "uniform:first=2")
    whole = average_checkpoints(sources, tmp_path / "whole", schemes=schemes)
    interrupted(sources, tmp_path / "out", schemes=schemes)
    result = average_checkpoints(sources, tmp_path / "out", schemes=schemes)
    assert result.resumed_nbytes > 0
    for one, other in zip(whole.outputs, result.outputs, strict=True):
        assert (one.path / "model.safetensors").read_bytes() == (
            other.path / "model.safetensors"
        ).read_bytes()
        assert one.differing == other.differing


@pytest.mark.parametrize("change", ["input", "option", "scheme"])
def test_other_inputs_or_options_start_afresh_and_say_so(
    sources: list[Path], tmp_path: Path, change: str
) -> None:
    interrupted(sources, tmp_path / "out")
    if change == "input":
        os.utime(sources[0], ns=(1, 1))
    result = average_checkpoints(
        sources,
        tmp_path / "out",
        dtype="bfloat16" if change == "option" else "same",
        schemes=["uniform:last=2"] if change == "scheme" else [],
    )
    assert result.resumed_nbytes == 0
    assert any(
        note == f"{tmp_path}/out: an interrupted run had other inputs or options; what it left "
        "was removed, and this one started afresh"
        for note in result.notes
    )
    assert not list(tmp_path.glob("out.partial-*"))


def test_other_weights_of_the_same_files_start_afresh(tmp_path: Path) -> None:
    """Nothing about the files tells the raw weights from the averaged ones in them."""
    paths = []
    for epoch in range(3):
        paths.append(tmp_path / f"epoch-{epoch}.pt")
        weights = {name: {"w": torch.randn(9000)} for name in ("state_dict", "ema")}
        torch.save({"epoch": epoch, **weights}, paths[-1])
    interrupted(paths, tmp_path / "out", state_key="ema")
    result = average_checkpoints(paths, tmp_path / "out")
    assert result.resumed_nbytes == 0
    average_checkpoints(paths, tmp_path / "whole")
    one, other = (tmp_path / each / "model.safetensors" for each in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_what_a_run_has_done_outlives_the_end_of_another_process(
    sources: list[Path], tmp_path: Path
) -> None:
    def lose_another(stage: str, done: int, total: int | None) -> None:
        raise ProcessEndedError("another process ended")

    with pytest.raises(ProcessEndedError) as caught:
        average_checkpoints(sources, tmp_path / "out", progress=lose_another, n_threads=1)
    assert caught.value.__notes__[0].endswith("; the same command continues it")
    result = average_checkpoints(sources, tmp_path / "out")
    assert result.resumed_nbytes > 0
    assert not list(tmp_path.glob("out.*"))


def test_a_killed_process_is_continued(sources: list[Path], tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from ckptavg import average_checkpoints, blocks\n"
        "blocks.BLOCK_NBYTES = 4000\n"
        "calls = []\n"
        "def die(stage, done, total):\n"
        "    calls.append(done)\n"
        "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "average_checkpoints(sys.argv[2:], sys.argv[1], progress=die, n_threads=1)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out"), *map(str, sources)], check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    result = average_checkpoints(sources, tmp_path / "out")
    assert any("continued an interrupted run; 50 % of it was done" in note for note in result.notes)
    average_checkpoints(sources, tmp_path / "whole")
    one, other = (tmp_path / each / "model.safetensors" for each in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_an_error_leaves_nothing_to_continue(sources: list[Path], tmp_path: Path) -> None:
    def fail(stage: str, done: int, total: int | None) -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - the test's own
        average_checkpoints(sources, tmp_path / "out", progress=fail)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("damage", ["shorter", "header", "missing", "journal"])
def test_what_is_damaged_is_made_anew(sources: list[Path], tmp_path: Path, damage: str) -> None:
    interrupted(sources, tmp_path / "out")
    partial = partial_of(tmp_path / "out")
    weights, journal = partial / "model.safetensors", partial / f"{JOURNAL_PREFIX}0"
    if damage == "shorter":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "header":
        with weights.open("r+b") as file:
            file.write(b"x")
    elif damage == "missing":
        weights.unlink()
    else:
        journal.write_text('{"boot": "another"}\n{"block": 0}\n')
    result = average_checkpoints(sources, tmp_path / "out")
    assert result.resumed_nbytes == 0
    average_checkpoints(sources, tmp_path / "whole")
    one, other = (tmp_path / each / "model.safetensors" for each in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_what_lay_beside_the_weights_is_made_anew(sources: list[Path], tmp_path: Path) -> None:
    interrupted(sources, tmp_path / "out")
    partial = partial_of(tmp_path / "out")
    (partial / "config.json").write_text("half")
    (partial / "additional_chat_templates").mkdir()
    average_checkpoints(sources, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ckptavg.json",
        "model.safetensors",
    ]


def test_room_that_an_interrupted_run_holds_counts_as_free(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(sources, tmp_path / "out")
    monkeypatch.setattr("ckptavg.destination._SPARE_BYTES", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    average_checkpoints(sources, tmp_path / "out")


def _bn_case(folder: Path) -> tuple[list[Path], nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    paths = [
        save_checkpoint(folder / f"e-{n}", dict(model.state_dict()), "safetensors") for n in (1, 2)
    ]
    return paths, model, [torch.randn(32, 3), torch.randn(32, 3)]


def test_an_interrupted_batchnorm_pass_keeps_the_average(tmp_path: Path) -> None:
    paths, model, data = _bn_case(tmp_path)

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == "batchnorm":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        average_checkpoints(
            paths, tmp_path / "out", batchnorm=BnPass(model=model, batches=data), progress=interrupt
        )
    assert caught.value.__notes__[0].startswith("100 % of the average is kept")
    result = average_checkpoints(
        paths, tmp_path / "out", batchnorm=BnPass(model=model, batches=data)
    )
    assert result.resumed_nbytes == result.read_nbytes
    average_checkpoints(paths, tmp_path / "whole", batchnorm=BnPass(model=model, batches=data))
    one, other = (tmp_path / each / "model.safetensors" for each in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_patched_statistics_are_never_taken_for_averaged_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after the pass, the same average without a pass must not inherit it."""
    paths, model, data = _bn_case(tmp_path)

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ckptavg.steps.provenance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            average_checkpoints(
                paths, tmp_path / "out", batchnorm=BnPass(model=model, batches=data)
            )
    result = average_checkpoints(paths, tmp_path / "out")
    assert result.resumed_nbytes == 0
    average_checkpoints(paths, tmp_path / "whole")
    one, other = (tmp_path / each / "model.safetensors" for each in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_after_a_failure_of_the_machine_only_synced_blocks_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, 0)
    journal.record(3, set())
    journal.record(5, {(0, "n"), (1, "m")})
    journal.sync(())
    journal.record(7, set())
    journal.close()
    assert read_journals(tmp_path) == {3: set(), 5: {(0, "n"), (1, "m")}, 7: set()}
    monkeypatch.setattr("ckptavg.journal._boot_id", lambda: "another boot")
    assert read_journals(tmp_path) == {3: set(), 5: {(0, "n"), (1, "m")}}
    monkeypatch.setattr("ckptavg.journal._boot_id", lambda: None)
    assert set(read_journals(tmp_path)) == {3, 5}
    remove_journals(tmp_path)
    assert read_journals(tmp_path) == {}


def test_journals_of_several_processes_add_up(tmp_path: Path) -> None:
    for rank in range(3):
        journal = Journal(tmp_path, rank)
        journal.record(rank, set())
        journal.close()
    assert set(read_journals(tmp_path)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("tail", "believed"),
    [
        ('{"block": 8', {3}),  # cut off
        ("\x00\x00\x00\n" + '{"block": 8}\n', {3}),
        ('{"block": "x"}\n{"block": 8}\n', {3}),
        ('[1]\n{"block": 8}\n', {3}),
        ('{"block": 8, "differing": 5}\n', {3}),
        ('{"block": 8}\n', {3, 8}),
    ],
)
def test_a_damaged_journal_is_believed_up_to_the_damage(
    tmp_path: Path, tail: str, believed: set[int]
) -> None:
    journal = Journal(tmp_path, 0)
    journal.record(3, set())
    journal.close()
    with (tmp_path / f"{JOURNAL_PREFIX}0").open("a") as file:
        file.write(tail)
    assert set(read_journals(tmp_path)) == believed


def test_long_runs_are_synced_now_and_then(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptavg.background._PAUSE_SECONDS", 0.001)
    monkeypatch.setattr("ckptavg.background._SYNC_SECONDS", 0.01)
    synced: list[int] = []

    def wait_for_sync(stage: str, done: int, total: int | None) -> None:
        (journal,) = tmp_path.glob(f"out.partial-*/{JOURNAL_PREFIX}0")
        for _ in range(1000):
            lines = [json.loads(line) for line in journal.read_text().splitlines()]
            synced.extend(line["synced"] for line in lines if "synced" in line)
            if synced and synced[-1] > 0:
                return
            import time

            time.sleep(0.005)

    average_checkpoints(sources, tmp_path / "out", progress=wait_for_sync, n_threads=1)
    assert synced[-1] > 0


def test_a_write_that_the_storage_refuses_later_is_not_forgotten(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of it once: a later sync would find nothing wrong."""
    monkeypatch.setattr("ckptavg.background._PAUSE_SECONDS", 0.001)
    monkeypatch.setattr("ckptavg.background._SYNC_SECONDS", 0.0)
    sync, refused = Journal.sync, threading.Event()

    def refuse_once(self: Journal, descriptors: Iterable[int]) -> None:
        if threading.current_thread() is threading.main_thread() or refused.is_set():
            sync(self, descriptors)
        else:
            refused.set()
            raise OSError(errno.EIO, "Input/output error")

    def wait(stage: str, done: int, total: int | None) -> None:
        refused.wait(10)

    monkeypatch.setattr(Journal, "sync", refuse_once)
    with pytest.raises(OutputError, match="cannot be written: input/output error; nothing was pub"):
        average_checkpoints(sources, tmp_path / "out", progress=wait, n_threads=1)
    assert refused.is_set()
    assert not list(tmp_path.glob("out*"))
