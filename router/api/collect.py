"""Calls whose answer waits for the last token: every sequence is read to its end, and the likeliest wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.api import render
from router.api.admission import Call, Services, Wish, admitted_together, log_success
from router.engine import Finish, Generation, Token


@dataclass(frozen=True, slots=True)
class Collected:
    """A prompt's finished sequences: the one with the highest mean log-probability, and the others in their order."""

    call: Call
    generation: Generation
    """The winner's, for its times."""
    best: render.Result
    others: Sequence[render.Result]


async def collect(services: Services, request_id: str, wishes: Sequence[Wish]) -> list[Collected]:
    """All sequences run side by side and are read one after the other. Raises the `RouterError` of one that fails."""
    async with admitted_together(services, request_id, wishes, stream=False) as calls:
        return [await _read_call(services, call) for call in calls]


async def _read_call(services: Services, call: Call) -> Collected:
    results = [await _read(generation, services) for generation in call.generations]
    results = [replace(result, prefill=results[0].prefill) for result in results]
    best = max(range(len(results)), key=lambda index: results[index].mean_logprob)
    winner = results.pop(best)
    log_success(call, call.generations[best], winner.finish)
    return Collected(call, call.generations[best], winner, results)


async def _read(generation: Generation, services: Services) -> render.Result:
    tokens: list[Token] = []
    top_tokens: list[Sequence[Token]] = []
    prompt_logprobs: Sequence[float | None] = ()
    finish: Finish | None = None
    for event in await generation.read_all():
        tokens.append(event.token)
        if generation.request.sampling.top_n_tokens:
            top_tokens.append(event.top_tokens)
        prompt_logprobs = event.prompt_logprobs or prompt_logprobs
        finish = event.finish
    assert finish is not None, "the last event says how it ended"
    text_of = services.tokenizer.token_text
    scored = zip(generation.request.prompt, prompt_logprobs, strict=False)
    prefill = [render.PrefillToken(token_id, text_of(token_id), logprob) for token_id, logprob in scored]
    return render.Result(generation.request, tokens, top_tokens, prefill, finish)
