"""The commands that are measured, on one set of inputs."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .inputs import InputSet
from .measure import Contender

PEERS = ("naive", "sum-in-stored-dtype", "float64-sums", "mergekit")


def ckptavg_command(
    inputs: InputSet, output: Path, device: str, schemes: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the command that averages the inputs with the ckptavg of the working tree."""
    options = ["-o", str(output), "--overwrite", "--json", "--device", device]
    options += [word for scheme in schemes for word in ("--scheme", scheme)]
    return (sys.executable, "-m", "ckptavg", "average", *map(str, inputs.paths), *options)


def ckptavg(inputs: InputSet, outputs: Path, device: str) -> Contender:
    """Return ckptavg, writing below ``outputs``."""
    output = outputs / "ckptavg"
    return Contender(
        name="ckptavg",
        commands=(ckptavg_command(inputs, output, device),),
        output=output,
        due_nbytes=inputs.checkpoint_nbytes,
    )


def peer(
    name: str, inputs: InputSet, outputs: Path, device: str = "cpu", *, n_outputs: int = 1
) -> Contender:
    """Return a peer, writing below ``outputs``."""
    output = outputs / name
    words = ("-o", str(output), "--device", device, "--outputs", str(n_outputs))
    module = (sys.executable, "-m", "tests.benchmarks.peers")
    command = (*module, name, *map(str, inputs.paths), *words)
    if name == "mergekit":
        command = _mergekit_command(inputs, output, device)
    return Contender(
        name=name,
        commands=(command,),
        output=output,
        due_nbytes=n_outputs * inputs.checkpoint_nbytes,
    )


def can_read(name: str, inputs: InputSet) -> bool:
    """Tell whether a peer can average such inputs."""
    if name == "mergekit":
        return (inputs.paths[0] / "config.json").exists()
    return name == "naive" or inputs.paths[0].suffix in (".pt", ".pth")


def is_installed(name: str) -> bool:
    """Tell whether a peer can run here."""
    return name != "mergekit" or shutil.which("mergekit-yaml") is not None


def _mergekit_command(inputs: InputSet, output: Path, device: str) -> tuple[str, ...]:
    """Write mergekit's recipe beside the inputs; return the command."""
    recipe = {
        "merge_method": "linear",
        "dtype": "float32" if inputs.name == "llama-f32" else "bfloat16",
        "models": [{"model": str(path), "parameters": {"weight": 1.0}} for path in inputs.paths],
    }
    path = inputs.paths[0].with_name("mergekit.yaml")
    path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    flags = ["--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card"]
    flags += ["--cuda", "--low-cpu-memory"] if device != "cpu" else []
    return ("mergekit-yaml", str(path), str(output), *flags)
