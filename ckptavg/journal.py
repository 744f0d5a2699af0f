"""What of a run is done, kept beside its output, so that an interrupted run can go on.

One JSON object a line. ``{"boot": ...}`` begins what one process noted: the boot of the operating
system it ran under. ``{"block": 3}`` says that a block is written, as far as the operating system
is concerned; ``{"synced": 12}`` that the first 12 blocks noted here are on the storage. After a
process was killed all blocks are good; after the machine failed, only those that were synced. A
last line that was cut off is passed over.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from ckptavg.blocks import Differing
from ckptavg.directories import entries, open_descriptor

JOURNAL_PREFIX = ".ckptavg-journal-"
EVALUATIONS_NAME = ".ckptavg-evaluations.jsonl"  # see evaluation_log.py


class Journal:
    """Notes finished blocks; one file a process, written from any thread."""

    def __init__(self, directory: Path, rank: int) -> None:
        """Begin a journal in a directory, in place of what the same rank left there.

        Raises:
            OSError: If it cannot be written.
        """
        self.blocks: dict[int, Differing] = {}
        self._lock = Lock()
        path = directory / f"{JOURNAL_PREFIX}{rank}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        self._descriptor = open_descriptor(path, flags, 0o666)
        self._note({"boot": _boot_id()})

    def record(self, block: int, differing: Differing) -> None:
        """Note that a block is written."""
        entry: dict[str, object] = {"block": block}
        if differing:
            entry["differing"] = sorted(differing)
        with self._lock:
            self.blocks[block] = differing
            self._note(entry)

    def sync(self, descriptors: Iterable[int]) -> None:
        """Bring what is noted so far, and the files it speaks of, to the storage."""
        n_blocks = len(self.blocks)
        for descriptor in descriptors:
            os.fdatasync(descriptor)
        with self._lock:
            self._note({"synced": n_blocks})
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _note(self, entry: dict[str, object]) -> None:
        os.write(self._descriptor, f"{json.dumps(entry)}\n".encode())  # one call: never mixed up


def read_journals(directory: Path) -> dict[int, Differing]:
    """Return the blocks that all journals in a directory vouch for, with what differed in them.

    Raises:
        OSError: If it cannot be listed.
    """
    done: dict[int, Differing] = {}
    for path in _journals(directory):
        done.update(_read(path))
    return done


def remove_journals(directory: Path) -> None:
    """Remove all journals: what they speak of is no longer so, or no longer of interest.

    Raises:
        OSError: If one cannot be found or removed.
    """
    for path in _journals(directory):
        path.unlink(missing_ok=True)


def has_journal(directory: Path) -> bool:
    """Tell whether a run has worked in a directory."""
    return bool(_journals(directory))


def _journals(directory: Path) -> list[Path]:
    try:
        return entries(directory, JOURNAL_PREFIX)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: Path) -> dict[int, Differing]:
    blocks: list[tuple[int, Differing]] = []
    n_synced, same_boot = 0, False
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
            if "boot" in entry:
                same_boot = entry["boot"] is not None and entry["boot"] == _boot_id()
            elif "synced" in entry:
                n_synced = int(entry["synced"])
            else:
                differing = {(int(row), str(name)) for row, name in entry.get("differing", ())}
                blocks.append((int(entry["block"]), differing))
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ):  # damaged: believe nothing from here on
            break
    return dict(blocks if same_boot else blocks[:n_synced])


def _boot_id() -> str | None:
    """Return what identifies this boot of the operating system; None where it does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
