"""The HTTP application: routes, keys, and one shape for every error.

Whatever goes wrong on whatever route, the answer is JSON with a string `error` on top, and the status comes from one
place: the exception. A further API joins as one more router in `create_app`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Final

from fastapi import Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from router.api import render
from router.api.admission import EngineLike, Permits, Services
from router.api.hub import catalogue_routes, hosted_routes
from router.api.kserve import kserve_probes, kserve_routes
from router.api.middleware import Cors, Head, RequestId, TraceContext
from router.api.openai import model_routes, openai_routes
from router.api.openapi import DocumentedApp
from router.api.ops import health_routes, info_routes
from router.api.replay import SharedAnswers
from router.api.sse import ClientGone
from router.api.tgi import native_routes
from router.api.vertex import vertex_routes
from router.config import VERSION, Config
from router.errors import (
    BodyTooSlow,
    IncompleteBatch,
    NotReady,
    Overloaded,
    RouterError,
    TemplateError,
    ToolError,
    Unauthorized,
    ValidationError,
)
from router.metrics import Metrics
from router.text.chat import ChatTemplate
from router.text.tokenizer import Tokenizer
from router.validate import Validator

COUNTED: Final[Mapping[type[RouterError], str]] = {
    Overloaded: "overloaded",
    TemplateError: "template",
    ToolError: "validation",  # TGI has no word of its own for it
    ValidationError: "validation",
}
"""Refusals that `tgi_request_failure` counts, and as what."""

NOT_READY_DELAY_S: Final = 0.25
"""Some clients ask again at once, and for ever, as long as the answer is 503."""


def create_app(
    config: Config,
    engine: EngineLike,
    validator: Validator,
    tokenizer: Tokenizer,
    metrics: Metrics,
    *,
    template: ChatTemplate | None = None,
    model_sha: str | None = None,
) -> FastAPI:
    """The application. It starts nothing and owns nothing: engine and tokenizer outlive it.

    Without a `template` conversations are refused.
    """
    template = template or ChatTemplate({}, {})
    permits = Permits(config.max_concurrent_requests)
    computing = Services(config, engine, validator, tokenizer, metrics, permits, template, model_sha)
    sharing = replace(computing, answers=SharedAnswers(config, model_sha, metrics))
    services = sharing if config.response_cache_bytes else computing
    hosted = computing if config.response_cache_bytes == 0 else sharing
    app = DocumentedApp(
        title="Shardstream",
        version=VERSION,
        description="Text generation with the HTTP contract of Text Generation Inference.",
        redoc_url=None,
        redirect_slashes=False,
    )
    keyed = [Depends(_key_check(config.api_key))] if config.api_key is not None else []
    keyed_info = keyed if config.protect_info else []
    # First, so that a path a platform chose wins over what else it may stand for.
    app.include_router(vertex_routes(services), dependencies=keyed)
    v1 = openai_routes(services)
    other_shapes = {"messages": v1.chat, "prompt": v1.completions}
    health, info = health_routes(services), info_routes(services)
    app.include_router(native_routes(services, other_shapes), dependencies=keyed)
    app.include_router(v1.router, dependencies=keyed)
    app.include_router(model_routes(services), dependencies=keyed_info)
    app.include_router(kserve_routes(services), dependencies=keyed)
    app.include_router(info, dependencies=keyed_info)
    app.include_router(health)
    app.include_router(kserve_probes(services))
    # Routes of their own, which may keep answers where the others do not.
    generating = native_routes(hosted), openai_routes(hosted).router
    app.include_router(hosted_routes(services, *generating), dependencies=keyed)
    app.include_router(hosted_routes(services, info), dependencies=keyed_info)
    app.include_router(hosted_routes(services, health))
    app.include_router(catalogue_routes(services), dependencies=keyed_info)
    app.add_exception_handler(RouterError, _refusing(metrics))
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(ClientGone, _say_nothing)
    app.add_exception_handler(Exception, _admit_failure)
    app.add_middleware(Head)
    app.add_middleware(Cors, allow_origins=config.cors_allow_origin)
    app.add_middleware(TraceContext)
    app.add_middleware(RequestId)
    return app


def _key_check(api_key: str) -> Callable[..., Awaitable[None]]:
    """A dependency that compares `Authorization` as a whole, without regard to case, in constant time."""
    expected = _digest(f"Bearer {api_key}")

    async def check(request: Request) -> None:
        given = request.headers.getlist("authorization")
        if len(given) != 1 or not hmac.compare_digest(_digest(given[0]), expected):
            raise Unauthorized

    return check


def _digest(authorization: str) -> bytes:
    """Of equal length for every key, so that not even the length shows in the time a comparison takes."""
    return hashlib.sha256(authorization.lower().encode()).digest()


def _refusing(metrics: Metrics) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Answers what was raised before the first byte. What fails behind the queue is counted there."""

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RouterError)
        cause = error.__cause__ if isinstance(error, IncompleteBatch) else error
        label = next((label for kind, label in COUNTED.items() if isinstance(cause, kind)), None)
        if label is not None:
            metrics.count("tgi_request_failure", label=label)
        if isinstance(error, NotReady) and request.method == "POST":
            await asyncio.sleep(NOT_READY_DELAY_S)
        return _refuse(error)

    return refuse


def _refuse(error: RouterError) -> Response:
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(error.retry_after_s)
    elif isinstance(error, NotReady):
        headers["retry-after"] = "1"
    elif isinstance(error, BodyTooSlow):
        headers["connection"] = "close"
    elif isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return _error(error.status, render.error(error), headers)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """404 and 405, which Starlette raises, naming the methods of one of the path's routes only."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers = {"allow": _allowed_methods(request)}
    return _error(error.status_code, {"error": error.detail}, headers)


def _allowed_methods(request: Request) -> str:
    routes = request.app.router.routes

    def has(method: str) -> bool:
        return any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)

    reads = ("GET", "HEAD") if has("GET") else ()
    return ",".join((*reads, *(("POST",) if has("POST") else ())))


async def _say_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _admit_failure(request: Request, error: Exception) -> Response:
    """A mistake of ours; the server logs it. The middleware that adds the id is not passed on this way."""
    body = {"error": "Internal server error", "error_type": "internal"}
    return _error(500, body, {"x-request-id": request.state.request_id})


def _error(status: int, body: dict[str, object] | dict[str, str], headers: dict[str, str]) -> Response:
    return Response(render.to_bytes(body), status_code=status, media_type="application/json", headers=headers)
