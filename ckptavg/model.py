"""Between a saved checkpoint and a live model: loading weights, taking buffers back out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ckptavg.batchnorm import BnReport
from ckptavg.checkpoint import Checkpoint
from ckptavg.errors import ModelError, OutputError
from ckptavg.tensors import Piece, TensorInfo

_WRAPPERS = {"module", "_orig_mod"}  # what DDP, AveragedModel and torch.compile call the model
_COUNTERS_OF_WRAPPERS = ("n_averaged",)  # of torch's AveragedModel: no weight of the model


@dataclass(frozen=True, slots=True)
class NameFit:
    """How the names in a checkpoint answer to those of a model: prefixes are stripped and added.

    Attributes:
        stored_prefix: What the checkpoint's names begin with, and the model's do not.
        model_prefix: The other way round.
    """

    stored_prefix: str = ""
    model_prefix: str = ""

    def stored(self, name: str) -> str:
        """Return the checkpoint's name for one of the model's."""
        return self.stored_prefix + name.removeprefix(self.model_prefix)

    def in_model(self, name: str) -> str:
        """Return the model's name for one of the checkpoint's."""
        return self.model_prefix + name.removeprefix(self.stored_prefix)


def check_names(model: nn.Module, tensors: Mapping[str, TensorInfo], label: str) -> NameFit:
    """Refuse a model whose state dict has other names or shapes than the tensors.

    Of names that the model ties, one is enough. A prefix that all names on one side have, such as
    ``model.`` of a LightningModule, may be missing on the other.

    Raises:
        ModelError: With the first few names that differ, or if the model has no storage yet.
    """
    state = model.state_dict()
    unbuilt = [name for name, value in state.items() if _has_no_storage(value)]
    if unbuilt:
        raise ModelError(
            f"{len(unbuilt)} tensors of the model have no storage yet (lazy, or on the meta "
            f"device): {_some(unbuilt)}; build it with real weights"
        )
    weights = [name for name in tensors if name in state or name not in _COUNTERS_OF_WRAPPERS]
    fits = [
        *(
            NameFit(stored_prefix=stored, model_prefix=own)
            for stored in ["", *_common_prefixes(weights)]
            for own in ["", *_common_prefixes(list(state))]
            # two names of one network's parts are no reason to load one into the other
            if not (stored and own) or _is_of_wrappers(stored) or _is_of_wrappers(own)
        ),
    ]
    for fit in fits:
        missing, unexpected = _differences(state, weights, fit)
        if not missing and not unexpected:
            break
    else:
        missing, unexpected = min(
            (_differences(state, weights, fit) for fit in fits), key=lambda two: sum(map(len, two))
        )
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensors of the model are missing: {_some(missing)}")
        if unexpected:
            parts.append(f"{len(unexpected)} tensors are not in the model: {_some(unexpected)}")
        raise ModelError(f"{label}: does not fit the model: {'; '.join(parts)}")
    for name, value in state.items():
        stored = fit.stored(name)
        if stored not in tensors:  # tied to one that is there
            continue
        if isinstance(value, Tensor) and tuple(value.shape) != tensors[stored].shape:
            raise ModelError(
                f"{label}: '{stored}' has shape {list(tensors[stored].shape)}, "
                f"{list(value.shape)} in the model"
            )
    return fit


def _differences(
    state: Mapping[str, object], stored: Sequence[str], fit: NameFit
) -> tuple[list[str], list[str]]:
    """Return the model's names that are missing among the stored ones, and those too many."""
    there = {fit.in_model(name) for name in stored if name.startswith(fit.stored_prefix)}
    tied = tied_names(state)
    missing = [
        name
        for name in state
        if name not in there and not any(other in there for other in tied.get(name, ()))
    ]
    unexpected = [
        name
        for name in stored
        if not name.startswith(fit.stored_prefix) or fit.in_model(name) not in state
    ]
    return missing, unexpected


def _is_of_wrappers(prefix: str) -> bool:
    return set(prefix.split(".")[:-1]) <= _WRAPPERS


def _common_prefixes(names: Sequence[str]) -> list[str]:
    """Return the dotted prefixes that all names have, the shortest first."""
    prefixes: list[str] = []
    while names:
        longest = prefixes[-1] if prefixes else ""
        part, dot, _ = names[0][len(longest) :].partition(".")
        prefix = f"{longest}{part}{dot}"
        if not dot or not all(name.startswith(prefix) for name in names):
            break
        prefixes.append(prefix)
    return prefixes


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> NameFit:
    """Load every tensor of a checkpoint into a model; names must match as in ``check_names``.

    Values are cast to the model's dtypes and copied to its devices.

    Raises:
        ModelError: If names or shapes differ, names that the model ties hold different values, or
            the model refuses.
        CheckpointError: If the checkpoint cannot be read.
    """
    fit = check_names(model, checkpoint.tensors, checkpoint.label)
    state = model.state_dict()
    values = {
        fit.in_model(name): value
        for name, value in read_tensors(checkpoint)
        if fit.in_model(name) in state
    }
    for name, others in tied_names(state).items():
        owner = next(other for other in others if other in values)
        if name not in values:
            values[name] = values[owner]
        elif not _same_bytes(values[name], values[owner]):
            raise ModelError(
                f"{checkpoint.label}: '{owner}' and '{name}' are one tensor in the model, but "
                "hold different values"
            )
    try:
        model.load_state_dict(values, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{checkpoint.label}: does not fit the model: {error}") from error
    return fit


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
    model: nn.Module, report: BnReport, dtypes: Mapping[str, str], fit: NameFit
) -> Iterator[tuple[str, bytes]]:
    """Yield name and row-major bytes of every buffer that a BN pass has set.

    A layer that the model holds under several names comes under each of them.

    Args:
        model: After ``recompute_bn_stats``.
        report: What it returned.
        dtypes: Tensor name -> torch's name of the dtype to store.
        fit: How stored names answer to the model's.

    Raises:
        ModelError: If the stored tensors go by other names than the layer's.
        OutputError: If a statistic does not fit the dtype to store.
    """
    state = model.state_dict()
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in report.layers:
        paths = [path for path, module in modules.items() if module is modules[layer.name]]
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            names = [f"{path}.{buffer}" if path else buffer for path in paths]
            stored = [name for name in names if name in state and fit.stored(name) in dtypes]
            if not stored and buffer != "num_batches_tracked":
                raise ModelError(f"'{names[0]}' is not among the stored tensors")
            for name in stored:
                yield (
                    fit.stored(name),
                    _row_major_bytes(name, state[name], dtypes[fit.stored(name)]),
                )


def _row_major_bytes(name: str, value: Tensor, dtype: str) -> bytes:
    stored = value.detach().to("cpu", getattr(torch, dtype)).contiguous()
    if not torch.isfinite(stored).all():
        raise OutputError(f"'{name}' has values too large for {dtype}, in which it is stored")
    return stored.reshape(-1).view(torch.uint8).numpy().tobytes()


def _has_no_storage(value: object) -> bool:
    return isinstance(value, Tensor) and (is_lazy(value) or value.is_meta)


def tied_names(state: Mapping[str, object]) -> dict[str, list[str]]:
    """Return, for every name that shares all its storage with others, all of these names."""
    names_by_storage: dict[tuple[object, ...], list[str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel():
            place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            names_by_storage.setdefault(place, []).append(name)
    return {name: names for names in names_by_storage.values() if names[1:] for name in names}


def _same_bytes(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)
    )


def _some(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:count])
    return shown if len(names) <= count else f"{shown}, ..."
