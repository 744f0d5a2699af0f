"""Models by name: what is asked of timm, torchvision and transformers, and what never is."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, tree
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ckptavg import BnPass, ModelError, average_checkpoints, model_from, open_checkpoint
from ckptavg.cli import run
from ckptavg.cli.user_code import load_bn_pass
from ckptavg.live_model import LiveModel
from ckptavg.model_zoo import LIBRARIES, ModelFromConfig
from ckptavg.processes import Processes

Call = tuple[str, dict[str, Any]]

DATA = "import torch\nbatches = [torch.arange(60.0).reshape(20, 3), torch.ones(5, 3)]\n"


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))


def batches() -> list[Tensor]:
    return [torch.arange(60.0).reshape(20, 3), torch.ones(5, 3)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory with weights of ``net`` and a config."""
    return model_directory(tmp_path / "checkpoint-1")


def model_directory(path: Path, seed: int = 1) -> Path:
    path.mkdir()
    torch.manual_seed(seed)
    save_file(net().state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", "seed": seed}))
    return path


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    """Put a library into ``sys.modules`` that has nothing but the given attributes."""
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


def uninstall(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let importing a library fail, whether it is there or not."""
    monkeypatch.setitem(sys.modules, name, None)  # importlib then raises ImportError


def built(model: ModelFromConfig, path: Path) -> nn.Module:
    """Return what the pipeline makes of a model by name for a checkpoint."""
    checkpoint = open_checkpoint(path)
    try:
        return LiveModel(
            BnPass(model=model, batches=batches), checkpoint, "cpu", Processes()
        ).module
    finally:
        checkpoint.close()


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "library", "name"),
    [
        ("timm:resnet50", "timm", "resnet50"),
        ("timm:resnet50.a1_in1k", "timm", "resnet50.a1_in1k"),
        ("torchvision:resnet18", "torchvision", "resnet18"),
        ("transformers:AutoModelForImageClassification", "transformers",
         "AutoModelForImageClassification"),
    ],
)  # fmt: skip
def test_a_model_is_named_as_on_the_command_line(text: str, library: str, name: str) -> None:
    assert model_from(text) == ModelFromConfig(library, name, {})
    assert model_from(text, num_classes=10) == ModelFromConfig(library, name, {"num_classes": 10})


@pytest.mark.parametrize("text", ["resnet50", "timm", "timm:", "timm.resnet50", ""])
def test_names_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ModelError) as caught:
        model_from(text)
    assert str(caught.value) == f"'{text}' is not of the form timm:resnet50"


@pytest.mark.parametrize("library", ["torch", "Timm", "torchvision.models", ""])
def test_another_library_is_refused_when_it_is_named(library: str) -> None:
    for name in (partial(ModelFromConfig, library, "Net"), partial(model_from, f"{library}:Net")):
        with pytest.raises(ModelError) as caught:
            name()
        assert str(caught.value) == (f"'{library}' is not one of timm, torchvision, transformers")


def test_a_name_cannot_be_changed_afterwards() -> None:
    model = model_from("timm:resnet50")
    with pytest.raises(FrozenInstanceError):
        model.name = "resnet18"  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize("library", LIBRARIES)
def test_naming_a_model_imports_nothing(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    uninstall(monkeypatch, library)
    assert model_from(f"{library}:tiny").library == library


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_not_there_comes_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, directory: Path, library: str
) -> None:
    uninstall(monkeypatch, library)
    with pytest.raises(ModelError) as caught:
        built(model_from(f"{library}:tiny"), directory)
    assert str(caught.value) == (
        f"{library}:tiny: {library} cannot be imported (import of {library} halted; None in "
        f"sys.modules); pip install {library}"
    )
    assert isinstance(caught.value.__cause__, ImportError)


# ---- timm ----------------------------------------------------------------------------------------


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Return what is asked of a library that stands in for timm."""
    calls: list[Call] = []

    def create_model(model_name: str, **arguments: Any) -> nn.Module:
        calls.append((model_name, arguments))
        if model_name == "resnet5":
            raise RuntimeError(f"Unknown model ({model_name})")
        return net(arguments.get("num_classes", 4))

    install(monkeypatch, "timm", create_model=create_model)
    return calls


@pytest.mark.parametrize(
    "arguments", [{}, {"num_classes": 4}, {"num_classes": 4, "drop_path_rate": 0.1}]
)
def test_timm_creates_the_model_without_pretrained_weights(
    timm: list[Call], directory: Path, arguments: dict[str, Any]
) -> None:
    model = built(model_from("timm:resnet50", **arguments), directory)
    assert timm == [("resnet50", {"pretrained": False, **arguments})]
    assert isinstance(model, nn.Sequential)


def test_arguments_that_make_another_model_are_found_before_anything_is_read(
    timm: list[Call], directory: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        built(model_from("timm:resnet50", num_classes=5), directory)
    assert str(caught.value) == f"{directory}: '0.weight' has shape [4, 3], [5, 3] in the model"


def test_what_the_library_raises_is_one_line_with_the_cause(
    timm: list[Call], directory: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        built(model_from("timm:resnet5"), directory)
    assert str(caught.value) == ("building the model failed: RuntimeError: Unknown model (resnet5)")
    assert type(caught.value.__cause__) is RuntimeError


def test_every_build_is_a_new_model_and_leaves_the_arguments_alone(timm: list[Call]) -> None:
    arguments = {"num_classes": 4}
    model = ModelFromConfig("timm", "resnet50", arguments)
    assert model.build(None) is not model.build(None)
    assert arguments == {"num_classes": 4}
    assert len(timm) == 2


# ---- torchvision ---------------------------------------------------------------------------------


def install_torchvision(
    monkeypatch: pytest.MonkeyPatch, builder: Callable[..., nn.Module]
) -> list[str]:
    """Return the names that a library in place of torchvision is asked for."""
    asked: list[str] = []

    def get_model_builder(name: str) -> Callable[..., nn.Module]:
        asked.append(name)
        return builder

    models = SimpleNamespace(get_model_builder=get_model_builder)
    install(monkeypatch, "torchvision", models=models)
    return asked


def test_torchvision_builds_a_classifier_without_weights(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def resnet18(*, weights: object = "given", progress: bool = True, **kwargs: Any) -> nn.Module:
        calls.append({"weights": weights, "progress": progress, **kwargs})
        return net()

    asked = install_torchvision(monkeypatch, resnet18)
    built(model_from("torchvision:resnet18", num_classes=10), directory)
    assert asked == ["resnet18"]
    assert calls == [{"weights": None, "progress": True, "num_classes": 10}]


def test_torchvision_builds_a_detector_without_weights_of_the_backbone_either(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def retinanet(
        *, weights: object = None, weights_backbone: object = "given", **kwargs: Any
    ) -> nn.Module:
        calls.append({"weights": weights, "weights_backbone": weights_backbone, **kwargs})
        return net()

    install_torchvision(monkeypatch, retinanet)
    built(model_from("torchvision:retinanet"), directory)
    assert calls == [{"weights": None, "weights_backbone": None}]


def test_torchvision_builders_that_know_no_weights_are_not_told_of_them(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def registered_by_the_user(width: int = 3, **kwargs: Any) -> nn.Module:
        calls.append({"width": width, **kwargs})
        return net(width)

    install_torchvision(monkeypatch, registered_by_the_user)
    built(model_from("torchvision:mine", width=4), directory)
    assert calls == [{"width": 4}]


# ---- transformers --------------------------------------------------------------------------------


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Return what is asked of a library that stands in for transformers."""
    calls: list[Call] = []

    class AutoConfig:
        @staticmethod
        def from_pretrained(
            source: object, *, return_unused_kwargs: bool, **arguments: Any
        ) -> tuple[dict[str, Any], dict[str, Any]]:
            assert return_unused_kwargs
            calls.append((f"config of {source}", arguments))
            config: dict[str, Any] = json.loads((Path(str(source)) / "config.json").read_text())
            return config, {key: arguments[key] for key in arguments if key.startswith("unknown")}

        @staticmethod
        def from_config(config: object) -> None:
            raise AssertionError("a config is no model")

    class AutoModel:
        def __init__(self, config: object) -> None:
            raise AssertionError("Auto classes cannot be called")

        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise AssertionError("no weights are loaded")

        @staticmethod
        def from_config(config: dict[str, Any], **arguments: Any) -> nn.Module:
            calls.append((f"AutoModel {config['seed']}", arguments))
            return net()

    class TinyModel(nn.Sequential):
        def __init__(self, config: dict[str, Any], **arguments: Any) -> None:
            calls.append((f"TinyModel {config['seed']}", arguments))
            super().__init__(*net())

        @staticmethod
        def from_pretrained(*_: object, **__: object) -> None:
            raise AssertionError("no weights are loaded")

    install(
        monkeypatch,
        "transformers",
        AutoConfig=AutoConfig,
        AutoModelForImageClassification=AutoModel,
        TinyModel=TinyModel,
    )
    return calls


OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def test_transformers_build_an_auto_class_from_the_config_of_the_checkpoint(
    transformers: list[Call], directory: Path
) -> None:
    built(model_from("transformers:AutoModelForImageClassification"), directory)
    assert transformers == [
        (f"config of {directory}", OFFLINE),
        ("AutoModel 1", {"trust_remote_code": False}),
    ]


def test_transformers_call_a_class_with_the_config(
    transformers: list[Call], directory: Path
) -> None:
    built(model_from("transformers:TinyModel"), directory)
    assert transformers == [(f"config of {directory}", OFFLINE), ("TinyModel 1", {})]


def test_arguments_for_transformers_are_those_of_the_config(
    transformers: list[Call], directory: Path
) -> None:
    model = model_from("transformers:AutoModelForImageClassification", num_labels=10)
    built(model, directory)
    assert transformers == [
        (f"config of {directory}", {**OFFLINE, "num_labels": 10}),
        ("AutoModel 1", {"trust_remote_code": False}),
    ]


def test_a_config_elsewhere_is_preferred_and_no_argument_of_the_model(
    transformers: list[Call], directory: Path, tmp_path: Path
) -> None:
    other = model_directory(tmp_path / "other", seed=2)
    model = model_from("transformers:TinyModel", config=str(other), num_labels=3)
    for _ in range(2):  # the second build finds it, too
        built(model, directory)
    assert transformers == 2 * [
        (f"config of {other}", {**OFFLINE, "num_labels": 3}),
        ("TinyModel 2", {}),
    ]


def test_a_single_file_has_no_config_and_the_remedy_is_told(
    transformers: list[Call], tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "one", net().state_dict(), "safetensors")
    with pytest.raises(ModelError) as caught:
        built(model_from("transformers:TinyModel"), path)
    assert str(caught.value) == (
        "transformers:TinyModel: a single file has no config.json beside it; say where one is "
        "(--model-arg config=DIR)"
    )
    assert transformers == []


def test_a_single_file_is_enough_with_a_config_elsewhere(
    transformers: list[Call], directory: Path, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "one", net().state_dict(), "safetensors")
    built(model_from("transformers:TinyModel", config=str(directory)), path)
    assert transformers[0] == (f"config of {directory}", OFFLINE)


def test_a_config_that_is_no_directory_is_told_without_asking_transformers(
    transformers: list[Call], directory: Path, tmp_path: Path
) -> None:
    """What is not there, transformers take for a repository: they look for it on the network."""
    model = model_from("transformers:TinyModel", config=str(tmp_path / "nope"))
    with pytest.raises(ModelError, match=f"^transformers:TinyModel: .*{tmp_path / 'nope'}"):
        built(model, directory)
    assert transformers == []


def test_a_class_that_transformers_do_not_have_is_one_line(
    transformers: list[Call], directory: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        built(model_from("transformers:AutoModelForNothing"), directory)
    assert str(caught.value) == (
        "building the model failed: AttributeError: module 'transformers' has no attribute "
        "'AutoModelForNothing'"
    )


@pytest.mark.parametrize("name", ["local_files_only", "trust_remote_code"])
def test_nobody_can_ask_transformers_to_go_online_or_run_foreign_code(
    transformers: list[Call], directory: Path, name: str
) -> None:
    model = model_from("transformers:TinyModel", **{name: not OFFLINE[name]})
    with pytest.raises(ModelError) as caught:
        built(model, directory)
    assert f"got multiple values for keyword argument '{name}'" in str(caught.value)
    assert transformers == []


# ---- end to end ----------------------------------------------------------------------------------


def assert_statistics_are_those_of_the_data(output: Path) -> None:
    found = load_file(output / "model.safetensors")
    inputs = torch.cat(batches()).double()
    values = inputs @ found["0.weight"].double().T + found["0.bias"].double()
    for buffer, expected in (("mean", values.mean(0)), ("var", values.var(0))):
        torch.testing.assert_close(
            found[f"1.running_{buffer}"].double(), expected, rtol=1e-5, atol=1e-5
        )


def test_the_config_is_that_of_the_last_checkpoint(
    transformers: list[Call], tmp_path: Path
) -> None:
    for step in (1, 2, 10):
        model_directory(tmp_path / f"checkpoint-{step}", seed=step)
    average_checkpoints(
        [tmp_path / "checkpoint-*"],
        tmp_path / "out",
        batchnorm=BnPass(
            model=model_from("transformers:AutoModelForImageClassification"), batches=batches
        ),
        device="cpu",
    )
    assert [name for name, _ in transformers] == [
        f"config of {tmp_path / 'checkpoint-10'}", "AutoModel 10",
    ]  # fmt: skip
    assert_statistics_are_those_of_the_data(tmp_path / "out")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with two model directories and the user's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "zoo_data.py").write_text(DATA)
    for step in (1, 2):
        model_directory(tmp_path / f"checkpoint-{step}", seed=step)
    yield tmp_path
    sys.modules.pop("zoo_data", None)


AVERAGE = ["average", "checkpoint-{1,2}", "-o", "out", "--data", "zoo_data:batches"]


def test_the_command_line_takes_a_model_by_name(here: Path, timm: list[Call]) -> None:
    arguments = ["--model", "timm:resnet50", "--model-arg", "num_classes=4", "--quiet"]
    assert run([*AVERAGE, *arguments]) == 0
    assert timm == [("resnet50", {"pretrained": False, "num_classes": 4})]
    assert_statistics_are_those_of_the_data(here / "out")


def test_the_command_line_takes_a_config_for_single_files(
    here: Path, transformers: list[Call], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "recompute-bn", "checkpoint-1/model.safetensors", "-o", "out", "--quiet",
        "--model", "transformers:TinyModel", "--data", "zoo_data:batches",
    ]  # fmt: skip
    before = tree(here)
    assert run(arguments) == 1
    assert capsys.readouterr().err == (
        "ckptavg: error: transformers:TinyModel: a single file has no config.json beside it; say "
        "where one is (--model-arg config=DIR)\n"
    )
    after = tree(here)
    assert {name for name in after if "__pycache__" not in name} == set(before)
    assert run([*arguments, "--model-arg", "config=checkpoint-2"]) == 0
    assert transformers == [("config of checkpoint-2", OFFLINE), ("TinyModel 2", {})]
    assert_statistics_are_those_of_the_data(here / "out")


def test_a_library_that_is_missing_is_one_line_on_the_command_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uninstall(monkeypatch, "timm")
    assert run([*AVERAGE, "--model", "timm:resnet50"]) == 1
    assert capsys.readouterr().err == (
        "ckptavg: error: timm:resnet50: timm cannot be imported (import of timm halted; None in "
        "sys.modules); pip install timm\n"
    )
    assert not (here / "out").exists()


def test_the_options_become_a_model_by_name_without_importing_the_library(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in LIBRARIES:
        uninstall(monkeypatch, library)
        found = load_bn_pass(
            model_name=f"{library}:resnet50",
            model_arguments=[("num_classes", 10), ("config", "some/where")],
            data_name="zoo_data:batches",
            data_arguments=(),
            forward_name=None,
        )
        assert found is not None
        assert found.model == ModelFromConfig(
            library, "resnet50", {"num_classes": 10, "config": "some/where"}
        )


def test_a_module_of_a_library_is_imported_as_the_users_own(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "torchvision")
    install(monkeypatch, "torchvision.models", resnet18=net)
    found = load_bn_pass(
        model_name="torchvision.models:resnet18",
        model_arguments=[("width", 7)],
        data_name="zoo_data:batches",
        data_arguments=(),
        forward_name=None,
    )
    assert found is not None
    assert isinstance(found.model, partial)
    assert found.model()[0].out_features == 7


# ---- the libraries themselves, where they are installed ------------------------------------------


def average_of_two(tmp_path: Path, model: ModelFromConfig, images: list[Tensor]) -> Any:
    """Average two models with random weights; return what the BatchNorm pass did."""
    for number in (1, 2):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir(exist_ok=True)
        torch.manual_seed(number)
        save_file(model.build(str(folder)).state_dict(), folder / "model.safetensors")
    result = average_checkpoints(
        [tmp_path / "checkpoint-{1,2}"],
        tmp_path / "out",
        batchnorm=BnPass(model=model, batches=images),
        device="cpu",
    )
    return result.outputs[0].batchnorm


IMAGES = [torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32).sin()]


@pytest.mark.filterwarnings("ignore")  # theirs
def test_timm_itself_builds_a_model(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    report = average_of_two(tmp_path, model_from("timm:resnet10t", num_classes=2), IMAGES)
    assert len(report.layers) > 5


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    ("name", "n_layers"), [("mobilenet_v3_small", 34), ("lraspp_mobilenet_v3_large", 47)]
)
def test_torchvision_itself_builds_a_model(tmp_path: Path, name: str, n_layers: int) -> None:
    pytest.importorskip("torchvision")
    report = average_of_two(tmp_path, model_from(f"torchvision:{name}", num_classes=2), IMAGES)
    assert len(report.layers) == n_layers


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    "name", ["AutoModelForImageClassification", "ResNetForImageClassification"]
)
def test_transformers_themselves_build_a_model(tmp_path: Path, name: str) -> None:
    library = pytest.importorskip("transformers")
    config = library.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    for number in (1, 2):
        config.save_pretrained(tmp_path / f"checkpoint-{number}")
    images = [{"pixel_values": batch} for batch in IMAGES]
    report = average_of_two(tmp_path, model_from(f"transformers:{name}"), images)  # type: ignore[arg-type]  # mappings
    assert len(report.layers) == 6


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize("argument", ["pretrained", "weights", "weights_backbone"])
def test_weights_are_not_asked_for(name: str, argument: str) -> None:
    with pytest.raises(ModelError) as caught:
        model_from(name, **{argument: True}).build(None)
    assert str(caught.value) == f"{name}: no weights are downloaded; leave out '{argument}'"


def test_nothing_is_fetched_from_the_hub() -> None:
    with pytest.raises(ModelError, match="^timm:hf-hub:me/net: nothing is fetched from the Hub$"):
        model_from("timm:hf-hub:me/net").build(None)


def test_what_a_config_does_not_know_is_refused(transformers: list[Call], directory: Path) -> None:
    with pytest.raises(ModelError) as caught:
        built(model_from("transformers:TinyModel", unknown_size=3), directory)
    assert str(caught.value) == "transformers:TinyModel: its config has no 'unknown_size'"
