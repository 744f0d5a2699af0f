"""Runs of the Hugging Face Trainer: whole, sharded, and LoRA adapters.

``python -m trainers.transformers_runs DIRECTORY [RUN ...]``
"""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trainers import truth

STEPS = 10


class Sentences(Dataset[dict[str, Tensor]]):
    """Random tokens, the same every time."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 50, (12,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


class KeepTruth(TrainerCallback):  # type: ignore[misc]  # Any where it is not installed
    """Keep the weights of the model in memory at each checkpoint."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Be called once a checkpoint is saved."""
        path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        model = kwargs["model"]
        truth.write(path, state.global_step, weights(model))
        if hasattr(model, "peft_config"):
            merged = copy.deepcopy(model).merge_and_unload().state_dict()
            truth.write(path, state.global_step, merged, run="lora-merged")


def weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the weights, or the adapter's alone under the names in its file."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        state: Mapping[str, Tensor] = get_peft_model_state_dict(model)
        return state
    return model.state_dict()


def gpt2(_: Path) -> PreTrainedModel:
    """Return a model with tied weights, which Trainer saves under one name."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


def llama(_: Path) -> PreTrainedModel:
    """Return a model in bfloat16."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def with_lora(run: Path) -> nn.Module:
    """Return a model of which two small matrices per layer are trained; keep the rest beside."""
    from peft import LoraConfig, get_peft_model

    base = run.with_name("lora-base")
    llama(run).float().save_pretrained(base)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"])
    model: nn.Module = get_peft_model(LlamaForCausalLM.from_pretrained(base), adapter)
    return model


class Sharding(Trainer):  # type: ignore[misc]  # likewise
    """A Trainer whose checkpoints are cut into small files; by itself it has no option for it."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        assert output_dir is not None
        Path(output_dir, "model.safetensors").unlink()
        assert isinstance(self.model, PreTrainedModel)
        self.model.save_pretrained(output_dir, max_shard_size="6KB")


RUNS = {
    "gpt2": (gpt2, Trainer),
    "llama-sharded": (llama, Sharding),
    "lora": (with_lora, Trainer),
}


def train(run: Path) -> None:
    """Train with a checkpoint every second step of the first six, and the last."""
    build, kind = RUNS[run.name]
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(run), max_steps=STEPS, save_steps=4, eval_steps=4, eval_strategy="steps",
        logging_steps=2, per_device_train_batch_size=4, learning_rate=0.01, report_to=[],
        use_cpu=True, disable_tqdm=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer = kind(
        model=build(run), args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(),
        callbacks=[KeepTruth()],
    )  # fmt: skip
    trainer.train()


def main(directory: str, names: list[str]) -> None:
    """Make the runs."""
    for name in names or RUNS:
        train(truth.clear(directory, name))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
