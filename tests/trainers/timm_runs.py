"""A run of timm's CheckpointSaver with an exponential moving average of the weights.

``python -m trainers.timm_runs DIRECTORY``
"""

import argparse
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from trainers import truth


class _Name(type):
    """The class of classes whose attributes can be read, but not called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Absent(ModuleType):
    """A module whose names can be imported, and raise when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name}")

        return _Name(name, (), {"__init__": called})


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets timm be imported without torchvision, none of which a CheckpointSaver needs."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def without_torchvision() -> None:
    """Let timm be imported where torchvision is not installed."""
    sys.meta_path.append(_Torchvision())


def train(run: Path) -> None:
    """Train for six epochs, of which the best three are kept."""
    without_torchvision()
    from timm.utils.checkpoint_saver import CheckpointSaver
    from timm.utils.model_ema import ModelEmaV3

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2))
    average = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run.mkdir(parents=True)
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, max_history=3, checkpoint_dir=str(run),
        args=argparse.Namespace(model="resnet18", lr=0.1, epochs=6, opt="sgd"),
    )  # fmt: skip
    metrics = (10.0, 20.0, 50.0, 30.0, 40.0, 45.0)
    for epoch, metric in enumerate(metrics):
        images = torch.randn(8, 1, 5, 5)
        loss = nn.functional.cross_entropy(model(images), torch.arange(8) % 2)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=epoch)
        saver.save_checkpoint(epoch, metric)
        path = run / f"checkpoint-{epoch}.pth.tar"
        if metric >= 40.0:
            truth.write(path, epoch, model.state_dict())
            truth.write(path, epoch, average.module.state_dict(), run="timm-ema")


def main(directory: str) -> None:
    """Make the run."""
    train(truth.clear(directory, "timm"))


if __name__ == "__main__":
    main(sys.argv[1])
