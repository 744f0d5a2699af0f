"""``pkg.mod:thing`` on the command line -> the user's object, found as Python finds it."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckptavg.errors import ModelError
from ckptavg.eval_command import EvalCommand
from ckptavg.recipe_file import argument_entry

if TYPE_CHECKING:
    from ckptavg.evaluate import Evaluate
    from ckptavg.results import BnPass

Arguments = Sequence[tuple[str, Any]]

_FLAGS = {"max_batches": "--batches", "max_samples": "--samples", "compare": "--compare-bn"}


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
    eval_name: str | None = None,
    eval_command: str | None = None,
    judged_by: "Callable[[Evaluate | None], Evaluate] | None" = None,
    **options: Any,
) -> "BnPass | None":
    """Build the BatchNorm pass and the evaluation that the options ask for; None if they do not.

    Args:
        model_name: What the options of these names say.
        model_arguments: Likewise.
        data_name: Likewise.
        data_arguments: Likewise.
        forward_name: Likewise.
        eval_name: Likewise.
        eval_command: Likewise.
        judged_by: Makes the evaluation of that of ``--eval``, or without it.
        options: Further attributes of ``BnPass``.

    Raises:
        click.UsageError: If options are given that need others.
        ModelError: If something named cannot be imported or is of the wrong kind.
    """
    from ckptavg.results import BnPass

    if eval_name is not None and eval_command is not None:
        raise click.UsageError("--eval and --eval-command exclude each other")
    is_judged = eval_name is not None or judged_by is not None
    if (data_name is None) != (model_name is None) and not (model_name and is_judged):
        raise click.UsageError("--model and --data belong together: the BatchNorm pass needs both")
    if data_name is None:
        needs = "--data" if model_name is not None else "--model and --data"
        of_pass = {"data_arg": data_arguments, "forward": forward_name, **options}
        of_model = {"eval": eval_name, "model_arg": model_arguments} if model_name is None else {}
        for name, value in (of_model | of_pass).items():
            if value not in (None, (), getattr(BnPass, name, None)):
                needed = "--model" if name == "eval" else needs
                raise click.UsageError(f"{_FLAGS.get(name, _flag(name))} needs {needed}")
    if model_name is None and eval_command is None:
        return None
    evaluate: Any = load_function(eval_name, "--eval")
    if judged_by is not None:
        evaluate = judged_by(evaluate)
    return BnPass(
        model=None if model_name is None else _model(model_name, model_arguments),
        batches=None if data_name is None else _batches(data_name, data_arguments),
        names=_names(
            ("model", model_name, model_arguments),
            ("data", data_name, data_arguments),
            ("forward", forward_name, ()),
            ("eval", eval_name, ()),
            ("eval-command", eval_command, ()),
        ),
        forward=load_function(forward_name, "--forward"),
        evaluate=evaluate if eval_command is None else EvalCommand(eval_command),
        **options,
    )


def load_batches(name: str, option: str) -> Any:
    """Import an iterable of batches, or a function that returns one.

    Raises:
        ModelError: If it cannot be imported, or is neither.
    """
    batches = load_thing(name, option)
    if not callable(batches) and not isinstance(batches, Iterable):
        raise ModelError(
            f"{option} {name}: is a {type(batches).__name__}, expected an iterable of batches"
        )
    return batches


def _batches(name: str, arguments: Arguments) -> Any:
    batches = load_batches(name, "--data")
    if not isinstance(batches, Iterable):
        return partial(batches, **dict(arguments))
    if arguments:
        raise click.UsageError(f"--data-arg: {name} is an iterable already, not a factory")
    return batches


def _names(*given: tuple[str, str | None, Arguments]) -> dict[str, Any]:
    """Return what was named, and with what arguments, as a recipe has it."""
    names: dict[str, Any] = {}
    for option, name, arguments in given:
        if name is not None:
            names |= {option: name, **argument_entry(f"{option}-arg", dict(arguments))}
    return names


def _model(name: str, arguments: Arguments) -> Any:
    from torch import nn

    from ckptavg.model_zoo import LIBRARIES, ModelFromConfig

    library, _, model_name = name.partition(":")
    if library in LIBRARIES and model_name:
        return ModelFromConfig(library, model_name, dict(arguments))
    model = load_thing(name, "--model")
    if isinstance(model, nn.Module):
        if arguments:
            raise click.UsageError(f"--model-arg: {name} is a module already, not a factory")
        return model
    if not callable(model):
        raise ModelError(f"--model {name}: is a {type(model).__name__}, expected a model")
    return partial(model, **dict(arguments))


def load_function(name: str | None, option: str) -> Callable[..., Any] | None:
    """Import a function; None where none is named.

    Raises:
        ModelError: If it cannot be imported, or is none.
    """
    if name is None:
        return None
    function = load_thing(name, option)
    if not callable(function):
        raise ModelError(f"{option} {name}: is a {type(function).__name__}, expected a function")
    found: Callable[..., Any] = function
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
