"""Where checkpoints lie: a directory of this machine, or a folder on the Hub, seen alike."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

from ckptavg.checkpoint.files import PositionalFile, ReadableFile
from ckptavg.checkpoint.limits import MAX_JSON_BYTES, SIDE_FILE_BOUNDS, JsonBounds
from ckptavg.checkpoint.strict_json import TooLargeError, parse_object
from ckptavg.tensors import HubRevision

PROVENANCE_NAME = "ckptavg.json"
MAX_SIDE_FILE_BYTES = 256 * 2**20
TEMPLATE_DIRECTORY = "additional_chat_templates"

# weights in any format, training state, and what is written anew
_LEFT_OUT = re.compile(
    r"""
    .*\.(safetensors|bin|pt|pth|ckpt|tar|gguf|ggml|onnx|onnx_data|h5|msgpack|distcp|npz|npy|pkl|pickle
        |tflite|ot|mlmodel|pb)
    | .*\.index\.json
    | consolidated.* | optimizer.* | scheduler.* | scaler.* | rng_state.* | random_states_.*
    | trainer_state\.json | training_args\..* | metadata\.json | latest.*\.txt
    | events\.out\..* | latest | zero_to_\w+\.py
    | README\.md | ckptavg\.json | \..*
    """,
    re.VERBOSE | re.IGNORECASE,
)


# what trainers save to go on with, beside the weights
_TRAINING_STATE = re.compile(
    r"""
    (.*[-_])?(optimizer|scheduler|scaler|rng_states?|random_states?|dataloader|sampler|ema_config)
        ([-_.].*)?
    | training_args\.bin | .*optim_states\.pt | .*zero_pp_.* | meta\.pt | common\.pt
    """,
    re.VERBOSE | re.IGNORECASE,
)
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
# one of several files of a model, as all writers number them
SHARD_NAME = re.compile(r".*-\d{5}-of-(\d{5})\.\w+")
WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".npz")


class Folder(Protocol):
    """A folder that holds a checkpoint, or is one.

    Attributes:
        label: What messages call it.
        hub: The revision on the Hub that it is; None for a local directory.
    """

    label: str

    @property
    def hub(self) -> HubRevision | None:
        """See the class."""

    def names(self) -> Sequence[str]:
        """Return the names of the files and folders in it, in order."""

    def has(self, name: str) -> bool:
        """Tell whether there is a file or folder of that name, be it a link that leads nowhere."""

    def is_folder(self, name: str) -> bool:
        """Tell whether that name is a folder's."""

    def leads_nowhere(self, name: str) -> bool:
        """Tell whether that name is a link to what is not there."""

    def size(self, name: str) -> int:
        """Return the bytes of a file; 0 for what is none."""

    def inside(self, name: str) -> "Folder":
        """Return a folder in it."""

    def open(self, name: str, label: str) -> ReadableFile:
        """Open a file in it.

        Raises:
            CheckpointError: If it cannot be opened.
        """

    def state(self) -> object:
        """Return what differs once the folder is another, or names in it come or go."""

    def local_directory(self) -> Path:
        """Return a directory of this machine that holds at least the side files.

        They are what ``is_side_file`` names, up to ``MAX_SIDE_FILE_BYTES`` each.
        """

    def close(self) -> None:
        """Let go of what was fetched."""


class LocalFolder:
    """A directory of this machine."""

    def __init__(self, path: Path, label: str) -> None:
        self.label = label
        self.path = path

    @property
    def hub(self) -> HubRevision | None:
        """Nothing."""
        return None

    def names(self) -> Sequence[str]:
        """Return the names in it; raises OSError if it cannot be listed."""
        return sorted(entry.name for entry in self.path.iterdir())

    def has(self, name: str) -> bool:
        """Tell whether a name is there."""
        return os.path.lexists(self.path / name)

    def is_folder(self, name: str) -> bool:
        """Tell whether it is a directory."""
        return (self.path / name).is_dir()

    def leads_nowhere(self, name: str) -> bool:
        """Tell whether it is a link to what is not there."""
        return not (self.path / name).exists()

    def size(self, name: str) -> int:
        """Return the bytes of a regular file."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else 0

    def inside(self, name: str) -> "LocalFolder":
        """Return a directory in it."""
        return LocalFolder(self.path / name, f"{self.label}/{name}")

    def open(self, name: str, label: str) -> ReadableFile:
        """Open a file in it."""
        return PositionalFile(self.path / name, label)

    def state(self) -> object:
        """Return its identity and the time of its last change; raises OSError."""
        status = self.path.stat()
        return status.st_dev, status.st_ino, status.st_mtime_ns

    def local_directory(self) -> Path:
        """Return itself."""
        return self.path

    def close(self) -> None:
        """Nothing to let go of."""


def is_side_file(name: str) -> bool:
    """Tell by its name whether a file belongs to a model beside its weights, as its config does."""
    return not _LEFT_OUT.fullmatch(name)


def is_training_state(name: str) -> bool:
    """Tell by its name whether a file holds an optimizer or the like, and no weights."""
    return _TRAINING_STATE.fullmatch(name) is not None


def is_plain_file_name(name: str) -> bool:
    """Tell whether a name that a checkpoint gives for a file stays within its folder."""
    # both flavours: an index written on Windows must not reach outside either
    return (
        name not in ("", ".", "..")
        and "\0" not in name
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )


def read_json(
    folder: Folder, name: str, bounds: JsonBounds = SIDE_FILE_BOUNDS, *, is_strict: bool = False
) -> dict[str, Any] | None:
    """Return the JSON object in a file of a folder, or None if there is no such file.

    Args:
        folder: Where it lies.
        name: Of the file.
        bounds: How much it may hold.
        is_strict: See ``parse_object``.

    Raises:
        TooLargeError: If it is unreasonably large.
        CheckpointError: If it is not a JSON object.
    """
    if not folder.has(name):
        return None
    label = f"{folder.label}/{name}"
    file = folder.open(name, label)
    try:
        if file.size > MAX_JSON_BYTES:
            raise TooLargeError(f"{label}: has {file.size} bytes, too many for a JSON side file")
        raw = file.read(0, file.size)
        file.verify()
    finally:
        file.close()
    return parse_object(raw, label, bounds, is_strict=is_strict)


def read_local_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a local file; see ``read_json``."""
    return read_json(LocalFolder(path.parent, str(path.parent)), path.name)
