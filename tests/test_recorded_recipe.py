"""The recipe in a provenance: what made the output, its sources pinned, and what has no name."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import verify_fixtures
from hub_fixtures import REPO
from loopback_hub import LoopbackHub
from torch import nn

from ckptavg import BnPass, Scheme, average_checkpoints, model_from, recompute_bn
from ckptavg.recorded_recipe import scheme_text
from ckptavg.schemes import parse_scheme


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with four checkpoints of the network."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for step, state in enumerate(verify_fixtures.states(), 1):
        torch.save({"step": step, "state_dict": state}, tmp_path / f"step-{step}.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recorded(output: str | Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(Path(output, "ckptavg.json").read_text())["reproduce"]
    return told


def bn_pass(**options: Any) -> BnPass:
    chosen = {"model": verify_fixtures.Net, "batches": verify_fixtures.batches, **options}
    return BnPass(**chosen)


def test_a_python_call_is_recorded_as_the_recipe_that_does_the_same(runs: Path) -> None:
    average_checkpoints(
        [Path("step-4.pt"), str(runs / "step-2.pt"), "step-{1,3}.pt"],
        "outputs/swa",
        schemes="best=uniform:last=2",
        last=3,
        dtype="float16",
        strip_prefixes=["linear."],
        state_key="state_dict",
        keep_prefix=True,
        max_shard_bytes=100,
        include_code=False,
        allow_nonfinite=True,
    )
    assert recorded("outputs/swa") == {
        "command": "average",
        "directory": "../..",
        "sources": [str(runs / "step-2.pt"), "step-3.pt", "step-4.pt"],
        "averaging": {
            "scheme": "best=uniform:last=2",
            "accumulate": "auto",
            "dtype": "float16",
            "buffers": "last",
            "allow-nonfinite": True,
            "state-key": "state_dict",
            "strip-prefixes": ["linear."],
            "keep-prefix": True,
        },
        "output": {"output-format": "safetensors", "max-shard-size": 100, "no-code": True},
        "member": "",
        "torch_threads": None,
        "obstacles": [],
    }


def test_each_of_several_outputs_records_its_own_scheme_and_all_sources(runs: Path) -> None:
    average_checkpoints(
        "step-[134].pt", "averages", schemes=["uniform:first=1", "b=coefficients:1/3,1/3,1/3"]
    )
    first, second = recorded("averages/uniform-first1"), recorded("averages/b")
    assert first["sources"] == second["sources"] == ["step-1.pt", "step-3.pt", "step-4.pt"]
    assert first["directory"] == "../.."
    assert first["averaging"]["scheme"] == "uniform:first=1"
    third = 1 / 3
    assert second["averaging"]["scheme"] == f"b=coefficients:{third!r},{third!r},{third!r}"


def test_coefficients_follow_the_checkpoints_in_their_order(runs: Path) -> None:
    average_checkpoints(["step-3.pt", "step-1.pt"], "out", coefficients=[0.75, 0.25])
    told = recorded("out")
    assert told["averaging"]["scheme"] == "coefficients:0.25,0.75"
    assert told["sources"] == ["step-1.pt", "step-3.pt"]


@pytest.mark.parametrize(
    "text",
    [
        "uniform",
        "late=uniform:last=5",
        "x=coefficients:0.1,1/7,3e-17,2",
        "ema:decay=0.9000000001,every=2",
        "wsm:decay=cosine,from=1000",
        "power:sigma=1/7",
    ],
)
def test_the_text_of_a_scheme_is_that_very_scheme(text: str) -> None:
    assert parse_scheme(scheme_text(parse_scheme(text))) == parse_scheme(text)
    assert scheme_text(Scheme()) == "uniform"


def test_revisions_are_pinned_to_their_commits(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    average_checkpoints([f"{REPO}@step1", f"{REPO}@step10"], tmp_path / "out")
    assert recorded(tmp_path / "out")["sources"] == [
        f"hf://{REPO}@{name}:{hub.branches(REPO)[name]}" for name in ("step1", "step10")
    ]


def test_the_way_back_holds_for_an_output_behind_a_link(
    runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Path("link").symlink_to(elsewhere)
    average_checkpoints("step-[12].pt", "link/out")
    way = recorded(elsewhere / "out")["directory"]
    assert Path(os.path.normpath(elsewhere / "out" / way)) == runs


# ---- model and data


def test_functions_classes_and_partials_are_recorded_by_name(runs: Path) -> None:
    average_checkpoints(
        "step-[12].pt",
        "out",
        batchnorm=bn_pass(
            model=partial(verify_fixtures.Net, width=4),
            batches=partial(verify_fixtures.batches, count=3),
            forward=verify_fixtures.forward,
            evaluate=verify_fixtures.accuracy,
            compare=True,
            max_samples=50,
            seed=0,
            estimator="torch",
        ),
    )
    told = recorded("out")
    assert told["obstacles"] == []
    assert told["torch_threads"] == torch.get_num_threads()
    assert told["machine"] == {"device": "cpu"}
    assert told["model"] == {
        "model": "verify_fixtures:Net",
        "model-args": {"width": 4},
        "data": "verify_fixtures:batches",
        "data-args": {"count": 3},
        "forward": "verify_fixtures:forward",
        "eval": "verify_fixtures:accuracy",
        "compare-bn": True,
        "samples": 50,
        "seed": 0,
        "estimator": "torch",
    }


def test_a_pass_over_one_model_is_recorded_as_such(runs: Path) -> None:
    recompute_bn("step-1.pt", "out", bn_pass())
    told = recorded("out")
    assert told["command"] == "recompute-bn"
    assert told["sources"] == ["step-1.pt"]
    assert "averaging" not in told


def test_a_model_of_a_library_is_recorded_by_its_name() -> None:
    from ckptavg.recorded_recipe import _name_of

    found = _name_of(model_from("timm:resnet18", num_classes=10))
    assert not isinstance(found, str)
    assert found.entry("model") == {"model": "timm:resnet18", "model-args": {"num_classes": 10}}


def local_function() -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return verify_fixtures.Net()

    return build


HERE = "test_recorded_recipe"


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"model": lambda: verify_fixtures.Net()},
         "model is a lambda, which cannot be imported by its name"),
        ({"model": local_function()},
         f"model is {HERE}:local_function.<locals>.build, which cannot be imported by its name"),
        ({"model": partial(verify_fixtures.Net, 4)},
         "model is a partial with positional arguments, which a recipe cannot express"),
        ({"batches": verify_fixtures.batches()},
         "batches is a list object, expected what can be imported by name"),
        ({"forward": lambda model, batch: model(batch)},
         "forward is a lambda, which cannot be imported by its name"),
        ({"batches": partial(verify_fixtures.batches, count=Path("x"))},  # type: ignore[arg-type]  # on purpose
         "batches is verify_fixtures:batches with arguments that a recipe cannot express"),
    ],
)  # fmt: skip
def test_what_has_no_name_is_an_obstacle(
    runs: Path, options: dict[str, Any], obstacle: str
) -> None:
    from ckptavg.recorded_recipe import _model_section

    obstacles: list[str] = []
    told = _model_section(bn_pass(**options), "average", obstacles)
    assert obstacles == [obstacle]
    (name,) = options
    assert {"batches": "data"}.get(name, name) not in told


def test_what_cannot_be_named_is_null_in_the_provenance(runs: Path) -> None:
    average_checkpoints(
        "step-[12].pt", "out",
        batchnorm=bn_pass(model=verify_fixtures.Net(), evaluate=lambda model: 1.0),
    )  # fmt: skip
    told = recorded("out")
    assert told["model"] == {"model": None, "data": "verify_fixtures:batches"}
    assert told["obstacles"] == ["model is a Net object, expected what can be imported by name"]


def test_what_a_script_defines_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptavg.recorded_recipe import _name_of

    monkeypatch.setattr(verify_fixtures.forward, "__module__", "__main__")
    assert _name_of(verify_fixtures.forward) == (
        "is forward of the script that was run, expected that of a module"
    )


@pytest.mark.promise(11)
def test_tokens_are_blanked_out_and_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "own-secret")
    Path("own-secret").symlink_to("step-1.pt")
    average_checkpoints(["own-secret", "step-2.pt"], "out")
    told = recorded("out")
    assert told["sources"] == ["hf_***", "step-2.pt"]
    assert told["obstacles"] == ["a token was blanked out of it: hf_***"]
