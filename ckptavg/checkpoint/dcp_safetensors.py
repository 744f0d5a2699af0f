"""safetensors files that hold parts of tensors: torch.distributed.checkpoint's Hugging Face form.

``HuggingFaceStorageWriter(save_distributed=True)`` writes a file for each process. All of them
have the same tensor names; ``DCP_SHARDING_INFO`` in their metadata says where in the tensor each
part begins (``saved_offsets``, torch/distributed/checkpoint/_hf_utils.py). To average such a file
as a model would be to average fragments.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.folder import Folder
from ckptavg.checkpoint.safetensors import SafetensorsHeader, read_header
from ckptavg.checkpoint.sharded import AnyPlace, Part, Place, assembled
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.errors import CheckpointError, IncompleteCheckpointError
from ckptavg.tensors import TensorInfo

SHARDING_INFO = "DCP_SHARDING_INFO"
LAYOUT = "torch.distributed.checkpoint safetensors directory"
_SHARD = re.compile(r"shard-(\d{5})-.*\.safetensors")


def is_dcp_shard(name: str) -> bool:
    """Tell by its name whether a file holds parts of tensors."""
    return _SHARD.fullmatch(name) is not None


def open_dcp_safetensors(folder: Folder, names: Sequence[str]) -> StoredCheckpoint:
    """Open the files of a directory that hold parts of the same tensors.

    Args:
        folder: The directory.
        names: The files, as ``is_dcp_shard`` finds them.

    Raises:
        CheckpointError: If a file is missing or damaged, or the parts do not make whole tensors.
    """
    numbers = sorted({int(match[1]) for name in names if (match := _SHARD.fullmatch(name))})
    missing = set(range(1, numbers[-1] + 1)) - set(numbers)
    if missing:
        raise IncompleteCheckpointError(
            f"{folder.label}: the file of process {min(missing)} is missing; there are "
            f"{numbers[-1]} of them (shard-{min(missing):05d}-...)"
        )
    parts: dict[str, list[tuple[tuple[int, ...], TensorInfo, Place]]] = {}
    files: list[ReadableFile] = []
    try:
        for name in names:
            file = folder.open(name, f"{folder.label}/{name}")
            files.append(file)
            header = read_header(file)
            for tensor, first in _offsets(header, file.label).items():
                info, place = header.tensors[tensor], Place(file, header.offsets[tensor])
                parts.setdefault(tensor, []).append((first, info, place))
        tensors, places = {}, {}
        for tensor, found in parts.items():
            tensors[tensor], places[tensor] = _whole(f"{folder.label}: tensor '{tensor}'", found)
    except BaseException:
        for file in files:
            file.close()
        raise
    return StoredCheckpoint(
        label=folder.label, layout=LAYOUT, tensors=tensors, places=places, open_files=files
    )


def _offsets(header: SafetensorsHeader, label: str) -> dict[str, tuple[int, ...]]:
    """Return where in its tensor each part of a file begins."""
    text = header.metadata.get(SHARDING_INFO)
    try:
        told: Any = json.loads(text) if text else None
    except (ValueError, RecursionError):
        told = None
    if type(told) is not dict:
        raise CheckpointError(
            f"{label}: is called like a part of a distributed checkpoint, but has "
            f"no {SHARDING_INFO}"
        )
    offsets: dict[str, tuple[int, ...]] = {}
    for name, info in header.tensors.items():
        entry = told.get(name)
        first = entry.get("saved_offsets") if type(entry) is dict else None
        if (
            type(first) is not list
            or len(first) != len(info.shape)
            or not all(type(begin) is int and 0 <= begin < 2**63 for begin in first)
        ):
            raise CheckpointError(
                f"{label}: its {SHARDING_INFO} does not say where the part of "
                f"tensor '{name}' begins"
            )
        offsets[name] = tuple(first)
    return offsets


def _whole(
    what: str, found: Sequence[tuple[tuple[int, ...], TensorInfo, Place]]
) -> tuple[TensorInfo, AnyPlace]:
    """Put a tensor together; its shape is what its parts reach."""
    dtypes = {info.dtype for _, info, _ in found}
    if len(dtypes) > 1 or len({len(first) for first, _, _ in found}) > 1:
        raise CheckpointError(f"{what} has parts of different dtypes or numbers of dimensions")
    reach = [
        [begin + size for begin, size in zip(first, info.shape, strict=True)]
        for first, info, _ in found
    ]
    whole = TensorInfo(dtypes.pop(), tuple(map(max, zip(*reach, strict=True))))
    if not whole.numel:
        return whole, found[0][2]
    return whole, assembled(
        whole, [Part(first, info.shape, place) for first, info, place in found], what
    )
