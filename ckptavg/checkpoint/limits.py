"""How much of a file that anyone may have written is looked at before it is refused.

Each bound lies well above what real models need, and low enough that refusing a file takes less
than a second and less than 100 MB (``tests/faults/corpus/costly_files.py`` tries that).
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

MAX_TENSORS = 65_536  # in one file; models of a trillion parameters have twice that in 60 shards
MAX_HEADER_BYTES = 12_000_000  # of that many tensors with names of 80 characters
MAX_NAME_CHARACTERS = 4096
MAX_DIMENSIONS = 64
MAX_SHARDS = 10_000
MAX_JSON_BYTES = 24_000_000
MAX_JSON_NESTING = 100
MAX_PICKLE_BYTES = 32 * 2**20
MAX_PICKLE_OPERATIONS = 2_600_000  # a tensor takes 35
MAX_PICKLE_VALUES = 1_100_000  # texts, numbers and containers; a tensor takes 16
MAX_ZIP_DIRECTORY_BYTES = 16_000_000
MAX_ZIP_MEMBERS = 100_000
MAX_ARRAYS = 20_000

# the description of a distributed checkpoint grows with the number of processes that wrote it
MAX_DCP_METADATA_BYTES = 256 * 2**20
MAX_DCP_OPERATIONS = 10_000_000


class JsonBounds(NamedTuple):
    """How often characters may stand in a JSON text: they are what makes values."""

    objects: int
    lists: int
    names: int
    commas: int


HEADER_BOUNDS = JsonBounds(  # with room for texts in its metadata that are JSON themselves
    MAX_TENSORS + 20_000, 2 * MAX_TENSORS + 20_000, 4 * MAX_TENSORS + 200_000, 10 * MAX_TENSORS
)
INDEX_BOUNDS = JsonBounds(1000, 1000, 300_000, 300_000)
SIDE_FILE_BOUNDS = JsonBounds(150_000, 300_000, 1_000_000, 1_500_000)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Let many small values be made at once, none of which is garbage: twice as fast."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
