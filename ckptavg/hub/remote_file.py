"""One file on the Hub at one commit, read by ranges and never stored.

Its address is asked for once; ranges then come from where the Hub keeps the content, without the
token, until that address expires. A server that ignores a range, or sends other bytes than asked
for, is refused: nothing is taken on trust but what the content's hash confirms at the end.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event, Lock
from typing import TYPE_CHECKING, Any
from zlib import crc32

from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url

from ckptavg.errors import CheckpointError, HubError
from ckptavg.hub.references import SCHEME, reference_text
from ckptavg.hub.threads import in_parallel
from ckptavg.hub.transport import (
    Attempts,
    address_timeout,
    answering,
    endpoint,
    headers,
    refuse_failure,
    request_timeout,
    traffic,
    tried,
)
from ckptavg.tensors import FileStamp, HubRevision

if TYPE_CHECKING:
    from ckptavg.hub.catalog import Entry
    from ckptavg.hub.read_ahead import ReadAhead

_FIRST_READ_BYTES = 8 * 1024  # the header of most shards
_MERGED_GAP_BYTES = 16 * 1024  # cheaper to read than another request
_EXPIRED_STATUS = frozenset({401, 403, 404, 410})
_MAX_EXPIRED = 2
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class _Location:
    address: str
    is_hub: bool  # the Hub itself holds the content, and wants to know who asks


class HubFile:
    """A file on the Hub, read by position from any number of threads."""

    def __init__(
        self, found: HubRevision, path: str, entry: "Entry", label: str, read_ahead: "ReadAhead"
    ) -> None:
        """Take note of a file; nothing is asked of the Hub before it is read.

        Args:
            found: The repository and the commit.
            path: The file in the repository.
            entry: What the Hub tells of it.
            label: What messages call it.
            read_ahead: Where its data will come through.
        """
        self.path = SCHEME + reference_text(found.repo, found.commit, path)
        self.label = label
        self.size = entry.size
        self.stamp = FileStamp(self.path, 0, 0, entry.size, 0, entry.digest)
        self.hash_lock = Lock()
        self.n_hashed_bytes = 0
        self._hash = content_hash(entry)
        self._digest = entry.digest
        self._address = hf_hub_url(found.repo, path, revision=found.commit, endpoint=endpoint())
        self._commit = found.commit
        self._read_ahead = read_ahead
        self._location: _Location | None = None
        self._location_lock = Lock()
        self._checksums: dict[int, int] = {}  # of segments, by where they begin
        self._starts: list[int] = []  # what was read before the data, in order
        self._seen: list[bytes] = []

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes from ``offset`` on; meant for headers, which are kept.

        Raises:
            CheckpointError: If the file ends early.
            HubError: If the Hub cannot be reached.
        """
        if offset + nbytes > self.size:
            raise CheckpointError(f"{self.label}: ends at byte {self.size}, before byte "
                                  f"{offset + nbytes}")  # fmt: skip
        if nbytes == self.size and not self.n_hashed_bytes:  # a side file, whole
            content = self._keep(0, nbytes)
            self.add_to_hash(memoryview(content))
            return content
        end = offset + nbytes
        for start, seen in zip(self._starts, self._seen, strict=True):
            if start <= offset and end <= start + len(seen):
                return seen[offset - start : end - start]
        if offset == 0:  # more will be wanted
            return self._keep(0, min(self.size, max(nbytes, _FIRST_READ_BYTES)))[:nbytes]
        if offset < self._head_bytes < end:  # a header that is longer than what was read first
            self._seen[0] += self._fetched(self._head_bytes, end - self._head_bytes)
            return self._seen[0][offset:end]
        return self._keep(offset, nbytes)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Read small ranges (offset, bytes) at once that will be asked for one by one."""
        merged: list[list[int]] = []
        for offset, nbytes in sorted(ranges):
            start = max(offset, self._head_bytes)  # the head is there
            end = min(offset + nbytes, self.size)
            if merged and start <= merged[-1][1] + _MERGED_GAP_BYTES:
                merged[-1][1] = max(merged[-1][1], end)
            elif start < end:
                merged.append([start, end])
        wanted = [(start, end - start) for start, end in merged]
        contents = in_parallel(
            lambda one: self._fetched(*one), wanted, self._read_ahead.connections
        )
        for (start, _), content in zip(wanted, contents, strict=True):
            self._insert(start, content)

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from ``offset`` on.

        Raises:
            CheckpointError: If the file ends early, or the Hub sends something else.
            HubError: If the Hub cannot be reached.
        """
        for buffer in buffers:
            if offset + buffer.nbytes > self.size:
                raise CheckpointError(f"{self.label}: ends at byte {self.size}")
            self._read_ahead.read_into(self, offset, buffer)
            offset += buffer.nbytes

    def check_unchanged(self) -> None:
        """Nothing: what a commit holds never changes; ``verify`` looks at what arrived."""

    def verify(self) -> None:
        """Compare the content's hash with what the Hub tells, reading what was not read yet.

        Raises:
            CheckpointError: If they differ.
            HubError: If the Hub cannot be reached.
        """
        if self._hash is None:
            return
        self._read_ahead.finish(self)
        kind, _, expected = self._digest.partition(":")
        found = self._hash.hexdigest()
        if found != expected:
            raise CheckpointError(
                f"{self.label}: what arrived has {kind} {found}, the Hub says {expected}: the "
                "transfer went wrong, try again; nothing was published"
            )

    def close(self) -> None:
        """Forget what was read ahead."""
        self._read_ahead.forget(self)

    # -- for what reads ahead

    def add_to_hash(self, content: memoryview) -> None:
        """Note the next bytes of the content, in order; called with ``hash_lock`` held."""
        if self._hash is not None:
            self._hash.update(content)
        self.n_hashed_bytes += len(content)

    def n_seen_bytes(self, offset: int, nbytes: int) -> int:
        """Return how many bytes of a range were read before the data."""
        return sum(
            max(min(start + len(seen), offset + nbytes) - max(start, offset), 0)
            for start, seen in zip(self._starts, self._seen, strict=True)
        )

    def check_seen(self, offset: int, content: memoryview) -> None:
        """Compare what arrives with what was read of it before, such as the header.

        Raises:
            CheckpointError: If it differs: the hash would not tell which of the two was wrong.
        """
        end = offset + len(content)
        for start, seen in zip(self._starts, self._seen, strict=True):
            first, last = max(start, offset), min(start + len(seen), end)
            if (
                first < last
                and content[first - offset : last - offset] != seen[first - start : last - start]
            ):
                raise CheckpointError(
                    f"{self.label}: bytes {first} to {last} differ from what the Hub sent before: "
                    "the transfer went wrong, try again; nothing was published"
                )

    def check_same(self, offset: int, content: memoryview) -> None:
        """Compare a segment that is fetched again with what arrived the first time.

        The hash covers one of the two, and the other may be what was averaged.

        Raises:
            CheckpointError: If they differ.
        """
        checksum = crc32(content)
        if self._checksums.setdefault(offset, checksum) != checksum:
            raise CheckpointError(
                f"{self.label}: bytes from {offset} on differ from what the Hub sent before: the "
                "transfer went wrong, try again; nothing was published"
            )

    def fetch(self, offset: int, buffer: memoryview, cancelled: Event | None = None) -> None:
        """Fill a buffer from the Hub, going on after what breaks off.

        Raises:
            CheckpointError: If the Hub sends something else than was asked for.
            HubError: If it cannot be reached, or the deadline is over.
        """
        attempts = Attempts(self.label, cancelled, is_under_way=True)
        filled = n_expired = 0
        while filled < len(buffer):
            first, last = offset + filled, offset + len(buffer) - 1
            location = self._located()
            with answering(attempts, self.label):
                wanted = {"Accept-Encoding": "identity", "Range": f"bytes={first}-{last}"}
                if location.is_hub:
                    wanted = headers() | wanted
                with get_session().stream(
                    "GET", location.address, headers=wanted, timeout=request_timeout()
                ) as response:
                    if response.status_code in _EXPIRED_STATUS and n_expired < _MAX_EXPIRED:
                        n_expired += 1
                        self._forget_location(location)
                        continue
                    refuse_failure(response, self.label)
                    self._check_answer(response, first, last)
                    for part in response.iter_raw():
                        attempts.check()
                        end = filled + len(part)
                        if end > len(buffer):
                            raise CheckpointError(
                                f"{self.label}: the Hub sends more bytes than were asked for"
                            )
                        buffer[filled:end] = part
                        filled = end
                        traffic.add(len(part))
                        attempts.progressed()
                        n_expired = 0
                if filled < len(buffer):
                    attempts.failed("the Hub sends less than was asked for")

    def _check_answer(self, response: Any, first: int, last: int) -> None:
        told = response.headers.get("content-range", "")
        match = _CONTENT_RANGE.fullmatch(told)
        encoding = response.headers.get("content-encoding", "identity")
        is_whole = first == 0 and last == self.size - 1 and self._digest.startswith("git-sha1:")
        if (
            is_whole  # a small file: its hash is looked at right away
            and response.status_code == 200
            and encoding == "identity"
            and response.headers.get("content-length") == str(self.size)
        ):
            return
        if response.status_code != 206 or not match or encoding != "identity":
            raise CheckpointError(
                f"{self.label}: the server answers {response.status_code} and does not send the "
                "range of bytes that was asked for; --cache downloads whole files instead"
            )
        begins, ends, size = map(int, match.groups())
        if begins != first or ends > last or size != self.size:
            raise CheckpointError(
                f"{self.label}: the server sends bytes {begins} to {ends} of {size}, asked for "
                f"were {first} to {last} of {self.size}"
            )

    @property
    def _head_bytes(self) -> int:
        """How many bytes at the beginning were read; 0 if what was read begins elsewhere."""
        return len(self._seen[0]) if self._starts[:1] == [0] else 0

    def _located(self) -> _Location:
        with self._location_lock:
            if self._location is None and self._digest.startswith("git-sha1:"):
                self._location = _Location(self._address, is_hub=True)
            if self._location is None:
                told = tried(
                    lambda: get_hf_file_metadata(
                        self._address, timeout=address_timeout(), endpoint=endpoint()
                    ),
                    self.label,
                )
                size = self.size if told.size is None else told.size
                if size != self.size or told.commit_hash not in (None, self._commit):
                    raise HubError(f"{self.label}: the Hub tells two sizes or commits of it")
                self._location = _Location(
                    told.location, told.location.startswith(f"{endpoint()}/")
                )
            return self._location

    def _forget_location(self, location: _Location) -> None:
        with self._location_lock:
            if self._location is location:
                self._location = None

    def _fetched(self, offset: int, nbytes: int) -> bytes:
        content = bytearray(nbytes)
        self.fetch(offset, memoryview(content))
        return bytes(content)

    def _keep(self, offset: int, nbytes: int) -> bytes:
        content = self._fetched(offset, nbytes)
        self._insert(offset, content)
        return content

    def _insert(self, offset: int, content: bytes) -> None:
        at = bisect_right(self._starts, offset)
        self._starts.insert(at, offset)
        self._seen.insert(at, content)


def content_hash(entry: "Entry") -> Any:
    """Return a hash of the kind that the Hub tells; None if it tells none."""
    kind = entry.digest.partition(":")[0]
    if kind == "sha256":
        return hashlib.sha256()
    if kind == "git-sha1":
        begun = hashlib.sha1(usedforsecurity=False)
        begun.update(b"blob %d\0" % entry.size)
        return begun
    return None
