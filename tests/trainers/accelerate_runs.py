"""Runs that save with accelerate: alone, and with FSDP in two gloo processes.

``python -m trainers.accelerate_runs DIRECTORY [RUN ...]``
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from trainers import processes, tiny, truth

STEPS = (2, 4, 10)
PROCESSES = 2

# name of the run: FSDP version, state dict type; FSDP1 crashes as it gathers a full one on CPUs
FSDP = {
    "fsdp1-sharded": (1, "SHARDED_STATE_DICT"),
    "fsdp2-sharded": (2, "SHARDED_STATE_DICT"),
    "fsdp2-full": (2, "FULL_STATE_DICT"),
}
RUNS = ("plain", "plain-torch", "automatic", *FSDP)


class Summed(nn.Module):
    """A model without scalars and without several dtypes, for FSDP1 flattens all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCABULARY, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 6)])
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, tiny.VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next token."""
        value = self.embed(tokens).flatten(0, 1)
        for layer in self.layers:
            value = torch.tanh(layer(value))
        logits: torch.Tensor = self.head(self.norm(value))
        return logits


def accelerator_for(name: str, run: Path) -> Accelerator:
    """Return the accelerator of a run."""
    plugin = None
    if name in FSDP:
        version, state_dict_type = FSDP[name]
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=version,
            state_dict_type=state_dict_type,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Linear"],
            cpu_ram_efficient_loading=False,
            use_orig_params=True if version == 1 else None,
        )
    accelerator = Accelerator(
        cpu=True,
        fsdp_plugin=plugin,
        project_config=ProjectConfiguration(
            project_dir=str(run), automatic_checkpoint_naming=name == "automatic"
        ),
    )
    if plugin is not None:
        # by itself it makes MULTI_CPU of FSDP without a GPU, though all that follows runs on CPUs
        accelerator.state.fsdp_plugin = plugin
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
            state.device = torch.device("cpu")  # FSDP1 wants it without a number
    return accelerator


def whole(model: Any, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the weights as one process would hold them; every process must call it."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            state: dict[str, Tensor] = model.state_dict()
        return state
    gathered: dict[str, Tensor] = accelerator.get_state_dict(model)
    return gathered


def train(directory: str, name: str) -> None:
    """Train one run, in one of several processes."""
    if name in FSDP:
        os.environ.update(ACCELERATE_USE_FSDP="true", ACCELERATE_USE_CPU="true")
    torch.manual_seed(0)
    run = Path(directory, name)
    accelerator = accelerator_for(name, run)
    model: Any = Summed() if name in FSDP else tiny.build()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule: Any = torch.optim.lr_scheduler.LinearLR(optimizer)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    for step in range(1, STEPS[-1] + 1):
        batch = tiny.tokens(step)
        accelerator.backward(nn.functional.cross_entropy(model(batch), batch.flatten()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in STEPS:
            path = None if name == "automatic" else str(run / f"step_{step}")
            saved = accelerator.save_state(path, safe_serialization=name != "plain-torch")
            weights = whole(model, accelerator)
            if accelerator.is_main_process:
                truth.write(Path(saved), step, weights)
            accelerator.wait_for_everyone()
    accelerator.end_training()
    if dist.is_initialized():
        dist.destroy_process_group()


def main(directory: str, names: list[str]) -> None:
    """Make the runs, each in processes of its own."""
    for name in names or RUNS:
        truth.clear(directory, name)
        size = PROCESSES if name in FSDP else 1
        processes.start(size, train, directory, name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
