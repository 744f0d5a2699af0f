"""Which checkpoints may be averaged together, told from their headers."""

import re
from collections.abc import Collection, Sequence

from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import IncompatibleCheckpointsError
from ckptavg.tensors import COMPLEX32, OutputFormat, TensorInfo

_MAX_DIFFERENCES_SHOWN = 5

# integer weights of GPTQ, AWQ, bitsandbytes, compressed-tensors and HQQ, and what goes with them
_QUANTISED_WEIGHT = re.compile(r"(^|[._])(weight|qweight|qzeros|weight_packed|W_q|packed_weight)$")
_QUANTISATION_STATE = re.compile(r"\.(quant_state\.\S+|absmax|quant_map|SCB)$")
_HINT_PREFIXES = ("module.", "_orig_mod.", "model.")


def refuse_unaveragable(checkpoint: Checkpoint, output_format: OutputFormat) -> None:
    """Refuse what holds quantised weights, what the output cannot store, or nothing to average.

    Raises:
        IncompatibleCheckpointsError: Saying which tensor and why.
    """

    def refuse(what: str) -> IncompatibleCheckpointsError:
        return IncompatibleCheckpointsError(f"{checkpoint.label}: {what}")

    for name, info in checkpoint.tensors.items():
        is_packed = info.dtype.kind == "integer" and (
            _QUANTISED_WEIGHT.search(name) or _QUANTISATION_STATE.search(name)
        )
        if info.dtype.kind == "quantised" or is_packed or _QUANTISATION_STATE.search(name):
            raise refuse(
                f"tensor '{name}' of {info.dtype} is quantised; average the full-precision weights"
            )
        if info.dtype is COMPLEX32:
            raise refuse(f"tensor '{name}' is {info.dtype}, which is not averaged")
        if output_format == "torch":
            continue
        if name == "__metadata__":
            raise refuse(
                "a tensor is called '__metadata__', a name that safetensors reserves; "
                "pass --output-format torch"
            )
        if info.dtype.code is None:
            raise refuse(
                f"tensor '{name}' is {info.dtype}, which safetensors cannot store; "
                "pass --output-format torch"
            )
    if not any(info.dtype.kind in ("float", "complex") for info in checkpoint.tensors.values()):
        raise refuse("nothing to average: it holds no floating-point tensors")


def refuse_differences(
    checkpoint: Checkpoint, reference: Checkpoint, *, any_shape: Collection[str] = ()
) -> None:
    """Compare names, shapes and dtypes; tied names may be stored in one and not in the other.

    Args:
        checkpoint: What is compared.
        reference: With what.
        any_shape: Names whose shapes may differ.

    Raises:
        IncompatibleCheckpointsError: Naming the first differences and what would help.
    """
    mine = checkpoint.tensors.keys() | checkpoint.aliases.keys()
    theirs = reference.tensors.keys() | reference.aliases.keys()
    missing = [name for name in reference.tensors if name not in mine]
    extra = [name for name in checkpoint.tensors if name not in theirs]
    differences = [
        f"'{name}' is in {reference.label}, not in {checkpoint.label}" for name in missing
    ]
    differences += [
        f"'{name}' is in {checkpoint.label}, not in {reference.label}" for name in extra
    ]
    hint = _prefix_hint(missing, extra)
    for name, info in reference.tensors.items():
        other = _info(checkpoint, name)
        if other is None or other == info:
            continue
        if other.dtype is info.dtype and name in any_shape:
            continue
        if other.shape != info.shape and name not in any_shape:
            differences.append(
                f"'{name}' has shape {list(other.shape)} in {checkpoint.label}, "
                f"{list(info.shape)} in {reference.label}"
            )
            hint = hint or "are they from the same run?"
        else:
            differences.append(
                f"'{name}' is {other.dtype} in {checkpoint.label}, "
                f"{info.dtype} in {reference.label}"
            )
            both_float = other.dtype.kind == info.dtype.kind == "float"
            hint = hint or (
                "pass --dtype to say which one the average gets"
                if both_float
                else "average checkpoints of one dtype"
            )
    if differences:
        shown = "; ".join(differences[:_MAX_DIFFERENCES_SHOWN])
        more = len(differences) - _MAX_DIFFERENCES_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        ending = f" ({hint})" if hint else ""
        raise IncompatibleCheckpointsError(f"the checkpoints differ: {shown}{rest}{ending}")


def _prefix_hint(missing: Sequence[str], extra: Sequence[str]) -> str:
    """Suggest the prefix that would make the names agree, if one would."""
    for longer, shorter in ((missing, extra), (extra, missing)):
        for name in longer[:1]:
            parts = name.split(".")
            tried = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
            for prefix in (*_HINT_PREFIXES, *tried):
                if name.startswith(prefix) and name.removeprefix(prefix) in shorter:
                    return f"pass --strip-prefix {prefix}"
    return ""


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    return checkpoint.tensors.get(name) or checkpoint.tensors.get(checkpoint.aliases.get(name, ""))


def tied_names(checkpoints: Sequence[Checkpoint]) -> tuple[dict[str, str], list[str]]:
    """Return tied name -> owner for the output, and notes on ties that are not the same everywhere.

    A pair is tied if every checkpoint either stores one of the two, or says that they share
    storage; then both get the same bytes.

    Raises:
        IncompatibleCheckpointsError: If a tensor that the last checkpoint does not store is a
            tensor of its own in another.
    """
    reference = checkpoints[-1]
    owners: dict[str, str] = {}
    notes = []
    for name, owner in reference.aliases.items():
        apart = [
            one for one in checkpoints if _storage_name(one, name) != _storage_name(one, owner)
        ]
        if name in reference.tensors and not apart:
            owners[name] = owner
        elif name in reference.tensors:
            notes.append(
                f"'{name}' is tied to '{owner}' in {reference.label}, but stored apart in "
                f"{apart[0].label}: each is averaged by itself"
            )
        elif apart:
            raise IncompatibleCheckpointsError(
                f"'{name}' is stored apart in {apart[0].label}, but only as the tied '{owner}' in "
                f"{reference.label}; average checkpoints that agree on it"
            )
    return owners, notes


def _storage_name(checkpoint: Checkpoint, name: str) -> str:
    return checkpoint.aliases.get(name, name)
