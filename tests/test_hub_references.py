"""What may be typed for revisions on the Hub, and what it stands for."""

from pathlib import Path

import pytest
from hostile import whole
from hub_fixtures import REPO
from loopback_hub import LoopbackHub

from ckptavg.errors import SourceError
from ckptavg.hub import HubReference, natural_order, parse_reference, pinned_reference
from ckptavg.hub import reference_text as text_of
from ckptavg.hub.references import Ancestor, is_commit
from ckptavg.sources import expand_sources, hub_repository
from ckptavg.tensors import HubRevision

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, an empty one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def steps(hub: LoopbackHub, here: Path) -> LoopbackHub:
    """A hub with branches ``step1``, ``step2``, ``step10``, a tag, a pull request and folders."""
    for step in (10, 2, 1):
        hub.commit(REPO, f"step{step}", {"a": b"%d" % step}, f"step {step}")
    for number in range(5):
        files = {f"run/step-{number}/model.safetensors": b"%d" % number}
        hub.commit(REPO, "main", files, f"commit {number}")
    hub.commit(REPO, "exp/lr-1", {"a": b"lr"})
    hub.commit(REPO, "50%25", {"a": b"%"})
    hub.tag(REPO, "v1.0", "step2")
    hub.branch(REPO, "refs/pr/7", "step1")
    return hub


def found(*sources: str | Path | HubRevision) -> list[str]:
    """Expand sources on the Hub; return how each would be labelled."""
    return [
        text_of(one.repo, one.revision, one.path) if isinstance(one, HubRevision) else one
        for one in expand_sources(list(sources))
    ]


def commits(*sources: str) -> list[str]:
    """Expand sources on the Hub; return their commits."""
    return [one.commit for one in expand_sources(list(sources)) if isinstance(one, HubRevision)]


# what is a reference


@pytest.mark.parametrize(
    ("text", "revision", "path"),
    [
        ("org/name", "main", ""),
        ("org/name@step1000", "step1000", ""),
        (f"org/name@{COMMIT}", COMMIT, ""),
        ("org/name@v1.0/sub", "v1.0", "sub"),
        ("org/name@v1.0/a/b/model.safetensors", "v1.0", "a/b/model.safetensors"),
        ("org/name@main/sub/", "main", "sub"),
        ("org/name@exp%2Flr-1", "exp/lr-1", ""),
        ("org/name@exp%2Flr-1/sub", "exp/lr-1", "sub"),
        ("org/name@refs/pr/3", "refs/pr/3", ""),
        ("org/name@refs/pr/3/sub", "refs/pr/3", "sub"),
        ("org/name@refs/convert/parquet", "refs/convert/parquet", ""),
        ("org/name@refs%2Fpr%2F3", "refs/pr/3", ""),
        ("org/name@step*", "step*", ""),
        ("org/name@main/step-[0-9]", "main", "step-[0-9]"),
        ("org/name@main~3", "main~3", ""),
        ("org/name@main~10..main", "main~10..main", ""),
        ("hf://org/name", "main", ""),
        ("hf://org/name/sub/model.bin", "main", "sub/model.bin"),
        ("hf://org/name@v1/sub", "v1", "sub"),
        ("My-Org_1/Name.with-dots_2@a@b", "a@b", ""),
    ],
)
def test_every_form_is_taken_apart(text: str, revision: str, path: str) -> None:
    reference = parse_reference(text)
    assert reference is not None
    assert (reference.revision, reference.path) == (revision, path)
    assert reference.repo == text.removeprefix("hf://").partition("@")[0][: len(reference.repo)]
    assert reference.has_revision == ("@" in text)
    again = parse_reference(str(reference))  # it is always written with its revision
    assert again == HubReference(reference.repo, revision, path, has_revision=True)


@pytest.mark.parametrize(
    "text",
    [
        "name", "name@v1", "/org/name@v1", "./org/name@v1", "../org/name@v1", "~/org/name@v1",
        "org/name/sub", "org/name@", "org/name@/sub", "org//name@v1", "org/na me@v1",
        ".org/name@v1", "org/.name@v1", "org/name@v1/../sub", "org/name@v1/..", "org/", "",
        f"org/{'n' * 97}@v1", "org/name@v1\n/x\n",
    ],
)  # fmt: skip
def test_everything_else_is_a_path(text: str) -> None:
    assert parse_reference(text) is None


def test_ranges_and_ancestors_are_told_from_names() -> None:
    def parsed(revision: str) -> HubReference:
        reference = parse_reference(f"org/name@{revision}")
        assert reference is not None
        return reference

    assert parsed("main~10..main").commit_range == (Ancestor("main", 10), Ancestor("main", 0))
    assert parsed("v1..main~2").commit_range == (Ancestor("v1", 0), Ancestor("main", 2))
    assert parsed("main~3").ancestor == Ancestor("main", 3)
    assert parsed("main~").ancestor == Ancestor("main", 1)
    assert parsed("main~~").ancestor == Ancestor("main~", 1)
    assert parsed("main~x").ancestor == Ancestor("main~x", 0)
    for revision in ("main", "v1.0", "..main", "main..", "step*"):
        assert parsed(revision).commit_range is None
    assert parsed("step?").revision_is_glob
    assert not parsed("main/step*").revision_is_glob
    assert parsed("main/step*").path_is_glob


def test_a_commit_is_told_by_its_digits() -> None:
    assert is_commit(COMMIT)
    assert is_commit(COMMIT[:7])
    for name in (COMMIT[:6], COMMIT + "0", COMMIT.upper(), "step143000", "main"):
        assert not is_commit(name)


@pytest.mark.parametrize("revision", ["main", "exp/lr-1", "50%25", "refs/pr/3", "a%2Fb"])
def test_what_is_written_is_read_again(revision: str) -> None:
    for path in ("", "sub", "a/b.safetensors"):
        reference = parse_reference(text_of("org/name", revision, path))
        assert reference == HubReference("org/name", revision, path, has_revision=True)


def test_a_pinned_reference_names_the_commit() -> None:
    one = HubRevision("org/name", "main~3", COMMIT, "sub", "title")
    assert pinned_reference(one) == f"hf://org/name@{one.revision}:{COMMIT}/sub"
    assert pinned_reference(one._replace(revision=COMMIT)) == f"hf://org/name@{COMMIT}/sub"


def test_a_pinned_name_is_that_commit_whatever_it_is_called_by_now(steps: LoopbackHub) -> None:
    before = expand_sources([f"{REPO}@step1", f"{REPO}@main~1..main", f"{REPO}@exp%2Flr-1/sub"])
    pins = [pinned_reference(one) for one in before if isinstance(one, HubRevision)]
    steps.commit(REPO, "step1", {"a": b"trained on"}, "go on")
    steps.commit(REPO, "main", {"a": b"trained on"}, "go on")
    assert expand_sources(pins) == before
    assert [one.title for one in before if isinstance(one, HubRevision)] == ["", "commit 4", ""]


def test_numbers_in_names_are_compared_as_numbers() -> None:
    names = ["step10", "step9", "step-1", "main", "stage2-step1", "stage1-step10", "10", "9"]
    assert sorted(names, key=natural_order) == [
        "9", "10", "main", "stage1-step10", "stage2-step1", "step9", "step10", "step-1",
    ]  # fmt: skip


# what it stands for


def test_branches_tags_commits_and_pull_requests_are_found(steps: LoopbackHub) -> None:
    branches = steps.branches(REPO)
    first, second = branches["step1"], branches["step2"]
    assert commits(f"{REPO}@step1", f"{REPO}@v1.0", f"{REPO}@{first}", f"{REPO}@{second[:8]}") == [
        first, second, first, second,
    ]  # fmt: skip
    assert commits(f"{REPO}@refs/pr/7") == [first]
    assert commits(f"{REPO}@exp%2Flr-1", f"{REPO}@50%2525") == [
        branches["exp/lr-1"], branches["50%25"],
    ]  # fmt: skip
    assert commits(f"hf://{REPO}", REPO) == [branches["main"]] * 2


def test_globs_and_braces_come_in_the_order_of_numbers(steps: LoopbackHub) -> None:
    expected = [f"{REPO}@step{step}" for step in (1, 2, 10)]
    assert found(f"{REPO}@step*") == expected
    assert found(f"{REPO}@step{{1,2,10}}") == expected
    assert found(f"{REPO}@step{{1..2}}") == expected[:2]
    assert found(f"{REPO}@step{{2..10..8}}") == expected[1:]
    assert found(f"{REPO}@step?") == expected[:2]
    assert found(f"{REPO}@v*", f"{REPO}@exp*") == [f"{REPO}@v1.0", f"{REPO}@exp%2Flr-1"]
    assert found(f"{{hf://,}}{REPO}@step2") == expected[1:2] * 2
    assert steps.count("GET", "/refs") == 7  # once a call


def test_globs_match_folders_and_files(steps: LoopbackHub) -> None:
    folders = [f"{REPO}@main/run/step-{number}" for number in range(5)]
    assert found(f"{REPO}@main/run/step-*") == folders
    assert found(f"{REPO}@main/r?n/step-[13]") == [folders[1], folders[3]]
    assert found(f"hf://{REPO}/run/step-*/model.safetensors") == [
        f"{folder}/model.safetensors" for folder in folders
    ]
    assert found(f"{REPO}@main/run/step-0/*.safetensors") == [f"{folders[0]}/model.safetensors"]


def test_earlier_commits_are_counted_as_git_counts_them(steps: LoopbackHub) -> None:
    history = [commit.oid for commit in steps.commits(REPO)]  # newest first
    assert commits(f"{REPO}@main~3", f"{REPO}@main~", f"{REPO}@main~0") == [
        history[3], history[1], history[0],
    ]  # fmt: skip
    assert commits(f"{REPO}@main~3..main") == history[:3][::-1]
    assert found(f"{REPO}@main~3..main~1") == [f"{REPO}@main~2", f"{REPO}@main~1"]
    assert commits(f"{REPO}@{history[4]}..main") == history[:4][::-1]
    (one,) = expand_sources(f"{REPO}@main~2")
    assert isinstance(one, HubRevision)
    assert one.title == "commit 2"


def test_the_history_is_read_over_many_pages(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_fixtures import talk_to

    with LoopbackHub(tmp_path / "pages", page_size=2) as hub:
        talk_to(hub, tmp_path / "home", monkeypatch)
        hub.create(REPO)
        for number in range(7):
            hub.commit(REPO, "main", {f"step-{number}/model.safetensors": b"x"})
        history = [commit.oid for commit in hub.commits(REPO)]
        assert commits(f"{REPO}@main~6..main") == history[:6][::-1]
        assert len(found(f"{REPO}@main/step-*")) == 7


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("@stp2", "@stp2: no such branch or tag; there are 7, for example step1, step2, step10"),
        ("@zzz", "@zzz: no such branch or tag; there are 7, for example step2, step10, v1.0"),
        ("@epoch*", "@epoch*: no branch or tag matches; there are 7, for example step2, step10, "
         "v1.0"),
        ("@main/stage-*", "@main/stage-*: no file or folder matches at main"),
        ("@main~6", "@main~6: main has only 6 commits"),
        ("@main:0123456", "@main:0123456: '0123456' is not the full SHA of a commit"),
        ("@step1..main", "@step1..main: step1 is no earlier commit of main"),
        ("@main..main", "@main..main: holds no commits"),
        ("@0123456789", "@0123456789: no such revision on the Hub"),
        ("@refs/pr/8", "@refs/pr/8: no such revision on the Hub"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_with_what_is(
    steps: LoopbackHub, source: str, message: str
) -> None:
    with pytest.raises(SourceError, match=whole(f"{REPO}{message}")):
        expand_sources(REPO + source)


# the Hub or here


def test_a_bare_name_is_local_where_its_first_part_is(steps: LoopbackHub, here: Path) -> None:
    assert found(REPO) == [f"{REPO}@main"]
    (here / "org").mkdir()
    with pytest.raises(SourceError, match=whole("org/model: no such file or directory")):
        expand_sources(REPO)
    (here / "org" / "model").mkdir()
    assert found(REPO) == [REPO]
    assert found(f"hf://{REPO}", f"{REPO}@main") == [f"{REPO}@main"] * 2


def test_a_local_path_wins_only_when_it_is_written_as_one(steps: LoopbackHub, here: Path) -> None:
    (here / "org" / "model@step1").mkdir(parents=True)
    (here / "org" / "model@mine").mkdir()
    local, remote = f"./{REPO}@step1", f"{REPO}@step1"
    assert found(local, remote, Path(remote)) == [local, remote, remote]
    assert [type(one) for one in expand_sources([local, remote, Path(remote)])] == [
        str, HubRevision, str,
    ]  # fmt: skip
    with pytest.raises(SourceError) as caught:
        expand_sources(f"{REPO}@mine")
    assert caught.value.__notes__ == [f"for the local path write ./{REPO}@mine"]


def test_local_and_hub_sources_stay_in_the_order_typed(steps: LoopbackHub, here: Path) -> None:
    for name in ("ckpt-2", "ckpt-10"):
        (here / name).mkdir()
    one = HubRevision(REPO, "mine", COMMIT, "sub")
    assert found("ckpt-10", f"{REPO}@step{{2,1}}", one, "ckpt-*") == [
        "ckpt-10", f"{REPO}@step2", f"{REPO}@step1", f"{REPO}@mine/sub", "ckpt-2", "ckpt-10",
    ]  # fmt: skip
    assert expand_sources(one) == [one]


@pytest.mark.parametrize(
    "text", ["hf://", "hf://name", "hf://org/name@v1/../x", "hf://org/na me", "hf:///org/name"]
)
def test_a_malformed_address_is_never_a_path(text: str, here: Path) -> None:
    message = f"{text}: is not of the form hf://org/name@revision/folder"
    with pytest.raises(SourceError, match=whole(message)):
        expand_sources(text)


def test_two_dots_never_lead_to_the_hub(steps: LoopbackHub) -> None:
    with pytest.raises(SourceError, match="no such file or directory"):
        expand_sources(f"{REPO}@main/../secret")
    assert steps.requests == []


def test_a_whole_repository_is_told_from_a_revision(here: Path) -> None:
    assert hub_repository(REPO) == hub_repository(f"hf://{REPO}") == REPO
    for text in (f"{REPO}@main", f"hf://{REPO}/sub", "./org/model", "model"):
        assert hub_repository(text) is None
