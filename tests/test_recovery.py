"""Real ranks die under running streams: the streams stay open and say what they would have said."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.engine import Engine, Generation, TokenEvent
from router.launch import LaunchSettings, LocalGroup
from router.metrics import Metrics
from router.text.tokenizer import Tokenizer
from tests.engines import collect, engine_over, greedy

NUM_STREAMS = 8
NUM_NEW = 48


@contextlib.asynccontextmanager
async def launched(model: Path, world_size: int) -> AsyncIterator[LocalGroup]:
    """A group under the launcher, as `python -m router` starts it."""
    settings = LaunchSettings(model, world_size, flags=("--dtype", "float32"))
    group = LocalGroup(settings, on_progress=lambda rank, done, total: None)
    try:
        await group.start()
        yield group
    finally:
        await group.stop()


def submit_all(engine: Engine, tokenizer: Tokenizer) -> list[Generation]:
    prompts = [tokenizer.encode(f"Story number {index}: it was") for index in range(NUM_STREAMS)]
    return [engine.submit(greedy(prompt, NUM_NEW)) for prompt in prompts]


def ids(events: list[TokenEvent]) -> list[int]:
    return [event.token.id for event in events]


@pytest.mark.parametrize(
    ("world_size", "victim"), [(1, 0), (2, 0), (2, 1)], ids=["the only rank", "rank 0 of 2", "rank 1 of 2"]
)
def test_streams_survive_a_killed_rank(smollm2: Path, world_size: int, victim: int) -> None:
    tokenizer = Tokenizer.load(smollm2)
    metrics = Metrics(max_input_tokens=1000, max_total_tokens=1000)

    async def run() -> None:
        async with (
            launched(smollm2, world_size) as group,
            engine_over(group.addresses, tokenizer, metrics=metrics, restart=group.restart) as engine,
        ):
            undisturbed = await asyncio.gather(*map(collect, submit_all(engine, tokenizer)))

            generations = submit_all(engine, tokenizer)
            witness = aiter(generations[0])
            first_events = [await anext(witness) for _ in range(10)]
            others = [asyncio.create_task(collect(generation)) for generation in generations[1:]]
            os.kill(group.process_ids[victim], signal.SIGKILL)
            disturbed = [first_events + [event async for event in witness], *await asyncio.gather(*others)]

            assert [ids(events) for events in disturbed] == [ids(events) for events in undisturbed]
            assert [[e.index for e in events] for events in disturbed] == [[*range(1, NUM_NEW + 1)]] * NUM_STREAMS
            assert [e[-1].finish for e in disturbed] == [e[-1].finish for e in undisturbed]
            assert metrics.value("shardstream_group_restarts_count") == 1
            assert engine.ready

    asyncio.run(run())
