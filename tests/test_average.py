"""Non-finite values, integers, ties: what the engine does beside sums, on every device."""

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from ckptavg import (
    CheckpointError,
    IncompatibleCheckpointsError,
    MemoryBudgetError,
    UsageError,
    average_checkpoints,
)
from ckptavg.average import choose_device
from ckptavg.average.work import run_threads

INFINITY, NAN = math.inf, math.nan


def average(tmp_path: Path, *checkpoints: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Save checkpoints a, b, c, ... average them into ``out``, and return what that holds."""
    paths = [
        save_checkpoint(tmp_path / letter, tensors, "safetensors")
        for letter, tensors in zip("abcdefgh", checkpoints, strict=False)
    ]
    average_checkpoints(paths, tmp_path / "out", **options)
    return load_file(tmp_path / "out" / "model.safetensors")


def refusal(tmp_path: Path, *checkpoints: dict[str, Tensor], **options: Any) -> str:
    """Return the message with which the average is refused, without the folder's name."""
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        average(tmp_path, *checkpoints, **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial*"))
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
def test_non_finite_value_is_refused_naming_checkpoint_and_tensor(
    tmp_path: Path, device: str, dtype: torch.dtype, bad: float
) -> None:
    good = {"first": torch.ones(1000), "second": torch.ones(3)}
    worse = {"first": torch.ones(1000), "second": torch.tensor([1.0, bad, bad])}
    checkpoints = [
        {name: value.to(dtype) for name, value in tensors.items()}
        for tensors in (good, worse, good)
    ]
    assert refusal(tmp_path, *checkpoints, device=device) == (
        "b.safetensors: tensor 'second' in checkpoint 2 of 3 has 2 non-finite values (infinity or "
        "NaN); leave that checkpoint out, or pass --allow-nonfinite"
    )


def test_nan_with_any_payload_is_found_before_it_is_rounded_away(
    tmp_path: Path, device: str
) -> None:
    """Rounding 0x7FFFFFFF to bfloat16 by adding would carry into the sign and give -0."""
    nan = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for value in nan:
        message = refusal(
            tmp_path, {"w": torch.stack([value, value])}, device=device, dtype="bfloat16"
        )
        assert "tensor 'w' in checkpoint 1 of 1 has 2 non-finite values" in message
        (tmp_path / "a.safetensors").unlink()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_infinities_that_all_checkpoints_share_are_kept(
    tmp_path: Path, device: str, dtype: torch.dtype
) -> None:
    mask = torch.tensor([0.0, -INFINITY, INFINITY, -INFINITY]).to(dtype)
    steps = [torch.arange(4.0).to(dtype) * factor for factor in (1, 2, 3)]
    result = average(tmp_path, *({"mask": mask, "w": step} for step in steps), device=device)
    assert torch.equal(result["mask"], mask)
    assert torch.equal(result["w"], steps[1])


def test_nan_that_all_checkpoints_share_is_refused(tmp_path: Path, device: str) -> None:
    tensors = {"w": torch.tensor([NAN, 1.0])}
    message = refusal(tmp_path, tensors, tensors, device=device)
    assert "tensor 'w' in checkpoint 1 of 2 has 1 non-finite values" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_allow_nonfinite_keeps_what_ieee_arithmetic_gives(
    tmp_path: Path, device: str, dtype: torch.dtype
) -> None:
    first = {"w": torch.tensor([INFINITY, INFINITY, NAN, -INFINITY, 1.0]).to(dtype)}
    second = {"w": torch.tensor([1.0, -INFINITY, 1.0, -INFINITY, 3.0]).to(dtype)}
    result = average(tmp_path, first, second, device=device, allow_nonfinite=True)["w"].float()
    assert result[0] == INFINITY
    assert torch.isnan(result[1:3]).all()
    assert result[3] == -INFINITY
    assert result[4] == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mean_of_large_values_does_not_overflow_in_the_sum(
    tmp_path: Path, device: str, dtype: torch.dtype
) -> None:
    largest = torch.finfo(dtype).max
    first = {"w": torch.tensor([largest, largest, 1.0], dtype=dtype)}
    second = {"w": torch.tensor([largest, -largest, 2.0], dtype=dtype)}
    result = average(tmp_path, first, second, first, device=device)["w"]
    assert result[0] == largest
    assert result[1] == torch.tensor(largest / 3, dtype=torch.float64).to(torch.float32).to(dtype)


def test_mean_that_overflows_the_output_dtype_is_refused(tmp_path: Path, device: str) -> None:
    tensors = {"w": torch.tensor([1.0, 1e5, -1e5])}
    assert refusal(tmp_path, tensors, tensors, device=device, dtype="float16") == (
        "tensor 'w': averaged values overflow float16; choose a wider --dtype, or pass "
        "--allow-nonfinite"
    )


def test_mean_that_overflows_is_infinite_if_allowed(tmp_path: Path, device: str) -> None:
    tensors = {"w": torch.tensor([1.0, 1e5, -1e5])}
    result = average(tmp_path, tensors, device=device, dtype="float16", allow_nonfinite=True)
    assert result["w"].tolist() == [1.0, INFINITY, -INFINITY]


def test_count_of_non_finite_values_is_that_of_the_whole_tensor(
    tmp_path: Path, device: str
) -> None:
    bad = torch.ones(1_000_000)
    bad[::2] = NAN
    message = refusal(tmp_path, {"v": torch.ones(3), "w": bad}, device=device)
    assert "tensor 'w' in checkpoint 1 of 1 has 500000 non-finite values" in message


def test_float64_values_whose_sum_overflows_have_a_mean(tmp_path: Path, device: str) -> None:
    first = {"w": torch.tensor([1.75e308, 1.0], dtype=torch.float64)}
    second = {"w": torch.tensor([1.25e308, 2.0], dtype=torch.float64)}
    result = average(tmp_path, first, second, device=device)["w"]
    assert result.tolist() == [1.5e308, 1.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shared_nan_keeps_its_bits_if_allowed(
    tmp_path: Path, device: str, dtype: torch.dtype
) -> None:
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}
    pattern = torch.tensor([NAN, -NAN, 1.0], dtype=dtype).view(bits[dtype])
    pattern[0] += 5
    tensors = {"w": pattern.view(dtype)}
    result = average(tmp_path, tensors, tensors, device=device, allow_nonfinite=True)["w"]
    assert torch.equal(result.view(bits[dtype]), pattern)


def test_large_masks_are_repaired_in_parts(tmp_path: Path, device: str) -> None:
    mask = torch.full((300_001,), -INFINITY, dtype=torch.bfloat16)
    mask[::3] = 0
    tensors = {"small": torch.ones(7).bfloat16(), "mask": mask, "w": torch.ones(3).bfloat16()}
    result = average(tmp_path, tensors, tensors, tensors, device=device)
    for name, value in tensors.items():
        assert torch.equal(result[name], value)


@pytest.mark.parametrize("option", ["n_threads", "memory_budget_bytes", "max_shard_bytes"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"^{option} is {value}, expected at least 1$"):
        average(tmp_path, {"w": torch.ones(1)}, **{option: value})


def test_a_zero_coefficient_leaves_the_integers_of_its_checkpoint_out(tmp_path: Path) -> None:
    checkpoints = [{"w": torch.ones(1), "n": torch.tensor(n)} for n in (1, 2, 3)]
    assert average(tmp_path, *checkpoints, coefficients=(0.5, 0.5, 0.0))["n"].item() == 2


def test_non_finite_values_do_not_change_their_neighbours(tmp_path: Path, device: str) -> None:
    """Only the elements that are not finite are computed again."""
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(70_001, generator=generator).bfloat16() for _ in range(10)]
    spoiled = [value.clone() for value in plain]
    for value in spoiled:
        value[::1000] = INFINITY
    expected = average(tmp_path, *({"w": value} for value in plain[:8]), device=device)["w"]
    (tmp_path / "two").mkdir()
    result = average(tmp_path / "two", *({"w": value} for value in spoiled[:8]), device=device)["w"]
    untouched = torch.ones(70_001, dtype=torch.bool)
    untouched[::1000] = False
    assert torch.equal(result[untouched], expected[untouched])
    assert (result[::1000] == INFINITY).all()


@pytest.mark.parametrize(("policy", "expected"), [("last", 30), ("first", 10)])
def test_integers_that_differ_come_whole_from_one_checkpoint(
    tmp_path: Path, device: str, policy: Any, expected: int
) -> None:
    def tensors(count: int) -> dict[str, Tensor]:
        return {
            "bn.num_batches_tracked": torch.tensor(count),
            "mask": torch.tensor([True, False]),
            "ids": torch.arange(2**53, 2**53 + 3),
            "w": torch.ones(2),
        }

    paths = [
        save_checkpoint(tmp_path / f"c{count}", tensors(count), "safetensors")
        for count in (10, 20, 30)
    ]
    result = average_checkpoints(paths, tmp_path / "out", buffers=policy, device=device)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded["bn.num_batches_tracked"].item() == expected
    assert loaded["bn.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(loaded["mask"], torch.tensor([True, False]))
    assert torch.equal(loaded["ids"], torch.arange(2**53, 2**53 + 3))
    assert result.outputs[0].differing == ("bn.num_batches_tracked",)
    assert result.outputs[0].taken_from == str(paths[2 if policy == "last" else 0])


def test_integers_that_differ_are_refused_if_asked(tmp_path: Path, device: str) -> None:
    first = {"n": torch.tensor(1), "same": torch.tensor(5), "w": torch.ones(2)}
    second = {"n": torch.tensor(2), "same": torch.tensor(5), "w": torch.ones(2)}
    assert refusal(tmp_path, first, second, device=device, buffers="refuse") == (
        "'n' of int64 differs between a.safetensors and b.safetensors (--buffers last takes the "
        "last)"
    )


def test_bool_bytes_are_copied_as_they_are(tmp_path: Path, device: str) -> None:
    tensors = {"m": torch.zeros(4, dtype=torch.uint8), "w": torch.ones(1)}
    path = save_checkpoint(tmp_path / "a", tensors, "safetensors")
    raw = path.read_bytes().replace(b'"U8"', b'"BOOL"').replace(b'"BOOL",  ', b'"BOOL",')
    header = int.from_bytes(raw[:8], "little") + 2
    path.write_bytes(header.to_bytes(8, "little") + raw[8:-4] + b"\x00\x01\x02\xff")
    average_checkpoints([path, path], tmp_path / "out", device=device)
    assert (tmp_path / "out" / "model.safetensors").read_bytes().endswith(b"\x00\x01\x02\xff")


def test_complex_tensors_are_averaged_in_both_parts(tmp_path: Path, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(501, generator=generator, dtype=torch.complex64) for _ in range(3)]
    result = average(tmp_path, *({"z": value} for value in values), device=device)["z"]
    expected = (sum(value.to(torch.complex128) for value in values) / 3).to(torch.complex64)  # type: ignore[union-attr]  # not 0
    assert torch.equal(result, expected)


def test_tied_tensors_are_read_once_and_written_alike(tmp_path: Path, device: str) -> None:
    paths = []
    for index in range(3):
        weight = torch.randn(30, 20)
        tensors = {"embed.weight": weight, "body": torch.randn(7), "head.weight": weight}
        paths.append(tmp_path / f"c{index}.pt")
        torch.save(tensors, paths[-1])
    result = average_checkpoints(paths, tmp_path / "out", device=device)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(loaded["embed.weight"], loaded["head.weight"])
    assert result.read_nbytes == 3 * 4 * (600 + 7)
    assert result.written_nbytes == 4 * (2 * 600 + 7)


def test_tensors_on_both_sides_of_a_tied_one_go_where_they_belong(
    tmp_path: Path, device: str
) -> None:
    """The copy lies between them in the output, so they are no neighbours."""
    paths = []
    for step in (1.0, 3.0):
        tied = torch.full((5,), step)
        tensors = {
            "a": tied, "b": torch.full((3,), 10 * step), "tied": tied,
            "c": torch.full((7,), 100 * step), "tied too": tied, "d": torch.full((2,), -step),
        }  # fmt: skip
        paths.append(tmp_path / f"{step}.pt")
        torch.save(tensors, paths[-1])
    average_checkpoints(paths, tmp_path / "out", device=device)
    averaged = load_file(tmp_path / "out/model.safetensors")
    found = {name: set(tensor.tolist()) for name, tensor in averaged.items()}
    assert found == {
        "a": {2.0}, "b": {20.0}, "tied": {2.0}, "c": {200.0}, "tied too": {2.0}, "d": {-2.0},
    }  # fmt: skip


def test_tied_in_one_checkpoint_and_apart_in_another_is_averaged_by_itself(
    tmp_path: Path, device: str
) -> None:
    shared = torch.ones(4)
    torch.save({"a": torch.zeros(4), "b": torch.full((4,), 3.0)}, tmp_path / "c1.pt")
    torch.save({"a": shared, "b": shared}, tmp_path / "c2.pt")
    result = average_checkpoints(
        [tmp_path / "c1.pt", tmp_path / "c2.pt"], tmp_path / "out", device=device
    )
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded["a"].tolist() == [0.5] * 4
    assert loaded["b"].tolist() == [2.0] * 4
    assert any("'b' is tied to 'a' in" in note for note in result.notes)


def test_alias_stored_under_the_other_name_is_read_through_its_owner(
    tmp_path: Path, device: str
) -> None:
    """One file keeps the input embedding, the other both under one storage."""
    from safetensors.torch import save_file

    save_file({"embed": torch.zeros(4)}, tmp_path / "c1.safetensors", {"head": "embed"})
    shared = torch.full((4,), 2.0)
    torch.save({"head": shared, "embed": shared}, tmp_path / "c2.pt")
    average_checkpoints(
        [tmp_path / "c1.safetensors", tmp_path / "c2.pt"], tmp_path / "out", device=device
    )
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded["head"].tolist() == loaded["embed"].tolist() == [1.0] * 4


def test_thousands_of_small_tensors_share_chunks(tmp_path: Path, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    checkpoints = [
        {f"layer.{n}": torch.randn(n % 7, generator=generator) for n in range(3000)}
        for _ in range(3)
    ]
    result = average(tmp_path, *checkpoints, device=device)
    for name, value in result.items():
        expected = sum(tensors[name].double() for tensors in checkpoints) / 3
        assert torch.equal(value, expected.float())  # type: ignore[union-attr]  # not 0


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path, device: str) -> None:
    tensors = {f"w{n}": torch.ones(500_000) for n in range(8)}
    paths = [save_checkpoint(tmp_path / f"c{n}", tensors, "safetensors") for n in range(2)]

    def truncate(stage: str, done: int, total: int | None) -> None:
        with paths[1].open("r+b") as file:
            file.truncate(1000)

    with pytest.raises(CheckpointError, match="changed while being read"):
        average_checkpoints(
            paths, tmp_path / "out", device=device, progress=truncate, n_threads=1,
            memory_budget_bytes=(24 if device == "cpu" else 64) * 2**20,
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0.safetensors", "c1.safetensors"]


def test_a_file_that_is_rewritten_while_it_is_read_is_noticed(tmp_path: Path, device: str) -> None:
    tensors = {"w": torch.ones(100)}
    paths = [save_checkpoint(tmp_path / f"c{n}", tensors, "safetensors") for n in range(2)]

    def rewrite(stage: str, done: int, total: int | None) -> None:
        with paths[0].open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"abcd")

    with pytest.raises(
        CheckpointError, match=r"c0\.safetensors: changed while being read; nothing was published"
    ):
        average_checkpoints(paths, tmp_path / "out", device=device, progress=rewrite)
    assert not (tmp_path / "out").exists()


def test_progress_adds_up_to_the_bytes_read(tmp_path: Path, device: str) -> None:
    tensors = {"w": torch.ones(1000), "n": torch.tensor(3), "e": torch.ones(0)}
    paths = [save_checkpoint(tmp_path / f"c{n}", tensors, "safetensors") for n in range(3)]
    calls: list[tuple[str, int, int | None]] = []
    result = average_checkpoints(
        paths, tmp_path / "out", device=device, progress=lambda *call: calls.append(call)
    )
    assert sum(done for _, done, _ in calls) == result.read_nbytes == 3 * 4008
    assert {(stage, total) for stage, _, total in calls} == {("average", 3 * 4008)}


def test_memory_budget_too_small_is_refused_with_what_is_needed(
    tmp_path: Path, device: str
) -> None:
    with pytest.raises(MemoryBudgetError, match=r"^a memory budget of 1000 bytes is too small: at "
                       r"least \d+ bytes are needed \(--memory\)$"):  # fmt: skip
        average(tmp_path, {"w": torch.ones(4)}, device=device, memory_budget_bytes=1000)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "mps"])
def test_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(
        UsageError,
        match=rf"^device: '{name}' is not one of auto, cpu, cuda, cuda:0, cuda:1, \.\.\.$",
    ):
        choose_device(name, read_nbytes=0, runs_model=False)


def test_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="^device: 'cuda:77' is not there; torch sees"):
        choose_device("cuda:77", read_nbytes=0, runs_model=False)


def test_first_failing_thread_stops_the_others_and_is_raised() -> None:
    stopped = threading.Event()

    def fail() -> None:
        raise ValueError("first")

    def wait() -> None:
        assert stopped.wait(timeout=30)

    with pytest.raises(ValueError, match="first"):
        run_threads([wait, fail, wait], stop=stopped.set)


def test_threads_end_before_an_interruption_goes_on_also_a_second_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Buffers and files must not vanish under a thread that is still at work."""
    stopping, ended = threading.Event(), threading.Event()
    join, interruptions = threading.Thread.join, iter(range(2))

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        if next(interruptions, None) is not None:
            raise KeyboardInterrupt
        join(self, timeout)

    def work() -> None:
        stopping.wait()
        time.sleep(0.05)
        ended.set()

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_threads([work], stop=stopping.set)
    assert ended.is_set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_full_gpu_is_told_in_one_line(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "in", {"w": torch.ones(2**24)}, "safetensors")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        with pytest.raises(
            MemoryBudgetError, match=r"^cuda:0: out of memory: \d+ bytes are needed"
        ):
            average_checkpoints([path, path], tmp_path / "out", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not list(tmp_path.glob("out*"))
    average_checkpoints([path, path], tmp_path / "out", device="cuda")
