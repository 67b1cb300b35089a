"""What clients should not send: the documented status, a JSON `error`, and a next request that is served."""

from __future__ import annotations

import json

import anyio
import httpx
import pytest

from tests.http_app import Client, Json

BODY_ROUTES = ["/", "/generate", "/generate_stream", "/tokenize", "/invocations"]
GOOD: Json = {"inputs": "a", "parameters": {}}
UNPARSED = "Failed to parse the request body as JSON: "
UNFIT = "Failed to deserialize the JSON body into the target type: "


@pytest.fixture(scope="module")
def client() -> Client:
    return Client(payload_limit=300_000)


def assert_refused(client: Client, path: str, response: httpx.Response, status: int) -> str:
    """The error's sentence; the next good request is served."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert isinstance(error, str)
    assert client.post(path, GOOD).status_code == 200
    return error


NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b"  \n",
    "truncated": b'{"inputs":',
    "trailing garbage": b'{"inputs":"a"}x',
    "trailing comma": b'{"inputs":"a",}',
    "two documents": b"{}{}",
    "single quotes": b"{'inputs':'a'}",
    "NaN": b'{"inputs":"a","parameters":{"temperature":NaN}}',
    "infinity": b'{"inputs":"a","parameters":{"temperature":-Infinity}}',
    "float beyond all": b'{"inputs":"a","parameters":{"temperature":1e400}}',
    "integer beyond all": b'{"inputs":"a","parameters":{"seed":' + b"9" * 5000 + b"}}",
    "lone surrogate": b'{"inputs":"\\ud800"}',
    "lone surrogate in an unknown field": b'{"inputs":"a","x":"\\udfff"}',
    "invalid UTF-8": b'{"inputs":"\xff\xfe"}',
    "UTF-16": '{"inputs":"a"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + b'{"inputs":"a"}',
    "control character": b'{"inputs":"\x00"}',
    "depth": b"[" * 100_000,
    "balanced depth": b'{"inputs":"a","x":' + b"[" * 1_015 + b"]" * 1_015 + b"}",
    "one level too many": b'{"inputs":"a","x":' + b"[" * 127 + b"]" * 127 + b"}",
}


@pytest.mark.parametrize("raw", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("path", BODY_ROUTES)
def test_what_is_not_json_is_a_400(client: Client, path: str, raw: bytes) -> None:
    response = client.post_raw(path, raw)

    assert assert_refused(client, path, response, 400).startswith(UNPARSED)


def test_malformed_json_is_located(client: Client) -> None:
    error = client.post_raw("/generate", b'{\n "inputs": x}').json()["error"]

    assert error.startswith(UNPARSED)
    assert error.endswith(" at line 2 column 12")


UNFIT_BODIES: list[tuple[str, str]] = [
    ("{}", "missing field `inputs` at line 1 column 2"),
    ('{"parameters":{}}  ', "missing field `inputs` at line 1 column 17"),
    ("[]", "invalid type: sequence, expected struct {model} at line 1 column 2"),
    ('"a"', 'invalid type: string "a", expected struct {model} at line 1 column 3'),
    ("null", "invalid type: null, expected struct {model} at line 1 column 4"),
    ('{"inputs":null}', "inputs: invalid type: null, expected a string at line 1 column 14"),
    ('{"inputs":5}', "inputs: invalid type: integer `5`, expected a string at line 1 column 11"),
    ('{"inputs":["a"]}', "inputs: invalid type: sequence, expected a string at line 1 column 15"),
    ('{"inputs":{}}', "inputs: invalid type: map, expected a string at line 1 column 12"),
    (
        '{"inputs":"a",\n"parameters":[]}',
        "parameters: invalid type: sequence, expected struct GenerateParameters at line 2 column 15",
    ),
    (
        '{"parameters":{"top_k":"2"},"inputs":"a"}',
        'parameters.top_k: invalid type: string "2", expected i32 at line 1 column 26',
    ),
    (
        '{"inputs":"é","parameters":{"max_new_tokens":20.0}}',
        "parameters.max_new_tokens: invalid type: floating point `20.0`, expected u32 at line 1 column 50",
    ),
    (
        '{"inputs":"a","parameters":{"max_new_tokens":-1}}',
        "parameters.max_new_tokens: invalid value: integer `-1`, expected u32 at line 1 column 47",
    ),
    (
        '{"inputs":"a","parameters":{"max_new_tokens":4294967296}}',
        "parameters.max_new_tokens: invalid value: integer `4294967296`, expected u32 at line 1 column 55",
    ),
    (
        '{"inputs":"a","parameters":{"best_of":true}}',
        "parameters.best_of: invalid type: boolean `true`, expected u32 at line 1 column 42",
    ),
    (
        '{"inputs":"a","parameters":{"seed":1180591620717411303424}}',
        "parameters.seed: invalid type: floating point `1.1805916207174113e+21`, expected u64 at line 1 column 57",
    ),
    (
        '{"inputs":"a","parameters":{"temperature":"hot"}}',
        'parameters.temperature: invalid type: string "hot", expected f32 at line 1 column 47',
    ),
    (
        '{"inputs":"a","parameters":{"temperature":true}}',
        "parameters.temperature: invalid type: boolean `true`, expected f32 at line 1 column 46",
    ),
    (
        '{"inputs":"a","parameters":{"temperature":1e39}}',
        "parameters.temperature: invalid value: floating point `1e+39`, expected f32 at line 1 column 46",
    ),
    (
        '{"inputs":"a","parameters":{"details":1}}',
        "parameters.details: invalid type: integer `1`, expected a boolean at line 1 column 39",
    ),
    (
        '{"inputs":"a","parameters":{"stop":"x"}}',
        'parameters.stop: invalid type: string "x", expected a sequence at line 1 column 38',
    ),
    (
        '{"inputs":"a","parameters":{"stop":["x", 5]}}',
        "parameters.stop[1]: invalid type: integer `5`, expected a string at line 1 column 42",
    ),
    (
        '{"inputs":"a","parameters":{"stop":[null]}}',
        "parameters.stop[0]: invalid type: null, expected a string at line 1 column 40",
    ),
    (
        '{"inputs":"a","parameters":{"logit_bias":[1.0]}}',
        "parameters.logit_bias: invalid type: sequence, expected a map at line 1 column 46",
    ),
    (
        '{"inputs":"a","parameters":{"logit_bias":{"1":"x"}}}',
        'parameters.logit_bias.1: invalid type: string "x", expected f32 at line 1 column 49',
    ),
    (
        '{"inputs":"a","parameters":{"bad_words":["x",[1,-1]]}}',
        "parameters.bad_words[1]: invalid type: sequence, expected a string or token ids at line 1 column 51",
    ),
    (
        '{"inputs":"a","parameters":{"grammar":{"type":"json"}}}',
        "parameters.grammar: missing field `value` at line 1 column 53",
    ),
    (
        '{"inputs":"a","parameters":{"grammar":{"type":"ebnf","value":""}}}',
        "parameters.grammar.type: unknown variant, "
        "expected one of 'json', 'json_object', 'json_schema', 'regex' or 'lark' "
        "at line 1 column 52",
    ),
    ('{"inputs":"a","inputs":"b"}', "duplicate field `inputs`"),
    ('{"inputs":"a","parameters":{"seed":1,"seed":2}}', "duplicate field `seed`"),
]
MODELS = {"/": "CompatGenerateRequest", "/invocations": "CompatGenerateRequest"}


@pytest.mark.parametrize(("text", "sentence"), UNFIT_BODIES, ids=[text[:50] for text, _ in UNFIT_BODIES])
@pytest.mark.parametrize("path", BODY_ROUTES)
def test_json_of_another_shape_is_a_422_in_serdes_words(client: Client, path: str, text: str, sentence: str) -> None:
    response = client.post_raw(path, text.encode())

    error = assert_refused(client, path, response, 422)
    assert error == UNFIT + sentence.replace("{model}", MODELS.get(path, "GenerateRequest"))


def test_wrong_values_are_not_repeated_at_length(client: Client) -> None:
    response = client.post("/generate", {"inputs": "a", "parameters": {"top_k": "x" * 100_000}})

    assert response.status_code == 422
    assert len(response.content) < 500


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx"],
)
@pytest.mark.parametrize("path", BODY_ROUTES)
def test_other_content_types_are_a_415(client: Client, path: str, content_type: str) -> None:
    response = client.post_raw(path, json.dumps(GOOD).encode(), content_type)

    error = assert_refused(client, path, response, 415)
    assert error == "Expected request with `Content-Type: application/json`"


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"]
)
def test_spellings_of_json_are_accepted(client: Client, content_type: str) -> None:
    assert client.post_raw("/generate", json.dumps(GOOD).encode(), content_type).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_compressed_bodies_are_a_415(client: Client, encoding: str) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}

    response = client.call("POST", "/generate", content=b"\x1f\x8b", headers=headers)

    assert_refused(client, "/generate", response, 415)


@pytest.mark.parametrize("path", BODY_ROUTES)
def test_too_large_bodies_are_a_413(client: Client, path: str) -> None:
    response = client.post(path, {"inputs": "a" * 300_000})

    error = assert_refused(client, path, response, 413)
    assert error == "Failed to buffer the request body: length limit exceeded"


async def answer(client: Client, headers: list[tuple[bytes, bytes]], messages: list[Json]) -> tuple[int, int]:
    """The status of a raw request and how many parts of its body were read."""
    status, num_read = 0, 0

    async def receive() -> Json:
        nonlocal num_read
        num_read += 1
        return messages[num_read - 1]

    async def send(message: Json) -> None:
        nonlocal status
        status = int(str(message.get("status", status)))

    scope: Json = {"type": "http", "method": "POST", "path": "/generate", "headers": headers, "query_string": b""}
    await client.app(scope, receive, send)  # type: ignore[arg-type]
    return status, num_read


@pytest.mark.parametrize("length", [b"300001", b"9" * 30])
def test_body_that_declares_to_be_too_large_is_not_read(client: Client, length: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]

    assert anyio.run(answer, client, headers, []) == (413, 0)


def test_body_that_grows_too_large_is_not_read_to_its_end(client: Client) -> None:
    part: Json = {"type": "http.request", "body": b" " * 100_000, "more_body": True}

    assert anyio.run(answer, client, [(b"content-type", b"application/json")], [part] * 10) == (413, 4)


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/generate/",
        "http://test//generate",
        "/Generate",
        "/generate%2f",
        "/v1/embeddings",
        "/..%2fhealth",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_routes_are_a_404(client: Client, method: str, path: str) -> None:
    response = client.call(method, path)

    assert assert_refused(client, "/generate", response, 404) == "Not Found"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate", "POST"),
        ("PUT", "/generate", "POST"),
        ("DELETE", "/generate_stream", "POST"),
        ("TRACE", "/tokenize", "POST"),
        ("POST", "/health", "GET,HEAD"),
        ("POST", "/metrics", "GET,HEAD"),
        ("PATCH", "/info", "GET,HEAD"),
        ("PUT", "/", "GET,HEAD,POST"),
        ("PUT", "/v2/models/m/versions/1/infer", "POST"),
    ],
)
def test_wrong_methods_are_a_405(client: Client, method: str, path: str, allowed: str) -> None:
    response = client.call(method, path)

    assert assert_refused(client, "/generate", response, 405) == "Method Not Allowed"
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("inputs", ["\x00", "\u202e\u2066", "\x1b[31m", "a\r\nb: c", "\U0010ffff", "\ufffd", "e\u0301"])
def test_strange_texts_are_served(client: Client, inputs: str) -> None:
    response = client.post("/", {"inputs": inputs})

    assert response.status_code == 200
    assert response.json()[0]["generated_text"] == inputs + " Paris"


@pytest.mark.parametrize("inner", [b"[]", b"1"])
def test_deepest_accepted_nesting_is_served(client: Client, inner: bytes) -> None:
    raw = b'{"inputs":"a","x":' + b"[" * 125 + inner + b"]" * 125 + b"}"

    assert client.post_raw("/generate", raw).status_code == 200


def test_what_would_be_too_deep_to_be_told_back_is_refused(client: Client) -> None:
    raw = b'{"input":"a","metadata":' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}"

    assert client.post_raw("/v1/responses", raw).status_code == 400


@pytest.mark.parametrize(("depth", "is_text"), [(127, False), (128, True)])
def test_arguments_of_past_calls_deeper_than_a_body_stay_text(depth: int, is_text: bool) -> None:
    client = Client(template_source="{% for message in messages %}{{ message.content }}{% endfor %}")
    arguments = '{"a":' * depth + "1" + "}" * depth
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]

    prompt = client.post("/chat_tokenize", {"messages": messages}).json()["templated_text"]

    assert (json.dumps(arguments) in prompt) == is_text


def test_enormous_prompts_are_refused_while_others_are_served() -> None:
    client = Client()
    prompts = ["a" * 1_900_000, "ab " * 600_000, "é" * 900_000]

    async def race() -> tuple[list[int], int]:
        num_served = 0
        statuses: list[int] = []
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

            async def ask(prompt: str) -> None:
                statuses.append((await http.post("/generate", json={"inputs": prompt})).status_code)

            async with anyio.create_task_group() as group:
                for prompt in prompts:
                    group.start_soon(ask, prompt)
                while len(statuses) < len(prompts):
                    num_served += (await http.post("/generate", json=GOOD)).status_code == 200
        return statuses, num_served

    statuses, num_served = anyio.run(race)

    assert statuses == [422] * len(prompts)
    assert num_served > len(prompts)
