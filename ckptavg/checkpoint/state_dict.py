"""Which of the mappings in a checkpoint holds the weights, and what else the trainer wrote there.

Works on inert values, wherever they come from: the pickle of a torch file, or the names in a
torch.distributed.checkpoint directory.
"""

import re
from collections.abc import Sequence
from typing import Any

from ckptavg.checkpoint.pickle_values import Inert, Pairs, TensorView, Unsupported
from ckptavg.errors import CheckpointError

_MAX_NESTING = 4
# where trainers put the weights; averages kept during training are taken only when asked for
WEIGHT_KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights",
    "model_weights",
)  # fmt: skip
_EXTRA_STATE = "_extra_state"  # what a module saves besides tensors; it may be a mapping
_AVERAGE_HINTS = ("ema", "swa", "averag", "shadow", "teacher")
# what trainers save beside the weights to go on training: it may hold tensors, but no weights
_TRAINING_STATE = re.compile(
    r"optimi[sz]er|optims?(?![a-z])|^opts?$|^opt_state|scheduler|(^|_)sched(_|$)|(^|_)(grad_?)?scalers?(_|$)"
    r"|^amp(_|$)|(^|_)rng(s|_|$)|random_states?|data_?loader|(^|_)sampler(_|$)|^(loops|callbacks)$"
    r"|^train(ing|er)?_(state|progress)|^(metric|loss|averaging)_state(_dict)?$",
    re.IGNORECASE,
)
# Lightning's WeightAveraging callback puts averages where the weights were, and those here
_LIGHTNING_AVERAGED, _LIGHTNING_RAW = "averaging_state", "current_model_state"
STEP_KEYS = (
    "global_step", "global_steps", "step", "global_iter", "iteration", "iter", "num_updates", "it",
)  # fmt: skip
EPOCH_KEYS = ("epoch", "epochs")


def is_training_state(key: str) -> bool:
    """Tell whether an entry of a checkpoint serves to go on training: an optimizer, a loader."""
    return _TRAINING_STATE.search(key) is not None


def find_state_dict(root: Any, state_key: str | None, label: str) -> tuple[Pairs, list[str]]:
    """Return the mapping that holds the weights, and notes on what else could have been meant."""
    if type(root) is not Pairs:
        kind = "a tensor" if type(root) is TensorView else f"a {_kind(root)}"
        raise CheckpointError(f"{label}: holds {kind}, expected a state dict (name -> tensor)")
    if state_key is not None:
        return _walk(root, state_key, label), []

    mapping, path, notes = root, "", list[str]()
    for _ in range(_MAX_NESTING):
        prefix = f"{path}." if path else ""
        averages = [key for key in _weight_mappings(mapping) if is_average(key)]
        if averages:
            averages[:3] = [f"{prefix}{_tensor_path(mapping, key)}" for key in averages[:3]]
            notes.append(f"also holds {some(averages)}; --state-key selects it")
        candidates = [key for key in _weight_mappings(mapping) if key in WEIGHT_KEYS]
        if not candidates:
            break
        if len(candidates) > 1:
            raise CheckpointError(
                f"{label}: {some(candidates)} all hold weights; choose one with --state-key"
            )
        siblings = [
            f"{prefix}{key}"
            for key in _tensor_mappings(mapping)
            if key not in (candidates[0], _LIGHTNING_RAW)
            and not is_average(key)
            and not key.endswith(_EXTRA_STATE)
        ]
        if siblings:
            notes.append(f"left out {some(siblings)}, which hold tensors, too; see --state-key")
        path = f"{path}.{candidates[0]}" if path else candidates[0]
        mapping = mapping.get(candidates[0])
    nested = [key for key in _tensor_mappings(mapping) if not key.endswith(_EXTRA_STATE)]
    networks = [key for key in nested if not is_average(key)]
    has_tensors = any(type(value) in (TensorView, Unsupported) for _, value in mapping.items)
    if has_tensors and not networks:
        if path == "state_dict" and {_LIGHTNING_AVERAGED, _LIGHTNING_RAW} <= _keys(root):
            notes.append(
                "its 'state_dict' holds averages that training kept already (WeightAveraging); "
                f"--state-key {_LIGHTNING_RAW} selects the weights of this step"
            )
        return mapping, notes
    level = f"in its entry '{path}'" if path else "at its top level"
    keys = [key for key, _ in mapping.string_items()]
    found = some(keys, 8) if keys else "nothing"
    prefix = f"{path}." if path else ""
    hint = ""
    if nested:
        example = f"{prefix}{_tensor_path(mapping, nested[0])}"
        hint = f"; choose one with --state-key, for example --state-key {example}"
    raise CheckpointError(f"{label}: no weights found {level}, which holds {found}{hint}")


def _walk(root: Pairs, state_key: str, label: str) -> Pairs:
    if state_key == ".":  # the top level itself
        return root
    has_dots = type(root.get(state_key)) is Pairs  # a key that itself holds dots
    parts = [state_key] if has_dots else state_key.split(".")
    mapping: Any = root
    for part in parts:
        inner = mapping.get(part) if type(mapping) is Pairs else None
        if inner is None:
            keys = [key for key, _ in mapping.string_items()] if type(mapping) is Pairs else []
            raise CheckpointError(
                f"{label}: no entry '{state_key}': '{part}' is not among {some(keys, 8)}"
            )
        mapping = inner
    if type(mapping) is not Pairs or not any(
        type(value) in (TensorView, Unsupported) for _, value in mapping.items
    ):
        raise CheckpointError(f"{label}: the entry '{state_key}' is not a state dict")
    return mapping


def _weight_mappings(mapping: Pairs) -> list[str]:
    """Return the keys under which trainers put weights, where a mapping of tensors is there."""
    return [key for key in _tensor_mappings(mapping) if key in WEIGHT_KEYS or is_average(key)]


def _tensor_mappings(mapping: Pairs) -> list[str]:
    """Return the keys whose value is a mapping that holds a tensor, at most two levels down.

    What serves to go on training is left out.
    """
    known: dict[tuple[int, int], bool] = {}  # one mapping may be referred to a million times

    def holds_tensors(value: Any, levels: int) -> bool:
        if type(value) is not Pairs:
            return False
        if (id(value), levels) not in known:
            known[id(value), levels] = any(
                type(inner) in (TensorView, Unsupported)
                or (levels > 0 and holds_tensors(inner, levels - 1))
                for _, inner in value.items
            )
        return known[id(value), levels]

    last = dict(mapping.string_items())  # as a dict keeps it, where a key is set twice
    return [
        key for key, value in last.items() if holds_tensors(value, 1) and not is_training_state(key)
    ]


def _tensor_path(mapping: Pairs, key: str) -> str:
    """Return the key, joined with those below it until a mapping holds tensors itself."""
    path, value = key, mapping.get(key)
    for _ in range(_MAX_NESTING):
        if any(type(inner) in (TensorView, Unsupported) for _, inner in value.items):
            break
        below = _tensor_mappings(value)
        if not below:
            break
        path, value = f"{path}.{below[0]}", value.get(below[0])
    return path


def _keys(mapping: Pairs) -> set[str]:
    return {key for key, _ in mapping.string_items()}


def is_average(key: str) -> bool:
    """Tell by its name whether an entry holds averages that training kept."""
    return any(hint in key.lower() for hint in _AVERAGE_HINTS)


def first_integer(root: Pairs, keys: Sequence[str]) -> int | None:
    """Return the first of some entries that is a whole number, as steps and epochs are."""
    for key in keys:
        value = root.get(key)
        if type(value) is int and 0 <= value < 2**63:
            return value
    return None


def _kind(value: Any) -> str:
    if type(value) is Inert:
        return f"{value.name} object"
    return type(value).__name__


def some(names: Sequence[str], count: int = 3) -> str:
    """Return a few names as they stand in messages."""
    shown = ", ".join(f"'{name}'" for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
