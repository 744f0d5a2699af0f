"""Layers that store a weight by other parameters: it is the weights that are averaged."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

from ckptavg import (
    CheckpointError,
    IncompatibleCheckpointsError,
    MemoryBudgetError,
    Recipe,
    average_checkpoints,
    inspect_checkpoint,
    open_checkpoint,
    plan_average,
    recompute_bn,
)
from ckptavg.derive import derive
from ckptavg.derived.weight_norm import find_weight_norms
from ckptavg.results import BnPass
from ckptavg.tensors import FLOAT32, TensorInfo

Make = Callable[[], nn.Module]


def old_weight_norm(module: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but in many checkpoints
        found: nn.Module = nn.utils.weight_norm(module, dim=dim)  # type: ignore[arg-type]  # or None
    return found


def new_weight_norm(module: nn.Module, dim: int | None = 0) -> nn.Module:
    found: nn.Module = parametrizations.weight_norm(module, dim=dim)  # type: ignore[arg-type]
    return found


WEIGHT_NORMED: dict[str, Make] = {
    "linear": lambda: new_weight_norm(nn.Linear(7, 5)),
    "old linear": lambda: old_weight_norm(nn.Linear(7, 5)),
    "conv1d": lambda: old_weight_norm(nn.Conv1d(4, 6, 3)),
    "conv2d": lambda: new_weight_norm(nn.Conv2d(4, 6, 3)),
    "transposed": lambda: new_weight_norm(nn.ConvTranspose1d(4, 6, 3), dim=1),
    "old transposed": lambda: old_weight_norm(nn.ConvTranspose2d(4, 4, 3), dim=1),
    "whole": lambda: new_weight_norm(nn.Linear(7, 5), dim=None),
    "old whole": lambda: old_weight_norm(nn.Conv1d(4, 6, 3), dim=None),
    "last": lambda: new_weight_norm(nn.Conv1d(4, 6, 3), dim=2),
    "one row": lambda: new_weight_norm(nn.Linear(7, 1)),
}
SPECTRAL_NORMED: dict[str, Make] = {
    "linear": lambda: parametrizations.spectral_norm(nn.Linear(7, 5)),
    "square": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old linear": lambda: old_spectral_norm(nn.Linear(5, 7)),
    "conv2d": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
    "transposed": lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(4, 4, 3)),
    "old transposed": lambda: old_spectral_norm(nn.ConvTranspose1d(5, 5, 3)),
}


def trained(make: Make, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a layer with parameters of its own and vectors that training has brought along."""
    torch.manual_seed(seed)
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
            parameter.mul_(0.5 + seed)  # directions of very different lengths
    layer.train()
    for _ in range(3):
        effective(layer)
    return layer.to(dtype)


def effective(layer: nn.Module) -> Tensor:
    """Return the weight that a layer has now, as its forward takes it."""
    hooks = list(layer._forward_pre_hooks.values())
    for hook in hooks:
        hook(layer, ())
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().clone()


def weights64(layers: Sequence[nn.Module]) -> list[Tensor]:
    """Return the weights of layers in evaluation, computed in float64."""
    found = []
    for layer in layers:
        state = {name: value.double() for name, value in layer.state_dict().items()}
        layer.double().eval().load_state_dict(state)
        found.append(effective(layer))
    return found


def average(
    tmp_path: Path, layers: Sequence[nn.Module], layout: str = "safetensors", **options: object
) -> dict[str, Tensor]:
    paths = [
        save_checkpoint(tmp_path / f"{number}", one.state_dict(), layout)
        for number, one in enumerate(layers)
    ]
    average_checkpoints(paths, tmp_path / "out", **options)  # type: ignore[arg-type]  # tests
    return load_file(tmp_path / "out" / "model.safetensors")


def loaded(make: Make, state: dict[str, Tensor]) -> nn.Module:
    layer = make()
    layer.to(next(iter(state.values())).dtype)
    layer.load_state_dict(state, strict=True)
    return layer.eval()


def averaged_and_mean(
    tmp_path: Path, make: Make, coefficients: tuple[float, ...] | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the average of three layers, its weight, and the mean of their weights."""
    layers = [trained(make, seed) for seed in range(3)]
    state = average(tmp_path, layers, coefficients=coefficients)
    (found,) = weights64([loaded(make, state)])
    shares = coefficients or (1 / 3,) * 3
    expected = sum(c * w for c, w in zip(shares, weights64(layers), strict=True))
    assert isinstance(expected, Tensor)
    return state, found, expected


@pytest.mark.parametrize("case", WEIGHT_NORMED)
@pytest.mark.parametrize("coefficients", [None, (0.5, 1.25, -0.75)])
def test_a_weight_normed_layer_gets_the_mean_weight(
    tmp_path: Path, case: str, coefficients: tuple[float, ...] | None
) -> None:
    _, found, expected = averaged_and_mean(tmp_path, WEIGHT_NORMED[case], coefficients)
    torch.testing.assert_close(found, expected, rtol=2**-22, atol=1e-12)


def test_the_mean_of_the_parameters_is_another_weight() -> None:
    """What averaging g and v apart gives: the reason for all this."""
    layers = [trained(WEIGHT_NORMED["linear"], seed) for seed in range(3)]
    parts = [one.state_dict() for one in layers]
    mean = {name: torch.stack([one[name] for one in parts]).mean(0) for name in parts[0]}
    (apart,) = weights64([loaded(WEIGHT_NORMED["linear"], mean)])
    expected = torch.stack(weights64(layers)).mean(0)
    assert (apart - expected).norm() / expected.norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    make = WEIGHT_NORMED["conv1d"]
    layers = [trained(make, seed, dtype) for seed in range(3)]
    state = average(tmp_path, layers)
    assert {one.dtype for one in state.values()} == {dtype}
    mean = torch.stack(weights64(layers)).mean(0)
    rtol = 1e-14 if dtype is torch.float64 else 0  # the reference is float64 itself
    torch.testing.assert_close(state["weight_v"], mean.to(dtype), rtol=rtol, atol=rtol)
    norm = mean.flatten(1).norm(dim=1).reshape(-1, 1, 1)
    torch.testing.assert_close(
        state["weight_g"].double(), norm.to(dtype).double(), rtol=1e-14, atol=0
    )


def test_the_output_dtype_is_rounded_to(tmp_path: Path) -> None:
    layers = [trained(WEIGHT_NORMED["linear"], seed) for seed in range(2)]
    state = average(tmp_path, layers, dtype="bfloat16")
    mean = torch.stack(weights64(layers)).mean(0)
    assert torch.equal(state["parametrizations.weight.original1"], mean.bfloat16())


@pytest.mark.parametrize("cases", [WEIGHT_NORMED, SPECTRAL_NORMED])
def test_equal_layers_are_kept_to_the_bit(tmp_path: Path, cases: dict[str, Make]) -> None:
    layer = trained(cases["linear"], 1)
    state = average(tmp_path, [layer] * 3)
    for name, value in layer.state_dict().items():
        assert torch.equal(state[name], value), name


def test_several_schemes_get_a_weight_each(tmp_path: Path) -> None:
    make = WEIGHT_NORMED["conv2d"]
    layers = [trained(make, seed) for seed in range(4)]
    paths = [
        save_checkpoint(tmp_path / f"{number}", one.state_dict(), "torch")
        for number, one in enumerate(layers)
    ]
    result = average_checkpoints(
        paths, tmp_path / "out", schemes=["uniform", "uniform:last=2", "uniform:last=1"]
    )
    weights = weights64(layers)
    for output, n in zip(result.outputs, (4, 2, 1), strict=True):
        (found,) = weights64([loaded(make, load_file(output.path / "model.safetensors"))])
        expected = torch.stack(weights[-n:]).mean(0)
        torch.testing.assert_close(found, expected, rtol=2**-22, atol=1e-12)
    last = load_file(tmp_path / "out" / "uniform-last1" / "model.safetensors")
    original = torch.load(paths[-1], weights_only=True)["state_dict"]
    assert all(torch.equal(last[name], value) for name, value in original.items())


def test_many_channels_are_worked_on_in_parts(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return new_weight_norm(nn.Linear(1000, 300))

    layers = [trained(make, seed) for seed in range(2)]
    state = average(tmp_path, layers, memory_budget_bytes=16 * 2**20)
    mean = torch.stack(weights64(layers)).mean(0)
    assert torch.equal(state["parametrizations.weight.original1"], mean.float())


@pytest.mark.parametrize("case", SPECTRAL_NORMED)
@pytest.mark.parametrize("coefficients", [None, (0.5, 1.25, -0.75)])
def test_a_spectral_normed_layer_gets_the_mean_weight_at_norm_1(
    tmp_path: Path, case: str, coefficients: tuple[float, ...] | None
) -> None:
    state, found, expected = averaged_and_mean(tmp_path, SPECTRAL_NORMED[case], coefficients)
    dim = 1 if "transposed" in case else 0
    sigma = torch.linalg.matrix_norm(expected.movedim(dim, 0).flatten(1), 2)
    torch.testing.assert_close(found, expected / sigma, rtol=1e-6, atol=1e-8)
    original = state.get("weight_orig", state.get("parametrizations.weight.original"))
    assert original is not None
    torch.testing.assert_close(original.double(), expected, rtol=2**-23, atol=1e-12)


def test_training_goes_on_where_the_vectors_are(tmp_path: Path) -> None:
    """One more step of power iteration moves the output's vectors by no more than rounding."""
    make = SPECTRAL_NORMED["conv2d"]
    state = average(tmp_path, [trained(make, seed) for seed in range(3)])
    layer = loaded(make, state)
    before = effective(layer)
    layer.train()
    torch.testing.assert_close(effective(layer), before, rtol=1e-5, atol=1e-6)


def test_notes_and_provenance_tell_which_layers(tmp_path: Path) -> None:
    layers = [
        nn.Sequential(
            trained(WEIGHT_NORMED["old linear"], seed), trained(SPECTRAL_NORMED["linear"], seed)
        )
        for seed in range(2)
    ]
    average(tmp_path, layers)
    told = json.loads((tmp_path / "out" / "ckptavg.json").read_text())
    assert told["tensors"]["derived"] == {
        "weight_norm": ["0.weight"],
        "spectral_norm": ["1.parametrizations.weight"],
    }
    assert told["notes"] == [
        "1 weight-normed layers are averaged as weights, not as magnitudes and directions",
        "1 spectral-normed layers are averaged as weights; the layers scale that mean to spectral "
        "norm 1, as they always do",
    ]


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (("a.weight_g", "a.weight"), "a.weight_g"),
        (("a.weight_v",), "a.weight_v"),
        (("a.weight_orig", "a.weight_u"), "a.weight_u"),
        (("a.parametrizations.weight.original", "b"), "a.parametrizations.weight.original"),
        (("a.parametrizations.weight.original0",), "a.parametrizations.weight.original0"),
    ],
)
def test_a_part_alone_is_averaged_as_it_stands(
    tmp_path: Path, names: tuple[str, ...], example: str
) -> None:
    paths = [
        save_checkpoint(tmp_path / f"{n}", dict.fromkeys(names, torch.tensor([float(n)])), "torch")
        for n in (1, 3)
    ]
    result = average_checkpoints(paths, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(value.item() == 2 for value in state.values())
    assert any(note.endswith(f"is not known: '{example}'") for note in result.notes)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight_g": torch.ones(3, 2), "weight_v": torch.ones(2, 3)},
        {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 3, dtype=torch.complex64)},
        {"weight_g": torch.ones(()), "weight_v": torch.ones(())},
        {"weight_orig": torch.ones(2, 3), "weight_u": torch.ones(5), "weight_v": torch.ones(3)},
        {"weight_orig": torch.ones(2, 3), "weight_u": torch.ones(2), "weight_v": torch.ones(5)},
        {
            "weight_orig": torch.ones(2, 3, dtype=torch.complex64),
            "weight_u": torch.ones(2),
            "weight_v": torch.ones(3),
        },
    ],
)
def test_parts_that_do_not_fit_are_averaged_as_they_stand(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    paths = [save_checkpoint(tmp_path / f"{n}", tensors, "torch") for n in (1, 2)]
    plan = plan_average([open_checkpoint(path) for path in paths], Recipe())
    assert not plan.derived.groups
    assert any("are averaged as they stand" in note for note in plan.notes)


def test_a_weight_that_is_not_finite_has_no_spectral_norm(tmp_path: Path) -> None:
    layers = [trained(SPECTRAL_NORMED["old linear"], seed) for seed in range(2)]
    with torch.no_grad():
        dict(layers[1].named_parameters())["weight_orig"][0, 0] = torch.nan
    with pytest.raises(
        IncompatibleCheckpointsError,
        match="'weight_orig': the mean weight is not finite, so it has no spectral norm",
    ):
        average(tmp_path, layers, allow_nonfinite=True)


def test_a_direction_of_length_0_is_refused(tmp_path: Path) -> None:
    good = {"x.weight_g": torch.ones(2, 1), "x.weight_v": torch.ones(2, 3)}
    bad = {**good, "x.weight_v": torch.tensor([[1.0, 1, 1], [0, 0, 0]])}
    paths = [
        save_checkpoint(tmp_path / name, one, "torch") for name, one in (("a", good), ("b", bad))
    ]
    with pytest.raises(
        IncompatibleCheckpointsError,
        match=r"b\.pt: 'x\.weight_v' has a direction of length 0, so the weight-normed layer",
    ):
        average_checkpoints(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_cancel_give_the_weight_0(tmp_path: Path) -> None:
    v = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    states = [{"weight_g": torch.tensor([[sign], [1.0]]), "weight_v": v} for sign in (1.0, -1.0)]
    paths = [save_checkpoint(tmp_path / f"{n}", one, "torch") for n, one in enumerate(states)]
    average_checkpoints(paths, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state["weight_g"], torch.tensor([[0.0], [1.0]]))
    assert torch.equal(state["weight_v"], v)


def test_a_spectral_norm_of_0_is_refused(tmp_path: Path) -> None:
    make = SPECTRAL_NORMED["old linear"]
    layers = [trained(make, seed) for seed in range(2)]
    states = [dict(one.state_dict()) for one in layers]
    states[0]["weight_orig"] = torch.zeros_like(states[0]["weight_orig"])
    paths = [save_checkpoint(tmp_path / f"{n}", one, "torch") for n, one in enumerate(states)]
    with pytest.raises(
        IncompatibleCheckpointsError, match=r"0\.pt: 'weight_orig' has the spectral norm 0"
    ):
        average_checkpoints(paths, tmp_path / "out")


def test_spectral_normed_weights_that_cancel_are_refused(tmp_path: Path) -> None:
    state = dict(trained(SPECTRAL_NORMED["old linear"], 1).state_dict())
    # the other sign of u and W is the same weight; that of W alone the opposite of sigma, too
    opposite = {**state, "weight_u": -state["weight_u"]}
    paths = [
        save_checkpoint(tmp_path / f"{n}", one, "torch") for n, one in enumerate((state, opposite))
    ]
    with pytest.raises(IncompatibleCheckpointsError, match="'weight_orig': the mean weight is 0"):
        average_checkpoints(paths, tmp_path / "out")


@pytest.mark.parametrize("cases", [WEIGHT_NORMED, SPECTRAL_NORMED])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, cases: dict[str, Make]) -> None:
    layers = [trained(cases["linear"], seed) for seed in range(3)]
    with torch.no_grad():
        next(one for one in layers[1].parameters() if one.ndim == 2)[0, 0] = torch.nan
    with pytest.raises(
        IncompatibleCheckpointsError,
        match=r"1\.safetensors: tensor 'parametrizations\.weight\.original0?' in checkpoint 2 of 3 "
        r"has 1 non-finite values",
    ):
        average(tmp_path, layers)


def test_nan_is_kept_where_it_is_allowed(tmp_path: Path) -> None:
    layers = [trained(WEIGHT_NORMED["linear"], seed) for seed in range(2)]
    with torch.no_grad():
        dict(layers[1].named_parameters())["parametrizations.weight.original1"][2, 0] = torch.nan
    state = average(tmp_path, layers, allow_nonfinite=True)
    found = state["parametrizations.weight.original1"]
    assert torch.isnan(found).any(dim=1).tolist() == [False, False, True, False, False]


def test_values_that_overflow_are_refused(tmp_path: Path) -> None:
    states = [
        {"weight_g": torch.full((1, 1), 3e38), "weight_v": torch.full((1, 1), value)}
        for value in (1.0, -1.0)
    ]
    paths = [save_checkpoint(tmp_path / f"{n}", one, "torch") for n, one in enumerate(states)]
    with pytest.raises(
        IncompatibleCheckpointsError, match="'weight_g': averaged values overflow float32"
    ):
        average_checkpoints(paths, tmp_path / "out", coefficients=(2, -1))


def test_what_does_not_fit_the_memory_is_refused(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return new_weight_norm(nn.Linear(600, 600), dim=None)

    with pytest.raises(
        MemoryBudgetError,
        match=r"a memory budget of 16777216 bytes is too small: averaging "
        r"'parametrizations\.weight' \(weight_norm\) needs \d+ bytes",
    ):
        average(tmp_path, [trained(make, 0), trained(make, 1)], memory_budget_bytes=16 * 2**20)


def test_the_fingerprint_does_not_depend_on_how_paths_are_typed(tmp_path: Path) -> None:
    found: set[str] = set()
    for case in (WEIGHT_NORMED, SPECTRAL_NORMED):
        states = [trained(case["linear"], seed).state_dict() for seed in range(2)]
        paths = [
            save_checkpoint(tmp_path / f"{len(found)}{n}", one, "torch")
            for n, one in enumerate(states)
        ]
        prints = {
            plan_average(
                [open_checkpoint(path, label=f"{kind}{path.name}") for path in paths], Recipe()
            ).fingerprint
            for kind in ("", "./")
        }
        assert len(prints) == 1
        found |= prints


def test_what_is_read_is_what_was_said(tmp_path: Path) -> None:
    layers = [
        nn.Sequential(*(trained(make, seed) for make in SPECTRAL_NORMED.values()))
        for seed in range(3)
    ]
    paths = [
        save_checkpoint(tmp_path / f"{n}", one.state_dict(), "torch")
        for n, one in enumerate(layers)
    ]
    done = 0

    def progress(stage: str, n: int, total: int | None) -> None:
        nonlocal done
        done += n
        assert total == planned

    planned = plan_average([open_checkpoint(path) for path in paths], Recipe()).read_nbytes
    result = average_checkpoints(paths, tmp_path / "out", progress=progress)
    assert done == planned == result.read_nbytes


def test_one_model_is_left_as_it_is(tmp_path: Path) -> None:
    """A BatchNorm pass on one model changes nothing but statistics."""

    def make() -> nn.Module:
        return nn.Sequential(WEIGHT_NORMED["linear"](), nn.BatchNorm1d(5))

    model = nn.Sequential(trained(WEIGHT_NORMED["linear"], 1), nn.BatchNorm1d(5))
    path = save_checkpoint(tmp_path / "one", model.state_dict(), "safetensors")
    recompute_bn(path, tmp_path / "out", BnPass(model=make, batches=[torch.randn(64, 7)]))
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in model.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(state[name], value), name


def test_the_batchnorm_pass_sees_the_mean_weight(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(WEIGHT_NORMED["linear"](), nn.BatchNorm1d(5))

    models = [
        nn.Sequential(trained(WEIGHT_NORMED["linear"], seed), nn.BatchNorm1d(5))
        for seed in range(2)
    ]
    paths = [
        save_checkpoint(tmp_path / f"{n}", one.state_dict(), "safetensors")
        for n, one in enumerate(models)
    ]
    data = torch.randn(256, 7)
    average_checkpoints(paths, tmp_path / "out", batchnorm=BnPass(model=make, batches=[data]))
    state = load_file(tmp_path / "out" / "model.safetensors")
    weight = torch.stack(weights64([one[0] for one in models])).mean(0)
    bias = torch.stack([one[0].bias.detach() for one in models]).mean(0)  # type: ignore[operator]  # a Linear
    outputs = data.double() @ weight.T + bias
    torch.testing.assert_close(
        state["1.running_mean"].double(), outputs.mean(0), rtol=1e-5, atol=1e-6
    )


def test_tied_layers_get_the_same_weight(tmp_path: Path) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        one = trained(WEIGHT_NORMED["old linear"], seed).state_dict()
        return {f"{layer}.{name}": value for layer in "ab" for name, value in one.items()}

    paths = [save_checkpoint(tmp_path / f"{n}", state(n), "torch") for n in range(2)]
    assert inspect_checkpoint(paths[0]).aliases
    average_checkpoints(paths, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["a.weight_v"], found["b.weight_v"])
    assert torch.equal(found["a.weight_g"], found["b.weight_g"])
    assert found["a.weight_v"].any()


def test_a_layer_that_one_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    layer = trained(WEIGHT_NORMED["linear"], 1)
    merged = {"weight": effective(layer), "bias": torch.ones(5)}
    paths = [
        save_checkpoint(tmp_path / "a", merged, "torch"),
        save_checkpoint(tmp_path / "b", layer.state_dict(), "torch"),
    ]
    with pytest.raises(IncompatibleCheckpointsError, match="'parametrizations.weight.original0'"):
        average_checkpoints(paths, tmp_path / "out")


def test_a_file_that_changes_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        save_checkpoint(
            tmp_path / f"{n}", trained(WEIGHT_NORMED["linear"], n).state_dict(), "torch"
        )
        for n in range(2)
    ]

    def derive_and_touch(*arguments: object) -> object:
        found = derive(*arguments)  # type: ignore[arg-type]  # passed on
        paths[0].write_bytes(paths[0].read_bytes() + b"\0")
        return found

    monkeypatch.setattr("ckptavg.steps.derive", derive_and_touch)
    with pytest.raises(CheckpointError, match="changed"):
        average_checkpoints(paths, tmp_path / "out")


def test_two_tensors_of_one_shape_are_no_weight_norm() -> None:
    info = TensorInfo(FLOAT32, (4, 3))
    prefix = "layer.parametrizations.weight"
    tensors = {f"{prefix}.original0": info, f"{prefix}.original1": info}
    assert list(find_weight_norms(tensors, ["a"])) == []
