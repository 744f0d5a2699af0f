"""``ckptavg sweep``: many averages from one read, each judged; the best is kept."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.options import scheme_options
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import chosen_push, push_and_echo, typed_command
from ckptavg.cli.recipes import save_recipe
from ckptavg.cli.render import metrics_table, stdout_for_the_result
from ckptavg.cli.searching import search_options, show_plan, taken

if TYPE_CHECKING:
    from ckptavg.results import SweepResult

_EPILOG = """\b
Examples:
  ckptavg sweep runs/exp7 -o best --scheme uniform:last=1..20 --eval-command 'python ev.py {model}'
  ckptavg sweep runs/exp7 -o best --scheme uniform --scheme ema:decay=0.9 --model m:net --eval m:val
  ckptavg sweep runs/exp7 -o b --scheme uniform:last=2..9 --model m:net --data m:data --eval m:val
"""


@click.command("sweep", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@search_options(
    scheme_options,
    click.option(
        "--keep",
        type=click.Choice(["best", "all"]),
        default="best",
        show_default=True,
        help="What is published: the best average as OUT, or each in a directory of its own.",
    ),
    click.option(
        "--no-singles",
        is_flag=True,
        help="Do not judge every checkpoint by itself, only the last one, for comparison.",
    ),
    plot="sweep.png",
)
def command(
    sources: tuple[str, ...],
    output: str,
    schemes: tuple[str, ...],
    metric: str | None,
    mode: str | None,
    keep: str,
    no_singles: bool,
    plot: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    save_recipe_as: str | None,
    **options: Any,
) -> None:
    """Try many averages of saved checkpoints, judge each, and keep the best.

    One pass over the checkpoints makes all averages. Each gets a BatchNorm pass of its own (with
    --model and --data) and is judged by --eval or --eval-command; so are the last checkpoint and
    every single one, as they are and with a BatchNorm pass. OUT is the best average, with
    sweep.json and sweep.csv in it. Judge on validation data: what wins looks better than it is.
    """
    from ckptavg.prepare import chosen_schemes
    from ckptavg.processes import is_first_process, started_by_torchrun
    from ckptavg.search.sweep import check_sweep, sweep

    distributed = started_by_torchrun()
    is_first = is_first_process()
    quiet = quiet or not is_first
    push = chosen_push(options, several=keep == "all", first=is_first)
    evaluation, arguments = taken(options)
    evaluation = check_sweep(evaluation, schemes, keep, plot=plot)
    judging: dict[str, Any] = {"metric": metric, "mode": mode}
    if is_first:
        save_recipe(save_recipe_as)
    if dry_run:
        talk = {"as_json": as_json, "quiet": quiet}
        chosen = chosen_schemes(schemes, None)
        show_plan(sources, output, chosen, evaluation, arguments, judging, talk)
        return
    with stdout_for_the_result(), ProgressBars(quiet=quiet or as_json) as progress:
        found = sweep(
            sources,
            output,
            schemes=schemes,
            evaluation=evaluation,
            **judging,
            keep=keep,  # type: ignore[arg-type]  # click knows the choices
            singles=not no_singles,
            plot=plot,
            **arguments,
            distributed=distributed,
            progress=progress,
            command=typed_command(),
        )
    if is_first:
        push_and_echo(
            found.result, _done(found), push, as_json=as_json, quiet=quiet,
            more=sweep_lines(found), json_fields=_json_fields(found),
        )  # fmt: skip


def _done(found: "SweepResult") -> str:
    averages = [row for row in found.rows if row.kind == "average"]
    plural = "" if len(averages) == 1 else "s"
    return (
        f"{found.best}, the best of {len(averages)} average{plural} of "
        f"{found.result.n_checkpoints} checkpoints by {found.metric} ({found.mode})"
    )


def sweep_lines(found: "SweepResult") -> list[str]:
    """Return the table of a sweep: averages best first, then what they are compared with."""
    from ckptavg.metrics import Judge
    from ckptavg.search.evidence import told_rows

    rows = told_rows(found.rows, Judge(found.metric, found.mode))
    return metrics_table("  average", [(row.name, row.metrics) for row in rows])


def _json_fields(found: "SweepResult") -> dict[str, Any]:
    return {
        "metric": found.metric,
        "mode": found.mode,
        "best": found.best,
        "rows": [asdict(row) for row in found.rows],
        "files": found.files,
    }
