"""Model directories: one weight file, or shards and an index, under the names of Hugging Face.

A ``model.pt`` counts where there is nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ckptavg.checkpoint.adapter import ADAPTER_CONFIG_NAME, ADAPTER_LAYOUT, open_adapter
from ckptavg.checkpoint.dcp import open_dcp
from ckptavg.checkpoint.dcp_metadata import METADATA_NAME
from ckptavg.checkpoint.dcp_safetensors import is_dcp_shard, open_dcp_safetensors
from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.folder import (
    TORCH_SUFFIXES,
    WEIGHT_SUFFIXES,
    Folder,
    is_plain_file_name,
    is_training_state,
    read_json,
)
from ckptavg.checkpoint.formats import open_file
from ckptavg.checkpoint.limits import INDEX_BOUNDS, MAX_SHARDS
from ckptavg.checkpoint.position import Position, position_from_name
from ckptavg.checkpoint.sharded import AnyPlace
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.checkpoint.strict_json import TooLargeError
from ckptavg.checkpoint.trainer_layouts import (
    is_trainer_layout,
    open_trainer_layout,
    refuse_foreign_formats,
    sharded_originals,
)
from ckptavg.checkpoint.trainer_state import add_trainer_state
from ckptavg.errors import CheckpointError, IncompleteCheckpointError
from ckptavg.tensors import Piece, TensorInfo

_INDEXED = (
    ("model.safetensors.index.json", "model.safetensors", "sharded safetensors directory"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "sharded torch directory"),
)
_TORCH_NAME = "model.pt"
_COMPARED_BYTES = 2**20
# accelerate's, of a second and a third model
_NEXT_MODEL = re.compile(r"(model|pytorch_model|pytorch_model_fsdp)_\d+\.(safetensors|bin)")
_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
_TIED_INPUT_SUFFIXES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)
_TIED_OUTPUT = "lm_head.weight"


def open_directory(folder: Folder, *, state_key: str | None) -> StoredCheckpoint:
    """Open a model directory, local or on the Hub.

    Raises:
        CheckpointError: If it holds no weights in a known layout, or more than one set of them.
    """
    label = folder.label
    try:
        before = folder.state()
        checkpoint = _open_weights(folder, state_key)
    except OSError as error:  # listing it failed; files have errors of their own
        raise CheckpointError(f"{label}: cannot be read: {error.strerror}") from error
    try:
        if len(checkpoint.files) > 1 and folder.state() != before:  # they may be of two saves
            raise CheckpointError(f"{label}: changed while it was opened; try again")
        checkpoint.folder = folder
        checkpoint.aliases = {**checkpoint.aliases, **_tied_by_config(folder, checkpoint)}
        if folder.has(ADAPTER_CONFIG_NAME) and checkpoint.layout != ADAPTER_LAYOUT:
            note = "the full model was read, the PEFT adapter beside it was passed over"
            checkpoint.notes = [*checkpoint.notes, note]
        state = _trainer_state(folder, checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    if state is not None:
        add_trainer_state(checkpoint, state)
    return checkpoint


def _trainer_state(folder: Folder, checkpoint: StoredCheckpoint) -> dict[str, Any] | None:
    """Read what transformers' Trainer wrote; of very long runs it is passed over with a note."""
    try:
        return read_json(folder, "trainer_state.json")
    except TooLargeError as error:
        note = f"{error}: step and metrics in it were passed over"
        checkpoint.notes = [*checkpoint.notes, note]
        return None


def holds_weights(folder: Folder) -> bool:
    """Tell by the names in a folder whether it is a checkpoint, be it one that is not read."""
    names = folder.names()
    single = [
        name
        for name in names
        if name.endswith(WEIGHT_SUFFIXES)
        and not is_training_state(name)
        and not name.startswith(".")
        and not folder.is_folder(name)
    ]
    return (
        any(folder.has(name) for names in _INDEXED for name in names[:2])
        or folder.has(METADATA_NAME)
        or folder.has(ADAPTER_CONFIG_NAME)
        or any(map(is_dcp_shard, names))
        or any(_SHARD.fullmatch(name) for name in names)
        or is_trainer_layout(folder, names)
        or [name for name in names if name.endswith(TORCH_SUFFIXES) and not is_training_state(name)]
        == [_TORCH_NAME]
        or (len(single) == 1 and position_from_name(single[0]) == Position(None, None))
    )


def _open_weights(folder: Folder, state_key: str | None) -> StoredCheckpoint:
    label = folder.label
    several = [name for name in folder.names() if _NEXT_MODEL.fullmatch(name)]
    if several:
        raise CheckpointError(
            f"{label}: holds several models ({several[0]} beside the first); name the file of one"
        )
    for index_name, single_name, layout in _INDEXED:
        # a link that leads nowhere is there, too: to pass over it would be to guess
        has_index, has_single = folder.has(index_name), folder.has(single_name)
        if has_index and has_single:
            raise CheckpointError(
                f"{label}: holds both {single_name} and {index_name}; remove the stale one, "
                "or name the file itself"
            )
        originals = None
        if has_index or has_single:
            originals = sharded_originals(folder, state_key=state_key)
        if originals is not None:
            return originals
        if has_index:
            return _open_sharded(folder, index_name, layout=layout, state_key=state_key)
        if has_single:
            return _open_single(folder, single_name, state_key)
    if folder.has(METADATA_NAME):
        return open_dcp(folder, state_key=state_key)
    if folder.has(ADAPTER_CONFIG_NAME):
        return open_adapter(folder, state_key=state_key)
    names = [
        name for name in folder.names() if not (name.startswith(".") or folder.is_folder(name))
    ]
    shards = [name for name in names if is_dcp_shard(name)]
    if shards:
        return open_dcp_safetensors(folder, shards, state_key=state_key)
    checkpoint = open_trainer_layout(folder, state_key=state_key)
    if checkpoint is not None:
        return checkpoint
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        raise IncompleteCheckpointError(
            f"{label}: holds shards ({shards[0]}), but no index, which is written last"
        )
    if folder.has(_TORCH_NAME) and not any(name.endswith(".safetensors") for name in names):
        return _open_single(folder, _TORCH_NAME, state_key)
    kinds: tuple[tuple[str | tuple[str, ...], str], ...] = (
        (".safetensors", "safetensors"), (TORCH_SUFFIXES, "torch"), (".npz", "numpy"),
    )  # fmt: skip
    for suffixes, kind in kinds:
        others = [one for one in names if one.endswith(suffixes) and not is_training_state(one)]
        if len(others) == 1:
            return _open_single(folder, others[0], state_key)
        if others:
            raise CheckpointError(
                f"{label}: holds {len(others)} {kind} files ({', '.join(others[:3])}, ...) and no "
                "index that makes them one model; name the file itself"
            )
    if any(name.endswith(".distcp") for name in names):
        raise IncompleteCheckpointError(
            f"{label}: holds parts of a distributed checkpoint, but no {METADATA_NAME}, which is "
            "written last"
        )
    refuse_foreign_formats(folder)
    raise IncompleteCheckpointError(f"{label}: holds no weights{_what_it_holds(folder, names)}")


def _what_it_holds(folder: Folder, names: Sequence[str]) -> str:
    """Say what a directory without weights does hold, so that the user can name it."""
    state = [name for name in names if is_training_state(name)]
    if state:
        return f", only the state of a training ({', '.join(state[:3])})"
    if not folder.names():
        return ": it is empty"
    return " (looked for model.safetensors, pytorch_model.bin, their sharded forms, and .metadata)"


def _open_single(folder: Folder, name: str, state_key: str | None) -> StoredCheckpoint:
    file = folder.open(name, f"{folder.label}/{name}")
    checkpoint = open_file(file, state_key=state_key)
    checkpoint.label = folder.label
    checkpoint.layout = checkpoint.layout.replace("file", "directory")
    return checkpoint


def _open_sharded(
    folder: Folder, index_name: str, *, layout: str, state_key: str | None
) -> StoredCheckpoint:
    label = folder.label
    index_label = f"{label}/{index_name}"
    names_by_shard = _read_index(folder, index_name, index_label)
    all_names = set[str]().union(*names_by_shard.values())
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, AnyPlace] = {}
    aliases: dict[str, str] = {}
    files: list[ReadableFile] = []
    metadata: dict[str, str] = {}
    notes: list[str] = []
    shards: dict[str, StoredCheckpoint] = {}
    try:
        for shard_name, listed in names_by_shard.items():
            if not folder.has(shard_name):
                raise IncompleteCheckpointError(
                    f"{label}: the shard {shard_name} is missing; {index_name} lists "
                    f"{len(names_by_shard)} shards"
                )
            file = folder.open(shard_name, f"{label}/{shard_name}")
            files.append(file)
            shard = open_file(file, state_key=state_key)
            _check_shard(shard, listed, shard_name, index_label, all_names)
            shards[shard_name] = shard
            tensors |= {name: info for name, info in shard.tensors.items() if name in listed}
            places |= {name: place for name, place in shard.places.items() if name in listed}
            aliases |= {
                tied: owner
                for tied, owner in shard.aliases.items()
                if owner in listed
                and (tied in listed or tied not in all_names)  # another shard may store it
            }
            metadata.update(shard.metadata)
            notes.extend(shard.notes)
        notes += _stored_twice(shards, names_by_shard, index_label)
        if folder.hub is None:  # where it was verified when it was read
            files.append(folder.open(index_name, index_label))
    except BaseException:
        for file in files:
            file.close()
        raise
    return StoredCheckpoint(
        label=label,
        layout=layout,
        tensors=tensors,
        places=places,
        open_files=files,
        aliases=aliases,
        metadata=metadata,
        notes=notes,
    )


def _check_shard(
    shard: StoredCheckpoint,
    listed: set[str],
    shard_name: str,
    index_label: str,
    all_names: set[str],
) -> None:
    missing = sorted(listed - shard.tensors.keys())
    if missing:
        raise CheckpointError(
            f"{index_label}: lists tensor '{missing[0]}' in {shard_name}, which does not hold it"
        )
    extra = sorted(shard.tensors.keys() - all_names)
    if extra:
        raise CheckpointError(
            f"{index_label}: {shard_name} holds tensor '{extra[0]}', which the index lists in no "
            "shard"
        )


def _stored_twice(
    shards: Mapping[str, StoredCheckpoint],
    names_by_shard: Mapping[str, set[str]],
    index_label: str,
) -> list[str]:
    """Compare tensors that shards hold beside the one where the index lists them.

    Returns:
        A note on each shard that holds some: the index decides.

    Raises:
        CheckpointError: If the copies differ: one of them is stale.
    """
    home = {name: shard for shard, names in names_by_shard.items() for name in names}
    notes = []
    for shard_name, shard in shards.items():
        again = sorted(shard.tensors.keys() - names_by_shard[shard_name])
        for name in again:
            if not _is_same(name, shard, shards[home[name]]):
                raise CheckpointError(
                    f"{index_label}: {shard_name} holds tensor '{name}', which the index lists in "
                    f"another shard, {home[name]}, and the two differ"
                )
        if again:
            notes.append(
                f"{shard_name} also holds '{again[0]}'"
                f"{f' and {len(again) - 1} more tensors' if len(again) > 1 else ''}, "
                "with the bytes of the shard where the index lists it"
            )
    return notes


def _is_same(name: str, one: StoredCheckpoint, other: StoredCheckpoint) -> bool:
    """Tell whether two files hold the same tensor, bit for bit."""
    if one.tensors[name] != other.tensors[name]:
        return False
    nbytes = one.tensors[name].nbytes
    pair = [memoryview(bytearray(min(_COMPARED_BYTES, nbytes))) for _ in (one, other)]
    for start in range(0, nbytes, _COMPARED_BYTES):
        piece = Piece(name, start, min(start + _COMPARED_BYTES, nbytes))
        for checkpoint, buffer in zip((one, other), pair, strict=True):
            checkpoint.read_into([piece], buffer[: piece.stop - start])
        if pair[0][: piece.stop - start] != pair[1][: piece.stop - start]:
            return False
    return True


def _read_index(folder: Folder, name: str, label: str) -> dict[str, set[str]]:
    """Return shard file name -> the names of its tensors, shards in sorted order."""
    index = read_json(folder, name, INDEX_BOUNDS, is_strict=True)
    weight_map = index.get("weight_map") if index else None
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(f"{label}: has no weight_map")
    names_by_shard: dict[str, set[str]] = {}
    for name, shard_name in weight_map.items():
        names = names_by_shard.get(shard_name) if type(shard_name) is str else None
        if names is None:
            if type(shard_name) is not str or not is_plain_file_name(shard_name):
                raise CheckpointError(
                    f"{label}: names '{shard_name}' as a shard: only plain file names are allowed"
                )
            names = names_by_shard[shard_name] = set()
        names.add(name)
    if len(names_by_shard) > MAX_SHARDS:
        raise CheckpointError(f"{label}: lists more than {MAX_SHARDS} shards")
    return {shard: names_by_shard[shard] for shard in sorted(names_by_shard)}


def indexed_files(folder: Folder) -> frozenset[str]:
    """Return the names of the files that a folder's own index calls its shards.

    None if it has no index, or one that cannot be read: opening it says so.
    """
    found: set[str] = set()
    for name, _, _ in _INDEXED:
        with suppress(CheckpointError):
            found.update(_read_index(folder, name, name) if folder.has(name) else ())
    return frozenset(found)


def _tied_by_config(folder: Folder, checkpoint: StoredCheckpoint) -> dict[str, str]:
    """Return the output embedding that ``config.json`` says is tied to the input embedding.

    transformers writes only one of the two; either may be the one that is stored.
    """
    config = read_json(folder, "config.json")
    if config is None or config.get("tie_word_embeddings") is not True:
        return {}
    inputs = [name for name in checkpoint.tensors if name.endswith(_TIED_INPUT_SUFFIXES)]
    if len(inputs) != 1 or any(name.endswith(_TIED_OUTPUT) for name in checkpoint.tensors):
        return {}
    return {_TIED_OUTPUT: inputs[0]}
