"""What ``plane``, ``width``, ``path`` and ``ensemble`` have in common on the command line."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptavg.cli.model_options import model_arguments, model_options
from ckptavg.cli.options import (
    Command,
    combined,
    machine_options,
    metric_options,
    reading_options,
    selection_arguments,
    selection_options,
    talk_options,
)
from ckptavg.cli.progress import ProgressBars
from ckptavg.cli.push import typed_command
from ckptavg.cli.render import echo_json, echo_lines, echo_notes, stdout_for_the_result
from ckptavg.cli.user_code import load_batches, load_bn_pass, load_function

if TYPE_CHECKING:
    from ckptavg.ensemble_results import EnsembleResult
    from ckptavg.evaluate import Evaluate
    from ckptavg.landscape_results import LandscapeResult, PathResult, PlaneResult, WidthResult
    from ckptavg.results import BnPass

Found = TypeVar("Found", "PlaneResult", "WidthResult", "PathResult", "EnsembleResult")

_HOW_IT_RUNS = ("forward_name", "amp", "channels_last")  # in a BatchNorm pass and on loaders


class _NamedThing(click.ParamType[tuple[str, str]]):
    """``NAME=PKG.MOD:THING``: something of the user's, and what it is called."""

    name = "name=pkg.mod:thing"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Return the name, and what it stands for."""
        if isinstance(value, tuple):
            return value
        name, equals, thing = value.partition("=")
        if not equals or not re.fullmatch(r"[\w.+-]+", name):
            self.fail(f"'{value}' is not of the form NAME=PKG.MOD:THING", param, ctx)
        return name, thing


def landscape_options(
    *own: Callable[..., Any], example: str = "plane", selects: bool = True
) -> Callable[[Command], Command]:
    """Return the options of a command that tries many sets of weights, its own in the middle.

    Args:
        own: Those of this command alone.
        example: What the output may be called.
        selects: Whether there are sources that a selection may be taken of.
    """
    selecting = (selection_options, metric_options) if selects else ()
    return combined(
        click.option(
            "-o", "--output", required=True, type=click.Path(), metavar="DIR",
            help=f"Directory to make for numbers and pictures, for example -o {example}.",
        ),
        click.option(
            "--overwrite", is_flag=True,
            help="Replace DIR if it holds only files of this command, in one step at the end.",
        ),
        click.option(
            "--no-plot", is_flag=True,
            help="Leave the pictures out; they need the extra ckptavg[plots].",
        ),
        *selecting,
        *own,
        click.option(
            "--loader", "loaders", multiple=True, type=_NamedThing(),
            metavar="NAME=PKG.MOD:THING",
            help="Labelled batches whose loss and error are measured, under a name, for example "
            "test=my_pkg.data:test_batches (repeatable): (inputs, labels) or mappings with labels.",
        ),
        click.option(
            "--weight-decay", type=click.FloatRange(min=0), default=0.0, show_default=True,
            metavar="X",
            help="Add half of it times the squared norm of the parameters to every loss, for "
            "example 5e-4, as training did.",
        ),
        reading_options,
        model_options(required=False, compare=None, writes_models=False),
        machine_options,
        talk_options,
    )  # fmt: skip


def landscape_arguments(options: dict[str, Any], *, needs_loader: bool = False) -> dict[str, Any]:
    """Take what ``landscape_options`` gave out of a command's options, under its names in Python.

    What the command itself says stays: ``output``, ``as_json``, ``quiet``, ``debug``, and its own.

    Args:
        options: A command's.
        needs_loader: Whether there must be labelled batches: an ``--eval`` is not enough.

    Raises:
        click.UsageError: If there is no model, or nothing that judges it.
        ModelError: If something named cannot be imported or is of the wrong kind.
        UsageError: If a value makes no sense.
    """
    from ckptavg.selection import Selection

    loaders: Sequence[tuple[str, str]] = options.pop("loaders")
    weight_decay: float = options.pop("weight_decay")
    of_model = model_arguments(options)
    if of_model["eval_command"] is not None:
        raise click.UsageError(
            "--eval-command judges model directories, and none are written here: use --eval, or "
            "--loader"
        )
    if of_model["model_name"] is None:
        raise click.UsageError("--model is missing: the weights are tried in it")
    if not loaders and needs_loader:
        raise click.UsageError("--loader is missing: the labelled batches that models are tried on")
    if not loaders and of_model["eval_name"] is None:
        raise click.UsageError("nothing judges the weights: pass --loader or --eval")
    if not loaders and weight_decay:
        raise click.UsageError("--weight-decay is added to the losses of a --loader")
    with stdout_for_the_result():
        evaluation = (
            _labelled_evaluation(loaders, weight_decay, of_model)
            if loaders
            else load_bn_pass(**of_model)
        )
    return {
        "evaluation": evaluation,
        "selection": Selection(**selection_arguments(options)),
        "state_key": options.pop("state_key"),
        "strip_prefixes": options.pop("strip_prefixes"),
        "keep_prefix": options.pop("keep_prefix"),
        "cache": options.pop("cache"),
        "device": options.pop("device"),
        "memory_budget_bytes": options.pop("memory"),
        "n_threads": options.pop("io_threads"),
        "overwrite": options.pop("overwrite"),
        "plot": not options.pop("no_plot"),
    }


def _labelled_evaluation(
    loaders: Sequence[tuple[str, str]], weight_decay: float, of_model: dict[str, Any]
) -> "BnPass":
    """Build the pass whose evaluation is that of the loaders, with that of ``--eval`` beside."""
    from ckptavg.labelled import LabelledEvaluation, Loader

    forward_name, amp, channels_last = (of_model[name] for name in _HOW_IT_RUNS)

    def judged_by(also: "Evaluate | None") -> "Evaluate":
        return LabelledEvaluation(
            loaders=[
                Loader(name=name, batches=load_batches(thing, f"--loader {name}"))
                for name, thing in loaders
            ],
            forward=load_function(forward_name, "--forward"),
            amp=amp,
            channels_last=channels_last,
            weight_decay=weight_decay,
            also=also,
        )

    of_pass = dict(of_model)
    if of_model["data_name"] is None:  # there is no pass that could run in some way
        of_pass |= {"forward_name": None, "amp": None, "channels_last": False}
    evaluation = load_bn_pass(**of_pass, judged_by=judged_by)
    if evaluation is None:
        raise AssertionError("there is a model")
    told = {
        "loaders": [f"{name}={thing}" for name, thing in loaders],
        "weight-decay": weight_decay,
        "eval": of_model["eval_name"],
        **{name: of_model[name] for name in _HOW_IT_RUNS},
    }
    return replace(evaluation, names={**evaluation.names, "eval": told})


def run_landscape(
    measure: Callable[..., Found],
    options: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
    tell: Callable[[Found], Sequence[str]],
    needs_loader: bool = False,
) -> None:
    """Carry out a command that tries many sets of weights.

    Args:
        measure: The function of the library, with what it alone has.
        options: What ``landscape_options`` gave.
        as_json: Whether the result is printed as JSON.
        quiet: Whether progress and notes are left out.
        tell: Says what was found.
        needs_loader: Whether there must be labelled batches.
    """
    arguments = landscape_arguments(options, needs_loader=needs_loader)
    with stdout_for_the_result(), ProgressBars(quiet=quiet or as_json) as progress:
        found = measure(**arguments, progress=progress, command=typed_command())
    if as_json:
        echo_json({**asdict(found), "output": str(found.output)})
        return
    echo_lines(tell(found))
    echo_notes(found.notes, quiet=quiet)


def landscape_lines(found: "LandscapeResult", what: str, lines: Sequence[str]) -> list[str]:
    """Return what was measured: how it was done, what was found, a table, the files.

    Args:
        found: The result.
        what: How many points, in words.
        lines: The table.
    """
    resumed = f", {found.n_resumed} of them before" if found.n_resumed else ""
    return [
        f"{found.output}: {what}, {found.n_points} evaluations{resumed}, "
        f"{found.seconds:.1f} s on {found.device}",
        *(f"  {sentence}" for sentence in found.summary),
        "",
        *lines,
        "",
        f"files: {', '.join(found.files)}",
    ]
