"""``pkg.mod:thing``: how the command line finds and checks the user's own code."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from ckptavg import BnPass, ModelError
from ckptavg.cli.options import model_options
from ckptavg.cli.user_code import load_bn_pass, load_thing
from ckptavg.model_zoo import ModelFromConfig

CODE = '''
"""Models and data as users write them."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self, width=4, name="plain"):
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.name = name

    @classmethod
    def wide(cls):
        return cls(width=64)

def build(width=4, **options):
    net = Net(width)
    net.options = options
    return net

net = Net(5)
sequential = nn.Sequential(nn.Linear(3, 2))
batches = [torch.zeros(2, 3), torch.ones(2, 3)]
pair = tuple(batches)
loader = DataLoader(TensorDataset(torch.zeros(6, 3)), batch_size=4)
dataset = TensorDataset(torch.zeros(6, 3))
number = 3
one_shot = (batch for batch in batches)

def generate(count=2, size=2):
    for _ in range(count):
        yield torch.zeros(size, 3)

def make_loader(batch_size=3):
    return DataLoader(TensorDataset(torch.zeros(6, 3)), batch_size=batch_size)

class Batches:
    def __init__(self, count=3):
        self.count = count
    def __iter__(self):
        return generate(self.count)

class CallableBatches(Batches):
    def __call__(self):
        raise AssertionError("it is an iterable already")

callable_batches = CallableBatches()

class Space:
    class Inner:
        build = staticmethod(build)
        data = batches

def forward(model, batch):
    return model(batch)
'''


@pytest.fixture(autouse=True)
def user_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a directory with the user's modules; forget them afterwards."""
    (tmp_path / "user_things.py").write_text(CODE)
    package = tmp_path / "user_pkg" / "sub"
    package.mkdir(parents=True)
    (tmp_path / "user_pkg" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "things.py").write_text("from user_things import Net as Deep\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("user_"):
            del sys.modules[name]


def bn_pass(
    model: str | None = "user_things:Net",
    data: str | None = "user_things:batches",
    **options: Any,
) -> BnPass | None:
    arguments: dict[str, Any] = {
        "model_arguments": (), "data_arguments": (), "forward_name": None, "max_batches": None,
        "max_samples": None,
    }  # fmt: skip
    return load_bn_pass(model_name=model, data_name=data, **{**arguments, **options})


def built(**options: Any) -> nn.Module:
    """Return the model of a pass, built as the pipeline builds it."""
    found = bn_pass(**options)
    assert found is not None
    assert not isinstance(found.model, ModelFromConfig)
    return found.model if isinstance(found.model, nn.Module) else found.model()


def drawn(**options: Any) -> list[Any]:
    """Return the batches of a pass, drawn as the pipeline draws them."""
    found = bn_pass(**options)
    assert found is not None
    batches = found.batches
    if not isinstance(batches, Iterable):
        batches = batches()
    return list(batches)


# ---- finding things ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("user_things:Net", type),
        ("user_things:net", nn.Module),
        ("user_things:Space.Inner.data", list),
        ("user_pkg.sub.things:Deep", type),
        ("torch.nn:Identity", type),
        ("collections:OrderedDict.fromkeys", object),
    ],
)
def test_a_thing_is_found_by_module_and_attributes(name: str, kind: type) -> None:
    assert isinstance(load_thing(name, "--model"), kind)


def test_the_current_directory_is_searched_once_and_first(user_directory: Path) -> None:
    assert os.getcwd() == str(user_directory)
    for _ in range(2):
        load_thing("user_things:net", "--model")
    assert sys.path[0] == str(user_directory)
    assert sys.path.count(str(user_directory)) == 1


@pytest.mark.parametrize("name", ["user_things", "user_things:", ":Net", ":", "", "Net.py"])
def test_names_of_another_form_are_usage_errors(name: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        load_thing(name, "--data")
    assert caught.value.message == f"--data: '{name}' is not of the form pkg.mod:thing"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("user_thingz:Net", "ModuleNotFoundError: No module named 'user_thingz'"),
        ("user_pkg.other:Net", "ModuleNotFoundError: No module named 'user_pkg.other'"),
        ("user_things:Nett", "AttributeError: module 'user_things' has no attribute 'Nett'"),
        ("user_things:Net.narrow", "AttributeError: type object 'Net' has no attribute 'narrow'"),
        ("user_things.py:Net", "ModuleNotFoundError: No module named 'user_things.py'; "
         "'user_things' is not a package"),
        ("user_things:a:b", "AttributeError: module 'user_things' has no attribute 'a:b'"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(name: str, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_thing(name, "--model")
    assert str(caught.value) == f"--model {name}: cannot be imported: {reason}"


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        ("import user_missing", ModuleNotFoundError,
         "ModuleNotFoundError: No module named 'user_missing'"),
        ("raise ValueError('two\\nlines')", ValueError, "ValueError: two\\nlines"),
        ("1 / 0", ZeroDivisionError, "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(2)", SystemExit, "SystemExit: 2"),
        ("def f(:", SyntaxError, "SyntaxError: invalid syntax (user_broken.py, line 1)"),
    ],
)  # fmt: skip
def test_errors_while_importing_are_one_line_with_the_cause(
    user_directory: Path, code: str, kind: type[BaseException], reason: str
) -> None:
    (user_directory / "user_broken.py").write_text(code)
    with pytest.raises(ModelError) as caught:
        load_thing("user_broken:thing", "--forward")
    assert str(caught.value) == f"--forward user_broken:thing: cannot be imported: {reason}"
    assert isinstance(caught.value.__cause__, kind)


def test_an_interrupt_while_importing_stays_one(user_directory: Path) -> None:
    (user_directory / "user_slow.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_thing("user_slow:thing", "--model")


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "width"),
    [
        ("user_things:Net", (), 4),
        ("user_things:Net", (("width", 7),), 7),
        ("user_things:Net.wide", (), 64),
        ("user_things:build", (("width", 8),), 8),
        ("user_things:Space.Inner.build", (), 4),
        ("user_things:net", (), 5),
        ("user_pkg.sub.things:Deep", (("width", 2),), 2),
    ],
)
def test_models_are_classes_factories_or_modules(
    name: str, arguments: tuple[tuple[str, Any], ...], width: int
) -> None:
    model = built(model=name, model_arguments=arguments)
    assert model.get_submodule("linear").out_features == width


def test_a_module_is_taken_as_it_is_though_it_can_be_called() -> None:
    assert isinstance(built(model="user_things:sequential"), nn.Sequential)


def test_factories_are_not_called_before_the_pipeline_asks() -> None:
    found = bn_pass(model="user_things:Net", model_arguments=(("wrong", 1),))
    assert found is not None
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        built(model="user_things:Net", model_arguments=(("wrong", 1),))


def test_arguments_for_a_module_are_refused() -> None:
    with pytest.raises(click.UsageError) as caught:
        bn_pass(model="user_things:net", model_arguments=(("width", 3),))
    assert caught.value.message == (
        "--model-arg: user_things:net is a module already, not a factory"
    )


@pytest.mark.parametrize(("name", "kind"), [("number", "int"), ("batches", "list")])
def test_a_model_must_be_one(name: str, kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        bn_pass(model=f"user_things:{name}")
    assert str(caught.value) == f"--model user_things:{name}: is a {kind}, expected a model"


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "sizes"),
    [
        ("batches", (), [2, 2]),
        ("pair", (), [2, 2]),
        ("one_shot", (), [2, 2]),
        ("loader", (), [4, 2]),
        ("generate", (), [2, 2]),
        ("generate", (("count", 3), ("size", 5)), [5, 5, 5]),
        ("make_loader", (), [3, 3]),
        ("make_loader", (("batch_size", 5),), [5, 1]),
        ("Batches", (), [2, 2, 2]),
        ("Batches", (("count", 1),), [2]),
        ("callable_batches", (), [2, 2, 2]),
        ("Space.Inner.data", (), [2, 2]),
    ],
)
def test_data_may_be_an_iterable_or_make_one(
    name: str, arguments: tuple[tuple[str, Any], ...], sizes: list[int]
) -> None:
    batches = drawn(data=f"user_things:{name}", data_arguments=arguments)
    tensors = [batch if isinstance(batch, torch.Tensor) else batch[0] for batch in batches]
    assert [len(tensor) for tensor in tensors] == sizes


@pytest.mark.parametrize("name", ["batches", "loader", "one_shot", "callable_batches"])
def test_arguments_for_an_iterable_are_refused(name: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        bn_pass(data=f"user_things:{name}", data_arguments=(("count", 3),))
    assert caught.value.message == (
        f"--data-arg: user_things:{name} is an iterable already, not a factory"
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("number", "int"), ("dataset", "TensorDataset")]
)  # a dataset gives samples, not batches
@pytest.mark.parametrize("arguments", [(), (("count", 3),)])
def test_data_must_be_batches(name: str, kind: str, arguments: tuple[tuple[str, Any], ...]) -> None:
    with pytest.raises(ModelError) as caught:
        bn_pass(data=f"user_things:{name}", data_arguments=arguments)
    assert str(caught.value) == (
        f"--data user_things:{name}: is a {kind}, expected an iterable of batches"
    )


# ---- the rest of the options ---------------------------------------------------------------------


def test_forward_and_limits_reach_the_pass() -> None:
    found = bn_pass(forward_name="user_things:forward", max_batches=3, max_samples=70)
    assert found is not None
    assert found.forward is sys.modules["user_things"].forward
    assert (found.max_batches, found.max_samples) == (3, 70)


def test_forward_must_be_a_function() -> None:
    with pytest.raises(ModelError) as caught:
        bn_pass(forward_name="user_things:number")
    assert str(caught.value) == "--forward user_things:number: is a int, expected a function"


def test_without_model_and_data_there_is_no_pass() -> None:
    assert bn_pass(model=None, data=None) is None


@pytest.mark.parametrize(
    ("model", "data"), [("user_things:Net", None), (None, "user_things:batches")]
)
def test_model_and_data_belong_together(model: str | None, data: str | None) -> None:
    with pytest.raises(click.UsageError) as caught:
        bn_pass(model=model, data=data)
    assert caught.value.message == (
        "--model and --data belong together: the BatchNorm pass needs both"
    )


@pytest.mark.parametrize(
    ("option", "keyword", "value"),
    [
        ("--model-arg", "model_arguments", (("width", 3),)),
        ("--data-arg", "data_arguments", (("count", 3),)),
        ("--forward", "forward_name", "user_things:forward"),
        ("--batches", "max_batches", 3),
        ("--samples", "max_samples", 3),
    ],
)
def test_options_of_the_pass_are_refused_without_it(option: str, keyword: str, value: Any) -> None:
    with pytest.raises(click.UsageError) as caught:
        bn_pass(model=None, data=None, **{keyword: value})
    assert caught.value.message == f"{option} needs --model and --data"


@click.command()
@model_options(required=True, compare="--compare")
def show(**options: Any) -> None:
    click.echo(repr(dict(options["model_arguments"])))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("-1", -1),
        ("1e-3", 0.001),
        ("True", True),
        ("None", None),
        ("(1, 2)", (1, 2)),
        ("[3,4]", [3, 4]),
        ("{'a': 1}", {"a": 1}),
        ("'64'", "64"),
        ("resnet18", "resnet18"),
        ("a=b", "a=b"),
        ("", ""),
        ("true", "true"),
        ("data/train set", "data/train set"),
        ("__import__('os').getcwd()", "__import__('os').getcwd()"),
    ],
)
def test_argument_values_are_literals_if_they_can_be_and_text_otherwise(
    text: str, value: Any
) -> None:
    arguments = ["--model", "a:b", "--data", "c:d", "--model-arg", f"key={text}"]
    result = CliRunner().invoke(show, arguments)
    assert (result.exit_code, result.output) == (0, f"{ {'key': value} }\n")


@pytest.mark.parametrize("text", ["width", "=3", "2x=3", "a b=3"])
def test_arguments_of_another_form_are_usage_errors(text: str) -> None:
    result = CliRunner().invoke(show, ["--model", "a:b", "--data", "c:d", "--model-arg", text])
    assert result.exit_code == 2
    assert f"'{text}' is not of the form key=value" in result.output
