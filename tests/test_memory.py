"""Memory is a promise with a number: anonymous memory of a fresh process, flat in everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MB = 10**6
CHECKPOINT_MB = 200
BUDGET_MB = 64

# samples RssAnon while averaging; prints the largest, and what numpy alone takes, in bytes
PROBE = """
import re, sys, threading, numpy
from pathlib import Path

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s*(\\d+)", status)[1]) * 1024

baseline = anonymous()
from ckptavg import average_checkpoints

largest, done = 0, threading.Event()
def watch():
    global largest
    while not done.wait(0.002):
        largest = max(largest, anonymous())
thread = threading.Thread(target=watch)
thread.start()
average_checkpoints(sys.argv[3:], sys.argv[1], memory_budget_bytes=int(sys.argv[2]), overwrite=True)
done.set()
thread.join()
assert "torch" not in sys.modules
print(max(largest, anonymous()), baseline)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Return 16 checkpoints of 200 MB in each format; four files, linked four times over."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    paths: dict[str, list[Path]] = {"safetensors": [], "pt": []}
    for index in range(4):
        tensors = {
            f"layer.{n}.weight": torch.randn(CHECKPOINT_MB // 20, 250_000, generator=generator)
            for n in range(20)
        }
        tensors |= {f"layer.{n}.bias": torch.randn(n, generator=generator) for n in range(40)}
        save_file(tensors, folder / f"{index}.safetensors")
        torch.save({"state_dict": tensors, "epoch": index}, folder / f"{index}.pt")
    for copy in range(4):
        for index in range(4):
            for suffix in paths:
                linked = folder / f"{copy}-{index}.{suffix}"
                os.link(folder / f"{index}.{suffix}", linked)
                paths[suffix].append(linked)
    return paths


def peak(paths: list[Path], output: Path, budget: int) -> tuple[int, int]:
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(output), str(budget), *map(str, paths)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    largest, baseline = map(int, result.stdout.split())
    return largest, baseline


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_within_the_budget_and_does_not_grow_with_checkpoints(
    checkpoints: dict[str, list[Path]], tmp_path: Path
) -> None:
    peaks = []
    for suffix in ("safetensors", "pt"):
        for count in (4, 16):
            largest, baseline = peak(checkpoints[suffix][:count], tmp_path / "out", BUDGET_MB * MB)
            assert largest <= baseline + BUDGET_MB * MB, (suffix, count)
            peaks.append(largest)
    assert max(peaks) <= 1.1 * min(peaks), peaks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_channels_last_weights_are_read_within_the_budget(tmp_path: Path) -> None:
    weight = torch.randn(512, 512, 7, 7).contiguous(memory_format=torch.channels_last)  # 51 MB
    transposed = torch.randn(3000, 4000).t()  # 48 MB
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"epoch-{index}.pt")
        torch.save({"conv": weight, "linear": transposed}, paths[-1])
    largest, baseline = peak(paths, tmp_path / "out", BUDGET_MB * MB)
    assert largest <= baseline + BUDGET_MB * MB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_memory_stays_within_what_the_plan_says(
    checkpoints: dict[str, list[Path]], tmp_path: Path
) -> None:
    from ckptavg import Recipe, average_checkpoints
    from ckptavg.pipeline import prepared_average

    peaks = []
    for count in (4, 16):
        paths = checkpoints["safetensors"][:count]
        with prepared_average(paths, tmp_path / f"{count}", Recipe(), device="cuda") as prepared:
            promised = prepared.workspace.device_nbytes
        result = average_checkpoints(paths, tmp_path / f"{count}", device="cuda")
        assert result.peak_device_bytes is not None
        assert result.peak_device_bytes <= promised <= 2**30
        peaks.append(result.peak_device_bytes)
    assert peaks[0] == peaks[1]
