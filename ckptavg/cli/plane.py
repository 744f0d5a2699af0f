"""``ckptavg plane``: loss and error on a plane through checkpoints."""

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.landscapes import landscape_lines, landscape_options, run_landscape
from ckptavg.cli.render import table

if TYPE_CHECKING:
    from ckptavg.landscape_results import PlaneResult

_EPILOG = """\b
Examples:
  ckptavg plane runs/exp7 --last 20 -o plane --model m:net --data m:train --loader test=m:test
  ckptavg plane runs/exp7 -o plane --through pca --mark sgd.pt --model m:net --eval m:losses
"""


@click.command("plane", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@landscape_options(
    click.option(
        "--through",
        multiple=True,
        metavar="POINT",
        help="What the plane goes through: three of first, middle, last, mean (of SOURCES) and "
        "further checkpoints, given three times (the four words also with commas); or pca, for "
        "example --through pca: the mean and the first two principal components. Default: "
        "first,middle,last.",
    ),
    click.option(
        "--mark",
        "marks",
        multiple=True,
        metavar="CKPT",
        help="A further checkpoint to show on the plane, for example --mark sgd.pt (repeatable).",
    ),
    click.option(
        "--points",
        type=click.IntRange(min=2),
        default=21,
        show_default=True,
        metavar="N",
        help="Grid points along each side, for example 31.",
    ),
    click.option(
        "--margin",
        type=click.FloatRange(min=0),
        default=0.2,
        show_default=True,
        metavar="SHARE",
        help="How far the grid goes beyond what is shown, for example 0.5.",
    ),
)
def command(
    sources: tuple[str, ...],
    output: str,
    through: tuple[str, ...],
    marks: tuple[str, ...],
    points: int,
    margin: float,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Measure loss and error on a plane through checkpoints, and show where all others lie.

    As in Figures 1 and 3 of the SWA paper: BatchNorm statistics are recomputed at every point (with
    --data), all SOURCES and their mean are projected, with their distance from the plane. DIR gets
    plane.json, plane.csv and pictures. An interrupted run is continued by the same command.
    """
    from ckptavg.landscape.plane import plane

    corners = [part for one in through for part in _parts(one)]
    run_landscape(
        partial(
            plane,
            sources,
            output,
            through=corners or ("first", "middle", "last"),
            marks=marks,
            points=points,
            margin=margin,
        ),
        options,
        as_json=as_json,
        quiet=quiet,
        tell=_lines,
    )


def _lines(found: "PlaneResult") -> list[str]:
    """Return what is told to people."""
    rows = [
        [
            mark.name,
            mark.kind,
            f"{mark.x:.4g}",
            f"{mark.y:.4g}",
            f"{mark.off_plane:.4g}",
            *(
                "-" if values is None else f"{values[metric]:.4g}"
                for metric in found.metrics
                for values in (mark.metrics or mark.surface,)
            ),
        ]
        for mark in found.marks
    ]
    header = ["seen from the plane", "as", "x", "y", "off it", *found.metrics]
    what = f"{len(found.x)} x {len(found.y)} points"
    return landscape_lines(found, what, table(header, rows))


def _parts(text: str) -> list[str]:
    """Return the parts of ``first,middle,last``; a path is one, whatever is in it."""
    parts = text.split(",")
    return parts if set(parts) <= {"first", "middle", "last", "mean"} else [text]
