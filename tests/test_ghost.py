"""The ghost itself: it must see every mistake, or the tests that lean on it prove nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto import shard_pb2 as pb
from proto import shard_pb2_grpc
from router.core.request import Request, Sampling
from router.core.scheduler import Limits, Scheduler
from router.errors import GroupLost
from router.group.client import Demands, GroupClient
from tests.ghost import (
    BAD_TOKEN,
    SERVICE_NAME,
    BrokenPlan,
    Fault,
    FaultKind,
    GhostGroup,
    GhostSettings,
    GhostState,
    ghost_group,
    oracle,
    sampling_message,
)

PROMPT = (1, 2, 3, 4, 5)


def make_plan(**changes: object) -> pb.StepPlan:
    """A good first step of one sequence, with some fields changed."""
    fields: dict[str, object] = {
        "step": 1,
        "opens": [make_open()],
        "row_seat": [0],
        "row_num_tokens": [5],
        "row_num_literals": [5],
        "row_num_new_blocks": [2],
        "row_emit": [True],
        "row_num_targets": [0],
        "literals": PROMPT,
        "new_blocks": [1, 2],
    }
    return pb.StepPlan(**(fields | changes))  # type: ignore[arg-type]


def make_open(**changes: object) -> pb.Open:
    fields: dict[str, object] = {"seat": 0, "num_prompt_tokens": 5, "sampling": sampling_message(Sampling())}
    return pb.Open(**(fields | changes))  # type: ignore[arg-type]


def make_decode(step: int, **changes: object) -> pb.StepPlan:
    """The step after: the last sampled token is fed."""
    fields: dict[str, object] = {
        "opens": [],
        "row_num_tokens": [1],
        "row_num_literals": [0],
        "row_num_new_blocks": [0],
        "literals": [],
        "new_blocks": [],
    }
    return make_plan(step=step, **(fields | changes))


def make_state() -> GhostState:
    return GhostState(num_blocks=8, block_size=4, max_seats=2, max_step_tokens=8)


def test_a_right_plan_gives_the_oracles_tokens() -> None:
    state = make_state()

    outputs = [state.run(make_plan()), state.run(make_decode(2)), state.run(make_decode(3))]

    assert [output.token_ids[0] for output in outputs] == oracle(PROMPT, 3)


def test_a_plan_that_is_repeated_gives_the_oracles_tokens() -> None:
    state = make_state()
    state.run(make_plan())

    outputs = state.run_steps(make_decode(2, num_repeats=2))

    assert [output.step for output in outputs] == [2, 3, 4]
    assert [output.token_ids[0] for output in outputs] == oracle(PROMPT, 4)[1:]


@pytest.mark.parametrize(
    "changes",
    [
        {"row_emit": [False]},
        {"row_num_tokens": [2], "row_num_literals": [2], "literals": [1, 2]},
        {"row_num_literals": [1], "literals": oracle(PROMPT, 1), "row_num_targets": [1], "targets": [9]},
    ],
)
def test_what_cannot_be_repeated_is_refused(changes: dict[str, object]) -> None:
    state = make_state()
    state.run(make_plan())

    with pytest.raises(BrokenPlan, match="a repeated row"):
        state.run(make_decode(2, num_repeats=1, **changes))


def test_a_repeat_without_room_in_its_table_is_refused() -> None:
    state = make_state()
    state.run(make_plan())

    with pytest.raises(BrokenPlan, match="9 tokens in a table of 2 blocks"):
        state.run_steps(make_decode(2, num_repeats=3))


def test_a_wrong_literal_changes_the_token() -> None:
    output = make_state().run(make_plan(literals=(1, 2, 3, 4, 6)))

    assert list(output.token_ids) != oracle(PROMPT, 1)
    assert list(output.token_ids) != [BAD_TOKEN]


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"temperature": 0.5}, {"logit_bias": ((3, 1.0),)}, {"bad_words": ((1, 2),)}, {"min_new_tokens": 2}],
)
def test_lost_sampling_state_changes_the_token(changes: dict[str, object]) -> None:
    wanted = oracle(PROMPT, 4, sampling=Sampling(**changes))  # type: ignore[arg-type]

    assert wanted != oracle(PROMPT, 4)


def test_a_hit_on_a_block_that_was_never_written_gives_the_bad_token() -> None:
    opens = [make_open(blocks=[5], num_cached_tokens=4)]

    output = make_state().run(make_plan(opens=opens))

    assert list(output.token_ids) == [BAD_TOKEN]


def test_a_hit_on_a_block_of_other_positions_gives_the_bad_token() -> None:
    state = make_state()
    state.run(make_plan(row_num_tokens=[8], row_num_literals=[8], literals=range(8)))

    opens = [make_open(seat=1, blocks=[2], num_cached_tokens=4)]
    output = state.run(make_plan(step=2, opens=opens, row_seat=[1], new_blocks=[3, 4]))

    assert list(output.token_ids) == [BAD_TOKEN]


BROKEN_FIRST_PLANS: dict[str, dict[str, object]] = {
    "step 2 after 0": {"step": 2},
    "closed but not open": {"closes": [0]},
    "seat 2 of 2": {"opens": [make_open(seat=2)]},
    "opened twice": {"opens": [make_open(), make_open()]},
    "cached tokens in 1 blocks": {"opens": [make_open(blocks=[5], num_cached_tokens=3)]},
    "without a prompt": {"opens": [make_open(num_prompt_tokens=0)]},
    "1 tokens of history, expected 0": {"opens": [make_open(history=[1])]},
    "not open": {"row_seat": [1]},
    "an empty row": {"row_num_tokens": [0], "row_num_literals": [0], "literals": []},
    "8 tokens|9 tokens": {"row_num_tokens": [9], "row_num_literals": [9], "literals": range(9)},
    "in a table of 1 blocks": {"row_num_new_blocks": [1], "new_blocks": [1]},
    "blocks .0, 1. of 8": {"new_blocks": [0, 1]},
    "blocks .1, 8. of 8": {"new_blocks": [1, 8]},
    "a block twice": {"new_blocks": [1, 1]},
    "4 literals for 5": {"row_num_literals": [4], "literals": PROMPT[:4]},
    "before anything was sampled": {"row_num_tokens": [1], "row_num_literals": [0], "literals": []},
    "5 tokens without literals": {"row_num_literals": [0], "literals": []},
    "vocabulary": {"literals": (1, 2, 3, 4, 97)},
    "too many in the ragged columns": {"literals": range(6)},
    "unequal length": {"row_emit": [True, True]},
    "without rows": {
        name: []
        for name in (
            *("opens", "row_seat", "row_num_tokens", "row_num_literals", "row_num_new_blocks", "row_emit"),
            *("row_num_targets", "literals", "new_blocks"),
        )
    },
    "behind the prompt": {"row_num_targets": [5], "targets": [2, 3, 4, 5, 6]},
    "do not follow the literals": {"row_num_targets": [2], "targets": [2, 4]},
}


@pytest.mark.parametrize("complaint", BROKEN_FIRST_PLANS)
def test_a_broken_plan_is_refused(complaint: str) -> None:
    with pytest.raises(BrokenPlan, match=complaint):
        make_state().run(make_plan(**BROKEN_FIRST_PLANS[complaint]))


def test_a_block_of_an_open_table_is_not_given_to_another() -> None:
    state = make_state()
    state.run(make_plan())

    with pytest.raises(BrokenPlan, match=r"blocks \[2\] are new to a table but in another"):
        state.run(make_plan(step=2, opens=[make_open(seat=1)], row_seat=[1], new_blocks=[3, 2]))


def test_a_history_that_is_not_what_the_hit_blocks_hold_is_refused() -> None:
    state = make_state()
    state.run(make_plan())
    sampling = sampling_message(Sampling(repetition_penalty=1.1))
    open_ = make_open(seat=1, blocks=[1], num_cached_tokens=4, sampling=sampling, history=[1, 2, 3, 5])
    row = {"row_seat": [1], "row_num_literals": [1], "literals": [5], "row_num_new_blocks": [1], "new_blocks": [3]}

    with pytest.raises(BrokenPlan, match="history is not what"):
        state.run(make_decode(2, opens=[open_], **row))


def test_a_faulted_seat_emits_nothing_and_its_later_rows_fault_too() -> None:
    state = make_state()

    outputs = [state.run(make_plan(), fault_rows=[0]), state.run(make_decode(2))]

    assert [list(output.token_ids) for output in outputs] == [[], []]
    assert [[fault.row for fault in output.row_faults] for output in outputs] == [[0], [0]]


# Behind gRPC


def make_client(addresses: list[str]) -> GroupClient:
    return GroupClient(addresses, Demands(max_seats=4, max_step_tokens=32))


async def connect(group: GhostGroup) -> GroupClient:
    client = make_client(group.addresses)
    await client.connect(find_s=60.0, load_s=60.0)
    return client


async def generate(client: GroupClient) -> list[int]:
    """One sequence to its end, one plan at a time."""
    info = client.info
    scheduler = Scheduler(Limits(info.num_blocks, info.block_size, info.max_seats, info.max_step_tokens))
    sequence = scheduler.add(Request("r", PROMPT, 4))
    while (plan := scheduler.plan()) is not None:
        await client.send(plan, 60.0)
        scheduler.commit(await client.receive(60.0))
    return sequence.tokens[len(PROMPT) :]


@pytest.mark.anyio
@pytest.mark.parametrize("world_size", [1, 3])
async def test_a_served_group_generates_the_oracles_tokens(world_size: int) -> None:
    async with ghost_group(GhostSettings(world_size=world_size)) as group:
        client = await connect(group)

        tokens = await generate(client)
        await client.close(goodbye=True)

    assert tokens == oracle(PROMPT, 4)


LOSSES = {
    FaultKind.DROP: "did not return|does not fit",
    FaultKind.DUPLICATE: "does not fit|does not hold",
    FaultKind.DIE: "unix:",
    FaultKind.GIVE_UP: "gives up",
    FaultKind.HANG: "did not return",
    FaultKind.GARBAGE_TOKENS: "vocabulary|does not hold",
    FaultKind.GARBAGE_ROWS: "2 rows for 1",
    FaultKind.WRONG_DIGEST: "does not hold",
    FaultKind.WRONG_STEP: "numbered 3",
}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", LOSSES)
async def test_a_fault_loses_the_group_once_and_a_revived_one_serves_again(kind: FaultKind) -> None:
    async with ghost_group(GhostSettings(world_size=2), [Fault(0, 2, kind)]) as group:
        client = await connect(group)
        with pytest.raises(GroupLost, match=LOSSES[kind]):
            await generate(client)
        await client.close(goodbye=False)

        await group.revive()
        await client.connect(find_s=60.0, load_s=60.0)
        tokens = await generate(client)
        await client.close(goodbye=True)

    assert tokens == oracle(PROMPT, 4)


@pytest.mark.anyio
async def test_a_dead_ranks_address_refuses_until_it_is_revived() -> None:
    async with ghost_group(GhostSettings(world_size=2)) as group:
        await group.kill(0)

        with pytest.raises(GroupLost, match="no shard listens at .*rank-0"):
            await make_client(group.addresses).connect(find_s=0.5, load_s=60.0)
        assert group.num_deaths == 1

        await group.revive()
        client = await connect(group)
        await client.close(goodbye=True)


@pytest.mark.anyio
async def test_a_delayed_answer_is_still_the_right_one() -> None:
    async with ghost_group(faults=[Fault(0, 2, FaultKind.DELAY, delay_s=0.05)]) as group:
        client = await connect(group)

        tokens = await generate(client)
        await client.close(goodbye=True)

    assert tokens == oracle(PROMPT, 4)


@pytest.mark.anyio
async def test_a_row_fault_strikes_all_ranks_alike_and_ends_only_the_sequence() -> None:
    async with ghost_group(GhostSettings(world_size=2), [Fault(0, 2, FaultKind.ROW_FAULT)]) as group:
        client = await connect(group)

        tokens = await generate(client)
        await client.close(goodbye=True)

    assert tokens == oracle(PROMPT, 1)


@pytest.mark.anyio
async def test_a_poison_token_kills_each_time() -> None:
    async with ghost_group(GhostSettings(poison_token=PROMPT[2])) as group:
        for num_deaths in (1, 2):
            client = await connect(group)
            with pytest.raises(GroupLost):
                await generate(client)
            await client.close(goodbye=False)
            assert group.num_deaths == num_deaths
            await group.revive()


@pytest.mark.anyio
async def test_an_epoch_that_is_over_is_refused() -> None:
    async with ghost_group() as group, grpc.aio.insecure_channel(group.addresses[0]) as channel:
        stub = shard_pb2_grpc.ShardStub(channel)
        request = pb.ConfigureRequest(epoch=3, num_blocks=8, block_size=4, max_seats=2, max_step_tokens=8)
        await stub.Configure(request)

        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.Configure(request)

        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert (await stub.Describe(pb.DescribeRequest())).last_epoch == 3


@pytest.mark.anyio
async def test_the_standard_health_service_says_serving() -> None:
    async with ghost_group() as group, grpc.aio.insecure_channel(group.addresses[0]) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))

    assert answer.status == health_pb2.HealthCheckResponse.SERVING


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv[0] = "tests.ghost"
runpy.run_module("tests.ghost", run_name="__main__")
"""


@pytest.mark.anyio
async def test_ghosts_serve_as_processes_without_torch(sockets: Path) -> None:
    socket = sockets / "rank-0"
    command = [sys.executable, "-c", WITHOUT_TORCH, "--address", f"unix:{socket}", "--report", "--model-id", "ignored"]
    process = await asyncio.create_subprocess_exec(*command, "--parent-pid", str(os.getpid()), stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        greeting = json.loads(await process.stdout.readline())
        client = make_client([f"unix:{socket}"])
        await client.connect(find_s=60.0, load_s=60.0)
        tokens = await generate(client)
        await client.close(goodbye=True)
    finally:
        process.send_signal(signal.SIGTERM)
        code = await process.wait()

    assert greeting == {"event": "ready"}
    assert tokens == oracle(PROMPT, 4)
    assert code == 0
