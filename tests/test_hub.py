"""The routes of the hosted Inference API: whose they are, what they answer beside what the routes behind them do, and
how long anybody waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest

from router.api import app as app_module
from router.api.hub import BEHIND_MODEL, PREFIXES, is_served
from router.config import Config
from router.errors import GenerationFailed, NotReady
from tests.engines import engine_over
from tests.ghost import GhostGroup, GhostSettings, ghost_group
from tests.http_app import CONFIG, MODEL_SHA, Client, FakeEngine, Json, Script, build, events
from tests.server import PATIENCE_S
from tests.tiny_tokenizers import byte_level, tokenizer_of

PROMPT = "The capital of France is"
NATIVE: Json = {"inputs": PROMPT, "parameters": {"details": True}}
BODIES: dict[str, Json] = {
    "/": NATIVE,
    "/v1/completions": {"prompt": PROMPT, "temperature": 0},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0},
}
VOLATILE = ("id", "created")


def hosting(engine: FakeEngine | None = None, **settings: object) -> Client:
    return Client(engine, **({"served_model_name": "org/m"} | settings))


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "NOT_READY_DELAY_S", 0.0)


# What is behind a model's path


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("method", "path"), BEHIND_MODEL)
def test_a_models_path_answers_as_the_route_behind_it(prefix: str, method: str, path: str) -> None:
    client = hosting(response_cache_bytes=0)
    body = {"json": BODIES[path]} if method == "POST" else {}

    own = client.call(method, path, **body)
    hosted = client.call(method, f"{prefix}/org/m{path.rstrip('/')}", **body)

    assert own.status_code == hosted.status_code == 200
    assert steady(hosted) == steady(own)
    assert hosted.headers.keys() - own.headers.keys() == {"x-sha"}
    assert hosted.headers["x-sha"] == MODEL_SHA


def steady(response: httpx.Response) -> object:
    """Without what no two answers share."""
    value = response.json() if response.content else None
    return {name: part for name, part in value.items() if name not in VOLATILE} if isinstance(value, dict) else value


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_models_path_streams(prefix: str) -> None:
    client = hosting()

    own, hosted = (client.post(path, NATIVE | {"stream": True}) for path in ("/", f"{prefix}/org/m"))

    assert len(events(hosted)) == 2
    assert hosted.content == own.content


def test_the_parameters_and_the_id_of_a_request_arrive() -> None:
    client = hosting()

    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 7, "temperature": 0.5}}
    response = client.post("/models/org/m", body, headers={"x-request-id": "one"})

    (request,) = client.engine.requests
    assert (request.max_new_tokens, request.sampling.temperature, request.request_id) == (7, 0.5, "one")
    assert response.headers["x-request-id"] == "one"


@pytest.mark.parametrize("path", ["/models/org/m", "/pipeline/text-generation/org/m", "/models/org/m/v1/completions"])
def test_a_path_that_generates_cannot_be_read(path: str) -> None:
    response = hosting().get(path)

    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json() == {"error": "Method Not Allowed"}


@pytest.mark.parametrize("path", [*BODIES])
@pytest.mark.parametrize("declared", [None, "application/x-www-form-urlencoded", "text/plain;charset=UTF-8"])
def test_bodies_need_not_be_declared_as_json(path: str, declared: str | None) -> None:
    """By curl, by `requests` with a text, and by `fetch`: the hosted API's own examples."""
    client = hosting()
    headers = {} if declared is None else {"content-type": declared}

    own, hosted = (
        client.call("POST", f"{prefix}{path}", content=json.dumps(BODIES[path]), headers=headers)
        for prefix in ("", "/models/m")
    )

    assert (own.status_code, hosted.status_code) == (415, 200)


def test_what_is_no_json_is_refused_and_so_is_what_is_packed() -> None:
    client = hosting()

    image = client.post_raw("/models/m", b"\x89PNG", "image/png")
    packed = client.post("/models/m", NATIVE, headers={"content-encoding": "gzip"})

    assert (image.status_code, packed.status_code) == (400, 415)


def test_a_wish_to_wait_need_not_be_declared_as_json() -> None:
    client = hosting(FakeEngine(ready=False))

    waits, does_not = (
        client.post_raw("/models/m", json.dumps(NATIVE | {"options": {"wait_for_model": wants}}).encode(), "text/plain")
        for wants in (True, False)
    )

    assert (waits.status_code, does_not.status_code) == (200, 503)


def test_other_tasks_have_no_route() -> None:
    assert hosting().post("/pipeline/feature-extraction/org/m", NATIVE).status_code == 404


@pytest.mark.parametrize("name", ["org/info", "health", "org/v1/completions/x"])
def test_a_name_may_look_like_a_route(name: str) -> None:
    client = hosting(served_model_name=name)

    assert client.post(f"/models/{name}", NATIVE).status_code == 200
    assert client.get(f"/models/{name}/info").json()["model_id"] == name
    assert client.get(f"/models/{name}/health").status_code == 200
    assert client.post(f"/models/{name}/v1/chat/completions", BODIES["/v1/chat/completions"]).status_code == 200


# Names


@pytest.mark.parametrize(
    ("model_id", "served_name", "asked"),
    [
        ("org/name", None, ["org/name", "name"]),
        ("org/name", "public", ["org/name", "name", "public"]),
        ("smollm2-135m-instruct", None, ["smollm2-135m-instruct"]),
        ("/models/llama", None, ["/models/llama", "models/llama", "llama", "llama/"]),
        ("./models/google/gemma/", None, ["google/gemma", "gemma", "models/google/gemma"]),
        ("/models/llama", "meta/Llama", ["llama", "meta/Llama", "Llama"]),
    ],
)
def test_names_of_the_model(model_id: str, served_name: str | None, asked: list[str]) -> None:
    config = Config(model_id=model_id, served_model_name=served_name)

    assert [name for name in asked if not is_served(config, name)] == []


@pytest.mark.parametrize("asked", ["", "/", "ame", "rg/name", "org", "other/name", "org/name/x", "NAME", "public/x"])
def test_names_of_other_models(asked: str) -> None:
    assert not is_served(Config(model_id="org/name", served_model_name="public"), asked)


@pytest.mark.parametrize(
    "path", ["/models/org/m", "/models/org%2Fm", "/models/m", "/models//models/llama", "/models/llama"]
)
def test_a_model_answers_to_all_of_its_names(path: str) -> None:
    assert hosting(model_id="/models/llama").post(path, NATIVE).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/models/fake/model"),
        ("POST", "/models/fake/model/v1/chat/completions"),
        ("POST", "/models/fake/model/v1/completions"),
        ("POST", "/hf-inference/models/fake/model"),
        ("POST", "/pipeline/text-generation/fake/model"),
        ("GET", "/models/fake/model/info"),
        ("GET", "/models/fake/model/health"),
        ("GET", "/status/fake/model"),
        ("GET", "/api/models/fake/model"),
    ],
)
def test_other_models_do_not_exist(method: str, path: str) -> None:
    client = hosting(FakeEngine(ready=False))

    response = client.call(method, path, **({"content": b"{"} if method == "POST" else {}))

    assert response.status_code == 404
    assert response.content == b'{"error":"Model fake/model does not exist"}'
    assert response.headers["x-sha"] == MODEL_SHA
    assert response.headers["x-request-id"]


# What is known of the model


def test_status_tells_whether_the_model_is_loaded() -> None:
    loaded, loading = (hosting(FakeEngine(ready=ready), compute_type="cpu") for ready in (True, False))
    common = {"compute_type": "cpu", "framework": "text-generation-inference"}

    assert loaded.get("/status/m").json() == {"state": "Loaded", "loaded": True} | common
    assert loading.get("/status/m").json() == {"state": "Loadable", "loaded": False} | common


def test_the_framework_lists_the_model_and_others_list_none() -> None:
    client = hosting()

    assert client.get("/framework/text-generation-inference").json() == [
        {"model_id": "org/m", "sha": MODEL_SHA, "task": "text-generation"}
    ]
    assert client.get("/framework/transformers").json() == []


def test_the_hub_says_what_the_model_is_for() -> None:
    about = hosting().get("/api/models/org/m", params={"expand[]": "pipeline_tag"}).json()

    assert (about["id"], about["sha"], about["pipeline_tag"]) == ("org/m", MODEL_SHA, "text-generation")


def test_weights_from_elsewhere_have_a_commit_that_is_none() -> None:
    client = hosting(model_sha=None)

    assert client.post("/models/m", NATIVE).headers["x-sha"] == "0" * 40
    (model,) = client.get("/framework/text-generation-inference").json()
    assert model["sha"] == "0" * 40


@pytest.mark.parametrize("path", ["/", "/generate", "/info", "/v1/models", "/no/such/route"])
def test_only_hosted_routes_name_a_commit(path: str) -> None:
    assert "x-sha" not in hosting().post(path, NATIVE).headers


# Keys


@pytest.mark.parametrize("path", ["/models/org/m", "/models/fake/model", "/hf-inference/models/m/v1/chat/completions"])
def test_generating_needs_the_key_before_anything_is_told(path: str) -> None:
    response = hosting(api_key="sesame").post(path, NATIVE)

    assert response.status_code == 401
    assert response.headers["x-sha"] == MODEL_SHA


def test_the_right_key_opens_a_models_path() -> None:
    response = hosting(api_key="sesame").post("/models/m", NATIVE, headers={"authorization": "Bearer sesame"})

    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/models/m/info", "/status/m", "/framework/x", "/api/models/m"])
def test_what_is_known_of_the_model_can_be_put_behind_the_key(path: str) -> None:
    assert hosting(api_key="sesame").get(path).status_code == 200
    assert hosting(api_key="sesame", protect_info=True).get(path).status_code == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/models/m"), ("GET", "/models/m/info"), ("GET", "/status/m"), ("GET", "/models/m/health")],
)
def test_the_commit_is_not_told_either_when_what_is_known_is_behind_the_key(method: str, path: str) -> None:
    response = hosting(api_key="sesame", protect_info=True).call(method, path)

    assert MODEL_SHA not in str(response.headers)


def test_a_models_health_needs_no_key() -> None:
    assert hosting(api_key="sesame", protect_info=True).get("/models/m/health").status_code == 200


# Loading


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "path", ["/models/m", "/models/m/v1/completions", "/hf-inference/models/m/v1/chat/completions"]
)
def test_a_model_that_loads_is_not_waited_for(path: str) -> None:
    client = hosting(FakeEngine(ready=False, ready_in_s=7.2618))

    response = client.post(path, BODIES["/v1/chat/completions"] | BODIES["/v1/completions"] | NATIVE)

    assert response.status_code == 503
    assert response.content == b'{"error":"Model m is currently loading","estimated_time":7.3}'
    assert (response.headers["retry-after"], response.headers["x-sha"]) == ("1", MODEL_SHA)
    assert client.engine.requests == []


@pytest.mark.parametrize("path", ["/models/m", "/models/m/v1/chat/completions"])
def test_a_server_that_shuts_down_says_no_more_than_that_the_model_is_not_there(path: str) -> None:
    """Clients of the hosted API take an `error_type` for a failure of the request and do not ask again."""
    client = hosting(FakeEngine(refusal=NotReady("the server is shutting down")))
    body = BODIES["/v1/chat/completions"] | NATIVE

    response = client.post(path, body, headers={"x-wait-for-model": "1"})

    assert response.status_code == 503
    assert response.json() == {"error": "Model m is currently loading", "estimated_time": 20.0}


@pytest.mark.parametrize("given", ["true", "1", "True", " 1 "])
def test_a_header_asks_to_wait(given: str) -> None:
    client = hosting(FakeEngine(ready=False))

    assert client.post("/models/m", NATIVE, headers={"x-wait-for-model": given}).status_code == 200


@pytest.mark.parametrize("path", [*BODIES])
def test_an_option_asks_to_wait(path: str) -> None:
    client = hosting(FakeEngine(ready=False))
    body = BODIES[path] | {"options": {"wait_for_model": True, "use_gpu": False}}

    assert client.post(f"/models/m{path.rstrip('/')}", body).status_code == 200


@pytest.mark.parametrize(
    ("header", "options"),
    [("false", {}), ("0", {}), ("yes", {}), ("", {"wait_for_model": False}), ("", None), ("", [1])],
)
def test_whoever_does_not_ask_does_not_wait(header: str, options: object) -> None:
    client = hosting(FakeEngine(ready=False))

    response = client.post("/models/m", NATIVE | {"options": options}, headers={"x-wait-for-model": header})

    assert response.status_code == 503


def test_a_refusal_to_wait_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clients ask again at once."""
    pauses: list[float] = []

    async def note(pause_s: float) -> None:
        pauses.append(pause_s)

    monkeypatch.undo()
    client = hosting(FakeEngine(ready=False))
    monkeypatch.setattr(app_module.asyncio, "sleep", note)

    client.post("/models/m", NATIVE)

    assert app_module.NOT_READY_DELAY_S in pauses


def test_a_model_that_loads_is_still_described_and_its_health_is_not_good() -> None:
    client = hosting(FakeEngine(ready=False))

    assert client.get("/models/m/info").status_code == 200
    assert client.get("/api/models/m").status_code == 200
    assert client.get("/models/m/health").status_code == 503


def test_a_body_that_is_none_is_refused_while_the_model_loads() -> None:
    client = hosting(FakeEngine(ready=False))

    assert client.post_raw("/models/m", b"{").status_code == 400


def test_a_request_that_waits_is_answered_when_the_group_is_back() -> None:
    config = replace(CONFIG, served_model_name="org/m", response_cache_bytes=0)
    tokenizer = tokenizer_of(byte_level())
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12, "do_sample": True, "seed": 3}}
    waiting_body = body | {"options": {"wait_for_model": True}}

    async def act(group: GhostGroup) -> tuple[httpx.Response, httpx.Response, list[httpx.Response]]:
        may_restart = asyncio.Event()

        async def restart() -> None:
            await may_restart.wait()
            await group.revive()

        async with engine_over(group.addresses, tokenizer, restart=restart) as engine:
            transport = httpx.ASGITransport(build(engine, config))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                before = await client.post("/models/m", json=body)
                await group.kill(0)
                await soon(lambda: not engine.ready)
                refused = await client.post("/models/m", json=body)
                header = {"x-wait-for-model": "true"}
                waiting = asyncio.gather(
                    client.post("/models/m", json=body, headers=header), client.post("/models/m", json=waiting_body)
                )
                await soon(lambda: engine.gauges.num_waiting == 2)
                may_restart.set()
                return before, refused, await waiting

    async def run() -> tuple[httpx.Response, httpx.Response, list[httpx.Response]]:
        async with ghost_group(GhostSettings(vocab_size=tokenizer.vocab_size)) as group:
            return await act(group)

    before, refused, waited = asyncio.run(run())

    assert (before.status_code, refused.status_code) == (200, 503)
    assert [response.json() for response in waited] == [before.json()] * 2


# The cache


def compute_types(client: Client, path: str, *, times: int = 2, **headers: str) -> list[str]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    answers = [client.post(path, NATIVE, headers=sent) for _ in range(times)]
    return [answer.headers["x-compute-type"] for answer in answers]


MADE, CACHED = Config().compute_type, "cache"


def test_hosted_routes_keep_their_answers_and_others_do_not() -> None:
    client = hosting()

    assert compute_types(client, "/") == [MADE, MADE]
    assert compute_types(client, "/models/org/m") == [MADE, CACHED]
    assert compute_types(client, "/models/m") == [CACHED, CACHED]
    assert compute_types(client, "/models/m", x_use_cache="false") == [MADE, MADE]
    assert compute_types(client, "/") == [MADE, MADE]


def test_a_kept_answer_is_the_same_and_names_its_commit() -> None:
    client = hosting(FakeEngine([Script(), Script(error=GenerationFailed("asked again"))]))

    first, second = (client.post("/models/org/m", NATIVE | {"stream": True}) for _ in range(2))

    assert second.headers["x-compute-type"] == CACHED
    assert second.content == first.content
    assert second.headers["x-sha"] == MODEL_SHA


def test_options_ask_for_an_answer_of_ones_own() -> None:
    client = hosting()
    client.post("/models/m", NATIVE)

    response = client.post("/models/m", NATIVE | {"options": {"use_cache": False}})

    assert response.headers["x-compute-type"] == MADE


def test_an_operator_may_want_no_cache_at_all() -> None:
    assert compute_types(hosting(response_cache_bytes=0), "/models/m") == [MADE, MADE]


def test_with_room_for_all_routes_they_share_what_is_kept() -> None:
    client = hosting(response_cache_bytes=1_000_000)

    assert compute_types(client, "/") == [MADE, CACHED]
    assert compute_types(client, "/models/m") == [CACHED, CACHED]
