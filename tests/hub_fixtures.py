"""A Hub that this process talks to, and checkpoints that are both on it and here."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import save_checkpoint, tree
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from safetensors.torch import save_file

from ckptavg import AverageResult, average_checkpoints
from ckptavg.cli import run
from ckptavg.hub import transport
from ckptavg.tensors import HubRevision

REPO = "org/model"
SHARDED = "sharded safetensors"
SIDE_FILES = {
    "config.json": '{"dtype": "float32"}',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer.model": "sentence pieces",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "modeling_custom.py": "raise SystemExit('never run')",
    "README.md": "---\nlicense: mit\n---\n",
    "optimizer.pt": "not for inference",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub with an empty repository ``REPO``; huggingface_hub in this process talks to it."""
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.create(REPO)
        talk_to(hub, tmp_path / "home", monkeypatch)
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def steps(hub: LoopbackHub, tmp_path: Path) -> list[Path]:
    """Sharded model directories here, each on a branch of its name there."""
    saved = save_steps(tmp_path / "local")
    for directory in saved:
        upload(hub, directory)
    return saved


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files, an empty one."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def talk_to(hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, which has read its environment, talk to a hub; and wait but briefly."""
    huggingface_hub.close_session()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transport, "_FIRST_WAIT_SECONDS", 0.002)


def save_steps(
    folder: Path,
    steps: Sequence[int] = (1, 2, 10),
    layout: str = SHARDED,
    *,
    n_values: int = 12_000,
) -> list[Path]:
    """Save a model directory ``step<N>`` for each step, with side files; oldest first."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    saved = []
    for step in steps:
        tensors = {
            "embed.weight": torch.randn(n_values // 100, 100, generator=generator),
            "norm.weight": torch.randn(7, generator=generator).bfloat16(),
            "out.weight": torch.randn(n_values // 100, 100, generator=generator),
            "position_ids": torch.arange(5),
        }
        directory = folder / f"step{step}"
        if layout == SHARDED:
            save_checkpoint(directory, tensors, layout)
        else:
            directory.mkdir()
            save_file(tensors, directory / "model.safetensors")
        add_side_files(directory)
        saved.append(directory)
    return saved


def add_side_files(directory: Path) -> None:
    """Put into a model directory what lies beside the weights."""
    for name, text in SIDE_FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)


def upload(hub: LoopbackHub, directory: Path, branch: str = "", inside: str = "") -> str:
    """Commit a directory, to a branch of its name if none is given; return the commit."""
    files = {f"{inside}{name}": content for name, content in tree(directory).items()}
    return hub.commit(REPO, branch or directory.name, files, f"add {directory.name}")


def ckptavg(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run the command line; return exit code, stdout and stderr."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def model_files(output: Path) -> dict[str, bytes]:
    """Return all files of a model but the provenance, which tells where it came from."""
    files = tree(output)
    del files["ckptavg.json"]
    return files


def same_as_local(
    remote: str | HubRevision | Sequence[str | HubRevision],
    local: Sequence[Path],
    output: Path,
    **options: Any,
) -> AverageResult:
    """Average revisions, check that local copies give the same files, return the result."""
    result = average_checkpoints(remote, output, **options)
    copies = output.with_name(f"{output.name}-local")
    average_checkpoints(local, copies, **options)
    assert model_files(output) == model_files(copies)
    assert (output / "config.json").exists() == (local[-1] / "config.json").exists()
    return result
