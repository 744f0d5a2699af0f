"""Distributed checkpoints on the Hub: the bits of local copies, in few requests."""

from pathlib import Path

import pytest
import torch
from dcp_files import FILES, cut, dcp_files, grid, nested_dcp, save_dcp
from hub_fixtures import REPO, add_side_files, same_as_local, upload
from loopback_hub import LoopbackHub
from test_dcp_safetensors import save_shards
from test_trainer_layouts import save_deepspeed
from torch import Tensor

from ckptavg.checkpoint import open_checkpoint, open_hub_checkpoint
from ckptavg.errors import CheckpointError
from ckptavg.hub.connection import HubConnection
from ckptavg.tensors import HubRevision


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "embed.weight": torch.randn(60, 70, generator=generator),
        "norm.weight": torch.randn(9, generator=generator).half(),
        "count": torch.tensor(step),
    }


@pytest.mark.parametrize("layout", ["rows", "columns", "folder", "shards", "deepspeed"])
def test_every_layout_averages_like_local_copies(
    hub: LoopbackHub, tmp_path: Path, layout: str
) -> None:
    local = []
    for step in (1, 2):
        tensors = tensors_of(step)
        directory = tmp_path / f"step{step}"
        if layout == "rows":
            nested_dcp(
                directory,
                {"model": tensors, "optimizer": {"w": torch.ones(9000)}, "step": step},
                boxes=lambda _, value: cut(value.shape, 0, [1, 5]) if value.dim() else [((), ())],
            )
        elif layout == "columns":
            save_dcp(directory, tensors, lambda _, value: grid(value.shape))
        elif layout == "folder":
            directory.mkdir()
            save_dcp(directory / "pytorch_model_fsdp_0", tensors)
            save_dcp(directory / "optimizer_0", {"optimizer.w": torch.ones(9)})
        elif layout == "shards":
            save_shards(directory, tensors, lambda _, value: grid(value.shape), n_processes=4)
        else:
            save_deepspeed(directory, tensors, step)
        add_side_files(directory)
        upload(hub, directory)
        local.append(directory)
    result = same_as_local(f"{REPO}@step*", local, tmp_path / "out")
    assert result.n_checkpoints == 2


def requests_of_opening(hub: LoopbackHub, directory: Path) -> int:
    """Return how many requests for content it takes to open a directory that is on the Hub."""
    commit = upload(hub, directory)
    before = len(hub.find("GET", r"\.distcp|\.metadata|blob"))
    checkpoint = open_hub_checkpoint(HubRevision(REPO, directory.name, commit), HubConnection())
    try:
        assert checkpoint.tensors == open_checkpoint(directory).tensors
    finally:
        checkpoint.close()
    return len(hub.find("GET", r"\.distcp|\.metadata|blob")) - before


def test_opening_takes_a_few_requests_for_each_file_whatever_the_parts(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    counts = []
    for n_tensors in (5, 60):
        tensors = {f"layer.{number}.weight": torch.ones(4, 6) for number in range(n_tensors)}
        path = save_dcp(tmp_path / f"of{n_tensors}", tensors, lambda _, value: grid(value.shape))
        counts.append(requests_of_opening(hub, path))
    assert len(FILES) < counts[0] <= 3 * len(FILES) + 1
    assert counts[1] <= counts[0] + len(FILES)  # though there are twelve times as many parts


def test_opening_takes_one_request_for_each_large_part_and_none_of_training_state(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    tensors = {f"model.{number}": torch.ones(100, 200) for number in range(10)}
    state = {f"optimizer.{number}": torch.ones(100, 400) for number in range(10)}
    path = save_dcp(tmp_path / "large", tensors | state, lambda _, value: cut(value.shape, 0, [50]))
    before = hub.sent_bytes
    count = requests_of_opening(hub, path)
    assert count <= 20 + 3 * len(FILES) + 1
    assert hub.sent_bytes - before < 200_000  # of 2.4 MB


def test_a_hostile_distributed_checkpoint_on_the_hub_is_refused(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    files = dcp_files({"w": torch.ones(2)}, names=FILES[:1])
    files.stored("w", (0,)).relative_path = "../other/__0_0.distcp"
    commit = upload(hub, files.write(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="as a file: only plain file names are allowed"):
        open_hub_checkpoint(HubRevision(REPO, "run", commit), HubConnection())
    (tmp_path / "run" / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    commit = upload(hub, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"/\.metadata: needs Python code 'os\.system'"):
        open_hub_checkpoint(HubRevision(REPO, "run", commit), HubConnection())


def test_a_file_that_is_not_on_the_hub_is_missing(hub: LoopbackHub, tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "run", {"w": torch.ones(4, 2)}, lambda *_: cut((4, 2), 0, [1, 2]))
    (path / FILES[1]).unlink()
    commit = upload(hub, path)
    what = rf"/{FILES[1]}: is missing; \.metadata says it is there"
    with pytest.raises(CheckpointError, match=what):
        open_hub_checkpoint(HubRevision(REPO, "run", commit), HubConnection())
