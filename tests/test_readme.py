"""What README, CHANGELOG and version say is true of the code."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import torch
from conftest import save_checkpoint

from ckptavg import __version__
from ckptavg.cli import _COMMANDS, cli
from ckptavg.cli.recipes import recipe_arguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_every_command_in_the_readme_is_one_the_tool_understands() -> None:
    lines = [
        line.removeprefix("$ ")
        for block in blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ckptavg ")
    ]
    assert len(lines) >= 5
    for line in lines:
        _, name, *arguments = shlex.split(line)
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, line
        command.make_context(name, arguments)  # raises click.UsageError on an unknown option


def test_every_command_is_in_the_readme() -> None:
    for name in _COMMANDS:
        assert f"ckptavg {name}" in README


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/exp7").mkdir(parents=True)
    for step in (500, 1000):
        tensors = {"w": torch.ones(3), "v": torch.ones(1)}
        save_checkpoint(Path(f"runs/exp7/checkpoint-{step}"), tensors, "sharded safetensors")
    examples = [block for block in blocks("python") if "import ckptavg" in block]
    assert len(examples) == 4
    Path("evaluate").write_text("#!/bin/sh\necho '{\"accuracy\": 0.5}'\n")
    Path("evaluate").chmod(0o755)
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
    assert Path("averaged/model.safetensors").exists()
    assert Path("averages/uniform-last2/model.safetensors").exists()
    assert Path("best/sweep.json").exists()


def test_the_recipe_in_the_readme_is_one() -> None:
    (text,) = blocks("toml")
    command = cli.get_command(click.Context(cli), "average")
    assert command is not None
    arguments = recipe_arguments(tomllib.loads(text), "README.md", command, {})
    assert command.make_context("average", arguments).params["last"] == 20


def test_files_and_names_the_readme_points_to_are_there() -> None:
    for path in (
        "examples/quickstart.py",
        "examples/mnist1d_sweep.py",
        "ckptavg/pipeline.py",
        ".ci/run",
        "LICENSE",
    ):
        assert (ROOT / path).exists()
        assert path in README or path == "LICENSE"


def test_newest_release_in_the_changelog_is_the_version_or_unreleased() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:2] in ([], [__version__])
