"""What was measured, as files for people and programs: JSON, CSV, and pictures beside them."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptavg.errors import OutputError, without_token
from ckptavg.evidence_names import MEASURED_FILE
from ckptavg.provenance import json_text
from ckptavg.staging import check_exchange_beside, publish_directory

FORMAT_VERSION = 1


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
        try:
            check_exchange_beside(output)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(f"{output}: cannot be written: {reason}") from error
    parent = next(one for one in Path(os.path.abspath(output)).parents if one.exists())
    if not parent.is_dir():
        raise OutputError(f"{output}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{output}: {parent} is not writable")


def publish_evidence(output: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Write files into a directory that appears whole or not at all.

    Raises:
        OutputError: If it exists and may not be replaced, or the storage refuses.
        AfterPublishError: If it is in place, but the storage did not confirm it.
    """
    kind = next(iter(files)).partition(".")[0]

    def check() -> None:
        check_evidence_destination(output, overwrite=overwrite, kind=kind)

    check()
    try:
        publish_directory(output, files, overwrite=overwrite, check=check)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"{output}: cannot be written: {reason}") from error
