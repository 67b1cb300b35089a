"""Answers that look like nearly every step's are read in one go; none is taken for one that it is not."""

from __future__ import annotations

import pytest

from proto import shard_pb2 as pb
from router.core.plan import Row, RowOutput, SampledToken, StepPlan
from router.errors import GroupLost
from router.group.codec import decode_output

VOCAB_SIZE = 100
EMITTING, SILENT, SCORED = Row(0, 1, [], [], True, []), Row(1, 1, [5], [], False, []), Row(1, 1, [5], [], True, [6])


def answer(**columns: object) -> pb.StepOutput:
    plain = {"row_num_emitted": [1, 1], "token_ids": [7, 8], "logprobs": [-0.5, -0.25], "num_top": [0, 0]}
    return pb.StepOutput(step=1, **(plain | columns))  # type: ignore[arg-type]


def plan(second: Row = EMITTING) -> StepPlan:
    return StepPlan(1, [], [], [EMITTING, second])


def test_a_token_of_each_row() -> None:
    rows = decode_output(answer(), plan(), VOCAB_SIZE).rows

    assert rows == [RowOutput((SampledToken(7, -0.5),)), RowOutput((SampledToken(8, -0.25),))]


@pytest.mark.parametrize(
    ("second", "spoilt", "complaint"),
    [
        (SILENT, {}, "row 1 emitted 1 tokens"),
        (SCORED, {}, "ragged columns"),
        (EMITTING, {"row_num_emitted": [2, 0]}, "row 0 emitted 2 tokens"),
        (EMITTING, {"token_ids": [7, VOCAB_SIZE]}, "token 100 in a vocabulary of 100"),
        (EMITTING, {"token_ids": [7]}, "out of range"),
        (EMITTING, {"logprobs": [-0.5] * 3}, "ragged columns"),
        (EMITTING, {"num_top": [0, 1]}, "ragged columns"),
        (EMITTING, {"top_token_ids": [1]}, "ragged columns"),
        (EMITTING, {"top_logprobs": [-1.0]}, "ragged columns"),
        (EMITTING, {"target_logprobs": [-1.0]}, "targets"),
        (EMITTING, {"target_num_top": [1]}, "targets"),
        (EMITTING, {"row_faults": [pb.RowFault(row=0, message="NaN")]}, "row 0 emitted 1 tokens"),
        (EMITTING, {"forced_token_ids": [3]}, "forced tokens"),
        (EMITTING, {"row_num_forced": [1, 0]}, "forced tokens"),
    ],
)
def test_what_does_not_fit_the_plan_loses_the_group(second: Row, spoilt: dict[str, object], complaint: str) -> None:
    with pytest.raises(GroupLost, match=complaint):
        decode_output(answer(**spoilt), plan(second), VOCAB_SIZE)
