"""The BatchNorm pass shared by several processes: the statistics of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file
from test_batchnorm import TOLERANCE
from test_processes import torchrun
from torch import nn

from ckptavg import BnPass, UsageError, average_checkpoints, recompute_bn_stats
from ckptavg.batchnorm import recompute_together
from ckptavg.bn_options import BnOptions
from ckptavg.processes import Processes

# batches of other sizes, whose means drift, so that every share has other statistics
MODULE = """
import os, time
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 2)
        self.second = nn.BatchNorm1d(2)
    def forward(self, x):
        return self.second(self.linear(self.first(x)))

def build():
    torch.manual_seed(0)
    return Net()

def samples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(150, 3, generator=generator) + torch.arange(150)[:, None] / 30

def batches():
    return list(torch.split(samples(), [40, 7, 3, 50, 20, 25, 5]))

def own_share():
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return batches()[rank::size]

def shared_out():
    data = samples()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sampler = DistributedSampler(data, num_replicas=size, rank=rank, shuffle=False)
    return DataLoader(data, batch_size=15, sampler=sampler)

def fails_in_one():
    if os.environ["RANK"] == "1":
        raise OSError("no such disk")
    return batches()

def metric(model):
    with open(f"evaluated-{os.environ['RANK']}", "a"):
        pass
    return float(model.first.running_mean[0])
"""
PRELUDE = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
os.chdir(sys.argv[1])
import torch
import parts
from ckptavg import BnPass, average_checkpoints, recompute_bn, recompute_bn_stats
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    import parts  # type: ignore[import-not-found]  # just written

    return importlib.reload(parts)


def run(tmp_path: Path, body: str, n_processes: int) -> Any:
    (tmp_path / "script.py").write_text(PRELUDE + body)
    return torchrun(str(tmp_path / "script.py"), str(tmp_path), n_processes=n_processes)


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.double() for name, buffer in model.named_buffers()}


def assert_alike(found: dict[str, Any], expected: nn.Module) -> None:
    """Compare buffers; standard deviations here are about 1."""
    for name, buffer in statistics(expected).items():
        value = torch.tensor(found[name]).double()
        assert torch.allclose(value, buffer, rtol=TOLERANCE, atol=TOLERANCE), name


@pytest.mark.parametrize("n_processes", [2, 4])
@pytest.mark.parametrize("estimator", ["population", "paper", "torch"])
def test_statistics_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, parts: Any, n_processes: int, estimator: str
) -> None:
    body = f"""
model = parts.build()
report = recompute_bn_stats(
    model, parts.batches(), estimator={estimator!r}, distributed=True
)
told = {{name: buffer.tolist() for name, buffer in model.named_buffers()}}
counts = [report.n_batches, report.n_samples, report.n_processes, report.layers[0].n_elements]
(folder / f"told-{{rank}}.json").write_text(json.dumps([told, counts]))
"""
    ended = run(tmp_path, body, n_processes)
    assert ended.returncode == 0, ended.stderr
    alone = parts.build()
    recompute_bn_stats(alone, parts.batches(), estimator=estimator)  # type: ignore[arg-type]
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(n_processes)]
    assert all(one == told[0] for one in told)
    assert told[0][1] == [7, 150, n_processes, 150]
    assert_alike(told[0][0], alone)


def test_loaders_that_share_the_data_out_themselves_are_used_whole(
    tmp_path: Path, parts: Any
) -> None:
    body = """
for name, options in (("own", {"data_per_process": True}), ("sampler", {})):
    model = parts.build()
    data = parts.own_share() if name == "own" else parts.shared_out()
    report = recompute_bn_stats(model, data, distributed=True, **options)
    assert report.n_samples == 150, report
    if rank == 0:
        told = {name: buffer.tolist() for name, buffer in model.named_buffers()}
        (folder / f"{name}.json").write_text(json.dumps(told))
# limits count the batches of all, where they take turns
assert recompute_bn_stats(
    parts.build(), parts.batches(), distributed=True, max_batches=3
).n_samples == 50
assert recompute_bn_stats(
    parts.build(), parts.batches(), distributed=True, max_samples=48
).n_batches == 3
"""
    ended = run(tmp_path, body, 2)
    assert ended.returncode == 0, ended.stderr
    alone = parts.build()
    recompute_bn_stats(alone, parts.batches())
    assert_alike(json.loads((tmp_path / "own.json").read_text()), alone)
    by_hand = parts.build()
    sampled = [parts.samples()[rank::2].split(15) for rank in range(2)]
    recompute_bn_stats(by_hand, [batch for share in sampled for batch in share])
    assert_alike(json.loads((tmp_path / "sampler.json").read_text()), by_hand)


def test_a_process_without_batches_and_one_that_fails(tmp_path: Path, parts: Any) -> None:
    body = """
model = parts.build()
report = recompute_bn_stats(model, parts.batches()[:1], distributed=True)
assert (report.n_batches, report.n_samples) == (1, 40)
before = [buffer.clone() for buffer in model.buffers()]
def failing():
    yield from parts.batches()[:3]
    if rank == 1:
        raise OSError("no such disk")
try:
    recompute_bn_stats(model, failing(), distributed=True)
except Exception as error:
    (folder / f"told-{rank}").write_text(f"{type(error).__name__}: {error}")
assert all(torch.equal(one, other) for one, other in zip(before, model.buffers()))
"""
    ended = run(tmp_path, body, 2)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "told-1").read_text() == "OSError: no such disk"
    assert (
        (tmp_path / "told-0")
        .read_text()
        .startswith("ProcessError: rank 1 failed: unexpected OSError: no such disk")
    )


def _checkpoints(tmp_path: Path, parts: Any) -> list[Path]:
    paths = []
    for step in range(3):
        torch.manual_seed(step)
        state = {
            name: value + step if value.is_floating_point() else value
            for name, value in parts.build().state_dict().items()
        }
        paths.append(save_checkpoint(tmp_path / f"step-{step}", state, "safetensors"))
    return paths


def test_averaging_and_the_pass_under_torchrun_equal_one_process(
    tmp_path: Path, parts: Any
) -> None:
    paths = _checkpoints(tmp_path, parts)
    options = ["--model", "parts:build", "--data", "parts:batches", "--eval", "parts:metric"]
    arguments = ["-m", "ckptavg", "average", *map(str, paths), "-o", str(tmp_path / "out")]
    several = ["--scheme", "uniform", "--scheme", "uniform:last=2", "--compare-bn", "--json"]
    ended = torchrun(*arguments, *options, *several, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert [one["batchnorm"]["n_processes"] for one in told["outputs"]] == [2, 2]
    assert (tmp_path / "evaluated-0").exists()
    assert not (tmp_path / "evaluated-1").exists()
    average_checkpoints(
        paths,
        tmp_path / "alone",
        schemes=["uniform", "uniform:last=2"],
        batchnorm=BnPass(model=parts.build, batches=parts.batches),
    )
    for name in ("uniform", "uniform-last2"):
        shared, alone = (
            load_file(tmp_path / folder / name / "model.safetensors") for folder in ("out", "alone")
        )
        for key, value in alone.items():
            assert torch.allclose(shared[key], value, rtol=TOLERANCE, atol=TOLERANCE), key
    assert not list(tmp_path.glob("*.partial-*"))


def test_recompute_bn_under_torchrun_publishes_nothing_if_one_fails(
    tmp_path: Path, parts: Any
) -> None:
    path = _checkpoints(tmp_path, parts)[0]
    arguments = ["-m", "ckptavg", "recompute-bn", str(path), "-o", str(tmp_path / "out")]
    ended = torchrun(
        *arguments, "--model", "parts:build", "--data", "parts:fails_in_one", cwd=tmp_path
    )
    assert ended.returncode != 0
    assert "the BatchNorm pass failed: OSError: no such disk" in ended.stderr
    assert not list(tmp_path.glob("out*"))
    ended = torchrun(*arguments, "--model", "parts:build", "--data", "parts:batches", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("layers recomputed") == 1
    assert "over 150 samples in 7 batches" in ended.stdout


def test_several_processes_cannot_decide_when_they_have_converged(parts: Any) -> None:
    processes = Processes()
    processes.size = 2
    with pytest.raises(UsageError, match="^until_converged: several processes cannot decide"):
        recompute_together(
            parts.build(),
            parts.batches,
            BnOptions(until_converged=0.1),
            processes=processes,
        )


def test_shuffled_data_comes_in_the_same_order_everywhere(tmp_path: Path, parts: Any) -> None:
    """Ranks of a training script are seeded differently; they take turns in one order."""
    body = """
import random
from torch.utils.data import DataLoader
torch.manual_seed(rank)
random.seed(rank)
seen = []
def forward(model, batch):
    seen.extend(batch[:, 0].tolist())
    return model(batch)
loader = DataLoader(parts.samples(), batch_size=15, shuffle=True)
recompute_bn_stats(parts.build(), loader, forward=forward, distributed=True)
(folder / f"seen-{rank}.json").write_text(json.dumps(seen))
"""
    ended = run(tmp_path, body, 2)
    assert ended.returncode == 0, ended.stderr
    seen: list[float] = []
    for rank in range(2):
        seen += json.loads((tmp_path / f"seen-{rank}.json").read_text())
    assert sorted(seen) == sorted(parts.samples()[:, 0].tolist())


def test_code_that_exits_in_one_process_is_a_failure_in_all(tmp_path: Path, parts: Any) -> None:
    body = """
from ckptavg import BnPass, CkptavgError
def exits():
    if rank == 1:
        sys.exit(3)
    return parts.batches()
try:
    recompute_bn(
        sys.argv[1] + "/step-0.safetensors", folder / "out",
        BnPass(model=parts.build, batches=exits), distributed=True,
    )
except CkptavgError as error:
    (folder / f"told-{rank}").write_text(f"{type(error).__name__}: {error}")
"""
    _checkpoints(tmp_path, parts)
    ended = run(tmp_path, body, 2)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "told-0").read_text() == (
        "ProcessError: rank 1 failed: unexpected SystemExit: 3; nothing was published"
    )
    assert (tmp_path / "told-1").read_text() == (
        "ModelError: the BatchNorm pass failed: SystemExit: 3"
    )
    assert not list(tmp_path.glob("out*"))


def test_models_with_other_layers_are_told(tmp_path: Path, parts: Any) -> None:
    body = """
model = parts.build()
if rank:
    model.second = torch.nn.Identity()
try:
    recompute_bn_stats(model, parts.batches(), distributed=True)
except Exception as error:
    (folder / f"told-{rank}").write_text(str(error))
"""
    ended = run(tmp_path, body, 2)
    assert ended.returncode == 0, ended.stderr
    told = {(tmp_path / f"told-{rank}").read_text() for rank in range(2)}
    assert told == {"the processes have models with different BatchNorm layers"}
