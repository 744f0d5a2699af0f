"""How the Hub is asked: few requests, nothing stored, refusals before any data is fetched."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, tree
from hub_fixtures import (
    REPO,
    SIDE_FILES,
    ckptavg,
    model_files,
    same_as_local,
    save_steps,
    talk_to,
    upload,
)
from loopback_hub import Fault, LoopbackHub, hub_environment
from memory_probe import WATCH
from safetensors.torch import save_file

from ckptavg import average_checkpoints

MB = 10**6


@contextmanager
def watched(folder: Path) -> Iterator[dict[str, int]]:
    """Note every file that appears below a folder, with its largest size."""
    seen: dict[str, int] = {}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            for where, _, names in os.walk(folder):
                for name in names:
                    try:
                        size = os.stat(os.path.join(where, name)).st_size  # noqa: PTH118
                    except FileNotFoundError:
                        continue
                    seen[name] = max(size, seen.get(name, 0))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def test_each_file_is_asked_for_once_and_at_its_commit(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    average_checkpoints(f"{REPO}@step*", tmp_path / "out")
    assert hub.count("GET", "/refs$") == 1
    assert hub.count("GET", "/tree/") == 3 + 1  # and the chat templates of the last
    large = [one.path for one in hub.find("HEAD", "/resolve/")]
    assert len(large) == len(set(large)) == 3 * 3 + 1  # and the tokenizer.model of the last
    small = [one.path for one in hub.find("GET", "/resolve/", "hub")]
    assert sorted(small) == sorted(set(small))
    commits = set(hub.branches(REPO).values())
    assert {
        re.split("/(?:resolve|tree)/", one.path)[1].split("/")[0]
        for one in hub.requests
        if re.search("/(?:resolve|tree)/", one.path)
    } <= commits
    assert {one.authorization for one in hub.requests if one.server == "hub"} == {"Bearer hf_test"}
    assert {one.authorization for one in hub.requests if one.server == "cdn"} == {None}
    assert hub.count("GET", "", "cdn") <= 9 * 3  # header, data; small files are read in one go
    assert not hub.find("GET", "optimizer|gitattributes")


def test_nothing_but_side_files_touches_the_disk(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, temporary: Path
) -> None:
    with watched(temporary) as seen:
        average_checkpoints(f"{REPO}@step*", tmp_path / "out")
    assert set(seen) <= {Path(name).name for name in SIDE_FILES}
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "home").exists()  # nothing in the cache either


def test_pickled_revisions_are_not_stored_either(
    hub: LoopbackHub, tmp_path: Path, temporary: Path
) -> None:
    for step in (1, 2):
        directory = save_checkpoint(
            tmp_path / f"step{step}", {"w": torch.full((300_000,), float(step))}, "sharded torch"
        )
        upload(hub, directory)
    with watched(temporary) as seen:
        average_checkpoints(f"{REPO}@step*", tmp_path / "out")
    assert seen == {}


# preflight


def test_a_revision_that_does_not_fit_is_refused_from_headers(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {step: 1999 if step == 37 else 2000 for step in range(50)}
    for step, rows in shape.items():
        path = tmp_path / f"{step}.safetensors"
        if step in (0, 37):
            save_file({"w": torch.zeros(rows, 2000), "v": torch.zeros(4)}, path)
        files = path if path.exists() else tmp_path / "0.safetensors"
        hub.commit(REPO, f"step{step}", {"model.safetensors": files}, orphan=True)
    code, _, err = ckptavg(capsys, "average", f"{REPO}@step*", "-o", tmp_path / "out")
    assert code == 1
    match = re.search(r"; (\d+) bytes of headers and lists were fetched from the Hub\n", err)
    assert match, err
    assert f"{REPO}@step37" in err
    assert "'w'" in err
    largest = (tmp_path / "0.safetensors").stat().st_size
    fetched = sum(one.sent_bytes for one in hub.find("GET", "", "cdn"))
    assert fetched / 50 < 0.01 * largest
    assert int(match[1]) >= fetched
    ranges = {one.range for one in hub.find("GET", "", "cdn")}
    assert ranges == {"bytes=0-8191"}
    assert not (tmp_path / "out").exists()


def test_the_same_files_in_two_revisions_are_pointed_out(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    hub.branch(REPO, "final", "step10")
    result = average_checkpoints([f"{REPO}@step*", f"{REPO}@final"], tmp_path / "out")
    assert f"{REPO}@final is the same checkpoint as {REPO}@step10: it counts twice" in result.notes


# private and gated repositories, what is not there


@pytest.mark.parametrize(
    ("source", "token", "message"),
    [
        ("org/none@main", "hf_test", "org/none: no such repository on the Hub, or it is private: "
         "check the name, and log in (hf auth login, or HF_TOKEN) to one that may see it"),
        ("org/private@main", "", "org/private: no such repository on the Hub, or it is private: "
         "check the name, and log in (hf auth login, or HF_TOKEN) to one that may see it"),
        ("org/gated@main", "", "org/gated@main/model.safetensors.index.json: is gated: ask "
         "for access on its page on the Hub, then log in (hf auth login, or HF_TOKEN)"),
        (f"{REPO}@step1", "hf_stale", f"{REPO}: the Hub does not know the token; log in again "
         "(hf auth login, or HF_TOKEN)"),
        (f"{REPO}@step3", "hf_test", f"{REPO}@step3: no such branch or tag; there are 4, for "
         "example step1, step2, step10"),
        (f"{REPO}@step1/sub", "hf_test", f"{REPO}@step1/sub: no such file or folder on the Hub"),
        (f"{REPO}@step1/other.safetensors", "hf_test",
         f"{REPO}@step1/other.safetensors: no such file on the Hub"),
        (f"{REPO}@main", "hf_test", f"{REPO}@main: holds no weights (looked for model.safetensors, "
         "pytorch_model.bin, their sharded forms, and .metadata)"),
    ],
)  # fmt: skip
def test_what_may_not_be_read_is_one_line_that_says_what_to_do(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, source: str, token: str, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.create("org/private", private=True)
    hub.create("org/gated", gated=True)
    hub.commit("org/gated", "main", tree(steps[0]))
    monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = ckptavg(capsys, "average", source, "-o", tmp_path / "out")
    err = re.sub(r"; \d+ bytes of headers and lists were fetched from the Hub", "", err)
    assert (code, out, err) == (1, "", f"ckptavg: error: {message}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_a_token_opens_private_and_gated_repositories(
    hub: LoopbackHub, tmp_path: Path, kind: str
) -> None:
    hub.create("org/closed", **{kind: True})
    (directory,) = save_steps(tmp_path / "local", (1,))
    hub.commit("org/closed", "step1", tree(directory))
    same_as_local("org/closed@step1", [directory], tmp_path / "out")


# the token


CANARY = "hf_CANARYcanaryCANARYcanaryCANARY12"


@pytest.fixture
def private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Path]
) -> Iterator[LoopbackHub]:
    """A hub that knows the canary alone, with the steps in a private repository."""
    with LoopbackHub(tmp_path / "private", tokens=[CANARY]) as hub:
        talk_to(hub, tmp_path / "home", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", CANARY)
        hub.create(REPO, private=True)
        for directory in steps:
            upload(hub, directory)
        yield hub


@pytest.mark.parametrize("options", [[], ["--cache"]], ids=["streamed", "cached"])
@pytest.mark.promise(11)
def test_the_token_is_in_no_output(
    private: LoopbackHub, tmp_path: Path, options: list[str],
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("DEBUG")
    for number, more in enumerate(([], ["--json"], ["--debug"], ["--dry-run", "--json"])):
        code, out, err = ckptavg(
            capsys, "average", f"{REPO}@step*", "-o", tmp_path / f"out{number}", *options, *more
        )
        assert code == 0
        assert CANARY not in out + err + caplog.text
    assert any(one.authorization == f"Bearer {CANARY}" for one in private.requests)
    for name, content in tree(tmp_path).items():
        assert CANARY.encode() not in content, name


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 401}, {"status": 403}, {"status": 404}, {"status": 500}, {"html_body": True},
        {"reset": True, "truncate_bytes": 0},
        {"status": 403, "headers": {"X-Error-Message": f"the token {CANARY} may not do this"}},
    ],
    ids=["401", "403", "404", "500", "html", "reset", "echo"],
)  # fmt: skip
@pytest.mark.promise(11)
def test_the_token_is_in_no_error(
    private: LoopbackHub, tmp_path: Path, trouble: dict[str, Any],
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for match in ("/refs", "/tree/", "HEAD /", "GET .*/resolve/", "GET /blob/"):
        if trouble.get("reset") and match == "HEAD /":
            continue  # what has no body is whole before it is reset
        private.faults.clear()
        private.inject(Fault(match, times=10**6, **trouble))
        code, out, err = ckptavg(
            capsys, "average", f"{REPO}@step*", "-o", tmp_path / "out", "--quiet", "--debug"
        )
        assert code == 1
        assert "Traceback" in err
        assert CANARY not in out + err + caplog.text, match
        assert "Bearer" not in err


# several processes, one that is watched


def test_two_processes_share_what_is_on_the_hub(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "ckptavg", "average", f"{REPO}@step*", "-o", str(tmp_path / "out"),
        ],
        capture_output=True, text=True, check=True, timeout=300,
        env={
            **os.environ, **hub_environment(hub, tmp_path / "home"),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )  # fmt: skip
    average_checkpoints(steps, tmp_path / "copies")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "copies")


# samples RssAnon while averaging; prints the largest beyond what the imports take, in bytes
PROBE = (
    WATCH
    + """
import sys
import numpy
from huggingface_hub import get_session, hf_hub_url
from ckptavg import average_checkpoints, hub
from ckptavg.hub.connection import HubConnection

get_session()
memory = here()
with watched(memory):
    average_checkpoints(
        sys.argv[1], sys.argv[2], memory_budget_bytes=int(sys.argv[3]), device="cpu"
    )
print(memory.largest - memory.baseline)
"""
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("layout", ["safetensors", "torch"])
def test_memory_stays_within_the_budget(hub: LoopbackHub, tmp_path: Path, layout: str) -> None:
    name = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}[layout]
    path = tmp_path / name
    for step in range(4):
        tensors = {f"{n}.weight": torch.full((1000, 1000), float(step + n)) for n in range(8)}
        path.unlink(missing_ok=True)
        torch.save(tensors, path) if layout == "torch" else save_file(tensors, path)
        hub.commit(REPO, f"step{step}", {name: path}, orphan=True)
    budget = 64 * 2**20
    result = subprocess.run(
        [sys.executable, "-c", PROBE, f"{REPO}@step*", str(tmp_path / "out"), str(budget)],
        env={**os.environ, **hub_environment(hub, tmp_path / "home")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 10 * MB < int(result.stdout) <= budget
