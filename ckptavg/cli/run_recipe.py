"""``ckptavg run``: a command from a recipe file."""

import contextlib
import os
from pathlib import Path

import click

from ckptavg.cli.options import talk_options
from ckptavg.cli.recipes import recipe_arguments, recipe_command
from ckptavg.cli.render import echo_notes
from ckptavg.errors import UsageError
from ckptavg.processes import is_first_process
from ckptavg.recipe_file import read_recipe

_EPILOG = """\b
Examples:
  ckptavg run swa.toml
  ckptavg run recipes/swa.toml -o swa-again --device cuda:1 --dry-run
  torchrun --nproc-per-node 4 -m ckptavg run swa.toml
"""


@click.command("run", epilog=_EPILOG)
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    help="Model directory to make instead of the recipe's, for example -o swa-again.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model directory.")
@click.option(
    "--device",
    metavar="auto|cpu|cuda[:i]",
    help="Where the arithmetic runs instead, for example cuda:1; default: what the recipe says.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done; read nothing but headers.")
@talk_options
@click.pass_context
def command(
    context: click.Context,
    /,
    recipe: str,
    output: str | None,
    overwrite: bool,
    device: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Run the command that a recipe file holds, as --save-recipe writes it or you do.

    RECIPE is a TOML file: command (default: average), sources, and sections of options under
    their names: [selection], [averaging], [model], [search], [machine], [output], [push]. The
    command works in the folder of the file: paths and code are found from there.
    """
    file = Path(recipe)
    told = read_recipe(file)
    group = context.find_root().command
    if not isinstance(group, click.Group):
        raise AssertionError("the command is one of a group")
    name, chosen = recipe_command(told, recipe, group)
    folder = file.parent / told.get("directory", ".")
    if not folder.is_dir():
        raise UsageError(f"{recipe}: its directory {folder} is not there")
    is_elsewhere = not folder.samefile(Path.cwd())
    given: dict[str, str | bool] = {
        option: True
        for option, is_given in (
            ("overwrite", overwrite), ("dry-run", dry_run), ("json", as_json), ("quiet", quiet),
            ("debug", debug),
        )
        if is_given
    }  # fmt: skip
    if device is not None:
        given["device"] = device
    own = told.get("output", {}).get("output")
    if output is not None:
        given["output"] = os.path.abspath(output) if is_elsewhere else output
    elif is_elsewhere and isinstance(own, str):  # what is printed is found from here
        given["output"] = os.path.abspath(folder / own)
    arguments = recipe_arguments(told, recipe, chosen, given)
    if is_elsewhere and is_first_process():
        echo_notes([f"paths and code are found from {folder}"], quiet=quiet or as_json)
    try:
        with (
            contextlib.chdir(folder),
            chosen.make_context(name, arguments, parent=context) as inner,
        ):
            chosen.invoke(inner)
    except (click.UsageError, UsageError) as error:
        reason = error.message if isinstance(error, click.UsageError) else str(error)
        raise UsageError(f"{recipe}: {reason}") from error
