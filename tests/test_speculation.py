"""Guessed tokens: what is guessed, when a row verifies it, and that nothing but the number of steps depends on it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from router.core.plan import Row, StepPlan
from router.core.request import FinishReason, Request, Sampling
from router.core.scheduler import MAX_GUESSING_ROWS, Limits
from router.core.speculation import MAX_INDEXED_AT_ONCE, Speculation
from router.errors import GroupLost
from router.group.codec import decode_output, encode_plan
from router.metrics import Metrics
from tests.engines import collect, engine_over
from tests.ghost import COPYING_SEED, BrokenPlan, GhostSettings, ghost_group, oracle, score
from tests.house import ROOMY, VOCAB_SIZE, House
from tests.tiny_tokenizers import byte_level, tokenizer_of

PROMPT = (1, 2, 3, 4, 5, 6, 1, 2)
SEEDS = range(COPYING_SEED, COPYING_SEED + 400)


def make_request(seed: int = COPYING_SEED, max_new_tokens: int = 40, **values: object) -> Request:
    """Of a sequence that mostly repeats itself."""
    return Request("r", PROMPT, max_new_tokens, Sampling(seed=seed), **values)  # type: ignore[arg-type]


def generated(request: Request) -> list[int]:
    return oracle(request.prompt, request.max_new_tokens, sampling=request.sampling)


def request_beginning(*tokens: int, max_new_tokens: int = 40) -> Request:
    """Whose first tokens are these."""
    requests = (make_request(seed, max_new_tokens) for seed in SEEDS)
    return next(r for r in requests if generated(r)[: len(tokens)] == list(tokens))


def drafting_rows(plans: list[StepPlan]) -> list[Row]:
    return [row for plan in plans for row in plan.rows if row.num_drafts]


# Guesses


def test_what_followed_an_earlier_place_is_guessed_to_follow_again() -> None:
    assert Speculation().drafts([7, 8, 9, 10, 11, 1, 7, 8], 3) == [9, 10, 11]


def test_a_guess_that_reaches_the_end_goes_on_with_itself() -> None:
    assert Speculation().drafts([5, 7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 2, 3, 4, 5], [1, 2, 3, 2, 1]])
def test_where_nothing_repeats_nothing_is_guessed(tokens: list[int]) -> None:
    assert Speculation().drafts(tokens, 4) == []


def test_the_place_with_the_longest_common_past_wins_over_later_ones() -> None:
    tokens = [1, 2, 3, 4, 50, 9, 3, 4, 60, 9, 3, 4, 70, 1, 2, 3, 4]

    assert Speculation().drafts(tokens, 1) == [50]


def test_of_equally_good_places_the_latest_wins() -> None:
    assert Speculation().drafts([1, 3, 4, 50, 2, 3, 4, 60, 9, 3, 4], 1) == [60]


def test_a_few_wrong_guesses_end_guessing_and_a_few_right_ones_begin_it_again() -> None:
    speculation = Speculation()
    text = list(range(40))
    tokens = [*text, 0, 1]
    assert speculation.drafts(tokens, 1) == [2]
    tokens += [77, 10, 11, 88, 20, 21, 99]
    assert speculation.drafts(tokens, 1) == []

    offers = []
    for token in (5, 6, 7, 8, 9, 10, 11):
        tokens.append(token)
        offers.append(speculation.drafts(tokens, 1))

    assert offers[0] == offers[1] == []
    assert offers[-1] == [12]


def test_guesses_that_are_right_every_other_time_are_not_made() -> None:
    speculation = Speculation()
    tokens: list[int] = []
    offers = []
    for number in range(10, 60):
        for token in (number, 1, 2):
            tokens.append(token)
            offers.append(speculation.drafts(tokens, 2))

    assert [offer for offer in offers[30:] if offer] == []


def test_guesses_do_not_depend_on_how_many_tokens_came_at_once() -> None:
    tokens = oracle(PROMPT, 300, sampling=Sampling(seed=COPYING_SEED))
    by_one, by_three = Speculation(), Speculation()

    offers = {end: by_one.drafts(tokens[:end], 4) for end in range(3, 301)}

    assert {end: by_three.drafts(tokens[:end], 4) for end in range(3, 301, 3)} == {
        end: offers[end] for end in range(3, 301, 3)
    }
    assert sum(map(bool, offers.values())) > 20


def test_a_long_prompt_is_indexed_in_parts_before_anything_is_guessed() -> None:
    speculation = Speculation()
    tokens = [*range(2 * MAX_INDEXED_AT_ONCE + 5), 0, 1]

    assert [speculation.drafts(tokens, 2) for _ in range(3)] == [[], [], [2, 3]]


# Rows that verify them


def test_a_row_feeds_the_last_token_and_guesses_and_emits_what_agrees_and_one_more() -> None:
    house = House(max_drafts=3)
    house.add(request_beginning(3, 4, 5, 6))
    house.turn()  # the prompt: its own last token is known, so that guesses go with it

    plan = house.plans[0]
    assert [(row.literals, row.num_drafts) for row in plan.rows] == [([*PROMPT], 0)]
    plan = house.send()

    assert plan is not None
    (row,) = plan.rows
    assert (row.literals, row.num_tokens, row.num_drafts, row.emit) == ([3, 4, 5, 6], 4, 3, True)
    emission = house.receive()[0]
    assert [token.token_id for token in emission.tokens[:3]] == [4, 5, 6]
    assert len(emission.tokens) == 4
    house.run()


def test_a_wrong_guess_is_as_good_as_never_fed() -> None:
    house = House(max_drafts=3)
    request = next(
        r for r in map(make_request, SEEDS) if generated(r)[:2] == [3, 4] and generated(r)[2] not in (5, *PROMPT)
    )
    sequence = house.add(request)

    house.turn()
    house.turn()

    assert house.scheduler.counters.num_rows_by_accepted == [0, 1, 0, 0]
    assert (len(sequence.tokens), sequence.num_planned) == (len(PROMPT) + 3, len(PROMPT) + 2)
    house.run()


@pytest.mark.parametrize("depth", [2, 3])
def test_a_sequence_with_a_guess_waits_for_what_is_in_flight(depth: int) -> None:
    house = House(depth=depth, max_drafts=3)
    sequence = house.add(request_beginning(3, 4, 5, 6))
    house.fill()
    assert house.scheduler.num_outstanding == 1
    assert sequence.num_in_flight == 1

    house.receive()
    house.fill()

    assert house.scheduler.num_outstanding == 1
    assert house.plans[-1].rows[0].num_drafts == 3
    house.run()


def test_sequences_with_guesses_go_together_and_others_with_them() -> None:
    house = House(depth=3, max_drafts=3)
    for seed in (COPYING_SEED, COPYING_SEED + 1):
        house.add(make_request(seed, max_new_tokens=80))
    house.add(Request("r", (10,), 80, Sampling(repetition_penalty=1.1)))

    house.run()

    num_drafting = [len(drafting_rows([plan])) for plan in house.plans]
    assert num_drafting.count(2) > 5
    assert all(len(plan.rows) == 3 for plan in house.plans[1:20] if plan.has_drafts)


def test_a_sequence_without_guesses_is_planned_ahead() -> None:
    house = House(depth=2, max_drafts=3)
    house.add(Request("r", (1, 2, 3, 4, 5), 8))

    house.run()

    assert [row.literals for plan in house.plans[1:] for row in plan.rows] == [[]] * 7


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_guesses_save_steps(depth: int) -> None:
    plain, guessing = (House(depth=depth, max_drafts=max_drafts) for max_drafts in (0, 4))
    for house in (plain, guessing):
        house.add(make_request(max_new_tokens=100))
        house.run()

    assert plain.scheduler.counters.num_steps == 100
    assert guessing.scheduler.counters.num_steps < 60


def test_guesses_leave_room_for_the_last_token() -> None:
    house = House(max_drafts=8)
    house.add(request_beginning(3, 4, 5, 6, max_new_tokens=4))

    house.run()

    assert [row.num_drafts for row in drafting_rows(house.plans)] == [2]
    assert house.scheduler.counters.num_dropped_tokens == 0


def test_tokens_behind_an_end_token_are_dropped() -> None:
    house = House(max_drafts=6)
    sequence = house.add(replace(request_beginning(3, 4, 5, 6), eos_token_ids=(5,)))

    house.run()

    assert sequence.finish_reason is FinishReason.EOS_TOKEN
    assert sequence.tokens == [*PROMPT, 3, 4, 5]
    assert house.scheduler.counters.num_dropped_tokens > 0


@pytest.mark.parametrize(
    "sampling", [Sampling(seed=COPYING_SEED, repetition_penalty=1.1), Sampling(seed=COPYING_SEED, bad_words=((1, 2),))]
)
def test_nothing_is_guessed_under_rules_that_look_back(sampling: Sampling) -> None:
    house = House(max_drafts=4)
    house.add(Request("r", PROMPT, 30, sampling))

    house.run()

    assert drafting_rows(house.plans) == []


def test_nothing_is_guessed_under_a_grammar() -> None:
    house = House(max_drafts=4)
    house.add(make_request(grammar="force:1/5"))

    house.run()

    assert drafting_rows(house.plans) == []
    assert house.scheduler.counters.num_forced_tokens > 0


@pytest.mark.parametrize(("num_others", "guesses"), [(MAX_GUESSING_ROWS - 1, True), (MAX_GUESSING_ROWS, False)])
def test_nothing_is_guessed_while_many_sequences_run(num_others: int, guesses: bool) -> None:
    house = House(depth=2, max_drafts=4)
    for n in range(num_others):
        house.add(Request("r", (10 + n,), 30, Sampling(repetition_penalty=1.1)))
    house.turn()
    house.add(make_request(max_new_tokens=10))

    house.run()

    assert bool(drafting_rows(house.plans)) is guesses


def test_guesses_fit_into_what_the_step_may_feed() -> None:
    house = House(replace(ROOMY, max_step_tokens=3), max_drafts=6)
    for n in range(2):
        house.add(make_request(COPYING_SEED + n))

    house.run()

    assert max(plan.num_tokens for plan in house.plans) <= 3
    assert {row.num_drafts for row in drafting_rows(house.plans)} <= {1, 2}


def test_guesses_take_blocks_that_nobody_needs_and_no_others() -> None:
    house = House(Limits(num_blocks=24, block_size=2, max_seats=2, max_step_tokens=32), max_drafts=6)
    for n in range(2):
        house.add(make_request(COPYING_SEED + n, max_new_tokens=15))

    house.run()

    assert drafting_rows(house.plans)
    assert house.scheduler.counters.num_preemptions == 0


def test_on_probation_nothing_is_guessed() -> None:
    house = House(max_drafts=4)
    house.add(request_beginning(3, 4, 5, 6))
    house.turn()
    for _ in range(2):
        house.fill()
        house.crash()
    num_before = len(house.plans)

    house.turn()

    assert drafting_rows(house.plans[num_before:]) == []
    house.run()


def test_a_death_amid_guesses_loses_only_the_guesses() -> None:
    house = House(max_drafts=4)
    sequence = house.add(request_beginning(3, 4, 5, 6))
    house.turn()
    house.fill()
    assert sequence.num_drafts == 4

    house.crash()

    assert sequence.num_drafts == 0
    house.run()


def test_blocks_of_accepted_guesses_are_found_again() -> None:
    house = House(max_drafts=4)
    sequence = house.add(request_beginning(3, 4, 5, 6))
    house.run()

    again = house.add(Request("r", (*sequence.tokens[:-1], 90), 1))
    house.run()

    assert again.num_hit_tokens >= len(sequence.tokens) - 2 * ROOMY.block_size


# The wire


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"row_num_emitted": [0]}, "emitted 0"),
        ({"row_num_emitted": [5]}, "emitted 5"),
        ({"token_ids": [4, 9, 6, 7]}, "other tokens than its drafts"),
    ],
)
def test_answers_that_do_not_fit_the_drafts_lose_the_group(changes: dict[str, list[int]], complaint: str) -> None:
    house = House(max_drafts=3)
    house.add(request_beginning(3, 4, 5, 6))
    house.turn()
    plan = house.scheduler.plan()
    assert plan is not None
    answer = house.ghost.run(encode_plan(plan))
    assert len(decode_output(answer, plan, VOCAB_SIZE).rows[0].tokens) == 4
    for name, values in changes.items():
        del getattr(answer, name)[:]
        getattr(answer, name).extend(values)

    with pytest.raises(GroupLost, match=complaint):
        decode_output(answer, plan, VOCAB_SIZE)


def test_the_ghost_refuses_drafts_behind_nothing() -> None:
    house = House(max_drafts=3)
    house.add(request_beginning(3, 4, 5, 6))
    house.turn()
    plan = house.scheduler.plan()
    assert plan is not None
    message = encode_plan(plan)
    message.row_num_drafts[0] += 1

    with pytest.raises(BrokenPlan, match="drafts behind nothing"):
        house.ghost.run(message)


# The engine


def test_tokens_that_were_guessed_are_published_like_others_and_counted() -> None:
    requests = [make_request(COPYING_SEED + n, max_new_tokens=60) for n in range(3)]

    async def run() -> None:
        metrics = Metrics(max_input_tokens=100, max_total_tokens=100)
        async with (
            ghost_group(GhostSettings(num_blocks=200)) as group,
            engine_over(group.addresses, tokenizer_of(byte_level()), max_drafts=3, metrics=metrics) as engine,
        ):
            results = await asyncio.gather(*(collect(engine.submit(request)) for request in requests))

            for request, events in zip(requests, results, strict=True):
                tokens = generated(request)
                assert [event.token.id for event in events] == tokens
                wanted = [score([*PROMPT, *tokens[:i]], token) for i, token in enumerate(tokens)]
                assert [event.token.logprob for event in events] == wanted
            counts = engine.gauges.num_rows_by_accepted
            num_accepted = sum(i * count for i, count in enumerate(counts))
            assert num_accepted > 20
            text = metrics.render(engine.gauges).decode()
            lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            assert float(lines["tgi_request_skipped_tokens_sum"]) == num_accepted
            assert float(lines["tgi_request_skipped_tokens_count"]) == 180 - num_accepted
            assert float(lines['tgi_request_skipped_tokens_bucket{le="2.0"}']) == 180 - num_accepted - counts[3]
            assert float(lines["shardstream_accepted_tokens_count"]) == num_accepted
            assert float(lines["shardstream_drafted_tokens_count"]) > num_accepted

    asyncio.run(run())
