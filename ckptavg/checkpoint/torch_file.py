"""torch files (``torch.save``): their pickle says which bytes are tensors, and their names.

The weights are looked for where trainers put them; optimizer state and the like are never read.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.pickle_values import Pairs, Storage, TensorView, Unsupported
from ckptavg.checkpoint.scheduler_state import scheduler_state
from ckptavg.checkpoint.sharded import Place
from ckptavg.checkpoint.state_dict import (
    EPOCH_KEYS,
    STEP_KEYS,
    find_state_dict,
    first_integer,
    some,
)
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.checkpoint.strided import extent, is_row_major
from ckptavg.checkpoint.torch_legacy import TorchLegacy
from ckptavg.checkpoint.torch_zip import TorchZip
from ckptavg.checkpoint.training_facts import learning_rate, metrics, n_updates, seed
from ckptavg.checkpoint.widened import widened
from ckptavg.errors import CheckpointError
from ckptavg.tensors import FLOAT64, TensorInfo


class TorchArchive(Protocol):
    """A torch file of some format, its pickle read.

    Attributes:
        root: The inert value that the pickle describes.
    """

    root: Any

    def prefetch(self, storages: Iterable[Storage]) -> None:
        """Hear which storages ``locate`` will be asked for."""

    def nbytes_of(self, key: str) -> int | None:
        """Return the bytes of a storage; None if it is not there."""

    def locate(self, key: str, name: str) -> int:
        """Return where the bytes of a storage, which is there, begin; ``name`` needs it."""


def open_torch_file(
    file: ReadableFile, *, is_legacy: bool, state_key: str | None
) -> StoredCheckpoint:
    """Open a file written by ``torch.save``.

    Args:
        file: The open file.
        is_legacy: Whether it has the format from before torch 1.6.
        state_key: Which entry holds the weights, as a key or keys joined by dots, or ``.`` for the
            top level; None looks for the usual ones.

    Raises:
        CheckpointError: If the file is damaged, needs code to be read, or holds no weights that
            can be told apart from the rest.
    """
    archive: TorchArchive = TorchLegacy(file) if is_legacy else TorchZip(file)
    state_dict, notes = find_state_dict(archive.root, state_key, file.label)
    archive.prefetch(value.storage for _, value in state_dict.items if type(value) is TensorView)
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    left_out = []
    seen: set[str] = set()
    for name, value in state_dict.items:
        if type(name) is not str:
            raise CheckpointError(f"{file.label}: the state dict has a key that is not a string")
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"{file.label}: the name of tensor '{name}' is not valid Unicode"
            ) from error
        if name in seen:
            raise CheckpointError(f"{file.label}: the state dict holds '{name}' twice")
        seen.add(name)
        if type(value) is Unsupported:
            raise CheckpointError(
                f"{file.label}: tensor '{name}' is {value.what}; only plain tensors are averaged"
            )
        if type(value) is not TensorView:
            left_out.append(name)
            continue
        tensors[name] = TensorInfo(value.dtype, value.shape)
        places[name] = place_view(file, archive, name, value)
        identity = (value.storage.key, value.offset, value.shape, value.strides, value.dtype)
        if value.storage.numel and identity in owners:
            aliases[name] = owners[identity]
        owners.setdefault(identity, name)
    floats = [info for info in tensors.values() if info.dtype.kind == "float"]
    if floats and all(info.shape == (0,) for info in floats):
        raise CheckpointError(
            f"{file.label}: holds no values, only the places of weights, as DeepSpeed ZeRO-3 saves "
            "them; name its folder to see what puts the weights together"
        )
    if left_out:
        notes.append(f"left out, not tensors: {some(left_out)}")
    checkpoint = StoredCheckpoint(
        label=file.label,
        layout="torch file",
        tensors=tensors,
        places=places,
        open_files=[file],
        aliases=aliases,
        notes=notes,
    )
    add_training_facts(checkpoint, file, archive)
    return checkpoint


def add_training_facts(
    checkpoint: StoredCheckpoint, file: ReadableFile, archive: TorchArchive
) -> None:
    """Take over what a torch file tells of the training and is not known yet."""
    root = archive.root
    if type(root) is not Pairs:
        return

    def read_scalar(view: TensorView) -> float | None:
        """Read what a trainer measured: a few bytes."""
        try:
            place = place_view(file, archive, "of a metric", view)
            raw = file.read(place.offset, view.dtype.itemsize)
        except CheckpointError:  # it is not needed
            return None
        return float(widened(np.frombuffer(raw, np.uint8), view.dtype, FLOAT64)[0])

    if checkpoint.step is None:
        checkpoint.step = first_integer(root, STEP_KEYS)
    if checkpoint.epoch is None:
        checkpoint.epoch = first_integer(root, EPOCH_KEYS)
    if checkpoint.learning_rate is None:
        checkpoint.learning_rate = learning_rate(root)
    checkpoint.metrics = {**metrics(root, read_scalar), **checkpoint.metrics}
    if checkpoint.scheduler is None:
        checkpoint.scheduler = scheduler_state(root)
    if checkpoint.scheduler is not None and checkpoint.n_updates is None:
        checkpoint.n_updates = n_updates(root, read_scalar)
    if checkpoint.seed is None:
        checkpoint.seed = seed(root)


def place_view(file: ReadableFile, archive: TorchArchive, name: str, view: TensorView) -> Place:
    """Check that a view lies inside its storage, and return where that is in the file.

    Raises:
        CheckpointError: If it does not, or repeats elements.
    """
    spanned, numel = extent(view.shape, view.strides), TensorInfo(view.dtype, view.shape).numel
    if numel == 0:
        return Place(file, 0)
    itemsize = view.dtype.itemsize
    if (view.offset + spanned) * itemsize > view.storage.nbytes:
        raise CheckpointError(f"{file.label}: tensor '{name}' reaches past the end of its storage")
    if numel > spanned:
        raise CheckpointError(
            f"{file.label}: tensor '{name}' is an expanded view: it repeats {spanned} stored "
            f"elements as {numel}; save a contiguous copy"
        )
    strides = None if is_row_major(view.shape, view.strides) else view.strides
    stored_nbytes = archive.nbytes_of(view.storage.key)
    if stored_nbytes is None:
        raise CheckpointError(f"{file.label}: the storage of tensor '{name}' is missing")
    if stored_nbytes != view.storage.nbytes:  # each reference to a storage states its size anew
        raise CheckpointError(
            f"{file.label}: the storage of tensor '{name}' has {stored_nbytes} bytes, "
            f"expected {view.storage.nbytes}"
        )
    start = archive.locate(view.storage.key, name)
    return Place(file, start + view.offset * itemsize, strides)
