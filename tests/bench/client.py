"""A client that is light enough to share the server's two cores.

While streams run, nothing happens but noting what arrived when; HTTP and JSON are taken apart when all is over. The
few calls that are not measured use the standard library's ordinary client.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

CALL_TIMEOUT_S: Final = 30.0

Json = Any
Arrival = tuple[float, bytes]
"""When (`time.perf_counter`), what."""


class BenchError(Exception):
    """Why there is nothing to measure, in one line."""


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """One answered stream: when it was asked for, and when each of its tokens arrived."""

    sent_at: float
    token_at: list[float]

    @property
    def first_token_s(self) -> float:
        return self.token_at[0] - self.sent_at

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.token_at, self.token_at[1:], strict=False)]


def call(url: str, path: str, body: Json = None) -> bytes:
    """An unmeasured request: POST if there is a body, else GET. Raises `BenchError`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:
            return bytes(answer.read())
    except OSError as error:
        raise BenchError(f"{url}{path}: {error}") from error


@dataclass(frozen=True, slots=True)
class Recording:
    """The bytes of one answer, and when they came."""

    sent_at: float
    arrivals: list[Arrival]

    def understood(self) -> StreamTimes:
        """Raises `BenchError` if anything but tokens came back."""
        return StreamTimes(self.sent_at, token_times(self.arrivals))


async def record(url: str, body: Mapping[str, Json], path: str = "/generate_stream") -> Recording:
    """Reads an answer to its end. Raises `BenchError` if there is nobody to ask."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    payload = json.dumps(body).encode()
    head = (
        f"POST {parts.path}{path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\nconnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    sent_at = time.perf_counter()
    try:
        transport, recorder = await loop.create_connection(lambda: _Recorder(ended), host, port)
    except OSError as error:
        raise BenchError(f"{url}: {error}") from error
    try:
        transport.write(head.encode() + payload)
        await ended
    finally:
        transport.close()  # Whoever gives up waiting wants the server to give up too.
    return Recording(sent_at, recorder.arrivals)


class _Recorder(asyncio.Protocol):
    def __init__(self, ended: asyncio.Future[None]) -> None:
        self.arrivals: list[Arrival] = []
        self._ended = ended

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


def token_times(arrivals: Sequence[Arrival]) -> list[float]:
    """When each token event of a recorded HTTP answer was complete. Raises `BenchError` with what came instead."""
    times = []
    for at, event in server_sent_events(arrivals):
        payload = json.loads(event.removeprefix(b"data:"))
        if "token" not in payload:
            raise BenchError(f"in the stream: {json.dumps(payload)[:300]}")
        times.append(at)
    if not times:
        raise BenchError("the stream ended without a token")
    return times


def server_sent_events(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """The events of a whole HTTP answer, each when it was complete. Raises `BenchError` if it is not one with a 200."""
    status, body = _unchunked(arrivals)
    if status != 200:
        raise BenchError(f"HTTP {status}: {b''.join(data for _, data in body)[:300].decode(errors='replace')}")
    events: list[Arrival] = []
    pending = b""
    for at, data in body:
        *complete, pending = (pending + data).split(b"\n\n")
        events.extend((at, event) for event in complete if event)
    return events


def _unchunked(arrivals: Sequence[Arrival]) -> tuple[int, list[Arrival]]:
    """Status and body of an answer, chunked (RFC 9112, section 7.1) or not; a chunk arrives with its last byte."""
    whole = b"".join(data for _, data in arrivals)
    head, separator, rest = whole.partition(b"\r\n\r\n")
    if not separator:
        raise BenchError("the connection closed before an answer")
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" not in head.lower():
        return status, [(arrivals[-1][0], rest)]
    clock = _Clock(arrivals)
    body: list[Arrival] = []
    start = len(head) + len(separator)
    while (line_end := whole.find(b"\r\n", start)) >= 0:
        size = int(whole[start:line_end].split(b";")[0], 16)
        if size == 0:
            return status, body
        end = line_end + 2 + size
        body.append((clock.at(end), whole[line_end + 2 : end]))
        start = end + 2
    raise BenchError("the answer broke off")


class _Clock:
    """When the first n bytes of a recording had arrived, for growing n."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        self._arrivals = iter(arrivals)
        self._num_bytes = 0
        self._at = 0.0

    def at(self, num_bytes: int) -> float:
        while self._num_bytes < num_bytes:
            arrival = next(self._arrivals, None)
            if arrival is None:
                raise BenchError("the answer broke off")
            self._at = arrival[0]
            self._num_bytes += len(arrival[1])
        return self._at
