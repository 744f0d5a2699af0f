"""Step and epoch as names of files and directories tell them."""

import pytest

from ckptavg.checkpoint.position import Position, position_from_name


@pytest.mark.parametrize(
    ("path", "step", "epoch"),
    [
        ("runs/exp7/checkpoint-500", 500, None),
        ("runs/exp7/checkpoint-500/model.safetensors", 500, None),
        ("checkpoint-500/pytorch_model.bin", 500, None),
        ("step_1000.pt", 1000, None),
        ("step=1000.ckpt", 1000, None),
        ("step1000", 1000, None),
        ("model_step-0000100.pt", 100, None),
        ("global_step143000", 143000, None),
        ("global-step-7.pt", 7, None),
        ("globalstep7", 7, None),
        ("iter_0005000.pth", 5000, None),
        ("iteration-12", 12, None),
        ("update_12.pt", 12, None),
        ("ckpt_12.tar", 12, None),
        ("ckpt12.pt", 12, None),
        ("CHECKPOINT-9", 9, None),
        ("epoch=3-step=900.ckpt", 900, 3),
        ("epoch-012.pt", None, 12),
        ("epoch_5.pth", None, 5),
        ("epochs5.pth", None, 5),
        ("ep7.pt", None, 7),
        ("model_ep7.pt", None, 7),
        ("model.ep-7.pt", None, 7),
        ("deep3.pt", None, None),
        ("steep_12.pt", None, None),
        ("model.pt", None, None),
        ("model-00001-of-00003.safetensors", None, None),
        ("resnet50.pth", None, None),
        ("a/b/c/step_5/d/model.pt", None, None),
        ("step_1/step_2", 2, None),
        ("step-1-step-2.pt", 2, None),
        ("checkpoint-" + "9" * 19, None, None),
        ("step_1000000000000000000000000", None, None),
        ("step_" + "9" * 18, 10**18 - 1, None),
        ("", None, None),
        ("/", None, None),
    ],
)
def test_names_tell_step_and_epoch(path: str, step: int | None, epoch: int | None) -> None:
    assert position_from_name(path) == Position(step, epoch)
