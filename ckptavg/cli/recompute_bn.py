"""``ckptavg recompute-bn``: right BatchNorm statistics for one saved model."""

from dataclasses import asdict
from typing import Any

import click

from ckptavg.cli.options import (
    machine_options,
    model_options,
    output_options,
    reading_options,
    talk_options,
)
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.render import echo_json, echo_lines, echo_notes, summary_lines
from ckptavg.cli.user_code import load_bn_pass

_EPILOG = """\b
Examples:
  ckptavg recompute-bn swa -o swa-bn --model my_pkg:build --data my_pkg:batches
  ckptavg recompute-bn last.pt -o fixed --model my_pkg:Net --model-arg width=64 --data my_pkg:data
"""


@click.command("recompute-bn", epilog=_EPILOG)
@click.argument("source", metavar="MODEL")
@output_options
@reading_options
@model_options(required=True)
@machine_options
@talk_options
def command(
    source: str, output: str, as_json: bool, quiet: bool, debug: bool, **options: Any
) -> None:
    """Recompute the BatchNorm statistics of one saved model over batches of training data.

    MODEL is a checkpoint file or a model directory. Everything but the statistics stays bit for
    bit. The statistics are those of all samples together, exact for unequal batches.
    """
    from ckptavg.pipeline import recompute_bn

    batchnorm = load_bn_pass(
        **{name: options.pop(name) for name in (
            "model_name", "model_arguments", "data_name", "data_arguments", "forward_name",
            "max_batches", "max_samples",
        )}
    )  # fmt: skip
    if batchnorm is None:
        raise AssertionError("--model and --data are required options")
    with ProgressBars(quiet=quiet or as_json) as progress:
        result = recompute_bn(
            source,
            output,
            batchnorm,
            state_key=options["state_key"],
            strip_prefixes=options["strip_prefixes"],
            device=options["device"],
            memory_budget_bytes=options["memory"],
            n_threads=options["io_threads"],
            max_shard_bytes=options["max_shard_size"],
            overwrite=options["overwrite"],
            include_code=not options["no_code"],
            progress=progress,
        )
    if as_json:
        echo_json(asdict(result))
    else:
        echo_lines(summary_lines(result, f"{source} with recomputed BatchNorm statistics"))
        echo_notes(result.notes, quiet=quiet)
