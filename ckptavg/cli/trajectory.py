"""``ckptavg trajectory``: is this one trajectory, and is averaging going to work?"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.options import (
    machine_options,
    metric_options,
    reading_options,
    selection_arguments,
    selection_options,
    talk_options,
)
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import typed_command
from ckptavg.cli.render import echo_json, echo_lines, echo_notes, table
from ckptavg.units import size

if TYPE_CHECKING:
    from ckptavg.geometry import TrajectoryResult

_EPILOG = """\b
Examples:
  ckptavg trajectory runs/exp7
  ckptavg trajectory 'EleutherAI/pythia-160m@step{100000..143000..1000}' -o trajectory
"""
_MOST_ROWS = 40


@click.command("trajectory", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    metavar="DIR",
    help="Directory to make for trajectory.json, .csv, .png and .svg, for example -o trajectory; "
    "default: nothing is written.",
)
@click.option("--overwrite", is_flag=True, help="Replace DIR if this command wrote it.")
@click.option(
    "--no-plot",
    is_flag=True,
    help="Leave the pictures out; they need the extra ckptavg[plots].",
)
@selection_options
@metric_options
@reading_options
@machine_options
@talk_options
def command(
    sources: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    no_plot: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Compare checkpoints with each other, and say whether averaging them can work.

    One pass over the weights tells whether the checkpoints belong to one run, whether they bounce
    around a centre or move on, which lie apart, and how each layer moved. It takes no model and no
    data; how good an average is, only an evaluation tells (sweep).
    """
    from ckptavg.comparing import trajectory
    from ckptavg.selection import Selection

    selection = Selection(**selection_arguments(options))
    with ProgressBars(quiet=quiet or as_json) as progress:
        result = trajectory(
            sources,
            output,
            selection=selection,
            state_key=options["state_key"],
            strip_prefixes=options["strip_prefixes"],
            keep_prefix=options["keep_prefix"],
            device=options["device"],
            memory_budget_bytes=options["memory"],
            n_threads=options["io_threads"],
            cache=options["cache"],
            plot=not no_plot,
            overwrite=overwrite,
            progress=progress,
            command=typed_command(),
        )
    if as_json:
        echo_json(asdict(result))
        return
    echo_lines(_lines(result))
    echo_notes(result.notes, quiet=quiet)


def _lines(result: "TrajectoryResult") -> list[str]:
    saved = [point.step for point in result.checkpoints]
    when = "step"
    if not any(step is not None for step in saved):
        saved, when = [point.epoch for point in result.checkpoints], "epoch"
    rate = result.read_nbytes / max(result.seconds, 1e-9)
    lines = [
        f"{len(result.checkpoints)} checkpoints of {result.n_elements:,} weights: {result.kind}",
        *(f"  {sentence}" for sentence in result.summary),
        f"  read {size(result.read_nbytes)} at {size(rate)}/s on {result.device}",
        "",
        *_shortened(
            table(
                ["checkpoint", when, "norm", "from the mean", "from the one before", "nearest"],
                [
                    [
                        point.source,
                        "-" if time is None else str(time),
                        f"{point.norm:.5g}",
                        f"{point.deviation:.4g}",
                        "-" if point.step_length is None else f"{point.step_length:.4g}",
                        f"{point.nearest:.4g}",
                    ]
                    for point, time in zip(result.checkpoints, saved, strict=True)
                ],
            )
        ),
        "",
        *_shortened(
            table(
                ["layer", "weights", "spread/norm", "moved/norm", "taken back", "of all variance"],
                [
                    [
                        layer.name,
                        f"{layer.n_elements:,}",
                        f"{layer.spread / layer.norm:.3g}" if layer.norm else "-",
                        f"{layer.moved / layer.norm:.3g}" if layer.norm else "-",
                        "-" if layer.taken_back is None else f"{layer.taken_back:.0%}",
                        f"{layer.variance_share:.1%}",
                    ]
                    for layer in result.layers
                ],
            )
        ),
    ]
    if result.output is not None:
        lines += ["", f"{result.output}: {', '.join(result.files)}"]
    return lines


def _shortened(lines: list[str]) -> list[str]:
    """Return a table without its middle where it is long; files hold all of it."""
    if len(lines) <= _MOST_ROWS + 1:
        return lines
    half = _MOST_ROWS // 2
    left_out = len(lines) - 2 * half - 1
    return [*lines[: half + 1], f"... {left_out} more (--json, -o)", *lines[-half:]]
