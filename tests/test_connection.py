"""Requests that are not quite HTTP, over real sockets: refused as JSON at once, and the next one is served."""

from __future__ import annotations

import json
import socket
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
import uvicorn

from router.api import body, connection
from tests.http_app import PARIS, FakeEngine, Script, build, listening
from tests.server import PATIENCE_S, until

BODY = b'{"inputs":"a","parameters":{}}'
JSON = b"content-type: application/json"
HOST = b"host: x"
CLOSE = b"connection: close"
CHUNKED = b"transfer-encoding: chunked"
LENGTH = b"content-length: %d" % len(BODY)
OFFER = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAEAAEAAAAIAAAAB")
"""What Java's HttpClient sends along."""

GOOD_ANSWER = b'{"generated_text":" Paris"}'
TOO_LARGE = "The head of the request has more than 65536 bytes or 100 fields"
INVALID = "Invalid HTTP request"


class Answer(NamedTuple):
    status: int
    headers: list[bytes]
    body: bytes
    rest: bytes
    """What came behind the body."""

    @property
    def error(self) -> str:
        assert b"content-type: application/json" in self.headers
        return str(json.loads(self.body)["error"])


@pytest.fixture(scope="module")
def engine() -> HangingEngine:
    return HangingEngine()


@pytest.fixture(scope="module")
def address(engine: HangingEngine) -> Iterator[tuple[str, int]]:
    """Of the application behind our connections."""
    config = uvicorn.Config(
        build(engine),
        http=connection.Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=int(PATIENCE_S),
    )
    with listening(config) as address:
        yield address


class HangingEngine(FakeEngine):
    """An endless stream has one token and then waits."""

    def submit(self, request):  # type: ignore[no-untyped-def]
        self.scripts = [Script(PARIS[:1], hangs=True) if request.max_new_tokens == 7 else Script()]
        return super().submit(request)


def post(*headers: bytes, path: bytes = b"/generate", body: bytes = BODY, version: bytes = b"1.1") -> bytes:
    line = b"POST %b HTTP/%b" % (path, version)
    return b"\r\n".join((line, *headers, b"", body))


GOOD = post(HOST, JSON, LENGTH)


class Wire:
    """A connection, byte by byte."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=PATIENCE_S)
        self.received = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read_until(self, mark: bytes) -> bytes:
        """What came before `mark`; all that comes, if it is empty."""
        while not mark or mark not in self.received:
            part = self.socket.recv(65_536)
            if not part:
                assert not mark, f"the connection ended with {self.received!r}"
                return self._take(len(self.received))
            self.received += part
        return self._take(self.received.index(mark) + len(mark)).removesuffix(mark)

    def _take(self, num_bytes: int) -> bytes:
        taken, self.received = self.received[:num_bytes], self.received[num_bytes:]
        return taken

    def read_answer(self) -> Answer:
        line, *headers = self.read_until(b"\r\n\r\n").split(b"\r\n")
        [length] = [int(h.split(b":")[1]) for h in headers if h.startswith(b"content-length:")]
        while len(self.received) < length:
            self.received += self.socket.recv(65_536)
        return Answer(int(line.split()[1]), headers, self._take(length), b"")

    def is_ended(self) -> bool:
        """Whether the server closes without another word."""
        return self.read_until(b"") == b""


def ask(address: tuple[str, int], *parts: bytes) -> Answer:
    """The answer to a request of which the connection is not kept, whoever decides that."""
    with Wire(address) as wire:
        for part in parts:
            wire.send(part)
        answer = wire.read_answer()
        return answer._replace(rest=wire.read_until(b""))


def assert_still_serving(address: tuple[str, int]) -> None:
    assert ask(address, post(HOST, JSON, LENGTH, CLOSE)).body == GOOD_ANSWER


def many(num: int) -> list[bytes]:
    return [b"x-%d: 1" % index for index in range(num)]


BAD: dict[str, tuple[bytes, int, str]] = {
    "a large header": (post(HOST, JSON, LENGTH, b"x: " + b"a" * 65_536), 431, TOO_LARGE),
    "a large header that does not end": (post(HOST, b"x: " + b"a" * 66_000)[:-50], 431, TOO_LARGE),
    "a long path": (post(HOST, JSON, LENGTH, path=b"/" + b"a" * 65_500), 431, TOO_LARGE),
    "many headers": (post(HOST, JSON, LENGTH, *many(98)), 431, TOO_LARGE),
    "no host": (post(JSON, LENGTH), 400, INVALID),
    "two hosts": (post(HOST, HOST, JSON, LENGTH), 400, INVALID),
    "a host with a path": (post(b"host: x/generate?", JSON, LENGTH), 400, INVALID),
    "a host with a user": (post(b"host: a@x", JSON, LENGTH), 400, INVALID),
    "two lengths": (post(HOST, JSON, LENGTH, LENGTH), 400, INVALID),
    "length and chunks": (post(HOST, JSON, LENGTH, b"transfer-encoding: chunked"), 400, INVALID),
    "an unknown coding": (post(HOST, JSON, b"transfer-encoding: xchunked"), 400, INVALID),
    "a coding that hides another": (post(HOST, JSON, b"transfer-encoding: gzip, chunked"), 400, INVALID),
    "a folded header": (post(HOST, JSON, LENGTH, b"x: a\r\n b"), 400, INVALID),
    "a line end in a header": (post(HOST, JSON, LENGTH, b"x: a\nb: c"), 400, INVALID),
    "TLS": (bytes.fromhex("1603010200010001fc0303"), 400, INVALID),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, INVALID),
    "a tunnel": (b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n", 400, INVALID),
    "nonsense": (b"\x00\x01\x02\r\n\r\n", 400, INVALID),
}


@pytest.mark.parametrize(("sent", "status", "error"), BAD.values(), ids=BAD)
def test_bad_heads_are_refused_in_json_and_the_connection_ends(
    address: tuple[str, int], sent: bytes, status: int, error: str
) -> None:
    answer = ask(address, sent)

    assert (answer.status, answer.error) == (status, error)
    assert CLOSE in answer.headers
    assert answer.rest == b""
    assert_still_serving(address)


def test_a_head_of_megabytes_is_not_read_to_its_end(address: tuple[str, int]) -> None:
    with Wire(address) as wire:
        wire.send(b"GET / HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            send_megabytes(wire)
    assert_still_serving(address)


def test_trailers_of_megabytes_are_not_read_to_their_end(address: tuple[str, int]) -> None:
    with Wire(address) as wire:
        wire.send(post(HOST, JSON, CHUNKED, path=b"/no/such", body=b"1\r\n{\r\n0\r\nx: "))
        assert wire.read_answer().status == 404
        with pytest.raises(ConnectionError):
            send_megabytes(wire)
    assert_still_serving(address)


def test_trailers_change_nothing(address: tuple[str, int]) -> None:
    fields = b"".join(b"%b\r\n" % field for field in [*many(200), HOST])

    answer = ask(address, post(HOST, JSON, CLOSE, CHUNKED, body=b"1e\r\n" + BODY + b"\r\n0\r\n" + fields + b"\r\n"))

    assert (answer.status, answer.body) == (200, GOOD_ANSWER)


def send_megabytes(wire: Wire) -> None:
    for _ in range(50):
        wire.send(b"a" * 1_000_000)


@pytest.mark.parametrize(
    "sent",
    [
        post(HOST, JSON, LENGTH, CLOSE, *many(96)),
        post(HOST, JSON, LENGTH, CLOSE, b"x: " + b"a" * 65_000),
        post(b"host: [::1]:8080", JSON, LENGTH, CLOSE),
        post(b"host: a-b_c.example:80", JSON, LENGTH, CLOSE),
        post(b"host:", JSON, LENGTH, CLOSE),
        post(JSON, LENGTH, version=b"1.0"),
        post(JSON, LENGTH, b"expect: 100-continue", version=b"1.0"),
        post(HOST, JSON, CLOSE, b"transfer-encoding: Chunked", body=b"1e\r\n" + BODY + b"\r\n0\r\n\r\n"),
        post(
            HOST,
            JSON,
            CLOSE,
            b"transfer-encoding: chunked",
            body=b"".join(b"1\r\n%c\r\n" % c for c in BODY) + b"0\r\n\r\n",
        ),
    ],
)
def test_unusual_heads_are_served(address: tuple[str, int], sent: bytes) -> None:
    assert ask(address, sent).body == GOOD_ANSWER


@pytest.mark.parametrize("cut", [0, 1, len(BODY)])
def test_an_offer_of_another_protocol_is_declined_by_an_answer(address: tuple[str, int], cut: int) -> None:
    """Wherever the first packet ends."""
    sent = post(HOST, JSON, LENGTH, *OFFER)
    with Wire(address) as wire:
        wire.send(sent[: len(sent) - cut])
        wire.send(sent[len(sent) - cut :])
        first = wire.read_answer()
        wire.send(GOOD)
        second = wire.read_answer()

    assert (first.status, first.body) == (200, GOOD_ANSWER)
    assert (second.status, second.body) == (200, GOOD_ANSWER)


def test_a_websocket_is_an_ordinary_get(address: tuple[str, int]) -> None:
    handshake = (b"connection: Upgrade, close", b"upgrade: websocket", b"sec-websocket-key: x")

    answer = ask(address, b"\r\n".join((b"GET /health HTTP/1.1", HOST, *handshake, b"", b"")))

    assert (answer.status, answer.rest) == (200, b"")
    assert CLOSE in answer.headers


def test_pipelined_requests_are_answered_in_their_order(address: tuple[str, int]) -> None:
    with Wire(address) as wire:
        wire.send(GOOD * 20 + post(HOST, JSON, LENGTH, CLOSE, path=b"/no/such"))
        answers = [wire.read_answer() for _ in range(21)]

        assert [answer.status for answer in answers] == [200] * 20 + [404]
        assert wire.is_ended()


ASK_FOREVER = b'{"inputs":"a","parameters":{"max_new_tokens":7}}'
FOREVER = post(HOST, JSON, b"content-length: %d" % len(ASK_FOREVER), path=b"/generate_stream", body=ASK_FOREVER)
LARGE = post(HOST, JSON, b"content-length: 200000", body=BODY.ljust(200_000))


@pytest.mark.parametrize("behind", [b"", GOOD, GOOD * 3], ids=["alone", "with another behind it", "with three"])
@pytest.mark.parametrize("later", [b"", GOOD, LARGE], ids=["", "and one that comes later", "and a large one"])
def test_a_client_that_leaves_its_stream_ends_it(
    engine: HangingEngine, address: tuple[str, int], behind: bytes, later: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it has asked for behind it, which nobody computes any more."""
    num_requests, num_cancelled = len(engine.requests), len(engine.cancelled)
    with Wire(address) as wire:
        wire.send(FOREVER + behind)
        wire.read_until(b'"details":null}\n\n\r\n')
        wire.send(later)

    until(lambda: len(engine.cancelled) > num_cancelled)
    assert_still_serving(address)
    assert len(engine.requests) - num_requests == 1 + 1
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_a_large_request_right_behind_an_answer_is_served(address: tuple[str, int]) -> None:
    stream = post(HOST, JSON, LENGTH, path=b"/generate_stream")
    with Wire(address) as wire:
        for _ in range(20):
            wire.send(stream)
            wire.read_until(b"\r\n0\r\n\r\n")
            wire.send(LARGE)
            assert wire.read_answer().body == GOOD_ANSWER


def test_no_more_than_some_requests_are_kept_while_an_answer_is_due(address: tuple[str, int]) -> None:
    with Wire(address) as wire:
        wire.send(GOOD * (connection.MAX_PIPELINED + 3))

        for _ in range(connection.MAX_PIPELINED + 1):
            assert wire.read_answer().body == GOOD_ANSWER
        assert wire.is_ended()


def test_a_stream_of_the_first_http_is_not_chunked_and_ends_with_the_connection(address: tuple[str, int]) -> None:
    with Wire(address) as wire:
        wire.send(post(JSON, LENGTH, path=b"/generate_stream", version=b"1.0"))
        head, body = wire.read_until(b"\r\n\r\n").lower(), wire.read_until(b"")

    assert b"transfer-encoding" not in head
    assert b"\r\nconnection: close" in head
    *events, rest = body.split(b"\n\n")
    assert [json.loads(event.removeprefix(b"data: "))["index"] for event in events] == [1, 2]
    assert rest == b""


# What keeps us waiting


SHORT_S = 0.1
"""Only of the one wait that a test is about: any other might be as long on a busy machine."""


@pytest.fixture
def short_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", SHORT_S)


@pytest.fixture
def short_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "FIRST_BYTES_S", SHORT_S)


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_TIMEOUT_S", SHORT_S)


@pytest.mark.usefixtures("short_heads")
@pytest.mark.parametrize("begun", [b"P", b"POST /generate HTTP/1.1\r\nhost: x\r\n", GOOD[:-50]])
def test_a_head_that_does_not_end_is_a_408(address: tuple[str, int], begun: bytes) -> None:
    answer = ask(address, begun)

    assert (answer.status, answer.error) == (408, "The head of the request did not come within 5 seconds")


@pytest.mark.usefixtures("short_heads")
def test_the_second_head_is_waited_for_no_longer(address: tuple[str, int]) -> None:
    with Wire(address) as wire:
        wire.send(GOOD)
        first = wire.read_answer()
        wire.send(b"POST /gen")
        second = wire.read_answer()

    assert (first.status, second.status) == (200, 408)


@pytest.mark.usefixtures("short_bodies")
def test_a_body_that_does_not_end_is_a_408(address: tuple[str, int]) -> None:
    answer = ask(address, GOOD[:-1])

    assert (answer.status, answer.error) == (408, "The request body did not come in time")
    assert CLOSE in answer.headers
    assert_still_serving(address)


@pytest.mark.usefixtures("short_silence")
def test_who_says_nothing_is_left(address: tuple[str, int]) -> None:
    with Wire(address) as wire:
        assert wire.is_ended()


def test_many_who_say_nothing_are_in_nobodys_way(address: tuple[str, int]) -> None:
    with ExitStack() as idle:
        for _ in range(200):
            idle.enter_context(Wire(address))

        assert_still_serving(address)


@pytest.mark.usefixtures("short_heads")
@pytest.mark.parametrize("behind", [b"POST /gen", b"\x00\x01\r\n\r\n"])
def test_a_stream_is_not_disturbed_by_what_is_sent_behind_its_request(address: tuple[str, int], behind: bytes) -> None:
    """Neither by a head that is late nor by one that is bad: the stream's own client would read a 408 in it."""
    with Wire(address) as wire:
        wire.send(FOREVER)
        wire.read_until(b'"details":null}\n\n\r\n')
        wire.send(behind)
        wire.socket.settimeout(0.5)

        with pytest.raises(TimeoutError):
            wire.read_until(b"\n")


@pytest.mark.parametrize("behind", [b"GET / HTTP/1.1\r\nx: ", b"\r\n0\r\nx: "], ids=["head", "trailer"])
def test_what_does_not_end_is_not_kept_while_an_answer_is_due(address: tuple[str, int], behind: bytes) -> None:
    """A second head beside a stream, or the request's own trailers: neither can end the connection yet."""
    with Wire(address) as wire:
        wire.send(post(HOST, JSON, CHUNKED, path=b"/generate_stream", body=b"%x\r\n" % len(ASK_FOREVER) + ASK_FOREVER))
        tracemalloc.start()
        try:
            wire.send((b"\r\n0\r\n\r\n" if behind.startswith(b"GET") else b"") + behind)
            send_megabytes(wire)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert peak_bytes < 10_000_000


@pytest.mark.parametrize("num_sent", [0, 5])
def test_a_client_that_leaves_within_its_body_is_no_error(
    address: tuple[str, int], num_sent: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Wire(address) as wire:
        wire.send(post(HOST, JSON, LENGTH, body=BODY[:num_sent]))
    assert_still_serving(address)

    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
