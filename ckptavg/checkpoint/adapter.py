"""Directories that hold a PEFT adapter: its weights in one file, and ``adapter_config.json``."""

from collections.abc import Mapping

from ckptavg.checkpoint.folder import Folder
from ckptavg.checkpoint.formats import open_file
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.errors import IncompleteCheckpointError
from ckptavg.tensors import OutputFormat

ADAPTER_LAYOUT = "PEFT adapter directory"
ADAPTER_CONFIG_NAME = "adapter_config.json"
# by format; the first that is there is read, as PEFT does
ADAPTER_WEIGHTS_NAMES: Mapping[OutputFormat, str] = {
    "safetensors": "adapter_model.safetensors",
    "torch": "adapter_model.bin",
}


def open_adapter(folder: Folder, *, state_key: str | None) -> StoredCheckpoint:
    """Open the weights of an adapter.

    Raises:
        CheckpointError: If there are none, or they cannot be read.
    """
    label = folder.label
    names = ADAPTER_WEIGHTS_NAMES.values()
    there = [name for name in names if folder.has(name)]
    if not there:
        raise IncompleteCheckpointError(
            f"{label}: holds {ADAPTER_CONFIG_NAME}, but neither {' nor '.join(names)}"
        )
    checkpoint = open_file(folder.open(there[0], f"{label}/{there[0]}"), state_key=state_key)
    checkpoint.label = label
    checkpoint.layout = ADAPTER_LAYOUT
    if folder.hub is None:  # where it is verified when it is read
        config = folder.open(ADAPTER_CONFIG_NAME, f"{label}/{ADAPTER_CONFIG_NAME}")
        checkpoint.is_described_by(config)
    if len(there) > 1:
        checkpoint.notes = [*checkpoint.notes, f"{there[1]} was passed over for {there[0]}"]
    return checkpoint
