"""Frames are written by whoever publishes a token while the client keeps up, and none is lost when it does not."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import uvicorn
from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from router.api.connection import Connection
from router.api.sse import BODY_EXTENSION, EventStream
from router.core.request import FinishReason, Request
from router.engine import Finish, Generation, TokenEvent
from router.errors import GenerationFailed, NotReady
from tests.engines import greedy
from tests.http_app import CONFIG, PARIS, FakeEngine, Script, build, listening
from tests.server import PATIENCE_S

LAST = Finish(FinishReason.LENGTH, "", 1)


class FakeBody:
    """Takes everything at once."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


def event(index: int, *, last: bool = False) -> TokenEvent:
    return TokenEvent(index, PARIS[0], finish=LAST if last else None)


def stream_of(generation: Generation) -> EventStream:
    """Its frames are the numbers of its events."""
    stream = EventStream({})

    def write(event: TokenEvent) -> None:
        stream.put(b"%d" % event.index)
        if event.finish is not None:
            stream.end()

    generation.pass_on(write, lambda error: stream.fail(error, b"failed"))
    return stream


def begin(stream: EventStream, body: FakeBody) -> asyncio.Task[None]:
    """The stream being written, to a client that stays."""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        assert not message.get("body"), "frames take the short way"

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
        writing = begin(stream_of(generation), body)
        generation.publish(event(2))
        await settle()
        assert body.written == [b"1", b"2"]

        generation.publish(event(3))
        assert body.written == [b"1", b"2", b"3"]
        generation.publish(event(4, last=True))
        assert body.written == [b"1", b"2", b"3", b"4"]
        await writing

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


@pytest.mark.parametrize("is_early", [False, True])
def test_a_failure_is_told_behind_frames_and_raised_before_them(is_early: bool) -> None:
    async def act() -> None:
        generation, body = new_generation(), FakeBody()
        stream = stream_of(generation)
        if not is_early:
            generation.publish(event(1))
        generation.fail(GenerationFailed("it broke"))

        if is_early:
            with pytest.raises(GenerationFailed, match="it broke"):
                await stream.begin()
        else:
            await stream.begin()
            await begin(stream, body)
        assert body.written == ([] if is_early else [b"1", b"failed"])

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


def test_nothing_comes_behind_the_end() -> None:
    async def act() -> None:
        stream, body = EventStream({}), FakeBody()
        stream.put(b"1")
        writing = begin(stream, body)
        await settle()
        stream.fail(GenerationFailed("it broke"), b"failed")
        stream.put(b"2")
        stream.fail(GenerationFailed("the others too"), b"again")
        await writing

        assert body.written == [b"1", b"failed"]

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


def test_the_first_failure_is_raised_when_all_fail() -> None:
    async def act() -> None:
        stream = EventStream({})
        stream.fail(GenerationFailed("it broke"))
        stream.fail(NotReady("so it goes"))

        with pytest.raises(GenerationFailed, match="it broke"):
            await stream.begin()

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


def test_nothing_is_written_for_a_client_that_left() -> None:
    async def act() -> None:
        generation, body = Generation(greedy([1, 2], 9), Generation.drop), FakeBody()
        stream, held = stream_of(generation), AsyncExitStack()
        held.callback(generation.cancel)
        stream.hold(held)
        writing = begin(stream, body)
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
        self.is_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def connect(engine: FakeEngine) -> tuple[Connection, FakeTransport]:
    config = uvicorn.Config(build(engine), http=Connection, ws="none", lifespan="off", log_config=None)
    config.load()
    connection, transport = Connection(config, ServerState(), {}), FakeTransport()
    connection.connection_made(transport)
    return connection, transport


def asking(num_spaces: int = 0) -> bytes:
    body = b'{"inputs":"a"%b}' % (b" " * num_spaces)
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
        written = transport.written
        engine.generation.publish(event(2))
        await settle()

        assert transport.written == written
        assert engine.cancelled == [engine.generation.request]

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))
    assert "Exception in ASGI application" not in caplog.text


def test_an_answer_that_lacks_a_token_has_no_end() -> None:
    """A client may close its side while it has not read what was written yet: the connection is not lost till then."""

    async def act() -> None:
        engine = HandedOver()
        connection, transport = connect(engine)
        connection.data_received(asking())
        await settle()
        assert engine.generation is not None
        engine.generation.publish(event(1))
        await settle()

        transport.close()
        assert not transport.is_aborted
        engine.generation.publish(event(2, last=True))

        assert transport.is_aborted

    asyncio.run(asyncio.wait_for(act(), PATIENCE_S))


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


@pytest.mark.parametrize("num_before", [1, 3])
def test_a_large_request_is_not_kept_while_an_answer_is_due(num_before: int) -> None:
    async def act() -> None:
        connection, transport = connect(FakeEngine())

        connection.data_received(asking() * num_before + asking(100_000) + asking())
        for _ in range(10):
            await settle()

        assert transport.written.count(b" 200 OK") == num_before
        assert transport.is_closed

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
