"""Xet storage on disk: the real ``hf_xet`` stores and fetches, this finds out what it stored."""

import importlib
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from loopback_hub.messages import Response, json_response

NEVER = 2**33  # seconds since 1970
CONTENT = "xet/xorbs"
DATABASE = "global_dedup_lookup.redb"
HEADER_NBYTES = 48
END_OF_FILES = b"\xff" * 32
HAS_VERIFICATION = 0x80000000
HAS_METADATA = 0x40000000


class XetStore:
    """A content-addressable store that ``hf_xet`` reaches under ``local://<directory>``.

    A process that has opened such a directory locks its database, as a rule until it ends: there
    can be one client at a time, and files cannot be added while it runs.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._directory = self._root / "cas"
        self._lock = threading.Lock()  # nor can one process open the database twice

    @property
    def cas_url(self) -> str:
        """Return the address that clients are given."""
        return f"local://{self._directory}"

    def token_response(self) -> Response:
        """Tell a client where the store is; different clients read the body or the headers."""
        values = {"accessToken": "xet", "exp": NEVER, "casUrl": self.cas_url}
        headers = {
            "X-Xet-Cas-Url": self.cas_url,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(NEVER),
        }
        return json_response(values, headers)

    def add(self, path: Path, sha256: str) -> str:
        """Store a file and return its Xet hash."""
        with self._lock:
            session = self._new_session()
            with session.new_upload_commit(**_credentials(self._directory)) as commit:
                upload = commit.start_upload_file(str(path), sha256=sha256)
            xet_hash: str = upload.result().xet_info.hash
        return xet_hash

    def fetch(self, sha256: str, n_bytes: int, target: Path) -> str | None:
        """Copy out what a client stored; return its Xet hash, or None if it is not there."""
        for shard in sorted((self._directory / CONTENT / "shards").glob("*.mdb")):
            for xet_hash, file_sha256, file_nbytes in _files_in_shard(shard.read_bytes()):
                if (file_sha256, file_nbytes) == (sha256, n_bytes):
                    if not target.exists():
                        self._download(xet_hash, n_bytes, target)
                    return xet_hash
        return None

    def _download(self, xet_hash: str, n_bytes: int, target: Path) -> None:
        """Read past the lock of the client, which is waiting for the answer to its commit."""
        with self._lock, tempfile.TemporaryDirectory(dir=self._root) as name:
            view = Path(name) / CONTENT
            view.mkdir(parents=True)
            for directory in ("xorbs", "shards"):
                (view / directory).symlink_to(self._directory / CONTENT / directory)
            shutil.copyfile(self._directory / CONTENT / DATABASE, view / DATABASE)
            session = self._new_session()
            info = _hf_xet().XetFileInfo(xet_hash, n_bytes)
            with session.new_file_download_group(**_credentials(Path(name))) as group:
                group.start_download_file(info, str(target.resolve()))

    def _new_session(self) -> Any:
        # it reads once where to log to, and otherwise logs into the home directory
        with mock.patch.dict(os.environ, {"HF_XET_LOG_DEST": f"{self._root / 'xet-logs'}/"}):
            return _hf_xet().XetSession()


def _hf_xet() -> Any:
    return importlib.import_module("hf_xet")  # optional, and it has no type hints


def _credentials(directory: Path) -> dict[str, Any]:
    return {
        "endpoint": f"local://{directory}",
        "token": "xet",
        "token_expiry_unix_secs": NEVER,
    }


def _files_in_shard(shard: bytes) -> Iterator[tuple[str, str | None, int]]:
    """Yield the Xet hash, the sha256 and the size of each file that a shard describes.

    Each file is a header, as many 48-byte segments as the header says, as many verification
    entries if the flags say so, and 48 bytes with the sha256 if the flags say so.
    """
    position = HEADER_NBYTES
    while shard[position : position + 32] != END_OF_FILES:
        xet_hash = _hash_text(shard[position : position + 32])
        flags, n_segments = struct.unpack_from("<II", shard, position + 32)
        position += HEADER_NBYTES
        n_bytes = 0
        for index in range(n_segments):
            (length,) = struct.unpack_from("<I", shard, position + 48 * index + 36)
            n_bytes += length
        position += 48 * n_segments
        if flags & HAS_VERIFICATION:
            position += 48 * n_segments
        sha256 = None
        if flags & HAS_METADATA:
            sha256 = _hash_text(shard[position : position + 32])
            position += 48
        yield xet_hash, sha256, n_bytes


def _hash_text(digest: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
