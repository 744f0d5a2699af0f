"""Which entry of a checkpoint holds the weights, for what trainers of many kinds write."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_contract import same_content
from hostile import whole
from torch import nn

from ckptavg.checkpoint import open_checkpoint
from ckptavg.checkpoint.state_dict import is_training_state
from ckptavg.errors import CheckpointError

RAW, AVERAGE = {"w": torch.zeros(2)}, {"w": torch.ones(2)}


def saved(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "w.pt"
    torch.save(content, path)
    return path


def adam_state() -> dict[str, Any]:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "key",
    [
        "optimizer", "optimizers", "optim", "optims", "optimizer_0", "optimizer_states",
        "optimizer_state_dict", "optimizer_G", "optim_g", "optimiser", "opt_state", "lr_scheduler",
        "lr_schedulers", "scheduler", "scheduler_state_dict", "sched", "swa_scheduler", "scaler",
        "grad_scaler", "amp", "amp_scaler", "scaler_state_dict", "rng", "rng_states",
        "cuda_rng_state", "random_states", "train_state", "training_state", "trainer_state",
        "dataloader", "data_loader", "train_dataloader", "sampler", "batch_sampler", "loops",
        "callbacks", "averaging_state", "loss_state_dict",
    ],
)  # fmt: skip
def test_what_serves_to_go_on_training_is_no_weights(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path, {"w": torch.ones(2), key: {"inner": adam_state(), "m": torch.ones(2)}})
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, {"w": torch.ones(2)})
    assert checkpoint.notes == [f"left out, not tensors: '{key}'"]


@pytest.mark.parametrize(
    "key",
    [
        "generator", "encoder", "upsampler", "resampler", "optimus", "optimal", "scale", "trainer",
        "model_state", "amplifier", "strng", "train_net",
    ],
)  # fmt: skip
def test_networks_are_not_taken_for_training_state(key: str) -> None:
    assert not is_training_state(key)


def test_the_advice_never_names_training_state(tmp_path: Path) -> None:
    path = saved(tmp_path, {"optimizer": adam_state(), "encoder": {"w": torch.ones(1)}})
    message = (
        f"{path}: no weights found at its top level, which holds 'optimizer', 'encoder'; choose "
        "one with --state-key, for example --state-key encoder"
    )
    with pytest.raises(CheckpointError, match=whole(message)):
        open_checkpoint(path)
    path = saved(tmp_path, {"optimizer": {"state": torch.ones(1)}})
    message = f"{path}: no weights found at its top level, which holds 'optimizer'"
    with pytest.raises(CheckpointError, match=whole(message)):
        open_checkpoint(path)
    assert list(open_checkpoint(path, state_key="optimizer").tensors) == ["state"]


def test_averages_of_lightning_are_noted_and_the_raw_weights_can_be_chosen(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        {
            "state_dict": AVERAGE,
            "current_model_state": RAW,
            "averaging_state": {"n_averaged": torch.tensor(7)},
            "optimizer_states": [adam_state()],
            "epoch": 3,
            "global_step": 70,
        },
    )
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, AVERAGE)
    assert checkpoint.notes == [
        "its 'state_dict' holds averages that training kept already (WeightAveraging); "
        "--state-key current_model_state selects the weights of this step"
    ]
    checkpoint = open_checkpoint(path, state_key="current_model_state")
    assert same_content(checkpoint, RAW)
    assert (checkpoint.notes, checkpoint.step) == ([], 70)


def test_averages_of_timm_are_noted_and_can_be_chosen(tmp_path: Path) -> None:
    content = {
        "epoch": 4, "arch": "resnet18", "state_dict": RAW, "optimizer": adam_state(), "version": 2,
        "state_dict_ema": AVERAGE, "metric": 71.5,
    }  # fmt: skip
    path = tmp_path / "checkpoint-4.pth.tar"
    torch.save(content, path)
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, RAW)
    assert checkpoint.notes == ["also holds 'state_dict_ema'; --state-key selects it"]
    assert (checkpoint.epoch, checkpoint.metrics) == (4, {"metric": 71.5})
    assert same_content(open_checkpoint(path, state_key="state_dict_ema"), AVERAGE)


def test_the_note_on_an_average_leads_to_its_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": RAW, "ema": {"module": AVERAGE, "decay": 0.9}})
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, RAW)
    assert checkpoint.notes == ["also holds 'ema.module'; --state-key selects it"]
    assert same_content(open_checkpoint(path, state_key="ema.module"), AVERAGE)
    path = saved(tmp_path, {"model": {"state_dict": RAW, "ema": AVERAGE}})
    assert open_checkpoint(path).notes == ["also holds 'model.ema'; --state-key selects it"]
    assert same_content(open_checkpoint(path, state_key="model.ema"), AVERAGE)


def test_fairseq_and_several_networks(tmp_path: Path) -> None:
    content = {"model": RAW, "extra_state": {"train_iterator": {"epoch": 2}}, "args": None}
    content |= {"last_optimizer_state": adam_state()}
    assert same_content(open_checkpoint(saved(tmp_path, content)), RAW)
    path = saved(
        tmp_path, {"generator": RAW, "discriminator": RAW, "optimizer_g": adam_state(), "it": 5}
    )
    message = (
        f"{path}: no weights found at its top level, which holds 'generator', 'discriminator', "
        "'optimizer_g', 'it'; choose one with --state-key, for example --state-key generator"
    )
    with pytest.raises(CheckpointError, match=whole(message)):
        open_checkpoint(path)
