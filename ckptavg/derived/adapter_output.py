"""What is told of an averaged adapter: its config for PEFT, and how exact it is."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ckptavg.coefficients import CoefficientRow
from ckptavg.derived.adapter_config import AdapterConfig, pattern_key
from ckptavg.derived.adapter_rules import changes_base
from ckptavg.derived.lora_groups import ConcatenatedGroup, TruncatedGroup


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


def ranks_and_alphas(
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
    if not changes_base(config):  # what stands for a beginning may not be made at another rank
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


def adapter_report(method: str, rank: int, found: Sequence[Sequence[Any]]) -> AdapterReport:
    """Sum up what was measured of one output; ``found`` are the fields of ``Deviation``."""
    if method == "concatenation":
        return AdapterReport(method=method, rank=rank, error=0.0)
    if not found:
        return AdapterReport(method=method, rank=rank)
    relative = [(_relative(error, total), module) for module, error, total in found]
    largest, module = max(relative)
    return AdapterReport(
        method=method,
        rank=rank,
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
