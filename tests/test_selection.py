"""What --last, --first, --every, --steps and --match take, and from what."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from hostile import whole
from hub_fixtures import REPO, ckptavg, model_files, save_steps, upload
from loopback_hub import LoopbackHub
from run_fixtures import final_model, lightning_run, model_directory, torch_file, trainer_run
from safetensors.torch import load_file

from ckptavg import average_checkpoints
from ckptavg.errors import SourceError, UsageError
from ckptavg.gathering import close_all, open_sources
from ckptavg.selection import Selection, parse_steps

STEPS = [100, 200, 300, 400, 500, 600]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a run of checkpoints-100 to -600 and one of step_150 to step_350."""
    monkeypatch.chdir(tmp_path)
    trainer_run("run", STEPS)
    for step in (150, 250, 350):
        torch_file(f"other/step_{step}.pt", step)
    return tmp_path


def chosen(*among: int | None, **selection: Any) -> list[int | None]:
    """Return the steps that a selection takes among some, or among ``STEPS``."""
    known = among or STEPS
    labels = [f"checkpoint-{step}" for step in known]
    return [known[index] for index in Selection(**selection).chosen(known, labels)]


def taken(*sources: str, **selection: Any) -> list[int | None]:
    """Return the steps of what is taken, in the order in which it is opened."""
    checkpoints, _ = open_sources(list(sources), selection=Selection(**selection))
    close_all(checkpoints)
    return [checkpoint.step for checkpoint in checkpoints]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, STEPS),
        ({"last": 2}, [500, 600]),
        ({"last": 6}, STEPS),
        ({"first": 2}, [100, 200]),
        ({"every": 1}, STEPS),
        ({"every": 2}, [200, 400, 600]),
        ({"every": 4}, [200, 600]),
        ({"every": 100}, [600]),
        ({"steps": (200, 400)}, [200, 300, 400]),
        ({"steps": (201, None)}, [300, 400, 500, 600]),
        ({"steps": (None, 250)}, [100, 200]),
        ({"steps": (300, 300)}, [300]),
        ({"steps": (None, None)}, STEPS),
        ({"steps": (None, 500), "every": 2}, [100, 300, 500]),
        ({"steps": (None, 500), "every": 2, "last": 2}, [300, 500]),
        ({"steps": (None, 500), "every": 2, "first": 2}, [100, 300]),
        ({"every": 2, "last": 2}, [400, 600]),
        ({"every": 2, "first": 2}, [200, 400]),
        ({"steps": (200, None), "last": 1}, [600]),
    ],
    ids=str,
)
def test_conditions_apply_in_order(selection: dict[str, Any], expected: list[int]) -> None:
    assert chosen(**selection) == expected


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"last": 7}, "--last 7: there are only 6"),
        ({"first": 7}, "--first 7: there are only 6"),
        ({"every": 3, "last": 3}, "--last 3: there are only 2"),
        ({"steps": (100, 100), "last": 2}, "--last 2: there is only 1 checkpoint"),
        ({"steps": (700, None)}, "none of the 6 checkpoints is within --steps 700:"),
        ({"steps": (110, 190), "every": 2},
         "none of the 6 checkpoints is within --steps 110:190 --every 2"),
        ({"steps": (110, 190), "last": 2},
         "none of the 6 checkpoints is within --steps 110:190 --last 2"),
    ],
    ids=str,
)  # fmt: skip
def test_a_selection_that_cannot_be_met_is_refused(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=whole(message)):
        chosen(**selection)


def test_a_range_of_steps_needs_the_step_of_every_checkpoint() -> None:
    steps = (100, None, 300)
    assert chosen(*steps, last=2) == [None, 300]
    with pytest.raises(
        SourceError,
        match=whole(
            "checkpoint-None: neither its name nor its metadata tells a training step, which "
            "--steps needs; choose by names with --match"
        ),
    ):
        chosen(*steps, steps=(100, None))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"last": 0}, "last is 0, expected a number of at least 1"),
        ({"first": -1}, "first is -1, expected a number of at least 1"),
        ({"every": 0}, "every is 0, expected a number of at least 1"),
        ({"every": 1.5}, "every is 1.5, expected a number of at least 1"),
        ({"last": True}, "last is True, expected a number of at least 1"),
        ({"last": 1, "first": 1}, "--last and --first exclude each other"),
        ({"steps": (5, 4)}, "steps 5:4: the first step is after the last"),
    ],
    ids=str,
)
def test_selections_without_sense_are_refused(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=whole(message)):
        Selection(**selection)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1:9", (1, 9)), ("1:", (1, None)), (":9", (None, 9)), ("1_000:9_000", (1000, 9000)),
     ("7:7", (7, 7))],
)  # fmt: skip
def test_ranges_of_steps_are_read(text: str, expected: tuple[int | None, int | None]) -> None:
    assert parse_steps(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":", "5", "a:b", "-1:5", "1:2:3", "1 : 2", "1.5:2", "_:_", "9" * 19 + ":"]
)
def test_what_is_no_range_of_steps_is_refused(text: str) -> None:
    message = f"'{text}' is not a range of steps such as 1000:9000 or 1000:"
    with pytest.raises(UsageError, match=whole(message)):
        parse_steps(text)


def test_a_selection_is_written_as_it_is_typed() -> None:
    selection = Selection(match=("a*", "b"), steps=(None, 9), every=2, first=3)
    assert str(selection) == "--match a* --match b --steps :9 --every 2 --first 3"
    assert selection.is_given
    assert not Selection().is_given


def test_patterns_are_compared_with_whole_names_and_case() -> None:
    selection = Selection(match=("checkpoint-?00", "step*"))
    names = ("checkpoint-100", "step_1.pt", "checkpoint-1000", "Checkpoint-100", "my-step_1.pt")
    assert [selection.matches(name) for name in names] == [True, True, False, False, False]


# from sources to what is opened


@pytest.mark.usefixtures("here")
def test_a_selection_is_over_all_sources_together() -> None:
    assert taken("run", "other", last=4) == [400, 500, 600, 350]  # as typed, runs oldest first
    assert taken("other", "run", first=3) == [150, 100, 200]
    assert taken("run/checkpoint-100", "other", "run/checkpoint-600", last=2) == [350, 600]
    assert taken("run", "other", steps=(150, 250)) == [200, 150, 250]
    assert taken("run", "other", match=("*50.pt",)) == [150, 250, 350]


@pytest.mark.usefixtures("here")
def test_globs_and_braces_are_selected_from() -> None:
    assert taken("run/checkpoint-*", last=2) == [500, 600]
    assert taken("run/checkpoint-{600..100..100}", last=2) == [600, 500]
    assert taken("run/checkpoint-{600,100}", first=1) == [100]
    assert taken("other/*.pt", match=("step_[12]*",)) == [150, 250]


@pytest.mark.usefixtures("here")
def test_checkpoints_of_the_same_step_in_two_runs_are_equally_new() -> None:
    trainer_run("twin", (500, 600))
    checkpoints, notes = open_sources(["run", "twin"], selection=Selection(last=2))
    close_all(checkpoints)
    assert [one.label for one in checkpoints] == ["run/checkpoint-600", "twin/checkpoint-600"]
    assert notes == [
        "took 2 of 8 checkpoints (--last 2): checkpoint-600 to checkpoint-600",
        "twin/checkpoint-600 and run/checkpoint-600 are both of step 600: is one a copy, or are "
        "these two runs?",
    ]


@pytest.mark.usefixtures("here")
def test_notes_tell_what_was_taken() -> None:
    _, notes = open_sources("run", selection=Selection(match=("*-[1-5]00",), every=2, last=1))
    assert notes == [
        "took 1 of 6 checkpoints (--match *-[1-5]00 --every 2 --last 1): checkpoint-500"
    ]
    assert open_sources("run", selection=Selection(last=6))[1] == []
    assert open_sources("run")[1] == []


@pytest.mark.usefixtures("here")
def test_a_pattern_that_no_name_matches_is_refused() -> None:
    with pytest.raises(
        SourceError, match=whole("none of 6 checkpoints is called so: --match step*")
    ):
        taken("run", match=("step*",))


@pytest.mark.usefixtures("here")
def test_epochs_are_no_steps() -> None:
    for epoch in (1, 2):
        torch_file(f"epochs/epoch_{epoch}.pt", epoch)
    assert len(taken("epochs", last=1)) == 1
    with pytest.raises(SourceError, match="^epochs/epoch_1.pt: neither its name nor its metadata"):
        taken("epochs", steps=(1, None))


@pytest.mark.usefixtures("here")
def test_explicit_coefficients_are_for_what_is_selected_in_the_order_typed() -> None:
    average_checkpoints("run", "a", last=2, coefficients=[0.25, 0.75])
    assert load_file("a/model.safetensors")["w"].tolist() == [575.0] * 4
    average_checkpoints("run/checkpoint-{600..100..100}", "b", last=2, coefficients=[0.25, 0.75])
    assert load_file("b/model.safetensors")["w"].tolist() == [525.0] * 4
    with pytest.raises(UsageError, match=whole("6 coefficients for 2 checkpoints")):
        average_checkpoints("run", "c", last=2, coefficients=[1, 0, 0, 0, 0, 0])


@pytest.mark.usefixtures("here")
def test_schemes_choose_among_what_is_selected() -> None:
    result = average_checkpoints("run", "a", match="*[1-4]00", schemes="uniform:last=2")
    assert list(result.outputs[0].coefficients) == [0, 0, 0.5, 0.5]
    assert load_file("a/model.safetensors")["w"].tolist() == [350.0] * 4


@pytest.mark.usefixtures("here")
def test_python_and_the_command_line_select_alike(capsys: pytest.CaptureFixture[str]) -> None:
    average_checkpoints("run", "a", match=["checkpoint-*"], steps=(150, None), every=2, first=2)
    code, out, err = ckptavg(
        capsys, "average", "run", "-o", "b", "--match", "checkpoint-*", "--steps", "150:",
        "--every", "2", "--first", "2", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    (note,) = json.loads(out)["notes"]
    assert note == (
        "took 2 of 6 checkpoints (--match checkpoint-* --steps 150: --every 2 --first 2): "
        "checkpoint-200 to checkpoint-400"
    )
    assert {**tree(Path("a")), "ckptavg.json": b""} == {**tree(Path("b")), "ckptavg.json": b""}
    assert load_file("b/model.safetensors")["w"].tolist() == [300.0] * 4


# on the Hub


@pytest.fixture
def many(hub: LoopbackHub, tmp_path: Path) -> list[Path]:
    """Six revisions step1 to step6, and the same as folders of main."""
    saved = save_steps(tmp_path / "local", range(1, 7), "safetensors", n_values=1000)
    for directory in saved:
        upload(hub, directory)
        upload(hub, directory, "main", f"checkpoint-{directory.name.removeprefix('step')}/")
    return saved


def commits_read(hub: LoopbackHub) -> set[str]:
    """Return the names of the branches of which anything was asked for."""
    names = {commit: name for name, commit in hub.branches(REPO).items()}
    asked = [one.path for one in hub.requests if "/resolve/" in one.path or "/tree/" in one.path]
    return {names[commit] for commit in names if any(commit in path for path in asked)}


def test_revisions_that_are_not_selected_are_not_asked_for(
    hub: LoopbackHub, many: list[Path], tmp_path: Path
) -> None:
    result = average_checkpoints(f"{REPO}@step*", tmp_path / "out", last=2)
    assert commits_read(hub) == {"step5", "step6"}
    assert hub.count("GET", "/tree/") == 2 + 1  # and the chat templates of the last
    assert "took 2 of 6 checkpoints (--last 2): step5 to step6" in result.notes
    average_checkpoints(many[-2:], tmp_path / "copies")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "copies")


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"every": 2}, {"step2", "step4", "step6"}),
        ({"every": 2, "last": 2}, {"step4", "step6"}),
        ({"steps": (2, 5), "every": 3}, {"step2", "step5"}),
        ({"match": "step[13]"}, {"step1", "step3"}),
        ({"match": "step[135]", "first": 2}, {"step1", "step3"}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("many")
def test_a_selection_applies_once_on_the_hub(
    hub: LoopbackHub, tmp_path: Path, selection: dict[str, Any], expected: set[str]
) -> None:
    result = average_checkpoints(f"{REPO}@step*", tmp_path / "out", **selection)
    assert result.n_checkpoints == len(expected)
    assert commits_read(hub) == expected


@pytest.mark.usefixtures("many")
def test_more_revisions_than_there_are_is_refused_before_any_is_asked_for(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="^--last 9: there are only 6\n"):
        average_checkpoints(f"{REPO}@step*", tmp_path / "out", last=9)
    assert commits_read(hub) == set()


def test_folders_of_a_revision_are_a_run(
    hub: LoopbackHub, many: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = ckptavg(capsys, "average", f"{REPO}@main", "--last", "2", "-o", tmp_path / "out")
    assert code == 0, err
    assert "note: took 2 of 6 checkpoints (--last 2): checkpoint-5 to checkpoint-6\n" in err
    read = {one.path for one in hub.requests if "/resolve/" in one.path}
    assert {path.split("/checkpoint-")[1][0] for path in read} == {"5", "6"}
    average_checkpoints(many[-2:], tmp_path / "copies")
    assert model_files(tmp_path / "out") == model_files(tmp_path / "copies")


@pytest.mark.usefixtures("many")
def test_a_run_on_the_hub_is_listed(hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ckptavg(capsys, "inspect", f"{REPO}@main", "--last", "2", "--json")
    assert code == 0
    (run,) = json.loads(out)
    assert run["source"] == f"{REPO}@main"
    assert [one["source"] for one in run["checkpoints"]] == [
        f"{REPO}@main/checkpoint-{step}" for step in (5, 6)
    ]


def test_a_final_model_on_the_hub_beside_folders_needs_a_word(
    hub: LoopbackHub, many: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(hub, many[0], "main")
    code, _, err = ckptavg(capsys, "average", f"{REPO}@main", "-o", tmp_path / "out")
    assert code == 1
    assert f"{REPO}@main: holds weights of its own and 6 checkpoints inside; select among " in err
    result = average_checkpoints(f"{REPO}@main", tmp_path / "out", last=1)
    assert result.n_checkpoints == 1


def test_two_runs_in_one_revision_are_refused_before_any_is_opened(
    hub: LoopbackHub, many: list[Path], tmp_path: Path
) -> None:
    for directory in many[-2:]:
        upload(hub, directory, "main", f"ema-checkpoint-{directory.name.removeprefix('step')}/")
    with pytest.raises(SourceError, match="holds two checkpoints of step 5, checkpoint-5 and ema-"):
        average_checkpoints(f"{REPO}@main", tmp_path / "out", last=2)
    result = average_checkpoints(f"{REPO}@main", tmp_path / "out", match="ema-*")
    assert result.n_checkpoints == 2


@pytest.mark.usefixtures("here")
def test_local_and_remote_checkpoints_are_selected_together(
    hub: LoopbackHub, many: list[Path]
) -> None:
    assert taken(str(many[1]), f"{REPO}@step{{5,1}}", last=2) == [2, 5]


@pytest.mark.usefixtures("here")
def test_runs_of_several_layouts_mix() -> None:
    lightning_run("light", (1, 2))
    final_model("final")
    model_directory("final/checkpoint-450", 450)
    assert taken("light", "final", last=2) == [600, 450]
