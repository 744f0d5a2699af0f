"""Bad inputs, byte by byte from the rules of their formats, each with what must be said of it."""

from collections.abc import Sequence
from importlib import import_module

from faults.case import Case

_MODULES = (
    "safetensors_files",
    "shard_sets",
    "checkpoint_sets",
    "file_names",
    "torch_files",
    "pickled_code",
    "costly_files",
    "distributed",
    "numpy_files",
)


def all_cases() -> Sequence[Case]:
    """Return every case there is; their names differ."""
    found = [case for name in _MODULES for case in import_module(f"faults.corpus.{name}").cases()]
    names = [case.name for case in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"several cases are named {sorted(twice)}")
    return found
