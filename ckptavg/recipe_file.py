"""Recipe files: a command with all that it takes, in TOML; and the same value in a provenance.

::

    command = "average"                  # the default
    directory = "../runs"                # where it works, from the file; default: its folder
    sources = ["exp7/checkpoint-*"]

    [averaging]                          # sections of options, under their names without dashes
    schemes = ["uniform:last=5", "uniform:last=20"]
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckptavg.errors import UsageError

DEFAULT_COMMAND = "average"
# section -> the options in it, of all commands
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "selection": (
        "last", "first", "every", "steps", "match", "at-lr-minima", "constant-lr", "swad",
        "swad-tolerance", "best", "log", "lr-recorded", "metric", "mode",
    ),
    "averaging": (
        "scheme", "coefficients", "accumulate", "dtype", "buffers", "allow-nonfinite",
        "adapter-rank", "adapter-factors", "state-key", "strip-prefix", "keep-prefix",
        "check-trajectory",
    ),
    "model": (
        "model", "model-arg", "data", "data-arg", "forward", "eval", "eval-command", "compare",
        "compare-bn", "last-checkpoint", "batches", "samples", "until-converged", "estimator",
        "train-mode", "amp", "channels-last", "compile", "seed", "allow-unreached",
        "data-per-process",
    ),
    "search": ("no-singles", "keep", "plot", "trials", "search-seed"),
    "landscape": (
        "loader", "weight-decay", "through", "mark", "points", "margin", "directions", "rays",
        "distance", "relative", "ray-seed", "t", "members", "order", "no-plot",
    ),
    "machine": ("device", "memory", "io-threads", "cache", "checksum"),
    "output": ("output", "overwrite", "output-format", "max-shard-size", "no-code"),
    "push": ("push", "private", "card"),
}  # fmt: skip
# said when a recipe is run, not in it
TALK = ("dry-run", "json", "quiet", "debug", "save-recipe", "list-schemes")
TOP_LEVEL = ("command", "directory", "sources")
_SECTION_OF = {option: section for section, options in SECTIONS.items() for option in options}

RecipeTable = dict[str, Any]


def section_of(option: str) -> str:
    """Return the section that an option belongs to.

    Raises:
        LookupError: If it belongs to none.
    """
    return _SECTION_OF[option]


def plural(option: str) -> str:
    """Return the key under which an option that may be repeated has several values."""
    return option + ("es" if option.endswith(("ch", "sh", "s", "x")) else "s")


def read_recipe(path: Path) -> RecipeTable:
    """Read a recipe file; its keys outside of sections are checked, and what sections there are.

    Raises:
        UsageError: If it cannot be read, is not TOML, or holds something else.
    """
    import tomllib  # not where recipes are only written down

    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"{path}: cannot be read: {reason}") from error
    except (ValueError, RecursionError) as error:  # of TOML, or of UTF-8
        raise UsageError(f"{path}: is not TOML: {error}") from error
    for key, value in told.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise wrong_type(f"{path}: '{key}'", value, f"a section, [{key}]")
        elif isinstance(value, dict):
            near = did_you_mean(key, SECTIONS, "[{}]")
            there = ", ".join(f"[{name}]" for name in SECTIONS)
            raise UsageError(f"{path}: [{key}] is not known{near or f'; there are {there}'}")
        elif key not in TOP_LEVEL:
            raise unknown_key(str(path), "", key, TOP_LEVEL)
    for key in ("command", "directory"):
        if not isinstance(told.get(key, ""), str):
            raise wrong_type(f"{path}: '{key}'", told[key], "text")
    sources = told.get("sources", [])
    if not isinstance(sources, (str, list)) or not all(isinstance(one, str) for one in sources):
        raise wrong_type(f"{path}: 'sources'", sources, "text, or a list of texts")
    return told


def unknown_key(where: str, section: str, key: str, known: Iterable[str]) -> UsageError:
    """Return the error for a key that does not belong where it stands.

    Args:
        where: The file.
        section: The section; empty outside of sections.
        key: The key.
        known: What may stand there.
    """
    where = f"{where}: [{section}]" if section else where
    if key in TALK:
        return UsageError(f"{where}: '{key}' is for the command line, not for a recipe")
    singular = next((one for one in _SECTION_OF if key in (one, plural(one))), None)
    if singular is not None and _SECTION_OF[singular] != section:
        return UsageError(f"{where}: '{key}' belongs into [{_SECTION_OF[singular]}]")
    known = list(known)
    near = did_you_mean(key, known)
    there = "" if near or not known else f"; there are {', '.join(known)}"
    return UsageError(f"{where}: '{key}' is not known{near or there}")


def did_you_mean(name: str, known: Iterable[str], form: str = "'{}'") -> str:
    """Return the end of a message that names what is spelt alike; empty if nothing is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {form.format(near[0])}?" if near else ""


def wrong_type(where: str, value: object, expected: str) -> UsageError:
    """Return the error for a value of a type that does not belong there."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return UsageError(f"{where} is {type_in_words(value)} ({shown}), expected {expected}")


def type_in_words(value: object) -> str:
    """Say of what type a value of a recipe is."""
    for kind, words in (
        (bool, "a boolean"), (int, "a whole number"), (float, "a number"), (str, "text"),
        (list, "a list"), (dict, "a table"),
    ):  # fmt: skip
        if isinstance(value, kind):
            return words
    return "a date or time"


def is_plain(value: object) -> bool:
    """Tell whether TOML, JSON and a Python literal can all express a value."""
    if isinstance(value, float):
        return value - value == 0  # infinity and NaN are no literals
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(is_plain, value.values()))
    return isinstance(value, (str, int))


def argument_entry(option: str, arguments: Mapping[str, Any]) -> RecipeTable:
    """Return the entry of a recipe for ``--model-arg`` or ``--data-arg``; none for no arguments.

    It is a table where TOML can express the values, else the texts ``key=value``, as typed.
    """
    if not arguments:
        return {}
    if all(map(is_plain, arguments.values())):
        return {plural(option): dict(arguments)}
    return {plural(option): [f"{key}={value!r}" for key, value in arguments.items()]}
