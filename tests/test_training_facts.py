"""What trainers write beside the weights: read where it is plain, and never in the way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import legacy_bytes, mapping, storage, tensor, torch_bytes
from torch import nn

from ckptavg.checkpoint import Checkpoint, open_checkpoint


def opened(tmp_path: Path, content: dict[str, Any], *, legacy: bool = False) -> Checkpoint:
    path = tmp_path / "w.pt"
    content = {"model": {"w": torch.ones(2)}, **content}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return open_checkpoint(path)


def sgd(lr: Any = 0.25) -> dict[str, Any]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = lr
    return state


@pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict", "optimizer_state", "optim"])
def test_the_learning_rate_of_the_first_group_is_read(tmp_path: Path, key: str) -> None:
    state = sgd()
    state["param_groups"].append({"lr": 0.5})
    assert opened(tmp_path, {key: state}).learning_rate == 0.25


def test_the_learning_rate_of_lightning_is_read(tmp_path: Path) -> None:
    content = {"optimizer_states": [sgd(3e-4), sgd(0.5)], "state_dict": {"w": torch.ones(2)}}
    path = tmp_path / "w.ckpt"
    torch.save(content, path)
    assert open_checkpoint(path).learning_rate == 3e-4


@pytest.mark.parametrize(
    "optimizer",
    [
        None, 3, [], {}, {"param_groups": None}, {"param_groups": []}, {"param_groups": [3]},
        {"param_groups": [{}]}, {"param_groups": {"lr": 1.0}}, sgd(True), sgd("0.1"),
        sgd(float("nan")), sgd(float("inf")), sgd(10**400 % 2**500), sgd(torch.tensor(0.1)),
    ],
    ids=range(15),
)  # fmt: skip
def test_an_odd_learning_rate_is_not_known(tmp_path: Path, optimizer: Any) -> None:
    for key, value in (("optimizer", optimizer), ("optimizer_states", [optimizer])):
        found = opened(tmp_path, {key: value}).learning_rate
        assert found is None or found > 1e100  # an integer is a number, however large


def test_nothing_is_known_where_nothing_is_told(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {"epoch": 3})
    assert (checkpoint.learning_rate, checkpoint.metrics) == (None, {})


def test_metrics_are_read_by_their_usual_names(tmp_path: Path) -> None:
    content = {
        "metric": 0.5, "val_loss": 2, "best_acc1": torch.tensor(71.25), "loss": float("nan"),
        "acc": True, "accuracy": "0.5", "eval_loss": torch.ones(3), "train_loss": torch.tensor(1),
        "acc1": torch.tensor([0.75], dtype=torch.bfloat16), "val_acc": torch.tensor(float("inf")),
        "something": 3.0,
    }  # fmt: skip
    for legacy in (False, True):
        checkpoint = opened(tmp_path, content, legacy=legacy)
        assert checkpoint.metrics == {
            "metric": 0.5, "val_loss": 2.0, "best_acc1": 71.25, "acc1": 0.75,
        }  # fmt: skip


@pytest.mark.parametrize(
    "score", [0.5, torch.tensor(0.5), torch.tensor(0.5).double(), torch.tensor(0.5).half()], ids=str
)
def test_the_score_of_lightnings_model_checkpoint_is_read(tmp_path: Path, score: Any) -> None:
    callbacks = {
        "EarlyStopping{'monitor': 'val_f1'}": {"best_score": torch.tensor(0.1)},
        "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}": {
            "monitor": "val_loss", "best_model_score": torch.tensor(0.25), "current_score": score,
        },
        "ModelCheckpoint{'monitor': None}": {"monitor": None, "current_score": None},
        "ModelCheckpoint{'monitor': 'f1'}": {"monitor": "f1", "current_score": torch.tensor(2.0)},
        "ModelCheckpoint": 3,
    }  # fmt: skip
    checkpoint = opened(tmp_path, {"callbacks": callbacks})
    assert checkpoint.metrics == {"val_loss": 0.5, "f1": 2.0}
    assert opened(tmp_path, {"callbacks": []}).metrics == {}


def test_a_hostile_score_is_not_known(tmp_path: Path) -> None:
    weights = mapping({"w": tensor()})
    path = tmp_path / "w.pt"
    for score in (
        tensor((), offset=4),
        tensor((), offset=2**62),
        tensor((), stored=storage("9")),
    ):
        content = mapping({"model": weights, "metric": score})
        for raw in (torch_bytes(content), legacy_bytes(content)):
            path.write_bytes(raw)
            checkpoint = open_checkpoint(path)
            assert (list(checkpoint.tensors), checkpoint.metrics) == (["w"], {})
            checkpoint.close()
    path.write_bytes(torch_bytes(mapping({"model": weights, "metric": tensor((), offset=2)})))
    assert open_checkpoint(path).metrics == {"metric": 2.0}
