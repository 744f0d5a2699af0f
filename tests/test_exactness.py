"""Every bit of an average: against independent references, on every road to it."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FORMATS, float64_mean, save_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from ckptavg import average_checkpoints
from ckptavg.average.floats import encode_from_float64
from ckptavg.tensors import DTYPE_BY_NAME

SHAPES = {
    "weight": (67, 129),
    "bias": (129,),
    "scalar": (),
    "empty": (2, 0, 3),
    "one": (1,),
    "odd": (1001,),
}
COUNTS = (1, 2, 3, 10, 33)


def random_checkpoints(
    dtype: torch.dtype, count: int, *, shapes: dict[str, tuple[int, ...]] | None = None
) -> list[dict[str, Tensor]]:
    """Return checkpoints as a run leaves them: a common point and noise of about its size."""
    generator = torch.Generator().manual_seed(count)
    shapes = shapes or SHAPES
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return [
        {
            name: (value + 0.3 * torch.randn(value.shape, generator=generator)).to(dtype)
            for name, value in start.items()
        }
        for _ in range(count)
    ]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def rounded_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to a dtype by exact rational arithmetic where torch would round twice."""
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    flat = [round_fraction(Fraction(value), dtype) for value in values.reshape(-1).tolist()]
    return torch.tensor(flat, dtype=torch.float64).to(dtype).reshape(values.shape)


def round_fraction(value: Fraction, dtype: torch.dtype) -> float:
    """Return the nearest value of a 16-bit float format, ties to even (normal and subnormal)."""
    if value == 0:
        return 0.0
    digits, lowest = (11, -24) if dtype is torch.float16 else (8, -133)
    magnitude, exponent = abs(value), 0
    while magnitude >= 2**digits:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 2 ** (digits - 1) and exponent > lowest:
        magnitude, exponent = magnitude * 2, exponent - 1
    whole = round(magnitude)  # Python rounds a Fraction half to even
    return float(whole * Fraction(2) ** exponent) * (1 if value > 0 else -1)


@pytest.mark.parametrize("count", COUNTS)
def test_float32_mean_equals_float64_reference_bit_for_bit(
    tmp_path: Path, device: str, count: int
) -> None:
    checkpoints = random_checkpoints(torch.float32, count)
    paths = [
        save_checkpoint(tmp_path / f"c{index}", tensors, layout)
        for index, (tensors, layout) in enumerate(
            zip(checkpoints, itertools.cycle(FORMATS), strict=False)
        )
    ]
    average_checkpoints(paths, tmp_path / "out", device=device)
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        expected = float64_mean([tensors[name] for tensors in checkpoints]).float()
        assert bits(result[name]) == bits(expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", COUNTS)
def test_16_bit_mean_with_float64_sums_is_rounded_once(
    tmp_path: Path, device: str, dtype: torch.dtype, count: int
) -> None:
    checkpoints = random_checkpoints(dtype, count)
    paths = [
        save_checkpoint(tmp_path / f"c{index}", tensors, "safetensors")
        for index, tensors in enumerate(checkpoints)
    ]
    average_checkpoints(paths, tmp_path / "out", device=device, accumulate="float64")
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        mean = float64_mean([tensors[name] for tensors in checkpoints])
        assert bits(result[name]) == bits(rounded_once(mean, dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", COUNTS)
def test_16_bit_mean_by_default_equals_fixed_order_float32_sum(
    tmp_path: Path, device: str, dtype: torch.dtype, count: int
) -> None:
    checkpoints = random_checkpoints(dtype, count)
    paths = [
        save_checkpoint(tmp_path / f"c{index}", tensors, "torch")
        for index, tensors in enumerate(checkpoints)
    ]
    average_checkpoints(paths, tmp_path / "out", device=device)
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        total = checkpoints[0][name].float()
        for tensors in checkpoints[1:]:
            total = total + tensors[name].float()
        expected = (total / torch.tensor(float(count))).to(dtype)
        assert bits(result[name]) == bits(expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [3, 7, 10, 16])
def test_16_bit_mean_by_default_is_nearly_always_the_correctly_rounded_one(
    tmp_path: Path, dtype: torch.dtype, count: int
) -> None:
    """The bound that the README states: at most 1e-5 of the elements, by one ulp."""
    checkpoints = random_checkpoints(dtype, count, shapes={"weight": (1000, 1000)})
    paths = [
        save_checkpoint(tmp_path / f"c{index}", tensors, "safetensors")
        for index, tensors in enumerate(checkpoints)
    ]
    for accumulate in ("auto", "float64"):
        average_checkpoints(paths, tmp_path / accumulate, accumulate=accumulate)
    default, exact = (
        load_file(tmp_path / accumulate / "model.safetensors")["weight"].view(torch.int16).int()
        for accumulate in ("auto", "float64")
    )
    distance = (default - exact).abs()
    assert int(distance.max()) <= 1
    assert int((distance > 0).sum()) <= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("accumulate", ["auto", "float64"])
def test_bits_do_not_depend_on_threads_or_memory_or_format(
    tmp_path: Path, device: str, dtype: torch.dtype, accumulate: str
) -> None:
    shapes = {"large": (700, 513), "small": (3,), "odd": (77777,), "last": (5,)}
    checkpoints = random_checkpoints(dtype, 5, shapes=shapes)
    outputs = []
    roads = itertools.product(FORMATS, [(1, 64 * 2**20), (3, 512 * 2**20)])
    for number, (layout, (n_threads, memory_budget_bytes)) in enumerate(roads):
        paths = [
            save_checkpoint(tmp_path / f"road{number}-{index}", tensors, layout)
            for index, tensors in enumerate(checkpoints)
        ]
        output = tmp_path / f"out{number}"
        average_checkpoints(
            paths, output, device=device, accumulate=accumulate,  # type: ignore[arg-type]  # a parameter
            n_threads=n_threads, memory_budget_bytes=memory_budget_bytes,
        )  # fmt: skip
        result = load_file(output / "model.safetensors")
        outputs.append({name: bits(result[name]) for name in shapes})
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("memory_budget_bytes", [10 * 2**20, 13 * 2**20, 512 * 2**20])
def test_bits_do_not_depend_on_the_chunk_size(tmp_path: Path, memory_budget_bytes: int) -> None:
    checkpoints = random_checkpoints(torch.bfloat16, 3, shapes={"a": (300001,), "b": (11,)})
    paths = [
        save_checkpoint(tmp_path / f"c{index}", tensors, "safetensors")
        for index, tensors in enumerate(checkpoints)
    ]
    average_checkpoints(paths, tmp_path / "out", memory_budget_bytes=memory_budget_bytes)
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("a", "b"):
        total = (
            sum(tensors[name].float() for tensors in checkpoints[1:]) + checkpoints[0][name].float()
        )
        assert torch.equal(result[name], (total / torch.tensor(3.0)).bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("output", ["same", "float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("accumulate", ["auto", "float64"])
@pytest.mark.parametrize("coefficients", [None, (0.2, 0.3, 0.4, 0.1), (1.5, 0.0, -0.75, 0.25)])
def test_cuda_gives_the_bits_of_the_cpu(
    tmp_path: Path,
    dtype: torch.dtype,
    output: str,
    accumulate: str,
    coefficients: tuple[float, ...] | None,
) -> None:
    checkpoints = random_checkpoints(dtype, 4, shapes={"a": (300, 1001), "b": (13,)})
    checkpoints[0]["a"][0, :2] = torch.tensor([-0.0, 1e-42]).to(dtype)
    paths = [
        save_checkpoint(tmp_path / f"c{index}", tensors, "safetensors")
        for index, tensors in enumerate(checkpoints)
    ]
    for device in ("cpu", "cuda"):
        average_checkpoints(
            paths, tmp_path / device, device=device, dtype=output, accumulate=accumulate,  # type: ignore[arg-type]  # parameters
            coefficients=coefficients,
        )  # fmt: skip
    on_cpu, on_cuda = (
        (tmp_path / device / "model.safetensors").read_bytes() for device in ("cpu", "cuda")
    )
    assert on_cpu == on_cuda


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool,
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
    ],
)  # fmt: skip
@pytest.mark.parametrize("count", [2, 3, 7, 10])
@pytest.mark.promise(12)
def test_equal_checkpoints_come_back_bit_for_bit(
    tmp_path: Path, device: str, dtype: torch.dtype, count: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(4099, generator=generator) * 100).to(
        torch.complex64 if dtype.is_complex else torch.float64
    )
    tensors = {"some.values": values.to(dtype), "w": torch.tensor([-0.0, 1e-45, 3e38, 1 / 3])}
    paths = [save_checkpoint(tmp_path / f"c{n}", tensors, "safetensors") for n in range(count)]
    average_checkpoints(paths, tmp_path / "out", device=device)
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in tensors.items():
        assert result[name].dtype == value.dtype
        assert bits(result[name]) == bits(value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("accumulate", ["auto", "float32", "float64"])
@pytest.mark.promise(12)
def test_equal_checkpoints_come_back_with_any_coefficients_and_sums(
    tmp_path: Path, device: str, dtype: torch.dtype, accumulate: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {"w": torch.randn(9999, generator=generator).to(dtype)}
    paths = [save_checkpoint(tmp_path / f"c{n}", tensors, "safetensors") for n in range(4)]
    average_checkpoints(
        paths, tmp_path / "out", device=device, accumulate=accumulate,  # type: ignore[arg-type]  # a parameter
        coefficients=(0.1, 0.2, 0.3, 0.4),
    )  # fmt: skip
    assert bits(load_file(tmp_path / "out" / "model.safetensors")["w"]) == bits(tensors["w"])


def test_equal_values_are_put_back_in_chunks_of_several_dtypes(tmp_path: Path, device: str) -> None:
    """Buffers made for one dtype serve the next, whose elements are of another size."""
    checkpoints = [
        {
            "single": torch.full((1000,), 0.1),
            "double": torch.full((77,), 0.1, dtype=torch.float64),
            "half": torch.full((333,), 0.1, dtype=torch.float16),
            "tail": torch.full((3,), 0.7),
        }
        for _ in range(3)
    ]
    paths = [
        save_checkpoint(tmp_path / str(index), tensors, "safetensors")
        for index, tensors in enumerate(checkpoints)
    ]
    for number, coefficients in enumerate((None, (0.3, 0.3, 0.4))):
        out = tmp_path / f"out-{number}"
        average_checkpoints(
            paths, out, accumulate="float32", coefficients=coefficients, device=device
        )
        averaged = load_file(out / "model.safetensors")
        for name, tensor in checkpoints[0].items():
            assert bits(averaged[name]) == bits(tensor)


def test_explicit_coefficients_weigh_the_checkpoints_in_the_order_typed(
    tmp_path: Path, device: str
) -> None:
    checkpoints = random_checkpoints(torch.float32, 3)
    paths = [
        save_checkpoint(tmp_path / f"step{step}", tensors, "safetensors")
        for step, tensors in zip((300, 100, 200), checkpoints, strict=True)  # typed out of order
    ]
    coefficients = (0.5, 0.2, 0.3)
    average_checkpoints(paths, tmp_path / "out", device=device, coefficients=coefficients)
    result = load_file(tmp_path / "out" / "model.safetensors")
    order = (0, 2, 1)  # sums are taken from the newest to the oldest
    for name in SHAPES:
        expected = float64_mean(
            [checkpoints[index][name] for index in order], [coefficients[index] for index in order]
        )
        assert bits(result[name]) == bits(expected.float()), name


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16", "float64"])
def test_output_dtype_is_rounded_once_from_the_float64_mean(
    tmp_path: Path, device: str, target: str
) -> None:
    checkpoints = random_checkpoints(torch.float32, 3)
    paths = [
        save_checkpoint(tmp_path / f"c{index}", tensors, "torch")
        for index, tensors in enumerate(checkpoints)
    ]
    average_checkpoints(paths, tmp_path / "out", device=device, dtype=target)  # type: ignore[arg-type]  # a parameter
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        mean = float64_mean([tensors[name] for tensors in checkpoints])
        expected = rounded_once(mean, getattr(torch, target))
        assert result[name].dtype == getattr(torch, target)
        assert bits(result[name]) == bits(expected), name


def test_double_rounding_is_avoided(tmp_path: Path, device: str) -> None:
    """A float64 mean just above a tie of bfloat16 would fall back onto it through float32."""
    tie = 1 + 2**-8
    values = {"w": torch.tensor([tie + 2**-40, tie - 2**-40, -tie - 2**-40], dtype=torch.float64)}
    path = save_checkpoint(tmp_path / "c", values, "safetensors")
    average_checkpoints([path], tmp_path / "out", device=device, dtype="bfloat16")
    result = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert result.tolist() == [1 + 2**-7, 1.0, -1 - 2**-7]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_encoding_from_float64_equals_exact_rational_rounding(name: str) -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate(
        [
            generator.standard_normal(500) * 10.0 ** generator.integers(-9, 4, 500),
            [0.0, 65504.0, 65519.9, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-133, 3e38, 1e-45],
        ]
    )
    dtype = getattr(torch, name)
    if dtype is not torch.float16:
        values = values[np.abs(values) < 3e38]
    else:
        values = values[np.abs(values) < 65520]
    encoded = torch.from_numpy(encode_from_float64(values, DTYPE_BY_NAME[name]).copy())
    assert bits(encoded) == bits(rounded_once(torch.from_numpy(values), dtype))


def test_a_zero_coefficient_leaves_its_checkpoint_out(tmp_path: Path, device: str) -> None:
    first = {"w": torch.tensor([1.0, 2.0])}
    poisoned = {"w": torch.tensor([float("nan"), float("inf")])}
    paths = [
        save_checkpoint(tmp_path / "a", first, "safetensors"),
        save_checkpoint(tmp_path / "b", poisoned, "safetensors"),
    ]
    average_checkpoints(paths, tmp_path / "out", device=device, coefficients=(1.0, 0.0))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], first["w"])
