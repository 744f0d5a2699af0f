"""``ckptavg path``: loss and error along the straight line between two sets of weights."""

from dataclasses import asdict
from typing import Any

import click

from ckptavg.cli.landscapes import echo_landscape, landscape_arguments, landscape_options
from ckptavg.cli.option_types import NumberRange
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import typed_command
from ckptavg.cli.render import echo_json, stdout_for_the_result, table

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
    arguments = landscape_arguments(options)
    with stdout_for_the_result(), ProgressBars(quiet=quiet or as_json) as progress:
        found = path(
            ends[0],
            ends[1:],
            output,
            t=t,
            points=points,
            **arguments,
            progress=progress,
            command=typed_command(),
        )
    if as_json:
        echo_json({**asdict(found), "output": str(found.output)})
        return
    lines: list[str] = []
    for segment in found.segments:
        rows = [
            [f"{at:.3g}", *(f"{values[number]:.4g}" for values in segment.metrics.values())]
            for number, at in enumerate(found.t)
        ]
        lines += ["", f"to {segment.stop}", *table(["t", *segment.metrics], rows)]
    echo_landscape(found, f"{len(found.t)} points a line", lines[1:], quiet=quiet)
