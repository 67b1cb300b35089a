"""TGI's native routes: /, /generate, /generate_stream, /tokenize and /invocations.

    body ─► Parameters ─► admitted: permits, Requests, Generations ─► tokens ─► JSON or events

An invalid stream request is an ordinary 4xx: the answer begins when the first token is there, and what fails after it
is told in the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fastapi import APIRouter, Request, Response

from router.api import render
from router.api.admission import Call, Services, Wish, admitted, log_success, time_headers
from router.api.body import Parsed, fit_body, read_body, read_json
from router.api.collect import Collected, collect
from router.api.openapi import answers, streams, takes
from router.api.replay import Endpoint, shared
from router.api.schemas import (
    CompatGenerateRequest,
    GenerateRequest,
    GenerateResponse,
    SimpleToken,
    TokenizePromptRequest,
)
from router.api.sse import EventStream, frame, unless_gone
from router.engine import Finish, TokenEvent
from router.errors import RouterError
from router.validate import Parameters, is_repeatable

JSON_TYPE: Final = "application/json"
EXAMPLE: Final = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 5}}
COMPAT_EXAMPLE: Final = EXAMPLE | {"stream": False}
ANSWER_EXAMPLE: Final = {"generated_text": " Paris."}
TOKENIZE_EXAMPLE: Final = {"inputs": "Hello"}
TOKENS_EXAMPLE: Final = [{"id": 9064, "text": "Hello", "start": 0, "stop": 5}]
NO_SHAPES: Final[Mapping[str, Endpoint]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Ask:
    """A body, understood. `prefix` stands before every text: the prompt or nothing."""

    request_id: str
    inputs: str
    parameters: Parameters
    prefix: str


def native_routes(services: Services, other_shapes: Mapping[str, Endpoint] = NO_SHAPES) -> APIRouter:
    """All of them ask for the API key, which the caller sees to.

    `other_shapes` are the routes of other APIs that /invocations stands for too, by the field their bodies have.
    """
    router = APIRouter(tags=["Text generation"])
    config = services.config

    @router.post(
        "/",
        responses=answers(list[GenerateResponse], [ANSWER_EXAMPLE], stream=True),
        openapi_extra=takes(CompatGenerateRequest, COMPAT_EXAMPLE),
    )
    @shared(services.answers, "/", _is_repeatable)
    async def compat(request: Request) -> Response:
        """Generate text, at once or token by token."""
        body = await read_body(request, CompatGenerateRequest, limit_bytes=config.payload_limit)
        ask = _understand(request, body, default_full_text=config.default_return_full_text)
        if body.stream:
            return await _stream(services, request, ask)
        return await unless_gone(request.receive, _answer(services, ask, as_list=True))

    @router.post(
        "/invocations",
        responses=answers(list[GenerateResponse], [ANSWER_EXAMPLE], stream=True),
        openapi_extra=takes(CompatGenerateRequest, COMPAT_EXAMPLE),
    )
    async def invocations(request: Request) -> Response:
        """What SageMaker calls: the same as / for a body with `inputs`, else the route that takes such a body."""
        parsed = await read_json(request, limit_bytes=config.payload_limit)
        for field, endpoint in other_shapes.items():
            if parsed.has(field) and not parsed.has("inputs"):
                return await endpoint(request)
        return await compat(request)

    @router.post(
        "/generate", responses=answers(GenerateResponse, ANSWER_EXAMPLE), openapi_extra=takes(GenerateRequest, EXAMPLE)
    )
    @shared(services.answers, "/generate", _is_repeatable)
    async def generate(request: Request) -> Response:
        """Generate text."""
        body = await read_body(request, GenerateRequest, limit_bytes=config.payload_limit)
        return await unless_gone(request.receive, _answer(services, _understand(request, body), as_list=False))

    @router.post(
        "/generate_stream",
        response_class=Response,
        responses=streams(),
        openapi_extra=takes(GenerateRequest, EXAMPLE),
    )
    @shared(services.answers, "/generate_stream", _is_repeatable)
    async def generate_stream(request: Request) -> Response:
        """Generate text, token by token."""
        body = await read_body(request, GenerateRequest, limit_bytes=config.payload_limit)
        return await _stream(services, request, _understand(request, body))

    @router.post(
        "/tokenize",
        responses=answers(list[SimpleToken], TOKENS_EXAMPLE),
        openapi_extra=takes(GenerateRequest, TOKENIZE_EXAMPLE),
    )
    async def tokenize(request: Request) -> Response:
        """Show the tokens of a text: of `inputs` with their offsets, of `prompt` (vLLM's form) the ids alone."""
        parsed = await read_json(request, limit_bytes=config.payload_limit)
        if parsed.has("prompt") and not parsed.has("inputs"):
            return await _token_ids(services, fit_body(parsed, TokenizePromptRequest))
        body = fit_body(parsed, GenerateRequest)
        tokenizer = services.tokenizer
        rendered = await tokenizer.run(body.inputs, lambda text: render.simple_tokens(tokenizer.tokenize(text)))
        return Response(rendered, media_type=JSON_TYPE)

    return router


def _is_repeatable(parsed: Parsed) -> bool:
    return is_repeatable(fit_body(parsed, GenerateRequest).to_parameters())


async def _token_ids(services: Services, body: TokenizePromptRequest) -> Response:
    add_special_tokens = body.add_special_tokens is not False
    encode = services.tokenizer.encode
    ids = await services.tokenizer.run(body.prompt, lambda text: encode(text, add_special_tokens=add_special_tokens))
    max_length = services.validator.limits.max_total_tokens
    return _json({"count": len(ids), "max_model_len": max_length, "tokens": ids})


def _json(value: object, headers: Mapping[str, str] | None = None) -> Response:
    return Response(render.to_bytes(value), media_type=JSON_TYPE, headers=headers)


def _understand(request: Request, body: GenerateRequest, *, default_full_text: bool = False) -> _Ask:
    parameters = body.to_parameters()
    wants = parameters.return_full_text
    full_text = default_full_text if wants is None else wants
    return _Ask(request.state.request_id, body.inputs, parameters, body.inputs if full_text else "")


async def _answer(services: Services, ask: _Ask, *, as_list: bool) -> Response:
    """All of the text at once."""
    [done] = await collect(services, ask.request_id, [Wish(ask.inputs, ask.parameters)])
    details = ask.parameters.details or ask.parameters.decoder_input_details
    body = render.response(done.best, done.others, prefix=ask.prefix, details=details)
    headers = _compute_headers(services, ask) | _time_headers(done)
    return _json([body] if as_list else body, headers)


async def _stream(services: Services, request: Request, ask: _Ask) -> Response:
    return await unless_gone(request.receive, _begin(services, ask))


async def _begin(services: Services, ask: _Ask) -> EventStream:
    async with AsyncExitStack() as held:
        call = await held.enter_async_context(
            admitted(services, ask.request_id, ask.inputs, ask.parameters, stream=True)
        )
        stream = EventStream(_compute_headers(services, ask))
        writer = _StreamWriter(stream, call, ask)
        call.generations[0].pass_on(writer.write, writer.fail)
        await stream.begin()
        stream.hold(held.pop_all())
        return stream


class _StreamWriter:
    """One frame per token."""

    __slots__ = ("_ask", "_call", "_stream")

    def __init__(self, stream: EventStream, call: Call, ask: _Ask) -> None:
        self._stream = stream
        self._call = call
        self._ask = ask

    def write(self, event: TokenEvent) -> None:
        index, token, top_tokens, finish, _, _ = event
        if finish is None and not top_tokens:  # as nearly always
            self._stream.put(render.plain_frame(index, token))
            return
        end = None if finish is None else self._end(finish)
        self._stream.put(frame(render.to_bytes(render.full_stream_event(event, end))))
        if finish is not None:
            self._stream.end()

    def fail(self, error: RouterError) -> None:
        self._stream.fail(error, frame(render.to_bytes(render.error(error))))

    def _end(self, finish: Finish) -> Mapping[str, object]:
        generation, details = self._call.generations[0], self._ask.parameters.details
        log_success(self._call, generation, finish)
        return render.stream_end(generation.request, finish, prefix=self._ask.prefix, details=details)


def _compute_headers(services: Services, ask: _Ask) -> dict[str, str]:
    return {"x-compute-type": services.config.compute_type, "x-compute-characters": str(len(ask.inputs))}


def _time_headers(done: Collected) -> dict[str, str]:
    generation = done.generation
    return time_headers(
        done.call,
        queue_s=generation.queue_s,
        inference_s=generation.inference_s,
        num_prompt_tokens=done.call.demand.input_length,
        num_generated=done.best.finish.num_generated,
    )
