"""A torch file of the old format: five pickles, and behind them the bytes of all storages.

torch wrote it before 1.6, and still does with ``_use_new_zipfile_serialization=False``. The pickles
are a magic number, a protocol version, facts about the machine, the saved object, and the keys of
the storages. Each storage then states its number of elements, and its bytes follow.
"""

import struct
from collections.abc import Iterable
from typing import Any

from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.limits import MAX_PICKLE_BYTES
from ckptavg.checkpoint.pickle_values import Pairs, Storage
from ckptavg.checkpoint.pickles import FoundPickle, read_pickle_at
from ckptavg.errors import CheckpointError, IncompleteCheckpointError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = _MAGIC_NUMBER.to_bytes(10, "little")  # as every binary protocol pickles it
_PROTOCOL_VERSION = 1001
_FIRST_READ_BYTES = 512  # what told the format
_GROWTH = 8
_COUNT = struct.Struct("<q")


def is_legacy(head: bytes) -> bool:
    """Tell whether a file that begins with these bytes has the old format."""
    return head[:1] == b"\x80" and _MAGIC_BYTES in head[:32]


class TorchLegacy:
    """What ``torch.save`` wrote before torch 1.6.

    Attributes:
        root: The inert value that its pickle describes; see ``read_pickle``.
    """

    def __init__(self, file: ReadableFile) -> None:
        """Read the five pickles, and find where every storage lies.

        Raises:
            CheckpointError: If it is damaged, truncated, or needs code to be read.
        """
        self._file = file
        self._raw = b""
        self._end = 0
        if self._next_pickle().value != _MAGIC_NUMBER:
            raise self._refuse("does not begin with the magic number of torch files")
        version = self._next_pickle().value
        if version != _PROTOCOL_VERSION:
            raise self._refuse(f"is not of protocol version {_PROTOCOL_VERSION} of torch files")
        machine = self._next_pickle().value
        if type(machine) is not Pairs or machine.get("little_endian") is not True:
            raise self._refuse("was written on a big-endian machine")
        found = self._next_pickle()
        self.root: Any = found.value
        self._storages = self._place_storages(self._next_pickle().value, found)
        self._raw = b""
        self._counted: set[str] = set()

    def prefetch(self, storages: Iterable[Storage]) -> None:
        """Have the element counts read at once of storages that will be located."""
        keys = {storage.key for storage in storages}
        self._file.prefetch(
            [
                (self._storages[key][0] - _COUNT.size, _COUNT.size)
                for key in keys
                if key in self._storages
            ]
        )

    def nbytes_of(self, key: str) -> int | None:
        """Return the bytes of a storage; None if it is not there."""
        return self._storages[key][1].nbytes if key in self._storages else None

    def locate(self, key: str, name: str) -> int:
        """Return where the bytes of a storage, which is there, begin in the file.

        Args:
            key: Which one.
            name: The tensor that needs it, for messages.

        Raises:
            CheckpointError: If it has another number of elements than its pickle says.
        """
        start, stored = self._storages[key]
        if key not in self._counted:
            (count,) = _COUNT.unpack(self._file.read(start - _COUNT.size, _COUNT.size))
            if count != stored.numel:
                raise self._refuse(
                    f"the storage of tensor '{name}' has {count} elements, expected {stored.numel}"
                )
            self._counted.add(key)
        return start

    def _next_pickle(self) -> FoundPickle:
        """Read the next pickle; nothing states its length, so the file's beginning is read on."""
        limit = min(self._file.size, MAX_PICKLE_BYTES)
        while True:
            if self._raw:
                found = read_pickle_at(self._raw, self._end, self._file.label)
                if found is not None:
                    self._end = found.end
                    return found
            known = len(self._raw)
            if known == self._file.size:
                raise self._cut_short(
                    f"has {known} bytes, which end inside its pickles: the torch file is truncated"
                )
            if known == limit:
                raise self._refuse(f"its pickles have more than the {limit} bytes that are allowed")
            wanted = min(max(_FIRST_READ_BYTES, known * _GROWTH), limit)
            self._raw += self._file.read(known, wanted - known)

    def _place_storages(self, keys: Any, found: FoundPickle) -> dict[str, tuple[int, Storage]]:
        """Return where the bytes of each storage begin, by key.

        Raises:
            CheckpointError: If they do not fill the rest of the file exactly.
        """
        if type(keys) is not list or not all(type(key) is str for key in keys):
            raise self._refuse("has a damaged list of storages")
        placed: dict[str, tuple[int, Storage]] = {}
        position = self._end
        for key in keys:
            storage = found.storages.get(key)
            if storage is None or key in placed:
                raise self._refuse(f"lists a storage '{key}' that its pickle does not mention once")
            if type(storage) is not Storage:
                raise self._refuse("holds quantised tensors; average the full-precision weights")
            position += _COUNT.size
            placed[key] = position, storage
            position += storage.nbytes
        if position > self._file.size:
            raise self._cut_short(
                f"has {self._file.size} bytes, expected {position}: the torch file is truncated"
            )
        if position < self._file.size:
            raise self._refuse(
                f"has {self._file.size} bytes, expected {position}: it has bytes left over"
            )
        return placed

    def _cut_short(self, what: str) -> CheckpointError:
        return IncompleteCheckpointError(f"{self._file.label}: {what}")

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file.label}: {what}")
