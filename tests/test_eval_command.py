"""A command that judges a model directory: what it sees, what it may print, what goes wrong."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeCheckpoint, tree
from safetensors.torch import load_file
from torch import nn

from ckptavg import BnPass, EvalCommand, ModelError, UsageError, average_checkpoints
from ckptavg.cli import run


def printing(text: str) -> EvalCommand:
    return EvalCommand(f"echo {{model}} >/dev/null; printf %s {shlex.quote(text)}")


@pytest.fixture
def sources(make_checkpoint: MakeCheckpoint) -> list[Path]:
    return [
        make_checkpoint(
            f"step{step}", {"0.weight": torch.full((2, 3), step), "0.bias": torch.ones(2)}
        )
        for step in (1.0, 2.0, 6.0)
    ]


@pytest.mark.parametrize(
    ("printed", "metrics"),
    [
        ("0.5", {"metric": 0.5}),
        ("-3\n", {"metric": -3.0}),
        ("loading\n 95% done\n0.25\n", {"metric": 0.25}),
        ("inf", {"metric": float("inf")}),
        ('{"loss": 1.5, "acc": 2}', {"loss": 1.5, "acc": 2.0}),
        ('{\n "loss": 1.5\n}\n', {"loss": 1.5}),
        ('progress\n{"results": {"arc": {"acc,none": 0.5, "alias": "arc"}}, "done": true}',
         {"results/arc/acc,none": 0.5}),
    ],
)  # fmt: skip
def test_a_number_or_json_may_be_printed(
    tmp_path: Path, printed: str, metrics: dict[str, float]
) -> None:
    assert printing(printed).evaluated(tmp_path) == metrics


@pytest.mark.parametrize("printed", ["", "good", "[]", "{}", '{"name": "x", "ok": true}', "1 2"])
def test_anything_else_is_an_error_that_shows_it(tmp_path: Path, printed: str) -> None:
    with pytest.raises(ModelError, match="printed no number") as caught:
        printing(printed).evaluated(tmp_path)
    assert repr(printed) in str(caught.value)


def test_a_command_must_say_where_the_model_goes() -> None:
    with pytest.raises(UsageError, match="put {model} there"):
        EvalCommand("python my_eval.py")


def test_the_path_is_absolute_and_quoted(tmp_path: Path) -> None:
    directory = tmp_path / "a model's; dir"
    directory.mkdir()
    (directory / "weight").write_text("7")
    assert EvalCommand("cat {model}/weight").evaluated(directory) == {"metric": 7.0}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("exit 3 # {model}", "exited with 3: exit 3 # {model}"),
        ("no-such-program {model} 2>/dev/null", "exited with 127"),
        ("kill -KILL $$ # {model}", "was ended by SIGKILL"),
    ],
)
def test_a_command_that_fails_is_an_error(tmp_path: Path, command: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        EvalCommand(command).evaluated(tmp_path)
    assert message in str(caught.value)


def test_what_a_command_leaves_in_the_model_is_removed_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    command = "mkdir -p {model}/cache/deep && touch {model}/cache/deep/x {model}/y && echo 1"
    assert EvalCommand(command).evaluated(tmp_path / "model") == {"metric": 1.0}
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["weights"]


def test_a_command_that_changes_the_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("w")
    with pytest.raises(ModelError, match="changed 'weights' in the model"):
        EvalCommand("echo more >> {model}/weights; echo 1").evaluated(tmp_path)


# ---- in the pipeline -----------------------------------------------------------------------------

JUDGE = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
model = Path(sys.argv[1])
state = load_file(model / "model.safetensors")
names = sorted(path.name for path in model.iterdir() if not path.name.startswith("."))
print("files:", names, file=sys.stderr)
print(json.dumps({"mean": state["0.weight"].mean().item(), "n_files": len(names)}))
"""


def judge(directory: Path) -> str:
    (directory / "judge.py").write_text(JUDGE)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(directory / 'judge.py'))} {{model}}"


def test_a_command_judges_every_output_before_it_is_published(
    tmp_path: Path, sources: list[Path]
) -> None:
    result = average_checkpoints(
        sources,
        tmp_path / "out",
        schemes=["uniform", "uniform:last=2"],
        batchnorm=BnPass(evaluate=EvalCommand(judge(tmp_path))),
    )
    assert [one.metrics for one in result.outputs] == [
        {"mean": 3.0, "n_files": 1.0},
        {"mean": 4.0, "n_files": 1.0},
    ]
    assert [one.batchnorm for one in result.outputs] == [None, None]
    told = json.loads((tmp_path / "out" / "uniform" / "ckptavg.json").read_text())
    assert (told["metrics"], told["batchnorm"]) == ({"mean": 3.0, "n_files": 1.0}, None)


def test_a_command_sees_the_recomputed_statistics(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    sources = []
    for seed in range(3):
        torch.manual_seed(seed)
        sources.append(make_checkpoint(f"step{seed}", build().state_dict()))
    command = (
        f"{shlex.quote(sys.executable)} -c 'import sys; from safetensors.torch import load_file; "
        'print(load_file(sys.argv[1] + "/model.safetensors")["1.running_mean"][0].item())\' {model}'
    )
    result = average_checkpoints(
        sources,
        tmp_path / "out",
        batchnorm=BnPass(model=build, batches=[torch.randn(64, 3)], evaluate=EvalCommand(command)),
    )
    published = load_file(tmp_path / "out" / "model.safetensors")
    assert result.outputs[0].batchnorm is not None
    assert result.outputs[0].metrics == {"metric": published["1.running_mean"][0].item()}


def test_nothing_is_published_when_the_command_fails(tmp_path: Path, sources: list[Path]) -> None:
    before = tree(tmp_path)
    with pytest.raises(ModelError, match="exited with 1"):
        average_checkpoints(
            sources, tmp_path / "out", batchnorm=BnPass(evaluate=EvalCommand("false {model}"))
        )
    assert tree(tmp_path) == before


def test_the_command_line_shows_what_the_command_says(
    tmp_path: Path, sources: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["average", *map(str, sources), "-o", str(tmp_path / "out")]
    code = run([*arguments, "--eval-command", judge(tmp_path)])
    out, err = capfd.readouterr()
    assert code == 0
    assert "  evaluation  mean  n_files\n  model          3        1\n" in out
    assert "files: ['model.safetensors']" in err


def test_an_evaluation_without_data_needs_a_model_only(tmp_path: Path, sources: list[Path]) -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {name: value.mean().item() for name, value in model.named_parameters()}

    result = average_checkpoints(
        sources,
        tmp_path / "out",
        batchnorm=BnPass(model=lambda: nn.Sequential(nn.Linear(3, 2)), evaluate=evaluate),
    )
    assert result.outputs[0].metrics == {"0.weight": 3.0, "0.bias": 1.0}
    assert result.outputs[0].batchnorm is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a model is there for batches"),
        ({"model": nn.Identity()}, "a model is there for batches"),
        ({"batches": []}, "need a model"),
        ({"evaluate": len}, "need a model"),
        ({"model": nn.Identity(), "evaluate": EvalCommand("x {model}")}, "needs no model"),
        ({"model": nn.Identity(), "evaluate": len, "max_samples": 3}, "max_samples is for a"),
        ({"model": nn.Identity(), "evaluate": len, "forward": len}, "forward is for a"),
        ({"model": nn.Identity(), "evaluate": len, "compare": True}, "compare needs batches"),
        ({"evaluate": EvalCommand("x {model}"), "compare": True}, "compare needs a metric"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BnPass(**options)


def test_an_interruption_ends_the_command_and_publishes_nothing(
    tmp_path: Path, sources: list[Path]
) -> None:
    marker = tmp_path / "started"
    command = f"sh -c 'echo $$ > {marker}; sleep 60' {{model}}"
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptavg", "average", *map(str, sources), "-o", "out",
         "--eval-command", command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    for _ in range(600):
        if marker.exists() and marker.read_text().endswith("\n"):
            break
        time.sleep(0.05)
    child = int(marker.read_text())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "nothing was published" in err
    assert not (tmp_path / "out").exists()
    for _ in range(100):
        if not _is_alive(child):
            break
        time.sleep(0.05)
    assert not _is_alive(child)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
