"""Server-sent events as TGI's clients need them, and what to do when a client goes away.

Exactly `data: ` + compact JSON + two LF, one write per event: no CRLF, comments, pings or `[DONE]`, each of which some
client stumbles over.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any, Final, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

STREAM_HEADERS: Final = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}

LINE_ENDS_OF_PYTHON: Final = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029")
"""Clients that split lines as `str.splitlines` does, httpx among them, would cut an event here."""


ERROR: Final = b'data: {"error":'
"""How the frame of an error begins, on every route, and no other frame does."""


BODY_EXTENSION: Final = "shardstream.body"
"""The ASGI extension by which our server offers a `Body`, as its "body"."""


class Body(Protocol):
    """A streamed body that is written at once, by whoever has something to write.

    Through ASGI each piece is a message that six coroutines hand on, in a task that has to be woken for it.
    """

    def write(self, data: bytes) -> None:
        """Goes nowhere when the client has left. What it is too slow for is kept."""


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def frame(payload: bytes) -> bytes:
    """One event."""
    return b"data: %b\n\n" % one_line(payload)


def one_line(json: bytes) -> bytes:
    """The same JSON without line ends of any kind: they can only stand inside strings, and may as well be escaped."""
    if not json.isascii():
        for char, escape in LINE_ENDS_OF_PYTHON:
            json = json.replace(char, escape)
    return json


def is_error(frame: bytes) -> bool:
    return frame.startswith(ERROR)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or `ClientGone` as soon as the client disconnects; `work` is cancelled and awaited then.

    Needs a request whose body has been read: what `receive` gives after it can only be the disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Writes frames as they are put, until they end or the client goes; lets go of what it holds either way.

    A client that reads slowly keeps nobody waiting: what it has not read is kept, and an answer has an end.
    """

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__(headers=STREAM_HEADERS | headers)
        del self.headers["content-length"]
        self._body: Body | None = None
        """Where frames go, as soon as there is one."""
        self._frames: deque[bytes] = deque()
        """Those that came before."""
        self._has_begun = False
        """Whether there is something to say other than an error."""
        self._is_over = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._held = AsyncExitStack()

    def put(self, data: bytes) -> None:
        """The next frame. Behind the end there is none: other choices may go on for a while when one has failed."""
        if self._is_over:
            return
        if self._body is not None:
            self._body.write(data)
        else:
            self._frames.append(data)
            self._has_begun = True
            self._changed.set()

    def end(self) -> None:
        self._is_over = True
        self._changed.set()

    def fail(self, error: Exception, *frames: bytes) -> None:
        """The frames tell it to a client who has had others; else `begin` raises the error."""
        if self._has_begun:
            for data in frames:
                self.put(data)
        elif self._error is None:
            self._error = error
        self.end()

    async def begin(self) -> None:
        """Waits for the first frame. Raises what there was instead, which so has a status of its own."""
        await self._have_news()
        if self._error is not None:
            raise self._error

    def hold(self, held: AsyncExitStack) -> None:
        """Keeps what the frames are made of until they are written."""
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            with suppress(ClientGone):
                await unless_gone(receive, self._write(scope, send))

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._body = scope.get("extensions", {}).get(BODY_EXTENSION, {}).get("body")
        while await self._have_news():
            data = self._frames.popleft()
            if self._body is not None:
                self._body.write(data)
            else:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _have_news(self) -> bool:
        """Waits for a frame that nobody has written. False: they have ended."""
        while not (self._frames or self._is_over):
            self._changed.clear()
            await self._changed.wait()
        return bool(self._frames)
