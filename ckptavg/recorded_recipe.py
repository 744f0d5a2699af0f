"""The recipe that makes an output again, for its provenance: sources pinned, one scheme."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ckptavg.coefficients import GaussianNoise
from ckptavg.errors import without_token
from ckptavg.eval_command import EvalCommand
from ckptavg.hub import pinned_reference
from ckptavg.model_zoo import ModelFromConfig
from ckptavg.plan import AveragePlan, OutputPlan
from ckptavg.recipe_file import RecipeTable, argument_entry
from ckptavg.results import BnPass
from ckptavg.schemes import Scheme, output_names
from ckptavg.sources import SingleCheckpoint, Source
from ckptavg.tensors import HubRevision

# options of a BN pass that are called otherwise on the command line
_OPTION_NAMES = {"max_batches": "batches", "max_samples": "samples"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for beside what a plan tells, as far as the output depends on it.

    Attributes:
        command: What makes the output again: ``average``, or ``recompute-bn`` for one checkpoint.
        directory: Where the command worked.
        n_processes: How many processes shared the work.
        device: Where it ran.
        state_key, strip_prefixes, keep_prefix, max_shard_bytes, include_code, batchnorm: As in
            ``average_checkpoints``.
    """

    command: str
    directory: str
    n_processes: int
    device: str
    state_key: str | None
    strip_prefixes: tuple[str, ...]
    keep_prefix: bool
    max_shard_bytes: int | None
    include_code: bool
    batchnorm: BnPass | None


def recorded_recipe(
    plan: AveragePlan, output: OutputPlan, asked: Asked, published: Path
) -> RecipeTable:
    """Return the recipe that makes one output again, bit for bit.

    It has the shape of a recipe file (see ``ckptavg.recipe_file``). All checkpoints of the run are
    its sources, oldest first, so that a scheme such as ``uniform:last=5`` means the same; those on
    the Hub are pinned to their commits. ``directory`` leads from the output to where the command
    worked, so that both may be moved together. ``member`` is the name of the output where its
    scheme makes several; ``torch_threads`` is how many threads a model ran
    on: they change the order of sums. ``obstacles`` says what keeps the recipe from being run.

    Args:
        plan: What was done.
        output: Which of its outputs.
        asked: What else was asked for.
        published: The directory of the output, links resolved.
    """
    obstacles: list[str] = []
    averaging: RecipeTable = {
        "state-key": asked.state_key,
        "strip-prefixes": list(asked.strip_prefixes),
        "keep-prefix": asked.keep_prefix,
    }
    if asked.command == "average":
        recipe = plan.recipe
        averaging = {
            "scheme": scheme_text(output.scheme),
            "accumulate": recipe.accumulate,
            "dtype": recipe.dtype,
            "buffers": recipe.buffers,
            "allow-nonfinite": recipe.allow_nonfinite,
            "adapter-rank": recipe.adapter_rank,
            "adapter-factors": recipe.adapter_factors,
            **averaging,
        }
    sections: dict[str, RecipeTable] = {
        "averaging": averaging,
        "model": {},
        "machine": {},
        "output": {
            "output-format": plan.output_format,
            "max-shard-size": asked.max_shard_bytes,
            "no-code": not asked.include_code,
        },
    }
    has_pass = asked.batchnorm is not None and asked.batchnorm.batches is not None
    if asked.batchnorm is not None:
        found: list[str] = []
        sections["model"] = _model_section(asked.batchnorm, asked.command, found)
        obstacles += found if has_pass else []  # an evaluation does not change what is published
    if has_pass:
        # the bits of what a model computes depend on the device
        sections["machine"] = {"device": asked.device.partition(":")[0]}
        if asked.n_processes > 1:
            obstacles.append(f"{asked.n_processes} processes shared the BatchNorm pass")
    told: RecipeTable = {
        "command": asked.command,
        "directory": os.path.relpath(asked.directory, os.path.realpath(published)),
        "sources": [
            label if hub is None else pinned_reference(hub)
            for label, hub in zip(plan.labels, plan.hubs, strict=True)
        ],
    }
    for name, section in sections.items():
        given = {key: value for key, value in section.items() if not _is_absent(value)}
        if name == "model" and has_pass:  # what has no name is null
            given = {"model": None, "data": None, **given}
        if given:
            told[name] = given
    told = _without_tokens(told, obstacles)
    return {
        **told,
        "member": _member(output),
        "torch_threads": _torch_threads() if has_pass else None,
        "obstacles": obstacles,
    }


def _is_absent(value: object) -> bool:
    return value is None or value is False or value == []  # a seed of 0 is there


def _member(output: OutputPlan) -> str:
    """Return the name of an output among those of its scheme; empty where that makes only one."""
    names, statistic = output_names((output.scheme,)), output.row.statistic
    if len(names) == 1 or not isinstance(statistic, GaussianNoise):
        return names[0]
    return names[statistic.sample - 1]


def _torch_threads() -> int:
    import torch  # the BatchNorm pass has imported it

    return torch.get_num_threads()


def command_for(sources: Source | Sequence[Source]) -> str:
    """Return the command that makes an output of these sources again."""
    several = [] if isinstance(sources, (str, Path, HubRevision)) else sources
    is_single = any(isinstance(one, SingleCheckpoint) for one in several)  # of recompute_bn
    return "recompute-bn" if is_single else "average"


def scheme_text(scheme: Scheme) -> str:
    """Return a scheme as it is typed, its label included."""
    return str(scheme) if scheme.label is None else f"{scheme.label}={scheme}"


def _model_section(batchnorm: BnPass, command: str, obstacles: list[str]) -> RecipeTable:
    """Return the section [model]; what cannot be named is left out, and told in ``obstacles``."""
    names = dict(batchnorm.names)
    by_command = isinstance(batchnorm.evaluate, EvalCommand)
    if isinstance(batchnorm.evaluate, EvalCommand):
        names["eval-command"] = batchnorm.evaluate.command
    for option, thing, attribute in (
        ("model", batchnorm.model, "model"),
        ("data", batchnorm.batches, "batches"),
        ("forward", batchnorm.forward, "forward"),
        ("eval", None if by_command else batchnorm.evaluate, "evaluate"),
    ):
        if option in names or thing is None:
            continue
        found = _name_of(thing)
        if isinstance(found, str):
            if option != "eval":  # which does not change what is published
                obstacles.append(f"{attribute} {found}")
        else:
            names |= found.entry(option)
    chosen = {
        _OPTION_NAMES.get(name, name.replace("_", "-")): value
        for name, value in batchnorm.chosen().items()
    }
    if batchnorm.compare:
        chosen["compare-bn" if command == "average" else "compare"] = True
    return {**names, **chosen}


@dataclass(frozen=True)
class _Named:
    """What a recipe calls a thing of the user's, and what it is called with."""

    name: str
    arguments: Mapping[str, Any]

    def entry(self, option: str) -> RecipeTable:
        return {option: self.name, **argument_entry(f"{option}-arg", self.arguments)}


def importable_name(thing: object) -> str | None:
    """Return what tells a thing of the user's from others; None where its name does not."""
    found = _name_of(thing)
    return None if isinstance(found, str) else repr((found.name, sorted(found.arguments.items())))


def _name_of(thing: object) -> _Named | str:
    """Return what a recipe calls a thing given in Python, or say what it is if it cannot."""
    arguments: Mapping[str, Any] = {}
    if isinstance(thing, ModelFromConfig):
        name, arguments = f"{thing.library}:{thing.name}", thing.arguments
    else:
        called: object = thing
        if isinstance(thing, partial):
            if thing.args:
                return "is a partial with positional arguments, which a recipe cannot express"
            called, arguments = thing.func, thing.keywords
        module = getattr(called, "__module__", None)
        qualified = getattr(called, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(qualified, str):
            return f"is a {type(called).__name__} object, expected what can be imported by name"
        if module == "__main__":
            return f"is {qualified} of the script that was run, expected that of a module"
        if _found_by_name(module, qualified) is not called:
            what = "a lambda" if "<lambda>" in qualified else f"{module}:{qualified}"
            return f"is {what}, which cannot be imported by its name"
        name = f"{module}:{qualified}"
    if not all(key.isidentifier() and _is_literal(value) for key, value in arguments.items()):
        return f"is {name} with arguments that a recipe cannot express"
    return _Named(name, arguments)


def _found_by_name(module: str, qualified: str) -> object:
    found: object = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    return found


def _is_literal(value: object) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


def _without_tokens(told: RecipeTable, obstacles: list[str]) -> RecipeTable:
    """Blank out tokens wherever they stand, and say so."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, str):
            text = without_token(value)
            if text != value:
                obstacles.append(f"a token was blanked out of it: {text}")
            return text
        if isinstance(value, Mapping):
            return {key: cleaned(item) for key, item in value.items()}
        if isinstance(value, Iterable):
            return [cleaned(item) for item in value]
        return value

    result: RecipeTable = cleaned(told)
    return result
