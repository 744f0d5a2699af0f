"""The options of the BatchNorm pass and the evaluation: model, data, and how they run."""

from collections.abc import Callable
from typing import Any, get_args

import click

from ckptavg.bn_options import Amp, BnOptions, Estimator, TrainMode
from ckptavg.cli.option_types import KeyValue
from ckptavg.cli.options import Command, combined


def model_options(
    *, required: bool, compare: str | None, writes_models: bool = True
) -> Callable[[Command], Command]:
    """Return the options that name the user's model and data, and say how the model runs.

    Args:
        required: Whether model and data must be given.
        compare: What the flag is called that asks for the comparison; None offers none.
        writes_models: Whether there are directories for ``--eval-command`` to judge.
    """
    comparing = () if compare is None else _compare_options(compare)
    return combined(
        click.option(
            "--model", "model_name", required=required, metavar="PKG.MOD:THING",
            help="Model for the BatchNorm pass and --eval: a module, a class or a factory, for "
            "example my_pkg.models:build (the current directory is searched, too), or "
            "timm:resnet50, torchvision:resnet50, transformers:AutoModelForImageClassification.",
        ),
        click.option(
            "--model-arg", "model_arguments", multiple=True, type=KeyValue(),
            help="Argument for the class or factory, for example num_classes=10 (repeatable).",
        ),
        click.option(
            "--data", "data_name", required=required, metavar="PKG.MOD:THING",
            help="Training data for the BatchNorm pass: an iterable of batches or a factory of "
            "one, for example my_pkg.data:train_batches.",
        ),
        click.option(
            "--data-arg", "data_arguments", multiple=True, type=KeyValue(),
            help="Argument for the factory of the data, for example batch_size=256 (repeatable).",
        ),
        click.option(
            "--forward", "forward_name", metavar="PKG.MOD:FN",
            help="fn(model, batch) that runs the model on a batch, for example my_pkg:forward; "
            "default: tensors, first items of tuples, mappings as keyword arguments.",
        ),
        click.option(
            "--eval", "eval_name", metavar="PKG.MOD:FN",
            help="fn(model) that returns a metric, or several by name, of the model that is "
            "published, for example my_pkg.evals:accuracy.",
        ),
        click.option(
            "--eval-command", metavar="COMMAND", hidden=not writes_models,
            help="Command that judges a model directory and prints a number or JSON on its last "
            "line, for example 'python my_eval.py {model}'.",
        ),
        *comparing,
        click.option(
            "--batches", "max_batches", type=click.IntRange(min=1), metavar="N",
            help="Use at most N batches, for example 100; default: all.",
        ),
        click.option(
            "--samples", "max_samples", type=click.IntRange(min=1), metavar="N",
            help="Stop after the batch that reaches N samples, for example 10000; default: all.",
        ),
        click.option(
            "--until-converged", type=click.FloatRange(0, 1, min_open=True, max_open=True),
            metavar="TOL",
            help="Stop once the last tenth of the data moved no statistic by more than TOL of its "
            "spread, for example 0.01.",
        ),
        click.option(
            "--estimator", type=click.Choice(get_args(Estimator)), default=BnOptions.estimator,
            show_default=True,
            help="population: mean and variance of all samples together; paper: variances within "
            "batches, weighed by samples; torch: every batch alike, as update_bn.",
        ),
        click.option(
            "--train-mode", type=click.Choice(get_args(TrainMode)),
            default=BnOptions.train_mode, show_default=True,
            help="bn: only BatchNorm layers run in training mode; model: dropout and all do.",
        ),
        click.option(
            "--amp", type=click.Choice(get_args(Amp)),
            help="Run the model under autocast, for example bfloat16; statistics stay float64.",
        ),
        click.option(
            "--channels-last", is_flag=True,
            help="Run convolutions with channels last in memory, which is faster on GPUs.",
        ),
        click.option(
            "--compile", is_flag=True,
            help="Run the model through torch.compile, which pays for many equal batches.",
        ),
        click.option(
            "--seed", type=click.IntRange(min=0), metavar="N",
            help="Seed of the random numbers that shuffle or augment the data, for example 0.",
        ),
        click.option(
            "--allow-unreached", is_flag=True,
            help="Leave BatchNorm layers that the data never reaches as they are.",
        ),
        click.option(
            "--data-per-process", is_flag=True,
            help="Under torchrun: the data of each process is its own share already; default: "
            "all go through the same data and take turns.",
        ),
    )  # fmt: skip


def _compare_options(compare: str) -> tuple[Callable[[Command], Command], ...]:
    return (
        click.option(
            compare,
            "compare",
            is_flag=True,
            help="Show the metric for the last checkpoint, with and without a BN pass of its own, "
            "and for the average with the BN statistics of the last, averaged and recomputed.",
        ),
        click.option(
            "--last-checkpoint",
            metavar="CKPT",
            help=f"What {compare} takes for the last checkpoint, for example epoch-36.pt; default: "
            "the last one that went into the average.",
        ),
    )


_MODEL_ARGUMENTS = (
    "model_name", "model_arguments", "data_name", "data_arguments", "forward_name", "eval_name",
    "eval_command", "compare", "last_checkpoint", "max_batches", "max_samples", "until_converged",
    "estimator", "train_mode", "amp", "channels_last", "compile", "seed", "allow_unreached",
    "data_per_process",
)  # fmt: skip


def model_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Take what ``model_options`` gave out of a command's options."""
    return {name: options.pop(name) for name in _MODEL_ARGUMENTS if name in options}
