"""``ckptavg inspect``: what is in a checkpoint, from its headers."""

import click

from ckptavg.cli.render import checkpoint_json, checkpoint_lines, echo_json, echo_lines

_EPILOG = """\b
Examples:
  ckptavg inspect runs/exp7/checkpoint-500
  ckptavg inspect epoch-036.pt --state-key ema --json
"""


@click.command("inspect", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@click.option(
    "--state-key", metavar="KEY", help="Entry of torch files to look at, for example ema."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(sources: tuple[str, ...], state_key: str | None, as_json: bool, debug: bool) -> None:
    """Show what is there: layout, step, tensors, dtypes, shapes, sizes, metadata."""
    from ckptavg.pipeline import inspect_checkpoint
    from ckptavg.sources import expand_sources

    infos = [inspect_checkpoint(path, state_key=state_key) for path in expand_sources(sources)]
    if as_json:
        echo_json([checkpoint_json(info) for info in infos])
        return
    for info in infos:
        echo_lines(checkpoint_lines(info))
