"""The routes of the hosted Inference API, which name the model they ask in their path.

    /models/{id}, with or without /v1/... behind it    what the same path does without the model's name
    /status, /framework, /api/models                   which model is here and what it can do

Old clients know no others. One model is served here, so a name is either one of its names or unknown: 404. While the
model is not ready its routes answer 503 at once, as the hosted API does, except to clients that would rather wait
(`x-wait-for-model` or `options.wait_for_model`). Bodies are JSON whatever they are declared to be: the hosted API's own
examples, by curl or `fetch`, do not declare it.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from router.api import render
from router.api.admission import Services
from router.api.body import Parsed, read_json
from router.api.openapi import failures
from router.api.replay import Endpoint
from router.config import Config
from router.errors import Loading, NotReady, UnknownModel

FRAMEWORK: Final = "text-generation-inference"
"""What TGI is called there; clients ask no other framework to generate."""

TASK: Final = "text-generation"
PREFIXES: Final = ("/models", "/hf-inference/models", f"/pipeline/{TASK}")
"""The API's own, its place behind the hub's router, and the one it had before either; the first is documented."""

BEHIND_MODEL: Final = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/info"),
    ("GET", "/health"),
    ("POST", "/"),
)
"""Routes that a model's path leads to. A model's name may have slashes, so the path without anything behind it is the
last that a request is compared with."""

NO_COMMIT: Final = "0" * 40
"""git's way to write it, for weights that are not from the hub: clients want a text."""

Check = Callable[..., Awaitable[None]]


def hosted_routes(services: Services, *routers: APIRouter) -> APIRouter:
    """Those of the routers' routes that may stand behind a model's path, there."""
    routes = {(method, route.path): route for route in _routes_of(routers) for method in route.methods or ()}
    hosted = APIRouter(tags=["Inference API"], route_class=_route_class(services))
    named = [Depends(_name_check(services.config))]
    for method, path in BEHIND_MODEL:
        route = routes.get((method, path))
        if route is None:
            continue
        for prefix in PREFIXES:
            hosted.add_api_route(
                f"{prefix}/{{model_id:path}}{path.rstrip('/')}",
                _in_hosted_words(services, route.endpoint) if method == "POST" else route.endpoint,
                methods=[method],
                dependencies=named,
                response_class=route.response_class,
                responses=route.responses | failures(404),
                openapi_extra=route.openapi_extra,
                include_in_schema=prefix == PREFIXES[0],
            )
    return hosted


def _routes_of(routers: tuple[APIRouter, ...]) -> list[APIRoute]:
    return [route for router in routers for route in router.routes if isinstance(route, APIRoute)]


def catalogue_routes(services: Services) -> APIRouter:
    """What is known of the model. Behind the API key if the operator wants it."""
    router = APIRouter(tags=["Inference API"], route_class=_route_class(services))
    name, sha = services.config.model_name, _sha(services)
    named = [Depends(_name_check(services.config))]

    @router.get("/status/{model_id:path}", dependencies=named, responses=failures(404))
    async def status() -> Response:
        """Whether a model is loaded, and on what."""
        ready = services.engine.ready
        state = {"state": "Loaded" if ready else "Loadable", "loaded": ready}
        return _json(state | {"compute_type": services.config.compute_type, "framework": FRAMEWORK})

    @router.get("/framework/{framework}")
    async def deployed(framework: str) -> Response:
        """Which models a framework serves."""
        return _json([{"model_id": name, "sha": sha, "task": TASK}] if framework == FRAMEWORK else [])

    @router.get("/api/models/{model_id:path}", dependencies=named, responses=failures(404))
    async def describe(model_id: str) -> Response:
        """What a model is for, as the hub says it."""
        about = {"id": model_id, "modelId": model_id, "sha": sha, "pipeline_tag": TASK}
        return _json(about | {"tags": [TASK, FRAMEWORK], "private": False, "gated": False, "disabled": False})

    return router


def _name_check(config: Config) -> Check:
    """A dependency that refuses models that are not served."""

    async def check(model_id: str) -> None:
        if not is_served(config, model_id):
            raise UnknownModel(model_id)

    return check


def is_served(config: Config, name: str) -> bool:
    """Whether this is a name of the model: what it is called here, where it is from, or the end of either, which of a
    folder's path is the folder and of a hub id the repository."""
    end = f"/{name.strip('/')}"
    return any(f"/{known.strip('/')}".endswith(end) for known in (config.model_name, config.model_id))


def _in_hosted_words(services: Services, endpoint: Endpoint) -> Endpoint:
    """The endpoint, but of a model that is not ready it says that it loads, and at once to those who do not want to
    wait. What the engine is given nevertheless waits there until its shards are back."""

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        loading = Loading(request.path_params["model_id"], round(services.engine.ready_in_s, 1))
        body = await read_json(request, limit_bytes=services.config.payload_limit, any_type=True)
        if not services.engine.ready and not _waits(request, body):
            raise loading
        try:
            return await endpoint(request)
        except NotReady as error:
            raise loading from error

    return answer


def _waits(request: Request, body: Parsed) -> bool:
    asked = request.headers.get("x-wait-for-model", "").strip().lower() in ("true", "1")
    return asked or body.option("wait_for_model") is True


def _route_class(services: Services) -> type[APIRoute]:
    """Of routes whose every answer says which weights it is from, unless that is not for everybody to know."""
    sha, is_public = _sha(services), not services.config.protect_info

    class HostedRoute(APIRoute):
        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def send_with_sha(message: Message) -> None:
                if is_public and message["type"] == "http.response.start":
                    MutableHeaders(scope=message)["x-sha"] = sha
                await send(message)

            await super().handle(scope, receive, send_with_sha)

    return HostedRoute


def _sha(services: Services) -> str:
    return services.model_sha or NO_COMMIT


def _json(value: object) -> Response:
    return Response(render.to_bytes(value), media_type="application/json")
