"""The small files that make weights a model: config, tokenizer, licence; copied, never run."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptavg.checkpoint.files import PositionalFile
from ckptavg.errors import CheckpointError
from ckptavg.tensors import DType
from ckptavg.writer import ModelWriter

_MAX_SIDE_FILE_BYTES = 256 * 2**20
_TEMPLATE_DIRECTORY = "additional_chat_templates"

# weights in any format, training state, and what is written anew
_LEFT_OUT = re.compile(
    r"""
    .*\.(safetensors|bin|pt|pth|ckpt|tar|gguf|ggml|onnx|onnx_data|h5|msgpack|distcp|npz|npy|pkl|pickle)
    | .*\.index\.json
    | consolidated.* | optimizer.* | scheduler.* | scaler.* | rng_state.* | random_states_.*
    | trainer_state\.json | training_args\..* | events\.out\..* | latest | zero_to_fp32\.py
    | README\.md | ckptavg\.json | \..*
    """,
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to copy: its path, and its name relative to the output."""

    path: Path
    name: str


def copy_side_files(
    files: Sequence[SideFile], writer: ModelWriter, *, output_dtype: DType | None
) -> None:
    """Copy side files into an output.

    Args:
        files: From ``find_side_files``.
        writer: Where they go.
        output_dtype: dtype of the output's weights where it was changed.

    Raises:
        CheckpointError: If a file cannot be read.
        OutputError: If one cannot be written.
    """
    for file in files:
        writer.add_file(file.name, read_side_file(file, output_dtype=output_dtype))


def find_side_files(
    directory: str | None, *, include_code: bool
) -> tuple[list[SideFile], list[str]]:
    """Choose what to copy from a model directory; a single file (None) brings nothing.

    Returns:
        The files, sorted by name, and notes on code that is among them or was left out.
    """
    if directory is None:
        return [], []
    root = Path(directory)
    candidates = [entry for entry in root.iterdir() if not _LEFT_OUT.fullmatch(entry.name)]
    templates = root / _TEMPLATE_DIRECTORY
    if templates.is_dir():
        candidates.extend(templates.glob("*.jinja"))
    files, code, notes = [], [], []
    for path in sorted(candidates):
        if not path.is_file():
            continue
        name = str(path.relative_to(root))
        if path.stat().st_size > _MAX_SIDE_FILE_BYTES:
            notes.append(f"did not copy {name}: it is larger than {_MAX_SIDE_FILE_BYTES} bytes")
        elif path.suffix == ".py":
            code.append(name)
            if include_code:
                files.append(SideFile(path, name))
        else:
            files.append(SideFile(path, name))
    if code:
        what = "copied, not run" if include_code else "left out"
        notes.append(f"Python files of the model, {what}: {', '.join(code)}")
    return files, notes


def read_side_file(file: SideFile, *, output_dtype: DType | None) -> bytes:
    """Return the content of a side file as it belongs into the output.

    Args:
        file: Which one.
        output_dtype: dtype of the output's weights if it differs from the input's; then
            ``dtype`` and ``torch_dtype`` in ``config.json`` are set to it.

    Raises:
        CheckpointError: If it cannot be read.
    """
    opened = PositionalFile(file.path, os.fspath(file.path))
    try:
        content = opened.read(0, opened.size)
    finally:
        opened.close()
    if file.name != "config.json" or output_dtype is None:
        return content
    try:
        config = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: is not valid JSON") from error
    return (json.dumps(_with_dtype(config, output_dtype.name), indent=2) + "\n").encode("utf-8")


def _with_dtype(config: Any, name: str) -> Any:
    """Set the dtype wherever a config names one, also in the parts of a composite model."""
    if not isinstance(config, dict):
        return config
    return {
        key: name
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else _with_dtype(value, name)
        for key, value in config.items()
    }
