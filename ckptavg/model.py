"""Between a saved checkpoint and a live model: loading weights, taking buffers back out."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ckptavg.batchnorm import BnReport
from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import ModelError
from ckptavg.tensors import Piece, TensorInfo


def check_names(model: nn.Module, tensors: Mapping[str, TensorInfo], label: str) -> None:
    """Refuse a model whose state dict has other names or shapes than the tensors.

    Raises:
        ModelError: With the first few names that differ.
    """
    state = model.state_dict()
    missing = [name for name in state if name not in tensors]
    unexpected = [name for name in tensors if name not in state]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensors of the model are missing: {_some(missing)}")
        if unexpected:
            parts.append(f"{len(unexpected)} tensors are not in the model: {_some(unexpected)}")
        raise ModelError(f"{label}: does not fit the model: {'; '.join(parts)}")
    for name, value in state.items():
        if isinstance(value, Tensor) and tuple(value.shape) != tensors[name].shape:
            raise ModelError(
                f"{label}: '{name}' has shape {list(tensors[name].shape)}, "
                f"{list(value.shape)} in the model"
            )


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load every tensor of a checkpoint into a model; names must match exactly.

    Values are cast to the model's dtypes and copied to its devices.

    Raises:
        ModelError: If names or shapes differ, or the model refuses.
        CheckpointError: If the checkpoint cannot be read.
    """
    check_names(model, checkpoint.tensors, checkpoint.label)
    try:
        model.load_state_dict(dict(read_tensors(checkpoint)), strict=True)
    except RuntimeError as error:
        raise ModelError(f"{checkpoint.label}: does not fit the model: {error}") from error


def read_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in its stored dtype, in host memory of its own.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
    """
    for name, info in checkpoint.tensors.items():
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        if info.nbytes:
            piece = Piece(name, 0, info.nbytes)
            checkpoint.read_into([piece], raw.numpy().data)
        yield name, raw.view(getattr(torch, info.dtype.name)).reshape(info.shape)


def bn_buffer_bytes(
    model: nn.Module, report: BnReport, dtypes: Mapping[str, str]
) -> Iterator[tuple[str, bytes]]:
    """Yield name and row-major bytes of every buffer that a BN pass has set.

    Args:
        model: After ``recompute_bn_stats``.
        report: What it returned.
        dtypes: Tensor name -> torch's name of the dtype to store.
    """
    state = model.state_dict()
    for layer in report.layers:
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            name = f"{layer.name}.{buffer}" if layer.name else buffer
            if name in state and name in dtypes:
                value = state[name].detach().to("cpu", getattr(torch, dtypes[name])).contiguous()
                yield name, value.reshape(-1).view(torch.uint8).numpy().tobytes()


def _some(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:count])
    return shown if len(names) <= count else f"{shown}, ..."
