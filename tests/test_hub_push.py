"""What is pushed arrives on the Hub as it is here: in one commit, and once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import tree
from hub_fixtures import REPO, ckptavg, save_steps
from loopback_hub import LoopbackHub, hub_environment
from safetensors.torch import load_file, save_file
from torch import nn

from ckptavg import average_checkpoints, push_model
from ckptavg.errors import CkptavgError, UsageError

# huggingface_hub uploads files with a deprecated argument of its HTTP client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

TARGET = "tester/swa"
NOTES = "## Notes\n\nTrained on a laptop.\n"


@pytest.fixture
def swa(hub: LoopbackHub, tmp_path: Path) -> Path:
    """An average of two local checkpoints, in one weight file."""
    average_checkpoints(save_steps(tmp_path / "local", (1, 2)), tmp_path / "swa")
    return tmp_path / "swa"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Text for a card."""
    path = tmp_path / "notes.md"
    path.write_text(NOTES)
    return path


def published(hub: LoopbackHub, revision: str = "main", repo: str = TARGET) -> dict[str, bytes]:
    """Return the files of a repository, without what the Hub itself puts there."""
    files = hub.files(repo, revision)
    del files[".gitattributes"]
    return files


def card(hub: LoopbackHub, revision: str = "main") -> str:
    """Return the model card of what was pushed."""
    return published(hub, revision)["README.md"].decode()


def check_arrived(hub: LoopbackHub, directory: Path, revision: str = "main") -> None:
    """Check that all files of a directory are there byte for byte, and a card besides."""
    there = published(hub, revision)
    assert there.pop("README.md").startswith(b"---\n")
    assert there == tree(directory)


def titles(hub: LoopbackHub, revision: str = "main") -> list[str]:
    """Return the titles of the commits after the first, newest first."""
    return [commit.title for commit in hub.commits(TARGET, revision)[:-1]]


# what arrives


def test_a_model_arrives_byte_for_byte_with_a_card(hub: LoopbackHub, swa: Path) -> None:
    before = tree(swa)
    pushed = push_model(swa, TARGET)
    check_arrived(hub, swa)
    assert tree(swa) == before
    assert pushed.changed
    assert (pushed.repo, pushed.revision) == (TARGET, "main")
    assert pushed.commit == hub.branches(TARGET)["main"]
    assert pushed.url == f"{hub.url}/{TARGET}"
    assert titles(hub) == ["Average of 2 checkpoints (uniform)"]


def test_the_command_line_pushes_a_directory(
    hub: LoopbackHub, swa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ckptavg(capsys, "push", swa, TARGET, "--message", "the last two")
    check_arrived(hub, swa)
    head = hub.branches(TARGET)["main"]
    assert (code, err) == (0, "")
    assert out == f"{TARGET}@main: pushed, commit {head}; {hub.url}/{TARGET}\n"
    assert titles(hub) == ["the last two"]


def test_an_average_of_revisions_is_pushed_when_it_is_done(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ckptavg(
        capsys, "average", f"{REPO}@step*", "-o", tmp_path / "out", "--push", TARGET, "--quiet"
    )
    assert (code, err) == (0, "")
    check_arrived(hub, tmp_path / "out")
    assert out.splitlines()[-1].startswith(f"{TARGET}@main: pushed, commit ")
    assert f"base_model: {REPO}\n" in card(hub)


def test_a_model_with_new_statistics_is_pushed_when_it_is_done(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "pushed_model.py").write_text(
        "import torch\n"
        "def build(): return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))\n"
        "batches = [torch.ones(4, 2), torch.zeros(4, 2)]\n"
    )
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    save_file(model.state_dict(), tmp_path / "one.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, err = ckptavg(
        capsys, "recompute-bn", tmp_path / "one.safetensors", "-o", tmp_path / "out",
        "--model", "pushed_model:build", "--data", "pushed_model:batches", "--push", TARGET,
        "--private", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    check_arrived(hub, tmp_path / "out")
    assert "BatchNorm statistics of 1 layers recomputed over 8 samples" in card(hub)


def test_a_torch_file_replaces_safetensors_and_is_read_again(
    hub: LoopbackHub, swa: Path, tmp_path: Path
) -> None:
    push_model(swa, TARGET)
    average_checkpoints(tmp_path / "swa", tmp_path / "torch", output_format="torch")
    push_model(tmp_path / "torch", TARGET)
    check_arrived(hub, tmp_path / "torch")
    assert 'torch.load("model.pt", weights_only=True)' in card(hub)
    average_checkpoints(f"{TARGET}@main", tmp_path / "again")
    assert tree(tmp_path / "again")["model.safetensors"]
    expected = load_file(swa / "model.safetensors")
    found = load_file(tmp_path / "again/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    push_model(swa, TARGET)
    check_arrived(hub, swa)
    assert "torch.load" not in card(hub)


def test_a_repository_is_private_when_asked(hub: LoopbackHub, swa: Path) -> None:
    push_model(swa, TARGET, private=True)
    push_model(swa, "tester/open")
    found = {repo: huggingface_hub.HfApi(endpoint=hub.url).model_info(repo).private
             for repo in (TARGET, "tester/open")}  # fmt: skip
    assert found == {TARGET: True, "tester/open": False}


def test_a_repository_that_is_there_is_used_and_stays_as_private_as_it_was(
    hub: LoopbackHub, swa: Path
) -> None:
    hub.create(TARGET, private=True)
    hub.commit(TARGET, "main", {"LICENSE": b"mine", "samples/a.wav": b"sound"}, "by hand")
    push_model(swa, TARGET)
    there = published(hub)
    assert (there["LICENSE"], there["samples/a.wav"]) == (b"mine", b"sound")
    assert titles(hub) == ["Average of 2 checkpoints (uniform)", "by hand"]
    assert huggingface_hub.HfApi(endpoint=hub.url).model_info(TARGET).private


def test_weights_that_were_there_before_go_in_the_same_commit(hub: LoopbackHub, swa: Path) -> None:
    hub.create(TARGET)
    stale = [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
    ]  # fmt: skip
    kept = ["notes.txt", "onnx/model.onnx", "checkpoint-5/model-00001-of-00002.safetensors"]
    hub.commit(TARGET, "main", {name: name.encode() for name in [*stale, *kept]}, "old")
    push_model(swa, TARGET, message="new")
    assert titles(hub) == ["new", "old"]
    assert set(published(hub)) == {*tree(swa), "README.md", *kept}


def test_a_sharded_model_replaces_a_single_file(
    hub: LoopbackHub, swa: Path, tmp_path: Path
) -> None:
    push_model(swa, TARGET)
    sources = sorted((tmp_path / "local").iterdir())
    average_checkpoints(sources, tmp_path / "sharded", max_shard_bytes=40_000)
    push_model(tmp_path / "sharded", TARGET)
    check_arrived(hub, tmp_path / "sharded")
    assert "model.safetensors" not in published(hub)
    assert len(titles(hub)) == 2


# once


def test_pushing_what_is_there_makes_no_commit_and_says_so(
    hub: LoopbackHub, swa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = push_model(swa, TARGET)
    again = push_model(swa, TARGET)
    assert (again.changed, again.commit) == (False, first.commit)
    _, out, _ = ckptavg(capsys, "push", swa, TARGET)
    assert out.startswith(f"{TARGET}@main: is there already, commit {first.commit}; ")
    assert len(titles(hub)) == 1
    assert hub.count("POST", "/commit/") == 1


def test_a_changed_file_is_all_that_is_sent(hub: LoopbackHub, swa: Path) -> None:
    push_model(swa, TARGET)
    hub.requests.clear()
    (swa / "tokenizer.json").write_text('{"version": "2.0"}')
    assert push_model(swa, TARGET).changed
    check_arrived(hub, swa)
    assert hub.count("PUT") == 0
    assert len(titles(hub)) == 2


# where to


def test_a_branch_is_made_or_moved_on(hub: LoopbackHub, swa: Path, tmp_path: Path) -> None:
    first = push_model(swa, TARGET, revision="last2")
    assert (first.revision, first.url) == ("last2", f"{hub.url}/{TARGET}/tree/last2")
    check_arrived(hub, swa, "last2")
    assert published(hub) == {}
    average_checkpoints(tmp_path / "local" / "step2", tmp_path / "other")
    assert push_model(tmp_path / "other", TARGET, revision="last2").changed
    check_arrived(hub, tmp_path / "other", "last2")
    assert len(titles(hub, "last2")) == 2
    assert titles(hub) == []


def test_a_branch_of_what_is_on_main_needs_no_commit(hub: LoopbackHub, swa: Path) -> None:
    first = push_model(swa, TARGET)
    second = push_model(swa, TARGET, revision="same")
    assert not second.changed
    assert hub.branches(TARGET)["same"] == first.commit


def test_a_pull_request_leaves_main_alone(
    hub: LoopbackHub, swa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.create(TARGET)
    code, out, _ = ckptavg(capsys, "push", swa, TARGET, "--create-pr", "--message", "try this")
    assert code == 0
    assert out.startswith(f"{TARGET}@refs/pr/1: pushed, commit ")
    assert out.endswith(f"; {hub.url}/{TARGET}/discussions/1\n")
    check_arrived(hub, swa, "refs/pr/1")
    assert titles(hub, "refs/pr/1") == ["try this"]
    assert published(hub) == {}


def test_several_averages_go_to_a_branch_each(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = ckptavg(
        capsys, "average", *steps, "-o", tmp_path / "out", "--scheme", "uniform:last=2",
        "--scheme", "all=uniform", "--push", TARGET, "--json",
    )  # fmt: skip
    assert code == 0
    for name in ("uniform-last2", "all"):
        check_arrived(hub, tmp_path / "out" / name, name)
    assert published(hub) == {}
    branches = hub.branches(TARGET)
    assert json.loads(out)["pushed"] == [
        {
            "repo": TARGET, "revision": name, "commit": branches[name],
            "url": f"{hub.url}/{TARGET}/tree/{name}", "changed": True,
        }
        for name in ("uniform-last2", "all")
    ]  # fmt: skip


def test_one_average_goes_to_the_branch_that_was_named(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = ckptavg(
        capsys, "average", *steps, "-o", tmp_path / "out", "--push", f"{TARGET}@dev", "--json"
    )
    assert code == 0
    check_arrived(hub, tmp_path / "out", "dev")
    (pushed,) = json.loads(out)["pushed"]
    assert (pushed["revision"], pushed["commit"]) == ("dev", hub.branches(TARGET)["dev"])


def test_json_tells_the_same_without_a_push(
    steps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = ckptavg(capsys, "average", *steps, "-o", tmp_path / "out", "--json")
    assert json.loads(out)["pushed"] == []


# own words


def test_an_own_card_is_published_as_it_is(hub: LoopbackHub, swa: Path) -> None:
    own = "---\nlicense: mit\n---\r\n# Mine\n\ttabs and ünïcode"
    (swa / "README.md").write_bytes(own.encode())
    push_model(swa, TARGET)
    assert published(hub) == tree(swa)


@pytest.mark.parametrize("own", [None, "---\nlicense: mit\n---\n# Mine\n"])
def test_text_is_appended_to_the_card_once(
    hub: LoopbackHub, swa: Path, notes: Path, own: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if own is not None:
        (swa / "README.md").write_text(own)
    for _ in range(2):
        assert ckptavg(capsys, "push", swa, TARGET, "--card", notes)[0] == 0
    assert card(hub).endswith(f"\n\n{NOTES}")
    assert card(hub).count(NOTES) == 1
    assert len(titles(hub)) == 1
    if own is not None:
        (swa / "README.md").write_text(card(hub))  # as one who edits the published card does
        assert ckptavg(capsys, "push", swa, TARGET, "--card", notes)[0] == 0
        assert card(hub).count(NOTES) == 1


# back again


def test_what_was_pushed_is_pulled_back_bit_for_bit(
    hub: LoopbackHub, swa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed = push_model(swa, TARGET, revision="last2")
    code, out, _ = ckptavg(capsys, "inspect", f"{TARGET}@last2")
    assert (code, pushed.commit[:12] in out) == (0, True)
    average_checkpoints(f"{TARGET}@last2", tmp_path / "again")
    again, first = (load_file(one / "model.safetensors") for one in (tmp_path / "again", swa))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    told = json.loads((tmp_path / "again" / "ckptavg.json").read_text())
    assert told["checkpoints"][0]["hub"]["commit"] == pushed.commit
    assert told["checkpoints"][0]["made_by_ckptavg"]["n_sources"] == 2
    pulled = huggingface_hub.snapshot_download(
        TARGET, revision="last2", endpoint=hub.url, local_dir=tmp_path / "pulled"
    )
    for name, content in published(hub, "last2").items():
        assert (Path(pulled) / name).read_bytes() == content, name


def test_transformers_loads_what_was_pushed(hub: LoopbackHub, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    for step in (1, 2):
        torch.manual_seed(step)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt" / f"step{step}")
    average_checkpoints(sorted((tmp_path / "gpt").iterdir()), tmp_path / "out")
    push_model(tmp_path / "out", TARGET, revision="last2")
    assert "library_name: transformers\n" in card(hub, "last2")
    script = (
        "import sys, transformers; transformers.GPT2LMHeadModel.from_pretrained(sys.argv[1], "
        "revision='last2').save_pretrained(sys.argv[2])"
    )
    run_python(hub, tmp_path, "-c", script, TARGET, str(tmp_path / "loaded"))
    loaded, local = (
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name).state_dict()
        for name in ("loaded", "out")
    )
    assert all(torch.equal(loaded[name], value) for name, value in local.items())


@pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="needs the package hf_xet")
def test_a_push_through_xet_arrives(swa: Path, tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "xet hub", xet=True) as hub:
        arguments = ["-m", "ckptavg", "push", str(swa), TARGET]
        assert ": pushed, commit" in run_python(hub, tmp_path, *arguments)
        check_arrived(hub, swa)
        assert "is there already" in run_python(hub, tmp_path, *arguments)
        assert len(titles(hub)) == 1
        assert hub.count("PUT") == 0


def run_python(hub: LoopbackHub, folder: Path, *arguments: str) -> str:
    """Run Python with the hub in its environment; return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **hub_environment(hub, folder / "other home")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# what is not pushed


def refused(swa: Path, repo: str = TARGET, **options: Any) -> str:
    """Return why a push is refused; nothing is asked of the Hub."""
    with pytest.raises(CkptavgError) as caught:
        push_model(swa, repo, **options)
    assert type(caught.value) is UsageError
    return str(caught.value)


@pytest.mark.parametrize("repo", ["swa", "a/b/c", "a/b@dev", "hf://a/b@dev", "../b", "", "a/b c"])
def test_only_a_repository_is_pushed_to(hub: LoopbackHub, swa: Path, repo: str) -> None:
    assert refused(swa, repo) == f"{repo}: is not of the form org/name"
    assert hub.requests == []


def test_a_pull_request_and_a_branch_exclude_each_other(hub: LoopbackHub, swa: Path) -> None:
    message = "a pull request is made against main: leave out the revision"
    assert refused(swa, create_pr=True, revision="dev") == message
    assert hub.requests == []
