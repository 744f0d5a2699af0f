"""Things that go wrong between a client and the Hub, made to happen on demand."""

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from loopback_hub.messages import Response, error_response

LOGIN_PAGE = b"<!DOCTYPE html><html><body>Please log in to this network.</body></html>"


@dataclass(frozen=True, kw_only=True)
class Misbehaviour:
    """How one answer differs from the right one; kinds may be combined."""

    status: int | None = None
    """Answer with this status and do nothing of what was asked."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers to add, or to put in place of the right ones."""
    drop_header: str | None = None
    """Leave out the header of this name."""
    html_body: bool = False
    """Answer 200 with the login page of some network."""
    ignore_range: bool = False
    """Answer 200 with the whole file when a range is asked for."""
    shift_content_range: bool = False
    """Let Content-Range begin one byte late; the body is right."""
    short_content_length: bool = False
    """Promise and send one byte less than the range that Content-Range tells."""
    flip_byte: int | None = None
    """Change the byte at this offset of the file, if it is in the range sent."""
    truncate_bytes: int | None = None
    """Promise everything, send so many bytes of the body, close the connection."""
    reset: bool = False
    """Reset the connection after ``truncate_bytes``, or after half of the body."""
    drip: bool = False
    """Send the body one byte at a time, 20 a second."""
    delay_seconds: float = 0.0
    """Wait before anything is done."""
    silent: bool = False
    """Never answer; the connection stays open until the hub is closed."""

    def replacement(self) -> Response | None:
        """Return what is answered instead of doing what was asked, if anything."""
        if self.status is not None:
            return error_response(self.status, f"injected fault {self.status}")
        if self.html_body:
            return Response(200, {"Content-Type": "text/html; charset=utf-8"}, LOGIN_PAGE)
        return None


RIGHT = Misbehaviour()


@dataclass(frozen=True)
class Fault(Misbehaviour):
    """A misbehaviour towards some of the requests whose "METHOD /path?query" matches."""

    match: str
    """A regular expression that is searched for."""
    times: int = 1
    """How many requests are hit."""
    after: int = 0
    """How many matching requests are answered rightly before."""


class FaultQueue:
    """Faults in the order in which they are consumed.

    The first one that matches and is not used up decides about a request, even if it lets the
    request pass: of two faults with the same pattern, the second begins when the first is over.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._n_seen: list[int] = []

    def add(self, fault: Fault) -> None:
        """Queue a fault behind the others."""
        with self._lock:
            self._faults.append(fault)
            self._n_seen.append(0)

    def take(self, request_line: str) -> Misbehaviour:
        """Return how to answer this request, and count it."""
        with self._lock:
            for index, fault in enumerate(self._faults):
                is_over = self._n_seen[index] >= fault.after + fault.times
                if is_over or re.search(fault.match, request_line) is None:
                    continue
                self._n_seen[index] += 1
                return fault if self._n_seen[index] > fault.after else RIGHT
        return RIGHT

    @property
    def n_left(self) -> int:
        """Return how many requests are still to be hit."""
        with self._lock:
            return sum(
                min(fault.times, fault.after + fault.times - n_seen)
                for fault, n_seen in zip(self._faults, self._n_seen, strict=True)
            )

    def clear(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()
            self._n_seen.clear()
