"""What happens around every route, as plain ASGI: request ids, traces, HEAD, and what browsers ask about origins.

Nothing here buffers, so streams pass byte for byte.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
"""What an id from outside may be: nothing that could forge a header or a log line."""

TRACE_PARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
"""https://www.w3.org/TR/trace-context/#traceparent-header: version, trace, parent, flags, and what is yet to come."""

TRACE_ID: Final[ContextVar[str | None]] = ContextVar("trace_id", default=None)
"""The trace that the request being served belongs to, for the log."""


class RequestId:
    """Takes the client's `x-request-id` or makes one, for the log and for the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class TraceContext:
    """Takes part in a client's trace: its id goes into the router's log and, with each sequence, into the shards', and
    its `traceparent` back with the answer.

    Steps have no parent: each serves many requests at once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("traceparent", "") if scope["type"] == "http" else ""
        trace_parent = TRACE_PARENT.fullmatch(given)
        if trace_parent is None:
            await self._app(scope, receive, send)
            return

        async def send_with_trace(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["traceparent"] = given
            await send(message)

        token = TRACE_ID.set(trace_parent[1])
        try:
            await self._app(scope, receive, send_with_trace)
        finally:
            TRACE_ID.reset(token)


class Head:
    """Answers HEAD as GET, on every route that has a GET; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class Cors:
    """Says which origins may read the answers, and answers every OPTIONS request itself, before routes and keys."""

    def __init__(self, app: ASGIApp, allow_origins: Sequence[str] = ()) -> None:
        self._app = app
        self._allow_origins = frozenset(allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowed = self._allowed_origin(Headers(scope=scope).get("origin"))

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["vary"] = "origin, access-control-request-method, access-control-request-headers"
                if allowed is not None:
                    headers["access-control-allow-origin"] = allowed
                    headers["access-control-expose-headers"] = "x-compute-type, x-compute-time"
            await send(message)

        if scope["method"] == "OPTIONS":
            await _answer_options(send_with_origin)
        else:
            await self._app(scope, receive, send_with_origin)

    def _allowed_origin(self, origin: str | None) -> str | None:
        if not self._allow_origins:
            return "*"
        return origin if origin in self._allow_origins else None


async def _answer_options(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET,POST"),
        (b"access-control-allow-headers", b"content-type"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
