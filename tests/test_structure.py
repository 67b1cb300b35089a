"""Structured output of a real server: its model's wildest answers fit their schemas, and what nobody can compile is
refused while the server stays small and goes on with everybody else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.hostile import LARKS, Json, hostile
from tests.schemas import corpus
from tests.server import PATIENCE_S, Server, serving, until

MAX_GROWTH_BYTES = 100 * 2**20

CHAT: Json = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0}
FILLING: Json = {"inputs": "a" + " a" * 1200, "parameters": {"max_new_tokens": 3}}
"""As long as the server takes: it touches nearly all KV memory, which is not handed out by the system before."""
ANSWERS = {200, 400, 422, 424, 429}
"""Accepted, refused, given up on the way, or not compiled in time because the machine is busy."""


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    flags = ("--dtype", "float32", "--kv-cache-bytes", "60000000")
    with serving("--model-id", str(smollm2), *flags) as running:
        yield running


def ask_again_and_again(server: Server, body: Json) -> httpx.Response:
    """Until there was time to compile."""
    answers: list[httpx.Response] = []

    def ask() -> bool:
        answers.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE_S))
        return answers[-1].status_code != 429

    until(ask)
    return answers[-1]


# Schemas

CORPUS = dict(corpus())
SAMPLE = frozenset(list(CORPUS)[::23])


@pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")  # of Python's, about expressions
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.exhaustive) for name in CORPUS]
)
def test_whatever_the_model_draws_fits_the_schema(server: Server, name: str) -> None:
    schema = CORPUS[name]
    body = {**CHAT, "max_tokens": 80, "temperature": 1.5, "n": 3, "seed": 1}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    answer = ask_again_and_again(server, {**body, "response_format": format_})

    if answer.status_code == 422:
        assert "grammar is not valid" in answer.json()["error"]
        return
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    for choice in answer.json()["choices"]:
        if choice["finish_reason"] == "stop":
            validator.validate(json.loads(choice["message"]["content"]))


# Hostility


def resident_bytes(pid: int) -> int:
    """Of a process and all that it started."""
    total = 0
    waiting = [pid]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            status = (process / "status").read_text()
            waiting += map(int, (process / f"task/{process.name}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
        sizes = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        total += sum(map(int, sizes)) * 1024
    return total


@dataclass
class Stream:
    """Requests that are being answered all the while."""

    url: str
    num_tokens: int = 0
    failure: str | None = None

    def wait_for_more(self) -> None:
        num_before = self.num_tokens
        until(lambda: self.num_tokens > num_before or self.failure is not None)

    def read(self, is_over: threading.Event) -> None:
        body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 200, "min_new_tokens": 200}}
        while not is_over.is_set():
            with httpx.stream("POST", f"{self.url}/generate_stream", json=body, timeout=PATIENCE_S) as answer:
                for line in filter(None, answer.iter_lines()):
                    self.num_tokens += 1
                    if "error" in json.loads(line.removeprefix("data:")):
                        self.failure = line
                    if is_over.is_set():
                        return


def ask_all(server: Server, path: str, bodies: dict[str, Json]) -> tuple[dict[str, httpx.Response], Stream]:
    """Asks one after the other, beside a stream that goes on before, meanwhile and after."""
    stream, is_over = Stream(server.url), threading.Event()
    reading = threading.Thread(target=stream.read, args=(is_over,))
    reading.start()
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        try:
            stream.wait_for_more()
            answers = {name: client.post(path, json=body) for name, body in bodies.items()}
            stream.wait_for_more()
        finally:
            is_over.set()
            reading.join()
    return answers, stream


def check(server: Server, ask: Callable[[], tuple[dict[str, httpx.Response], Stream]]) -> None:
    """What holds of all that is hostile."""
    ask_again_and_again(server, {**CHAT, "response_format": {"type": "json_object"}})
    httpx.post(f"{server.url}/generate", json=FILLING, timeout=PATIENCE_S).raise_for_status()
    before = resident_bytes(server.process.pid)

    answers, stream = ask()

    assert resident_bytes(server.process.pid) - before < MAX_GROWTH_BYTES
    assert stream.failure is None
    for name, answer in answers.items():
        assert answer.status_code in ANSWERS, (name, answer.text)
        assert answer.status_code == 200 or answer.json()["error"], name
    after = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=PATIENCE_S)
    assert after.status_code == 200


def test_hostile_formats_hurt_nobody(server: Server) -> None:
    bodies = {name: {**CHAT, **fields} for name, fields in hostile()}
    assert len(bodies) + len(LARKS) >= 100

    check(server, lambda: ask_all(server, "/v1/chat/completions", bodies))


def test_hostile_grammars_hurt_nobody(server: Server) -> None:
    def body(text: str) -> Json:
        return {"inputs": "Hi", "parameters": {"max_new_tokens": 3, "grammar": {"type": "lark", "value": text}}}

    check(server, lambda: ask_all(server, "/generate", {name: body(text) for name, text in LARKS.items()}))
