"""What goes over the wire: a call as a server reads it, and the response it gives back."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from io import BufferedIOBase
from pathlib import Path
from typing import Literal

PIECE_NBYTES = 1 << 20

ServerName = Literal["hub", "cdn"]


@dataclass
class Request:
    """A request as the tests look at it; filled in while it is answered."""

    method: str
    path: str  # as sent, still encoded, with the query
    range: str | None
    status: int | None  # None until an answer begins
    sent_bytes: int  # of the body
    authorization: str | None
    server: ServerName


class RequestBody:
    """The body of one request, read when somebody wants it."""

    def __init__(self, file: BufferedIOBase, headers: Message) -> None:
        self._pieces = self._read_pieces(file, headers)
        self._content: bytes | None = None

    def pieces(self) -> Iterator[bytes]:
        """Return what has not been read yet, in pieces."""
        return self._pieces

    def read(self) -> bytes:
        """Return the whole body; may be called again."""
        if self._content is None:
            self._content = b"".join(self._pieces)
        return self._content

    def drain(self) -> None:
        """Read what is left: the next request on the connection begins behind it."""
        for _ in self._pieces:
            pass

    @classmethod
    def _read_pieces(cls, file: BufferedIOBase, headers: Message) -> Iterator[bytes]:
        if headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from cls._read_exactly(file, int(headers.get("Content-Length", "0")))
            return
        while n_bytes := int(file.readline().split(b";")[0] or b"0", 16):
            yield from cls._read_exactly(file, n_bytes)
            file.readline()
        file.readline()

    @staticmethod
    def _read_exactly(file: BufferedIOBase, n_bytes: int) -> Iterator[bytes]:
        while n_bytes > 0:
            piece = file.read(min(n_bytes, PIECE_NBYTES))
            if not piece:
                raise ConnectionError("the client left in the middle of its request")
            n_bytes -= len(piece)
            yield piece


@dataclass(frozen=True)
class Call:
    """A request as the code that answers it sees it."""

    method: str
    path: str  # still encoded: %2F in a revision is not a separator
    query: Mapping[str, list[str]]
    headers: Message
    body: RequestBody

    def option(self, name: str, default: str = "") -> str:
        """Return one value of the query."""
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        """Return whether the query switches something on."""
        return self.option(name).lower() in ("1", "true")


@dataclass(frozen=True)
class Response:
    """A status, headers, and a body in memory or in a file."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | Path = b""
    accepts_ranges: bool = False

    @property
    def n_bytes(self) -> int:
        """Return how long the whole body is."""
        if isinstance(self.content, Path):
            return self.content.stat().st_size
        return len(self.content)


def json_response(
    value: object, headers: Mapping[str, str] | None = None, status: int = 200
) -> Response:
    """Answer with JSON."""
    return Response(
        status,
        {"Content-Type": "application/json; charset=utf-8", **(headers or {})},
        json.dumps(value).encode(),
    )


def error_response(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with an error; the client tells errors apart by the code in a header."""
    # a header is one line of ASCII, whatever name the message repeats
    line = message.encode("unicode_escape").decode("ascii")
    error_headers = {**(headers or {}), "X-Error-Message": line}
    if code is not None:
        error_headers["X-Error-Code"] = code
    return json_response({"error": message}, error_headers, status)
