"""Averages whose rows are given, statistics and all, instead of schemes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from ckptavg.coefficients import CoefficientRow, GaussianNoise, Trimmed
from ckptavg.plan import AveragePlan, OutputPlan, plan_average
from ckptavg.schemes import Scheme

GiveRows = Callable[..., None]


def mean(n: int, last: int | None = None) -> CoefficientRow:
    """Return the mean of the last of n checkpoints, or of all."""
    last = last or n
    return CoefficientRow((0.0,) * (n - last) + (1.0,) * last, last)


def trimmed(n: int, n_cut: int, last: int | None = None) -> CoefficientRow:
    return replace(mean(n, last), statistic=Trimmed(n_cut))


def median(n: int, last: int | None = None) -> CoefficientRow:
    return trimmed(n, ((last or n) - 1) // 2, last)


def noisy(
    row: CoefficientRow, *, scale: float = 1.0, seed: int = 0, sample: int = 0
) -> CoefficientRow:
    """Return a row with noise of the spread of the checkpoints that it uses."""
    return replace(row, statistic=GaussianNoise(row.used, scale, seed, sample))


def with_rows(plan: AveragePlan, rows: Sequence[CoefficientRow]) -> AveragePlan:
    """Return a plan with these rows, one an output: the only one, or out0, out1, ..."""
    outputs = tuple(
        OutputPlan(
            name=f"out{number}" if len(rows) > 1 else "",
            scheme=_scheme_of(row),
            row=row,
            take_from=row.used[-1],
        )
        for number, row in enumerate(rows)
    )
    return replace(plan, outputs=outputs)


def _scheme_of(row: CoefficientRow) -> Scheme:
    """Return a scheme that has an output for such a row: its samples are told by number."""
    noise = row.statistic
    if isinstance(noise, GaussianNoise):
        return Scheme(name="swag", samples=max(noise.sample, 1))
    return Scheme()


@pytest.fixture
def give_rows(monkeypatch: pytest.MonkeyPatch) -> GiveRows:
    """Return ``give_rows(*rows)``: what averages from then on has these rows."""

    def give(*rows: CoefficientRow) -> None:
        def planned(*args: Any, **options: Any) -> AveragePlan:
            return with_rows(plan_average(*args, **options), rows)

        monkeypatch.setattr("ckptavg.prepare.plan_average", planned)

    return give
