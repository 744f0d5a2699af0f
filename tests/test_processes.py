"""Several processes share one run: the same bits as one, or nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FORMATS, save_checkpoint, tree
from safetensors.torch import load_file

from ckptavg import ProcessError, UsageError, average_checkpoints
from ckptavg.average import choose_device
from ckptavg.processes import Processes, joined_processes, started_by_torchrun

# small blocks, so that there is something to share
PRELUDE = """
import json, os, signal, sys
from pathlib import Path
from ckptavg import average_checkpoints, blocks
blocks.BLOCK_NBYTES = 4000
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
sources = sys.argv[2:]
"""


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    return [
        save_checkpoint(
            tmp_path / f"step-{step}",
            {
                "w": torch.randn(9000, generator=generator),
                "n": torch.full((700,), step),
                "b": torch.randn(2000, generator=generator).bfloat16(),
            },
            FORMATS[step],
        )
        for step in range(3)
    ]


def torchrun(
    *arguments: str, n_processes: int = 2, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(n_processes), *arguments,
        ],
        capture_output=True, text=True, check=False, timeout=300, cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def script(tmp_path: Path, body: str, sources: list[Path], n_processes: int = 2) -> Any:
    path = tmp_path / "script.py"
    path.write_text(PRELUDE + body)
    return torchrun(str(path), str(tmp_path), *map(str, sources), n_processes=n_processes)


def test_one_process_is_alone() -> None:
    with joined_processes(distributed=False) as processes:
        assert (processes.rank, processes.size) == (0, 1)
        assert processes.together(lambda: "done") == ["done"]
        assert processes.share([1, 2, 3]) == [1, 2, 3]
        processes.look_out()


def test_shares_are_whole_and_disjoint() -> None:
    for size in (1, 2, 3, 7):
        for count in (0, 1, 2, 9, 100):
            shares = []
            for rank in range(size):
                processes = Processes()
                processes.rank, processes.size = rank, size
                shares.append(processes.share(list(range(count))))
            assert [item for share in shares for item in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_torchrun_there_is_nobody_to_join(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="RANK is not set; start the processes with torchrun"):
        average_checkpoints(sources, tmp_path / "out", distributed=True)
    monkeypatch.setenv("WORLD_SIZE", "4")  # as schedulers set it for other reasons
    assert not started_by_torchrun()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert started_by_torchrun()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not started_by_torchrun()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_process_of_a_host_gets_a_gpu_of_its_own() -> None:
    count = torch.cuda.device_count()
    for local_rank in range(2 * count):
        device = choose_device("cuda", read_nbytes=0, runs_model=False, local_rank=local_rank)
        assert device == f"cuda:{local_rank % count}"
    assert choose_device("cuda:0", read_nbytes=0, runs_model=False, local_rank=1) == "cuda:0"


def test_bits_are_those_of_one_process(tmp_path: Path, sources: list[Path], device: str) -> None:
    body = f"""
    shares = []
    for number, schemes in enumerate(([], ["uniform", "uniform:last=2"])):
        result = average_checkpoints(
            sources, folder / f"out-{{number}}", schemes=schemes, distributed=True,
            device={device!r}, progress=lambda stage, done, total: shares.append(done),
        )
        assert result.n_processes == 3
    told = [sum(shares), [one.differing for one in result.outputs], result.read_nbytes]
    (folder / f"told-{{rank}}.json").write_text(json.dumps(told))
    """
    ended = script(tmp_path, body.replace("\n    ", "\n"), sources, n_processes=3)
    assert ended.returncode == 0, ended.stderr
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(3)]
    assert all(one[0] > 0 for one in told)
    assert sum(one[0] for one in told) == 2 * told[0][2]
    assert [one[1] for one in told] == [[["n"], ["n"]]] * 3
    average_checkpoints(sources, tmp_path / "whole")
    expected = (tmp_path / "whole/model.safetensors").read_bytes()
    assert (tmp_path / "out-0/model.safetensors").read_bytes() == expected
    assert (tmp_path / "out-1/uniform/model.safetensors").read_bytes() == expected
    average_checkpoints(sources, tmp_path / "last", schemes="uniform:last=2")
    assert (tmp_path / "out-1/uniform-last2/model.safetensors").read_bytes() == (
        tmp_path / "last/model.safetensors"
    ).read_bytes()
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_torch_file_is_written_by_several_processes(tmp_path: Path, sources: list[Path]) -> None:
    body = """
average_checkpoints(sources, folder / "out", output_format="torch", distributed=True)
"""
    ended = script(tmp_path, body, sources)
    assert ended.returncode == 0, ended.stderr
    average_checkpoints(sources, tmp_path / "whole", output_format="torch")
    one, other = (tmp_path / name / "model.pt" for name in ("out", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_if_one_fails_all_do_and_nothing_is_published(tmp_path: Path, sources: list[Path]) -> None:
    body = """
from ckptavg import BnPass, CkptavgError
told = []
def attempt(name, **options):
    try:
        average_checkpoints(sources, folder / name, distributed=True, n_threads=1, **options)
        told.append("published")
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
def fail(stage, done, total):
    if rank == 1: raise OSError("no luck")
attempt("a", progress=fail)
attempt("b", dtype="bfloat16" if rank else "same")
attempt("c", state_key="nothing" if rank else None)
(folder / "d").mkdir(exist_ok=True)
attempt("d")
attempt("e", batchnorm=BnPass(model=lambda: 1 / 0, batches=[]))
attempt("f")
(folder / f"told-{rank}.json").write_text(json.dumps(told))
"""
    ended = script(tmp_path, body, sources)
    assert ended.returncode == 0, ended.stderr
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2))
    failed = "rank 1 failed: unexpected OSError: no luck; nothing was published"
    assert first[0] == f"ProcessError: {failed}"
    assert second[0] == "OSError: no luck"
    different = "the processes see different checkpoints or options: all must see the same files"
    assert first[1] == second[1] == f"ProcessError: {different}"
    assert first[2].startswith("ProcessError: rank 1 failed: ")
    assert "--state-key is for torch files" in first[2]
    assert second[2].startswith("CheckpointError: ")
    assert first[3] == second[3]
    assert first[3].startswith(f"OutputError: {tmp_path}/d: already exists")
    assert first[4] == second[4]
    assert first[4] == "ModelError: building the model failed: ZeroDivisionError: division by zero"
    assert first[5] == second[5] == "published"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] in "abcdef") == [
        "d",
        "f",
    ]
    assert tree(tmp_path / "d") == {}


def test_if_one_dies_nothing_is_published_and_the_run_can_be_continued(
    tmp_path: Path, sources: list[Path]
) -> None:
    body = """
import time
calls = []
def die(stage, done, total):
    calls.append(done)
    if rank == 1 and len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
average_checkpoints(sources, folder / "out", distributed=True, n_threads=1, progress=die)
"""
    ended = script(tmp_path, body, sources)
    assert ended.returncode != 0
    assert not (tmp_path / "out").exists()
    again = script(tmp_path, body.replace("== 2", "== 0"), sources)
    assert again.returncode == 0, again.stderr
    average_checkpoints(sources, tmp_path / "whole")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_recipe_under_torchrun_is_saved_and_run_by_all(
    tmp_path: Path, sources: list[Path]
) -> None:
    (tmp_path / "there").mkdir()
    ended = torchrun(
        "-m", "ckptavg", "average", *(path.name for path in sources), "-o", "out",
        "--save-recipe", "there/swa.toml", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    ended = torchrun("-m", "ckptavg", "run", "there/swa.toml", "-o", "again", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "again: average of 3 checkpoints" in ended.stdout
    one, other = tree(tmp_path / "out"), tree(tmp_path / "again")
    assert one.pop("ckptavg.json") != other.pop("ckptavg.json")
    assert one == other


def test_command_line_under_torchrun(tmp_path: Path, sources: list[Path]) -> None:
    ended = torchrun("-m", "ckptavg", "average", *map(str, sources), "-o", str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("average of 3 checkpoints") == 1
    assert "2 processes" in ended.stdout
    assert load_file(tmp_path / "out/model.safetensors")["n"][0] == 2
    ended = torchrun("-m", "ckptavg", "average", *map(str, sources), "-o", str(tmp_path / "out"))
    assert ended.returncode != 0
    assert "already exists; pass --overwrite to replace it" in ended.stderr


def test_processes_of_a_training_script_share_too(tmp_path: Path, sources: list[Path]) -> None:
    """Their process group is used, and is theirs again afterwards."""
    body = """
from torch import distributed
import torch
distributed.init_process_group("gloo")
result = average_checkpoints(sources, folder / "out", distributed=True)
assert result.n_processes == 2
total = torch.ones(1)
distributed.all_reduce(total)
assert total.item() == 2
distributed.destroy_process_group()
"""
    ended = script(tmp_path, body, sources)
    assert ended.returncode == 0, ended.stderr
    average_checkpoints(sources, tmp_path / "whole")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()


def test_processes_that_cannot_be_reached_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("RANK", "x"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "::"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ProcessError, match="cannot join the other processes"),
        joined_processes(distributed=True),
    ):
        pass
