"""Small good checkpoints of every format: what mutations begin with.

Those that torch writes itself are the same for one version of torch.
"""

import io
import json
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import hostile
import torch
from dcp_files import DcpFiles, cut, dcp_files, whole
from torch import Tensor

from faults.mutated_pickles import operations_of
from faults.stand_ins import storages_named

Files = Mapping[str, bytes]

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
DISTCP = ("__0_0.distcp", "__1_0.distcp")
PARTS = ("shard-00001-model.safetensors", "shard-00002-model.safetensors")


class TorchParts(NamedTuple):
    """A torch file taken apart: its pickle, and its storages by key."""

    pickle: bytes
    storages: Mapping[str, bytes]


class LegacyParts(NamedTuple):
    """A torch file of the old format taken apart: its five pickles, and what follows them."""

    pickles: Sequence[bytes]
    storages: bytes

    @property
    def whole(self) -> bytes:
        """The file."""
        return b"".join((*self.pickles, self.storages))


def floats(*values: float) -> bytes:
    """Return float32 numbers as files hold them."""
    return struct.pack(f"<{len(values)}f", *values)


def _values() -> dict[str, Tensor]:
    tied = torch.arange(6.0).reshape(2, 3)
    return {
        "w": tied,
        "v": torch.arange(4.0).to(torch.bfloat16).reshape(2, 2).t(),
        "tied": tied,
        "row": tied[1],
        "n": torch.tensor(7),
        "none": torch.empty(0, 2, dtype=torch.float16),
        "b": torch.tensor([True, False, True]),
    }


def _few() -> dict[str, Tensor]:
    return {"w": torch.arange(4.0).reshape(2, 2), "c": torch.tensor([1 + 2j, 3 - 4j])}


def _roots() -> list[Any]:
    nested = {
        "epoch": 3,
        "state_dict": OrderedDict(_few()),
        "optimizer": {"param_groups": [{"lr": 0.1}]},
        "loss": torch.tensor(0.5),
    }
    return [_values(), _few(), nested, {"w": torch.nn.Parameter(torch.arange(3.0))}]


def saved(root: Any) -> bytes:
    """Return what torch writes."""
    buffer = io.BytesIO()
    torch.save(root, buffer)
    return buffer.getvalue()


def row_major(value: Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cache
def torch_files() -> Sequence[bytes]:
    """Return torch files of today's format, some with the padding and records that torch adds."""
    by_hand = [hostile.zip_bytes(hostile.torch_members(*parts)) for parts in torch_parts()]
    return (*by_hand, *map(saved, _roots()))


@cache
def torch_parts() -> Sequence[TorchParts]:
    """Return what torch files consist of: written by torch, and put together by hand."""
    by_hand = TorchParts(
        hostile.pickled(
            hostile.mapping(
                {
                    "w": hostile.tensor((2, 2)),
                    "t": hostile.tensor((2, 2), (1, 2)),
                    "s": hostile.tensor((), offset=3),
                }
            )
        ),
        {"0": floats(0, 1, 2, 3)},
    )
    return (by_hand, *(taken_apart(saved(root)) for root in _roots()))


def taken_apart(raw: bytes) -> TorchParts:
    """Return the pickle and the storages of what torch wrote."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        prefix = "archive/data/"
        storages = {
            name.removeprefix(prefix): archive.read(name)
            for name in archive.namelist()
            if name.startswith(prefix)
        }
        return TorchParts(archive.read("archive/data.pkl"), storages)


@cache
def legacy_parts() -> Sequence[LegacyParts]:
    """Return what torch files of the old format consist of.

    torch names storages by where they lie in memory; here they have the names of today's format.
    """
    return tuple(map(as_legacy, torch_parts()))


def as_legacy(parts: TorchParts) -> LegacyParts:
    """Return the same content in the old format."""
    operations = list(operations_of(parts.pickle))
    for at in reversed(range(len(operations))):
        if operations[at] == b"Q":  # its tuple ends with None in the old format
            end = next(before for before in reversed(range(at)) if operations[before] == b"t")
            operations.insert(end, b"N")
    named = storages_named(parts.pickle)
    pickles = (
        hostile.pickled(hostile.number(hostile.LEGACY_MAGIC)),
        hostile.pickled(hostile.number(1001)),
        hostile.pickled(
            hostile.mapping({"little_endian": b"\x88", "protocol_version": b"M\xe9\x03"})
        ),
        b"".join(operations),
        hostile.pickled(b"](" + b"".join(map(hostile.text, named)) + b"e"),
    )
    storages = (struct.pack("<q", numel) + parts.storages[key] for key, numel in named.items())
    return LegacyParts(pickles, b"".join(storages))


@cache
def legacy_files() -> Sequence[bytes]:
    """Return torch files of the old format."""
    return tuple(parts.whole for parts in legacy_parts())


def npy(header: str, data: bytes, version: int = 1) -> bytes:
    """Return a numpy array file with this header."""
    raw = header.encode("utf-8", "surrogatepass") + b"\n"
    layout = "<H" if version == 1 else "<I"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(layout, len(raw)) + raw + data


def npy_header(descr: str, order: bool, shape: tuple[int, ...]) -> str:
    """Return the header that numpy writes."""
    return f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}"


@cache
def npz_files() -> Sequence[bytes]:
    """Return numpy files of arrays."""
    arrays = {
        "w.npy": npy(npy_header("<f4", False, (2, 2)), floats(0, 1, 2, 3)),
        "c.npy": npy(npy_header("<f8", True, (2, 3)), struct.pack("<6d", *range(6)), 2),
        "s.npy": npy(npy_header("|b1", False, ()), b"\1"),
        "e.npy": npy(npy_header("<i8", False, (0, 3)), b""),
        "t.npy": npy(npy_header("<U2", False, ()), "ab".encode("utf-32-le")),
    }
    members = [hostile.Member(name=name, content=content) for name, content in arrays.items()]
    return (hostile.zip_bytes(members), hostile.zip_bytes(members[:1]), _by_numpy())


def _by_numpy() -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, w=np.arange(6, dtype="f4").reshape(2, 3), h=np.ones(3, "f2"))
    return buffer.getvalue()


@cache
def safetensors_files() -> Sequence[bytes]:
    """Return safetensors files."""
    entry = hostile.entry
    several = {
        "__metadata__": {"format": "pt", "step": "12"},
        "w": entry("F32", [2, 2], 0, 16),
        "b": entry("BF16", [4], 16, 24),
        "n": entry("I64", [], 24, 32),
        "e": entry("F16", [0, 3], 32, 32),
    }
    packed = {"q": entry("F4", [4], 0, 2), "f": entry("F8_E4M3", [2, 1], 2, 4)}
    return (
        hostile.safetensors_bytes(several, bytes(range(32))),
        hostile.safetensors_bytes({"w": entry("F32", [4], 0, 16)}, floats(0, 1, 2, 3)),
        hostile.safetensors_bytes(packed, bytes(range(4))),
    )


@cache
def sharded_directories() -> Sequence[Files]:
    """Return directories of safetensors shards with an index, and one of parts of tensors."""
    entry = hostile.entry
    first = {"a.weight": entry("F32", [2], 0, 8), "embed_tokens.weight": entry("F32", [1], 8, 12)}
    second = {"b.weight": entry("F16", [2, 1], 0, 4)}
    index = {
        "metadata": {"total_size": 16},
        "weight_map": {**dict.fromkeys(first, SHARDS[0]), **dict.fromkeys(second, SHARDS[1])},
    }
    history = [
        {"step": 10, "epoch": 0.5, "learning_rate": 0.1, "loss": 2.5},
        {"step": 20, "eval_loss": 1.5, "eval_runtime": 3.0},
    ]
    state = {"global_step": 20, "epoch": 1.0, "log_history": history}
    sharded = {
        SHARDS[0]: hostile.safetensors_bytes(first, bytes(range(12))),
        SHARDS[1]: hostile.safetensors_bytes(second, bytes(range(100, 104))),
        INDEX: _json(index),
        "config.json": _json({"model_type": "x", "tie_word_embeddings": True}),
        "trainer_state.json": _json(state),
    }
    parts = {
        PARTS[0]: _part({"w": ([0, 0], [1, 2]), "b": ([0], [3])}),
        PARTS[1]: _part({"w": ([1, 0], [2, 2])}),
    }
    return (sharded, parts)


def _part(boxes: Mapping[str, tuple[list[int], list[int]]]) -> bytes:
    header: dict[str, Any] = {}
    position = 0
    for name, (_, shape) in boxes.items():
        nbytes = torch.Size(shape).numel()
        header[name] = hostile.entry("U8", shape, position, position + nbytes)
        position += nbytes
    told = {name: {"saved_offsets": first} for name, (first, _) in boxes.items()}
    header["__metadata__"] = {"DCP_SHARDING_INFO": json.dumps(told)}
    return hostile.safetensors_bytes(header, bytes(range(1, position + 1)))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


@cache
def dcp_directories() -> Sequence[Files]:
    """Return torch.distributed.checkpoint directories: without and with the planner's notes."""
    plain = dcp_files(
        {"w": torch.arange(6.0).reshape(3, 2), "n": torch.tensor(4), "e": torch.empty(0)},
        lambda name, value: cut(value.shape, 0, [1]) if name == "w" else whole(value.shape),
        names=DISTCP,
    )
    columns = dcp_files(
        {"model.w": torch.arange(4.0).reshape(2, 2), "optim.m": torch.ones(2), "step": 5},
        lambda name, value: cut(value.shape, 1, [1]) if name == "model.w" else whole(value.shape),
        planner={"model.w": ("model", "w"), "optim.m": ("optim", "m"), "step": ("step",)},
        names=DISTCP[:1],
    )
    return dcp_contents(plain), dcp_contents(columns)


def dcp_contents(made: DcpFiles) -> Files:
    """Return the files of a directory that was put together, the parts without what pads them."""
    contents = dict.fromkeys(made.contents, b"")
    for info in made.metadata.storage_data.values():
        start, content = info.offset, contents[info.relative_path]
        raw = bytes(made.contents[info.relative_path][start : start + info.length])
        part = hostile.zip_bytes(hostile.torch_members(*taken_apart(raw)))
        info.offset, info.length = len(content), len(part)
        contents[info.relative_path] = content + part
    return {".metadata": pickle.dumps(made.metadata), **contents}


def some_bytes(rng: random.Random) -> bytes:
    """Return a good file of any format."""
    of_format = rng.choice((torch_files, legacy_files, npz_files, safetensors_files))
    return rng.choice(of_format())
