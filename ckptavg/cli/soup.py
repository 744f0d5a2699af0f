"""``ckptavg soup``: checkpoints are added, best first, as long as the mean does not get worse."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.render import table
from ckptavg.cli.searching import Told, run_search, search_options

if TYPE_CHECKING:
    from ckptavg.results import SoupResult

_EPILOG = """\b
Examples:
  ckptavg soup runs/exp7 -o soup --model my_pkg:build --data my_pkg:batches --eval my_pkg:validate
  ckptavg soup 'runs/seed-*/final' -o soup --eval-command 'python evaluate.py {model}' --mode max
"""


@click.command("soup", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@search_options(plot="soup.png")
def command(sources: tuple[str, ...], **options: Any) -> None:
    """Make a greedy soup: average those checkpoints that help each other.

    Every checkpoint is judged by --eval or --eval-command. From the best on, each is added to the
    mean of those before, and stays if the metric does not get worse; every mean gets a BatchNorm
    pass of its own (with --model and --data). OUT is the model, with soup.json and soup.csv in it.
    A soup that was interrupted goes on from what it has when it is called again.
    """
    from ckptavg.search.soup import check_soup, greedy_soup, refuse_soup

    run_search(
        sources, options, search=greedy_soup, check=check_soup, tell=_told, refuse=refuse_soup
    )


def _told(found: "SoupResult") -> Told:
    n_accepted = sum(step.accepted for step in found.steps)
    return Told(
        f"greedy soup of {n_accepted} out of {len(found.steps)} checkpoints by {found.metric} "
        f"({found.mode})",
        _lines(found),
        {"steps": [asdict(step) for step in found.steps]},
    )


def _lines(found: "SoupResult") -> list[str]:
    """Return the table of a soup: what was tried, in order."""
    rows = [
        [
            f"  {step.candidate}",
            f"{step.metrics[found.metric]:.6g}",
            f"{step.mean_metrics[found.metric]:.6g}",
            "accepted" if step.accepted else "rejected",
        ]
        for step in found.steps
    ]
    return table(["  candidate, best first", f"{found.metric} alone", "of the mean", ""], rows)
