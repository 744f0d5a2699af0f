"""``ckptavg ensemble``: checkpoints as an ensemble, against the average of their weights."""

from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import click

from ckptavg.cli.landscapes import landscape_options, run_landscape
from ckptavg.cli.render import table
from ckptavg.ensemble_results import Members, Order

if TYPE_CHECKING:
    from ckptavg.ensemble_results import EnsembleResult, LoaderComparison, Scores

_EPILOG = """\b
Examples:
  ckptavg ensemble runs/exp7 --last 20 -o ens --model m:net --data m:train --loader test=m:test
  ckptavg ensemble runs/lm -o ens --model m:gpt --loader val=m:batches --order newest --no-plot
"""


@click.command("ensemble", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@landscape_options(
    click.option(
        "--members",
        type=click.Choice(get_args(Members)),
        default="stored",
        show_default=True,
        help="BatchNorm statistics of the members: those they were stored with, or recomputed "
        "ones, as the average has.",
    ),
    click.option(
        "--order",
        type=click.Choice(get_args(Order)),
        default="oldest",
        show_default=True,
        help="Which checkpoint comes first where the first 1, 2, ... are looked at.",
    ),
    example="ensemble",
)
def command(
    sources: tuple[str, ...],
    output: str,
    members: Members,
    order: Order,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Compare an ensemble of saved checkpoints with the average of their weights.

    The ensemble predicts the mean of its members' probabilities, at the cost of all of them; the
    average predicts once. For the first 1, 2, ... checkpoints both are measured on every --loader:
    accuracy, likelihood, calibration, and on how many labels they agree. Each average gets a
    BatchNorm pass (with --data). DIR gets ensemble.json, ensemble.csv and pictures.
    """
    from ckptavg.landscape.ensemble import ensemble

    run_landscape(
        partial(ensemble, sources, output, members=members, order=order),
        options,
        as_json=as_json,
        quiet=quiet,
        tell=_lines,
        needs_loader=True,
    )


def _lines(found: "EnsembleResult") -> list[str]:
    """Return what is told to people."""
    n_members = len(found.members)
    lines = [
        f"{found.output}: {n_members} checkpoints as an ensemble and as an average, "
        f"{found.seconds:.2f} s on {found.device}"
    ]
    for one in found.loaders:
        lines += table(
            [f"  {one.name}", "accuracy", "NLL", "ECE", "same as average"],
            _rows(found, one),
        )
    lines += [f"  {sentence}" for sentence in found.summary]
    return [*lines, f"  files: {', '.join(found.files)}"]


def _rows(found: "EnsembleResult", one: "LoaderComparison") -> list[list[str]]:
    n_members, newest = len(found.members), found.newest
    members = " + BN pass" if found.bn_statistics == "recomputed" else ""
    average = "" if found.bn_statistics is None else " + BN pass"
    agreements = one.member_agreements
    return [
        _row(f"last checkpoint{members}", one.members[newest], agreements[newest]),
        _row(
            f"a checkpoint{members}, mean of {n_members}",
            one.mean_member,
            sum(agreements) / n_members,
        ),
        _row(f"ensemble of {n_members}", one.ensembles[-1], one.agreements[-1]),
        _row(f"average of {n_members}{average}", one.averages[-1], None),
    ]


def _row(name: str, scores: "Scores", agreement: float | None) -> list[str]:
    return [
        f"    {name}",
        f"{scores.accuracy:.2f} %",
        f"{scores.nll:.4f} nats",
        f"{scores.ece:.2f} %",
        "-" if agreement is None else f"{agreement:.2f} %",
    ]
