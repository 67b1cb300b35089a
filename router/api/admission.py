"""From a client's body to running sequences, and back out whatever happens.

A call holds one permit per sequence from before its validation until its last byte is written; there are as many as
`max_concurrent_requests`, and nobody waits for one. Leaving `admitted` cancels what still runs and returns the permits.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Final, Protocol

from router.api.middleware import TRACE_ID
from router.api.replay import SharedAnswers
from router.config import Config
from router.core.request import Request
from router.engine import Finish, Generation
from router.errors import Overloaded
from router.metrics import Gauges, Metrics
from router.text.chat import ChatTemplate
from router.text.tokenizer import Tokenizer
from router.validate import NATIVE, Demand, Manner, Parameters, Validator

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S: Final = 60
DRAIN_WINDOW: Final = 32
"""Returned permits that the drain rate is measured over."""


class EngineLike(Protocol):
    """The loop, as HTTP sees it."""

    def submit(self, request: Request) -> Generation:
        """Queues a request. Raises `Overloaded` or `NotReady` at once, never later for the same cause."""

    @property
    def ready(self) -> bool: ...

    @property
    def ready_in_s(self) -> float:
        """What is expected when it is not; one at least."""

    @property
    def gauges(self) -> Gauges: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes work with."""

    config: Config
    engine: EngineLike
    validator: Validator
    tokenizer: Tokenizer
    metrics: Metrics
    permits: Permits
    template: ChatTemplate
    model_sha: str | None = None
    """The hub commit that the weights are from, None when they are from elsewhere."""
    answers: SharedAnswers | None = None
    """None: every request is computed."""


class Permits:
    """Room for so many sequences at once."""

    def __init__(self, num_permits: int) -> None:
        self._num_permits = num_permits
        self._num_taken = 0
        self._returned_at: deque[float] = deque(maxlen=DRAIN_WINDOW)

    @contextmanager
    def take(self, num: int) -> Iterator[None]:
        """Holds `num` permits. Raises `Overloaded` when there are fewer."""
        if self._num_taken + num > self._num_permits:
            raise Overloaded(self._retry_after_s(num))
        self._num_taken += num
        try:
            yield
        finally:
            self._num_taken -= num
            self._returned_at.extend([time.monotonic()] * num)

    def _retry_after_s(self, num: int) -> int:
        """Until `num` permits come back, at the pace of the last ones."""
        if len(self._returned_at) < 2:
            return 1
        interval_s = (time.monotonic() - self._returned_at[0]) / len(self._returned_at)
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(num * interval_s)))


@dataclass(frozen=True, slots=True)
class Wish:
    """One prompt, as text or as token ids, and what is asked of it."""

    inputs: str | Sequence[int]
    parameters: Parameters
    manner: Manner = NATIVE


@dataclass(frozen=True, slots=True)
class Call:
    """One prompt of a client call, whose sequences run."""

    inputs: str | Sequence[int]
    demand: Demand
    generations: tuple[Generation, ...]
    begun_at: float
    validated_at: float

    @property
    def validation_s(self) -> float:
        return self.validated_at - self.begun_at

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self.begun_at


@asynccontextmanager
async def admitted(
    services: Services, request_id: str, inputs: str, parameters: Parameters, *, stream: bool
) -> AsyncIterator[Call]:
    """Validates and submits. Raises `ValidationError`, `Overloaded` or `NotReady`."""
    async with admitted_together(services, request_id, [Wish(inputs, parameters)], stream=stream) as [call]:
        yield call


@asynccontextmanager
async def admitted_together(
    services: Services, request_id: str, wishes: Sequence[Wish], *, stream: bool
) -> AsyncIterator[list[Call]]:
    """The same for several prompts: nothing is submitted before all are valid. Raises as `admitted`."""
    begun_at = time.perf_counter()
    validator = services.validator
    num = sum(validator.num_sequences(w.parameters, stream=stream, manner=w.manner) for w in wishes)
    with services.permits.take(num):
        demands = [await _validated(validator, wish, request_id) for wish in wishes]
        validated_at = time.perf_counter()
        services.metrics.observe("tgi_request_validation_duration", validated_at - begun_at)
        with _submitted(services.engine, demands) as submitted:
            yield [
                Call(wish.inputs, demand, generations, begun_at, validated_at)
                for wish, demand, generations in zip(wishes, demands, submitted, strict=True)
            ]


async def _validated(validator: Validator, wish: Wish, request_id: str) -> Demand:
    """As part of the client's trace, if it has one."""
    demand = await validator.validate(wish.inputs, wish.parameters, request_id, wish.manner)
    trace_id = TRACE_ID.get()
    if trace_id is None:
        return demand
    return replace(demand, requests=tuple(replace(request, trace_id=trace_id) for request in demand.requests))


@contextmanager
def _submitted(engine: EngineLike, demands: Sequence[Demand]) -> Iterator[list[tuple[Generation, ...]]]:
    """What is submitted before a refusal is cancelled, as everything is in the end."""
    generations: list[Generation] = []

    def submit(request: Request) -> Generation:
        generations.append(engine.submit(request))
        return generations[-1]

    try:
        yield [tuple(map(submit, demand.requests)) for demand in demands]
    finally:
        for generation in generations:
            generation.cancel()


def log_success(call: Call, generation: Generation, finish: Finish) -> None:
    """One line per answered call: times in milliseconds, never a prompt or a text."""
    logger.info(
        "Success request_id=%s trace_id=%s input_length=%d generated_tokens=%d finish_reason=%s seed=%s "
        "total_time=%.1fms validation_time=%.1fms queue_time=%.1fms inference_time=%.1fms time_per_token=%.1fms",
        generation.request.request_id,
        generation.request.trace_id or None,
        call.demand.input_length,
        finish.num_generated,
        finish.reason.value,
        generation.request.sampling.seed if generation.request.sampling.do_sample else None,
        call.total_s * 1e3,
        call.validation_s * 1e3,
        generation.queue_s * 1e3,
        generation.inference_s * 1e3,
        generation.inference_s * 1e3 / finish.num_generated,
    )


def time_headers(
    call: Call, *, queue_s: float, inference_s: float, num_prompt_tokens: int, num_generated: int
) -> dict[str, str]:
    """Seconds in x-compute-time, whole milliseconds in the others."""

    def whole_ms(seconds: float) -> str:
        return str(int(seconds * 1e3))

    total_s = call.total_s
    return {
        "x-compute-time": str(total_s),
        "x-total-time": whole_ms(total_s),
        "x-validation-time": whole_ms(call.validation_s),
        "x-queue-time": whole_ms(queue_s),
        "x-inference-time": whole_ms(inference_s),
        "x-time-per-token": whole_ms(inference_s / max(1, num_generated)),
        "x-prompt-tokens": str(num_prompt_tokens),
        "x-generated-tokens": str(num_generated),
    }
