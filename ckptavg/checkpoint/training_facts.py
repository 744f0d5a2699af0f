"""What a trainer wrote beside the weights: learning rate and metrics, where it is plain to see.

Nothing here is needed for an average, so anything odd is not known and never an error.
"""

import math
from collections.abc import Callable
from typing import Any

from ckptavg.checkpoint.pickle_values import Inert, Pairs, TensorView

# of Lightning, which has a list of them; of timm and hand-written loops
_OPTIMIZER_LISTS = ("optimizer_states",)
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim", "optim_state_dict")
# timm's first; the others are what the examples of torch and hand-written loops call theirs
_METRICS = (
    "metric", "loss", "train_loss", "val_loss", "valid_loss", "eval_loss", "acc", "accuracy",
    "val_acc", "val_accuracy", "acc1", "best_acc", "best_acc1", "best_loss",
)  # fmt: skip
# where trainers and hand-written loops keep the options of a run
_OPTIONS = ("args", "hyper_parameters", "hparams", "config", "cfg")
_MODEL_CHECKPOINT = "ModelCheckpoint"  # Lightning's callback that decides what is kept
_MAX_CALLBACKS = 16

ReadScalar = Callable[[TensorView], float | None]


def learning_rate(root: Any) -> float | None:
    """Return the learning rate of the first parameter group of the first optimizer."""
    for optimizer in _optimizers(root):
        group = first(entry(optimizer, "param_groups"))
        rate = number(entry(group, "lr"))
        if rate is not None:
            return rate
    return None


def n_updates(root: Any, read_scalar: ReadScalar) -> int | None:
    """Return how often the first optimizer was stepped, as Adam counts it for each parameter.

    0 also says that it holds nothing: no update was made, or it is plain SGD.
    """
    for optimizer in _optimizers(root):
        state = entry(optimizer, "state")
        if type(state) is not Pairs:
            continue
        if not state.items:
            return 0
        count = _value(entry(state.items[0][1], "step"), read_scalar)
        return int(count) if count is not None and count == int(count) >= 0 else None
    return None


def seed(root: Any) -> int | None:
    """Return the seed among the options of the run, where they are plain to read."""
    for key in _OPTIONS:
        options = root.get(key) if type(root) is Pairs else None
        if type(options) is Inert:  # argparse.Namespace, as timm saves it
            options = options.state
        value = entry(options, "seed")
        if type(value) is int and abs(value) < 2**63:
            return value
    return None


def metrics(root: Any, read_scalar: ReadScalar) -> dict[str, float]:
    """Return what was measured, by name.

    Args:
        root: The value that a checkpoint's pickle describes.
        read_scalar: Returns the value of a tensor of one element, or None.
    """
    if type(root) is not Pairs:
        return {}

    found = {name: _value(root.get(name), read_scalar) for name in _METRICS}
    callbacks = root.get("callbacks")
    states = [
        state
        for key, state in (callbacks.string_items() if type(callbacks) is Pairs else ())
        if key.startswith(_MODEL_CHECKPOINT)
    ]
    for state in states[:_MAX_CALLBACKS]:
        monitor = entry(state, "monitor")
        if type(monitor) is str and found.get(monitor) is None:
            found[monitor] = _value(entry(state, "current_score"), read_scalar)
    return {name: value for name, value in found.items() if value is not None}


def _optimizers(root: Any) -> list[Any]:
    if type(root) is not Pairs:
        return []
    optimizers = [first(root.get(key)) for key in _OPTIMIZER_LISTS]
    return optimizers + [root.get(key) for key in _OPTIMIZERS]


def _value(value: Any, read_scalar: ReadScalar) -> float | None:
    """Return a number, be it that of a tensor."""
    if type(value) is not TensorView:
        return number(value)
    is_scalar = value.shape in ((), (1,)) and value.dtype.kind == "float"
    return number(read_scalar(value)) if is_scalar else None


def entry(value: Any, key: str) -> Any:
    """Return what a mapping holds under a key; None if it is no mapping."""
    return value.get(key) if type(value) is Pairs else None


def first(value: Any) -> Any:
    """Return the first item of a list; None if it is none."""
    return value[0] if type(value) in (list, tuple) and value else None


def number(value: Any) -> float | None:
    """Return a finite number as such; a huge integer and what is no number are None."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
