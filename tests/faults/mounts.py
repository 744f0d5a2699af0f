"""File systems of a test's own: small, read-only, or on an image whose power can be cut.

What this machine cannot do shows when it is tried: ``MissingError`` says what a test needs then.
"""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from faults.runs import Runner
from faults.scenarios import Kind, Scenario

_FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
_NO_LOG_FLUSH = 2
_FORMATTING = {"ext4": ("-F", "-m", "0"), "xfs": ("-f",)}  # on a file; no room kept for root
_IMAGE_BYTES = {"ext4": 128 * 2**20, "xfs": 300 * 2**20}  # mkfs.xfs makes no smaller one
_BUSY_SECONDS = 5.0
_PAUSE_SECONDS = 0.01


class MissingError(Exception):
    """This machine lacks what a test needs; the message says what."""


@dataclass(frozen=True)
class Mount:
    """A file system that is mounted.

    Attributes:
        root: Where.
    """

    root: Path

    def remount(self, *options: str) -> None:
        """Change how it is mounted, such as its size, or whether it can be written."""
        _command("mount", "-o", ",".join(("remount", *options)), str(self.root))

    def free_bytes(self) -> int:
        """Return what files may still take."""
        return shutil.disk_usage(self.root).free

    def n_inodes(self) -> int:
        """Return how many files and directories there are; some file systems do not tell."""
        status = os.statvfs(self.root)
        return status.f_files - status.f_ffree

    def fill(self, left_bytes: int) -> None:
        """Take all room but so much, as another process may at any moment."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT, 0o666)
        position, step = 0, self.free_bytes()
        try:
            while (step := min(step, self.free_bytes() - left_bytes)) > 0:
                try:
                    os.posix_fallocate(descriptor, position, step)
                    position += step
                except OSError:  # what describes the file takes room, too
                    step //= 2
        finally:
            os.close(descriptor)

    def empty(self) -> None:
        """Give the room back that ``fill`` took."""
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.root / "filler"


@contextlib.contextmanager
def tmpfs(place: Path, *options: str) -> Iterator[Mount]:
    """Mount a file system in memory, such as with ``size=1m``, ``nr_inodes=3``, ``ro``.

    Raises:
        MissingError: If this machine cannot.
    """
    with _mounted(place, "-t", "tmpfs", "-o", ",".join(("mode=755", *options)), "tmpfs"):
        yield Mount(place)


@dataclass(frozen=True)
class Disk(Mount):
    """A file system on an image: what is in there is what its storage holds.

    Attributes:
        image: The file that is its storage.
    """

    image: Path

    def sync(self) -> None:
        """Bring everything to the storage."""
        _command("sync", "-f", str(self.root))

    def commit(self) -> None:
        """Bring one file to the storage, as another process does: its journal goes with it."""
        path = self.root / "unrelated"
        path.write_bytes(b"something else\n")
        self.sync_file(path)

    def sync_file(self, path: Path) -> None:
        """Bring one file to the storage, as the system may at any moment."""
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def cut_power(self) -> None:
        """Lose what is not on the storage, then mount again what is."""
        shut_down(self.root)
        _unmount(self.root)
        _command("mount", "-o", "loop", str(self.image), str(self.root))


@contextlib.contextmanager
def disk(place: Path, file_system: str) -> Iterator[Disk]:
    """Mount a file system on an image beside the place, which takes the room of what is written.

    Args:
        place: Where.
        file_system: ``ext4`` or ``xfs``.

    Raises:
        MissingError: If this machine cannot.
    """
    image = place.with_name(f"{place.name}.{file_system}")
    try:
        with image.open("wb") as file:
            file.truncate(_IMAGE_BYTES[file_system])
        _attempt(f"mkfs.{file_system}", "-q", *_FORMATTING[file_system], str(image))
        with _mounted(place, "-t", file_system, "-o", "loop", str(image)):
            yield Disk(place, image)
    finally:
        image.unlink(missing_ok=True)


def shut_down(root: Path) -> None:
    """Stop a file system at once; what its journal has not on the storage is lost.

    Raises:
        MissingError: If this one has no such call.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
    except OSError as error:
        raise MissingError(f"needs to shut a file system down: {error.strerror}") from error
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Make a directory, or a file, one that even root cannot change.

    Raises:
        MissingError: If its file system, or this process, cannot.
    """
    _attempt("chattr", "+i", str(path))
    try:
        yield
    finally:
        _command("chattr", "-i", str(path))


MountT = TypeVar("MountT", bound=Mount)


class Places(Generic[MountT]):
    """For each runner a file system, with a scenario of each kind that is tried on it."""

    def __init__(
        self,
        stack: ExitStack,
        directory: Path,
        mount: Callable[[Path], AbstractContextManager[MountT]],
    ) -> None:
        """Mount nothing yet.

        Args:
            stack: What unmounts them.
            directory: Where they will be.
            mount: Mounts one.
        """
        self._stack = stack
        self._directory = directory
        self._mount = mount
        self._mounts: dict[Runner, MountT] = {}
        self._scenarios: dict[tuple[Runner, str], Scenario] = {}

    def mount(self, runner: Runner) -> MountT:
        """Return a runner's file system."""
        if runner not in self._mounts:
            place = self._directory / f"mount-{len(self._mounts)}"
            self._mounts[runner] = self._stack.enter_context(self._mount(place))
        return self._mounts[runner]

    def scenario(self, kind: Kind, runner: Runner) -> Scenario:
        """Return a runner's scenario of a kind, on its file system."""
        key = runner, kind.name
        if key not in self._scenarios:
            directory = self.mount(runner).root / kind.name.replace(" ", "-")
            self._scenarios[key] = Scenario(kind, directory, runner)
        return self._scenarios[key]


@contextlib.contextmanager
def _mounted(place: Path, *arguments: str) -> Iterator[None]:
    place.mkdir()
    try:
        _attempt("mount", *arguments, str(place))
        try:
            yield
        finally:
            if _is_mounted(place):
                _leave(place)
    finally:
        place.rmdir()


def _is_mounted(place: Path) -> bool:
    """Tell whether something is mounted there; ``os.path.ismount`` does not see broken ones."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(place) for line in lines)


def _leave(place: Path) -> None:
    """Unmount, and detach the image, as soon as nothing is busy in it, whatever happened."""
    try:
        _unmount(place)
    except RuntimeError:
        _command("umount", "--lazy", str(place))
        raise


def _unmount(place: Path) -> None:
    """Unmount, and detach the image.

    A process that another thread has just started may have it open until it becomes a program.
    """
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            _command("umount", str(place))
        except RuntimeError:
            if time.monotonic() > end:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def _attempt(*command: str) -> None:
    """Run what a machine may not be able to do."""
    if shutil.which(command[0]) is None:
        raise MissingError(f"needs {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tried = " ".join(one for one in command[:3] if not one.startswith("/"))
        reason = done.stderr.partition("\n")[0].rpartition(": ")[2].rstrip(".")
        raise MissingError(f"needs {tried} to work: {reason.partition(' while ')[0]}")


def _command(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
