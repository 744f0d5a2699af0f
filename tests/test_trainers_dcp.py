"""Checkpoints that torch.distributed.checkpoint saved in several processes, averaged by one."""

from pathlib import Path

import pytest
from trainers import truth
from trainers.checks import assert_mean, averaged, is_tied, moved

from ckptavg import inspect_checkpoint

# what torch's safetensors writers cannot store, or lose
ABSENT = {
    "safetensors": {"head.weight"},
    "hugging-face": {"head.weight"},
    "hugging-face-consolidated": {"head.weight", "seen", "norm.num_batches_tracked"},
}
SAVED_BY_TORCH = (
    "nested", "flat", "weights-only", "file-per-tensor", "files-per-rank", "async", "safetensors",
    "hugging-face", "hugging-face-consolidated", "tensor-parallel", "tensor-parallel-fsdp", "fsdp1",
)  # fmt: skip
HAND_MADE = ("megatron", "olmo", "nemo")
TELL_THEIR_STEP = ("nested", "flat", "tensor-parallel", "fsdp1", *HAND_MADE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of runs, each with three checkpoints."""
    directory = tmp_path_factory.mktemp("runs")
    truth.make("dcp", directory)
    return truth.make("handmade", directory)


@pytest.mark.parametrize("run", [*SAVED_BY_TORCH, *HAND_MADE])
def test_a_list_of_checkpoints_is_averaged_to_the_mean_of_the_true_weights(
    runs: Path, tmp_path: Path, run: str
) -> None:
    saved = truth.read(runs, run)
    found = averaged([each.path for each in saved], tmp_path / "out")
    assert_mean(found, saved, absent=ABSENT.get(run, set()))


@pytest.mark.parametrize("run", [*SAVED_BY_TORCH, *HAND_MADE])
def test_a_run_directory_is_averaged_in_the_order_of_its_steps(
    runs: Path, tmp_path: Path, run: str
) -> None:
    saved = truth.read(runs, run)
    found = averaged(saved[0].path.parent, tmp_path / "out")
    assert_mean(found, saved, absent=ABSENT.get(run, set()))


@pytest.mark.parametrize("run", ["nested", "flat", "hugging-face", "megatron", "olmo", "nemo"])
def test_the_last_checkpoints_of_a_run_are_those_of_the_highest_steps(
    runs: Path, tmp_path: Path, run: str
) -> None:
    saved = truth.read(runs, run)
    found = averaged(saved[0].path.parent, tmp_path / "out", last=2)
    assert_mean(found, saved[1:], absent=ABSENT.get(run, set()))


@pytest.mark.parametrize("run", TELL_THEIR_STEP)
def test_the_step_is_told(runs: Path, run: str) -> None:
    saved = truth.read(runs, run)
    assert [inspect_checkpoint(each.path).step for each in saved] == [2, 4, 10]


def test_the_makers_save_what_is_hard(runs: Path) -> None:
    saved = truth.read(runs, "nested")
    weights = saved[0].weights
    assert is_tied(saved, "embed.weight", "head.weight")
    assert moved(saved) == set(weights)
    assert weights["scale"].shape == weights["seen"].shape == ()
    assert {str(value.dtype) for value in weights.values()} == {
        "torch.float32", "torch.bfloat16", "torch.int64",
    }  # fmt: skip
    assert len(weights["layers.1.bias"]) < 4
