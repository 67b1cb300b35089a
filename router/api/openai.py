"""OpenAI's routes: /v1/completions, /v1/chat/completions, /v1/responses and /v1/models; with TGI's /chat_tokenize, and
/load_model, which `transformers chat` asks before it talks.

They follow OpenAI's contract, except that an error's body is flat as everywhere here. A `model` that names an adapter
has it answer; whatever else a body names, the served model answers.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final, NamedTuple

from fastapi import APIRouter, Request, Response

from router.api import render
from router.api.admission import Services
from router.api.body import Parsed, fit_body, read_body, read_json
from router.api.openai_bodies import (
    NO_CONFIG,
    ChatRequest,
    CompletionRequest,
    GenerationConfig,
    LoadRequest,
    ResponseRequest,
    SamplingBody,
)
from router.api.openai_chat import chat, chat_tokens
from router.api.openai_completions import completions
from router.api.openai_responses import responses
from router.api.openapi import GENERATION, READING, failures, own_events, takes
from router.api.replay import Endpoint, shared
from router.api.sse import EventStream, frame
from router.errors import NotReady, UnknownModel
from router.validate import is_repeatable

JSON_TYPE: Final = "application/json"
MESSAGES: Final = ({"role": "user", "content": "What is the capital of France?"},)
CHAT_EXAMPLE: Final = {"messages": list(MESSAGES), "max_tokens": 20, "stream": False}
COMPLETION_EXAMPLE: Final = {"prompt": "The capital of France is", "max_tokens": 5}
RESPONSE_EXAMPLE: Final = {"input": "What is the capital of France?", "max_output_tokens": 20}
LOAD_EXAMPLE: Final = {"model": "org/name"}
GENERATES: Final[MappingProxyType[int | str, dict[str, Any]]] = MappingProxyType(own_events() | failures(*GENERATION))


class V1(NamedTuple):
    """The routes, and two of them by name, because /invocations stands for them too."""

    router: APIRouter
    chat: Endpoint
    completions: Endpoint


def openai_routes(services: Services) -> V1:
    """Those that ask for the API key, which the caller sees to."""
    router = APIRouter(tags=["OpenAI"])
    limit = services.config.payload_limit

    @router.post(
        "/v1/completions", responses=dict(GENERATES), openapi_extra=takes(CompletionRequest, COMPLETION_EXAMPLE)
    )
    @shared(services.answers, "/v1/completions", _is_repeatable_completion)
    async def create_completion(request: Request) -> Response:
        """Go on with one or several prompts."""
        return await completions(services, request, await read_body(request, CompletionRequest, limit_bytes=limit))

    @router.post("/v1/chat/completions", responses=dict(GENERATES), openapi_extra=takes(ChatRequest, CHAT_EXAMPLE))
    @shared(services.answers, "/v1/chat/completions", _is_repeatable_chat)
    async def create_chat_completion(request: Request) -> Response:
        """Answer in a conversation."""
        return await chat(services, request, await read_body(request, ChatRequest, limit_bytes=limit))

    @router.post("/v1/responses", responses=dict(GENERATES), openapi_extra=takes(ResponseRequest, RESPONSE_EXAMPLE))
    @shared(services.answers, "/v1/responses", _is_repeatable_response)
    async def create_response(request: Request) -> Response:
        """Answer a text."""
        return await responses(services, request, await read_json(request, limit_bytes=limit))

    @router.post("/chat_tokenize", responses=failures(*READING), openapi_extra=takes(ChatRequest, CHAT_EXAMPLE))
    async def chat_tokenize(request: Request) -> Response:
        """Show the prompt that a conversation becomes, and its tokens."""
        return await chat_tokens(services, await read_body(request, ChatRequest, limit_bytes=limit))

    @router.post(
        "/load_model",
        response_class=Response,
        responses=own_events() | failures(*READING, 503),
        openapi_extra=takes(LoadRequest, LOAD_EXAMPLE),
    )
    async def load_model(request: Request) -> Response:
        """Say that the model is loaded, whichever is asked for."""
        body = await read_body(request, LoadRequest, limit_bytes=limit)
        if not services.engine.ready:
            raise NotReady("unhealthy")
        status = {"status": "ready", "model": body.model or services.config.model_name, "cached": True}
        stream = EventStream({})
        stream.put(frame(render.to_bytes(status)))
        stream.end()
        return stream

    return V1(router, create_chat_completion, create_completion)


def _is_repeatable_completion(parsed: Parsed) -> bool:
    return _is_repeatable(fit_body(parsed, CompletionRequest), NO_CONFIG)


def _is_repeatable_chat(parsed: Parsed) -> bool:
    body = fit_body(parsed, ChatRequest)
    return _is_repeatable(body, body.generation_config)


def _is_repeatable(body: SamplingBody, config: GenerationConfig) -> bool:
    return is_repeatable(body.to_parameters(config, max_new_tokens=None, num_top=None), body.to_manner(config))


def _is_repeatable_response(parsed: Parsed) -> bool:
    """These bodies bring no seed."""
    return fit_body(parsed, ResponseRequest).temperature == 0


def model_routes(services: Services) -> APIRouter:
    """Behind the API key if the operator wants it."""
    router = APIRouter(tags=["OpenAI"])
    name = services.config.model_name
    names = (name, *services.validator.limits.adapters)
    models = {id_: {"id": id_, "object": "model", "created": 0, "owned_by": name} for id_ in names}

    @router.get("/v1/models")
    async def list_models() -> Response:
        """What is served: the model and its adapters."""
        return Response(render.to_bytes({"object": "list", "data": list(models.values())}), media_type=JSON_TYPE)

    @router.get("/v1/models/{model_id:path}", responses=failures(404))
    async def retrieve_model(model_id: str) -> Response:
        """Whether a model is served; its name may have slashes."""
        if model_id not in models:
            raise UnknownModel(model_id)
        return Response(render.to_bytes(models[model_id]), media_type=JSON_TYPE)

    return router
