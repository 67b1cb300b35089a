"""Forced tokens: known before a row has come to them, handed on only with their log-probabilities."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from router.core.plan import Row, RowOutput, SampledToken, StepOutput
from router.core.request import FinishReason, Request, Sampling, Sequence
from router.core.scheduler import CONTRADICTION_FAULT, Emission, Limits, Scheduler
from router.errors import GroupLost
from router.group.codec import decode_output, encode_plan
from tests.engines import collect, engine_over
from tests.ghost import BrokenPlan, GhostSettings, forced_run, ghost_group, make_rules, oracle, sampling_message, score
from tests.house import ROOMY, VOCAB_SIZE, House
from tests.tiny_tokenizers import byte_level, tokenizer_of

PROMPT = (1, 2, 3, 4, 5)
ALWAYS = "force:1/1"
SEEDS = range(40)


def make_request(max_new_tokens: int, seed: int = 0, eos_token_ids: tuple[int, ...] = ()) -> Request:
    """Of a sequence whose every row forces a few tokens."""
    return Request("r", PROMPT, max_new_tokens, Sampling(seed=seed), eos_token_ids, grammar=ALWAYS)


def generated(request: Request) -> list[int]:
    return oracle(request.prompt, request.max_new_tokens, sampling=request.sampling, grammar=request.grammar)


def first_run(request: Request) -> list[int]:
    """What the first row forces."""
    rules = make_rules(sampling_message(request.sampling), len(request.prompt), request.grammar)
    return forced_run([*request.prompt, *generated(request)[:1]], rules, request.grammar, VOCAB_SIZE)


def request_forcing(num_tokens: int, max_new_tokens: int = 20) -> Request:
    """Whose first row forces exactly so many tokens."""
    requests = (make_request(max_new_tokens, seed) for seed in SEEDS)
    return next(request for request in requests if len(first_run(request)) == num_tokens)


def sent_rows(house: House) -> list[Row]:
    return [row for plan in house.plans for row in plan.rows]


# What is planned


def test_forced_tokens_are_fed_in_one_row_that_asks_for_their_scores() -> None:
    house = House()
    request = request_forcing(5)
    tokens = generated(request)
    house.add(request)

    house.turn()
    plan = house.send()

    assert plan is not None
    (row,) = plan.rows
    assert (row.literals, row.targets, row.emit) == (tokens[:6], tokens[1:6], True)
    house.run()
    assert [[t.token_id for t in e.tokens] for e in house.emissions[:2]] == [tokens[:1], tokens[1:7]]


def test_forced_tokens_are_counted_as_steps_that_were_not_needed() -> None:
    house = House(max_drafts=2)
    house.add(request_forcing(5))
    house.add(Request("r", PROMPT, 7))

    house.run()

    counters = house.scheduler.counters
    counts = [len(emission.tokens) for emission in house.emissions]
    assert max(counts) >= 6
    assert counters.num_emitted_tokens == sum(counts) == 20 + 7
    assert counters.num_emitted_tokens - counters.num_skipped_tokens == len(counts)
    assert counters.num_rows_by_skipped == [0, counts.count(2), counts.count(3), sum(count > 3 for count in counts)]


@pytest.mark.parametrize("depth", [2, 3])
def test_rows_in_flight_come_to_the_first_forced_tokens_and_the_next_row_feeds_the_rest(depth: int) -> None:
    house = House(depth=depth)
    request = request_forcing(5)
    tokens = generated(request)
    house.add(request)

    house.turn()
    plan = house.send()

    in_flight = depth - 1
    assert plan is not None
    assert [row.literals for row in sent_rows(house)[1:depth]] == [[]] * in_flight
    assert (plan.rows[0].literals, plan.rows[0].targets) == (tokens[in_flight:6], tokens[in_flight + 1 : 6])
    house.run()
    counts = [len(emission.tokens) for emission in house.emissions]
    assert counts[: depth + 1] == [1] * depth + [6 - in_flight]


def test_fewer_forced_tokens_than_rows_in_flight_change_nothing() -> None:
    house = House(depth=3)
    house.add(request_forcing(1))

    house.turn()
    plan = house.send()

    assert plan is not None
    assert (plan.rows[0].literals, plan.rows[0].emit) == ([], True)
    house.run()


@pytest.mark.parametrize(("depth", "num_rows"), [(1, 41), (2, 81), (3, 114)])
def test_forced_tokens_save_rows(depth: int, num_rows: int) -> None:
    house = House(depth=depth)
    house.add(make_request(200))

    house.run()

    counters = house.scheduler.counters
    assert counters.num_emitted_tokens == 200
    assert counters.num_forced_tokens > 100
    assert counters.num_rows == num_rows


def test_forced_tokens_take_as_many_blocks_as_they_need() -> None:
    house = House(Limits(num_blocks=65, block_size=2, max_seats=4, max_step_tokens=64))
    house.add(request_forcing(7))

    house.turn()
    plan = house.send()

    assert plan is not None
    assert (plan.rows[0].num_tokens, len(plan.rows[0].new_blocks)) == (8, 4)
    house.run()


def test_a_long_forced_run_is_fed_in_chunks_of_the_budget() -> None:
    house = House(replace(ROOMY, max_step_tokens=5))
    house.add(request_forcing(7))

    house.run()

    assert [(row.num_tokens, len(row.targets), row.emit) for row in sent_rows(house)[1:3]] == [
        (5, 5, False),
        (3, 2, True),
    ]


@pytest.mark.parametrize(
    ("max_step_tokens", "max_prompt_tokens", "chunks"),
    [(64, None, [8]), (64, 3, [4, 4]), (6, None, [5, 3])],
    ids=["nothing bounds it", "others wait for the step", "others need a token of the budget"],
)
def test_a_long_forced_run_leaves_room_and_time_for_the_next_token_of_others(
    max_step_tokens: int, max_prompt_tokens: int | None, chunks: list[int]
) -> None:
    house = House(replace(ROOMY, max_step_tokens=max_step_tokens), max_prompt_tokens=max_prompt_tokens)
    house.add(request_forcing(7, max_new_tokens=9))
    house.add(Request("r", (7,), 5))
    house.turn()

    house.run()

    rows = [[(row.seat, row.num_tokens) for row in plan.rows] for plan in house.plans[1 : 1 + len(chunks)]]
    assert rows == [[(0, num_tokens), (1, 1)] for num_tokens in chunks]


def test_a_forced_run_and_prompts_share_what_a_step_may_feed_of_both() -> None:
    house = House(max_prompt_tokens=9)
    house.add(request_forcing(7))
    house.add(Request("r", (7,), 5))
    house.turn()
    house.add(Request("r", tuple(range(21, 33)), 2))

    plan = house.send()

    assert plan is not None
    assert [row.num_tokens for row in plan.rows] == [8, 1, 2]
    house.run()


def test_other_sequences_wait_for_blocks_that_a_forced_run_needs() -> None:
    house = House(Limits(num_blocks=13, block_size=1, max_seats=4, max_step_tokens=64), depth=2)
    first = house.add(request_forcing(7, max_new_tokens=7))
    second = house.add(Request("r", (7, 8, 9), 9))

    house.run()

    assert (first.num_preemptions, second.num_preemptions) == (0, 1)


# How sequences end


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_last_token_allowed_may_be_forced_and_then_only_its_score_is_asked_for(depth: int) -> None:
    house = House(depth=depth)
    sequence = house.add(request_forcing(8, max_new_tokens=7))

    house.run()

    last = sent_rows(house)[-1]
    assert sequence.finish_reason is FinishReason.LENGTH
    assert (last.emit, len(last.targets)) == (False, last.num_tokens)
    assert house.scheduler.counters.num_dropped_tokens == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_end_token_may_be_forced_and_what_is_forced_behind_it_is_dropped(depth: int) -> None:
    request = request_forcing(8)
    tokens = generated(request)
    assert tokens.index(tokens[5]) == 5
    house = House(depth=depth)
    sequence = house.add(replace(request, eos_token_ids=(tokens[5],)))

    house.run()

    assert sequence.finish_reason is FinishReason.EOS_TOKEN
    assert sequence.tokens == [*PROMPT, *tokens[:6]]
    assert not sent_rows(house)[-1].emit


def test_an_end_token_that_rows_in_flight_come_to_needs_no_further_row() -> None:
    request = request_forcing(2)
    tokens = generated(request)
    house = House(depth=3)
    house.add(replace(request, eos_token_ids=(tokens[2],)))

    house.run()

    assert len(sent_rows(house)) == 3


def test_a_sequence_that_emits_its_end_is_forced_nothing() -> None:
    request = request_forcing(5)
    house = House()
    sequence = house.add(replace(request, eos_token_ids=(generated(request)[0],)))

    house.run()

    assert sequence.tokens == [*PROMPT, generated(request)[0]]


# What may happen meanwhile


def test_after_a_death_only_forced_tokens_without_a_score_are_scored() -> None:
    house = House(replace(ROOMY, block_size=2, max_step_tokens=5), depth=1)
    request = request_forcing(8)
    tokens = generated(request)
    house.add(request)
    house.turn()  # the prompt: one token is emitted, eight are forced
    house.turn()  # five of these are scored

    house.crash()
    num_before = len(sent_rows(house))
    house.run()

    replayed = sent_rows(house)[num_before:]
    assert [(row.num_tokens, row.targets) for row in replayed[:3]] == [(5, []), (5, []), (4, tokens[6:9])]


def test_a_replayed_prefix_of_scored_tokens_may_be_hit_but_not_what_unscored_ones_follow() -> None:
    house = House(replace(ROOMY, block_size=1), depth=1)
    sequence = house.add(request_forcing(5))
    house.turn()
    house.add(Request("r", tuple(sequence.tokens), 1))
    house.turn()

    house.crash()
    house.run()

    assert sequence.num_admissions == 2


def test_a_preempted_sequence_keeps_what_it_was_forced() -> None:
    house = House(Limits(num_blocks=16, block_size=2, max_seats=2, max_step_tokens=4), depth=1)
    house.add(Request("r", tuple(range(50, 64)), 10))
    forced = house.add(request_forcing(8, max_new_tokens=16))

    house.run()

    assert forced.num_preemptions > 0


def commit(scheduler: Scheduler, **answer: object) -> list[Emission]:
    """Plans a step of one row and answers it."""
    plan = scheduler.plan()
    assert plan is not None
    assert len(plan.rows) == 1
    return scheduler.commit(StepOutput(plan.step, [RowOutput(**answer)]))  # type: ignore[arg-type]


def forced_by_hand(scheduler: Scheduler, *tokens: int, max_new_tokens: int = 9) -> Sequence:
    sequence = scheduler.add(Request("r", PROMPT, max_new_tokens))
    commit(scheduler, tokens=(SampledToken(6, -1.0),), forced=tokens)
    return sequence


def test_forced_tokens_are_handed_on_with_their_scores_and_likeliest_tokens() -> None:
    scheduler = Scheduler(ROOMY)
    sequence = forced_by_hand(scheduler, 7, 8)
    tops = (((7, -0.5),), ((9, -0.1),))

    emissions = commit(scheduler, tokens=(SampledToken(10, -3.0),), target_logprobs=(-0.5, -2.0), target_tops=tops)

    wanted = (SampledToken(7, -0.5, tops[0]), SampledToken(8, -2.0, tops[1]), SampledToken(10, -3.0))
    assert emissions == [Emission(sequence, wanted)]


def test_a_promise_may_be_repeated_and_extended() -> None:
    scheduler = Scheduler(ROOMY)
    sequence = scheduler.add(Request("r", PROMPT, 9))
    plans = [scheduler.plan(), scheduler.plan()]
    assert all(plans)

    scheduler.commit(StepOutput(1, [RowOutput((SampledToken(6, -1.0),), forced=(7, 8))]))
    scheduler.commit(StepOutput(2, [RowOutput((SampledToken(7, -1.0),), forced=(8, 9, 10))]))

    assert sequence.tokens == [*PROMPT, 6, 7, 8, 9, 10]
    assert (sequence.num_scored, sequence.num_in_flight) == (7, 0)


def test_a_token_other_than_the_forced_one_ends_its_sequence_alone() -> None:
    scheduler = Scheduler(ROOMY)
    sequence = scheduler.add(Request("r", PROMPT, 9))
    plans = [scheduler.plan(), scheduler.plan()]
    assert all(plans)
    scheduler.commit(StepOutput(1, [RowOutput((SampledToken(6, -1.0),), forced=(7, 8))]))

    emissions = scheduler.commit(StepOutput(2, [RowOutput((SampledToken(9, -1.0),))]))

    assert emissions == [Emission(sequence, fault=CONTRADICTION_FAULT)]
    assert scheduler.num_running == 0


def test_a_score_of_a_forced_token_acquits() -> None:
    scheduler = Scheduler(replace(ROOMY, max_step_tokens=5))
    sequence = forced_by_hand(scheduler, *range(10, 18), max_new_tokens=20)
    scheduler.plan()
    scheduler.reset(scheduler.limits, died=True)
    commit(scheduler)  # five tokens of the prompt
    assert sequence.num_deaths == 1

    commit(scheduler, target_logprobs=(-1.0,) * 5)

    assert sequence.num_deaths == 0


def test_on_probation_a_complete_sequence_is_not_given_an_empty_row() -> None:
    scheduler = Scheduler(replace(ROOMY, max_step_tokens=8))
    forced_by_hand(scheduler, *range(10, 14), max_new_tokens=5)
    for _ in range(2):
        scheduler.plan()
        scheduler.reset(scheduler.limits, died=True)

    plans = [scheduler.plan() for _ in range(4)]

    assert [plan and [(row.num_tokens, row.emit) for row in plan.rows] for plan in plans] == [
        [(5, False)],
        [(4, False)],
        None,
        None,
    ]


# The wire


@pytest.mark.parametrize(
    ("spoilt", "complaint"),
    [
        ({"row_num_forced": [1, 1]}, "forced tokens of 2 rows"),
        ({"row_num_forced": [99]}, "forced tokens of 1 rows"),
        ({"row_num_forced": []}, "forced tokens of 0 rows"),
        ({"row_num_forced": [1], "forced_token_ids": [VOCAB_SIZE]}, "in a vocabulary"),
        ({"row_num_emitted": [0], "row_faults": True}, "emitted nothing"),
    ],
)
def test_forced_tokens_that_do_not_fit_the_rows_lose_the_group(spoilt: dict[str, object], complaint: str) -> None:
    house = House()
    house.add(request_forcing(3))
    plan = house.scheduler.plan()
    assert plan is not None
    answer = house.ghost.run(encode_plan(plan))
    assert len(decode_output(answer, plan, VOCAB_SIZE).rows[0].forced) == 3
    if spoilt.pop("row_faults", False):
        answer.row_faults.add(row=0, message="not a number")
    for name, values in spoilt.items():
        del getattr(answer, name)[:]
        getattr(answer, name).extend(values)

    with pytest.raises(GroupLost, match=complaint):
        decode_output(answer, plan, VOCAB_SIZE)


def test_the_ghost_refuses_literals_that_are_not_what_it_forced() -> None:
    house = House()
    house.add(request_forcing(3))
    house.turn()
    plan = house.scheduler.plan()
    assert plan is not None
    message = encode_plan(plan)
    message.literals[2] += 1

    with pytest.raises(BrokenPlan, match="were to come"):
        house.ghost.run(message)


# The engine


def test_forced_tokens_are_published_one_by_one_and_a_stop_string_drops_the_rest() -> None:
    request = request_forcing(8)
    tokenizer = tokenizer_of(byte_level())

    async def run() -> None:
        async with ghost_group(GhostSettings()) as group, engine_over(group.addresses, tokenizer) as engine:
            events = await collect(engine.submit(request))
            stop = events[4].token.text
            assert "".join(event.token.text for event in events).index(stop) == len(
                "".join(event.token.text for event in events[:4])
            )
            stopped = await collect(engine.submit(replace(request, stop=(stop,))))

            tokens = generated(request)
            assert [event.token.id for event in events] == tokens
            wanted = [score([*PROMPT, *tokens[:i]], token) for i, token in enumerate(tokens)]
            assert [event.token.logprob for event in events] == wanted
            assert stopped[:4] == events[:4]
            assert stopped[-1].finish is not None
            assert (stopped[-1].finish.reason, stopped[-1].finish.num_generated, len(stopped)) == (
                FinishReason.STOP_SEQUENCE,
                5,
                5,
            )

    asyncio.run(run())
