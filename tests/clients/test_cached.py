"""A response cache over a real model, asked by the plainest of clients."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

from tests.clients.conftest import SMALL
from tests.server import PATIENCE_S, Server, serving

ASK = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 20, "details": True}}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
NUM_AT_ONCE = 8


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def is_cached(self) -> bool:
        return self.headers["x-compute-type"] == "cache"


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    with serving("--model-id", str(smollm2), *SMALL, "--response-cache-bytes", "10_000_000") as running:
        yield running


def post(server: Server, path: str, body: object, **headers: str) -> Answer:
    url = urlsplit(server.url)
    connection = HTTPConnection(str(url.hostname), url.port, timeout=PATIENCE_S)
    try:
        fields = {"content-type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
        connection.request("POST", path, json.dumps(body), fields)
        response = connection.getresponse()
        return Answer(response.status, {name.lower(): v for name, v in response.getheaders()}, response.read())
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", ASK),
        ("/generate", ASK),
        ("/generate_stream", ASK),
        ("/", ASK | {"stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"stream": True}),
    ],
)
def test_row_61_an_answer_is_given_again(server: Server, path: str, body: object) -> None:
    first, second = post(server, path, body), post(server, path, body)
    own = post(server, path, body, x_use_cache="false")

    assert (first.status, second.status, own.status) == (200, 200, 200)
    assert [answer.is_cached for answer in (first, second, own)] == [False, True, False]
    assert second.body == first.body
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers.get("x-compute-time") == first.headers.get("x-compute-time")
    assert "x-inference-time" not in second.headers
    assert second.headers["x-request-id"] != first.headers["x-request-id"]


def test_row_61_answers_that_are_drawn_are_drawn_again(server: Server) -> None:
    drawn = {"inputs": "Once", "parameters": {"max_new_tokens": 12, "do_sample": True}}
    seeded = {"inputs": "Once", "parameters": {"max_new_tokens": 12, "do_sample": True, "seed": 3}}

    assert [post(server, "/generate", drawn).is_cached for _ in range(2)] == [False, False]
    assert [post(server, "/generate", seeded).is_cached for _ in range(2)] == [False, True]


def test_row_61_clients_that_ask_at_once_share_one_answer(server: Server) -> None:
    body = {"inputs": "A long story:", "parameters": {"max_new_tokens": 100}}
    answers: list[Answer] = []

    def ask() -> None:
        answers.append(post(server, "/generate_stream", body))

    threads = [threading.Thread(target=ask) for _ in range(NUM_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(answers) == NUM_AT_ONCE
    assert len({answer.body for answer in answers}) == 1
    assert sorted(answer.is_cached for answer in answers) == [False] + [True] * (NUM_AT_ONCE - 1)
