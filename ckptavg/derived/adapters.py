"""What becomes of adapters: which may be averaged, how, and the config of the result."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ckptavg.checkpoint import ADAPTER_LAYOUT, Checkpoint
from ckptavg.derived.adapter_config import (
    LORA,
    AdapterConfig,
    pattern_key,
    read_adapter_config,
)
from ckptavg.derived.lora_groups import ConcatenatedGroup, MeasuredGroup, TruncatedGroup
from ckptavg.derived.lora_modules import LoraModule, foreign_parts, lora_modules
from ckptavg.errors import IncompatibleCheckpointsError, UsageError
from ckptavg.recipe import CoefficientRow, Recipe

_MERGE = "merge each adapter into its base model with merge_and_unload and average those"
# what the parameters of these stand for is linear in them, or they are what the model reads
_LINEAR = ("IA3", "LN_TUNING", "TRAINABLE_TOKENS")
_PROMPTS = (
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
_RANKS_AND_SCALES = ("r", "alpha", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# where factors begin; all but these change the base model when the adapter is loaded
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")

LoraGroup = ConcatenatedGroup | TruncatedGroup | MeasuredGroup


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """What is done with adapters.

    Attributes:
        method: ``concatenation``, ``truncation``, ``factors``, or ``parameters`` of what is no
            LoRA.
        rank: The largest rank of a module in the output; 0 without LoRA.
        groups: What computes or measures the products.
        configs: The text of ``adapter_config.json`` for each output.
        notes: What a user should know, one sentence each.
    """

    method: str
    rank: int
    groups: tuple[LoraGroup, ...]
    configs: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """How an adapter was averaged, and how far its products are from the mean of the products.

    Attributes:
        method: ``concatenation`` (exact), ``truncation`` (``adapter_rank``), ``factors``
            (``adapter_factors``), or ``parameters`` of adapters that are no LoRA.
        rank: The largest rank of a module.
        error: Relative error of all products together, as Frobenius norms; rounding to the
            output's dtype not counted. None where it was not measured.
        largest_error: That of the module where it is largest.
        largest_error_module: Its name.
    """

    method: str
    rank: int
    error: float | None = None
    largest_error: float | None = None
    largest_error_module: str | None = None


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
    _refuse_differences(configs, ("peft_type", *_SAME))
    if configs[-1].peft_type != LORA and recipe.adapter_rank is not None:
        raise UsageError(f"--adapter-rank is for LoRA, and these are {configs[-1].peft_type}")
    if not recipe.adapter_factors:
        for checkpoint, config in zip(checkpoints, configs, strict=True):
            _refuse_unlike_lora(checkpoint, config)
    elif configs[-1].peft_type != LORA:
        _refuse_differences(configs, _RANKS_AND_SCALES)
    return configs


def plan_adapters(
    checkpoints: Sequence[Checkpoint],
    configs: Sequence[AdapterConfig],
    recipe: Recipe,
    rows: Sequence[CoefficientRow],
) -> AdapterPlan:
    """Decide how adapters are averaged; names and dtypes have been compared.

    Raises:
        CheckpointError: If factors do not fit each other or their config.
        IncompatibleCheckpointsError: If these adapters have no such average.
    """
    last = configs[-1]
    if last.peft_type != LORA:
        return _plan_parameters(configs, rows)
    used = tuple(sorted({index for row in rows for index in row.used}))
    if recipe.adapter_factors:
        return _plan_factors(checkpoints, configs, rows, used)
    modules = lora_modules(checkpoints, configs)
    _refuse_another_base(modules, configs, recipe, used)
    if recipe.adapter_rank is None:
        groups: list[ConcatenatedGroup | TruncatedGroup] = [
            ConcatenatedGroup(lora=one, used=used, rank=sum(one.ranks[index] for index in used))
            for one in modules
        ]
        notes = _concatenation_notes(groups, used)
    else:
        groups = [_truncated(one, recipe.adapter_rank, used, configs) for one in modules]
        notes = _truncation_notes(groups, recipe.adapter_rank)
    out = [
        json_config(configs[row.used[-1]], _shape_of(groups, row, configs[row.used[-1]]))
        for row in rows
    ]
    return AdapterPlan(
        method="concatenation" if recipe.adapter_rank is None else "truncation",
        rank=max((one.rank for one in groups), default=0),
        groups=tuple(groups),
        configs=tuple(out),
        notes=tuple(notes),
    )


def _plan_parameters(
    configs: Sequence[AdapterConfig], rows: Sequence[CoefficientRow]
) -> AdapterPlan:
    kind = configs[-1].peft_type
    note = f"{kind} adapters: their parameters are averaged as they are"
    if kind in _PROMPTS:
        note += ", which has no exact meaning for prompts: compare it with the last checkpoint"
    elif kind not in _LINEAR:
        note += ", which is not the mean of what they do to the weights"
    return AdapterPlan(
        method="parameters",
        rank=0,
        groups=(),
        configs=tuple(json_config(configs[row.used[-1]], {}) for row in rows),
        notes=(note,),
    )


def _plan_factors(
    checkpoints: Sequence[Checkpoint],
    configs: Sequence[AdapterConfig],
    rows: Sequence[CoefficientRow],
    used: tuple[int, ...],
) -> AdapterPlan:
    notes = [
        "LoRA factors A and B are averaged apart, as asked: their product is not the mean of the "
        "products, but less what A and B have in common beside their means; that is small along "
        "one run, and meaningless across runs"
    ]
    kinds = _unlike_lora(checkpoints[-1], configs[-1])
    modules: list[LoraModule] = []
    if kinds:
        notes.append(f"how far that is was not measured: it is not made for {kinds[0]}")
        _refuse_differences(configs, _RANKS_AND_SCALES)
    else:
        modules = lora_modules(checkpoints, configs)
    for module in modules:
        for index in used:
            mine, theirs = ((one.ranks[at], one.scales[at]) for one, at in
                            ((module, index), (module, used[-1])))  # fmt: skip
            if mine != theirs:
                raise IncompatibleCheckpointsError(
                    f"'{module.name}' has rank {mine[0]} and scale {mine[1]:.6g} in "
                    f"{configs[index].label}, rank {theirs[0]} and scale {theirs[1]:.6g} in "
                    f"{configs[used[-1]].label}: such factors cannot be averaged; leave "
                    "--adapter-factors out"
                )
    return AdapterPlan(
        method="factors",
        rank=max((module.ranks[-1] for module in modules), default=0),
        groups=tuple(
            MeasuredGroup(lora=one, used=used, rank=one.ranks[used[-1]])
            for one in modules
            if len(used) > 1
        ),
        configs=tuple(json_config(configs[row.used[-1]], {}) for row in rows),
        notes=tuple(notes),
    )


def _truncated(
    module: LoraModule, rank: int, used: Sequence[int], configs: Sequence[AdapterConfig]
) -> TruncatedGroup:
    whole = sum(module.ranks[index] for index in used)
    keeps_scale = any(_changes_base(configs[index]) for index in used)
    return TruncatedGroup(
        lora=module,
        used=tuple(used),
        rank=min(rank, whole, module.n_in, module.n_out),
        scale=(module.scales[used[-1]] if keeps_scale else 0) or 1.0,
    )


# -- what is refused


def _refuse_differences(configs: Sequence[AdapterConfig], keys: Sequence[str]) -> None:
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
    kinds = _unlike_lora(checkpoint, config)
    if kinds:
        raise IncompatibleCheckpointsError(
            f"{config.label}: is an adapter with {kinds[0]}, which is not linear in its "
            f"parameters; {_MERGE}, or pass --adapter-factors to average the parameters as they are"
        )


def _unlike_lora(checkpoint: Checkpoint, config: AdapterConfig) -> list[str]:
    """Name what of an adapter has no mean of products."""
    if config.peft_type in (*_LINEAR, *_PROMPTS):
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


def _changes_base(config: AdapterConfig) -> bool:
    """Tell whether loading the adapter changes the base model, by rank and scale of the config.

    PiSSA, OLoRA, CorDA and LoftQ take the beginning of the factors out of the base weights, each
    time an adapter is made (peft.tuners.lora.layer, ``pissa_init`` and the like).
    """
    return config.content.get("init_lora_weights", True) not in _PLAIN_INITS


def _refuse_another_base(
    modules: Sequence[LoraModule],
    configs: Sequence[AdapterConfig],
    recipe: Recipe,
    used: Sequence[int],
) -> None:
    """Refuse another rank or scale where they decide what the base model becomes."""
    changing = next((index for index in used if _changes_base(configs[index])), None)
    if changing is None or (len(used) == 1 and recipe.adapter_rank is None):
        return
    init = _shown(configs[changing].content["init_lora_weights"])
    _refuse_differences([configs[index] for index in used], ("init_lora_weights",))
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


# -- notes


def _concatenation_notes(
    groups: Sequence[ConcatenatedGroup | TruncatedGroup], used: Sequence[int]
) -> Iterator[str]:
    rank = max((one.rank for one in groups), default=0)
    yield (
        f"LoRA: the exact mean of the products of {len(used)} adapters, by concatenation: rank "
        f"{rank}" + (" and less" if any(one.rank != rank for one in groups) else "")
    )
    wide = [one for one in groups if one.rank > min(one.lora.n_in, one.lora.n_out)]
    if wide:
        yield (
            f"the rank of {len(wide)} modules exceeds a side of their weights, such as "
            f"'{wide[0].module}': --adapter-rank makes a smaller adapter and tells its error"
        )


def _truncation_notes(
    groups: Sequence[ConcatenatedGroup | TruncatedGroup], rank: int
) -> Iterator[str]:
    lower = [one for one in groups if one.rank < rank]
    yield f"LoRA: the mean of the products at rank {rank}, by singular value decomposition"
    if lower:
        yield (
            f"{len(lower)} modules have no more than rank {max(one.rank for one in lower)}, such "
            f"as '{lower[0].module}': they get that"
        )


# -- the config of the output


def _shape_of(
    groups: Sequence[ConcatenatedGroup | TruncatedGroup],
    row: CoefficientRow,
    config: AdapterConfig,
) -> dict[str, Any]:
    """Return rank, alpha and their patterns for one output."""
    ranks = {one.lora.key: one.rank for one in groups}
    alphas = {one.lora.key: _number(one.alpha(row, use_rslora=config.use_rslora)) for one in groups}
    if not groups:
        return {}
    changes: dict[str, Any] = {"r": _usual(ranks), "lora_alpha": _usual(alphas)}
    changes["rank_pattern"] = _patterns(ranks, changes["r"])
    changes["alpha_pattern"] = _patterns(alphas, changes["lora_alpha"])
    if not _changes_base(config):  # what stands for a beginning may not be made at another rank
        changes["init_lora_weights"] = True
    return changes


def _usual(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _patterns(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Return patterns that give each module its value: names, where those match nothing else."""
    wanted = {name: value for name, value in values.items() if value != usual}
    try:
        is_right = all(
            wanted.get(pattern_key(wanted, name) or "", usual) == value
            for name, value in values.items()
        )
    except re.error:  # a name that is no pattern
        is_right = False
    return wanted if is_right else {f"^{re.escape(name)}": one for name, one in wanted.items()}


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)


def json_config(config: AdapterConfig, changes: Mapping[str, Any]) -> str:
    """Return the text of ``adapter_config.json``: one checkpoint's, with some values changed."""
    content = {**config.content, **changes, "inference_mode": True}
    return json.dumps(content, indent=2, ensure_ascii=True) + "\n"


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)[:100]


def adapter_report(plan: AdapterPlan, found: Sequence[Sequence[Any]]) -> AdapterReport:
    """Sum up what was measured of one output; ``found`` are the fields of ``Deviation``."""
    if plan.method == "concatenation":
        return AdapterReport(method=plan.method, rank=plan.rank, error=0.0)
    if not found:
        return AdapterReport(method=plan.method, rank=plan.rank)
    relative = [(_relative(error, total), module) for module, error, total in found]
    largest, module = max(relative)
    return AdapterReport(
        method=plan.method,
        rank=plan.rank,
        error=_relative(
            math.fsum(error for _, error, _ in found), math.fsum(total for _, _, total in found)
        ),
        largest_error=largest,
        largest_error_module=module,
    )


def report_note(report: AdapterReport) -> str | None:
    """Say what was measured."""
    if report.largest_error is None or report.error is None:
        return None
    what = {
        "truncation": f"at rank {report.rank} the products are off the exact mean",
        "factors": "the products of the averaged factors are off the mean of the products",
    }[report.method]
    return (
        f"LoRA: {what} by {report.error:.3g} of its norm in all, by at most "
        f"{report.largest_error:.3g} in a module ('{report.largest_error_module}')"
    )


def _relative(error: float, total: float) -> float:
    """Return the ratio of two norms from their squares; 0 for an exact 0."""
    return 0.0 if error == 0 else math.sqrt(error / total) if total else math.inf
