"""``ckptavg average``: many checkpoints in, one model directory out."""

import sys
from typing import Any

import click

from ckptavg.cli.model_options import model_arguments, model_options
from ckptavg.cli.option_types import Coefficients
from ckptavg.cli.options import (
    averaging_arguments,
    averaging_options,
    checksum_option,
    machine_options,
    metric_options,
    output_options,
    pipeline_arguments,
    push_options,
    reading_options,
    scheme_options,
    selection_arguments,
    selection_options,
    talk_options,
)
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import chosen_push, push_and_echo, typed_command
from ckptavg.cli.recipes import save_recipe, save_recipe_option
from ckptavg.cli.render import echo_plan, stdout_for_the_result
from ckptavg.cli.schemes import echo_coefficients
from ckptavg.cli.user_code import load_bn_pass

_EPILOG = """\b
Examples:
  ckptavg average runs/exp7 --last 10 -o swa
  ckptavg average runs/exp7 --at-lr-minima --log metrics.csv -o swa
  ckptavg average epoch-{17..36}.pt -o swa --model my_pkg:build --data my_pkg:batches
  ckptavg average 'EleutherAI/pythia-160m@step{140000..143000..1000}' -o swa --push me/swa
  ckptavg average 'step{1..24}' -o averages --scheme uniform:last=5..20..5 --scheme ema:decay=0.9
  torchrun --nproc-per-node 4 -m ckptavg average runs/exp7/checkpoint-* -o swa
"""


@click.command("average", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@output_options
@push_options
@selection_options
@metric_options
@scheme_options
@click.option(
    "--coefficients",
    type=Coefficients(),
    help="One multiplier a checkpoint, in the order typed, summing to 1: 0.2,0.3,0.5; the same as "
    "--scheme coefficients:0.2,0.3,0.5.",
)
@averaging_options
@reading_options
@model_options(required=False, compare="--compare-bn")
@machine_options
@checksum_option
@click.option(
    "--check-trajectory",
    is_flag=True,
    help="Compare the checkpoints with each other along the way, and say whether they are one "
    "trajectory that averaging can help; see ckptavg trajectory.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done; read nothing but headers.")
@save_recipe_option
@talk_options
def command(
    sources: tuple[str, ...],
    output: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    save_recipe_as: str | None,
    **options: Any,
) -> None:
    """Average saved checkpoints into one model, and recompute its BatchNorm statistics.

    SOURCES are checkpoint files (safetensors, torch), checkpoint directories as trainers write
    them, run directories that hold those, globs, patterns such as step{1000..9000..1000}, and
    revisions on the Hugging Face Hub, which are streamed: org/name@revision, org/name@step*,
    org/name@main/checkpoint-500. They are ordered by training step where all tell theirs.
    """
    from ckptavg.pipeline import average_checkpoints
    from ckptavg.prepare import chosen_schemes, prepared_average
    from ckptavg.processes import is_first_process, started_by_torchrun
    from ckptavg.recipe import Recipe
    from ckptavg.selection import Selection

    distributed = started_by_torchrun()
    is_first = is_first_process()
    quiet = quiet or not is_first
    push = chosen_push(options, first=is_first)
    with stdout_for_the_result():
        batchnorm = load_bn_pass(**model_arguments(options))
    arguments = pipeline_arguments(options)
    selection = selection_arguments(options)
    schemes = chosen_schemes(options["schemes"], options["coefficients"])
    recipe = averaging_arguments(options)
    arguments |= {"batchnorm": batchnorm}
    if is_first:
        save_recipe(save_recipe_as)
    if dry_run:
        with (
            stdout_for_the_result(),
            prepared_average(
                sources,
                output,
                Recipe(schemes=schemes, **recipe),
                selection=Selection(**selection),
                **arguments,
            ) as prepared,
        ):
            pass  # deciding is all
        if is_first:
            echo_plan(prepared, output, as_json=as_json, quiet=quiet)
        return
    # where nobody watches, a run that fails says so in one line
    plans = list[Any]()
    tell_plan = echo_coefficients if sys.stderr.isatty() else plans.append
    with stdout_for_the_result(), ProgressBars(quiet=quiet or as_json) as progress:
        result = average_checkpoints(
            sources,
            output,
            **selection,
            schemes=schemes,
            **recipe,
            **arguments,
            check_trajectory=options["check_trajectory"],
            distributed=distributed,
            planned=None if quiet or as_json else tell_plan,
            progress=progress,
            command=typed_command(),
        )
    for plan in plans:
        echo_coefficients(plan)
    if is_first:
        plural = "" if result.n_checkpoints == 1 else "s"
        number = "average" if len(result.outputs) == 1 else f"{len(result.outputs)} averages"
        done = f"{number} of {result.n_checkpoints} checkpoint{plural}"
        push_and_echo(result, done, push, as_json=as_json, quiet=quiet)
