"""What the OpenAPI document says about routes that read their bodies and write their answers by hand."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.api.openai_bodies import ChatRequest, CompletionRequest, LoadRequest, ResponseRequest
from router.api.schemas import (
    Body,
    CompatGenerateRequest,
    ErrorResponse,
    GenerateRequest,
    KserveRequest,
    StreamResponse,
    VertexInstance,
    VertexRequest,
)

Json = dict[str, Any]
Responses = dict[int | str, Json]

REF: Final = "#/components/schemas/{model}"
UNDESCRIBED: Final[tuple[type[BaseModel], ...]] = (
    GenerateRequest,
    CompatGenerateRequest,
    StreamResponse,
    VertexRequest,
    VertexInstance,
    KserveRequest,
    CompletionRequest,
    ChatRequest,
    ResponseRequest,
    LoadRequest,
)
"""Models that no route declares to FastAPI."""


class DocumentedApp(FastAPI):
    """FastAPI with the schemas of the bodies it does not handle itself."""

    def openapi(self) -> Json:
        if self.openapi_schema is None:
            document = super().openapi()
            _, models = models_json_schema([(model, "validation") for model in UNDESCRIBED], ref_template=REF)
            document["components"]["schemas"].update(models["$defs"])
        return self.openapi_schema or {}


def takes(body: type[Body], example: Json) -> Json:
    """The request body of a route, for its `openapi_extra`."""
    schema = {"$ref": REF.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}}


def answers(model: Any, example: object, *, stream: bool = False) -> Responses:
    """What a route that generates answers, as one JSON document or, with `stream`, as events too."""
    ok: Json = {"description": "The text.", "model": model, "content": {"application/json": {"example": example}}}
    if stream:
        ok["content"] |= _events()
    return {200: ok} | failures(*GENERATION)


def streams() -> Responses:
    """What a route answers that only knows events. Its response class says that there is nothing else."""
    return {200: {"description": "One event per token.", "content": _events()}} | failures(*GENERATION)


def own_events() -> Responses:
    """That a route may answer with events of a kind of its own."""
    return {200: {"content": {"text/event-stream": {}}}}


def failures(*statuses: int) -> Responses:
    return {status: {"description": FAILURES[status], "model": ErrorResponse} for status in statuses}


def _events() -> Json:
    return {"text/event-stream": {"schema": {"$ref": REF.format(model="StreamResponse")}}}


READING: Final = (400, 401, 413, 415, 422)
"""What a route that reads a body may fail with, behind the API key."""
GENERATION: Final = (*READING, 424, 429, 500, 503)
FAILURES: Final = {
    400: "The body is not JSON.",
    401: "The API key is missing or wrong.",
    404: "No such model is served.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    422: "Input validation error.",
    424: "Generation failed.",
    429: "Model is overloaded.",
    500: "Incomplete generation.",
    503: "Not ready.",
}
