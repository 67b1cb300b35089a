"""Beam search through an engine: equal to transformers' over real ranks, and undisturbed by whatever goes on around."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from router.api.app import create_app
from router.beams import BeamGeneration
from router.config import Config
from router.core.beams import Beam, BeamSearch
from router.core.request import BeamSettings, FinishReason, Request, Sampling
from router.engine import Engine, Finish, Generation, Token, TokenEvent
from router.errors import GenerationFailed, NotReady
from router.metrics import Metrics
from router.text.tokenizer import Tokenizer
from router.validate import Capacity, Limits, Validator
from tests.engines import collect, engine_over, greedy
from tests.ghost import Fault, FaultKind, GhostGroup, GhostSettings, ghost_group, likeliest, oracle_prompt_logprobs
from tests.http_app import Json
from tests.server import PATIENCE_S
from tests.shards import ShardProcesses, shard_processes
from tests.tiny_tokenizers import byte_level, tokenizer_of

TOKENIZER = tokenizer_of(byte_level())
SETTINGS = GhostSettings(vocab_size=TOKENIZER.vocab_size, num_blocks=200)
PROMPT = [*range(10, 52)]
"""42 tokens: ten full blocks of the ghost's and two tokens."""
NUM_NEW = 9
BEAMS = BeamSettings(3, early_stopping="never")

Act = Callable[[GhostGroup, Engine, Metrics], Awaitable[None]]


def beams_of(prompt: list[int] = PROMPT, **values: object) -> Request:
    return greedy(prompt, NUM_NEW, **{"beams": BEAMS, **values})


def over_ghosts(
    act: Act, settings: GhostSettings = SETTINGS, *, faults: tuple[Fault, ...] = (), prefix_caching: bool = True
) -> None:
    async def run() -> None:
        metrics = Metrics(max_input_tokens=100, max_total_tokens=100)
        async with (
            ghost_group(settings, faults) as group,
            engine_over(
                group.addresses, TOKENIZER, metrics=metrics, prefix_caching=prefix_caching, restart=group.revive
            ) as engine,
        ):
            await act(group, engine, metrics)

    asyncio.run(run())


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.001)


def expected_winner(prompt: list[int] = PROMPT, ends: tuple[int, ...] = (), beams: BeamSettings = BEAMS) -> Beam:
    """The search over the ghost's own log-probabilities, beam by beam."""
    search = BeamSearch(beams, NUM_NEW, ends)
    while not search.is_done:
        histories = [[*prompt, *beam.token_ids] for beam in search.running]
        search.advance([tuple(likeliest(h, search.num_candidates, SETTINGS.vocab_size)) for h in histories])
    return search.winner


def assert_is_winner(events: list[TokenEvent], winner: Beam) -> None:
    assert [event.token.id for event in events] == list(winner.token_ids)
    assert [event.token.logprob for event in events] == list(winner.logprobs)
    assert [event.index for event in events] == [*range(1, len(winner.token_ids) + 1)]
    assert [event.finish is None for event in events] == [True] * (len(events) - 1) + [False]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("faults", [(), (Fault(0, 4, FaultKind.DIE),)], ids=["", "with a death"])
def test_a_search_finds_the_winner_whatever_happens(prefix_caching: bool, faults: tuple[Fault, ...]) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        events = await collect(engine.submit(beams_of()))

        assert_is_winner(events, expected_winner())
        finish = events[-1].finish
        assert finish == Finish(FinishReason.LENGTH, "".join(event.token.text for event in events), NUM_NEW)
        assert metrics.value("shardstream_group_restarts_count") == len(faults)

    over_ghosts(act, faults=faults, prefix_caching=prefix_caching)


def test_an_end_token_of_the_winner_is_told() -> None:
    """The winner's third token is made an end token, and short beams are favoured."""
    beams = BeamSettings(3, length_penalty=-1.0)
    end = expected_winner().token_ids[2]
    winner = expected_winner(ends=(end,), beams=beams)

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        events = await collect(engine.submit(beams_of(beams=beams, eos_token_ids=(end,))))

        assert_is_winner(events, winner)
        assert winner.token_ids[-1] == end
        assert len(events) < NUM_NEW
        assert events[-1].finish is not None
        assert events[-1].finish.reason is FinishReason.EOS_TOKEN

    over_ghosts(act)


def test_only_the_last_block_of_a_beam_is_fed_again() -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        await collect(engine.submit(beams_of()))

        num_fed_again = engine.counters.num_fed_tokens - len(PROMPT)
        assert 0 < num_fed_again <= BEAMS.num_beams * (NUM_NEW - 1) * SETTINGS.block_size

    over_ghosts(act)


@pytest.mark.parametrize("num_top", [1, 5, 40])
def test_likeliest_tokens_are_those_beside_the_winners(num_top: int) -> None:
    """Also more of them than the search itself looks at."""
    history = list(PROMPT)

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        events = await collect(engine.submit(beams_of(sampling=Sampling(top_n_tokens=num_top))))

        for event in events:
            # A ghost finds other tokens likeliest if it is asked for more of them.
            asked = max(num_top, 2 * BEAMS.num_beams)
            told = likeliest(history, asked, SETTINGS.vocab_size)
            least = told[num_top - 1][1]
            assert [(t.id, t.logprob) for t in event.top_tokens] == [pair for pair in told if pair[1] >= least]
            history.append(event.token.id)

    over_ghosts(act)


def test_the_prompt_is_scored_once() -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        events = await collect(engine.submit(beams_of(prompt_logprobs=True)))

        assert events[0].prompt_logprobs == (None, *oracle_prompt_logprobs(PROMPT))
        assert {event.prompt_logprobs for event in events[1:]} == {None}

    over_ghosts(act)


# What the engine counts and keeps


def test_a_search_counts_as_one_request() -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        generation = engine.submit(beams_of())
        await collect(generation)

        assert metrics.value("tgi_request_count") == metrics.value("tgi_request_success") == 1
        assert metrics.value("tgi_request_failure", "dropped") == 0
        rendered = metrics.render(engine.gauges).decode()
        assert f"tgi_request_generated_tokens_sum {NUM_NEW}.0\n" in rendered
        assert f"tgi_request_input_length_sum {len(PROMPT)}.0\n" in rendered
        assert "tgi_request_duration_count 1.0\n" in rendered
        assert generation.queue_s > 0
        assert generation.inference_s > 0

    over_ghosts(act)


def test_a_cancelled_search_leaves_nothing() -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        generation = engine.submit(beams_of())
        reading = asyncio.create_task(collect(generation))
        await wait_until(lambda: engine.counters.num_steps >= 3)
        reading.cancel()
        await asyncio.wait([reading])
        generation.cancel()
        generation.cancel()

        assert (engine.gauges.num_running, engine.gauges.num_waiting) == (0, 0)
        assert engine.gauges.kv_cache_utilization == 0
        assert metrics.value("tgi_request_failure", "dropped") == metrics.value("shardstream_cancelled_count") == 1
        await engine.drain(timeout_s=60)
        assert metrics.value("tgi_request_success") == 0

    over_ghosts(act, replace(SETTINGS, step_delay_s=0.001))


def test_a_search_fails_with_any_of_its_beams() -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        generation = engine.submit(beams_of())
        with pytest.raises(GenerationFailed):
            await collect(generation)
        generation.cancel()

        assert (engine.gauges.num_running, engine.gauges.num_waiting) == (0, 0)
        assert metrics.value("tgi_request_failure", "generation") == 1
        assert metrics.value("tgi_request_failure", "dropped") == 0
        await engine.drain(timeout_s=60)

    over_ghosts(act, faults=(Fault(0, 3, FaultKind.ROW_FAULT),))


def test_a_shutdown_waits_for_a_search() -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        reading = asyncio.create_task(collect(engine.submit(beams_of())))
        engine.refuse("the server is shutting down")

        with pytest.raises(NotReady):
            engine.submit(beams_of())
        await engine.drain(timeout_s=60)

        assert metrics.value("tgi_request_success") == 1
        assert_is_winner(await reading, expected_winner())

    over_ghosts(act)


def test_a_shutdown_does_not_wait_for_ever() -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        reading = asyncio.create_task(collect(engine.submit(beams_of())))

        await engine.drain(timeout_s=0)

        with pytest.raises(NotReady):
            await reading
        assert (engine.gauges.num_running, engine.gauges.num_waiting) == (0, 0)

    over_ghosts(act, replace(SETTINGS, step_delay_s=0.001))


def test_a_search_that_is_between_two_steps_at_the_end_of_a_shutdown_fails() -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        unread = engine.submit(beams_of())
        await wait_until(lambda: engine.counters.num_emitted_tokens == 1)

        await engine.drain(timeout_s=0)

        with pytest.raises(NotReady):
            await collect(unread)

    over_ghosts(act)


class Recorder:
    """Answers every beam at once: tokens 7 and 8 are always the likeliest. Beam `num_answers` is never answered, and
    those behind it are refused."""

    def __init__(self, num_answers: int) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[Generation] = []
        self.ends: list[object] = []
        self._num_answers = num_answers

    def submit(self, request: Request) -> Generation:
        if len(self.requests) == self._num_answers:
            raise NotReady("over")
        self.requests.append(request)
        generation = Generation(request, self.cancelled.append)
        if len(self.requests) < self._num_answers:
            tops = tuple(Token(id_, "", -float(id_), False) for id_ in (7, 8, 9, 10))
            generation.publish(TokenEvent(1, tops[0], tops, Finish(FinishReason.LENGTH, "", 1)))
        return generation

    def search(self) -> Generation:
        request = beams_of([1, 2], prompt_logprobs=True)
        return BeamGeneration(
            request, BeamSettings(2), self.submit, TOKENIZER, lambda _, outcome: self.ends.append(outcome)
        )


def test_beams_behind_the_first_step_go_first() -> None:
    recorder = Recorder(100)
    asyncio.run(collect(recorder.search()))

    first, *others = recorder.requests
    assert (first.prompt, first.priority, first.prompt_logprobs) == ((1, 2), 0, True)
    assert [request.prompt for request in others[:4]] == [(1, 2, 7), (1, 2, 8), (1, 2, 7, 7), (1, 2, 7, 8)]
    assert {(r.priority, r.prompt_logprobs, r.max_new_tokens, r.beams) for r in others} == {(1, False, 1, None)}


def test_a_search_that_is_refused_in_a_step_ends_the_beams_of_it() -> None:
    recorder = Recorder(2)

    with pytest.raises(NotReady, match="over"):
        asyncio.run(collect(recorder.search()))

    assert [generation.request for generation in recorder.cancelled] == recorder.requests[1:]
    assert [type(end) for end in recorder.ends] == [NotReady]


# HTTP


def post(body: Json, **settings: object) -> httpx.Response:
    """What /generate answers over a ghost."""
    responses: list[httpx.Response] = []

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        config = Config(max_total_tokens=128, **settings)  # type: ignore[arg-type]
        limits = Limits.derive(config, Capacity(TOKENIZER.vocab_size, (), 796), TOKENIZER)
        app = create_app(config, engine, Validator(limits, TOKENIZER), TOKENIZER, metrics)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            responses.append(await client.post("/generate", json=body))

    over_ghosts(act)
    return responses[0]


def test_the_native_answer_is_the_winner() -> None:
    prompt = "z" * 20
    winner = expected_winner(TOKENIZER.encode(prompt))
    parameters = {"num_beams": 3, "early_stopping": "never", "max_new_tokens": NUM_NEW, "details": True}

    answer = post({"inputs": prompt, "parameters": parameters | {"decoder_input_details": True}}).json()

    details = answer["details"]
    assert [token["id"] for token in details["tokens"]] == list(winner.token_ids)
    assert [token["logprob"] for token in details["tokens"]] == pytest.approx(winner.logprobs)
    assert "".join(token["text"] for token in details["tokens"]) == answer["generated_text"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", NUM_NEW, None)
    assert len(details["prefill"]) == 20
    assert "best_of_sequences" not in details


def test_every_beam_takes_a_permit() -> None:
    body: Json = {"inputs": "a", "parameters": {"num_beams": 3, "max_new_tokens": 2}}

    assert post(body, max_concurrent_requests=3).status_code == 200
    assert post(body, max_concurrent_requests=2).status_code == 429


# Real weights


@dataclass(frozen=True)
class Subject:
    text: str
    ends: bool = False
    """Whether the winner ends of itself."""


SUBJECTS = (
    Subject("The capital of France is"),
    Subject("def fibonacci(n):\n"),
    Subject("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", ends=True),
)
REAL_NUM_NEW = 16


@pytest.fixture(scope="module")
def shards(smollm2: Path) -> Iterator[ShardProcesses]:
    with shard_processes(smollm2, 1, "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def causal_lm(smollm2: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "beams",
    [BeamSettings(4), BeamSettings(3, 0.0, True), BeamSettings(2, 2.0, "never")],
    ids=["usual", "no penalty, early", "long, never"],
)
def test_the_winner_is_transformers(
    shards: ShardProcesses, smollm2: Path, causal_lm: PreTrainedModel, beams: BeamSettings
) -> None:
    tokenizer = Tokenizer.load(smollm2)
    prompts = [tokenizer.encode(subject.text) for subject in SUBJECTS]
    ends = tuple(causal_lm.generation_config.eos_token_id)
    requests = [greedy(prompt, REAL_NUM_NEW, beams=beams, eos_token_ids=ends) for prompt in prompts]

    async def search() -> list[list[TokenEvent]]:
        async with engine_over(shards.addresses, tokenizer) as engine:
            return list(await asyncio.gather(*(collect(engine.submit(request)) for request in requests)))

    for subject, prompt, events in zip(SUBJECTS, prompts, asyncio.run(search()), strict=True):
        generated, logprobs = reference(causal_lm, prompt, beams)
        assert [event.token.id for event in events] == generated
        assert [event.token.logprob for event in events] == pytest.approx(logprobs, abs=1e-4)
        finish = events[-1].finish
        assert finish is not None
        assert (finish.reason is FinishReason.EOS_TOKEN) == subject.ends


def reference(causal_lm: PreTrainedModel, prompt: list[int], beams: BeamSettings) -> tuple[list[int], list[float]]:
    """transformers' winner and its tokens' log-probabilities."""
    out = causal_lm.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=REAL_NUM_NEW,
        num_beams=beams.num_beams,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        do_sample=False,
    )
    with torch.inference_mode():
        scores = causal_lm(out).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    generated = out[0, len(prompt) :]
    return generated.tolist(), scores.gather(-1, generated[:, None])[:, 0].tolist()
