"""Step and epoch as names of files and directories tell them."""

import pytest

from ckptavg.checkpoint.position import Position, position_from_name, training_order


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
        ("checkpoint_3_1500.pt", 1500, 3),
        ("checkpoint-3-1500", 1500, 3),
        ("checkpoint_3_0.25.pt", 3, None),
        ("checkpoint_3_1500_x.pt", 3, None),
        ("checkpoint1.pt", 1, None),
        ("checkpoint-12.pth.tar", 12, None),
        ("12epoch.pth", None, 12),
        ("12-epochs.pth", None, 12),
        ("iter_0000100", 100, None),
        ("network-snapshot-0000393-0.050.pt", 393, None),
        ("model--val_loss=0.10-step=10-consumed_samples=80", 10, None),
        ("epoch=3-step=900-v1.ckpt", 900, 3),
        ("100.pt", 100, None),
        ("0100.pth.tar", 100, None),
        ("run/100", 100, None),
        ("100.txt", None, None),
        ("model_0009999.pth", None, None),
        ("G_1000.pth", None, None),
        ("recovery-0-500.pth.tar", None, None),
        ("checkpoint_last.pt", None, None),
        ("1000/model.safetensors", None, None),
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


@pytest.mark.parametrize(
    ("positions", "order"),
    [
        ([(30, None), (4, None), (200, None)], [1, 0, 2]),
        ([(30, 1), (4, 2)], [1, 0]),
        ([(None, 3), (5, 1), (None, 2)], [1, 2, 0]),
        ([(5, 3), (5, 1)], [1, 0]),
        ([(5, None), (5, None)], [0, 1]),
        ([(None, None), (1, None)], [0, 1]),
        ([], []),
    ],
    ids=str,
)
def test_steps_order_before_epochs_and_the_order_given(
    positions: list[tuple[int | None, int | None]], order: list[int]
) -> None:
    assert training_order([Position(*one) for one in positions]) == order
