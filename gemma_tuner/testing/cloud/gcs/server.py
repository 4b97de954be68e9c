"""A local server for the official google-cloud-storage client: sockets, and faults on demand.

Read in this order: ``buckets`` (objects in memory), ``api`` (the JSON API's calls), ``faults``
(what goes wrong, and when), and this. ``tests/cloud/README.md`` says what it cannot show.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import socket
import socketserver
import struct
import threading
from dataclasses import dataclass
from typing import Any, Self

from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from gemma_tuner.testing.cloud.gcs.api import Answer, Call, GcsApi
from gemma_tuner.testing.cloud.gcs.buckets import ApiError, Buckets
from gemma_tuner.testing.cloud.gcs.faults import (
    Effect,
    Fault,
    FaultScript,
    FlipBit,
    Operation,
    Overwrite,
    Refuse,
    Reset,
    Stall,
    Truncate,
)

_SLICE_BYTES = 1 << 16


@dataclass(slots=True)
class LoggedRequest:
    """One request that the server was sent."""

    operation: Operation  # ``read`` is a download
    method: str
    bucket: str
    name: str  # the object's; a listing's prefix
    generation: int | None  # asked for by ``generation`` or ``ifGenerationMatch``
    byte_range: str | None
    status: int  # 0 where the connection was reset before
    num_bytes: int  # how many of the body were sent; until then, how many will be
    effect: Effect | None  # the fault that struck it


class GcsServer:
    """A local server of buckets and objects, for the official client.

    Example:
        >>> with GcsServer() as server:
        ...     generation = server.put("bucket", "a/x.txt", b"hello")
        ...     server.client().bucket("bucket").blob("a/x.txt").download_as_bytes()
        b'hello'

    Args:
        seed: Decides which requests are struck by faults that have a probability.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.buckets = Buckets()
        self.api = GcsApi(self.buckets)
        self.faults = FaultScript(seed)
        self.log: list[LoggedRequest] = []
        self.latency_seconds = 0.0  # to the first byte of each download
        self.bytes_per_second: float | None = None  # of each connection; None for no limit
        self.stopped = threading.Event()
        self._http: _HttpServer | None = None
        self._clients: list[storage.Client] = []

    def start(self) -> Self:
        """Listen on a free port of 127.0.0.1, on threads of its own."""
        if self._http is None:
            self.stopped.clear()
            self._http = _HttpServer(self)
            self.api.endpoint = self.endpoint
            # The argument: how often it looks whether to stop, in seconds.
            threading.Thread(
                target=self._http.serve_forever, args=(0.02,), name="gcs-server", daemon=True
            ).start()
        return self

    def stop(self) -> None:
        """Close all connections, also those that stall; the objects stay."""
        self.stopped.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.close_connections()
            self._http.server_close()
            self._http = None
        while self._clients:
            self._clients.pop().close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """``http://127.0.0.1:port``.

        Raises:
            RuntimeError: The server is not running.
        """
        if self._http is None:
            raise RuntimeError("the server is not running: call start(), or use it in `with`")
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def client(self) -> storage.Client:
        """Return the official client, without credentials, at this server; it closes with it."""
        client = storage.Client(
            project="local",
            credentials=AnonymousCredentials(),
            client_options={"api_endpoint": self.endpoint},
        )
        self._clients.append(client)
        return client

    def create_bucket(self, bucket: str, *, keeps_versions: bool = False) -> None:
        """Add an empty bucket; ``keeps_versions`` is Cloud Storage's object versioning."""
        self.buckets.create_bucket(bucket, keeps_versions=keeps_versions)

    def put(
        self,
        bucket: str,
        name: str,
        data: bytes,
        *,
        content_type: str | None = None,
        content_encoding: str | None = None,
        generation: int | None = None,
    ) -> int:
        """Store an object without HTTP, in a new bucket where there is none.

        Args:
            bucket: Where.
            name: Under which name.
            data: Its bytes, as they are stored.
            content_type: As it is served.
            content_encoding: ``gzip`` where the bytes are zipped.
            generation: What its generation is at least, so that a server that is started again
                can hold the same objects; None is one above all that were.

        Returns:
            Its generation.
        """
        if not self.buckets.has_bucket(bucket):
            self.buckets.create_bucket(bucket)
        return self.buckets.put(
            bucket,
            name,
            data,
            content_type=content_type,
            content_encoding=content_encoding,
            generation=generation,
        ).generation

    def delete(self, bucket: str, name: str) -> None:
        """Delete an object without HTTP."""
        self.buckets.delete(bucket, name)

    def forbid(self, bucket: str) -> None:
        """Answer every request about a bucket with 403."""
        self.api.forbidden.add(bucket)

    def allow(self, bucket: str) -> None:
        """Take :meth:`forbid` back."""
        self.api.forbidden.discard(bucket)

    def add_fault(self, fault: Fault) -> None:
        """Append a fault to the script; where several strike one request, the first added does."""
        self.faults.add(fault)

    def clear_faults(self) -> None:
        """Forget all faults."""
        self.faults.clear()

    @property
    def requests(self) -> list[LoggedRequest]:
        """The requests so far, in order of arrival."""
        return list(self.log)

    def clear_requests(self) -> None:
        """Forget the requests so far."""
        self.log.clear()


class _HttpServer(socketserver.ThreadingTCPServer):
    request_queue_size = 256
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, gcs: GcsServer) -> None:
        self._connections: set[Any] = set()
        super().__init__(("127.0.0.1", 0), functools.partial(_Connection, gcs))

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Connection(http.server.BaseHTTPRequestHandler):
    """Serves one connection, request after request."""

    protocol_version = "HTTP/1.1"
    server_version = "gemma-tuner-local-server"
    sys_version = ""
    disable_nagle_algorithm = True

    def __init__(self, gcs: GcsServer, *arguments: Any) -> None:
        self._gcs = gcs
        self._num_sent_bytes = 0
        super().__init__(*arguments)  # Serves the connection to its end.

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Be silent: :attr:`GcsServer.requests` is the log."""

    def handle(self) -> None:
        """Serve until either side has enough; a client may leave at any time."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def serve(self) -> None:
        """Answer one request, or do to it what the script says."""
        gcs = self._gcs
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            call = gcs.api.parse(self.command, self.path, self.headers, body)
        except ApiError as error:
            call = Call("other", self.command)
            answer, effect = gcs.api.refuse(call, error.status, error=error), None
        else:
            byte_range = self.headers.get("Range")
            effect = gcs.faults.choose(call.operation, call.bucket, call.name, byte_range)
            answer = self._answer(call, effect)
        delivery = _plan_delivery(answer.body, effect)
        logged = self._describe(call, answer, effect, delivery)
        gcs.log.append(logged)
        self._num_sent_bytes = 0
        try:
            self._pause(delivery.wait_seconds)
            if call.operation == "read":
                self._pause(gcs.latency_seconds)
            if not delivery.is_mute:
                self._send(answer, delivery)
        except OSError:  # The client went away, or the server stops.
            logged.num_bytes = self._num_sent_bytes
            self.close_connection = True
        if delivery.resets:
            self._reset()
        self.close_connection |= not delivery.is_whole

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve  # noqa: N815

    def _answer(self, call: Call, effect: Effect | None) -> Answer:
        gcs = self._gcs
        if isinstance(effect, Refuse):
            seconds = effect.retry_after_seconds
            return gcs.api.refuse(call, effect.status, retry_after_seconds=seconds)
        if isinstance(effect, Overwrite):
            gcs.put(call.bucket, call.name, effect.data)
        return gcs.api.answer(call)

    def _describe(
        self, call: Call, answer: Answer, effect: Effect | None, delivery: _Delivery
    ) -> LoggedRequest:
        generation = call.parameters.get("generation", call.parameters.get("ifGenerationMatch"))
        return LoggedRequest(
            operation=call.operation,
            method=call.method,
            bucket=call.bucket,
            name=call.name,
            generation=int(generation) if generation and generation.isdecimal() else None,
            byte_range=self.headers.get("Range"),
            status=0 if delivery.is_mute else answer.status,
            num_bytes=sum(len(piece) for piece, _ in delivery.pieces),
            effect=effect,
        )

    def _send(self, answer: Answer, delivery: _Delivery) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        for piece, pause_seconds in delivery.pieces:
            for start in range(0, len(piece), _SLICE_BYTES):
                part = piece[start : start + _SLICE_BYTES]
                if speed := self._gcs.bytes_per_second:
                    self._pause(len(part) / speed)
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if answer.chunked else part)
                self._num_sent_bytes += len(part)
            self._pause(pause_seconds)
        if answer.chunked and delivery.is_whole:
            self.wfile.write(b"0\r\n\r\n")

    def _pause(self, seconds: float) -> None:
        if self._gcs.stopped.wait(seconds):
            raise ConnectionAbortedError("the server stops")

    def _reset(self) -> None:
        # Closing a socket that lingers for no time sends a reset, once nothing refers to it.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()


@dataclass(frozen=True, slots=True)
class _Delivery:
    """How a body is sent: its pieces, each with a pause after it, and what goes wrong around."""

    pieces: tuple[tuple[bytes, float], ...]
    wait_seconds: float = 0.0
    is_whole: bool = True
    is_mute: bool = False  # Not even the status line is sent.
    resets: bool = False


def _plan_delivery(body: bytes, effect: Effect | None) -> _Delivery:
    middle, last = len(body) // 2, max(len(body) - 1, 0)
    match effect:
        case Stall(seconds, None):
            return _Delivery(((body, 0.0),), wait_seconds=seconds)
        case Stall(seconds, int(after)):
            return _Delivery(((body[:after], seconds), (body[after:], 0.0)))
        case Truncate(after):
            end = min(middle if after is None else after, last)
            return _Delivery(((body[:end], 0.0),), is_whole=not body)
        case FlipBit(at) if body:
            at = min(middle if at is None else at, last)
            flipped = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
            return _Delivery(((flipped, 0.0),))
        case Reset(None):
            return _Delivery((), is_whole=False, is_mute=True, resets=True)
        case Reset(int(after)):
            return _Delivery(((body[: min(after, last)], 0.0),), is_whole=False, resets=True)
    return _Delivery(((body, 0.0),))
