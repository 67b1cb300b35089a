"""uvicorn's HTTP/1.1 connection with bounds on what comes before a body, and JSON refusals where it would write text.

Refused here, before any route or key is looked at: heads that are too large or too slow, and requests that a proxy in
front of us might understand differently, for want of one sensible `Host` or by an unknown coding. What a body may be
says `body.py`.

Nobody is talked to in another protocol: who offers to change it, as Java's client does with every first request, is
answered in HTTP/1.1.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from router.api import render
from router.api.sse import BODY_EXTENSION

MAX_HEAD_BYTES: Final = 65_536
MAX_HEADERS: Final = 100
HEAD_TIMEOUT_S: Final = 5.0
"""From a request's first byte to the end of its head."""

IDLE_TIMEOUT_S: Final = 30.0
"""From a connection's beginning to its first byte. Between requests uvicorn's own, shorter limit holds."""

MAX_PIPELINED: Final = 32
"""Requests kept while another one is answered; what comes behind them is as good as not sent."""

HOST: Final = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:\[\]%-]*")
"""https://www.rfc-editor.org/rfc/rfc3986#section-3.2: registered names, addresses and ports, without user names."""

REFUSALS: Final[Mapping[HTTPStatus, str]] = {
    HTTPStatus.BAD_REQUEST: "Invalid HTTP request",
    HTTPStatus.REQUEST_TIMEOUT: f"The head of the request did not come within {HEAD_TIMEOUT_S:.0f} seconds",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        f"The head of the request has more than {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} fields"
    ),
}


class RefusedHead(Exception):
    """Raised in the parser's callbacks; it ends the parsing, and the reason is kept beside it."""


class Connection(HttpToolsProtocol):
    """One client's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        """Of a head, or of trailers, which are no less."""
        self._is_in_head = False
        self._is_in_trailers = False
        self._ends_another = False
        """Whether what comes begins with the rest of the request before."""
        self._is_over = False
        """Whether what still comes is not looked at."""
        self._refusal = HTTPStatus.BAD_REQUEST
        self._patience: asyncio.TimerHandle | None = None
        """Ends a connection that keeps us waiting."""
        self._answering: RequestResponseCycle | None = None
        """The request that is being answered or was last; `cycle` is the one that came last."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(IDLE_TIMEOUT_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_over:
            return
        was_in_trailers, self._ends_another = self._is_in_trailers, False
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as stopped:
            self._decline_upgrade(data[stopped.args[0] :])
        except HttpParserError:
            self._refuse(self._refusal)
        is_all_head = self._is_in_head and not self._ends_another
        if is_all_head or (was_in_trailers and self._is_in_trailers):
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_head_bytes, self._is_in_head = 0, True
        self._stop_waiting()
        self._patience = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, HTTPStatus.REQUEST_TIMEOUT)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Reads the request again without the offer, at which the parser has stopped; `rest` came behind its head."""
        line = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [(name, value) for name, value in self.headers if name not in (b"connection", b"upgrade")]
        head = [line, *(name + b": " + value for name, value in kept)]
        if not self.parser.should_keep_alive():
            head.append(b"connection: close")
        self.parser = HttpRequestParser(self)
        self.data_received(b"\r\n".join((*head, b"", rest)))

    def on_chunk_header(self) -> None:
        """Behind the last one come trailers, and of which it is the last nothing is said."""
        self._num_head_bytes, self._is_in_trailers = 0, True

    def on_body(self, body: bytes) -> None:
        self._is_in_trailers = False
        if self.pipeline and len(self.cycle.body) + len(body) > HIGH_WATER_LIMIT:
            # uvicorn would stop reading, and not notice that the client leaves: the request is as good as not sent.
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answering  # type: ignore[assignment]
            raise RefusedHead
        super().on_body(body)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_trailers:
            return
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise RefusedHead

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_waiting()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise RefusedHead
        hosts = [value for name, value in self.headers if name == b"host"]
        num_needed = 0 if self.parser.get_http_version() == "1.0" else 1
        if not num_needed <= len(hosts) <= 1 or not all(map(HOST.fullmatch, hosts)):
            raise RefusedHead
        if self.parser.get_method() == b"CONNECT" or len(self.pipeline) == MAX_PIPELINED:
            raise RefusedHead
        if any(value.lower() != b"chunked" for name, value in self.headers if name == b"transfer-encoding"):
            raise RefusedHead
        if not self.parser.should_upgrade():
            self.expect_100_continue &= self.parser.get_http_version() != "1.0"  # whose clients know one answer only
            super().on_headers_complete()
            if self.scope["http_version"] != "1.0":
                self.scope["extensions"] = {BODY_EXTENSION: {"body": ChunkedBody(self.transport)}}
            if self.pipeline:
                self.flow.resume_reading()  # uvicorn keeps from it, and would not notice that the client leaves

    def on_message_complete(self) -> None:
        self._is_in_trailers, self._ends_another = False, True
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        if cycle.scope["http_version"] == "1.0":
            app = partial(_call_without_chunks, app, cycle)
        super()._start_asgi_task(cycle, app)

    def _refuse(self, status: HTTPStatus) -> None:
        """Ends the connection; an answer that is being written comes first, and nothing behind it."""
        self._is_over = True
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            return
        body = render.to_bytes({"error": REFUSALS[status]})
        head = (
            f"HTTP/1.1 {status} {status.phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        )
        self.transport.write("\r\n".join((*head, "", "")).encode() + body)
        self.transport.close()


async def _call_without_chunks(
    app: ASGIApp, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send
) -> None:
    """uvicorn chunks bodies of unknown length. HTTP/1.0 knows no chunks: they end with the connection."""

    async def send_whole(message: Message) -> None:
        if message["type"] == "http.response.start":
            cycle.chunked_encoding = False
        cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_whole)


class ChunkedBody:
    """The `Body` of an answer whose head uvicorn has written, without a content-length, and whose end it will write,
    and will wait with until the client has read enough."""

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        transport = self._transport
        if not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            transport.abort()  # else a client that only closed its own side could be told the end without this
