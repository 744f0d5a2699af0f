"""The state of a learning-rate scheduler that a trainer saved, beside the weights or with them.

Nothing here is needed for an average, so anything odd is not known and never an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptavg.checkpoint.folder import Folder
from ckptavg.checkpoint.pickle_values import Pairs
from ckptavg.checkpoint.torch_legacy import is_legacy
from ckptavg.checkpoint.torch_zip import TorchZip
from ckptavg.checkpoint.training_facts import entry, first, number
from ckptavg.errors import CheckpointError

# of Lightning, which has a list of them; of hand-written loops
_SCHEDULER_LISTS = ("lr_schedulers", "schedulers")
_SCHEDULERS = (
    "lr_scheduler", "scheduler", "lr_scheduler_state_dict", "scheduler_state_dict",
    "lr_scheduler_state", "scheduler_state", "lr_sched", "sched",
)  # fmt: skip
# of transformers' Trainer, of accelerate
SCHEDULER_FILES = ("scheduler.pt", "scheduler.bin")
_MAX_FILE_BYTES = 16 * 2**20
_NUMBERS = (
    "T_0", "T_mult", "T_i", "T_cur", "T_max", "eta_min", "total_size", "step_ratio", "gamma",
)  # fmt: skip
_TEXTS = ("mode", "scale_mode")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerState:
    """What the ``state_dict`` of a scheduler of ``torch.optim.lr_scheduler`` tells.

    Attributes:
        last_epoch: How often the scheduler was stepped: per epoch, or per update.
        rate: The learning rate that it set last, of the first parameter group.
        base_rate: The one that it began with.
        max_rate: The highest that it goes up to, where it is cyclical.
        values: Its other numbers, by their names: ``T_0``, ``eta_min``, ``total_size``, ...
        texts: Those of its values that are text: ``mode`` of CyclicLR, ...
    """

    last_epoch: int
    rate: float | None = None
    base_rate: float | None = None
    max_rate: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def scheduler_state(root: Any) -> SchedulerState | None:
    """Return the state of the first scheduler in what the pickle of a torch file describes."""
    if type(root) is not Pairs:
        return None
    found = [first(root.get(key)) for key in _SCHEDULER_LISTS]
    found += [root.get(key) for key in _SCHEDULERS]
    for state in found:
        told = _state(first(state) if type(state) is list else state)
        if told is not None:
            return told
    return None


def read_scheduler_file(folder: Folder) -> SchedulerState | None:
    """Return the state that a trainer saved in a file of its own beside the weights."""
    for name in SCHEDULER_FILES:
        if not folder.has(name) or not 0 < folder.size(name) <= _MAX_FILE_BYTES:
            continue
        try:
            file = folder.open(name, f"{folder.label}/{name}")
        except CheckpointError:
            continue
        try:
            if not is_legacy(file.read(0, min(file.size, 512))):
                file.verify()
                return _state(TorchZip(file).root)
        except CheckpointError:  # it is not needed
            continue
        finally:
            file.close()
    return None


def _state(state: Any) -> SchedulerState | None:
    last_epoch = entry(state, "last_epoch")
    if type(last_epoch) is not int or not 0 <= last_epoch < 2**53:
        return None
    numbers = {name: number(entry(state, name)) for name in _NUMBERS}
    texts = {name: entry(state, name) for name in _TEXTS}
    if entry(state, "_scale_fn_custom") is not None:  # CyclicLR with a scale of the user's own
        texts["mode"] = None
    return SchedulerState(
        last_epoch=last_epoch,
        rate=number(first(entry(state, "_last_lr"))),
        base_rate=number(first(entry(state, "base_lrs"))),
        max_rate=number(first(entry(state, "max_lrs"))),
        values={name: value for name, value in numbers.items() if value is not None},
        texts={name: value for name, value in texts.items() if type(value) is str},
    )
