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
_OF_MODEL = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")
_MAX_SIZE = 2**63


def is_dcp_shard(name: str) -> bool:
    """Tell by its name whether a file holds parts of tensors."""
    return _SHARD.fullmatch(name) is not None


def open_dcp_safetensors(
    folder: Folder, names: Sequence[str], *, state_key: str | None
) -> StoredCheckpoint:
    """Open the files of a directory that hold parts of the same tensors.

    Args:
        folder: The directory.
        names: The files, as ``is_dcp_shard`` finds them.
        state_key: Refused: such files hold weights alone.

    Raises:
        CheckpointError: If a file is missing or damaged, or the parts do not make whole tensors.
    """
    if state_key is not None:
        raise CheckpointError(
            f"{folder.label}: --state-key is for torch files, these are safetensors files"
        )
    numbers = sorted({int(match[1]) for name in names if (match := _SHARD.fullmatch(name))})
    missing = next((at for at, number in enumerate(numbers, start=1) if at != number), None)
    if missing is not None:
        raise IncompleteCheckpointError(
            f"{folder.label}: the file of process {missing} is missing; there are "
            f"{numbers[-1]} of them (shard-{missing:05d}-...)"
        )
    _check_every_file_of_the_model(folder.label, names)
    parts: dict[str, list[tuple[tuple[int, ...], TensorInfo, Place]]] = {}
    files: list[ReadableFile] = []
    try:
        for name in names:
            file = folder.open(name, f"{folder.label}/{name}")
            files.append(file)
            header = read_header(file)
            for tensor, first in part_offsets(header, file.label).items():
                info, place = header.tensors[tensor], Place(file, header.offsets[tensor])
                parts.setdefault(tensor, []).append((first, info, place))
        tensors, places = {}, {}
        for tensor, found in parts.items():
            tensors[tensor], places[tensor] = _whole(f"{folder.label}: tensor '{tensor}'", found)
    except BaseException:
        for file in files:
            file.close()
        raise
    processes = f"{len(numbers)} process{'es' if len(numbers) > 1 else ''}"
    return StoredCheckpoint(
        label=folder.label,
        layout=LAYOUT,
        tensors=tensors,
        places=places,
        open_files=files,
        notes=[
            f"was put together from the files of {processes}; they do not tell whether there "
            "were more"
        ],
    )


def refuse_part(header: SafetensorsHeader, file: ReadableFile) -> None:
    """Refuse a single file that holds parts of tensors as if they were whole.

    Files of whole tensors may have ``DCP_SHARDING_INFO``, too.

    Raises:
        CheckpointError: If its name or its content tells that it does.
    """
    if SHARDING_INFO not in header.metadata:
        return
    if is_dcp_shard(file.path.rpartition("/")[2]) or any(
        any(first) for first in part_offsets(header, file.label).values()
    ):
        raise CheckpointError(
            f"{file.label}: holds one process's parts of tensors, not whole ones; name the folder "
            "with the files of all processes"
        )


def part_offsets(header: SafetensorsHeader, label: str) -> dict[str, tuple[int, ...]]:
    """Return where in its tensor each part of a file begins.

    Raises:
        CheckpointError: If the file does not say so of every part.
    """
    text = header.metadata.get(SHARDING_INFO)
    try:
        told: Any = json.loads(text) if text else None
    except (ValueError, RecursionError):
        told = None
    if type(told) is not dict:
        raise CheckpointError(
            f"{label}: has no {SHARDING_INFO} that says where in their tensors its parts begin"
        )
    offsets: dict[str, tuple[int, ...]] = {}
    for name, info in header.tensors.items():
        entry = told.get(name)
        first = entry.get("saved_offsets") if type(entry) is dict else None
        if (
            type(first) is not list
            or len(first) != len(info.shape)
            or not all(type(begin) is int and 0 <= begin < _MAX_SIZE for begin in first)
        ):
            raise CheckpointError(
                f"{label}: its {SHARDING_INFO} does not say where the part of "
                f"tensor '{name}' begins"
            )
        offsets[name] = tuple(first)
    return offsets


def _check_every_file_of_the_model(label: str, names: Sequence[str]) -> None:
    """Check that each of the files is there that a model was spread over, from some process."""
    told = [match for name in names if (match := _OF_MODEL.fullmatch(name))]
    found = {int(match[1]) for match in told}
    for number in range(1, max((int(match[2]) for match in told), default=0) + 1):
        if number not in found:
            raise CheckpointError(
                f"{label}: no process's file {number} of {told[0][2]} of the model is there"
            )


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
    if any(size >= _MAX_SIZE for size in whole.shape):
        raise CheckpointError(f"{what} has an impossible size")
    if not whole.numel:
        return whole, found[0][2]
    return whole, assembled(
        whole, [Part(first, info.shape, place) for first, info, place in found], what
    )
