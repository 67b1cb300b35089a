"""A timeout for what happens in every step, hundreds of times a second.

`asyncio.timeout` sets a timer and cancels it again each time. Here one timer stays for the earliest deadline so far,
and when it goes off too early for the present one it sets itself anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Deadline:
    """For one caller at a time, on one event loop."""

    def __init__(self) -> None:
        self._at_s = 0.0
        self._timer: asyncio.Handle | None = None
        self._timer_at_s = 0.0
        self._waiting: asyncio.Task[object] | None = None
        self._has_passed = False

    async def within(self, timeout_s: float, call: Awaitable[T]) -> T:
        """The result of `call`. If it takes longer it is cancelled, and `TimeoutError` raised."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None, "a deadline outside of any task"
        num_cancels = task.cancelling()
        self._at_s = loop.time() + timeout_s
        self._waiting, self._has_passed = task, False
        self._watch(loop)
        try:
            return await call
        except asyncio.CancelledError:
            if self._has_passed and task.uncancel() <= num_cancels:
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            if self._timer_at_s <= self._at_s:
                return
            self._timer.cancel()
        self._timer_at_s = self._at_s
        self._timer = loop.call_at(self._at_s, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiting is None:
            return
        if loop.time() < self._at_s:
            self._watch(loop)
        else:
            self._has_passed = True
            self._waiting.cancel()
