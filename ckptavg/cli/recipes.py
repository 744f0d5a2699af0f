"""Recipe files and commands: what a recipe says as arguments, and a call as a recipe.

All of it is derived from the commands' own options, so that a new one needs no more than its
section in ``ckptavg.recipe_file``.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ckptavg.cli import TYPED
from ckptavg.cli.option_types import Coefficients, KeyValue
from ckptavg.cli.options import Command
from ckptavg.errors import OutputError, UsageError, without_token
from ckptavg.recipe_file import (
    DEFAULT_COMMAND,
    SECTIONS,
    TALK,
    RecipeTable,
    argument_entry,
    did_you_mean,
    is_plain,
    plural,
    read_recipe,
    section_of,
    unknown_key,
    wrong_type,
)
from ckptavg.staging import publish_file
from ckptavg.toml_text import toml_text

_NOT_RUN = ("run", "report")  # though they have an output
_HEADER = "# Written by ckptavg --save-recipe; run it with: ckptavg run {name}\n\n"

save_recipe_option: Callable[[Command], Command] = click.option(
    "--save-recipe", "save_recipe_as", type=click.Path(dir_okay=False), metavar="FILE",
    help="Write this call into a recipe file first, for example swa.toml, for ckptavg run; with "
    "--overwrite an older recipe is replaced.",
)  # fmt: skip


# ---- a recipe as arguments


def option_key(parameter: click.Parameter) -> str:
    """Return what a recipe calls an option: its long name without dashes."""
    return max(parameter.opts, key=len).lstrip("-")


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command by their keys in a recipe."""
    return {option_key(one): one for one in command.params if isinstance(one, click.Option)}


def recipe_command(
    recipe: RecipeTable, where: str, group: click.Group
) -> tuple[str, click.Command]:
    """Return the command that a recipe runs: any that makes an output.

    Raises:
        UsageError: If there is none of that name.
    """
    context = click.Context(group)
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    runnable = {
        name: one
        for name, one in commands.items()
        if one is not None and name not in _NOT_RUN and "output" in options_of(one)
    }
    name = recipe.get("command", DEFAULT_COMMAND)
    if name not in runnable:
        near = did_you_mean(name, runnable)
        there = near or f"; there are {', '.join(runnable)}"
        raise UsageError(f"{where}: command: '{name}' is not one that a recipe runs{there}")
    return name, runnable[name]


def recipe_arguments(
    recipe: RecipeTable, where: str, command: click.Command, given: Mapping[str, str | bool]
) -> list[str]:
    """Return a recipe as the arguments of its command, each value checked by its option's type.

    Args:
        recipe: From ``read_recipe``.
        where: What messages call the file.
        command: From ``recipe_command``.
        given: What takes the place of the recipe's own: option -> text, or True for a flag.

    Raises:
        UsageError: If a key is not known, or a value does not belong there.
    """
    options = options_of(command)
    arguments, found = list[str](), set[str]()
    for section, table in recipe.items():
        if section not in SECTIONS:
            continue
        for key, value in table.items():
            option = _option_of(key, section, options, where, command)
            name = option_key(option)
            place = f"{where}: [{section}]: '{key}'"
            if name in found:
                raise UsageError(f"{place} is given twice, also as '{name}'")
            found.add(name)
            if name not in given:
                arguments += _typed_values(option, value, place, as_table=key != name)
    for name, value in given.items():
        if name not in options:
            raise UsageError(f"{where}: {command.name} has no --{name}")
        arguments.append(f"--{name}" if value is True else f"--{name}={value}")
        found.add(name)
    for name, option in options.items():
        if option.required and name not in found:
            raise UsageError(f"{where}: [{section_of(name)}]: '{name}' is missing")
    sources = recipe.get("sources", [])
    sources = [sources] if isinstance(sources, str) else sources
    if not sources:
        raise UsageError(f"{where}: 'sources' is missing: no checkpoints are named")
    return [*arguments, "--", *sources]


def _option_of(
    key: str, section: str, options: Mapping[str, click.Option], where: str, command: click.Command
) -> click.Option:
    keys = {name: option for name, option in options.items() if name in SECTIONS[section]}
    keys |= {plural(name): option for name, option in keys.items() if option.multiple}
    if key in keys:
        return keys[key]
    if any(key in (name, plural(name)) for name in SECTIONS[section]):
        near = did_you_mean(key, keys)
        raise UsageError(f"{where}: [{section}]: '{key}' is no option of {command.name}{near}")
    raise unknown_key(where, section, key, keys)


def _typed_values(option: click.Option, value: Any, place: str, *, as_table: bool) -> Iterator[str]:
    """Yield the value of a key as it would be typed."""
    name = option_key(option)
    if option.is_flag:
        if not isinstance(value, bool):
            raise wrong_type(place, value, "true or false")
        if value:
            yield f"--{name}"
        return
    if isinstance(value, dict) and isinstance(option.type, KeyValue) and as_table:
        for key, item in value.items():
            if not is_plain(item):
                raise UsageError(f"{place}: '{key}' is no value that Python can write as a literal")
        texts: list[Any] = [f"{key}={item!r}" for key, item in value.items()]
    elif option.multiple and isinstance(value, list):
        texts = value
    elif isinstance(option.type, Coefficients) and isinstance(value, list):
        texts = [",".join(_text(option, one, place) for one in value)]
    else:
        texts = [value]
    for one in texts:
        text = _text(option, one, place)
        try:
            option.type.convert(text, option, None)
        except click.BadParameter as error:
            reason = error.message.rstrip(".")
            raise UsageError(f"{place}: {reason[:1].lower()}{reason[1:]}") from error
        yield f"--{name}={text}"


def _text(option: click.Option, value: Any, place: str) -> str:
    """Return one value of an option as text; of the types that TOML has, each has its own."""
    kind = option.type
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(kind, click.types.IntParamType):
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong_type(place, value, "a whole number")
    elif isinstance(kind, click.types.FloatParamType):
        if not is_number or not math.isfinite(value):
            raise wrong_type(place, value, "a number")
    elif isinstance(kind, (click.types.StringParamType, click.Choice, click.Path, KeyValue)):
        if not isinstance(value, str):
            raise wrong_type(place, value, "text")
    elif not isinstance(value, str) and not is_number:  # a type of our own reads text
        raise wrong_type(place, value, "text or a number")
    return value if isinstance(value, str) else repr(value)


# ---- a call as a recipe


def save_recipe(path: str | None) -> None:
    """Write the call under way into a recipe file, if that is asked for.

    What has its default is left out; the file says where it works if that is not its own folder.

    Raises:
        UsageError: If a name cannot be written.
        OutputError: If the file is there and may not be replaced, or cannot be written.
    """
    if path is None:
        return
    context = click.get_current_context()
    file = Path(path)
    recipe = called_recipe(context)
    folder = os.path.relpath(os.getcwd(), file.parent)
    if folder != ".":
        recipe = {"command": recipe.pop("command"), "directory": folder, **recipe}
    text = without_token(_HEADER.format(name=file.name) + toml_text(recipe))
    overwrite = bool(context.params.get("overwrite"))

    def check() -> None:
        if os.path.lexists(file):
            _check_replaceable(file, overwrite=overwrite)

    try:
        if os.path.lexists(file):
            if file.is_file() and file.read_bytes() == text.encode("utf-8"):
                return
            check()
        publish_file(file, text.encode("utf-8"), overwrite=overwrite, check=check)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"{path}: the recipe cannot be written: {reason}") from error


def called_recipe(context: click.Context) -> RecipeTable:
    """Return the call that a command's context stands for as a recipe."""
    command = context.command
    typed, _, _ = command.make_parser(context).parse_args(list(context.meta[TYPED]))
    defaults = command.make_context(command.name, [], resilient_parsing=True).params
    sections: dict[str, RecipeTable] = {}
    sources: list[Any] = []
    for parameter in command.get_params(context):
        name = parameter.name or ""
        raw = typed.get(name)
        if isinstance(parameter, click.Argument):
            sources += [raw] if isinstance(raw, str) else raw or ()
        elif isinstance(parameter, click.Option) and name in typed:
            key = option_key(parameter)
            if key not in (*TALK, "help") and context.params[name] != defaults[name]:
                sections.setdefault(section_of(key), {}).update(_entry(parameter, raw))
    told: RecipeTable = {"command": command.name, "sources": sources}
    return told | {name: sections[name] for name in SECTIONS if name in sections}


def _entry(option: click.Option, raw: Any) -> RecipeTable:
    """Return the entry for an option that was given."""
    name = option_key(option)
    if option.is_flag:
        return {name: True}
    if isinstance(option.type, KeyValue):
        return argument_entry(name, dict(option.type.convert(one, option, None) for one in raw))
    if option.multiple:
        values = [_plain_value(option, one) for one in raw]
        return {name: values[0]} if len(values) == 1 else {plural(name): values}
    return {name: _plain_value(option, raw)}


def _plain_value(option: click.Option, text: str) -> str | int | float:
    if isinstance(option.type, click.types.IntParamType):
        return int(text)
    return float(text) if isinstance(option.type, click.types.FloatParamType) else text


def _check_replaceable(file: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{file}: is there already; pass --overwrite to replace a recipe")
    try:
        is_recipe = bool(read_recipe(file))
    except UsageError as error:
        raise OutputError(f"{file}: is no recipe, so it is not replaced") from error
    if not is_recipe:
        raise OutputError(f"{file}: is no recipe, so it is not replaced")
