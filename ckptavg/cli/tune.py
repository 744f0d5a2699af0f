"""``ckptavg tune``: coefficients searched by the user's metric."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import chosen_push, push_and_echo, typed_command
from ckptavg.cli.recipes import save_recipe
from ckptavg.cli.render import metrics_table, stdout_for_the_result
from ckptavg.cli.searching import search_options, show_plan, taken

if TYPE_CHECKING:
    from ckptavg.results import TuneResult

_EPILOG = """\b
Examples:
  ckptavg tune runs/exp7 --last 8 -o tuned --model m:net --data m:data --eval m:validate --trials 40
  ckptavg tune runs/exp7 --last 5 -o tuned --eval-command 'python evaluate.py {model}' --mode max
"""


@click.command("tune", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@search_options(
    click.option(
        "--trials",
        type=click.IntRange(min=2),
        default=64,
        show_default=True,
        metavar="N",
        help="How many averages are tried at most, for example 40.",
    ),
    click.option(
        "--search-seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        metavar="N",
        help="Seed of the optimiser, for example 1.",
    ),
    plot="tune.png",
)
def command(
    sources: tuple[str, ...],
    output: str,
    metric: str | None,
    mode: str | None,
    trials: int,
    search_seed: int,
    plot: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    save_recipe_as: str | None,
    **options: Any,
) -> None:
    """Search the coefficients of an average by a metric (extra: ckptavg[tune]).

    CMA-ES tries coefficients that are not negative and sum to 1, the uniform mean first; each
    generation is one read of the checkpoints, and each average gets a BatchNorm pass of its own
    (with --model and --data). OUT is the best, with tune.json and tune.csv in it. So many numbers
    fitted to a validation set fit its noise, too: keep a test set aside.
    """
    from ckptavg.processes import started_by_torchrun
    from ckptavg.schemes import Scheme
    from ckptavg.search.tune import check_tune, tune

    push = chosen_push(options, several=False, first=True)
    evaluation, arguments = taken(options)
    evaluation = check_tune(evaluation, trials, distributed=started_by_torchrun(), plot=plot)
    judging: dict[str, Any] = {"metric": metric, "mode": mode}
    save_recipe(save_recipe_as)
    if dry_run:
        talk = {"as_json": as_json, "quiet": quiet}
        show_plan(sources, output, [Scheme()], evaluation, arguments, judging, talk)
        return
    with stdout_for_the_result(), ProgressBars(quiet=quiet or as_json) as progress:
        found = tune(
            sources,
            output,
            evaluation=evaluation,
            **judging,
            trials=trials,
            seed=search_seed,
            plot=plot,
            **arguments,
            progress=progress,
            command=typed_command(),
        )
    push_and_echo(
        found.result, _done(found), push, as_json=as_json, quiet=quiet,
        more=_lines(found), json_fields=_json_fields(found),
    )  # fmt: skip


def _done(found: "TuneResult") -> str:
    return (
        f"the best of {len(found.trials)} averages by {found.metric} ({found.mode}), coefficients "
        + ", ".join(f"{one:.3g}" for one in found.best.coefficients)
    )


def _lines(found: "TuneResult") -> list[str]:
    comparison = [(row.name, row.metrics) for row in found.result.outputs[0].comparison[1:]]
    rows = [("tuned", found.best.metrics), ("uniform mean", found.trials[0].metrics), *comparison]
    return metrics_table("  average", rows)


def _json_fields(found: "TuneResult") -> dict[str, Any]:
    return {
        "metric": found.metric,
        "mode": found.mode,
        "best": asdict(found.best),
        "trials": [asdict(trial) for trial in found.trials],
        "files": found.files,
    }
