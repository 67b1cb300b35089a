"""What operators and probes ask: health, readiness, what is served, and measurements.

`/livez` says that this process answers; `/health`, `/ping`, `/readyz` and `GET /` say that the group behind it serves.
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse

from router.api import render
from router.api.admission import Services
from router.api.openapi import failures
from router.api.schemas import Info
from router.config import VERSION
from router.errors import NotReady

METRICS_TYPE: Final = "text/plain; charset=utf-8"


def health_routes(services: Services) -> APIRouter:
    """Never behind the API key."""
    router = APIRouter(tags=["Operations"])

    @router.get("/", response_class=Response, responses=failures(503))
    @router.get("/health", response_class=Response, responses=failures(503))
    @router.get("/ping", response_class=Response, responses=failures(503))
    @router.get("/readyz", response_class=Response, responses=failures(503))
    async def health() -> Response:
        """Whether requests are served: 200 with an empty body, or 503."""
        if not services.engine.ready:
            raise NotReady("unhealthy")
        return Response()

    if services.config.aip_health_route is not None:
        router.add_api_route(services.config.aip_health_route, health, include_in_schema=False)

    @router.get("/livez", response_class=Response)
    async def alive() -> Response:
        """Whether the process answers at all."""
        return Response()

    return router


def info_routes(services: Services) -> APIRouter:
    """Behind the API key if the operator wants it."""
    router = APIRouter(tags=["Operations"])

    @router.get("/info", responses={200: {"model": Info}})
    async def info() -> Response:
        """What is served, within which limits."""
        return Response(render.to_bytes(_info(services)), media_type="application/json")

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Measurements for Prometheus."""
        text = services.metrics.render(services.engine.gauges)
        return Response(text, headers={"content-type": METRICS_TYPE})

    @router.get("/api-doc/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        return JSONResponse(request.app.openapi())

    @router.get("/docs/", include_in_schema=False)
    async def docs() -> Response:
        """TGI's address of the page at /docs."""
        return RedirectResponse("/docs")

    return router


def _info(services: Services) -> dict[str, object]:
    config, limits = services.config, services.validator.limits
    return {
        "model_id": config.model_name,
        "model_sha": services.model_sha,
        "model_pipeline_tag": None,
        "max_concurrent_requests": config.max_concurrent_requests,
        "max_best_of": limits.max_best_of,
        "max_stop_sequences": limits.max_stop_sequences,
        "max_input_tokens": limits.max_input_tokens,
        "max_total_tokens": limits.max_total_tokens,
        "validation_workers": config.validation_workers,
        "max_client_batch_size": config.max_client_batch_size,
        "router": "text-generation-router",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
    }
