"""``ckptavg sweep``: many averages from one read, each judged; the best is kept."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.options import (
    averaging_arguments,
    averaging_options,
    judging_options,
    machine_options,
    model_arguments,
    model_options,
    output_options,
    pipeline_arguments,
    push_options,
    reading_options,
    scheme_options,
    selection_arguments,
    selection_options,
    talk_options,
)
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import chosen_push, push_and_echo, typed_command
from ckptavg.cli.recipes import save_recipe, save_recipe_option
from ckptavg.cli.render import echo_plan, metrics_table, stdout_for_the_result
from ckptavg.cli.user_code import load_bn_pass

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
@output_options
@push_options
@selection_options
@scheme_options
@judging_options
@click.option(
    "--keep",
    type=click.Choice(["best", "all"]),
    default="best",
    show_default=True,
    help="What is published: the best average as OUT, or each in a directory of its own.",
)
@click.option(
    "--no-singles",
    is_flag=True,
    help="Do not judge every checkpoint by itself, only the last one, for comparison.",
)
@click.option(
    "--plot", is_flag=True, help="Add sweep.png, a picture of the table (extra: ckptavg[plots])."
)
@averaging_options
@reading_options
@model_options(required=False, compare=None)
@machine_options
@click.option("--dry-run", is_flag=True, help="Show what would be done; read nothing but headers.")
@save_recipe_option
@talk_options
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
    from ckptavg.average_options import Request
    from ckptavg.prepare import chosen_schemes, prepared_average
    from ckptavg.processes import is_first_process, started_by_torchrun
    from ckptavg.search.sweep import check_sweep, sweep

    distributed = started_by_torchrun()
    is_first = is_first_process()
    quiet = quiet or not is_first
    push = chosen_push(options, several=keep == "all", first=is_first)
    with stdout_for_the_result():
        evaluation = load_bn_pass(**model_arguments(options))
    evaluation = check_sweep(evaluation, schemes, keep, plot=plot)
    selection, recipe = selection_arguments(options), averaging_arguments(options)
    arguments = pipeline_arguments(options)
    if is_first:
        save_recipe(save_recipe_as)
    if dry_run:
        request = Request.of(
            chosen_schemes(schemes, None), {**selection, **recipe, **arguments},
            metric=metric, mode=mode,  # type: ignore[arg-type]  # click knows the choices
        )  # fmt: skip
        with (
            stdout_for_the_result(),
            prepared_average(
                sources, output, request.recipe, batchnorm=evaluation, **request.preparing
            ) as prepared,
        ):
            pass  # deciding is all
        if is_first:
            echo_plan(prepared, output, as_json=as_json, quiet=quiet)
        return
    with stdout_for_the_result(), ProgressBars(quiet=quiet or as_json) as progress:
        found = sweep(
            sources,
            output,
            schemes=schemes,
            evaluation=evaluation,
            metric=metric,
            mode=mode,  # type: ignore[arg-type]  # click knows the choices
            keep=keep,  # type: ignore[arg-type]  # likewise
            singles=not no_singles,
            plot=plot,
            **selection,
            **recipe,
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
