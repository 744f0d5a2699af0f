"""Where trainers put weights that do not lie in a model directory's usual files.

Each layout is told by names. What cannot be put together from files alone is refused by name, with
what to do instead.
"""

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePosixPath

from ckptavg.checkpoint.dcp import open_dcp
from ckptavg.checkpoint.dcp_metadata import METADATA_NAME
from ckptavg.checkpoint.dcp_safetensors import is_dcp_shard, open_dcp_safetensors
from ckptavg.checkpoint.folder import WEIGHT_SUFFIXES, Folder
from ckptavg.checkpoint.formats import open_file
from ckptavg.checkpoint.position import Position, position_from_name
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.errors import CheckpointError

_SHARDED = "sharded"
ACCELERATE_FSDP_FILE = "pytorch_model_fsdp.bin"
_DEEPSPEED_WEIGHTS = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_DEEPSPEED_ZERO3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_DEEPSPEED_OTHER = re.compile(r"(layer|expert)_\d+.*_states\.pt")
DEEPSPEED_STEP = re.compile(r"global_step\d+")
_OPTIMIZER_FOLDER = re.compile(r"optim.*", re.IGNORECASE)
_MEGATRON_RANK = re.compile(r"mp_rank_\d{2,}(_\d{3,})*")

# what a directory is whose names match, and what to do
_PARTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        _MEGATRON_RANK,
        "holds Megatron-LM's model-parallel shards ({name}), which only Megatron can put together; "
        "convert it with tools/checkpoint/convert.py, or save with --ckpt-format torch_dist, which "
        "is read as it is",
    ),
    (
        re.compile(
            r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin|.*model_rank_?\d+\.pt|.*_fsdp_rank_?\d+.*"
        ),
        "holds the flat shards of single FSDP processes ({name}), which do not say what they are "
        "part of; save with SHARDED_STATE_DICT or FULL_STATE_DICT",
    ),
    (
        re.compile(r"consolidated\.0[1-9]\.pth"),
        "holds model-parallel shards ({name}); convert them to the Hugging Face format",
    ),
)
_FOREIGN_FORMATS = (
    (
        re.compile(r".*\.gguf"),
        "holds a GGUF model ({name}), quantised for inference; average the original checkpoints",
    ),
    (
        re.compile(r".*\.onnx"),
        "holds an ONNX model ({name}), which is a program; average the checkpoints it came from",
    ),
    (
        re.compile(r".*\.nemo"),
        "holds a NeMo archive ({name}); unpack it with tar, and average what it holds",
    ),
    (
        re.compile(r"flax_model.*\.msgpack|.*\.msgpack"),
        "holds Flax weights ({name}), which are not read; save them as safetensors",
    ),
    (
        re.compile(r"tf_model.*\.h5|.*\.h5|.*\.ckpt\.index|saved_model\.pb"),
        "holds TensorFlow weights ({name}), which are not read; save them as safetensors",
    ),
)


def is_trainer_layout(folder: Folder, names: Sequence[str]) -> bool:
    """Tell by names whether a folder is a checkpoint of one of the layouts that are read here."""
    steps = [name for name in names if DEEPSPEED_STEP.fullmatch(name)]
    return (
        ACCELERATE_FSDP_FILE in names
        or any(map(_DEEPSPEED_WEIGHTS.fullmatch, names))
        or any(map(_DEEPSPEED_ZERO3.fullmatch, names))
        or (len(steps) == 1 and ("latest" in names or "trainer_state.json" in names))
        or bool(_distributed_inside(folder, names))
    )


def sharded_originals(folder: Folder, *, state_key: str | None) -> StoredCheckpoint | None:
    """Open what ``HuggingFaceStorageWriter(enable_consolidation=True)`` put together, in parts.

    It leaves the parts in ``sharded/`` beside the whole files; torch 2.13 writes 0 for every tensor
    without dimensions into those, so the parts are what is read.
    """
    if not folder.is_folder(_SHARDED):
        return None
    inner = folder.inside(_SHARDED)
    shards = [name for name in inner.names() if is_dcp_shard(name)]
    if not shards:
        return None
    checkpoint = open_dcp_safetensors(inner, shards, state_key=state_key)
    checkpoint.label = folder.label
    checkpoint.notes = [
        *checkpoint.notes,
        f"read the parts in {_SHARDED}/ rather than what torch put together: it loses tensors "
        "without dimensions",
    ]
    return checkpoint


def open_trainer_layout(folder: Folder, *, state_key: str | None) -> StoredCheckpoint | None:
    """Open what a trainer left in a directory; None if it is none of the layouts known here.

    Raises:
        CheckpointError: If it is one that is not read, or damaged.
    """
    names = folder.names()
    if ACCELERATE_FSDP_FILE in names:
        return _open_inside(folder, ACCELERATE_FSDP_FILE, state_key, "accelerate FSDP directory")
    for recognise in (_deepspeed, _inner_dcp):
        checkpoint = recognise(folder, names, state_key)
        if checkpoint is not None:
            return checkpoint
    _refuse(_PARTS, folder, names)
    return None


def refuse_foreign_formats(folder: Folder) -> None:
    """Refuse a directory that holds weights in a format that is not read, and in no other.

    Raises:
        CheckpointError: If it does.
    """
    _refuse(_FOREIGN_FORMATS, folder, folder.names())


def _refuse(
    refused: Sequence[tuple[re.Pattern[str], str]], folder: Folder, names: Sequence[str]
) -> None:
    for pattern, what in refused:
        found = [name for name in names if pattern.fullmatch(name)]
        if found:
            raise CheckpointError(f"{folder.label}: {what.format(name=found[0])}")


def _deepspeed(
    folder: Folder, names: Sequence[str], state_key: str | None
) -> StoredCheckpoint | None:
    """Open the 16-bit weights that DeepSpeed writes up to ZeRO-2.

    The layout is that of ``DeepSpeedEngine.save_checkpoint``: ``latest`` names a folder
    ``global_step<N>`` with ``mp_rank_00_model_states.pt``, whose ``module`` is the state dict; with
    ZeRO-3 every process writes files of its own, and ``module`` holds empty tensors.
    """
    steps = [name for name in names if DEEPSPEED_STEP.fullmatch(name) and folder.is_folder(name)]
    inner, prefix = folder, ""
    if steps:
        tag = _latest(folder) or (steps[0] if len(steps) == 1 else "")
        if tag not in steps:
            return None  # several, and nothing says which: a run, not a checkpoint
        inner, prefix = folder.inside(tag), f"{tag}/"
        names = inner.names()
    if any(map(_DEEPSPEED_ZERO3.fullmatch, names)):
        raise CheckpointError(
            f"{folder.label}: is a DeepSpeed ZeRO-3 checkpoint, whose weights lie in the optimizer "
            f"files of all processes; put them together first: "
            f"{_zero_to_fp32(folder.label, prefix.rstrip('/'), alone=len(steps) == 1)}"
        )
    ranks = [name for name in names if _DEEPSPEED_WEIGHTS.fullmatch(name)]
    parts = [name for name in names if _DEEPSPEED_OTHER.fullmatch(name)]
    if parts or len(ranks) > 1:
        what = "pipeline stages or experts" if parts else "tensor-parallel ranks"
        raise CheckpointError(
            f"{folder.label}: is a DeepSpeed checkpoint of {what} ({(parts or ranks)[0]}), which "
            "only its trainer can put together; save or convert it to one model first"
        )
    if not ranks:
        return None
    checkpoint = _open_inside(
        folder, ranks[0], state_key, "DeepSpeed directory", inner=inner, shown=f"{prefix}{ranks[0]}"
    )
    if any(info.dtype.itemsize == 2 for info in checkpoint.tensors.values()):
        checkpoint.notes = [
            *checkpoint.notes,
            "holds the 16-bit weights; DeepSpeed's float32 ones are in its optimizer files "
            "(zero_to_fp32.py puts them together)",
        ]
    return checkpoint


def _zero_to_fp32(label: str, tag: str, *, alone: bool) -> str:
    """Return the command that puts ZeRO-3 weights together.

    Args:
        label: The directory that was opened, which gets the weights.
        tag: The folder in it with the files; empty if it is that folder itself.
        alone: Whether there is no other such folder in it: else that one gets them.
    """
    outer = target = PurePosixPath(label)
    if not tag:
        tag = outer.name
        outer = outer.parent if DEEPSPEED_STEP.fullmatch(tag) else outer / ".."
    elif not alone:
        target = outer / tag
    option = f" -t {tag}" if DEEPSPEED_STEP.fullmatch(tag) else ""  # else what `latest` says
    script, root, into = (
        shlex.quote(str(path)) for path in (outer / "zero_to_fp32.py", outer, target)
    )
    # as a torch file: DeepSpeed's safetensors fail where weights are tied
    return f"python {script} {root} {into}{option}"


def _latest(folder: Folder) -> str | None:
    """Return what DeepSpeed's file ``latest`` says."""
    if not folder.has("latest") or folder.is_folder("latest") or folder.size("latest") > 4096:
        return None
    file = folder.open("latest", f"{folder.label}/latest")
    try:
        told = file.read(0, file.size).decode("utf-8", "replace").strip()
        file.verify()
        return told
    finally:
        file.close()


def _inner_dcp(
    folder: Folder, names: Sequence[str], state_key: str | None
) -> StoredCheckpoint | None:
    """Open the one torch.distributed.checkpoint directory in a folder that holds a model.

    accelerate calls it ``pytorch_model_fsdp_0``, OLMo-core ``model_and_optim``, NeMo ``weights``.
    """
    found = _distributed_inside(folder, names)
    if not found:
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{folder.label}: holds {len(found)} distributed checkpoints "
            f"({', '.join(name for name, _, _ in found[:3])}, ...); name one of them"
        )
    _, inner, shards = found[0]
    if shards:
        checkpoint = open_dcp_safetensors(inner, shards, state_key=state_key)
    else:
        checkpoint = open_dcp(inner, state_key=state_key)
    checkpoint.label = folder.label
    return checkpoint


def _distributed_inside(
    folder: Folder, names: Sequence[str]
) -> list[tuple[str, Folder, list[str]]]:
    """Return the folders inside that are distributed checkpoints, with their safetensors parts."""
    found = []
    for name in names:
        is_step = position_from_name(name) != Position(None, None)
        is_file_of_a_run = name.endswith(WEIGHT_SUFFIXES)  # Lightning's last.ckpt/
        if is_step or is_file_of_a_run or _OPTIMIZER_FOLDER.fullmatch(name):
            continue
        if not folder.is_folder(name):
            continue
        inner = folder.inside(name)
        with suppress(PermissionError):  # somebody else's folder, such as lost+found
            shards = [one for one in inner.names() if is_dcp_shard(one)]
            if shards or inner.has(METADATA_NAME):
                found.append((name, inner, shards))
    return found


def _open_inside(
    folder: Folder,
    name: str,
    state_key: str | None,
    layout: str,
    *,
    inner: Folder | None = None,
    shown: str | None = None,
) -> StoredCheckpoint:
    file = (inner or folder).open(name, f"{folder.label}/{shown or name}")
    checkpoint = open_file(file, state_key=state_key)
    checkpoint.label, checkpoint.layout = folder.label, layout
    return checkpoint
