"""The response cache as clients see it: what is answered again, what is not, and who may leave in between."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import date

import anyio
import anyio.lowlevel
import pytest
from fastapi import Request, Response

from router.api import replay
from router.api.replay import shared
from router.core.request import Request as SequenceRequest
from router.engine import Generation, TokenEvent
from router.errors import GenerationFailed
from tests.http_app import CONFIG, PARIS, Client, FakeEngine, Json, Script, build

PROMPT = "The capital of France is"
GREEDY: Json = {"inputs": PROMPT, "parameters": {"details": True}}
MESSAGES = [{"role": "user", "content": "Hello"}]
TIMES = ("x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token")
ROOM = 1_000_000
CONFIG_WITH_CACHE = replace(CONFIG, response_cache_bytes=ROOM)

PLAIN: dict[str, Json] = {
    "/": GREEDY,
    "/generate": GREEDY,
    "/invocations": GREEDY,
    "/v1/completions": {"prompt": PROMPT, "temperature": 0},
    "/v1/chat/completions": {"messages": MESSAGES, "seed": 7},
    "/v1/responses": {"input": "Hello", "temperature": 0},
}
STREAMS: dict[str, Json] = {"/generate_stream": GREEDY} | {
    path: body | {"stream": True} for path, body in PLAIN.items() if path != "/generate"
}


def a_day(day: int) -> type[date]:
    return type("Day", (date,), {"today": classmethod(lambda cls: date(2024, 1, day))})


@pytest.fixture(autouse=True)
def _no_midnight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two requests of a test: another day is another request."""
    monkeypatch.setattr(replay, "date", a_day(1))


def caching(engine: FakeEngine | None = None, **settings: object) -> Client:
    return Client(engine, **({"response_cache_bytes": ROOM} | settings))


def compute_types(
    client: Client, path: str, body: Json, *, times: int = 2, headers: dict[str, str] | None = None
) -> list[str]:
    answers = [client.post(path, body, headers=headers) for _ in range(times)]
    assert [answer.status_code for answer in answers] == [200] * times
    return [answer.headers["x-compute-type"] for answer in answers]


MADE, CACHED = "gpu+optimized", "cache"


# What is answered again


@pytest.mark.parametrize("path", PLAIN)
def test_an_equal_request_is_given_the_same_bytes_again(path: str) -> None:
    client = caching()

    first, second = (client.post(path, PLAIN[path]) for _ in range(2))

    assert (first.status_code, second.status_code) == (200, 200)
    assert second.content == first.content
    assert [answer.headers["x-compute-type"] for answer in (first, second)] == [MADE, CACHED]
    assert len(client.engine.requests) == 1


def test_a_replay_tells_what_the_answer_took_and_nothing_of_work_it_did_not_do() -> None:
    client = caching()

    first, second = (client.post("/generate", GREEDY).headers for _ in range(2))

    assert second["x-compute-time"] == first["x-compute-time"]
    assert not [name for name in TIMES if name in second]
    for name in ("x-compute-characters", "x-prompt-tokens", "x-generated-tokens", "content-length", "content-type"):
        assert second[name] == first[name]


@pytest.mark.parametrize("path", STREAMS)
def test_streams_are_given_again_event_by_event(path: str) -> None:
    async def ask_twice() -> tuple[Asgi, Asgi]:
        async with Asgi.calling(app, path, STREAMS[path]) as first:
            await first.end.wait()
        async with Asgi.calling(app, path, STREAMS[path]) as second:
            await second.end.wait()
        return first, second

    engine = FakeEngine()
    app = build(engine, CONFIG_WITH_CACHE)

    first, second = anyio.run(ask_twice)

    assert len(first.writes) > 2
    assert second.writes == first.writes
    assert all(write.endswith(b"\n\n") for write in first.writes[:-1])
    assert first.writes[-1] == b""
    assert (first.headers["x-compute-type"], second.headers["x-compute-type"]) == (MADE, CACHED)
    assert second.headers["content-type"] == "text/event-stream"
    assert len(engine.requests) == 1


def test_sagemakers_route_shares_with_the_one_it_stands_for() -> None:
    client = caching()

    assert compute_types(client, "/", GREEDY, times=1) == [MADE]
    assert compute_types(client, "/invocations", GREEDY, times=1) == [CACHED]


def test_every_client_keeps_its_own_id_and_trace() -> None:
    client = caching()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client.post("/generate", GREEDY, headers={"x-request-id": "one", "traceparent": trace})

    second = client.post("/generate", GREEDY, headers={"x-request-id": "two"})

    assert second.headers["x-compute-type"] == CACHED
    assert second.headers["x-request-id"] == "two"
    assert "traceparent" not in second.headers


def test_replays_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    client = caching()
    client.post("/generate", GREEDY)
    caplog.clear()

    with caplog.at_level(logging.INFO, logger="router"):
        client.post("/generate", GREEDY, headers={"x-request-id": "two"})

    assert [record.getMessage() for record in caplog.records] == ["Success request_id=two trace_id=None cache=hit"]
    metrics = client.get("/metrics").text
    assert 'shardstream_response_cache_count{outcome="hit"} 1.0' in metrics
    assert 'shardstream_response_cache_count{outcome="miss"} 1.0' in metrics


# What is not


def test_without_a_cache_every_request_is_computed() -> None:
    client = Client()

    assert compute_types(client, "/generate", GREEDY) == [MADE, MADE]
    assert len(client.engine.requests) == 2


def test_without_a_cache_a_route_is_left_as_it_is() -> None:
    async def endpoint(request: Request) -> Response:
        raise AssertionError

    assert shared(None, "/", lambda _: True)(endpoint) is endpoint


@pytest.mark.parametrize(
    ("headers", "options"),
    [
        ({"x-use-cache": "false"}, {}),
        ({"x-use-cache": "0"}, {}),
        ({"X-Use-Cache": "False"}, {}),
        ({}, {"options": {"use_cache": False}}),
        ({"x-use-cache": "true"}, {"options": {"use_cache": False}}),
    ],
)
def test_who_wants_no_cache_has_an_answer_computed(headers: dict[str, str], options: Json) -> None:
    client = caching()
    compute_types(client, "/generate", GREEDY, times=1)

    assert compute_types(client, "/generate", GREEDY | options, headers=headers) == [MADE, MADE]
    assert compute_types(client, "/generate", GREEDY, times=1) == [CACHED]


@pytest.mark.parametrize(
    ("headers", "options"),
    [
        ({"x-use-cache": "true"}, {}),
        ({"x-use-cache": "1"}, {}),
        ({"x-use-cache": "?"}, {}),
        ({}, {"options": {"use_cache": True, "wait_for_model": True}}),
        ({}, {"options": None}),
        ({}, {"options": "x"}),
        ({}, {"options": {"use_cache": None}}),
    ],
)
def test_everything_else_about_options_makes_no_difference(headers: dict[str, str], options: Json) -> None:
    client = caching()
    compute_types(client, "/generate", GREEDY, times=1)

    assert compute_types(client, "/generate", GREEDY | options, times=1, headers=headers) == [CACHED]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": PROMPT}),
        ("/generate", {"inputs": PROMPT, "parameters": {"temperature": 0.5}}),
        ("/generate", {"inputs": PROMPT, "parameters": {"do_sample": True, "best_of": 2}}),
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/responses", {"input": "Hello"}),
    ],
)
def test_what_is_drawn_anew_each_time_is_kept_only_on_demand(path: str, body: Json) -> None:
    assert compute_types(caching(), path, body) == [MADE, MADE]
    assert compute_types(caching(response_cache_sampled=True), path, body) == [MADE, CACHED]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": PROMPT, "parameters": {"do_sample": True, "seed": 0}}),
        ("/v1/completions", {"prompt": PROMPT, "seed": 0}),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0}),
        ("/v1/chat/completions", {"messages": MESSAGES, "generation_config": {"do_sample": False}}),
    ],
)
def test_what_is_drawn_with_a_seed_or_not_drawn_is_kept(path: str, body: Json) -> None:
    assert compute_types(caching(), path, body) == [MADE, CACHED]


DIFFERENT: list[tuple[str, Json]] = [
    ("/", GREEDY),
    ("/generate", GREEDY),
    ("/generate_stream", GREEDY),
    ("/", GREEDY | {"stream": True}),
    ("/generate", GREEDY | {"model": "another"}),
    ("/generate", GREEDY | {"inputs": PROMPT + " "}),
    ("/generate", {"inputs": PROMPT, "parameters": {"details": False}}),
    ("/generate", {"inputs": PROMPT, "parameters": {"details": True, "seed": 1}}),
    ("/v1/chat/completions", {"messages": MESSAGES, "seed": 7, "chat_template_kwargs": {"a": 1, "b": 2}}),
    ("/v1/chat/completions", {"messages": MESSAGES, "seed": 7, "chat_template_kwargs": {"b": 2, "a": 1}}),
]
"""The last two differ in the order of fields, which a template or a schema may show."""


def test_different_requests_have_different_answers() -> None:
    client = caching()

    assert [compute_types(client, path, body, times=1) for path, body in DIFFERENT] == [[MADE]] * len(DIFFERENT)
    assert [compute_types(client, path, body, times=1) for path, body in DIFFERENT] == [[CACHED]] * len(DIFFERENT)


def test_another_day_is_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    client = caching()
    body = PLAIN["/v1/chat/completions"]
    assert compute_types(client, "/v1/chat/completions", body) == [MADE, CACHED]

    monkeypatch.setattr(replay, "date", a_day(2))

    assert compute_types(client, "/v1/chat/completions", body) == [MADE, CACHED]


def test_layout_of_the_json_makes_no_difference() -> None:
    client = caching()
    client.post_raw("/generate", b'{"inputs":"\xc3\xa9","parameters":{}}')

    again = client.post_raw("/generate", b' {"inputs" : "\\u00e9",\n"parameters":{}}')

    assert again.headers["x-compute-type"] == CACHED


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_failures_are_not_kept(path: str) -> None:
    engine = FakeEngine([Script((), error=GenerationFailed("x")), Script()])
    client = caching(engine)

    statuses = [client.post(path, GREEDY).status_code for _ in range(2)]

    assert statuses == [424, 200]
    assert compute_types(client, path, GREEDY, times=1) == [CACHED]


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/chat/completions", "/v1/responses"])
def test_streams_that_failed_within_are_not_kept(path: str) -> None:
    client = caching(FakeEngine([Script(PARIS[:1], error=GenerationFailed("x")), Script()]))

    first = client.post(path, STREAMS[path])

    assert first.status_code == 200
    assert '{"error":' in first.text
    assert compute_types(client, path, STREAMS[path]) == [MADE, CACHED]


def test_refusals_are_told_as_without_a_cache() -> None:
    bodies = [b"{", b"{}", b'{"inputs":5}', b'{"inputs":"a","parameters":{"temperature":-1}}', b'{"inputs":""}']

    for raw in bodies * 2:
        plain, cached = Client().post_raw("/generate", raw), caching().post_raw("/generate", raw)

        assert (cached.status_code, cached.content) == (plain.status_code, plain.content)
        assert cached.status_code >= 400


def test_answers_larger_than_the_cache_are_not_kept() -> None:
    assert compute_types(caching(response_cache_bytes=100), "/generate", GREEDY) == [MADE, MADE]


def test_a_replay_needs_the_key_too() -> None:
    client = caching(api_key="sesame")
    key = {"authorization": "Bearer sesame"}
    assert compute_types(client, "/generate", GREEDY, headers=key) == [MADE, CACHED]

    assert client.post("/generate", GREEDY).status_code == 401


def test_a_replay_needs_no_group() -> None:
    client = caching()
    client.post("/generate", GREEDY)
    client.engine.refusal = GenerationFailed("the group is gone")

    assert compute_types(client, "/generate", GREEDY, times=1) == [CACHED]


# Requests that come at once


@dataclass
class SteppingEngine(FakeEngine):
    """Its sequences say what they are told to say, when they are told to."""

    generations: list[Generation] = field(default_factory=list)

    def submit(self, request: SequenceRequest) -> Generation:
        self.requests.append(request)
        generation = Generation(request, self._cancel)
        generation.note_planned()
        self.generations.append(generation)
        return generation

    def say(self, *indices: int) -> None:
        """Tokens of the only sequence, from 1; the last one ends it."""
        [generation] = self.generations
        script = Script()
        for index in indices:
            finish = script._finish() if index == len(PARIS) else None
            generation.publish(TokenEvent(index, PARIS[index - 1], (), finish))


@dataclass
class Asgi:
    """One client, as the server sees it."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    writes: list[bytes] = field(default_factory=list)
    end: anyio.Event = field(default_factory=anyio.Event)
    gone: anyio.Event = field(default_factory=anyio.Event)

    @classmethod
    @asynccontextmanager
    async def calling(cls, app: Callable[..., Awaitable[None]], path: str, body: Json) -> AsyncIterator[Asgi]:
        """Leaves at the latest when the block ends."""
        client, unread = cls(), [json.dumps(body).encode()]

        async def receive() -> Json:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await client.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Json) -> None:
            client.take(message)

        async def call() -> None:
            await app(scope, receive, send)
            client.end.set()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await settle()
            yield client
            client.gone.set()
            await client.end.wait()

    def take(self, message: Json) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]  # type: ignore[assignment]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}  # type: ignore[attr-defined]
        else:
            self.writes.append(message["body"])  # type: ignore[arg-type]

    async def leave(self) -> None:
        self.gone.set()
        await self.end.wait()
        await settle()


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(50):
        await anyio.lowlevel.checkpoint()


BOTH = pytest.mark.parametrize("path", ["/generate", "/generate_stream"])


@pytest.mark.anyio
@BOTH
async def test_equal_requests_at_once_are_computed_once(path: str) -> None:
    engine = SteppingEngine()
    app = build(engine, CONFIG_WITH_CACHE)
    async with (
        Asgi.calling(app, path, GREEDY) as one,
        Asgi.calling(app, path, GREEDY) as two,
        Asgi.calling(app, path, GREEDY) as three,
    ):
        engine.say(1, 2)
        for client in (one, two, three):
            await client.end.wait()

    assert len(engine.requests) == 1
    assert one.writes == two.writes == three.writes
    assert [client.headers["x-compute-type"] for client in (one, two, three)] == [MADE, CACHED, CACHED]
    assert [client.status for client in (one, two, three)] == [200] * 3
    assert engine.cancelled == []


@pytest.mark.anyio
async def test_who_joins_takes_no_place() -> None:
    engine = SteppingEngine()
    app = build(engine, replace(CONFIG_WITH_CACHE, max_concurrent_requests=1))
    async with Asgi.calling(app, "/generate", GREEDY) as one, Asgi.calling(app, "/generate", GREEDY) as two:
        async with Asgi.calling(app, "/generate", GREEDY | {"model": "x"}) as other:
            await other.end.wait()
        engine.say(1, 2)
        await two.end.wait()

    assert (one.status, two.status, other.status) == (200, 200, 429)


@pytest.mark.anyio
async def test_no_event_waits_for_a_later_one() -> None:
    engine = SteppingEngine()
    app = build(engine, CONFIG_WITH_CACHE)
    async with Asgi.calling(app, "/generate_stream", GREEDY) as first:
        engine.say(1)
        await settle()
        seen_by_the_first = len(first.writes)
        async with Asgi.calling(app, "/generate_stream", GREEDY) as late:
            seen_by_the_late = len(late.writes)
            engine.say(2)
            await late.end.wait()

    assert (seen_by_the_first, seen_by_the_late) == (1, 1)
    assert late.writes == first.writes
    assert len(first.writes) == 3


@pytest.mark.anyio
@BOTH
async def test_whoever_asked_first_may_leave(path: str) -> None:
    engine = SteppingEngine()
    app = build(engine, CONFIG_WITH_CACHE)
    async with Asgi.calling(app, path, GREEDY) as first, Asgi.calling(app, path, GREEDY) as second:
        engine.say(1)
        await settle()
        await first.leave()
        was_cancelled = list(engine.cancelled)
        engine.say(2)
        await second.end.wait()
    async with Asgi.calling(app, path, GREEDY) as third:
        await third.end.wait()

    assert was_cancelled == engine.cancelled == []
    assert second.status == 200
    assert third.writes == second.writes
    assert third.headers["x-compute-type"] == CACHED


@pytest.mark.anyio
@BOTH
async def test_when_the_last_one_leaves_nothing_goes_on(path: str) -> None:
    engine = SteppingEngine()
    app = build(engine, CONFIG_WITH_CACHE)
    async with Asgi.calling(app, path, GREEDY) as first, Asgi.calling(app, path, GREEDY) as second:
        await first.leave()
        one_left = list(engine.cancelled)
        await second.leave()

        assert one_left == []
        assert engine.cancelled == engine.requests
        engine.generations.clear()
        async with Asgi.calling(app, path, GREEDY) as third:
            engine.say(1, 2)
            await third.end.wait()

    assert (third.status, third.headers["x-compute-type"]) == (200, MADE)


@pytest.mark.anyio
@BOTH
async def test_a_failure_is_told_to_all_who_wait_and_forgotten(path: str) -> None:
    engine = SteppingEngine()
    app = build(engine, CONFIG_WITH_CACHE)
    async with Asgi.calling(app, path, GREEDY) as first, Asgi.calling(app, path, GREEDY) as second:
        engine.generations.pop().fail(GenerationFailed("x"))
        await second.end.wait()
    async with Asgi.calling(app, path, GREEDY) as third:
        engine.say(1, 2)
        await third.end.wait()

    assert (first.status, second.status, third.status) == (424, 424, 200)
    assert first.writes == second.writes
    assert third.headers["x-compute-type"] == MADE


@pytest.mark.anyio
async def test_who_wants_no_cache_joins_nobody() -> None:
    engine = SteppingEngine()
    app = build(engine, CONFIG_WITH_CACHE)
    own = GREEDY | {"options": {"use_cache": False}}
    async with Asgi.calling(app, "/generate", GREEDY), Asgi.calling(app, "/generate", own):
        assert len(engine.requests) == 2
