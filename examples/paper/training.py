"""Training: one loop for every arm, which leaves ordinary checkpoints and a log behind."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from mnist1d_resnet import Mnist1d, ResNet1d
from setups import Setup, accuracy, build, load
from torch import Tensor
from torch.nn import functional

BATCH_SIZE = 100
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
PEAK_RATE, FINAL_SHARE = 0.1, 0.01  # of the conventional schedule
CONSTANT_RATE = 0.05
CYCLE_EPOCHS, CYCLE_HIGH, CYCLE_LOW = 2, 0.1, 0.005
BRANCH = 0.75  # budgets after which the SWA arms leave the conventional run
AVERAGED_FROM = 140 / 300  # of the run at a fixed rate, as in Fig. 7
BUDGETS = (1.0, 1.25, 1.5)

Rate = Callable[[int], float]  # of the step, counted from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One training run.

    Attributes:
        name: What files and tables call it.
        rate: The learning rate of each step.
        n_epochs: Its last epoch.
        saved_from: The first epoch of which a checkpoint is kept.
        branch_of: The arm from whose checkpoint it starts; None starts from initial weights.
        branch_epoch: Of which epoch.
    """

    name: str
    rate: Rate
    n_epochs: int
    saved_from: int
    branch_of: str | None = None
    branch_epoch: int = 0


def arms(setup: Setup) -> list[Arm]:
    """Return the runs of one seed, each after the one that it branches off."""
    steps = setup.n_train // BATCH_SIZE
    branch, longest = setup.epochs(BRANCH), setup.epochs(BUDGETS[-1])
    cycle = CYCLE_EPOCHS * steps
    return [
        *(
            Arm(
                name=f"sgd-{budgets:g}",
                rate=conventional(setup.epochs(budgets) * steps),
                n_epochs=setup.epochs(budgets),
                saved_from=branch,
            )
            for budgets in BUDGETS
        ),
        Arm(
            name="constant",
            rate=lambda step: CONSTANT_RATE,
            n_epochs=longest,
            saved_from=branch + 1,
            branch_of="sgd-1",
            branch_epoch=branch,
        ),
        Arm(
            name="cyclical",
            rate=lambda step: cyclical(step - branch * steps, cycle),
            n_epochs=longest,
            saved_from=branch + 1,
            branch_of="sgd-1",
            branch_epoch=branch,
        ),
        Arm(
            name="fixed",
            rate=lambda step: CONSTANT_RATE,
            n_epochs=longest,
            saved_from=int(longest * AVERAGED_FROM) + 1,
        ),
    ]


def conventional(n_steps: int) -> Rate:
    """Return the schedule of the paper's code: constant, linear from half to 0.9, constant."""

    def rate(step: int) -> float:
        fallen = min(max((step / n_steps - 0.5) / 0.4, 0.0), 1.0)
        return PEAK_RATE * (1 - (1 - FINAL_SHARE) * fallen)

    return rate


def cyclical(step: int, cycle: int) -> float:
    """Return the paper's cyclical rate: it falls linearly, and jumps back at once (section 3.1)."""
    share = ((step - 1) % cycle + 1) / cycle
    return (1 - share) * CYCLE_HIGH + share * CYCLE_LOW


def train_all(setup: Setup, seed: int, folder: Path, device: str) -> None:
    """Train all arms of one seed."""
    for arm in arms(setup):
        train(setup, arm, seed, folder, device)


def train(setup: Setup, arm: Arm, seed: int, folder: Path, device: str) -> None:
    """Train one arm; leave ``epoch-*.pt`` and ``log.csv`` in a folder of its name.

    The order of the batches follows from seed and epoch, so that arms which share their first
    epochs share all of them, and what is told apart are schedules.
    """
    data = load(setup, seed, device)
    n_steps = setup.n_train // BATCH_SIZE
    torch.manual_seed(seed)
    model = build(setup).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=arm.rate(1), momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    if arm.branch_of is not None:
        start = torch.load(
            checkpoint_path(folder, arm.branch_of, arm.branch_epoch), weights_only=True
        )
        model.load_state_dict(start["model"])
        optimizer.load_state_dict(start["optimizer"])
    run_dir = folder / arm.name
    run_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, float]] = []
    for epoch in range(arm.branch_epoch + 1, arm.n_epochs + 1):
        random = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(setup.n_train, generator=random).to(device)
        loss = torch.zeros((), device=device)
        model.train()
        for at in range(n_steps):
            for group in optimizer.param_groups:
                group["lr"] = arm.rate((epoch - 1) * n_steps + at + 1)
            batch = order[at * BATCH_SIZE : (at + 1) * BATCH_SIZE]
            loss += learn(model, optimizer, data, batch)
        rows.append(
            {
                "epoch": epoch,
                "step": epoch * n_steps,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "train_loss": loss.item() / n_steps,
                "test_error": test_error(model, data),
            }
        )
        if epoch >= arm.saved_from:
            torch.save(
                {
                    "epoch": epoch,
                    "step": epoch * n_steps,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                checkpoint_path(folder, arm.name, epoch),
            )
    with (run_dir / "log.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def learn(
    model: ResNet1d, optimizer: torch.optim.Optimizer, data: Mnist1d, batch: Tensor
) -> Tensor:
    """Take one step; return the loss before it, where the model is."""
    loss = functional.cross_entropy(model(data.train_signals[batch]), data.train_digits[batch])
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def test_error(model: ResNet1d, data: Mnist1d) -> float:
    """Return the test error in percent, with the BatchNorm statistics that training kept."""
    model.eval()
    return 100 - accuracy(model(data.test_signals), data.test_digits)


def checkpoint_path(folder: Path, arm: str, epoch: int) -> Path:
    """Return where the checkpoint of an epoch is."""
    return folder / arm / f"epoch-{epoch:03d}.pt"


def checkpoints(folder: Path, arm: str) -> list[Path]:
    """Return the checkpoints of an arm, oldest first."""
    return sorted((folder / arm).glob("epoch-*.pt"))


def logged(folder: Path, arm: str, column: str) -> dict[int, float]:
    """Return one column of an arm's log, by epoch."""
    with (folder / arm / "log.csv").open(newline="", encoding="utf-8") as file:
        return {int(row["epoch"]): float(row[column]) for row in csv.DictReader(file)}


def first_averaged(setup: Setup, arm: str) -> int:
    """Return the epoch of the first checkpoint that is averaged."""
    if arm == "fixed":
        return int(setup.epochs(BUDGETS[-1]) * AVERAGED_FROM) + 1
    return setup.epochs(BRANCH) + (CYCLE_EPOCHS if arm == "cyclical" else 1)
