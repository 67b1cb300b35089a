"""The servers that clients are tried against, alive while the tests of this folder run."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import uvicorn

from router.config import Config
from router.core.request import Request
from router.engine import Finish, Generation, TokenEvent
from router.errors import GenerationFailed, NotReady
from tests.clients.drivers.rows import Servers
from tests.http_app import CONFIG, FakeEngine, Script, build
from tests.server import PATIENT, Server, serving

KEY = "the-right-one"
SILENCE_S = 20.0
"""Longer than 15 s, at which server libraries like to begin sending comments."""
SMALL = ("--dtype", "float32", "--max-total-tokens", "2048", "--max-batch-total-tokens", "16384")
NAME = "smollm2-135m-instruct"
STRICT = ("--api-key", KEY, "--max-concurrent-requests", "1", "--served-model-name", "org/m")
LOADING_S = 3.0


@pytest.fixture(scope="package")
def plain_server(smollm2: Path) -> Iterator[Server]:
    with serving("--model-id", str(smollm2), *SMALL, "--served-model-name", NAME, code=PATIENT) as server:
        yield server


@pytest.fixture(scope="package")
def servers(smollm2: Path, plain_server: Server) -> Iterator[Servers]:
    """All that drivers call."""
    with (
        serving("--model-id", str(smollm2), *SMALL, *STRICT, code=PATIENT) as strict,
        playing(FakeEngine([Script(error=GenerationFailed("out of luck"))])) as failing,
        playing(FakeEngine([SlowScript()])) as slow,
        playing(FakeEngine(refusal=NotReady("unhealthy"))) as unready,
        playing(LoadingEngine()) as loading,
        playing(FakeEngine(), replace(CONFIG, response_cache_bytes=1_000_000)) as caching,
    ):
        yield Servers(plain_server.url, strict.url, KEY, failing, slow, unready, loading, caching)


@dataclass(frozen=True, slots=True)
class SlowScript(Script):
    """Makes its client wait before each token."""

    def play(self, generation: Generation) -> None:
        generation.note_planned()
        text = "".join(token.text for token in self.tokens)
        for index, token in enumerate(self.tokens, 1):
            finish = Finish(self.reason, text, index) if index == len(self.tokens) else None
            event = TokenEvent(index, token, (), finish)
            asyncio.get_running_loop().call_later(index * SILENCE_S, generation.publish, event)


@dataclass
class LoadingEngine(FakeEngine):
    """Is ready some time after it was first asked."""

    ready_at_s: float | None = None

    def submit(self, request: Request) -> Generation:
        if self.ready_at_s is None:
            self.ready_at_s = time.monotonic() + LOADING_S
        self.refusal = NotReady("Model is loading") if time.monotonic() < self.ready_at_s else None
        return super().submit(request)


@contextlib.contextmanager
def playing(engine: FakeEngine, config: Config = CONFIG) -> Iterator[str]:
    """The HTTP side alone, on a port of its own, over an engine that plays; its URL."""
    app = build(engine, config)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
