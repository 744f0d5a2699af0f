"""Table 1: test accuracy by method and budget, over the seeds."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from files import write_csv, write_json
from setups import Setup
from training import BUDGETS

Measured = Sequence[dict[str, Any]]  # of one set-up, one a seed


class Cell(NamedTuple):
    """One number of the table, for each seed."""

    row: str
    budgets: float
    metric: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    def __str__(self) -> str:
        digits = 2 if self.metric == "accuracy" else 3
        if len(self.values) == 1:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {stdev(self.values):.{digits}f}"


ROWS = {
    "SGD": ("sgd", "as saved"),
    "SGD + BN pass": ("sgd", "BN pass"),
    "constant rate: last checkpoint": ("constant", "single"),
    "constant rate: last + BN pass": ("constant", "single, BN pass"),
    "constant rate: SWA": ("constant", "swa"),
    "constant rate: ensemble": ("constant", "ensemble"),
    "cyclical rate: last checkpoint": ("cyclical", "single"),
    "cyclical rate: last + BN pass": ("cyclical", "single, BN pass"),
    "cyclical rate: SWA": ("cyclical", "swa"),
    "cyclical rate: ensemble (FGE)": ("cyclical", "ensemble"),
    "fixed rate from scratch: last checkpoint": ("fixed", "single"),
    "fixed rate from scratch: last + BN pass": ("fixed", "single, BN pass"),
    "fixed rate from scratch: SWA": ("fixed", "swa"),
    "fixed rate from scratch: ensemble": ("fixed", "ensemble"),
}


class Table:
    """Table 1 of one set-up."""

    def __init__(self, setup: Setup, measured: Measured) -> None:
        self.setup = setup
        self.n_seeds = len(measured)
        self.cells = {
            (row, budgets, metric): Cell(
                row,
                budgets,
                metric,
                tuple(_looked_up(one, setup, *where, budgets)[metric] for one in measured),
            )
            for row, where in ROWS.items()
            for budgets in BUDGETS
            if where[0] != "fixed" or budgets == BUDGETS[-1]
            for metric in ("accuracy", "nll")
        }

    def values(self, row: str, budgets: float, metric: str = "accuracy") -> tuple[float, ...]:
        """Return one number of the table for each seed."""
        return self.cells[row, budgets, metric].values

    def mean(self, row: str, budgets: float, metric: str = "accuracy") -> float:
        """Return its mean."""
        return self.cells[row, budgets, metric].mean

    def text(self, metric: str = "accuracy") -> str:
        """Return the table in Markdown, which is also readable as it is."""
        budgets = "".join(f" {f'{one:g} budget' + 's' * (one > 1):<14} |" for one in BUDGETS)
        lines = [
            f"| {f'{self.setup.name}, {METRICS[metric]}':<40} |{budgets}",
            "|---|" + 3 * "---|",
        ]
        for row in ROWS:
            cells = (self.cells.get((row, one, metric)) for one in BUDGETS)
            numbers = "".join(f" {'' if cell is None else str(cell):<14} |" for cell in cells)
            lines.append(f"| {row:<40} |{numbers}")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write the table as Markdown, JSON and CSV."""
        name = f"table1-{self.setup.name}"
        text = "\n\n".join(self.text(metric) for metric in METRICS)
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        write_json(
            folder / f"{name}.json", {"cells": [cell._asdict() for cell in self.cells.values()]}
        )
        write_csv(
            folder / f"{name}.csv",
            ["row", "budgets", "metric", *(f"run {at}" for at in range(self.n_seeds))],
            [(cell.row, cell.budgets, cell.metric, *cell.values) for cell in self.cells.values()],
        )


METRICS = {"accuracy": "test accuracy, %", "nll": "negative log-likelihood, nats"}


def _looked_up(
    measured: dict[str, Any], setup: Setup, arm: str, what: str, budgets: float
) -> dict[str, float]:
    epoch = str(setup.epochs(budgets))
    if arm == "sgd":
        found: dict[str, float] = measured["sgd"][f"sgd-{budgets:g}"][what]
    elif what == "ensemble":
        found = measured["ensemble"][arm][epoch]
    else:
        found = measured["swa"][arm][epoch][what]
    return found
