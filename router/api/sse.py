"""Server-sent events as TGI's clients need them, and what to do when a client goes away.

Exactly `data: ` + compact JSON + two LF, one write per event: no CRLF, comments, pings or `[DONE]`, each of which some
client stumbles over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

STREAM_HEADERS: Final = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}

LINE_ENDS_OF_PYTHON: Final = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029")
"""Clients that split lines as `str.splitlines` does, httpx among them, would cut an event here."""


ERROR: Final = b'data: {"error":'
"""How the frame of an error begins, on every route, and no other frame does."""


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def frame(payload: bytes) -> bytes:
    """One event. `payload` is JSON, where these characters can only stand inside strings and may as well be escaped."""
    for char, escape in LINE_ENDS_OF_PYTHON:
        payload = payload.replace(char, escape)
    return b"data: " + payload + b"\n\n"


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
    """Writes the first frame and the others until they end or the client goes; closes their generator either way."""

    def __init__(self, first: bytes, frames: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(headers=STREAM_HEADERS | headers)
        del self.headers["content-length"]
        self._first = first
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._frames):
            try:
                await unless_gone(receive, self._write(send))
            except ClientGone:
                return

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for data in self._frames:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
