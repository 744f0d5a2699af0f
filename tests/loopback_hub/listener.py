"""One HTTP/1.1 server on loopback: reads calls, records them, applies faults, sends answers."""

import contextlib
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from loopback_hub.faults import FaultQueue, Misbehaviour
from loopback_hub.messages import (
    Call,
    Request,
    RequestBody,
    Response,
    ServerName,
    error_response,
)
from loopback_hub.sending import plan_answer, reset_connection, send_body


class Traffic:
    """What the two servers of a hub share: the record, the faults, and the end."""

    def __init__(self) -> None:
        self.requests: list[Request] = []  # only ever appended to, which is atomic
        self.faults = FaultQueue()
        self.closing = threading.Event()


class Exchange(BaseHTTPRequestHandler):
    """Answers the requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"

    def handle(self) -> None:
        """Serve the connection; a client may leave whenever it likes."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: requests are recorded instead."""

    def do_GET(self) -> None:
        """Answer a GET request."""
        self._exchange()

    def do_HEAD(self) -> None:
        """Answer a HEAD request."""
        self._exchange()

    def do_POST(self) -> None:
        """Answer a POST request."""
        self._exchange()

    def do_PUT(self) -> None:
        """Answer a PUT request."""
        self._exchange()

    def do_DELETE(self) -> None:
        """Answer a DELETE request."""
        self._exchange()

    def _exchange(self) -> None:
        traffic = self.server.traffic
        request = Request(
            method=self.command,
            path=self.path,
            range=self.headers.get("Range"),
            status=None,
            sent_bytes=0,
            authorization=self.headers.get("Authorization"),
            server=self.server.name,
        )
        traffic.requests.append(request)
        fault = traffic.faults.take(f"{self.command} {self.path}")
        if fault.silent:
            traffic.closing.wait()
            self.close_connection = True
            return
        traffic.closing.wait(fault.delay_seconds)
        self._answer(request, fault)

    def _answer(self, request: Request, fault: Misbehaviour) -> None:
        url = urlsplit(self.path)
        body = RequestBody(self.rfile, self.headers)
        call = Call(
            self.command,
            url.path,
            parse_qs(url.query, keep_blank_values=True),
            self.headers,
            body,
        )
        response = fault.replacement()
        if response is None:
            response = self._respond(call)
        body.drain()
        answer = plan_answer(response, request.range, fault)
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Connection", "close")  # the end of the body is the end of it all
        self.end_headers()
        if self.command != "HEAD":
            send_body(self.connection, answer, fault, request, self.server.traffic.closing)
            if fault.truncate_bytes is not None:
                self.close_connection = True
        if fault.reset:
            reset_connection(self.connection)
            self.close_connection = True

    def _respond(self, call: Call) -> Response:
        try:
            return self.server.respond(call)
        except ConnectionError:
            raise
        except Exception as error:
            # a mistake in this package or a call it does not know: let the client show it
            return error_response(500, f"{type(error).__name__}: {error}")


class Listener(ThreadingHTTPServer):
    """A server on a free port that can be closed at once, whatever its clients do."""

    request_queue_size = 128  # clients open many connections at a time

    def __init__(
        self, name: ServerName, traffic: Traffic, respond: Callable[[Call], Response]
    ) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.name = name
        self.traffic = traffic
        self.respond = respond
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, socket.socket] = {}
        self._acceptor = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._acceptor.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve one connection in a thread of its own, and remember both."""
        thread = threading.Thread(
            target=self._serve_connection, args=(request, client_address), daemon=True
        )
        with self._lock:
            self._connections[thread] = request
        thread.start()

    def _serve_connection(self, request: Any, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._connections[threading.current_thread()]

    def close(self) -> None:
        """Stop accepting, cut every connection and wait for the threads."""
        self.shutdown()
        self._acceptor.join()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections:
            thread.join()
        self.server_close()
