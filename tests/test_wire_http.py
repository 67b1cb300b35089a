"""Every route's answers, byte for byte: `tests/data/http` holds what is sent and what must come back.

    ### a name
    POST /generate            the request's line, its headers, an empty line, its body

    {"inputs":"a"}
    --->
    200                       the status, the headers in their order, an empty line, the body, two LF
    content-type: application/json

    {"generated_text":" Paris"}

Times are written as `*`, random ids as zeros. Behind the model stands a script, named here by the exchange.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from router.core.request import FinishReason
from router.engine import Token
from router.errors import GenerationFailed, NotReady, Overloaded
from tests.http_app import PARIS, Client, FakeEngine, Json, Script

EXCHANGES = Path(__file__).parent / "data" / "http"
TIMES = ("x-compute-time", "x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token")

TOP = (Token(3681, " Paris", -0.25, False), Token(7, " Rome", -17.25, False), Token(8, "x", float("-inf"), False))
BYTES = (
    Token(5, "", -0.1, False),
    Token(6, "\u00e9\u4eac", -3.5762787e-06, False),
    Token(7, '"\n\u2028', float("nan"), False),
)
STOPPED = Script((PARIS[0], Token(30, ".", -0.34, False)), reason=FinishReason.STOP_SEQUENCE)
FAILURE = GenerationFailed("Server error: NaN logits")

SCRIPTS: dict[str, list[Script]] = {
    "best_of": [Script(), Script((Token(7, " Rome", -1.0, False),), reason=FinishReason.LENGTH)],
    "best_of with prompt details": [Script(), Script((Token(7, " Rome", -1.0, False),))],
    "best_of with top tokens": [Script(top_tokens=TOP[:1]), Script((Token(7, " Rome", -1.0, False),), TOP[1:2])],
    "top tokens": [Script(top_tokens=TOP)],
    "streamed top tokens": [Script(top_tokens=TOP)],
    "text is not escaped": [Script(BYTES, reason=FinishReason.LENGTH)],
    "streamed text is not escaped": [Script(BYTES, reason=FinishReason.LENGTH)],
    "stop sequence": [STOPPED],
    "streamed stop sequence": [STOPPED],
    "failure": [Script((), error=FAILURE)],
    "failure before the first event": [Script((), error=FAILURE)],
    "failure behind the first event": [Script(PARIS[:1], error=FAILURE)],
    "two instances": [Script(), STOPPED],
    "an instance fails": [Script(), Script((), error=FAILURE)],
    "two tensors": [Script(), STOPPED],
    "a tensor fails": [Script((), error=FAILURE)],
    "completion of several prompts": [Script(), Script((Token(7, " Rome", -1.0, False),), reason=FinishReason.LENGTH)],
    "chat that fails behind the first event": [Script(PARIS[:1], error=FAILURE)],
}
REFUSALS = {"overloaded": Overloaded(7), "overloaded stream": Overloaded(7), "not ready": NotReady("unhealthy")}
UNREADY = (
    *("unhealthy", "hosted status while loading", "hosted model that loads"),
    "hosted model that loads and is waited for",
)
HOSTED = (
    *("hosted prompt", "hosted stream", "hosted completion", "hosted conversation", "hosted info", "hosted health"),
    *("hosted status", "hosted status while loading", "hosted models", "hosted models of others", "hosted model"),
    *("hosted model that is not here", "hosted model that loads", "hosted model that loads and is waited for"),
)
SETTINGS: dict[str, dict[str, object]] = {
    "wrong key": {"api_key": "sesame"},
    "too large": {"payload_limit": 20},
    "allowed origin": {"cors_allow_origin": ("https://a.example",)},
    "best_of above its limit": {"max_best_of": 1},
    "a path of the platform": {"aip_predict_route": "/p:predict"},
    **dict.fromkeys(("served name", "a model by a name with slashes", *HOSTED), {"served_model_name": "org/m"}),
    "conversation that its template refuses": {"template_source": "{{ raise_exception('Roles must alternate') }}"},
}


class Exchange(NamedTuple):
    name: str
    request: str
    answer: str


def read_exchanges() -> list[Exchange]:
    found = []
    for path in sorted(EXCHANGES.glob("*.txt")):
        for block in path.read_text().split("### ")[1:]:
            name, _, rest = block.partition("\n")
            request, _, answer = rest.partition("\n--->\n")
            found.append(Exchange(name, request, answer))
    return found


def perform(exchange: Exchange) -> httpx.Response:
    name = exchange.name
    engine = FakeEngine(list(SCRIPTS.get(name, [Script()])), REFUSALS.get(name), ready=name not in UNREADY)
    head, _, body = exchange.request.partition("\n\n")
    line, *headers = head.split("\n")
    method, path = line.split()
    sent = dict(header.split(": ", 1) for header in headers)
    if method == "POST":
        sent.setdefault("content-type", "application/json")
    return Client(engine, **SETTINGS.get(name, {})).call(method, path, headers=sent, content=body.encode())


def transcript(response: httpx.Response) -> str:
    """Without what is on every answer, unless a browser asks."""
    around = () if "origin" in response.request.headers else ("vary", "access-control", "x-request-id")
    shown = [(name, value) for name, value in response.headers.items() if not name.startswith(around)]
    headers = [f"{name}: {mask(name, value)}" for name, value in shown]
    return "\n".join([str(response.status_code), *headers, "", response.content.decode()]) + "\n"


def mask(name: str, value: str) -> str:
    if name not in TIMES:
        return value
    pattern = r"\d+(\.\d+(e-\d+)?)?" if name == "x-compute-time" else r"\d+"
    return "*" if re.fullmatch(pattern, value) else value


@pytest.mark.parametrize("exchange", read_exchanges(), ids=lambda exchange: exchange.name)
def test_answers_are_the_recorded_bytes(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda _: 2**64 - 1)
    monkeypatch.setattr(secrets, "token_hex", lambda num_bytes: "00" * num_bytes)
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000 * 10**9)

    response = perform(exchange)

    assert transcript(response) + "\n" == exchange.answer


def test_every_route_has_an_exchange() -> None:
    lines = {exchange.request.partition("\n")[0] for exchange in read_exchanges()}
    documented = Client().app.openapi()["paths"]
    wanted = {f"{method.upper()} {path}" for path, methods in documented.items() for method in methods}
    names = {"{model_name}": "m", "{model_version}": "1", "{model_id}": "org/m"}
    names["{framework}"] = "text-generation-inference"
    placed = {re.sub(r"\{\w+\}", lambda found: names[found[0]], line) for line in wanted}

    assert placed - lines == {"GET /metrics"}


def documented_answers(paths: Mapping[str, Json], method: str, path: str) -> Mapping[str, Json]:
    """By status; none for a route that is not in the document."""
    for template, methods in paths.items():
        pattern = re.sub(r"\{model_id\}", ".+", re.sub(r"\{(?!model_id)\w+\}", "[^/]+", template))
        if method.lower() in methods and re.fullmatch(pattern, path):
            return methods[method.lower()]["responses"]
    return {}


def test_the_document_knows_what_is_answered() -> None:
    paths = Client().app.openapi()["paths"]

    unknown = [exchange.name for exchange in read_exchanges() if not is_documented(paths, exchange)]

    assert unknown == []


def is_documented(paths: Mapping[str, Json], exchange: Exchange) -> bool:
    """Whether an answer's status and kind are, or nothing is said of the route."""
    method, path = exchange.request.partition("\n")[0].split()
    answers = documented_answers(paths, method, path)
    status, _, rest = exchange.answer.partition("\n")
    kind = re.search(r"^content-type: ([^;\n]+)", rest.partition("\n\n")[0], re.MULTILINE)
    kinds = answers.get(status, {}).get("content", {None: {}})
    return not answers or (status in answers and (kind[1] if kind else None) in kinds)


def test_the_document_declares_what_stands_in_its_paths() -> None:
    for path, methods in Client().app.openapi()["paths"].items():
        for operation in methods.values():
            declared = {part["name"] for part in operation.get("parameters", []) if part["in"] == "path"}
            assert declared == set(re.findall(r"\{(\w+)\}", path)), path


def test_scripts_are_of_exchanges() -> None:
    names = [exchange.name for exchange in read_exchanges()]

    assert len(set(names)) == len(names)
    assert {*SCRIPTS, *REFUSALS, *SETTINGS} <= set(names)
