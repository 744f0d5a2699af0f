"""Files and folders in memory that the readers take for real ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptavg.errors import CheckpointError
from ckptavg.tensors import FileStamp, HubRevision


class MemoryFile:
    """A ``ReadableFile`` over bytes; what reaches past their end is the error that files give."""

    def __init__(self, content: bytes, label: str) -> None:
        self.path = label
        self.label = label
        self.size = len(content)
        self.stamp = FileStamp(label, 0, 0, len(content), 0)
        self._content = content

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return a range, all of which must be there."""
        if not 0 <= offset <= offset + nbytes <= self.size:
            raise CheckpointError(
                f"{self.label}: ends at byte {self.size}: it changed while being read"
            )
        return self._content[offset : offset + nbytes]

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Nothing."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other."""
        for buffer in buffers:
            buffer[:] = self.read(offset, len(buffer))
            offset += len(buffer)

    def check_unchanged(self) -> None:
        """Nothing: bytes do not change."""

    def verify(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class MemoryFolder:
    """A ``Folder`` over a mapping of names to bytes."""

    hub: HubRevision | None = None

    def __init__(self, contents: Mapping[str, bytes], label: str) -> None:
        self.label = label
        self._contents = contents

    def names(self) -> Sequence[str]:
        """Return the names in order."""
        return sorted(self._contents)

    def has(self, name: str) -> bool:
        """Tell whether a name is there."""
        return name in self._contents

    def is_folder(self, name: str) -> bool:
        """Tell that it holds no folders."""
        return False

    def leads_nowhere(self, name: str) -> bool:
        """Tell whether a name is missing; there are no links."""
        return name not in self._contents

    def size(self, name: str) -> int:
        """Return the bytes of a file; 0 for what is none."""
        return len(self._contents.get(name, b""))

    def inside(self, name: str) -> "MemoryFolder":
        """Return an empty folder."""
        return MemoryFolder({}, f"{self.label}/{name}")

    def open(self, name: str, label: str) -> MemoryFile:
        """Open a file in it."""
        if name not in self._contents:
            raise CheckpointError(f"{label}: cannot be opened: no such file or directory")
        return MemoryFile(self._contents[name], label)

    def state(self) -> object:
        """Nothing changes."""
        return None

    def local_directory(self) -> Path:
        """Refuse: nothing in memory has a path."""
        raise CheckpointError(f"{self.label}: lies in memory")

    def close(self) -> None:
        """Nothing."""
