"""Model directories in the Hugging Face layouts: one weight file, or shards and an index."""

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ckptavg.checkpoint.files import PositionalFile
from ckptavg.checkpoint.formats import open_file
from ckptavg.checkpoint.stored import Place, StoredCheckpoint
from ckptavg.errors import CheckpointError
from ckptavg.tensors import TensorInfo

_INDEXED = (
    ("model.safetensors.index.json", "model.safetensors", "sharded safetensors directory"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "sharded torch directory"),
)
_MAX_JSON_BYTES = 100_000_000
_MAX_SHARDS = 10_000
_TIED_INPUT_SUFFIXES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)
_TIED_OUTPUT = "lm_head.weight"


def open_directory(path: Path, *, label: str, state_key: str | None) -> StoredCheckpoint:
    """Open a model directory.

    Raises:
        CheckpointError: If it holds no weights in a known layout, or more than one set of them.
    """
    try:
        checkpoint = _open_weights(path, label, state_key)
    except OSError as error:  # listing it failed; files have errors of their own
        raise CheckpointError(f"{label}: cannot be read: {error.strerror}") from error
    try:
        checkpoint.directory = str(path)
        checkpoint.aliases = {**checkpoint.aliases, **_tied_by_config(path, label, checkpoint)}
        state = read_json(path / "trainer_state.json", f"{label}/trainer_state.json")
    except BaseException:
        checkpoint.close()
        raise
    if state is not None and type(state.get("global_step")) is int:
        checkpoint.step = state["global_step"]
    return checkpoint


def read_json(path: Path, label: str) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is no such file.

    Raises:
        CheckpointError: If it is not a JSON object, or unreasonably large.
    """
    if not os.path.lexists(path):
        return None
    file = PositionalFile(path, label)
    try:
        if file.size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{label}: has {file.size} bytes, too many for a JSON side file")
        value = json.loads(file.read(0, file.size).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: is not valid JSON") from error
    finally:
        file.close()
    if type(value) is not dict:
        raise CheckpointError(f"{label}: is not a JSON object")
    return value


def _open_weights(path: Path, label: str, state_key: str | None) -> StoredCheckpoint:
    for index_name, single_name, layout in _INDEXED:
        # a link that leads nowhere is there, too: to pass over it would be to guess
        has_index, has_single = map(os.path.lexists, (path / index_name, path / single_name))
        if has_index and has_single:
            raise CheckpointError(
                f"{label}: holds both {single_name} and {index_name}; remove the stale one, "
                "or name the file itself"
            )
        if has_index:
            return _open_sharded(path, index_name, label=label, layout=layout, state_key=state_key)
        if has_single:
            return _open_single(path / single_name, label, state_key)
    if os.path.lexists(path / ".metadata"):
        raise CheckpointError(
            f"{label}: is a torch.distributed.checkpoint directory, which is not read yet; convert "
            "it with: python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        )
    if os.path.lexists(path / "adapter_config.json"):
        raise CheckpointError(
            f"{label}: holds a LoRA adapter; the mean of its factors is not the mean of their "
            "product, so adapters are not averaged; merge them into the base model first"
        )
    others = sorted(entry.name for entry in path.glob("*.safetensors"))
    if len(others) == 1:
        return _open_single(path / others[0], label, state_key)
    if others:
        raise CheckpointError(
            f"{label}: holds {len(others)} safetensors files ({', '.join(others[:3])}, ...) and no "
            "model.safetensors.index.json; name the file itself"
        )
    raise CheckpointError(f"{label}: holds no weights{_inside_hint(path, label)}")


def _inside_hint(path: Path, label: str) -> str:
    """Say what a directory without weights does hold, so that the user can name it."""
    inside = sorted(
        entry.name
        for entry in path.iterdir()
        if (entry.is_dir() and any(map(entry.name.lower().__contains__, ("checkpoint", "step"))))
        or entry.suffix in (".pt", ".pth", ".ckpt", ".bin", ".tar")
    )
    if not inside:
        return " (looked for model.safetensors, pytorch_model.bin and their sharded forms)"
    common = inside[0].rstrip("0123456789") if (path / inside[0]).is_dir() else ""
    pattern = f"{common}*" if common else f"*{Path(inside[0]).suffix}"
    return f" itself, but {len(inside)} checkpoints; name them, for example: {label}/{pattern}"


def _open_single(path: Path, label: str, state_key: str | None) -> StoredCheckpoint:
    checkpoint = open_file(PositionalFile(path, f"{label}/{path.name}"), state_key=state_key)
    checkpoint.label = label
    checkpoint.layout = checkpoint.layout.replace("file", "directory")
    return checkpoint


def _open_sharded(
    path: Path, index_name: str, *, label: str, layout: str, state_key: str | None
) -> StoredCheckpoint:
    index_label = f"{label}/{index_name}"
    names_by_shard = _read_index(path / index_name, index_label)
    all_names = set[str]().union(*names_by_shard.values())
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    aliases: dict[str, str] = {}
    files: list[PositionalFile] = []
    metadata: dict[str, str] = {}
    notes: list[str] = []
    try:
        for shard_name, listed in names_by_shard.items():
            shard_path = path / shard_name
            if not os.path.lexists(shard_path):
                raise CheckpointError(
                    f"{label}: the shard {shard_name} is missing; {index_name} lists "
                    f"{len(names_by_shard)} shards"
                )
            file = PositionalFile(shard_path, f"{label}/{shard_name}")
            files.append(file)
            shard = open_file(file, state_key=state_key)
            _check_shard(shard, listed, shard_name, index_label, all_names)
            tensors.update(shard.tensors)
            places.update(shard.places)
            aliases |= {
                tied: owner
                for tied, owner in shard.aliases.items()
                if tied in shard.tensors or tied not in all_names  # another shard may store it
            }
            metadata.update(shard.metadata)
            notes.extend(shard.notes)
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
    extra = sorted(shard.tensors.keys() - listed)
    if extra:
        where = "another shard" if extra[0] in all_names else "no shard"
        raise CheckpointError(
            f"{index_label}: {shard_name} holds tensor '{extra[0]}', "
            f"which the index lists in {where}"
        )


def _read_index(path: Path, label: str) -> dict[str, set[str]]:
    """Return shard file name -> the names of its tensors, shards in sorted order."""
    index = read_json(path, label)
    weight_map = index.get("weight_map") if index else None
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(f"{label}: has no weight_map")
    names_by_shard: dict[str, set[str]] = {}
    for name, shard_name in weight_map.items():
        if type(shard_name) is not str or not _is_plain_file_name(shard_name):
            raise CheckpointError(
                f"{label}: names '{shard_name}' as a shard: only plain file names are allowed"
            )
        names_by_shard.setdefault(shard_name, set()).add(name)
    if len(names_by_shard) > _MAX_SHARDS:
        raise CheckpointError(f"{label}: lists more than {_MAX_SHARDS} shards")
    return {shard: names_by_shard[shard] for shard in sorted(names_by_shard)}


def _is_plain_file_name(name: str) -> bool:
    # both flavours: an index written on Windows must not reach outside either
    return (
        name not in ("", ".", "..")
        and "\0" not in name
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )


def _tied_by_config(path: Path, label: str, checkpoint: StoredCheckpoint) -> dict[str, str]:
    """Return the output embedding that ``config.json`` says is tied to the input embedding.

    transformers writes only one of the two; either may be the one that is stored.
    """
    config = read_json(path / "config.json", f"{label}/config.json")
    if config is None or config.get("tie_word_embeddings") is not True:
        return {}
    inputs = [name for name in checkpoint.tensors if name.endswith(_TIED_INPUT_SUFFIXES)]
    if len(inputs) != 1 or any(name.endswith(_TIED_OUTPUT) for name in checkpoint.tensors):
        return {}
    return {_TIED_OUTPUT: inputs[0]}
