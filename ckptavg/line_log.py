"""JSON objects in a file, one a line, that outlive an interruption."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptavg.directories import open_descriptor


class LineLog:
    """A log; each entry is on the storage before ``add`` returns.

    What follows a line that is not whole is cut off when the log is opened again.

    Attributes:
        entries: What it holds.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            OSError: If it cannot be read.
        """
        self.entries: list[dict[str, Any]] = []
        self._path = path
        if not path.exists():
            return
        content, good = path.read_bytes(), 0
        for line in content.split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict):
                break
            self.entries.append(entry)
            good += len(line) + 1
        if good < len(content):
            os.truncate(path, good)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry.

        Raises:
            OSError: If the storage refuses.
        """
        line = memoryview(f"{json.dumps(entry)}\n".encode())
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = open_descriptor(self._path, flags, 0o666)
        try:
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.entries.append(dict(entry))
