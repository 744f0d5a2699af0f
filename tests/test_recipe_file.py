"""Recipe files: what they may hold, where they work, and calls that are written down as one."""

import json
import os
import shutil
import sys
import tomllib
from pathlib import Path

import click
import pytest
import torch
from conftest import tree
from hub_fixtures import ckptavg

from ckptavg.cli import _COMMANDS, cli, run
from ckptavg.cli.recipes import option_key, options_of, recipe_command
from ckptavg.errors import UsageError
from ckptavg.recipe_file import SECTIONS, TALK, plural

MODEL = """
import torch
from torch import nn

def build(width=4, bias=True, inner=None):
    return nn.Sequential(nn.Linear(3, width, bias=bias), nn.BatchNorm1d(width))

def batches(count=2):
    return [torch.arange(60.0).reshape(20, 3) * number for number in range(1, count + 1)]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of four checkpoints and code; the working directory is beside it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "recipe_model", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    (folder / "recipe_model.py").write_text(MODEL)
    for step in (1, 2, 3, 4):
        torch.manual_seed(step)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        torch.save({"step": step, "model": model.state_dict()}, folder / f"runs/step-{step}.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def recipe(folder: Path, text: str, name: str = "swa.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


PLAIN = """
sources = ["runs/step-*.pt"]
[selection]
last = 3
[averaging]
dtype = "bfloat16"
[output]
output = "swa"
"""


# ---- running


def test_a_recipe_works_in_its_own_folder_and_does_what_the_command_does(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = ckptavg(capsys, "run", recipe(here, PLAIN))
    assert (code, out.splitlines()[0]) == (0, f"{here}/swa: average of 3 checkpoints")
    assert f"note: paths and code are found from {here}\n" in err
    assert Path.cwd().name == "elsewhere"
    assert list(Path.cwd().iterdir()) == []
    monkeypatch.chdir(here)
    run(["average", "runs/step-*.pt", "--last", "3", "--dtype", "bfloat16", "-o", "typed"])
    assert weights(here / "typed") == weights(here / "swa")
    code, out, err = ckptavg(capsys, "run", "swa.toml", "-o", "again")
    assert (code, out.splitlines()[0]) == (0, "again: average of 3 checkpoints")
    assert "paths and code" not in err
    assert weights(here / "again") == weights(here / "swa")


def test_what_is_given_to_run_takes_the_place_of_what_the_recipe_says(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(here, PLAIN + '[machine]\ndevice = "cuda:7"\nio-threads = 1\n')
    code, _, err = ckptavg(capsys, "run", file)
    assert code != 0
    assert "cuda:7" in err
    code, out, _ = ckptavg(capsys, "run", file, "--device", "cpu", "-o", "mine", "--json")
    assert code == 0
    assert json.loads(out)["output"] == str(Path.cwd() / "mine")
    assert not (here / "swa").exists()
    before = tree(Path("mine"))
    code, _, err = ckptavg(capsys, "run", file, "--device", "cpu", "-o", "mine")
    assert code == 1
    assert "already exists; pass --overwrite" in err
    code, out, err = ckptavg(
        capsys, "run", file, "--device", "cpu", "-o", "mine", "--overwrite", "--dry-run", "--quiet"
    )
    assert (code, err) == (0, "")
    assert out.startswith("would average 3 checkpoints")
    assert tree(Path("mine")) == before


def test_every_kind_of_value_reaches_the_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
    command = "average"
    sources = "runs"
    [selection]
    steps = "2:"
    matches = ["step-*", "epoch-*"]
    [averaging]
    schemes = ["uniform:last=2", "late=coefficients:0.25,0.25,0.5"]
    keep-prefix = true
    allow-nonfinite = false
    [model]
    model = "recipe_model:build"
    model-args = { width = 4, bias = true, inner = { a = [1, 2.5, "x"] } }
    data = "recipe_model:batches"
    data-arg = "count=3"
    samples = 50
    until-converged = 0.5
    [machine]
    memory = "64MiB"
    device = "cpu"
    [output]
    output = "out"
    max-shard-size = 100000
    """
    code, _, err = ckptavg(capsys, "run", recipe(here, text), "--quiet")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in (here / "out").iterdir()) == ["late", "uniform-last2"]
    told = json.loads((here / "out/late/ckptavg.json").read_text())
    assert [one["coefficient"] for one in told["checkpoints"]] == [0.25, 0.25, 0.5]
    assert [one["step"] for one in told["checkpoints"]] == [2, 3, 4]
    assert told["batchnorm"]["n_samples"] == 60
    assert told["reproduce"]["model"]["model-args"]["inner"] == {"a": [1, 2.5, "x"]}


def test_coefficients_may_be_a_list(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = 'sources = "runs"\n[averaging]\ncoefficients = [0.1, "1/10", 0.3, 0.5]\n'
    assert ckptavg(capsys, "run", recipe(here, text), "-o", "out")[0] == 0
    told = json.loads(Path("out/ckptavg.json").read_text())
    assert [one["coefficient"] for one in told["checkpoints"]] == [0.1, 0.1, 0.3, 0.5]


def test_a_recipe_may_name_the_directory_that_it_works_in(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(here.parent, 'directory = "project"\n' + PLAIN)
    assert ckptavg(capsys, "run", file, "--quiet")[0] == 0
    assert (here / "swa").is_dir()
    file = recipe(here.parent, 'directory = "nowhere"\n' + PLAIN)
    code, _, err = ckptavg(capsys, "run", file)
    assert (code, err) == (
        2, f"ckptavg: error: {file}: its directory {here.parent}/nowhere is not there\n"
    )  # fmt: skip


def test_a_recipe_run_twice_gives_the_same_bits(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PLAIN + '[model]\nmodel = "recipe_model:build"\ndata = "recipe_model:batches"\n'
    file = recipe(here, text)
    for name in ("one", "two"):
        assert ckptavg(capsys, "run", file, "-o", name)[0] == 0
    assert weights(Path("one")) == weights(Path("two"))


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[averaging]\nschme = 'uniform'",
         "[averaging]: 'schme' is not known; did you mean 'scheme'?"),
        ("[averging]\ndtype = 'same'", "[averging] is not known; did you mean [averaging]?"),
        ("[zzz]\nx = 1",
         "[zzz] is not known; there are [selection], [averaging], [model], [search], "
         "[landscape], [machine], [output], [push]"),
        ("source = 'runs'", "'source' is not known; did you mean 'sources'?"),
        ("dtype = 'same'", "'dtype' belongs into [averaging]"),
        ("[output]\nschemes = ['uniform']", "[output]: 'schemes' belongs into [averaging]"),
        ("[machine]\nquiet = true",
         "[machine]: 'quiet' is for the command line, not for a recipe"),
        ("averaging = 3", "'averaging' is a whole number (3), expected a section, [averaging]"),
        ("sources = [1]", "'sources' is a list ([1]), expected text, or a list of texts"),
        ("command = 'averag'\n",
         "command: 'averag' is not one that a recipe runs; did you mean 'average'?"),
        ("[selection]\nlast = '3'", "[selection]: 'last' is text ('3'), expected a whole number"),
        ("[selection]\nlast = true",
         "[selection]: 'last' is a boolean (True), expected a whole number"),
        ("[selection]\nlast = 0", "[selection]: 'last': 0 is not in the range x>=1"),
        ("[selection]\nlast = [1, 2]",
         "[selection]: 'last' is a list ([1, 2]), expected a whole number"),
        ("[averaging]\nkeep-prefix = 1",
         "[averaging]: 'keep-prefix' is a whole number (1), expected true or false"),
        ("[averaging]\ndtype = 'float31'",
         "[averaging]: 'dtype': 'float31' is not one of 'same', 'float64', 'float32', 'bfloat16', "
         "'float16'"),
        ("[averaging]\nstate-key = 1979-05-27",
         "[averaging]: 'state-key' is a date or time (datetime.date(1979, 5, 27)), expected text"),
        ("[averaging]\nscheme = 'uniform'\nschemes = ['uniform']",
         "[averaging]: 'schemes' is given twice, also as 'scheme'"),
        ("[machine]\nmemory = 'lots'",
         "[machine]: 'memory': 'lots' is not a size such as 512MiB or 5GB"),
        ("[machine]\nmemory = [1]",
         "[machine]: 'memory' is a list ([1]), expected text or a number"),
        ("[model]\nuntil-converged = nan",
         "[model]: 'until-converged' is a number (nan), expected a number"),
        ("[model]\nmodel-args = { width = inf }",
         "[model]: 'model-args': 'width' is no value that Python can write as a literal"),
        ("[model]\nmodel-arg = { width = 3 }",
         "[model]: 'model-arg' is a table ({'width': 3}), expected text"),
        ("[model]\ncompare = true",
         "[model]: 'compare' is no option of average; did you mean 'compare-bn'?"),
        ("[push]\npush = ['me/swa']", "[push]: 'push' is a list (['me/swa']), expected text"),
        ("[selection]\nlast = 2", "'sources' is missing: no checkpoints are named"),
    ],
)  # fmt: skip
def test_what_does_not_belong_there_is_refused_with_its_place(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = recipe(here, text)
    code, out, err = ckptavg(capsys, "run", file, "-o", "out")
    assert (code, out, err) == (2, "", f"ckptavg: error: {file}: {message}\n")


def test_what_is_missing_is_told_with_its_place(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(here, 'sources = "runs"')
    _, _, err = ckptavg(capsys, "run", file)
    assert err == f"ckptavg: error: {file}: [output]: 'output' is missing\n"
    file = recipe(here, 'command = "recompute-bn"\nsources = "runs"\n[model]\nmodel = "a:b"')
    _, _, err = ckptavg(capsys, "run", file, "-o", "x")
    assert err == f"ckptavg: error: {file}: [model]: 'data' is missing\n"
    file = recipe(here, PLAIN.replace("average", "recompute-bn"))
    _, _, err = ckptavg(capsys, "run", here / "none.toml")
    assert err == f"ckptavg: error: {here}/none.toml: cannot be read: no such file or directory\n"


def test_what_is_no_toml_is_told_with_the_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = ckptavg(capsys, "run", recipe(here, "sources = \n"))
    assert code == 2
    assert "swa.toml: is not TOML: Invalid value (at line 1, column 11)" in err
    (here / "swa.toml").write_bytes(b"\xff\xfe")
    assert "is not TOML" in ckptavg(capsys, "run", here / "swa.toml")[2]


def test_run_refuses_what_the_command_does_not_have(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'command = "recompute-bn"\nsources = "runs/step-1.pt"\n[model]\nmodel="a:b"\ndata="a:b"'
    code, _, err = ckptavg(capsys, "run", recipe(here, text), "-o", "x", "--dry-run")
    assert (code, err) == (
        2, f"ckptavg: error: {here}/swa.toml: recompute-bn has no --dry-run\n"
    )  # fmt: skip


# ---- sections


def runnable() -> dict[str, click.Command]:
    return {
        name: recipe_command({"command": name}, "recipe", cli)[1]
        for name in _COMMANDS
        if name not in ("inspect", "push", "run", "report", "verify")
    }


def test_every_option_of_every_command_is_in_one_section() -> None:
    places = [option for options in SECTIONS.values() for option in options]
    assert len(places) == len(set(places))
    assert set(places).isdisjoint(TALK)
    commands = runnable()
    assert {"average", "recompute-bn"} <= commands.keys()
    known = set[str]()
    for name, command in commands.items():
        keys = set(options_of(command)) - {"help"}
        assert keys <= {*places, *TALK}, f"{name}: give {keys - {*places, *TALK}} a section"
        known |= keys
    assert set(places) <= known, f"no command has {set(places) - known}"


def test_every_command_that_makes_an_output_takes_its_sources_from_one_argument() -> None:
    for command in runnable().values():
        assert len([one for one in command.params if isinstance(one, click.Argument)]) == 1


def test_other_commands_are_not_run_from_recipes() -> None:
    for name in ("inspect", "push", "run", "report", "verify"):
        there = "recipe: command: '{}' is not one that a recipe runs; there are average, recompute"
        with pytest.raises(UsageError, match=there.format(name)):
            recipe_command({"command": name}, "recipe", cli)


def test_plurals_are_no_other_options() -> None:
    singular = {option for options in SECTIONS.values() for option in options}
    for command in runnable().values():
        for option in options_of(command).values():
            if option.multiple:
                assert plural(option_key(option)) not in singular


# ---- calls that are written down


def test_a_saved_recipe_holds_what_was_given_and_does_the_same(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    code, _, err = ckptavg(
        capsys, "average", "runs/step-2.pt", "runs/step-{3..4}.pt", "-o", "swa",
        "--model", "recipe_model:build", "--data", "recipe_model:batches",
        "--model-arg", "width=4", "--model-arg", "inner=(1, None)", "--data-arg", "count=3",
        "--samples", "50", "--until-converged", "0.5", "--memory", "64MiB", "--dtype", "same",
        "--scheme", "uniform:last=2", "--scheme", "x=uniform", "--save-recipe", "swa.toml",
        "--match", "step-[234].pt", "--quiet", "--debug",
    )  # fmt: skip
    assert (code, err) == (0, "")
    text = Path("swa.toml").read_text()
    assert text.startswith("# Written by ckptavg --save-recipe; run it with: ckptavg run swa.toml")
    assert tomllib.loads(text) == {
        "command": "average",
        "sources": ["runs/step-2.pt", "runs/step-{3..4}.pt"],
        "selection": {"match": "step-[234].pt"},
        "averaging": {"schemes": ["uniform:last=2", "x=uniform"]},
        "model": {
            "model": "recipe_model:build",
            "model-args": ["width=4", "inner=(1, None)"],
            "data": "recipe_model:batches",
            "data-args": {"count": 3},
            "samples": 50,
            "until-converged": 0.5,
        },
        "machine": {"memory": "64MiB"},
        "output": {"output": "swa"},
    }
    monkeypatch.chdir(here.parent / "elsewhere")
    assert ckptavg(capsys, "run", here / "swa.toml", "-o", "again")[0] == 0
    for name in ("x", "uniform-last2"):
        assert weights(Path("again", name)) == weights(here / "swa" / name)


def test_a_recipe_saved_elsewhere_leads_back_to_where_it_works(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    (here / "swa.pt").symlink_to("runs/step-1.pt")
    code, _, _ = ckptavg(
        capsys, "recompute-bn", "swa.pt", "-o", "fixed", "--model", "recipe_model:build",
        "--data", "recipe_model:batches", "--save-recipe", "../elsewhere/fix.toml",
    )  # fmt: skip
    assert code == 0
    told = tomllib.loads(Path("../elsewhere/fix.toml").read_text())
    assert told["directory"] == "../project"
    assert (told["command"], told["sources"]) == ("recompute-bn", ["swa.pt"])
    shutil.move(here.parent / "elsewhere", here.parent / "moved")
    monkeypatch.chdir(here.parent)
    assert ckptavg(capsys, "run", "moved/fix.toml", "-o", "again")[0] == 0
    assert weights(Path("again")) == weights(here / "fixed")
    assert ckptavg(capsys, "run", "moved/fix.toml", "--overwrite")[0] == 0


def test_a_recipe_is_written_before_the_work_also_of_a_dry_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(here / "runs")
    assert (
        ckptavg(capsys, "average", runs, "-o", "a", "--dry-run", "--save-recipe", "a.toml")[0] == 0
    )
    assert ckptavg(capsys, "average", "none", "-o", "b", "--save-recipe", "b.toml")[0] == 1
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["a.toml", "b.toml"]
    assert tomllib.loads(Path("b.toml").read_text())["sources"] == ["none"]


def test_nothing_but_a_recipe_is_replaced_and_only_when_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["average", str(here / "runs"), "-o", "a", "--save-recipe", "a.toml", "--dry-run"]
    assert ckptavg(capsys, *call)[0] == 0
    assert ckptavg(capsys, *call)[0] == 0  # it would be the same
    code, _, err = ckptavg(capsys, *call, "--last", "2")
    assert (code, err) == (
        1, "ckptavg: error: a.toml: is there already; pass --overwrite to replace a recipe\n"
    )  # fmt: skip
    assert ckptavg(capsys, *call, "--last", "2", "--overwrite")[0] == 0
    assert tomllib.loads(Path("a.toml").read_text())["selection"] == {"last": 2}
    for content in ("", "a poem", "[tool.ruff]\nline-length = 100\n"):
        Path("a.toml").write_text(content)
        code, _, err = ckptavg(capsys, *call, "--overwrite")
        assert (code, err) == (1, "ckptavg: error: a.toml: is no recipe, so it is not replaced\n")
        assert Path("a.toml").read_text() == content
    code, _, err = ckptavg(capsys, *call[:-2], "no/folder.toml")
    assert code == 1
    assert "no/folder.toml: the recipe cannot be written: no such file or directory" in err


@pytest.mark.promise(11)
def test_tokens_never_end_up_in_a_recipe(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "abcDEF123" * 4
    monkeypatch.setenv("HF_TOKEN", "own-secret")
    ckptavg(
        capsys, "average", str(here / "runs"), "-o", "a", "--dry-run", "--save-recipe", "a.toml",
        "--state-key", token, "--strip-prefix", "own-secret",
    )  # fmt: skip
    text = Path("a.toml").read_text()
    assert token not in text
    assert "own-secret" not in text
    assert "hf_***" in text


def test_a_name_that_is_not_utf8_cannot_be_saved(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"step-\xff.pt")
    shutil.copyfile(here / "runs/step-1.pt", name)
    code, _, err = ckptavg(capsys, "average", name, "-o", "a", "--save-recipe", "a.toml")
    assert code == 2
    assert "cannot be written into a recipe, which is UTF-8" in err
    assert not Path("a.toml").exists()
