"""What platforms call: /invocations, /vertex and KServe's routes, beyond the recorded answers of tests/data/http."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from router.api.admission import Permits, Services
from router.api.body import read_body
from router.api.schemas import VertexRequest
from router.api.tgi import native_routes
from router.errors import GenerationFailed, NotReady
from router.metrics import Metrics
from router.text.chat import ChatTemplate
from router.validate import Capacity, Limits, Validator
from tests.http_app import CONFIG, Client, FakeEngine, Json, Script
from tests.tiny_tokenizers import byte_level, tokenizer_of

INFER = "/v2/models/m/versions/1/infer"


def tensor(text: str) -> Json:
    return {"name": "in", "shape": [1, len(text)], "datatype": "BYTES", "data": list(text.encode())}


def infer_body(*texts: str, **extra: object) -> Json:
    return {"id": "1", "inputs": [tensor(text) for text in texts], "outputs": [{"name": "out"}] * len(texts)} | extra


def test_vertex_always_samples_and_knows_two_parameters() -> None:
    client = Client()
    parameters = {"max_new_tokens": 3, "seed": 7, "temperature": 0.5, "top_k": 2, "stop": ["a"], "best_of": 2}

    client.post("/vertex", {"instances": [{"inputs": "a", "parameters": parameters}, {"inputs": "b"}]})

    first, second = client.engine.requests
    assert (first.max_new_tokens, first.sampling.seed, first.stop) == (3, 7, ())
    assert (first.sampling.do_sample, first.sampling.temperature, first.sampling.top_k) == (True, 1.0, 0)
    assert second.sampling.do_sample


SEVERAL = [("/vertex", {"instances": [{"inputs": "a"}] * 3}), (INFER, infer_body(*"abc"))]


@pytest.mark.parametrize(("path", "body"), SEVERAL)
def test_calls_of_several_prompts_fail_whole_and_leave_nothing_running(path: str, body: Json) -> None:
    failing, hanging = Script(tokens=(), error=GenerationFailed("x")), Script(hangs=True)
    client = Client(FakeEngine([Script(), failing, hanging]))

    response = client.post(path, body)

    assert (response.status_code, response.json()["error"]) == (500, "Incomplete generation")
    assert client.engine.cancelled == client.engine.requests[2:]


@pytest.mark.parametrize(("path", "body"), SEVERAL)
def test_calls_of_more_prompts_than_there_is_room_for_submit_nothing(path: str, body: Json) -> None:
    client = Client(max_concurrent_requests=2)

    response = client.post(path, body)

    assert response.status_code == 500
    assert client.engine.requests == []


def test_vertex_takes_conversations_too() -> None:
    client = Client()
    conversation = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0}

    response = client.post("/vertex", {"instances": [conversation, {"inputs": "a"}]})

    assert response.json() == {"predictions": [" Paris", " Paris"]}
    rendered = tokenizer_of(byte_level()).encode("<user>Hi<assistant>")
    assert client.engine.requests[0].prompt == tuple(rendered)
    assert not client.engine.requests[0].sampling.do_sample
    assert client.engine.requests[0].max_new_tokens == 3


def test_a_conversation_that_cannot_be_rendered_keeps_its_error() -> None:
    client = Client(template_source="{{ raise_exception('no') }}")

    response = client.post("/vertex", {"instances": [{"messages": [{"role": "user", "content": "Hi"}]}]})

    assert (response.status_code, response.json()["error_type"]) == (422, "template_error")


@pytest.mark.parametrize("instance", [{}, {"inputs": 5}, "a"])
def test_unfit_instances_are_unfit_bodies(instance: object) -> None:
    response = Client().post("/vertex", {"instances": [instance]})

    assert response.status_code == 422
    assert response.json()["error"].startswith("Failed to deserialize the JSON body into the target type: ")


def test_vertex_does_not_say_what_was_wrong_with_an_instance() -> None:
    response = Client().post("/vertex", {"instances": [{"inputs": ""}]})

    assert (response.status_code, response.json()["error"]) == (500, "Incomplete generation")


def test_kserve_takes_native_parameters() -> None:
    client = Client()

    client.post(INFER, infer_body("a", parameters={"temperature": 0.5, "max_new_tokens": 3}))
    client.post(INFER, infer_body("a"))
    client.post(INFER, infer_body("a", parameters={}))

    requests = client.engine.requests
    assert (requests[0].sampling.temperature, requests[0].max_new_tokens) == (0.5, 3)
    assert [request.sampling.do_sample for request in requests] == [True, True, False]


@pytest.mark.parametrize("data", [[256], [-1], ["a"], [1.5], "abc", None])
def test_tensors_are_bytes(data: object) -> None:
    body = infer_body("a") | {"inputs": [tensor("a") | {"data": data}]}

    response = Client().post(INFER, body)

    assert response.status_code == 422
    assert "inputs[0].data: invalid" in response.json()["error"]


@pytest.mark.parametrize("path", ["/v2/health/ready", "/v2/models/m/versions/1/ready"])
def test_kserve_is_ready_when_the_group_is(path: str) -> None:
    client = Client(FakeEngine(ready=False))

    assert client.get(path).status_code == 503
    assert client.get("/v2/health/live").status_code == 200


def test_paths_of_vertex_ai_stand_beside_ours_and_behind_the_key() -> None:
    client = Client(aip_predict_route="/", aip_health_route="/up", api_key="sesame")
    body = {"instances": [{"inputs": "a"}]}

    assert client.post("/", body).status_code == 401
    assert client.post("/", body, headers={"authorization": "Bearer sesame"}).json() == {"predictions": [" Paris"]}
    assert client.get("/up").status_code == 200
    assert Client(FakeEngine(ready=False), aip_health_route="/up").get("/up").status_code == 503


# /invocations stands for several routes


async def describe(request: Request) -> Response:
    """Another API's route: it reads the body for itself, a second time."""
    body = await read_body(request, VertexRequest, limit_bytes=100)
    return Response(f"{len(body.instances)} instances")


def invoke(body: Json) -> httpx.Response:
    tokenizer = tokenizer_of(byte_level())
    limits = Limits.derive(CONFIG, Capacity(tokenizer.vocab_size, (2,), 8192), tokenizer)
    metrics = Metrics(max_input_tokens=10, max_total_tokens=20)
    engine = FakeEngine(refusal=NotReady("the native route"))
    services = Services(
        CONFIG, engine, Validator(limits, tokenizer), tokenizer, metrics, Permits(1), ChatTemplate({}, {})
    )
    app = FastAPI()
    app.include_router(native_routes(services, {"messages": describe}))

    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/invocations", json=body)

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("extra", "handed_on"),
    [({"messages": []}, True), ({"messages": None}, True), ({"messages": [], "inputs": "a"}, False), ({}, False)],
)
def test_invocations_are_told_apart_by_their_shape(extra: Json, handed_on: bool) -> None:
    response = invoke({"instances": [{"inputs": "a"}]} | extra)

    assert (response.text == "1 instances") is handed_on
