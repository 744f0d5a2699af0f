"""The small files that make weights a model: config, tokenizer, licence; copied, never run."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ckptavg.checkpoint import Checkpoint
from ckptavg.checkpoint.files import PositionalFile
from ckptavg.checkpoint.folder import (
    MAX_SIDE_FILE_BYTES,
    TEMPLATE_DIRECTORY,
    Folder,
    is_side_file,
)
from ckptavg.checkpoint.limits import SIDE_FILE_BOUNDS
from ckptavg.checkpoint.strict_json import parse_object
from ckptavg.directories import entries
from ckptavg.evidence_names import SEARCH_FILE, is_report
from ckptavg.hub import CARD_NAME
from ckptavg.tensors import DType
from ckptavg.writer import ModelWriter

_MAX_CARD_BYTES = 2**20
_FRONT_MATTER = re.compile(r"---\n(.*?)\n---(?:\n|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file to copy: its path, and its name relative to the output."""

    path: Path
    name: str


def copy_side_files(
    files: Sequence[SideFile],
    writer: ModelWriter,
    *,
    output_dtype: DType | None,
    rewritten: Mapping[str, bytes],
) -> None:
    """Copy side files into an output.

    Args:
        files: From ``find_side_files``.
        writer: Where they go.
        output_dtype: dtype of the output's weights where it was changed.
        rewritten: Content of those that are not copied as they are, by name.

    Raises:
        CheckpointError: If a file cannot be read.
        OutputError: If one cannot be written.
    """
    for file in files:
        content = rewritten.get(file.name)
        if content is None:
            content = read_side_file(file, output_dtype=output_dtype)
        writer.add_file(file.name, content)


def find_side_files(
    checkpoint: Checkpoint, *, include_code: bool
) -> tuple[list[SideFile], list[str]]:
    """Choose what to copy from a model directory; a single file brings nothing.

    Returns:
        The files, sorted by name, and notes on code that is among them or was left out.
    """
    folder = checkpoint.folder
    if folder is None:
        return [], []
    # whatever they are called
    weights = {PurePath(one.path).name for one in checkpoint.files if one.holds_weights}
    root = folder.local_directory()
    names = [  # what was found of another model is nothing of this one
        name
        for name in folder.names()
        if is_side_file(name) and not SEARCH_FILE.fullmatch(name) and name not in weights
    ]
    if (root / TEMPLATE_DIRECTORY).is_dir():
        found = (one.name for one in entries(root / TEMPLATE_DIRECTORY))
        names += [f"{TEMPLATE_DIRECTORY}/{name}" for name in found if name.endswith(".jinja")]
    files, code, notes = [], [], []
    for name in sorted(names, key=PurePath):
        path = root / name
        if folder.size(name) > MAX_SIDE_FILE_BYTES:
            notes.append(f"did not copy {name}: it is larger than {MAX_SIDE_FILE_BYTES} bytes")
        elif not path.is_file() or is_report(path):  # which is about another model
            continue
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
    config = parse_object(content, str(file.path), SIDE_FILE_BOUNDS, is_strict=False)
    return (json.dumps(_with_dtype(config, output_dtype.name), indent=2) + "\n").encode("utf-8")


def inherited_front_matter(folder: Folder | None) -> str | None:
    """Return the front matter of the model card in a folder, as it stands there; None without one.

    Raises:
        CheckpointError: If the card cannot be read.
    """
    if folder is None or not folder.has(CARD_NAME) or folder.is_folder(CARD_NAME):
        return None
    file = folder.open(CARD_NAME, f"{folder.label}/{CARD_NAME}")
    try:
        if file.size > _MAX_CARD_BYTES:
            return None
        text = file.read(0, file.size).decode("utf-8", "replace").replace("\r\n", "\n")
        file.verify()
    finally:
        file.close()
    match = _FRONT_MATTER.match(text)
    return match[1] if match else None


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
