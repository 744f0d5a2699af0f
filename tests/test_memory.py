"""Memory is a promise with a number: anonymous memory of a fresh process, flat in everything."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from dcp_files import cut, save_dcp
from memory_probe import WATCH
from safetensors.torch import save_file

MB = 10**6
CHECKPOINT_MB = 200
BUDGET_MB = 64

# samples RssAnon while averaging; prints the largest, what numpy (or CUDA, too) takes alone, and
# what the plan says, in bytes
PROBE = (
    WATCH
    + """
import json, sys, numpy, pytest
from typing import Any, NamedTuple

output, options, sources = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
if options["device"] == "cuda":
    import torch
    torch.empty(0, device="cuda")
memory = here()
from ckptavg import Recipe, average_checkpoints
from ckptavg import prepare
from ckptavg.prepare import chosen_schemes, prepared_average

if rows := options.pop("rows", None):
    import statistic_rows as made
    from ckptavg.plan import plan_average
    rows = [eval(row, vars(made) | {"n": len(sources)}) for row in rows]
    prepare.plan_average = lambda *args, **named: made.with_rows(plan_average(*args, **named), rows)
with watched(memory):
    result = average_checkpoints(sources, output, overwrite=True, **options)
assert options["device"] == "cuda" or "torch" not in sys.modules
recipe = Recipe(
    schemes=chosen_schemes(options.pop("schemes", ()), None), dtype=options.pop("dtype", "same")
)
options["compare"] = options.pop("check_trajectory", False)
with prepared_average(sources, output, recipe, overwrite=True, **options) as prepared:
    workspace = prepared.workspace
print(json.dumps([
    memory.largest - memory.baseline, workspace.host_nbytes, workspace.max_host_nbytes,
    result.peak_device_bytes, workspace.device_nbytes,
]))
"""
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Return 24 checkpoints of 200 MB in each format; four files, linked six times over."""
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
    for copy in range(6):
        for index in range(4):
            for suffix in paths:
                linked = folder / f"{copy}-{index}.{suffix}"
                os.link(folder / f"{index}.{suffix}", linked)
                paths[suffix].append(linked)
    return paths


class Measured(NamedTuple):
    host_nbytes: int
    promised_host_nbytes: int
    promised_max_host_nbytes: int
    device_nbytes: int | None
    promised_device_nbytes: int


def measured(paths: list[Path], output: Path, **options: Any) -> Measured:
    result = subprocess.run(
        [
            sys.executable, "-c", PROBE, str(output), json.dumps({"device": "cpu", **options}),
            *map(str, paths),
        ],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    return Measured(*json.loads(result.stdout))


EIGHT = [
    "uniform",
    "uniform:last=2",
    "uniform:first=3",
    *(f"c{n}=coefficients:{n / 10},{1 - n / 10},0,0" for n in range(1, 6)),
]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.promise(9)
def test_memory_stays_within_the_budget_and_does_not_grow_with_checkpoints(
    checkpoints: dict[str, list[Path]], tmp_path: Path
) -> None:
    peaks = []
    for suffix in ("safetensors", "pt"):
        for count in (4, 16):
            found = measured(
                checkpoints[suffix][:count], tmp_path / "out", memory_budget_bytes=BUDGET_MB * MB
            )
            assert found.host_nbytes <= found.promised_max_host_nbytes <= BUDGET_MB * MB
            peaks.append(found.host_nbytes)
    assert max(peaks) <= 1.1 * min(peaks), peaks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.promise(9)
def test_a_torch_file_is_written_within_the_same_budget(
    checkpoints: dict[str, list[Path]], tmp_path: Path
) -> None:
    found = measured(
        checkpoints["pt"][:4], tmp_path / "out",
        memory_budget_bytes=BUDGET_MB * MB, output_format="torch",
    )  # fmt: skip
    assert (tmp_path / "out/model.pt").stat().st_size > CHECKPOINT_MB * MB
    assert found.host_nbytes <= found.promised_max_host_nbytes <= BUDGET_MB * MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.promise(9)
def test_sharded_tensors_are_averaged_within_the_budget(tmp_path: Path, axis: int) -> None:
    """torch puts the whole model together in memory first."""
    paths = []
    for index in range(2):
        paths.append(tmp_path / f"step-{index}")
        tensors = {f"layer.{n}.weight": torch.randn(3000, 4000) for n in range(4)}  # 48 MB each
        save_dcp(paths[-1], tensors, lambda _, value: cut(value.shape, axis, [800, 1500, 2200]))
    found = measured(paths, tmp_path / "out", memory_budget_bytes=BUDGET_MB * MB)
    assert found.host_nbytes <= found.promised_max_host_nbytes <= BUDGET_MB * MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.promise(9)
def test_channels_last_weights_are_read_within_the_budget(tmp_path: Path) -> None:
    weight = torch.randn(512, 512, 7, 7).contiguous(memory_format=torch.channels_last)  # 51 MB
    transposed = torch.randn(3000, 4000).t()  # 48 MB
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"epoch-{index}.pt")
        torch.save({"conv": weight, "linear": transposed}, paths[-1])
    found = measured(paths, tmp_path / "out", memory_budget_bytes=BUDGET_MB * MB)
    assert found.host_nbytes <= BUDGET_MB * MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("schemes", [["uniform"], EIGHT], ids=["one average", "eight"])
@pytest.mark.promise(9)
def test_the_plan_tells_the_memory_that_a_run_takes(
    checkpoints: dict[str, list[Path]], tmp_path: Path, schemes: list[str], device: str
) -> None:
    found = measured(
        checkpoints["safetensors"][:4], tmp_path / "out",
        schemes=schemes, device=device, n_threads=2 if device == "cpu" else None,
    )  # fmt: skip
    # interpreters differ by some megabytes, which weigh where the buffers are few
    assert found.host_nbytes == pytest.approx(found.promised_host_nbytes, rel=0.1, abs=4 * MB)
    assert found.host_nbytes <= 512 * 2**20
    if found.device_nbytes is not None:
        assert found.device_nbytes == pytest.approx(found.promised_device_nbytes, rel=0.1)
        assert found.device_nbytes <= 2**30


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_checkpoints_are_compared_within_the_budget(
    checkpoints: dict[str, list[Path]], tmp_path: Path
) -> None:
    found = measured(
        checkpoints["safetensors"], tmp_path / "out", check_trajectory=True,
        memory_budget_bytes=BUDGET_MB * MB,
    )  # fmt: skip
    assert found.host_nbytes <= found.promised_max_host_nbytes <= BUDGET_MB * MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_plan_tells_the_memory_that_a_comparison_takes(
    checkpoints: dict[str, list[Path]], tmp_path: Path, device: str
) -> None:
    found = measured(
        checkpoints["safetensors"][:8], tmp_path / "out",
        check_trajectory=True, device=device, n_threads=2 if device == "cpu" else None,
    )  # fmt: skip
    assert found.host_nbytes == pytest.approx(found.promised_host_nbytes, rel=0.1, abs=4 * MB)
    if found.device_nbytes is not None:
        assert found.device_nbytes <= 1.02 * found.promised_device_nbytes
        assert found.device_nbytes <= 2**30


ORDER = ["mean(n)", "median(n)", "trimmed(n, 3)", "median(n, last=5)"]
NOISE = ["mean(n)", *(f"noisy(mean(n), sample={sample})" for sample in range(5))]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("rows", [ORDER, NOISE], ids=["order statistics", "noise"])
@pytest.mark.promise(9)
def test_statistics_of_24_checkpoints_are_taken_within_the_budget(
    checkpoints: dict[str, list[Path]], tmp_path: Path, rows: list[str]
) -> None:
    found = measured(
        checkpoints["safetensors"], tmp_path / "out", rows=rows,
        memory_budget_bytes=BUDGET_MB * MB,
    )  # fmt: skip
    assert found.host_nbytes <= found.promised_max_host_nbytes <= BUDGET_MB * MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("rows", [ORDER, NOISE], ids=["order statistics", "noise"])
@pytest.mark.parametrize("dtype", ["same", "bfloat16"])
def test_the_plan_tells_the_memory_that_statistics_take(
    checkpoints: dict[str, list[Path]], tmp_path: Path, rows: list[str], dtype: str, device: str
) -> None:
    if rows is NOISE and device != "cpu":
        pytest.skip("noise is drawn on the CPU")
    found = measured(
        checkpoints["safetensors"][:8], tmp_path / "out",
        rows=rows, device=device, dtype=dtype, n_threads=2 if device == "cpu" else None,
    )  # fmt: skip
    assert found.host_nbytes == pytest.approx(found.promised_host_nbytes, rel=0.1, abs=4 * MB)
    if found.device_nbytes is not None:
        assert found.device_nbytes == pytest.approx(found.promised_device_nbytes, rel=0.1)
        assert found.device_nbytes <= 2**30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.promise(9)
def test_device_memory_stays_within_what_the_plan_says(
    checkpoints: dict[str, list[Path]], tmp_path: Path
) -> None:
    peaks = []
    for count in (4, 16):
        found = measured(checkpoints["safetensors"][:count], tmp_path / f"{count}", device="cuda")
        assert found.device_nbytes is not None
        assert found.device_nbytes <= found.promised_device_nbytes <= 2**30
        peaks.append(found.device_nbytes)
    assert peaks[0] == peaks[1]
