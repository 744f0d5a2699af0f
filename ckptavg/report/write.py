"""From an output to a file: gather, lay out, write whole or not at all."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptavg.errors import OutputError, told_storage_errors
from ckptavg.evidence_names import REPORT_NAME, is_report
from ckptavg.report.gather import find_evidence, find_models
from ckptavg.report.page import lay_out
from ckptavg.staging import publish_file


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """A report that was written.

    Attributes:
        path: The page.
        models: The model directories that it is about.
        evidence: The files of figures that it shows.
        sections: Its headings, in order.
        n_pictures: How many pictures are in it.
        nbytes: Its size.
        notes: What the user should know, such as pictures that are not in it.
    """

    path: Path
    models: tuple[Path, ...]
    evidence: tuple[Path, ...]
    sections: tuple[str, ...]
    n_pictures: int
    nbytes: int
    notes: tuple[str, ...]


@told_storage_errors()
def write_report(
    output: str | Path,
    evidence: Sequence[str | Path] = (),
    *,
    path: str | Path | None = None,
    overwrite: bool = False,
) -> ReportResult:
    """Write one page of everything that is known about an output: HTML that needs nothing else.

    It tells what the model is and what averaging brought, its checkpoints, what became of tensors
    and BatchNorm statistics, what searches and measurements found, with their pictures, and the
    recipe that makes it again. Nothing is computed, and nothing else is changed.

    Args:
        output: A model directory that ckptavg wrote, or a directory of several. Evidence in it, and
            in directories in it, is shown.
        evidence: Directories and JSON files to show besides.
        path: The file to write; None is ``report.html`` in the output.
        overwrite: Replace an older report.

    Raises:
        ReportError: If there is nothing to tell, or what there is cannot be read.
        OutputError: If the file is there and may not be replaced, or cannot be written.
    """
    output = Path(output)
    models = find_models(output)
    target = output / REPORT_NAME if path is None else Path(path)
    _check_target(target, overwrite=overwrite)
    found = find_evidence(output, models, evidence)
    page = lay_out(output, models, found)
    content = page.text.encode("utf-8")
    _write(target, content, overwrite=overwrite)
    return ReportResult(
        path=target,
        models=tuple(model.path for model in models),
        evidence=tuple(one.path for one in found),
        sections=page.sections,
        n_pictures=page.n_pictures,
        nbytes=len(content),
        notes=page.notes,
    )


def _check_target(target: Path, *, overwrite: bool) -> None:
    if os.path.lexists(target):
        if not overwrite:
            raise OutputError(f"{target}: is there already; pass --overwrite to replace a report")
        if not is_report(target):
            raise OutputError(f"{target}: is no report of ckptavg's, so it is not replaced")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: {target.parent} is not a directory")


def _write(target: Path, content: bytes, *, overwrite: bool) -> None:
    try:
        publish_file(
            target,
            content,
            overwrite=overwrite,
            check=lambda: _check_target(target, overwrite=overwrite),
        )
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"{target}: the report cannot be written: {reason}") from error
