"""``pkg.mod:thing`` on the command line -> the user's object, found as Python finds it."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckptavg.errors import ModelError

if TYPE_CHECKING:
    from ckptavg.results import BnPass

Arguments = Sequence[tuple[str, Any]]


def load_thing(name: str, option: str) -> Any:
    """Import ``pkg.mod:thing``; the current directory is searched first.

    Raises:
        ModelError: If there is no such module or attribute, or importing it fails.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise click.UsageError(f"{option}: '{name}' is not of the form pkg.mod:thing")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        thing = importlib.import_module(module_name)
        for part in attribute.split("."):
            thing = getattr(thing, part)
    except (Exception, SystemExit) as error:  # a script without a main guard may call sys.exit
        raise ModelError(
            f"{option} {name}: cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return thing


def load_bn_pass(
    *,
    model_name: str | None,
    model_arguments: Arguments,
    data_name: str | None,
    data_arguments: Arguments,
    forward_name: str | None,
    max_batches: int | None,
    max_samples: int | None,
) -> "BnPass | None":
    """Build the BatchNorm pass that the options ask for; None if they name no model.

    Raises:
        click.UsageError: If options are given that need others.
        ModelError: If something named cannot be imported or is of the wrong kind.
    """
    if model_name is None and data_name is None:
        for option, value in (
            ("--model-arg", model_arguments), ("--data-arg", data_arguments),
            ("--forward", forward_name), ("--batches", max_batches), ("--samples", max_samples),
        ):  # fmt: skip
            if value:
                raise click.UsageError(f"{option} needs --model and --data")
        return None
    if model_name is None or data_name is None:
        raise click.UsageError("--model and --data belong together: the BatchNorm pass needs both")

    from torch import nn

    from ckptavg.results import BnPass

    model = load_thing(model_name, "--model")
    if isinstance(model, nn.Module):
        if model_arguments:
            raise click.UsageError(f"--model-arg: {model_name} is a module already, not a factory")
    elif not callable(model):
        raise ModelError(f"--model {model_name}: is a {type(model).__name__}, expected a model")
    else:
        model = partial(model, **dict(model_arguments))
    batches = load_thing(data_name, "--data")
    if callable(batches) and not isinstance(batches, Iterable):
        batches = partial(batches, **dict(data_arguments))
    elif not isinstance(batches, Iterable):
        raise ModelError(
            f"--data {data_name}: is a {type(batches).__name__}, expected an iterable of batches"
        )
    elif data_arguments:
        raise click.UsageError(f"--data-arg: {data_name} is an iterable already, not a factory")
    forward: Callable[..., Any] | None = None
    if forward_name is not None:
        forward = load_thing(forward_name, "--forward")
        if not callable(forward):
            raise ModelError(
                f"--forward {forward_name}: is a {type(forward).__name__}, expected a function"
            )
    return BnPass(
        model=model,
        batches=batches,
        forward=forward,
        max_batches=max_batches,
        max_samples=max_samples,
    )
