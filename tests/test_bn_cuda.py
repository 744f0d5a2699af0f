"""The BatchNorm pass on a GPU, and with the libraries whose layers it should know."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from test_batchnorm import snapshot
from torch import Tensor, nn

from ckptavg import BatchNormError, recompute_bn_stats
from ckptavg.batchnorm import BnOptions
from ckptavg.model_zoo import model_from

Test = TypeVar("Test", bound=Callable[..., None])


def needs_gpu(test: Test) -> Test:
    """Mark a test that runs where there is a CUDA device."""
    skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    marked: Test = pytest.mark.gpu(skipped(test))
    return marked


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)
    )


def images(count: int = 7, size: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [16] * (count - 1) + [5]
    return [torch.randn(n, 3, size, size, generator=generator) + n / 8 for n in sizes]


def statistics(model: nn.Module) -> list[list[float]]:
    return [buffer.flatten().tolist() for buffer in model.buffers()]


def assert_near(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for (name, found), expected in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(found.cpu(), expected.cpu(), rtol=tolerance, atol=tolerance), name


@needs_gpu
def test_statistics_on_a_gpu_are_those_of_float64_on_all_activations() -> None:
    model = network().cuda()
    recompute_bn_stats(model, images())
    with torch.no_grad():
        activations = torch.cat([model[0](batch.cuda()) for batch in images()]).double()
    variance, mean = torch.var_mean(activations, (0, 2, 3))
    layer = model[1]
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert float(((layer.running_mean - mean).abs() / variance.sqrt()).max()) < 1e-6
    assert float((layer.running_var / variance - 1).abs().max()) < 2e-6


@needs_gpu
@pytest.mark.parametrize("where", ["pinned", "made on the gpu", "objects", "nested"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_it_does_not_matter_where_batches_come_from(where: str, channels_last: bool) -> None:
    class Sample:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def to(self, device: torch.device) -> "Sample":
            return Sample(self.x.to(device, non_blocking=True))

    def loader() -> Iterator[Any]:
        for batch in images(40, 64):
            if where == "pinned":
                yield batch.pin_memory()
            elif where == "made on the gpu":  # by work that is only queued
                on_gpu = batch.cuda(non_blocking=True)
                for _ in range(200):
                    on_gpu = on_gpu + 1e-3
                yield on_gpu - 0.2
            elif where == "objects":
                yield Sample(batch.pin_memory())
            else:
                yield {"x": (batch.pin_memory(), ["names"])}

    def forward(model: nn.Module, batch: Any) -> object:
        if isinstance(batch, Sample):
            batch = batch.x
        x = batch["x"][0] if isinstance(batch, dict) else batch
        assert x.is_cuda
        return model(x)

    model, expected = network().cuda(), network().cuda()
    recompute_bn_stats(model, loader(), forward=forward, channels_last=channels_last)
    recompute_bn_stats(expected, [batch.cuda() for batch in images(40, 64)])
    assert_near(model, expected, 1e-4)


@needs_gpu
@pytest.mark.filterwarnings("ignore")  # of what torch itself imports to compile
def test_compiled_and_eager_passes_agree() -> None:
    model, expected = network().cuda(), network().cuda()
    report = recompute_bn_stats(model, images(), compile=True)
    recompute_bn_stats(expected, images())
    assert report.notes == ()
    assert_near(model, expected, 1e-5)


@needs_gpu
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast_moves_statistics_by_little(amp: Any) -> None:
    model, expected = network().cuda(), network().cuda()
    recompute_bn_stats(model, images(), amp=amp, channels_last=True)
    recompute_bn_stats(expected, images())
    assert statistics(model) != statistics(expected)
    assert_near(model, expected, 0.02)


@needs_gpu
def test_a_gpu_that_is_full_is_told_and_the_model_is_as_before() -> None:
    model = network().cuda()
    torch.cuda.empty_cache()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(BatchNormError, match=r"^cuda:0: out of memory in batch \d; use smaller"):
        recompute_bn_stats(model, [torch.ones(1, 3, 1, 1).expand(2**16, 3, 512, 512)] * 2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    recompute_bn_stats(model, images())


@needs_gpu
def test_statistics_take_next_to_no_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)) for _ in range(9)))
    model.cuda().train()
    data = [torch.randn(2**16, 64, device="cuda") for _ in range(3)]

    def peak(run: Any) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    with torch.no_grad():
        forward = peak(lambda: model(data[0]))
    assert peak(lambda: recompute_bn_stats(model, data)) <= 1.01 * forward


# ---- layers of libraries, where they are installed -----------------------------------------------


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_layers_of_image_libraries_are_recomputed(name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    model = model_from(name, num_classes=3).build(None).eval()
    batches = [batch[:, :, :, :] for batch in images(3, 64)]
    report = recompute_bn_stats(model, batches)
    assert len(report.layers) == 20
    assert report.skipped == {}
    with torch.no_grad():
        first = torch.cat([model.get_submodule("conv1")(batch) for batch in batches]).double()
    variance, mean = torch.var_mean(first, (0, 2, 3))
    layer = model.get_submodule("bn1")
    found = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    assert float(((found[0] - mean).abs() / variance.sqrt()).max()) < 1e-5
    assert float((found[1] / variance - 1).abs().max()) < 1e-5


def test_frozen_layers_of_torchvision_are_left_alone() -> None:
    torchvision = pytest.importorskip("torchvision")
    frozen = torchvision.ops.misc.FrozenBatchNorm2d(3)
    model = nn.Sequential(frozen, nn.BatchNorm2d(3))
    before = snapshot(frozen)
    report = recompute_bn_stats(model, images())
    assert report.skipped == {"0": "is frozen: a FrozenBatchNorm2d"}
    assert {key: value for key, value in snapshot(frozen).items() if key != "rng"} == {
        key: value for key, value in before.items() if key != "rng"
    }


def test_transformers_models_run_on_their_own_batches() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    model = transformers.AutoModelForImageClassification.from_config(config)
    batches = [transformers.BatchEncoding({"pixel_values": batch}) for batch in images(3, 32)]
    report = recompute_bn_stats(model, batches)
    assert report.layers
    assert report.n_samples == 37


def test_options_have_the_defaults_that_are_documented() -> None:
    assert BnOptions().chosen() == {}
