"""Minima of cyclical learning rates, from runs of real schedulers saved as loops save them.

What is expected comes from the rates that the optimizer was stepped with, update by update.
"""

import math
from collections.abc import Callable, Sequence
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


def rises_and_falls(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 0.55 + 0.45 * math.cos(2 * math.pi * (step + 1) / 40))


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
@pytest.mark.parametrize("number", [from_zero, from_one])
def test_checkpoints_of_the_end_of_each_cycle_are_all_taken(
    tmp_path: Path, number: Callable[[int], dict[str, int]], saves_first: bool
) -> None:
    loop = Loop(build=restarts, epochs=32, every=4, saves_first=saves_first, number=number)
    loop.run(tmp_path / "run")
    on_record = {
        torch.load(path)["scheduler"]["_last_lr"][0] for path in (tmp_path / "run").iterdir()
    }
    assert on_record == {0.5} if not saves_first else on_record != {0.5}  # the highest, or not
    assert taken(tmp_path / "run") == [f"save{n:03}.pt" for n in range(1, 9)]


@pytest.mark.parametrize("saves_first", ORDERS)
@pytest.mark.parametrize(
    ("build", "every"),
    [
        (restarts, 2),
        (triangular, 3),
        (growing_restarts, 3),
        (hard_restarts, 10),
        (rises_and_falls, 5),
    ],
)
def test_minima_are_found_where_checkpoints_are_rare(
    tmp_path: Path, build: Build, every: int, saves_first: bool
) -> None:
    loop = Loop(
        build=build, epochs=168, per_epoch=False, every=every, saves_first=saves_first,
        number=lambda done: {"global_step": done + 1},
    )  # fmt: skip
    loop.run(tmp_path / "run")
    assert len(loop.at_minima()) > 2
    assert taken(tmp_path / "run") == loop.at_minima()


def test_without_a_scheduler_the_rates_on_record_are_those_used(tmp_path: Path) -> None:
    loop = Loop(build=restarts, epochs=16, saves_first=True, scheduler_key="")
    loop.run(tmp_path / "run")
    assert taken(tmp_path / "run") == ["save004.pt", "save008.pt", "save012.pt", "save016.pt"]


@pytest.mark.parametrize("first", [0, 1])
def test_restarts_stepped_by_parts_of_epochs_are_found(tmp_path: Path, first: int) -> None:
    (tmp_path / "run").mkdir()
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = CosineAnnealingWarmRestarts(optimizer, 3)
    for epoch in range(9):
        for batch in range(10):
            optimizer.step()
            scheduler.step(epoch + batch / 10)
        content = {"model": {"w": torch.ones(1)}, "optimizer": optimizer.state_dict()}
        path = tmp_path / "run" / f"epoch-{epoch + first}.pt"
        torch.save({**content, "scheduler": scheduler.state_dict(), "epoch": epoch + first}, path)
    assert taken(tmp_path / "run") == [f"epoch-{epoch + first}.pt" for epoch in (2, 5, 8)]


def test_of_rare_checkpoints_those_that_came_down_less_are_not_at_a_minimum(tmp_path: Path) -> None:
    Loop(
        build=lambda o: CosineAnnealingWarmRestarts(o, 5),
        epochs=24,
        saves_first=True,
        every=2,
        scheduler_key="",
    ).run(tmp_path / "run")  # what is on record goes down to 0.17 and 0.05 in turn
    assert taken(tmp_path / "run") == ["save005.pt", "save010.pt"]
    assert (
        "left out 3 of 5 cycles of the learning rate: no checkpoint was saved near their minimum"
        in notes_of(tmp_path / "run")
    )


def fge_rate(update: int, length: int, high: float, low: float) -> float:
    """Return Fast Geometric Ensembling's rate (Garipov et al. 2018, eq. 2), set by hand."""
    part = ((update - 1) % length + 1) / length
    if part <= 0.5:
        return (1 - 2 * part) * high + 2 * part * low
    return (2 - 2 * part) * low + (2 * part - 1) * high


@pytest.mark.parametrize("n_saved", [3, 6, 7])
def test_of_the_checkpoints_of_fge_every_second_one_is_taken(tmp_path: Path, n_saved: int) -> None:
    (tmp_path / "run").mkdir()
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    low = []
    for update in range(1, n_saved * 50 + 1):
        optimizer.param_groups[0]["lr"] = fge_rate(update, 100, 0.05, 0.0005)
        if update % 50 == 0:  # half a cycle
            name = f"checkpoint-{update}.pt"
            content = {"epoch": update // 50, "state_dict": {"w": torch.ones(1)}}
            torch.save({**content, "optimizer": optimizer.state_dict()}, tmp_path / "run" / name)
            low += [name] if update % 100 == 50 else []
    assert len(low) > 1
    assert taken(tmp_path / "run") == low


def test_the_scheduler_is_found_under_other_names(tmp_path: Path) -> None:
    for key in ("lr_scheduler", "scheduler_state_dict", "lr_scheduler_state_dict", "sched"):
        loop = Loop(build=restarts, epochs=8, scheduler_key=key)
        loop.run(tmp_path / key)
        assert taken(tmp_path / key) == loop.at_minima() == ["save004.pt", "save008.pt"]


def test_where_nothing_tells_which_rate_is_on_record_it_has_to_be_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    loops = {one: Loop(build=restarts, epochs=16, saves_first=one) for one in (True, False)}
    for saves_first, loop in loops.items():
        loop.number = from_zero if saves_first else from_one
        loop.run(run)
        for number in (1, 2):  # rotated away; epoch and count are the same from here on
            (run / f"save{number:03}.pt").unlink()
        expected = ["save004.pt", "save008.pt", "save012.pt", "save016.pt"]
        assert loop.at_minima() == expected
        with pytest.raises(
            SourceError,
            match=whole(
                "nothing tells whether the learning rates on record (the checkpoints' schedulers) "
                "are those of the update before a checkpoint (then the minima are at "
                f"{'save004.pt, save008.pt, ... save016.pt' if saves_first else ''}"
                f"{'' if saves_first else 'save003.pt, save007.pt, ... save015.pt'}) or of the "
                "one after it ("
                f"{'save005.pt, save009.pt, save013.pt' if saves_first else ''}"
                f"{'' if saves_first else 'save004.pt, save008.pt, ... save016.pt'}): say it with "
                "--lr-recorded used or --lr-recorded next"
            ),
        ):
            taken(run)
        assert taken(run, lr_recorded="used" if saves_first else "next") == expected


def test_schedules_without_cycles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    schedules: dict[str, Build] = {
        "decay": lambda optimizer: CosineAnnealingLR(optimizer, 8),
        "stages": lambda optimizer: StepLR(optimizer, 3),
        "one-cycle": lambda optimizer: OneCycleLR(optimizer, 0.5, total_steps=9),
    }
    for name, build in schedules.items():
        Loop(build=build, epochs=8, number=from_one).run(tmp_path / name)
        with pytest.raises(SourceError, match="without rising again .* --constant-lr, .* --last"):
            taken(tmp_path / name)
    Loop(build=lambda o: LambdaLR(o, lambda step: step + 1), number=from_one).run(tmp_path / "up")
    with pytest.raises(SourceError, match="the learning rate rises from 1 to 6.5 and never falls"):
        taken(tmp_path / "up")


def test_equal_rates_are_all_at_the_minimum(tmp_path: Path) -> None:
    Loop(build=lambda o: StepLR(o, 99), epochs=3, saves_first=True, scheduler_key="").run(
        tmp_path / "run"
    )
    assert taken(tmp_path / "run") == ["save001.pt", "save002.pt", "save003.pt"]
    assert notes_of(tmp_path / "run") == [
        "the learning rate is 0.5 at all 3 checkpoints (the checkpoints): each of them is taken to "
        "be at the minimum"
    ]


def test_what_was_taken_and_left_out_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Loop(build=restarts, epochs=14, number=from_one).run(run)
    (run / "save008.pt").unlink()
    assert notes_of(run) == [
        "took 2 of 13 checkpoints (--at-lr-minima): save004.pt to save012.pt",
        "at the minima of the learning rate (the checkpoints' schedulers): save004.pt (0.0817588), "
        "save012.pt (0.0817588)",
        "left out 1 of 3 cycles of the learning rate: no checkpoint was saved near their minimum",
        "left out the last cycle of the learning rate: it is still falling at save014.pt",
    ]


def test_other_conditions_apply_to_the_minima(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Loop(build=restarts, epochs=20, number=lambda n: {"global_step": n + 1}).run(run)
    assert taken(run, last=2) == ["save016.pt", "save020.pt"]
    assert taken(run, every=2) == ["save004.pt", "save012.pt", "save020.pt"]
    assert taken(run, steps=(6, 17)) == ["save008.pt", "save012.pt", "save016.pt"]


def test_a_run_saved_away_from_its_minima_is_refused(tmp_path: Path) -> None:
    Loop(build=triangular, epochs=32, every=4, number=from_one).run(tmp_path / "run")
    with pytest.raises(
        SourceError,
        match=whole(
            "no checkpoint was saved near a minimum of the learning rate (the checkpoints' "
            "schedulers), which goes down to 0.01"
        ),
    ):
        taken(tmp_path / "run")


def test_checkpoints_that_tell_no_rate_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for epoch in (1, 2):
        torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "run" / f"epoch-{epoch}.pt")
    with pytest.raises(
        SourceError,
        match="epoch-1.pt: tells no learning rate; name a log that does, with its steps",
    ):
        taken(tmp_path / "run")
