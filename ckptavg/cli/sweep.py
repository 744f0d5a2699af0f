"""``ckptavg sweep``: many averages from one read, each judged; the best is kept."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.options import scheme_options
from ckptavg.cli.render import metrics_table
from ckptavg.cli.searching import Told, run_search, search_options

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
    sources: tuple[str, ...], schemes: tuple[str, ...], keep: str, no_singles: bool, **options: Any
) -> None:
    """Try many averages of saved checkpoints, judge each, and keep the best.

    One pass over the checkpoints makes all averages. Each gets a BatchNorm pass of its own (with
    --model and --data) and is judged by --eval or --eval-command; so are the last checkpoint and
    every single one, as they are and with a BatchNorm pass. OUT is the best average, with
    sweep.json and sweep.csv in it. Judge on validation data: what wins looks better than it is.
    """
    from ckptavg.prepare import chosen_schemes
    from ckptavg.processes import started_by_torchrun
    from ckptavg.search.sweep import check_sweep, sweep

    run_search(
        sources,
        options,
        search=partial(
            sweep,
            schemes=schemes,
            keep=keep,  # type: ignore[arg-type]  # click knows the choices
            singles=not no_singles,
            distributed=started_by_torchrun(),
        ),
        check=partial(check_sweep, schemes=schemes, keep=keep),
        tell=_told,
        schemes=lambda: chosen_schemes(schemes, None),
        several=keep == "all",
    )


def _told(found: "SweepResult") -> Told:
    """Say what was best, with the table: averages best first, then what they are compared with."""
    from ckptavg.metrics import Judge
    from ckptavg.search.evidence import told_rows

    averages = [row for row in found.rows if row.kind == "average"]
    plural = "" if len(averages) == 1 else "s"
    rows = told_rows(found.rows, Judge(found.metric, found.mode))
    return Told(
        f"{found.best}, the best of {len(averages)} average{plural} of "
        f"{found.result.n_checkpoints} checkpoints by {found.metric} ({found.mode})",
        metrics_table("  average", [(row.name, row.metrics) for row in rows]),
        {"best": found.best, "rows": [asdict(row) for row in found.rows]},
    )
