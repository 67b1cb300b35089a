"""`/v1/responses` for text: a text or messages in, one message out, at once or as OpenAI's named events.

The text may have a format, as in chat. Nothing is stored, so there is nothing to go on from; fields that ask for more
than text are refused by their names.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fastapi import Request, Response

from router.api.admission import Call, Services, Wish
from router.api.body import Parsed, fit_body
from router.api.openai_bodies import ChatRequest, ResponseRequest
from router.api.openai_chat import understand_chat
from router.api.openai_run import (
    Choice,
    ChoiceText,
    Envelope,
    Json,
    Usage,
    admit,
    answer,
    choices_of,
    collect,
    is_cut_short,
    stream,
)
from router.api.sse import unless_gone
from router.engine import TokenEvent
from router.errors import ValidationError

UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "background": (False,),
    "conversation": (),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Fields that ask for what is not there, with the values that do not."""
LOGPROBS: Final = "message.output_text.logprobs"
"""All else that can be included belongs to items that no answer here has."""


async def responses(services: Services, request: Request, parsed: Parsed) -> Response:
    body = fit_body(parsed, ResponseRequest)
    _check_supported(parsed.value)
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    sampling = {"max_tokens": body.max_output_tokens, "temperature": body.temperature, "top_p": body.top_p}
    asked = {"model": body.model, "messages": [*system, *body.input], "response_format": body.format}
    effort = {"reasoning_effort": body.reasoning.effort if body.reasoning else None}
    chat = ChatRequest.model_validate(asked | sampling | effort)
    wish, _ = await understand_chat(services, chat)
    reply = Reply.new(services, body)
    if body.stream:
        return await stream(services, request, [wish], _StreamWriter(reply))
    return await unless_gone(request.receive, _answer(services, request, wish, reply))


def _check_supported(body: object) -> None:
    assert isinstance(body, dict), "it was fitted to a model"
    for name, harmless in UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise ValidationError(f"`{name}` is not supported")
    include = body.get("include")
    if isinstance(include, list) and LOGPROBS in include:
        raise ValidationError(f"`include` of {LOGPROBS} is not supported")
    text = body.get("text")
    if isinstance(text, dict) and text.get("verbosity") not in (None, "medium"):
        raise ValidationError("`text.verbosity` is not supported")


@dataclass(frozen=True, slots=True)
class Reply:
    """What is said of a response besides its text."""

    envelope: Envelope
    item_id: str
    body: ResponseRequest

    @classmethod
    def new(cls, services: Services, body: ResponseRequest) -> Reply:
        return cls(Envelope.new("response", "resp", services, body.model), f"msg_{secrets.token_hex(16)}", body)

    def to_json(self, status: str, output: Sequence[Json], usage: Usage | None) -> Json:
        """A Response object. `status` is in_progress, completed or incomplete."""
        body, envelope = self.body, self.envelope
        return {
            "id": envelope.id,
            "object": envelope.object,
            "created_at": envelope.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": envelope.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.format or {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
        }

    def item(self, status: str, content: Sequence[Json]) -> Json:
        return {"type": "message", "id": self.item_id, "status": status, "role": "assistant", "content": content}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage.num_completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt + usage.num_completion,
    }


def _status(choice: Choice, last: TokenEvent) -> str:
    return "incomplete" if is_cut_short(choice, last) else "completed"


async def _answer(services: Services, request: Request, wish: Wish, reply: Reply) -> Response:
    async with admit(services, request, [wish]) as calls:
        choices = choices_of(calls)
        events = await collect(choices[0])
        usage = Usage.begin(calls)
        usage.num_completion = len(events)
        text, status = ChoiceText(), _status(choices[0], events[-1])
        item = reply.item(status, [_part("".join(map(text.read, events)))])
        return answer(services, [wish], choices, usage, reply.to_json(status, [item], usage))


class _StreamWriter:
    """OpenAI's sequence of events around the deltas of one text."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._usage = Usage()
        self._text = ChoiceText()
        self._shown: list[str] = []
        self._num_events = 0

    def begin(self, calls: Sequence[Call], choices: Sequence[Choice]) -> None:
        self._usage = Usage.begin(calls)

    def write(self, choice: Choice, event: TokenEvent) -> Iterator[Json]:
        """What opens a stream waits for the first token, so that what fails before it has a status of its own."""
        if not self._usage.num_completion:
            yield from self._opening()
        self._usage.num_completion += 1
        delta = self._text.read(event)
        if delta:
            self._shown.append(delta)
            yield self._event("response.output_text.delta", **self._place, delta=delta, logprobs=[])
        if event.finish is not None:
            yield from self._closing(_status(choice, event))

    def end(self) -> Iterable[Json]:
        return ()

    @property
    def _place(self) -> dict[str, object]:
        return {"item_id": self._reply.item_id, "output_index": 0, "content_index": 0}

    def _opening(self) -> Iterator[Json]:
        begun = self._reply.to_json("in_progress", [], None)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._reply.item("in_progress", []))
        yield self._event("response.content_part.added", **self._place, part=_part(""))

    def _closing(self, status: str) -> Iterator[Json]:
        text = "".join(self._shown)
        item = self._reply.item(status, [_part(text)])
        yield self._event("response.output_text.done", **self._place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{status}", response=self._reply.to_json(status, [item], self._usage))

    def _event(self, kind: str, **rest: object) -> Json:
        event = {"type": kind, "sequence_number": self._num_events, **rest}
        self._num_events += 1
        return event
