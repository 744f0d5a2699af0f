"""What ``sweep``, ``soup`` and ``tune`` have in common on the command line."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.options import (
    Command,
    averaging_arguments,
    averaging_options,
    combined,
    judging_options,
    machine_options,
    model_arguments,
    model_options,
    output_options,
    pipeline_arguments,
    push_options,
    reading_options,
    selection_arguments,
    selection_options,
    talk_options,
)
from ckptavg.cli.recipes import save_recipe_option
from ckptavg.cli.render import echo_plan, stdout_for_the_result
from ckptavg.cli.user_code import load_bn_pass

if TYPE_CHECKING:
    from ckptavg.prepare import Prepared
    from ckptavg.results import BnPass
    from ckptavg.schemes import Scheme


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


def taken(options: dict[str, Any]) -> "tuple[BnPass | None, dict[str, Any]]":
    """Return the evaluation, and all that ``AverageOptions`` names, out of a command's options."""
    with stdout_for_the_result():
        evaluation = load_bn_pass(**model_arguments(options))
    selection = selection_arguments(options)
    return evaluation, {**selection, **averaging_arguments(options), **pipeline_arguments(options)}


def show_plan(
    sources: Sequence[str],
    output: str,
    schemes: "Sequence[Scheme]",
    evaluation: "BnPass",
    arguments: Mapping[str, Any],
    judging: Mapping[str, Any],
    talk: Mapping[str, bool],
    refuse: "Callable[[Prepared, BnPass], None]" = lambda prepared, evaluation: None,
) -> None:
    """Do a dry run: decide everything, and print the plan.

    Args:
        sources: As typed.
        output: Likewise.
        schemes: What would be averaged.
        evaluation: From ``taken``, like the next.
        arguments: Likewise.
        judging: The metric and its mode.
        talk: Whether as JSON, whether quiet.
        refuse: Refuses what cannot be done, once all is prepared.
    """
    from ckptavg.average_options import Request
    from ckptavg.prepare import prepared_average
    from ckptavg.processes import is_first_process

    request = Request.of(schemes, arguments, **judging)
    with (
        stdout_for_the_result(),
        prepared_average(
            sources, output, request.recipe, batchnorm=evaluation, **request.preparing
        ) as prepared,
    ):
        refuse(prepared, evaluation)
    if is_first_process():
        echo_plan(prepared, output, **talk)
