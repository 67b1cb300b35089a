"""Inputs that are moved on from step to step are those that would have been made anew."""

from __future__ import annotations

import random
from collections import deque

import pytest
import torch

from proto import shard_pb2 as pb
from router.core.plan import StepPlan
from router.core.request import Request
from router.core.scheduler import Limits, Scheduler
from router.group.codec import decode_output, encode_plan
from shard.inputs import ModelInputs, PlanError, Seats

CPU = torch.device("cpu")
LIMITS = Limits(num_blocks=120, block_size=4, max_seats=6, max_step_tokens=40)
VOCAB_SIZE = 100


def make_seats() -> Seats:
    return Seats(num_blocks=120, block_size=4, max_seats=6, max_positions=400, device=CPU)


def made_anew(seats: Seats, plan: pb.StepPlan, repeat: int = 0) -> ModelInputs:
    seats._decoding = None
    return seats.repeat(plan) if repeat else seats.build(plan)


def assert_same(inputs: ModelInputs, expected: ModelInputs) -> None:
    for name in ("input_ids", "positions", "emit_index", "emit_seat_index", "target_index", "targets"):
        assert getattr(inputs, name).tolist() == getattr(expected, name).tolist(), name
    for name in ("num_rows", "emit_rows", "emit_seats", "emit_positions", "emit_drafts", "target_seats"):
        assert getattr(inputs, name) == getattr(expected, name), name
    batch, other = inputs.batch, expected.batch
    assert batch.slots.tolist() == other.slots.tolist()
    assert (batch.query_starts, batch.context_lens) == (other.query_starts, other.context_lens)
    for row, context in enumerate(batch.context_lens):
        blocks = -(-context // batch.block_size)
        assert batch.block_tables[row, :blocks].tolist() == other.block_tables[row, :blocks].tolist()
    rows, others = batch.step_rows(), other.step_rows()
    for name in ("slots", "starts", "contexts"):
        assert getattr(rows, name).tolist() == getattr(others, name).tolist()
    assert rows.tables.tolist() == batch.block_tables.tolist()


def take_turns(seats: Seats, plan: pb.StepPlan) -> None:
    for seat in plan.closes:
        seats.close(seat)
    for opened in plan.opens:
        seats.open(opened.seat, opened.blocks, opened.num_cached_tokens)


def answer_to(plan: pb.StepPlan, repeat: int, rng: random.Random) -> pb.StepOutput:
    num = sum(plan.row_emit)
    return pb.StepOutput(
        step=plan.step + repeat,
        row_num_emitted=[int(emit) for emit in plan.row_emit],
        token_ids=[rng.randrange(VOCAB_SIZE) for _ in range(num)],
        logprobs=[-1.0] * num,
        num_top=[0] * num,
    )


@pytest.mark.parametrize(("depth", "max_repeats"), [(1, 0), (2, 0), (2, 3), (2, 30)])
def test_a_run_of_steps_has_the_inputs_of_each_made_anew(depth: int, max_repeats: int) -> None:
    rng = random.Random(depth)
    scheduler = Scheduler(LIMITS, prefix_caching=False, max_drafts=0)
    moved, anew = make_seats(), make_seats()
    to_come = [Request("r", tuple(rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 30))), 160) for _ in range(5)]
    answers: deque[tuple[StepPlan, int, pb.StepOutput]] = deque()
    num_steps = num_moved = num_repeats = 0
    before: ModelInputs | None = None
    while True:
        if num_steps >= 40 * (5 - len(to_come)) and to_come:
            scheduler.add(to_come.pop())
        while len(answers) < depth and (plan := scheduler.plan(max_repeats=max_repeats)):
            encoded = encode_plan(plan)
            for seats in (moved, anew):
                take_turns(seats, encoded)
            for repeat in range(plan.num_steps):
                inputs = moved.repeat(encoded) if repeat else moved.build(encoded)
                expected = made_anew(anew, encoded, repeat)
                assert_same(inputs, expected)
                num_moved += inputs is before
                before = inputs
                answer = answer_to(encoded, repeat, rng)
                chosen = torch.tensor(list(answer.token_ids), dtype=torch.int64)
                for seats in (moved, anew):
                    seats.last_token[expected.emit_seat_index] = chosen
                answers.append((plan, repeat, answer))
            num_steps += plan.num_steps
            num_repeats += plan.num_repeats
        if not answers:
            break
        plan, repeat, answer = answers.popleft()
        scheduler.commit(decode_output(answer, plan, VOCAB_SIZE, repeat=repeat))

    assert num_steps > 250
    assert num_moved > 100 or depth == 1, "a plan that knows the last tokens is another kind"
    assert num_repeats > 100 or not max_repeats


def decode_plan(step: int) -> pb.StepPlan:
    return pb.StepPlan(
        step=step, row_seat=[3], row_num_tokens=[1], row_num_literals=[0], row_num_new_blocks=[0], row_emit=[True]
    )


def test_a_literal_among_such_steps_is_fed() -> None:
    seats = make_seats()
    seats.open(3, [7], 0)
    seats.build(decode_plan(1))
    with_literal = decode_plan(2)
    with_literal.row_num_literals[:] = [1]
    with_literal.literals.append(9)

    assert seats.build(with_literal).input_ids.tolist() == [9]


def test_a_token_that_is_scored_is_not_scored_again_in_the_next_step() -> None:
    seats = make_seats()
    seats.open(3, [7], 0)
    with_target = decode_plan(1)
    with_target.row_num_targets.append(1)
    with_target.targets.append(9)

    scoring = seats.build(with_target)

    assert scoring.targets.tolist() == [9]
    assert seats.build(decode_plan(2)).targets.tolist() == []


def test_a_row_that_goes_on_past_its_blocks_is_refused() -> None:
    seats = make_seats()
    seats.open(3, [7], 0)
    for step in range(1, 5):
        seats.build(decode_plan(step))

    with pytest.raises(PlanError, match="past its block table"):
        seats.build(decode_plan(5))


def test_a_seat_that_was_closed_is_not_continued() -> None:
    seats = make_seats()
    seats.open(3, [7], 0)
    seats.build(decode_plan(1))
    seats.close(3)

    with pytest.raises(PlanError, match="closed seat"):
        seats.build(decode_plan(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"row_emit": [False]},
        {"row_num_tokens": [2], "row_num_literals": [2], "literals": [5, 6]},
        {"row_num_literals": [1], "literals": [5], "row_num_targets": [1], "targets": [6]},
        {"row_num_tokens": [2], "row_num_literals": [2], "literals": [5, 6], "row_num_drafts": [1]},
    ],
)
def test_a_step_of_another_kind_is_not_repeated(changes: dict[str, list[int]]) -> None:
    seats = make_seats()
    seats.open(3, [7, 8], 0)
    plan = decode_plan(1)
    for name, values in changes.items():
        getattr(plan, name)[:] = values
    seats.build(plan)

    with pytest.raises(PlanError, match="is repeated"):
        seats.repeat(plan)


def test_a_repeat_that_goes_on_past_its_blocks_is_refused() -> None:
    seats = make_seats()
    seats.open(3, [7], 0)
    plan = decode_plan(1)
    seats.build(plan)
    for _ in range(3):
        seats.repeat(plan)

    with pytest.raises(PlanError, match="past its block table"):
        seats.repeat(plan)
