"""How the Hub's own writers split a model into files."""

from collections.abc import Mapping


def split_into_shards(
    nbytes_by_name: Mapping[str, int], max_shard_bytes: int
) -> dict[str, list[str]]:
    """Return file name -> tensor names, as the Hub's own writers split a model.

    Args:
        nbytes_by_name: Size of every tensor, in the order they are to be stored.
        max_shard_bytes: Upper bound for a shard; a larger tensor gets a shard of its own.
    """
    # imported here: a model that fits one file never needs it
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(nbytes_by_name),
        get_storage_size=lambda nbytes: nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    return {name: list(tensors) for name, tensors in split.filename_to_tensors.items()}
