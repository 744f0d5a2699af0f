"""Tensors that are computed in groups: adapters, and weights that are stored by other parameters.

An average of parameters is the average of the weights only where those are linear in them. Here is
found where they are not, and what is computed instead.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptavg.checkpoint import Checkpoint
from ckptavg.coefficients import CoefficientRow
from ckptavg.derived.adapter_config import AdapterConfig
from ckptavg.derived.adapter_output import AdapterReport, adapter_report, report_note
from ckptavg.derived.adapter_rules import adapter_configs
from ckptavg.derived.adapters import AdapterPlan, plan_adapters
from ckptavg.derived.lora_modules import factor_names
from ckptavg.derived.protocol import Deviation, Group, Inputs, Part
from ckptavg.derived.spectral_norm import find_spectral_norms
from ckptavg.derived.weight_norm import find_weight_norms
from ckptavg.errors import UsageError
from ckptavg.recipe import Recipe
from ckptavg.tensors import TensorInfo

__all__ = [
    "NOTHING_DERIVED",
    "AdapterConfig",
    "AdapterPlan",
    "AdapterReport",
    "Derived",
    "Deviation",
    "Group",
    "Inputs",
    "Part",
    "adapter_configs",
    "adapter_report",
    "derive_groups",
    "refuse_statistics",
    "report_note",
    "shapes_that_may_differ",
]

_PART_OF_A_NORM = re.compile(r"(.*\.)?weight\w*_[gvu]|.*\.original[01]|.*\.0\._[uv]")
_PARAMETRISED = re.compile(r"(^|\.)parametrizations\.")


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What is computed in groups.

    Attributes:
        groups: In the order of the work.
        adapter: What is done with adapters; None if the checkpoints are none.
        notes: What a user should know, one sentence each.
    """

    groups: tuple[Group, ...] = ()
    adapter: AdapterPlan | None = None
    notes: tuple[str, ...] = ()

    @property
    def outputs(self) -> dict[str, TensorInfo]:
        """Every tensor that is computed: its shape in the output, its dtype in the checkpoints."""
        return {name: info for group in self.groups for name, info in group.outputs.items()}

    @property
    def working_nbytes(self) -> int:
        """Bytes that the largest group holds."""
        return max((group.working_nbytes for group in self.groups), default=0)

    def read_nbytes(self, rows: Sequence[CoefficientRow]) -> int:
        """Bytes that all groups read for all outputs."""
        return sum(group.read_nbytes(row) for group in self.groups for row in rows)


NOTHING_DERIVED = Derived()


def shapes_that_may_differ(
    reference: Checkpoint, configs: Sequence[AdapterConfig] | None, recipe: Recipe
) -> frozenset[str]:
    """Return the tensors whose shapes the groups compare: factors, which may differ in rank."""
    if configs is None or recipe.adapter_factors:
        return frozenset()
    return frozenset(factor_names(reference.tensors))


def derive_groups(
    checkpoints: Sequence[Checkpoint],
    configs: Sequence[AdapterConfig] | None,
    recipe: Recipe,
    rows: Sequence[CoefficientRow],
) -> Derived:
    """Find what is not averaged element by element; names and dtypes have been compared.

    Args:
        checkpoints: Oldest first; the last one gives the names.
        configs: From ``adapter_configs``.
        recipe: What was asked for.
        rows: The coefficients of each output.

    Raises:
        CheckpointError: If an adapter is not what its config says.
        IncompatibleCheckpointsError: If these adapters have no such average, or what is computed
            in groups has no such statistic.
    """
    if configs is not None:
        adapter = plan_adapters(checkpoints, configs, recipe, rows)
        return Derived(groups=adapter.groups, adapter=adapter, notes=adapter.notes)
    if max(len(row.used) for row in rows) == 1:  # copied as they are
        return NOTHING_DERIVED
    tensors, labels = checkpoints[-1].tensors, [one.label for one in checkpoints]
    weight_norms = tuple(find_weight_norms(tensors, labels))
    taken = {name for group in weight_norms for name in group.outputs}
    spectral_norms = tuple(
        one for one in find_spectral_norms(tensors, labels) if taken.isdisjoint(one.outputs)
    )
    notes = []
    if weight_norms:
        notes.append(
            f"{len(weight_norms)} weight-normed layers are averaged as weights, not as magnitudes "
            "and directions"
        )
    if spectral_norms:
        notes.append(
            f"{len(spectral_norms)} spectral-normed layers are averaged as weights; the layers "
            "scale that mean to spectral norm 1, as they always do"
        )
    taken |= {name for group in spectral_norms for name in group.outputs}
    return Derived(
        groups=(*weight_norms, *spectral_norms),
        notes=(*notes, *_left_over(tensors, taken)),
    )


def refuse_statistics(derived: Derived, schemes: Sequence[tuple[str, CoefficientRow]]) -> None:
    """Refuse order statistics and noise of what is computed in groups: those are weighted means.

    Args:
        derived: What is computed in groups.
        schemes: What each output's scheme is called, and its row.

    Raises:
        UsageError: If a row has a statistic, and there are LoRA adapters or normed layers.
    """
    adapter, what = derived.adapter, None
    if adapter is not None and adapter.method != "parameters":
        what = "LoRA adapters are averaged by the products of their factors"
    elif derived.groups:
        group = derived.groups[0]
        what = f"the {group.kind} layer '{group.module}' is averaged by the weight it stands for"
    for scheme, row in schemes:
        if what is not None and row.statistic is not None:
            raise UsageError(
                f"scheme '{scheme}': works on single values, but {what}; take a weighted mean such "
                "as uniform"
            )


def _left_over(tensors: Mapping[str, TensorInfo], taken: set[str]) -> list[str]:
    """Name what looks like a part of a normed or parametrised weight, but is averaged as it is."""
    left = [
        name
        for name in tensors
        if name not in taken and (_PART_OF_A_NORM.fullmatch(name) or _PARAMETRISED.search(name))
    ]
    if not left:
        return []
    return [
        f"{len(left)} tensors that parametrise a weight are averaged as they stand, since what "
        f"they make of it is not known: '{left[0]}'"
    ]
