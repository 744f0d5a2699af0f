"""What a trainer wrote beside the weights: learning rate and metrics, where it is plain to see.

Nothing here is needed for an average, so anything odd is not known and never an error.
"""

import math
from collections.abc import Callable
from typing import Any

from ckptavg.checkpoint.pickle_values import Pairs, TensorView

# of Lightning, which has a list of them; of timm and hand-written loops
_OPTIMIZER_LISTS = ("optimizer_states",)
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "optim_state_dict")
# timm's first; the others are what the examples of torch and hand-written loops call theirs
_METRICS = (
    "metric", "loss", "train_loss", "val_loss", "valid_loss", "eval_loss", "acc", "accuracy",
    "val_acc", "val_accuracy", "acc1", "best_acc", "best_acc1", "best_loss",
)  # fmt: skip
_MODEL_CHECKPOINT = "ModelCheckpoint"  # Lightning's callback that decides what is kept
_MAX_CALLBACKS = 16

ReadScalar = Callable[[TensorView], float | None]


def learning_rate(root: Any) -> float | None:
    """Return the learning rate of the first parameter group of the first optimizer."""
    if type(root) is not Pairs:
        return None
    optimizers = [_first(root.get(key)) for key in _OPTIMIZER_LISTS]
    optimizers += [root.get(key) for key in _OPTIMIZERS]
    for optimizer in optimizers:
        group = _first(_entry(optimizer, "param_groups"))
        rate = _number(_entry(group, "lr"))
        if rate is not None:
            return rate
    return None


def metrics(root: Any, read_scalar: ReadScalar) -> dict[str, float]:
    """Return what was measured, by name.

    Args:
        root: The value that a checkpoint's pickle describes.
        read_scalar: Returns the value of a tensor of one element, or None.
    """
    if type(root) is not Pairs:
        return {}

    def value_of(value: Any) -> float | None:
        if type(value) is not TensorView:
            return _number(value)
        is_scalar = value.shape in ((), (1,)) and value.dtype.kind == "float"
        return _number(read_scalar(value)) if is_scalar else None

    found = {name: value_of(root.get(name)) for name in _METRICS}
    callbacks = root.get("callbacks")
    states = [
        state
        for key, state in (callbacks.string_items() if type(callbacks) is Pairs else ())
        if key.startswith(_MODEL_CHECKPOINT)
    ]
    for state in states[:_MAX_CALLBACKS]:
        monitor = _entry(state, "monitor")
        if type(monitor) is str and found.get(monitor) is None:
            found[monitor] = value_of(_entry(state, "current_score"))
    return {name: value for name, value in found.items() if value is not None}


def _entry(value: Any, key: str) -> Any:
    return value.get(key) if type(value) is Pairs else None


def _first(value: Any) -> Any:
    return value[0] if type(value) in (list, tuple) and value else None


def _number(value: Any) -> float | None:
    """Return a finite number as such; a huge integer and what is no number are None."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
