"""Runs of DeepSpeed in two gloo processes on CPUs, by ZeRO stage.

``python -m trainers.deepspeed_runs DIRECTORY [RUN ...]``
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainers import processes, tiny, truth

STEPS = (2, 4, 10)
PROCESSES = 2

# name of the run: ZeRO stage, and whether the weights are 16-bit and their float32 copies apart
RUNS = {
    "zero1": (1, False),
    "zero2": (2, False),
    "zero2-bf16": (2, True),
    "zero3": (3, False),
    "zero3-bf16": (3, True),
    "zero3-gathered": (3, True),
}


def build() -> tiny.Tiny:
    """Return a model of one dtype, without what DeepSpeed cannot broadcast or train in 16 bits."""
    model = tiny.build()
    model.scale = nn.Parameter(torch.ones(1))
    model.brief = nn.Linear(6, 7)
    model.norm = nn.LayerNorm(6)  # type: ignore[assignment]  # instead of BatchNorm
    return model


def train(directory: str, names: list[str]) -> None:
    """Train once per run, in one of several processes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ first
    for name in names:
        stage, is_bf16 = RUNS[name]
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4,
            "bf16": {"enabled": is_bf16},
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": name == "zero3-gathered",
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        run = Path(directory, name)
        for step in range(1, STEPS[-1] + 1):
            batch = tiny.tokens(step)
            engine.backward(nn.functional.cross_entropy(engine(batch).float(), batch.flatten()))
            engine.step()
            if step in STEPS:
                engine.save_checkpoint(str(run))
                path = run / f"global_step{step}"
                state = engine.module.state_dict()
                if name == "zero3-gathered":
                    engine.save_16bit_model(str(path), "pytorch_model.bin")
                    state = engine._zero3_consolidated_16bit_state_dict()
                if torch.distributed.get_rank() == 0:
                    exact = get_fp32_state_dict_from_zero_checkpoint(str(run), path.name)
                    truth.write(path, step, exact, run=f"{name}-fp32")
                    if stage < 3 or name == "zero3-gathered":
                        truth.write(path, step, state)


def main(directory: str, names: list[str]) -> None:
    """Make the runs."""
    names = names or list(RUNS)
    for name in names:
        truth.clear(directory, name)
    processes.start(PROCESSES, train, directory, names)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
