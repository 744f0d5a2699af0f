"""Every decision and refusal that headers allow."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from torch import Tensor

from ckptavg import IncompatibleCheckpointsError, Recipe, open_checkpoint, plan_average
from ckptavg.blocks import Action
from ckptavg.checkpoint import Checkpoint
from ckptavg.plan import AveragePlan


def opened(tmp_path: Path, *checkpoints: dict[str, Tensor]) -> list[Checkpoint]:
    """Save checkpoints a, b, c, ... and open them under those names."""
    return [
        open_checkpoint(save_checkpoint(tmp_path / letter, tensors, "torch"), label=letter)
        for letter, tensors in zip("abcdefgh", checkpoints, strict=False)
    ]


def plan(tmp_path: Path, *checkpoints: dict[str, Tensor]) -> AveragePlan:
    return plan_average(opened(tmp_path, *checkpoints), Recipe())


def refusal(checkpoints: Sequence[Checkpoint]) -> str:
    with pytest.raises(IncompatibleCheckpointsError) as caught:
        plan_average(checkpoints, Recipe())
    return str(caught.value)


def test_no_checkpoints_are_refused() -> None:
    assert refusal([]) == "nothing to average: no checkpoints"


def test_names_that_differ_are_named_with_both_checkpoints(tmp_path: Path) -> None:
    first = {"w": torch.ones(2), "only.a": torch.ones(1)}
    last = {"w": torch.ones(2), "only.b": torch.ones(1)}
    assert refusal(opened(tmp_path, first, last)) == (
        "the checkpoints differ: 'only.b' is in b, not in a; 'only.a' is in a, not in b"
    )


def test_at_most_five_differences_are_named(tmp_path: Path) -> None:
    first = {"w": torch.ones(2), **{f"x{n}": torch.ones(1) for n in range(9)}}
    last = {"w": torch.ones(2)}
    assert refusal(opened(tmp_path, first, last)) == (
        "the checkpoints differ: 'x0' is in a, not in b; 'x1' is in a, not in b; "
        "'x2' is in a, not in b; 'x3' is in a, not in b; 'x4' is in a, not in b; and 4 more"
    )


def test_shapes_that_differ_are_refused(tmp_path: Path) -> None:
    first = {"fc.weight": torch.ones(10, 4), "n": torch.ones(())}
    last = {"fc.weight": torch.ones(10, 5), "n": torch.ones(1)}
    assert refusal(opened(tmp_path, first, last)) == (
        "the checkpoints differ: 'fc.weight' has shape [10, 4] in a, [10, 5] in b; "
        "'n' has shape [] in a, [1] in b (are they from the same run?)"
    )


def test_dtypes_that_differ_are_refused(tmp_path: Path) -> None:
    first = {"w": torch.ones(2, dtype=torch.bfloat16)}
    last = {"w": torch.ones(2)}
    assert refusal(opened(tmp_path, first, last)) == (
        "the checkpoints differ: 'w' is bfloat16 in a, float32 in b "
        "(pass --dtype to say which one the average gets)"
    )
    assert refusal(
        opened(
            tmp_path, {"w": torch.ones(2).long(), "v": torch.ones(1)}, last | {"v": torch.ones(1)}
        )
    ) == (
        "the checkpoints differ: 'w' is int64 in a, float32 in b (average checkpoints of one dtype)"
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.encoder."])
def test_a_prefix_that_explains_the_difference_is_suggested(tmp_path: Path, prefix: str) -> None:
    plain = {"fc.weight": torch.ones(2)}
    wrapped = {f"{prefix}fc.weight": torch.ones(2)}
    for pair in ((plain, wrapped), (wrapped, plain)):
        assert refusal(opened(tmp_path, *pair)).endswith(f"(pass --strip-prefix {prefix})")


def test_middle_checkpoint_is_compared_too(tmp_path: Path) -> None:
    same, other = {"w": torch.ones(2)}, {"w": torch.ones(3)}
    assert refusal(opened(tmp_path, same, other, same)) == (
        "the checkpoints differ: 'w' has shape [3] in b, [2] in c (are they from the same run?)"
    )


def test_only_integers_are_nothing_to_average(tmp_path: Path) -> None:
    assert refusal(opened(tmp_path, {"n": torch.tensor(3), "mask": torch.tensor([True])})) == (
        "a: nothing to average: it holds no floating-point tensors"
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layer.weight", torch.float8_e4m3fn),
        ("layer.weight", torch.float8_e5m2),
        ("layer.weight", torch.int8),
        ("layer.weight", torch.uint8),
        ("layer.qweight", torch.int32),
        ("layer.qzeros", torch.int32),
        ("layer.weight_packed", torch.int32),
        ("layer.weight.absmax", torch.float32),
        ("layer.SCB", torch.float32),
        ("layer.weight.quant_state.bitsandbytes__nf4", torch.uint8),
    ],
)
def test_quantised_weights_are_refused(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensors = {"norm": torch.ones(2), name: torch.ones(4).to(dtype)}
    stored = str(dtype).removeprefix("torch.")
    assert refusal(opened(tmp_path, tensors)) == (
        f"a: tensor '{name}' of {stored} is quantised; average the full-precision weights"
    )


@pytest.mark.parametrize("name", ["attn.bias", "attn.mask", "position_ids", "weight_mask"])
def test_integer_buffers_are_not_taken_for_quantised_weights(tmp_path: Path, name: str) -> None:
    tensors = {"w": torch.ones(2), name: torch.ones(4, dtype=torch.uint8)}
    actions = {tensor.name: tensor.action for tensor in plan(tmp_path, tensors).tensors}
    assert actions == {"w": Action.AVERAGE, name: Action.TAKE}


def test_dtype_that_safetensors_cannot_store_is_refused(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2), "z": torch.ones(2, dtype=torch.complex128)}
    assert refusal(opened(tmp_path, tensors)) == (
        "a: tensor 'z' is complex128, which safetensors cannot store; pass --output-format torch"
    )


def test_lora_factors_are_pointed_out(tmp_path: Path) -> None:
    tensors = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(4, 2)}
    notes = plan(tmp_path, tensors, tensors).notes
    assert notes == (
        "2 tensors are LoRA factors: the mean of the factors is only near the mean of their "
        "products, and only for checkpoints of one run",
    )


def test_tensors_lie_aligned_to_their_own_element_size(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.ones(7),
        "d": torch.ones(3, dtype=torch.float64),
        "e": torch.tensor(1),
    }
    for tensor in plan(tmp_path, tensors).tensors:
        assert tensor.offset % tensor.output_dtype.itemsize == 0


def test_chunks_cover_every_byte_once(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(1001),
        "b": torch.ones(3, 5),
        "half": torch.ones(77, dtype=torch.bfloat16),
        "n": torch.tensor(1),
        "z": torch.ones(9, dtype=torch.complex64),
        "empty": torch.ones(0),
    }
    whole = plan(tmp_path, tensors, tensors)
    for max_nbytes in (1, 64, 100, 10**6):
        covered: list[tuple[int, int]] = []
        read = 0
        for chunk in whole.chunks(max_nbytes):
            assert chunk.nbytes == sum(piece.stop - piece.start for piece in chunk.pieces)
            assert chunk.nbytes <= max(max_nbytes, 2 * chunk.dtype.itemsize)
            read += chunk.nbytes
            ((_, offset),) = chunk.destinations
            covered.append((offset, offset + chunk.numel * chunk.output_dtype.itemsize))
        covered.sort()
        assert covered[0][0] == 0
        assert covered[-1][1] == whole.total_nbytes
        assert all(left[1] == right[0] for left, right in itertools.pairwise(covered))
        assert read * 2 == whole.read_nbytes


def test_small_tensors_share_a_chunk(tmp_path: Path) -> None:
    tensors = {f"w{n}": torch.ones(3) for n in range(100)}
    assert len(list(plan(tmp_path, tensors).chunks(2**20))) == 1


def test_a_model_larger_than_a_shard_is_split_as_the_hub_does(tmp_path: Path) -> None:
    tensors = {f"w{n}": torch.ones(100) for n in range(5)} | {"big": torch.ones(1000)}
    split = plan_average(opened(tmp_path, tensors), Recipe(), max_shard_bytes=1000)
    assert [shard.filename for shard in split.shards] == [
        f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)
    ]
    assert sorted(name for shard in split.shards for name in shard.tensor_names) == sorted(tensors)
    assert all(shard.nbytes <= 1000 or shard.tensor_names == ("big",) for shard in split.shards)


def test_fingerprint_changes_with_inputs_and_recipe_only(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    first = plan_average(checkpoints, Recipe()).fingerprint
    assert plan_average(checkpoints, Recipe()).fingerprint == first
    assert plan_average(checkpoints, Recipe(dtype="bfloat16")).fingerprint != first
    assert plan_average(checkpoints[:1], Recipe()).fingerprint != first


def test_a_name_that_safetensors_reserves_is_refused(tmp_path: Path) -> None:
    assert refusal(opened(tmp_path, {"w": torch.ones(2), "__metadata__": torch.ones(1)})) == (
        "a: a tensor is called '__metadata__', a name that safetensors reserves; "
        "pass --output-format torch"
    )
