"""What every request passes: where it comes from, its token, its length, the headers of its answer, its count.

Without a token a service listens on loopback only, and answers only where it is called by a name of loopback: a
web page whose name was made to point to 127.0.0.1 (DNS rebinding) sends its own name. No page of another origin may
send a form, which browsers do without asking.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import Literal
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.answers import CLIENT_GONE, Refused
from pipeline.serving.limits import MAX_JSON_BYTES, MAX_UPLOAD_BYTES
from pipeline.serving.metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/page.css", "/page.js", "/healthz", "/readyz")  # without a token
BODY_SECONDS = 60
UPLOADS = "/v1/images/edits"
OPEN_BELOW = "/images/"  # by names that cannot be guessed
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware. `token` None: none is needed, and the service listens on loopback."""

    def __init__(self, app: ASGIApp, token: str | None, metrics: Metrics) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 500
        if scope["method"] == "HEAD":  # the server leaves the content out
            scope = {**scope, "method": "GET"}

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(scope["path"], scope["method"], Headers(scope=scope))
            body = await _read(receive, MAX_UPLOAD_BYTES if scope["path"] == UPLOADS else MAX_JSON_BYTES)
            await self._app(scope, _again(body, receive), send_on)
        except Refused as refusal:
            await refusal.response()(scope, receive, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - start)

    def _check(self, path: str, method: str, headers: Headers) -> None:
        """Raise Refused where a request may not be served."""
        host = headers.get("host", "")
        if self._token is None and _part(f"//{host}", "hostname") not in LOOPBACK:
            raise Refused(403, "unknown_host", f"this service is not called {host[:100]!r}")
        origin = headers.get("origin")
        if method != "GET" and origin is not None and _part(origin, "netloc") != host:
            raise Refused(403, "cross_origin", "pages of other origins may not use this service")
        if self._token is None or path in OPEN or path.startswith(OPEN_BELOW):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self._token):
            message = "give the service's token, as OpenAI's clients give an API key"
            raise Refused(401, "invalid_api_key", message)


async def _read(receive: Receive, limit: int) -> bytes:
    """The body of a request. Raises Refused where it is too large, or does not come."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(CLIENT_GONE, "client_gone", "the client has gone")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise Refused(413, "too_large", f"the request has more than {limit} bytes")
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refused(408, "timeout", f"the request took longer than {BODY_SECONDS} s") from None
    return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, and what comes after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return first.pop() if first else await receive()

    return receive_again


def _part(address: str, part: Literal["hostname", "netloc"]) -> str | None:
    """Of an address; None of what is none."""
    try:
        parts = urlsplit(address)
        return parts.hostname if part == "hostname" else parts.netloc
    except ValueError:
        return None
