"""What inner products say: lengths, angles, movement, and the verdict in words."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ckptavg.errors import UsageError
from ckptavg.geometry import Geometry, GramTable, judge
from ckptavg.geometry.table import layer_of

Points = NDArray[np.float64]


def geometry_of(points: Points) -> Geometry:
    mean = points.mean(axis=0)
    rows = np.vstack([points - mean, mean])
    return Geometry(rows @ rows.T)


def noise(n_points: int, seed: int = 0, size: int = 4000) -> Points:
    return np.random.default_rng(seed).standard_normal((n_points, size))


def walk(n_points: int, seed: int = 0) -> Points:
    return noise(n_points, seed).cumsum(axis=0)


CENTRE = 10 * noise(1, seed=99)


def test_lengths_and_angles_are_those_of_the_points() -> None:
    points = noise(6) + CENTRE
    geometry = geometry_of(points)
    np.testing.assert_allclose(geometry.norms, np.linalg.norm(points, axis=1), rtol=1e-12)
    differences = points[:, None] - points[None]
    np.testing.assert_allclose(
        geometry.distances, np.linalg.norm(differences, axis=2), rtol=1e-12, atol=1e-9
    )
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    np.testing.assert_allclose(geometry.cosines, units @ units.T, rtol=1e-12)
    mean = points.mean(axis=0)
    assert geometry.mean_norm == pytest.approx(np.linalg.norm(mean), rel=1e-12)
    deviations = np.linalg.norm(points - mean, axis=1)
    np.testing.assert_allclose(geometry.deviations, deviations, rtol=1e-12)
    assert geometry.spread == pytest.approx(np.sqrt((deviations**2).mean()), rel=1e-12)
    assert geometry.norm_ratio == pytest.approx(
        np.linalg.norm(mean) / np.linalg.norm(points, axis=1).mean(), rel=1e-12
    )


def test_some_of_the_points_have_the_geometry_of_these_alone() -> None:
    points = noise(7) + CENTRE
    some = geometry_of(points).of([1, 2, 5])
    np.testing.assert_allclose(
        some.products, geometry_of(points[[1, 2, 5]]).products, rtol=1e-10, atol=1e-7
    )


def test_principal_components_are_those_of_the_deviations() -> None:
    points = noise(5) * np.array([[3.0], [1.0], [2.0], [1.0], [0.5]]) + CENTRE
    geometry = geometry_of(points)
    deviations = points - points.mean(axis=0)
    _, lengths, directions = np.linalg.svd(deviations, full_matrices=False)
    np.testing.assert_allclose(
        geometry.explained[:4], lengths[:4] ** 2 / (lengths**2).sum(), rtol=1e-10
    )
    coordinates = deviations @ directions[:2].T
    np.testing.assert_allclose(
        np.abs(geometry.coordinates(2)), np.abs(coordinates), rtol=1e-8, atol=1e-8
    )
    direction = geometry.component(0) @ points
    assert np.linalg.norm(direction) == pytest.approx(1, rel=1e-10)
    assert abs(direction @ directions[0]) == pytest.approx(1, rel=1e-10)


def test_points_on_a_line_have_one_component() -> None:
    geometry = geometry_of(np.outer(np.arange(4.0), noise(1)[0]))
    with pytest.raises(UsageError, match="spread in 1 directions only"):
        geometry.component(1)


def test_products_of_combinations_are_those_of_the_weights() -> None:
    points = noise(4) + CENTRE
    one, other = np.array([0.2, 0.3, 0.5, 0.0]), np.array([1.0, -1.0, 0.0, 0.0])
    assert geometry_of(points).product(one, other) == pytest.approx(
        float((one @ points) @ (other @ points)), rel=1e-9
    )


def test_independent_points_are_worth_their_number() -> None:
    for n_points in (4, 10, 30):
        count = geometry_of(noise(n_points)).effective_count(range(n_points))
        assert count == pytest.approx(n_points, rel=0.1)


def test_correlated_points_are_worth_what_their_mean_says() -> None:
    """AR(1): the variance of the mean is that of (1 - a) / (1 + a) times as many points."""
    coefficient, n_points = 0.6, 150
    innovations = noise(n_points, size=10_000)
    points = [innovations[0] / np.sqrt(1 - coefficient**2)]
    for one in innovations[1:]:
        points.append(coefficient * points[-1] + one)
    count = geometry_of(np.array(points)).effective_count(range(n_points))
    expected = n_points * (1 - coefficient) / (1 + coefficient)
    assert count == pytest.approx(expected, rel=0.25)


def test_a_drift_is_taken_out_before_points_are_counted() -> None:
    drift = np.outer(np.arange(20.0), noise(1, seed=5)[0])
    geometry = geometry_of(noise(20) + drift)
    assert geometry.drift_share(range(20)) > 0.9
    assert geometry.effective_count(range(20)) == pytest.approx(20, rel=0.15)


def test_movement_tells_noise_from_a_walk_and_from_a_line() -> None:
    share, lag = geometry_of(noise(20)).taken_back() or (0.0, 0)
    assert share > 0.95
    assert lag == 1
    share, _ = geometry_of(walk(20)).taken_back() or (1.0, 0)
    assert share < 0.1
    line = geometry_of(np.outer(np.arange(8.0), noise(1)[0]))
    assert line.taken_back() == (0.0, 1)
    assert line.drift_share(range(8)) == pytest.approx(1)
    np.testing.assert_allclose(line.step_cosines(), 1)
    assert geometry_of(noise(20)).step_cosines().mean() == pytest.approx(-0.5, abs=0.03)
    assert geometry_of(noise(2)).taken_back() is None


def test_noise_that_lasts_longer_than_a_step_is_seen_on_longer_ways() -> None:
    slow = np.repeat(noise(12), 2, axis=0) + 0.01 * noise(24, seed=3)
    share, lag = geometry_of(slow).taken_back() or (0.0, 0)
    assert lag == 2
    assert share > 0.9


def verdict_of(points: Points) -> tuple[str, str]:
    labels = [f"step-{number}" for number in range(len(points))]
    found = judge(geometry_of(points), None, labels, list(range(len(points))))
    return found.kind, "\n".join(found.sentences)


def test_points_around_a_centre_bounce() -> None:
    kind, text = verdict_of(CENTRE + noise(10))
    assert kind == "bouncing"
    assert "stays where it is" in text
    assert "the 10 are worth" in text


def test_points_around_a_moving_centre_bounce_and_move() -> None:
    drift = np.outer(np.arange(10.0), 0.6 * noise(1, seed=5)[0])
    kind, text = verdict_of(CENTRE + noise(10) + drift)
    assert kind == "bouncing"
    assert "it moves on meanwhile: a straight line in time explains" in text


def test_a_walk_goes_its_way() -> None:
    kind, text = verdict_of(CENTRE + walk(10))
    assert kind == "drifting"
    assert "do not show a centre" in text


def test_steps_that_get_smaller_converge() -> None:
    sizes = np.array([8, 8, 8, 4, 2, 1, 0.5, 0.5, 0.5])[:, None]
    kind, text = verdict_of(CENTRE + (sizes * noise(9)).cumsum(axis=0))
    assert kind == "converging"
    assert "by a factor of 16" in text


def test_equal_weights_are_nothing_to_average() -> None:
    assert verdict_of(np.repeat(CENTRE, 3, axis=0)) == (
        "equal",
        "the checkpoints are equal: there is nothing to average\n"
        "the same weights, which count twice: step-0 = step-1, step-0 = step-2, step-1 = step-2",
    )
    kind, text = verdict_of(CENTRE + 1e-6 * noise(3))
    assert kind == "equal"
    assert "nearly one point" in text


def test_two_points_of_one_run_are_a_pair() -> None:
    kind, text = verdict_of(CENTRE + noise(2))
    assert kind == "pair"
    assert "two checkpoints of one run" in text


def test_unrelated_points_are_no_trajectory() -> None:
    kind, text = verdict_of(np.vstack([CENTRE + noise(3), 10 * noise(1, seed=7)]))
    assert kind == "unrelated"
    assert "2 groups" in text
    assert "step-0, step-1 and 1 more; step-3" in text
    assert "hardly better than chance" in text


def test_ends_of_one_run_may_be_far_apart() -> None:
    """Neighbours are near each other, though the first and the last are not."""
    turn = np.linspace(0, 2, 12)[:, None]
    points = 10 * (np.cos(turn) * noise(1, seed=1) + np.sin(turn) * noise(1, seed=2))
    assert geometry_of(points).cosines[0, -1] < 0
    assert verdict_of(points)[0] == "drifting"


def test_weights_with_two_dimensions_decide_what_is_unrelated() -> None:
    """Scales of norms are near 1 in every run."""
    scales, weights = 50 + noise(2, seed=3), noise(2, seed=4)
    labels, times = ["a", "b"], [0.0, 1.0]
    both = geometry_of(np.hstack([scales, weights]))
    assert judge(both, None, labels, times).kind == "pair"
    assert judge(both, geometry_of(weights), labels, times).kind == "unrelated"


def test_what_lies_apart_is_named() -> None:
    points = CENTRE + noise(6)
    points[4] += 5 * noise(1, seed=8)[0]
    kind, text = verdict_of(points)
    assert kind == "bouncing"
    assert "far from all others: step-4" in text


def test_points_that_are_there_twice_are_named() -> None:
    points = CENTRE + noise(5)
    points[3] = points[1]
    assert "the same weights, which count twice: step-1 = step-3" in verdict_of(points)[1]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "model.layers.12"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("features.3.weight", "features.3"),
        ("blocks.2.norm1.bias", "blocks.2"),
        ("transformer.h.7.mlp.c_fc.weight", "transformer.h.7"),
        ("head.weight", "head"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("w", "w"),
        ("conv1.weight", "conv1"),
        ("layers.3.experts.11.w1.weight", "layers.3"),
    ],
)
def test_a_tensor_belongs_to_the_layer_that_its_name_begins_with(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_matrices_of_a_layer_are_apart_from_the_rest() -> None:
    table = GramTable([("a.0.w", (3, 4)), ("a.0.b", (3,)), ("a.1.w", (2, 2))], range(2))
    assert [(group.name, group.is_matrix) for group in table.groups] == [
        ("a.0", True), ("a.0", False), ("a.1", True),
    ]  # fmt: skip
