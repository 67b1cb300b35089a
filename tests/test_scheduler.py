"""The scheduler against the ghost, one test per rule; `test_random_lives` mixes them all."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from router.core import scheduler as scheduler_module
from router.core.plan import RowOutput, SampledToken, StepOutput, StepPlan
from router.core.request import FinishReason, Request, Sampling, Sequence, SequenceState
from router.core.scheduler import POISON_FAULT, Emission, Limits, Scheduler
from router.errors import GroupLost
from router.group.codec import decode_output, encode_plan
from tests.ghost import oracle
from tests.house import ROOMY, VOCAB_SIZE, House, make_request


def seats_of(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [row.seat for row in plan.rows]


# The rules, one by one


def test_a_token_on_the_device_is_never_sent_as_a_literal() -> None:
    house = House(depth=3)
    house.add(make_request(range(1, 6)))

    house.fill()

    assert [(row.literals, row.num_tokens, row.emit) for plan in house.plans for row in plan.rows] == [
        ([1, 2, 3, 4, 5], 5, True),
        ([], 1, True),
        ([], 1, True),
    ]


def test_a_known_token_is_sent_as_a_literal() -> None:
    house = House(depth=1)
    house.add(make_request(range(1, 6)))

    house.run()

    assert [row.literals for plan in house.plans[1:] for row in plan.rows] == [[t] for t in oracle(range(1, 6), 4)[:3]]


def test_equal_prompts_admitted_in_one_step_share_blocks() -> None:
    house = House()
    sequences = [house.add(make_request(range(1, 11))) for _ in range(3)]

    house.fill()

    assert [open_.blocks for open_ in house.plans[0].opens] == [[], [1, 2], [1, 2]]
    assert [sequence.num_hit_tokens for sequence in sequences] == [0, 8, 8]
    house.run()


def test_generated_tokens_are_hit_by_a_prompt_that_continues_them() -> None:
    house = House(depth=2)
    first = house.add(make_request(range(1, 6), 8))
    house.run()

    second = house.add(make_request((*first.tokens, 7)))
    house.run()

    assert second.num_hit_tokens == 12


def test_a_prompt_that_is_wholly_in_memory_still_feeds_its_last_block() -> None:
    house = House()
    house.add(make_request(range(1, 9), 1))
    house.run()

    again = house.add(make_request(range(1, 9), 1))
    house.run()

    assert again.num_hit_tokens == 4
    assert house.plans[-1].rows[0].literals == [5, 6, 7, 8]


FAR = 2**31 - 1
"""An id that takes five bytes on the wire."""

LARGE_OPENS = {
    "forbidden words": (1200, Sampling(bad_words=((FAR,),) * 50 + ((FAR,) * 3000,)), ""),
    "biases": (1200, Sampling(logit_bias=((FAR, -1.5),) * 2000), ""),
    "a grammar": (200, Sampling(), "force:1/" + "9" * 4000),
    "a history": (1200, Sampling(repetition_penalty=1.5), ""),
}


@pytest.mark.parametrize(("num_prompt_tokens", "sampling", "grammar"), LARGE_OPENS.values(), ids=LARGE_OPENS)
def test_sequences_whose_opens_are_large_begin_in_several_plans(
    monkeypatch: pytest.MonkeyPatch, num_prompt_tokens: int, sampling: Sampling, grammar: str
) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_OPENS_BYTES", 60_000)
    prompt = tuple(1 + n % 96 for n in range(num_prompt_tokens))
    house = House(Limits(num_blocks=900, block_size=4, max_seats=16, max_step_tokens=4096))
    request = Request("r" * 128, prompt, 3, sampling, grammar=grammar, trace_id="t" * 32)
    house.add(request)
    house.run()

    for _ in range(12):
        house.add(request)
    house.run()

    sizes = [[open_.ByteSize() for open_ in encode_plan(plan).opens] for plan in house.plans]
    assert max(map(sum, sizes)) <= 60_000
    assert 1 < max(map(len, sizes)) < 12


def test_a_sequence_whose_open_is_larger_than_that_begins_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_OPENS_BYTES", 100)
    house = House()
    for _ in range(3):
        house.add(make_request(range(1, 6)))

    house.run()

    assert [len(plan.opens) for plan in house.plans[:3]] == [1, 1, 1]


def test_prompts_of_different_salt_share_nothing() -> None:
    house = House()
    house.add(make_request(range(1, 11)))
    salted = house.add(Request("r", tuple(range(1, 11)), 4, cache_salt=b"tenant"))

    house.run()

    assert salted.num_hit_tokens == 0


def test_only_sequences_of_one_adapter_share_blocks() -> None:
    house = House()
    requests = [Request("r", tuple(range(1, 11)), 4, adapter=adapter) for adapter in (0, 1, 2, 1)]
    sequences = [house.add(request) for request in requests]

    house.run()

    assert [sequence.num_hit_tokens for sequence in sequences] == [0, 0, 0, 8]


def test_without_prefix_caching_nothing_is_hit() -> None:
    house = House(prefix_caching=False)
    for _ in range(2):
        house.add(make_request(range(1, 11)))

    house.run()

    assert house.scheduler.counters.num_hit_tokens == 0


def tight_house(depth: int) -> tuple[House, Sequence, Sequence]:
    """Two sequences of 12 tokens in memory for 20: the second must make way before they end."""
    house = House(Limits(num_blocks=6, block_size=4, max_seats=2, max_step_tokens=16), depth=depth)
    return house, house.add(make_request(range(1, 5), 8)), house.add(make_request(range(11, 15), 8))


def test_nothing_is_preempted_while_a_plan_is_outstanding() -> None:
    house, _, second = tight_house(depth=2)
    drains = house.scheduler.counters

    while not drains.num_drains:
        house.turn()
    kept_place = second.state
    while house.scheduler.num_outstanding:
        house.receive()
    plan = house.send()

    assert kept_place is SequenceState.RUNNING
    assert second.state is SequenceState.WAITING
    assert plan is not None
    assert plan.closes == [1]
    assert seats_of(plan) == [0]
    house.run()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_preempted_sequence_resumes_where_it_was(depth: int) -> None:
    house, first, second = tight_house(depth)

    house.run()

    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert second.num_admissions == 2


def test_a_preempted_sequence_keeps_its_place_before_later_arrivals() -> None:
    house, first, second = tight_house(depth=2)
    third = house.add(make_request((21,), 1))

    house.run()

    admitted = [open_.num_prompt_tokens for plan in house.plans for open_ in plan.opens]
    assert admitted == [len(sequence.request.prompt) for sequence in (first, second, second, third)]


def test_the_latest_of_the_lowest_priority_is_preempted() -> None:
    limits = Limits(num_blocks=9, block_size=4, max_seats=4, max_step_tokens=32)
    house = House(limits)
    urgent = house.add(make_request(range(1, 5), 8, priority=1))
    low = [house.add(make_request(range(n, n + 4), 8)) for n in (11, 21)]
    latest_but_urgent = house.add(make_request(range(31, 35), 8, priority=1))

    house.run()

    assert [s.num_preemptions for s in (urgent, latest_but_urgent)] == [0, 0]
    assert low[0].num_preemptions <= low[1].num_preemptions
    assert house.scheduler.counters.num_preemptions > 0


def test_a_preempted_sequence_has_no_row_in_the_plan_that_closes_its_seat() -> None:
    house, _, _ = tight_house(depth=1)

    house.run()

    preempting = [plan for plan in house.plans if plan.closes and not plan.opens]
    assert preempting
    assert all(plan.closes[0] not in seats_of(plan) for plan in preempting)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_row_is_planned_behind_the_last_token(depth: int) -> None:
    house = House(depth=depth)
    house.add(make_request(range(1, 6), 6))
    house.add(make_request(range(1, 6), 1))

    house.run()

    assert house.scheduler.counters.num_dropped_tokens == 0
    assert house.scheduler.counters.num_rows == 7


def test_rows_behind_an_end_token_are_dropped() -> None:
    prompt = tuple(range(1, 6))
    house = House(depth=3)
    sequence = house.add(Request("r", prompt, 6, eos_token_ids=(oracle(prompt, 6)[1],)))

    house.run()

    assert sequence.finish_reason is FinishReason.EOS_TOKEN
    assert len(sequence.tokens) == 7
    assert house.scheduler.counters.num_dropped_tokens == 2


def test_an_end_token_in_the_last_place_counts_as_length() -> None:
    prompt = tuple(range(1, 6))
    house = House()
    sequence = house.add(Request("r", prompt, 2, eos_token_ids=(oracle(prompt, 2)[1],)))

    house.run()

    assert sequence.finish_reason is FinishReason.LENGTH


def test_a_freed_seat_and_its_blocks_are_given_away_in_the_next_plan() -> None:
    house = House(Limits(num_blocks=3, block_size=4, max_seats=1, max_step_tokens=16), prefix_caching=False)
    house.add(make_request(range(1, 6), 1))
    house.add(make_request(range(11, 16), 1))

    house.run()

    plan = house.plans[1]
    assert (plan.closes, [open_.seat for open_ in plan.opens]) == ([0], [0])
    assert plan.rows[0].new_blocks == [1, 2]


def test_a_prompt_is_fed_in_chunks_of_what_the_decodes_leave() -> None:
    house = House(Limits(num_blocks=65, block_size=4, max_seats=4, max_step_tokens=6))
    house.add(make_request(range(1, 5), 8))
    house.turn()
    house.add(make_request(range(21, 33), 2))

    house.run()

    second = [(row.num_tokens, row.emit) for plan in house.plans for row in plan.rows if row.seat == 1]
    assert second == [(5, False), (5, False), (2, True), (1, True)]
    assert max(plan.num_tokens for plan in house.plans) == 6


def test_a_prompt_is_fed_in_smaller_chunks_while_others_wait_for_their_next_token() -> None:
    house = House(Limits(num_blocks=65, block_size=4, max_seats=4, max_step_tokens=64), max_prompt_tokens=5)
    house.add(make_request(range(1, 9), 3))
    house.turn()
    house.add(make_request(range(21, 43), 2))

    house.run()

    first_alone, *_ = house.plans[0].rows
    second = [row.num_tokens for plan in house.plans for row in plan.rows if row.seat == 1]
    assert first_alone.num_tokens == 8
    assert second == [5, 5, 12, 1], "the last chunk has the step to itself"
    assert house.scheduler.counters.num_fed_tokens == sum(plan.num_tokens for plan in house.plans)


def test_a_budget_below_the_number_of_sequences_serves_them_in_order() -> None:
    house = House(Limits(num_blocks=65, block_size=4, max_seats=4, max_step_tokens=2), depth=2)
    for n in range(4):
        house.add(make_request(range(10 * n + 1, 10 * n + 4), 5))

    house.run()

    ends = [emission.sequence.arrival for emission in house.emissions if emission.finish]
    assert ends == [0, 1, 2, 3]


def test_more_decodes_than_the_budget_holds_share_it() -> None:
    """Probation lets in one sequence after the other, so the budget does not bound how many decode in the end."""
    house = House(replace(ROOMY, max_step_tokens=1), depth=3)
    house.add(make_request((21,), 2, priority=1))
    house.add(make_request((1, 2, 3), 4))
    for _ in range(2):
        house.fill()
        house.crash()

    house.depth = 1
    house.run()

    assert [emission.sequence.arrival for emission in house.emissions] == [0, 1, 0, 1, 1, 1]


def test_higher_priority_is_admitted_first_then_earlier_arrival() -> None:
    house = House(Limits(num_blocks=65, block_size=4, max_seats=1, max_step_tokens=64))
    for priority in (0, 2, 0, 2):
        house.add(make_request((priority + 1,), 1, priority=priority))

    house.run()

    assert [emission.sequence.arrival for emission in house.emissions] == [1, 3, 0, 2]


def test_an_urgent_prompt_overtakes_one_that_is_half_fed() -> None:
    house = House(Limits(num_blocks=65, block_size=4, max_seats=2, max_step_tokens=4))
    slow = house.add(make_request(range(1, 17), 1))
    house.turn()
    urgent = house.add(make_request(range(21, 29), 1, priority=1))

    house.run()

    assert [emission.sequence for emission in house.emissions] == [urgent, slow]


def test_a_large_prompt_is_not_passed_by_small_ones_behind_it() -> None:
    house = House(Limits(num_blocks=9, block_size=4, max_seats=8, max_step_tokens=32))
    running = house.add(make_request(range(1, 17), 4))
    house.turn()
    large = house.add(make_request(range(31, 55), 4))
    small = house.add(make_request((71,), 1))

    house.run()

    admitted = [open_.num_prompt_tokens for plan in house.plans for open_ in plan.opens]
    assert admitted == [len(sequence.request.prompt) for sequence in (running, large, small)]
    assert house.plans[1].opens == []


def test_an_admission_leaves_running_sequences_a_block_to_grow() -> None:
    house = House(Limits(num_blocks=41, block_size=1, max_seats=4, max_step_tokens=64))
    house.add(make_request(range(1, 11), 6))
    house.turn()
    exact = house.add(make_request(range(21, 50), 6))

    house.turn()
    kept_out = exact.state
    house.run()

    assert kept_out is SequenceState.WAITING
    assert house.scheduler.counters.num_preemptions == 0


def test_what_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(Limits(num_blocks=5, block_size=4, max_seats=2, max_step_tokens=8))

    scheduler.add(make_request(range(12), 4))

    with pytest.raises(ValueError, match="17 tokens never fit into 16"):
        scheduler.add(make_request(range(12), 5))


@pytest.mark.parametrize(("prompt", "max_new_tokens"), [((), 1), ((1,), 0)])
def test_a_request_that_asks_for_nothing_is_refused(prompt: tuple[int, ...], max_new_tokens: int) -> None:
    with pytest.raises(ValueError, match="nothing to do"):
        Scheduler(ROOMY).add(make_request(prompt, max_new_tokens))


@pytest.mark.parametrize("field_name", ["num_blocks", "block_size", "max_seats", "max_step_tokens"])
def test_limits_within_which_nothing_can_run_are_refused(field_name: str) -> None:
    with pytest.raises(ValueError, match="nothing can run"):
        replace(ROOMY, **{field_name: 0})


# Ends from outside


def test_a_cancelled_sequence_is_closed_with_the_next_plan_and_its_late_tokens_are_dropped() -> None:
    house = House(depth=2)
    cancelled = house.add(make_request(range(1, 6), 8))
    house.fill()

    house.cancel(cancelled)
    house.receive()
    house.receive()
    house.add(make_request(range(11, 16), 1))
    house.run()

    assert house.scheduler.counters.num_dropped_tokens == 2
    assert house.plans[-1].closes == [0]
    assert house.scheduler.num_free_blocks == ROOMY.num_blocks - 1


def test_a_waiting_sequence_can_be_cancelled() -> None:
    house = House()
    sequence = house.add(make_request(range(1, 6)))

    house.cancel(sequence)

    assert house.scheduler.num_waiting == 0
    assert house.send() is None


def test_ending_what_has_ended_is_harmless() -> None:
    house = House()
    sequence = house.add(make_request(range(1, 6), 1))
    house.run()

    house.scheduler.cancel(sequence)
    house.scheduler.finish(sequence, FinishReason.STOP_SEQUENCE)

    assert sequence.finish_reason is FinishReason.LENGTH
    house.scheduler.check_integrity()


def test_a_stop_string_ends_a_sequence_with_its_reason() -> None:
    house = House(depth=2)
    sequence = house.add(make_request(range(1, 6), 8))
    house.turn()

    house.scheduler.finish(sequence, FinishReason.STOP_SEQUENCE)
    house.expected[sequence].ended = True
    house.run()

    assert sequence.finish_reason is FinishReason.STOP_SEQUENCE
    assert house.scheduler.num_running == 0


def test_a_faulted_row_ends_its_sequence_alone_and_its_blocks_are_not_hit_again() -> None:
    scheduler = Scheduler(ROOMY)
    faulty, other = (scheduler.add(make_request(range(n, n + 9), 2)) for n in (1, 11))
    plan = scheduler.plan()
    assert plan is not None

    rows = [RowOutput(fault="not a number"), RowOutput((SampledToken(5, -1.0),))]
    emissions = scheduler.commit(StepOutput(plan.step, rows))
    again = scheduler.add(make_request(range(1, 10), 2))
    scheduler.plan()

    assert [(e.sequence, e.fault, len(e.tokens)) for e in emissions] == [
        (faulty, "not a number", 0),
        (other, None, 1),
    ]
    assert again.num_hit_tokens == 0
    scheduler.check_integrity()


def test_rows_behind_a_faulted_one_are_dropped() -> None:
    house = House(depth=2)
    house.add(make_request(range(1, 6), 8))
    plans = [house.scheduler.plan(), house.scheduler.plan()]
    messages = [encode_plan(plan) for plan in plans if plan is not None]

    answers = [house.ghost.run(messages[0], fault_rows=[0]), house.ghost.run(messages[1])]
    outputs = [decode_output(a, p, VOCAB_SIZE) for a, p in zip(answers, plans, strict=True) if p is not None]
    emissions = [emission for output in outputs for emission in house.scheduler.commit(output)]

    assert [emission.fault for emission in emissions] == ["row 0 failed"]


# Prompt logprobs


def num_targets(house: House, seat: int | None = None) -> int:
    return sum(len(row.targets) for plan in house.plans for row in plan.rows if seat in (None, row.seat))


@pytest.mark.parametrize("max_step_tokens", [1, 3, 64])
def test_each_prompt_token_but_the_first_is_scored_once(max_step_tokens: int) -> None:
    house = House(replace(ROOMY, max_step_tokens=max_step_tokens), depth=2)
    house.add(make_request(range(1, 12), 3, prompt_logprobs=True))

    house.run()

    assert num_targets(house) == 10


def test_a_prompt_to_be_scored_does_not_hit_but_is_hit() -> None:
    house = House()
    house.add(make_request(range(1, 12)))
    house.run()

    scored = house.add(make_request(range(1, 12), prompt_logprobs=True))
    house.run()
    plain = house.add(make_request(range(1, 12)))
    house.run()

    assert (scored.num_hit_tokens, plain.num_hit_tokens) == (0, 8)


def test_a_preempted_prompt_is_not_scored_again() -> None:
    house = House(Limits(num_blocks=6, block_size=4, max_seats=2, max_step_tokens=16), depth=2)
    house.add(make_request(range(1, 5), 8))
    scored = house.add(make_request(range(11, 17), 7, prompt_logprobs=True))

    house.run()

    assert scored.num_preemptions > 0
    assert num_targets(house) == 5


def test_a_crash_amid_a_prompt_scores_only_what_was_not_received() -> None:
    house = House(replace(ROOMY, max_step_tokens=6), depth=2)
    scored = house.add(make_request(range(1, 17), 3, prompt_logprobs=True))
    house.fill()
    house.receive()
    received = scored.num_scored

    house.crash()
    before = num_targets(house)
    house.run()

    assert received == 7
    assert num_targets(house) - before == 9
    assert [(row.num_tokens, len(row.targets)) for plan in house.plans[2:4] for row in plan.rows] == [(6, 0), (6, 6)]


def test_a_row_that_starts_between_scored_and_unscored_tokens_is_cut_there() -> None:
    house = House(replace(ROOMY, max_step_tokens=6))
    house.add(make_request(range(1, 17), 3, prompt_logprobs=True))
    house.turn()
    house.crash(replace(ROOMY, max_step_tokens=10))

    house.run()

    replayed = [(row.num_tokens, len(row.targets)) for plan in house.plans[1:] for row in plan.rows]
    assert replayed[:2] == [(6, 0), (10, 9)]


# Sampling that looks back


def test_history_is_sent_only_if_the_sampling_looks_back() -> None:
    house = House()
    prompt = tuple(range(1, 11))
    house.add(make_request(prompt))
    house.run()

    house.add(make_request(prompt))
    house.add(Request("r", prompt, 4, sampling=Sampling(repetition_penalty=1.5)))
    house.run()

    assert [open_.history for plan in house.plans[1:] for open_ in plan.opens] == [[], list(range(1, 9))]


def test_history_covers_the_hits_of_a_sequence_that_comes_back() -> None:
    house = House(Limits(num_blocks=8, block_size=2, max_seats=2, max_step_tokens=16))
    house.add(make_request(range(1, 4), 8))
    request = Request("r", tuple(range(11, 16)), 6, sampling=Sampling(frequency_penalty=0.5))
    sequence = house.add(request)

    house.run()

    reopened = [open_ for plan in house.plans[1:] for open_ in plan.opens]
    assert sequence.num_preemptions == len(reopened) > 0
    assert all(open_.history == sequence.tokens[: open_.num_cached_tokens] for open_ in reopened)
    assert any(open_.history for open_ in reopened)


def test_every_sampling_parameter_reaches_the_shard() -> None:
    """The ghost chooses by all of them, and its reference does not share the router's encoding."""
    sampling = Sampling(
        do_sample=True,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        typical_p=0.8,
        min_p=0.1,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        seed=2**64 - 1,
        logit_bias=((3, -1.5), (4, 2.0)),
        watermark_gamma=0.25,
        watermark_delta=2.0,
        top_n_tokens=2,
        no_repeat_ngram_size=3,
        min_new_tokens=2,
        bad_words=((1, 2), (5,)),
        prompt_top_n_tokens=1,
    )
    neutral = Sampling()
    assert all(getattr(sampling, f.name) != getattr(neutral, f.name) for f in fields(Sampling))
    house = House()

    house.add(Request("r", tuple(range(1, 6)), 4, sampling=sampling))
    house.run()

    assert len(house.emissions) == 4


@pytest.mark.parametrize(
    "spoilt",
    [
        {"target_num_top": [1, 1, 1]},
        {"target_num_top": [1, 1], "target_top_token_ids": [5, 6], "target_top_logprobs": [-1.0]},
        {"target_num_top": [1]},
    ],
)
def test_top_tokens_that_do_not_fit_the_targets_lose_the_group(spoilt: dict[str, list[int]]) -> None:
    house = House()
    house.add(make_request(range(1, 4), prompt_logprobs=True))
    plan = house.scheduler.plan()
    assert plan is not None
    answer = house.ghost.run(encode_plan(plan))
    assert decode_output(answer, plan, VOCAB_SIZE).rows[0].target_logprobs
    for name, values in spoilt.items():
        del getattr(answer, name)[:]
        getattr(answer, name).extend(values)

    with pytest.raises(GroupLost, match="top tokens"):
        decode_output(answer, plan, VOCAB_SIZE)


# Deaths


def test_after_a_death_everything_is_replayed_in_order_from_step_one() -> None:
    house = House(depth=2)
    sequences = [house.add(make_request(range(n, n + 5), 6)) for n in (1, 11, 21)]
    house.turn()

    ends = house.crash()
    house.fill()

    assert ends == []
    replay = house.plans[-2]
    assert (replay.step, seats_of(replay), replay.closes) == (1, [0, 1, 2], [])
    assert [row.literals for row in replay.rows] == [sequence.tokens for sequence in sequences]
    house.run()


def run_with_poison(house: House, poison: Sequence) -> tuple[int, list[Emission]]:
    """Runs on a group that dies of every plan with a row of `poison`; returns its deaths and the ends they brought."""
    num_deaths = 0
    ends: list[Emission] = []
    while True:
        plan = house.send()
        if plan is not None and poison.seat in seats_of(plan):
            ends += house.crash()
            num_deaths += 1
        elif not house.scheduler.num_outstanding:
            return num_deaths, ends
        elif plan is None or house.scheduler.num_outstanding > 1:
            house.receive()


def test_poison_is_failed_alone_and_the_innocent_around_it_finish() -> None:
    house = House(depth=2)
    innocent = [house.add(make_request(range(n, n + 5), 6)) for n in (1, 11)]
    poison = house.add(make_request(range(21, 26), 6))
    innocent.append(house.add(make_request(range(31, 36), 6)))

    num_deaths, ends = run_with_poison(house, poison)

    assert num_deaths == 3
    assert [(end.sequence, end.fault) for end in ends] == [(poison, POISON_FAULT)]
    assert all(sequence.finish_reason is FinishReason.LENGTH for sequence in innocent)
    assert house.scheduler.counters.num_poisoned == 1
    house.scheduler.check_integrity()


def test_on_probation_a_sequence_is_planned_alone_until_it_emits() -> None:
    house = House(replace(ROOMY, max_step_tokens=12), depth=3)
    for n in (1, 31):
        house.add(make_request(range(n, n + 20), 6))
    for _ in range(2):
        house.fill()
        house.crash()
    num_before = len(house.plans)

    house.run()

    fed = [[row.num_tokens for row in plan.rows] for plan in house.plans[num_before:]]
    assert fed[:5] == [[12], [8], [12], [8], [1, 1]]


def test_a_sequence_on_probation_waits_for_the_rows_of_those_that_just_left() -> None:
    house = House(depth=2)
    first, second = (house.add(make_request(range(n, n + 5), 8)) for n in (1, 11))
    for _ in range(2):
        house.fill()
        house.crash()
    house.send()

    house.cancel(first)
    while_outstanding = house.send()
    house.receive()
    afterwards = house.send()

    assert while_outstanding is None
    assert seats_of(afterwards) == [second.seat]


def test_a_sequence_on_probation_takes_the_blocks_and_the_seat_of_others() -> None:
    house = House()
    first, second = (house.add(make_request(range(n, n + 5), 8)) for n in (1, 11))
    for max_seats in (8, 1):
        house.fill()
        house.crash(replace(ROOMY, max_seats=max_seats))

    house.turn()
    house.turn()

    assert [emission.sequence for emission in house.emissions] == [first, second]
    assert (first.num_preemptions, second.num_preemptions) == (1, 0)
    house.run()


def test_a_token_between_two_deaths_acquits() -> None:
    house = House()
    sequence = house.add(make_request(range(1, 6), 8))

    for _ in range(5):
        house.turn()
        house.fill()
        assert house.crash() == []

    assert sequence.num_deaths == 1
    house.run()


def test_a_reconnect_is_nobodys_fault() -> None:
    house = House()
    sequence = house.add(make_request(range(1, 6), 8))

    for _ in range(5):
        house.fill()
        assert house.crash(died=False) == []

    assert sequence.num_deaths == 0
    house.run()


def test_a_sequence_that_was_not_in_flight_is_not_blamed() -> None:
    house = House(replace(ROOMY, max_seats=1))
    house.add(make_request(range(1, 6), 8))
    waiting = house.add(make_request(range(11, 16), 8))
    house.fill()

    house.crash()

    assert waiting.num_deaths == 0


def test_sequences_that_no_longer_fit_are_failed_and_the_others_go_on() -> None:
    house = House()
    large, small = house.add(make_request(range(1, 30), 8)), house.add(make_request(range(31, 36), 8))
    house.turn()

    ends = house.crash(Limits(num_blocks=9, block_size=2, max_seats=4, max_step_tokens=8), died=False)
    house.run()

    assert [end.sequence for end in ends] == [large]
    assert small.finish_reason is FinishReason.LENGTH


# Books


def test_what_is_seen_from_outside_adds_up() -> None:
    house = House(Limits(num_blocks=11, block_size=4, max_seats=2, max_step_tokens=32), depth=2)
    for n in (1, 11, 21):
        house.add(make_request(range(n, n + 6), 4))

    house.fill()

    scheduler = house.scheduler
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.num_outstanding) == (1, 2, 2)
    assert [sequence.arrival for sequence in scheduler.running] == [0, 1]
    assert scheduler.num_free_blocks == 6
    assert scheduler.utilization == pytest.approx(0.4)
    house.run()
    assert scheduler.num_free_blocks == 10
    assert scheduler.utilization == 0.0
    counters = scheduler.counters
    assert (counters.num_steps, counters.num_emitted_tokens) == (len(house.plans), 12)
    assert counters.num_fed_tokens == sum(plan.num_tokens for plan in house.plans)


def test_the_sequences_a_plan_admitted_are_known_until_the_next_one() -> None:
    house = House(depth=2)
    sequences = [house.add(make_request(range(n, n + 5), 2)) for n in (1, 11)]

    house.send()
    opened = list(house.scheduler.last_opened)
    house.send()

    assert opened == sequences
    assert list(house.scheduler.last_opened) == []
    house.run()


def test_integrity_check_finds_a_block_too_many() -> None:
    house = House()
    sequence = house.add(make_request(range(1, 6)))
    house.fill()

    sequence.blocks.append(9)

    with pytest.raises(AssertionError, match="held"):
        house.scheduler.check_integrity()


def test_integrity_check_finds_a_lost_seat() -> None:
    house = House()
    sequence = house.add(make_request(range(1, 6)))
    house.fill()

    sequence.seat = 5

    with pytest.raises(AssertionError, match="seats"):
        house.scheduler.check_integrity()


def test_nothing_to_do_is_no_plan() -> None:
    assert Scheduler(ROOMY).plan() is None
