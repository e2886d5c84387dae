"""What every request has to pass before anything of ours looks at it, and what every answer carries.

A browser on this machine will send requests to us in the name of any page it shows. So the host
that it thinks we are is checked (a foreign name that resolves to us is an attack), and where a
request that changes something came from. None of this rests on a header that a page can set.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["INGEST_BODY", "Guard", "is_local"]

BODY = 4 << 20
INGEST_BODY = 1 << 20
BODY_SECONDS = 30.0
LOCAL = ("localhost", "127.0.0.1", "[::1]")
TYPES = ("application/json", "application/msgpack")
FORMS = {"/login": "application/x-www-form-urlencoded"}  # the one form; a browser sends it with its origin
UNMETERED = ("/api/v1/ingest",)
CLOSE = {"Connection": "close"}

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses requests from the wrong place, of the wrong type, too large or too many.

    Parameters
    ----------
    app : ASGIApp
        What gets the others.
    hosts : iterable of str
        Names, without port, by which we may be addressed besides those of this machine.
    rate : float
        Requests per second from one token or address; short bursts may have twice as many.
        Ingest is limited by its queue instead.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = (), rate: float = 100.0) -> None:
        self.app = app
        self.hosts = {*LOCAL, *(host.lower() for host in hosts)}
        self._meter = _Meter(rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets here; a new kind of door needs a lock first
            await send({"type": "websocket.close", "code": 1008})
            return
        send = _with_headers(send)
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._forward(scope, receive, send)
            return
        status, detail = refusal
        # A body that nobody wants is not read to its end either.
        await JSONResponse({"detail": detail}, status, CLOSE)(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or _name(host) not in self.hosts:
            return (
                421,
                "This server is not addressed by that name; `penstock server start --allowed-host` adds one.",
            )
        if scope["method"] not in {"GET", "HEAD"}:
            if not self._same_origin(headers, host, scope["scheme"]):
                return 403, "Requests from other sites change nothing here."
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if _has_body(headers) and kind not in TYPES and kind != FORMS.get(scope["path"]):
                return 415, f"The body must be {' or '.join(TYPES)}."
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return 400, "The length of the body is no number."
        if int(length) > _limit(scope):
            return 413, f"The body is larger than {_limit(scope)} bytes."
        if scope["path"] not in UNMETERED and not self._meter.admit(_sender(scope, headers)):
            return 429, "Too many requests; slow down."
        return None

    def _same_origin(self, headers: Headers, host: str, scheme: str) -> bool:
        site = headers.get("sec-fetch-site")
        if site is not None and site not in {"same-origin", "none"}:
            return False
        origin = headers.get("origin")
        if origin is None:
            return True  # no browser leaves it out of a request that changes something
        parts = urlsplit(origin)
        if parts.netloc.lower() != host.lower():
            return False
        # Behind a proxy with TLS a page of ours is https, and what reaches us is not. Only names that somebody
        # has let in have such a proxy; one of this machine with https is another program's.
        return parts.scheme == scheme or (parts.scheme == "https" and not is_local(host))

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit, deadline = _limit(scope), time.monotonic() + BODY_SECONDS
        received, complete = 0, False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()  # waits for the client to go away
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, "The body did not arrive in time.", CLOSE) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise HTTPException(413, f"The body is larger than {limit} bytes.", CLOSE)
            return message

        await self.app(scope, limited, send)


def _limit(scope: Scope) -> int:
    return INGEST_BODY if scope["path"] in UNMETERED else BODY


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def is_local(host: str) -> bool:
    """Whether a Host header names this machine in a way that only this machine uses."""
    return _name(host) in LOCAL


def _name(host: str) -> str:
    """Return a host without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isascii() and port.isdigit() else host).lower()


def _sender(scope: Scope, headers: Headers) -> str:
    return headers.get("authorization") or str((scope.get("client") or ("",))[0])


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


class _Meter:
    """A bucket of requests for each sender that fills up with time."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._buckets: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def admit(self, sender: str) -> bool:
        """Take one request out of a sender's bucket; False if it is empty."""
        now, key = time.monotonic(), hash(sender)
        left, then = self._buckets.pop(key, (2 * self.rate, now))
        left = min(2 * self.rate, left + (now - then) * self.rate)
        self._buckets[key] = (max(0.0, left - 1), now)
        while len(self._buckets) > 1000:
            self._buckets.popitem(last=False)
        return left >= 1
