"""The modules of LoRA adapters: their factors, found in files and checked against the configs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ckptavg.checkpoint import Checkpoint
from ckptavg.derived.adapter_config import AdapterConfig, module_key
from ckptavg.errors import CheckpointError, IncompatibleCheckpointsError
from ckptavg.tensors import TensorInfo

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)"
)
_OF_LORA = re.compile(r"(^|\.)lora_")
_A, _B, _BIAS = (
    ("lora_A.weight", "lora_embedding_A"),
    ("lora_B.weight", "lora_embedding_B"),
    "lora_B.bias",
)


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """One module's factors in all checkpoints: its weight changes by scale x B A.

    A has the shape [rank, ...], B [out, rank] or [out, rank, 1, 1]: convolutions have the kernel
    in A (peft.tuners.lora.layer, ``_ConvNd.update_layer``). Embeddings look up columns of A, which
    is the same product, transposed.

    Attributes:
        name: Its name, as files have it.
        key: Its name, as patterns in the config match it.
        a, b, bias: Names of the factors, and of the bias that B may have.
        a_infos, b_infos: What each checkpoint has of them.
        ranks, scales: One a checkpoint.
        alphas: What the scales are made of.
    """

    name: str
    key: str
    a: str
    b: str
    bias: str | None
    a_infos: tuple[TensorInfo, ...]
    b_infos: tuple[TensorInfo, ...]
    bias_info: TensorInfo | None
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    alphas: tuple[int | float, ...]

    @property
    def n_in(self) -> int:
        """Elements of one row of A."""
        return prod(self.a_infos[0].shape[1:])

    @property
    def n_out(self) -> int:
        """Rows of B."""
        return self.b_infos[0].shape[0]

    def a_info(self, rank: int) -> TensorInfo:
        """Return A's description at another rank."""
        last = self.a_infos[-1]
        return TensorInfo(last.dtype, (rank, *last.shape[1:]))

    def b_info(self, rank: int) -> TensorInfo:
        """Return B's description at another rank."""
        last = self.b_infos[-1]
        return TensorInfo(last.dtype, (last.shape[0], rank, *last.shape[2:]))

    def nbytes(self, index: int) -> int:
        """Bytes of one checkpoint's factors."""
        return self.a_infos[index].nbytes + self.b_infos[index].nbytes


def factor_names(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of the factors A and B, whose shapes have a rank in them."""
    return [
        name for name in tensors if (match := _FACTOR.fullmatch(name)) and match["part"] != _BIAS
    ]


def foreign_parts(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the parts of LoRA modules that are no factors of a plain product."""
    return [name for name in tensors if _OF_LORA.search(name) and not _FACTOR.fullmatch(name)]


def lora_modules(
    checkpoints: Sequence[Checkpoint], configs: Sequence[AdapterConfig]
) -> list[LoraModule]:
    """Return the modules that all checkpoints have, in the order of the last one's file.

    Names and dtypes are the same everywhere: the caller has compared them.

    Raises:
        CheckpointError: If factors are missing, or do not fit each other or the config.
        IncompatibleCheckpointsError: If shapes differ in more than the rank.
    """
    parts: dict[str, dict[str, str]] = {}
    for name in checkpoints[-1].tensors:
        if match := _FACTOR.fullmatch(name):
            parts.setdefault(match["module"], {})[match["part"]] = name
    return [_module(name, found, checkpoints, configs) for name, found in parts.items()]


def _module(
    name: str,
    parts: Mapping[str, str],
    checkpoints: Sequence[Checkpoint],
    configs: Sequence[AdapterConfig],
) -> LoraModule:
    a = [parts[part] for part in _A if part in parts]
    b = [parts[part] for part in _B if part in parts]
    if len(a) != 1 or len(b) != 1:
        raise CheckpointError(
            f"{checkpoints[-1].label}: module '{name}' has {len(a)} LoRA factors A and {len(b)} B, "
            "expected one of each"
        )
    key, bias = module_key(name), parts.get(_BIAS)
    ranks = [config.rank_of(key) for config in configs]
    for checkpoint, rank in zip(checkpoints, ranks, strict=True):
        _check_shapes(checkpoint, a[0], b[0], rank)
    module = LoraModule(
        name=name,
        key=key,
        a=a[0],
        b=b[0],
        bias=bias,
        a_infos=tuple(_info(one, a[0]) for one in checkpoints),
        b_infos=tuple(_info(one, b[0]) for one in checkpoints),
        bias_info=None if bias is None else _info(checkpoints[-1], bias),
        ranks=tuple(ranks),
        scales=tuple(config.scale_of(key) for config in configs),
        alphas=tuple(config.alpha_of(key) for config in configs),
    )
    for index, checkpoint in enumerate(checkpoints):
        for factor, infos, expected in (
            (module.a, module.a_infos, module.a_info(ranks[index])),
            (module.b, module.b_infos, module.b_info(ranks[index])),
        ):
            if infos[index] != expected:
                raise IncompatibleCheckpointsError(
                    f"the checkpoints differ: '{factor}' has shape {list(infos[index].shape)} in "
                    f"{checkpoint.label}, {list(infos[-1].shape)} in {checkpoints[-1].label} (only "
                    "ranks may differ)"
                )
    return module


def _check_shapes(checkpoint: Checkpoint, a: str, b: str, rank: int) -> None:
    a_info, b_info = _info(checkpoint, a), _info(checkpoint, b)
    if any(info.dtype.kind != "float" or len(info.shape) < 2 for info in (a_info, b_info)):
        raise CheckpointError(f"{checkpoint.label}: '{a}' and '{b}' are no factors of a matrix")
    if a_info.shape[0] != rank:
        raise CheckpointError(
            f"{checkpoint.label}: '{a}' has rank {a_info.shape[0]}, adapter_config.json says {rank}"
        )
    if b_info.shape[1] != rank or prod(b_info.shape[2:]) != 1:
        raise CheckpointError(
            f"{checkpoint.label}: '{b}' has shape {list(b_info.shape)}, which is no factor of rank "
            f"{rank} (grouped convolutions are not averaged: pass --adapter-factors, or merge the "
            "adapter into its base model with merge_and_unload and average that)"
        )


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    found = checkpoint.tensors.get(name)
    return checkpoint.tensors[checkpoint.aliases[name]] if found is None else found
