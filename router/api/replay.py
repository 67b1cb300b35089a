"""Equal requests are answered once: from the cache if they were answered before, together if they come at once.

    request ─► key ─┬─ cached ─────────► Replay
                    ├─ in flight ──────► Replay, piece by piece as the flight writes it
                    └─ new: a Flight ──► Replay, and into the cache if all went well

A flight belongs to none of those who wait for it: whoever asked first may leave, and it is cancelled when the last one
has left. It records what the route writes, so a replay is the same bytes in the same writes.

Only requests that are answered alike every time take part (greedy ones, and drawn ones that bring a seed), unless the
operator wants all of them to. A client keeps out of it with `x-use-cache: false` or `options.use_cache`, as on the
hosted Inference API, whose routes always have a cache unless the operator wants none. Without a cache routes are not
touched at all.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager, suppress
from datetime import date
from typing import Final, NamedTuple

import orjson
from fastapi import Request, Response
from starlette.types import Message, Receive, Scope, Send

from router.api.body import Parsed, read_json
from router.api.middleware import TRACE_ID
from router.api.sse import ClientGone, is_error, unless_gone
from router.cache import Header, ResponseCache, StoredAnswer
from router.config import HOSTED_CACHE_BYTES, Config
from router.metrics import Metrics

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]

OFF: Final = ("false", "0")
TIMES: Final = frozenset(
    (b"x-total-time", b"x-validation-time", b"x-queue-time", b"x-inference-time", b"x-time-per-token")
)
"""Headers about work that a replay does not need. `x-compute-time` stays: what the answer took when it was made."""


class Piece(NamedTuple):
    """One write of a body."""

    data: bytes
    is_last: bool


class SharedAnswers:
    """The answers that are kept and those that are being made."""

    def __init__(self, config: Config, model_sha: str | None, metrics: Metrics) -> None:
        self.payload_limit = config.payload_limit
        self.keeps_sampled = config.response_cache_sampled
        self._model = f"{config.model_name}@{model_sha}".encode()
        self._metrics = metrics
        self._cache = ResponseCache(config.response_cache_bytes or HOSTED_CACHE_BYTES)
        self._flights: dict[bytes, Flight] = {}

    def key(self, route: str, parsed: Parsed) -> bytes:
        """Of all that an answer depends on: the order of fields too, for a schema's decides what is generated, and the
        date, for chat templates show it."""
        assert isinstance(parsed.value, dict), "it was fitted to a model"
        payload = {name: value for name, value in parsed.value.items() if name != "options"}
        parts = (self._model, str(date.today()).encode(), route.encode(), orjson.dumps(payload))
        return hashlib.sha256(b"\0".join(parts)).digest()

    async def answer(self, key: bytes, endpoint: Endpoint, request: Request) -> Response:
        """Raises what the endpoint raises, and `ClientGone` as soon as this request's own client has left."""
        stored = self._cache.get(key)
        if stored is not None:
            self._note("hit", request)
            return Replay(stored.headers, _pieces_of(stored))
        flight, is_new = self._board(key, endpoint, request)
        self._note("miss" if is_new else "joined", request)
        with ExitStack() as seat:
            seat.enter_context(flight.boarded())
            headers = await unless_gone(request.receive, flight.headers())
            return Replay(headers if is_new else _replayed(headers), flight.pieces(), seat.pop_all())

    def _board(self, key: bytes, endpoint: Endpoint, request: Request) -> tuple[Flight, bool]:
        """The flight of this key, and whether it is a new one."""
        running = self._flights.get(key)
        if running is not None and not running.is_abandoned:
            return running, False
        flight = self._flights[key] = Flight(endpoint, request, functools.partial(self._land, key))
        return flight, True

    def _land(self, key: bytes, flight: Flight) -> None:
        """The answer is complete, or will never be."""
        if self._flights.get(key) is flight:
            del self._flights[key]
        answer = flight.answer
        if answer is not None:
            self._cache.put(key, StoredAnswer(tuple(_replayed(answer.headers)), answer.parts))

    def _note(self, outcome: str, request: Request) -> None:
        self._metrics.count("shardstream_response_cache_count", label=outcome)
        if outcome != "miss":
            logger.info("Success request_id=%s trace_id=%s cache=%s", request.state.request_id, TRACE_ID.get(), outcome)


def shared(
    answers: SharedAnswers | None, route: str, is_repeatable: Callable[[Parsed], bool]
) -> Callable[[Endpoint], Endpoint]:
    """A decorator of routes: equal requests that are repeatable share one answer.

    `is_repeatable` raises what the route itself raises of a body that does not fit.
    """

    def decorate(endpoint: Endpoint) -> Endpoint:
        if answers is None:
            return endpoint

        @functools.wraps(endpoint)
        async def answer(request: Request) -> Response:
            parsed = await read_json(request, limit_bytes=answers.payload_limit)
            if _keeps_out(request, parsed) or not (is_repeatable(parsed) or answers.keeps_sampled):
                return await endpoint(request)
            return await answers.answer(answers.key(route, parsed), endpoint, request)

        return answer

    return decorate


def _keeps_out(request: Request, parsed: Parsed) -> bool:
    """Whether the client wants an answer made for itself."""
    return parsed.option("use_cache") is False or request.headers.get("x-use-cache", "").strip().lower() in OFF


class Flight:
    """One answer being made, for whoever waits for it."""

    def __init__(self, endpoint: Endpoint, request: Request, on_landed: Callable[[Flight], None]) -> None:
        self.is_abandoned = False
        self._headers: tuple[Header, ...] | None = None
        self._parts: list[bytes] = []
        self._is_complete = False
        self._failed = False
        self._num_waiting = 0
        self._news = asyncio.Event()
        self._on_landed = on_landed
        self._task = asyncio.create_task(self._fly(endpoint, request))
        self._task.add_done_callback(self._note_landed)

    async def _fly(self, endpoint: Endpoint, request: Request) -> None:
        """The request as it came, but from a client that never leaves."""
        response = await endpoint(Request(request.scope, receive=_nothing_more))
        await response({**request.scope, "extensions": {}}, _nothing_more, self._record)

    async def _record(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200, "whatever is no success is raised"
            self._headers = tuple(message["headers"])
        else:
            self._failed = self._failed or is_error(message["body"])
            self._parts.append(message["body"])
            self._is_complete = not message.get("more_body", False)
        if self._is_complete:
            self._on_landed(self)
        self._tell()

    def _tell(self) -> None:
        """Wakes all who wait, each of whom waits for the next event again."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _note_landed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # for those who wait; if nobody does, it need not be reported
        self._tell()
        if not self._is_complete:
            self._on_landed(self)

    @contextmanager
    def boarded(self) -> Iterator[None]:
        """The flight goes on for as long as anybody is in here."""
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            if not self._num_waiting and not self._is_complete:
                self.is_abandoned = True
                self._task.cancel()

    async def headers(self) -> tuple[Header, ...]:
        """As soon as the answer begins. Raises what the endpoint raised instead."""
        while self._headers is None:
            await self._next()
        return self._headers

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """All writes of the body, those to come as they come. Raises what ended the answer before its end."""
        num_given = 0
        while True:
            while num_given < len(self._parts):
                num_given += 1
                is_last = self._is_complete and num_given == len(self._parts)
                yield Piece(self._parts[num_given - 1], is_last)
                if is_last:
                    return
            await self._next()

    async def _next(self) -> None:
        if self._task.done():
            self._task.result()
            raise AssertionError("an answer ended before its end without an error")
        await self._news.wait()

    @property
    def answer(self) -> StoredAnswer | None:
        """All of it, if it is a good one."""
        if self._headers is None or not self._is_complete or self._failed:
            return None
        return StoredAnswer(self._headers, tuple(self._parts))


async def _nothing_more() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _pieces_of(answer: StoredAnswer) -> AsyncGenerator[Piece, None]:
    for index, part in enumerate(answer.parts, 1):
        yield Piece(part, index == len(answer.parts))


def _replayed(headers: Iterable[Header]) -> Iterator[Header]:
    for name, value in headers:
        if name == b"x-compute-type":
            yield name, b"cache"
        elif name not in TIMES:
            yield name, value


class Replay(Response):
    """Writes what was or is being written for somebody else; gives up its seat in the end."""

    def __init__(
        self,
        headers: Iterable[Header],
        pieces: AsyncGenerator[Piece, None],
        seat: AbstractContextManager[object] | None = None,
    ) -> None:
        super().__init__()
        self.raw_headers = list(headers)
        self._pieces = pieces
        self._seat = seat or ExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._seat:
            async with aclosing(self._pieces):
                with suppress(ClientGone):
                    await unless_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece.data, "more_body": not piece.is_last})
