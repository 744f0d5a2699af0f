"""Config, tokenizer and licence travel; weights and training state stay behind."""

import json
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint, tree

from ckptavg import average_checkpoints


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """Two checkpoint folders as a trainer leaves them."""
    folders = []
    for step in (500, 1000):
        folder = save_checkpoint(
            tmp_path / f"checkpoint-{step}",
            {"w": torch.ones(4), "v": torch.full((2,), float(step))},
            "sharded safetensors",
        )
        folders.append(folder)
        for name in (
            "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
            "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja",
            "preprocessor_config.json", "processor_config.json", "LICENSE", "NOTICE.txt",
            "USE_POLICY.md", "modeling_custom.py", "optimizer.pt", "scheduler.pt", "rng_state.pth",
            "scaler.pt", "trainer_state.json", "training_args.bin", "pytorch_model.bin",
            "model.gguf", "model.onnx", "tf_model.h5", "zero_to_fp32.py", "latest", "README.md",
            "optimizer.bin", "random_states_0.pkl", ".gitattributes",
        ):  # fmt: skip
            (folder / name).write_text("{}" if name.endswith(".json") else f"{name} of {step}")
        (folder / "config.json").write_text('{"torch_dtype": "float32", "dtype": "float32"}')
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text(f"tool {step}")
        (folder / "global_step500").mkdir()
        (folder / "runs").mkdir()
        (folder / "runs" / "events.out.tfevents.1").write_text("log")
    return folders


COPIED = {
    "LICENSE", "NOTICE.txt", "USE_POLICY.md", "additional_chat_templates/tool.jinja",
    "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
    "modeling_custom.py", "preprocessor_config.json", "processor_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json",
}  # fmt: skip


def test_side_files_of_the_last_checkpoint_are_copied(run: list[Path], tmp_path: Path) -> None:
    result = average_checkpoints(list(reversed(run)), tmp_path / "out")
    written = tree(tmp_path / "out")
    assert set(written) == COPIED | {"ckptavg.json", "model.safetensors"}
    assert written["merges.txt"] == b"merges.txt of 1000"
    assert written["additional_chat_templates/tool.jinja"] == b"tool 1000"
    assert written["config.json"] == (run[1] / "config.json").read_bytes()
    assert "Python files of the model, copied, not run: modeling_custom.py" in result.notes
    told = json.loads(written["ckptavg.json"])
    assert set(told["output"]["side_files"]) == COPIED


def test_code_is_left_out_if_asked(run: list[Path], tmp_path: Path) -> None:
    result = average_checkpoints(run, tmp_path / "out", include_code=False)
    assert "modeling_custom.py" not in tree(tmp_path / "out")
    assert "Python files of the model, left out: modeling_custom.py" in result.notes


def test_config_names_the_output_dtype(run: list[Path], tmp_path: Path) -> None:
    average_checkpoints(run, tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"torch_dtype": "bfloat16", "dtype": "bfloat16"}


def test_linked_side_files_are_copied_as_files(run: list[Path], tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("from a cache")
    (run[1] / "vocab.json").unlink()
    (run[1] / "vocab.json").symlink_to(tmp_path / "blob")
    average_checkpoints(run, tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.json").is_symlink()
    assert (tmp_path / "out" / "vocab.json").read_text() == "from a cache"


def test_single_files_bring_no_side_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = save_checkpoint(tmp_path / "c", {"w": torch.ones(1)}, "safetensors")
    average_checkpoints([path], tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == ["ckptavg.json", "model.safetensors"]


def test_what_a_sweep_found_of_a_model_does_not_travel_to_the_next(
    tmp_path: Path,
) -> None:
    tensors = {"w": torch.ones(3), "v": torch.ones(2)}
    directory = save_checkpoint(tmp_path / "swept", tensors, "sharded safetensors")
    (directory / "config.json").write_text("{}")
    for name in ("sweep.json", "soup.json", "tune.json"):
        (directory / name).write_text("{}")
    average_checkpoints([directory], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "config.json" in names
    assert not {"sweep.json", "soup.json", "tune.json"} & names
