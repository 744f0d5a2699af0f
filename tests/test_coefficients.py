"""Every scheme's coefficients: closed forms, and the process that each stands for, step by step."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from ckptavg import Scheme, UsageError, parse_scheme
from ckptavg.coefficients import GaussianNoise, Trimmed
from ckptavg.schemes import Positions, coefficient_rows
from ckptavg.schemes.decay_merging import DECAYS, merged_decay
from ckptavg.schemes.power_ema import MAX_SIGMA, fit_power_ema, gamma_of_sigma, power_ema

Array = NDArray[np.float64]

STEPS = (100, 150, 300, 310, 500)
SIGMAS = (0.01, 0.05, 0.1, 0.2, 0.28, MAX_SIGMA)


def positions(steps: Sequence[int | None], epochs: Sequence[int | None] | None = None) -> Positions:
    labels = tuple(f"number-{number}" for number in range(len(steps)))
    return Positions(labels, tuple(steps), tuple(epochs or (None,) * len(steps)))


def coefficients(scheme: str | Scheme, steps: Sequence[int | None] = STEPS) -> Array:
    parsed = scheme if isinstance(scheme, Scheme) else parse_scheme(scheme)
    ((_, row),) = coefficient_rows(parsed, positions(steps))
    return np.array(row.coefficients)


def walk(n: int, seed: int = 0) -> Array:
    """Return n iterates of three weights."""
    return np.random.default_rng(seed).standard_normal((n, 3)).cumsum(axis=0)


def iterates(snapshots: Array, steps: Sequence[int]) -> Array:
    """Return the weights of steps 1 to T: each snapshot's from the one before it (exclusive) on."""
    counts = [after - before for before, after in pairwise((0, *steps))]
    return np.repeat(snapshots, counts, axis=0)


def test_uniform_and_linear_have_closed_forms() -> None:
    np.testing.assert_array_equal(coefficients("uniform"), [0.2] * 5)
    np.testing.assert_allclose(coefficients("linear"), np.arange(1, 6) / 15, rtol=1e-15)


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.9, 0.999])
def test_ema_over_snapshots_is_its_recursion(decay: float) -> None:
    snapshots = walk(7)
    average = snapshots[0]
    for snapshot in snapshots[1:]:
        average = decay * average + (1 - decay) * snapshot
    found = coefficients(Scheme(name="ema", decay=decay), [None] * 7)
    np.testing.assert_allclose(found @ snapshots, average, rtol=1e-13)
    np.testing.assert_allclose(found[0], decay**6, rtol=1e-13)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999])
def test_ema_of_steps_is_its_recursion_over_every_step(decay: float) -> None:
    snapshots = walk(5)
    average = snapshots[0]
    for weights in iterates(snapshots, STEPS)[STEPS[0] :]:
        average = decay * average + (1 - decay) * weights
    found = coefficients(Scheme(name="ema", step_decay=decay))
    np.testing.assert_allclose(found @ snapshots, average, rtol=1e-11)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_power_ema_is_its_recursion_over_every_step(sigma: float) -> None:
    snapshots, gamma = walk(5), gamma_of_sigma(sigma)
    average = np.zeros(3)
    for t, weights in enumerate(iterates(snapshots, STEPS), start=1):
        kept = (1 - 1 / t) ** (gamma + 1)
        average = kept * average + (1 - kept) * weights
    found = coefficients(Scheme(name="power", sigma=sigma))
    np.testing.assert_allclose(found @ snapshots, average, rtol=1e-10)


def profile(gamma: float, end: float, t: Array) -> Array:
    """Return p(t) = (gamma+1) t^gamma / T^(gamma+1), which ends at T."""
    value: Array = np.where(t <= end, (gamma + 1) * (t / end) ** gamma / end, 0.0)
    return value


@pytest.mark.parametrize("sigma", SIGMAS)
def test_sigma_is_the_relative_standard_deviation_of_the_profile(sigma: float) -> None:
    # midpoints are dense near 1, where narrow profiles are
    edges = 1 - np.linspace(1, 0, 200_001) ** 3
    t, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    share = profile(gamma_of_sigma(sigma), 1.0, t) * width
    mean = share @ t
    assert share.sum() == pytest.approx(1, rel=1e-6)
    assert math.sqrt(share @ (t - mean) ** 2) == pytest.approx(sigma, rel=1e-5)


def test_gamma_is_the_root_of_the_papers_cubic() -> None:
    for sigma in (1e-4, *SIGMAS):
        inverse = sigma**-2
        roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
        largest = max(root.real for root in roots if abs(root.imag) < 1e-6 * abs(root))
        assert gamma_of_sigma(sigma) == pytest.approx(max(largest, 0), rel=1e-9, abs=1e-9)
    assert gamma_of_sigma(MAX_SIGMA) == pytest.approx(0, abs=1e-6)


def test_widest_power_ema_is_the_mean_over_all_steps() -> None:
    np.testing.assert_allclose(
        power_ema(STEPS, MAX_SIGMA), np.diff([0, *STEPS]) / 500, rtol=1e-6
    )  # fmt: skip


def decayed(name: str, x: Array, final: float) -> Array:
    """Return the decay D(x) as its definition says."""
    forms: dict[str, Callable[[Array], Array]] = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
        "1-sqrt": lambda x: 1 - np.sqrt(x),
        "1-square": lambda x: 1 - x**2,
    }
    if name == "inverse":
        return np.asarray(1 / (1 + x * (1 / final - 1)))
    if name == "exponential":
        return np.asarray(final**x)
    return final + (1 - final) * forms[name](x)


@pytest.mark.parametrize("final", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("decay", DECAYS)
def test_wsm_weighs_displacements_by_the_mean_of_the_decay(decay: str, final: float) -> None:
    if final == 0 and decay in ("inverse", "exponential"):
        final = 0.01
    snapshots = walk(5)
    displacements = -np.diff(snapshots, axis=0)
    weights = []
    for start, end in pairwise((np.array(STEPS) - 100) / 400):
        edges = np.linspace(start, end, 200_001)  # the midpoint rule
        weights.append(decayed(decay, (edges[1:] + edges[:-1]) / 2, final).mean())
    expected = snapshots[0] - np.array(weights) @ displacements
    found = coefficients(Scheme(name="wsm", decay=decay, final=final))
    np.testing.assert_allclose(found @ snapshots, expected, rtol=1e-7)
    assert (found >= 0).all()


def test_wsm_linear_on_even_spacing_is_the_trapezoid() -> None:
    found = coefficients("wsm:decay=linear", [10, 20, 30, 40, 50])
    np.testing.assert_allclose(found, [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8], rtol=1e-14)
    assert list(coefficients("wsm:decay=linear", [7, 9])) == [0.5, 0.5]
    # 1-sqrt weighs the old ones more, unlike EMA
    assert (np.diff(coefficients("wsm:decay=1-sqrt", range(10))[1:]) < 0).all()


def test_wsm_ends_where_it_is_told_to() -> None:
    defaults = [coefficients(f"wsm:decay={name}") for name in ("inverse", "exponential")]
    for name, found in zip(("inverse", "exponential"), defaults, strict=True):
        np.testing.assert_array_equal(found, coefficients(f"wsm:decay={name},final=0.1"))
    np.testing.assert_array_equal(
        coefficients("wsm:decay=cosine"), coefficients("wsm:decay=cosine,final=0")
    )
    assert merged_decay([5], "linear", 0.0) == [1.0]


def stored_averages(all_iterates: Array, steps: Sequence[int], sigmas: Sequence[float]) -> Array:
    """Return the power-function EMAs that a training would have stored."""
    return np.array([
        np.array(power_ema(range(1, step + 1), sigma)) @ all_iterates[:step]
        for step, sigma in zip(steps, sigmas, strict=True)
    ])  # fmt: skip


def numeric_fit(steps: Sequence[int], sigmas: Sequence[float], sigma: float) -> tuple[Array, float]:
    """Return least-squares coefficients and fit error from profiles on a fine grid."""
    edges = np.linspace(0, max(steps), 400_001)
    t, width = (edges[1:] + edges[:-1]) / 2, edges[1]
    columns = np.stack(
        [profile(gamma_of_sigma(s), step, t) for step, s in zip(steps, sigmas, strict=True)], axis=1
    )
    wanted = profile(gamma_of_sigma(sigma), max(steps), t)
    found = np.linalg.solve(columns.T @ columns * width, columns.T @ wanted * width)
    found /= found.sum()
    error = np.linalg.norm(columns @ found - wanted) / np.linalg.norm(wanted)
    return found, float(error)


def test_phema_is_the_least_squares_fit_of_profiles() -> None:
    steps, sigmas = (100, 100, 250, 250, 400, 400), (0.05, 0.1) * 3
    for sigma in (0.03, 0.07, 0.15, 0.28):
        fit = fit_power_ema(steps, sigmas, sigma)
        expected, error = numeric_fit(steps, sigmas, sigma)
        np.testing.assert_allclose(fit.coefficients, expected, rtol=1e-3, atol=1e-5)
        assert fit.error == pytest.approx(error, rel=1e-3)


def test_phema_returns_a_profile_that_is_there() -> None:
    fit = fit_power_ema((100, 250, 400, 400), (0.05, 0.1, 0.05, 0.1), 0.1)
    assert fit.coefficients == pytest.approx([0, 0, 0, 1], abs=1e-12)
    assert fit.error < 1e-6
    assert fit.coefficients[:3] == [0, 0, 0]  # what rounding leaves is not read for nothing


def test_phema_comes_near_the_average_it_stands_for() -> None:
    steps = [*range(50, 1001, 50)] * 2
    sigmas = [0.05] * 20 + [0.1] * 20
    all_iterates = walk(1000)
    wanted = np.array(power_ema(range(1, 1001), 0.15)) @ all_iterates
    scheme, notes = Scheme(name="phema", sigma=0.15, stored=tuple(sigmas)), list[str]()
    ((_, row),) = coefficient_rows(scheme, positions(steps), notes)
    found = np.array(row.coefficients) @ stored_averages(all_iterates, steps, sigmas)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(all_iterates.std(axis=0)).max()
    assert (
        "reaches the profile of sigma 0.15 at step 1000 with a relative error of 0.0058"
        in (notes[0])
    )
    assert "from stored averages of sigma 0.05, 0.1" in notes[0]
    assert any("has negative coefficients" in note for note in notes)


@pytest.mark.parametrize(
    ("steps", "stored"), [((5, 9, 9), (0.05, 0.1, 0.1)), ((9, 9, 9), (0.05, 0.1, 0.05))]
)
def test_phema_refuses_a_profile_that_is_there_twice(
    steps: tuple[int, ...], stored: tuple[float, ...]
) -> None:
    scheme = Scheme(name="phema", sigma=0.07, stored=stored)
    with pytest.raises(UsageError, match="the stored averages depend on each other"):
        coefficient_rows(scheme, positions(steps))


@pytest.mark.parametrize("counts", [(1, 2), (10, 25), (24, 25)])
def test_unaverage_returns_the_mean_of_the_iterates_between(counts: tuple[int, int]) -> None:
    older, newer = counts
    all_iterates = walk(newer)
    means = np.array([all_iterates[:older].mean(axis=0), all_iterates.mean(axis=0)])
    found = coefficients(Scheme(name="unaverage", counts=counts), [None, None])
    np.testing.assert_allclose(found @ means, all_iterates[older:].mean(axis=0), rtol=1e-11)


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_unaverage_takes_the_older_ema_out_of_the_newer(decay: float) -> None:
    all_iterates = walk(60)
    averages, average = [], all_iterates[0]
    for weights in all_iterates:
        average = decay * average + (1 - decay) * weights
        averages.append(average)
    window = decay ** np.arange(39, -1, -1)
    expected = window @ all_iterates[20:] / window.sum()
    pair = np.array([averages[19], averages[59]])
    by_steps = coefficients(Scheme(name="unaverage", step_decay=decay), [20, 60])
    np.testing.assert_allclose(by_steps @ pair, expected, rtol=1e-9)
    by_updates = coefficients(Scheme(name="unaverage", decay=decay, updates=40), [None, None])
    np.testing.assert_array_equal(by_steps, by_updates)


def test_order_statistics_count_what_they_leave_out() -> None:
    for n, text, n_cut in (
        (5, "median", 2), (6, "median", 2), (3, "median", 1), (10, "trimmed:fraction=0.2", 2),
        (100, "trimmed:fraction=0.29", 29), (3, "trimmed:fraction=1/3", 1),
        (2 * 7, "trimmed:fraction=0.49999999999", 6),
    ):  # fmt: skip
        ((_, row),) = coefficient_rows(parse_scheme(text), positions([None] * n))
        assert row.statistic == Trimmed(n_cut)
        assert (row.multipliers, row.divisor) == ((1.0,) * n, n)
        assert row.told_coefficients == (None,) * n


@pytest.mark.parametrize(("text", "n"), [("median", 1), ("median", 2), ("trimmed:fraction=0.1", 9)])
def test_order_statistics_that_leave_nothing_out_are_the_mean(text: str, n: int) -> None:
    notes: list[str] = []
    ((_, row),) = coefficient_rows(parse_scheme(text), positions([None] * n), notes)
    assert (row.multipliers, row.divisor, row.statistic) == ((1.0,) * n, n, None)
    assert notes == ([] if text == "median" else [
        "scheme 'trimmed:fraction=0.1' cuts nothing from 9 checkpoints: it is their mean"
    ])  # fmt: skip


def test_order_statistics_have_names_of_their_own() -> None:
    ((_, row),) = coefficient_rows(parse_scheme("median"), positions(STEPS))
    assert row.statistic_name == "median"
    ((_, row),) = coefficient_rows(
        parse_scheme("trimmed:fraction=0.25,last=10"), positions([None] * 12)
    )
    assert row.statistic_name == "trimmed 20%"
    assert row.told_coefficients == (0, 0, *(None,) * 10)


def swag_rows(text: str, n: int) -> list[tuple[Array, GaussianNoise]]:
    rows = []
    for _, row in coefficient_rows(parse_scheme(text), positions([None] * n)):
        assert isinstance(row.statistic, GaussianNoise)
        rows.append((np.array(row.coefficients), row.statistic))
    return rows


def test_swag_samples_have_the_mean_and_the_covariance_of_the_deviations() -> None:
    n, rank, m = 5, 3, 1000
    snapshots = walk(n)
    samples = np.array(
        [row @ snapshots for row, _ in swag_rows(f"swag:rank={rank},samples={m}", n)]
    )
    deviations = snapshots[-rank:] - snapshots.mean(axis=0)
    covariance = deviations.T @ deviations / (2 * (rank - 1))
    spread = np.sqrt(np.diag(covariance))
    # five standard errors
    assert (np.abs(samples.mean(axis=0) - snapshots.mean(axis=0)) < 5 * spread / m**0.5).all()
    assert (
        np.abs(np.cov(samples.T) - covariance) < 5 * np.outer(spread, spread) * (2 / m) ** 0.5
    ).all()


def test_swag_samples_are_seeded_and_scaled() -> None:
    one, same, other = (swag_rows(f"swag:samples=2,seed={seed}", 4) for seed in (3, 3, 4))
    for (row, noise), (row_again, noise_again) in zip(one, same, strict=True):
        np.testing.assert_array_equal(row, row_again)
        assert noise == noise_again
    rows = [row for row, _ in (*one, *other)]
    assert len({tuple(row) for row in rows}) == 4
    assert [noise for _, noise in one] == [
        GaussianNoise((0, 1, 2, 3), 1 / math.sqrt(2), 3, number) for number in (1, 2)
    ]
    halved = swag_rows("swag:samples=2,seed=3,scale=0.5", 4)
    for (row, _), (half, noise) in zip(one, halved, strict=True):
        np.testing.assert_allclose(half - 0.25, (row - 0.25) / 2, rtol=1e-12)
        assert noise.scale == pytest.approx(0.5 * 2**-0.5)
    # the first sample does not depend on how many there are
    np.testing.assert_array_equal(swag_rows("swag:samples=1,seed=3", 4)[0][0], one[0][0])


def test_swag_has_deviations_of_the_last_checkpoints_only() -> None:
    ((row, noise),) = swag_rows("swag:rank=2,samples=1,last=5", 6)
    assert row[0] == 0
    assert len(set(row[1:4])) == 1
    assert len(set(row[3:])) == 3
    assert noise.moments == (1, 2, 3, 4, 5)
