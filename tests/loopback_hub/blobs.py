"""Large files: kept on disk under their sha256, never in memory as a whole."""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from loopback_hub.messages import PIECE_NBYTES


class BlobStore:
    """A directory of files named by their sha256, and of parts of files to come."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._parts = root / "parts"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._parts.mkdir(exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Return where a blob is, or would be."""
        return self._blobs / sha256

    def has(self, sha256: str) -> bool:
        """Return whether a blob is there."""
        return self.path(sha256).is_file()

    def add_file(self, source: Path) -> str:
        """Take in a file: by a hard link, so it must not be written to later; return its sha256."""
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with self._incoming() as path:
            try:
                os.link(source.resolve(), path)
            except OSError:  # another file system
                shutil.copyfile(source, path)
            path.replace(self.path(sha256))
        return sha256

    def add_pieces(self, pieces: Iterable[bytes], expected_sha256: str | None = None) -> str | None:
        """Take in bytes; return their sha256, or None if it is not the expected one."""
        digest = hashlib.sha256()
        with self._incoming() as path:
            with path.open("wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
            sha256 = digest.hexdigest()
            if expected_sha256 not in (None, sha256):
                return None
            path.replace(self.path(sha256))
        return sha256

    def add_part(self, sha256: str, number: int, pieces: Iterable[bytes]) -> str:
        """Take in one part of a blob to come; return its ETag."""
        digest = hashlib.md5(usedforsecurity=False)
        with self._incoming() as path:
            with path.open("wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
            path.replace(self._part_path(sha256, number, digest.hexdigest()))
        return digest.hexdigest()

    def join_parts(self, sha256: str, etags: list[str]) -> bool:
        """Make a blob of its parts, and return whether all were there and right."""
        paths = [
            self._part_path(sha256, number, etag) for number, etag in enumerate(etags, start=1)
        ]
        if not all(path.is_file() for path in paths):
            return False
        is_right = self.add_pieces(_read_in_turn(paths), sha256) is not None
        for path in paths:
            path.unlink()
        return is_right

    def _part_path(self, sha256: str, number: int, etag: str) -> Path:
        return self._parts / f"{sha256}-{number}-{etag}"

    @contextlib.contextmanager
    def _incoming(self) -> Iterator[Path]:
        path = self._parts / f"incoming-{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def _read_in_turn(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(PIECE_NBYTES):
                yield piece
