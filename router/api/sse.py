"""Server-sent events as TGI's clients need them, and what to do when a client goes away.

Exactly `data: ` + compact JSON + two LF, one write per event: no CRLF, comments, pings or `[DONE]`, each of which some
client stumbles over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, suppress
from itertools import chain
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

Frames = Iterator[bytes | None]
"""Events in their order; None stands for as long as there is no new one, until it is asked again."""


class Source(Protocol):
    """Where new frames come from."""

    def subscribe(self, on_news: Callable[[], None]) -> None:
        """Has `on_news`, which must not raise, called with everything new from now on, and what was before no more."""


class Body(Protocol):
    """A streamed body that is written at once, by whoever has something to write.

    Through ASGI each piece is a message that six coroutines hand on, in a task that has to be woken for it.
    """

    @property
    def is_full(self) -> bool:
        """Whether the client is too slow for what is written already."""

    def write(self, data: bytes) -> None:
        """Goes nowhere when the client has left."""

    async def drain(self) -> None:
        """Waits until it is not full any more."""


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def frame(payload: bytes) -> bytes:
    """One event. `payload` is JSON, where these characters can only stand inside strings and may as well be escaped."""
    if not payload.isascii():
        for char, escape in LINE_ENDS_OF_PYTHON:
            payload = payload.replace(char, escape)
    return b"data: %b\n\n" % payload


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
    """Writes frames until they end or the client goes; lets go of what it holds either way."""

    def __init__(self, frames: Frames, sources: Iterable[Source], headers: dict[str, str]) -> None:
        super().__init__(headers=STREAM_HEADERS | headers)
        del self.headers["content-length"]
        self._frames = frames
        self._sources = sources
        self._held = AsyncExitStack()

    async def begin(self) -> None:
        """Waits for the first frame. Raises what the frames raise instead, which so has a status of its own."""
        news = self._news()
        while (first := next(self._frames)) is None:
            news.clear()
            await news.wait()
        self._frames = chain((first,), self._frames)

    def hold(self, held: AsyncExitStack) -> None:
        """Keeps what the frames are made of until they are written."""
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                with suppress(ClientGone):
                    await unless_gone(receive, self._write(scope, send))
            finally:
                self._subscribe(_ignore)  # its sources and what they call would else keep each other alive

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body: Body | None = scope.get("extensions", {}).get(BODY_EXTENSION, {}).get("body")
        if body is None:
            await self._send_frames(send)
        else:
            while not await self._pour(body):
                await body.drain()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_frames(self, send: Send) -> None:
        news = self._news()
        for data in self._frames:
            if data is not None:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            else:
                news.clear()
                await news.wait()

    async def _pour(self, body: Body) -> bool:
        """Has every frame written by whoever brings the news, in the same call, until they have ended (True) or the
        body is full (False)."""
        outcome: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def pour() -> None:
            if outcome.done():
                return
            try:
                for data in self._frames:
                    if data is None:
                        return
                    body.write(data)
                    if body.is_full:
                        outcome.set_result(False)
                        return
                outcome.set_result(True)
            except Exception as error:
                outcome.set_exception(error)

        self._subscribe(pour)
        pour()
        return await outcome

    def _news(self) -> asyncio.Event:
        """Set with every piece of news."""
        news = asyncio.Event()
        self._subscribe(news.set)
        return news

    def _subscribe(self, on_news: Callable[[], None]) -> None:
        for source in self._sources:
            source.subscribe(on_news)


def _ignore() -> None:
    """Nobody waits for news any more."""
