"""What the Python drivers share: finding their rows, running them, reporting them.

A driver is a script full of functions `row_<number>_<what must hold>`, numbered as in the acceptance matrix. It runs in
the environment of the client it drives, against servers that run already, and prints one JSON line per row, whose
problem is null or a traceback. So this module knows nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

Row = Callable[["Servers"], Awaitable[None] | None]

PROMPT = "The capital of France is"
PROMPT_IDS = [504, 3575, 282, 4649, 314]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
"""What SmolLM2 says to the question, greedily."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer", "minimum": 1, "maximum": 100_000_000},
    },
    "required": ["name", "country", "inhabitants"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Servers:
    """Their URLs."""

    plain: str
    """SmolLM2, with default settings."""
    strict: str
    """SmolLM2, one sequence at a time and only with the key."""
    key: str
    failing: str
    """Streams two tokens and fails."""
    slow: str
    """Is silent for longer than any keep-alive interval before each token."""
    unready: str
    """Answers 503 to everything."""
    loading: str
    """Answers 503 for the first 3 s after its first request."""
    restarting: str
    """Loads its model for 3 s, whenever it is asked, and answers those who waited."""
    absent: str
    """The same for an hour."""
    caching: str
    """Keeps its answers. Its model is called google/gemma-2-2b-it."""
    certificate: str
    """A file that vouches for huggingface.co and what belongs to it, if these are asked through a front."""
    front: str
    """A proxy behind which all hosts are the plain server."""
    alias_front: str
    """One behind which they are the caching server."""


def run(driver: ModuleType) -> None:
    """Runs all rows of a driver; the command line names the servers."""
    servers = Servers(**json.loads(sys.argv[1]))
    for name, row in vars(driver).items():
        if name.startswith("row_"):
            sys.stdout.write(json.dumps({"row": name, "problem": _problem(row, servers)}) + "\n")
            sys.stdout.flush()


def _problem(row: Row, servers: Servers) -> str | None:
    try:
        running = row(servers)
        if inspect.iscoroutine(running):
            asyncio.run(running)
    except Exception:
        return traceback.format_exc()
    return None


def reimport(package: str, **variables: str) -> ModuleType:
    """The package where the environment says this, which it reads once; in place of the one imported before."""
    os.environ.update(variables)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    return importlib.import_module(package)


@contextlib.contextmanager
def behind(front: str, servers: Servers) -> Iterator[None]:
    """The real names of hosts lead to our servers."""
    names = {"HTTPS_PROXY": front, "REQUESTS_CA_BUNDLE": servers.certificate, "SSL_CERT_FILE": servers.certificate}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


def check_weather(arguments: str) -> None:
    """They must follow the schema of `WEATHER`."""
    given = json.loads(arguments)
    assert given.keys() == {"city", "unit"}, given
    assert isinstance(given["city"], str)
    assert len(given["city"]) <= 20
    assert given["unit"] in ("celsius", "fahrenheit")


def check_city(text: str) -> None:
    """It must follow the schema `CITY`."""
    given = json.loads(text)
    assert given.keys() == {"name", "country", "inhabitants"}, given
    assert all(isinstance(given[name], str) and len(given[name]) <= 20 for name in ("name", "country"))
    assert type(given["inhabitants"]) is int
    assert 1 <= given["inhabitants"] <= 100_000_000


@contextlib.contextmanager
def raises(kind: type[Exception], message: str) -> Iterator[None]:
    """The block must raise exactly `kind`, and say `message` somewhere."""
    try:
        yield
    except Exception as error:
        if type(error) is not kind or message not in str(error):
            raise AssertionError(f"expected {kind.__name__} with {message!r}, not {error!r}") from error
    else:
        raise AssertionError(f"expected {kind.__name__}, not success")


@contextlib.contextmanager
def occupied(servers: Servers) -> Iterator[None]:
    """The strict server's only place is taken."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {servers.key}"}
    parameters = {"min_new_tokens": 1500, "max_new_tokens": 1500}
    body = json.dumps({"inputs": PROMPT, "parameters": parameters}).encode()
    request = urllib.request.Request(f"{servers.strict}/generate_stream", body, headers)
    with _open_patiently(request) as stream:
        assert stream.readline().startswith(b"data: {")
        yield


def _open_patiently(request: urllib.request.Request) -> contextlib.closing:
    """Whoever had the place before may have left only just now."""
    while True:
        try:
            return contextlib.closing(urllib.request.urlopen(request, timeout=60))
        except urllib.error.HTTPError as refusal:
            if refusal.code != 429:
                raise
            time.sleep(0.05)
