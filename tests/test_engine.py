"""The whole engine over ghost groups: every token is the oracle's, whatever happens to the shards meanwhile."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest

from router.core.plan import StepPlan, Timings
from router.core.request import FinishReason, Request, Sampling
from router.engine import Engine, Pace, StepMeters, TokenEvent
from router.errors import GenerationFailed, GroupLost, NotReady, RouterError, StartupError
from router.group.client import Demands, GroupClient
from router.metrics import Gauges, Metrics
from router.text.output import OutputText, Piece
from router.text.tokenizer import Tokenizer
from tests.engines import collect, engine_over, greedy, sampled
from tests.ghost import (
    DEFAULT_VOCAB_SIZE,
    Fault,
    FaultKind,
    GhostGroup,
    GhostSettings,
    ghost_group,
    likeliest,
    oracle,
    oracle_prompt_logprobs,
)
from tests.tiny_tokenizers import byte_level, tokenizer_of

SEND = GroupClient.send


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of(byte_level())


def ids(events: list[TokenEvent]) -> list[int]:
    return [event.token.id for event in events]


def make_prompts(num: int, longest: int = 30) -> list[list[int]]:
    rng = random.Random(num)
    return [[rng.randrange(1, 97) for _ in range(rng.randint(1, longest))] for _ in range(num)]


async def assert_all_right(engine: Engine, prompts: list[list[int]], num_new: int) -> None:
    results = await asyncio.gather(*(collect(engine.submit(greedy(prompt, num_new))) for prompt in prompts))

    assert [ids(events) for events in results] == [oracle(prompt, num_new) for prompt in prompts]
    assert all(events[-1].finish is not None for events in results)
    assert all(event.finish is None for events in results for event in events[:-1])


def over_ghosts(
    tokenizer: Tokenizer,
    act: Callable[[GhostGroup, Engine, Metrics], Awaitable[None]],
    settings: GhostSettings | None = None,
    faults: tuple[Fault, ...] = (),
    *,
    lookahead: int = 1,
) -> None:
    """Runs `act` against an engine over a ghost group that a supervisor revives when it is lost."""

    async def run() -> None:
        metrics = Metrics(max_input_tokens=100, max_total_tokens=100)
        async with (
            ghost_group(settings, faults) as group,
            engine_over(
                group.addresses,
                tokenizer,
                max_step_tokens=32,
                max_seats=16,
                lookahead=lookahead,
                metrics=metrics,
                restart=group.revive,
            ) as engine,
        ):
            await act(group, engine, metrics)

    asyncio.run(run())


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_every_token_is_the_oracles(tokenizer: Tokenizer, world_size: int, lookahead: int) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        await assert_all_right(engine, make_prompts(40), num_new=20)

        assert metrics.value("tgi_request_success") == 40
        assert metrics.value("shardstream_generated_tokens_count") == 40 * 20
        assert engine.gauges.kv_cache_utilization == 0
        assert engine.counters.num_preemptions > 0

    over_ghosts(tokenizer, act, GhostSettings(world_size=world_size, num_blocks=40), lookahead=lookahead)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(0, 5, FaultKind.DIE),
        Fault(1, 5, FaultKind.DIE),
        Fault(0, 5, FaultKind.GIVE_UP),
        Fault(1, 5, FaultKind.GIVE_UP),
        Fault(0, 5, FaultKind.DUPLICATE),
        Fault(1, 5, FaultKind.DUPLICATE),
        *(Fault(rank, 5, kind) for kind in (FaultKind.HANG, FaultKind.DROP) for rank in (0, 1)),
        Fault(0, 5, FaultKind.GARBAGE_TOKENS),
        Fault(0, 5, FaultKind.GARBAGE_ROWS),
        Fault(1, 5, FaultKind.WRONG_DIGEST),
        *(Fault(rank, 5, FaultKind.WRONG_STEP) for rank in (0, 1)),
    ],
    ids=lambda fault: f"{fault.kind.value} of rank {fault.rank}",
)
def test_streams_survive_a_lost_epoch(tokenizer: Tokenizer, fault: Fault) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        await assert_all_right(engine, make_prompts(12), num_new=20)

        assert metrics.value("shardstream_group_restarts_count") == 1
        assert engine.ready

    over_ghosts(tokenizer, act, GhostSettings(world_size=2, num_blocks=200), (fault,))


def test_a_rank_that_is_slow_but_alive_is_waited_for(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        await assert_all_right(engine, make_prompts(6), num_new=10)

        assert metrics.value("shardstream_group_restarts_count") == 0

    over_ghosts(tokenizer, act, GhostSettings(world_size=2), (Fault(1, 3, FaultKind.DELAY, delay_s=0.5),))


def test_a_rank_that_dies_while_nothing_runs_is_replaced_before_the_next_request(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        await assert_all_right(engine, make_prompts(3), num_new=5)
        await group.kill(1)
        await assert_all_right(engine, make_prompts(3), num_new=5)

        assert metrics.value("shardstream_group_restarts_count") == 1

    over_ghosts(tokenizer, act, GhostSettings(world_size=2))


def test_a_request_that_kills_every_group_fails_alone(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        innocents = asyncio.create_task(assert_all_right(engine, make_prompts(8), num_new=12))
        with pytest.raises(GenerationFailed, match="died"):
            await collect(engine.submit(greedy([5, 2000, 7], 5)))
        await innocents

        assert metrics.value("tgi_request_failure", "generation") == 1
        assert metrics.value("tgi_request_success") == 8

    over_ghosts(tokenizer, act, GhostSettings(world_size=2, poison_token=2000, num_blocks=200))


def test_a_row_that_fails_ends_its_sequence_alone(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        prompts = make_prompts(5)
        generations = [engine.submit(greedy(prompt, 10)) for prompt in prompts]
        results = await asyncio.gather(*map(collect, generations), return_exceptions=True)

        failed = [result for result in results if isinstance(result, BaseException)]
        assert [type(error) for error in failed] == [GenerationFailed]
        for prompt, result in zip(prompts, results, strict=True):
            assert isinstance(result, BaseException) or ids(result) == oracle(prompt, 10)
        assert metrics.value("shardstream_group_restarts_count") == 0

    over_ghosts(tokenizer, act, GhostSettings(world_size=2), (Fault(0, 4, FaultKind.ROW_FAULT),))


def test_a_cancelled_sequence_leaves_nothing_behind(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        generation = engine.submit(greedy([1, 2, 3], 50))
        stays = asyncio.create_task(collect(engine.submit(greedy([4, 5], 30))))
        events = aiter(generation)
        seen = [await anext(events) for _ in range(5)]
        generation.cancel()
        generation.cancel()
        survivor = await stays

        assert ids(seen) == oracle([1, 2, 3], 50)[:5]
        assert ids(survivor) == oracle([4, 5], 30)
        assert metrics.value("shardstream_cancelled_count") == 1
        assert (engine.gauges.num_running, engine.gauges.kv_cache_utilization) == (0, 0)

    over_ghosts(tokenizer, act, GhostSettings(step_delay_s=0.001))


def test_a_stop_string_ends_the_sequence_and_its_text(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        whole = (await collect(engine.submit(greedy([9, 8, 7], 40))))[-1].finish
        assert whole is not None
        stop = whole.text[10:13]
        end = whole.text.index(stop) + len(stop)

        kept = await collect(engine.submit(greedy([9, 8, 7], 40, stop=(stop,))))
        cut = await collect(engine.submit(greedy([9, 8, 7], 40, stop=(stop,), keep_stop=False)))

        for events, text in ((kept, whole.text[:end]), (cut, whole.text[: end - len(stop)])):
            finish = events[-1].finish
            assert finish is not None
            assert (finish.reason, finish.text) == (FinishReason.STOP_SEQUENCE, text)
            assert "".join(event.token.text for event in events if not event.token.special) == text
            assert finish.num_generated == len(events) < 40

    over_ghosts(tokenizer, act)


def test_a_stop_string_in_the_last_token_allowed_counts_where_it_is_cut_off(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        events = await collect(engine.submit(greedy([9, 8, 7], 8)))
        assert events[-1].finish is not None
        text, last = events[-1].finish.text, events[-1].token.text
        assert text.count(last) == 1

        kept = await collect(engine.submit(greedy([9, 8, 7], 8, stop=(last,))))
        cut = await collect(engine.submit(greedy([9, 8, 7], 8, stop=(last,), keep_stop=False)))

        assert [e[-1].finish and e[-1].finish.reason for e in (kept, cut)] == [
            FinishReason.LENGTH,
            FinishReason.STOP_SEQUENCE,
        ]

    over_ghosts(tokenizer, act)


def test_the_likeliest_tokens_in_a_prompts_places_come_with_its_logprobs(tokenizer: Tokenizer) -> None:
    prompt = [*range(1, 41)]  # two chunks of 32
    sampling = Sampling(prompt_top_n_tokens=2)

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        events = await collect(engine.submit(greedy(prompt, 2, prompt_logprobs=True, sampling=sampling)))

        tops = [[(token.id, token.logprob) for token in tops] for tops in events[0].prompt_tops]
        assert tops == [[], *(likeliest(prompt[:end], 2, DEFAULT_VOCAB_SIZE) for end in range(1, len(prompt)))]
        assert events[1].prompt_tops == ()

    over_ghosts(tokenizer, act)


def test_prompt_logprobs_come_with_the_first_token_and_survive_a_death(tokenizer: Tokenizer) -> None:
    prompt = [*range(1, 81)]  # three chunks of 32

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        events = await collect(engine.submit(greedy(prompt, 4, prompt_logprobs=True)))

        assert events[0].prompt_logprobs is not None
        assert events[0].prompt_logprobs[0] is None
        assert events[0].prompt_logprobs[1:] == pytest.approx(oracle_prompt_logprobs(prompt), abs=1e-6)
        assert [event.prompt_logprobs for event in events[1:]] == [None] * 3

    over_ghosts(tokenizer, act, faults=(Fault(0, 2, FaultKind.DIE),))


def test_sampling_reaches_the_shards_and_survives_a_replay(tokenizer: Tokenizer) -> None:
    sampling = Sampling(
        do_sample=True,
        temperature=0.5,
        top_k=3,
        repetition_penalty=1.5,
        seed=2**64 - 1,
        logit_bias=((3, -1.5),),
        bad_words=((1, 2), (3,)),
        top_n_tokens=2,
    )

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        events = await collect(engine.submit(sampled([1, 2, 3], 20, sampling)))

        assert ids(events) == oracle([1, 2, 3], 20, sampling=sampling)
        assert all(len(event.top_tokens) == 2 for event in events)

    over_ghosts(tokenizer, act, faults=(Fault(0, 9, FaultKind.DIE),))


def test_an_engine_that_shuts_down_refuses_and_drains(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        running = asyncio.create_task(collect(engine.submit(greedy([1, 2], 3))))
        endless = asyncio.create_task(collect(engine.submit(greedy([3, 4], 90))))
        await asyncio.sleep(0)
        engine.refuse("the server is shutting down")

        with pytest.raises(NotReady):
            engine.submit(greedy([5], 3))
        draining = asyncio.create_task(engine.drain(timeout_s=60))
        assert ids(await running) == oracle([1, 2], 3)
        assert not draining.done()
        draining.cancel()
        await engine.drain(timeout_s=0)
        assert not engine.ready
        with pytest.raises(NotReady):
            await endless

    over_ghosts(tokenizer, act, GhostSettings(step_delay_s=0.02))


def test_a_sequence_whose_text_fails_fails_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fragile(OutputText):
        def push(self, token_id: int, *, last: bool) -> Piece:
            if token_id == oracle([1, 2, 3], 5)[4]:
                raise OverflowError
            return super().push(token_id, last=last)

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        monkeypatch.setattr("router.engine.OutputText", Fragile)
        doomed = engine.submit(greedy([1, 2, 3], 10))
        monkeypatch.undo()
        fine = engine.submit(greedy([4, 5], 10))

        with pytest.raises(GenerationFailed, match="could not be told"):
            await collect(doomed)
        assert ids(await collect(fine)) == oracle([4, 5], 10)
        assert engine.gauges.kv_cache_utilization == 0

    over_ghosts(tokenizer, act)


def test_a_sequence_that_fails_is_logged_by_its_names(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        generation = engine.submit(Request("one", (1, 2, 3), 10, trace_id="0af7"))
        engine.fail_all("no more")

        with pytest.raises(NotReady):
            await collect(generation)

    over_ghosts(tokenizer, act)

    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert messages == ["Failure request_id=one trace_id=0af7: no more"]


def test_a_group_that_comes_back_with_another_model_is_given_up(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        generation = engine.submit(greedy([1, 2], 40))
        await anext(aiter(generation))
        for host in group.hosts:
            host.settings = replace(host.settings, vocab_size=98)
        await group.kill(0)

        with pytest.raises(NotReady):
            await collect(generation)
        assert not engine.ready

    with pytest.raises(StartupError, match="another model: vocab_size"):
        over_ghosts(tokenizer, act, GhostSettings(step_delay_s=0.01))


def test_ranks_that_do_not_belong_together_are_refused() -> None:
    async def run() -> None:
        async with ghost_group(GhostSettings(world_size=2)) as group:
            with pytest.raises(StartupError, match="2 ranks but 1"):
                await GroupClient(group.addresses[:1], Demands(4, 16)).connect(find_s=60, load_s=60)
            with pytest.raises(StartupError, match=r"ranks \[1, 0\]"):
                await GroupClient(group.addresses[::-1], Demands(4, 16)).connect(find_s=60, load_s=60)
        async with ghost_group(GhostSettings(num_blocks=1)) as small:
            with pytest.raises(StartupError, match="too little"):
                await GroupClient(small.addresses, Demands(4, 16)).connect(find_s=60, load_s=60)

    asyncio.run(run())


def test_one_router_at_a_time_drives_a_group() -> None:
    async def run() -> None:
        async with ghost_group() as group:
            first, second = (GroupClient(group.addresses, Demands(4, 16)) for _ in range(2))
            info = await first.connect(find_s=60, load_s=60)
            with pytest.raises(GroupLost, match="another router"):
                await second.connect(find_s=60, load_s=60)
            await first.close(goodbye=True)
            again = await second.connect(find_s=60, load_s=60)
            await second.close(goodbye=True)

            assert again.epoch > info.epoch

    asyncio.run(run())


def test_a_step_is_repeated_as_often_as_takes_the_longest_wait_of_a_request_that_arrives() -> None:
    pace = Pace()
    before = pace.max_repeats
    pace.note(0.004, 1, 0.003)
    short = pace.max_repeats
    for _ in range(60):
        pace.note(0.001, 1, 0.0009)
    shorter = pace.max_repeats
    for _ in range(60):
        pace.note(0.011, 32, 0.01)

    assert (before, short, shorter, pace.max_repeats) == (0, 2, 3, 0)


@pytest.mark.parametrize(("lookahead", "longest"), [(0, 0), (1, 3), (2, 3)])
def test_only_what_is_planned_ahead_is_repeated(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, lookahead: int, longest: int
) -> None:
    monkeypatch.setattr(Pace, "max_repeats", 3)
    sent: list[StepPlan] = []

    async def send(client: GroupClient, plan: StepPlan, timeout_s: float) -> None:
        sent.append(plan)
        await SEND(client, plan, timeout_s)

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        await assert_all_right(engine, make_prompts(1), num_new=20)

        assert max(plan.num_repeats for plan in sent) == longest
        assert sum(plan.num_steps for plan in sent) == engine.counters.num_steps == 20
        assert metrics.value("tgi_batch_inference_count", "decode") == 19
        assert metrics.value("tgi_batch_inference_success", "decode") == 19

    monkeypatch.setattr(GroupClient, "send", send)
    over_ghosts(tokenizer, act, lookahead=lookahead)


def test_a_lost_group_is_expected_to_be_away_as_long_as_the_last_time(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now, perf_counter=time.perf_counter)
    monkeypatch.setattr("router.engine.time", clock)
    restart, engines, expected = GhostGroup.revive, list[Engine](), list[float]()

    async def revive(group: GhostGroup) -> None:
        for engine in engines:  # there is none when the group starts
            expected.append(engine.ready_in_s)
            clock.now += 12.0
            expected.append(engine.ready_in_s)
            clock.now += 0.5
        await restart(group)

    monkeypatch.setattr(GhostGroup, "revive", revive)

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        engines.append(engine)
        for _ in range(2):
            await group.kill(1)
            await assert_all_right(engine, make_prompts(1), num_new=5)
            clock.now += 70.0
            expected.append(engine.ready_in_s)

    over_ghosts(tokenizer, act, GhostSettings(world_size=2))

    assert expected == [20.0, 8.0, 12.5, 12.5, 1.0, 12.5]


def test_a_steps_time_begins_when_it_was_sent_and_the_step_before_it_returned(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's clock goes on by a second with each look at it: with each plan and each answer."""
    seconds, noted = count(), []
    monkeypatch.setattr(Pace, "max_repeats", 3)
    monkeypatch.setattr(Pace, "note", lambda _, step_s, num_tokens, forward_s: noted.append(step_s))
    clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=time.perf_counter)
    monkeypatch.setattr("router.engine.time", clock)

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        await assert_all_right(engine, make_prompts(1), num_new=9)
        for _ in range(100):  # with nothing to do
            next(seconds)
        await assert_all_right(engine, make_prompts(1), num_new=9)

    over_ghosts(tokenizer, act)

    assert noted == 2 * [2, 1, 1, 1, 2, 1, 1, 1, 1]  # 2: a plan was sent meanwhile


AMID_REPEATS = 5
"""Of a sequence alone with three repeats per plan: the steps of its plans are 1, then 2 to 5, then 6 to 9."""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", [FaultKind.DIE, FaultKind.GIVE_UP, FaultKind.DUPLICATE])
@pytest.mark.parametrize("step", [AMID_REPEATS - 1, AMID_REPEATS])
def test_a_stream_survives_an_epoch_that_is_lost_amid_repeats(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, rank: int, kind: FaultKind, step: int
) -> None:
    monkeypatch.setattr(Pace, "max_repeats", 3)

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        await assert_all_right(engine, make_prompts(1), num_new=20)

        assert metrics.value("shardstream_group_restarts_count") == 1

    over_ghosts(tokenizer, act, GhostSettings(world_size=2), (Fault(rank, step, kind),))


def test_a_row_that_fails_amid_repeats_ends_its_sequence_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "max_repeats", 3)

    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        with pytest.raises(GenerationFailed, match="row 0 failed"):
            await collect(engine.submit(greedy([5, 6], 20)))
        await assert_all_right(engine, make_prompts(3), num_new=20)

        assert metrics.value("shardstream_group_restarts_count") == 0
        assert engine.gauges.kv_cache_utilization == 0

    over_ghosts(tokenizer, act, GhostSettings(world_size=2), (Fault(0, AMID_REPEATS, FaultKind.ROW_FAULT),))


def test_prompts_feed_no_more_beside_running_streams_than_takes_the_longest_stall() -> None:
    pace = Pace()
    pace.note(0.5, 1, 0.005)  # a decode says nothing of prompts
    assert pace.max_prompt_tokens is None

    pace.note(0.9, 1000, 0.25)
    assert pace.max_prompt_tokens == 600  # of 250 us each, in 0.15 s

    for _ in range(40):
        pace.note(9.0, 1000, 5.0)
    assert pace.max_prompt_tokens == 128, "slow shards get chunks worth reading the weights for"


@pytest.mark.parametrize("num_shown", [2, 19], ids=["a token", "the last one"])
def test_who_cannot_show_a_token_fails_alone(tokenizer: Tokenizer, num_shown: int) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        failed: asyncio.Future[RouterError] = asyncio.get_running_loop().create_future()

        def show(event: TokenEvent) -> None:
            if event.index > num_shown:
                raise ZeroDivisionError

        engine.submit(greedy([1, 2, 3], 20)).pass_on(show, failed.set_result)
        await assert_all_right(engine, make_prompts(3), num_new=20)

        assert isinstance(await failed, GenerationFailed)
        assert metrics.value("shardstream_group_restarts_count") == 0

    over_ghosts(tokenizer, act)


def test_who_cannot_be_told_of_a_failure_fails_alone(tokenizer: Tokenizer) -> None:
    async def act(group: GhostGroup, engine: Engine, metrics: Metrics) -> None:
        def break_(_: object) -> None:
            raise ZeroDivisionError

        engine.submit(greedy([1, 2, 3], 20)).pass_on(break_, break_)
        await assert_all_right(engine, make_prompts(3), num_new=20)

        assert metrics.value("tgi_request_failure", "generation") == 1

    over_ghosts(tokenizer, act)


def test_a_steps_times_are_counted_each_under_its_name() -> None:
    metrics = Metrics(max_input_tokens=100, max_total_tokens=100)

    StepMeters(metrics, "decode").note(0.5, Timings(wait_us=1, inputs_us=2, forward_us=3, sample_us=4))

    names = ("wait", "inputs", "forward", "sample")
    assert [metrics.value(f"shardstream_shard_{name}_seconds_sum") for name in names] == pytest.approx(
        [1e-6, 2e-6, 3e-6, 4e-6]
    )
    text = metrics.render(Gauges()).decode()
    for name, seconds in (("inference", "0.5"), ("forward", "3e-06"), ("decode", "4e-06")):
        assert f'tgi_batch_{name}_duration_sum{{method="decode"}} {seconds}' in text
