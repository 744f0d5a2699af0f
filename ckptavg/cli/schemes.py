"""What is printed of schemes: all there are, and the coefficients of a run before it starts."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ckptavg.errors import printable

if TYPE_CHECKING:
    from ckptavg.plan import AveragePlan, OutputPlan

_MOST_COEFFICIENTS = 6  # more are shown by --dry-run
_INDENT = 13


def scheme_lines() -> Iterator[str]:
    """Yield what ``--list-schemes`` prints: two lines a scheme, and what holds for all."""
    from ckptavg.schemes import list_schemes

    for kind in list_schemes():
        yield f"{kind.name:<{_INDENT}}{kind.summary}"
        usage = f"{kind.usage}, " if kind.usage else ""
        yield f"{'':<{_INDENT}}{usage}e.g. {kind.example}"
    yield "All but coefficients take from=STEP to=STEP every=M last=N first=N, in this order."
    yield "Written [LABEL=]NAME[:KEY=VALUE,...]; KEY=1..8 or KEY=2..20..2 makes one for each."


def echo_coefficients(plan: "AveragePlan") -> None:
    """Print the coefficients of every average to stderr; where nobody can read them, no matter."""
    with contextlib.suppress(OSError):
        for output in plan.outputs:
            line = printable(f"coefficients: {_told(plan, output)}")
            encoding = sys.stderr.encoding or "utf-8"
            click.echo(line.encode(encoding, "backslashreplace").decode(encoding), err=True)


def _told(plan: "AveragePlan", output: "OutputPlan") -> str:
    """Say in a line what goes into an average, oldest first."""
    from ckptavg.schemes import shortened

    row = output.row
    labels = [plan.labels[index] for index in row.used]
    whose = f"{labels[0]} to {labels[-1]}" if len(labels) > 1 else labels[0]
    scheme = shortened(str(output.scheme))
    name = output.name if output.name and output.name != scheme else ""
    told = f"{name} ({scheme})" if name else scheme
    plural = "" if len(labels) == 1 else "s"
    of = f"{len(labels)} checkpoint{plural} ({whose})"
    values = [row.coefficients[index] for index in row.used]
    if None in row.told_coefficients:
        return f"{told}: {row.statistic_name} of {of}"
    if row.divisor == len(labels):
        numbers = f"{1 / row.divisor:.6g} each" if len(labels) > 1 else "1"
    else:
        shown = [f"{value:.4g}" for value in values]
        if len(shown) > _MOST_COEFFICIENTS:
            half = _MOST_COEFFICIENTS // 2
            shown = [*shown[:half], "...", *shown[-half:]]
        numbers = ", ".join(shown)
    noise = "" if row.statistic is None else f", plus {row.statistic_name}"
    return f"{told}: {numbers} of {of}{noise}"
