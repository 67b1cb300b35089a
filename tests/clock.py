"""Time that passes when a test says so, for what has to wait for it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass


@dataclass(slots=True)
class Clock:
    """May stand for the module `time`; runs ahead of the machine's clock since its leaps."""

    ahead_s: float = 0.0

    def perf_counter(self) -> float:
        return time.perf_counter() + self.ahead_s

    def leap(self, seconds: float) -> None:
        """Whatever the running event loop has a timer for within so many seconds is due now."""
        self.ahead_s += seconds
        asyncio.get_running_loop().time = self._monotonic  # type: ignore[method-assign]

    def _monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


async def let_time_fly(clock: Clock) -> None:
    """Nothing that is waited for meanwhile comes in time."""
    while True:
        clock.leap(3600.0)
        await asyncio.sleep(0)
