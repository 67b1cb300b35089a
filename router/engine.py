"""The loop: requests in, token events out, one shard group behind it.

    submit ──► scheduler.plan ──► client.send ──► (shards) ──► client.receive ──► scheduler.commit ──► publish
                    ▲                                                                    │
                    └────────────── up to `lookahead` plans ahead of the running step ◄──┘

The scheduler decides, the client carries, this module waits. Publishing never awaits, so a slow reader costs nobody
else a token. When the group is lost every running sequence waits again and is replayed from its tokens once the group
is back; its stream stays open meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from router.core.plan import StepPlan, Timings, TopTokens
from router.core.request import FinishReason, Request, Sequence
from router.core.scheduler import Counters, Emission, Limits, Scheduler
from router.errors import GenerationFailed, GroupLost, NotReady, RouterError
from router.group.client import GroupClient, GroupInfo
from router.metrics import Gauges, Metrics
from router.text.output import OutputText
from router.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SHUTTING_DOWN: Final = "the server is shutting down"
MIN_DEADLINE_S: Final = 5.0
MIN_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 5.0


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
    """One token on its way to HTTP, numbered from 1; the last one carries `finish`.

    `prompt_logprobs` comes with the first event of a request that asked for it: one entry per prompt token, None for
    the first. `prompt_tops`, the likeliest tokens in their places, has as many entries, or none if they were not asked
    for; the first is empty.
    """

    index: int
    token: Token
    top_tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    prompt_tops: tuple[tuple[Token, ...], ...] = ()


class Generation:
    """One sequence as its consumer sees it: iterate over it once, and cancel it in a `finally`."""

    def __init__(self, request: Request, on_cancel: Callable[[Generation], None]) -> None:
        self.request = request
        self._on_cancel = on_cancel
        self._events: deque[TokenEvent] = deque()
        self._error: RouterError | None = None
        self._changed = asyncio.Event()
        self._submitted_at = time.monotonic()
        self._planned_at: float | None = None
        self._ended_at: float | None = None

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Every event once, to the one that carries `finish`. Raises the `RouterError` the sequence failed with."""
        while True:
            while self._events:
                event = self._events.popleft()
                yield event
                if event.finish is not None:
                    return
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()

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
        if event.finish is not None:
            self._ended_at = time.monotonic()
        self._events.append(event)
        self._changed.set()

    def fail(self, error: RouterError) -> None:
        self._ended_at = time.monotonic()
        self._error = error
        self._changed.set()

    def drop(self) -> None:
        """Nobody listens any more."""
        self._ended_at = time.monotonic()


@dataclass(frozen=True, slots=True)
class EngineSettings:
    lookahead: int = 1
    """Plans sent ahead of the running step; 0 waits for each output before it plans the next."""
    step_timeout_s: float = 120.0
    """Longest a step may ever take."""
    find_timeout_s: float = 8.0
    """A rank of a lost group that does not listen for this long is looked for again after a restart."""
    load_timeout_s: float = 600.0
    """A rank that listens may take this long to load its weights."""
    prefix_caching: bool = True


class _Sent(NamedTuple):
    """A plan on its way."""

    at: float
    num_tokens: int
    method: str
    joined: bool
    """Whether sequences joined running ones."""


@dataclass(slots=True)
class _Run:
    """What the engine keeps beside a sequence."""

    generation: Generation
    text: OutputText
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    prompt_tops: list[tuple[Token, ...]] = field(default_factory=lambda: [()])
    num_events: int = 0


class Supervisor(Protocol):
    """Whoever keeps the group's processes alive."""

    async def restart(self) -> None:
        """Ends what is left of a lost group and starts it anew. Raises `StartupError` when it is given up."""

    def note_served(self) -> None:
        """The group did some work since it was started."""


class Elsewhere:
    """The supervisor of shards that run elsewhere: whoever started them brings them back, and connecting waits."""

    async def restart(self) -> None:
        return

    def note_served(self) -> None:
        return


class Engine:
    """Owns the scheduler and the client; everything runs on one event loop."""

    def __init__(
        self,
        client: GroupClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        settings: EngineSettings,
        *,
        prefix_seed: bytes,
        supervisor: Supervisor,
    ) -> None:
        self._client = client
        client.on_lost = self.wake
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._settings = settings
        self._supervisor = supervisor
        self._scheduler = Scheduler(
            _limits(client.info), prefix_seed=prefix_seed, prefix_caching=settings.prefix_caching
        )
        self._runs: dict[Sequence, _Run] = {}
        self._sequences: dict[Generation, Sequence] = {}
        self._work = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._sent: deque[_Sent] = deque()
        self._pace = _Pace()
        self._refusal: str | None = None
        self._serving = True

    @property
    def ready(self) -> bool:
        """Whether the group is up and new requests are taken."""
        return self._serving and self._refusal is None

    @property
    def gauges(self) -> Gauges:
        scheduler = self._scheduler
        return Gauges(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_running_tokens=scheduler.num_running_tokens,
            capacity_tokens=self._client.info.capacity_tokens,
            kv_cache_utilization=scheduler.utilization,
            ready=self.ready,
            num_admitted_tokens=scheduler.counters.num_admitted_tokens,
            num_hit_tokens=scheduler.counters.num_hit_tokens,
            num_preemptions=scheduler.counters.num_preemptions,
        )

    @property
    def counters(self) -> Counters:
        return self._scheduler.counters

    def wake(self) -> None:
        """There may be something to do: a request, a cancel, a lost group."""
        self._work.set()

    def submit(self, request: Request) -> Generation:
        """Queues a request. Raises `NotReady` at once, never later for the same cause."""
        if self._refusal is not None:
            raise NotReady(self._refusal)
        sequence = self._scheduler.add(request)
        generation = Generation(request, self._cancel)
        text = OutputText(self._tokenizer, request.prompt, request.stop, request.keep_stop)
        self._runs[sequence] = _Run(generation, text)
        self._sequences[generation] = sequence
        self._empty.clear()
        self._metrics.count("tgi_request_count")
        self._metrics.observe("tgi_request_input_length", len(request.prompt))
        self._metrics.observe("tgi_request_max_new_tokens", request.max_new_tokens)
        self.wake()
        return generation

    def _cancel(self, generation: Generation) -> None:
        sequence = self._sequences.get(generation)
        if sequence is None:
            return
        self._scheduler.cancel(sequence)
        generation.drop()
        self._forget(sequence)
        self._metrics.count("shardstream_cancelled_count")
        self._metrics.count("tgi_request_failure", label="dropped")
        self.wake()

    def _forget(self, sequence: Sequence) -> None:
        run = self._runs.pop(sequence)
        del self._sequences[run.generation]
        if not self._runs:
            self._empty.set()

    async def run(self) -> None:
        """Serves until cancelled. Raises `StartupError` when the group is given up.

        the group is lost          everything that ran waits; processes are restarted, the client connects anew
        it cannot be reached       tried again, with growing pauses
        it comes back changed      given up: what was begun with one model cannot go on with another
        the supervisor gives up    given up
        """
        try:
            while True:
                try:
                    await self._serve_epoch()
                except GroupLost as error:
                    logger.error("the group is lost: %s", error)
                self._lose_epoch()
                await self._regain_group()
        finally:
            self.refuse(SHUTTING_DOWN)
            self.fail_all(SHUTTING_DOWN)

    def _lose_epoch(self) -> None:
        """Every sequence waits again; those that killed the group repeatedly are failed."""
        self._serving = False
        self._metrics.count("shardstream_group_restarts_count")
        for sent in self._sent:
            self._metrics.count("tgi_batch_inference_failure", label=sent.method)
        self._sent.clear()
        self._pace = _Pace()
        for emission in self._scheduler.reset(self._scheduler.limits, died=True):
            self._publish(emission)

    async def _regain_group(self) -> None:
        await self._client.close(goodbye=False)
        pause_s = MIN_PAUSE_S
        while not self._serving:
            await self._supervisor.restart()
            try:
                await self._client.connect(find_s=self._settings.find_timeout_s, load_s=self._settings.load_timeout_s)
                self._serving = True
            except GroupLost as error:
                logger.error("the group is not back yet: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(MAX_PAUSE_S, 2.0 * pause_s)
        logger.info("the group is back in epoch %d", self._client.info.epoch)

    async def _serve_epoch(self) -> None:
        """Runs steps until the group is lost."""
        while True:
            self._client.raise_if_lost()
            await self._send_plans()
            if self._scheduler.num_outstanding:
                await self._take_output()
            else:
                await self._wait_for_work()

    async def _wait_for_work(self) -> None:
        if not self._runs:
            self._scheduler.check_empty()
        self._work.clear()
        await self._work.wait()

    async def _send_plans(self) -> None:
        while self._scheduler.num_outstanding <= self._settings.lookahead:
            begun_at, codec_s = time.perf_counter(), self._client.codec_s
            plan = self._scheduler.plan()
            planned_s = time.perf_counter() - begun_at
            if plan is None:
                return
            self._note_plan(plan)
            await self._client.send(plan, self._settings.step_timeout_s)
            self._count_host_time(planned_s, codec_s)

    def _note_plan(self, plan: StepPlan) -> None:
        sent = _Sent(time.monotonic(), plan.num_tokens, _method(plan), joined=0 < len(plan.opens) < len(plan.rows))
        self._sent.append(sent)
        self._metrics.count("tgi_batch_inference_count", label=sent.method)
        if sent.joined:
            self._metrics.count("tgi_batch_concat", label="chunking")
        if plan.opens:
            self._metrics.observe("tgi_batch_next_size", len(plan.opens))
            for sequence in self._scheduler.last_opened:
                self._runs[sequence].generation.note_planned()

    async def _take_output(self) -> None:
        codec_s = self._client.codec_s
        sent = self._sent[0]
        output = await self._client.receive(self._pace.deadline_s(sent.num_tokens, self._settings.step_timeout_s))
        self._sent.popleft()
        self._note_output(sent, output.timings)
        begun_at = time.perf_counter()
        emissions = self._scheduler.commit(output)
        committed_at = time.perf_counter()
        self._metrics.observe("tgi_batch_filter_duration", committed_at - begun_at, sent.method)
        self._supervisor.note_served()
        for emission in emissions:
            self._publish(emission)
        self._metrics.count("shardstream_router_publish_seconds_sum", time.perf_counter() - committed_at)
        self._count_host_time(committed_at - begun_at, codec_s)

    def _count_host_time(self, scheduler_s: float, codec_s_before: float) -> None:
        codec_s = self._client.codec_s - codec_s_before
        self._metrics.count("shardstream_router_step_seconds_sum", scheduler_s + codec_s)

    def _note_output(self, sent: _Sent, timings: Timings) -> None:
        step_s = time.monotonic() - sent.at
        self._pace.note(step_s, sent.num_tokens)
        count, observe = self._metrics.count, self._metrics.observe
        count("shardstream_step_count")
        count("tgi_batch_inference_success", label=sent.method)
        count("shardstream_shard_wait_seconds_sum", timings.wait_us * 1e-6)
        count("shardstream_shard_inputs_seconds_sum", timings.inputs_us * 1e-6)
        count("shardstream_shard_forward_seconds_sum", timings.forward_us * 1e-6)
        count("shardstream_shard_sample_seconds_sum", timings.sample_us * 1e-6)
        observe("tgi_batch_inference_duration", step_s, sent.method)
        observe("tgi_batch_forward_duration", timings.forward_us * 1e-6, sent.method)
        observe("tgi_batch_decode_duration", timings.sample_us * 1e-6, sent.method)
        if sent.joined:
            observe("tgi_batch_concat_duration", timings.inputs_us * 1e-6, "decode")

    def _publish(self, emission: Emission) -> None:
        """Turns what the scheduler committed into an event. Never awaits, never raises: a sequence fails alone."""
        try:
            self._publish_event(emission)
        except Exception:
            logger.exception("a token could not be published")
            if emission.sequence in self._runs:
                self._scheduler.cancel(emission.sequence)
                self._fail(emission.sequence, GenerationFailed("its text could not be decoded"))

    def _publish_event(self, emission: Emission) -> None:
        sequence = emission.sequence
        run = self._runs[sequence]
        if emission.prompt_logprobs:
            run.prompt_logprobs += emission.prompt_logprobs
            run.prompt_tops += map(self._top_tokens, emission.prompt_tops)
        if emission.fault is not None:
            self._fail(sequence, GenerationFailed(emission.fault))
            return
        if emission.token is None:
            return
        sampled = emission.token
        piece = run.text.push(sampled.token_id, last=emission.finish is not None)
        reason = emission.finish
        if piece.stopped and (reason is None or not sequence.request.keep_stop):
            reason = FinishReason.STOP_SEQUENCE  # at the last token allowed, TGI's clients expect `length`
            self._scheduler.finish(sequence, reason)
        run.num_events += 1
        finish = None if reason is None else Finish(reason, run.text.text, sequence.num_generated)
        is_scored = sequence.request.prompt_logprobs and run.num_events == 1
        run.generation.publish(
            TokenEvent(
                run.num_events,
                Token(sampled.token_id, piece.text, sampled.logprob, piece.special),
                self._top_tokens(sampled.top_tokens),
                finish,
                tuple(run.prompt_logprobs) if is_scored else None,
                tuple(run.prompt_tops) if is_scored and sequence.request.sampling.prompt_top_n_tokens else (),
            )
        )
        self._metrics.count("shardstream_generated_tokens_count")
        if finish is not None:
            self._note_finished(run.generation, finish)
            self._forget(sequence)

    def _top_tokens(self, top_tokens: TopTokens) -> tuple[Token, ...]:
        tokenizer = self._tokenizer
        return tuple(
            Token(id_, tokenizer.token_text(id_), logprob, tokenizer.is_special(id_)) for id_, logprob in top_tokens
        )

    def _note_finished(self, generation: Generation, finish: Finish) -> None:
        observe = self._metrics.observe
        self._metrics.count("tgi_request_success")
        observe("tgi_request_duration", generation.queue_s + generation.inference_s)
        observe("tgi_request_queue_duration", generation.queue_s)
        observe("tgi_request_inference_duration", generation.inference_s)
        observe("tgi_request_mean_time_per_token_duration", generation.inference_s / finish.num_generated)
        observe("tgi_request_generated_tokens", finish.num_generated)

    def _fail(self, sequence: Sequence, error: RouterError) -> None:
        self._runs[sequence].generation.fail(error)
        self._metrics.count("tgi_request_failure", label=error.error_type or "internal")
        self._forget(sequence)

    def refuse(self, cause: str) -> None:
        """From now on every submit raises `NotReady`."""
        self._refusal = cause

    def fail_all(self, cause: str) -> None:
        """Ends every sequence with `NotReady`."""
        for sequence in list(self._runs):
            self._scheduler.cancel(sequence)
            self._fail(sequence, NotReady(cause))
        self.wake()

    async def drain(self, timeout_s: float) -> None:
        """Returns when no sequence is left, or fails those that remain after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            self.fail_all(SHUTTING_DOWN)


def _limits(info: GroupInfo) -> Limits:
    return Limits(
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_seats=info.max_seats,
        max_step_tokens=info.max_step_tokens,
    )


def _method(plan: StepPlan) -> str:
    """TGI's label: a step with prompt tokens in it is a prefill."""
    return "prefill" if any(row.num_tokens > 1 for row in plan.rows) else "decode"


class _Pace:
    """How long a step may take before the group counts as hung.

    Twenty times the usual step or four times the usual time per token, whichever is longer: a long prompt after many
    short steps must not look like a hang. Before anything is known the configured limit holds.
    """

    def __init__(self) -> None:
        self._step_s: float | None = None
        self._token_s = 0.0

    def note(self, step_s: float, num_tokens: int) -> None:
        self._step_s = step_s if self._step_s is None else 0.9 * self._step_s + 0.1 * step_s
        self._token_s = max(step_s / max(1, num_tokens), 0.99 * self._token_s)

    def deadline_s(self, num_tokens: int, limit_s: float) -> float:
        """Seconds to wait for a step of `num_tokens`."""
        if self._step_s is None:
            return limit_s
        expected_s = max(20.0 * self._step_s, 4.0 * self._token_s * num_tokens)
        return min(limit_s, max(MIN_DEADLINE_S, expected_s))
