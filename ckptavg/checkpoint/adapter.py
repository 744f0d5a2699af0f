"""Directories that hold a PEFT adapter: its weights in one file, and ``adapter_config.json``."""

from ckptavg.checkpoint.folder import Folder
from ckptavg.checkpoint.formats import open_file
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.errors import CheckpointError

ADAPTER_LAYOUT = "PEFT adapter directory"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_WEIGHT_NAMES = (ADAPTER_WEIGHTS_NAME, "adapter_model.bin")  # the first that is there, as PEFT does


def open_adapter(folder: Folder, *, state_key: str | None) -> StoredCheckpoint:
    """Open the weights of an adapter.

    Raises:
        CheckpointError: If there are none, or they cannot be read.
    """
    label = folder.label
    there = [name for name in _WEIGHT_NAMES if folder.has(name)]
    if not there:
        raise CheckpointError(
            f"{label}: holds {ADAPTER_CONFIG_NAME}, but neither {' nor '.join(_WEIGHT_NAMES)}"
        )
    checkpoint = open_file(folder.open(there[0], f"{label}/{there[0]}"), state_key=state_key)
    checkpoint.label = label
    checkpoint.layout = ADAPTER_LAYOUT
    if len(there) > 1:
        checkpoint.notes = [*checkpoint.notes, f"{there[1]} was passed over for {there[0]}"]
    return checkpoint
