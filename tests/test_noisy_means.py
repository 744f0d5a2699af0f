"""Noise of SWAG samples: its numbers, their addresses, its variance, and where it is drawn."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_checkpoint
from numpy.typing import NDArray
from safetensors.torch import load_file
from statistic_rows import GiveRows, mean, median, noisy, with_rows
from torch import Tensor

from ckptavg import (
    IncompatibleCheckpointsError,
    Recipe,
    average_checkpoints,
    open_checkpoint,
    plan_average,
)
from ckptavg.average import averaging_device
from ckptavg.average.floats import encode_from_float64
from ckptavg.average.normal_numbers import _log, _sine_and_cosine_of_turns, standard_normal
from ckptavg.coefficients import CoefficientRow, GaussianNoise
from ckptavg.prepare import prepared_average
from ckptavg.tensors import DTYPE_BY_NAME

Array = NDArray[np.float64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INFINITY, NAN = math.inf, math.nan


def save(folder: Path, checkpoints: Sequence[dict[str, Tensor]]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [
        save_checkpoint(folder / f"c{number}", tensors, "safetensors")
        for number, tensors in enumerate(checkpoints)
    ]


def random_values(count: int, numel: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    start = torch.randn(numel, generator=generator)
    return [(start + 0.1 * torch.randn(numel, generator=generator)).to(dtype) for _ in range(count)]


def loaded(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- the numbers


def test_logarithm_sine_and_cosine_are_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.random(100_000), [1.0, 0.5, 0.75, 2.0**-53, 1 - 2.0**-53]])
    np.testing.assert_allclose(_log(values), np.log(values), rtol=1e-15, atol=0)
    turns = np.concatenate([generator.random(100_000), np.arange(16) / 16, [1 - 2.0**-53]])
    sine, cosine = _sine_and_cosine_of_turns(turns)
    np.testing.assert_allclose(sine, np.sin(2 * np.pi * turns), rtol=0, atol=1e-15)
    np.testing.assert_allclose(cosine, np.cos(2 * np.pi * turns), rtol=0, atol=1e-15)


def test_the_numbers_stay_what_they_are() -> None:
    """Samples that were published can be made again: these bits must never change."""
    numbers = standard_normal(7, 3, "layer.weight", 1_000_001, 1_000_005)
    assert [one.hex() for one in numbers.tolist()] == [
        "0x1.e9f9606c16690p-4",
        "0x1.c546336ef05ccp-4",
        "0x1.555e4ee877787p+1",
        "-0x1.b6f56bf68a555p+0",
    ]


@pytest.fixture(scope="module")
def million() -> Array:
    return standard_normal(0, 0, "w", 0, 10**6)


def test_a_million_numbers_are_standard_normal(million: Array) -> None:
    """Each moment within four of its standard errors; the distribution function likewise."""
    n = len(million)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((million**power).mean() - expected) < 4 * math.sqrt(variance / n)
    levels = np.linspace(-3, 3, 25)
    below = np.searchsorted(np.sort(million), levels) / n
    expected_below = [0.5 * (1 + math.erf(level / math.sqrt(2))) for level in levels]
    assert np.abs(below - expected_below).max() < 2 / math.sqrt(n)  # Kolmogorov: 1.95 at 0.1 %
    assert 4.3 < np.abs(million).max() < 6


def test_seeds_samples_tensors_and_neighbours_are_not_correlated(million: Array) -> None:
    others = [
        standard_normal(1, 0, "w", 0, 10**6),
        standard_normal(0, 1, "w", 0, 10**6),
        standard_normal(0, 0, "v", 0, 10**6),
        standard_normal(0, 11, "w", 0, 10**6),
        standard_normal(0, 1, "1/w", 0, 10**6),
        *(np.roll(million, shift) for shift in (1, 2, 3, 4, 8, 64)),
    ]
    for other in others:
        assert abs((million * other).mean()) < 4 / math.sqrt(10**6)
        assert abs((million**2 * other**2).mean() - 1) < 4 * math.sqrt(8 / 10**6)


def test_any_part_of_a_tensor_has_the_numbers_of_the_whole(million: Array) -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        first = int(generator.integers(0, 10**6))
        last = min(10**6, first + int(generator.integers(0, 2000)))
        np.testing.assert_array_equal(standard_normal(0, 0, "w", first, last), million[first:last])
    far = standard_normal(0, 0, "w", 2**40, 2**40 + 9)
    np.testing.assert_array_equal(standard_normal(0, 0, "w", 2**40 + 5, 2**40 + 9), far[5:])


# -- the mean and the variance


def reference(values: Sequence[Tensor], row: CoefficientRow, name: str, *, first: int = 0) -> Array:
    """Compute in float64 what a row must give before it is rounded."""
    noise = row.statistic
    assert isinstance(noise, GaussianNoise)
    stack = np.stack([value.double().numpy().reshape(-1) for value in values])
    linear = sum(stack[k] * row.multipliers[k] for k in reversed(range(len(stack)))) / row.divisor
    numel = stack.shape[1]
    z = standard_normal(noise.seed, noise.sample, name, first, first + numel)
    result: Array = linear + noise.scale * stack[list(noise.moments)].std(axis=0) * z
    return result


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_with_noise_is_rounded_once(
    tmp_path: Path, give_rows: GiveRows, dtype: torch.dtype, target: torch.dtype
) -> None:
    values = random_values(6, 70_001, dtype)
    low_rank = CoefficientRow((0.1, -0.3, 0.25, 0.15, 0.5, 0.3), 1)
    rows = [
        noisy(mean(6)),
        noisy(mean(6), scale=2.0**-0.5, seed=5, sample=1),
        noisy(low_rank, seed=5, sample=2),
        replace(low_rank, statistic=GaussianNoise((1, 3, 4), 0.5, 5, 3)),
    ]
    give_rows(*rows)
    sources = save(tmp_path, [{"w": value} for value in values])
    name = str(target).removeprefix("torch.")
    average_checkpoints(sources, tmp_path / "out", dtype=name)  # type: ignore[arg-type]  # a parameter
    for number, row in enumerate(rows):
        result = loaded(tmp_path / f"out/out{number}")["w"]
        expected = reference(values, row, "w")
        if target is torch.float64:
            np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9, atol=1e-12)
        else:  # the reference may differ in the last bits of float64, hence rarely by one ulp
            rounded = encode_from_float64(expected, DTYPE_BY_NAME[name])
            differ = np.frombuffer(bits(result), rounded.dtype) != rounded
            assert differ.sum() <= 2


def test_values_close_together_keep_their_variance(tmp_path: Path, give_rows: GiveRows) -> None:
    """mean(x^2) - mean(x)^2 taken as it stands would be 0 or noise here: 1e-18 beside 1."""
    generator = torch.Generator().manual_seed(0)
    values = [1 + 1e-9 * torch.randn(10_000, generator=generator).double() for _ in range(5)]
    row = noisy(mean(5))
    give_rows(row)
    average_checkpoints(save(tmp_path, [{"w": value} for value in values]), tmp_path / "out")
    result = loaded(tmp_path / "out")["w"].numpy()
    np.testing.assert_allclose(result - 1, reference(values, row, "w") - 1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_equal_checkpoints_come_back_bit_for_bit(
    tmp_path: Path, give_rows: GiveRows, dtype: torch.dtype, count: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    value = (torch.randn(5000, generator=generator, dtype=torch.float64) * 100).to(dtype)
    value[:3] = torch.tensor([-0.0, 1e-45, 3e4])
    tensors = {"w": value, "bn.running_var": value[:100].abs().contiguous()}
    multipliers = np.random.default_rng(0).normal(size=count)
    give_rows(
        noisy(CoefficientRow(tuple((multipliers / multipliers.sum()).tolist()), 1)),
        noisy(mean(count)),
    )
    average_checkpoints(save(tmp_path, [tensors] * count), tmp_path / "out")
    for number in range(2):
        result = loaded(tmp_path / f"out/out{number}")
        assert {name: bits(one) for name, one in result.items()} == {
            name: bits(one) for name, one in tensors.items()
        }


def test_samples_have_the_covariance_of_swag(tmp_path: Path, give_rows: GiveRows) -> None:
    """Maddox et al. 2019, eq. 1: N(mean, (diag + D D^T / (K - 1)) / 2), over 3000 samples."""
    n, rank, n_samples = 5, 4, 3000
    values = [torch.randn(4, generator=torch.Generator().manual_seed(k)).double() for k in range(n)]
    generator = np.random.default_rng(0)
    rows = []
    for sample in range(n_samples):
        z = generator.standard_normal(rank) / math.sqrt(2 * (rank - 1))
        common = (1 - z.sum()) / n
        multipliers = [*[common] * (n - rank), *(common + z)]
        row = CoefficientRow(tuple(float(one) for one in multipliers), 1)
        rows.append(noisy(row, scale=2.0**-0.5, seed=1, sample=sample))
    plan = plan_average(
        [open_checkpoint(path) for path in save(tmp_path, [{"w": value} for value in values])],
        Recipe(),
    )
    from ckptavg.average.numpy_arithmetic import NumpyArithmetic

    (chunk,) = plan.chunks(2**20)
    arithmetic = NumpyArithmetic(rows, "auto", chunk.nbytes)
    arithmetic.start(chunk)
    samples = np.empty((n_samples, 4))
    for index in reversed(range(n)):
        arithmetic.input[:] = bits(values[index])
        for row_number in arithmetic.add(index):
            samples[row_number] = np.frombuffer(arithmetic.finish(row_number)[0])
    stack = np.stack([value.numpy() for value in values])
    deviations = (stack - stack.mean(axis=0))[n - rank :].T
    covariance = (np.diag(stack.var(axis=0)) + deviations @ deviations.T / (rank - 1)) / 2
    error = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()) * 2 / n_samples)
    assert (np.abs(np.cov(samples.T) - covariance) < 4 * error).all()
    standard_errors = np.sqrt(covariance.diagonal() / n_samples)
    assert (np.abs(samples.mean(axis=0) - stack.mean(axis=0)) < 4 * standard_errors).all()


# -- addresses


def test_bits_depend_on_nothing_but_seed_sample_name_and_element(
    tmp_path: Path, give_rows: GiveRows
) -> None:
    w = random_values(4, 400_003)
    extra = random_values(4, 33_333, torch.bfloat16)
    row = noisy(mean(4), seed=3, sample=2)
    alone = save(tmp_path / "alone", [{"w": value} for value in w])
    among = save(
        tmp_path / "among",
        [
            {"a": one[:7].float(), "w": value, "z": one, "n": torch.arange(3)}
            for value, one in zip(w, extra, strict=True)
        ],
    )
    sharded = [
        save_checkpoint(tmp_path / f"s{k}", {"w": w[k], "b": w[k][:5].clone()}, "sharded torch")
        for k in range(4)
    ]
    others = [mean(4), noisy(mean(4), seed=3, sample=1), median(4, last=3)]
    found: list[bytes] = []
    for sources, company, n_threads, budget in (
        (alone, [], 1, 512 * 2**20),
        (alone, [], 3, 512 * 2**20),
        (alone, others, 2, 512 * 2**20),
        (among, [], 1, 16 * 2**20),
        (among, others, 2, 40 * 2**20),
        (sharded, [], 2, 512 * 2**20),
    ):
        give_rows(row, *company)
        out = tmp_path / f"out{len(found)}"
        average_checkpoints(sources, out, n_threads=n_threads, memory_budget_bytes=budget)
        found.append(bits(loaded(out / ("out0" if company else ""))["w"]))
    assert len(set(found)) == 1


def test_samples_seeds_and_tensors_differ(tmp_path: Path, give_rows: GiveRows) -> None:
    values = random_values(3, 1000)
    rows = [noisy(mean(3), seed=seed, sample=sample) for seed in (0, 1) for sample in (0, 1)]
    give_rows(*rows)
    average_checkpoints(
        save(tmp_path, [{"v": value, "w": value.clone()} for value in values]), tmp_path / "out"
    )
    found = [loaded(tmp_path / f"out/out{number}")[name] for number in range(4) for name in "vw"]
    assert len({bits(one) for one in found}) == 8


def test_tied_tensors_get_the_same_noise(tmp_path: Path, give_rows: GiveRows) -> None:
    paths = []
    for number, value in enumerate(random_values(3, 60)):
        paths.append(tmp_path / f"c{number}.pt")
        torch.save({"embed": value, "head": value, "body": value[:5].clone()}, paths[-1])
    give_rows(noisy(mean(3)))
    average_checkpoints(paths, tmp_path / "out")
    result = loaded(tmp_path / "out")
    assert torch.equal(result["embed"], result["head"])


def test_both_parts_of_complex_numbers_have_noise_of_their_own(
    tmp_path: Path, give_rows: GiveRows
) -> None:
    parts = random_values(4, 2 * 501)
    values = [torch.view_as_complex(value.reshape(-1, 2)) for value in parts]
    row = noisy(mean(4))
    give_rows(row)
    average_checkpoints(save(tmp_path, [{"z": value} for value in values]), tmp_path / "out")
    result = torch.view_as_real(loaded(tmp_path / "out")["z"]).reshape(-1)
    np.testing.assert_allclose(result.numpy(), reference(parts, row, "z"), rtol=1e-6)


def test_seed_sample_and_scale_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    paths = save(tmp_path, [{"w": value} for value in random_values(3, 10)])
    plan = plan_average([open_checkpoint(path) for path in paths], Recipe())
    rows = [
        mean(3), noisy(mean(3)), noisy(mean(3), seed=1), noisy(mean(3), sample=1),
        noisy(mean(3), scale=0.5),
    ]  # fmt: skip
    assert len({with_rows(plan, [row]).fingerprint for row in rows}) == len(rows)


# -- what gets no noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batchnorm_statistics_are_the_plain_mean(
    tmp_path: Path, give_rows: GiveRows, dtype: torch.dtype
) -> None:
    """A running variance with noise could be negative, and so could one of the low rank."""
    names = ["bn.running_mean", "bn.running_var", "bn.weight", "running_variety"]
    values = random_values(5, 4 * 50, dtype)
    checkpoints = [
        {
            **{name: value[50 * k : 50 * k + 50].abs() for k, name in enumerate(names)},
            "bn.num_batches_tracked": torch.tensor(number),
        }
        for number, value in enumerate(values)
    ]
    rows = [noisy(CoefficientRow((2.0, -1.5, 1.0, -1.0, 0.5), 1)), noisy(mean(5)), mean(5)]
    give_rows(*rows)
    average_checkpoints(save(tmp_path, checkpoints), tmp_path / "out", accumulate="float64")
    sample, other, plain = (loaded(tmp_path / f"out/out{number}") for number in range(3))
    for name in names:
        is_plain = name.endswith(("running_mean", "running_var"))
        assert (bits(sample[name]) == bits(plain[name])) == is_plain
        assert (bits(other[name]) == bits(plain[name])) == is_plain
    assert sample["bn.num_batches_tracked"].item() == 4


# -- what is not finite


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
def test_a_value_that_is_not_finite_is_refused(
    tmp_path: Path, give_rows: GiveRows, dtype: torch.dtype, bad: float
) -> None:
    values = random_values(4, 2000, dtype)
    values[1][[700, 1999]] = bad
    row = CoefficientRow((0.0, 0.0, 0.5, 0.5), 1)  # what counts for the variance alone, too
    give_rows(replace(row, statistic=GaussianNoise((1, 2, 3), 1.0, 0, 0)))
    with pytest.raises(
        IncompatibleCheckpointsError, match="'w' in checkpoint 2 of 4 has 2 non-finite values"
    ):
        average_checkpoints(save(tmp_path, [{"w": value} for value in values]), tmp_path / "out")
    give_rows(replace(row, statistic=GaussianNoise((2, 3), 1.0, 0, 0)))
    average_checkpoints(save(tmp_path, [{"w": value} for value in values]), tmp_path / "out")


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_that_all_checkpoints_share_pass_through(
    tmp_path: Path, give_rows: GiveRows, dtype: torch.dtype
) -> None:
    values = random_values(4, 100_001, dtype)
    give_rows(noisy(mean(4)))
    average_checkpoints(save(tmp_path, [{"w": value} for value in values]), tmp_path / "plain")
    for value in values:
        value[::3], value[1::30] = -INFINITY, INFINITY
    average_checkpoints(save(tmp_path, [{"w": value} for value in values]), tmp_path / "out")
    result, plain = (loaded(tmp_path / name)["w"] for name in ("out", "plain"))
    expected = torch.where(torch.isinf(values[0]), values[0], plain)
    assert bits(result) == bits(expected)


def test_what_is_not_finite_becomes_nan_if_allowed(tmp_path: Path, give_rows: GiveRows) -> None:
    columns = torch.tensor(
        [[1.0, 2.0, 3.0], [INFINITY, 2.0, 3.0], [NAN, 1.0, 2.0], [-INFINITY] * 3]
    )
    give_rows(noisy(mean(3)))
    sources = save(tmp_path, [{"w": value.contiguous()} for value in columns.T])
    average_checkpoints(sources, tmp_path / "out", allow_nonfinite=True)
    result = loaded(tmp_path / "out")["w"]
    assert torch.isfinite(result).tolist() == [True, False, False, False]
    assert torch.isnan(result).tolist() == [False, True, True, False]


# -- where it is drawn


def test_noise_is_drawn_on_the_cpu_wherever_the_model_runs(
    tmp_path: Path, give_rows: GiveRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptavg.prepare.choose_device", lambda *args, **options: "cuda:0")
    sources = save(tmp_path, [{"w": value} for value in random_values(3, 10)])
    plan = plan_average([open_checkpoint(path) for path in sources], Recipe())
    assert averaging_device(with_rows(plan, [mean(3), median(3)]), "cuda:0") == "cuda:0"
    give_rows(noisy(mean(3)), mean(3))
    with prepared_average(sources, tmp_path / "out", Recipe(), device="cuda") as prepared:
        assert prepared.workspace.device == "cpu"
        assert prepared.notes == (
            "SWAG samples are drawn on the CPU, so that their bits are the same everywhere, and "
            "all is averaged there; cuda:0 is not used",
        )
