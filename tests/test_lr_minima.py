"""Minima of cyclical learning rates, from runs of real schedulers saved as loops save them.

What is expected comes from the rates that the optimizer was stepped with, update by update.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import whole
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from ckptavg.errors import SourceError
from ckptavg.gathering import close_all, open_sources
from ckptavg.selection import Selection

Build = Callable[[Optimizer], LRScheduler]


@dataclass(kw_only=True)
class Loop:
    """A hand-written training loop.

    Attributes:
        build: Makes the scheduler.
        epochs: How many.
        updates: Of an epoch.
        per_epoch: Whether the scheduler is stepped after each epoch; else after each update.
        saves_first: Whether a checkpoint is saved before the scheduler's step, not after it.
        every: Saved every so many epochs, or updates.
        number: What is saved of an epoch (or update) that is counted from 0, if anything.
        adam: Whether the optimizer is one that counts its updates.
        scheduler_key: Where the scheduler's state is; none if empty.
        used: The rate of each update, once it ran.
        saved: After how many updates checkpoints were saved.
    """

    build: Build
    epochs: int = 12
    updates: int = 1
    per_epoch: bool = True
    saves_first: bool = False
    every: int = 1
    number: Callable[[int], dict[str, int]] = lambda done: {"epoch": done}
    adam: bool = False
    scheduler_key: str = "scheduler"
    used: list[float] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)

    def run(self, folder: Path) -> None:
        """Train and save."""
        folder.mkdir(exist_ok=True)
        weight = nn.Parameter(torch.ones(2))
        optimizer: Optimizer = (
            AdamW([weight], lr=0.5) if self.adam else SGD([weight], lr=0.5, momentum=0.9)
        )
        scheduler = self.build(optimizer)
        for epoch in range(self.epochs):
            for _ in range(self.updates):
                self.used.append(optimizer.param_groups[0]["lr"])
                weight.grad = torch.ones(2)
                optimizer.step()
                if not self.per_epoch:
                    self._end(folder, len(self.used) - 1, weight, optimizer, scheduler)
            if self.per_epoch:
                self._end(folder, epoch, weight, optimizer, scheduler)

    def _end(
        self, folder: Path, done: int, weight: Any, optimizer: Optimizer, scheduler: LRScheduler
    ) -> None:
        if not self.saves_first:
            scheduler.step()
        if (done + 1) % self.every == 0:
            self.saved.append(len(self.used))
            content = {"model": {"w": weight.detach().clone()}, "optimizer": optimizer.state_dict()}
            if self.scheduler_key:
                content[self.scheduler_key] = scheduler.state_dict()
            torch.save({**content, **self.number(done)}, folder / f"save{len(self.saved):03}.pt")
        if self.saves_first:
            scheduler.step()

    def at_minima(self) -> list[str]:
        """Return the files of the checkpoints made by the last update before a rate rises."""
        lows = [
            update
            for update in range(1, len(self.used))
            if _fell_before(self.used, update)
            and (update + 1 == len(self.used) or self.used[update + 1] > self.used[update])
        ]
        lowest = [update for update in lows if update + 1 < len(self.used)]
        if lows and lows[-1] + 1 == len(self.used):  # of the last cycle only if it came down
            low = max((self.used[update] for update in lowest), default=-1.0)
            lows = lows if self.used[lows[-1]] <= low * 1.01 + 1e-9 else lowest
        return [
            f"save{number:03}.pt" for number, n in enumerate(self.saved, 1) if n - 1 in set(lows)
        ]


def _fell_before(rates: Sequence[float], update: int) -> bool:
    """Tell whether the last change of a rate up to an update was a fall."""
    before = [rate for rate in rates[:update] if rate != rates[update]]
    return bool(before) and before[-1] > rates[update]


def taken(source: Path, **selection: Any) -> list[str]:
    """Return the names of what is taken at minima."""
    checkpoints, _ = open_sources(str(source), selection=Selection(at_lr_minima=True, **selection))
    close_all(checkpoints)
    return [Path(checkpoint.label).name for checkpoint in checkpoints]


def notes_of(source: Path, **selection: Any) -> list[str]:
    """Return what is said of what is taken."""
    checkpoints, notes = open_sources(
        str(source), selection=Selection(at_lr_minima=True, **selection)
    )
    close_all(checkpoints)
    return notes


def triangular(optimizer: Optimizer) -> LRScheduler:
    return CyclicLR(optimizer, 0.01, 0.1, step_size_up=4, step_size_down=4, mode="triangular")


def triangular2(optimizer: Optimizer) -> LRScheduler:
    return CyclicLR(optimizer, 0.01, 0.1, step_size_up=2, step_size_down=4, mode="triangular2")


def exp_range(optimizer: Optimizer) -> LRScheduler:
    return CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, mode="exp_range", gamma=0.97)


def restarts(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingWarmRestarts(optimizer, 4, eta_min=0.01)


def growing_restarts(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingWarmRestarts(optimizer, 3, T_mult=2)


def cosine(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(optimizer, 4, eta_min=0.001)


def hard_restarts(optimizer: Optimizer) -> LRScheduler:
    """As transformers' cosine_with_restarts: of its state, only the rate and the count tell."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * (step % 40) / 40)))


def after_warm_up(optimizer: Optimizer) -> LRScheduler:
    warm = LambdaLR(optimizer, lambda step: (step + 1) / 4)
    cycles = CosineAnnealingWarmRestarts(optimizer, 5, eta_min=0.01)
    return SequentialLR(optimizer, [warm, cycles], [3])


SCHEDULERS = (triangular, triangular2, exp_range, restarts, growing_restarts, cosine)
ORDERS = [
    pytest.param(True, id="saved, then stepped"),
    pytest.param(False, id="stepped, then saved"),
]


def from_zero(done: int) -> dict[str, int]:
    return {"epoch": done}


def from_one(done: int) -> dict[str, int]:
    return {"epoch": done + 1}


@pytest.mark.parametrize("saves_first", ORDERS)
@pytest.mark.parametrize("number", [from_zero, from_one])
@pytest.mark.parametrize("build", [*SCHEDULERS, after_warm_up])
def test_the_minima_of_a_schedule_by_epochs_are_found(
    tmp_path: Path, build: Build, number: Callable[[int], dict[str, int]], saves_first: bool
) -> None:
    loop = Loop(build=build, epochs=26, saves_first=saves_first, number=number)
    loop.run(tmp_path / "run")
    expected = loop.at_minima()
    assert len(expected) > 2
    assert taken(tmp_path / "run") == expected


@pytest.mark.parametrize("saves_first", ORDERS)
@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("build", SCHEDULERS)
def test_the_minima_of_a_schedule_by_updates_are_found(
    tmp_path: Path, build: Build, adam: bool, saves_first: bool
) -> None:
    loop = Loop(
        build=build, epochs=25, updates=2, per_epoch=False, saves_first=saves_first, adam=adam,
        number=lambda done: {} if adam else {"global_step": done + 1},
    )  # fmt: skip
    loop.run(tmp_path / "run")
    assert len(loop.at_minima()) > 2
    assert taken(tmp_path / "run") == loop.at_minima()


@pytest.mark.parametrize("saves_first", ORDERS)
@pytest.mark.parametrize("build", [restarts, triangular, cosine])
def test_checkpoints_of_the_end_of_each_cycle_are_all_taken(
    tmp_path: Path, build: Build, saves_first: bool
) -> None:
    loop = Loop(build=build, epochs=32, every=4, saves_first=saves_first, number=from_zero)
    loop.run(tmp_path / "run")
    rates = {round(loop.used[n - 1], 6) for n in loop.saved}
    if build is restarts:
        assert len(rates) == 1  # what is on record after the step is the maximum of each cycle
        assert taken(tmp_path / "run") == [f"save{n:03}.pt" for n in range(1, 9)]
    else:  # its low end is the update after the save of each second one
        assert taken(tmp_path / "run") == (loop.at_minima() or ["none"])
