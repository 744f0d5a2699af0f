"""Which adapters may be averaged, and which go together; told from their configs."""

import json
from collections.abc import Sequence
from typing import Any

from ckptavg.checkpoint import ADAPTER_LAYOUT, Checkpoint
from ckptavg.derived.adapter_config import LORA, AdapterConfig, read_adapter_config
from ckptavg.derived.lora_modules import LoraModule, foreign_parts
from ckptavg.errors import IncompatibleCheckpointsError, UsageError
from ckptavg.recipe import Recipe

_MERGE = "merge each adapter into its base model with merge_and_unload and average those"
# what the parameters of these stand for is linear in them, or they are what the model reads
LINEAR = ("IA3", "LN_TUNING", "TRAINABLE_TOKENS")
PROMPTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
)  # fmt: skip
# other than a plain product of two factors, or factors of other shapes
_UNLIKE_LORA = (
    "use_dora", "use_bdlora", "arrow_config", "monteclora_config", "kasa_config",
    "target_parameters",
)  # fmt: skip
# what must be the same for the same factors to mean the same
_SAME = (
    "base_model_name_or_path", "fan_in_fan_out", "use_qalora", "qalora_group_size",
    "alora_invocation_tokens", "layer_replication",
)  # fmt: skip
RANKS_AND_SCALES = ("r", "alpha", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# where factors begin; all but these change the base model when the adapter is loaded
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")


def adapter_configs(
    checkpoints: Sequence[Checkpoint], recipe: Recipe
) -> list[AdapterConfig] | None:
    """Read the configs of adapters and refuse those that do not go together; None without any.

    Raises:
        UsageError: If an option for adapters is given, and these are none.
        CheckpointError: If a config is not what PEFT writes.
        IncompatibleCheckpointsError: If they differ in what matters, or some are none.
    """
    adapters = [one for one in checkpoints if one.layout == ADAPTER_LAYOUT]
    asked = [
        option
        for option, given in (
            ("--adapter-rank", recipe.adapter_rank is not None),
            ("--adapter-factors", recipe.adapter_factors),
        )
        if given
    ]
    if not adapters:
        if asked:
            raise UsageError(f"{asked[0]} is for adapters, and {checkpoints[0].label} is none")
        return None
    if len(adapters) < len(checkpoints):
        other = next(one for one in checkpoints if one.layout != ADAPTER_LAYOUT)
        raise IncompatibleCheckpointsError(
            f"{adapters[0].label} is an adapter, {other.label} is not; average adapters among "
            "themselves, each as its directory"
        )
    configs = [read_adapter_config(one) for one in checkpoints]
    refuse_config_differences(configs, ("peft_type", *_SAME))
    if configs[-1].peft_type != LORA and recipe.adapter_rank is not None:
        raise UsageError(f"--adapter-rank is for LoRA, and these are {configs[-1].peft_type}")
    if not recipe.adapter_factors:
        for checkpoint, config in zip(checkpoints, configs, strict=True):
            _refuse_unlike_lora(checkpoint, config)
    elif configs[-1].peft_type != LORA:
        refuse_config_differences(configs, RANKS_AND_SCALES)
    return configs


def refuse_config_differences(configs: Sequence[AdapterConfig], keys: Sequence[str]) -> None:
    """Refuse configs that differ from the last one; what is absent is like null and false.

    Raises:
        IncompatibleCheckpointsError: Naming the first key that differs, and both values.
    """
    last = configs[-1]
    for config in configs[:-1]:
        for key in keys:
            mine, theirs = (one.content.get(key) or None for one in (config, last))
            if mine != theirs:
                raise IncompatibleCheckpointsError(
                    f"the adapters differ: '{key}' is {_shown(mine)} in {config.label}, "
                    f"{_shown(theirs)} in {last.label}"
                )


def _refuse_unlike_lora(checkpoint: Checkpoint, config: AdapterConfig) -> None:
    kinds = unlike_lora(checkpoint, config)
    if kinds:
        raise IncompatibleCheckpointsError(
            f"{config.label}: is an adapter with {kinds[0]}, which is not linear in its "
            f"parameters; {_MERGE}, or pass --adapter-factors to average the parameters as they are"
        )


def unlike_lora(checkpoint: Checkpoint, config: AdapterConfig) -> list[str]:
    """Name what of an adapter has no mean of products."""
    if config.peft_type in (*LINEAR, *PROMPTS):
        return []
    if config.peft_type != LORA:
        return [config.peft_type]
    kinds = [key for key in _UNLIKE_LORA if config.content.get(key)]
    foreign = foreign_parts(checkpoint.tensors)
    if any(name.endswith("lora_magnitude_vector") for name in foreign):
        kinds.insert(0, "use_dora")
    elif foreign:
        kinds.append(f"the tensor '{foreign[0]}'")
    return ["use_dora (DoRA)" if kind == "use_dora" else kind for kind in dict.fromkeys(kinds)]


def changes_base(config: AdapterConfig) -> bool:
    """Tell whether loading the adapter changes the base model, by rank and scale of the config.

    PiSSA, OLoRA, CorDA and LoftQ take the beginning of the factors out of the base weights, each
    time an adapter is made (peft.tuners.lora.layer, ``pissa_init`` and the like).
    """
    return config.content.get("init_lora_weights", True) not in _PLAIN_INITS


def refuse_another_base(
    modules: Sequence[LoraModule],
    configs: Sequence[AdapterConfig],
    recipe: Recipe,
    used: Sequence[int],
) -> None:
    """Refuse another rank or scale where they decide what the base model becomes."""
    changing = next((index for index in used if changes_base(configs[index])), None)
    if changing is None or (len(used) == 1 and recipe.adapter_rank is None):
        return
    init = _shown(configs[changing].content["init_lora_weights"])
    refuse_config_differences([configs[index] for index in used], ("init_lora_weights",))
    for module in modules:
        ranks, scales = ({one[index] for index in used} for one in (module.ranks, module.scales))
        rank = next(iter(ranks))
        if len(ranks) > 1 or len(scales) > 1 or rank != recipe.adapter_rank:
            raise IncompatibleCheckpointsError(
                f"{configs[changing].label}: init_lora_weights {init} changes the base model when "
                f"the adapter is loaded, by its rank ({rank} for '{module.name}') and scale, so "
                f"the average must keep both: pass --adapter-rank {rank} or --adapter-factors, or "
                "convert the adapters to plain LoRA (save_pretrained with "
                "path_initial_model_for_weight_conversion)"
            )


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)[:100]
