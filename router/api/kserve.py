"""KServe's protocol, version 2: who we are, whether we live, and inference on tensors of bytes.

A prompt is the UTF-8 of a text, written as a list of numbers, and so is its answer. Any model name and version in the
path mean the model that is served. https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Depends, Request, Response

from router.api import render
from router.api.admission import Services, Wish
from router.api.body import read_body
from router.api.collect import Collected, collect
from router.api.openapi import answers, failures, takes
from router.api.schemas import KserveInput, KserveOutput, KserveRequest, KserveResponse
from router.api.sse import unless_gone
from router.config import VERSION
from router.errors import BadBatch, IncompleteBatch, NotReady, RouterError
from router.validate import Parameters

SERVER_NAME: Final = "text-generation-inference"
"""What TGI says, since clients may look for it."""

MODEL: Final = "/v2/models/{model_name}/versions/{model_version}"
EXAMPLE: Final = {
    "id": "1",
    "parameters": {"max_new_tokens": 5},
    "inputs": [{"name": "prompt", "shape": [1, 5], "datatype": "BYTES", "data": [72, 101, 108, 108, 111]}],
    "outputs": [{"name": "text"}],
}
ANSWER_EXAMPLE: Final = {
    "id": "1",
    "outputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [33]}],
}


def kserve_probes(services: Services) -> APIRouter:
    """What is never behind the API key."""
    router = APIRouter(tags=["Platforms"])

    @router.get("/v2")
    async def server_metadata() -> Response:
        """What this server is."""
        return _json({"name": SERVER_NAME, "version": VERSION, "extensions": ["health", "models", "metrics"]})

    @router.get("/v2/health/live")
    async def live() -> Response:
        """Whether the process answers at all."""
        return _json({"live": True})

    @router.get("/v2/health/ready", responses=failures(503))
    @router.get(f"{MODEL}/ready", dependencies=[Depends(_model)], responses=failures(503))
    async def ready() -> Response:
        """Whether requests are served; `live` is the protocol's key as TGI writes it."""
        if not services.engine.ready:
            raise NotReady("unhealthy")
        return _json({"live": True})

    @router.get(MODEL)
    async def model_metadata(model_name: str, model_version: str) -> Response:
        """What can be done with the model."""
        return _json({"name": model_name, "version": model_version, "extensions": ["infer", "ready"]})

    return router


def kserve_routes(services: Services) -> APIRouter:
    """Asks for the API key, which the caller sees to."""
    router = APIRouter(tags=["Platforms"])

    @router.post(
        f"{MODEL}/infer",
        dependencies=[Depends(_model)],
        responses=answers(KserveResponse, ANSWER_EXAMPLE),
        openapi_extra=takes(KserveRequest, EXAMPLE),
    )
    async def infer(request: Request) -> Response:
        """Generate a text for each input."""
        body = await read_body(request, KserveRequest, limit_bytes=services.config.payload_limit)
        if len(body.inputs) != len(body.outputs):
            raise BadBatch("Inputs and outputs length mismatch", "length mismatch")
        parameters = Parameters(do_sample=True) if body.parameters is None else body.parameters.to_parameters()
        wishes = [Wish(_text(tensor), parameters) for tensor in body.inputs]
        try:
            done = await unless_gone(request.receive, collect(services, request.state.request_id, wishes))
        except RouterError as error:
            raise IncompleteBatch from error
        outputs = [_tensor(output, collected) for output, collected in zip(body.outputs, done, strict=True)]
        return _json({"id": body.id, "outputs": outputs})

    return router


def _model(model_name: str, model_version: str) -> None:
    """That a path has them, for the document."""


def _text(tensor: KserveInput) -> str:
    try:
        return tensor.data.decode()
    except UnicodeDecodeError as error:
        kind = "incomplete utf-8 byte sequence"
        if error.reason != "unexpected end of data":
            kind = f"invalid utf-8 sequence of {error.end - error.start} bytes"
        raise BadBatch(f"{kind} from index {error.start}", "utf8") from error


def _tensor(output: KserveOutput, collected: Collected) -> dict[str, object]:
    data = collected.best.finish.text.encode()
    return {"name": output.name, "shape": [1, len(data)], "datatype": "BYTES", "data": list(data)}


def _json(value: object) -> Response:
    return Response(render.to_bytes(value), media_type="application/json")
