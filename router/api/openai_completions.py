"""`/v1/completions`: one or several prompts, as text or token ids, each with its choices; also how models are scored.

With `echo` and `logprobs` the prompt's own tokens are scored, and with `max_tokens: 0` nothing else is: one token is
generated for want of a way to generate none, and not shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from fastapi import Request, Response

from router.api.admission import Call, Services, Wish
from router.api.openai_bodies import NO_CONFIG, CompletionRequest
from router.api.openai_logprobs import CompletionLogprobs, Scored, prompt_scores, token_scores, written_out
from router.api.openai_run import (
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
from router.errors import BadBatch, ValidationError

NO_SUFFIX: Final = "Suffix is not supported and can be achieved by preprocessing the prompt."


@dataclass(frozen=True, slots=True)
class _Ask:
    """A body, understood."""

    wishes: Sequence[Wish]
    num_choices: int
    """Of each prompt, among those generated."""
    echo: bool
    num_top: int | None
    """Likeliest tokens with every token; None: no log-probabilities at all."""
    hides_tokens: bool
    """Only the prompt is wanted."""


async def completions(services: Services, request: Request, body: CompletionRequest) -> Response:
    ask = _understand(services, body)
    envelope = Envelope.new("text_completion", "cmpl", services)
    if body.stream:
        return await stream(services, request, ask.wishes, _StreamWriter(services, body, ask, envelope))
    return await unless_gone(request.receive, _answer(services, request, ask, envelope))


def _understand(services: Services, body: CompletionRequest) -> _Ask:
    """Raises `ValidationError` or `BadBatch` for what can be refused without a look at the prompts."""
    if body.suffix:
        raise BadBatch(NO_SUFFIX, "suffix not supported")
    limit = services.config.max_client_batch_size
    if len(body.prompt) > limit:
        sentence = f"Number of prompts exceeds the maximum allowed batch size of {limit}"
        raise BadBatch(sentence, "batch size exceeded")
    num_choices, num_sequences = body.num_choices, _num_sequences(services, body)
    num_top, echo = body.logprobs, bool(body.echo)
    _check_top(services, num_top)
    scores_prompt = echo and num_top is not None
    if body.stream and scores_prompt and num_choices > 1:
        raise ValidationError("`echo` with `logprobs` is not supported when streaming several choices")
    hides_tokens = body.num_new_tokens == 0 and echo
    parameters = replace(
        body.to_parameters(NO_CONFIG, max_new_tokens=1 if hides_tokens else body.num_new_tokens, num_top=num_top),
        truncate=body.truncate,
    )
    manner = replace(
        body.to_manner(NO_CONFIG),
        num_sequences=num_sequences,
        scores_prompt=scores_prompt,
        num_prompt_top=(num_top or 0) if scores_prompt else 0,
    )
    wishes = [Wish(prompt, parameters, manner) for prompt in body.prompt]
    return _Ask(wishes, num_choices, echo, num_top, hides_tokens)


def _num_sequences(services: Services, body: CompletionRequest) -> int:
    """As many as choices, or as `best_of` says."""
    num_choices, best_of = body.num_choices, body.best_of
    if best_of is None or best_of == num_choices:
        return num_choices
    limit = max(num_choices, services.validator.limits.max_best_of)
    if not num_choices < best_of <= limit:
        raise ValidationError(f"`best_of` must be >= `n` and <= {limit}. Given: {best_of}")
    if body.stream:
        raise ValidationError("`best_of` above `n` is not supported when streaming tokens")
    return best_of


def _check_top(services: Services, num_top: int | None) -> None:
    limit = services.validator.limits.max_top_n_tokens
    if num_top is not None and num_top > limit:
        raise ValidationError(f"`logprobs` must be >= 0 and <= {limit}. Given: {num_top}")


async def _answer(services: Services, request: Request, ask: _Ask, envelope: Envelope) -> Response:
    async with admit(services, request, ask.wishes) as calls:
        usage, written = Usage.begin(calls), []
        for call in calls:
            told = [_Told(choice, await collect(choice)) for choice in choices_of([call])]
            usage.num_completion += 0 if ask.hides_tokens else sum(len(one.events) for one in told)
            written += [_write_whole(services, ask, one, told[0].events[0]) for one in _best(told, ask.num_choices)]
        choices = [{"index": index, **choice} for index, choice in enumerate(written)]
        whole = {**envelope.to_json(), "choices": choices, "usage": usage.to_json()}
        return answer(services, ask.wishes, choices_of(calls), usage, whole)


class _Told(NamedTuple):
    """A choice and all it said."""

    choice: Choice
    events: Sequence[TokenEvent]

    @property
    def mean_logprob(self) -> float:
        return sum(event.token.logprob for event in self.events) / len(self.events)


def _best(told: Sequence[_Told], num_choices: int) -> Sequence[_Told]:
    """Those of highest mean log-probability; all of them stay in their order."""
    if len(told) == num_choices:
        return told
    return sorted(told, key=lambda one: one.mean_logprob, reverse=True)[:num_choices]


def _write_whole(services: Services, ask: _Ask, told: _Told, first_event: TokenEvent) -> Json:
    """A choice without its index. The prompt was scored with the first sequence's first event."""
    choice, events = told
    writer = _ChoiceWriter(services, ask, choice.call)
    shown = "".join(map(ChoiceText().read, events))
    scores = [] if ask.hides_tokens else list(map(token_scores, events))
    reason = finish_reason(choice, events[-1])
    return writer.write("" if ask.hides_tokens else shown, scores, reason, first_event)


class _ChoiceWriter:
    """Writes one choice, whole or in chunks, the first of which begins with the prompt if it is echoed."""

    def __init__(self, services: Services, ask: _Ask, call: Call) -> None:
        self._services = services
        self._ask = ask
        self._call = call
        prompt = call.demand.requests[0].prompt
        context = () if ask.echo else prompt
        self._lists = CompletionLogprobs(services.tokenizer, context, num_top=ask.num_top or 0)
        self._begun = False

    def write(self, text: str, scores: list[Scored], reason: str | None, first_event: TokenEvent) -> Json:
        if self._ask.echo and not self._begun:
            prompt = self._call.demand.requests[0].prompt
            text = self._prompt_text(prompt) + text
            scores = [*prompt_scores(prompt, first_event), *scores]
        self._begun = True
        logprobs = None if self._ask.num_top is None else self._lists.write(scores)
        return {"text": text, "logprobs": logprobs, "finish_reason": reason}

    def _prompt_text(self, prompt: Sequence[int]) -> str:
        """As it came, unless it was cut or came as tokens."""
        inputs = self._call.inputs
        is_cut = self._ask.wishes[0].parameters.truncate is not None
        return inputs if isinstance(inputs, str) and not is_cut else written_out(self._services.tokenizer, prompt)


class _StreamWriter:
    """A chunk per token, and the usage behind them if it is asked for."""

    def __init__(self, services: Services, body: CompletionRequest, ask: _Ask, envelope: Envelope) -> None:
        self._services = services
        self._body = body
        self._ask = ask
        self._envelope = envelope.to_json()
        self._usage = Usage()
        self._texts: list[ChoiceText] = []
        self._writers: list[_ChoiceWriter] = []
        self._frames: list[FrameOfText] = []
        """Of each choice's tokens that have nothing to tell but their text."""
        self._are_plain = ask.num_top is None and not (ask.echo or body.continuous_usage)
        """Whether that is all of them but the last."""

    def begin(self, calls: Sequence[Call], choices: Sequence[Choice]) -> None:
        self._usage = Usage.begin(calls)
        self._texts = [ChoiceText() for _ in choices]
        self._writers = [_ChoiceWriter(self._services, self._ask, choice.call) for choice in choices]
        plain = {"text": PLACE, "logprobs": None, "finish_reason": None}
        self._frames = [FrameOfText(self._chunk(choice, plain)) for choice in choices]

    def write(self, choice: Choice, event: TokenEvent) -> Iterator[Json | bytes]:
        text = self._texts[choice.index].read(event)
        self._usage.num_completion += not self._ask.hides_tokens
        is_plain = self._are_plain and event.finish is None
        framed = self._frames[choice.index].frame(text) if is_plain else None
        yield self._full_chunk(choice, event, text) if framed is None else framed

    def _full_chunk(self, choice: Choice, event: TokenEvent, text: str) -> Json:
        scores = [token_scores(event)]
        if self._ask.hides_tokens:
            text, scores = "", []
        return self._chunk(choice, self._writers[choice.index].write(text, scores, finish_reason(choice, event), event))

    def _chunk(self, choice: Choice, written: Json) -> Json:
        chunk = {**self._envelope, "choices": [{"index": choice.index, **written}]}
        if self._body.include_usage:
            chunk["usage"] = self._usage.to_json() if self._body.continuous_usage else None
        return chunk

    def end(self) -> Iterator[Json]:
        if self._body.include_usage:
            yield {**self._envelope, "choices": [], "usage": self._usage.to_json()}
