"""``ckptavg soup``: checkpoints are added, best first, as long as the mean does not get worse."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import chosen_push, push_and_echo, typed_command
from ckptavg.cli.recipes import save_recipe
from ckptavg.cli.render import stdout_for_the_result, table
from ckptavg.cli.searching import search_options, show_plan, taken

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
def command(
    sources: tuple[str, ...],
    output: str,
    metric: str | None,
    mode: str | None,
    plot: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    save_recipe_as: str | None,
    **options: Any,
) -> None:
    """Make a greedy soup: average those checkpoints that help each other.

    Every checkpoint is judged by --eval or --eval-command. From the best on, each is added to the
    mean of those before, and stays if the metric does not get worse; every mean gets a BatchNorm
    pass of its own (with --model and --data). OUT is the model, with soup.json and soup.csv in it.
    A soup that was interrupted goes on from what it has when it is called again.
    """
    from ckptavg.processes import started_by_torchrun
    from ckptavg.schemes import Scheme
    from ckptavg.search.soup import check_soup, greedy_soup, refuse_soup

    push = chosen_push(options, several=False, first=True)
    evaluation, arguments = taken(options)
    evaluation = check_soup(evaluation, distributed=started_by_torchrun(), plot=plot)
    judging: dict[str, Any] = {"metric": metric, "mode": mode}
    save_recipe(save_recipe_as)
    if dry_run:
        talk = {"as_json": as_json, "quiet": quiet}
        show_plan(sources, output, [Scheme()], evaluation, arguments, judging, talk, refuse_soup)
        return
    with stdout_for_the_result(), ProgressBars(quiet=quiet or as_json) as progress:
        found = greedy_soup(
            sources,
            output,
            evaluation=evaluation,
            **judging,
            plot=plot,
            **arguments,
            progress=progress,
            command=typed_command(),
        )
    push_and_echo(
        found.result, _done(found), push, as_json=as_json, quiet=quiet,
        more=soup_lines(found), json_fields=_json_fields(found),
    )  # fmt: skip


def _done(found: "SoupResult") -> str:
    n_accepted = sum(step.accepted for step in found.steps)
    return (
        f"greedy soup of {n_accepted} out of {len(found.steps)} checkpoints by {found.metric} "
        f"({found.mode})"
    )


def soup_lines(found: "SoupResult") -> list[str]:
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


def _json_fields(found: "SoupResult") -> dict[str, Any]:
    return {
        "metric": found.metric,
        "mode": found.mode,
        "steps": [asdict(step) for step in found.steps],
        "files": found.files,
    }
