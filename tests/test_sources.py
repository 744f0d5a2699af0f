"""From what was typed to checkpoints in the order of training."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hostile import whole
from safetensors.torch import save_file

from ckptavg.checkpoint import Checkpoint, open_checkpoint
from ckptavg.errors import CheckpointError, SourceError
from ckptavg.gathering import close_all, open_sources, order_by_position
from ckptavg.sources import expand_sources

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current directory, an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def refused(sources: Sequence[str | Path], what: str) -> None:
    """Check that sources are refused with exactly this message."""
    with pytest.raises(SourceError, match=whole(what)):
        expand_sources(sources)


def test_paths_stay_in_the_order_typed() -> None:
    touch("b", "a")
    assert expand_sources(["b", Path("a"), "b"]) == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("checkpoint-*", ["checkpoint-9", "checkpoint-10", "checkpoint-100"]),
        ("checkpoint-1?", ["checkpoint-10"]),
        ("checkpoint-[19]", ["checkpoint-9"]),
        ("*-10", ["checkpoint-10"]),
        ("e2s*", ["e2s9", "e2s10"]),
        ("./e*s9", ["./e2s9", "./e10s9"]),
    ],
)
def test_globs_match_in_natural_order(pattern: str, expected: list[str]) -> None:
    touch("checkpoint-10", "checkpoint-9", "checkpoint-100", "e10s9", "e2s10", "e2s9")
    assert expand_sources([pattern]) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s{1..3}", "s1 s2 s3"),
        ("s{3..1}", "s3 s2 s1"),
        ("s{2..10..4}", "s2 s6 s10"),
        ("s{2..10..-4}", "s2 s6 s10"),
        ("s{08..10}", "s08 s09 s10"),
        ("s{-1..1}", "s-1 s0 s1"),
        ("s{1,3}", "s1 s3"),
        ("s{3,1}{,0}", "s3 s30 s1 s10"),
        ("s{1,{2,3}}", "s1 s2 s3"),
        ("s{{1..2},3}", "s1 s2 s3"),
        ("./s{1..2}/x", "./s1/x ./s2/x"),
        ("{s,t}{1..2}", "s1 s2 t1 t2"),
    ],
)
def test_braces_expand_as_in_a_shell(
    pattern: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "exists", lambda _: True)
    assert expand_sources([pattern]) == expected.split()


@pytest.mark.parametrize("name", ["a{b}", "a{", "a}b{", "{}", "a{1..}", "{a..c}", "a{1..2", "[x]"])
def test_what_is_no_pattern_stands_for_itself(name: str) -> None:
    touch(name)
    assert expand_sources([name]) == [name]


@pytest.mark.parametrize("name", ["a{1,2}", "a{1..2}", "a*", "a[1]", "a?"])
def test_a_path_that_exists_is_never_expanded(name: str) -> None:
    touch(name, "a1", "a2")
    assert expand_sources([name]) == [name]


def test_braces_and_globs_mix() -> None:
    touch("r1/s10", "r1/s9", "r2/s1")
    assert expand_sources(["r{2,1}/s*"]) == ["r2/s1", "r1/s9", "r1/s10"]


def test_nothing_named_is_refused() -> None:
    refused([], "no checkpoints were named")


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    touch("a1")
    refused(["a1", "b*"], "b*: matches nothing")
    refused(["{a,b}*"], "{a,b}*: matches nothing")


def test_a_missing_path_names_a_near_one() -> None:
    touch("runs/checkpoint-500")
    message = "runs/checkpoint-50: no such file or directory; did you mean runs/checkpoint-500?"
    refused(["runs/checkpoint-50"], message)
    refused(["runs/xyz"], "runs/xyz: no such file or directory")
    refused(["./absent/xyz"], "./absent/xyz: no such file or directory")


def test_a_missing_member_of_a_range_is_refused_not_skipped() -> None:
    touch("s1", "s3")
    message = "s2: no such file or directory; did you mean s3?"
    with pytest.raises(SourceError) as caught:
        expand_sources(["s{1..3}"])
    assert str(caught.value).startswith(message.partition("; did")[0])


def test_paths_that_cannot_be_are_refused() -> None:
    for path in ("a" * 300, "a" * 300 + "/b", "a\0b"):
        with pytest.raises(SourceError, match="no such file or directory$"):
            expand_sources([path])


def test_a_link_that_leads_nowhere_is_refused() -> None:
    Path("link").symlink_to("absent")
    refused(["link"], "link: is a symbolic link that leads nowhere")
    refused(["l*"], "link: is a symbolic link that leads nowhere")


def test_a_range_of_step_0_is_refused() -> None:
    refused(["s{1..3..0}"], "s{1..3..0}: a range with step 0")


@pytest.mark.parametrize("pattern", ["s{1..200000}", "s{1..1000}{1..1000}", "{a,b}" * 60])
def test_patterns_without_end_are_refused(pattern: str) -> None:
    refused([pattern], f"{pattern}: names more than 10000 checkpoints")


def save(path: str, **content: object) -> str:
    torch.save({"model": {"w": torch.ones(1)}, **content}, path)
    return path


def test_checkpoints_are_opened_in_the_order_typed_and_labelled_as_typed() -> None:
    save("s2.pt")
    save("s1.pt")
    checkpoints, notes = open_sources(["s2.pt", "./s1.pt"])
    assert [checkpoint.label for checkpoint in checkpoints] == ["s2.pt", "./s1.pt"]
    assert notes == []
    close_all(checkpoints)


def test_the_same_file_by_two_names_is_noted() -> None:
    save("a.pt")
    Path("link.pt").symlink_to("a.pt")
    os.link("a.pt", "hard.pt")
    checkpoints, notes = open_sources(["a.pt", "a.pt", "link.pt", "hard.pt"])
    assert notes == [
        f"{name} is the same checkpoint as a.pt: it counts twice"
        for name in ("a.pt", "link.pt", "hard.pt")
    ]
    assert len(checkpoints) == 4
    close_all(checkpoints)


def test_a_state_key_is_passed_on() -> None:
    torch.save({"model": {"w": torch.ones(1)}, "ema": {"v": torch.ones(1)}}, "a.pt")
    (checkpoint,), _ = open_sources(["a.pt"], state_key="ema")
    assert list(checkpoint.tensors) == ["v"]
    close_all([checkpoint])


def test_checkpoints_opened_before_a_bad_one_are_closed() -> None:
    save("a.pt")
    touch("b.pt")
    before = os.listdir("/proc/self/fd")  # noqa: PTH208  # what is open, by number
    with pytest.raises(CheckpointError, match=whole("b.pt: is empty (0 bytes)")):
        open_sources(["a.pt", "a.pt", "b.pt"])
    assert len(os.listdir("/proc/self/fd")) == len(before)  # noqa: PTH208  # likewise


def opened(*paths: str) -> list[Checkpoint]:
    checkpoints = []
    for path in paths:
        checkpoint = open_checkpoint(path)
        checkpoint.close()
        checkpoints.append(checkpoint)
    return checkpoints


def test_steps_order_checkpoints() -> None:
    checkpoints = opened(save("a.pt", step=30), save("b.pt", step=4), save("c.pt", step=200))
    assert order_by_position(checkpoints) == [1, 0, 2]


def test_steps_in_names_order_checkpoints() -> None:
    names = ("step_1000.pt", "step_200.pt", "step_30.pt")
    assert order_by_position(opened(*map(save, names))) == [2, 1, 0]


def test_steps_inside_win_over_names() -> None:
    checkpoints = opened(save("step_2.pt", step=10), save("step_9.pt", step=5))
    assert [checkpoint.step for checkpoint in checkpoints] == [10, 5]
    assert order_by_position(checkpoints) == [1, 0]


def test_epochs_order_checkpoints_without_steps() -> None:
    checkpoints = opened(save("a.pt", epoch=3), save("b.pt", epoch=1), save("epoch-2.pt"))
    assert order_by_position(checkpoints) == [1, 2, 0]


def test_steps_win_over_epochs() -> None:
    checkpoints = opened(save("a.pt", epoch=1, step=9), save("b.pt", epoch=2, step=3))
    assert order_by_position(checkpoints) == [1, 0]


def test_epochs_decide_where_a_step_is_missing() -> None:
    checkpoints = opened(save("a.pt", epoch=2, step=1), save("b.pt", epoch=1))
    assert order_by_position(checkpoints) == [1, 0]


@pytest.mark.parametrize("steps", [(5, 5), (5, None), (None, None)])
def test_the_order_typed_stays_where_nothing_decides(steps: tuple[int | None, int | None]) -> None:
    first, second = steps
    checkpoints = opened(save("b.pt", step=first), save("a.pt", step=second))
    assert order_by_position(checkpoints) == [0, 1]


def test_no_checkpoints_have_no_order() -> None:
    assert order_by_position([]) == []


def test_directories_of_a_trainer_are_ordered_by_their_names() -> None:
    names = ["checkpoint-1000", "checkpoint-500"]
    for name in names:
        Path(name).mkdir()
        save_file({"w": torch.ones(1)}, f"{name}/model.safetensors")
    assert order_by_position(opened(*names)) == [1, 0]
