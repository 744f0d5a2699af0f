"""What the values of options may look like."""

import re
from typing import Any

import click

from ckptavg.errors import UsageError

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


class ByteSize(click.ParamType[int]):
    """A size such as ``512MiB``, ``5GB`` or a plain number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
        if not match or match[2].upper() not in _UNITS:
            self.fail(f"'{value}' is not a size such as 512MiB or 5GB", param, ctx)
        nbytes = int(float(match[1]) * _UNITS[match[2].upper()])
        if nbytes <= 0:
            self.fail(f"'{value}' is not a positive size", param, ctx)
        return nbytes


class KeyValue(click.ParamType[tuple[str, Any]]):
    """``key=value``; the value is a Python literal if it can be read as one, else text."""

    name = "key=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Return key and value."""
        import ast

        key, equals, text = value.partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"'{value}' is not of the form key=value", param, ctx)
        try:
            return key, ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return key, text


class Coefficients(click.ParamType[tuple[float, ...]]):
    """Comma-separated numbers or fractions: ``0.2,0.3,0.5`` or ``1/3,1/3,1/3``."""

    name = "a,b,c"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Return the numbers."""
        from ckptavg.schemes import parse_coefficients

        if isinstance(value, tuple):
            return value
        try:
            return parse_coefficients(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class StepRange(click.ParamType[tuple[int | None, int | None]]):
    """Training steps ``A:B``, both ends included; either may be left out."""

    name = "A:B"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | None, int | None]:
        """Return the ends."""
        from ckptavg.selection import parse_steps

        if isinstance(value, tuple):
            return value
        try:
            return parse_steps(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class NumberRange(click.ParamType[tuple[float, float]]):
    """``A:B``: two numbers, the first the smaller one."""

    name = "a:b"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        """Return both."""
        if isinstance(value, tuple):
            return value
        first, _, last = value.partition(":")
        try:
            low, high = float(first), float(last)
        except ValueError:
            self.fail(f"'{value}' is not of the form A:B, such as 0:1", param, ctx)
        if not -float("inf") < low < high < float("inf"):
            self.fail(f"'{value}': expected the smaller number first", param, ctx)
        return low, high
