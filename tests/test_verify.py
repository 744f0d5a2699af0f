"""An output that was changed is found out; one that was not is made again bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import verify_fixtures
from conftest import tree
from hub_fixtures import REPO, ckptavg
from huggingface_hub import constants
from loopback_hub import LoopbackHub, hub_environment
from loopback_hub.faults import Fault
from safetensors.torch import save_file

from ckptavg import (
    BnPass,
    EvalCommand,
    UsageError,
    VerificationError,
    average_checkpoints,
    verify_output,
)
from ckptavg._version import __version__
from ckptavg.provenance import sealed


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with four checkpoints as model directories, and the code beside them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for step, state in enumerate(verify_fixtures.states(), 1):
        directory = tmp_path / f"step-{step}"
        directory.mkdir()
        save_file(state, directory / "model.safetensors")
        (directory / "config.json").write_text('{"model_type": "net"}')
    shutil.copy(verify_fixtures.__file__, tmp_path / "verify_fixtures.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHARDED: dict[str, Any] = {"max_shard_bytes": 64}


def averaged(name: str = "out", **options: Any) -> Path:
    average_checkpoints("step-[1234]", name, **options)
    return Path(name)


def edit_provenance(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = output / "ckptavg.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_bytes(sealed(f"{json.dumps(told, indent=2)}\n".encode()))


# ---- files


@pytest.mark.parametrize("options", [{}, SHARDED, {"output_format": "torch"}])
def test_an_untouched_output_is_as_written(runs: Path, options: dict[str, Any]) -> None:
    result = verify_output(averaged(**options))
    assert result.ok
    assert (result.problems, result.notes, result.unlisted) == ((), (), ())
    assert {one.state for one in result.files} == {"as written"}
    assert {one.name for one in result.files} == {*tree(Path("out"))} - {"ckptavg.json"}
    assert [one.source for one in result.sources] == [f"step-{step}" for step in (1, 2, 3, 4)]
    assert {one.state for one in result.sources} == {"unchanged"}
    assert result.reproduced is None


def test_the_hashes_hold_after_a_batchnorm_pass(runs: Path) -> None:
    bn_pass = BnPass(model=verify_fixtures.Net, batches=verify_fixtures.batches)
    assert verify_output(averaged(batchnorm=bn_pass, **SHARDED)).ok


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def instead(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


EDITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit of the data": (
        lambda out: flip(out / "model-00001-of-00003.safetensors", -1),
        "model-00001-of-00003.safetensors has other content in its {nbytes} bytes",
    ),
    "one bit of the header": (
        lambda out: flip(out / "model-00002-of-00003.safetensors", 40),
        "model-00002-of-00003.safetensors has other content in its {nbytes} bytes",
    ),
    "an added byte": (
        lambda out: append(out / "model-00002-of-00003.safetensors"),
        "model-00002-of-00003.safetensors has {more} bytes, not the {nbytes} that were written",
    ),
    "a cut file": (
        lambda out: os.truncate(out / "model-00001-of-00003.safetensors", 9),
        "model-00001-of-00003.safetensors has 9 bytes, not the {nbytes} that were written",
    ),
    "a removed shard": (
        lambda out: (out / "model-00003-of-00003.safetensors").unlink(),
        "model-00003-of-00003.safetensors is missing",
    ),
    "an edited index": (
        lambda out: flip(out / "model.safetensors.index.json", 30),
        "model.safetensors.index.json has other content in its {nbytes} bytes",
    ),
    "an edited config": (
        lambda out: (out / "config.json").write_text('{"model_type": "Net"}'),
        "config.json has other content in its {nbytes} bytes",
    ),
    "a directory instead": (
        lambda out: instead(out / "config.json", Path.mkdir),
        "config.json has ",
    ),
    "a pipe instead": (
        lambda out: instead(out / "config.json", os.mkfifo),
        "config.json has 0 bytes, not the {nbytes} that were written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_found(runs: Path, edit: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = averaged(**SHARDED)
    change, message = EDITS[edit]
    name = message.partition(" ")[0]
    nbytes = (output / name).stat().st_size
    change(output)
    result = verify_output(output)
    assert not result.ok
    assert result.problems[0].startswith(message.format(nbytes=nbytes, more=nbytes + 1))
    assert [one.name for one in result.files if one.state != "as written"] == [name]
    code, out, err = ckptavg(capsys, "verify", output)
    assert code == 1
    assert err == f"ckptavg: error: out: {result.problems[0]}\n"
    assert out.splitlines()[-1] == "out: 4 of 5 files as written, 4 sources unchanged"


def test_the_first_problem_is_named_and_all_are_counted(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = averaged(**SHARDED)
    for name in ("model-00001-of-00003.safetensors", "config.json"):
        flip(output / name, 3)
    code, out, err = ckptavg(capsys, "verify", output)
    nbytes = len((output / "config.json").read_bytes())
    assert (code, err) == (
        1,
        f"ckptavg: error: out: config.json has other content in its {nbytes} bytes; 2 problems in "
        "all\n",
    )
    assert len(out.splitlines()) == 3


def test_what_is_there_beside_is_a_note(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = averaged()
    (output / "README.md").write_text("mine")
    (output / "plots").mkdir()
    (output / "plots/a.png").write_text("mine")
    code, out, err = ckptavg(capsys, "verify", output)
    assert (code, out) == (0, "out: 2 files as written, 4 sources unchanged\n")
    assert err == "note: out: not written by ckptavg: README.md, plots/a.png\n"


def test_a_provenance_that_contradicts_the_weights_is_found(runs: Path) -> None:
    for key, value, message in (
        ("scheme", "uniform:last=2",
         "ckptavg.json says scheme uniform:last=2, the header of model.safetensors uniform"),
        ("ckptavg_version", "0.0.1",
         f"ckptavg.json says version 0.0.1, the header of model.safetensors "
         f"{__version__}"),
    ):  # fmt: skip
        output = averaged(f"out-{key}")
        edit_provenance(output, lambda told, key=key, value=value: told.update({key: value}))  # type: ignore[misc]
        assert verify_output(output).problems == (message,)
    output = averaged("out-steps")
    edit_provenance(output, lambda told: told["checkpoints"].pop())
    assert "ckptavg.json says checkpoints 3, the header of" in verify_output(output).problems[0]


def test_what_cannot_be_verified_fails_in_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = averaged()
    edit_provenance(output, lambda told: told["output"].pop("files"))
    average_checkpoints("step-[12]", "several", schemes=["uniform", "uniform:last=1"])
    Path("broken").mkdir()
    Path("broken/ckptavg.json").write_text("{")
    edit_provenance(averaged("older"), lambda told: told.pop("reproduce"))
    version = __version__
    for name, message in (
        ("out", f"out: was written by ckptavg {version}, which recorded no hashes: it cannot be "
                "verified"),
        ("none", "none: is not there"),
        ("step-1", "step-1: holds no ckptavg.json, which says what to compare with"),
        ("broken", "broken/ckptavg.json: is not valid JSON"),
        ("older", "older: its ckptavg.json makes no sense: it was changed by hand, or is of "
                  "another version"),
    ):  # fmt: skip
        assert ckptavg(capsys, "verify", name) == (1, "", f"ckptavg: error: {message}\n")


@pytest.mark.parametrize("name", ["../step-1/config.json", "/etc/hostname", "", 3, None])
def test_a_list_that_leads_elsewhere_is_refused(runs: Path, name: object) -> None:
    output = averaged()
    edit_provenance(output, lambda told: told["output"]["files"][0].update(name=name))
    with pytest.raises(VerificationError, match="its ckptavg.json makes no sense"):
        verify_output(output)


def test_several_outputs_are_verified_in_one_go(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average_checkpoints("step-[12]", "several", schemes=["a=uniform", "b=uniform:last=1"])
    assert ckptavg(capsys, "verify", "several") == ckptavg(
        capsys, "verify", *sorted(map(str, Path("several").iterdir()))
    )
    code, out, _ = ckptavg(capsys, "verify", "several/a", "several/b")
    assert (code, out) == (
        0,
        "several/a: 2 files as written, 2 sources unchanged\n"
        "several/b: 2 files as written, 1 source unchanged\n",
    )
    flip(Path("several/b/config.json"), 0)
    code, out, err = ckptavg(capsys, "verify", "several/a", "several/b", "--json")
    assert code == 1
    assert [one["ok"] for one in json.loads(out)] == [True, False]
    assert err.startswith("ckptavg: error: several/b: config.json has other content")


# ---- sources


def test_sources_that_changed_fail_and_those_that_are_gone_do_not(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = averaged()
    shutil.rmtree("step-1")
    code, out, err = ckptavg(capsys, "verify", output)
    assert (code, out) == (0, "out: 2 files as written, 3 of 4 sources unchanged, 1 missing\n")
    assert err == "note: out: the source step-1 is not there any more\n"
    os.utime("step-2/model.safetensors")
    append(Path("step-3/model.safetensors"))
    nbytes = Path("step-3/model.safetensors").stat().st_size
    assert verify_output(output).problems == (
        "the source step-2 was written again since it was read",
        f"the source step-3 has changed: {nbytes} bytes, {nbytes - 1} when it was read",
    )
    assert ckptavg(capsys, "verify", output)[0] == 1


def test_an_output_is_verified_from_anywhere_also_after_all_was_moved(
    runs: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged("outputs/swa")
    place = tmp_path_factory.mktemp("place") / "moved"
    shutil.move(runs, place)
    monkeypatch.chdir(place.parent)
    result = verify_output(place / "outputs/swa", reproduce=True)
    assert result.ok
    assert {one.state for one in result.sources} == {"unchanged"}


def on_the_hub(hub: LoopbackHub, tmp_path: Path, **options: Any) -> Path:
    output = tmp_path / "out"
    average_checkpoints([f"{REPO}@step1", f"{REPO}@step2"], output, **options)
    return output


def test_revisions_on_the_hub_are_compared_by_commit_and_hash(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    output = on_the_hub(hub, tmp_path)
    hub.commit(REPO, "step2", {"model-00001-of-00003.safetensors": b"trained on"}, "go on")
    result = verify_output(output)
    assert (result.ok, {one.state for one in result.sources}) == (True, {"unchanged"})

    def other_hash(told: dict[str, Any]) -> None:
        told["checkpoints"][1]["files"][0]["digest"] = "sha256:" + "0" * 64

    edit_provenance(output, other_hash)
    assert verify_output(output).problems == (
        f"the source {REPO}@step2 has another model-00001-of-00003.safetensors on the Hub",
    )


def test_a_commit_that_is_gone_is_told_and_a_hub_that_is_away_is_passed_over(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = on_the_hub(hub, tmp_path)
    before = (output / "ckptavg.json").read_text()

    def other_commit(told: dict[str, Any]) -> None:
        told["checkpoints"][0]["hub"]["commit"] = "1" * 40
        for file in told["checkpoints"][0]["files"]:
            file["path"] = file["path"].replace(hub.branches(REPO)["step1"], "1" * 40)

    edit_provenance(output, other_commit)
    result = verify_output(output)
    assert result.ok
    assert [one.state for one in result.sources] == ["missing", "unchanged"]
    assert f"the source {REPO}@step1 is not on the Hub any more" in result.notes[0]
    (output / "ckptavg.json").write_text(before)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = verify_output(output)
    assert result.ok
    assert [one.reason for one in result.sources] == ["was not checked: HF_HUB_OFFLINE is set"] * 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.inject(Fault("GET /api/", status=500, times=10**6))
    result = verify_output(output)
    assert result.ok
    assert {one.state for one in result.sources} == {"not checked"}


def test_files_that_came_from_the_cache_are_compared_with_the_hub(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    output = on_the_hub(hub, tmp_path, cache=True)
    shutil.rmtree(constants.HF_HUB_CACHE)
    result = verify_output(output)
    assert [one.state for one in result.sources] == ["unchanged"] * 2


# ---- reproduction


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "schemes": "late=uniform:last=2"},
        {**SHARDED, "coefficients": [0.1, 0.2, 0.3, 0.4]},
        {"output_format": "torch", "accumulate": "float32"},
    ],
)
def test_an_output_is_made_again_bit_for_bit(runs: Path, options: dict[str, Any]) -> None:
    output = averaged(**options)
    before = tree(runs)
    result = verify_output(output, reproduce=True)
    assert result.ok
    assert result.reproduced is not None
    assert [one.name for one in result.reproduced] == [one.name for one in result.files]
    assert all(one.is_identical for one in result.reproduced)
    assert tree(runs) == before


def test_one_of_several_outputs_is_made_again_alone(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged("several", schemes=["uniform:last=2", "uniform"])
    code, out, _ = ckptavg(capsys, "verify", "several/uniform-last2", "--reproduce")
    assert (code, out) == (
        0,
        "several/uniform-last2: config.json: made again, identical\n"
        "several/uniform-last2: model.safetensors: made again, identical\n"
        "several/uniform-last2: 2 files as written, 2 sources unchanged, reproduced bit for bit\n",
    )
    assert sorted(path.name for path in Path("several").iterdir()) == ["uniform", "uniform-last2"]


def test_a_batchnorm_pass_is_made_again_with_the_code_if_that_is_trusted(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = ckptavg(
        capsys, "average", "step-[1234]", "-o", "out", "--model", "verify_fixtures:Net",
        "--data", "verify_fixtures:batches", "--data-arg", "count=3",
        "--forward", "verify_fixtures:forward", "--eval", "verify_fixtures:accuracy",
        "--compare-bn", "--seed", "0", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    code, out, err = ckptavg(capsys, "verify", "out", "--reproduce")
    assert (code, out) == (2, "")
    assert err == (
        "ckptavg: error: out: making it again would run verify_fixtures:Net, "
        f"verify_fixtures:batches, verify_fixtures:forward, found from {runs}; pass --trust-code "
        "if that code is yours\n"
    )
    code, out, _ = ckptavg(capsys, "verify", "out", "--reproduce", "--trust-code")
    assert code == 0
    assert out.endswith("reproduced bit for bit\n")


def test_code_in_a_provenance_is_never_run_without_trust(runs: Path) -> None:
    def plant(told: dict[str, Any]) -> None:
        told["reproduce"]["model"] = {"model": "os:system", "data": "os:getcwd"}

    output = averaged()
    edit_provenance(output, plant)
    assert verify_output(output).ok
    with pytest.raises(UsageError, match="would run os:system, os:getcwd"):
        verify_output(output, reproduce=True)


def test_what_a_provenance_says_of_pushing_and_judging_is_not_done(runs: Path) -> None:
    def plant(told: dict[str, Any]) -> None:
        told["reproduce"]["push"] = {"push": "me/stolen"}
        told["reproduce"]["output"] |= {"output": "step-1", "overwrite": True}
        told["reproduce"]["machine"] = {"device": "cpu", "cache": True}

    output = averaged()
    edit_provenance(output, plant)
    before = tree(runs / "step-1")
    assert verify_output(output, reproduce=True).ok
    assert tree(runs / "step-1") == before


def test_an_edited_weight_file_is_told_by_its_tensors(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = averaged()
    flip(output / "model.safetensors", -1)
    code, out, err = ckptavg(capsys, "verify", output, "--reproduce")
    assert code == 1
    assert "out: model.safetensors: 'norm.weight' differs in 1 of 4 elements\n" in out
    assert out.endswith("1 of 2 files as written, 4 sources unchanged, not reproduced\n")
    assert err.startswith("ckptavg: error: out: model.safetensors has other content")
    flip(output / "model.safetensors", -1)
    flip(output / "config.json", 3)
    result = verify_output(output, reproduce=True)
    assert result.reproduced is not None
    (config,) = (one for one in result.reproduced if not one.is_identical)
    assert (config.name, config.reason) == ("config.json", "differs")


def test_code_that_changed_is_told_by_the_tensors_that_differ(runs: Path) -> None:
    Path("changing.py").write_text(
        "import torch\nfrom verify_fixtures import Net\n"
        "def data():\n    return [torch.full((4, 3), float(i)) for i in range(SIZE)]\n"
        "SIZE = 3\n"
    )
    subprocess.run(
        [
            sys.executable, "-m", "ckptavg", "average", "step-[12]", "-o", "out", "--quiet",
            "--model", "changing:Net", "--data", "changing:data",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    Path("changing.py").write_text(Path("changing.py").read_text().replace("SIZE = 3", "SIZE = 4"))
    result = verify_output("out", reproduce=True, trust_code=True)
    assert result.reproduced is not None
    (weights,) = (one for one in result.reproduced if not one.is_identical)
    assert {one.name for one in weights.differing} == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    assert result.problems == (
        "model.safetensors came out otherwise: 'norm.num_batches_tracked' in 1 of 1 elements, and "
        "2 more tensors",
    )
    assert "data that is shuffled without --seed differs from run to run" in result.notes


def test_obstacles_and_changed_sources_keep_it_from_being_made_again(runs: Path) -> None:
    output = averaged(
        batchnorm=BnPass(model=lambda: verify_fixtures.Net(), batches=verify_fixtures.batches)
    )
    shutil.rmtree("step-1")
    os.utime("step-2/model.safetensors")
    result = verify_output(output, reproduce=True, trust_code=True)
    assert result.reproduced is None
    assert result.problems == (
        "it was not made again: model is a lambda, which cannot be imported by its name",
        "it was not made again: the source step-1 is not there any more",
        "the source step-2 was written again since it was read",
    )


def test_copied_sources_are_told_apart_from_changed_ones_by_making_it_again(runs: Path) -> None:
    output = averaged()
    os.utime("step-2/model.safetensors")
    assert verify_output(output).problems == (
        "the source step-2 was written again since it was read",
    )
    result = verify_output(output, reproduce=True)
    assert result.ok
    assert "the source step-2 was written again since it was read" in result.notes
    flip(Path("step-2/model.safetensors"), -1)
    result = verify_output(output, reproduce=True)
    assert any("came out otherwise" in problem for problem in result.problems)


def test_weights_without_a_hash_are_a_problem(runs: Path) -> None:
    output = averaged()
    flip(output / "model.safetensors", -1)
    edit_provenance(output, lambda told: told["output"].update(files=[]))
    assert "model.safetensors is not vouched for: ckptavg.json lists no hash of it" in (
        verify_output(output).problems
    )
    (output / "other.safetensors").write_bytes(b"")
    assert any("other.safetensors" in problem for problem in verify_output(output).problems)


def test_another_version_is_a_note(runs: Path) -> None:
    output = averaged(output_format="torch")  # its file names no version
    edit_provenance(output, lambda told: told.update(ckptavg_version="0.0.1"))
    result = verify_output(output, reproduce=True)
    assert result.ok
    assert result.notes == (f"it was written by ckptavg 0.0.1, this is {__version__}",)


def test_a_recipe_that_fails_is_told_in_one_line_and_leaves_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = averaged(schemes="uniform:last=2")
    shutil.rmtree("step-1")  # it went in with 0, and is asked for all the same
    code, out, err = ckptavg(capsys, "verify", output, "--reproduce")
    assert (code, out) == (1, "")
    assert err == (
        "ckptavg: error: out: its recipe cannot be run again: step-1: no such file or directory; "
        "did you mean step-4?\n"
    )
    assert sorted(path.name for path in runs.iterdir() if path.name.startswith(".")) == []


def test_a_revision_on_the_hub_is_made_again(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = on_the_hub(hub, tmp_path)
    hub.commit(REPO, "step2", {"model-00001-of-00003.safetensors": b"trained on"}, "go on")
    for name, value in hub_environment(hub, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    result = verify_output(output, reproduce=True)
    assert result.ok
    assert result.reproduced is not None


def test_an_interrupt_leaves_nothing_behind(runs: Path) -> None:
    Path("slow.py").write_text(
        "import time, torch\nfrom verify_fixtures import Net\n"
        "def data():\n"
        "    from pathlib import Path\n"
        "    if Path('wait').exists():\n"
        "        Path('waiting').touch()\n"
        "        time.sleep(60)\n"
        "    return [torch.ones(4, 3), torch.zeros(4, 3)]\n"
    )
    call = [sys.executable, "-m", "ckptavg"]
    subprocess.run(
        [*call, "average", "step-[12]", "-o", "out", "--model", "slow:Net", "--data", "slow:data"],
        check=True, capture_output=True,
    )  # fmt: skip
    Path("wait").touch()
    process = subprocess.Popen(
        [*call, "verify", "out", "--reproduce", "--trust-code"], stderr=subprocess.PIPE, text=True
    )
    while not Path("waiting").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert list(runs.glob("out.verify-*"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "ended by SIGTERM" in err
    assert not list(runs.glob("out.verify-*"))


def test_options_that_need_reproduce_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = ckptavg(capsys, "verify", "out", "--trust-code")
    assert code == 2
    assert "--trust-code and --device belong to --reproduce" in err


# ---- what came of a search, or is one of many


def test_the_winner_of_a_sweep_is_made_again_as_an_average_of_its_own(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [
        "sweep", "step-[1234]", "--scheme", "uniform:last=1..3", "--scheme", "median",
        "--model", "verify_fixtures:Net", "--data", "verify_fixtures:batches",
        "--eval", "verify_fixtures:accuracy", "--mode", "max", "--no-singles", "--quiet",
    ]  # fmt: skip
    code, _, err = ckptavg(capsys, *call, "-o", "best", "--save-recipe", "search.toml")
    assert (code, err) == (0, "")
    result = verify_output("best", reproduce=True, trust_code=True)
    assert result.ok
    assert {"sweep.json", "sweep.csv"} <= {one.name for one in result.files}
    assert result.reproduced is not None
    assert [one.name for one in result.reproduced] == ["config.json", "model.safetensors"]
    told = json.loads(Path("best/ckptavg.json").read_text())["reproduce"]
    assert (told["command"], told["averaging"]["scheme"]) == ("average", "uniform:last=1")
    assert ckptavg(capsys, "run", "search.toml", "-o", "again", "--quiet")[0] == 0
    assert (Path("again/model.safetensors").read_bytes()) == (
        Path("best/model.safetensors").read_bytes()
    )
    assert ckptavg(capsys, *call, "-o", "all", "--keep", "all")[0] == 0
    assert verify_output("all/median").ok


def test_an_average_that_a_command_judged_is_made_again_without_it(runs: Path) -> None:
    output = averaged(
        batchnorm=BnPass(evaluate=EvalCommand("echo 1 > /dev/stderr; echo 2 #{model}"))
    )
    told = json.loads((output / "ckptavg.json").read_text())["reproduce"]
    assert told["model"] == {"eval-command": "echo 1 > /dev/stderr; echo 2 #{model}"}
    assert verify_output(output, reproduce=True).ok


def test_one_sample_of_many_is_made_again(runs: Path) -> None:
    averaged("samples", schemes=["x=swag:samples=2,rank=2", "uniform"])
    result = verify_output("samples/x-sample-02", reproduce=True)
    assert result.ok
    assert result.reproduced is not None
    (other,) = averaged("alone", schemes="swag:samples=2,rank=2").glob("sample-02")
    assert (other / "model.safetensors").read_bytes() == (
        Path("samples/x-sample-02/model.safetensors").read_bytes()
    )
    assert verify_output(other, reproduce=True).ok
