"""How adapters are averaged: by products or by parameters, at which rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import CoefficientRow
from ckptavg.derived.adapter_config import LORA, AdapterConfig
from ckptavg.derived.adapter_output import json_config, ranks_and_alphas
from ckptavg.derived.adapter_rules import (
    LINEAR,
    PROMPTS,
    RANKS_AND_SCALES,
    changes_base,
    refuse_another_base,
    refuse_config_differences,
    unlike_lora,
)
from ckptavg.derived.lora_groups import ConcatenatedGroup, MeasuredGroup, TruncatedGroup
from ckptavg.derived.lora_modules import LoraModule, lora_modules
from ckptavg.errors import IncompatibleCheckpointsError
from ckptavg.recipe import Recipe

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
    refuse_another_base(modules, configs, recipe, used)
    if recipe.adapter_rank is None:
        groups: list[ConcatenatedGroup | TruncatedGroup] = [
            ConcatenatedGroup(lora=one, used=used, rank=sum(one.ranks[index] for index in used))
            for one in modules
        ]
        notes = _concatenation_notes(groups, used)
    else:
        rank = recipe.adapter_rank
        groups = [_truncated(one, modules, rank, used, configs) for one in modules]
        notes = _truncation_notes(groups, recipe.adapter_rank)
    out = [
        json_config(configs[row.used[-1]], ranks_and_alphas(groups, row, configs[row.used[-1]]))
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
    if kind in PROMPTS:
        note += ", which has no exact meaning for prompts: compare it with the last checkpoint"
    elif kind not in LINEAR:
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
    kinds = unlike_lora(checkpoints[-1], configs[-1])
    modules: list[LoraModule] = []
    if kinds:
        notes.append(f"how far that is was not measured: it is not made for {kinds[0]}")
        refuse_config_differences(configs, RANKS_AND_SCALES)
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
    module: LoraModule,
    modules: Sequence[LoraModule],
    rank: int,
    used: Sequence[int],
    configs: Sequence[AdapterConfig],
) -> TruncatedGroup:
    whole = sum(module.ranks[index] for index in used)
    # those that share an entry in the config have one rank
    sides = [side for one in modules if one.key == module.key for side in (one.n_in, one.n_out)]
    keeps_scale = any(changes_base(configs[index]) for index in used)
    return TruncatedGroup(
        lora=module,
        used=tuple(used),
        rank=min(rank, whole, *sides),
        scale=(module.scales[used[-1]] if keeps_scale else 0) or 1.0,
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
