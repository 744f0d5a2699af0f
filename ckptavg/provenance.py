"""What made a model: the content of ``ckptavg.json`` and of the weight files' headers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from ckptavg.plan import Action, AveragePlan

FORMAT_VERSION = 1


def weight_file_metadata(plan: AveragePlan, version: str) -> dict[str, str]:
    """Return the string map for the headers.

    It holds no times and no paths, so that equal runs give equal files.
    ``{"format": "pt"}`` is what transformers requires as soon as any other key is there.
    """
    steps = [step for step in plan.steps if step is not None]
    metadata = {
        "format": "pt",
        **plan.metadata,
        "ckptavg_version": version,
        "ckptavg_scheme": plan.rows[0].name,
        "ckptavg_checkpoints": str(plan.n_checkpoints),
    }
    if len(steps) == plan.n_checkpoints:
        metadata["ckptavg_steps"] = ",".join(map(str, steps))
    return metadata


def provenance(
    plan: AveragePlan,
    *,
    version: str,
    device: str,
    differing: Sequence[str],
    notes: Sequence[str],
    side_files: Sequence[str],
    derived_from: Sequence[Mapping[str, Any] | None],
    batchnorm: Mapping[str, Any] | None,
) -> bytes:
    """Return the JSON text of ``ckptavg.json``."""
    row = plan.rows[0]
    content = {
        "format_version": FORMAT_VERSION,
        "ckptavg_version": version,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "scheme": row.name,
        "checkpoints": [
            {
                "source": label,
                "step": step,
                "epoch": epoch,
                "coefficient": coefficient,
                "files": [
                    {"path": file.path, "nbytes": file.size, "mtime_ns": file.mtime_ns}
                    for file in files
                ],
                "made_by_ckptavg": earlier,
            }
            for label, step, epoch, coefficient, files, earlier in zip(
                plan.labels,
                plan.steps,
                plan.epochs,
                row.coefficients,
                plan.files,
                derived_from,
                strict=True,
            )
        ],
        "recipe": asdict(plan.recipe),
        "tensors": tensor_summary(plan, differing),
        "notes": list(notes),
        "batchnorm": batchnorm,
        "output": {
            "nbytes": plan.total_nbytes,
            "shards": [shard.filename for shard in plan.shards],
            "side_files": list(side_files),
        },
        "device": device,
    }
    return (json_text(content) + "\n").encode("utf-8")


def json_text(value: Any) -> str:
    """Return a value as JSON; what is not finite becomes null, since JSON has no word for it."""

    def finite(inner: Any) -> Any:
        if isinstance(inner, float):
            return inner if math.isfinite(inner) else None
        if isinstance(inner, Mapping):
            return {key: finite(item) for key, item in inner.items()}
        if isinstance(inner, (list, tuple)):
            return [finite(item) for item in inner]
        return inner

    return json.dumps(finite(value), indent=2, default=str, allow_nan=False)


def tensor_summary(plan: AveragePlan, differing: Sequence[str] | None) -> dict[str, Any]:
    """Return counts by action, and every name whose treatment is not obvious.

    ``differing`` are the copied tensors that differed between checkpoints; None before the run.
    """
    averaged = plan.with_action(Action.AVERAGE)
    dtypes: dict[str, int] = {}
    for tensor in averaged:
        change = (
            f"{tensor.info.dtype}"
            if tensor.info.dtype is tensor.output_dtype
            else f"{tensor.info.dtype} to {tensor.output_dtype}"
        )
        dtypes[change] = dtypes.get(change, 0) + 1
    summary: dict[str, Any] = {
        "averaged": len(averaged),
        "averaged_dtypes": dtypes,
        "copied": [tensor.name for tensor in plan.with_action(Action.TAKE)],
        "tied": {tensor.name: tensor.owner for tensor in plan.with_action(Action.ALIAS)},
    }
    if differing is not None:
        summary["differing"] = {
            "taken_from": plan.labels[plan.take_from],
            "names": list(differing),
        }
    return summary
