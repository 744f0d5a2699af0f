"""The cache of huggingface_hub: filled where asked for, used where it can be, enough offline."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hub_fixtures import REPO, SIDE_FILES, ckptavg, model_files, upload
from huggingface_hub import constants, hf_hub_download, snapshot_download
from loopback_hub import Fault, LoopbackHub

from ckptavg import average_checkpoints
from ckptavg.errors import HubError

SOURCES = f"{REPO}@step*"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where the cache keeps the repository, once it does."""
    return tmp_path / "home" / "hub" / "models--org--model"


def go_offline(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the network off, and the Hub, too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()


def same_as_copies(output: Path, local: Sequence[Path]) -> None:
    """Check that an average has the files of one of local copies."""
    copies = output.with_name(f"{output.name}-copies")
    average_checkpoints(local, copies)
    assert model_files(output) == model_files(copies)


def tensors_in(output: Path) -> bytes:
    """Return what follows the header of a model's only weight file."""
    content = (output / "model.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def cached_names(cache: Path) -> set[str]:
    """Return the names of all files that the cache holds at any commit."""
    return {path.name for path in (cache / "snapshots").rglob("*") if path.is_file()}


def test_whole_files_go_into_the_cache_and_come_from_it(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, cache: Path
) -> None:
    average_checkpoints(SOURCES, tmp_path / "first", cache=True)
    same_as_copies(tmp_path / "first", steps)
    weights = {path.name for path in steps[0].glob("model*")}
    wanted = {Path(name).name for name in SIDE_FILES} - {"optimizer.pt"}
    assert cached_names(cache) == weights | wanted
    for options in ({"cache": True}, {"cache": False}):
        hub.requests.clear()
        name = f"again-{options['cache']}"
        average_checkpoints(SOURCES, tmp_path / name, cache=options["cache"])
        same_as_copies(tmp_path / name, steps)
        assert hub.find("GET", "", "cdn") == []
        assert hub.find("GET", "/resolve/") == hub.find("HEAD") == []
    told = json.loads((tmp_path / "first" / "ckptavg.json").read_text())["checkpoints"]
    assert [one["hub"]["commit"] for one in told] == [
        hub.branches(REPO)[f"step{step}"] for step in (1, 2, 10)
    ]


def test_files_that_others_put_there_are_used(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, cache: Path
) -> None:
    shard = "model-00002-of-00003.safetensors"
    hf_hub_download(REPO, shard, revision="step2")
    before = cached_names(cache)
    hub.requests.clear()
    average_checkpoints(SOURCES, tmp_path / "out")
    same_as_copies(tmp_path / "out", steps)
    commit = hub.branches(REPO)["step2"]
    assert hub.count("HEAD", f"/{commit}/{shard}") == 0
    assert hub.count("HEAD", f"/{commit}/model-") == 2
    assert cached_names(cache) == before  # nothing more was put there


def test_what_was_cached_is_enough_offline(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average_checkpoints(SOURCES, tmp_path / "online", cache=True)
    commits = [hub.branches(REPO)[f"step{step}"] for step in (1, 2, 10)]
    go_offline(hub, monkeypatch)
    for number, sources in enumerate((SOURCES, f"{REPO}@step{{1,2,10}}")):
        average_checkpoints(sources, tmp_path / f"{number}")
        assert model_files(tmp_path / f"{number}") == model_files(tmp_path / "online")
    average_checkpoints([f"{REPO}@{commit}" for commit in commits], tmp_path / "commits")
    # their names tell no steps for the header
    assert tensors_in(tmp_path / "commits") == tensors_in(tmp_path / "online")
    assert hub.requests == []


def test_a_snapshot_of_another_tool_is_enough_offline(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in steps:
        snapshot_download(REPO, revision=directory.name)
    upload(hub, steps[0], "main", "run/step1/")
    snapshot_download(REPO)
    go_offline(hub, monkeypatch)
    average_checkpoints(SOURCES, tmp_path / "out")
    same_as_copies(tmp_path / "out", steps)
    average_checkpoints(f"{REPO}@main/run/step*", tmp_path / "inside")
    same_as_copies(tmp_path / "inside", steps[:1])
    assert hub.requests == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/other@main", "org/other: is not in the cache, and HF_HUB_OFFLINE is set"),
        (f"{REPO}@step10", f"{REPO}@step10: no such branch or tag; there are 1, for example step1"),
        (f"{REPO}@{'0' * 40}",
         f"{REPO}@{'0' * 40}: is not in the cache, and HF_HUB_OFFLINE is set"),
        (f"{REPO}@refs/pr/1", f"{REPO}@refs/pr/1: is not in the cache, and HF_HUB_OFFLINE is set"),
        (f"{REPO}@step1~1", f"{REPO}@step1~1: the cache does not hold the history of step1"),
        (f"{REPO}@step1/sub", f"{REPO}@step1/sub: is not in the cache, and HF_HUB_OFFLINE is set"),
        (f"{REPO}@step1", f"{REPO}@step1: the shard model-00001-of-00003.safetensors is missing; "
         "model.safetensors.index.json lists 3 shards"),
    ],
)  # fmt: skip
def test_what_is_not_cached_is_told_offline(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, source: str, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hf_hub_download(REPO, "model.safetensors.index.json", revision="step1")
    go_offline(hub, monkeypatch)
    code, out, err = ckptavg(capsys, "average", source, "-o", tmp_path / "out")
    assert (code, out, err) == (1, "", f"ckptavg: error: {message}\n")
    assert hub.requests == []


def test_a_link_in_the_cache_that_leads_nowhere_is_no_file(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, cache: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    average_checkpoints(SOURCES, tmp_path / "first", cache=True)
    shard = next((cache / "snapshots").glob("*/model-00001-of-00003.safetensors"))
    Path(os.path.realpath(shard)).unlink()
    average_checkpoints(SOURCES, tmp_path / "again")  # that one is streamed
    same_as_copies(tmp_path / "again", steps)
    go_offline(hub, monkeypatch)
    code, _, err = ckptavg(capsys, "average", SOURCES, "-o", tmp_path / "out")
    assert code == 1
    assert "model-00001-of-00003.safetensors is missing" in err


@pytest.mark.parametrize(
    ("match", "name"),
    [
        ("GET /blob/.*filename=model-00003", "model-00003-of-00003.safetensors"),
        ("GET .*/tokenizer.json", "tokenizer.json"),
    ],
)
def test_a_download_that_went_wrong_is_refused_and_not_kept(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, cache: Path, match: str, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.inject(Fault(match, flip_byte=7, times=1))
    code, out, err = ckptavg(
        capsys, "average", SOURCES, "-o", tmp_path / "out", "--cache", "--quiet"
    )
    assert (code, out) == (1, "")
    assert f"/{name}: what arrived is not what the Hub says" in err
    assert "it is gone from the cache" in err
    assert not (tmp_path / "out").exists()
    average_checkpoints(SOURCES, tmp_path / "out", cache=True)
    same_as_copies(tmp_path / "out", steps)


@pytest.mark.parametrize(
    "trouble",
    [{"status": 503, "times": 2}, {"reset": True}, {"truncate_bytes": 100}],
    ids=["503", "reset", "truncated"],
)
def test_downloads_into_the_cache_go_through_trouble(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, trouble: dict[str, object]
) -> None:
    hub.inject(Fault("GET /blob/", **trouble))  # type: ignore[arg-type]  # each value is right
    average_checkpoints(SOURCES, tmp_path / "out", cache=True)
    same_as_copies(tmp_path / "out", steps)


def test_a_cache_that_cannot_be_filled_is_told(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    hub.inject(Fault("GET /blob/", status=500, times=10**6))
    with pytest.raises(HubError, match=f"{REPO}@step1.*model-0000"):
        average_checkpoints(SOURCES, tmp_path / "out", cache=True)
    assert not (tmp_path / "out").exists()
