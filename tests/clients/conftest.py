"""The servers that clients are tried against, alive while the tests of this folder run."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from router.api.admission import EngineLike
from router.config import Config
from router.core.request import Request
from router.engine import Finish, Generation, TokenEvent
from router.errors import GenerationFailed, NotReady
from router.metrics import Gauges
from tests.clients.drivers.rows import Servers
from tests.clients.front import fronting, make_certificate
from tests.http_app import CONFIG, FakeEngine, Script, build
from tests.server import PATIENT, Server, serving

KEY = "the-right-one"
SILENCE_S = 20.0
"""Longer than 15 s, at which server libraries like to begin sending comments."""
SMALL = ("--dtype", "float32", "--max-total-tokens", "2048", "--max-batch-total-tokens", "16384")
NAME = "smollm2-135m-instruct"
STRICT = ("--api-key", KEY, "--max-concurrent-requests", "1", "--served-model-name", "org/m")
CACHING = Config(max_total_tokens=1000, response_cache_bytes=1_000_000, served_model_name="google/gemma-2-2b-it")
LOADING_S = 3.0
FOREVER_S = 3600.0


@pytest.fixture(scope="package")
def plain_server(smollm2: Path) -> Iterator[Server]:
    with serving("--model-id", str(smollm2), *SMALL, "--served-model-name", NAME, code=PATIENT) as server:
        yield server


@pytest.fixture(scope="package")
def servers(smollm2: Path, plain_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """All that drivers call."""
    with (
        serving("--model-id", str(smollm2), *SMALL, *STRICT, code=PATIENT) as strict,
        playing(FakeEngine([Script(error=GenerationFailed("out of luck"))])) as failing,
        playing(FakeEngine([SlowScript()])) as slow,
        playing(FakeEngine(refusal=NotReady("unhealthy"))) as unready,
        playing(LoadingEngine()) as loading,
        playing(RestartingEngine(LOADING_S)) as restarting,
        playing(RestartingEngine(FOREVER_S)) as absent,
        playing(FakeEngine(), CACHING) as caching,
        fronts(tmp_path_factory.mktemp("front"), plain_server.url, caching) as (certificate, front, alias_front),
    ):
        yield Servers(
            plain=plain_server.url,
            strict=strict.url,
            key=KEY,
            failing=failing,
            slow=slow,
            unready=unready,
            loading=loading,
            restarting=restarting,
            absent=absent,
            caching=caching,
            certificate=certificate,
            front=front,
            alias_front=alias_front,
        )


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


class RestartingEngine:
    """What the real one is while its shards restart: not ready, but it keeps what it is given and answers that later.
    It is away from when somebody asks until it has answered, and then again."""

    def __init__(self, restart_s: float) -> None:
        self.gauges = Gauges()
        self.ready_in_s = 20.0  # which clients are told, and do not wait for
        self._restart_s = restart_s
        self._back_at_s: float | None = None

    @property
    def ready(self) -> bool:
        return self._away_s() <= 0

    def _away_s(self) -> float:
        """How much longer."""
        if self._back_at_s is None:
            self._back_at_s = time.monotonic() + self._restart_s
        return self._back_at_s - time.monotonic()

    def submit(self, request: Request) -> Generation:
        generation = Generation(request, Generation.drop)
        asyncio.get_running_loop().call_later(max(0.0, self._away_s()), self._answer, generation)
        return generation

    def _answer(self, generation: Generation) -> None:
        self._back_at_s = None
        Script().play(generation)


@contextlib.contextmanager
def fronts(folder: Path, *urls: str) -> Iterator[tuple[str, ...]]:
    """The certificate and a proxy for each of the servers; empty names where there is no openssl."""
    if shutil.which("openssl") is None:
        yield ("",) * (1 + len(urls))
        return
    certificate = make_certificate(folder)
    with contextlib.ExitStack() as running:
        yield str(certificate), *(running.enter_context(fronting(url, certificate)) for url in urls)


@contextlib.contextmanager
def playing(engine: EngineLike, config: Config = CONFIG) -> Iterator[str]:
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
