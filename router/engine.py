"""The loop: requests in, token events out, one group of shards behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from router.core.request import FinishReason, Request


@dataclass(frozen=True, slots=True)
class Token:
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


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token on its way to HTTP; the last one carries `finish`.

    `prompt_logprobs` comes with the first event of a request that asked for it: one entry per prompt token, None for
    the first.
    """

    index: int
    token: Token
    top_tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None


class Generation(Protocol):
    """One sequence as its consumer sees it. Iterating raises a `RouterError` if the sequence fails."""

    request: Request
    queue_s: float
    """Seconds from submit to the first plan that holds a row of it; 0 until then."""
    inference_s: float
    """Seconds from that plan to now, or to the end."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    def cancel(self) -> None:
        """Ends the sequence if it still runs; harmless otherwise. Consumers call it in a `finally`."""


class EngineLike(Protocol):
    """The seam between HTTP and the loop."""

    def submit(self, request: Request) -> Generation:
        """Queues a request. Raises `Overloaded` or `NotReady` at once, never later for the same cause."""

    @property
    def ready(self) -> bool: ...
