"""Medians and trimmed means: every bit, on every road to it."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file
from statistic_rows import GiveRows, mean, median, noisy, trimmed, with_rows
from torch import Tensor

from ckptavg import (
    IncompatibleCheckpointsError,
    Recipe,
    average_checkpoints,
    open_checkpoint,
    plan_average,
)
from ckptavg.average.cuda_arithmetic import CudaArithmetic
from ckptavg.average.floats import encode_from_float64
from ckptavg.average.numpy_arithmetic import NumpyArithmetic
from ckptavg.average.sorting_network import sort_rows, sorting_network, stacks_of
from ckptavg.blocks import Action, Chunk
from ckptavg.coefficients import CoefficientRow
from ckptavg.tensors import DTYPE_BY_NAME, DType, Piece

INFINITY, NAN = math.inf, math.nan
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def some_values(dtype: torch.dtype, count: int, numel: int = 2001) -> list[Tensor]:
    """Return checkpoints of a few elements with ties, zeros of both signs and subnormals."""
    generator = torch.Generator().manual_seed(count)
    smallest = torch.finfo(dtype).smallest_normal
    values = torch.randn(count, numel, generator=generator, dtype=torch.float64)
    values[:, 1::5] = (2 * values[:, 1::5]).round()  # ties
    values[:, 2::5] = values[:, 2::5].sign() * 0.0
    values[:, 3::5] *= smallest / 8
    values[:, 4::50] *= torch.finfo(dtype).max / 512
    return list(values.to(dtype))


def reference(values: Sequence[Tensor], n_cut: int, dtype: torch.dtype) -> bytes:
    """Sort by value and sign, add up what is left in float64 from the smallest, round once."""
    stack = np.stack([value.double().numpy() for value in values])
    order = np.lexsort((~np.signbit(stack), stack), axis=0)
    kept = np.take_along_axis(stack, order, axis=0)[n_cut : len(stack) - n_cut]
    total = kept[0].copy()
    for one in kept[1:]:
        total += one
    total /= len(kept)
    same = (kept[0] == kept[-1]) & (np.signbit(kept[0]) == np.signbit(kept[-1]))
    total[same] = kept[0][same]
    return encode_from_float64(total, DTYPE_BY_NAME[str(dtype).removeprefix("torch.")]).tobytes()


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(folder: Path, values: Sequence[Tensor], layout: str = "safetensors") -> list[Path]:
    return [
        save_checkpoint(folder / f"c{number}", {"w": value}, layout)
        for number, value in enumerate(values)
    ]


# -- the network


@pytest.mark.parametrize("n", range(1, 13))
def test_the_network_sorts_all_zeros_and_ones_and_so_everything(n: int) -> None:
    """Knuth's 0-1 principle, for every n_cut: what is not needed may be left out."""
    inputs = np.arange(2**n)
    expected = np.sort([(inputs >> place) & 1 for place in range(n)], axis=0)
    for n_cut in range((n + 1) // 2):
        ranks = range(n_cut, n - n_cut)
        rows = [((inputs >> place) & 1).astype(np.int8) for place in range(n)]
        network = sorting_network(n, ranks)
        result = sort_rows(network, rows, np.empty(2**n, np.int8), np.minimum, np.maximum)
        assert len(result) == n
        for rank in ranks:
            np.testing.assert_array_equal(result[rank], expected[rank])


@pytest.mark.parametrize("n", [13, 16, 17, 24, 33, 64, 100])
def test_the_network_sorts_many_values(n: int) -> None:
    rows = list(np.random.default_rng(n).integers(-50, 50, (n, 3000)).astype(np.int16))
    expected = np.sort(rows, axis=0)
    network = sorting_network(n, range(n))
    result = sort_rows(network, rows, np.empty(3000, np.int16), np.minimum, np.maximum)
    np.testing.assert_array_equal(result, expected)


def test_a_median_needs_fewer_comparisons_than_sorting() -> None:
    def n_steps(ranks: Sequence[int]) -> int:
        return sum(one.keeps_low + one.keeps_high for one in sorting_network(20, ranks))

    assert n_steps([9, 10]) < 0.75 * n_steps(range(20))


# -- values


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 10, 33])
def test_every_order_statistic_is_rounded_once_from_its_definition(
    tmp_path: Path, device: str, give_rows: GiveRows, dtype: torch.dtype, count: int
) -> None:
    values = some_values(dtype, count)
    cuts = sorted({0, (count - 1) // 4, (count - 1) // 2})
    give_rows(*(trimmed(count, n_cut) for n_cut in cuts))
    average_checkpoints(save(tmp_path, values), tmp_path / "out", device=device)
    for number, n_cut in enumerate(cuts):
        folder = tmp_path / "out" / (f"out{number}" if len(cuts) > 1 else "")
        result = load_file(folder / "model.safetensors")["w"]
        assert bits(result) == reference(values, n_cut, dtype), n_cut


@pytest.mark.parametrize("count", [3, 8])
def test_the_median_is_that_of_numpy(
    tmp_path: Path, device: str, give_rows: GiveRows, count: int
) -> None:
    values = some_values(torch.float32, count)
    give_rows(median(count))
    average_checkpoints(save(tmp_path, values), tmp_path / "out", device=device)
    expected = np.median([value.double().numpy() for value in values], axis=0)
    result = load_file(tmp_path / "out/model.safetensors")["w"]
    np.testing.assert_array_equal(result.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_an_order_statistic_is_rounded_once_to_any_dtype(
    tmp_path: Path, device: str, give_rows: GiveRows, dtype: torch.dtype, target: torch.dtype
) -> None:
    values = [value * 2.0**-8 for value in some_values(dtype, 6)]  # fits float16, but for some
    values = [value.clamp(-60000, 60000) for value in values]
    give_rows(median(6), trimmed(6, 1), median(6, last=5))
    name: Any = str(target).removeprefix("torch.")
    average_checkpoints(save(tmp_path, values), tmp_path / "out", device=device, dtype=name)
    for number, (some, n_cut) in enumerate([(values, 2), (values, 1), (values[1:], 2)]):
        result = load_file(tmp_path / f"out/out{number}/model.safetensors")["w"]
        assert result.dtype == target
        assert bits(result) == reference(some, n_cut, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_that_agree_after_trimming_come_back_bit_for_bit(
    tmp_path: Path, device: str, give_rows: GiveRows, dtype: torch.dtype
) -> None:
    """Seven times x, over 7, is not always x in float64."""
    same = some_values(dtype, 1)[0]
    outlier = torch.full_like(same, torch.finfo(dtype).max)
    give_rows(trimmed(9, 1))
    sources = save(tmp_path, [same, outlier, *[same] * 6, -outlier])
    average_checkpoints(sources, tmp_path / "out", device=device)
    assert bits(load_file(tmp_path / "out/model.safetensors")["w"]) == bits(same)


def test_float64_values_whose_sum_overflows_have_a_median(
    tmp_path: Path, device: str, give_rows: GiveRows
) -> None:
    values = [torch.tensor([one, 1.0], dtype=torch.float64) for one in (1.25e308, 1.75e308)]
    give_rows(median(2))
    average_checkpoints(save(tmp_path, values), tmp_path / "out", device=device)
    assert load_file(tmp_path / "out/model.safetensors")["w"].tolist() == [1.5e308, 1.0]


def test_complex_tensors_have_the_order_statistics_of_their_parts(
    tmp_path: Path, device: str, give_rows: GiveRows
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(501, generator=generator, dtype=torch.complex64) for _ in range(5)]
    give_rows(median(5))
    average_checkpoints(save(tmp_path, values), tmp_path / "out", device=device)
    result = load_file(tmp_path / "out/model.safetensors")["w"]
    parts = torch.stack([torch.view_as_real(value) for value in values])
    assert torch.equal(torch.view_as_real(result), parts.median(dim=0).values)


# -- roads


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_do_not_depend_on_threads_or_memory_or_company(
    tmp_path: Path, device: str, give_rows: GiveRows, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (700, 513), "small": (3,), "odd": (77777,), "last": (5,)}
    paths = [
        save_checkpoint(
            tmp_path / f"c{number}",
            {
                name: torch.randn(shape, generator=generator).to(dtype)
                for name, shape in shapes.items()
            },
            "safetensors",
        )
        for number in range(6)
    ]
    row, results = trimmed(6, 1, last=5), []
    company = [[], [mean(6), median(6), trimmed(6, 1), trimmed(6, 2, last=5), mean(6, last=2)]]
    for number, (others, (n_threads, budget)) in enumerate(
        itertools.product(company, [(1, 40 * 2**20), (3, 512 * 2**20), (2, 100 * 2**20)])
    ):
        give_rows(row, *others)
        average_checkpoints(
            paths, tmp_path / f"out{number}", device=device, n_threads=n_threads,
            memory_budget_bytes=budget + (0 if device == "cpu" else 64 * 2**20),
        )  # fmt: skip
        folder = tmp_path / f"out{number}" / ("out0" if others else "")
        results.append((folder / "model.safetensors").read_bytes())
    assert len(set(results)) == 1


def test_all_rows_come_from_one_read_of_the_checkpoints(
    tmp_path: Path, device: str, give_rows: GiveRows
) -> None:
    values = some_values(torch.float32, 7)
    rows = [mean(7), median(7), trimmed(7, 1), median(7, last=4), mean(7, last=3)]
    give_rows(*rows)
    result = average_checkpoints(save(tmp_path, values), tmp_path / "out", device=device)
    assert result.read_nbytes == 7 * 4 * 2001
    alone = tmp_path / "alone"
    alone.mkdir()
    for number, row in enumerate(rows):
        give_rows(row)
        average_checkpoints(save(alone, values), alone / f"out{number}", device=device)
        one, other = (
            (folder / f"out{number}/model.safetensors").read_bytes()
            for folder in (alone, tmp_path / "out")
        )
        assert one == other


def test_rows_of_the_same_checkpoints_share_one_sorted_stack() -> None:
    stacks = stacks_of([mean(7), median(7), trimmed(7, 1), median(7, last=4), trimmed(7, 2)])
    assert [stack.members for stack in stacks] == [tuple(range(7)), (3, 4, 5, 6)]
    assert stacks[0].kept == {1: range(3, 4), 2: range(1, 6), 4: range(2, 5)}


def one_chunk(numel: int, dtype: DType, output_dtype: DType) -> Chunk:
    return Chunk(
        block=0,
        pieces=(Piece("w", 0, numel * dtype.itemsize),),
        numel=numel,
        dtype=dtype,
        output_dtype=output_dtype,
        action=Action.AVERAGE,
        destinations=((0, 0),),
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("nonfinite", [None, INFINITY, -INFINITY, NAN, -NAN])
@np.errstate(all="ignore")
def test_torch_gives_the_bits_of_numpy(
    dtype: torch.dtype, target: torch.dtype, nonfinite: float | None
) -> None:
    """The code for a GPU, run on the CPU; what is not finite is told by both, bits or not."""
    values = [value * 2.0**-8 for value in some_values(dtype, 9, 40_001)]
    for value in values[1:]:
        value[30_000:] = values[0][30_000:]
    if nonfinite is not None:
        values[5][20_000] = nonfinite
    rows = [mean(9), median(9), trimmed(9, 1), median(9, last=8), trimmed(9, 0), median(9, last=2)]
    one, other = (DTYPE_BY_NAME[str(name).removeprefix("torch.")] for name in (dtype, target))
    chunk = one_chunk(40_001, one, other)
    on_numpy = NumpyArithmetic(rows, "auto", chunk.nbytes)
    on_torch = CudaArithmetic(rows, "auto", torch.device("cpu"))
    on_numpy.start(chunk)
    on_torch.start(chunk)
    n_rows = 0
    for index in reversed(range(9)):
        on_numpy.input[:] = bits(values[index])
        complete = on_numpy.add(index)
        assert sorted(on_torch.add(values[index].clone(), index)) == sorted(complete)
        for row in complete:
            n_rows += 1
            found, finite = on_numpy.finish(row)
            output, extremes = torch.empty(40_001, dtype=target), torch.empty(2, dtype=target)
            on_torch.finish(row, output, extremes[0], extremes[1])
            assert bool(torch.isfinite(extremes).all()) == finite
            if nonfinite is None:
                assert bits(output) == bytes(found)
            else:
                assert not finite or 5 not in rows[row].used
    assert n_rows == len(rows)


@pytest.mark.usefixtures("small_blocks")
def test_a_resumed_run_gives_the_same_bits(tmp_path: Path, give_rows: GiveRows) -> None:
    values = some_values(torch.float32, 5, 20_000)
    paths = save(tmp_path, values)
    give_rows(median(5), mean(5), noisy(mean(5)))
    average_checkpoints(paths, tmp_path / "whole")

    def interrupt(stage: str, done: int, total: int | None) -> None:
        calls.append(done)
        if len(calls) == 7:
            raise KeyboardInterrupt

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        average_checkpoints(paths, tmp_path / "out", progress=interrupt, n_threads=1)
    result = average_checkpoints(paths, tmp_path / "out")
    assert 0 < result.resumed_nbytes < result.read_nbytes
    for name in ("out0", "out1", "out2"):
        one, other = (
            (tmp_path / folder / name / "model.safetensors").read_bytes()
            for folder in ("whole", "out")
        )
        assert one == other


def test_the_statistic_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    checkpoints = [open_checkpoint(path) for path in save(tmp_path, some_values(torch.float32, 5))]
    plan = plan_average(checkpoints, Recipe())
    rows = [mean(5), trimmed(5, 1), median(5)]
    assert len({with_rows(plan, [row]).fingerprint for row in rows}) == 3


# -- what is not finite


def refusal(tmp_path: Path, values: Sequence[Tensor], **options: Any) -> str:
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        average_checkpoints(save(tmp_path, values), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [NAN, -NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("row", [median(5), trimmed(5, 1)], ids=["median", "trimmed"])
def test_a_value_that_is_not_finite_is_refused_though_the_median_would_be(
    tmp_path: Path,
    device: str,
    give_rows: GiveRows,
    dtype: torch.dtype,
    bad: float,
    row: CoefficientRow,
) -> None:
    values = some_values(dtype, 5)
    values[1][[700, 1999]] = bad
    give_rows(mean(5, last=1), row)
    assert refusal(tmp_path, values, device=device) == (
        "c1.safetensors: tensor 'w' in checkpoint 2 of 5 has 2 non-finite values (infinity or "
        "NaN); leave that checkpoint out, or pass --allow-nonfinite"
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [2, 3])
def test_infinities_that_all_checkpoints_share_pass_through(
    tmp_path: Path, device: str, give_rows: GiveRows, dtype: torch.dtype, count: int
) -> None:
    values = some_values(dtype, count, 300_001)
    for value in values:
        value[::3], value[1::30] = -INFINITY, INFINITY
    give_rows(median(count))
    average_checkpoints(save(tmp_path, values), tmp_path / "out", device=device)
    result = load_file(tmp_path / "out/model.safetensors")["w"]
    assert bits(result) == reference(values, (count - 1) // 2, dtype)
    assert (result[::3] == -INFINITY).all()


def test_infinities_of_both_signs_are_not_shared(
    tmp_path: Path, device: str, give_rows: GiveRows
) -> None:
    give_rows(median(3))
    values = [torch.tensor([one]) for one in (INFINITY, -INFINITY, INFINITY)]
    assert "in checkpoint 1 of 3 has 1 non-finite" in refusal(tmp_path, values, device=device)


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_take_part_in_the_order_if_allowed_and_nan_wins(
    tmp_path: Path, device: str, give_rows: GiveRows, dtype: torch.dtype
) -> None:
    columns = [
        ([1, 2, 3, 4], 2.5),
        ([INFINITY, 2, 3, 4], 3.5),
        ([INFINITY, -INFINITY, 3, 4], 3.5),
        ([INFINITY, INFINITY, 3, 4], INFINITY),
        ([-INFINITY, -INFINITY, INFINITY, INFINITY], NAN),
        ([NAN, 1, 2, 3], NAN),
        ([-NAN, 1, 2, 3], NAN),
        ([-INFINITY] * 4, -INFINITY),
    ]
    values = list(torch.tensor([column for column, _ in columns]).to(dtype).T.contiguous())
    give_rows(median(4))
    average_checkpoints(
        save(tmp_path, values), tmp_path / "out", device=device, allow_nonfinite=True
    )
    result = load_file(tmp_path / "out/model.safetensors")["w"]
    expected = torch.tensor([value for _, value in columns]).to(dtype)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_an_infinity_does_not_change_its_neighbours(
    tmp_path: Path, device: str, give_rows: GiveRows
) -> None:
    values = some_values(torch.float64, 7, 100_001)
    give_rows(trimmed(7, 1))
    expected = reference(values, 1, torch.float64)
    for number, value in enumerate(values[:3]):
        value[number::9999] = (-1) ** number * INFINITY
    average_checkpoints(
        save(tmp_path, values), tmp_path / "out", device=device, allow_nonfinite=True
    )
    result = bits(load_file(tmp_path / "out/model.safetensors")["w"])
    spoiled = {place for number in range(3) for place in range(number, 100_001, 9999)}
    for place in range(100_001):
        if place not in spoiled:
            assert result[8 * place : 8 * place + 8] == expected[8 * place : 8 * place + 8]
    assert result == reference(values, 1, torch.float64)


def test_a_nan_that_all_share_keeps_its_bits_if_allowed(
    tmp_path: Path, device: str, give_rows: GiveRows
) -> None:
    value = torch.tensor([0x7FC00123, -0x3FFEDD, 1], dtype=torch.int32).view(torch.float32)
    give_rows(median(3))
    average_checkpoints(
        save(tmp_path, [value] * 3), tmp_path / "out", device=device, allow_nonfinite=True
    )
    assert bits(load_file(tmp_path / "out/model.safetensors")["w"]) == bits(value)


def test_a_median_that_overflows_the_output_dtype_is_refused(
    tmp_path: Path, device: str, give_rows: GiveRows
) -> None:
    give_rows(median(3))
    values = [torch.tensor([1.0, one]) for one in (1e5, 2e5, 1e6)]
    assert refusal(tmp_path, values, device=device, dtype="float16") == (
        "tensor 'w': averaged values overflow float16; choose a wider --dtype, or pass "
        "--allow-nonfinite"
    )
