"""``ckptavg report``: one page of everything that is known about an output."""

from typing import TYPE_CHECKING

import click

from ckptavg.cli.options import talk_options
from ckptavg.cli.render import echo_json, echo_lines, echo_notes
from ckptavg.units import size

if TYPE_CHECKING:
    from ckptavg.report import ReportResult

_EPILOG = """\b
Examples:
  ckptavg report swa
  ckptavg report swa evidence/plane evidence/width.json -o swa.html
"""


@click.command("report", epilog=_EPILOG)
@click.argument("output", metavar="OUT", type=click.Path())
@click.argument("evidence", nargs=-1, metavar="[EVIDENCE]...", type=click.Path())
@click.option(
    "-o",
    "--output",
    "page",
    type=click.Path(),
    metavar="FILE",
    help="The page to write, for example -o swa.html; default: report.html in OUT.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace FILE if it is a report, in one step at the end."
)
@talk_options
def command(
    output: str,
    evidence: tuple[str, ...],
    page: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:  # fmt: skip
    """Write one page of everything that is known about OUT: a single HTML file.

    OUT is a model directory that ckptavg wrote, or a directory of several averages. What sweep,
    soup, tune, trajectory, plane, width, path and ensemble found is shown with its pictures, where
    it lies in OUT or in a directory in it; EVIDENCE names other directories, or JSON files. The
    page needs no network, no scripts and no other file.
    """
    from ckptavg.report import write_report

    result = write_report(output, evidence, path=page, overwrite=overwrite)
    if as_json:
        echo_json(
            {
                "output": output,
                "report": result.path,
                "sections": result.sections,
                "models": result.models,
                "evidence": result.evidence,
                "n_pictures": result.n_pictures,
                "nbytes": result.nbytes,
                "notes": result.notes,
            }
        )
        return
    echo_lines(_lines(result))
    echo_notes(result.notes, quiet=quiet)


def _lines(result: "ReportResult") -> list[str]:
    parts = [_counted(len(result.sections), "section")]
    if result.n_pictures:
        parts.append(_counted(result.n_pictures, "picture"))
    return [
        f"{result.path}: {', '.join([*parts, size(result.nbytes)])}",
        f"  {', '.join(result.sections)}",
    ]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
