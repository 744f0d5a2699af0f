"""``ckptavg path``: loss and error along the straight line between two sets of weights."""

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.landscapes import landscape_lines, landscape_options, run_landscape
from ckptavg.cli.option_types import NumberRange
from ckptavg.cli.render import table

if TYPE_CHECKING:
    from ckptavg.landscape_results import PathResult

_EPILOG = """\b
Examples:
  ckptavg path swa sgd.pt -o path --model m:net --data m:train --loader test=m:test
  ckptavg path swa last.pt other-seed.pt -o path --t 0:1 --points 11 --model m:net --eval m:val
"""


@click.command("path", epilog=_EPILOG)
@click.argument("ends", nargs=-1, required=True, metavar="FROM TO...")
@landscape_options(
    click.option(
        "--t",
        "t",
        type=NumberRange(),
        default="-1:1.5",
        show_default=True,
        help="Where the line begins and ends: 0 is FROM, 1 is TO, for example 0:1.",
    ),
    click.option(
        "--points",
        type=click.IntRange(min=2),
        default=26,
        show_default=True,
        metavar="N",
        help="Points along each line, for example 11; FROM and TO are always among them.",
    ),
    example="path",
    selects=False,
)
def command(
    ends: tuple[str, ...],
    output: str,
    t: tuple[float, float],
    points: int,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Measure loss and error along the straight line from one set of weights to another.

    As in Figure 5 of the SWA paper, from SWA to SGD and beyond both: w(t) = (1 - t) FROM + t TO,
    with BatchNorm statistics recomputed at every point (with --data). Several TO give a line each.
    DIR gets path.json, path.csv and pictures. An interrupted run is continued by the same command.
    """
    from ckptavg.landscape.path import path

    if len(ends) < 2:
        raise click.UsageError("TO is missing: name at least two checkpoints")
    run_landscape(
        partial(path, ends[0], ends[1:], output, t=t, points=points),
        options,
        as_json=as_json,
        quiet=quiet,
        tell=_lines,
    )


def _lines(found: "PathResult") -> list[str]:
    """Return what is told to people."""
    lines: list[str] = []
    for segment in found.segments:
        rows = [
            [f"{at:.3g}", *(f"{values[number]:.4g}" for values in segment.metrics.values())]
            for number, at in enumerate(found.t)
        ]
        lines += ["", f"to {segment.stop}", *table(["t", *segment.metrics], rows)]
    return landscape_lines(found, f"{len(found.t)} points a line", lines[1:])
