"""The page's server: on loopback alone, for those who have its token, and only for its pages."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response
from nicegui import app as pages
from nicegui import ui
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_tuner.errors import ConfigError
from gemma_tuner.training.reporting.page import write_address
from gemma_tuner.watch.page import Page
from gemma_tuner.watch.run import Run
from gemma_tuner.watch.samples import MEDIA_TYPES, find_media
from gemma_tuner.watch.watched import Watched

READ_SECONDS = 1.0
PARENT_GRACE_SECONDS = 5.0
"""The page stays so long after its parent has ended, so that browsers hear of it."""

RECONNECT_SECONDS = 60.0
"""A page that was out of reach for less goes on where it was; it is asked every 48 s."""

REQUEST_SECONDS = 10.0
"""A connection on which no whole request comes in this time is closed; others need its place."""

HOST = "127.0.0.1"
NAMES = (HOST, "localhost", "[::1]")
"""Names by which a browser may call this server. A page elsewhere can let its own name lead to
127.0.0.1, but cannot call itself one of these."""

# Everything comes from here and nothing goes elsewhere. Vue compiles templates in the browser, and
# styles are set on elements: hence the two "unsafe" ones.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def serve(
    runs: Sequence[Run],
    *,
    port: int = 0,
    parent_pid: int | None = None,
    token: str = "",
    announce: Callable[[str], None],
) -> None:
    """Serve the page until the process is interrupted or its parent ends."""
    listener = _listen(port)
    watched = Watched(runs, parent_pid)
    # Nothing is compressed: it does not leave the machine, and the cores are needed elsewhere.
    token = token or secrets.token_urlsafe()
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        _build_app(watched, Guard(token, port)),
        http=_Connection,
        log_level="error",
        ws_max_size=1 << 20,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)

    async def follow() -> None:
        watched.refresh()
        while watched.is_behind:
            await asyncio.sleep(0.01)  # others' turn
            watched.refresh()
        if watched.has_parent_ended:
            await asyncio.sleep(PARENT_GRACE_SECONDS)
            server.should_exit = True

    pages.timer(READ_SECONDS, follow)
    announce(write_address(port, token))
    with contextlib.suppress(KeyboardInterrupt):  # the usual end of a page
        server.run(sockets=[listener])


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port {port} cannot be used ({error.strerror}); give another, or none for any that "
            "is free"
        ) from None
    listener.listen()
    return listener


def _build_app(watched: Watched, guard: Guard) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.get("/media/{index}/{name}")
    def read_media(index: int, name: str) -> Response:
        path = None
        if 0 <= index < len(watched.runs):
            path = find_media(watched.runs[index].folder, name)
        if path is None:
            return PlainTextResponse("not found", status_code=404)
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix.lower()])

    @ui.page("/")
    def show() -> None:
        Page(watched)

    ui.run_with(
        app,
        title="gemma-tuner",
        dark=None,
        reconnect_timeout=RECONNECT_SECONDS,
        tailwind=False,
        gzip_middleware_factory=None,
        show_welcome_message=False,
        favicon="◭",
    )
    app.add_middleware(OwnPages, guard=guard)
    return app


@dataclass(frozen=True)
class Guard:
    """Who may read the page: whoever has its address, and then the browser that came with it."""

    token: str
    port: int

    @property
    def cookie(self) -> str:
        """The cookie's name: cookies do not know ports."""
        return f"gemma_tuner_{self.port}"

    @property
    def hosts(self) -> list[str]:
        """What a browser may call this server; it leaves port 80 out."""
        return [*(f"{name}:{self.port}" for name in NAMES), *(NAMES if self.port == 80 else ())]

    def admits(self, scope: Scope) -> bool:
        """Whether a request has the token, in its address or in a cookie."""
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        cookies = SimpleCookie()
        with contextlib.suppress(CookieError):
            cookies.load(Headers(scope=scope).get("cookie", ""))
        if self.cookie in cookies:
            given.append(cookies[self.cookie].value)
        return any(hmac.compare_digest(each.encode(), self.token.encode()) for each in given)


class _Connection(H11Protocol):
    # Its parser, unlike others, bounds the head of a request, to 64 kB.

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(REQUEST_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and self in self.connections:  # and no WebSocket by now
            self.transport.close()


class OwnPages:
    """Refuses strangers and other sites' pages; sends headers that keep this page to itself."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard
        self._headers = {
            **_HEADERS,
            "set-cookie": f"{guard.cookie}={guard.token}; Path=/; HttpOnly; SameSite=Strict",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        reason = ""
        if host not in self._guard.hosts:
            reason = f"open this page as {HOST}:{self._guard.port}, through a tunnel too"
        elif not self._guard.admits(scope):
            reason = (
                "give the page's whole address, with its token; it was printed where the page was "
                "started"
            )
        elif origin is not None and urlsplit(origin).netloc != host:
            reason = "another site's page"
        if reason:
            refusal = PlainTextResponse(reason, 403, {"connection": "close"})
            await refusal(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._app(scope, receive, send_with_headers)
