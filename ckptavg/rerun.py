"""Makes an output again by its recorded recipe, in a process of its own, and compares."""

import filecmp
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ckptavg.checkpoint.files import PositionalFile
from ckptavg.checkpoint.formats import open_file
from ckptavg.checkpoint.stored import StoredCheckpoint
from ckptavg.errors import CheckpointError, OutputError
from ckptavg.recipe_file import SECTIONS, RecipeTable
from ckptavg.staging import temporary_directory
from ckptavg.tensors import Piece
from ckptavg.toml_text import toml_text

# what may stand in a recipe that comes from a file: nothing that publishes or judges the output
_KEPT = {
    "averaging": set(SECTIONS["averaging"]) | {"strip-prefixes"},
    "model": {*SECTIONS["model"], "model-args", "data-args"}
    - {"eval", "eval-command", "compare", "compare-bn", "last-checkpoint"},
    "machine": {"device"},
    "output": {"output-format", "max-shard-size", "no-code"},
}
_COMPARED_AT_ONCE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """A tensor that came out otherwise.

    Attributes:
        name: Its name.
        numel: How many elements it has in the output.
        n_differing: How many of them differ; all, where dtype or shape do.
    """

    name: str
    numel: int
    n_differing: int


@dataclass(frozen=True, kw_only=True)
class ReproducedFile:
    """A file of an output, compared with the one that was made again.

    Attributes:
        name: Its name.
        is_identical: Whether all bytes are the same.
        differing: The tensors that differ, of a weight file.
        reason: What else differs, in words; None if it is identical, or the tensors tell.
    """

    name: str
    is_identical: bool
    differing: tuple[TensorDifference, ...] = ()
    reason: str | None = None


def named_code(recipe: Mapping[str, Any]) -> list[str]:
    """Return what of the user's code a recorded recipe imports and calls."""
    model = recipe.get("model", {})
    keys = ("model", "data", "forward") if "data" in model else ()  # else there is no pass
    names = [model.get(key) for key in keys]
    return [str(name) for name in names if name is not None]


def run_again(
    recipe: Mapping[str, Any],
    output: Path,
    filenames: Sequence[str],
    *,
    directory: Path,
    device: str | None,
    shows_progress: bool,
) -> tuple[ReproducedFile, ...]:
    """Run a recorded recipe into a directory beside an output, compare the files, and remove it.

    Args:
        recipe: From the output's provenance.
        output: The output.
        filenames: The files to compare.
        directory: Where the recipe works.
        device: Where it runs, instead of where it says.
        shows_progress: Whether the run's progress goes to stderr.

    Raises:
        OutputError: If the run fails, or there is no room beside the output.
    """
    kept: RecipeTable = {"command": recipe["command"], "directory": str(directory)}
    kept["sources"] = recipe["sources"]
    for section, keys in _KEPT.items():
        table = {key: one for key, one in recipe.get(section, {}).items() if key in keys}
        if section == "machine" and device is not None:
            table["device"] = device
        if table and (section != "model" or "data" in table):
            kept[section] = table
    place = Path(os.path.realpath(output))
    with ExitStack() as stack:
        try:
            holder = stack.enter_context(temporary_directory(place, "verify"))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(
                f"{output}: cannot be made again beside it, in {place.parent}: {reason}"
            ) from error
        file, again = holder / "recipe.toml", holder / place.name
        file.write_text(toml_text(kept), encoding="utf-8")
        _run(file, again, output, recipe["torch_threads"], shows_progress=shows_progress)
        again = again / str(recipe["member"])
        return tuple(_compared(name, place / name, again / name) for name in filenames)


def _run(
    recipe: Path, again: Path, output: Path, n_threads: int | None, *, shows_progress: bool
) -> None:
    """Run a recipe as the command line does: the working directory and imports are its own."""
    # this very package, wherever it was imported from; not what lies in the current directory
    package = str(Path(__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if n_threads is not None:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(int(n_threads)))
    words = [sys.executable, "-P", "-m", "ckptavg", "run", str(recipe), "-o", str(again)]
    done = subprocess.run(
        words if shows_progress else [*words, "--quiet"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=None if shows_progress else subprocess.PIPE,
        env=environment,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    said = [line for line in (done.stderr or "").splitlines() if line.strip()]
    reason = said[-1].removeprefix("ckptavg: error: ") if said else "see above"
    raise OutputError(f"{output}: its recipe cannot be run again: {reason}")


def _compared(name: str, one: Path, other: Path) -> ReproducedFile:
    if not other.is_file():
        return ReproducedFile(name=name, is_identical=False, reason="was not made again")
    if not one.is_file():
        return ReproducedFile(name=name, is_identical=False, reason="is missing here")
    if filecmp.cmp(one, other, shallow=False):
        return ReproducedFile(name=name, is_identical=True)
    if not name.endswith((".safetensors", ".pt", ".bin")):
        return ReproducedFile(name=name, is_identical=False, reason="differs")
    try:
        differing = _differing_tensors(one, other)
    except CheckpointError as error:
        return ReproducedFile(name=name, is_identical=False, reason=f"cannot be read: {error}")
    reason = None if differing else "differs in its header or between the tensors"
    return ReproducedFile(name=name, is_identical=False, differing=differing, reason=reason)


def _differing_tensors(one: Path, other: Path) -> tuple[TensorDifference, ...]:
    first = open_file(PositionalFile(one, one.name), state_key=None)
    try:
        second = open_file(PositionalFile(other, other.name), state_key=None)
        try:
            return tuple(_differences(first, second))
        finally:
            second.close()
    finally:
        first.close()


def _differences(first: StoredCheckpoint, second: StoredCheckpoint) -> Iterable[TensorDifference]:
    for name in dict.fromkeys([*first.tensors, *second.tensors]):
        info = first.tensors.get(name) or second.tensors[name]
        if first.tensors.get(name) == second.tensors.get(name):
            n_differing = _n_differing(name, first, second)
        else:
            n_differing = info.numel
        if n_differing:
            yield TensorDifference(name=name, numel=info.numel, n_differing=n_differing)


def _n_differing(name: str, first: StoredCheckpoint, second: StoredCheckpoint) -> int:
    """Count the elements whose bytes differ, so that NaN is equal to the same NaN."""
    info = first.tensors[name]
    step = _COMPARED_AT_ONCE_BYTES // info.dtype.itemsize * info.dtype.itemsize
    count = 0
    for start in range(0, info.nbytes, step):
        piece = Piece(name, start, min(start + step, info.nbytes))
        arrays = []
        for checkpoint in (first, second):
            buffer = bytearray(piece.stop - piece.start)
            checkpoint.read_into([piece], memoryview(buffer))
            arrays.append(np.frombuffer(buffer, np.uint8).reshape(-1, info.dtype.itemsize))
        count += int((arrays[0] != arrays[1]).any(axis=1).sum())
    return count
