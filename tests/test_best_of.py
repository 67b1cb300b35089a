"""Several sequences for one prompt: computed once, shared block by block."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from router.api.app import create_app
from router.config import Config
from router.core.scheduler import Counters
from router.metrics import Metrics
from router.validate import Capacity, Limits, Validator
from tests.engines import engine_over
from tests.ghost import GhostSettings, ghost_group
from tests.http_app import Json
from tests.tiny_tokenizers import byte_level, tokenizer_of

BLOCK_SIZE = 4
PROMPT = "z" * 42
"""42 tokens: ten full blocks and two tokens."""
NUM_SHARED = 40
CONFIG = Config(max_best_of=4, max_total_tokens=128)


def generate(body: Json, *, max_step_tokens: int = 2048) -> tuple[Json, Counters]:
    """What HTTP answers, and what it took, over an engine and a ghost."""
    tokenizer = tokenizer_of(byte_level())

    async def run() -> tuple[Json, Counters]:
        settings = GhostSettings(num_blocks=200, block_size=BLOCK_SIZE, vocab_size=tokenizer.vocab_size)
        metrics = Metrics(max_input_tokens=100, max_total_tokens=100)
        async with (
            ghost_group(settings) as group,
            engine_over(group.addresses, tokenizer, max_step_tokens=max_step_tokens, metrics=metrics) as engine,
        ):
            limits = Limits.derive(CONFIG, Capacity(tokenizer.vocab_size, (), 796), tokenizer)
            app = create_app(CONFIG, engine, Validator(limits, tokenizer), tokenizer, metrics)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                answer = await client.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json(), engine.counters

    return asyncio.run(run())


@pytest.mark.parametrize("max_step_tokens", [2048, 16])
@pytest.mark.parametrize("scored", [False, True])
def test_sequences_of_a_call_share_the_prompts_blocks(scored: bool, max_step_tokens: int) -> None:
    parameters = {"best_of": 4, "do_sample": True, "max_new_tokens": 3, "decoder_input_details": scored}

    answer, counters = generate({"inputs": PROMPT, "parameters": parameters}, max_step_tokens=max_step_tokens)

    assert counters.num_hit_tokens == 3 * NUM_SHARED
    num_generated_and_fed = 4 * 2
    assert counters.num_fed_tokens == len(PROMPT) + 3 * (len(PROMPT) - NUM_SHARED) + num_generated_and_fed
    if scored:
        details = answer["details"]
        assert isinstance(details, dict)
        others = details["best_of_sequences"]
        assert len(details["prefill"]) == len(PROMPT)
        assert [other["prefill"] for other in others] == [details["prefill"]] * 3


def test_every_sequence_draws_with_a_seed_of_its_own() -> None:
    parameters = {"best_of": 4, "temperature": 1.0, "do_sample": True, "max_new_tokens": 8, "details": True}

    answer, _ = generate({"inputs": PROMPT, "parameters": parameters})

    details = answer["details"]
    assert isinstance(details, dict)
    sequences = [details, *details["best_of_sequences"]]
    assert len({sequence["seed"] for sequence in sequences}) == 4
    means = [sum(token["logprob"] for token in sequence["tokens"]) / 8 for sequence in sequences]
    assert means[0] == max(means)
