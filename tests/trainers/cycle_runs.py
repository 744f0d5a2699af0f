"""Runs with cyclical learning rates of trainers' own code, and the rates they were stepped with.

``python -m trainers.cycle_runs DIRECTORY [RUN ...]``

Each run keeps ``used.json`` beside it: the learning rate of every update.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.utils.data import DataLoader, TensorDataset

UPDATES_PER_EPOCH = 4


def record(optimizer: Any, used: list[float]) -> None:
    """Keep the rate of each update that an optimizer makes from now on."""
    optimizer.register_step_pre_hook(
        lambda this, *_: used.append(float(this.param_groups[0]["lr"]))
    )


def transformers_run(run: Path) -> list[float]:
    """Train with cosine_with_restarts, five cycles of 12 updates after a warm-up of 6."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from trainers.transformers_runs import Sentences, gpt2

    used: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]  # Any where it is not installed
        def on_train_begin(self, *_: Any, optimizer: Any = None, **more: Any) -> None:
            record(getattr(optimizer, "optimizer", optimizer), used)

    arguments = TrainingArguments(
        output_dir=str(run), max_steps=66, warmup_steps=6, save_steps=6, logging_steps=2,
        lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 5},
        per_device_train_batch_size=4, learning_rate=0.01, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=gpt2(run), args=arguments, train_dataset=Sentences(), callbacks=[Watch()]).train()
    return used


def lightning_run(run: Path, interval: str, length: int) -> list[float]:
    """Train with restarts, stepped by epochs or by updates."""
    import lightning
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    used: list[float] = []

    class Linear(lightning.LightningModule):  # type: ignore[misc]  # Any where it is not installed
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            record(optimizer, used)
            scheduler = CosineAnnealingWarmRestarts(optimizer, length)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": interval},
            }

    trainer = lightning.Trainer(
        default_root_dir=run, max_epochs=13, accelerator="cpu", log_every_n_steps=1,
        callbacks=[ModelCheckpoint(dirpath=run, save_top_k=-1), LearningRateMonitor()],
        logger=CSVLogger(run.parent, name="", version=f"{run.name}-log"),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(torch.randn(8 * UPDATES_PER_EPOCH, 6), torch.arange(32) % 3)
    trainer.fit(Linear(), DataLoader(data, batch_size=8), DataLoader(data, batch_size=16))
    return used


def timm_run(run: Path) -> list[float]:
    """Train with timm's cosine cycles of 4 epochs, as its train.py orders things."""
    from trainers.timm_runs import without_torchvision

    without_torchvision()
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.utils.checkpoint_saver import CheckpointSaver

    used: list[float] = []
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    record(optimizer, used)
    scheduler = CosineLRScheduler(optimizer, t_initial=4, cycle_limit=4, lr_min=1e-4)
    run.mkdir(parents=True)
    saver = CheckpointSaver(
        model, optimizer, max_history=20, checkpoint_dir=str(run),
        args=argparse.Namespace(model="linear", seed=42),
    )  # fmt: skip
    scheduler.step(0)
    for epoch in range(16):
        for _ in range(UPDATES_PER_EPOCH):
            torch.autograd.backward(model(torch.randn(8, 6)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        saver.save_checkpoint(epoch, float(epoch))
        scheduler.step(epoch + 1)
    return used


RUNS = {
    "restarts": transformers_run,
    "lightning-epoch": lambda run: lightning_run(run, "epoch", 3),
    "lightning-step": lambda run: lightning_run(run, "step", 3 * UPDATES_PER_EPOCH),
    "timm-cycles": timm_run,
}


def main(directory: str, names: list[str]) -> None:
    """Make the runs."""
    torch.manual_seed(0)
    for name in names or RUNS:
        used = RUNS[name](Path(directory, name))
        Path(directory, f"{name}-used.json").write_text(json.dumps(used))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
