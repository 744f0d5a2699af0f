"""The BatchNorm pass inside the pipeline: what is published, what is not, and what users read."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FORMATS, MakeCheckpoint, float64_mean, tree
from safetensors import safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ckptavg import (
    BatchNormError,
    BnPass,
    CkptavgError,
    ModelError,
    OutputError,
    average_checkpoints,
    recompute_bn,
    recompute_bn_stats,
)

N_CHECKPOINTS = 4
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep ``--device auto`` on the CPU: published bits are compared with a pass made there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 40)
        self.bn = nn.BatchNorm1d(40)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(40, 6)
        self.late = nn.BatchNorm1d(6, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.bn(self.first(x))))
        out: Tensor = self.late(self.second(hidden))
        return out


class Plain(nn.Module):
    """A model without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def trained(kind: Callable[[], nn.Module], count: int = N_CHECKPOINTS) -> list[nn.Module]:
    """Return models as checkpoints of one run: a common start, noise, statistics of their own."""
    torch.manual_seed(0)
    start = kind().state_dict()
    models = []
    for seed in range(count):
        torch.manual_seed(seed + 1)
        model = kind()
        model.load_state_dict(start)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            model.train()
            for _ in range(seed + 5):
                model(torch.randn(16, 3) * 2 + seed)
        models.append(model)
    return models


def batches() -> list[Tensor]:
    """Return batches of unequal size and unequal mean."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, 3, generator=generator) + size / 10 for size in (30, 12, 50, 4)]


def saved(
    make_checkpoint: MakeCheckpoint, models: list[nn.Module], layout: str = "safetensors"
) -> list[Path]:
    return [
        make_checkpoint(f"step{10 * number}", model.state_dict(), layout)
        for number, model in enumerate(models, 1)
    ]


def published(directory: Path) -> dict[str, Tensor]:
    return {
        name: value
        for file in sorted(directory.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def expected_after_pass(models: list[nn.Module]) -> nn.Module:
    """Return the reference: weights averaged in float64, then the pass on the model itself."""
    states = [model.state_dict() for model in models]
    mean = {
        name: float64_mean([state[name] for state in states]).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in states[-1].items()
    }
    model = Net()
    model.load_state_dict(mean)
    recompute_bn_stats(model, batches())
    return model


def assert_nothing_published(directory: Path, before: dict[str, bytes]) -> None:
    assert tree(directory) == before
    assert not [path for path in directory.iterdir() if "partial" in path.name]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# ---- what is published ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FORMATS)
def test_published_buffers_are_those_of_a_pass_over_the_float64_mean(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, layout: str
) -> None:
    models = trained(Net)
    result = average_checkpoints(
        saved(make_checkpoint, models, layout),
        tmp_path / "out",
        batchnorm=BnPass(model=Net, batches=batches),
    )
    assert_same(published(tmp_path / "out"), expected_after_pass(models).state_dict())
    assert result.outputs[0].batchnorm is not None
    assert [layer.name for layer in result.outputs[0].batchnorm.layers] == ["bn", "late"]
    assert (result.outputs[0].batchnorm.n_batches, result.outputs[0].batchnorm.n_samples) == (4, 96)
    assert result.notes == ()


def test_the_pass_changes_nothing_but_the_statistics(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    sources = saved(make_checkpoint, trained(Net))
    average_checkpoints(sources, tmp_path / "without")
    average_checkpoints(sources, tmp_path / "with", batchnorm=BnPass(model=Net, batches=batches()))
    without, with_pass = published(tmp_path / "without"), published(tmp_path / "with")
    assert without.keys() == with_pass.keys()
    for name, value in without.items():
        assert torch.equal(value, with_pass[name]) == (not name.endswith(STATISTICS)), name


@pytest.mark.parametrize("max_shard_bytes", [1, 200, 700])
def test_sharded_output_holds_the_same_tensors(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, max_shard_bytes: int
) -> None:
    models = trained(Net)
    average_checkpoints(
        saved(make_checkpoint, models),
        tmp_path / "out",
        batchnorm=BnPass(model=Net, batches=batches),
        max_shard_bytes=max_shard_bytes,
    )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert_same(published(tmp_path / "out"), expected_after_pass(models).state_dict())


def test_a_model_instance_a_forward_and_limits_are_used(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    models = trained(Net)
    model = Net().eval()
    result = average_checkpoints(
        saved(make_checkpoint, models),
        tmp_path / "out",
        batchnorm=BnPass(
            model=model,
            batches=[{"image": part} for part in batches()],
            forward=lambda model, batch: model(batch["image"]),
            max_batches=3,
            max_samples=31,
        ),
    )
    assert result.outputs[0].batchnorm is not None
    assert (result.outputs[0].batchnorm.n_batches, result.outputs[0].batchnorm.n_samples) == (2, 42)
    assert_same(published(tmp_path / "out"), model.state_dict())
    assert not model.training


def test_the_output_dtype_holds_for_the_statistics_too(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    average_checkpoints(
        saved(make_checkpoint, trained(Net)),
        tmp_path / "out",
        dtype="bfloat16",
        batchnorm=BnPass(model=Net, batches=batches),
    )
    found = published(tmp_path / "out")
    assert {value.dtype for name, value in found.items() if not name.endswith("tracked")} == {
        torch.bfloat16
    }
    # the pass ran in float32 on the rounded weights that were published
    model = Net()
    model.load_state_dict(found)
    recompute_bn_stats(model, batches())
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def test_statistics_stored_wider_than_the_model_runs_are_widened(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    models = [model.double() for model in trained(Net)]
    average_checkpoints(
        saved(make_checkpoint, models),
        tmp_path / "out",
        batchnorm=BnPass(model=Net, batches=batches),
    )
    found = published(tmp_path / "out")
    assert found["bn.running_mean"].dtype == torch.float64
    assert torch.equal(found["bn.running_mean"], found["bn.running_mean"].float().double())


def test_a_layer_under_two_names_is_published_alike_under_both(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.bn

    models = trained(Shared)
    # copies: as written by a trainer that does not know of the tie
    states = [
        {name: value.clone() for name, value in model.state_dict().items()} for model in models
    ]
    sources = [make_checkpoint(f"step{number}", state) for number, state in enumerate(states)]
    average_checkpoints(sources, tmp_path / "out", batchnorm=BnPass(model=Shared, batches=batches))
    found = published(tmp_path / "out")
    for statistic in STATISTICS:
        assert torch.equal(found[f"bn.{statistic}"], found[f"again.{statistic}"])
    assert torch.equal(
        found["bn.running_mean"], expected_after_pass(trained(Net)).state_dict()["bn.running_mean"]
    )


def test_tied_weights_that_the_file_stores_once_fit_a_model_that_ties_them(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 40)
            self.head.weight = self.first.weight

    for number, model in enumerate(trained(Tied)):
        save_model(model, str(tmp_path / f"step{number}.safetensors"))
    result = average_checkpoints(
        [tmp_path / "step{0..3}.safetensors"],
        tmp_path / "out",
        batchnorm=BnPass(model=Tied, batches=batches),
    )
    assert result.outputs[0].batchnorm is not None
    assert len(result.outputs[0].batchnorm.layers) == 2


def test_progress_tells_the_samples_of_the_pass(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    told: list[tuple[str, int, int | None]] = []
    average_checkpoints(
        saved(make_checkpoint, trained(Net)),
        tmp_path / "out",
        batchnorm=BnPass(model=Net, batches=batches, max_samples=90),
        progress=lambda stage, done, total: told.append((stage, done, total)),
    )
    assert [one for one in told if one[0] == "batchnorm"] == [
        ("batchnorm", size, 90) for size in (30, 12, 50)
    ]


def test_provenance_records_the_pass(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    result = average_checkpoints(
        saved(make_checkpoint, trained(Net)),
        tmp_path / "out",
        batchnorm=BnPass(model=Net, batches=batches),
    )
    assert result.outputs[0].batchnorm is not None
    recorded = json.loads((tmp_path / "out" / "ckptavg.json").read_text())["batchnorm"]
    assert recorded["n_samples"] == 96
    assert [layer["name"] for layer in recorded["layers"]] == ["bn", "late"]
    assert recorded["layers"][0]["mean_shift"] == result.outputs[0].batchnorm.layers[0].mean_shift


def test_a_model_without_batchnorm_is_published_with_a_note(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    models = trained(Plain)
    result = average_checkpoints(
        saved(make_checkpoint, models),
        tmp_path / "out",
        batchnorm=BnPass(model=Plain, batches=batches),
    )
    assert result.notes == ("the model has no BatchNorm layers: no BN pass was needed",)
    states = [model.state_dict() for model in models]
    assert_same(
        published(tmp_path / "out"),
        {name: float64_mean([state[name] for state in states]).float() for name in states[0]},
    )


def test_layers_left_alone_are_named_in_a_note(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    def frozen() -> nn.Module:
        model = Net()
        model.late.eval()
        return model

    result = average_checkpoints(
        saved(make_checkpoint, trained(Net)),
        tmp_path / "out",
        batchnorm=BnPass(model=frozen, batches=batches),
    )
    assert result.notes == (
        "BatchNorm layer 'late' is frozen: in evaluation mode inside a model in training mode",
    )


# ---- recompute-bn --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [300, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_recompute_bn_keeps_every_other_bit(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in trained(Net)[-1].state_dict().items()
    }
    state["second.bias"][:4] = torch.tensor([-0.0, 1e-45, 3e-6, 6e4])  # zeros and subnormals too
    result = recompute_bn(
        make_checkpoint("last", state),
        tmp_path / "out",
        BnPass(model=Net, batches=batches),
        max_shard_bytes=max_shard_bytes,
    )
    found = published(tmp_path / "out")
    assert found.keys() == state.keys()
    for name, value in state.items():
        same = torch.equal(raw(found[name]), raw(value))
        assert same == (not name.endswith(STATISTICS)), name
    assert result.n_checkpoints == 1
    model = Net()
    model.load_state_dict(state)
    recompute_bn_stats(model, batches())
    for name in ("bn.running_mean", "bn.running_var", "late.running_mean", "late.running_var"):
        assert torch.equal(found[name], model.state_dict()[name].to(dtype))


def raw(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)


def test_recompute_bn_replaces_statistics_that_are_not_finite(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    state = trained(Net)[-1].state_dict()
    state["bn.running_mean"].fill_(float("nan"))
    state["late.running_var"].fill_(float("inf"))
    source = make_checkpoint("last", state)
    recompute_bn(source, tmp_path / "out", BnPass(model=Net, batches=batches))
    assert all(bool(value.isfinite().all()) for value in published(tmp_path / "out").values())


def test_recompute_bn_of_a_published_average_equals_averaging_with_the_pass(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    sources = saved(make_checkpoint, trained(Net))
    bn_pass = BnPass(model=Net, batches=batches)
    average_checkpoints(sources, tmp_path / "at-once", batchnorm=bn_pass)
    average_checkpoints(sources, tmp_path / "plain")
    recompute_bn(tmp_path / "plain", tmp_path / "after", bn_pass)
    assert_same(published(tmp_path / "after"), published(tmp_path / "at-once"))


# ---- failures ------------------------------------------------------------------------------------


class DiskError(OSError):
    """Raised by the user's own loader."""


def failing_loader() -> Iterator[Tensor]:
    yield from batches()[:2]
    raise DiskError("cannot read\nimage 7")


def failing_factory() -> nn.Module:
    raise ValueError("no such width")


def failing_data() -> Any:
    raise DiskError("no data set")


def failing_forward(model: nn.Module, batch: Tensor) -> object:
    return model(batch[:, :2])


def interrupted() -> Iterator[Tensor]:
    yield batches()[0]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("batchnorm", "message", "cause"),
    [
        (BnPass(model=failing_factory, batches=batches),
         "building the model failed: ValueError: no such width", ValueError),
        (BnPass(model=Net, batches=failing_data),
         "the BatchNorm pass failed: DiskError: no data set", DiskError),
        (BnPass(model=Net, batches=failing_loader),
         "the BatchNorm pass failed: DiskError: cannot read\\nimage 7", DiskError),
        (BnPass(model=Net, batches=batches, forward=failing_forward),
         "the BatchNorm pass failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied "
         "(30x2 and 3x40)", RuntimeError),
    ],
)  # fmt: skip
def test_what_user_code_raises_is_a_one_line_model_error_with_its_cause(
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    batchnorm: BnPass,
    message: str,
    cause: type[Exception],
) -> None:
    sources = saved(make_checkpoint, trained(Net))
    before = tree(tmp_path)
    with pytest.raises(ModelError) as caught:
        average_checkpoints(sources, tmp_path / "out", batchnorm=batchnorm)
    assert str(caught.value) == message
    assert type(caught.value.__cause__) is cause
    assert_nothing_published(tmp_path, before)


@pytest.mark.parametrize(
    ("batchnorm", "error", "message"),
    [
        (BnPass(model=Net, batches=[]), BatchNormError,
         "no batches: BatchNorm statistics need data"),
        (BnPass(model=Net, batches=[torch.ones(1, 3)]), BatchNormError,
         "layer 'bn' got a batch with 1 value per channel, which has no variance; use larger "
         "batches, or drop the last small one"),
        (BnPass(model=Net, batches=[torch.full((4, 3), float("nan"))]), BatchNormError,
         "layer 'bn': 40 of 40 channels have non-finite statistics; the data or the weights hold "
         "infinity or NaN"),
        (BnPass(model=lambda: "net", batches=batches), ModelError,  # type: ignore[arg-type,return-value]  # as a user may
         "the model is a str, expected a torch.nn.Module"),
        (BnPass(model=Net, batches=3), ModelError,  # type: ignore[arg-type]  # as a user may
         "the data is a int, expected an iterable of batches"),
        (BnPass(model=Net, batches=lambda: None), ModelError,  # type: ignore[arg-type,return-value]  # as a user may
         "the data is a NoneType, expected an iterable of batches"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pass_that_fails_publishes_nothing(
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    batchnorm: BnPass,
    error: type[CkptavgError],
    message: str,
    overwrite: bool,
) -> None:
    sources = saved(make_checkpoint, trained(Net))
    if overwrite:
        average_checkpoints(sources[:2], tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(error) as caught:
        average_checkpoints(sources, tmp_path / "out", batchnorm=batchnorm, overwrite=overwrite)
    assert str(caught.value) == message
    assert_nothing_published(tmp_path, before)


def test_an_interrupted_pass_publishes_nothing(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    sources = saved(make_checkpoint, trained(Net))
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        average_checkpoints(
            sources, tmp_path / "out", batchnorm=BnPass(model=Net, batches=interrupted)
        )
    (kept,) = tmp_path.glob("out.partial-*")  # the average, to continue with
    assert caught.value.__notes__ == [
        f"100 % of the average is kept in {kept.name}; the same command continues it"
    ]
    shutil.rmtree(kept)
    assert_nothing_published(tmp_path, before)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_read(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    sources = saved(make_checkpoint, trained(Net))
    before = tree(tmp_path)
    told: list[str] = []
    with pytest.raises(ModelError) as caught:
        average_checkpoints(
            sources,
            tmp_path / "out",
            batchnorm=BnPass(model=Plain, batches=batches),
            progress=lambda stage, done, total: told.append(stage),
        )
    assert str(caught.value) == (
        f"{sources[-1]}: does not fit the model: 2 tensors of the model are missing: "
        "'linear.weight', 'linear.bias'; 14 tensors are not in the model: "
        "'bn.num_batches_tracked', 'late.num_batches_tracked', 'bn.bias', ..."
    )
    assert told == []
    assert_nothing_published(tmp_path, before)


def test_statistics_that_the_output_dtype_cannot_hold_are_refused(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    sources = saved(make_checkpoint, trained(Net))
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        average_checkpoints(
            sources,
            tmp_path / "out",
            dtype="float16",
            batchnorm=BnPass(model=Net, batches=[part * 1000 for part in batches()]),
        )
    assert str(caught.value) == (
        "'bn.running_var' has values too large for float16, in which it is stored"
    )
    assert_nothing_published(tmp_path, before)


# ---- the peer: torch.optim.swa_utils.AveragedModel -----------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 10])
def test_averaged_model_of_torch_gives_the_same_weights_within_one_ulp(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, count: int
) -> None:
    models = trained(Net, count)
    averaged = AveragedModel(models[0])
    for model in models:
        averaged.update_parameters(model)
    average_checkpoints(saved(make_checkpoint, models), tmp_path / "out")
    found = published(tmp_path / "out")
    for name, parameter in averaged.module.named_parameters():
        theirs, ours = parameter.detach(), found[name]
        # the running mean of torch rounds at every step: an ulp of the largest value seen
        largest = torch.stack([model.state_dict()[name].abs() for model in models]).amax(0)
        ulp = torch.nextafter(largest, torch.tensor(float("inf"))) - largest
        assert bool(((ours - theirs).abs() <= ulp).all()), name


def test_averaged_model_of_torch_keeps_the_statistics_of_the_last_model_and_we_recompute_them(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    models = trained(Net)
    averaged = AveragedModel(models[0])
    for model in models:
        averaged.update_parameters(model)
    average_checkpoints(
        saved(make_checkpoint, models),
        tmp_path / "out",
        batchnorm=BnPass(model=Net, batches=batches),
    )
    theirs = averaged.module.state_dict()
    last, expected = models[-1].state_dict(), expected_after_pass(models).state_dict()
    ours = published(tmp_path / "out")
    for name in ("bn.running_mean", "bn.running_var"):
        assert torch.equal(theirs[name], last[name])
        assert torch.equal(ours[name], expected[name])
        assert not torch.allclose(theirs[name], expected[name], rtol=0.01)


def test_headers_of_the_published_files_are_untouched_by_the_pass(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    sources = saved(make_checkpoint, trained(Net))
    average_checkpoints(sources, tmp_path / "without")
    average_checkpoints(sources, tmp_path / "with", batchnorm=BnPass(model=Net, batches=batches))
    found = []
    for name in ("without", "with"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            found.append((file.metadata(), sorted(file.keys())))
    assert found[0] == found[1]
