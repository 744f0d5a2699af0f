"""What searches are tried on: a small model with a BatchNorm layer, as objects and as a module."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

BATCHES = [torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])]

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        self.bn = nn.BatchNorm1d(1)

    def forward(self, x):
        return self.bn(self.linear(x))

batches = [torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])]

def error(model):
    return {"error": abs(model.linear.weight.mean().item() - 3)}

def look(model):
    print("looking")
    return {"loss": model.linear.weight.mean().item()}
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        self.bn = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.linear(x))
        return out


def batches() -> list[Tensor]:
    return BATCHES


def enter_with_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make a folder the current directory, with ``MODULE`` in it under a name."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    (folder / f"{name}.py").write_text(MODULE)


class Evaluations:
    """Counts evaluations, and stops at one of them."""

    count = 0
    stop_at = -1
    error: BaseException = KeyboardInterrupt()

    @classmethod
    def next(cls) -> None:
        cls.count += 1
        if cls.count == cls.stop_at:
            raise cls.error


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return ``stop(at, error)``, which says which evaluation raises what."""

    def stop(at: int, error: BaseException | None = None) -> None:
        monkeypatch.setattr(Evaluations, "stop_at", at)
        monkeypatch.setattr(Evaluations, "error", error or KeyboardInterrupt())

    monkeypatch.setattr(Evaluations, "count", 0)
    return stop


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let matplotlib look as if it were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "matplotlib" else found(name, *rest),
    )
