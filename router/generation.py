"""One sequence as its consumer sees it: token events, the last of which says how it ended.

The engine is at the other end. Publishing never waits for the consumer; what it has not read yet is kept. Waking a task
costs more than most events, so a consumer that shows them as they come is a function that is called with each of them,
and one that wants them all is woken at the end.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple

from router.core.request import FinishReason, Request
from router.errors import RouterError


class Token(NamedTuple):
    """A token as a client sees it. `logprob` is the natural log-softmax of the model's raw logits."""

    id: int
    text: str
    logprob: float
    special: bool


@dataclass(frozen=True, slots=True)
class Finish:
    """How a sequence ended. `text` is all of it: special tokens left out, nothing behind a stop string."""

    reason: FinishReason
    text: str
    num_generated: int


class TokenEvent(NamedTuple):
    """One token on its way to HTTP, numbered from 1; the last one carries `finish`.

    `prompt_logprobs` comes with the first event of a request that asked for it: one entry per prompt token, None for
    the first. `prompt_tops`, the likeliest tokens in their places, has as many entries, or none if they were not asked
    for; the first is empty.
    """

    index: int  # type: ignore[assignment]  # tuple's own `index` is no loss
    token: Token
    top_tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_tops: tuple[tuple[Token, ...], ...] = ()


class Generation:
    """One sequence as its consumer sees it: read it once, in one of the three ways, and cancel it in a `finally`."""

    __slots__ = (
        *("__weakref__", "_changed", "_ended_at", "_error", "_events", "_on_cancel", "_on_error", "_on_event", "_over"),
        *("_planned_at", "_submitted_at", "request"),
    )

    def __init__(self, request: Request, on_cancel: Callable[[Generation], None]) -> None:
        self.request = request
        self._on_cancel = on_cancel
        self._on_event: Callable[[TokenEvent], None] | None = None
        self._on_error: Callable[[RouterError], None] | None = None
        self._events: deque[TokenEvent] = deque()
        """Those that nobody has taken."""
        self._error: RouterError | None = None
        self._changed = asyncio.Event()
        self._over = asyncio.Event()
        """There is nothing more to come."""
        self._submitted_at = time.monotonic()
        self._planned_at: float | None = None
        self._ended_at: float | None = None

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Every event once, to the one that carries `finish`. Raises the `RouterError` the sequence failed with."""
        event = None
        while event is None or event.finish is None:
            while not self._events:
                if self._error is not None:
                    raise self._error
                self._changed.clear()
                await self._changed.wait()
            event = self._events.popleft()
            yield event

    async def read_all(self) -> list[TokenEvent]:
        """Every event, once the last one is there. Raises the `RouterError` the sequence failed with."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        return list(self._events)

    def pass_on(self, on_event: Callable[[TokenEvent], None], on_error: Callable[[RouterError], None]) -> None:
        """Has `on_event` called with every event, and `on_error` with what the sequence fails with: at once with what
        there is, and then by whoever publishes it."""
        while self._events:
            on_event(self._events.popleft())
        if self._error is not None:
            on_error(self._error)
        elif self._ended_at is None:
            self._on_event, self._on_error = on_event, on_error

    def cancel(self) -> None:
        """Ends the sequence if it still runs; harmless otherwise."""
        if self._ended_at is None:
            self._on_cancel(self)

    @property
    def queue_s(self) -> float:
        """Seconds from submit to the first plan with a row of it, or to now."""
        return (self._planned_at or self._now()) - self._submitted_at

    @property
    def inference_s(self) -> float:
        """Seconds from that plan to the end, or to now; 0 before it."""
        return 0.0 if self._planned_at is None else self._now() - self._planned_at

    def _now(self) -> float:
        return time.monotonic() if self._ended_at is None else self._ended_at

    def note_planned(self) -> None:
        if self._planned_at is None:
            self._planned_at = time.monotonic()

    def publish(self, event: TokenEvent) -> None:
        """Raises what `on_event` raises; the sequence can still `fail` then, also with the last event."""
        if self._on_event is not None:
            self._on_event(event)
        else:
            self._events.append(event)
            self._changed.set()
        if event.finish is not None:
            self._end()

    def fail(self, error: RouterError) -> None:
        on_error = self._on_error
        self._error = error
        self._end()
        if on_error is not None:
            on_error(error)

    def _end(self) -> None:
        self.drop()
        self._over.set()
        self._changed.set()

    def drop(self) -> None:
        """Nobody listens any more."""
        self._ended_at = time.monotonic()
        self._on_event = self._on_error = None  # they and what they call would else keep each other alive
