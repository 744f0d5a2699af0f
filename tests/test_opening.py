"""Opening checkpoints: sources in the order of training, and single ones behind them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeCheckpoint
from hub_fixtures import REPO

from ckptavg import CheckpointError, HubError, Selection, SourceError
from ckptavg.opening import Opened, opened_in_order


def opened(*arguments: Any, **options: Any) -> Opened:
    with opened_in_order(*arguments, **options) as found:
        return found


def names(found: Opened) -> list[str]:
    return [Path(one.label).stem for one in found.checkpoints]


@pytest.fixture
def paths(make_checkpoint: MakeCheckpoint) -> list[Path]:
    return [make_checkpoint(f"step{step}", {"w": torch.ones(2)}) for step in (3, 1, 2)]


def test_further_checkpoints_come_behind_the_sources_in_their_own_order(
    paths: list[Path], make_checkpoint: MakeCheckpoint
) -> None:
    further = [make_checkpoint(f"step{step}", {"w": torch.ones(2)}) for step in (9, 0)]
    found = opened(paths, further=further)
    assert names(found) == ["step1", "step2", "step3", "step9", "step0"]
    assert (list(found.order), len(found.opened)) == ([1, 2, 0], 5)
    assert found.notes == ["checkpoints are in the order of training, not as typed"]


def test_a_selection_does_not_concern_them(paths: list[Path]) -> None:
    found = opened(paths, further=[paths[1]], selection=Selection(last=1))
    assert names(found) == ["step3", "step1"]


def test_they_may_stand_alone(paths: list[Path]) -> None:
    found = opened((), further=paths)
    assert names(found) == ["step3", "step1", "step2"]
    assert list(found.order) == []


@pytest.mark.parametrize("sources", [(), []])
def test_nothing_at_all_is_refused(sources: Any) -> None:
    with pytest.raises(SourceError, match="no checkpoints were named"):
        opened(sources)


def test_prefixes_are_stripped_where_they_are(
    paths: list[Path], make_checkpoint: MakeCheckpoint
) -> None:
    prefixed = make_checkpoint("prefixed", {"model.w": torch.ones(2)}, "torch")
    wrapped = make_checkpoint("wrapped", {"module.w": torch.ones(2)})
    found = opened([prefixed], further=[*paths, wrapped], strip_prefixes=["model."])
    assert [list(one.tensors) for one in found.checkpoints] == [["w"]] * 5


def test_names_may_be_kept_as_those_of_the_last(
    paths: list[Path], make_checkpoint: MakeCheckpoint
) -> None:
    wrapped = make_checkpoint("wrapped", {"module.w": torch.ones(2)})
    found = opened(paths, further=[wrapped], keep_prefix=True)
    assert {name for one in found.checkpoints for name in one.tensors} == {"module.w"}


def test_a_key_is_looked_for_in_all_of_them(make_checkpoint: MakeCheckpoint) -> None:
    first, second = (make_checkpoint(name, {"w": torch.ones(2)}, "torch") for name in "ab")
    opened([first], further=[second], state_key="state_dict")
    torch.save({"ema": {"w": torch.ones(2)}}, first)
    with pytest.raises(CheckpointError, match=r"b\.pt"):
        opened([first], further=[second], state_key="ema")


def test_all_are_closed_if_one_cannot_be_opened(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Any] = []
    monkeypatch.setattr("ckptavg.opening.close_all", closed.extend)
    with pytest.raises(CheckpointError, match=r"nothing\.pt"):
        opened(paths, further=[paths[0], "nothing.pt"])
    assert len(closed) == 4
    for one in closed:
        one.close()


def test_an_error_of_a_further_one_on_the_hub_tells_what_was_fetched(steps: list[Path]) -> None:
    first = f"hf://{REPO}@step1"
    assert opened((), further=[first]).hub.fetched_nbytes
    with pytest.raises((HubError, SourceError)) as caught:
        opened((), further=[first, f"hf://{REPO}@nothing"])
    notes = getattr(caught.value, "__notes__", [])
    assert any("bytes of headers and lists were fetched" in note for note in notes)
