"""``ckptavg recompute-bn``: right BatchNorm statistics for one saved model."""

from typing import Any

import click

from ckptavg.cli.model_options import model_arguments, model_options
from ckptavg.cli.options import (
    checksum_option,
    machine_options,
    output_options,
    pipeline_arguments,
    push_options,
    reading_options,
    talk_options,
)
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import chosen_push, push_and_echo, typed_command
from ckptavg.cli.recipes import save_recipe, save_recipe_option
from ckptavg.cli.render import stdout_for_the_result
from ckptavg.cli.user_code import load_bn_pass

_EPILOG = """\b
Examples:
  ckptavg recompute-bn swa -o swa-bn --model my_pkg:build --data my_pkg:batches
  ckptavg recompute-bn last.pt -o fixed --model my_pkg:Net --model-arg width=64 --data my_pkg:data
  ckptavg recompute-bn swa -o swa-bn --model timm:resnet50 --data my_pkg:data --amp bfloat16
  torchrun --nproc-per-node 4 -m ckptavg recompute-bn swa -o out --model pkg:build --data pkg:data
"""


@click.command("recompute-bn", epilog=_EPILOG)
@click.argument("source", metavar="MODEL")
@output_options
@push_options
@reading_options
@model_options(required=True, compare="--compare")
@machine_options
@checksum_option
@save_recipe_option
@talk_options
def command(
    source: str,
    output: str,
    as_json: bool,
    quiet: bool,
    debug: bool,
    save_recipe_as: str | None,
    **options: Any,
) -> None:
    """Recompute the BatchNorm statistics of one saved model over batches of training data.

    MODEL is a checkpoint file or a model directory. Everything but the statistics stays bit for
    bit. The statistics are those of all samples together, exact for unequal batches.
    """
    from ckptavg.pipeline import recompute_bn
    from ckptavg.processes import is_first_process, started_by_torchrun

    distributed = started_by_torchrun()
    is_first = is_first_process()
    quiet = quiet or not is_first
    push = chosen_push(options, first=is_first)
    with stdout_for_the_result():
        batchnorm = load_bn_pass(**model_arguments(options))
    if batchnorm is None:
        raise AssertionError("--model and --data are required options")
    if is_first:
        save_recipe(save_recipe_as)
    with stdout_for_the_result(), ProgressBars(quiet=quiet or as_json) as progress:
        result = recompute_bn(
            source,
            output,
            batchnorm,
            **pipeline_arguments(options),
            distributed=distributed,
            progress=progress,
            command=typed_command(),
        )
    if not is_first:
        return
    report = result.outputs[0].batchnorm
    recomputed = report is not None and report.layers
    done = f"{source} with recomputed BatchNorm statistics" if recomputed else f"a copy of {source}"
    push_and_echo(result, done, push, as_json=as_json, quiet=quiet)
