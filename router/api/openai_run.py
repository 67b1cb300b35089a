"""What the OpenAI routes have in common: several choices running side by side, and how an answer is written.

A call has one or more prompts, each with `n` choices; choice number `prompt * n + k` is sequence k of that prompt.

    wishes ─► admitted_together ─► events of all choices as they come ─► Writer ─► chunks ─► [DONE]
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from fastapi import Request, Response

from router.api import render
from router.api.admission import Call, Services, Wish, admitted_together, log_success, time_headers
from router.api.sse import EventStream, frame, unless_gone
from router.config import VERSION
from router.core.request import FinishReason
from router.engine import Generation, TokenEvent
from router.errors import RouterError

JSON_TYPE: Final = "application/json"
DONE: Final = frame(b"[DONE]")
PLACE: Final = "\0"

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence of a call."""

    index: int
    call: Call
    generation: Generation


class Writer(Protocol):
    """Turns the events of a call's choices into the payloads of a stream, or into whole frames at once."""

    def begin(self, calls: Sequence[Call], choices: Sequence[Choice]) -> None: ...

    def write(self, choice: Choice, event: TokenEvent) -> Iterable[Json | bytes]: ...

    def end(self) -> Iterable[Json]: ...


class FrameOfText:
    """A frame that is the same for every token but for its text, rendered once.

    `payload` has it with `PLACE` for its text.
    """

    def __init__(self, payload: Json) -> None:
        self._head, _, self._tail = _frame(payload).rpartition(render.to_bytes(PLACE))

    def frame(self, text: str) -> bytes | None:
        """None for a text that needs a closer look."""
        return self._head + render.to_bytes(text) + self._tail if text.isascii() else None


@dataclass(slots=True)
class Usage:
    """Tokens of a call so far. A prompt counts once, whatever the number of its choices."""

    num_prompt: int = 0
    num_completion: int = 0

    @classmethod
    def begin(cls, calls: Sequence[Call]) -> Usage:
        return cls(sum(call.demand.input_length for call in calls))

    def to_json(self) -> Json:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_completion,
            "total_tokens": self.num_prompt + self.num_completion,
        }


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every object of an answer begins with."""

    object: str
    id: str
    model: str
    created: int

    @classmethod
    def new(cls, kind: str, prefix: str, services: Services, asked: str | None = None) -> Envelope:
        """With an id nobody else has; `created` is in Unix seconds. The model that was `asked` for is named if it is an
        adapter."""
        id_ = f"{prefix}-{secrets.token_hex(16)}"
        name = asked if asked in services.validator.limits.adapters else None
        return cls(kind, id_, name or services.config.model_name, time.time_ns() // 1_000_000_000)

    def to_json(self) -> Json:
        return {
            "object": self.object,
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"{VERSION}-native",
        }


class ChoiceText:
    """The text of one choice, piece by piece, without special tokens except `markers`."""

    def __init__(self, markers: frozenset[str] = frozenset()) -> None:
        self._markers = markers
        self._num_shown = 0

    def read(self, event: TokenEvent) -> str:
        """What the event adds. The last one also brings what waited to be told from a stop string."""
        token = event.token
        piece = token.text if not token.special or token.text in self._markers else ""
        if not token.special:
            self._num_shown += len(piece)
        return piece if event.finish is None else piece + event.finish.text[self._num_shown :]


def finish_reason(choice: Choice, event: TokenEvent, *, has_calls: bool = False) -> str | None:
    """In OpenAI's words; None before the end."""
    if event.finish is None:
        return None
    if is_cut_short(choice, event):
        return "length"
    return "tool_calls" if has_calls else "stop"


def is_cut_short(choice: Choice, last: TokenEvent) -> bool:
    """Whether tokens ran out. Natively they do even if the last one ends the text; here that counts as an end."""
    assert last.finish is not None
    is_end_token = last.token.id in choice.generation.request.eos_token_ids
    return last.finish.reason is FinishReason.LENGTH and not is_end_token


def choices_of(calls: Sequence[Call]) -> list[Choice]:
    pairs = ((call, generation) for call in calls for generation in call.generations)
    return [Choice(index, call, generation) for index, (call, generation) in enumerate(pairs)]


async def collect(choice: Choice) -> list[TokenEvent]:
    """All events of a choice. Raises the `RouterError` it failed with."""
    events = await choice.generation.read_all()
    finish = events[-1].finish
    assert finish is not None, "the last event says how it ended"
    log_success(choice.call, choice.generation, finish)
    return events


def admit(services: Services, request: Request, wishes: Sequence[Wish]) -> AbstractAsyncContextManager[list[Call]]:
    return admitted_together(services, request.state.request_id, wishes, stream=False)


async def stream(services: Services, request: Request, wishes: Sequence[Wish], writer: Writer) -> Response:
    """Begins to answer once there is something to say, so that what fails before that has a status of its own."""
    return await unless_gone(request.receive, _begin(services, request, wishes, writer))


async def _begin(services: Services, request: Request, wishes: Sequence[Wish], writer: Writer) -> EventStream:
    async with AsyncExitStack() as held:
        calls = await held.enter_async_context(admit(services, request, wishes))
        choices = choices_of(calls)
        writer.begin(calls, choices)
        stream = EventStream(compute_headers(services, wishes))
        telling = _Telling(stream, writer, num_choices=len(choices))
        for choice in choices:
            choice.generation.pass_on(partial(telling.write, choice), telling.fail)
        await stream.begin()
        stream.hold(held.pop_all())
        return stream


class _Telling:
    """What the writer makes of the events of all choices, as they come, on its way to the stream."""

    def __init__(self, stream: EventStream, writer: Writer, *, num_choices: int) -> None:
        self._stream = stream
        self._writer = writer
        self._num_unfinished = num_choices

    def write(self, choice: Choice, event: TokenEvent) -> None:
        self._put(self._writer.write(choice, event))
        if event.finish is not None:
            log_success(choice.call, choice.generation, event.finish)
            self._num_unfinished -= 1
            if not self._num_unfinished:
                self._put((*self._writer.end(), DONE))
                self._stream.end()

    def fail(self, error: RouterError) -> None:
        told = {"error": {"message": str(error), "http_status_code": error.status}}
        self._stream.fail(error, _frame(told), DONE)

    def _put(self, payloads: Iterable[Json | bytes]) -> None:
        for payload in payloads:
            self._stream.put(payload if isinstance(payload, bytes) else _frame(payload))


def _frame(payload: Json) -> bytes:
    """OpenAI names an event by its type, where it has one."""
    kind = payload.get("type")
    return (b"" if kind is None else f"event: {kind}\n".encode()) + frame(render.to_bytes(payload))


def answer(services: Services, wishes: Sequence[Wish], choices: Sequence[Choice], usage: Usage, body: Json) -> Response:
    """All at once, with the headers that `/generate` has."""
    headers = compute_headers(services, wishes) | _summed_time_headers(choices, usage)
    return Response(render.to_bytes(body), media_type=JSON_TYPE, headers=headers)


def compute_headers(services: Services, wishes: Sequence[Wish]) -> dict[str, str]:
    num_chars = sum(len(wish.inputs) for wish in wishes if isinstance(wish.inputs, str))
    return {"x-compute-type": services.config.compute_type, "x-compute-characters": str(num_chars)}


def _summed_time_headers(choices: Sequence[Choice], usage: Usage) -> dict[str, str]:
    """Sums over prompts or sequences."""
    return time_headers(
        choices[0].call,
        queue_s=sum(choice.generation.queue_s for choice in choices),
        inference_s=sum(choice.generation.inference_s for choice in choices),
        num_prompt_tokens=usage.num_prompt,
        num_generated=usage.num_completion,
    )
