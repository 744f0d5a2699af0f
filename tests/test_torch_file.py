"""torch files: every tensor that torch.save writes, and nothing that only pretends to be one."""

import argparse
import os
import random
import struct
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.serialization
from checkpoint_contract import CheckpointContract, bytes_of, read_tensor, same_content
from hostile import (
    Member,
    call,
    group,
    mapping,
    name,
    number,
    pickled,
    sizes,
    storage,
    tensor,
    text,
    torch_bytes,
    torch_members,
    whole,
    zip_bytes,
)
from torch import Tensor, nn

from ckptavg.checkpoint import open_checkpoint
from ckptavg.errors import CheckpointError, CkptavgError
from ckptavg.tensors import DTYPE_BY_NAME, Piece


class TestTorchFile(CheckpointContract):
    layout = "torch file"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = directory / "model.pt"
        torch.save({"state_dict": dict(tensors), "epoch": 3}, path)
        return path


class TestTorchFileOfViews(CheckpointContract):
    """Tensors whose storages are laid out otherwise than row by row."""

    layout = "torch file"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = directory / "model.pt"
        torch.save({name: self.view(value) for name, value in tensors.items()}, path)
        return path

    @staticmethod
    def view(value: Tensor) -> Tensor:
        if value.dim() == 0 or not value.numel():
            return value
        padded = torch.zeros((*[size + 2 for size in value.shape[::-1]], 2), dtype=value.dtype)
        inside: list[slice | int] = [slice(1, -1)] * value.dim()
        view = padded[(*inside, 1)].permute(*range(value.dim() - 1, -1, -1))
        view.copy_(value)
        return view


def saved(tmp_path: Path, content: Any, **options: Any) -> Path:
    path = tmp_path / "w.pt"
    torch.save(content, path, **options)
    return path


def written(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "w.pt"
    path.write_bytes(raw)
    return path


def refused(path: Path, what: str, *, state_key: str | None = None) -> None:
    """Check that a file is refused with exactly this message."""
    with pytest.raises(CheckpointError, match=whole(f"{path}: {what}")):
        open_checkpoint(path, state_key=state_key)


# -- what torch.save writes


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    tensors = {
        "w": torch.randn(3, 4),
        "b": torch.randn(4).bfloat16(),
        "u": torch.arange(3).to(torch.uint16),
    }
    path = saved(tmp_path, {"model": tensors, "step": 7}, pickle_protocol=protocol)
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, tensors)
    assert checkpoint.step == 7


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint16, torch.uint32, torch.uint64, torch.complex32, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ],
    ids=str,
)  # fmt: skip
def test_rare_dtypes_are_described_and_read(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(48, dtype=torch.uint8).view(dtype).reshape(3, -1)
    checkpoint = open_checkpoint(saved(tmp_path, {"w": value}))
    assert checkpoint.tensors["w"].dtype is DTYPE_BY_NAME[str(dtype).removeprefix("torch.")]
    assert read_tensor(checkpoint, "w") == bytes_of(value)


def test_views_of_every_shape_come_back_row_major(tmp_path: Path) -> None:
    base = torch.randn(4, 6, 5, 3)
    tensors = {
        "channels last": base.to(memory_format=torch.channels_last),
        "transposed": torch.randn(30, 40).T,
        "rows": torch.randn(10, 4)[3:7],
        "columns": torch.randn(10, 8)[:, 1:8:3],
        "one column": torch.randn(10, 8)[:, 2],
        "one element": torch.randn(10, 8)[3, 2],
        "row": torch.randn(1, 5).T,
        "diagonal": torch.randn(5, 5).diagonal(),
        "permuted": base.permute(3, 1, 0, 2),
        "bool columns": torch.randn(6, 6).T > 0,
        "complex": torch.randn(3, 4, dtype=torch.complex64).T,
        "empty columns": torch.randn(0, 4).T,
        "empty of an offset": torch.randn(6)[4:4],
    }
    checkpoint = open_checkpoint(saved(tmp_path, tensors))
    assert same_content(checkpoint, tensors)


def test_parameters_buffers_and_metadata_of_a_module_are_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    state = model.state_dict()
    assert isinstance(state, OrderedDict)
    assert hasattr(state, "_metadata")
    assert same_content(open_checkpoint(saved(tmp_path, state)), state)
    parameters = dict(model.named_parameters())
    assert same_content(
        open_checkpoint(saved(tmp_path, parameters)),
        {name: value.detach() for name, value in parameters.items()},
    )


def test_tensors_with_attributes_of_their_own_are_read(tmp_path: Path) -> None:
    plain, parameter = torch.randn(3), nn.Parameter(torch.randn(2))
    unsigned = torch.arange(3).to(torch.uint16)
    for value in (plain, parameter, unsigned):
        value.note = "mine"  # type: ignore[attr-defined]  # a subclass in all but name
    tensors = {"plain": plain, "parameter": parameter, "unsigned": unsigned}
    expected = {name: value.detach() for name, value in tensors.items()}
    assert same_content(open_checkpoint(saved(tmp_path, tensors)), expected)


def test_tied_tensors_are_aliases_of_the_first(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    tensors = {"a": weight, "b": weight, "c": weight.T, "d": weight[:2], "e": weight.clone()}
    tensors["f"] = tensors["c"].view(3, 3)
    checkpoint = open_checkpoint(saved(tmp_path, tensors))
    assert checkpoint.aliases == {"b": "a", "f": "c"}
    assert same_content(checkpoint, tensors)


def test_empty_tensors_are_not_tied(tmp_path: Path) -> None:
    state = {"a": torch.empty(0), "b": torch.empty(0), "c": torch.ones(1)}
    assert open_checkpoint(saved(tmp_path, state)).aliases == {}


def test_places_of_weights_without_values_are_no_weights(tmp_path: Path) -> None:
    """DeepSpeed ZeRO-3 saves such files for each process."""
    path = saved(tmp_path, {"module": {"a": torch.empty(0), "b": torch.empty(0)}, "step": 5})
    with pytest.raises(CheckpointError, match="holds no values, .* DeepSpeed ZeRO-3"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "key",
    [
        "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network",
        "weights", "model_weights",
    ],
)  # fmt: skip
def test_weights_are_found_where_trainers_put_them(tmp_path: Path, key: str) -> None:
    tensors = {"w": torch.randn(2)}
    optimizer = torch.optim.Adam([nn.Parameter(torch.randn(2))])
    path = saved(tmp_path, {key: tensors, "optimizer": optimizer.state_dict(), "epoch": 4})
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, tensors)
    assert checkpoint.epoch == 4
    assert checkpoint.notes == []


def test_weights_are_found_below_several_levels(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(2)}
    path = saved(tmp_path, {"model": {"state_dict": tensors}})
    assert same_content(open_checkpoint(path), tensors)


def everything_else() -> dict[str, Any]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.randn(2))], momentum=0.9)
    return {
        "epoch": 9,
        "global_step": 1200,
        "args": argparse.Namespace(lr=0.1, out=Path("runs/a"), sizes=(1, 2)),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 3, "_last_lr": [0.1]},
        "best": np.float64(0.5),
        "array": np.arange(6).reshape(2, 3),
        "random_state": (np.random.default_rng(0).integers(0, 9, 3), torch.get_rng_state()),
        "when": datetime(2026, 1, 2, 3, 4, 5),
        "counts": defaultdict(int, a=1),
        "nested": defaultdict(list, a=[1]),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:0"),
        "layout": {"ints": {1: 2}, "set": {1, 2}, "frozen": frozenset({1}), "bytes": b"x"},
        "complex": 1 + 2j,
        "range": range(3),
        "none": None,
    }


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_else_trainers_save_is_passed_over(tmp_path: Path, protocol: int) -> None:
    tensors = {"w": torch.randn(2)}
    content = everything_else() | {"model": tensors}
    checkpoint = open_checkpoint(saved(tmp_path, content, pickle_protocol=protocol))
    assert same_content(checkpoint, tensors)
    assert (checkpoint.step, checkpoint.epoch) == (1200, 9)
    assert checkpoint.notes == []


def test_values_beside_tensors_are_left_out_with_a_note(tmp_path: Path) -> None:
    content = {"w": torch.ones(1), "a": 1, "b": "x", "c": None, "d": [torch.ones(1)]}
    checkpoint = open_checkpoint(saved(tmp_path, content))
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.notes == ["left out, not tensors: 'a', 'b', 'c' and 1 more"]


def test_extra_state_beside_tensors_is_left_out_with_a_note(tmp_path: Path) -> None:
    content = {"w": torch.ones(1), "layer._extra_state": {"scale": torch.ones(1)}}
    checkpoint = open_checkpoint(saved(tmp_path, content))
    assert checkpoint.notes == ["left out, not tensors: 'layer._extra_state'"]


@pytest.mark.parametrize("key", ["step", "global_step", "iteration", "iter", "num_updates", "it"])
def test_the_step_is_read_where_trainers_put_it(tmp_path: Path, key: str) -> None:
    content = {"model": {"w": torch.ones(1)}, key: 500}
    assert open_checkpoint(saved(tmp_path, content)).step == 500


@pytest.mark.parametrize("step", [True, -1, 2**63, 1.5, "7", torch.tensor(5)])
def test_a_step_that_is_no_count_is_not_believed(tmp_path: Path, step: Any) -> None:
    content = {"model": {"w": torch.ones(1)}, "step": step}
    assert open_checkpoint(saved(tmp_path, content)).step is None


# -- which of several entries


@pytest.mark.parametrize(
    "key", ["ema", "model_ema", "EMA_state", "swa_model", "averaged", "shadow", "teacher"]
)
def test_an_average_kept_in_training_is_taken_only_when_asked_for(tmp_path: Path, key: str) -> None:
    model, average = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    path = saved(tmp_path, {"model": model, key: average})
    checkpoint = open_checkpoint(path)
    assert same_content(checkpoint, model)
    assert checkpoint.notes == [f"also holds '{key}'; --state-key selects it"]
    checkpoint = open_checkpoint(path, state_key=key)
    assert same_content(checkpoint, average)
    assert checkpoint.notes == []


def test_an_average_beside_the_tensors_themselves_is_noted(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(2), "ema": {"w": torch.zeros(2)}})
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.notes[0] == "also holds 'ema'; --state-key selects it"


def test_an_average_alone_is_not_taken_for_the_weights(tmp_path: Path) -> None:
    path = saved(tmp_path, {"ema": {"w": torch.ones(2)}, "step": 3})
    refused(
        path,
        "no weights found at its top level, which holds 'ema', 'step'; choose one with "
        "--state-key, for example --state-key ema",
    )


def test_two_candidates_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {"w": torch.ones(2)}, "net": {"w": torch.ones(2)}})
    refused(path, "'model', 'net' all hold weights; choose one with --state-key")
    assert list(open_checkpoint(path, state_key="net").tensors) == ["w"]


def test_networks_beside_single_tensors_are_refused_not_left_out(tmp_path: Path) -> None:
    network = {"w": torch.ones(2)}
    content = {"best_loss": torch.tensor(0.5), "netG": network, "netD": network}
    path = saved(tmp_path, content)
    refused(
        path,
        "no weights found at its top level, which holds 'best_loss', 'netG', 'netD'; choose one "
        "with --state-key, for example --state-key netG",
    )
    assert list(open_checkpoint(path, state_key="netD").tensors) == ["w"]


def test_networks_below_a_known_entry_are_refused_by_their_path(tmp_path: Path) -> None:
    path = saved(
        tmp_path, {"model": {"encoder": {"w": torch.ones(2)}, "decoder": {"w": torch.ones(2)}}}
    )
    refused(
        path,
        "no weights found in its entry 'model', which holds 'encoder', 'decoder'; choose one with "
        "--state-key, for example --state-key model.encoder",
    )
    assert list(open_checkpoint(path, state_key="model.encoder").tensors) == ["w"]


def test_nothing_found_names_what_is_there(tmp_path: Path) -> None:
    path = saved(tmp_path, {"epoch": 1, "config": {"a": 1}})
    refused(path, "no weights found at its top level, which holds 'epoch', 'config'")
    path = saved(tmp_path, {f"k{index}": index for index in range(10)})
    keys = ", ".join(f"'k{index}'" for index in range(8))
    refused(path, f"no weights found at its top level, which holds {keys} and 2 more")
    refused(saved(tmp_path, {}), "no weights found at its top level, which holds nothing")


def test_a_state_key_may_hold_dots(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a.b": {"w": torch.ones(1)}, "a": {"b": {"v": torch.ones(1)}}})
    assert list(open_checkpoint(path, state_key="a.b").tensors) == ["w"]


def test_a_state_key_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {"w": torch.ones(1)}, "epoch": 3})
    refused(path, "no entry 'ema': 'ema' is not among 'model', 'epoch'", state_key="ema")
    refused(path, "no entry 'model.x': 'x' is not among 'w'", state_key="model.x")
    refused(path, "no entry 'epoch.x': 'x' is not among ", state_key="epoch.x")
    refused(path, "the entry 'epoch' is not a state dict", state_key="epoch")
    refused(path, "the entry 'model.w' is not a state dict", state_key="model.w")


@pytest.mark.parametrize(
    ("root", "kind"),
    [
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a tensor"),
        (3, "a int"),
        ("x", "a str"),
        (None, "a NoneType"),
        ((torch.ones(1),), "a tuple"),
        (argparse.Namespace(model=1), "a argparse.Namespace object"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_root_that_is_no_state_dict_is_refused(tmp_path: Path, root: Any, kind: str) -> None:
    refused(saved(tmp_path, root), f"holds {kind}, expected a state dict (name -> tensor)")


def test_a_whole_module_is_refused_by_its_name(tmp_path: Path) -> None:
    path = saved(tmp_path, nn.Linear(2, 2))
    with pytest.raises(
        CheckpointError, match=r"needs Python code 'torch\.nn\.modules\.linear\.Linear'"
    ):
        open_checkpoint(path)


# -- tensors that are no plain arrays


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11 says so of itself
def test_quantised_sparse_meta_and_conjugated_tensors_are_refused(tmp_path: Path) -> None:
    value = torch.randn(2, 2, dtype=torch.complex64)
    indices = torch.tensor([[0, 1], [1, 0]])
    for tensor_, what in (
        (torch.empty(2, device="meta"), "on the meta device: it has no values"),
        (
            torch.sparse_coo_tensor(indices, torch.ones(2), (2, 2), check_invariants=True),
            "sparse",
        ),
        (value.conj(), "stored with a conjugation or negation still to be applied"),
        (value.conj().imag, "stored with a conjugation or negation still to be applied"),
        (
            torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            "quantised",
        ),
        (torch.ones([1] * 65), "of more than 64 dimensions"),
    ):
        path = saved(tmp_path, {"w": tensor_})
        refused(path, f"tensor 'w' is {what}; only plain tensors are averaged")


def test_a_resolved_conjugate_is_read(tmp_path: Path) -> None:
    value = torch.randn(2, dtype=torch.complex64).conj().resolve_conj()
    assert same_content(open_checkpoint(saved(tmp_path, {"w": value})), {"w": value})


def test_an_expanded_view_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(1).expand(3, 4)})
    refused(
        path,
        "tensor 'w' is an expanded view: it repeats 1 stored elements as 12; "
        "save a contiguous copy",
    )


def test_a_view_of_terabytes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, torch_bytes(mapping({"w": tensor([2**36], [0])})))
    refused(
        path,
        "tensor 'w' is an expanded view: it repeats 1 stored elements as 68719476736; "
        "save a contiguous copy",
    )


def test_a_view_of_more_elements_than_digits_can_say_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, torch_bytes(mapping({"w": tensor([2**62] * 64, [0] * 64)})))
    with pytest.raises(CheckpointError, match="is an expanded view"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ([5], [1], 0), ([4], [1], 1), ([2], [4], 0), ([2, 2], [3, 1], 0), ([1], [1], 4),
        ([1], [1], 2**62), ([2], [2**62], 0),
    ],
)  # fmt: skip
def test_a_view_past_its_storage_is_refused(
    tmp_path: Path, shape: list[int], strides: list[int], offset: int
) -> None:
    content = mapping({"w": tensor(shape, strides, offset=offset)})
    path = written(tmp_path, torch_bytes(content))
    refused(path, "tensor 'w' reaches past the end of its storage")


def test_an_empty_view_needs_no_storage(tmp_path: Path) -> None:
    content = mapping({"w": tensor([0, 5], [5, 1], offset=99, stored=storage("none"))})
    checkpoint = open_checkpoint(written(tmp_path, torch_bytes(content)))
    assert read_tensor(checkpoint, "w") == b""


def test_overlapping_rows_are_read_as_they_are(tmp_path: Path) -> None:
    content = mapping({"w": tensor([2, 2], [1, 2])})
    checkpoint = open_checkpoint(written(tmp_path, torch_bytes(content)))
    assert read_tensor(checkpoint, "w") == struct.pack("<4f", 0, 2, 1, 3)


# -- storages


def test_a_missing_storage_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, torch_bytes(mapping({"w": tensor()}), {"1": bytes(16)}))
    refused(path, "the storage of tensor 'w' is missing")


@pytest.mark.parametrize("nbytes", [0, 15, 17, 32])
def test_a_storage_of_another_size_is_refused(tmp_path: Path, nbytes: int) -> None:
    path = written(tmp_path, torch_bytes(mapping({"w": tensor()}), {"0": bytes(nbytes)}))
    refused(path, f"the storage of tensor 'w' has {nbytes} bytes, expected 16")


def test_a_second_reference_cannot_state_another_size(tmp_path: Path) -> None:
    content = mapping({"w": tensor(), "v": tensor([40], stored=storage(numel=40))})
    refused(written(tmp_path, torch_bytes(content)), "refers to the storage '0' in two ways")


def test_a_second_reference_cannot_state_another_dtype(tmp_path: Path) -> None:
    """torch would read both as what the first one says, and never writes this."""
    integers = tensor([4], stored=storage(kind="IntStorage"))
    content = mapping({"w": tensor(), "v": integers})
    refused(written(tmp_path, torch_bytes(content)), "refers to the storage '0' in two ways")


# -- names


@pytest.mark.parametrize("other", [tensor(), number(3), mapping({})])
def test_a_name_that_stands_twice_is_refused(tmp_path: Path, other: bytes) -> None:
    for pair in ((tensor(), other), (other, tensor())):
        content = mapping([(text("v"), tensor()), *((text("w"), one) for one in pair)])
        refused(written(tmp_path, torch_bytes(content)), "the state dict holds 'w' twice")


@pytest.mark.parametrize("key", [number(1), b"N", group(text("w")), b"C\x01w"])
def test_a_name_that_is_no_string_is_refused(tmp_path: Path, key: bytes) -> None:
    content = mapping([(text("w"), tensor()), (key, tensor())])
    path = written(tmp_path, torch_bytes(content))
    refused(path, "the state dict has a key that is not a string")


def test_a_name_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, torch_bytes(mapping({"w\ud800": tensor()})))
    refused(path, "the name of tensor 'w\\ud800' is not valid Unicode")


# -- archives


def test_a_zip_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(path, "is a zip file, but not one that torch.save wrote: it has no data.pkl")
    for names in (("data.pkl",), ("a/b/data.pkl",), ("a/data.pkl", "b/data.pkl"), ()):
        path.write_bytes(zip_bytes([Member(name=one, content=pickled(b"}")) for one in names]))
        refused(path, "is a zip file, but not one that torch.save wrote: it has no data.pkl")


@pytest.mark.parametrize("extra", ["archive/constants.pkl", "archive/code/__torch__.py"])
def test_a_torchscript_archive_is_refused(tmp_path: Path, extra: str) -> None:
    members = [*torch_members(pickled(mapping({"w": tensor()}))), Member(name=extra)]
    path = written(tmp_path, zip_bytes(members))
    refused(
        path,
        "is a TorchScript archive, which is a program; save its state_dict() with torch.save and "
        "average that",
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_real_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)  # type: ignore[no-untyped-call]
    with pytest.raises(CheckpointError, match="; a TorchScript archive is a program: "):
        open_checkpoint(path)


@pytest.mark.parametrize("order", [b"big", b"", b"little\n", b"LITTLE"])
def test_another_byte_order_is_refused(tmp_path: Path, order: bytes) -> None:
    members = torch_members(pickled(mapping({"w": tensor()})))
    members[1] = Member(name="archive/byteorder", content=order)
    refused(written(tmp_path, zip_bytes(members)), "was written on a big-endian machine")


def test_a_file_without_a_byte_order_is_read(tmp_path: Path) -> None:
    members = torch_members(pickled(mapping({"w": tensor()})))
    del members[1]
    assert list(open_checkpoint(written(tmp_path, zip_bytes(members))).tensors) == ["w"]


def test_a_huge_byte_order_is_refused(tmp_path: Path) -> None:
    members = torch_members(pickled(mapping({"w": tensor()})))
    members[1] = Member(name="archive/byteorder", content=b"l" * 65)
    path = written(tmp_path, zip_bytes(members))
    refused(path, "its archive/byteorder has 65 bytes, at most 64 are allowed")


def test_a_pickle_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptavg.checkpoint.torch_zip.MAX_PICKLE_BYTES", 100)
    path = saved(tmp_path, {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"its w/data\.pkl has .* at most 100 are allowed$"):
        open_checkpoint(path)


def test_a_pickle_of_another_checksum_is_refused(tmp_path: Path) -> None:
    members = torch_members(pickled(mapping({"w": tensor()})))
    members[0] = Member(name="archive/data.pkl", content=members[0].content, crc=1)
    path = written(tmp_path, zip_bytes(members))
    refused(path, "its archive/data.pkl is damaged (CRC-32 differs)")


def test_a_checksum_of_zero_was_not_computed(tmp_path: Path) -> None:
    members = torch_members(pickled(mapping({"w": tensor()})))
    members[0] = Member(name="archive/data.pkl", content=members[0].content, crc=0)
    assert list(open_checkpoint(written(tmp_path, zip_bytes(members))).tensors) == ["w"]


def test_files_without_checksums_or_of_another_alignment_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(7)}
    patch = torch.utils.serialization.config.patch  # type: ignore[attr-defined]  # made on import
    with patch("save.storage_alignment", 4096):
        path = saved(tmp_path, tensors)
    assert path.stat().st_size > 8192
    assert same_content(open_checkpoint(path), tensors)
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, tensors)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same_content(open_checkpoint(path), tensors)


def test_an_archive_of_pythons_zipfile_is_read(tmp_path: Path) -> None:
    original = saved(tmp_path, {"w": torch.arange(5.0)})
    path = tmp_path / "again.pt"
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    assert same_content(open_checkpoint(path), {"w": torch.arange(5.0)})


def test_a_checkpoint_of_many_tensors_reads_in_few_system_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"t{index}": torch.full((5,), float(index)) for index in range(300)}
    checkpoint = open_checkpoint(saved(tmp_path, tensors))
    calls = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    assert same_content(checkpoint, tensors)
    assert len(calls) == 300
    calls.clear()
    buffer = bytearray(300 * 20)
    checkpoint.read_into([Piece(name, 0, 20) for name in tensors], memoryview(buffer))
    assert bytes(buffer) == b"".join(map(bytes_of, tensors.values()))
    assert len(calls) <= 3


# -- hostile ones


def test_a_cyclic_state_dict_is_refused(tmp_path: Path) -> None:
    content = b"}q\x00" + text("model") + b"h\x00s"
    refused(
        written(tmp_path, torch_bytes(content)),
        "no weights found at its top level, which holds 'model'",
    )
    cyclic: dict[str, Any] = {"w": torch.ones(1)}
    cyclic["model"] = cyclic
    path = saved(tmp_path, cyclic)
    with pytest.raises(CheckpointError, match=r"no weights found in its entry 'model\.model"):
        open_checkpoint(path)


def test_one_mapping_under_many_names_is_searched_once(tmp_path: Path) -> None:
    count = 3000
    inner = b"}q\x00(" + b"NN" * count + b"u0"
    middle = b"}q\x01(" + b"Nh\x00" * count + b"u0"
    root = b"}(" + (text("ema") + b"h\x01") * count + b"u"
    path = written(tmp_path, torch_bytes(inner + middle + root))
    with pytest.raises(CheckpointError, match="no weights found at its top level"):
        open_checkpoint(path)


def test_a_key_that_is_set_twice_has_its_last_value(tmp_path: Path) -> None:
    twice = [(text("model"), mapping({"old": tensor()}))]
    for last, names in (
        (mapping({"w": tensor()}), ["w"]),
        (number(3), ["w"]),
    ):
        pairs = [*twice, (text("model"), last)]
        if last == number(3):
            pairs.append((text("net"), mapping({"w": tensor()})))
        path = written(tmp_path, torch_bytes(mapping(pairs)))
        assert list(open_checkpoint(path).tensors) == names


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    depth = 100_000
    content = b"}" + (text("model") + b"}") * depth + b"s" * depth
    refused(
        written(tmp_path, torch_bytes(content)),
        "no weights found at its top level, which holds 'model'",
    )
    for content in (b")" + b"\x85" * depth, b"]" * depth + b"a" * (depth - 1)):
        with pytest.raises(CheckpointError, match="expected a state dict"):
            open_checkpoint(written(tmp_path, torch_bytes(content)))


def test_a_note_about_hostile_names_stays_what_it_is(tmp_path: Path) -> None:
    content = mapping({"w": tensor(), "x\x1b[2J": b"N"})
    checkpoint = open_checkpoint(written(tmp_path, torch_bytes(content)))
    assert checkpoint.notes == ["left out, not tensors: 'x\x1b[2J'"]  # escaped where it is printed


# -- whatever the bytes


def small_file(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors = {"a": torch.arange(5).to(torch.int16), "b": torch.arange(6.0).reshape(3, 2).T}
    return saved(tmp_path, tensors), tensors


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path, _ = small_file(tmp_path)
    raw = path.read_bytes()
    cut = tmp_path / "cut.pt"
    for length in range(len(raw)):
        cut.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(cut)


def storage_ranges(path: Path) -> set[int]:
    """Return the positions of the storages' bytes, which carry no structure."""
    positions: set[int] = set()
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                header = raw[entry.header_offset : entry.header_offset + 30]
                start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
                positions |= set(range(start, start + entry.file_size))
    return positions


@pytest.mark.parametrize("change", [0x08, 0xFF])
def test_every_changed_byte_of_the_structure_is_refused_or_harmless(
    tmp_path: Path, change: int
) -> None:
    path, tensors = small_file(tmp_path)
    raw, data = path.read_bytes(), storage_ranges(path)
    assert len(data) == 10 + 24
    changed_path = tmp_path / "changed.pt"
    refusals = 0
    for at in range(len(raw)):
        if at in data:
            continue
        changed = bytearray(raw)
        changed[at] ^= change
        changed_path.write_bytes(changed)
        try:
            checkpoint = open_checkpoint(changed_path)
        except CkptavgError:
            refusals += 1
            continue
        assert same_content(checkpoint, tensors), at
        checkpoint.close()
    assert refusals > 500


def test_mutated_files_are_refused_or_keep_their_tensors(tmp_path: Path) -> None:
    path, tensors = small_file(tmp_path)
    raw, data = path.read_bytes(), storage_ranges(path)
    structure = [at for at in range(len(raw)) if at not in data]
    expected = {name: tuple(value.shape) for name, value in tensors.items()}
    rng = random.Random(3)
    changed_path = tmp_path / "changed.pt"
    for _ in range(800):
        changed = bytearray(raw)
        for at in rng.sample(structure, rng.randint(2, 5)):
            changed[at] = rng.randrange(256)
        changed_path.write_bytes(changed)
        try:
            checkpoint = open_checkpoint(changed_path)
        except CkptavgError:
            continue
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == expected
        assert same_content(checkpoint, tensors)
        checkpoint.close()


def test_rebuild_calls_of_other_functions_stay_out(tmp_path: Path) -> None:
    content = mapping(
        {
            "w": call(
                name("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), sizes([4]), b"N"
            )
        }
    )
    refused(written(tmp_path, torch_bytes(content)), "its pickle is damaged (TypeError)")


def test_a_dot_chooses_the_top_level_itself(tmp_path: Path) -> None:
    path = tmp_path / "gan.pt"
    torch.save({"w": torch.ones(2), "extra": {"v": torch.ones(3)}}, path)
    with pytest.raises(CheckpointError, match="no weights found at its top level"):
        open_checkpoint(path)
    checkpoint = open_checkpoint(path, state_key=".")
    assert list(checkpoint.tensors) == ["w"]
    checkpoint.close()


def test_the_advice_on_state_key_leads_to_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "ema.pt"
    torch.save({"model_ema": {"module": {"w": torch.ones(2)}}}, path)
    with pytest.raises(CheckpointError, match="for example --state-key model_ema.module$"):
        open_checkpoint(path)
    checkpoint = open_checkpoint(path, state_key="model_ema.module")
    assert list(checkpoint.tensors) == ["w"]
    checkpoint.close()


def test_another_network_beside_the_model_is_named(tmp_path: Path) -> None:
    state = {"model": {"a": torch.ones(1)}, "discriminator": {"b": torch.ones(1)}}
    checkpoint = open_checkpoint(saved(tmp_path, state))
    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.notes == [
        "left out 'discriminator', which hold tensors, too; see --state-key"
    ]
