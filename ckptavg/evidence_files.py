"""What was measured, as files for people and programs: JSON, CSV, and pictures beside them."""

import csv
import errno
import io
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptavg.directories import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    make_parents,
    remove_empty,
    rename,
    sync_directory,
)
from ckptavg.errors import OutputError, without_token
from ckptavg.evidence_names import MEASURED_FILE
from ckptavg.provenance import json_text

FORMAT_VERSION = 1
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL)  # by the file system: renames with flags


def data_files(
    name: str, content: Mapping[str, Any], table: Iterable[Sequence[object]]
) -> dict[str, bytes]:
    """Return ``name.json`` and ``name.csv`` with their content.

    Args:
        name: What it is called.
        content: For JSON.
        table: For CSV, the header first.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return {
        f"{name}.json": f"{json_text(content)}\n".encode(),
        f"{name}.csv": text.getvalue().encode("utf-8", "backslashreplace"),
    }


def evidence(
    kind: str,
    title: str,
    summary: Sequence[str],
    notes: Sequence[str],
    details: Mapping[str, Any],
    *,
    command: str | None,
) -> dict[str, Any]:
    """Return what a measurement says, in the form that ``report`` reads.

    Args:
        kind: Which command made it, such as ``plane``; its files are called by it.
        title: What it shows, in a few words.
        summary: What was found, one sentence each.
        notes: What the reader should know about how, one sentence each.
        details: All numbers.
        command: What made it; tokens are blanked out.
    """
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "title": title,
        "summary": list(summary),
        "notes": list(notes),
        **details,
        "command": command and without_token(command),
    }


def check_evidence_destination(output: Path, *, overwrite: bool, kind: str | None = None) -> None:
    """Refuse a directory that cannot or must not be written.

    Args:
        output: The directory.
        overwrite: Whether one with such files may be replaced.
        kind: Which command's files those may be; None for any.

    Raises:
        OutputError: If it exists and may not be replaced, or cannot be made.
    """
    if os.path.lexists(output):
        if not overwrite:
            raise OutputError(f"{output}: already exists; pass --overwrite to replace it")
        if not output.is_dir() or output.is_symlink():
            raise OutputError(f"{output}: is not a directory; --overwrite replaces directories")
        try:
            names = sorted(entry.name for entry in output.iterdir())
        except OSError as error:
            raise OutputError(f"{output}: cannot be read: {error.strerror}") from error
        for name in names:
            found = MEASURED_FILE.fullmatch(name)
            if found is None or found[1] != (kind or found[1]):
                raise OutputError(
                    f"{output}: also holds '{name}'; --overwrite replaces nothing but what "
                    "this command writes: remove it yourself, or choose another output"
                )
    parent = next(one for one in Path(os.path.abspath(output)).parents if one.exists())
    if not parent.is_dir():
        raise OutputError(f"{output}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: {parent} is not writable")


def publish_evidence(output: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Write files into a directory that appears whole or not at all.

    Raises:
        OutputError: If it exists and may not be replaced, or the storage refuses.
    """
    kind = next(iter(files)).partition(".")[0]
    check_evidence_destination(output, overwrite=overwrite, kind=kind)
    target = Path(os.path.abspath(output))
    made: list[Path] = []
    partial: Path | None = None
    try:
        made = make_parents(target)
        partial = _beside(target)
        partial.mkdir()
        for name, content in files.items():
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_directory(partial)
        _put_in_place(partial, target)
        sync_directory(target.parent)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"{output}: cannot be written: {reason}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)  # after an exchange: what was there before
        remove_empty(made)


def _put_in_place(partial: Path, target: Path) -> None:
    """Let a directory appear under its name; one that was there takes its name, in one step."""
    exists = os.path.lexists(target)
    try:
        rename(partial, target, RENAME_EXCHANGE if exists else RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        if exists:  # in two steps
            aside = _beside(target)
            target.rename(aside)
            try:
                partial.rename(target)
            except BaseException:
                aside.rename(target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            partial.rename(target)


def _beside(target: Path) -> Path:
    """Return a path beside another that nothing has."""
    return target.with_name(f".{target.name}-{os.urandom(8).hex()}")
