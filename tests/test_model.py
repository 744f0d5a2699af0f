"""Loading weights into live models, and taking recomputed buffers back out."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import FORMATS, MakeCheckpoint
from safetensors.torch import save_model
from torch import Tensor, nn

from ckptavg import ModelError, OutputError, open_checkpoint, recompute_bn_stats
from ckptavg.model import NameFit, bn_buffer_bytes, check_names, load_weights, read_tensors
from ckptavg.tensors import DTYPE_BY_NAME, TensorInfo


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Tied(nn.Module):
    """A language model's usual tie: the output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def load(model: nn.Module, path: Path) -> None:
    checkpoint = open_checkpoint(path)
    try:
        load_weights(model, checkpoint)
    finally:
        checkpoint.close()


def refusal(model: nn.Module, path: Path) -> str:
    """Return the message of a refused load, without the path; the model must be unchanged."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load(model, path)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.mark.parametrize("layout", FORMATS)
def test_every_tensor_is_loaded_bit_for_bit(make_checkpoint: MakeCheckpoint, layout: str) -> None:
    saved, model = net(1), net(2)
    saved(torch.randn(8, 3))
    load(model, make_checkpoint("one", saved.state_dict(), layout))
    assert same(model.state_dict(), saved.state_dict())


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("live", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_cast_to_the_dtypes_of_the_model(
    make_checkpoint: MakeCheckpoint, stored: torch.dtype, live: torch.dtype
) -> None:
    saved, model = net(1).to(stored), net(2).to(live)
    load(model, make_checkpoint("one", saved.state_dict()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name].to(value.dtype))
        assert value.dtype == (torch.int64 if name.endswith("tracked") else live)


def test_missing_names_are_refused_with_the_first_three(make_checkpoint: MakeCheckpoint) -> None:
    state = net().state_dict()
    kept = {name: value for name, value in state.items() if name in ("0.bias", "2.bias")}
    assert refusal(net(), make_checkpoint("one", kept)) == (
        "does not fit the model: 7 tensors of the model are missing: "
        "'0.weight', '1.weight', '1.bias', ..."
    )


def test_unexpected_names_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    state = {**net().state_dict(), "3.weight": torch.zeros(2)}
    assert refusal(net(), make_checkpoint("one", state)) == (
        "does not fit the model: 1 tensors are not in the model: '3.weight'"
    )


def test_missing_and_unexpected_names_come_in_one_message(make_checkpoint: MakeCheckpoint) -> None:
    state = net().state_dict()
    state["2.scale"] = state.pop("2.weight")
    assert refusal(net(), make_checkpoint("one", state)) == (
        "does not fit the model: 1 tensors of the model are missing: '2.weight'; "
        "1 tensors are not in the model: '2.scale'"
    )


@pytest.mark.parametrize("shape", [(4, 4), (12,), (3, 4), (4, 3, 1)])
def test_other_shapes_are_refused_even_of_equal_size(
    make_checkpoint: MakeCheckpoint, shape: tuple[int, ...]
) -> None:
    state = {**net().state_dict(), "0.weight": torch.zeros(shape)}
    assert refusal(net(), make_checkpoint("one", state)) == (
        f"'0.weight' has shape {list(shape)}, [4, 3] in the model"
    )


def test_what_a_model_refuses_itself_is_told_as_one_line(make_checkpoint: MakeCheckpoint) -> None:
    class Picky(nn.Linear):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            raise RuntimeError("not these\nweights")

    path = make_checkpoint("one", nn.Linear(2, 2).state_dict())
    assert refusal(Picky(2, 2), path) == "does not fit the model: not these\\nweights"


def test_tied_names_are_loaded_from_files_that_store_both(make_checkpoint: MakeCheckpoint) -> None:
    saved, model = Tied(), Tied()
    load(model, make_checkpoint("one", saved.state_dict(), "torch"))
    assert same(model.state_dict(), saved.state_dict())
    assert model.head.weight is model.embed.weight


def test_tied_names_are_loaded_from_files_that_store_one(tmp_path: Path) -> None:
    saved, model = Tied(), Tied()
    path = tmp_path / "tied.safetensors"
    save_model(saved, str(path))
    with_one_name = open_checkpoint(path)
    assert len(with_one_name.tensors) == len(saved.state_dict()) - 1
    with_one_name.close()
    load(model, path)
    assert same(model.state_dict(), saved.state_dict())


def test_a_tied_name_alone_is_not_enough_for_a_model_without_the_tie(
    make_checkpoint: MakeCheckpoint,
) -> None:
    state = Tied().state_dict()
    del state["head.weight"]
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(6, 4))
    assert refusal(model, make_checkpoint("one", state)) == (
        "does not fit the model: 1 tensors of the model are missing: 'head.weight'"
    )


def test_different_values_for_names_that_the_model_ties_are_refused(
    make_checkpoint: MakeCheckpoint,
) -> None:
    state = Tied().state_dict()
    state["head.weight"] = state["head.weight"] + 1
    assert refusal(Tied(), make_checkpoint("one", state)) == (
        "'embed.weight' and 'head.weight' are one tensor in the model, but hold different values"
    )


def test_models_without_storage_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    with torch.device("meta"):
        model = net()
    checkpoint = open_checkpoint(make_checkpoint("one", net().state_dict()))
    with pytest.raises(ModelError) as caught:
        check_names(model, checkpoint.tensors, "one")
    assert str(caught.value) == (
        "9 tensors of the model have no storage yet (lazy, or on the meta device): "
        "'0.weight', '0.bias', '1.weight', ...; build it with real weights"
    )
    checkpoint.close()


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_models_with_lazy_layers_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = open_checkpoint(make_checkpoint("one", nn.Linear(3, 4).state_dict()))
    with pytest.raises(ModelError, match=r"^2 tensors of the model have no storage yet \(lazy, "):
        check_names(nn.LazyLinear(4), checkpoint.tensors, "one")
    checkpoint.close()


def test_state_that_is_no_tensor_has_no_shape_to_compare() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"version": 1}

        def set_extra_state(self, state: object) -> None:
            pass

    info = TensorInfo(DTYPE_BY_NAME["float32"], (2,))
    with pytest.raises(ModelError, match="1 tensors of the model are missing: '_extra_state'"):
        check_names(Extra(2, 2), {"weight": info, "bias": info}, "one")


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
     torch.bool, torch.complex64],
)  # fmt: skip
def test_tensors_are_read_in_their_own_dtype_and_shape(
    make_checkpoint: MakeCheckpoint, dtype: torch.dtype
) -> None:
    tensors = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros((2, 0, 3), dtype=dtype),
    }
    checkpoint = open_checkpoint(make_checkpoint("one", tensors))
    read = dict(read_tensors(checkpoint))
    checkpoint.close()
    assert same(read, tensors)
    assert {value.dtype for value in read.values()} == {dtype}


# ---- buffers back out ----------------------------------------------------------------------------


def decoded(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


def test_recomputed_buffers_come_out_in_the_dtypes_to_store() -> None:
    model = net()
    report = recompute_bn_stats(model, [torch.randn(16, 3)])
    dtypes = {
        "1.running_mean": "bfloat16",
        "1.running_var": "float64",
        "1.num_batches_tracked": "int64",
    }
    found = dict(bn_buffer_bytes(model, report, dtypes, NameFit()))
    state = model.state_dict()
    assert list(found) == list(dtypes)
    for name, data in found.items():
        dtype: torch.dtype = getattr(torch, dtypes[name])
        assert torch.equal(decoded(data, dtype), state[name].to(dtype).reshape(-1))


def test_a_layer_without_a_counter_gives_two_buffers() -> None:
    model = net()
    report = recompute_bn_stats(model, [torch.randn(16, 3)])
    dtypes = {"1.running_mean": "float32", "1.running_var": "float32"}
    assert list(dict(bn_buffer_bytes(model, report, dtypes, NameFit()))) == list(dtypes)


def test_skipped_layers_give_no_buffers() -> None:
    model = net().train()
    model[1].eval()
    report = recompute_bn_stats(model, [torch.randn(16, 3)])
    assert dict(bn_buffer_bytes(model, report, {"1.running_mean": "float32"}, NameFit())) == {}


def test_a_layer_that_is_the_whole_model_has_names_without_a_dot() -> None:
    model = nn.BatchNorm1d(3)
    report = recompute_bn_stats(model, [torch.randn(16, 3)])
    dtypes = {"running_mean": "float32", "running_var": "float32", "num_batches_tracked": "int64"}
    assert list(dict(bn_buffer_bytes(model, report, dtypes, NameFit()))) == list(dtypes)


@pytest.mark.parametrize("stored", [("a", "b"), ("a",), ("b",)])
def test_a_layer_with_two_names_is_given_under_all_that_are_stored(stored: tuple[str, ...]) -> None:
    layer = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    report = recompute_bn_stats(model, [torch.randn(16, 3)], forward=lambda model, x: layer(x))
    dtypes = {f"{name}.running_{what}": "float32" for what in ("mean", "var") for name in stored}
    found = dict(bn_buffer_bytes(model, report, dtypes, NameFit()))
    assert found.keys() == dtypes.keys()
    for name, data in found.items():
        assert torch.equal(decoded(data, torch.float32), model.state_dict()[name])


def test_statistics_that_would_not_be_stored_anywhere_are_refused() -> None:
    model = net()
    report = recompute_bn_stats(model, [torch.randn(16, 3)])
    with pytest.raises(ModelError, match="^'1.running_mean' is not among the stored tensors$"):
        dict(bn_buffer_bytes(model, report, {"renamed.running_mean": "float32"}, NameFit()))


def test_statistics_that_the_stored_dtype_cannot_hold_are_refused() -> None:
    model = nn.BatchNorm1d(3)
    report = recompute_bn_stats(model, [torch.randn(16, 3) * 1000])
    dtypes = {"running_mean": "float16", "running_var": "float16"}
    with pytest.raises(OutputError) as caught:
        dict(bn_buffer_bytes(model, report, dtypes, NameFit()))
    assert str(caught.value) == (
        "'running_var' has values too large for float16, in which it is stored"
    )
