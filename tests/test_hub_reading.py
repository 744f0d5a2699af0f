"""What is averaged from the Hub has the bits of an average of local copies."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, tree
from hub_fixtures import (
    REPO,
    add_side_files,
    ckptavg,
    model_files,
    same_as_local,
    save_steps,
    talk_to,
    upload,
)
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from torch import nn

from ckptavg import BnPass, average_checkpoints, recompute_bn, side_files
from ckptavg.checkpoint import hub_folder
from ckptavg.tensors import HubRevision

# the same bits


def test_sharded_revisions_average_like_local_copies(
    steps: list[Path], tmp_path: Path, temporary: Path
) -> None:
    result = same_as_local(f"{REPO}@step*", steps, tmp_path / "out")
    assert result.n_checkpoints == 3
    written = model_files(tmp_path / "out")
    assert set(written) == {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer.model",
        "additional_chat_templates/tool.jinja", "modeling_custom.py",
    }  # fmt: skip
    assert list(temporary.iterdir()) == []


def test_code_stays_behind_where_it_is_not_wanted(
    steps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = ckptavg(
        capsys, "average", f"{REPO}@step*", "-o", tmp_path / "out", "--no-code", "--quiet"
    )
    assert (code, err) == (0, "")
    assert "modeling_custom.py" not in tree(tmp_path / "out")
    assert "tokenizer.json" in tree(tmp_path / "out")


@pytest.mark.parametrize("layout", ["safetensors", "torch", "old torch", "sharded torch"])
def test_every_layout_averages_like_local_copies(
    hub: LoopbackHub, tmp_path: Path, layout: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    local = []
    for step in (1, 2):
        shared = torch.randn(60, 70, generator=generator)
        tensors = {
            "embed.weight": shared,
            "norm.weight": torch.randn(9, generator=generator).half(),
            "count": torch.tensor(step),
        }
        if "torch" in layout:
            tensors["lm_head.weight"] = shared  # tied
            tensors["conv.weight"] = torch.randn(70, 60, generator=generator).t()
            tensors["sliced.weight"] = torch.randn(40, 50, generator=generator)[::2, 3:]
        directory = tmp_path / f"step{step}"
        if layout == "sharded torch":
            save_checkpoint(directory, tensors, layout)
        else:
            directory.mkdir()
            if "torch" in layout:
                torch.save(
                    tensors,
                    directory / "pytorch_model.bin",
                    _use_new_zipfile_serialization=layout == "torch",
                )
            else:
                save_file(tensors, directory / "model.safetensors")
        add_side_files(directory)
        upload(hub, directory)
        local.append(directory)
    same_as_local(f"{REPO}@step*", local, tmp_path / "out")
    same_as_local(
        [f"{REPO}@step2", f"{REPO}@step1"],
        [local[1], local[0]],
        tmp_path / "weighted",
        coefficients=(0.25, 0.75),
    )


def test_folders_and_files_of_one_commit_are_checkpoints(hub: LoopbackHub, tmp_path: Path) -> None:
    local = save_steps(tmp_path / "local", (5, 10), "safetensors")
    for directory, step in zip(local, (5, 10), strict=True):
        upload(hub, directory, "main", f"run/checkpoint-{step}/")
    folders = f"{REPO}@main/run/checkpoint-*"
    result = same_as_local(folders, local, tmp_path / "folders")
    assert result.n_checkpoints == 2
    files = [f"{REPO}@main/run/checkpoint-{step}/model.safetensors" for step in (5, 10)]
    average_checkpoints(files, tmp_path / "files")
    assert set(model_files(tmp_path / "files")) == {"model.safetensors"}
    assert (
        model_files(tmp_path / "files")["model.safetensors"]
        == model_files(tmp_path / "folders")["model.safetensors"]
    )
    told = json.loads((tmp_path / "files" / "ckptavg.json").read_text())["checkpoints"]
    assert [one["step"] for one in told] == [5, 10]  # as their folders' names tell


def test_local_and_hub_checkpoints_mix(hub: LoopbackHub, steps: list[Path], tmp_path: Path) -> None:
    commit = hub.branches(REPO)["step10"]
    sources: list[str | HubRevision] = [
        str(steps[0]),
        f"hf://{REPO}@step2",
        HubRevision(REPO, "step10", commit),
    ]
    same_as_local(sources, steps, tmp_path / "out")


def test_several_schemes_read_the_revisions_once(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    schemes = ["uniform", "late=uniform:last=2", "own=coefficients:0.5,0.25,0.25"]
    average_checkpoints(f"{REPO}@step*", tmp_path / "out", schemes=schemes)
    stored = sum(path.stat().st_size for step in steps for path in step.glob("*.safetensors"))
    assert sum(one.sent_bytes for one in hub.find("GET", "", "cdn")) < 1.5 * stored
    average_checkpoints(steps, tmp_path / "copies", schemes=schemes)
    for name in ("uniform", "late", "own"):
        assert model_files(tmp_path / "out" / name) == model_files(tmp_path / "copies" / name)


def test_the_step_of_the_trainer_wins_over_the_name_of_the_branch(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    local = save_steps(tmp_path / "local", (1, 2))
    for directory, step in zip(local, (700, 300), strict=True):
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        upload(hub, directory)
    average_checkpoints(f"{REPO}@step*", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "ckptavg.json").read_text())["checkpoints"]
    assert [(one["source"], one["step"]) for one in told] == [
        (f"{REPO}@step2", 300), (f"{REPO}@step1", 700),
    ]  # fmt: skip


def test_tied_embeddings_are_known_from_the_config(hub: LoopbackHub, tmp_path: Path) -> None:
    local = [tmp_path / "step1", tmp_path / "step2"]
    for step, directory in enumerate(local):
        embedding = {"model.embed_tokens.weight": torch.full((3, 2), float(step))}
        directory.mkdir()
        if step == 0:
            tied = embedding | {"lm_head.weight": embedding["model.embed_tokens.weight"]}
            torch.save(tied, directory / "pytorch_model.bin")
        else:
            save_file(embedding, directory / "model.safetensors")
        (directory / "config.json").write_text('{"tie_word_embeddings": true}')
        upload(hub, directory)
    same_as_local(f"{REPO}@step*", local, tmp_path / "out")


def test_the_provenance_names_commits_and_digests(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path
) -> None:
    hub.tag(REPO, "final", "step10")
    average_checkpoints([f"{REPO}@step{{1,2}}", f"{REPO}@final~0"], tmp_path / "out")
    told = json.loads((tmp_path / "out" / "ckptavg.json").read_text())["checkpoints"]
    assert [one["hub"]["commit"] for one in told] == [
        hub.branches(REPO)[f"step{step}"] for step in (1, 2, 10)
    ]
    assert [one["hub"]["revision"] for one in told] == ["step1", "step2", "final~0"]
    for one in told:
        assert len(one["files"]) == 3
        for file in one["files"]:
            assert re.fullmatch("sha256:[0-9a-f]{64}", file["digest"])
            assert file["path"].startswith(f"hf://{REPO}@{one['hub']['commit']}/model-0000")


def test_files_that_xet_stores_are_read_by_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = save_steps(tmp_path / "local")
    with LoopbackHub(tmp_path / "xet", xet=True) as hub:
        talk_to(hub, tmp_path / "home", monkeypatch)
        hub.create(REPO)
        for directory in local:
            upload(hub, directory)
        same_as_local(f"{REPO}@step*", local, tmp_path / "out")
        assert hub.count("GET", "/blob/", "cdn") > 0
        assert hub.find("GET", "xet") == []


def test_inspect_lists_revisions_and_shows_one(
    hub: LoopbackHub, steps: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ckptavg(capsys, "inspect", REPO)
    assert (code, err) == (0, "")
    places = [out.index(f"step{step} ") for step in (1, 2, 10)]
    assert places == sorted(places)
    for step, directory in zip((1, 2, 10), steps, strict=True):
        code, out, _ = ckptavg(capsys, "inspect", f"{REPO}@step{step}", "--json")
        (told,) = json.loads(out)
        (copy,) = json.loads(ckptavg(capsys, "inspect", directory, "--json")[1])
        assert told["tensors"] == copy["tensors"]
        assert told["step"] == copy["step"] == step
    assert hub.count("GET", "", "cdn") <= 2 * 3 * 3  # headers alone


# BatchNorm


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def bn_pass(**options: Any) -> BnPass:
    batches = [torch.arange(60.0).reshape(20, 3), torch.ones(5, 3)]
    return BnPass(model=build, batches=batches, **options)


def save_bn_models(hub: LoopbackHub, folder: Path) -> list[Path]:
    saved = []
    for step in (1, 2):
        torch.manual_seed(step)
        saved.append(folder / f"step{step}")
        saved[-1].mkdir(parents=True)
        save_file(build().state_dict(), saved[-1] / "model.safetensors")
        (saved[-1] / "config.json").write_text("{}")
        upload(hub, saved[-1])
    return saved


def test_statistics_are_recomputed_from_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    local = save_bn_models(hub, tmp_path / "local")
    same_as_local(f"{REPO}@step*", local, tmp_path / "average", batchnorm=bn_pass())
    recompute_bn(f"{REPO}@step2", tmp_path / "one", bn_pass())
    recompute_bn(local[1], tmp_path / "one-local", bn_pass())
    assert model_files(tmp_path / "one") == model_files(tmp_path / "one-local")


def test_an_average_is_compared_with_its_last_checkpoint_on_the_hub(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    local = save_bn_models(hub, tmp_path / "local")
    average_checkpoints(f"{REPO}@step*", tmp_path / "swa")
    hub.commit(REPO, "step2", {"model.safetensors": b"moved on"})
    options: dict[str, Any] = {"compare": True, "evaluate": weight_sum}
    result = recompute_bn(tmp_path / "swa", tmp_path / "out", bn_pass(**options))
    (output,) = result.outputs
    last = load_file(local[1] / "model.safetensors")["0.weight"].sum().item()
    values = [row.metrics["weight"] for row in output.comparison]
    assert len(values) > 1
    assert last in values
    given = bn_pass(**options, last_checkpoint=f"{REPO}@step1")
    recompute_bn(tmp_path / "swa", tmp_path / "given", given)


def weight_sum(model: nn.Module) -> dict[str, float]:
    return {"weight": model.state_dict()["0.weight"].sum().item()}


def test_a_side_file_that_is_too_large_is_left_out_with_a_word(
    hub: LoopbackHub, steps: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(REPO, "step1", {"large.txt": b"x" * 5000})
    for module in (hub_folder, side_files):
        monkeypatch.setattr(module, "MAX_SIDE_FILE_BYTES", 4999)
    result = average_checkpoints(f"{REPO}@step1", tmp_path / "out")
    assert "did not copy large.txt: it is larger than 4999 bytes" in result.notes
    assert not (tmp_path / "out" / "large.txt").exists()
    assert hub.count("GET", "/large.txt") == 0
