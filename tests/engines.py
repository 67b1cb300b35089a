"""An engine in the test's own process, over whatever group the test has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from router.core.request import Request, Sampling
from router.engine import Engine, EngineSettings, Generation, TokenEvent
from router.group.client import Demands, GroupClient
from router.metrics import Metrics
from router.text.tokenizer import Tokenizer
from tests.server import PATIENCE_S


async def nobody_restarts() -> None:
    raise AssertionError("the group was lost")


class Restarter:
    """A supervisor that calls a function."""

    def __init__(self, restart: Callable[[], Awaitable[None]]) -> None:
        self._restart = restart

    async def restart(self) -> None:
        await self._restart()

    def note_served(self) -> None:
        return


@contextlib.asynccontextmanager
async def engine_over(
    addresses: list[str],
    tokenizer: Tokenizer,
    *,
    max_step_tokens: int = 2048,
    max_kv_tokens: int | None = None,
    max_seats: int = 64,
    lookahead: int = 1,
    prefix_caching: bool = True,
    max_drafts: int = 0,
    metrics: Metrics | None = None,
    restart: Callable[[], Awaitable[None]] = nobody_restarts,
) -> AsyncIterator[Engine]:
    """Leaves the shards ready for the next epoch."""
    demands = Demands(max_seats, max_step_tokens, max_kv_tokens)
    client = GroupClient(addresses, demands)
    await client.connect(find_s=PATIENCE_S, load_s=PATIENCE_S)
    settings = EngineSettings(lookahead, PATIENCE_S, PATIENCE_S, PATIENCE_S, prefix_caching, max_drafts)
    metrics = metrics or Metrics(max_input_tokens=1000, max_total_tokens=1000)
    engine = Engine(client, tokenizer, metrics, settings, prefix_seed=b"test", supervisor=Restarter(restart))
    loop = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop
        await client.close(goodbye=True)


async def collect(generation: Generation) -> list[TokenEvent]:
    return [event async for event in generation]


def greedy(prompt: list[int], max_new_tokens: int, **values: object) -> Request:
    """A greedy request that no end token ends."""
    return Request("test", tuple(prompt), max_new_tokens, **values)  # type: ignore[arg-type]


def sampled(prompt: list[int], max_new_tokens: int, sampling: Sampling) -> Request:
    return Request("test", tuple(prompt), max_new_tokens, sampling)
