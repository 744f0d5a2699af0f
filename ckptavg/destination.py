"""Where an output may go: not over anything else, not into an input, not onto a full disk."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath

from ckptavg.checkpoint.folder import PROVENANCE_NAME, read_local_json
from ckptavg.directories import entries, files_below
from ckptavg.errors import OutputError, UsageError
from ckptavg.evidence_names import SEARCH_FILE, is_report
from ckptavg.staging import PARTIAL, STAGED_BYTES, is_staged, remove_orphaned_locks
from ckptavg.tensors import FileStamp

_SPARE_BYTES = 64 * 2**20  # side files, directory entries
# what a bare model directory may hold, beside what the provenance lists
_MODEL_FILE = re.compile(
    r"ckptavg\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|model\.pt"
    r"|(generation_|preprocessor_|processor_)?config\.json|tokenizer(_config)?\.json"
    r"|adapter_model\.(safetensors|bin)|adapter_config\.json"
    r"|tokenizer\.model|special_tokens_map\.json|vocab\.(json|txt)|merges\.txt|chat_template\.jinja"
)


def check_destination(
    output: Path,
    *,
    overwrite: bool,
    needed_bytes: int,
    inputs: Sequence[FileStamp],
    input_directories: Sequence[str],
) -> None:
    """Refuse an output that cannot or must not be written, before anything is read.

    Args:
        output: The directory to be made.
        overwrite: Whether an existing model directory may be replaced.
        needed_bytes: Size of the output.
        inputs: The files that will be read.
        input_directories: The model directories among the sources.

    Raises:
        UsageError: If the output is, lies inside, or contains an input.
        OutputError: If it exists and may not be replaced, or there is not enough room.
    """
    where = Path(os.path.realpath(output))
    _refuse_names(output, where)
    for directory in input_directories:
        inside = Path(os.path.realpath(directory))
        if where == inside or inside in where.parents:
            relation = "is" if where == inside else "lies inside"
            raise UsageError(f"{output}: {relation} the input {directory}; choose another output")
    for stamp in inputs:
        for file in (Path(os.path.realpath(stamp.path)), Path(os.path.abspath(stamp.path))):
            if where == file or where in file.parents:
                raise UsageError(f"{output}: holds the input {stamp.path}; choose another output")
    if os.path.lexists(output):
        if not overwrite:
            remove_orphaned_locks(where)
            raise OutputError(f"{output}: already exists; pass --overwrite to replace it")
        check_replaceable(output)
    parent = existing_parent(where)
    if not parent.is_dir():
        raise OutputError(f"{output}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: {parent} is not writable")
    free_bytes = shutil.disk_usage(parent).free + _left_by_earlier_runs(where)
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise OutputError(
            f"{output}: needs {needed_bytes} bytes, but only {free_bytes} are free in {parent}"
        )


def _refuse_names(output: Path, where: Path) -> None:
    """Refuse a name under which nothing can be made.

    Raises:
        OutputError: If so.
    """
    parent = next((one for one in where.parents if os.path.lexists(one)), where)
    if not parent.exists():
        raise OutputError(f"{output}: {parent} is a symbolic link that leads nowhere")
    longest = os.pathconf(parent, "PC_NAME_MAX") - STAGED_BYTES
    nbytes = len(os.fsencode(where.name))
    if nbytes > longest:
        raise OutputError(
            f"{output}: its name is too long: it has {nbytes} bytes, at most {longest} work, since "
            "it is made under a longer one"
        )


def check_replaceable(output: Path) -> None:
    """Allow replacing what ckptavg wrote, a bare model, or nothing; never anything else."""
    if not output.is_dir():
        raise OutputError(f"{output}: is not a directory; --overwrite replaces model directories")
    names = sorted(
        one.name
        for one in output.iterdir()
        if not (SEARCH_FILE.fullmatch(one.name) or is_report(one) or is_staged(one.name))
    )
    if names and all(_siblings(output / name) == names for name in names):
        for name in names:  # several averages that were made at once
            check_replaceable(output / name)
        return
    ours = _written_names(output)
    foreign = [name for name in names if name not in ours and not _MODEL_FILE.fullmatch(name)]
    if foreign:
        raise OutputError(
            f"{output}: also holds '{foreign[0]}'; --overwrite replaces nothing but a model "
            "directory: remove it yourself, or choose another output"
        )


def _siblings(model: Path) -> object:
    """Return the names of the directories that were made along with a model, itself included."""
    if not model.is_dir():
        return None
    told = read_local_json(model / PROVENANCE_NAME)
    made = told.get("output") if told else None
    return made.get("siblings") if isinstance(made, dict) else None


def _left_by_earlier_runs(output: Path) -> int:
    """Return the bytes on the storage that interrupted runs hold: they are reused or removed."""
    try:
        return sum(
            file.lstat().st_blocks * 512
            for partial in entries(output.parent, f"{output.name}.{PARTIAL}-")
            if is_staged(partial.name) and partial.is_dir()
            for file in files_below(partial)
        )
    except OSError:  # one of them ends at this moment
        return 0


def _written_names(output: Path) -> set[str]:
    """Return what the provenance in a directory says that ckptavg wrote there."""
    told = read_local_json(output / PROVENANCE_NAME)
    made = told.get("output") if told else None
    side_files = made.get("side_files") if isinstance(made, dict) else None
    if not isinstance(side_files, list):
        return set()
    return {PurePath(name).parts[0] for name in side_files if isinstance(name, str) and name}


def existing_parent(path: Path) -> Path:
    """Return the nearest directory above a path that is there."""
    return next(parent for parent in path.parents if parent.exists())
