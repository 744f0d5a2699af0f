"""Readers of saved checkpoints: one protocol, whatever the layout; opening reads headers only."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckptavg.checkpoint.adapter import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_LAYOUT,
    ADAPTER_WEIGHTS_NAMES,
)
from ckptavg.checkpoint.directory import holds_weights, open_directory
from ckptavg.checkpoint.files import PositionalFile
from ckptavg.checkpoint.folder import SHARD_NAME, LocalFolder
from ckptavg.checkpoint.formats import open_file
from ckptavg.checkpoint.hub_folder import HubFolder, names_a_file, open_hub_weights
from ckptavg.checkpoint.naming import normalise_names, under_last_names
from ckptavg.checkpoint.position import position_from_name
from ckptavg.checkpoint.protocol import READ_SCRATCH_BYTES, Checkpoint
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.checkpoint.widened import widen_dtypes
from ckptavg.errors import CheckpointError
from ckptavg.hub import label_of
from ckptavg.tensors import HubRevision

if TYPE_CHECKING:  # importing huggingface_hub takes longer than averaging many models
    from ckptavg.hub.connection import HubConnection

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "ADAPTER_LAYOUT",
    "ADAPTER_WEIGHTS_NAMES",
    "READ_SCRATCH_BYTES",
    "Checkpoint",
    "holds_weights",
    "normalise_names",
    "open_checkpoint",
    "open_hub_checkpoint",
    "under_last_names",
    "widen_dtypes",
]


def open_checkpoint(
    source: str | Path, *, state_key: str | None = None, label: str | None = None
) -> Checkpoint:
    """Open one local checkpoint: a file or a model directory.

    Reads and checks headers, indexes and pickles; touches no tensor data and runs no code from
    the checkpoint.

    Args:
        source: A safetensors file, a torch file of either format (``.pt .pth .bin .ckpt .tar``),
            a numpy file of arrays (``.npz``), or a directory as trainers write it.
        state_key: The entry of a torch file that holds the weights, such as ``ema`` or
            ``trainer.model``; None looks for the usual ones.
        label: What messages call the checkpoint; the source itself if None.

    Raises:
        CheckpointError: If it is missing, broken, hostile, or of an unsupported layout.
    """
    label = label or str(source)
    path = Path(source)
    _refuse_parts(path.name, label)
    try:
        if path.is_dir():
            checkpoint = open_directory(LocalFolder(path, label), state_key=state_key)
        else:
            checkpoint = open_file(PositionalFile(path, label), state_key=state_key)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(f"{label}: cannot be opened: {error.strerror}") from error
    return _placed(checkpoint, str(path))


def open_hub_checkpoint(
    found: HubRevision, connection: "HubConnection", *, state_key: str | None = None
) -> Checkpoint:
    """Open a revision on the Hub, or a folder or file in it, as ``open_checkpoint`` does.

    Raises:
        CheckpointError: If it is broken, hostile, or of an unsupported layout.
        SourceError: If the path is not there.
        HubError: If the Hub cannot be reached.
    """
    label = label_of(found)
    if names_a_file(found):
        _refuse_parts(found.path.rpartition("/")[2], label)
        file = open_hub_weights(found, connection, label)
        checkpoint = open_file(file, state_key=state_key)
        checkpoint.revision = found
    else:
        checkpoint = open_directory(HubFolder(found, connection), state_key=state_key)
    checkpoint.connection = connection
    return _placed(checkpoint, f"{found.revision}/{found.path}".rstrip("/"), found.title)


def _refuse_parts(name: str, label: str) -> None:
    """Refuse a file that is named itself and holds a part of a model only.

    Raises:
        CheckpointError: If its name says so.
    """
    shard = SHARD_NAME.fullmatch(name)
    if (shard is not None and int(shard[1]) > 1) or name.endswith(".distcp"):
        raise CheckpointError(f"{label}: is a part of a checkpoint; name the folder it lies in")


def _placed(checkpoint: StoredCheckpoint, *names: str) -> StoredCheckpoint:
    """Fill in what the names of a checkpoint tell of its place in training."""
    for name in names:
        told = position_from_name(name)
        # metadata written by the trainer wins over names; timm calls epoch 12 checkpoint-12
        step = None if told.step == checkpoint.epoch else told.step
        checkpoint = replace(
            checkpoint,
            step=step if checkpoint.step is None else checkpoint.step,
            epoch=told.epoch if checkpoint.epoch is None else checkpoint.epoch,
        )
    return checkpoint
