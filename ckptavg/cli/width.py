"""``ckptavg width``: loss and error along random rays from solutions."""

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.landscapes import landscape_lines, landscape_options, run_landscape
from ckptavg.cli.render import table

if TYPE_CHECKING:
    from ckptavg.landscape_results import WidthResult

_EPILOG = """\b
Examples:
  ckptavg width swa=swa last=epoch-36.pt -o width --model m:net --data m:train --loader test=m:test
  ckptavg width swa sgd.pt -o width --directions filter --rays 5 --model m:net --eval m:val_loss
"""


@click.command("width", epilog=_EPILOG)
@click.argument("solutions", nargs=-1, required=True, metavar="[NAME=]CKPT...")
@landscape_options(
    click.option(
        "--directions",
        type=click.Choice(["sphere", "filter", "both"]),
        default="both",
        show_default=True,
        help="Random directions, uniform on the sphere of all parameters, or filter-normalised: "
        "each filter as long as the solution's; biases and norms are left out of those.",
    ),
    click.option(
        "--rays",
        type=click.IntRange(min=1),
        default=10,
        show_default=True,
        metavar="N",
        help="Directions of each kind, for example 5; the same for all solutions.",
    ),
    click.option(
        "--points",
        type=click.IntRange(min=2),
        default=11,
        show_default=True,
        metavar="N",
        help="Points along each ray, for example 21.",
    ),
    click.option(
        "--distance",
        type=click.FloatRange(min=0, min_open=True),
        metavar="D",
        help="How far rays on the sphere go, for example 10; default: 1.5 times the distance "
        "between the solutions.",
    ),
    click.option(
        "--relative",
        type=click.FloatRange(min=0, min_open=True),
        default=0.5,
        show_default=True,
        metavar="R",
        help="How far filter-normalised rays go, in norms of the filters, for example 1.",
    ),
    click.option(
        "--ray-seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Seed of the first direction, for example 100; each further one adds 1.",
    ),
    example="width",
    selects=False,
)
def command(
    solutions: tuple[str, ...],
    output: str,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Measure how loss and error rise along random rays from one or several solutions.

    As in Figure 4 of the SWA paper: BatchNorm statistics are recomputed at every point (with
    --data). Solutions are checkpoints, such as an average, the last iterate and a run of its own;
    NAME is what pictures call them. DIR gets width.json, width.csv and pictures. An interrupted run
    is continued by the same command.
    """
    from ckptavg.landscape.width import width

    own = {
        name: options.pop(name)
        for name in ("directions", "rays", "points", "distance", "relative", "ray_seed")
    }
    run_landscape(
        partial(width, _named(solutions), output, **own),
        options,
        as_json=as_json,
        quiet=quiet,
        tell=partial(_lines, n_rays=own["rays"]),
    )


def _lines(found: "WidthResult", n_rays: int) -> list[str]:
    """Return what is told to people."""
    lines: list[str] = []
    for kind, places in found.distances.items():
        rows = [
            [f"{name}: {metric}", *(f"{value:.4g}" for value in values)]
            for name, metrics in found.means[kind].items()
            for metric, values in metrics.items()
        ]
        header = [f"mean of the rays ({kind}), at", *(f"{place:.3g}" for place in places)]
        lines += ["", *table(header, rows)]
    return landscape_lines(found, f"{n_rays} rays of each kind", lines[1:])


def _named(solutions: tuple[str, ...]) -> dict[str, str]:
    """Return the solutions by name; those without one are called as they are typed."""
    named: dict[str, str] = {}
    for one in solutions:
        name, equals, source = one.partition("=")
        if not equals or "/" in name:
            name, source = one, one
        if name in named:
            raise click.UsageError(
                f"two solutions are called '{name}': give each a name of its own"
            )
        if not source:
            raise click.UsageError(f"'{one}' names no checkpoint")
        named[name] = source
    return named
