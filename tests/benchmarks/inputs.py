"""Checkpoints to average: real names and shapes, random values, like those of one run.

All checkpoints of a set share one block of N(0, 0.02) values, each with a little noise of its own,
repeated over the tensors. The block's length is prime, so equal tensors do not come out equal.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dcp import write_dcp

Specs = dict[str, tuple[tuple[int, ...], str]]  # name: shape, and dtype as safetensors spells it

SETS = ("llama-bf16", "llama-f32", "llama-pt", "resnet50-f32", "resnet50-pth")
# the same 16 matrices: whole, in rows over 4 processes, in columns over 4 processes
LAYOUTS = ("matrices-safetensors", "matrices-pt", "matrices-dcp", "matrices-dcp-columns")
_N_MATRICES = 16
_SUFFIXES = {
    "llama-pt": ".pt", "resnet50-f32": ".safetensors", "resnet50-pth": ".pth",
    "matrices-safetensors": ".safetensors", "matrices-pt": ".pt",
}  # fmt: skip
_BLOCK_LENGTH = 4_194_301  # values
_ITEM_BYTES = {"BF16": 2, "F32": 4, "I64": 8}
_N_SHARDS = 2
_VOCABULARIES = (4_000, 8_000, 16_000, 32_000)


class InputError(Exception):
    """The inputs that were asked for cannot be made."""


@dataclass(frozen=True, kw_only=True)
class InputSet:
    """Checkpoints of one kind and size.

    Attributes:
        name: One of ``SETS``.
        paths: The checkpoints, in the order of their steps.
        nbytes: Bytes of all files of all checkpoints.
        checkpoint_nbytes: Bytes of tensor data in one checkpoint.
    """

    name: str
    paths: tuple[Path, ...]
    nbytes: int
    checkpoint_nbytes: int


def make_inputs(
    work: Path, name: str, *, n_checkpoints: int, nbytes: int, say: Callable[[str], None]
) -> InputSet:
    """Make what is missing of a set of checkpoints in ``work``; use again what is there.

    ``nbytes`` is the size of one checkpoint, met within 5 %; ResNet-50 has the size it has.

    Raises:
        InputError: If the disk is too small, or no Llama has about that size.
    """
    if name not in (*SETS, *LAYOUTS):
        raise InputError(f"no set is named '{name}'; there are {', '.join((*SETS, *LAYOUTS))}")
    folder, config = work / "inputs" / name, {}
    if name.startswith("llama"):
        folder = folder.with_name(f"{name}-{nbytes}")
        config = _llama_config(nbytes, "F32" if name == "llama-f32" else "BF16")
    specs = _llama_specs(config) if config else _resnet50_specs()
    if name in LAYOUTS:
        folder, specs = folder.with_name(f"{name}-{nbytes}"), _matrix_specs(nbytes)
    checkpoint_nbytes = _nbytes(specs)
    steps = range(1, n_checkpoints + 1)
    paths = {step: folder / f"step-{step}{_SUFFIXES.get(name, '')}" for step in steps}
    missing = [step for step in steps if not paths[step].exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = len(missing) * checkpoint_nbytes / 1e9, shutil.disk_usage(folder).free / 1e9
        if needed > free:
            raise InputError(f"{folder}: inputs take {needed:.1f} GB, {free:.1f} GB are free")
        say(f"making {len(missing)} x {checkpoint_nbytes / 1e9:.3g} GB of {name}")
    for step in missing:
        values, partial = _Values(step), folder / f"unfinished-{paths[step].name}"
        if paths[step].suffix in (".pt", ".pth"):
            _write_torch_file(partial, specs, values)
        elif paths[step].suffix == ".safetensors":
            _write_safetensors(partial, specs, values)
        elif "dcp" in name:
            write_dcp(partial, specs, values.pieces, columns=name.endswith("columns"))
        else:
            _write_directory(partial, specs, values, config)
        partial.rename(paths[step])
    return InputSet(
        name=name,
        paths=tuple(paths.values()),
        nbytes=sum(file_sizes(paths.values())),
        checkpoint_nbytes=checkpoint_nbytes,
    )


def file_sizes(paths: Iterable[Path]) -> Iterator[int]:
    """Yield the size of every file that is, or lies below, one of the paths."""
    for path in paths:
        for file in (path, *path.rglob("*")):
            if file.is_file():
                yield file.stat().st_size


def _nbytes(specs: Specs) -> int:
    return sum(math.prod(shape) * _ITEM_BYTES[code] for shape, code in specs.values())


def _llama_config(nbytes: int, code: str) -> dict[str, Any]:
    """Return the ``config.json`` of a Llama of about a size, with the largest vocabulary."""
    candidates = []
    for hidden, vocabulary in itertools.product(range(256, 16_385, 256), _VOCABULARIES):
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": math.ceil(hidden * 8 / 3 / 256) * 256,
            "num_hidden_layers": 0,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 256,
            "vocab_size": vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": {"BF16": "bfloat16", "F32": "float32"}[code],
        }
        ends = _nbytes(_llama_specs(config))
        layer = _nbytes(_llama_specs(config | {"num_hidden_layers": 1})) - ends
        config["num_hidden_layers"] = n_layers = round((nbytes - ends) / layer)
        if n_layers >= 2 and 24 <= hidden / n_layers <= 160:  # as wide for their depth as usual
            error = abs(ends + n_layers * layer - nbytes) / nbytes
            candidates.append((error > 0.03, -vocabulary, error, hidden, config))
    *_, error, _, best = min(candidates, default=(0, 0, 1.0, 0, {}))
    if error > 0.05:
        raise InputError(f"no Llama comes near {nbytes / 1e9:g} GB; try 0.05 GB to 100 GB")
    return best


def _llama_specs(config: dict[str, Any]) -> Specs:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key_value = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    in_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    shapes |= {"model.norm": (hidden,), "lm_head": (config["vocab_size"], hidden)}
    code = {"bfloat16": "BF16", "float32": "F32"}[config["torch_dtype"]]
    return {f"{name}.weight": (shape, code) for name, shape in shapes.items()}


def _matrix_specs(nbytes: int) -> Specs:
    rows = max(round(nbytes / _N_MATRICES / (4 * 4096)), 4)
    return {f"layers.{number}.weight": ((rows, 4096), "F32") for number in range(_N_MATRICES)}


def _resnet50_specs() -> Specs:
    """Return the tensors of a ResNet-50 for 1000 classes, in float32: 102 MB."""
    specs: Specs = {}

    def add(convolution: str, batchnorm: str, outputs: int, inputs: int, side: int) -> None:
        specs[f"{convolution}.weight"] = ((outputs, inputs, side, side), "F32")
        for part in ("weight", "bias", "running_mean", "running_var"):
            specs[f"{batchnorm}.{part}"] = ((outputs,), "F32")
        specs[f"{batchnorm}.num_batches_tracked"] = ((), "I64")

    add("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, n_blocks in enumerate((3, 4, 6, 3)):
        width, outputs = 64 * 2**stage, 256 * 2**stage
        for block in range(n_blocks):
            prefix = f"layer{stage + 1}.{block}"
            add(f"{prefix}.conv1", f"{prefix}.bn1", width, inputs, 1)
            add(f"{prefix}.conv2", f"{prefix}.bn2", width, width, 3)
            add(f"{prefix}.conv3", f"{prefix}.bn3", outputs, width, 1)
            if block == 0:
                add(f"{prefix}.downsample.0", f"{prefix}.downsample.1", outputs, inputs, 1)
            inputs = outputs
    return specs | {"fc.weight": ((1000, inputs), "F32"), "fc.bias": ((1000,), "F32")}


class _Values:
    """The values of one checkpoint, handed out tensor by tensor."""

    def __init__(self, step: int) -> None:
        base, noise = (
            np.random.default_rng(seed).standard_normal(_BLOCK_LENGTH, dtype=np.float32)
            for seed in (0, step)
        )
        self._step = step
        self._float32 = base * np.float32(0.02) + noise * np.float32(0.001)
        # the upper half of a float32 is a bfloat16
        self._bfloat16 = (self._float32.view(np.uint32) >> 16).astype(np.uint16)
        self._start = 0

    def pieces(self, name: str, shape: tuple[int, ...], code: str) -> Iterator[memoryview]:
        """Yield the bytes of the next tensor."""
        if code == "I64":
            yield memoryview(np.int64(1000 * self._step).tobytes())
            return
        block: NDArray[Any] = self._bfloat16 if code == "BF16" else self._float32
        left = math.prod(shape)
        while left:
            values: NDArray[Any] = block[self._start : self._start + left]
            self._start = (self._start + len(values)) % len(block)
            left -= len(values)
            if name.endswith("running_var"):
                values = np.abs(values)
            yield values.data.cast("B")


def _write_directory(path: Path, specs: Specs, values: _Values, config: dict[str, Any]) -> None:
    """Write shards of about the same size, their index and the model's config."""
    path.mkdir(exist_ok=True)
    total, done = _nbytes(specs), 0
    shards: list[Specs] = [{} for _ in range(_N_SHARDS)]
    for name, spec in specs.items():
        shards[done * _N_SHARDS // total][name] = spec
        done += _nbytes({name: spec})
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        filename = f"model-{number:05d}-of-{_N_SHARDS:05d}.safetensors"
        _write_safetensors(path / filename, shard, values)
        weight_map |= dict.fromkeys(shard, filename)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (path / "config.json").write_text(json.dumps(config, indent=2))


def _write_safetensors(path: Path, specs: Specs, values: _Values) -> None:
    """Write one safetensors file, the widest dtype first, as safetensors itself does."""
    specs = dict(sorted(specs.items(), key=lambda item: -_ITEM_BYTES[item[1][1]]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, code) in specs.items():
        end = offset + _nbytes({name: (shape, code)})
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            file.writelines(values.pieces(name, *spec))


def _write_torch_file(path: Path, specs: Specs, values: _Values) -> None:
    import torch

    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
    tensors = {}
    for name, (shape, code) in specs.items():
        data = bytearray().join(values.pieces(name, shape, code))
        flat = torch.frombuffer(data, dtype=torch.uint8).view(dtypes[code])
        tensors[name] = flat.reshape(shape)
    torch.save(tensors, path)
