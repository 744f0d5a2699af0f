"""Selection by logs and metrics: --log, --constant-lr, --best and --swad."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import whole
from hub_fixtures import REPO, ckptavg, upload
from loopback_hub import LoopbackHub
from run_fixtures import model_directory, torch_file

import ckptavg as package
from ckptavg.errors import SourceError, UsageError
from ckptavg.gathering import close_all, open_sources
from ckptavg.loss_valley import swad_window
from ckptavg.selection import Selection
from ckptavg.training_log import read_log

NAN = math.nan


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(steps: Sequence[int], name: str = "run", **more: Sequence[Any]) -> None:
    """Save files of steps, each with its own of some values."""
    for at, step in enumerate(steps):
        own = {key: values[at] for key, values in more.items() if values[at] is not None}
        torch_file(f"{name}/step_{step}.pt", step, **own)


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def selected(**selection: Any) -> tuple[list[int | None], list[str]]:
    """Return the steps (or epochs) of what is taken from ``run``, and the notes."""
    checkpoints, notes = open_sources("run", selection=Selection(**selection))
    close_all(checkpoints)
    return [one.epoch if one.step is None else one.step for one in checkpoints], notes


def steps_of(**selection: Any) -> list[int | None]:
    return selected(**selection)[0]


def cosine(update: int, length: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (update % length) / length))


# learning rates in logs


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("recorded", ["used", "next"])
@pytest.mark.parametrize("every", [1, 10])
def test_minima_are_found_by_a_log_of_steps_and_rates(recorded: str, every: int) -> None:
    run_of(range(50, 801, 50))
    later = recorded == "next"
    rows = [{"step": n, "lr": cosine(n - 1 + later, 200)} for n in range(every, 801, every)]
    write_csv("log.csv", rows)
    Path("log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("log.json").write_text(json.dumps(rows))
    for log in ("log.csv", "log.jsonl", "log.json"):
        assert steps_of(at_lr_minima=True, log=log) == [200, 400, 600, 800]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("steps", [range(27, 800, 25), range(4, 800, 4)])
def test_restarts_between_the_rows_of_a_sparse_log_lead_to_no_maximum(steps: range) -> None:
    run_of(steps)
    write_csv("log.csv", [{"step": n, "lr": cosine(n - 1, 100)} for n in range(10, 801, 10)])
    for recorded in ("used", None):
        try:
            taken = steps_of(at_lr_minima=True, log="log.csv", lr_recorded=recorded)
        except SourceError:  # to be refused is right, too
            continue
        assert [step for step in taken if step and cosine(step - 1, 100) > 0.1] == []


@pytest.mark.usefixtures("here")
def test_two_rates_at_the_peak_do_not_make_a_log_one_of_the_next_update() -> None:
    run_of(range(1, 41))
    rates = ([0.1] * 8 + [0.001] * 2) * 4
    write_csv("log.csv", [{"step": n, "lr": rate} for n, rate in enumerate(rates, 1)])
    with pytest.raises(SourceError, match="--lr-recorded used"):
        steps_of(at_lr_minima=True, log="log.csv")
    taken = steps_of(at_lr_minima=True, log="log.csv", lr_recorded="used")
    assert taken == [10, 20, 30, 40]


@pytest.mark.usefixtures("here")
def test_a_warm_up_is_no_cycle_and_an_unfinished_one_is_left_out() -> None:
    run_of(range(50, 751, 50))
    rates = [n / 100 if n < 100 else cosine(n - 100, 200) for n in range(750)]
    write_csv("log.csv", [{"step": n + 1, "lr": rate} for n, rate in enumerate(rates)])
    steps, notes = selected(at_lr_minima=True, log="log.csv")
    assert steps == [300, 500, 700]
    assert notes[1].startswith(
        "at the minima of the learning rate (log.csv): step_300.pt (6.16838e-05), "
    )
    falling = "left out the last cycle of the learning rate: it is still falling at step_"
    assert notes[2:] == [f"{falling}750.pt"]
    write_csv("log.csv", [{"step": n + 1, "lr": rate} for n, rate in enumerate(rates[:650])])
    for step in (700, 750):
        Path(f"run/step_{step}.pt").unlink()
    steps, notes = selected(at_lr_minima=True, log="log.csv")
    assert steps == [300, 500]
    assert notes[2:] == [f"{falling}650.pt"]


@pytest.mark.usefixtures("here")
def test_a_checkpoint_one_update_past_a_restart_is_taken_where_there_is_none_before_it() -> None:
    run_of([100, 201, 300, 399, 401])
    write_csv("log.csv", [{"step": n, "lr": cosine(n - 1, 200)} for n in range(1, 402)])
    steps, notes = selected(at_lr_minima=True, log="log.csv")
    assert steps == [201, 399]
    assert notes[1] == (
        "at the minima of the learning rate (log.csv): step_201.pt (one update after it, 1), "
        "step_399.pt (0.00024672)"
    )
    Path("run/step_201.pt").rename("run/step_202.pt")
    assert steps_of(at_lr_minima=True, log="log.csv") == [399]


@pytest.mark.usefixtures("here")
def test_a_log_by_epochs_is_matched_by_epochs() -> None:
    for epoch in range(12):
        torch_file(f"run/epoch-{epoch}.pt", epoch, epoch=epoch)
    rates = [cosine(epoch, 4) for epoch in range(13)]
    timm = [{"epoch": n, "train_loss": 1.0, "eval_top1": 50.0, "lr": rates[n]} for n in range(12)]
    write_csv("summary.csv", timm)
    assert steps_of(at_lr_minima=True, log="summary.csv") == [3, 7, 11]
    # of one's own: where the first row is the peak, rates are those of the epoch itself
    write_csv("used.csv", [{"epoch": n, "lr": rates[n]} for n in range(12)])
    assert steps_of(at_lr_minima=True, log="used.csv") == [3, 7, 11]
    write_csv("next.csv", [{"epoch": n, "lr": rates[n + 1]} for n in range(12)])
    assert steps_of(at_lr_minima=True, log="next.csv") == [3, 7, 11]
    # a log that begins later tells nothing of the kind
    write_csv("late.csv", [{"epoch": n, "lr": rates[n]} for n in range(2, 12)])
    with pytest.raises(SourceError, match="--lr-recorded used or --lr-recorded next"):
        steps_of(at_lr_minima=True, log="late.csv")
    assert steps_of(at_lr_minima=True, log="late.csv", lr_recorded="used") == [3, 7, 11]
    assert steps_of(at_lr_minima=True, log="late.csv", lr_recorded="next") == [4, 8]


@pytest.mark.usefixtures("here")
def test_lightnings_log_of_several_rows_a_step_is_understood() -> None:
    for epoch in range(8):
        name = f"run/epoch={epoch}-step={(epoch + 1) * 25}.ckpt"
        torch_file(name, epoch, "state_dict", epoch=epoch, global_step=(epoch + 1) * 25)
    rows: list[dict[str, Any]] = []
    for update in range(200):  # logged as the batch begins, counted from 0
        rows.append({"step": update, "lr-AdamW": cosine(update, 50), "lr-AdamW-momentum": 0.9})
        if update % 25 == 24:
            rows.append({"step": update, "epoch": update // 25, "val_loss": 1 / (update + 1)})
    write_csv("metrics.csv", rows)
    assert steps_of(at_lr_minima=True, log="metrics.csv") == [50, 100, 150, 200]
    steps, notes = selected(best=2, metric="val_loss", log="metrics.csv")
    assert steps == [175, 200]
    assert notes[1] == (
        "with the lowest val_loss (metrics.csv, whose steps begin with 0): "
        "epoch=7-step=200.ckpt (0.005), epoch=6-step=175.ckpt (0.00571429)"
    )


@pytest.mark.usefixtures("here")
def test_checkpoints_without_a_step_cannot_be_found_in_a_log_of_steps() -> None:
    torch_file("run/a1.pt")
    torch_file("run/step_2.pt", 2)
    write_csv("log.csv", [{"step": 1, "lr": 1}])
    with pytest.raises(SourceError, match="tells a training step, by which the learning rate"):
        open_sources(
            ["run/a1.pt", "run/step_2.pt"], selection=Selection(at_lr_minima=True, log="log.csv")
        )


def trainer_checkpoints(
    steps: Sequence[int],
    logged: str,
    *,
    keep_scheduler: bool | Sequence[int] = True,
    logging_steps: range = range(5, 161, 5),
) -> None:
    """Save what transformers' Trainer leaves of hard restarts every 40 steps."""
    for step in steps:
        history = [
            {"step": n, "learning_rate": cosine(n - (logged == "used"), 40), "loss": 1.0}
            for n in logging_steps
            if n <= step
        ]
        state = {"global_step": step, "log_history": history}
        model_directory(f"run/checkpoint-{step}", step, trainer_state__json=json.dumps(state))
        scheduler = {"base_lrs": [1.0], "last_epoch": step, "_last_lr": [cosine(step, 40)]}
        if keep_scheduler is True or (keep_scheduler and step in keep_scheduler):
            torch.save(scheduler, f"run/checkpoint-{step}/scheduler.pt")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("logged", ["used", "next"])
def test_trainer_states_are_read_whichever_rate_the_version_logged(logged: str) -> None:
    trainer_checkpoints(range(20, 161, 20), logged)
    assert steps_of(at_lr_minima=True) == [40, 80, 120, 160]


@pytest.mark.usefixtures("here")
def test_without_a_scheduler_beside_it_both_ways_to_read_a_trainer_state_agree() -> None:
    trainer_checkpoints(range(20, 161, 20), "next", keep_scheduler=False)
    assert steps_of(at_lr_minima=True) == [40, 80, 120, 160]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("logged", ["used", "next"])
def test_between_checkpoints_side_by_side_the_way_a_version_logged_decides(logged: str) -> None:
    side_by_side = [20, 39, 40, 41, 79, 80, 81]
    # the first row of all tells, or the scheduler's own rate at one step
    trainer_checkpoints(side_by_side, logged, keep_scheduler=False, logging_steps=range(1, 161))
    assert steps_of(at_lr_minima=True) == [40, 80]
    trainer_checkpoints(side_by_side, logged, keep_scheduler=[20], logging_steps=range(5, 161))
    assert steps_of(at_lr_minima=True) == [40, 80]
    Path("run/checkpoint-20/scheduler.pt").unlink()
    with pytest.raises(SourceError, match="nothing tells whether the learning rates on record"):
        steps_of(at_lr_minima=True)
    assert steps_of(at_lr_minima=True, lr_recorded=logged) == [40, 80]


@pytest.mark.usefixtures("here")
def test_a_log_too_sparse_to_tell_how_the_rate_went_on_is_refused() -> None:
    for epoch in range(9):
        torch_file(f"run/step_{(epoch + 1) * 25}.pt", epoch)
    rates = [1, 2, 3, 2, 1, 2, 3, 2, 1, 2]  # as each epoch began; it may have moved in between
    write_csv("log.csv", [{"step": 25 * n, "lr-SGD": rate} for n, rate in enumerate(rates)])
    with pytest.raises(
        SourceError,
        match=whole(
            "the learning rates on record (log.csv) are too far apart to tell whether the minima "
            "are at step_100.pt, step_200.pt or at step_125.pt, step_225.pt: name a log with more "
            "of them (--log FILE)"
        ),
    ):
        steps_of(at_lr_minima=True, log="log.csv")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("recorded", ["used", "next"])
def test_a_checkpoint_shortly_after_a_smooth_minimum_is_near_it(recorded: str) -> None:
    run_of([50, 110, 210, 310, 410])
    rows = [{"step": n, "lr": 1 + math.cos(math.pi * (n / 100 - 1))} for n in range(10, 411, 10)]
    write_csv("log.csv", rows)
    assert steps_of(at_lr_minima=True, log="log.csv", lr_recorded=recorded) == [210, 410]


@pytest.mark.usefixtures("here")
def test_rates_too_far_apart_to_tell_a_restart_from_a_rise_are_refused() -> None:
    trainer_checkpoints(range(20, 161, 20), "next")
    for path in Path("run").glob("*/trainer_state.json"):
        state = json.loads(path.read_text())
        path.write_text(json.dumps({**state, "log_history": []}))
    with pytest.raises(SourceError, match=r"are too far apart to tell .* \(--log FILE\)"):
        steps_of(at_lr_minima=True)


# constant learning rates


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("recorded", ["used", "next"])
def test_the_stretch_of_constant_rate_before_a_decay_is_taken(recorded: str) -> None:
    run_of(range(100, 1001, 100))
    warm, stable, later = 150, 700, int(recorded == "next")

    def rate(update: int) -> float:
        if update < warm:
            return (update + 1) / warm
        return 1.0 if update < stable else 1 - (update - stable) / 300

    write_csv("log.csv", [{"step": n, "lr": rate(n - 1 + later)} for n in range(1, 1001)])
    steps, notes = selected(constant_lr=True, log="log.csv")
    assert steps == [200, 300, 400, 500, 600, 700]
    assert notes[1] == ("at the constant learning rate 1 (log.csv): step_200.pt to step_700.pt")
    assert steps_of(constant_lr=True, log="log.csv", steps=(300, 500)) == [300, 400, 500]


@pytest.mark.usefixtures("here")
def test_the_last_stage_of_a_rate_that_falls_in_stages_is_taken() -> None:
    def optimizer(rate: float) -> dict[str, Any]:
        return {"param_groups": [{"lr": rate}], "state": {}}

    rates = [0.1, 0.1, 0.1, 0.01, 0.01, 0.001]
    run_of(range(1, 7), optimizer=[optimizer(rate) for rate in rates])
    assert steps_of(constant_lr=True) == [4, 5]


@pytest.mark.usefixtures("here")
def test_a_rate_that_was_constant_all_along_takes_all() -> None:
    scheduler = [{"last_epoch": n, "_last_lr": [0.1], "base_lrs": [0.1]} for n in (1, 2, 3)]
    run_of([1, 2, 3], scheduler=scheduler)
    assert steps_of(constant_lr=True) == [1, 2, 3]


@pytest.mark.usefixtures("here")
def test_a_rate_that_is_never_constant_is_refused() -> None:
    run_of(range(100, 501, 100))
    write_csv("log.csv", [{"step": n, "lr": 1 / n} for n in range(1, 501)])
    with pytest.raises(
        SourceError,
        match=whole(
            "there are no two checkpoints between which the learning rate was constant (log.csv: "
            "1, 0.5, 0.333333, ... 0.00200401, 0.002)"
        ),
    ):
        steps_of(constant_lr=True, log="log.csv")


# metrics


@pytest.mark.usefixtures("here")
def test_the_best_checkpoints_are_taken_by_their_own_metrics() -> None:
    run_of([1, 2, 3, 4, 5], val_loss=[3.0, 1.0, 2.0, 1.0, 5.0], acc=[1.0, 2.0, 9.0, 4.0, 5.0])
    steps, notes = selected(best=2, metric="val_loss")
    assert steps == [2, 4]
    assert notes == [
        "took 2 of 5 checkpoints (--best 2 --metric val_loss): step_2.pt to step_4.pt",
        "with the lowest val_loss (the checkpoints): step_4.pt (1), step_2.pt (1)",
    ]
    assert steps_of(best=1, metric="val_loss") == [4]  # of equal ones the newest
    assert steps_of(best=2, metric="acc") == [3, 5]
    assert steps_of(best=2, metric="acc", mode="min") == [1, 2]
    assert steps_of(best=3, metric="acc", last=2) == [4, 5]
    assert steps_of(best=1, metric="acc", steps=(None, 2)) == [2]


@pytest.mark.usefixtures("here")
def test_the_best_checkpoints_are_taken_by_a_log() -> None:
    run_of([10, 20, 30, 40], val_loss=[1.0, 2.0, 3.0, 4.0])
    write_csv(
        "log.csv",
        [
            {"step": 10, "val_loss": 9, "lr": 1},
            {"step": 20, "lr": 1},
            {"step": 20, "val_loss": 5},
            {"step": 25, "val_loss": 0},
            {"step": 30, "val_loss": "nan"},
            {"step": 40, "val_loss": 7},
        ],
    )
    steps, notes = selected(best=2, metric="val_loss", log="log.csv")
    assert steps == [20, 40]
    assert notes[1:] == [
        "left out step_30.pt: its val_loss is not a number",
        "with the lowest val_loss (log.csv): step_20.pt (5), step_40.pt (7)",
    ]
    with pytest.raises(SourceError, match=whole("--best 4: there are only 3")):
        steps_of(best=4, metric="val_loss", log="log.csv")


@pytest.mark.usefixtures("here")
def test_evaluations_of_a_trainer_state_are_metrics_of_its_checkpoints() -> None:
    for step in (10, 20, 30):
        history = [{"step": n, "eval_loss": abs(n - 20) + 1.0, "loss": n} for n in (10, 20, 30)]
        state = {"global_step": step, "log_history": history[: step // 10]}
        model_directory(f"run/checkpoint-{step}", step, trainer_state__json=json.dumps(state))
    assert steps_of(best=1, metric="eval_loss") == [20]
    assert steps_of(best=1, metric="loss") == [10]  # logged in training


@pytest.mark.usefixtures("here")
def test_a_checkpoint_whose_metric_is_not_known_is_refused() -> None:
    run_of([10, 20, 30], val_loss=[1.0, None, 2.0])
    message = (
        "run/step_20.pt: its val_loss is not known (by the checkpoints it is at 10, 30); leave it "
        "out with --match or --steps"
    )
    with pytest.raises(SourceError, match=whole(message)):
        steps_of(best=1, metric="val_loss")
    assert steps_of(best=1, metric="val_loss", match=("*[13]0.pt",)) == [10]


@pytest.mark.usefixtures("here")
def test_an_unknown_metric_is_refused_with_those_there_are() -> None:
    run_of([10, 20], val_loss=[1.0, 2.0], acc=[1.0, 2.0])
    with pytest.raises(UsageError, match="no metric 'vall_loss', .*; did you mean 'val_loss'"):
        steps_of(best=1, metric="vall_loss")
    with pytest.raises(UsageError, match="its name does not tell"):
        steps_of(best=1, metric="fitness")


# SWAD


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([5, 4, 3, 2, 1], None),
        ([5, 4], None),
        ([3, 1, 2, 3], (1, 3)),  # begins with the first of three that is their least
        ([3, 1, 2, 1.5, *[9] * 6, 1], (1, 3)),  # mean 1.5, so up to 1.95 is within
        ([3, 1, 2, 1.5, *[9] * 5, 1.9, 9], (1, 10)),  # not six in a row
        ([3, 1, 2, 1.5, 1.9, *[9] * 6], (1, 4)),
        ([3, 1, 1, 1, *[NAN] * 6], (1, 3)),
        ([NAN, NAN, NAN, 1, 2, 3], (3, 5)),
        ([1, 2, NAN, 3, 4, 5], (3, 5)),
        ([1, 1, 1], (0, 2)),
    ],
    ids=str,
)
def test_swads_window_is_that_of_the_paper(
    losses: list[float], expected: tuple[int, int] | None
) -> None:
    assert swad_window(losses) == expected


@pytest.mark.usefixtures("here")
def test_the_checkpoints_in_swads_window_are_taken() -> None:
    run_of(range(20, 201, 20))
    losses = [9, 7, 5, 3, 2, 2.1, 2.2, 2.3, 2.2, 2.4, *[8] * 10]
    write_csv("log.csv", [{"step": 10 * n, "val_loss": x} for n, x in enumerate(losses, 1)])
    steps, notes = selected(swad=True, log="log.csv")
    assert steps == [60, 80, 100]
    assert notes == [
        "took 3 of 10 checkpoints (--swad --log log.csv): step_60.pt to step_100.pt",
        "in SWAD's window of val_loss (log.csv), 50 to 100: step_60.pt to step_100.pt; SWAD "
        "averages every step of it, these are 3 of them",
    ]
    write_csv("log.csv", [{"step": 10 * n, "val_loss": 1 / n} for n in range(1, 21)])
    with pytest.raises(SourceError, match="is still falling after 20, so SWAD's window has not"):
        steps_of(swad=True, log="log.csv")
    write_csv("log.csv", [{"step": 10 * n, "val_loss": -1, "acc": 1} for n in range(1, 21)])
    with pytest.raises(SourceError, match="val_loss is -1 at 10 .*have to be positive"):
        steps_of(swad=True, log="log.csv")
    with pytest.raises(SourceError, match="goes by a validation loss, and of acc more is better"):
        steps_of(swad=True, log="log.csv", metric="acc")


@pytest.mark.usefixtures("here")
def test_swad_takes_a_tolerance() -> None:
    run_of(range(1, 12), val_loss=[3.0, 1.0, 1.0, 1.0, 1.0, *[1.25] * 6])
    assert steps_of(swad=True) == list(range(2, 12))
    assert steps_of(swad=True, swad_tolerance=0.2) == [2, 3, 4, 5]


# what is refused


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"at_lr_minima": True, "swad": True}, "--at-lr-minima and --swad exclude each other"),
        ({"constant_lr": True, "at_lr_minima": True},
         "--at-lr-minima and --constant-lr exclude each other"),
        ({"best": 0}, "best is 0, expected a number of at least 1"),
        ({"best": 2}, "--best needs the name of a metric, for example --metric eval_loss"),
        ({"metric": "loss"}, "--metric is for --best or --swad"),
        ({"mode": "min"}, "--mode is for --best or --swad"),
        ({"swad_tolerance": 0.2}, "--swad-tolerance is for --swad"),
        ({"log": "x"}, "--log is for --at-lr-minima, --constant-lr, --best or --swad"),
        ({"lr_recorded": "used", "swad": True},
         "--lr-recorded is for --at-lr-minima or --constant-lr"),
        ({"lr_recorded": "last", "constant_lr": True},
         "lr_recorded is 'last', expected used or next"),
        ({"swad_tolerance": -1.0, "swad": True},
         "swad_tolerance is -1.0, expected 0 or more, such as 0.3"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_would_not_be_used_are_refused(
    selection: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=whole(message)):
        Selection(**selection)


def test_a_selection_by_training_is_written_as_it_is_typed() -> None:
    selection = Selection(
        at_lr_minima=True, best=2, metric="acc", mode="max", log="l.csv", lr_recorded="next", last=1
    )
    assert str(selection) == (
        "--at-lr-minima --best 2 --metric acc --mode max --log l.csv --lr-recorded next --last 1"
    )


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "log: the log has no rows"),
        ("step,lr\n", "log: the log has no rows"),
        ("a,b\n1,2\n", "log: line 2: tells neither a step nor an epoch (a column step, "
         "global_step, iteration or epoch)"),
        ("step,lr\n1,0.5\n2\n", "log: line 3: has 1 cells, the header names 2"),
        ("step,lr\n1,fast\n", "log: line 2: its lr is 'fast', expected a learning rate"),
        ("step,lr\n1,inf\n", "log: line 2: its lr is 'inf', expected a learning rate"),
        ("step,lr\n\n1.5,0\n", "log: line 3: its step is '1.5', expected a number"),
        ("step,lr\n-1,0\n", "log: line 2: its step is '-1', expected a number"),
        ("step,lr\n1e300,0\n", "log: line 2: its step is '1e300', expected a number"),
        ("step,lr,lr\n1,0,0\n", "log: line 1: names the column 'lr' twice"),
        ('{"step": 1}\n{"step": ', "log: line 2: is not JSON"),
        ('{"step": 1}\n3', "log: line 2: is not an object with names and values"),
        ('{"log_history": 3}', "log: its log_history is not a list of rows"),
        ("[3]", "log: row 1: is not an object with names and values"),
        ("[" * 100000, "log: line 1: is not JSON"),
        (b"\xff\xfe", "log: the log is not text (UTF-8)"),
    ],
    ids=range(16),
)  # fmt: skip
def test_a_log_that_cannot_be_read_is_refused_by_its_line(
    content: str | bytes, message: str
) -> None:
    Path("log").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match=whole(message)):
        read_log("log")


@pytest.mark.usefixtures("here")
def test_a_log_that_is_not_there_or_too_large_is_refused() -> None:
    with pytest.raises(SourceError, match="log: the log cannot be read: No such file"):
        read_log("log")
    with Path("log").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(SourceError, match="log: the log has more than 67108864 bytes"):
        read_log("log")


@pytest.mark.usefixtures("here")
def test_cells_that_are_empty_or_text_are_not_known() -> None:
    Path("log").write_text("\ufeffstep;lr;loss;note\n1;;nan;good\n2;0.5;1;\n\n", "utf-8")
    rows = read_log("log").rows
    assert [row.step for row in rows] == [1, 2]
    assert [row.rate for row in rows] == [None, 0.5]
    assert math.isnan(rows[0].values["loss"])
    assert dict(rows[1].values) == {"loss": 1.0}


# doubts


def optimizers(*rates: float) -> list[dict[str, Any]]:
    return [{"param_groups": [{"lr": rate}], "state": {}} for rate in rates]


@pytest.mark.usefixtures("here")
def test_an_average_across_a_decay_is_pointed_out() -> None:
    run_of([1, 2, 3, 4], optimizer=optimizers(0.3, 0.3, 0.2, 0.1))
    note = (
        "the learning rate falls from 0.3 to 0.1 across these checkpoints: averaging across a "
        "decay is known to bring nothing or to hurt; --constant-lr takes those before it"
    )
    assert selected()[1] == [note]
    assert note not in selected(last=2)[1]
    assert note not in selected(constant_lr=True)[1]
    run_of([1, 2, 3, 4], optimizer=optimizers(0.3, 0.1, 0.3, 0.1))
    assert selected()[1] == []  # cyclical


@pytest.mark.usefixtures("here")
def test_runs_with_different_seeds_are_pointed_out() -> None:
    torch_file("run/step_1.pt", args=__import__("argparse").Namespace(seed=1))
    torch_file("run/step_2.pt", hyper_parameters={"seed": 2})
    assert selected()[1] == [
        "run/step_1.pt is of a run with seed 1, run/step_2.pt of one with seed 2: weights of runs "
        "with different seeds do not average"
    ]


@pytest.mark.usefixtures("here")
def test_runs_whose_steps_overlap_are_pointed_out() -> None:
    run_of([10, 30])
    run_of([20, 40], "other")
    run_of([50, 60], "later")
    checkpoints, notes = open_sources(["run", "other"])
    close_all(checkpoints)
    assert notes == [
        "run (steps 10 to 30) and other (20 to 40) overlap: if these are two runs with different "
        "seeds, their weights do not average"
    ]
    checkpoints, notes = open_sources(["run", "later"])
    close_all(checkpoints)
    assert notes == []


@pytest.mark.usefixtures("here")
def test_cycles_are_those_of_one_run_and_metrics_are_each_checkpoints_own() -> None:
    run_of([1, 2], val_loss=[3.0, 1.0])
    run_of([3, 4], "other", val_loss=[2.0, 9.0])
    for selection in (Selection(at_lr_minima=True), Selection(swad=True)):
        with pytest.raises(
            SourceError, match="goes by the training of one run, and run and other are two"
        ):
            open_sources(["run", "other"], selection=selection)
    checkpoints, _ = open_sources(["run", "other"], selection=Selection(best=2, metric="val_loss"))
    close_all(checkpoints)
    assert [one.step for one in checkpoints] == [2, 3]


# commands


@pytest.mark.usefixtures("here")
def test_commands_select_by_metrics_and_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    run_of([10, 20, 30], val_loss=[3.0, 1.0, 2.0])
    best = ("--best", "2", "--metric", "val_loss")
    note = "with the lowest val_loss (the checkpoints): step_20.pt (1), step_30.pt (2)"
    code, out, err = ckptavg(capsys, "inspect", "run", *best)
    assert (code, err) == (0, "")
    assert "run: a run of 2 checkpoints" in out
    assert f"note: {note}" in out
    code, out, err = ckptavg(capsys, "average", "run", "-o", "out", *best, "--json")
    assert code == 0, err
    assert json.loads(out)["n_checkpoints"] == 2
    assert note in json.loads(out)["notes"]
    assert note in json.loads(Path("out/ckptavg.json").read_text())["notes"]
    result = package.average_checkpoints("run", "again", best=2, metric="val_loss")
    assert result.n_checkpoints == 2
    code, _, err = ckptavg(capsys, "average", "run", "-o", "third", "--best", "2")
    assert code == 2
    assert "--best needs the name of a metric" in err


@pytest.mark.usefixtures("here")
def test_commands_select_by_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    run_of(range(50, 401, 50))
    write_csv("log.csv", [{"step": n, "lr": cosine(n - 1, 200)} for n in range(1, 401)])
    by_log = ("--at-lr-minima", "--log", "log.csv", "--lr-recorded", "used")
    code, out, err = ckptavg(capsys, "inspect", "run", *by_log)
    assert code == 0, err
    assert "run: a run of 2 checkpoints" in out
    info = package.inspect_run("run", selection=Selection(at_lr_minima=True, log="log.csv"))
    assert info is not None
    assert [one.step for one in info.checkpoints] == [200, 400]


def test_schedulers_that_are_odd_are_not_known(tmp_path: Path) -> None:
    for number, state in enumerate(
        (None, 3, {"last_epoch": -1}, {"last_epoch": True}, {"last_epoch": 2**60}, [3], {})
    ):
        path = tmp_path / f"{number}.pt"
        torch.save({"model": {"w": torch.ones(1)}, "scheduler": state}, path)
        checkpoint = package.open_checkpoint(path)
        assert checkpoint.scheduler is None
        checkpoint.close()


def test_checkpoints_on_the_hub_are_selected_by_what_they_tell(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        history = [{"step": step, "eval_loss": loss}]
        state = json.dumps({"global_step": step, "log_history": history})
        model_directory(f"all/run/checkpoint-{step}", step, trainer_state__json=state)
    upload(hub, tmp_path / "all", "main")
    checkpoints, notes = open_sources(
        f"{REPO}@main/run", selection=Selection(best=2, metric="eval_loss")
    )
    close_all(checkpoints)
    assert [one.step for one in checkpoints] == [20, 30]
    assert notes[1].startswith("with the lowest eval_loss (the checkpoints): checkpoint-20 (1)")
