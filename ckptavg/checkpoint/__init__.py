"""Readers of saved checkpoints: one protocol, whatever the layout; opening reads headers only."""

from dataclasses import replace
from pathlib import Path

from ckptavg.checkpoint.directory import open_directory
from ckptavg.checkpoint.files import PositionalFile
from ckptavg.checkpoint.formats import open_file
from ckptavg.checkpoint.naming import normalise_names
from ckptavg.checkpoint.position import position_from_name
from ckptavg.checkpoint.protocol import READ_SCRATCH_BYTES, Checkpoint
from ckptavg.errors import CheckpointError

__all__ = ["READ_SCRATCH_BYTES", "Checkpoint", "normalise_names", "open_checkpoint"]


def open_checkpoint(
    source: str | Path, *, state_key: str | None = None, label: str | None = None
) -> Checkpoint:
    """Open one checkpoint: a file or a model directory.

    Reads and checks headers, indexes and pickles; touches no tensor data and runs no code from
    the checkpoint.

    Args:
        source: A safetensors file, a torch file (zip format, ``.pt .pth .bin .ckpt .tar``), or a
            directory with ``model.safetensors``, ``pytorch_model.bin`` or their sharded forms.
        state_key: The entry of a torch file that holds the weights, such as ``ema`` or
            ``trainer.model``; None looks for the usual ones.
        label: What messages call the checkpoint; the source itself if None.

    Raises:
        CheckpointError: If it is missing, broken, hostile, or of an unsupported layout.
    """
    label = label or str(source)
    path = Path(source)
    try:
        is_directory = path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(f"{label}: cannot be opened: {error.strerror}") from error
    if is_directory:
        checkpoint = open_directory(path, label=label, state_key=state_key)
    else:
        checkpoint = open_file(PositionalFile(path, label), state_key=state_key)
    named = position_from_name(str(path))
    # metadata written by the trainer wins over names
    return replace(
        checkpoint,
        step=named.step if checkpoint.step is None else checkpoint.step,
        epoch=named.epoch if checkpoint.epoch is None else checkpoint.epoch,
    )
