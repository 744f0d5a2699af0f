"""Loading weights into live models, and taking recomputed buffers back out."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conftest import FORMATS, MakeCheckpoint, float64_mean
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from ckptavg import (
    BnPass,
    ModelError,
    OutputError,
    average_checkpoints,
    open_checkpoint,
    recompute_bn,
    recompute_bn_stats,
)
from ckptavg.live_model import LiveModel
from ckptavg.model import NameFit, bn_buffer_bytes, check_names, load_weights, read_tensors
from ckptavg.processes import Processes
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


def load(model: nn.Module, path: Path) -> NameFit:
    checkpoint = open_checkpoint(path)
    try:
        return load_weights(model, checkpoint)
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


# ---- names with and without a prefix -------------------------------------------------------------

PREFIXES = ["model.", "model.backbone.", "module.", "_orig_mod.", "a.b.c."]


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def inside(model: nn.Module, prefix: str) -> nn.Module:
    """Return a model whose names all begin with a prefix."""
    for part in reversed(prefix.removesuffix(".").split(".")):
        model = nn.ModuleDict({part: model})
    return model


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_only_the_checkpoint_has_is_left_out(
    make_checkpoint: MakeCheckpoint, prefix: str, layout: str
) -> None:
    saved, model = net(1), net(2)
    path = make_checkpoint("one", prefixed(saved.state_dict(), prefix), layout)
    assert load(model, path) == NameFit(stored_prefix=prefix)
    assert same(model.state_dict(), saved.state_dict())


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_only_the_model_has_is_added(
    make_checkpoint: MakeCheckpoint, prefix: str, layout: str
) -> None:
    saved, model = net(1), inside(net(2), prefix)
    path = make_checkpoint("one", saved.state_dict(), layout)
    assert load(model, path) == NameFit(model_prefix=prefix)
    assert same(model.state_dict(), prefixed(saved.state_dict(), prefix))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_that_fit_as_they_are_keep_their_prefix(
    make_checkpoint: MakeCheckpoint, prefix: str
) -> None:
    saved, model = inside(net(1), prefix), inside(net(2), prefix)
    assert load(model, make_checkpoint("one", saved.state_dict())) == NameFit()
    assert same(model.state_dict(), saved.state_dict())


def test_no_more_is_left_out_than_the_model_has(make_checkpoint: MakeCheckpoint) -> None:
    saved, model = net(1), inside(net(2), "backbone.")
    path = make_checkpoint("one", prefixed(saved.state_dict(), "model.backbone."))
    assert load(model, path) == NameFit(stored_prefix="model.")
    assert same(model.state_dict(), prefixed(saved.state_dict(), "backbone."))


def test_no_more_is_added_than_the_checkpoint_lacks(make_checkpoint: MakeCheckpoint) -> None:
    saved, model = net(1), inside(net(2), "model.backbone.")
    path = make_checkpoint("one", prefixed(saved.state_dict(), "backbone."))
    assert load(model, path) == NameFit(model_prefix="model.")
    assert same(model.state_dict(), prefixed(saved.state_dict(), "model.backbone."))


def test_a_part_of_the_name_that_comes_twice_is_left_out_once(
    make_checkpoint: MakeCheckpoint,
) -> None:
    saved = nn.Sequential(nn.Sequential(nn.Linear(3, 4)))  # 0.0.weight
    model = nn.Sequential(nn.Linear(3, 4))  # 0.weight
    assert load(model, make_checkpoint("one", saved.state_dict())) == NameFit(stored_prefix="0.")
    assert torch.equal(model.state_dict()["0.weight"], saved.state_dict()["0.0.weight"])
    assert load(saved, make_checkpoint("two", model.state_dict())) == NameFit(model_prefix="0.")


@pytest.mark.parametrize(("stored", "live"), [("model.", ""), ("", "model."), ("model.", "net.")])
def test_names_translate_there_and_back(stored: str, live: str) -> None:
    fit = NameFit(stored_prefix=stored, model_prefix=live)
    assert fit.stored(f"{live}bn.weight") == f"{stored}bn.weight"
    assert fit.in_model(f"{stored}bn.weight") == f"{live}bn.weight"


@pytest.mark.parametrize("shape", [(4, 4), (12,), (3, 4)])
def test_shapes_are_compared_through_a_prefix_of_the_checkpoint(
    make_checkpoint: MakeCheckpoint, shape: tuple[int, ...]
) -> None:
    state = prefixed({**net().state_dict(), "0.weight": torch.zeros(shape)}, "model.")
    assert refusal(net(), make_checkpoint("one", state)) == (
        f"'model.0.weight' has shape {list(shape)}, [4, 3] in the model"
    )


def test_shapes_are_compared_through_a_prefix_of_the_model(make_checkpoint: MakeCheckpoint) -> None:
    state = {**net().state_dict(), "0.weight": torch.zeros(4, 4)}
    assert refusal(inside(net(), "model."), make_checkpoint("one", state)) == (
        "'0.weight' has shape [4, 4], [4, 3] in the model"
    )


def test_one_prefix_may_stand_for_another(make_checkpoint: MakeCheckpoint) -> None:
    """As of a file that DDP saved, for a LightningModule."""
    weights = nn.Linear(3, 4).state_dict()
    checkpoint = open_checkpoint(make_checkpoint("one", prefixed(weights, "module.")))
    model = inside(nn.Linear(3, 4), "model.")
    fit = load_weights(model, checkpoint)
    checkpoint.close()
    assert fit == NameFit(stored_prefix="module.", model_prefix="model.")
    assert fit.stored("model.weight") == "module.weight"
    assert fit.in_model("module.weight") == "model.weight"
    assert torch.equal(model.state_dict()["model.weight"], weights["weight"])


@pytest.mark.parametrize("extra", ["epochs", "head.weight", "model"])
def test_a_prefix_that_not_all_names_have_is_not_left_out(
    make_checkpoint: MakeCheckpoint, extra: str
) -> None:
    state = prefixed(nn.Linear(3, 4).state_dict(), "model.")
    path = make_checkpoint("one", {extra: torch.zeros(2), **state}, "torch")
    assert refusal(nn.Linear(3, 4), path) == (
        "does not fit the model: 2 tensors of the model are missing: 'weight', 'bias'; "
        f"3 tensors are not in the model: '{extra}', 'model.weight', 'model.bias'"
    )


def test_what_is_missing_behind_a_prefix_is_told_alone(make_checkpoint: MakeCheckpoint) -> None:
    state = prefixed(net().state_dict(), "model.")
    del state["model.2.bias"]
    assert refusal(net(), make_checkpoint("one", state, "torch")) == (
        "does not fit the model: 1 tensors of the model are missing: '2.bias'"
    )


def test_parts_of_one_network_are_not_loaded_into_each_other(
    make_checkpoint: MakeCheckpoint,
) -> None:
    path = make_checkpoint("one", prefixed(nn.Linear(3, 4).state_dict(), "actor."))
    assert refusal(inside(nn.Linear(3, 4), "critic."), path) == (
        "does not fit the model: 2 tensors of the model are missing: 'critic.weight', "
        "'critic.bias'; 2 tensors are not in the model: 'actor.bias', 'actor.weight'"
    )


@pytest.mark.parametrize("left_out", [(), ("embed.weight",), ("head.weight",)])
def test_tied_names_are_loaded_through_a_prefix_of_the_checkpoint(
    make_checkpoint: MakeCheckpoint, left_out: tuple[str, ...]
) -> None:
    saved, model = Tied(), Tied()
    state = {
        name: value.clone() for name, value in saved.state_dict().items() if name not in left_out
    }
    path = make_checkpoint("one", prefixed(state, "model."))
    assert load(model, path) == NameFit(stored_prefix="model.")
    assert same(model.state_dict(), saved.state_dict())
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("left_out", [(), ("embed.weight",), ("head.weight",)])
def test_tied_names_are_loaded_through_a_prefix_of_the_model(
    make_checkpoint: MakeCheckpoint, left_out: tuple[str, ...]
) -> None:
    saved, model = Tied(), inside(Tied(), "model.")
    state = {
        name: value.clone() for name, value in saved.state_dict().items() if name not in left_out
    }
    assert load(model, make_checkpoint("one", state)) == NameFit(model_prefix="model.")
    assert same(model.state_dict(), prefixed(saved.state_dict(), "model."))


def test_different_values_for_tied_names_are_refused_through_a_prefix(
    make_checkpoint: MakeCheckpoint,
) -> None:
    state = prefixed(Tied().state_dict(), "model.")
    state["model.head.weight"] = state["model.head.weight"] + 1
    assert refusal(Tied(), make_checkpoint("one", state)) == (
        "'embed.weight' and 'head.weight' are one tensor in the model, but hold different values"
    )


@pytest.mark.parametrize(
    ("stored_prefix", "model_prefix"), [("model.", ""), ("model.backbone.", ""), ("", "model.")]
)
def test_recomputed_buffers_come_out_under_the_stored_names(
    stored_prefix: str, model_prefix: str
) -> None:
    model = net() if not model_prefix else inside(net(), model_prefix)
    inner = model if not model_prefix else model.get_submodule(model_prefix.removesuffix("."))
    report = recompute_bn_stats(model, [torch.randn(16, 3)], forward=lambda _, x: inner(x))
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    dtypes = {f"{stored_prefix}1.{buffer}": "float32" for buffer in buffers}
    found = dict(
        bn_buffer_bytes(
            model, report, dtypes, NameFit(stored_prefix=stored_prefix, model_prefix=model_prefix)
        )
    )
    assert list(found) == list(dtypes)
    for buffer in buffers:
        value = inner.state_dict()[f"1.{buffer}"]
        assert torch.equal(
            decoded(found[f"{stored_prefix}1.{buffer}"], torch.float32), value.view(-1)
        )


# ---- what torch.optim.swa_utils saves ------------------------------------------------------------


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 3, generator=generator) + size / 10 for size in (30, 12, 50)]


def averaged_model(inner: nn.Module, n_models: int = 3) -> AveragedModel:
    averaged = AveragedModel(inner)
    for seed in range(n_models):
        averaged.update_parameters(net(seed))
    return averaged


def test_an_averaged_model_of_torch_is_loaded_into_the_inner_model(tmp_path: Path) -> None:
    averaged, model = averaged_model(net()), net(9)
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    assert load(model, tmp_path / "swa.pt") == NameFit(stored_prefix="module.")
    assert same(model.state_dict(), averaged.module.state_dict())


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_further_wrappers_inside_an_averaged_model_are_left_out_too(
    make_checkpoint: MakeCheckpoint, wrapper: str
) -> None:
    saved, model = net(1), net(2)
    state = {
        "n_averaged": torch.tensor(3),
        **prefixed(saved.state_dict(), f"module.{wrapper}"),
    }
    assert load(model, make_checkpoint("one", state)) == NameFit(stored_prefix=f"module.{wrapper}")
    assert same(model.state_dict(), saved.state_dict())


def test_an_averaged_model_of_torch_fits_itself(tmp_path: Path) -> None:
    averaged, model = averaged_model(net()), AveragedModel(net(9))
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    assert load(model, tmp_path / "swa.pt") == NameFit()
    assert same(model.state_dict(), averaged.state_dict())
    assert int(model.n_averaged) == 3


class Counting(nn.Linear):
    """A model with a weight that is called as the counter of AveragedModel is."""

    n_averaged: Tensor

    def __init__(self, count: int) -> None:
        super().__init__(3, 4)
        self.register_buffer("n_averaged", torch.tensor(count))


def test_a_counter_that_the_model_has_itself_is_one_of_its_weights(
    make_checkpoint: MakeCheckpoint,
) -> None:
    saved, model = Counting(7), Counting(0)
    assert load(model, make_checkpoint("one", saved.state_dict())) == NameFit()
    assert int(model.n_averaged) == 7
    path = make_checkpoint("two", nn.Linear(3, 4).state_dict())
    assert refusal(model, path) == (
        "does not fit the model: 1 tensors of the model are missing: 'n_averaged'"
    )


def test_a_counter_alone_is_no_checkpoint_of_the_model(make_checkpoint: MakeCheckpoint) -> None:
    path = make_checkpoint("one", {"n_averaged": torch.tensor(3)})
    assert refusal(nn.Linear(3, 4), path) == (
        "does not fit the model: 2 tensors of the model are missing: 'weight', 'bias'"
    )


def test_recompute_bn_of_an_averaged_model_equals_update_bn_of_torch(tmp_path: Path) -> None:
    averaged = averaged_model(net())
    torch.save(averaged.state_dict(), tmp_path / "swa.pt")
    recompute_bn(
        tmp_path / "swa.pt",
        tmp_path / "out",
        BnPass(model=net, batches=data(), estimator="torch"),
        device="cpu",
    )
    update_bn(data(), averaged)
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = averaged.module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # torch keeps a running mean of the batches in float32
        tolerance = 1e-5 if "running" in name else 0.0
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


# ---- end to end ----------------------------------------------------------------------------------


def mean_state(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: float64_mean([state[name] for state in states]).float()
        for name in states[0]
        if not name.endswith("num_batches_tracked")
    }


def statistics_over_data(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance of what the BatchNorm layer of ``net`` gets, in float64."""
    inputs = torch.cat(data()).double()
    values = inputs @ state["0.weight"].double().T + state["0.bias"].double()
    return values.mean(0), values.var(0)


def assert_averaged(
    found: Mapping[str, Tensor], states: list[dict[str, Tensor]], prefix: str
) -> None:
    """Compare a published average of ``net`` with one made here; counters aside."""
    mean = mean_state(states)
    for name, value in mean.items():
        if "running" not in name:
            assert torch.equal(found[f"{prefix}{name}"], value), name
    for buffer, expected in zip(("mean", "var"), statistics_over_data(mean), strict=True):
        value = found[f"{prefix}1.running_{buffer}"]
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert found[f"{prefix}1.num_batches_tracked"].item() == len(data())


@pytest.mark.parametrize("layout", ["safetensors", "torch"])
@pytest.mark.parametrize(
    ("stored_prefix", "model_prefix"),
    [("model.", ""), ("model.backbone.", ""), ("model.backbone.", "backbone."), ("", "model.")],
)
def test_an_average_keeps_the_names_of_the_checkpoints_and_gets_the_right_statistics(
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    layout: str,
    stored_prefix: str,
    model_prefix: str,
) -> None:
    states = [net(seed).state_dict() for seed in range(3)]
    sources = [
        make_checkpoint(f"epoch{number}", prefixed(state, stored_prefix), layout)
        for number, state in enumerate(states)
    ]
    model = inside(net(9), model_prefix) if model_prefix else net(9)
    inner = model.get_submodule(model_prefix.removesuffix("."))
    average_checkpoints(
        sources,
        tmp_path / "out",
        batchnorm=BnPass(model=model, batches=data(), forward=lambda _, batch: inner(batch)),
        device="cpu",
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == prefixed(states[0], stored_prefix).keys()
    assert_averaged(found, states, stored_prefix)


def test_an_average_of_averaged_models_has_the_names_of_what_they_wrap(tmp_path: Path) -> None:
    states = []
    for number in range(1, 4):
        averaged = averaged_model(net(), number)
        torch.save(averaged.state_dict(), tmp_path / f"swa{number}.pt")
        states.append(averaged.module.state_dict())
    average_checkpoints(
        [tmp_path / "swa{1..3}.pt"],
        tmp_path / "out",
        batchnorm=BnPass(model=net, batches=data()),
        device="cpu",
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == states[0].keys()
    assert_averaged(found, states, "")


# ---- models that the user wrapped ----------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]  # it is one
    return wrapped


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    AveragedModel,
    nn.DataParallel,
    compiled,
    lambda model: AveragedModel(nn.DataParallel(model)),
    lambda model: nn.DataParallel(compiled(model)),
]
WRAPPER_IDS = [
    "AveragedModel", "DataParallel", "compile", "AveragedModel of DataParallel",
    "DataParallel of compile",
]  # fmt: skip


@pytest.mark.parametrize("is_factory", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS, ids=WRAPPER_IDS)
def test_the_model_inside_the_users_wrapper_is_taken(
    make_checkpoint: MakeCheckpoint, wrap: Callable[[nn.Module], nn.Module], is_factory: bool
) -> None:
    wrapped = wrap(net(1))
    checkpoint = open_checkpoint(make_checkpoint("one", net(2).state_dict()))
    model = LiveModel(
        BnPass(model=(lambda: wrapped) if is_factory else wrapped, batches=data()),
        checkpoint,
        "cpu",
        Processes(),
    ).module
    checkpoint.close()
    assert type(model) is nn.Sequential
    assert any(module is model for module in wrapped.modules())


@pytest.mark.parametrize("wrap", WRAPPERS, ids=WRAPPER_IDS)
def test_a_wrapped_model_gives_the_same_files(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    states = [net(seed).state_dict() for seed in range(3)]
    sources = [make_checkpoint(f"epoch{number}", state) for number, state in enumerate(states)]
    average_checkpoints(
        sources,
        tmp_path / "out",
        batchnorm=BnPass(model=wrap(net(9)), batches=data()),
        device="cpu",
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == states[0].keys()
    assert_averaged(found, states, "")
