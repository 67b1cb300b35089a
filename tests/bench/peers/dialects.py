"""What goes to an engine over HTTP, and what its events mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.bench.client import Arrival, BenchError, Json, server_sent_events, token_times


@dataclass(frozen=True, slots=True)
class Answer:
    """One text as it came."""

    sent_at: float
    event_at: Sequence[float]
    """When text arrived. An engine may put several tokens into one event, and an event without any at the end."""
    num_tokens: int
    num_prompt_tokens: int | None
    """As the engine counts them, if it says so."""

    @property
    def first_token_s(self) -> float:
        return self.event_at[0] - self.sent_at


@dataclass(frozen=True, slots=True)
class Dialect:
    """`body` of a prompt and a number of new tokens goes to `path`; `understood` reads what was recorded."""

    path: str
    body: Callable[[str, int], Mapping[str, Json]]
    understood: Callable[[float, Sequence[Arrival]], Answer]


def _native_body(prompt: str, num_new_tokens: int) -> Mapping[str, Json]:
    limits = {"max_new_tokens": num_new_tokens, "min_new_tokens": num_new_tokens}
    return {"inputs": prompt, "parameters": {**limits, "do_sample": False}}


def _native_answer(sent_at: float, arrivals: Sequence[Arrival]) -> Answer:
    times = token_times(arrivals)
    return Answer(sent_at, times, len(times), None)


NATIVE: Final = Dialect("/generate_stream", _native_body, _native_answer)


def completions(**fields: Json) -> Dialect:
    """OpenAI's /v1/completions; `fields` say in an engine's own way that end tokens do not count."""

    def body(prompt: str, num_new_tokens: int) -> Mapping[str, Json]:
        return {"prompt": prompt, "max_tokens": num_new_tokens, "temperature": 0, "stream": True, **fields}

    return Dialect("/v1/completions", body, completion_answer)


def completion_answer(sent_at: float, arrivals: Sequence[Arrival]) -> Answer:
    """Raises `BenchError` if anything but a text and its usage came back."""
    event_at: list[float] = []
    usage: Mapping[str, int] = {}
    for at, event in server_sent_events(arrivals):
        data = event.strip().removeprefix(b"data:").strip()
        if data == b"[DONE]":
            continue
        payload = json.loads(data)
        if payload.get("error"):
            raise BenchError(f"in the stream: {json.dumps(payload)[:300]}")
        # Tokens without a text of their own, special ones above all, come as empty texts.
        if payload["choices"]:
            event_at.append(at)
        usage = payload.get("usage") or usage
    if not event_at or "completion_tokens" not in usage:
        raise BenchError("the stream ended without a token or without its usage")
    return Answer(sent_at, event_at, usage["completion_tokens"], usage.get("prompt_tokens"))
