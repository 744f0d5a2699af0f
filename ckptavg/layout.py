"""Where tensors lie in the files of an output."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ckptavg.blocks import Action, TensorPlan
from ckptavg.hub import split_into_shards
from ckptavg.tensors import DType, TensorInfo

SAFETENSORS_NAME, TORCH_NAME = "model.safetensors", "model.pt"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file: its name, the bytes of its data, its tensors in the order of the data."""

    filename: str
    nbytes: int
    tensor_names: tuple[str, ...]


def split_by_size(
    infos: Mapping[str, TensorInfo], output_dtypes: Mapping[str, DType], max_shard_bytes: int
) -> dict[str, list[str]]:
    """Return file name -> tensor names, so that no safetensors file is larger than allowed."""
    sizes = {name: info.numel * output_dtypes[name].itemsize for name, info in infos.items()}
    if sum(sizes.values()) <= max_shard_bytes:
        return {SAFETENSORS_NAME: list(sizes)}
    return split_into_shards(sizes, max_shard_bytes)


def lay_out(
    infos: Mapping[str, TensorInfo],
    output_dtypes: Mapping[str, DType],
    owners: Mapping[str, str],
    names_by_file: Mapping[str, list[str]],
    shared: Mapping[str, str],
    derived: Collection[str],
) -> tuple[tuple[TensorPlan, ...], tuple[ShardPlan, ...]]:
    """Place every tensor: widest dtype first, so that each lies aligned to its own element size.

    ``shared`` are the tied names that lie where their owners do.
    """
    tensors, shards = [], []
    for shard, (filename, names) in enumerate(sorted(names_by_file.items())):
        names = sorted(names, key=lambda name: -output_dtypes[name].itemsize)
        offset, offsets = 0, dict[str, int]()
        for name in names:
            if name not in shared:
                offsets[name] = offset
                offset += infos[name].numel * output_dtypes[name].itemsize
        for name in names:
            kind = infos[name].dtype.kind
            action = Action.AVERAGE if kind in ("float", "complex") else Action.TAKE
            owner = owners.get(name)
            if name in derived:  # under each of its names
                action, owner = Action.DERIVE, None
            elif owner is not None:
                action = Action.ALIAS
            tensors.append(
                TensorPlan(
                    name=name,
                    info=infos[name],
                    output_dtype=output_dtypes[name],
                    action=action,
                    owner=owner,
                    shard=shard,
                    offset=offsets[shared.get(name, name)],
                )
            )
        shards.append(ShardPlan(filename, offset, tuple(names)))
    return tuple(tensors), tuple(shards)
