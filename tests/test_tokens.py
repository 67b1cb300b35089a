"""The tokens of the whole engine equal transformers' own, however they are computed.

Real weights in float32, real processes, one and two ranks; the reference is `generate` on the same weights. The full
matrix of chunk budgets, lookahead and concurrency is marked exhaustive (`make test-all`); the default runs its corners.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from router.core.request import Sampling
from router.core.scheduler import Counters
from router.engine import Engine, TokenEvent
from router.text.tokenizer import Tokenizer
from tests.engines import collect, engine_over, greedy, sampled
from tests.shards import ShardProcesses, shard_processes

NUM_NEW = 64
LOGPROB_TOLERANCE = 1e-4

SUBJECTS = (
    *("The capital of France is", "def fibonacci(n):", "Once upon a time, in a village by the sea,", "1, 2, 3, 4, 5,"),
    *("The three laws of thermodynamics state that", "<|im_start|>user\nWhat is 17 times 23?<|im_end|>\n", "E = mc^2"),
    *("Dear Sir or Madam,", "La vie est belle et", "import numpy as np\n", "The mitochondria is", "HTTP/1.1 200 OK\n"),
)
CONTEXT = (
    "The lighthouse keeper wrote every evening into the same book: the wind, the ships, the colour of the water, and "
    "what the fishermen had told him when they brought the bread. He never crossed out a word. On the last page of "
    "the year he counted the storms, and under the number he drew a line, as his father had done before him.\n"
)
QUESTIONS = (
    *("Who wrote the book?", "What did the fishermen bring?", "How many storms were there?", "Summary:", "Next year,"),
    *("The keeper's father", "List three facts:", "Ein Leuchtturm ist"),
)


@dataclass(frozen=True)
class Reference:
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    prompt_logprobs: list[list[float]]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.load(smollm2)


@pytest.fixture(scope="module")
def reference(smollm2: Path, tokenizer: Tokenizer) -> Reference:
    """transformers' greedy tokens, and the log-softmax of the logits they were chosen from."""
    prompts = [tokenizer.encode(text) for text in (*SUBJECTS, *(CONTEXT + q for q in QUESTIONS))]
    causal_lm = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    causal_lm.generation_config.eos_token_id = None
    causal_lm.generation_config.pad_token_id = 0
    longest = max(map(len, prompts))
    out = causal_lm.generate(
        torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, longest:]
    logprobs = torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    with torch.inference_mode():
        prompt_logprobs = [_prompt_logprobs(causal_lm, torch.tensor([prompt])) for prompt in prompts]
    return Reference(prompts, tokens.tolist(), logprobs.tolist(), prompt_logprobs)


def _prompt_logprobs(causal_lm: PreTrainedModel, ids: torch.Tensor) -> list[float]:
    scores = causal_lm(ids).logits[0, :-1].log_softmax(-1)
    return scores.gather(-1, ids[0, 1:, None])[:, 0].tolist()


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def shards(request: pytest.FixtureRequest, smollm2: Path) -> Iterator[ShardProcesses]:
    with shard_processes(smollm2, request.param, "--dtype", "float32") as running:
        yield running


async def generate(engine: Engine, prompts: list[list[int]], at_once: int) -> list[list[TokenEvent]]:
    """Greedy tokens of all prompts, at most `at_once` of them running."""
    places = asyncio.Semaphore(at_once)

    async def one(prompt: list[int]) -> list[TokenEvent]:
        async with places:
            return await collect(engine.submit(greedy(prompt, NUM_NEW)))

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def assert_equal_tokens(results: list[list[TokenEvent]], reference: Reference) -> None:
    """The results of the first prompts, or of all."""
    for events, tokens, logprobs in zip(results, reference.tokens, reference.logprobs, strict=False):
        assert [event.token.id for event in events] == tokens
        assert [event.token.logprob for event in events] == pytest.approx(logprobs, abs=LOGPROB_TOLERANCE)


def exhaustive(max_step_tokens: int, at_once: int, lookahead: int) -> object:
    return pytest.param(max_step_tokens, at_once, lookahead, 20, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("max_step_tokens", "at_once", "lookahead", "num_prompts"),
    [
        (2048, 16, 1, 20),
        (16, 16, 2, 20),
        (16, 1, 1, 3),
        (2048, 1, 2, 3),
        exhaustive(2048, 16, 2),
        exhaustive(16, 16, 1),
        exhaustive(2048, 1, 1),
        exhaustive(2048, 1, 2),
        exhaustive(16, 1, 1),
        exhaustive(16, 1, 2),
    ],
)
def test_greedy_tokens_equal_transformers(
    shards: ShardProcesses,
    tokenizer: Tokenizer,
    reference: Reference,
    max_step_tokens: int,
    at_once: int,
    lookahead: int,
    num_prompts: int,
) -> None:
    async def run() -> None:
        async with engine_over(
            shards.addresses, tokenizer, max_step_tokens=max_step_tokens, lookahead=lookahead, prefix_caching=False
        ) as engine:
            results = await generate(engine, reference.prompts[:num_prompts], at_once)

            assert len(results) == num_prompts
            assert_equal_tokens(results, reference)

    asyncio.run(run())


def test_tokens_are_the_same_with_prefix_hits(
    shards: ShardProcesses, tokenizer: Tokenizer, reference: Reference
) -> None:
    async def run() -> None:
        async with engine_over(shards.addresses, tokenizer) as engine:
            first = await generate(engine, reference.prompts, at_once=16)
            hits_before = engine.counters.num_hit_tokens
            second = await generate(engine, reference.prompts, at_once=16)

            assert_equal_tokens(first, reference)
            assert_equal_tokens(second, reference)
            context_tokens = len(tokenizer.encode(CONTEXT))
            assert engine.counters.num_hit_tokens - hits_before > len(QUESTIONS) * (context_tokens // 2)

    asyncio.run(run())


@pytest.mark.parametrize("lookahead", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_tokens_are_the_same_when_memory_is_so_small_that_sequences_are_preempted(
    shards: ShardProcesses, tokenizer: Tokenizer, reference: Reference, lookahead: int
) -> None:
    longest = max(map(len, reference.prompts)) + NUM_NEW

    async def run() -> None:
        async with engine_over(
            shards.addresses, tokenizer, max_kv_tokens=3 * longest, max_step_tokens=64, lookahead=lookahead
        ) as engine:
            results = await generate(engine, reference.prompts, at_once=16)

            assert_equal_tokens(results, reference)
            assert engine.counters.num_preemptions > 0

    asyncio.run(run())


def test_prompt_logprobs_equal_transformers(shards: ShardProcesses, tokenizer: Tokenizer, reference: Reference) -> None:
    async def run() -> None:
        async with engine_over(shards.addresses, tokenizer, max_step_tokens=24) as engine:
            generations = [engine.submit(greedy(p, 2, prompt_logprobs=True)) for p in reference.prompts]
            results = await asyncio.gather(*map(collect, generations))

            for events, scores in zip(results, reference.prompt_logprobs, strict=True):
                assert events[0].prompt_logprobs is not None
                assert events[0].prompt_logprobs[0] is None
                assert events[0].prompt_logprobs[1:] == pytest.approx(scores, abs=LOGPROB_TOLERANCE)
                assert events[1].prompt_logprobs is None

    asyncio.run(run())


def test_equal_seeds_give_equal_text_in_any_batch(
    shards: ShardProcesses, tokenizer: Tokenizer, reference: Reference
) -> None:
    sampling = Sampling(do_sample=True, temperature=0.9, top_p=0.95, seed=2**63 + 11, repetition_penalty=1.1)
    request = sampled(reference.prompts[0], 32, sampling)

    async def run() -> None:
        async with engine_over(shards.addresses, tokenizer) as engine:
            alone = await collect(engine.submit(request))
            others = [
                engine.submit(sampled(prompt, 20, Sampling(do_sample=True, top_k=5, seed=seed, frequency_penalty=0.5)))
                for seed, prompt in enumerate(reference.prompts[:7])
            ]
            crowded, *_ = await asyncio.gather(collect(engine.submit(request)), *map(collect, others))

            assert [event.token.id for event in crowded] == [event.token.id for event in alone]
            assert [event.token.id for event in alone] != reference.tokens[0][:32]

    asyncio.run(run())


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(do_sample=True, temperature=0.8, top_p=0.95, seed=7)], ids=["greedy", "drawn"]
)
def test_guessing_ahead_changes_no_token(shards: ShardProcesses, tokenizer: Tokenizer, sampling: Sampling) -> None:
    copying = "<|im_start|>user\nRepeat this text:\n" + CONTEXT + "<|im_end|>\n<|im_start|>assistant\n" + CONTEXT[:40]
    requests = [sampled(tokenizer.encode(text), NUM_NEW, sampling) for text in (copying, SUBJECTS[4])]

    async def run(max_drafts: int) -> tuple[list[list[TokenEvent]], Counters]:
        async with engine_over(shards.addresses, tokenizer, max_drafts=max_drafts) as engine:
            return await asyncio.gather(*(collect(engine.submit(request)) for request in requests)), engine.counters

    plain, without = asyncio.run(run(0))
    guessed, counters = asyncio.run(run(4))

    for events, others in zip(guessed, plain, strict=True):
        assert [event.token.id for event in events] == [event.token.id for event in others]
        wanted = [event.token.logprob for event in others]
        assert [event.token.logprob for event in events] == pytest.approx(wanted, abs=LOGPROB_TOLERANCE)
    assert sum(counters.num_rows_by_accepted[1:]) > 5
    assert counters.num_rows < without.num_rows - 20


def test_shards_outlive_a_router_that_says_goodbye(shards: ShardProcesses) -> None:
    """The tests above used the same processes, one epoch each."""
    assert all(process.poll() is None for process in shards.processes)
    assert all(os.path.exists(address.removeprefix("unix:")) for address in shards.addresses)
