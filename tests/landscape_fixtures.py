"""What planes, rays and paths are laid through: small models, their checkpoints, labelled data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_checkpoint
from numpy.typing import NDArray
from safetensors.torch import load_file
from search_fixtures import Evaluations
from torch import Tensor, nn
from torch.nn import functional

from ckptavg import BnPass, LabelledEvaluation, Loader, recompute_bn_stats
from ckptavg.evaluate import evaluated

N_CLASSES = 3
State = Mapping[str, Tensor]
Vector = NDArray[np.float64]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: models so small wait for a second one, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.bn = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(functional.relu(self.bn(self.body(x))))
        return out


class Plain(nn.Module):
    """Without BatchNorm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x)))
        return out


def drawn(seed: int, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def labelled(seed: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    inputs = [drawn(100 * seed + number, size, 4) for number, size in enumerate(sizes)]
    return [(one, one[:, :N_CLASSES].argmax(1)) for one in inputs]


TRAIN = [drawn(1, 40, 4) + 0.3, drawn(2, 24, 4) + 0.3]
TEST = labelled(3, 30, 7)
VALIDATION = labelled(4, 21)


def train() -> list[Tensor]:
    return TRAIN


def test() -> list[tuple[Tensor, Tensor]]:
    return TEST


test.__test__ = False  # type: ignore[attr-defined]  # a loader, though it is called like a test


class Counted:
    """Batches that count how often they are gone through."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.count = 0
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        return iter(self._batches)


def look(model: nn.Module) -> dict[str, float]:
    """Return the loss on the test data, after it was counted."""
    Evaluations.next()
    return loss_of(model)


def loss_of(model: nn.Module) -> dict[str, float]:
    inputs, labels = (torch.cat(parts) for parts in zip(*TEST, strict=True))
    return {"loss": functional.cross_entropy(model(inputs), labels).item()}


def save_run(
    folder: Path, model: Callable[[], nn.Module] = Net, count: int = 5, layout: str = "safetensors"
) -> list[Path]:
    """Save checkpoints that lie around a centre, with steps 1, 2, ..."""
    paths = []
    for step in range(1, count + 1):
        torch.manual_seed(0)
        state = model().state_dict()
        seen: dict[int, int] = {}  # tied weights get the same noise once
        for number, (name, value) in enumerate(state.items()):
            if value.dtype == torch.int64:
                value.fill_(7)
            elif seen.setdefault(value.data_ptr(), number) == number:
                noise = drawn(100 * step + number, *value.shape).to(value.dtype)
                value += 0.4 * (noise.abs() if name.endswith("running_var") else noise)
        kept = {name: value.clone() for name, value in state.items()}
        paths.append(save_checkpoint(folder / f"step{step}", kept, layout))
    return paths


def on_loaders(**loaders: Any) -> LabelledEvaluation:
    found = loaders or {"test": TEST}
    return LabelledEvaluation(
        loaders=[Loader(name=name, batches=batches) for name, batches in found.items()]
    )


def judged(model: Any = Net, batches: Any = TRAIN, evaluate: Any = None, **options: Any) -> BnPass:
    """Return an evaluation: on the test data, if nothing else is said."""
    return BnPass(model=model, batches=batches, evaluate=evaluate or on_loaders(), **options)


# ---- a straightforward reference -----------------------------------------------------------------


def directly(
    state: State, model: Callable[[], nn.Module] = Net, evaluate: Any = None
) -> dict[str, float]:
    """Return what the evaluation says of weights, after a BatchNorm pass of their own."""
    built = model()
    built.load_state_dict(dict(state))
    recompute_bn_stats(built, TRAIN)
    return evaluated(built, evaluate or on_loaders())


def vector(state: State) -> Vector:
    """Return the weights as one float64 vector."""
    parts = [state[name].double().flatten() for name in weight_names(state)]
    return torch.cat(parts).numpy()


def weight_names(state: State) -> list[str]:
    statistics = ("running_mean", "running_var")
    return sorted(
        name
        for name, value in state.items()
        if value.is_floating_point() and not name.endswith(statistics)
    )


def with_vector(state: State, weights: Vector) -> dict[str, Tensor]:
    """Return a state with other weights, rounded to its dtypes."""
    found, start = dict(state), 0
    for name in weight_names(state):
        value = state[name]
        part = torch.from_numpy(weights[start : start + value.numel()])
        found[name], start = part.reshape(value.shape).to(value.dtype), start + value.numel()
    assert start == len(weights)
    return found


def states_of(paths: Sequence[Path]) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in paths]
