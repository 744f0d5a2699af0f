"""Coefficients: their sum, their number, their order."""

import math
from typing import Any

import pytest
from test_schemes import coefficient_row

from ckptavg import Recipe, Scheme, UsageError

FINITE = "expected a list such as 0.2,0.3,0.5, each a finite number"


def explicit(*coefficients: float) -> Scheme:
    return Scheme(name="coefficients", coefficients=coefficients)


def test_uniform_divides_the_sum() -> None:
    row = coefficient_row(Scheme(), 3)
    assert row.multipliers == (1.0, 1.0, 1.0)
    assert row.divisor == 3
    assert math.fsum(row.coefficients) == pytest.approx(1, abs=1e-15)


def test_explicit_coefficients_are_divided_by_their_sum() -> None:
    row = coefficient_row(explicit(0.3333333, 0.1333333, 0.5333333), 3)
    assert math.fsum(row.coefficients) == 1
    assert row.divisor == 1


def test_equal_explicit_coefficients_make_the_uniform_mean() -> None:
    for values in ((0.3333333,) * 3, (1 / 3,) * 3):
        assert coefficient_row(explicit(*values), 3) == coefficient_row(Scheme(), 3)
    assert coefficient_row(explicit(0, 0.5, 0.5), 3) == coefficient_row(Scheme(last=2), 3)
    assert coefficient_row(explicit(0, 1, 0), 3).multipliers == (0, 1, 0)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ((0.5, 0.5, 0.0), "3 coefficients for 2 checkpoints"),
        ((0.5, 0.6), "the coefficients sum to 1.1, not 1; divide each of them by their sum"),
        ((1.0, -1.0), "the coefficients sum to 0, not 1"),
        ((math.nan, 1.0), f"scheme 'coefficients': coefficients is 'nan,1', {FINITE}"),
        ((math.inf, 1.0), f"scheme 'coefficients': coefficients is 'inf,1', {FINITE}"),
    ],
)
def test_coefficients_that_make_no_mean_are_refused(
    coefficients: tuple[float, ...], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        coefficient_row(explicit(*coefficients), 2)
    assert str(caught.value) == message


def test_coefficients_follow_their_checkpoints() -> None:
    recipe = Recipe(schemes=(Scheme(last=2), explicit(0.5, 0.2, 0.3)))
    assert recipe.reordered([1, 2, 0]).schemes == (Scheme(last=2), explicit(0.2, 0.3, 0.5))
    with pytest.raises(UsageError, match="^3 coefficients for 2 checkpoints$"):
        recipe.reordered([1, 0])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("accumulate", "accumulate: 'int8' is not one of auto, float32, float64"),
        ("dtype", "dtype: 'int8' is not one of same, float64, float32, bfloat16, float16"),
        ("buffers", "buffers: 'int8' is not one of last, first, refuse"),
    ],
)
def test_unknown_choices_are_refused(field: str, message: str) -> None:
    choice: dict[str, Any] = {field: "int8"}
    with pytest.raises(UsageError) as caught:
        Recipe(**choice)
    assert str(caught.value) == message
