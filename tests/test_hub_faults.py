"""Whatever goes wrong on the way from the Hub: the right bits, or a refusal; never a wrong average.

Nothing is published in the second case, and nothing takes longer than the deadline.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import REPO, ckptavg, model_files, save_steps, upload
from huggingface_hub import constants
from loopback_hub import Fault, LoopbackHub, hub_environment

from ckptavg import average_checkpoints
from ckptavg.hub import catalog, read_ahead, transport
from ckptavg.hub.remote_file import HubFile

pytestmark = pytest.mark.promise(10)

EVER = 10**6
SOURCES = f"{REPO}@step*"
SHIFTED = "sends bytes 1 to 8191 of {size}, asked for were 0 to 8191 of {size}"
NO_RANGE = (
    "the server answers {status} and does not send the range of bytes that was asked for; "
    "--cache downloads whole files instead"
)


@pytest.fixture(autouse=True)
def local(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two revisions on the hub, each of one file of 15 segments, and their local copies."""
    monkeypatch.setattr(read_ahead, "_MIN_SEGMENT_BYTES", 2**16)
    monkeypatch.setattr(read_ahead, "_MAX_SEGMENT_BYTES", 2**16)
    monkeypatch.setattr(read_ahead, "_MAX_AHEAD", 2)
    saved = save_steps(tmp_path / "local", (1, 2), "safetensors", n_values=120_000)
    for directory in saved:
        upload(hub, directory)
    return saved


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> float:
    """A deadline that comes soon; a silent connection is given up even sooner."""
    monkeypatch.setattr(transport, "DEADLINE_SECONDS", 0.7)  # told as 1
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    return 0.7


def right(local: Sequence[Path], folder: Path, **options: Any) -> None:
    """Average the revisions, and check that local copies give the same files."""
    average_checkpoints(SOURCES, folder / "out", **options)
    average_checkpoints(local, folder / "copies")
    assert model_files(folder / "out") == model_files(folder / "copies")


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    """Check that averaging is refused in one line and leaves nothing; return what it says."""
    before = sorted(folder.iterdir())
    code, out, err = ckptavg(capsys, "average", SOURCES, "-o", folder / "out", "--quiet", *options)
    assert (code, out) == (1, "")
    assert err.startswith("ckptavg: error: ")
    assert err.count("\n") == 1
    assert sorted(folder.iterdir()) == before
    return err.removeprefix("ckptavg: error: ").partition("; ")[0].rstrip()


def blob(directory: Path) -> str:
    """Return a pattern of the requests for the content of a model."""
    content = (directory / "model.safetensors").read_bytes()
    return f"GET /blob/{hashlib.sha256(content).hexdigest()}"


# what passes


@pytest.mark.parametrize("server", ["/blob/", "/resolve/", "/refs", "/tree/"])
@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 503, "times": 2},
        {"status": 500, "times": 5},
        {"status": 429, "headers": {"Retry-After": "0"}},
        {"status": 408},
        {"reset": True},
        {"truncate_bytes": 10},
        {"short_content_length": True},
        {"delay_seconds": 0.2},
    ],
    ids=["503 twice", "500 five times", "429", "408", "reset", "truncated", "short", "late"],
)
def test_what_passes_leaves_the_right_bits(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, server: str, trouble: dict[str, Any]
) -> None:
    if trouble.get("short_content_length") and server in ("/refs", "/tree/"):
        pytest.skip("an answer in JSON that lacks its last byte is none")
    hub.inject(Fault(server, **trouble))
    right(local, tmp_path)
    assert hub.faults.n_left == 0


@pytest.mark.parametrize(
    "trouble",
    [
        {"status": 503},
        {"reset": True},
        {"reset": True, "truncate_bytes": 30_000},
        {"truncate_bytes": 0},
        {"truncate_bytes": 40_001},
        {"short_content_length": True},
    ],
    ids=["503", "reset at half", "reset", "nothing", "truncated", "short"],
)
def test_data_goes_on_where_it_broke_off(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, trouble: dict[str, Any]
) -> None:
    hub.inject(Fault(blob(local[1]), after=3, times=3, **trouble))
    right(local, tmp_path)
    assert hub.faults.n_left == 0
    asked = {one.range for one in hub.find("GET", "", "cdn")}
    arrived = trouble.get("truncate_bytes", -1)
    for one in hub.find("GET", "", "cdn"):
        if one.sent_bytes == arrived and one.range is not None:  # it is not asked for again
            first, last = map(int, one.range.removeprefix("bytes=").split("-"))
            assert f"bytes={first + arrived}-{last}" in asked


def test_addresses_that_expire_are_asked_for_again(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, calls = HubFile.fetch, list[HubFile]()

    def fetch_and_expire(self: HubFile, *arguments: Any) -> None:
        calls.append(self)
        if len(calls) in (1, 12, 20):
            hub.expire_urls()
        fetch(self, *arguments)

    monkeypatch.setattr(HubFile, "fetch", fetch_and_expire)
    right(local, tmp_path)
    assert any(one.status == 403 for one in hub.find("GET", "", "cdn"))
    assert 2 < hub.count("HEAD", "model.safetensors") <= 2 * 4


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "0"}, {"RateLimit": '"resolvers";r=0;t=0'}], ids=["retry", "quota"]
)
def test_the_hub_says_how_long_to_wait(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, headers: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transport, "DEADLINE_SECONDS", 5.0)
    monkeypatch.setattr(transport, "_FIRST_WAIT_SECONDS", 100.0)  # never, if nothing is said
    hub.inject(*(Fault(f"{name} /", status=429, headers=headers) for name in ("GET", "HEAD")))
    hub.inject(Fault("GET /blob/", status=429, headers=headers))
    right(local, tmp_path)
    assert hub.faults.n_left == 0


# what does not


def test_a_quota_that_lasts_longer_than_the_deadline_is_told_at_once(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.inject(
        Fault("HEAD ", status=429, times=EVER, headers={"RateLimit": '"resolvers";r=0;t=700'})
    )
    assert refused(capsys, tmp_path) == (
        f"{REPO}@step1/model.safetensors: the Hub answers 429, and the Hub asks to wait 701 s"
    )


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"status": 500}, "the Hub answers 500, 6 times"),
        ({"status": 403}, "the Hub denies access: injected fault 403"),
        ({"status": 404}, "the Hub answers 404: injected fault 404"),
        ({"status": 416}, "the Hub answers 416: injected fault 416"),
        ({"ignore_range": True}, NO_RANGE.format(status=200).partition("; ")[0]),
        ({"html_body": True}, NO_RANGE.format(status=200).partition("; ")[0]),
        ({"drop_header": "Content-Range"}, NO_RANGE.format(status=206).partition("; ")[0]),
        ({"headers": {"Content-Encoding": "gzip"}}, NO_RANGE.format(status=206).partition("; ")[0]),
        ({"shift_content_range": True}, SHIFTED),
        ({"truncate_bytes": 0}, "the connection broke, 6 times"),
        ({"reset": True, "truncate_bytes": 0}, "the connection broke, 6 times"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
@pytest.mark.parametrize("after", [0, 8], ids=["header", "data"])
def test_trouble_that_stays_is_refused(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, trouble: dict[str, Any], message: str,
    after: int, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.inject(Fault("GET /blob/", times=EVER, after=after, **trouble))
    said = refused(capsys, tmp_path)
    if after and message is SHIFTED:
        assert "the server sends bytes " in said
    else:
        size = (local[0] / "model.safetensors").stat().st_size
        assert said.endswith(message.format(size=size))
    assert hub.count("GET", "", "cdn") <= after + 30


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"status": 500}, "the Hub answers 500, 6 times"),
        ({"status": 403}, "the Hub denies access: injected fault 403"),
        ({"headers": {"X-Linked-Size": "7"}}, "the Hub tells two sizes or commits of it"),
        ({"headers": {"X-Repo-Commit": "f" * 40}}, "the Hub tells two sizes or commits of it"),
        ({"html_body": True}, "the Hub tells two sizes or commits of it"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_strange_address_is_refused(
    hub: LoopbackHub, tmp_path: Path, trouble: dict[str, Any], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.inject(Fault("HEAD /", times=EVER, **trouble))
    assert refused(capsys, tmp_path).endswith(f"/model.safetensors: {message}")
    assert hub.count("GET", "", "cdn") == 0


@pytest.mark.parametrize("where", ["header", "first data", "middle", "last byte"])
def test_a_changed_byte_is_never_averaged(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, where: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = (local[1] / "model.safetensors").read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    offset = {
        "header": header_bytes - 2, "first data": header_bytes, "middle": 500_000,
        "last byte": len(content) - 1,
    }[where]  # fmt: skip
    hub.inject(Fault(blob(local[1]), times=EVER, after=1, flip_byte=offset))
    said = refused(capsys, tmp_path)
    if where in ("header", "first data"):
        assert f"{REPO}@step2/model.safetensors: bytes 0 to 8192 differ" in said
    else:
        assert f"{REPO}@step2/model.safetensors: what arrived has sha256 " in said


def test_a_header_that_was_changed_only_in_the_preflight_is_refused(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (local[1] / "model.safetensors").read_bytes()
    digit = content.index(b"position_ids") + len("position_")  # another name, and valid still
    hub.inject(Fault(blob(local[1]), flip_byte=digit))
    refused(capsys, tmp_path)
    hub.inject(Fault(blob(local[1]), flip_byte=5000))  # of the data that came with the header
    assert "bytes 0 to 8192 differ from what the Hub sent before" in refused(capsys, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model"])
def test_a_changed_side_file_is_refused(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    where = f"/resolve/.*{name}" if name != "tokenizer.model" else "filename=tokenizer.model"
    hub.inject(Fault(f"GET .*{where}", times=EVER, flip_byte=1))
    said = refused(capsys, tmp_path)
    assert name in said


# what never ends


@pytest.mark.parametrize("match", ["GET /blob/", "HEAD /", "/refs", "/tree/", "GET .*config.json"])
@pytest.mark.parametrize("trouble", [{"silent": True}, {"drip": True}], ids=["silent", "drip"])
def test_nothing_takes_longer_than_the_deadline(
    hub: LoopbackHub, tmp_path: Path, match: str, trouble: dict[str, Any], brief: float,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if match == "HEAD /" and "drip" in trouble:
        pytest.skip("no body, no drops")
    if match == "GET .*config.json" and "drip" in trouble:
        pytest.skip("so short that it is done in time")
    hub.inject(Fault(match, times=EVER, **trouble))
    began = time.monotonic()
    said = refused(capsys, tmp_path)
    assert time.monotonic() - began < brief + 3
    reason = " (the Hub does not answer)" if "silent" in trouble else ""
    assert said.endswith(f": not done within 1 s{reason}")


def test_data_that_comes_in_drops_ends_at_the_deadline(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, brief: float,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.inject(Fault(blob(local[0]), times=EVER, after=3, drip=True))
    began = time.monotonic()
    assert refused(capsys, tmp_path).endswith("not done within 1 s")
    assert time.monotonic() - began < brief + 3


def test_a_hub_that_is_not_there_is_told(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.close()
    assert refused(capsys, tmp_path) == f"{REPO}: the Hub cannot be reached, 3 times"


# answers that make no sense


@pytest.mark.parametrize("match", ["/refs", "/tree/", "/commits/"])
def test_a_login_page_is_no_answer(
    hub: LoopbackHub, tmp_path: Path, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.inject(Fault(match, times=EVER, html_body=True))
    source = f"{REPO}@step2~0" if match != "/commits/" else f"{REPO}@step2~1"
    code, _, err = ckptavg(capsys, "average", source, "-o", tmp_path / "out")
    assert code == 1
    assert ": the Hub's answer is not JSON" in err


ENTRY = {"type": "file", "path": "a", "oid": "0", "size": 1}


@pytest.mark.parametrize(
    "answer",
    [
        None, 3, "text", {"error": "x"}, [1], ["a"], [None], [[]], [{}], [{"path": "a"}],
        [ENTRY | {"size": "large"}], [ENTRY | {"size": None}], [ENTRY | {"size": -1}],
        [ENTRY | {"lfs": 1}], [ENTRY | {"lfs": {"size": 1}}],
        [ENTRY | {"path": "/etc/evil"}], [ENTRY | {"path": "../evil"}],
        [ENTRY | {"path": "a/../../evil"}], [ENTRY | {"path": ".."}], [ENTRY | {"path": ""}],
        [ENTRY | {"path": "a\0b"}],
    ],
)  # fmt: skip
def test_a_list_of_files_that_makes_no_sense_is_refused(
    hub: LoopbackHub, tmp_path: Path, answer: object,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def strange(path: str, what: str) -> Any:
        return answer if "/tree/" in path else transport.get_json(path, what)

    monkeypatch.setattr(catalog, "get_json", strange)
    assert refused(capsys, tmp_path) == f"{REPO}@step1: the Hub's list of files makes no sense"


@pytest.mark.parametrize(
    "answer", [None, [], "text", {}, {"branches": None}, {"branches": [{}]}, {"branches": [1]}]
)
def test_a_list_of_revisions_that_makes_no_sense_is_refused(
    hub: LoopbackHub, tmp_path: Path, answer: object,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(catalog, "get_json", lambda path, what: answer)
    assert refused(capsys, tmp_path) == f"{REPO}: the Hub's list of revisions makes no sense"


# Ctrl-C


@pytest.mark.parametrize("match", ["/refs", "/tree/", "GET /blob/", "data"])
def test_an_interrupt_ends_a_run_that_waits_for_the_hub(
    hub: LoopbackHub, local: list[Path], tmp_path: Path, match: str
) -> None:
    after = 2 if match == "data" else 0  # the headers
    pattern = "GET /blob/" if match == "data" else match
    hub.inject(Fault(pattern, silent=True, times=EVER, after=after))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptavg", "average", SOURCES, "-o", str(tmp_path / "out")],
        env={**os.environ, **hub_environment(hub, tmp_path / "home"), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while hub.count("GET", pattern.removeprefix("GET ")) <= after:
        assert process.poll() is None
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("ckptavg: error: ended by SIGINT; nothing was published")
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "out").exists()
