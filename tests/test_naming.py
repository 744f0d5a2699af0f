"""Wrapper prefixes of tensor names are stripped when all agree, or when asked."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from checkpoint_contract import CheckpointContract, read_tensor, same_content
from hostile import whole
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ckptavg.checkpoint import Checkpoint, normalise_names, open_checkpoint, under_last_names
from ckptavg.errors import CheckpointError, IncompatibleCheckpointsError


class TestAveragedModel(CheckpointContract):
    """What torch's AveragedModel saves: every name with a prefix, but that of its counter."""

    layout = "torch file"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = directory / "model.pt"
        wrapped = {f"module.{name}": value for name, value in tensors.items()}
        torch.save({"n_averaged": torch.tensor(5), **wrapped}, path)
        return path

    def open(self, path: Path) -> Checkpoint:
        (renamed,), _ = normalise_names([open_checkpoint(path)])
        return renamed


class TestRenamedCheckpoint(CheckpointContract):
    layout = "torch file"

    def save(self, directory: Path, tensors: Mapping[str, Tensor]) -> Path:
        path = directory / "model.pt"
        torch.save({f"module.{name}": value for name, value in tensors.items()}, path)
        return path

    def open(self, path: Path) -> Checkpoint:
        (renamed,), _ = normalise_names([open_checkpoint(path)])
        return renamed


class Wrapper(nn.Module):
    """What DistributedDataParallel does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]  # it is one
    return wrapped


def named(tmp_path: Path, label: str, *names: str) -> Checkpoint:
    path = tmp_path / f"{label}.safetensors"
    save_file({name: torch.full((2,), float(index)) for index, name in enumerate(names)}, path)
    return open_checkpoint(path, label=label)


@pytest.mark.parametrize(
    ("prefix", "stripped"),
    [
        ("module.", ["module."]),
        ("_orig_mod.", ["_orig_mod."]),
        ("module._orig_mod.", ["module.", "_orig_mod."]),
        ("_orig_mod.module.", ["_orig_mod.", "module."]),
        ("module.module.", ["module.", "module."]),
    ],
)
def test_wrappers_that_all_names_have_are_stripped(
    tmp_path: Path, prefix: str, stripped: list[str]
) -> None:
    one = named(tmp_path, "one", f"{prefix}a", f"{prefix}b")
    two = named(tmp_path, "two", f"{prefix}a", f"{prefix}b")
    renamed, notes = normalise_names([one, two])
    assert [list(checkpoint.tensors) for checkpoint in renamed] == [["a", "b"], ["a", "b"]]
    assert notes == [f"stripped the prefix '{one}', which all tensor names had" for one in stripped]
    expected = {"a": torch.zeros(2), "b": torch.ones(2)}
    assert same_content(renamed[0], expected)


def averaged(tmp_path: Path, label: str, state: Mapping[str, Tensor]) -> Checkpoint:
    path = tmp_path / f"{label}.pt"
    torch.save(dict(state), path)
    return open_checkpoint(path, label=label)


@pytest.mark.parametrize(
    ("wrap", "stripped"),
    [
        (AveragedModel, ["module."]),
        (lambda model: Wrapper(AveragedModel(model)), ["module.", "module."]),
        (lambda model: AveragedModel(Wrapper(model)), ["module.", "module."]),
        (lambda model: AveragedModel(compiled(model)), ["module.", "_orig_mod."]),
        (lambda model: compiled(AveragedModel(model)), ["_orig_mod.", "module."]),
    ],
    ids=["alone", "inside", "outside", "of a compiled model", "compiled"],
)
def test_the_counter_of_an_averaged_model_is_left_out(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], stripped: list[str]
) -> None:
    model = nn.Linear(2, 3)
    state = wrap(model).state_dict()
    both = [averaged(tmp_path, label, state) for label in ("one", "two")]
    renamed, notes = normalise_names(both)
    assert all(same_content(checkpoint, model.state_dict()) for checkpoint in renamed)
    told = (
        "'one', 'two': averages that training kept already (AveragedModel); 'n_averaged' is "
        "left out"
    )
    assert notes.count(told) == 1
    assert [note for note in notes if note != told] == [
        f"stripped the prefix '{one}', which all tensor names had" for one in stripped
    ]
    assert renamed[0].places_digest != both[0].places_digest


@pytest.mark.parametrize(
    "counter", [torch.tensor([5]), torch.tensor(5.0), torch.tensor(True)], ids=str
)
def test_a_tensor_that_is_no_counter_is_not_left_out(tmp_path: Path, counter: Tensor) -> None:
    checkpoint = averaged(tmp_path, "one", {"module.w": torch.ones(1), "n_averaged": counter})
    assert normalise_names([checkpoint]) == ([checkpoint], [])


def test_a_counter_beside_no_wrapped_names_stays(tmp_path: Path) -> None:
    for state in ({}, {"w": torch.ones(1)}, {"_orig_mod.w": torch.ones(1)}):
        checkpoint = averaged(tmp_path, "one", {"n_averaged": torch.tensor(5), **state})
        assert normalise_names([checkpoint]) == ([checkpoint], [])


def test_a_name_tied_to_the_counter_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    count = torch.tensor(5)
    state = {"n_averaged": count, "module.w": torch.ones(1), "module.steps": count}
    (renamed,), _ = normalise_names([averaged(tmp_path, "one", state)])
    assert same_content(renamed, {"w": torch.ones(1), "steps": count})
    assert renamed.aliases == {}


def test_wrappers_that_only_some_names_have_stay(tmp_path: Path) -> None:
    mixed = [named(tmp_path, "one", "module.a", "b"), named(tmp_path, "two", "module.a")]
    assert normalise_names(mixed) == (mixed, [])
    apart = [named(tmp_path, "one", "a"), named(tmp_path, "two", "module.a")]
    assert normalise_names(apart) == (apart, [])


def test_nothing_to_rename_is_nothing_renamed(tmp_path: Path) -> None:
    assert normalise_names([]) == ([], [])
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    checkpoint = open_checkpoint(empty)
    assert normalise_names([checkpoint]) == ([checkpoint], [])


def test_a_prefix_asked_for_is_stripped_where_it_is(tmp_path: Path) -> None:
    one = named(tmp_path, "one", "model.a", "b")
    two = named(tmp_path, "two", "a", "b")
    renamed, notes = normalise_names([one, two], ["model."])
    assert [set(checkpoint.tensors) for checkpoint in renamed] == [{"a", "b"}, {"a", "b"}]
    assert notes == ["stripped the prefix 'model.' from tensor names, as asked"]


def test_prefixes_asked_for_come_before_wrappers(tmp_path: Path) -> None:
    checkpoint = named(tmp_path, "one", "net.module.a")
    renamed, notes = normalise_names([checkpoint], ["net."])
    assert list(renamed[0].tensors) == ["a"]
    assert len(notes) == 2


def test_a_prefix_that_occurs_nowhere_is_refused(tmp_path: Path) -> None:
    message = "no tensor name in any checkpoint begins with 'x.' (--strip-prefix)"
    with pytest.raises(IncompatibleCheckpointsError, match=whole(message)):
        normalise_names([named(tmp_path, "one", "a")], ["x."])


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    message = "one: two tensor names become one without the prefix 'x.'"
    with pytest.raises(CheckpointError, match=whole(message)):
        normalise_names([named(tmp_path, "one", "x.a", "a")], ["x."])


def test_a_tied_name_that_becomes_a_stored_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = {"x.a": torch.ones(2), "b": torch.zeros(2)}
    save_file(tensors, path, metadata={"a": "b"})
    checkpoint = open_checkpoint(path, label="one")
    assert checkpoint.aliases == {"a": "b"}
    message = "one: two tensor names become one without the prefix 'x.'"
    with pytest.raises(CheckpointError, match=whole(message)):
        normalise_names([checkpoint], ["x."])


def test_tied_names_are_renamed_too(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"module.a": torch.ones(2)}, path, metadata={"module.b": "module.a"})
    (renamed,), _ = normalise_names([open_checkpoint(path)])
    assert renamed.aliases == {"b": "a"}
    assert renamed.metadata["b"] == "a"
    assert read_tensor(renamed, "b") == read_tensor(renamed, "a")
    weight = torch.ones(2)
    torch.save({"module.a": weight, "module.b": weight}, tmp_path / "w.pt")
    (renamed,), _ = normalise_names([open_checkpoint(tmp_path / "w.pt")])
    assert renamed.aliases == {"b": "a"}
    assert set(renamed.tensors) == {"a", "b"}


def test_everything_else_is_passed_on(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-70"
    directory.mkdir()
    save_file({"module.a": torch.ones(2)}, directory / "model.safetensors")
    checkpoint = open_checkpoint(directory)
    (renamed,), _ = normalise_names([checkpoint])
    for attribute in ("label", "layout", "step", "epoch", "notes", "files", "folder", "hub"):
        assert getattr(renamed, attribute) == getattr(checkpoint, attribute)


class TestCheckpointUnderTheNamesOfAnother(TestRenamedCheckpoint):
    def open(self, path: Path) -> Checkpoint:
        """The last has the prefix net., which is taken back."""
        one = open_checkpoint(path)
        last = path.with_name("last.safetensors")
        save_file({f"net.{name}": torch.ones(1) for name in one.tensors}, last)
        renamed, _ = normalise_names([one, open_checkpoint(last)], ["net."])
        kept, _ = under_last_names(renamed)
        assert all(name.startswith("net.module.") for name in kept[0].tensors)
        (stripped,), _ = normalise_names(kept[:1], ["net.", "module."])
        return stripped


def test_names_come_back_as_the_last_checkpoint_has_them(tmp_path: Path) -> None:
    one = named(tmp_path, "one", "a", "b", "module.c")
    two = named(tmp_path, "two", "net.module.a", "module.b", "c")
    renamed, _ = normalise_names([one, two], ["net.", "module."])
    kept, notes = under_last_names(renamed)
    assert [set(checkpoint.tensors) for checkpoint in kept] == [
        {"net.module.a", "module.b", "c"}
    ] * 2
    assert notes == ["the output keeps the prefixes that tensor names have in two"]
    assert read_tensor(kept[0], "c") == read_tensor(one, "module.c")
    assert kept[0].places_digest != renamed[0].places_digest


def test_names_that_were_never_changed_are_kept_without_a_word(tmp_path: Path) -> None:
    checkpoint = named(tmp_path, "one", "a", "b")
    assert under_last_names([checkpoint]) == ([checkpoint], [])


def test_a_name_that_is_taken_already_is_refused(tmp_path: Path) -> None:
    """The last checkpoint's 'y.a' is called 'a', which another has beside a 'y.a' of its own."""
    two = normalise_names([named(tmp_path, "two", "y.a")], ["y."])[0]
    message = "one: two tensor names become one under the names of two"
    with pytest.raises(CheckpointError, match=whole(message)):
        under_last_names([named(tmp_path, "one", "y.a", "a"), *two])


def test_tied_names_keep_their_prefix(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"module.a": torch.ones(2)}, path, metadata={"module.b": "module.a"})
    (kept,), _ = under_last_names(normalise_names([open_checkpoint(path)])[0])
    assert kept.aliases == {"module.b": "module.a"}
