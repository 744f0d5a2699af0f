"""Run directories: what is found in them, in which order, and what is left out."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint, tree
from hostile import call, name, pickled, torch_bytes, whole
from run_fixtures import (
    cut,
    dcp_directory,
    final_model,
    lightning_file,
    lightning_run,
    model_directory,
    text,
    torch_file,
    trainer_run,
    trainer_state,
    weights,
)
from safetensors.torch import load_file

import ckptavg
from ckptavg import average_checkpoints, gathering
from ckptavg.checkpoint.folder import LocalFolder
from ckptavg.errors import CheckpointError, CkptavgError, IncompleteCheckpointError, SourceError
from ckptavg.gathering import close_all, open_sources
from ckptavg.results import RunInfo
from ckptavg.runs import find_run
from ckptavg.selection import Selection

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current directory, an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gathered(*sources: str, **selection: object) -> tuple[list[str], list[str]]:
    """Return the labels of what is taken, and the notes on what is not."""
    checkpoints, notes = open_sources(list(sources), selection=Selection(**selection))  # type: ignore[arg-type]
    close_all(checkpoints)
    return [checkpoint.label for checkpoint in checkpoints], notes


def taken(*sources: str, **selection: object) -> list[str]:
    """Return the labels of what is taken, without their common folder."""
    return [label.rpartition("/")[2] for label in gathered(*sources, **selection)[0]]


def refused(
    source: str, what: str, kind: type[Exception] = SourceError, **selection: object
) -> None:
    """Check that a source is refused with exactly this message."""
    with pytest.raises(kind, match=whole(what)):
        gathered(source, **selection)


def run_of(source: str, **selection: object) -> RunInfo:
    """Return what is in a run directory."""
    info = ckptavg.inspect_run(source, selection=Selection(**selection))  # type: ignore[arg-type]
    assert info is not None
    return info


def names_in(folder: str) -> tuple[str, ...]:
    """Return what a directory's names make of it."""
    run = find_run(LocalFolder(Path(folder), folder))
    return () if run is None else run.names


# naming


@pytest.mark.parametrize(
    "names",
    [
        ("checkpoint-500", "checkpoint-1000"),
        ("step-1000", "step-20000"),
        ("step_9", "step_10"),
        ("global_step100", "global_step2000"),
        ("iter_0000100", "iter_0000200"),
        ("model--val_loss=0.50-step=2-samples=16", "model--val_loss=0.1-step=10-samples=80"),
        ("epoch_9", "epoch_10"),
        ("9", "10"),
    ],
    ids=lambda names: names[0],
)  # fmt: skip
def test_folders_named_after_a_step_are_checkpoints(names: tuple[str, ...]) -> None:
    for value, one in enumerate(names):
        model_directory(f"run/{one}", value)
    assert gathered("run") == ([f"run/{one}" for one in names], [])


@pytest.mark.parametrize(
    "names",
    [
        ("epoch=3-step=900.ckpt", "epoch=10-step=3000.ckpt"),
        ("epoch=3-val_loss=0.2.ckpt", "epoch=4-val_loss=nan.ckpt", "epoch=5-val_loss=1e-05.ckpt"),
        ("best-epoch=3.ckpt", "best-epoch=11.ckpt"),
        ("checkpoint-9.pth.tar", "checkpoint-12.pth.tar"),
        ("checkpoint1.pt", "checkpoint10.pt"),
        ("checkpoint_1_500.pt", "checkpoint_1_1000.pt", "checkpoint_2_1500.pt"),
        ("9epoch.pth", "12epoch.pth"),
        ("epoch-009.pt", "epoch-010.pt"),
        ("100.pt", "200.pt", "1000.pt"),
        ("model_0009999.pth", "model_0019999.pth"),
        ("G_9.pth", "G_10.pth"),
        ("ckpt9.bin", "ckpt10.bin"),
        ("iter_9_of_run.pt", "iter_10_of_run.pt"),
    ],
    ids=lambda names: names[0],
)
def test_files_are_checkpoints_in_natural_order(names: tuple[str, ...]) -> None:
    for value, one in enumerate(names):
        torch_file(f"run/{one}", value)
    assert gathered("run") == ([f"run/{one}" for one in names], [])


def test_safetensors_files_are_checkpoints_where_they_have_numbers() -> None:
    for step in (10, 9):
        save_checkpoint(Path(f"step_{step}"), weights(step), "safetensors")
    assert taken(".") == ["step_9.safetensors", "step_10.safetensors"]


def test_distributed_checkpoints_make_a_run() -> None:
    for step in (2, 10):
        dcp_directory(f"outputs/checkpoint/step-{step}", step)
    text("outputs/tb/events")
    assert gathered("outputs")[0] == ["outputs/checkpoint/step-2", "outputs/checkpoint/step-10"]


def test_fairseq() -> None:
    for epoch in (1, 2, 10):
        torch_file(f"run/checkpoint{epoch}.pt", epoch)
    torch_file("run/checkpoint_best.pt", 2)
    torch_file("run/checkpoint_last.pt", 10)
    reason = "nothing tells its place in training; name it to take it"
    assert gathered("run") == (
        ["run/checkpoint1.pt", "run/checkpoint2.pt", "run/checkpoint10.pt"],
        [f"run: left out checkpoint_{one}.pt: {reason}" for one in ("best", "last")],
    )


def test_espnet() -> None:
    for epoch in (9, 10, 12):
        Path("run").mkdir(exist_ok=True)
        torch.save(weights(epoch), f"run/{epoch}epoch.pth")
    Path("run/valid.acc.best.pth").symlink_to("10epoch.pth")
    Path("run/latest.pth").symlink_to("12epoch.pth")
    torch.save(weights(11), "run/valid.acc.ave_10best.pth")
    torch_file("run/checkpoint.pth", 12, optimizers=[{}])
    text("run/config.yaml")
    reason = "nothing tells its place in training; name it to take it"
    assert gathered("run") == (
        ["run/9epoch.pth", "run/10epoch.pth", "run/12epoch.pth"],
        [
            f"run: left out checkpoint.pth: {reason}",
            "run: left out latest.pth: it is the same as 12epoch.pth",
            f"run: left out valid.acc.ave_10best.pth: {reason}",
            "run: left out valid.acc.best.pth: it is the same as 10epoch.pth",
        ],
    )


def timm_run() -> None:
    for epoch in (8, 9, 10):
        torch_file(f"run/checkpoint-{epoch}.pth.tar", epoch, "state_dict", epoch=epoch, arch="r")
    os.link("run/checkpoint-9.pth.tar", "run/model_best.pth.tar")
    shutil.copy("run/checkpoint-10.pth.tar", "run/last.pth.tar")
    text("run/args.yaml")
    text("run/summary.csv")


def test_timm() -> None:
    timm_run()
    torch_file("run/recovery-9-500.pth.tar", 9.5, "state_dict", epoch=9)
    torch_file("run/recovery-7-500.pth.tar", 7.5, "state_dict", epoch=7)
    older = "it is older than checkpoint-10.pth.tar; name it to take it"
    labels, notes = gathered("run")
    assert labels == [f"run/checkpoint-{epoch}.pth.tar" for epoch in (8, 9, 10)]
    assert notes == [
        "run: left out last.pth.tar: it is the same as checkpoint-10.pth.tar",
        "run: left out model_best.pth.tar: it is the same as checkpoint-9.pth.tar",
        f"run: left out recovery-7-500.pth.tar: {older}",
        "run: left out recovery-9-500.pth.tar: it is the same as checkpoint-9.pth.tar",
    ]


def test_a_recovery_file_that_is_newer_than_all_is_the_newest() -> None:
    timm_run()
    torch_file("run/recovery-11-500.pth.tar", 11, "state_dict", epoch=11)
    assert taken("run", last=2) == ["checkpoint-10.pth.tar", "recovery-11-500.pth.tar"]


LIGHTNING = "run/lightning_logs/version_0/checkpoints"


def test_lightning_with_last_equal_to_the_newest() -> None:
    lightning_run(LIGHTNING)
    shutil.copy(f"{LIGHTNING}/epoch=3-step=900.ckpt", f"{LIGHTNING}/last.ckpt")
    assert gathered("run") == (
        [f"{LIGHTNING}/epoch={epoch}-step={epoch * 300}.ckpt" for epoch in (1, 2, 3)],
        [f"{LIGHTNING}: left out last.ckpt: it is the same as epoch=3-step=900.ckpt"],
    )


def test_lightning_with_last_newer_than_all() -> None:
    lightning_run(LIGHTNING)
    lightning_file(f"{LIGHTNING}/last.ckpt", 3, 950)
    assert taken("run", last=2) == ["epoch=3-step=900.ckpt", "last.ckpt"]


def test_lightning_with_a_broken_last() -> None:
    lightning_run(LIGHTNING)
    text(f"{LIGHTNING}/last.ckpt")
    labels, notes = gathered("run", last=1)
    assert labels == [f"{LIGHTNING}/epoch=3-step=900.ckpt"]
    broken = f"it cannot be read: {LIGHTNING}/last.ckpt: is empty (0 bytes)"
    assert notes[0] == f"{LIGHTNING}: left out last.ckpt: {broken}"


def test_two_second_names_of_one_newer_checkpoint_count_once() -> None:
    lightning_run("run/checkpoints")
    for one in ("last", "latest"):
        lightning_file(f"run/checkpoints/{one}.ckpt", 3, 950)
    assert taken("run", last=2) == ["epoch=3-step=900.ckpt", "last.ckpt"]


def test_two_versions_of_a_lightning_run_are_refused_by_name() -> None:
    for version in (0, 1):
        lightning_run(f"run/lightning_logs/version_{version}/checkpoints")
    where = "run/lightning_logs"
    refused("run", f"{where}: holds several runs (version_0, version_1); name one of them, for "
            f"example {where}/version_1")  # fmt: skip
    assert len(taken(f"{where}/version_1")) == 3


def test_two_files_of_one_step_are_refused_with_a_pattern_that_tells_them_apart() -> None:
    lightning_run("run")
    lightning_file("run/epoch=3-step=900-v1.ckpt", 3, 900)
    refused("run", "run: holds two checkpoints of step 900, epoch=3-step=900-v1.ckpt and "
            "epoch=3-step=900.ckpt: of two runs? move one away, or choose with --match, for "
            "example --match 'epoch=*-step=*-v*.ckpt'")  # fmt: skip
    assert taken("run", match=("*[0-9][0-9].ckpt",)) == [
        f"epoch={epoch}-step={epoch * 300}.ckpt" for epoch in (1, 2, 3)
    ]


def test_two_files_of_one_epoch_are_refused() -> None:
    torch_file("run/epoch-3.pt", epoch=3)
    torch_file("run/epoch-4.pt", epoch=3)
    refused("run", "run: holds two checkpoints of epoch 3, epoch-3.pt and epoch-4.pt: of two "
            "runs? move one away, or choose with --match")  # fmt: skip


def test_a_trainer_s_final_model_beside_its_checkpoints_needs_a_word() -> None:
    trainer_run("run")
    final_model("run")
    refused("run", "run: holds weights of its own and 3 checkpoints inside; select among those, "
            "for example with --last 5, or name the weights' file")  # fmt: skip
    assert gathered("run", last=2) == (
        ["run/checkpoint-1000", "run/checkpoint-1500"],
        [
            "run: left out the weights beside the checkpoints",
            "took 2 of 3 checkpoints (--last 2): checkpoint-1000 to checkpoint-1500",
        ],
    )
    assert run_of("run").has_weights
    assert ckptavg.inspect_checkpoint("run").step == 1500
    assert gathered("run/model.safetensors") == (["run/model.safetensors"], [])


def test_a_final_model_beside_a_folder_of_checkpoints_needs_a_word_too() -> None:
    trainer_run("run/checkpoints")
    final_model("run")
    refused("run", "run: holds weights of its own and 3 checkpoints inside; select among those, "
            "for example with --last 5, or name the weights' file")  # fmt: skip
    assert taken("run", last=1) == ["checkpoint-1500"]


def test_parts_of_a_model_in_a_folder_beside_it_are_no_run() -> None:
    model_directory("model")
    for part in (0, 1):
        torch_file(f"model/original/consolidated.{part:02d}.pth")
    assert ckptavg.inspect_run("model") is None
    assert gathered("model") == (["model"], [])
    for run in ("a", "b"):
        trainer_run(f"model/{run}")
    assert gathered("model") == (["model"], [])  # nothing says that one of two is meant


def test_adapters_of_which_none_has_weights_are_no_run_to_take() -> None:
    trainer_run("run", (1, 2))
    for step in (1, 2):
        Path(f"run/checkpoint-{step}/model.safetensors").unlink()
        text(f"run/checkpoint-{step}/adapter_config.json", "{}")
    refused(
        "run",
        "run: holds no checkpoint to take: run: left out checkpoint-2: it is not whole: "
        "run/checkpoint-2: holds adapter_config.json, but neither adapter_model.safetensors nor "
        "adapter_model.bin",
    )


def test_a_model_in_one_folder_and_a_run_in_another_are_refused() -> None:
    trainer_run("run/checkpoints")
    model_directory("run/final")
    refused("run", "run: holds several runs (checkpoints, final); name one of them, for example "
            "run/checkpoints")  # fmt: skip


def test_weights_without_a_number_beside_numbered_files_are_a_final_model() -> None:
    for epoch in (1, 2):
        torch_file(f"run/epoch_{epoch}.pt", epoch)
    model_directory("run", 7)
    assert taken("run", last=2) == ["epoch_1.pt", "epoch_2.pt"]
    refused("run", "run: holds weights of its own and 2 checkpoints inside; select among those, "
            "for example with --last 5, or name the weights' file")  # fmt: skip


def test_recomputing_bn_takes_the_final_model() -> None:
    trainer_run("run")
    final_model("run")
    batchnorm = ckptavg.BnPass(model=torch.nn.Linear(2, 2), batches=[torch.ones(1, 2)])
    with pytest.raises(ckptavg.ModelError, match="^run: does not fit"):
        ckptavg.recompute_bn("run", "out", batchnorm)


def test_a_trainer_s_deepspeed_folder_is_part_of_its_checkpoint() -> None:
    trainer_run("run", (500, 1000))
    for step in (500, 1000):
        path = f"run/checkpoint-{step}"
        torch_file(f"{path}/global_step{step}/mp_rank_00_model_states.pt", step, "module")
        text(f"{path}/latest", f"global_step{step}")
    assert taken("run") == ["checkpoint-500", "checkpoint-1000"]
    assert gathered("run/checkpoint-500") == (["run/checkpoint-500"], [])
    assert ckptavg.inspect_run("run/checkpoint-500") is None


def test_a_native_deepspeed_run() -> None:
    for step in (100, 200):
        path = f"run/global_step{step}"
        torch_file(f"{path}/mp_rank_00_model_states.pt", step, "module")
        text(f"{path}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    text("run/latest", "global_step200")
    text("run/zero_to_fp32.py")
    assert [one.layout for one in run_of("run").checkpoints] == ["DeepSpeed directory"] * 2
    assert taken("run", last=1) == ["global_step200"]


def test_a_megatron_run() -> None:
    for step in (100, 200):
        dcp_directory(f"run/iter_{step:07d}", step)
        text(f"run/iter_{step:07d}/common.pt")
    text("run/latest_checkpointed_iteration.txt", "200")
    assert taken("run") == ["iter_0000100", "iter_0000200"]


def test_two_models_side_by_side_are_refused_and_a_pattern_chooses() -> None:
    for step in (1000, 20000):
        for one in ("G", "D"):
            torch_file(f"run/{one}_{step}.pth", step)
    refused("run", "run: holds checkpoints of several kinds, such as D_1000.pth and G_1000.pth: of "
            "two runs? choose with --match, for example --match 'D_*.pth', or name the files "
            "themselves")  # fmt: skip
    assert gathered("run", match=("G_*",)) == (
        ["run/G_1000.pth", "run/G_20000.pth"],
        ["took 2 of 4 checkpoints (--match G_*): G_1000.pth to G_20000.pth"],
    )


def test_models_without_numbers_are_several_kinds() -> None:
    for one in ("adam", "sgd"):
        torch_file(f"soup/{one}.pt")
    refused("soup", "soup: holds checkpoints of several kinds, such as adam.pt and sgd.pt: of two "
            "runs? choose with --match, for example --match 'adam.pt', or name the files "
            "themselves")  # fmt: skip
    assert taken("soup/*") == ["adam.pt", "sgd.pt"]


# what is no checkpoint


def test_our_own_outputs_inside_a_run_are_never_averaged_in() -> None:
    trainer_run("run")
    average_checkpoints("run", "run/step-swa")
    average_checkpoints("run", "run/two", schemes=["uniform:last=1", "uniform:last=2"])
    assert len(taken("run")) == 3
    shutil.copytree("run/step-swa", "run/step-9000.partial-0a1b2c")
    labels, notes = gathered("run")
    assert len(labels) == 3
    reason = "its name says that it is not finished"
    assert [one for one in notes if reason in one] in (
        [], [f"run: left out step-9000.partial-0a1b2c: {reason}"],
    )  # fmt: skip


def test_names_that_say_that_something_is_not_finished() -> None:
    trainer_run("run")
    unfinished = (
        "tmp-checkpoint-2000", "checkpoint-2000.tmp", "step-3000.incomplete", "checkpoint-2500_tmp",
        "swa.partial-0a1b2c",
    )  # fmt: skip
    for one in unfinished:
        model_directory(f"run/{one}")
    text("run/step-9.pt.part")
    text("run/notes.tmp")
    labels, notes = gathered("run")
    assert len(labels) == 3
    reason = "its name says that it is not finished"
    assert sorted(notes) == sorted(
        f"run: left out {one}: {reason}" for one in (*unfinished, "step-9.pt.part")
    )


def test_training_state_shards_and_hidden_files_are_no_checkpoints() -> None:
    for epoch in (9, 10):
        torch_file(f"run/epoch_{epoch}.pt", epoch)
        torch_file(f"run/optimizer_{epoch}.pt", epoch)
        torch_file(f"run/epoch_{epoch}_optimizer.pt", epoch)
        torch_file(f"run/.epoch_{epoch}.pt", epoch)
    torch_file("run/.ipynb_checkpoints/epoch_9.pt")
    torch_file("run/rng_state_0.pth")
    torch_file("run/checkpoint-00001-of-00002.pt")
    text("run/events.out.tfevents.step_3")
    assert names_in("run") == ("epoch_9.pt", "epoch_10.pt")


def test_links_are_what_they_lead_to() -> None:
    trainer_run("elsewhere")
    Path("run").mkdir()
    for step in (500, 1000):
        Path(f"run/checkpoint-{step}").symlink_to(f"../elsewhere/checkpoint-{step}")
    Path("run/latest").symlink_to("checkpoint-1000")
    assert gathered("run") == (
        ["run/checkpoint-500", "run/checkpoint-1000"],
        ["run: left out latest: it is the same as checkpoint-1000"],
    )
    Path("linked").symlink_to("run")
    assert len(taken("linked")) == 2


def test_a_link_that_leads_nowhere_is_not_passed_over() -> None:
    trainer_run("run", (500, 1000, 2000))
    Path("run/checkpoint-1500").symlink_to("../removed")
    with pytest.raises(CheckpointError, match="run/checkpoint-1500: .*no such file or directory"):
        gathered("run")
    torch_file("files/step_1.pt")
    Path("files/step_2.pt").symlink_to("../removed")
    with pytest.raises(CheckpointError, match="files/step_2.pt: .*no such file or directory"):
        gathered("files")


def test_folders_of_pictures_named_after_steps_are_no_checkpoints() -> None:
    trainer_run("run", (500, 1000))
    for step in (250, 500, 1000, 1250):
        text(f"run/validation-step-{step}/image.png")
    labels, notes = gathered("run")
    assert labels == ["run/checkpoint-500", "run/checkpoint-1000"]
    assert len(notes) == 4
    assert notes[0].startswith(
        "run: left out validation-step-250: it is no checkpoint, as none of its kind is: "
        "run/validation-step-250: holds no weights"
    )


def test_a_folder_with_one_weight_file_is_a_checkpoint_with_its_side_files() -> None:
    torch_file("model/weights.pth")
    text("model/config.json", "{}")
    assert ckptavg.inspect_run("model") is None
    average_checkpoints("model", "out")
    assert "config.json" in tree(Path("out"))


def test_a_folder_that_may_not_be_listed_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    lightning_run("run/checkpoints")
    text("run/lost+found/file")
    names = LocalFolder.names

    def guarded(self: LocalFolder) -> object:
        if self.path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return names(self)

    monkeypatch.setattr(LocalFolder, "names", guarded)
    assert len(taken("run")) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_run_that_may_not_be_listed_is_told() -> None:
    trainer_run("run")
    Path("run").chmod(0)
    with pytest.raises(CheckpointError, match="run: cannot be read: Permission denied"):
        gathered("run")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Path("x").mkdir(), "x: holds no weights: it is empty"),
        (lambda: save_optimizers("x"),
         "x: holds no weights, only the state of a training (optimizer_1.pt, optimizer_2.pt)"),
        (lambda: text("x/notes.txt"),
         "x: holds no weights (looked for model.safetensors, pytorch_model.bin, their sharded "
         "forms, and .metadata)"),
        (lambda: text("x/.hidden.pt"),
         "x: holds no weights (looked for model.safetensors, pytorch_model.bin, their sharded "
         "forms, and .metadata)"),
        (lambda: lightning_run("x/a/b/c/d/checkpoints"),
         "x: holds no weights (looked for model.safetensors, pytorch_model.bin, their sharded "
         "forms, and .metadata)"),
    ],
    ids=["empty", "optimizers", "unrelated", "hidden", "too deep"],
)  # fmt: skip
def test_folders_without_checkpoints_say_what_they_hold(
    build: Callable[[], object], message: str
) -> None:
    build()
    refused("x", message, IncompleteCheckpointError)


def test_a_file_is_no_run() -> None:
    torch_file("epoch_1.pt")
    assert ckptavg.inspect_run("epoch_1.pt") is None
    assert gathered("epoch_1.pt") == (["epoch_1.pt"], [])


def test_a_folder_of_thousands_of_names_is_looked_at_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").mkdir()
    for step in range(2000):
        Path(f"run/step_{step}.pt").touch()
    torch_file("run/step_77.pt", 77)
    started = time.perf_counter()
    assert len(names_in("run")) == 2000
    assert time.perf_counter() - started < 1
    opened: list[str] = []
    opener: Callable[..., object] = gathering.open_checkpoint  # type: ignore[attr-defined]

    def noted(path: str, **options: object) -> object:
        opened.append(path)
        return opener(path, **options)

    monkeypatch.setattr(gathering, "open_checkpoint", noted)
    assert taken("run", match=("step_77.pt",)) == ["step_77.pt"]
    assert opened == ["run/step_77.pt"]  # nothing is opened before --match
    assert time.perf_counter() - started < 1


# order


def test_metadata_win_over_names() -> None:
    torch_file("run/step_10.pt", global_step=99)
    torch_file("run/step_20.pt", global_step=20)
    torch_file("run/step_30.pt", global_step=30)
    assert taken("run") == ["step_20.pt", "step_30.pt", "step_10.pt"]
    assert [one.step for one in run_of("run").checkpoints] == [20, 30, 99]


def test_a_trainer_s_state_wins_over_the_name_of_its_folder() -> None:
    trainer_run("run", (10, 20))
    text("run/checkpoint-10/trainer_state.json", trainer_state(99))
    assert taken("run") == ["checkpoint-20", "checkpoint-10"]


def test_epochs_decide_where_steps_are_missing() -> None:
    for file, epoch in (("ckpt_a1", 3), ("ckpt_a2", 1), ("ckpt_a3", 2)):
        torch_file(f"run/{file}.pt", epoch=epoch)
    assert taken("run") == ["ckpt_a2.pt", "ckpt_a3.pt", "ckpt_a1.pt"]


# not whole


def cut_safetensors(path: str) -> None:
    cut(f"{path}/model.safetensors", 4)


def shards_of(path: str) -> list[Path]:
    shutil.rmtree(path)
    tensors = {f"w{number}": torch.ones(2) for number in range(3)}
    save_checkpoint(Path(path), tensors, "sharded safetensors")
    return sorted(Path(path).glob("*.safetensors"))


def drop_index(path: str) -> None:
    shards_of(path)
    Path(path, "model.safetensors.index.json").unlink()


def save_optimizers(path: str) -> None:
    for step in (1, 2):
        text(f"{path}/optimizer_{step}.pt")


def empty(path: str) -> None:
    shutil.rmtree(path)
    Path(path).mkdir()


def only_optimizer(path: str) -> None:
    Path(path, "model.safetensors").unlink()


def dcp_without_metadata(path: str) -> None:
    shutil.rmtree(path)
    dcp_directory(path)
    Path(path, ".metadata").unlink()


def torch_without_end(path: str) -> None:
    Path(path, "model.safetensors").unlink()
    torch.save(weights(1), f"{path}/pytorch_model.bin")
    cut(f"{path}/pytorch_model.bin", 100)


INCOMPLETE: dict[str, tuple[Callable[[str], object], str]] = {
    "truncated safetensors": (cut_safetensors, "run/checkpoint-1500/model.safetensors: "),
    "torch zip without end": (torch_without_end, "run/checkpoint-1500/pytorch_model.bin: "),
    "shard missing": (
        lambda path: shards_of(path)[-1].unlink(), "run/checkpoint-1500: the shard "
        "model-00003-of-00003.safetensors is missing; ",
    ),
    "no index": (drop_index, "run/checkpoint-1500: holds shards "),
    "DCP without .metadata": (dcp_without_metadata, "run/checkpoint-1500: "),
    "empty": (empty, "run/checkpoint-1500: holds no weights: it is empty"),
    "only optimizer": (
        only_optimizer,
        "run/checkpoint-1500: holds no weights, only the state of a training (optimizer.pt, ",
    ),
    "zero bytes": (
        lambda path: Path(path, "model.safetensors").write_bytes(b""),
        "run/checkpoint-1500/model.safetensors: is empty (0 bytes)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", INCOMPLETE)
def test_a_newest_checkpoint_that_is_not_whole_is_left_out_with_a_word(what: str) -> None:
    trainer_run("run")
    damage, reason = INCOMPLETE[what]
    damage("run/checkpoint-1500")
    labels, (note,) = gathered("run")
    assert labels == ["run/checkpoint-500", "run/checkpoint-1000"]
    assert note.startswith(f"run: left out checkpoint-1500: it is not whole: {reason}")
    *_, last = run_of("run").checkpoints
    assert (last.name, last.layout, last.nbytes) == ("checkpoint-1500", None, 0)
    assert last.left_out is not None
    assert last.problem is not None
    assert last.step == 1500  # its name tells


def test_a_file_of_a_run_that_is_cut_short_is_left_out() -> None:
    for epoch in (8, 9, 10):
        torch_file(f"run/epoch_{epoch}.pt", epoch, epoch=epoch, global_step=epoch * 100)
    cut("run/epoch_10.pt")
    labels, (note,) = gathered("run")
    assert labels == ["run/epoch_8.pt", "run/epoch_9.pt"]
    assert note.startswith("run: left out epoch_10.pt: it is not whole: run/epoch_10.pt: ")


def test_names_tell_which_is_newest_where_metadata_cannot_be_read() -> None:
    for number in (1, 2, 3):  # steps in the metadata are of another scale than those in the names
        torch_file(f"run/checkpoint-{number}.pt", number, global_step=number * 1000)
    cut("run/checkpoint-3.pt")
    assert taken("run") == ["checkpoint-1.pt", "checkpoint-2.pt"]


def test_the_newest_without_trainer_state_is_left_out_where_others_have_it() -> None:
    trainer_run("run")
    Path("run/checkpoint-1500/trainer_state.json").unlink()
    assert gathered("run") == (
        ["run/checkpoint-500", "run/checkpoint-1000"],
        [
            "run: left out checkpoint-1500: it is not finished: it has no trainer_state.json, "
            "which the others have"
        ],
    )
    Path("run/checkpoint-500/trainer_state.json").unlink()  # so it is no sign of anything
    assert len(taken("run")) == 3


def test_two_newest_that_are_not_whole_are_both_left_out() -> None:
    trainer_run("run")
    cut_safetensors("run/checkpoint-1500")
    empty("run/checkpoint-1000")
    labels, notes = gathered("run")
    assert labels == ["run/checkpoint-500"]
    assert len(notes) == 2


def test_a_run_with_nothing_whole_is_refused() -> None:
    trainer_run("run", (500,))
    empty("run/checkpoint-500")
    refused("run", "run: holds no checkpoint to take: run: left out checkpoint-500: it is not "
            "whole: run/checkpoint-500: holds no weights: it is empty")  # fmt: skip


def test_a_broken_one_in_the_middle_is_an_error_that_names_it() -> None:
    trainer_run("run")
    empty("run/checkpoint-1000")
    with pytest.raises(IncompleteCheckpointError) as caught:
        gathered("run")
    assert str(caught.value) == "run/checkpoint-1000: holds no weights: it is empty"
    assert caught.value.__notes__ == [
        "it is not the newest of its run, so not left out by itself; --match or --steps leaves it "
        "out"
    ]
    states = [(one.left_out, one.problem) for one in run_of("run").checkpoints]
    problem = "run/checkpoint-1000: holds no weights: it is empty"
    assert states == [(None, None), (None, problem), (None, None)]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"last": 1}, [1500]),
        ({"steps": (1100, None)}, [1500]),
        ({"every": 2}, [500, 1500]),
        ({"match": ("*5*",)}, [500, 1500]),
    ],
    ids=str,
)
def test_a_broken_one_that_is_not_selected_is_no_error(
    selection: dict[str, object], expected: list[int]
) -> None:
    trainer_run("run")
    empty("run/checkpoint-1000")
    assert taken("run", **selection) == [f"checkpoint-{step}" for step in expected]


def test_a_hostile_newest_is_an_error() -> None:
    for step in (1, 2):
        torch_file(f"run/step_{step}.pt", step)
    hostile = torch_bytes(pickled(call(name("os", "system"), b"X\x02\x00\x00\x00ls")))
    Path("run/step_3.pt").write_bytes(hostile)
    with pytest.raises(CheckpointError, match="run/step_3.pt: ") as caught:
        gathered("run")
    assert not isinstance(caught.value, IncompleteCheckpointError)
    assert taken("run", match=("step_[12].pt",)) == ["step_1.pt", "step_2.pt"]


# what is averaged


def test_a_run_gives_the_same_bits_as_its_checkpoints_one_by_one() -> None:
    trainer_run("run", (9, 10, 200))
    average_checkpoints("run", "a")
    average_checkpoints([f"run/checkpoint-{step}" for step in (9, 10, 200)], "b")
    one, other = tree(Path("a")), tree(Path("b"))
    assert {**one, "ckptavg.json": b""} == {**other, "ckptavg.json": b""}
    result = average_checkpoints("run", "c", last=2)
    assert load_file("c/model.safetensors")["w"].tolist() == [105.0] * 4
    assert result.n_checkpoints == 2
    sources = json.loads(Path("c/ckptavg.json").read_text())
    assert "run/checkpoint-9" not in json.dumps(sources)


def test_files_of_checkpoints_that_are_not_taken_are_closed() -> None:
    trainer_run("run", range(1, 21))

    def n_open() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # what is open, by number

    before = n_open()
    checkpoints, _ = open_sources("run", selection=Selection(last=2))
    assert n_open() == before + 2
    close_all(checkpoints)
    with pytest.raises(SourceError):
        open_sources("run", selection=Selection(last=200))
    assert n_open() == before
    run_of("run")
    assert n_open() == before


def test_checkpoints_that_are_not_taken_may_change_meanwhile() -> None:
    trainer_run("run")

    def touch(*_: object) -> None:
        shutil.rmtree("run/checkpoint-500", ignore_errors=True)
        model_directory("run/checkpoint-2000")

    average_checkpoints("run", "out", last=2, progress=touch)
    assert load_file("out/model.safetensors")["w"].tolist() == [1250.0] * 4
    assert not Path("run/checkpoint-500").exists()


# in Python


def test_a_run_is_told_in_python() -> None:
    trainer_run("run", (500, 1000))
    info = run_of("run")
    assert (info.source, info.has_weights, info.notes) == ("run", False, ())
    first, second = info.checkpoints
    assert first == ckptavg.RunCheckpoint(
        name="checkpoint-500",
        source="run/checkpoint-500",
        layout="safetensors directory",
        step=500,
        epoch=None,
        learning_rate=0.00095,
        metrics={"eval_loss": 1.002},
        nbytes=16,
        left_out=None,
        problem=None,
    )
    assert second.step == 1000
    assert run_of("run", last=1).checkpoints == (second,)
    assert ckptavg.inspect_run("run/checkpoint-500") is None
    assert isinstance(info, ckptavg.RunInfo)


def test_a_mixed_run_is_listed_with_a_note() -> None:
    for one in ("G", "D"):
        torch_file(f"run/{one}_1000.pth")
    (note,) = run_of("run").notes
    assert note.startswith("holds checkpoints of several kinds, such as D_1000.pth and G_1000.pth")
    assert run_of("run", match=("G*",)).notes == ()


def test_a_broken_one_is_not_the_newest_because_newer_names_do_not_match() -> None:
    trainer_run("run", (1, 2, 3))
    os.truncate("run/checkpoint-2/model.safetensors", 20)
    with pytest.raises(CheckpointError, match="checkpoint-2.*truncated"):
        open_sources("run", selection=Selection(match=("*-1", "*-2")))


def test_pictures_of_a_step_beside_weights_make_no_run() -> None:
    model_directory("model")
    Path("model/samples_step_500").mkdir()
    assert taken("model") == ["model"]


def test_a_truncated_file_of_another_kind_is_no_picture() -> None:
    for step in (100, 150, 200):
        torch_file(f"run/epoch=1-step={step}{'-v1' if step == 150 else ''}.ckpt", step=step)
    os.truncate("run/epoch=1-step=150-v1.ckpt", 50)
    with pytest.raises(CkptavgError):
        open_sources("run")


def test_files_that_count_to_a_last_epoch_are_no_shards() -> None:
    for epoch in (1, 2, 3):
        torch_file(f"run/epoch-{epoch}-of-10.pt", epoch=epoch)
    assert taken("run", last=2) == ["epoch-2-of-10.pt", "epoch-3-of-10.pt"]
