"""``ckptavg tune``: coefficients searched by the user's metric."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.render import metrics_table
from ckptavg.cli.searching import Told, run_search, search_options

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
def command(sources: tuple[str, ...], trials: int, search_seed: int, **options: Any) -> None:
    """Search the coefficients of an average by a metric (extra: ckptavg[tune]).

    CMA-ES tries coefficients that are not negative and sum to 1, the uniform mean first; each
    generation is one read of the checkpoints, and each average gets a BatchNorm pass of its own
    (with --model and --data). OUT is the best, with tune.json and tune.csv in it. So many numbers
    fitted to a validation set fit its noise, too: keep a test set aside.
    """
    from ckptavg.search.tune import check_tune, tune

    run_search(
        sources,
        options,
        search=partial(tune, trials=trials, seed=search_seed),
        check=partial(check_tune, trials=trials),
        tell=_told,
    )


def _told(found: "TuneResult") -> Told:
    comparison = [(row.name, row.metrics) for row in found.result.outputs[0].comparison[1:]]
    rows = [("tuned", found.best.metrics), ("uniform mean", found.trials[0].metrics), *comparison]
    return Told(
        f"the best of {len(found.trials)} averages by {found.metric} ({found.mode}), coefficients "
        + ", ".join(f"{one:.3g}" for one in found.best.coefficients),
        metrics_table("  average", rows),
        {"best": asdict(found.best), "trials": [asdict(trial) for trial in found.trials]},
    )
