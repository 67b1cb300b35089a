"""`/v1/chat/completions` and `/chat_tokenize`: conversations in, messages out; tool calls and reasoning told from text.

    messages, tools ─► template ─► prompt ─► tokens ─► text ─► reasoning | content | tool calls

What a choice says is read by the same `ChatReader` whether it is streamed or not, so both say the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from fastapi import Request, Response

from router.api import render
from router.api.admission import Call, Services, Wish
from router.api.body import is_deep
from router.api.openai_bodies import ChatRequest
from router.api.openai_logprobs import chat_logprobs
from router.api.openai_run import (
    JSON_TYPE,
    PLACE,
    Choice,
    ChoiceText,
    Envelope,
    FrameOfText,
    Json,
    Usage,
    admit,
    answer,
    choices_of,
    collect,
    finish_reason,
    stream,
)
from router.api.sse import unless_gone
from router.engine import TokenEvent
from router.errors import ToolError, ValidationError
from router.text.chat import Conversation
from router.text.grammar import Grammar, InvalidGrammar
from router.text.reasoning import MARKERS, ReasoningSplitter
from router.text.shape import Calls, shape_answer
from router.text.tools import CallDelta, ToolFormat, ToolParser, describe_call, describe_tools, find_format

AUTO: Final = "auto"
ANY: Final = "any"
"""LangChain's word for a required call, which its client for Hugging Face sends as if a function had that name."""


@dataclass(frozen=True, slots=True)
class ChatReading:
    """How the text of a call's answers is to be understood."""

    prompt: str
    splits_reasoning: bool
    tool_format: ToolFormat | None
    """None: the text is not searched for calls."""
    tool_names: frozenset[str]
    max_calls: int | None
    only_calls: bool


@dataclass(slots=True)
class ChatDelta:
    """What one token adds to a message."""

    content: str = ""
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)

    @property
    def is_plain(self) -> bool:
        """Whether it is content and nothing else."""
        return bool(self.content) and not (self.reasoning or self.calls)


class ChatReader:
    """Reads one choice, event by event."""

    def __init__(self, reading: ChatReading) -> None:
        markers = MARKERS if reading.splits_reasoning else frozenset[str]()
        self._splitter = ReasoningSplitter(reading.prompt) if reading.splits_reasoning else None
        self._parser: ToolParser | None = None
        if reading.tool_format is not None:
            markers |= reading.tool_format.markers
            self._parser = ToolParser(
                reading.tool_format, reading.tool_names, max_calls=reading.max_calls, only_calls=reading.only_calls
            )
        self._text = ChoiceText(markers)
        self.silence = ChatDelta()
        """For chunks without news: nothing more of the call that is being told, if one is. Clients add up contents or
        arguments without looking whether there are any."""

    @property
    def has_calls(self) -> bool:
        return self._parser is not None and self._parser.num_calls > 0

    def read(self, event: TokenEvent) -> ChatDelta:
        delta = ChatDelta(self._text.read(event))
        is_last = event.finish is not None
        if self._splitter is not None:
            thoughts = [self._splitter.feed(delta.content), *([self._splitter.close()] if is_last else [])]
            delta = ChatDelta("".join(t.content for t in thoughts), "".join(t.reasoning for t in thoughts))
        if self._parser is not None:
            parts = [self._parser.feed(delta.content), *([self._parser.close()] if is_last else [])]
            delta.content = "".join(part.content for part in parts)
            delta.calls = [call for part in parts for call in part.calls]
            if delta.calls:
                self.silence = ChatDelta(calls=[CallDelta(delta.calls[-1].index, "")])
        return delta


async def chat(services: Services, request: Request, body: ChatRequest) -> Response:
    wish, reading = await understand_chat(services, body)
    if body.stream:
        envelope = Envelope.new("chat.completion.chunk", "chatcmpl", services, body.model)
        return await stream(services, request, [wish], _StreamWriter(services, body, reading, envelope))
    envelope = Envelope.new("chat.completion", "chatcmpl", services, body.model)
    return await unless_gone(request.receive, _answer(services, request, body, wish, reading, envelope))


async def chat_tokens(services: Services, body: ChatRequest) -> Response:
    """The prompt that a conversation becomes, and its tokens."""
    prompt = await render_prompt(services, body)
    tokenizer = services.tokenizer
    tokens = await tokenizer.run(
        prompt, lambda text: render.simple_tokens(tokenizer.tokenize(text, add_special_tokens=False))
    )
    written = b'{"tokenize_response":' + tokens + b',"templated_text":' + render.to_bytes(prompt) + b"}"
    return Response(written, media_type=JSON_TYPE)


async def render_prompt(services: Services, body: ChatRequest) -> str:
    """Raises `TemplateError` or `ValidationError`."""
    if body.chat_template is not None and not services.config.trust_request_chat_template:
        raise ValidationError("`chat_template` is not allowed: the server renders its own")
    template = services.template
    tools = _offered_tools(body)
    messages: Sequence[Mapping[str, object]] = [_for_template(services, body, message) for message in body.messages]
    if tools and not template.takes_tools and body.chat_template is None and messages:
        messages, tools = describe_tools(messages, tools, body.tool_prompt), []
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    continues = body.wants_continuation
    prompt = await template.render_async(
        Conversation(
            messages=messages,
            tools=tools or None,
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final=continues,
            variables={**effort, **(body.chat_template_kwargs or {})},
            template=body.chat_template,
        )
    )
    return prompt.rstrip() if continues else prompt


def _offered_tools(body: ChatRequest) -> list[dict[str, object]]:
    return [] if body.tool_choice.mode == "none" else body.tools


def _for_template(services: Services, body: ChatRequest, message: Mapping[str, object]) -> Mapping[str, object]:
    """OpenAI's message as templates expect it. Only the model's own is helped out where it shows no calls."""
    changed = dict(message)
    if message["role"] == "developer" and not any("developer" in source for source in services.template.sources):
        changed["role"] = "system"
    calls = message.get("tool_calls")
    if isinstance(calls, list) and not services.template.takes_text_arguments:
        changed["tool_calls"] = [{**call, "function": _with_object(call["function"])} for call in calls]
    if isinstance(calls, list) and not services.template.shows_calls and body.chat_template is None:
        written = [describe_call(_with_object(call["function"])) for call in calls]
        changed["content"] = "\n".join(filter(None, [str(message.get("content") or ""), *written]))
    return changed


def _with_object(function: Mapping[str, object]) -> Mapping[str, object]:
    """Arguments are JSON text in OpenAI's messages and an object in templates; what is not JSON, or deeper than a body
    may be, stays text."""
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            decoded = json.loads(arguments)
            arguments = arguments if is_deep(decoded) else decoded
    return {**function, "arguments": {} if arguments is None else arguments}


async def understand_chat(services: Services, body: ChatRequest) -> tuple[Wish, ChatReading]:
    """Raises `ValidationError` or `TemplateError`."""
    _check_supported(services, body)
    config = body.generation_config
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    parameters = body.to_parameters(config, max_new_tokens=body.num_new_tokens, num_top=num_top)
    manner = replace(body.to_manner(config), add_special_tokens=False)
    prompt = await render_prompt(services, body)
    functions = _callable_functions(body)
    reading = ChatReading(
        prompt=prompt,
        splits_reasoning=services.config.reasoning_parser != "none",
        tool_format=_tool_format(services) if functions else None,
        tool_names=frozenset(functions),
        max_calls=None if _allows_several(body, functions) else 1,
        only_calls=body.tool_choice.mode == "required",
    )
    parameters = replace(parameters, grammar=_shape(services, body, reading, functions))
    return Wish(prompt, parameters, manner), reading


def _callable_functions(body: ChatRequest) -> dict[str, object]:
    """The functions that may be called, with the schemas of their arguments. Raises `ToolError`."""
    functions: dict[str, object] = {}
    for tool in _offered_tools(body):
        function = tool["function"]
        assert isinstance(function, dict), "bodies hold tools in one form"
        functions[function["name"]] = function["parameters"]
    name = body.tool_choice.name
    if name is not None and name in functions:
        return {name: functions[name]}
    if name not in (None, ANY):
        raise ToolError(f"Tool with name {name[:60]} not found")
    if body.tool_choice.mode == "required" and not functions:
        raise ToolError("`tool_choice` is required, but there are no tools")
    return functions


def _allows_several(body: ChatRequest, functions: Mapping[str, object]) -> bool:
    """Where there must be a call there is one, as with TGI, unless the client asks for several: what a model that would
    rather answer says behind it is the same call again and again."""
    choice = body.tool_choice
    if choice.mode == "required":
        return body.parallel_tool_calls is True and choice.name not in functions
    return body.parallel_tool_calls is not False


def _shape(
    services: Services, body: ChatRequest, reading: ChatReading, functions: Mapping[str, object]
) -> Grammar | None:
    """What the answer must look like. Free text that may be a call is not restricted, only searched for calls.

    Raises `ToolError` or `ValidationError`.
    """
    structure = None if reading.only_calls else body.response_format
    calls = None
    if reading.tool_format is not None and (reading.only_calls or structure is not None):
        calls = Calls(reading.tool_format.form, functions, _allows_several(body, functions))
    try:
        return shape_answer(
            structure,
            calls,
            thinks_behind=reading.prompt if reading.splits_reasoning else None,
            marker_id=services.tokenizer.marker_id,
        )
    except InvalidGrammar as error:
        raise (ToolError(str(error)) if calls else ValidationError(f"grammar is not valid: {error}")) from error


def _tool_format(services: Services) -> ToolFormat:
    named = services.config.tool_call_parser
    return find_format(services.template.sources, None if named == AUTO else named)


def _check_supported(services: Services, body: ChatRequest) -> None:
    limit = services.validator.limits.max_top_n_tokens
    if (body.top_logprobs or 0) > limit:
        raise ValidationError(f"`top_logprobs` must be >= 0 and <= {limit}. Given: {body.top_logprobs}")


async def _answer(
    services: Services, request: Request, body: ChatRequest, wish: Wish, reading: ChatReading, envelope: Envelope
) -> Response:
    async with admit(services, request, [wish]) as calls:
        usage, written, choices = Usage.begin(calls), [], choices_of(calls)
        for choice in choices:
            events = await collect(choice)
            usage.num_completion += len(events)
            written.append(_write_whole(services, body, reading, choice, events))
        whole = {**envelope.to_json(), "choices": written, "usage": usage.to_json()}
        return answer(services, [wish], choices, usage, whole)


def _write_whole(
    services: Services, body: ChatRequest, reading: ChatReading, choice: Choice, events: Sequence[TokenEvent]
) -> Json:
    reader, message = ChatReader(reading), Message()
    for event in events:
        message.add(reader.read(event))
    return {
        "index": choice.index,
        "message": message.to_json(),
        "logprobs": chat_logprobs(services.tokenizer, events) if body.logprobs else None,
        "finish_reason": finish_reason(choice, events[-1], has_calls=reader.has_calls),
    }


@dataclass(slots=True)
class Message:
    """An assistant's message, put together from deltas."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[CallDelta] = field(default_factory=list)
    """One per call, with all of its arguments."""

    def add(self, delta: ChatDelta) -> None:
        self.content.append(delta.content)
        self.reasoning.append(delta.reasoning)
        for call in delta.calls:
            if call.name is not None:
                self.calls.append(call)
            else:
                self.calls[-1] = replace(self.calls[-1], arguments=self.calls[-1].arguments + call.arguments)

    def to_json(self) -> Json:
        """Without text a message that calls has no content at all."""
        content, reasoning = "".join(self.content), "".join(self.reasoning)
        message: dict[str, object] = {"role": "assistant", "content": None if self.calls and not content else content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if self.calls:
            message["tool_calls"] = [_named_call(call) for call in self.calls]
        return message


def _named_call(call: CallDelta) -> dict[str, object]:
    return {
        "id": call.call_id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


class _StreamWriter:
    """A chunk per token that says something, and the usage behind them if it is asked for."""

    def __init__(self, services: Services, body: ChatRequest, reading: ChatReading, envelope: Envelope) -> None:
        self._services = services
        self._body = body
        self._reading = reading
        self._envelope = envelope.to_json()
        self._usage = Usage()
        self._readers: list[ChatReader] = []
        self._begun: list[bool] = []
        self._frames: list[FrameOfText] = []
        """Of each choice's tokens that have nothing to tell but a part of the content."""
        self._tells_more = bool(body.logprobs or body.continuous_usage)

    def begin(self, calls: Sequence[Call], choices: Sequence[Choice]) -> None:
        self._usage = Usage.begin(calls)
        self._readers = [ChatReader(self._reading) for _ in choices]
        self._begun = [False] * len(choices)
        plain = ChatDelta(PLACE)
        self._frames = [FrameOfText(self._chunk(choice, _delta(plain), None, None)) for choice in choices]

    def write(self, choice: Choice, event: TokenEvent) -> Iterator[Json | bytes]:
        """Nothing for a token whose text is held back, unless there is more to say of it than its text."""
        self._usage.num_completion += 1
        reader, begun = self._readers[choice.index], self._begun[choice.index]
        delta = reader.read(event)
        can_wait = event.finish is None and (begun or self._reading.only_calls)
        is_plain = begun and event.finish is None and delta.is_plain and not self._tells_more
        framed = self._frames[choice.index].frame(delta.content) if is_plain else None
        if framed is not None:
            yield framed
        elif delta or not can_wait or self._body.logprobs:
            self._begun[choice.index] = True
            written = ({} if begun else {"role": "assistant"}) | _delta(delta or reader.silence)
            logprobs = chat_logprobs(self._services.tokenizer, [event]) if self._body.logprobs else None
            yield self._chunk(choice, written, logprobs, finish_reason(choice, event, has_calls=reader.has_calls))

    def _chunk(self, choice: Choice, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        written = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = self._usage.to_json() if self._body.continuous_usage else None
        return {**self._envelope, "choices": [written], "usage": usage}

    def end(self) -> Iterator[Json]:
        if self._body.include_usage:
            yield {**self._envelope, "choices": [], "usage": self._usage.to_json()}


def _delta(delta: ChatDelta) -> dict[str, object]:
    """With a content, even an empty one, if there is nothing else."""
    written: dict[str, object] = {}
    if delta.content or not (delta.reasoning or delta.calls):
        written["content"] = delta.content
    if delta.reasoning:
        written["reasoning_content"] = delta.reasoning
    if delta.calls:
        written["tool_calls"] = [_call_delta(call) for call in delta.calls]
    return written


def _call_delta(call: CallDelta) -> Json:
    """Id, type and name come with a call's first piece only: clients add up what they get."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **_named_call(call)}
