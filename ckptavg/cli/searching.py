"""What ``sweep``, ``soup`` and ``tune`` have in common on the command line."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from ckptavg.cli.model_options import model_arguments, model_options
from ckptavg.cli.options import (
    Command,
    averaging_arguments,
    averaging_options,
    combined,
    judging_options,
    machine_options,
    output_options,
    pipeline_arguments,
    push_options,
    reading_options,
    selection_arguments,
    selection_options,
    talk_options,
)
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import chosen_push, push_and_echo, typed_command
from ckptavg.cli.recipes import save_recipe, save_recipe_option
from ckptavg.cli.render import echo_plan, stdout_for_the_result
from ckptavg.cli.user_code import load_bn_pass

if TYPE_CHECKING:
    from ckptavg.prepare import Prepared
    from ckptavg.results import BnPass, SoupResult, SweepResult, TuneResult
    from ckptavg.schemes import Scheme

Found = TypeVar("Found", "SweepResult", "SoupResult", "TuneResult")


def search_options(*own: Callable[..., Any], plot: str) -> Callable[[Command], Command]:
    """Return the options of a search, its own in the middle.

    Args:
        own: Those of this command alone.
        plot: The picture that ``--plot`` adds.
    """
    return combined(
        output_options,
        push_options,
        selection_options,
        judging_options,
        *own,
        click.option(
            "--plot", is_flag=True, help=f"Add {plot}, a picture of it (extra: ckptavg[plots])."
        ),
        averaging_options,
        reading_options,
        model_options(required=False, compare=None),
        machine_options,
        click.option(
            "--dry-run", is_flag=True, help="Show what would be done; read nothing but headers."
        ),
        save_recipe_option,
        talk_options,
    )


class Told(NamedTuple):
    """What a search says at its end."""

    done: str
    lines: list[str]  # for people
    fields: dict[str, Any]  # for JSON


def run_search(
    sources: Sequence[str],
    options: dict[str, Any],
    *,
    search: Callable[..., Found],
    check: "Callable[..., BnPass]",
    tell: Callable[[Found], Told],
    schemes: "Callable[[], Sequence[Scheme]]" = lambda: (),
    several: bool = False,
    refuse: "Callable[[Prepared, BnPass], None]" = lambda prepared, evaluation: None,
) -> None:
    """Carry out a command that searches.

    Args:
        sources: As typed.
        options: What ``search_options`` gave.
        search: The function of the library, with the options that it alone has.
        check: Refuses what cannot be done, given the evaluation and ``plot``; returns the former.
        tell: Says what was found.
        schemes: What is averaged, as far as a dry run can tell; default: the mean of all.
        several: Whether several models are published.
        refuse: Refuses what cannot be done, once all is prepared.
    """
    from ckptavg.processes import is_first_process

    is_first = is_first_process()
    output, plot, as_json = (options.pop(name) for name in ("output", "plot", "as_json"))
    judging = {name: options.pop(name) for name in ("metric", "mode")}
    quiet = options.pop("quiet") or not is_first
    push = chosen_push(options, several=several, first=is_first)
    with stdout_for_the_result():
        loaded = load_bn_pass(**model_arguments(options))
    arguments = {
        **selection_arguments(options), **averaging_arguments(options),
        **pipeline_arguments(options),
    }  # fmt: skip
    evaluation = check(loaded, plot=plot)
    if is_first:
        save_recipe(options["save_recipe_as"])
    if options["dry_run"]:
        prepared = _prepared(sources, output, schemes(), evaluation, arguments, judging, refuse)
        if is_first:
            echo_plan(prepared, output, as_json=as_json, quiet=quiet)
        return
    with stdout_for_the_result(), ProgressBars(quiet=quiet or as_json) as progress:
        found = search(
            sources,
            output,
            evaluation=evaluation,
            **judging,
            plot=plot,
            **arguments,
            progress=progress,
            command=typed_command(),
        )
    if is_first:
        told = tell(found)
        metric = {"metric": found.metric, "mode": found.mode}
        push_and_echo(
            found.result, told.done, push, as_json=as_json, quiet=quiet,
            more=told.lines, json_fields={**metric, **told.fields, "files": found.files},
        )  # fmt: skip


def _prepared(
    sources: Sequence[str],
    output: str,
    schemes: "Sequence[Scheme]",
    evaluation: "BnPass",
    arguments: Mapping[str, Any],
    judging: Mapping[str, Any],
    refuse: "Callable[[Prepared, BnPass], None]",
) -> "Prepared":
    """Decide everything, and do nothing."""
    from ckptavg.average_options import Request
    from ckptavg.prepare import prepared_average
    from ckptavg.schemes import Scheme

    request = Request.of(schemes or [Scheme()], arguments, **judging)
    with (
        stdout_for_the_result(),
        prepared_average(
            sources, output, request.recipe, batchnorm=evaluation, **request.preparing
        ) as prepared,
    ):
        refuse(prepared, evaluation)
    return prepared
