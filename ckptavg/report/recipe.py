"""The recipe that makes an output again, as text to copy."""

from collections.abc import Mapping
from typing import Any

from ckptavg.errors import UsageError
from ckptavg.recipe_file import SECTIONS, TOP_LEVEL
from ckptavg.toml_text import toml_text


def recipe_text(recorded: Mapping[str, Any]) -> str | None:
    """Return a recorded recipe as a recipe file holds it; None if it cannot be written.

    What is no key of a recipe, such as ``obstacles``, is left out, and what has no name.
    """
    content: dict[str, Any] = {key: recorded[key] for key in TOP_LEVEL if key in recorded}
    for section in SECTIONS:
        table = {
            key: value for key, value in recorded.get(section, {}).items() if value is not None
        }
        if table:
            content[section] = table
    try:
        return toml_text(content)
    except UsageError:  # a value that TOML cannot express
        return None
