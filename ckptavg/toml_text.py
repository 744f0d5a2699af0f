"""Values -> TOML text, as far as recipe files need it: the standard library reads it only."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ckptavg.errors import UsageError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {
    '"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r",
}  # fmt: skip
_DELETE = 0x7F
_WIDTH = 96  # a longer list has one value a line


def toml_text(content: Mapping[str, Any]) -> str:
    """Write a table of values and of tables of values, such as a recipe, as TOML 1.0.

    Text, whole numbers, floats, booleans, lists of these and tables inside tables (on one line)
    can be written. Values stand before tables, else the order stays.

    Raises:
        UsageError: If a value is of another type, or text that UTF-8 cannot express.
    """
    values = [(key, value) for key, value in content.items() if not isinstance(value, Mapping)]
    tables = [(key, value) for key, value in content.items() if isinstance(value, Mapping)]
    lines = [_assignment(key, value) for key, value in values]
    for name, table in tables:
        lines += [""] * bool(lines) + [f"[{_key(name)}]"]
        lines += [_assignment(key, value) for key, value in table.items()]
    return "\n".join([*lines, ""])


def _assignment(key: str, value: Any) -> str:
    line = f"{_key(key)} = {_value(value)}"
    if len(line) <= _WIDTH or not isinstance(value, (list, tuple)):
        return line
    return "\n".join([f"{_key(key)} = [", *(f"    {_value(item)}," for item in value), "]"])


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _quoted(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return repr(value)
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return f"[{', '.join(map(_value, value))}]"
    raise UsageError(f"{value!r}: a {type(value).__name__} cannot be written into a recipe")


def _quoted(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{text!r}: cannot be written into a recipe, which is UTF-8") from error
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    code = ord(character)
    return f"\\u{code:04x}" if code < ord(" ") or code == _DELETE else character
