"""Frames are written by whoever publishes a token while the client keeps up, and none is lost when it does not."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest
import uvicorn
from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from router.api.admission import Call
from router.api.connection import Connection
from router.api.openai_run import Choice, arriving
from router.api.sse import BODY_EXTENSION, EventStream, Frames
from router.core.request import FinishReason, Request
from router.engine import Finish, Generation, TokenEvent
from router.errors import GenerationFailed
from tests.engines import greedy
from tests.http_app import CONFIG, PARIS, FakeEngine, Script, build, listening
from tests.server import PATIENCE_S

LAST = Finish(FinishReason.LENGTH, "", 1)


class FakeBody:
    """Full behind every `room` frames, until it is drained."""

    def __init__(self, room: int = 1000) -> None:
        self.written: list[bytes] = []
        self.drained = asyncio.Event()
        self._room = room
        self._num_free = room

    @property
    def is_full(self) -> bool:
        return self._num_free == 0

    def write(self, data: bytes) -> None:
        assert self._num_free > 0, "it was full"
        self._num_free -= 1
        self.written.append(data)

    async def drain(self) -> None:
        await self.drained.wait()
        self._num_free = self._room


def frames_of(generation: Generation) -> Frames:
    for event in generation.arriving():
        yield None if event is None else b"%d" % event.index


def event(index: int, *, last: bool = False) -> TokenEvent:
    return TokenEvent(index, PARIS[0], finish=LAST if last else None)


def begin(generation: Generation, body: FakeBody, frames: Frames | None = None) -> asyncio.Task[None]:
    """The stream being written, to a client that stays."""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        assert not message.get("body"), "frames take the short way"

    stream = EventStream(frames or frames_of(generation), [generation], {})
    scope = {"type": "http", "extensions": {BODY_EXTENSION: {"body": body}}}
    return asyncio.create_task(stream(scope, receive, send))


def new_generation() -> Generation:
    return Generation(greedy([1, 2], 9), lambda _: None)


async def settle() -> None:
    """Lets everything happen that can."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_who_publishes_writes_at_once() -> None:
    async def act() -> None:
        generation, body = new_generation(), FakeBody()
        generation.publish(event(1))
        writing = begin(generation, body)
        await settle()
        assert body.written == [b"1"]

        generation.publish(event(2))
        assert body.written == [b"1", b"2"]
        generation.publish(event(3, last=True))
        assert body.written == [b"1", b"2", b"3"]
        await writing

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


def test_a_slow_client_is_waited_for_and_misses_nothing() -> None:
    async def act() -> None:
        generation, body = new_generation(), FakeBody(room=2)
        writing = begin(generation, body)
        await settle()
        for index in range(1, 6):
            generation.publish(event(index))
        assert body.written == [b"1", b"2"]

        body.drained.set()
        await settle()
        generation.publish(event(6, last=True))
        await writing
        assert body.written == [b"%d" % index for index in range(1, 7)]

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


def test_what_goes_wrong_ends_the_stream_and_not_the_publisher() -> None:
    def broken() -> Frames:
        yield None
        raise ZeroDivisionError

    async def act() -> None:
        generation = new_generation()
        writing = begin(generation, FakeBody(), broken())
        await settle()
        assert not writing.done()

        generation.publish(event(1))
        with pytest.raises(ZeroDivisionError):
            await writing
        generation.publish(event(2, last=True))

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


def test_nothing_is_written_for_a_client_that_left() -> None:
    async def act() -> None:
        generation, body = new_generation(), FakeBody()
        writing = begin(generation, body)
        generation.publish(event(1))
        await settle()
        assert body.written == [b"1"]

        writing.cancel()
        await asyncio.wait((writing,))
        generation.publish(event(2, last=True))
        assert body.written == [b"1"]

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


def test_who_wants_all_events_is_woken_by_the_last() -> None:
    async def act() -> None:
        generation = new_generation()
        reading = generation.read_all()
        waiting = reading.send(None)
        generation.publish(event(1))
        assert not waiting.done()
        generation.publish(event(2, last=True))
        assert waiting.done()

        with pytest.raises(StopIteration) as returned:
            reading.send(None)
        assert returned.value.value == [event(1), event(2, last=True)]

    asyncio.run(act())


def test_who_wants_all_events_is_told_what_a_sequence_failed_with() -> None:
    async def act() -> None:
        generation = new_generation()
        reading = asyncio.create_task(generation.read_all())
        await settle()
        generation.publish(event(1))
        generation.fail(GenerationFailed("it broke"))

        with pytest.raises(GenerationFailed, match="it broke"):
            await reading

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


NUM_TOKENS = 400


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Of an application behind our connections that writes megabytes at once."""
    tokens = [PARIS[0]._replace(text=f"{index} " + "x" * 20_000) for index in range(NUM_TOKENS)]
    engine = FakeEngine([Script(tokens, reason=FinishReason.LENGTH)])
    config = uvicorn.Config(
        build(engine, replace(CONFIG, response_cache_bytes=100_000_000)),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
    )
    with listening(config) as address:
        yield address


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("/generate_stream", {"inputs": "a", "parameters": {"seed": 1}}),
        ("/generate_stream", {"inputs": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True, "temperature": 1, "seed": None}),
    ],
    ids=["kept for others", "native", "openai"],
)
def test_megabytes_reach_a_client_that_reads_late(
    address: tuple[str, int], route: str, asked: dict[str, object]
) -> None:
    body = json.dumps(asked)
    head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection(address, timeout=PATIENCE_S) as client:
        client.sendall(f"{head}connection: close\r\n\r\n{body}".encode())
        threading.Event().wait(0.2)  # until its buffers are full
        received = b"".join(iter(lambda: client.recv(1 << 20), b""))

    places = [received.find(f'"{index} xxx'.encode()) for index in range(NUM_TOKENS)]
    assert -1 not in places
    assert places == sorted(places)
    assert received.endswith(b"\r\n0\r\n\r\n")


class FakeTransport(asyncio.Transport):
    """Takes everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def resume_reading(self) -> None:
        pass


def connect(engine: FakeEngine) -> tuple[Connection, FakeTransport]:
    config = uvicorn.Config(build(engine), http=Connection, ws="none", lifespan="off", log_config=None)
    config.load()
    connection, transport = Connection(config, ServerState(), {}), FakeTransport()
    connection.connection_made(transport)
    return connection, transport


def asking() -> bytes:
    body = b'{"inputs":"a"}'
    head = b"POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


class HandedOver(FakeEngine):
    """Publishes nothing by itself."""

    generation: Generation | None = None

    def submit(self, request: Request) -> Generation:
        self.generation = Generation(request, self._cancel)
        self.generation.note_planned()
        return self.generation


@pytest.mark.parametrize("num_turns", range(8))
def test_a_client_that_leaves_about_its_first_token_is_no_error(
    num_turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def act() -> None:
        engine = HandedOver()
        connection, transport = connect(engine)
        connection.data_received(asking())
        await settle()
        assert engine.generation is not None
        engine.generation.publish(event(1))
        for _ in range(num_turns):
            await asyncio.sleep(0)

        transport.is_closed = True
        connection.connection_lost(None)
        await settle()

        assert engine.cancelled == [engine.generation.request]

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))
    assert "Exception in ASGI application" not in caplog.text


def test_a_head_that_is_cut_is_no_larger_for_what_came_with_its_beginning() -> None:
    async def act() -> None:
        connection, transport = connect(FakeEngine())
        body = b'{"inputs":"a"%b}' % (b" " * 65_450)
        head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        request = head % len(body) + body
        connection.data_received(request + request[:20])
        await settle()
        connection.data_received(request[20:])
        for _ in range(3):
            await settle()

        assert transport.written.count(b" 200 OK") == 2

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


def test_what_was_answered_is_freed_without_the_garbage_collector() -> None:
    async def ask(connection: Connection, request: bytes) -> None:
        for _ in range(10):
            connection.data_received(request)
            for _ in range(3):
                await settle()

    def alive() -> int:
        return sum(type(thing) in (Generation, RequestResponseCycle) for thing in gc.get_objects())

    async def act(request: bytes) -> None:
        connection, transport = connect(FakeEngine())
        await ask(connection, request)  # what is kept for ever is made by now
        gc.collect()
        gc.disable()
        try:
            before = alive()
            await ask(connection, request)
            assert alive() <= before + 1, "the last one may still be held by its connection"
        finally:
            gc.enable()
        assert transport.written.count(b" 200 OK") == 20

    asyncio.run(asyncio.wait_for(act(asking()), PATIENCE_S))
    asyncio.run(asyncio.wait_for(act(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"), PATIENCE_S))


def test_what_other_choices_have_comes_before_the_failure_of_one() -> None:
    failing, other = new_generation(), new_generation()
    call = cast("Call", None)
    arrivals = arriving([Choice(0, call, failing), Choice(1, call, other)])
    assert next(arrivals) is None

    other.publish(event(1))
    failing.fail(GenerationFailed("it broke"))

    assert next(arrivals) == (Choice(1, call, other), event(1))
    with pytest.raises(GenerationFailed, match="it broke"):
        next(arrivals)
