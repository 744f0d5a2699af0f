"""torch files (``torch.save``): a zip of stored members whose pickle says which are tensors.

The weights are looked for where trainers put them; optimizer state and the like are never read.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.pickle_values import Inert, Pairs, Storage, TensorView, Unsupported
from ckptavg.checkpoint.pickles import read_pickle
from ckptavg.checkpoint.stored import Place, StoredCheckpoint
from ckptavg.checkpoint.strided import extent, is_row_major
from ckptavg.checkpoint.zip_directory import Member, ZipDirectory
from ckptavg.errors import CheckpointError
from ckptavg.tensors import TensorInfo

_MAX_PICKLE_BYTES = 64 * 2**20
_MAX_NESTING = 4
# where trainers put the weights; averages kept during training are taken only when asked for
_WEIGHT_KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights",
    "model_weights",
)  # fmt: skip
_EXTRA_STATE = "_extra_state"  # what a module saves besides tensors; it may be a mapping
_AVERAGE_HINTS = ("ema", "swa", "averag", "shadow", "teacher")
_STEP_KEYS = ("global_step", "step", "global_iter", "iteration", "iter", "num_updates", "it")
_EPOCH_KEYS = ("epoch", "epochs")


def open_torch_file(file: ReadableFile, *, state_key: str | None) -> StoredCheckpoint:
    """Open a zip file written by ``torch.save``.

    Args:
        file: The open file.
        state_key: Which entry holds the weights, as a key or keys joined by dots, or ``.`` for the
            top level; None looks for the usual ones.

    Raises:
        CheckpointError: If the file is damaged, needs code to be read, or holds no weights that
            can be told apart from the rest.
    """
    directory = ZipDirectory(file)
    root_name, root = _read_root(file, directory)
    state_dict, notes = _find_state_dict(root, state_key, file.label)

    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    left_out = []
    _prefetch(directory, root_name, state_dict)
    data_offsets: dict[str, int] = {}
    for name, value in state_dict.items:
        if type(name) is not str:
            raise CheckpointError(f"{file.label}: the state dict has a key that is not a string")
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"{file.label}: the name of tensor '{name}' is not valid Unicode"
            ) from error
        if type(value) is Unsupported:
            raise CheckpointError(
                f"{file.label}: tensor '{name}' is {value.what}; only plain tensors are averaged"
            )
        if type(value) is not TensorView:
            left_out.append(name)
            continue
        if name in tensors:
            raise CheckpointError(f"{file.label}: the state dict holds '{name}' twice")
        tensors[name] = TensorInfo(value.dtype, value.shape)
        places[name] = _place(file, directory, root_name, name, value, data_offsets)
        identity = (value.storage.key, value.offset, value.shape, value.strides, value.dtype)
        if value.storage.numel and identity in owners:
            aliases[name] = owners[identity]
        owners.setdefault(identity, name)
    if left_out:
        notes.append(f"left out, not tensors: {_some(left_out)}")
    root_pairs = root if type(root) is Pairs else Pairs()
    return StoredCheckpoint(
        label=file.label,
        layout="torch file",
        tensors=tensors,
        places=places,
        open_files=[file],
        aliases=aliases,
        step=_first_integer(root_pairs, _STEP_KEYS),
        epoch=_first_integer(root_pairs, _EPOCH_KEYS),
        notes=notes,
    )


def _read_root(file: ReadableFile, directory: ZipDirectory) -> tuple[str, Any]:
    """Return the archive's top folder (with a slash) and the value that its pickle describes."""
    members = directory.members
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{file.label}: is a zip file, but not one that torch.save wrote: it has no data.pkl"
        )
    root_name = pickles[0].removesuffix("data.pkl")
    if f"{root_name}constants.pkl" in members or any(
        name.startswith(f"{root_name}code/") for name in members
    ):
        raise CheckpointError(
            f"{file.label}: is a TorchScript archive, which is a program; save its state_dict() "
            "with torch.save and average that"
        )
    byteorder = members.get(f"{root_name}byteorder")
    if byteorder is not None and _read_member(file, directory, byteorder, 64) != b"little":
        raise CheckpointError(f"{file.label}: was written on a big-endian machine")
    pickle = members[pickles[0]]
    raw = _read_member(file, directory, pickle, _MAX_PICKLE_BYTES)
    return root_name, read_pickle(raw, file.label)


def _read_member(
    file: ReadableFile, directory: ZipDirectory, member: Member, max_bytes: int
) -> bytes:
    if member.nbytes > max_bytes:
        raise CheckpointError(
            f"{file.label}: its {member.name} has {member.nbytes} bytes, "
            f"at most {max_bytes} are allowed"
        )
    raw = file.read(directory.data_offset(member), member.nbytes)
    # 0 in the directory: torch was told not to compute it
    if member.crc32 and crc32(raw) != member.crc32:
        raise CheckpointError(f"{file.label}: its {member.name} is damaged (CRC-32 differs)")
    return raw


def _prefetch(directory: ZipDirectory, root_name: str, state_dict: Pairs) -> None:
    """Have the headers of all storages read at once that the weights lie in."""
    keys = {value.storage.key for _, value in state_dict.items if type(value) is TensorView}
    members = (directory.members.get(f"{root_name}data/{key}") for key in keys)
    directory.prefetch_headers(member for member in members if member is not None)


def _place(
    file: ReadableFile,
    directory: ZipDirectory,
    root_name: str,
    name: str,
    view: TensorView,
    data_offsets: dict[str, int],
) -> Place:
    """Check that a view lies inside its storage, and return where that is in the file."""
    spanned, numel = extent(view.shape, view.strides), TensorInfo(view.dtype, view.shape).numel
    if numel == 0:
        return Place(file, 0)
    itemsize = view.dtype.itemsize
    storage_bytes = _storage_bytes(view.storage)
    if (view.offset + spanned) * itemsize > storage_bytes:
        raise CheckpointError(f"{file.label}: tensor '{name}' reaches past the end of its storage")
    if numel > spanned:
        raise CheckpointError(
            f"{file.label}: tensor '{name}' is an expanded view: it repeats {spanned} stored "
            f"elements as {numel}; save a contiguous copy"
        )
    key = view.storage.key
    member = directory.members.get(f"{root_name}data/{key}")
    if member is None:
        raise CheckpointError(f"{file.label}: the storage of tensor '{name}' is missing")
    if member.nbytes != storage_bytes:  # each reference to a storage states its size anew
        raise CheckpointError(
            f"{file.label}: the storage of tensor '{name}' has {member.nbytes} bytes, "
            f"expected {storage_bytes}"
        )
    if key not in data_offsets:
        data_offsets[key] = directory.data_offset(member)
    strides = None if is_row_major(view.shape, view.strides) else view.strides
    return Place(file, data_offsets[key] + view.offset * itemsize, strides)


def _storage_bytes(storage: Storage) -> int:
    return storage.numel * (storage.dtype.itemsize if storage.dtype else 1)


def _find_state_dict(root: Any, state_key: str | None, label: str) -> tuple[Pairs, list[str]]:
    """Return the mapping that holds the weights, and notes on what else could have been meant."""
    if type(root) is not Pairs:
        kind = "a tensor" if type(root) is TensorView else f"a {_kind(root)}"
        raise CheckpointError(f"{label}: holds {kind}, expected a state dict (name -> tensor)")
    if state_key is not None:
        return _walk(root, state_key, label), []

    mapping, path, notes = root, "", list[str]()
    for _ in range(_MAX_NESTING):
        averages = [key for key in _weight_mappings(mapping) if _is_average(key)]
        if averages:
            notes.append(f"also holds {_some(averages)}; --state-key selects it")
        candidates = [key for key in _weight_mappings(mapping) if key in _WEIGHT_KEYS]
        if not candidates:
            break
        if len(candidates) > 1:
            raise CheckpointError(
                f"{label}: {_some(candidates)} all hold weights; choose one with --state-key"
            )
        path = f"{path}.{candidates[0]}" if path else candidates[0]
        mapping = mapping.get(candidates[0])
    nested = [key for key in _tensor_mappings(mapping) if not key.endswith(_EXTRA_STATE)]
    networks = [key for key in nested if not _is_average(key)]
    has_tensors = any(type(value) in (TensorView, Unsupported) for _, value in mapping.items)
    if has_tensors and not networks:
        return mapping, notes
    level = f"in its entry '{path}'" if path else "at its top level"
    keys = [key for key, _ in mapping.string_items()]
    found = _some(keys, 8) if keys else "nothing"
    prefix = f"{path}." if path else ""
    hint = ""
    if nested:
        example = f"{prefix}{_tensor_path(mapping, nested[0])}"
        hint = f"; choose one with --state-key, for example --state-key {example}"
    raise CheckpointError(f"{label}: no weights found {level}, which holds {found}{hint}")


def _walk(root: Pairs, state_key: str, label: str) -> Pairs:
    if state_key == ".":  # the top level itself
        return root
    has_dots = type(root.get(state_key)) is Pairs  # a key that itself holds dots
    parts = [state_key] if has_dots else state_key.split(".")
    mapping: Any = root
    for part in parts:
        inner = mapping.get(part) if type(mapping) is Pairs else None
        if inner is None:
            keys = [key for key, _ in mapping.string_items()] if type(mapping) is Pairs else []
            raise CheckpointError(
                f"{label}: no entry '{state_key}': '{part}' is not among {_some(keys, 8)}"
            )
        mapping = inner
    if type(mapping) is not Pairs or not any(
        type(value) in (TensorView, Unsupported) for _, value in mapping.items
    ):
        raise CheckpointError(f"{label}: the entry '{state_key}' is not a state dict")
    return mapping


def _weight_mappings(mapping: Pairs) -> list[str]:
    """Return the keys under which trainers put weights, where a mapping of tensors is there."""
    return [key for key in _tensor_mappings(mapping) if key in _WEIGHT_KEYS or _is_average(key)]


def _tensor_mappings(mapping: Pairs) -> list[str]:
    """Return the keys whose value is a mapping that holds a tensor, at most two levels down."""
    known: dict[tuple[int, int], bool] = {}  # one mapping may be referred to a million times

    def holds_tensors(value: Any, levels: int) -> bool:
        if type(value) is not Pairs:
            return False
        if (id(value), levels) not in known:
            known[id(value), levels] = any(
                type(inner) in (TensorView, Unsupported)
                or (levels > 0 and holds_tensors(inner, levels - 1))
                for _, inner in value.items
            )
        return known[id(value), levels]

    return [key for key, value in mapping.string_items() if holds_tensors(value, 1)]


def _tensor_path(mapping: Pairs, key: str) -> str:
    """Return the key, joined with those below it until a mapping holds tensors itself."""
    path, value = key, mapping.get(key)
    for _ in range(_MAX_NESTING):
        if any(type(inner) in (TensorView, Unsupported) for _, inner in value.items):
            break
        below = _tensor_mappings(value)
        if not below:
            break
        path, value = f"{path}.{below[0]}", value.get(below[0])
    return path


def _is_average(key: str) -> bool:
    return any(hint in key.lower() for hint in _AVERAGE_HINTS)


def _first_integer(root: Pairs, keys: Sequence[str]) -> int | None:
    for key in keys:
        value = root.get(key)
        if type(value) is int and 0 <= value < 2**63:
            return value
    return None


def _kind(value: Any) -> str:
    if type(value) is Inert:
        return f"{value.name} object"
    return type(value).__name__


def _some(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
