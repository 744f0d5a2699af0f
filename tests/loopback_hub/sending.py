"""Turn a response into bytes on a connection, rightly or as a fault wants it."""

import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loopback_hub.faults import Misbehaviour
from loopback_hub.messages import PIECE_NBYTES, Request, Response

DRIP_SECONDS = 0.05


@dataclass
class Outgoing:
    """The head of an answer, and which bytes of the content are its body."""

    status: int
    headers: dict[str, str]
    content: bytes | Path
    start: int
    stop: int


def plan_answer(response: Response, asked_range: str | None, fault: Misbehaviour) -> Outgoing:
    """Decide about the range, and put the fault into the headers."""
    n_bytes = response.n_bytes
    answer = Outgoing(response.status, dict(response.headers), response.content, 0, n_bytes)
    if response.accepts_ranges:
        answer.headers["Accept-Ranges"] = "bytes"
        if not fault.ignore_range:
            _apply_range(answer, asked_range, n_bytes, shift=int(fault.shift_content_range))
    if fault.short_content_length and answer.stop > answer.start:
        answer.stop -= 1
    answer.headers["Content-Length"] = str(answer.stop - answer.start)
    answer.headers.update(fault.headers)
    if fault.drop_header is not None:
        name = fault.drop_header.lower()
        answer.headers = {
            key: value for key, value in answer.headers.items() if key.lower() != name
        }
    return answer


def _apply_range(answer: Outgoing, asked_range: str | None, n_bytes: int, shift: int) -> None:
    # like S3: what is not one well-formed range is answered with everything
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", (asked_range or "").strip())
    if found is None or found.groups() == ("", ""):
        return
    first, last = found.groups()
    if first and last and int(first) > int(last):
        return
    if first:
        start = int(first)
        stop = min(int(last) + 1, n_bytes) if last else n_bytes
    else:
        start = max(n_bytes - int(last), 0)
        stop = n_bytes
    if start >= n_bytes:
        answer.status = 416
        answer.headers["Content-Range"] = f"bytes */{n_bytes}"
        answer.content = b""
        answer.start = answer.stop = 0
        return
    answer.status = 206
    answer.headers["Content-Range"] = f"bytes {start + shift}-{stop - 1}/{n_bytes}"
    answer.start, answer.stop = start, stop


def send_body(
    connection: socket.socket,
    answer: Outgoing,
    fault: Misbehaviour,
    request: Request,
    closing: threading.Event,
) -> None:
    """Send the body, or as much of it as the fault leaves, and count it in ``request``."""
    start, stop = answer.start, answer.stop
    if fault.truncate_bytes is not None:
        stop = min(stop, start + fault.truncate_bytes)
    elif fault.reset:
        stop = start + (stop - start) // 2
    if fault.drip:
        _drip(connection, _pieces(answer.content, start, stop), request, closing)
    elif isinstance(answer.content, Path) and fault.flip_byte is None:
        _send_file(connection, answer.content, start, stop, request)
    else:
        position = start
        for piece in _pieces(answer.content, start, stop):
            sent = _flipped(piece, fault.flip_byte, position)
            position += len(sent)
            _send(connection, sent, request)


def reset_connection(connection: socket.socket) -> None:
    """Close so that the client gets a TCP reset instead of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())  # a shutdown, as the server does it, would be orderly


def _send(connection: socket.socket, piece: bytes, request: Request) -> None:
    # counted first: a client that has got the last byte may look at the count at once
    request.sent_bytes += len(piece)
    connection.sendall(piece)


def _send_file(
    connection: socket.socket, path: Path, start: int, stop: int, request: Request
) -> None:
    with path.open("rb") as file:
        while start < stop:
            n_wanted = min(stop - start, PIECE_NBYTES)
            request.sent_bytes += n_wanted
            n_sent = 0
            try:
                n_sent = os.sendfile(connection.fileno(), file.fileno(), start, n_wanted)
            finally:
                request.sent_bytes -= n_wanted - n_sent
            if n_sent == 0:
                raise ConnectionError(f"{path}: became shorter while it was sent")
            start += n_sent


def _pieces(content: bytes | Path, start: int, stop: int) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content[start:stop]
        return
    with content.open("rb") as file:
        file.seek(start)
        while start < stop:
            piece = file.read(min(stop - start, PIECE_NBYTES))
            start += len(piece)
            yield piece


def _flipped(piece: bytes, flip_byte: int | None, position: int) -> bytes:
    if flip_byte is None or not position <= flip_byte < position + len(piece):
        return piece
    changed = bytearray(piece)
    changed[flip_byte - position] ^= 0xFF
    return bytes(changed)


def _drip(
    connection: socket.socket,
    pieces: Iterator[bytes],
    request: Request,
    closing: threading.Event,
) -> None:
    for piece in pieces:
        for index in range(len(piece)):
            if closing.wait(DRIP_SECONDS):
                raise ConnectionError("the hub was closed")
            _send(connection, piece[index : index + 1], request)
