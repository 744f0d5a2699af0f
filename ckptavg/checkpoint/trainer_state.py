"""What ``trainer_state.json`` of transformers' Trainer tells of a checkpoint beside it."""

import math
import re
from collections.abc import Mapping
from typing import Any

from ckptavg.checkpoint.stored import StoredCheckpoint

_NO_METRIC = re.compile(r"step|epoch|.*_(runtime|per_second|compilation_time)")


def add_trainer_state(checkpoint: StoredCheckpoint, state: Mapping[str, Any]) -> None:
    """Take step, learning rate and metrics over; whatever is not as it should be is not known.

    ``log_history`` holds rows of what was logged at a step: of training (``loss``,
    ``learning_rate``) and of evaluations (``eval_loss``, ...). The learning rate is the last one
    that was logged up to this step; metrics are those of evaluations at this very step.
    """
    step = state.get("global_step")
    if type(step) is not int:
        return
    checkpoint.step = step
    history = state.get("log_history")
    metrics: dict[str, float] = {}
    for row in history if isinstance(history, list) else ():
        at = row.get("step") if isinstance(row, dict) else None
        if type(at) is not int or at > step:
            continue
        rate = _number(row.get("learning_rate"))
        if rate is not None:
            checkpoint.learning_rate = rate
        is_evaluation = any(str(key).startswith("eval_") for key in row)
        if at == step and is_evaluation:
            for key, value in row.items():
                number = _number(value)
                if number is not None and not _NO_METRIC.fullmatch(key):
                    metrics[key] = number
    checkpoint.metrics = metrics


def _number(value: Any) -> float | None:
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of many digits
        return None
    return number if math.isfinite(number) else None
