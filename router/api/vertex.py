"""Vertex AI's route: several prompts or conversations in one call, a text for each.

As TGI has it: tokens of a prompt are always drawn, `max_new_tokens` and `seed` are its only parameters that count, and
a failure of any instance fails the call without saying why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fastapi import APIRouter, Request, Response

from router.api import render
from router.api.admission import Services, Wish
from router.api.body import Parsed, fit_body, read_body
from router.api.collect import collect
from router.api.openai_bodies import ChatRequest
from router.api.openai_chat import understand_chat
from router.api.openapi import answers, takes
from router.api.schemas import Predictions, VertexInstance, VertexRequest
from router.api.sse import unless_gone
from router.errors import BadBatch, IncompleteBatch, RouterError
from router.validate import Parameters

EXAMPLE: Final = {"instances": [{"inputs": "The capital of France is", "parameters": {"max_new_tokens": 5}}]}
ANSWER_EXAMPLE: Final = {"predictions": [" Paris."]}
NO_INSTANCES: Final = "Input validation error"


def vertex_routes(services: Services) -> APIRouter:
    """Asks for the API key, which the caller sees to. Also serves the path that the platform chose, if it did."""
    router = APIRouter(tags=["Platforms"])
    config = services.config

    async def predict(request: Request) -> Response:
        """Generate a text for each instance."""
        body = await read_body(request, VertexRequest, limit_bytes=config.payload_limit)
        if not body.instances:
            raise BadBatch(NO_INSTANCES, NO_INSTANCES)
        wishes = [await _understand(services, instance) for instance in body.instances]
        try:
            done = await unless_gone(request.receive, collect(services, request.state.request_id, wishes))
        except RouterError as error:
            raise IncompleteBatch from error
        predictions = {"predictions": [collected.best.finish.text for collected in done]}
        return Response(render.to_bytes(predictions), media_type="application/json")

    if config.aip_predict_route is not None:
        router.add_api_route(config.aip_predict_route, predict, methods=["POST"], include_in_schema=False)
    router.add_api_route(
        "/vertex",
        predict,
        methods=["POST"],
        responses=answers(Predictions, ANSWER_EXAMPLE),
        openapi_extra=takes(VertexRequest, EXAMPLE),
    )
    return router


async def _understand(services: Services, instance: Mapping[str, object]) -> Wish:
    """Raises `BadBody` with positions inside the instance, and what a conversation's template raises."""
    parsed = Parsed(render.to_bytes(instance), instance)
    if parsed.has("messages") and not parsed.has("inputs"):
        wish, _ = await understand_chat(services, fit_body(parsed, ChatRequest))
        return wish
    prompt = fit_body(parsed, VertexInstance)
    given = prompt.parameters
    if given is None:
        return Wish(prompt.inputs, Parameters(do_sample=True))
    return Wish(prompt.inputs, Parameters(do_sample=True, max_new_tokens=given.max_new_tokens, seed=given.seed))
