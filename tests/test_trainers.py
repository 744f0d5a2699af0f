"""Checkpoints that trainers saved; runs in an environment where they are installed."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import float64_mean
from trainers import truth
from trainers.checks import assert_mean, averaged

from ckptavg import CheckpointError, average_checkpoints, inspect_checkpoint
from ckptavg.gathering import close_all, open_sources
from ckptavg.selection import Selection

MAKERS = {
    "transformers_runs": ("transformers", "accelerate", "peft"),
    "accelerate_runs": ("accelerate",),
    "lightning_runs": ("lightning",),
    "timm_runs": ("timm",),
    "deepspeed_runs": ("deepspeed",),
    "cycle_runs": ("transformers", "lightning", "timm"),
}
# run: maker, and the key that its weights stand under where it is not the usual one
RUNS: dict[str, tuple[str, str | None]] = {
    "gpt2": ("transformers_runs", None),
    "llama-sharded": ("transformers_runs", None),
    "plain": ("accelerate_runs", None),
    "plain-torch": ("accelerate_runs", None),
    "automatic": ("accelerate_runs", None),
    "fsdp1-sharded": ("accelerate_runs", None),
    "fsdp2-sharded": ("accelerate_runs", None),
    "fsdp2-full": ("accelerate_runs", None),
    "files": ("lightning_runs", None),
    "weight-averaging-averaged": ("lightning_runs", None),
    "weight-averaging": ("lightning_runs", "current_model_state"),
    "ema-averaged": ("lightning_runs", None),
    "ema": ("lightning_runs", "current_model_state"),
    "sharded": ("lightning_runs", None),
    "timm": ("timm_runs", None),
    "timm-ema": ("timm_runs", "state_dict_ema"),
    "zero1": ("deepspeed_runs", None),
    "zero2": ("deepspeed_runs", None),
    "zero2-bf16": ("deepspeed_runs", None),
    "zero3-gathered": ("deepspeed_runs", None),
}
# the second name of a tied weight, which safetensors leaves out
ABSENT = {
    "gpt2": {"lm_head.weight"},
    "plain": {"head.weight"},
    "automatic": {"head.weight"},
}
TELL_THEIR_STEP = (
    "gpt2", "llama-sharded", "files", "ema", "sharded", "zero1", "zero2-bf16",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directories of the runs made so far, by maker."""
    return {"": tmp_path_factory.mktemp("runs")}


def runs_of(maker: str, made: dict[str, Path]) -> Path:
    """Return the runs of a maker, made when they are first asked for."""
    for library in MAKERS[maker]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    if maker not in made:
        made[maker] = truth.make(maker, made[""] / maker)
    return made[maker]


@pytest.mark.parametrize("run", RUNS)
def test_a_list_of_checkpoints_is_averaged_to_the_mean_of_the_true_weights(
    made: dict[str, Path], tmp_path: Path, run: str
) -> None:
    maker, state_key = RUNS[run]
    saved = truth.read(runs_of(maker, made), run)
    found = averaged([each.path for each in saved], tmp_path / "out", state_key=state_key)
    assert_mean(found, saved, absent=ABSENT.get(run, set()))


@pytest.mark.parametrize("run", RUNS)
def test_a_run_directory_is_averaged_in_the_order_of_its_steps(
    made: dict[str, Path], tmp_path: Path, run: str
) -> None:
    maker, state_key = RUNS[run]
    saved = truth.read(runs_of(maker, made), run)
    found = averaged(saved[0].path.parent, tmp_path / "out", state_key=state_key)
    assert_mean(found, saved, absent=ABSENT.get(run, set()))


@pytest.mark.parametrize("run", ["gpt2", "fsdp2-sharded", "files", "timm", "zero2"])
def test_the_last_checkpoints_of_a_run_are_those_of_the_highest_steps(
    made: dict[str, Path], tmp_path: Path, run: str
) -> None:
    maker, state_key = RUNS[run]
    saved = truth.read(runs_of(maker, made), run)
    found = averaged(saved[0].path.parent, tmp_path / "out", state_key=state_key, last=2)
    assert_mean(found, saved[1:], absent=ABSENT.get(run, set()))


@pytest.mark.parametrize("run", TELL_THEIR_STEP)
def test_the_step_is_told(made: dict[str, Path], run: str) -> None:
    saved = truth.read(runs_of(RUNS[run][0], made), run)
    assert [inspect_checkpoint(each.path).step for each in saved] == [each.step for each in saved]


@pytest.mark.parametrize("run", ["zero3", "zero3-bf16"])
def test_weights_of_which_no_process_has_the_whole_are_refused_with_the_way_out(
    made: dict[str, Path], tmp_path: Path, run: str
) -> None:
    saved = truth.read(runs_of("deepspeed_runs", made), f"{run}-fp32")
    with pytest.raises(CheckpointError, match="zero_to_fp32"):
        averaged([each.path for each in saved], tmp_path / "out")


def test_an_optimizer_alone_is_no_model(made: dict[str, Path], tmp_path: Path) -> None:
    saved = truth.read(runs_of("accelerate_runs", made), "fsdp2-sharded")
    with pytest.raises(CheckpointError, match="optimizer_0: .*(no weights|optimizer)"):
        averaged([each.path / "optimizer_0" for each in saved], tmp_path / "out")


@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_an_adapter_is_averaged_to_the_mean_of_the_merged_weights(
    made: dict[str, Path], tmp_path: Path
) -> None:
    runs = runs_of("transformers_runs", made)
    saved = truth.read(runs, "lora")
    average_checkpoints(saved[0].path.parent, tmp_path / "out")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(runs / "lora-base")
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    each = [one.weights for one in truth.read(runs, "lora-merged")]
    assert each[0].keys() == merged.keys()
    for name, value in merged.items():
        expected = float64_mean([weights[name] for weights in each])
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def ends_of_cycles(used: list[float], per_update: int) -> list[int]:
    """Return after how many updates (or epochs) a rate had fallen, and rose next or was low."""
    found = []
    for at in range(1, len(used)):
        others = [rate for rate in used[:at] if rate != used[at]]
        is_end = used[at + 1] > used[at] if at + 1 < len(used) else used[at] < max(used) / 5
        if others and others[-1] > used[at] and is_end:
            assert (at + 1) % per_update == 0
            found.append((at + 1) // per_update)
    return found


@pytest.mark.parametrize(
    ("run", "per_update", "logs"),
    [
        ("restarts", 1, ()),
        ("lightning-step", 1, ("lightning-step-log/metrics.csv",)),
        ("lightning-epoch", 1, ("lightning-epoch-log/metrics.csv",)),
        ("timm-cycles", 4, ()),
    ],
)
def test_the_ends_of_the_cycles_of_a_learning_rate_are_found(
    made: dict[str, Path], run: str, per_update: int, logs: tuple[str, ...]
) -> None:
    runs = runs_of("cycle_runs", made)
    used = json.loads((runs / f"{run}-used.json").read_text())
    expected = ends_of_cycles(used, per_update)
    assert len(expected) in (4, 5)  # of as many cycles
    for log in (None, *(runs / name for name in logs)):
        selection = Selection(at_lr_minima=True, log=log)
        checkpoints, _ = open_sources(str(runs / run), selection=selection)
        close_all(checkpoints)
        found = [one.step if per_update == 1 else (one.epoch or 0) + 1 for one in checkpoints]
        assert found == expected


def test_older_versions_logged_the_learning_rate_of_the_next_update(
    made: dict[str, Path], tmp_path: Path
) -> None:
    run = "restarts"
    runs = runs_of("cycle_runs", made)
    used = json.loads((runs / f"{run}-used.json").read_text())
    shutil.copytree(runs / run, tmp_path / run)
    for path in (tmp_path / run).glob("checkpoint-*/trainer_state.json"):
        state = json.loads(path.read_text())
        rows = [row for row in state["log_history"] if "learning_rate" in row]
        assert [row["learning_rate"] for row in rows] == [used[row["step"] - 1] for row in rows]
        for row in rows:
            row["learning_rate"] = used[row["step"] % len(used)]
        path.write_text(json.dumps(state))
    checkpoints, _ = open_sources(str(tmp_path / run), selection=Selection(at_lr_minima=True))
    close_all(checkpoints)
    assert [one.step for one in checkpoints] == ends_of_cycles(used, 1)
