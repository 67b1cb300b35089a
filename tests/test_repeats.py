"""Plans that stand for several steps: when there may be any, and what they must not change."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from router.core.request import Request, Sampling
from router.core.scheduler import Limits
from router.errors import GroupLost
from router.group.codec import decode_output, encode_plan
from tests.ghost import COPYING_SEED, oracle, steps_of
from tests.house import ROOMY, VOCAB_SIZE, House, make_request

PROMPT = range(1, 6)


def make_house(limits: Limits = ROOMY, *, depth: int = 2, max_repeats: int = 3, max_drafts: int = 0) -> House:
    return House(limits, depth=depth, max_repeats=max_repeats, max_drafts=max_drafts)


def repeats(house: House) -> list[int]:
    return [plan.num_repeats for plan in house.plans]


def test_a_step_is_repeated_when_every_row_feeds_what_it_sampled() -> None:
    house = make_house()
    house.add(make_request(PROMPT, 10))
    house.add(make_request(range(11, 14), 10))

    house.run()

    assert repeats(house) == [0, 3, 3, 0]
    assert [plan.step for plan in house.plans] == [1, 2, 6, 10]
    assert house.scheduler.counters.num_rows == 20
    assert house.scheduler.counters.num_fed_tokens == 5 + 3 + 2 * 9


def test_repeats_are_outstanding_one_by_one() -> None:
    house = make_house()
    house.add(make_request(PROMPT, 10))

    house.fill()
    outstanding = [house.scheduler.num_outstanding]
    for _ in range(5):
        house.receive()
        outstanding.append(house.scheduler.num_outstanding)

    assert outstanding == [5, 4, 3, 2, 1, 0]
    assert [len(emission.tokens) for emission in house.emissions] == [1] * 5
    house.run()


def test_the_blocks_of_all_its_steps_come_with_a_plan() -> None:
    house = make_house(Limits(num_blocks=20, block_size=2, max_seats=2, max_step_tokens=16))
    house.add(make_request(PROMPT, 6))

    house.fill()

    assert house.plans[1].num_repeats == 3
    assert [len(row.new_blocks) for plan in house.plans for row in plan.rows] == [3, 2]
    house.run()


@pytest.mark.parametrize("num_new", range(2, 12))
def test_no_step_is_repeated_behind_the_certain_end_of_a_sequence(num_new: int) -> None:
    house = make_house()
    house.add(make_request(PROMPT, num_new))
    house.add(make_request(range(11, 16), 11))

    house.run()

    assert house.scheduler.counters.num_dropped_tokens == 0
    assert house.scheduler.counters.num_rows == num_new + 11


def with_grammar(house: House) -> None:
    house.add(Request("r", tuple(PROMPT), 60, grammar="force:1/9"))


def with_guesses(house: House) -> None:
    house.add(Request("r", (1, 2, 3, 1, 2, 3), 12, Sampling(seed=COPYING_SEED)))


def with_waiting(house: House) -> None:
    for first in (11, 21):
        house.add(make_request(range(first, first + 60), 12))


HINDRANCES: dict[str, tuple[Callable[[House], None], Callable[[], House]]] = {
    "a grammar": (with_grammar, make_house),
    "guesses": (with_guesses, lambda: make_house(max_drafts=4)),
    "one that waits for memory": (with_waiting, lambda: make_house(Limits(30, 4, 8, 64))),
    "tokens that are known": (lambda house: None, lambda: make_house(depth=1)),
}


@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_no_step_is_repeated_beside(hindrance: str) -> None:
    add_others, make = HINDRANCES[hindrance]
    house = make()
    house.add(make_request(PROMPT, 12))
    add_others(house)

    for _ in range(8):
        house.turn()

    assert len(house.plans) >= 8
    assert not any(repeats(house))
    house.run()


def test_a_request_that_arrives_is_planned_behind_the_repeats_that_are_outstanding() -> None:
    house = make_house()
    house.add(make_request(PROMPT, 20))
    house.fill()
    house.receive()

    house.add(make_request(range(11, 40), 3))
    house.run()

    assert repeats(house)[:3] == [0, 3, 0]
    assert [len(plan.opens) for plan in house.plans[:3]] == [1, 0, 1]
    assert house.plans[2].step == 6


def test_prompts_that_take_several_steps_keep_others_from_repeating_theirs() -> None:
    house = make_house(Limits(65, 4, 8, 8))
    house.add(make_request(PROMPT, 20))
    house.fill()

    house.add(make_request(range(11, 51), 3))
    house.run()

    amid = [plan for plan in house.plans if plan.has_prompts]
    assert len(amid) > 5
    assert not any(plan.num_repeats for plan in amid)


def num_preemptions(max_repeats: int) -> int:
    """Of three sequences in memory for two, which is full in the midst of what might be one plan."""
    house = make_house(Limits(num_blocks=14, block_size=2, max_seats=3, max_step_tokens=16), max_repeats=max_repeats)
    for first in (1, 11, 21):
        house.add(make_request(range(first, first + 3), 7))
    house.run()
    return house.scheduler.counters.num_preemptions


def test_repeats_preempt_nobody_that_single_steps_would_not() -> None:
    assert [num_preemptions(max_repeats) for max_repeats in range(4)] == [num_preemptions(0)] * 4


def test_memory_that_holds_the_next_step_and_not_its_repeats_is_enough() -> None:
    house = make_house(Limits(num_blocks=5, block_size=2, max_seats=1, max_step_tokens=16), max_repeats=3)
    house.add(make_request(PROMPT, 3))
    somebody_elses = house.scheduler._pool.take()  # what is left is one token's place behind the prompt

    house.fill()

    assert repeats(house) == [0, 0]
    house.scheduler._pool.release([somebody_elses])
    house.run()


def test_a_sequence_that_left_amid_repeats_is_closed_with_the_next_plan() -> None:
    house = make_house()
    cancelled = house.add(make_request(PROMPT, 30))
    other = house.add(make_request(range(11, 16), 9))
    house.fill()
    house.receive()

    house.cancel(cancelled)
    house.run()

    assert house.plans[2].closes == [0]
    assert house.scheduler.counters.num_dropped_tokens == 4
    assert len(other.tokens) == 5 + 9


def test_what_a_sequence_repeated_behind_its_end_token_is_dropped() -> None:
    wanted = oracle(tuple(PROMPT), 9)
    house = make_house()
    sequence = house.add(Request("r", tuple(PROMPT), 9, eos_token_ids=(wanted[2],)))

    house.run()

    assert sequence.tokens[5:] == wanted[: wanted.index(wanted[2]) + 1]
    assert house.scheduler.counters.num_dropped_tokens == 2
    assert house.scheduler.num_free_blocks == ROOMY.num_blocks - 1


def test_a_row_that_fails_amid_repeats_ends_its_sequence_alone() -> None:
    house = make_house()
    faulty, other = house.add(make_request(PROMPT, 5)), house.add(make_request(range(11, 16), 5))
    house.send()
    plan = house.scheduler.plan(max_repeats=3)
    assert plan is not None
    assert plan.num_repeats == 3
    house.receive()

    emissions = []
    for repeat, step in enumerate(steps_of(encode_plan(plan))):
        answer = house.ghost.run(step, fault_rows=[0] if repeat == 1 else [])
        emissions += house.scheduler.commit(decode_output(answer, plan, VOCAB_SIZE, repeat=repeat))

    assert [e.fault for e in emissions if e.sequence is faulty] == [None, "row 0 failed"]
    assert [t.token_id for e in emissions if e.sequence is other for t in e.tokens] == oracle(range(11, 16), 5)[1:]


@pytest.mark.parametrize("num_received", range(6))
def test_a_death_amid_repeats_is_replayed(num_received: int) -> None:
    house = make_house()
    sequences = [house.add(make_request(range(first, first + 5), 12)) for first in (1, 11)]
    house.fill()
    for _ in range(num_received):
        house.receive()

    house.crash()
    deaths = [sequence.num_deaths for sequence in sequences]
    house.run()

    assert deaths == [int(num_received < 5)] * 2
    assert house.scheduler.counters.num_replays == 2


def test_a_sequence_on_probation_repeats_nothing() -> None:
    house = make_house()
    house.add(make_request(PROMPT, 12))
    for _ in range(2):
        house.fill()
        house.crash()
    num_before = len(house.plans)

    house.fill()

    assert repeats(house)[num_before:] == [0]
    house.run()
    assert max(repeats(house)[num_before:]) == 3


@pytest.mark.parametrize("repeat", [0, 2, 3])
def test_an_answer_to_another_of_a_plans_steps_loses_the_group(repeat: int) -> None:
    house = make_house()
    house.add(make_request(PROMPT, 9))
    house.send()
    plan = house.scheduler.plan(max_repeats=3)
    assert plan is not None
    answers = house.ghost.run_steps(encode_plan(plan))

    decoded = decode_output(answers[1], plan, VOCAB_SIZE, repeat=1)

    assert decoded.step == plan.step + 1
    with pytest.raises(GroupLost, match=f"step {plan.step + 1}.*numbered {plan.step + repeat}"):
        decode_output(answers[repeat], plan, VOCAB_SIZE, repeat=1)
