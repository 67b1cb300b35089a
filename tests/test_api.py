"""The native routes: exact bytes, headers, errors, and what happens when clients go away."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn

from router.api import render, schemas
from router.api.sse import frame
from router.core.request import FinishReason
from router.engine import Token, TokenEvent
from router.errors import GenerationFailed, NotReady, Overloaded
from tests.http_app import MODEL_SHA, PARIS, Client, FakeEngine, Json, Script, build, events
from tests.server import PATIENCE_S

PROMPT = "The capital of France is"
GREEDY: Json = {"inputs": PROMPT, "parameters": {"details": True}}
SAMPLED_SEED = 2**64 - 1


def with_parameters(**parameters: object) -> Json:
    return {"inputs": PROMPT, "parameters": parameters}


# Answers, byte for byte


def test_generate_answers_the_text() -> None:
    response = Client().post("/generate", with_parameters())

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.content == b'{"generated_text":" Paris"}'


def test_generate_answers_details_in_the_order_of_the_contract() -> None:
    client = Client()

    response = client.post("/generate", GREEDY)

    num_prompt = len(client.engine.requests[0].prompt)
    assert response.text == (
        '{"generated_text":" Paris","details":{"finish_reason":"eos_token","generated_tokens":2,"seed":null,'
        '"prefill":[],"tokens":[{"id":3681,"text":" Paris","logprob":-0.25,"special":false},'
        '{"id":2,"text":"</s>","logprob":-2.5839844,"special":true}],'
        f'"prompt_tokens":{num_prompt}}}}}'
    )


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_compat_routes_answer_a_list_with_the_prompt_in_front(path: str) -> None:
    response = Client().post(path, {"inputs": PROMPT, "parameters": {}})

    assert response.content == b'[{"generated_text":"The capital of France is Paris"}]'


def test_compat_default_of_full_text_can_be_turned_off() -> None:
    response = Client(default_return_full_text=False).post("/", {"inputs": PROMPT})

    assert response.content == b'[{"generated_text":" Paris"}]'


@pytest.mark.parametrize(("path", "wants", "prefix"), [("/", False, ""), ("/generate", True, PROMPT)])
def test_request_decides_about_full_text(path: str, wants: bool, prefix: str) -> None:
    answer = Client().post(path, with_parameters(return_full_text=wants)).json()

    answer = answer[0] if isinstance(answer, list) else answer
    assert answer["generated_text"] == prefix + " Paris"


def test_stream_is_one_event_per_token() -> None:
    client = Client()

    response = client.post("/generate_stream", GREEDY)

    num_prompt = len(client.engine.requests[0].prompt)
    assert response.text == (
        'data: {"index":1,"token":{"id":3681,"text":" Paris","logprob":-0.25,"special":false},'
        '"generated_text":null,"details":null}\n\n'
        'data: {"index":2,"token":{"id":2,"text":"</s>","logprob":-2.5839844,"special":true},'
        '"generated_text":" Paris","details":{"finish_reason":"eos_token","generated_tokens":2,"seed":null,'
        f'"input_length":{num_prompt},"prompt_tokens":{num_prompt}}}}}\n\n'
    )


def test_stream_without_details_says_null() -> None:
    response = Client().post("/generate_stream", with_parameters())

    assert events(response)[-1]["details"] is None
    assert events(response)[-1]["generated_text"] == " Paris"


def test_compat_route_streams_on_demand_with_the_prompt_in_front_of_the_last_text() -> None:
    response = Client().post("/", {"inputs": PROMPT, "stream": True})

    assert response.headers["content-type"] == "text/event-stream"
    assert [event["generated_text"] for event in events(response)] == [None, PROMPT + " Paris"]


def test_stream_headers() -> None:
    headers = Client(compute_type="2-cpu").post("/generate_stream", GREEDY).headers

    assert headers["content-type"] == "text/event-stream"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-compute-type"] == "2-cpu"
    assert headers["x-compute-characters"] == str(len(PROMPT))
    assert "x-compute-time" not in headers


def test_plain_headers() -> None:
    client = Client()

    headers = client.post("/generate", {"inputs": "né", "parameters": {}}).headers

    assert headers["x-compute-type"] == "gpu+optimized"
    assert headers["x-compute-characters"] == "2"
    assert headers["x-prompt-tokens"] == str(len(client.engine.requests[0].prompt))
    assert headers["x-generated-tokens"] == "2"
    assert float(headers["x-compute-time"]) >= 0
    names = ("x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token")
    assert all(headers[name].isdecimal() for name in names)


def test_top_tokens_stand_between_token_and_text() -> None:
    top = (Token(5, "a", -0.1, False), Token(6, "b", float("-inf"), False))
    engine = FakeEngine([Script(top_tokens=top)])

    response = Client(engine).post("/generate_stream", with_parameters(top_n_tokens=2))

    first = events(response)[0]
    assert list(first) == ["index", "token", "top_tokens", "generated_text", "details"]
    assert [token["logprob"] for token in first["top_tokens"]] == [-0.1, None]  # type: ignore[attr-defined]


def test_top_tokens_stand_last_but_one_in_details() -> None:
    engine = FakeEngine([Script(top_tokens=(Token(5, "a", -0.1, False),))])

    answer = Client(engine).post("/generate", with_parameters(top_n_tokens=1, details=True)).json()

    assert list(answer["details"])[-2:] == ["top_tokens", "prompt_tokens"]
    assert answer["details"]["top_tokens"] == [[{"id": 5, "text": "a", "logprob": -0.1, "special": False}]] * 2


def test_prefill_has_one_entry_per_prompt_token_and_no_first_logprob() -> None:
    client = Client()

    answer = client.post("/generate", with_parameters(decoder_input_details=True)).json()

    prefill = answer["details"]["prefill"]
    assert [token["id"] for token in prefill] == list(client.engine.requests[0].prompt)
    assert "".join(token["text"] for token in prefill) == PROMPT
    assert [token["logprob"] for token in prefill] == [None] + [-1.0] * (len(prefill) - 1)


def test_seed_is_shown_exactly_when_tokens_are_drawn() -> None:
    client = Client()

    sampled = client.post("/generate", with_parameters(details=True, do_sample=True, seed=SAMPLED_SEED))
    greedy = client.post("/generate", with_parameters(details=True, seed=SAMPLED_SEED))

    assert f'"seed":{SAMPLED_SEED},' in sampled.text
    assert greedy.json()["details"]["seed"] is None


def scripts_with_logprobs(*logprobs: float) -> list[Script]:
    return [Script([PARIS[0]._replace(text=str(value), logprob=value)]) for value in logprobs]


def test_best_of_answers_the_likeliest_and_lists_the_others() -> None:
    client = Client(FakeEngine(scripts_with_logprobs(-2.0, -1.0, -3.0)), max_best_of=3)

    answer = client.post("/generate", with_parameters(best_of=3, do_sample=True, details=True)).json()

    assert answer["generated_text"] == "-1.0"
    others = answer["details"]["best_of_sequences"]
    assert [other["generated_text"] for other in others] == ["-2.0", "-3.0"]
    seeds = {answer["details"]["seed"], *(other["seed"] for other in others)}
    assert seeds == {request.sampling.seed for request in client.engine.requests}
    assert len(seeds) == 3


def test_best_of_takes_the_first_of_equals_by_mean_not_by_sum() -> None:
    long = Script([PARIS[0]._replace(text="long", logprob=-1.0)] * 3)
    scripts = [*scripts_with_logprobs(-2.0), long, *scripts_with_logprobs(-1.0)]
    client = Client(FakeEngine(scripts), max_best_of=3)

    answer = client.post("/generate", with_parameters(best_of=3, do_sample=True)).json()

    assert answer == {"generated_text": "longlonglong"}


def test_tokenize_answers_byte_offsets_and_takes_no_permit() -> None:
    client = Client(FakeEngine(refusal=NotReady("loading")))

    response = client.post("/tokenize", {"inputs": "zé"})

    assert response.status_code == 200
    tokens = response.json()
    assert list(tokens[0]) == ["id", "text", "start", "stop"]
    assert (tokens[0]["text"], tokens[0]["start"], tokens[0]["stop"]) == ("z", 0, 1)
    assert tokens[-1]["stop"] == 3


def test_tokenize_takes_empty_inputs() -> None:
    assert Client().post("/tokenize", {"inputs": ""}).content == b"[]"


def test_parameters_left_out_sample_and_empty_ones_do_not() -> None:
    client = Client()

    client.post("/generate", {"inputs": PROMPT})
    client.post("/generate", {"inputs": PROMPT, "parameters": {}})

    assert [request.sampling.do_sample for request in client.engine.requests] == [True, False]


def test_null_is_accepted_for_every_optional_field() -> None:
    nulls = dict.fromkeys(schemas.GenerateParameters.model_fields)
    client = Client()

    response = client.post("/", {"inputs": PROMPT, "parameters": nulls, "stream": None})
    client.post("/generate", {"inputs": PROMPT, "parameters": None})

    assert response.status_code == 200
    assert [request.sampling.do_sample for request in client.engine.requests] == [False, True]


def test_unknown_fields_are_ignored_at_every_level() -> None:
    body = {"inputs": PROMPT, "model": "m", "options": {"x": 1}, "parameters": {"ignore_eos_token": True}}

    assert Client().post("/generate", body).status_code == 200


def test_rendered_keys_are_the_documented_ones() -> None:
    engine = FakeEngine([Script(top_tokens=(Token(5, "a", -0.1, False),))])
    client = Client(engine)

    wanted = with_parameters(best_of=2, do_sample=True, details=True, top_n_tokens=1)
    answer = client.post("/generate", wanted).json()
    event = events(client.post("/generate_stream", with_parameters(details=True, top_n_tokens=1)))[-1]

    assert list(answer) == list(schemas.GenerateResponse.model_fields)
    assert list(answer["details"]) == list(schemas.Details.model_fields)
    assert list(answer["details"]["best_of_sequences"][0]) == list(schemas.BestOfSequence.model_fields)
    assert list(answer["details"]["tokens"][0]) == list(schemas.Token.model_fields)
    assert list(event) == list(schemas.StreamResponse.model_fields)
    assert list(event["details"]) == list(schemas.StreamDetails.model_fields)  # type: ignore[call-overload]
    assert list(client.get("/info").json()) == list(schemas.Info.model_fields)


def test_long_texts_are_tokenized_whole() -> None:
    text = "z\u2603" * 5_000

    tokens = Client().post("/tokenize", {"inputs": text}).json()

    assert len(tokens) > 10_000
    assert tokens[-1]["stop"] == len(text.encode())
    starts = [token["start"] for token in tokens]
    assert starts == sorted(starts)


# Floats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (1.0, "1.0"),
        (-0.34, "-0.34"),
        (-2.5839844, "-2.5839844"),
        (-0.1, "-0.1"),
        (-17.25, "-17.25"),
        (16777216.0, "16777216.0"),
        (-3.5762787e-06, "-0.0000035762787"),
        (-1.1920929e-07, "-1.1920929e-7"),
        (1e-7, "1e-7"),
        (0.00097666, "0.00097666"),
        (1e12, "1000000000000.0"),
        (1.5e13, "1.5e13"),
        (3.4028235e38, "3.4028235e38"),
    ],
)
def test_float32_is_written_with_the_fewest_digits(value: float, text: str) -> None:
    [single] = struct.unpack("<f", struct.pack("<f", value))

    assert render.format_float32(single) == text
    assert render.to_bytes(render.float32(single)) == text.encode()


def test_float32_text_gives_the_same_float32_again() -> None:
    for bits in range(0x00800000, 0x7F800000, 0x00012345):
        [value] = struct.unpack("<f", struct.pack("<I", bits))

        text = render.format_float32(value)

        assert struct.pack("<f", float(text)) == struct.pack("<I", bits)
        assert len(text.partition("e")[0].replace(".", "").strip("0")) <= 9


def test_float32_is_written_alike_whatever_its_size() -> None:
    rng = random.Random(5)
    for exponent in (-20, *range(-16, 13), 40):
        for mantissa in (0, 1, 0x7FFFFF, *(rng.getrandbits(23) for _ in range(200))):
            [value] = struct.unpack("<f", struct.pack("<I", 0x80000000 | (exponent + 127) << 23 | mantissa))

            assert render.to_bytes(render.float32(value)).decode() == render.format_float32(value)


@pytest.mark.parametrize("text", [" Paris", "", '"\\', "\n\t\x00\x1f\x7f", "é\u2028☃", "%d{}"])
@pytest.mark.parametrize("logprob", [-0.25, -1e-7, -0.0, -1234.5, float("-inf"), float("nan")])
def test_an_event_of_a_stream_is_written_as_any_json_is(text: str, logprob: float) -> None:
    for special in (False, True):
        token = Token(49151, text, logprob, special)

        written = render.plain_frame(3, token)

        assert written == frame(render.to_bytes(render.full_stream_event(TokenEvent(3, token), None)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_what_is_no_number_is_null(value: float | None) -> None:
    assert render.to_bytes({"logprob": render.float32(value)}) == b'{"logprob":null}'


# Failures


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("refusal", "status", "body", "retry_after"),
    [
        (Overloaded(7), 429, {"error": "Model is overloaded", "error_type": "overloaded"}, "7"),
        (NotReady("loading"), 503, {"error": "loading", "error_type": "healthcheck"}, "1"),
    ],
)
def test_refused_requests_tell_when_to_come_back(
    path: str, refusal: Overloaded | NotReady, status: int, body: Json, retry_after: str
) -> None:
    response = Client(FakeEngine(refusal=refusal)).post(path, GREEDY)

    assert (response.status_code, response.json()) == (status, body)
    assert response.headers["retry-after"] == retry_after


def test_too_many_sequences_at_once_are_refused_before_their_validation() -> None:
    client = Client(max_concurrent_requests=1, max_best_of=4)

    response = client.post("/generate", with_parameters(best_of=2, do_sample=True, temperature=-1.0))

    assert response.status_code == 429
    assert response.json()["error_type"] == "overloaded"
    assert client.engine.requests == []


def test_permits_come_back_whatever_happened() -> None:
    failing = Script(error=GenerationFailed("x"))
    client = Client(FakeEngine([failing, failing, Script()]), max_concurrent_requests=1)

    for body in (GREEDY, with_parameters(temperature=-1.0)):
        client.post("/generate", body)
        client.post("/generate_stream", body)

    assert client.post("/generate", GREEDY).status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_failure_before_the_first_token_is_a_status(path: str) -> None:
    engine = FakeEngine([Script(tokens=(), error=GenerationFailed("Server error: NaN logits"))])

    response = Client(engine).post(path, GREEDY)

    assert response.status_code == 424
    sentence = "Request failed during generation: Server error: NaN logits"
    assert response.json() == {"error": sentence, "error_type": "generation"}


def test_failure_after_the_first_token_is_an_event_and_the_end() -> None:
    engine = FakeEngine([Script(tokens=PARIS[:1], error=GenerationFailed("Server error: NaN logits"))])

    response = Client(engine).post("/generate_stream", GREEDY)

    assert response.status_code == 200
    sentence = "Request failed during generation: Server error: NaN logits"
    assert response.text.endswith(f'\n\ndata: {{"error":"{sentence}","error_type":"generation"}}\n\n')
    assert len(events(response)) == 2


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_our_own_mistakes_are_json_too(path: str) -> None:
    engine = FakeEngine(refusal=RuntimeError("/secret/path"))  # type: ignore[arg-type]

    response = Client(engine).post(path, GREEDY, headers={"x-request-id": "abc"})

    assert response.status_code == 500
    assert response.json() == {"error": "Internal server error", "error_type": "internal"}
    assert response.headers["x-request-id"] == "abc"


def test_sequences_are_cancelled_when_another_one_of_the_call_fails() -> None:
    scripts = [Script(error=GenerationFailed("x")), Script(hangs=True)]
    client = Client(FakeEngine(scripts))

    response = client.post("/generate", with_parameters(best_of=2, do_sample=True))

    assert response.status_code == 424
    assert client.engine.cancelled == client.engine.requests[1:]


# Keys, origins, ids


PROTECTED = [
    *("/", "/generate", "/generate_stream", "/tokenize", "/invocations", "/vertex"),
    "/v2/models/m/versions/1/infer",
]


@pytest.mark.parametrize("path", PROTECTED)
@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer ", "Basic sesame", "sesame", "Bearer sesam", "é"])
def test_wrong_keys_are_refused_alike(path: str, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given.encode()}

    response = Client(api_key="sesame").post(path, GREEDY, headers=headers)

    assert response.status_code == 401
    assert response.json() == {"error": "Unauthorized: the API key is missing or wrong"}


def test_two_keys_are_none() -> None:
    headers = [("authorization", "Bearer sesame"), ("authorization", "Bearer sesame")]

    assert Client(api_key="sesame").post("/generate", GREEDY, headers=headers).status_code == 401


@pytest.mark.parametrize("given", ["Bearer sesame", "bearer SESAME"])
def test_right_key_is_compared_as_a_whole_without_case(given: str) -> None:
    response = Client(api_key="sesame").post("/generate", GREEDY, headers={"authorization": given})

    assert response.status_code == 200


def test_key_is_asked_for_before_the_body_is_looked_at() -> None:
    assert Client(api_key="sesame").post_raw("/generate", b"{").status_code == 401


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ping", "/livez", "/readyz", "/info", "/metrics", "/v2", "/v2/health/ready"]
)
def test_probes_need_no_key(path: str) -> None:
    assert Client(api_key="sesame").get(path).status_code == 200


@pytest.mark.parametrize(("path", "status"), [("/info", 401), ("/metrics", 401), ("/health", 200), ("/livez", 200)])
def test_info_and_metrics_can_be_put_behind_the_key(path: str, status: int) -> None:
    assert Client(api_key="sesame", protect_info=True).get(path).status_code == status


@pytest.mark.parametrize("path", ["/generate", "/no/such/route", "/health"])
def test_options_is_answered_before_routes_and_keys(path: str) -> None:
    response = Client(api_key="sesame").call("OPTIONS", path, headers={"origin": "https://a.example"})

    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["access-control-allow-methods"] == "GET,POST"
    assert response.headers["access-control-allow-headers"] == "content-type"


@pytest.mark.parametrize(("origin", "allowed"), [("https://a.example", True), ("https://b.example", False)])
def test_only_listed_origins_are_allowed(origin: str, allowed: bool) -> None:
    client = Client(cors_allow_origin=("https://a.example",))

    headers = client.get("/health", headers={"origin": origin}).headers

    assert headers.get("access-control-allow-origin") == (origin if allowed else None)


def test_request_id_is_echoed_and_passed_on() -> None:
    client = Client()

    response = client.post("/generate", GREEDY, headers={"x-request-id": "req-1.a:b"})

    assert response.headers["x-request-id"] == "req-1.a:b"
    assert client.engine.requests[0].request_id == "req-1.a:b"


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", 'a"b', "é", "\x1b[31m"])
def test_hostile_request_ids_are_replaced(given: str) -> None:
    response = Client().get("/no/such/route", headers={"x-request-id": given.encode()})

    assert response.headers["x-request-id"] != given
    assert len(response.headers["x-request-id"]) == 32


# Operations


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/readyz"])
def test_health_is_the_groups(path: str) -> None:
    good, bad = Client().get(path), Client(FakeEngine(ready=False)).get(path)

    assert (good.status_code, good.content) == (200, b"")
    assert (bad.status_code, bad.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})


def test_process_lives_while_the_group_does_not() -> None:
    assert Client(FakeEngine(ready=False)).get("/livez").status_code == 200


def test_info() -> None:
    info = Client(served_model_name="org/m").get("/info").json()

    assert (info["model_id"], info["model_sha"]) == ("org/m", MODEL_SHA)
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (40, 64)
    assert (info["max_best_of"], info["max_stop_sequences"], info["max_client_batch_size"]) == (2, 4, 4)
    assert info["router"] == "text-generation-router"


def test_metrics_are_prometheus_text_and_count_failures() -> None:
    client = Client(max_concurrent_requests=1)
    client.post("/generate", with_parameters(temperature=-1.0))
    client.post("/generate", with_parameters(best_of=2, do_sample=True))

    response = client.get("/metrics")

    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert 'tgi_request_failure{err="validation"} 1.0' in response.text
    assert 'tgi_request_failure{err="overloaded"} 1.0' in response.text


NO_ROLE_KNOWN = "{{ raise_exception('no') }}"
CHAT: Json = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("path", "body", "cause"),
    [
        ("/generate_stream", with_parameters(temperature=-1.0), "validation"),
        ("/vertex", {"instances": [with_parameters(max_new_tokens=0)]}, "validation"),
        ("/v1/chat/completions", CHAT | {"n": 0}, "validation"),
        ("/v1/chat/completions", CHAT, "template"),
        ("/v1/chat/completions", CHAT | {"stream": True}, "template"),
        ("/chat_tokenize", CHAT, "template"),
        ("/vertex", {"instances": [CHAT]}, "template"),
        ("/generate", {}, None),
        ("/no/such", {}, None),
    ],
)
def test_every_refusal_is_counted_once_by_its_cause(path: str, body: Json, cause: str | None) -> None:
    client = Client(template_source=NO_ROLE_KNOWN)

    assert client.post(path, body).status_code >= 400

    assert failures(client) == ({cause: "1.0"} if cause else {})


def test_tools_that_cannot_be_called_count_as_invalid() -> None:
    client = Client()

    assert client.post("/v1/chat/completions", CHAT | {"tool_choice": "required"}).json()["error_type"] == "tool_error"

    assert failures(client) == {"validation": "1.0"}


def failures(client: Client) -> dict[str, str]:
    """Those that were counted, by cause."""
    counts = re.findall(r'tgi_request_failure\{err="(\w+)"\} ([\d.]+)', client.get("/metrics").text)
    return {cause: count for cause, count in counts if count != "0.0"}


def test_success_is_logged_once_without_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    client = Client()

    with caplog.at_level(logging.INFO, logger="router"):
        client.post("/generate", GREEDY, headers={"x-request-id": "one"})
        client.post("/generate_stream", GREEDY, headers={"x-request-id": "two"})

    messages = [record.getMessage() for record in caplog.records]
    assert [message.split()[:2] for message in messages] == [
        ["Success", "request_id=one"],
        ["Success", "request_id=two"],
    ]
    assert "France" not in caplog.text
    assert "Paris" not in caplog.text


KSERVE_MODEL = "/v2/models/{model_name}/versions/{model_version}"


def test_a_clients_trace_is_in_the_log_and_in_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client = Client()

    with caplog.at_level(logging.INFO, logger="router"):
        traced = [
            client.post(path, GREEDY, headers={"traceparent": trace}) for path in ("/generate", "/generate_stream")
        ]
        untraced = client.post("/generate", GREEDY, headers={"traceparent": trace.replace("-b", "-B")})

    trace_ids = [record.getMessage().split()[2] for record in caplog.records]
    assert trace_ids == ["trace_id=0af7651916cd43dd8448eb211c80319c"] * 2 + ["trace_id=None"]
    assert [response.headers["traceparent"] for response in traced] == [trace] * 2
    assert "traceparent" not in untraced.headers


@pytest.mark.parametrize("path", ["/", "/health", "/info", "/metrics", "/openapi.json", "/v2"])
def test_head_is_get_without_a_body(path: str) -> None:
    client = Client()

    head, get = client.call("HEAD", path), client.get(path)

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]
    assert client.call("HEAD", "/generate").headers["allow"] == "POST"


def test_line_ends_that_only_python_knows_do_not_end_an_event() -> None:
    text = "a\x85b\u2028c\u2029d"
    engine = FakeEngine([Script((Token(1, text, -1.0, False),), reason=FinishReason.LENGTH)])

    response = Client(engine).post("/generate_stream", GREEDY)

    event, empty = response.text.splitlines()
    assert json.loads(event.removeprefix("data: "))["generated_text"] == text
    assert empty == ""


DOCUMENTED = {
    *("/", "/generate", "/generate_stream", "/tokenize", "/invocations"),
    *("/health", "/ping", "/livez", "/readyz", "/info", "/metrics"),
    *("/vertex", "/v2", "/v2/health/live", "/v2/health/ready", KSERVE_MODEL),
    *(f"{KSERVE_MODEL}/ready", f"{KSERVE_MODEL}/infer"),
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", "/v1/models/{model_id}"),
    *("/chat_tokenize", "/load_model"),
    *("/models/{model_id}", "/models/{model_id}/v1/completions", "/models/{model_id}/v1/chat/completions"),
    *("/models/{model_id}/info", "/models/{model_id}/health"),
    *("/status/{model_id}", "/framework/{framework}", "/api/models/{model_id}"),
}


@pytest.mark.parametrize("path", ["/openapi.json", "/api-doc/openapi.json"])
def test_openapi_lists_every_route_with_examples(path: str) -> None:
    document = Client().get(path).json()

    assert set(document["paths"]) == DOCUMENTED
    for methods in document["paths"].values():
        if "post" in methods:
            assert methods["post"]["requestBody"]["content"]["application/json"]["example"]
    schemas_ = document["components"]["schemas"]
    assert "max_new_tokens" in schemas_["GenerateParameters"]["properties"]
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= set(schemas_)


def test_docs_are_a_page() -> None:
    assert "swagger" in Client().get("/docs").text


# Clients that go away, over real sockets


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(engine: FakeEngine) -> AsyncIterator[str]:
    """The application under uvicorn on a free port."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build(engine), log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve([listener]))
    try:
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_disconnect_before_the_first_token_cancels(path: str) -> None:
    engine = FakeEngine([Script(tokens=(), hangs=True)])
    async with serving(engine) as url, httpx.AsyncClient(timeout=PATIENCE_S) as client:
        call = asyncio.create_task(client.post(url + path, json=GREEDY))
        await until(lambda: engine.requests)

        call.cancel()

        await until(lambda: engine.cancelled)
        assert engine.cancelled == engine.requests


@pytest.mark.anyio
async def test_disconnect_inside_a_stream_cancels() -> None:
    engine = FakeEngine([Script(tokens=PARIS[:1], hangs=True)])
    async with serving(engine) as url, httpx.AsyncClient(timeout=PATIENCE_S) as client:
        async with client.stream("POST", url + "/generate_stream", json=GREEDY) as response:
            first = await anext(response.aiter_lines())
            assert first.startswith('data: {"index":1,')

        await until(lambda: engine.cancelled)
        assert engine.cancelled == engine.requests


@pytest.mark.anyio
async def test_every_event_is_one_write() -> None:
    engine = FakeEngine([Script([*PARIS[:1]] * 5, reason=FinishReason.LENGTH)])
    writes: list[bytes] = []

    async def receive() -> Json:
        if not asked:
            asked.append(True)
            return {"type": "http.request", "body": json.dumps(GREEDY).encode(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Json) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            writes.append(message["body"])  # type: ignore[arg-type]

    asked: list[bool] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate_stream",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    await build(engine)(scope, receive, send)  # type: ignore[arg-type]

    assert len(writes) == 5
    assert all(write.startswith(b"data: ") and write.endswith(b"\n\n") for write in writes)
