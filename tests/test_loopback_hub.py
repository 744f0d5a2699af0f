"""The loopback Hub behaves like the real one towards the real client, and misbehaves on demand."""

import hashlib
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from loopback_hub import Fault, LoopbackHub, hub_environment

REPO = "EleutherAI/pythia-tiny"
WEIGHTS = bytes(range(256)) * 1000

needs_xet = pytest.mark.skipif(
    importlib.util.find_spec("hf_xet") is None, reason="needs the package hf_xet"
)

STORAGES: list[Any] = [
    pytest.param({}, id="basic"),
    pytest.param({"multipart_over_bytes": 100_000}, id="multipart"),
    pytest.param({"xet": True}, id="xet", marks=needs_xet),
]

PRELUDE = """
import json, os, sys
from pathlib import Path
import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, ModelCard, hf_hub_download
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
repo, folder = sys.argv[1], Path(sys.argv[2])
api = HfApi()
results = {}
def error_of(function):
    try:
        function()
    except HfHubHTTPError as error:
        return [type(error).__name__, error.response.status_code]
"""

READ = """
info = api.model_info(repo, revision="step1000", files_metadata=True)
results["info"] = [info.sha, [sibling.rfilename for sibling in info.siblings]]
results["sizes"] = [sibling.size for sibling in info.siblings]
results["whoami"] = api.whoami()["name"]
results["branches"] = [branch.name for branch in api.list_repo_refs(repo).branches]
results["tags"] = [tag.name for tag in api.list_repo_refs(repo).tags]
results["titles"] = [commit.title for commit in api.list_repo_commits(repo, revision="step1000")]
results["tree"] = [entry.path for entry in api.list_repo_tree(repo, recursive=True)]
results["top"] = [entry.path for entry in api.list_repo_tree(repo)]
results["sub"] = [entry.path for entry in api.list_repo_tree(repo, "sub")]
results["changed by"] = [
    entry.last_commit.title for entry in api.list_repo_tree(repo, revision="step1000", expand=True)
]
results["paths"] = [entry.path for entry in api.get_paths_info(repo, ["sub", "config.json", "no"])]
results["exists"] = [api.file_exists(repo, name) for name in ("config.json", "nope")]
results["resolved"] = huggingface_hub.resolve_revision(repo, revision="step1").resolved
results["config"] = Path(hf_hub_download(repo, "config.json", revision="step1000")).read_text()
weights = Path(hf_hub_download(repo, "model.safetensors", revision="step1000")).read_bytes()
(folder / "downloaded").write_bytes(weights)
snapshot = Path(snapshot_download(repo, revision="step1", allow_patterns=["*.json"]))
results["snapshot"] = sorted(os.listdir(snapshot))
metadata = api.get_safetensors_metadata(repo, revision="step1")
results["shape"] = metadata.files_metadata["model.safetensors"].tensors["w"].shape
with HfFileSystem().open(f"{repo}@step1000/model.safetensors", block_size=2**16) as file:
    file.seek(1000)
    results["range is right"] = file.read(5000) == weights[1000:6000]
results["no repo"] = error_of(lambda: api.model_info("nobody/none"))
results["no revision"] = error_of(lambda: hf_hub_download(repo, "config.json", revision="nope"))
results["no entry"] = error_of(lambda: hf_hub_download(repo, "nope.json"))
results["no tree"] = error_of(lambda: list(api.list_repo_tree(repo, "nope")))
results["bad token"] = error_of(lambda: HfApi(token="hf_bad").model_info(repo))
print(json.dumps(results))
"""

PUSH = """
api.create_repo(repo, private=True)
api.create_repo(repo, exist_ok=True)
push = dict(repo_id=repo, folder_path=folder)
results["first"] = api.upload_folder(**push, commit_message="average").oid
results["again"] = api.upload_folder(**push).oid
api.create_branch(repo, branch="ema-0.999")
api.create_branch(repo, branch="ema-0.999", exist_ok=True)
(folder / "config.json").write_text('{"a": 1}')
results["branch"] = api.upload_folder(**push, revision="ema-0.999").oid
(folder / "config.json").write_text('{"a": 2}')
results["pull request"] = api.upload_folder(**push, create_pr=True).pr_url
results["extra"] = api.create_commit(
    repo, [CommitOperationAdd("extra.safetensors", b"z" * 9000)], commit_message="extra"
).oid
api.delete_file("sub/text.txt", repo)
results["stale"] = error_of(lambda: api.create_commit(
    repo, [CommitOperationAdd("a.txt", b"a")], commit_message="a", parent_commit=results["first"]
))
results["no branch"] = error_of(lambda: api.upload_folder(**push, revision="nope"))
api.create_tag(repo, tag="v1")
api.create_tag(repo, tag="v2", revision="ema-0.999")
api.delete_tag(repo, tag="v2")
refs = api.list_repo_refs(repo, include_pull_requests=True)
results["refs"] = [ref.ref for ref in [*refs.branches, *refs.tags, *refs.pull_requests]]
results["discussion"] = api.get_discussion_details(repo, 1).title
results["license"] = ModelCard.load(repo).data.license
card = b"---\\nlicense: apache-2.0\\n---\\n# more"  # push_to_hub asks another Hub before 2.2
api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
downloaded = hf_hub_download(repo, "model-00002-of-00002.safetensors")
results["same"] = Path(downloaded).read_bytes() == (folder / Path(downloaded).name).read_bytes()
api.create_branch(repo, branch="old", revision=results["first"])
api.delete_branch(repo, branch="old")
api.create_repo("tester/other")
api.delete_repo("tester/other")
print(json.dumps(results))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.create(REPO)
        hub.commit(REPO, "main", {"config.json": b"{}", "model.safetensors": WEIGHTS})
        yield hub


def run_client(
    hub: LoopbackHub, script: str, repo_id: str, folder: Path, token: str | None = "hf_test"
) -> dict[str, Any]:
    """Run a script with the real client; return the results that it prints."""
    environment = {**os.environ, **hub_environment(hub, folder.parent / "home", token)}
    completed = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, repo_id, str(folder)],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    results: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return results


def fetch(url: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Get an address on a connection of its own, without following redirects."""
    address, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", f"/{path}", headers=headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def resolve_url(hub: LoopbackHub, path: str = "model.safetensors", repo_id: str = REPO) -> str:
    return f"{hub.url}/{repo_id}/resolve/main/{path}"


def blob_url(hub: LoopbackHub) -> str:
    """Return where the Hub says that the weights are."""
    status, headers, _ = fetch(resolve_url(hub))
    assert status == 302
    return str(headers["Location"])


def safetensors_bytes(value: int) -> bytes:
    """Return a file with one tensor, without the help of a framework."""
    n_bytes = 4 * 300 * 300
    header = {"w": {"dtype": "F32", "shape": [300, 300], "data_offsets": [0, n_bytes]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes([value % 251]) * n_bytes


@pytest.mark.parametrize("options", STORAGES)
def test_the_real_client_reads(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with LoopbackHub(tmp_path / "hub", page_size=3, **options) as hub:
        hub.create(REPO)
        heads = {}
        for step in (1, 1000):
            files: dict[str, bytes | Path | None] = {
                "config.json": b'{"step": %d}' % step,
                "model.safetensors": safetensors_bytes(step),
            }
            heads[step] = hub.commit(REPO, f"step{step}", files, f"step {step}")
        hub.commit(REPO, "main", {"config.json": b"{}", "sub/a.txt": b"a", "sub/b/c.txt": b"c"})
        hub.tag(REPO, "v0")

        results = run_client(hub, READ, REPO, folder)

        names = [".gitattributes", "config.json", "model.safetensors"]
        assert results == {
            "info": [heads[1000], names],
            "sizes": [len(content) for content in hub.files(REPO, "step1000").values()],
            "whoami": "tester",
            "branches": ["main", "step1", "step1000"],
            "tags": ["v0"],
            "titles": ["step 1000", "initial commit"],
            "tree": [".gitattributes", "config.json", "sub", "sub/a.txt", "sub/b", "sub/b/c.txt"],
            "top": [".gitattributes", "config.json", "sub"],
            "sub": ["sub/a.txt", "sub/b"],
            "changed by": ["initial commit", "step 1000", "step 1000"],
            "paths": ["sub", "config.json"],
            "exists": [True, False],
            "resolved": heads[1],
            "config": '{"step": 1000}',
            "snapshot": ["config.json"],
            "shape": [300, 300],
            "range is right": True,
            "no repo": ["RepositoryNotFoundError", 404],
            "no revision": ["RevisionNotFoundError", 404],
            "no entry": ["RemoteEntryNotFoundError", 404],
            "no tree": ["RemoteEntryNotFoundError", 404],
            "bad token": ["HfHubHTTPError", 401],
        }
        assert (folder / "downloaded").read_bytes() == safetensors_bytes(1000)
        cdn_requests = [request for request in hub.requests if request.server == "cdn"]
        assert 206 in [request.status for request in cdn_requests]
        assert not any(request.authorization for request in cdn_requests)
        assert hub.count("GET", "/xet-read-token/") == int(hub.xet)


@pytest.mark.parametrize("options", STORAGES)
def test_the_real_client_pushes(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for number in (1, 2):
        content = safetensors_bytes(number)
        (folder / f"model-{number:05d}-of-00002.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "text.txt").write_text("x")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# hello")
    with LoopbackHub(tmp_path / "hub", **options) as hub:
        results = run_client(hub, PUSH, "tester/average", folder)

        assert results.pop("first") == results.pop("again")
        assert results.pop("branch") == hub.branches("tester/average")["ema-0.999"]
        assert results.pop("extra") == hub.commits("tester/average")[2].oid
        assert results == {
            "pull request": f"{hub.url}/tester/average/discussions/1",
            "stale": ["HfHubHTTPError", 412],
            "no branch": ["RevisionNotFoundError", 404],
            "refs": ["refs/heads/main", "refs/heads/ema-0.999", "refs/tags/v1", "refs/pr/1"],
            "discussion": "Upload folder using huggingface_hub",
            "license": "mit",
            "same": True,
        }
        assert [commit.title for commit in hub.commits("tester/average")] == [
            "Upload README.md with huggingface_hub",
            "Delete sub/text.txt with huggingface_hub",
            "extra",
            "average",
            "initial commit",
        ]
        pushed = hub.files("tester/average")
        assert list(pushed) == [
            ".gitattributes",
            "README.md",
            "config.json",
            "extra.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert pushed["model-00002-of-00002.safetensors"] == safetensors_bytes(2)
        assert pushed["config.json"] == b"{}"
        assert hub.files("tester/average", "ema-0.999")["config.json"] == b'{"a": 1}'
        assert hub.files("tester/average", "refs/pr/1")["config.json"] == b'{"a": 2}'
        assert hub.tags("tester/average") == {"v1": hub.commits("tester/average")[1].oid}
        assert list(hub.branches("tester/average")) == ["main", "ema-0.999", "refs/pr/1"]
        assert hub.repositories() == ["tester/average"]
        # two shards of four parts each, or whole, or not over HTTP at all
        n_uploads = {"basic": 3, "multipart": 9, "xet": 0}
        storage = "xet" if hub.xet else "multipart" if options else "basic"
        assert hub.count("PUT", "/upload/", "cdn") == n_uploads[storage]


def test_strangers_meet_closed_doors(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("tester/private", private=True)
    hub.create("tester/gated", gated=True)
    hub.commit("tester/gated", "main", {"config.json": b"{}"})
    folder = tmp_path / "folder"
    folder.mkdir()
    results = run_client(
        hub,
        """
results["private"] = error_of(lambda: api.model_info("tester/private"))
results["missing"] = error_of(lambda: api.model_info("tester/missing"))
results["gated"] = error_of(lambda: hf_hub_download("tester/gated", "config.json"))
results["gated info"] = api.model_info("tester/gated").gated
results["write"] = error_of(lambda: api.create_branch(repo, branch="b"))
results["whoami"] = error_of(lambda: api.create_repo("tester/new"))
print(json.dumps(results))
""",
        REPO,
        folder,
        token=None,
    )
    assert results == {
        "private": ["RepositoryNotFoundError", 401],
        "missing": ["RepositoryNotFoundError", 401],
        "gated": ["GatedRepoError", 403],
        "gated info": "auto",
        "write": ["HfHubHTTPError", 401],
        "whoami": ["HfHubHTTPError", 401],
    }
    assert not any(request.authorization for request in hub.requests)
    for token, expected in (("hf_test", 200), ("hf_wrong", 401)):
        status, headers, _ = fetch(
            f"{hub.url}/api/models/tester/private", Authorization=f"Bearer {token}"
        )
        assert status == expected
        assert "X-Error-Code" not in headers


def test_a_path_becomes_a_large_file_without_a_copy(hub: LoopbackHub, tmp_path: Path) -> None:
    path = tmp_path / "big.dat"
    path.write_bytes(WEIGHTS * 20)
    hub.commit(REPO, "main", {"notes.txt": path}, "notes")
    status, headers, _ = fetch(resolve_url(hub, "notes.txt"))
    assert status == 302
    assert headers["X-Linked-Size"] == str(len(WEIGHTS) * 20)
    assert headers["X-Linked-Etag"] == f'"{hashlib.sha256(WEIGHTS * 20).hexdigest()}"'
    assert headers["X-Repo-Commit"] == hub.commits(REPO)[0].oid
    assert path.stat().st_nlink == 2
    assert fetch(headers["Location"])[2] == path.read_bytes()


def test_branches_start_from_main_or_from_nothing(hub: LoopbackHub) -> None:
    hub.commit(REPO, "step1", {"a.txt": b"a", "config.json": None}, "one")
    hub.commit(REPO, "alone", {"a.txt": b"a"}, "two", orphan=True)
    hub.branch(REPO, "copy", "step1")
    assert sorted(hub.files(REPO, "step1")) == [".gitattributes", "a.txt", "model.safetensors"]
    assert hub.files(REPO, "alone") == {"a.txt": b"a"}
    assert [commit.title for commit in hub.commits(REPO, "alone")] == ["two"]
    assert hub.files(REPO, "copy") == hub.files(REPO, "step1")
    with pytest.raises(KeyError, match="no revision nope"):
        hub.files(REPO, "nope")


def test_history_comes_in_pages(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path, page_size=2) as hub:
        hub.create("gpt2")
        for number in range(4):
            hub.commit("gpt2", "main", {"a.txt": b"%d" % number}, f"commit {number}")
        url = f"{hub.url}/api/models/gpt2/commits/main"
        titles = []
        while url:
            _, headers, body = fetch(url)
            titles.append([commit["title"] for commit in json.loads(body)])
            url = headers.get("Link", "").partition(">")[0].removeprefix("<")
        assert titles == [
            ["commit 3", "commit 2"],
            ["commit 1", "commit 0"],
            ["initial commit"],
        ]


@pytest.mark.parametrize(
    ("asked", "expected_range", "expected"),
    [
        ("bytes=10-19", "bytes 10-19/256000", WEIGHTS[10:20]),
        ("bytes=255990-", "bytes 255990-255999/256000", WEIGHTS[-10:]),
        ("bytes=-5", "bytes 255995-255999/256000", WEIGHTS[-5:]),
        ("bytes=255999-999999", "bytes 255999-255999/256000", WEIGHTS[-1:]),
    ],
)
def test_ranges_of_large_files(
    hub: LoopbackHub, asked: str, expected_range: str, expected: bytes
) -> None:
    status, headers, body = fetch(blob_url(hub), Range=asked)
    assert (status, headers["Content-Range"], body) == (206, expected_range, expected)
    request = hub.requests[-1]
    assert (request.range, request.status, request.sent_bytes) == (asked, 206, len(expected))
    assert request.server == "cdn"


def test_ranges_that_make_no_sense(hub: LoopbackHub) -> None:
    status, headers, body = fetch(blob_url(hub), Range="bytes=256000-256001")
    assert (status, headers["Content-Range"], body) == (416, "bytes */256000", b"")
    for asked in ("bytes=9-3", "bytes=-", "bytes=0-1,4-5", "lines=1-2"):
        assert fetch(blob_url(hub), Range=asked)[::2] == (200, WEIGHTS)


def test_regular_files_have_ranges_too(hub: LoopbackHub) -> None:
    status, headers, body = fetch(resolve_url(hub, "config.json"), Range="bytes=1-1")
    assert (status, body) == (206, b"}")
    assert headers["X-Repo-Commit"] == hub.commits(REPO)[0].oid


def test_names_may_hold_any_letters(hub: LoopbackHub) -> None:
    name = "größe/模型 & 100%.bin"
    hub.commit(REPO, "höhe/1", {name: b"content"})
    url = f"{hub.url}/{REPO}/resolve/{quote('höhe/1', safe='')}/{quote(name)}"
    status, headers, _ = fetch(url)
    assert status == 302
    assert fetch(headers["Location"])[2] == b"content"
    status, headers, body = fetch(f"{hub.url}/{REPO}/resolve/{quote('模型')}/a")
    assert (status, headers["X-Error-Code"]) == (404, "RevisionNotFound")
    assert json.loads(body)["error"] == "Invalid rev id: 模型"


def test_the_cdn_refuses_a_token(hub: LoopbackHub) -> None:
    url = blob_url(hub)
    assert url.startswith("http://localhost:")
    assert hub.url.startswith("http://127.0.0.1:")
    assert fetch(url, Authorization="Bearer hf_test")[0] == 400


def test_expired_addresses_answer_403_until_they_are_resolved_again(hub: LoopbackHub) -> None:
    old = blob_url(hub)
    assert fetch(old)[0] == 200
    hub.expire_urls()
    assert fetch(old)[0] == 403
    assert fetch(blob_url(hub))[::2] == (200, WEIGHTS)


def test_xet_tokens_are_refused_without_xet(hub: LoopbackHub) -> None:
    assert fetch(f"{hub.url}/api/models/{REPO}/xet-read-token/main")[0] == 404


def test_requests_are_counted(hub: LoopbackHub) -> None:
    url = blob_url(hub)
    fetch(url)
    fetch(url, Range="bytes=0-9")
    assert hub.count("GET", "/resolve/") == hub.count("GET", server="hub") == 1
    assert [request.sent_bytes for request in hub.find("GET", "/blob/")] == [len(WEIGHTS), 10]
    assert hub.sent_bytes == sum(request.sent_bytes for request in hub.requests)
    hub.requests.clear()
    assert hub.sent_bytes == 0


def test_a_status_comes_with_headers_and_only_so_often(hub: LoopbackHub) -> None:
    hub.inject(Fault("GET .*/resolve/", status=429, headers={"Retry-After": "3"}, times=2, after=1))
    answers = [fetch(resolve_url(hub, "config.json")) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 429, 429, 200]
    assert answers[1][1]["Retry-After"] == "3"
    assert hub.faults.n_left == 0


def test_faults_are_consumed_in_order(hub: LoopbackHub) -> None:
    hub.inject(
        Fault("GET .*/config.json", status=503),
        Fault("POST", status=500),
        Fault("GET", status=401, after=1),
        Fault("GET", status=403),
    )
    statuses = [fetch(resolve_url(hub, "config.json"))[0] for _ in range(5)]
    assert statuses == [503, 200, 401, 403, 200]
    assert hub.faults.n_left == 1
    hub.faults.clear()
    assert hub.faults.n_left == 0


def test_ignored_range(hub: LoopbackHub) -> None:
    hub.inject(Fault("GET /blob/", ignore_range=True))
    status, headers, body = fetch(blob_url(hub), Range="bytes=0-9")
    assert (status, body) == (200, WEIGHTS)
    assert "Content-Range" not in headers


@pytest.mark.parametrize("n_bytes", [0, 1000, 200_000])
def test_truncated_body(hub: LoopbackHub, n_bytes: int) -> None:
    hub.inject(Fault("GET /blob/", truncate_bytes=n_bytes))
    with pytest.raises(http.client.IncompleteRead) as caught:
        fetch(blob_url(hub))
    assert caught.value.partial == WEIGHTS[:n_bytes]
    assert caught.value.expected == len(WEIGHTS) - n_bytes
    assert hub.requests[-1].sent_bytes == n_bytes


@pytest.mark.parametrize("n_bytes", [None, 0, 1000])
def test_reset_connection(hub: LoopbackHub, n_bytes: int | None) -> None:
    hub.inject(Fault("GET /blob/", reset=True, truncate_bytes=n_bytes))
    with pytest.raises(ConnectionResetError):
        fetch(blob_url(hub))
    assert fetch(blob_url(hub))[2] == WEIGHTS


def test_delayed_answer(hub: LoopbackHub) -> None:
    hub.inject(Fault("GET /blob/", delay_seconds=0.2))
    start = time.monotonic()
    assert fetch(blob_url(hub))[2] == WEIGHTS
    assert time.monotonic() - start >= 0.2


def test_silent_server_is_closed_promptly(hub: LoopbackHub) -> None:
    hub.inject(Fault("GET .*/config.json", silent=True))
    with (
        pytest.raises(TimeoutError),
        urllib.request.urlopen(resolve_url(hub, "config.json"), timeout=0.2),
    ):
        pass
    assert hub.requests[-1].status is None
    start = time.monotonic()
    hub.close()
    assert time.monotonic() - start < 1
    with pytest.raises(ConnectionRefusedError):
        fetch(resolve_url(hub))


def test_dripping_body(hub: LoopbackHub) -> None:
    hub.inject(Fault("GET /blob/", drip=True, times=2))
    start = time.monotonic()
    assert fetch(blob_url(hub), Range="bytes=5-8")[2] == WEIGHTS[5:9]
    assert time.monotonic() - start >= 0.2
    # a long one ends when the hub does
    closer = threading.Timer(0.2, hub.close)
    closer.start()
    with pytest.raises(http.client.IncompleteRead):
        fetch(blob_url(hub))
    closer.join()


def test_flipped_byte(hub: LoopbackHub) -> None:
    hub.inject(Fault("GET /blob/", flip_byte=1000, times=3))
    assert fetch(blob_url(hub), Range="bytes=0-999")[2] == WEIGHTS[:1000]
    body = fetch(blob_url(hub), Range="bytes=990-1009")[2]
    assert [index for index in range(20) if body[index] != WEIGHTS[990 + index]] == [10]
    whole = fetch(blob_url(hub))[2]
    assert len(whole) == len(WEIGHTS)
    assert whole != WEIGHTS
    assert fetch(blob_url(hub))[2] == WEIGHTS


def test_shifted_content_range(hub: LoopbackHub) -> None:
    hub.inject(Fault("GET /blob/", shift_content_range=True))
    _, headers, body = fetch(blob_url(hub), Range="bytes=10-19")
    assert (headers["Content-Range"], body) == ("bytes 11-19/256000", WEIGHTS[10:20])


def test_short_content_length(hub: LoopbackHub) -> None:
    hub.inject(Fault("GET /blob/", short_content_length=True))
    status, headers, body = fetch(blob_url(hub), Range="bytes=10-19")
    assert (status, headers["Content-Range"]) == (206, "bytes 10-19/256000")
    assert (headers["Content-Length"], body) == ("9", WEIGHTS[10:19])


def test_login_page(hub: LoopbackHub) -> None:
    hub.inject(Fault("GET /blob/", html_body=True))
    status, headers, body = fetch(blob_url(hub), Range="bytes=10-19")
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert b"log in" in body


@pytest.mark.parametrize("name", ["etag", "Content-Range", "Content-Length"])
def test_dropped_header(hub: LoopbackHub, name: str) -> None:
    hub.inject(Fault("GET /blob/", drop_header=name))
    _, headers, body = fetch(blob_url(hub), Range="bytes=10-19")
    assert name not in headers
    assert body == WEIGHTS[10:20]
    assert name in fetch(blob_url(hub), Range="bytes=10-19")[1]


def test_a_lost_answer_to_a_commit_leaves_the_commit(hub: LoopbackHub) -> None:
    hub.inject(Fault("POST .*/commit/", truncate_bytes=0))
    lines = [
        {"key": "header", "value": {"summary": "lost"}},
        {"key": "file", "value": {"path": "a.txt", "content": "YQ=="}},
    ]
    request = urllib.request.Request(
        f"{hub.url}/api/models/{REPO}/commit/main",
        "\n".join(map(json.dumps, lines)).encode(),
        {"Authorization": "Bearer hf_test"},
    )
    with (
        urllib.request.urlopen(request, timeout=10) as response,
        pytest.raises(http.client.IncompleteRead),
    ):
        response.read()
    assert hub.commits(REPO)[0].title == "lost"
    assert hub.files(REPO)["a.txt"] == b"a"


def test_unknown_calls_are_told_so(hub: LoopbackHub) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(f"{hub.url}/api/datasets/a/b", timeout=10)
    with caught.value as error:
        assert error.headers["X-Error-Message"] == "no endpoint GET /api/datasets/a/b"


def test_one_connection_serves_many_requests(hub: LoopbackHub) -> None:
    address = hub.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.connect()
    first = connection.sock
    for method, path in (("GET", "config.json"), ("HEAD", "model.safetensors"), ("GET", "nope")):
        connection.request(method, f"/{REPO}/resolve/main/{path}", body=b"left unread")
        connection.getresponse().read()
    assert connection.sock is first
    connection.close()


def test_clients_that_leave_early_do_no_harm(hub: LoopbackHub, tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    with path.open("wb") as file:
        file.truncate(1 << 28)
    hub.commit(REPO, "main", {"big.bin": path})
    location = fetch(resolve_url(hub, "big.bin"))[1]["Location"]
    address, _, target = location.removeprefix("http://").partition("/")
    host, _, port = address.partition(":")
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(f"GET /{target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
    # this one is still downloading when the hub is closed
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(f"GET /{target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        start = time.monotonic()
        hub.close()
        assert time.monotonic() - start < 1
    assert all(request.sent_bytes < 1 << 28 for request in hub.find("GET", "/blob/"))
