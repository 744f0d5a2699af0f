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

from ckptavg import BnPass, ModelError, UsageError
from ckptavg.bn_options import BnOptions
from ckptavg.cli.model_options import model_arguments, model_options
from ckptavg.cli.user_code import load_bn_pass, load_thing
from ckptavg.eval_command import EvalCommand
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

def accuracy(model):
    return 0.5
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
    assert found.model is not None
    assert not isinstance(found.model, ModelFromConfig)
    return found.model if isinstance(found.model, nn.Module) else found.model()


def drawn(**options: Any) -> list[Any]:
    """Return the batches of a pass, drawn as the pipeline draws them."""
    found = bn_pass(**options)
    assert found is not None
    batches = found.batches
    assert batches is not None
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


# ---- evaluation without a BatchNorm pass ---------------------------------------------------------


def test_a_command_needs_neither_model_nor_data() -> None:
    found, code, _ = given("--eval-command", "judge {model}")
    assert found is not None
    assert (found.model, found.batches, found.evaluate, code) == (
        None, None, EvalCommand("judge {model}"), 0,
    )  # fmt: skip


def test_a_command_may_come_after_a_batchnorm_pass() -> None:
    found, code, _ = given(*MODEL_AND_DATA, "--eval-command", "judge {model}", "--batches", "3")
    assert found is not None
    assert (code, found.max_batches, found.evaluate) == (0, 3, EvalCommand("judge {model}"))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--eval-command", "x {model}", "--eval", "a:b"], "exclude each other"),
        (["--model", "a:b", "--eval-command", "x {model}"], "belong together"),
        (["--model", "a:b", "--eval", "c:d", "--samples", "3"], "--samples needs --data"),
        (["--model", "a:b", "--eval", "c:d", "--compare-bn"], "--compare-bn needs --data"),
        (["--eval-command", "x {model}", "--seed", "3"], "--seed needs --model and --data"),
    ],
)
def test_evaluations_that_do_not_go_together_are_usage_errors(
    typed: list[str], message: str
) -> None:
    _, code, output = given(*typed)
    assert code == 2
    assert message in output


# ---- the options as they are typed ---------------------------------------------------------------

# what is typed; the attribute of the pass; its value then, and without
PASS_OPTIONS: list[tuple[list[str], str, object, object]] = [
    (["--forward", "user_things:forward"], "forward", "forward", None),
    (["--eval", "user_things:accuracy"], "evaluate", "accuracy", None),
    (["--batches", "3"], "max_batches", 3, None),
    (["--samples", "70"], "max_samples", 70, None),
    (["--until-converged", "0.1"], "until_converged", 0.1, None),
    (["--estimator", "paper"], "estimator", "paper", "population"),
    (["--estimator", "torch"], "estimator", "torch", "population"),
    (["--train-mode", "model"], "train_mode", "model", "bn"),
    (["--amp", "bfloat16"], "amp", "bfloat16", None),
    (["--amp", "float16"], "amp", "float16", None),
    (["--channels-last"], "channels_last", True, False),
    (["--compile"], "compile", True, False),
    (["--seed", "0"], "seed", 0, None),
    (["--seed", "7"], "seed", 7, None),
    (["--allow-unreached"], "allow_unreached", True, False),
    (["--data-per-process"], "data_per_process", True, False),
]
# these need a metric
COMPARE_OPTIONS: list[tuple[list[str], str, object, object]] = [
    (["--compare-bn"], "compare", True, False),
    (["--last-checkpoint", "x"], "last_checkpoint", "x", None),
]
ARGUMENT_OPTIONS = [["--model-arg", "width=3"], ["--data-arg", "count=3"]]
MODEL_AND_DATA = ["--model", "user_things:Net", "--data", "user_things:batches"]


def given(*arguments: str) -> tuple[BnPass | None, int, str]:
    """Return the pass that typed options give, the exit code, and what is printed."""
    found: list[BnPass | None] = []

    @click.command()
    @model_options(required=False, compare="--compare-bn")
    def take(**options: Any) -> None:
        found.append(load_bn_pass(**model_arguments(options)))
        assert options == {}  # nothing is left over

    result = CliRunner().invoke(take, arguments)
    if isinstance(result.exception, Exception):
        raise result.exception
    return (found[0] if found else None), result.exit_code, result.output


def attribute(found: BnPass | None, name: str) -> object:
    value = getattr(found, name)
    return value.__name__ if callable(value) else value


def test_all_options_are_in_the_tables_below() -> None:
    @click.command()
    @model_options(required=False, compare="--compare-bn")
    def take(**options: Any) -> None: ...

    tables = [*(row[0] for row in (*PASS_OPTIONS, *COMPARE_OPTIONS)), *ARGUMENT_OPTIONS]
    assert {flag for parameter in take.params for flag in parameter.opts} == {
        "--model", "--data", "--eval-command", *(typed[0] for typed in tables),
    }  # fmt: skip


@pytest.mark.parametrize(
    "typed",
    [*(row[0] for row in (*PASS_OPTIONS, *COMPARE_OPTIONS)), *ARGUMENT_OPTIONS],
    ids=" ".join,
)
def test_every_option_is_refused_under_its_own_name_without_model_and_data(
    typed: list[str],
) -> None:
    found, code, output = given(*typed)
    assert (found, code) == (None, 2)
    needed = "--model" if typed[0] == "--eval" else "--model and --data"
    assert output.endswith(f"Error: {typed[0]} needs {needed}\n")


@pytest.mark.parametrize(
    "typed",
    [*(row[0] for row in (*PASS_OPTIONS, *COMPARE_OPTIONS)), *ARGUMENT_OPTIONS],
    ids=" ".join,
)
@pytest.mark.parametrize("half", [MODEL_AND_DATA[:2], MODEL_AND_DATA[2:]], ids=["model", "data"])
def test_every_option_with_only_one_of_them_is_told_that_they_belong_together(
    typed: list[str], half: list[str]
) -> None:
    found, code, output = given(*half, *typed)
    if typed[0] == "--eval" and half[0] == "--model":  # an evaluation needs no data
        assert (code, attribute(found, "evaluate")) == (0, "accuracy")
        return
    assert code == 2
    assert output.endswith(
        "Error: --model and --data belong together: the BatchNorm pass needs both\n"
    )


@pytest.mark.parametrize(
    ("typed", "name", "value", "default"),
    PASS_OPTIONS,
    ids=[" ".join(row[0]) for row in PASS_OPTIONS],
)
def test_every_option_reaches_the_pass_and_nothing_else_changes(
    typed: list[str], name: str, value: object, default: object
) -> None:
    plain, _, _ = given(*MODEL_AND_DATA)
    found, code, output = given(*MODEL_AND_DATA, *typed)
    assert (code, output) == (0, "")
    assert attribute(found, name) == value
    assert attribute(plain, name) == default
    others = {row[1] for row in (*PASS_OPTIONS, *COMPARE_OPTIONS)} - {name}
    assert {other: attribute(found, other) for other in others} == {
        other: attribute(plain, other) for other in others
    }


def test_the_comparison_reaches_the_pass_with_a_metric() -> None:
    metric = ["--eval", "user_things:accuracy"]
    found, _, _ = given(*MODEL_AND_DATA, *metric, "--compare-bn")
    assert found is not None
    assert (found.compare, found.last_checkpoint) == (True, None)
    found, _, _ = given(*MODEL_AND_DATA, *metric, "--compare-bn", "--last-checkpoint", "last.pt")
    assert found is not None
    assert (found.compare, found.last_checkpoint) == (True, "last.pt")


def test_the_comparison_without_a_metric_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as caught:
        given(*MODEL_AND_DATA, "--compare-bn")
    assert str(caught.value) == "compare needs a metric: evaluate (--eval)"


def test_a_last_checkpoint_without_the_comparison_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"^last_checkpoint \(--last-checkpoint\) belongs to "):
        given(*MODEL_AND_DATA, "--last-checkpoint", "last.pt")


def test_the_defaults_of_the_command_line_are_those_of_python() -> None:
    found, _, _ = given(*MODEL_AND_DATA)
    defaults = BnOptions()
    assert found is not None
    for row in PASS_OPTIONS:
        if row[1] != "evaluate":
            assert getattr(found, row[1]) == getattr(defaults, row[1]) == row[3], row[1]


def test_defaults_that_are_typed_need_no_model() -> None:
    assert given("--estimator", "population", "--train-mode", "bn") == (None, 0, "")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--estimator", "mean"],
         "'mean' is not one of 'population', 'paper', 'torch'."),
        (["--train-mode", "eval"], "'eval' is not one of 'bn', 'model'."),
        (["--amp", "float32"], "'float32' is not one of 'bfloat16', 'float16'."),
        (["--seed", "-1"], "-1 is not in the range x>=0."),
        (["--batches", "0"], "0 is not in the range x>=1."),
        (["--samples", "0"], "0 is not in the range x>=1."),
        (["--until-converged", "0"], "0.0 is not in the range 0<x<1."),
        (["--until-converged", "1"], "1.0 is not in the range 0<x<1."),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused_when_they_are_typed(
    typed: list[str], message: str
) -> None:
    _, code, output = given(*MODEL_AND_DATA, *typed)
    assert code == 2
    assert f"Error: Invalid value for '{typed[0]}': {message}\n" in output


def test_the_metric_must_be_a_function_that_is_there() -> None:
    with pytest.raises(ModelError) as caught:
        given(*MODEL_AND_DATA, "--eval", "user_things:number")
    assert str(caught.value) == "--eval user_things:number: is a int, expected a function"
    with pytest.raises(ModelError) as caught:
        given(*MODEL_AND_DATA, "--eval", "user_things:recall")
    assert str(caught.value) == (
        "--eval user_things:recall: cannot be imported: AttributeError: module 'user_things' has "
        "no attribute 'recall'"
    )


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_model_of_a_library_comes_with_its_arguments(library: str) -> None:
    found, _, _ = given(
        "--model", f"{library}:resnet50", "--model-arg", "num_classes=10", *MODEL_AND_DATA[2:]
    )
    assert found is not None
    assert found.model == ModelFromConfig(library, "resnet50", {"num_classes": 10})


@pytest.mark.parametrize("name", ["timm:", "timm"])
def test_a_library_alone_is_no_model(name: str) -> None:
    _, code, output = given("--model", name, *MODEL_AND_DATA[2:])
    assert code == 2
    assert output.endswith(f"Error: --model: '{name}' is not of the form pkg.mod:thing\n")
