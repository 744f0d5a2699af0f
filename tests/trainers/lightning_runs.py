"""Runs of Lightning: one file per checkpoint, averaging callbacks, and directories of shards.

``python -m trainers.lightning_runs DIRECTORY [RUN ...]``
"""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from trainers import processes, truth

PROCESSES = 2
EPOCHS = 3


class Classifier(lightning.LightningModule):  # type: ignore[misc]  # Any if not installed
    """A small network with BatchNorm and a count of its own."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)
        )
        self.register_buffer("seen", torch.tensor(0))
        self.seen: Tensor

    def configure_model(self) -> None:
        """Shard the parameters where there are several processes."""
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None:
            for part in (self.net[0], self.net[3], self.net):
                fully_shard(part, mesh=mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        self.seen += len(batch[0])
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Log what checkpoints are chosen by."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and a schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class ModelCheckpoint(callbacks.ModelCheckpoint):  # type: ignore[misc]  # likewise
    """Lightning's, which keeps the true weights of each epoch's checkpoint, too."""

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        path = Path(filepath)
        if not path.name.startswith("epoch"):
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(trainer.lightning_module, options=options)
        if trainer.is_global_zero:
            truth.write(path, trainer.global_step, weights)
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging):
                assert callback._average_model is not None  # since training began
                average = callback._average_model.module.state_dict()
                run = f"{Path(trainer.default_root_dir).name}-averaged"
                truth.write(path, trainer.global_step, average, run=run)


RUNS: dict[str, list[Any]] = {
    "files": [],
    "weight-averaging": [WeightAveraging],
    "ema": [EMAWeightAveraging],
    "sharded": [],
}


def train(directory: str, name: str) -> None:
    """Train one run, in one of several processes if its weights are sharded."""
    sharded = name == "sharded"
    lightning.seed_everything(0, verbose=False)
    run = Path(directory, name)
    checkpoints = ModelCheckpoint(monitor="val_loss", save_last=True, save_top_k=-1)
    trainer = lightning.Trainer(
        default_root_dir=run, max_epochs=EPOCHS, accelerator="cpu", logger=True,
        devices=PROCESSES if sharded else 1,
        strategy=ModelParallelStrategy(PROCESSES, 1) if sharded else "auto",
        callbacks=[*(kind() for kind in RUNS[name]), checkpoints],
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        use_distributed_sampler=False,  # else each process has BatchNorm statistics of its own
    )  # fmt: skip
    data = TensorDataset(torch.randn(48, 6), torch.arange(48) % 3)
    trainer.fit(Classifier(), DataLoader(data, batch_size=8), DataLoader(data, batch_size=16))


def main(directory: str, names: list[str]) -> None:
    """Make the runs, the sharded one in processes of its own."""
    for name in names or RUNS:
        truth.clear(directory, name)
        if name == "sharded":
            processes.start(PROCESSES, train, directory, name)
        else:
            train(directory, name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
