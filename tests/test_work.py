"""How the work is shared among threads: CPUs, slow storage, where the time went."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint

from ckptavg import Recipe, StageTimes, average_checkpoints
from ckptavg.average import cpu as cpu_module
from ckptavg.average import work
from ckptavg.checkpoint.files import PositionalFile
from ckptavg.prepare import prepared_average


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [
        save_checkpoint(tmp_path / f"step-{step}", {"w": torch.randn(2_000_000)}, "safetensors")
        for step in range(3)
    ]


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "1\n", "cpu/cpu.cfs_period_us": "0\n"}, None),
        ({}, None),
    ],
)
def test_quota_of_a_container_is_read(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert work._cgroup_cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 6), (0.5, 1), (2.5, 3), (4.0, 4), (64.0, 6)]
)
def test_usable_cpus_are_the_fewer_of_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(work, "_cgroup_cpu_quota", lambda: quota)
    assert work.usable_cpus() == expected


def test_processes_of_one_host_share_its_cpus(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptavg.average.usable_cpus", lambda: 6)
    from ckptavg.average import size_workspace

    with prepared_average(sources, tmp_path / "out", Recipe(), device="cpu") as prepared:
        for local_size, expected in ((1, 6), (2, 3), (4, 1), (9, 1)):
            sized = size_workspace(
                prepared.plan, "cpu", memory_budget_bytes=2**29, local_size=local_size
            )
            assert sized.n_threads == expected


def n_readers(
    sources: Sequence[Path], output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> int:
    """Return how many threads read at once, at most, where reading waits for the storage."""
    reading: set[int] = set()
    most = 0
    read_into = PositionalFile.read_into

    def slow(self: PositionalFile, offset: int, buffers: Sequence[memoryview]) -> None:
        nonlocal most
        if sum(buffer.nbytes for buffer in buffers) < 10_000:  # a header
            return read_into(self, offset, buffers)
        import threading

        reading.add(threading.get_ident())
        most = max(most, len(reading))
        time.sleep(0.02)
        read_into(self, offset, buffers)
        reading.discard(threading.get_ident())
        return None

    with monkeypatch.context() as patched:
        patched.setattr(PositionalFile, "read_into", slow)
        patched.setattr(cpu_module, "_TRIAL_SECONDS", 0.01)
        average_checkpoints(sources, output, device="cpu", **options)
    return most


def test_slow_storage_is_read_by_more_threads_than_there_are_cpus(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptavg.average.usable_cpus", lambda: 1)
    monkeypatch.setattr(cpu_module, "_CHUNK_NBYTES", 2**18)
    with prepared_average(sources, tmp_path / "out", Recipe(), device="cpu") as prepared:
        assert prepared.workspace.n_threads == 1
        most = prepared.workspace.max_threads
        assert prepared.workspace.max_host_nbytes > prepared.workspace.host_nbytes
    assert 3 <= n_readers(sources, tmp_path / "out", monkeypatch) <= most
    average_checkpoints(sources, tmp_path / "usual", device="cpu")
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "usual"))
    assert one.read_bytes() == other.read_bytes()


def test_a_number_of_threads_that_was_asked_for_is_kept(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_module, "_CHUNK_NBYTES", 2**18)
    assert n_readers(sources, tmp_path / "out", monkeypatch, n_threads=2) <= 2


def test_stages_are_timed_and_the_longest_is_named(
    sources: list[Path], tmp_path: Path, device: str
) -> None:
    times = average_checkpoints(sources, tmp_path / "out", device=device).times
    seconds = {
        "reading": times.read_seconds,
        "arithmetic": times.arithmetic_seconds,
        "writing": times.write_seconds,
        "syncing": times.publish_seconds,
    }
    assert all(value > 0 for value in seconds.values())
    assert seconds[times.bottleneck] == max(seconds.values())
    stages = StageTimes(read_seconds=1, arithmetic_seconds=2, write_seconds=4, publish_seconds=3)
    assert stages.bottleneck == "writing"


def test_slow_reading_is_named(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_into = PositionalFile.read_into

    def slow(self: PositionalFile, offset: int, buffers: Sequence[memoryview]) -> None:
        time.sleep(0.1)
        read_into(self, offset, buffers)

    monkeypatch.setattr(PositionalFile, "read_into", slow)
    result = average_checkpoints(sources, tmp_path / "out", device="cpu")
    assert result.times.bottleneck == "reading"


@pytest.mark.parametrize(
    ("read_nbytes", "runs_model", "has_started", "expected"),
    [
        (39 * 10**9, False, False, "cpu"),
        (40 * 10**9, False, False, "cuda:1"),
        (0, True, False, "cuda:1"),
        (10**9, False, True, "cuda:1"),
        (10**8, False, True, "cpu"),
    ],
)
def test_auto_takes_a_gpu_where_it_pays(
    monkeypatch: pytest.MonkeyPatch,
    read_nbytes: int,
    runs_model: bool,
    has_started: bool,
    expected: str,
) -> None:
    monkeypatch.setattr("ckptavg.average._has_nvidia_driver", lambda: True)
    for name, value in (
        ("is_available", True),
        ("device_count", 2),
        ("is_initialized", has_started),
    ):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    from ckptavg.average import choose_device

    chosen = choose_device("auto", read_nbytes=read_nbytes, runs_model=runs_model, local_rank=3)
    assert chosen == expected
    monkeypatch.setattr("ckptavg.average._has_nvidia_driver", lambda: False)
    assert choose_device("auto", read_nbytes=10**12, runs_model=True) == "cpu"
