"""The HTTP application over an engine that only plays a script, so that every answer is known beforehand."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import anyio
import httpx
import uvicorn
from fastapi import FastAPI

from router.api.admission import EngineLike
from router.api.app import create_app
from router.config import Config
from router.core.request import FinishReason, Request
from router.engine import Finish, Generation, Token, TokenEvent
from router.errors import RouterError
from router.metrics import Gauges, Metrics
from router.text.chat import ChatTemplate
from router.validate import Capacity, Limits, Validator
from tests.tiny_tokenizers import byte_level, tokenizer_of

Json = dict[str, object]

PARIS = (Token(3681, " Paris", -0.25, False), Token(2, "</s>", -2.5839844, True))


@dataclass(frozen=True, slots=True)
class Script:
    """What a sequence does: its tokens, then an error, or a finish with `text`, or nothing at all (`hangs`)."""

    tokens: Sequence[Token] = PARIS
    top_tokens: tuple[Token, ...] = ()
    error: RouterError | None = None
    hangs: bool = False
    reason: FinishReason = FinishReason.EOS_TOKEN

    def play(self, generation: Generation) -> None:
        request = generation.request
        generation.note_planned()
        for index, token in enumerate(self.tokens, 1):
            scored = (None, *(-1.0 for _ in request.prompt[1:])) if request.prompt_logprobs and index == 1 else None
            last = index == len(self.tokens) and self.error is None and not self.hangs
            num_top = request.sampling.prompt_top_n_tokens if scored else 0
            tops = tuple((Token(33, "B", -0.5, False),) * min(i, num_top) for i in range(len(request.prompt)))
            finish = self._finish() if last else None
            generation.publish(TokenEvent(index, token, self.top_tokens, finish, scored, tops if num_top else ()))
        if self.error is not None:
            generation.fail(self.error)

    def _finish(self) -> Finish:
        text = "".join(token.text for token in self.tokens if not token.special)
        return Finish(self.reason, text, len(self.tokens))


@dataclass
class FakeEngine:
    """Plays one script after the other, the last one for ever."""

    scripts: list[Script] = field(default_factory=lambda: [Script()])
    refusal: RouterError | None = None
    ready: bool = True
    ready_in_s: float = 20.0
    gauges: Gauges = field(default_factory=Gauges)
    requests: list[Request] = field(default_factory=list)
    cancelled: list[Request] = field(default_factory=list)

    def submit(self, request: Request) -> Generation:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        generation = Generation(request, self._cancel)
        (self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]).play(generation)
        return generation

    def _cancel(self, generation: Generation) -> None:
        self.cancelled.append(generation.request)
        generation.drop()


CONFIG = Config(max_total_tokens=64, max_input_tokens=40)


MODEL_SHA = "5a2e1c0ffee"
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build(
    engine: EngineLike,
    config: Config = CONFIG,
    *,
    template_source: str = CHAT_TEMPLATE,
    model_sha: str | None = MODEL_SHA,
    adapters: tuple[str, ...] = (),
) -> FastAPI:
    tokenizer = tokenizer_of(byte_level())
    vocab_size = tokenizer.vocab_size
    capacity = Capacity(vocab_size, eos_token_ids=(2,), kv_tokens=8192, max_positions=4096, adapters=adapters)
    limits = Limits.derive(config, capacity, tokenizer)
    metrics = Metrics(max_input_tokens=limits.max_input_tokens, max_total_tokens=limits.max_total_tokens)
    template = ChatTemplate({"default": template_source}, {})
    validator = Validator(limits, tokenizer)
    return create_app(config, engine, validator, tokenizer, metrics, template=template, model_sha=model_sha)


class Client:
    """Calls the application in this process, without a socket."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        template_source: str = CHAT_TEMPLATE,
        model_sha: str | None = MODEL_SHA,
        adapters: tuple[str, ...] = (),
        **settings: object,
    ) -> None:
        self.engine = engine or FakeEngine()
        config = replace(CONFIG, **settings)  # type: ignore[arg-type]
        self.app = build(self.engine, config, template_source=template_source, model_sha=model_sha, adapters=adapters)

    def call(self, method: str, path: str, **kwargs: object) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **kwargs)  # type: ignore[arg-type]

        return anyio.run(call)

    def get(self, path: str, **kwargs: object) -> httpx.Response:
        return self.call("GET", path, **kwargs)

    def post(self, path: str, body: object, **kwargs: object) -> httpx.Response:
        return self.call("POST", path, json=body, **kwargs)

    def post_raw(self, path: str, raw: bytes, content_type: str = "application/json") -> httpx.Response:
        return self.call("POST", path, content=raw, headers={"content-type": content_type})


def events(response: httpx.Response) -> list[Json]:
    """The events of a stream, whose bytes must be exactly frames."""
    *frames, rest = response.content.split(b"\n\n")
    assert rest == b""
    assert all(frame.startswith(b"data: {") and b"\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames]


@contextlib.contextmanager
def listening(config: uvicorn.Config) -> Iterator[tuple[str, int]]:
    """Where a server of it listens, on a thread of its own."""
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()
