"""A torch file of today's format: a zip of stored members whose pickle says what they are."""

from collections.abc import Iterable
from typing import Any
from zlib import crc32

from ckptavg.checkpoint.files import ReadableFile
from ckptavg.checkpoint.limits import MAX_PICKLE_BYTES
from ckptavg.checkpoint.pickle_values import Storage
from ckptavg.checkpoint.pickles import read_pickle
from ckptavg.checkpoint.zip_directory import Member, ZipDirectory
from ckptavg.errors import CheckpointError

_MAX_VERSION = 10  # what torch reads


class TorchZip:
    """What ``torch.save`` writes since torch 1.6.

    Attributes:
        root: The inert value that its pickle describes; see ``read_pickle``.
    """

    def __init__(self, file: ReadableFile) -> None:
        """Read the archive's directory and its pickle.

        Raises:
            CheckpointError: If it is damaged, a program, or needs code to be read.
        """
        self._file = file
        self._directory = ZipDirectory(file)
        self._data_offsets: dict[str, int] = {}
        members = self._directory.members
        if self._directory.start:
            raise self._refuse("has bytes before the first member of its zip archive")
        pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise self._refuse(
                "is a zip file, but not one that torch.save wrote: it has no data.pkl"
            )
        self._top = pickles[0].removesuffix("data.pkl")
        if f"{self._top}constants.pkl" in members or any(
            name.startswith(f"{self._top}code/") for name in members
        ):
            raise self._refuse(
                "is a TorchScript archive, which is a program; save its state_dict() "
                "with torch.save and average that"
            )
        outside = next((name for name in members if not name.startswith(self._top)), None)
        if outside is not None:
            raise self._refuse(f"its zip archive holds '{outside}' outside {self._top}")
        version = members.get(f"{self._top}version")
        told = b"" if version is None else self._read(version, 64).strip()
        if not (told.isdigit() and 1 <= int(told) <= _MAX_VERSION):
            raise self._refuse("tells no version of torch files that is known")
        byteorder = members.get(f"{self._top}byteorder")
        if byteorder is not None and self._read(byteorder, 64) != b"little":
            raise self._refuse("was written on a big-endian machine")
        self.root: Any = read_pickle(self._read(members[pickles[0]], MAX_PICKLE_BYTES), file.label)

    def prefetch(self, storages: Iterable[Storage]) -> None:
        """Have the headers read at once of storages that will be located."""
        keys = {storage.key for storage in storages}
        members = (self._directory.members.get(f"{self._top}data/{key}") for key in keys)
        self._directory.prefetch_headers(member for member in members if member is not None)

    def nbytes_of(self, key: str) -> int | None:
        """Return the bytes of a storage; None if it is not there."""
        member = self._directory.members.get(f"{self._top}data/{key}")
        return None if member is None else member.nbytes

    def locate(self, key: str, name: str) -> int:
        """Return where the bytes of a storage, which is there, begin in the file.

        Raises:
            CheckpointError: If its header is damaged.
        """
        if key not in self._data_offsets:
            member = self._directory.members[f"{self._top}data/{key}"]
            self._data_offsets[key] = self._directory.data_offset(member)
        return self._data_offsets[key]

    def _read(self, member: Member, max_bytes: int) -> bytes:
        if member.nbytes > max_bytes:
            raise self._refuse(
                f"its {member.name} has {member.nbytes} bytes, at most {max_bytes} are allowed"
            )
        raw = self._file.read(self._directory.data_offset(member), member.nbytes)
        # 0 in the directory: torch was told not to compute it
        if member.crc32 and crc32(raw) != member.crc32:
            raise self._refuse(f"its {member.name} is damaged (CRC-32 differs)")
        return raw

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file.label}: {what}")
