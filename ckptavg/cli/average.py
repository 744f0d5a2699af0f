"""``ckptavg average``: many checkpoints in, one model directory out."""

from dataclasses import asdict
from typing import Any

import click

from ckptavg.cli.options import (
    Coefficients,
    machine_options,
    model_options,
    output_options,
    reading_options,
    talk_options,
)
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.render import (
    echo_json,
    echo_lines,
    echo_notes,
    plan_json,
    plan_lines,
    summary_lines,
)
from ckptavg.cli.user_code import load_bn_pass

_EPILOG = """\b
Examples:
  ckptavg average runs/exp7/checkpoint-* -o swa
  ckptavg average epoch-{17..36}.pt -o swa --model my_pkg:build --data my_pkg:batches
"""


@click.command("average", epilog=_EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCES...")
@output_options
@click.option(
    "--coefficients",
    type=Coefficients(),
    help="One multiplier a checkpoint, in the order typed, summing to 1: 0.2,0.3,0.5; default: "
    "the uniform mean.",
)
@click.option(
    "--accumulate",
    type=click.Choice(["auto", "float32", "float64"]),
    default="auto",
    show_default=True,
    help="dtype of the sums; auto is float64 for float32 inputs, float32 for 16-bit ones.",
)
@click.option(
    "--dtype",
    type=click.Choice(["same", "float64", "float32", "bfloat16", "float16"]),
    default="same",
    show_default=True,
    help="dtype of averaged tensors, for example bfloat16.",
)
@click.option(
    "--buffers",
    type=click.Choice(["last", "first", "refuse"]),
    default="last",
    show_default=True,
    help="Which checkpoint gives integer and bool tensors that differ.",
)
@click.option(
    "--allow-nonfinite", is_flag=True, help="Keep infinity and NaN instead of refusing them."
)
@reading_options
@model_options(required=False)
@machine_options
@click.option("--dry-run", is_flag=True, help="Show what would be done; read nothing but headers.")
@talk_options
def command(
    sources: tuple[str, ...],
    output: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Average saved checkpoints into one model, and recompute its BatchNorm statistics.

    SOURCES are checkpoint files (safetensors, torch), model directories, globs, and patterns such
    as step{1000..9000..1000}. They are ordered by training step where all tell theirs.
    """
    from ckptavg.pipeline import average_checkpoints, prepared_average
    from ckptavg.recipe import Recipe

    batchnorm = load_bn_pass(
        **{name: options.pop(name) for name in (
            "model_name", "model_arguments", "data_name", "data_arguments", "forward_name",
            "max_batches", "max_samples",
        )}
    )  # fmt: skip
    reading = {
        "state_key": options["state_key"],
        "strip_prefixes": options["strip_prefixes"],
        "device": options["device"],
        "memory_budget_bytes": options["memory"],
        "n_threads": options["io_threads"],
        "max_shard_bytes": options["max_shard_size"],
    }
    recipe = {
        name: options[name]
        for name in ("coefficients", "accumulate", "dtype", "buffers", "allow_nonfinite")
    }
    if dry_run:
        with prepared_average(
            sources,
            output,
            Recipe(**recipe),
            **reading,
            overwrite=options["overwrite"],
            runs_model=batchnorm is not None,
        ) as prepared:
            if as_json:
                echo_json(plan_json(prepared, output))
            else:
                echo_lines(plan_lines(prepared, output))
                echo_notes(prepared.plan.notes, quiet=quiet)
        return
    with ProgressBars(quiet=quiet or as_json) as progress:
        result = average_checkpoints(
            sources,
            output,
            **recipe,
            **reading,
            batchnorm=batchnorm,
            overwrite=options["overwrite"],
            include_code=not options["no_code"],
            progress=progress,
        )
    if as_json:
        echo_json(asdict(result))
    else:
        echo_lines(summary_lines(result, f"average of {result.n_checkpoints} checkpoints"))
        echo_notes(result.notes, quiet=quiet)
