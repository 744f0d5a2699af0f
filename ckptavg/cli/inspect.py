"""``ckptavg inspect``: what is in a checkpoint, from its headers."""

from typing import Any

import click

from ckptavg.cli.listing import (
    checkpoint_json,
    checkpoint_lines,
    revision_lines,
    revisions_json,
    run_json,
    run_lines,
)
from ckptavg.cli.options import (
    debug_option,
    json_option,
    metric_options,
    selection_arguments,
    selection_options,
)
from ckptavg.cli.render import echo_json, echo_lines
from ckptavg.errors import UsageError

_EPILOG = """\b
Examples:
  ckptavg inspect runs/exp7
  ckptavg inspect runs/exp7/checkpoint-500
  ckptavg inspect epoch-036.pt --state-key ema --json
  ckptavg inspect EleutherAI/pythia-160m
  ckptavg inspect EleutherAI/pythia-160m@step143000
"""


@click.command("inspect", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@click.option(
    "--state-key", metavar="KEY", help="Entry of torch files to look at, for example ema."
)
@selection_options
@metric_options
@json_option
@debug_option
def command(
    sources: tuple[str, ...], state_key: str | None, as_json: bool, debug: bool, **options: Any
) -> None:
    """Show what is there: layout, step, tensors, dtypes, shapes, sizes, metadata.

    SOURCES are as for average. Of a run directory the checkpoints in it are listed, with step,
    metrics, learning rate and size, and whether they are complete; org/name alone lists the
    revisions of a repository on the Hub. --last and the other options that select are for run
    directories; a note says what was taken and why.
    """
    from ckptavg.pipeline import hub_revisions, inspect_checkpoint, inspect_run
    from ckptavg.selection import Selection
    from ckptavg.sources import expand_sources, hub_repository

    selection = Selection(**selection_arguments(options))
    values: list[dict[str, Any]] = []
    lines: list[str] = []
    for source in sources:
        repo = hub_repository(source)
        if repo is not None:
            revisions = hub_revisions(repo)
            values.append(revisions_json(repo, revisions))
            lines += revision_lines(repo, revisions)
            continue
        for found in expand_sources(source):
            run = inspect_run(found, state_key=state_key, selection=selection)
            if run is not None:
                values.append(run_json(run))
                lines += run_lines(run)
            elif selection.is_given:
                raise UsageError(f"{selection} selects from run directories, {source} is none")
            if run is not None and not run.has_weights:
                continue
            info = inspect_checkpoint(found, state_key=state_key)
            values.append(checkpoint_json(info))
            lines += checkpoint_lines(info)
    echo_json(values) if as_json else echo_lines(lines)
