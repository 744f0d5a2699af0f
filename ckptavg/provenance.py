"""What made a model: the content of ``ckptavg.json`` and of the weight files' headers."""

import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

from ckptavg.blocks import Action
from ckptavg.checkpoint import Checkpoint
from ckptavg.checkpoint.folder import PROVENANCE_NAME, read_json
from ckptavg.errors import without_token
from ckptavg.hashing import FileHash
from ckptavg.hub import pinned_reference
from ckptavg.plan import AveragePlan, OutputPlan
from ckptavg.tensors import HubRevision

FORMAT_VERSION = 1
_OWN_HASH = "sha256_of_this_file"  # with zeros in its place
_NO_HASH = "0" * 64
_OWN_HASH_LINE = re.compile(rf'"{_OWN_HASH}": "([0-9a-f]{{64}})"\n\}}\n\Z'.encode())
_MAX_GENERATIONS = 16  # of averages of averages


def weight_file_metadata(plan: AveragePlan, output: OutputPlan, version: str) -> dict[str, str]:
    """Return the string map for the headers of one output.

    It holds no times and no paths, so that equal runs give equal files.
    ``{"format": "pt"}`` is what transformers requires as soon as any other key is there.
    """
    steps = [plan.steps[index] for index in output.row.used]
    metadata = {
        "format": "pt",
        **plan.metadata,
        "ckptavg_version": version,
        "ckptavg_scheme": str(output.scheme),
        "ckptavg_checkpoints": str(len(steps)),
    }
    if None not in steps:
        metadata["ckptavg_steps"] = ",".join(map(str, steps))
    return metadata


def provenance(
    plan: AveragePlan,
    output: OutputPlan,
    *,
    version: str,
    device: str,
    state_key: str | None,
    strip_prefixes: Sequence[str],
    keep_prefix: bool,
    differing: Sequence[str],
    notes: Sequence[str],
    side_files: Sequence[str],
    evidence: Sequence[str],
    hashes: Mapping[str, FileHash],
    digests: Mapping[str, str],
    reproduce: Mapping[str, Any],
    derived_from: Sequence[Mapping[str, Any] | None],
    batchnorm: Mapping[str, Any] | None,
    metrics: Mapping[str, float] | None,
    comparison: Sequence[Mapping[str, Any]],
    adapter: Mapping[str, Any] | None,
    command: str | None,
    inherited_card: str | None,
) -> bytes:
    """Return the JSON text of ``ckptavg.json`` for one output; it lists what went into that."""
    siblings = [other.name for other in plan.outputs]
    reading = {
        "state_key": state_key,
        "strip_prefixes": list(strip_prefixes),
        "keep_prefix": keep_prefix,
    }
    recipe = {**asdict(plan.recipe), **reading}
    del recipe["schemes"]
    content = {
        "format_version": FORMAT_VERSION,
        "ckptavg_version": version,
        "versions": _versions(),
        "command": command and without_token(command),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "scheme": str(output.scheme),
        "statistic": _statistic_json(output),
        "n_sources": plan.n_checkpoints,
        "checkpoints": [
            {
                "source": plan.labels[index],
                "hub": _hub_json(plan.hubs[index]),
                "step": plan.steps[index],
                "epoch": plan.epochs[index],
                "coefficient": output.row.told_coefficients[index],
                "files": [
                    {
                        "path": file.path,
                        "nbytes": file.size,
                        "mtime_ns": file.mtime_ns,
                        "digest": digests.get(file.path) or file.digest or None,
                    }
                    for file in plan.files[index]
                ],
                "made_by_ckptavg": derived_from[index],
            }
            for index in output.row.used
        ],
        "recipe": recipe,
        "reproduce": reproduce,
        "tensors": tensor_summary(plan, output, differing),
        "notes": list(notes),
        "batchnorm": batchnorm,
        "metrics": metrics,
        "comparison": list(comparison),
        "adapter": adapter,
        "output": {
            "format": plan.output_format,
            "nbytes": plan.total_nbytes,
            "shards": [shard.filename for shard in plan.shards],
            "side_files": list(side_files),
            "evidence": list(evidence),
            "files": [{"name": name, **one._asdict()} for name, one in sorted(hashes.items())],
            "siblings": sorted(siblings) if len(siblings) > 1 else [],
        },
        "device": device,
        "inherited_card": inherited_card,
        _OWN_HASH: _NO_HASH,
    }
    return sealed((json_text(content) + "\n").encode("utf-8"))


def sealed(text: bytes) -> bytes:
    """Return a provenance with its own hash in the place for it."""
    return _with_hash(text, hashlib.sha256(_with_hash(text, _NO_HASH)).hexdigest())


def has_own_hash(text: bytes) -> bool | None:
    """Tell whether a provenance has the hash that stands at its end; None if none does."""
    match = _OWN_HASH_LINE.search(text)
    if match is None:
        return None
    found = hashlib.sha256(_with_hash(text, _NO_HASH)).hexdigest()
    return found.encode() == match[1]


def _with_hash(text: bytes, digits: str) -> bytes:
    return _OWN_HASH_LINE.sub(f'"{_OWN_HASH}": "{digits}"\n}}\n'.encode(), text)


def earlier_provenance(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return how a checkpoint was made, if ckptavg made it.

    Raises:
        CheckpointError: If its provenance is damaged.
    """
    if checkpoint.folder is None:
        return None
    told = read_json(checkpoint.folder, PROVENANCE_NAME)
    _forget_before(told, _MAX_GENERATIONS)
    return told


def _forget_before(told: Any, generations: int) -> None:
    """Leave out how averages of averages were made, from so many generations back on."""
    checkpoints = told.get("checkpoints") if isinstance(told, dict) else None
    for one in checkpoints if isinstance(checkpoints, list) else ():
        if isinstance(one, dict) and "made_by_ckptavg" in one:
            if generations:
                _forget_before(one["made_by_ckptavg"], generations - 1)
            else:
                one["made_by_ckptavg"] = None


@dataclass(frozen=True)
class LastAveraged:
    """The last checkpoint that went into an average, as its provenance tells.

    Attributes:
        source: What was given, or the reference to the commit on the Hub.
        files: Path, size and modification time of each of its files, where they are local.
        state_key: The entry that held the weights; None for the usual one.
        strip_prefixes: What was removed from its tensors' names.
    """

    source: str
    files: tuple[tuple[str, int, int], ...]
    state_key: str | None
    strip_prefixes: tuple[str, ...]


def last_averaged(told: Mapping[str, Any] | None) -> LastAveraged | None:
    """Return the last checkpoint that went into an average; None if no average is known.

    Looks through models that were made from one model, as by another BatchNorm pass.
    """
    try:
        while told is not None and told["n_sources"] == 1:
            told = told["checkpoints"][0]["made_by_ckptavg"]
        if told is None:
            return None
        last, recipe = told["checkpoints"][-1], told["recipe"]
        hub = last.get("hub")
        pinned = hub and pinned_reference(HubRevision(**hub))
        return LastAveraged(
            source=pinned or str(last["source"]),
            files=()
            if pinned
            else tuple(
                (str(file["path"]), int(file["nbytes"]), int(file["mtime_ns"]))
                for file in last["files"]
            ),
            state_key=recipe.get("state_key"),
            strip_prefixes=tuple(map(str, recipe.get("strip_prefixes", ()))),
        )
    except (LookupError, TypeError, ValueError, AttributeError):  # of another version, or by hand
        return None


def _versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on, without importing it."""
    found = {"python": platform.python_version()}
    for name in ("numpy", "torch"):
        with suppress(PackageNotFoundError):
            found[name] = package_version(name)
    return found


def _statistic_json(output: OutputPlan) -> dict[str, Any] | None:
    """Return what was taken instead of a weighted mean, or added to it."""
    statistic = output.row.statistic
    return None if statistic is None else {"name": output.row.statistic_name, **asdict(statistic)}


def _hub_json(found: HubRevision | None) -> dict[str, str] | None:
    return None if found is None else found._asdict()


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


def tensor_summary(
    plan: AveragePlan, output: OutputPlan, differing: Sequence[str] | None
) -> dict[str, Any]:
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
        "derived": _derived_modules(plan),
        "tied": {tensor.name: tensor.owner for tensor in plan.with_action(Action.ALIAS)},
    }
    if differing is not None:
        summary["differing"] = {
            "taken_from": plan.labels[output.take_from],
            "names": list(differing),
        }
    return summary


def _derived_modules(plan: AveragePlan) -> dict[str, list[str]]:
    """Return by kind the modules whose tensors are computed together."""
    found: dict[str, list[str]] = {}
    for group in plan.derived.groups:
        if group.outputs:
            found.setdefault(group.kind, []).append(group.module)
    return found
