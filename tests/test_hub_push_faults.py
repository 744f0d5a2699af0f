"""A push that fails says what finishes it, makes no half of a commit, and never shows a token."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import tree
from hub_fixtures import REPO, ckptavg, save_steps, talk_to
from huggingface_hub import constants
from loopback_hub import Fault, LoopbackHub, hub_environment

from ckptavg import average_checkpoints, push_model
from ckptavg.errors import CkptavgError, SourceError

# huggingface_hub uploads files with a deprecated argument of its HTTP client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

TARGET = "tester/swa"
EVER = 10**6
CANARY = "hf_CANARYcanaryCANARYcanaryCANARY1234"
COMMIT = "POST .*/commit/"


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub wait but briefly before it tries an upload again."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))


@pytest.fixture
def swa(hub: LoopbackHub, tmp_path: Path) -> Path:
    """An average of two local checkpoints, in one weight file."""
    average_checkpoints(save_steps(tmp_path / "local", (1, 2)), tmp_path / "swa")
    return tmp_path / "swa"


def check_pushed(hub: LoopbackHub, directory: Path, n_commits: int = 1) -> None:
    """Check that a directory is on the hub, after so many commits."""
    there = hub.files(TARGET)
    for name, content in tree(directory).items():
        assert there[name] == content, name
    assert len(hub.commits(TARGET)) == 1 + n_commits  # the Hub itself makes the first


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Return exit code and the one line of an error."""
    code, out, err = ckptavg(capsys, *arguments)
    assert out == ""
    assert err.startswith("ckptavg: error: ")
    assert err.count("\n") == 1
    return code, err.removeprefix("ckptavg: error: ").rstrip("\n")


# what passes


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.parametrize(
    "match",
    [
        "GET /api/whoami", "POST /api/repos/create", "POST .*/branch/", "GET .*/revision/",
        "GET .*/tree/", "POST /api/validate-yaml", "POST .*/preupload/", "POST .*/objects/batch",
        "PUT /upload/", "POST .*/lfs/verify/", COMMIT,
    ],
)  # fmt: skip
def test_what_passes_is_tried_again(hub: LoopbackHub, swa: Path, match: str, status: int) -> None:
    hub.inject(Fault(match, status=status))
    pushed = push_model(swa, TARGET, revision="dev")
    assert hub.faults.n_left == 0
    assert pushed.changed
    assert hub.files(TARGET, "dev")["model.safetensors"] == (swa / "model.safetensors").read_bytes()
    assert len(hub.commits(TARGET, "dev")) == 2


@pytest.mark.parametrize("fault", [{"reset": True}, {"truncate_bytes": 0}])
def test_a_commit_whose_answer_is_lost_is_made_once(
    hub: LoopbackHub, swa: Path, fault: dict[str, Any]
) -> None:
    hub.create(TARGET)
    hub.commit(TARGET, "main", {"pytorch_model.bin": b"stale", "LICENSE": b"kept"})
    hub.inject(Fault(COMMIT, **fault))
    pushed = push_model(swa, TARGET, message="new\n\nand more")
    assert hub.faults.n_left == 0
    check_pushed(hub, swa, 2)
    newest = hub.commits(TARGET)[0]
    assert (newest.title, pushed.commit, pushed.changed) == ("new\n\nand more", newest.oid, True)
    assert "pytorch_model.bin" not in hub.files(TARGET)


def test_a_commit_of_another_in_between_is_told(
    hub: LoopbackHub, swa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_commit = huggingface_hub.HfApi.create_commit

    def late(self: huggingface_hub.HfApi, *arguments: Any, **options: Any) -> Any:
        hub.commit(TARGET, "main", {"LICENSE": b"theirs"}, "theirs")
        return create_commit(self, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    with pytest.raises(CkptavgError, match="the Hub answers 412: A commit has happened since"):
        push_model(swa, TARGET)
    assert [one.title for one in hub.commits(TARGET)] == ["theirs", "initial commit"]


# what stays


@pytest.mark.parametrize(
    ("fault", "n_sent"),
    [
        (Fault(COMMIT, status=500, times=EVER), 0),
        (Fault("PUT /upload/", status=500, times=EVER), None),
        (Fault("POST /api/validate-yaml", status=400), None),
        (Fault("POST .*/preupload/", html_body=True), None),
    ],
    ids=["commit", "upload", "card", "login page"],
)
def test_a_failed_push_says_the_command_that_finishes_it(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, fault: Fault, n_sent: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    notes = tmp_path / "my notes.md"
    notes.write_text("## Mine\n")
    output = tmp_path / "out"
    hub.inject(fault)
    code, _, err = ckptavg(
        capsys, "average", *steps, "-o", output, "--push", f"{TARGET}@dev", "--private",
        "--card", notes, "--quiet",
    )  # fmt: skip
    assert code == 3
    assert err.count("\n") == 1
    assert err.startswith(f"ckptavg: error: {output}: is published here and whole, but not on the ")
    command = err.partition("; finish it with: ")[2].rstrip("\n")
    assert command == shlex.join(
        [
            "ckptavg", "push", str(output), TARGET, "--revision", "dev", "--private",
            "--card", str(notes),
        ]
    )  # fmt: skip
    assert (output / "model.safetensors").exists()
    assert len(hub.commits(TARGET, "dev")) == 1
    hub.faults.clear()
    hub.requests.clear()
    assert ckptavg(capsys, *shlex.split(command)[1:])[0] == 0
    there = hub.files(TARGET, "dev")
    assert all(there[name] == content for name, content in tree(output).items())
    assert there["README.md"].endswith(b"\n\n## Mine\n")
    assert len(hub.commits(TARGET, "dev")) == 2
    if n_sent is not None:
        assert hub.count("PUT") == n_sent


def test_one_command_after_the_other_finishes_several(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    hub.inject(Fault(COMMIT, status=500, times=EVER, after=1))
    code, out, err = ckptavg(
        capsys, "average", *steps, "-o", output, "--scheme", "uniform", "--scheme",
        "uniform:last=2", "--scheme", "late=uniform:last=1", "--push", TARGET, "--quiet",
    )  # fmt: skip
    assert code == 3
    assert f"{TARGET}@uniform: pushed, commit " in out
    assert err.rstrip("\n").partition("; finish it with: ")[2] == " && ".join(
        f"ckptavg push {output}/{name} {TARGET} --revision {name}"
        for name in ("uniform-last2", "late")
    )


def test_a_hub_that_goes_away_is_told(
    hub: LoopbackHub, swa: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.close()
    code, told = refusal(capsys, "push", swa, TARGET)
    assert code == 1
    assert re.fullmatch(f"{TARGET}: the Hub cannot be reached, \\d times; try again later", told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_an_interrupt_of_an_upload_says_what_finishes_it(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, number: signal.Signals, shard: str
) -> None:
    hub.inject(Fault("PUT /upload/", silent=True, times=EVER))
    process = subprocess.Popen(
        [
            sys.executable, "-m", "ckptavg", "average", *map(str, steps),
            "-o", str(tmp_path / "out"), "--max-shard-size", shard, "--push", TARGET,
        ],
        env={**os.environ, **hub_environment(hub, tmp_path / "home")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not hub.count("PUT"):
        assert process.poll() is None
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == 3
    assert err.splitlines()[-1] == (
        f"ckptavg: error: {tmp_path}/out: is published here and whole, but not on the Hub: ended "
        f"by {number.name}; finish it with: ckptavg push {tmp_path}/out {TARGET}"
    )
    assert (tmp_path / "out" / "ckptavg.json").exists()
    assert len(hub.commits(TARGET)) == 1


@pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="needs the package hf_xet")
def test_a_hub_without_xet_is_told_with_the_way_around(
    hub: LoopbackHub, swa: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckptavg", "push", str(swa), TARGET],
        env={
            **os.environ, **hub_environment(hub, tmp_path / "home"), "HF_HUB_DISABLE_XET": "0",
        },
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"ckptavg: error: {TARGET}@main: the upload failed: ")
    assert "; HF_HUB_DISABLE_XET=1 sends the files in the older way\n" in done.stderr


# who may not


def offline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def without_a_token(patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")


def with_a_wrong_token(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", CANARY)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (offline, 2, "cannot be pushed to while HF_HUB_OFFLINE is set"),
        (without_a_token, 2, "log in to push (hf auth login, or HF_TOKEN)"),
        (
            with_a_wrong_token, 1,
            "the Hub does not know the token; log in again (hf auth login, or HF_TOKEN)",
        ),
    ],
)  # fmt: skip
def test_who_may_not_push_is_told_before_the_work(
    hub: LoopbackHub, swa: Path, tmp_path: Path, change: Callable[[pytest.MonkeyPatch], None],
    code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    change(monkeypatch)
    local = tmp_path / "local" / "step1"
    commands: list[list[str | Path]] = [
        ["push", swa, TARGET], ["average", local, "-o", "never", "--push", TARGET],
    ]  # fmt: skip
    for command in commands:
        assert refusal(capsys, *command) == (code, f"{TARGET}: {message}")
    assert not Path("never").exists()
    assert hub.repositories() == [REPO]


def test_a_token_that_may_not_write_is_told(hub: LoopbackHub, swa: Path) -> None:
    hub.inject(Fault("POST /api/repos/create", status=403))
    with pytest.raises(SourceError) as caught:
        push_model(swa, TARGET)
    assert str(caught.value) == (
        f"{TARGET}@main: the Hub denies access: injected fault 403; does the token have the right "
        "to do this?"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--private"], "--private and --card belong to --push"),
        (["--push", "swa"], "swa: is not of the form org/name"),
        (["--push", "a/b@dev/x"], "a/b@dev/x: is not of the form org/name or org/name@branch"),
        (
            ["--push", "a/b@dev", "--scheme", "uniform", "--scheme", "uniform:last=1"],
            "a/b@dev: several averages go to a branch each, named like them",
        ),
        (
            ["--push", "a/b@dev", "--scheme", "uniform:last=1..2"],
            "a/b@dev: several averages go to a branch each, named like them",
        ),
        (["--push", "a/b@dev", "--scheme", "swag"], "a/b@dev: several averages go to a branch"),
        (["--push", "a/b", "--card", "binary"], "binary: cannot be read as text: "),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_work(
    hub: LoopbackHub, swa: Path, tmp_path: Path, options: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe")
    code, told = refusal(capsys, "average", "local/step1", "-o", "never", *options)
    assert (code, told[: len(message)]) == (2, message)
    assert not Path("never").exists()
    assert hub.requests == []


def test_only_a_model_that_was_made_here_is_pushed(
    hub: LoopbackHub, swa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    average_checkpoints(
        ["local/step1", "local/step2"], "two", schemes=["uniform", "uniform:last=1"]
    )
    changed = {
        "damaged/ckptavg.json": b"{", "list/ckptavg.json": b"[]", "empty/ckptavg.json": b"{}",
        "own/ckptavg.json": b"{}", "own/README.md": b"# Mine", "half/ckptavg.json": b"",
        "config/config.json": b"[", "card/README.md": b"\xff",
    }  # fmt: skip
    for name, content in changed.items():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        if path.parent.name in ("config", "card"):
            (path.parent / "ckptavg.json").write_bytes((swa / "ckptavg.json").read_bytes())
        path.write_bytes(content)
    by_hand = "its ckptavg.json is of another version, or was changed by hand"
    found = {
        name: refusal(capsys, "push", name, TARGET)
        for name in (
            "local/step1",
            "two",
            "nowhere",
            "swa/config.json",
            *sorted({*(Path(n).parent.name for n in changed)}),
        )
    }
    assert found.pop("card")[1].startswith("card/README.md: cannot be read as text: ")
    assert found == {
        "local/step1": (2, "local/step1: holds no ckptavg.json: only what ckptavg wrote is pushed"),
        "two": (2, "two: holds 2 models: push one of them, such as two/uniform"),
        "nowhere": (2, "nowhere: is not a directory"),
        "swa/config.json": (2, "swa/config.json: is not a directory"),
        "damaged": (1, "damaged/ckptavg.json: is not valid JSON"),
        "half": (1, "half/ckptavg.json: is not valid JSON"),
        "list": (1, "list/ckptavg.json: is not a JSON object"),
        "config": (1, "config/config.json: is not valid JSON"),
        "empty": (2, f"empty: {by_hand}"),
        "own": (2, f"own: {by_hand}"),
    }
    assert hub.requests == []


# the token


@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault(COMMIT, status=500, times=EVER),
        Fault("PUT /upload/", status=500, times=EVER),
        Fault("POST /api/repos/create", status=403),
        Fault("POST .*/preupload/", html_body=True, times=EVER),
        Fault("GET /api/whoami", status=401),
        Fault(COMMIT, status=400, headers={"X-Error-Message": f"Bearer {CANARY} is bad"}),
    ],
)
@pytest.mark.promise(11)
def test_the_token_appears_nowhere(
    tmp_path: Path, fault: Fault | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sources = save_steps(tmp_path / "local", (1, 2))
    with LoopbackHub(tmp_path / "hub", tokens=[CANARY]) as hub:
        talk_to(hub, tmp_path / "home", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", CANARY)
        if fault is not None:
            hub.inject(fault)
        arguments = [
            "average", *map(str, sources), "-o", str(tmp_path / "out"), "--push", TARGET, "--debug",
        ]  # fmt: skip
        monkeypatch.setattr("sys.argv", ["ckptavg", *arguments, f"--note={CANARY}"])
        code, out, err = ckptavg(capsys, *arguments)
        assert code == (0 if fault is None else 1 if "whoami" in fault.match else 3)
        shown = [out.encode(), err.encode(), *tree(tmp_path / "out").values()]
        for repo in hub.repositories():
            shown.extend(hub.files(repo).values())
            shown.extend(one.message.encode() for one in hub.commits(repo))
        assert hub.find("GET", "whoami")[0].authorization == f"Bearer {CANARY}"
    huggingface_hub.close_session()
    assert all(CANARY.encode() not in one for one in shown)
