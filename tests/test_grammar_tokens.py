"""Structured output of the real model through the whole engine: always valid, however it is computed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jsonschema_rs
import pytest

from router.core.request import FinishReason, Request, Sampling
from router.core.scheduler import Counters
from router.engine import Engine, TokenEvent
from router.launch import LaunchSettings, LocalGroup
from router.text.grammar import Grammar, GrammarKind, to_source
from router.text.tokenizer import Tokenizer
from tests.engines import collect, engine_over
from tests.shards import ShardProcesses, shard_processes

EOS = 2
HOT = Sampling(do_sample=True, temperature=1.5)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "favourite_colour": {"enum": ["red", "green", "blue"]},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 150},
        "friends": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
        "is_employed_at_the_moment": {"type": "boolean"},
    },
    "required": ["name", "favourite_colour", "age_in_years", "friends", "is_employed_at_the_moment"],
    "additionalProperties": False,
}
JSON = to_source(Grammar(GrammarKind.JSON, SCHEMA))
EXPRESSION = "(Mr|Ms)\\. [A-Z][a-z]{2,9}, born in (19|20)[0-9]{2}"
REGEX = to_source(Grammar(GrammarKind.REGEX, EXPRESSION))
LARK = to_source(Grammar(GrammarKind.LARK, 'start: ("yes" | "no") " because " /[a-z ]{5,40}/ "."'))
GREEDY = (Sampling(), Sampling(repetition_penalty=1.3, top_n_tokens=2))
DRAWN = (HOT, replace(HOT, seed=1, top_k=20), replace(HOT, seed=2, frequency_penalty=0.7, min_new_tokens=5))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.load(smollm2)


@pytest.fixture(scope="module")
def shards(smollm2: Path) -> Iterator[ShardProcesses]:
    with shard_processes(smollm2, 1, "--dtype", "float32") as running:
        yield running


def requests(tokenizer: Tokenizer) -> list[Request]:
    """A JSON object under every way of choosing, and one each of the other kinds."""
    prompt = tokenizer.encode("<|im_start|>user\nInvent somebody, in JSON.<|im_end|>\n<|im_start|>assistant\n")
    request = Request("test", tuple(prompt), 200, eos_token_ids=(EOS,), grammar=JSON)
    return [
        *(replace(request, sampling=sampling) for sampling in (*GREEDY, *DRAWN)),
        *(replace(request, grammar=grammar, sampling=HOT) for grammar in (REGEX, LARK)),
        replace(request, grammar="", max_new_tokens=30),
    ]


async def answer_all(engine: Engine, requests: Sequence[Request]) -> list[list[TokenEvent]]:
    return list(await asyncio.gather(*(collect(engine.submit(request)) for request in requests)))


def run(shards: ShardProcesses, tokenizer: Tokenizer, **settings: int) -> tuple[list[list[TokenEvent]], Counters]:
    async def answer() -> tuple[list[list[TokenEvent]], Counters]:
        async with engine_over(shards.addresses, tokenizer, **settings) as engine:  # type: ignore[arg-type]
            return await answer_all(engine, requests(tokenizer)), engine.counters

    return asyncio.run(answer())


@pytest.fixture(scope="module")
def answers(shards: ShardProcesses, tokenizer: Tokenizer) -> list[list[TokenEvent]]:
    events, _ = run(shards, tokenizer)
    return events


def ids(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token.id for event in events]


def text_of(events: Sequence[TokenEvent]) -> str:
    finish = events[-1].finish
    assert finish is not None
    assert finish.reason is FinishReason.EOS_TOKEN
    assert finish.num_generated == len(events)
    return finish.text


def assert_same(others: list[list[TokenEvent]], answers: list[list[TokenEvent]]) -> None:
    assert [ids(events) for events in others] == [ids(events) for events in answers]
    for events, expected in zip(others, answers, strict=True):
        logprobs = [event.token.logprob for event in events]
        assert logprobs == pytest.approx([event.token.logprob for event in expected], abs=1e-3)
        assert [event.index for event in events] == [*range(1, len(events) + 1)]


def test_every_answer_conforms_to_its_grammar(answers: list[list[TokenEvent]]) -> None:
    *documents, line, sentence, _ = answers
    for events in documents:
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(text_of(events)))
    assert re.fullmatch(EXPRESSION, text_of(line))
    assert re.fullmatch("(yes|no) because [a-z ]{5,40}\\.", text_of(sentence))
    assert len({text_of(events) for events in documents}) == len(documents)


def test_the_likeliest_tokens_come_with_forced_ones_too(answers: list[list[TokenEvent]]) -> None:
    events = answers[1]

    assert all(len(event.top_tokens) >= 2 for event in events)
    assert all(event.top_tokens[0].logprob >= event.token.logprob for event in events)


def test_log_probabilities_are_the_models_own(
    shards: ShardProcesses, tokenizer: Tokenizer, answers: list[list[TokenEvent]]
) -> None:
    """Equal to those of the same tokens as a prompt, where nothing constrains them: also of forced tokens."""
    request, events = requests(tokenizer)[0], answers[0]
    prompt = (*request.prompt, *ids(events))

    async def score() -> list[TokenEvent]:
        async with engine_over(shards.addresses, tokenizer) as engine:
            return await collect(engine.submit(Request("test", prompt, 1, prompt_logprobs=True)))

    (scored,) = asyncio.run(score())
    assert scored.prompt_logprobs is not None
    expected = scored.prompt_logprobs[len(request.prompt) :]
    assert [event.token.logprob for event in events] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"lookahead": 0}, {"lookahead": 2, "max_step_tokens": 8}, {"max_kv_tokens": 320}],
    ids=str,
)
def test_an_answer_does_not_depend_on_how_it_is_scheduled(
    shards: ShardProcesses, tokenizer: Tokenizer, answers: list[list[TokenEvent]], settings: dict[str, int]
) -> None:
    """With little KV memory sequences are preempted, and their matchers built again."""
    events, counters = run(shards, tokenizer, **settings)

    assert_same(events, answers)
    assert counters.num_forced_tokens > 0
    assert (counters.num_preemptions > 0) == ("max_kv_tokens" in settings)


def test_an_answer_that_is_cut_is_said_to_be(shards: ShardProcesses, tokenizer: Tokenizer) -> None:
    async def answer() -> list[TokenEvent]:
        async with engine_over(shards.addresses, tokenizer) as engine:
            return await collect(engine.submit(replace(requests(tokenizer)[0], max_new_tokens=7)))

    events = asyncio.run(answer())
    assert len(events) == 7
    assert events[-1].finish is not None
    assert events[-1].finish.reason is FinishReason.LENGTH


def test_a_stop_string_ends_an_answer_within_a_forced_run(
    shards: ShardProcesses, tokenizer: Tokenizer, answers: list[list[TokenEvent]]
) -> None:
    async def answer() -> list[TokenEvent]:
        async with engine_over(shards.addresses, tokenizer) as engine:
            return await collect(engine.submit(replace(requests(tokenizer)[0], stop=("urite_col",))))

    events = asyncio.run(answer())
    assert events[-1].finish is not None
    assert events[-1].finish.reason is FinishReason.STOP_SEQUENCE
    assert events[-1].finish.text.endswith("urite_col")
    assert ids(events) == ids(answers[0])[: len(events)]


def test_two_ranks_answer_as_one(smollm2: Path, tokenizer: Tokenizer, answers: list[list[TokenEvent]]) -> None:
    """Draws at a high temperature may differ: logits do, in the sixth digit."""
    with shard_processes(smollm2, 2, "--dtype", "float32") as two:
        events, _ = run(two, tokenizer)

    assert_same(events[: len(GREEDY)], answers[: len(GREEDY)])
    for document in events[: len(GREEDY) + len(DRAWN)]:
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(text_of(document)))


def test_a_killed_rank_changes_no_answer(smollm2: Path, tokenizer: Tokenizer, answers: list[list[TokenEvent]]) -> None:
    async def answer() -> list[list[TokenEvent]]:
        settings = LaunchSettings(smollm2, 1, flags=("--dtype", "float32"))
        group = LocalGroup(settings, on_progress=lambda rank, done, total: None)
        await group.start()
        try:
            async with engine_over(group.addresses, tokenizer, restart=group.restart) as engine:
                generations = [engine.submit(request) for request in requests(tokenizer)]
                witness = aiter(generations[0])
                first = [await anext(witness) for _ in range(9)]
                others = [asyncio.create_task(collect(generation)) for generation in generations[1:]]
                os.kill(group.process_ids[0], signal.SIGKILL)
                return [first + [event async for event in witness], *await asyncio.gather(*others)]
        finally:
            await group.stop()

    assert_same(asyncio.run(answer()), answers)
