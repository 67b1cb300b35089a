"""The loop: requests in, token events out, one shard group behind it.

    submit ──► scheduler.plan ──► client.send ──► (shards) ──► client.receive ──► scheduler.commit ──► publish
                    ▲                                                                    │
                    └────────────── up to `lookahead` steps ahead of the running one ◄───┘

The scheduler decides, the client carries, this module waits. While steps are short and alike, one plan stands for
several of them. Publishing never awaits, so a slow reader costs nobody else a token. When the group is lost every
running sequence waits again and is replayed from its tokens once the group is back; its stream stays open meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat
from typing import Final, NamedTuple, Protocol

from router.beams import BeamGeneration
from router.core.plan import SampledToken, StepPlan, Timings, TopTokens
from router.core.request import BeamSettings, FinishReason, Request, Sequence
from router.core.scheduler import Counters, Emission, Limits, Scheduler
from router.errors import GenerationFailed, GroupLost, NotReady, RouterError
from router.generation import Finish, Generation, Token, TokenEvent
from router.group.client import GroupClient, GroupInfo
from router.metrics import METHODS, Gauges, Metrics
from router.text.output import OutputText
from router.text.tokenizer import Tokenizer

__all__ = [
    "SHUTTING_DOWN",
    "Elsewhere",
    "Engine",
    "EngineSettings",
    "Finish",
    "Generation",
    "Supervisor",
    "Token",
    "TokenEvent",
]

logger = logging.getLogger(__name__)

SHUTTING_DOWN: Final = "the server is shutting down"
MIN_DEADLINE_S: Final = 5.0
MIN_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 5.0
MAX_STALL_S: Final = 0.15
"""Longest that a step's prompts and forced runs should keep running streams waiting."""
MAX_REPEATED_S: Final = 0.01
"""Longest that the repeats of a plan should take. A request that arrives meanwhile waits so much longer for its first
token, and behind a stop string, or for a client that left, so much is computed in vain."""
MAX_REPEATS: Final = 3
"""Most of them: a plan for five steps instead of four saves a twentieth of what it takes to send one for each."""
MIN_CHUNK_TOKENS: Final = 128
"""Fewest prompt tokens of a step, however slow the shards: smaller chunks read the weights for too little."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    lookahead: int = 1
    """A plan is sent when so many steps are left beside the running one; 0 waits for each output before it plans the
    next step. Above 0, steps in which no row feeds a known token may repeat, as `Pace.max_repeats` says."""
    step_timeout_s: float = 120.0
    """Longest a step may ever take."""
    find_timeout_s: float = 8.0
    """A rank of a lost group that does not listen for this long is looked for again after a restart."""
    load_timeout_s: float = 600.0
    """A rank that listens may take this long to load its weights."""
    prefix_caching: bool = True
    max_drafts: int = 0
    """Guessed tokens a row may verify."""
    loaded_s: float = 20.0
    """What the group took until it was there."""


class _Sent(NamedTuple):
    """A step on its way."""

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
    is_part: bool = False
    """Works for a beam search, which is what the client asked for and what is counted."""


class StepMeters:
    """What every step of a method adds to."""

    __slots__ = (
        *("choosing", "commit", "forward", "forward_s", "host_s", "inputs_s", "num_by_method", "num_steps"),
        *("publish_s", "sample_s", "step", "wait_s"),
    )

    def __init__(self, metrics: Metrics, method: str) -> None:
        counter, histogram = metrics.counter, metrics.histogram
        self.num_steps = counter("shardstream_step_count")
        self.num_by_method = counter("tgi_batch_inference_success", method)
        self.host_s = counter("shardstream_router_step_seconds_sum")
        self.publish_s = counter("shardstream_router_publish_seconds_sum")
        self.wait_s = counter("shardstream_shard_wait_seconds_sum")
        self.inputs_s = counter("shardstream_shard_inputs_seconds_sum")
        self.forward_s = counter("shardstream_shard_forward_seconds_sum")
        self.sample_s = counter("shardstream_shard_sample_seconds_sum")
        self.step = histogram("tgi_batch_inference_duration", method)
        self.forward = histogram("tgi_batch_forward_duration", method)
        self.choosing = histogram("tgi_batch_decode_duration", method)
        self.commit = histogram("tgi_batch_filter_duration", method)

    def note(self, step_s: float, timings: Timings) -> None:
        """`step_s` from when it could begin to its output."""
        forward_s, sample_s = timings.forward_us * 1e-6, timings.sample_us * 1e-6
        self.num_steps.value += 1
        self.num_by_method.value += 1
        self.wait_s.value += timings.wait_us * 1e-6
        self.inputs_s.value += timings.inputs_us * 1e-6
        self.forward_s.value += forward_s
        self.sample_s.value += sample_s
        self.step.observe(step_s)
        self.forward.observe(forward_s)
        self.choosing.observe(sample_s)


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
            _limits(client.info),
            prefix_seed=prefix_seed,
            prefix_caching=settings.prefix_caching,
            max_drafts=settings.max_drafts,
        )
        self._runs: dict[Sequence, _Run] = {}
        self._sequences: dict[Generation, Sequence] = {}
        self._num_searches = 0
        self._work = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._num_published = metrics.counter("shardstream_generated_tokens_count")
        """Tokens that became events."""
        self._sent: deque[_Sent] = deque()
        self._returned_at = 0.0
        """When the last step returned (`time.monotonic`)."""
        self._meters = {method: StepMeters(metrics, method) for method in METHODS}
        self._pace = Pace()
        self._refusal: str | None = None
        self._is_over = False
        self._serving = True
        self._away_s = settings.loaded_s
        """How long the group was away the last time."""
        self._lost_at = 0.0
        """When it was lost (`time.monotonic`), if it is."""

    @property
    def ready(self) -> bool:
        """Whether the group is up and new requests are taken."""
        return self._serving and self._refusal is None

    @property
    def ready_in_s(self) -> float:
        """How long the group will still be away, if it is as long as the last time; one second at least. How long it
        would be if it were lost now, while it is there."""
        passed_s = 0.0 if self._serving else time.monotonic() - self._lost_at
        return max(1.0, self._away_s - passed_s)

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
            num_forced_tokens=scheduler.counters.num_forced_tokens,
            num_drafted_tokens=scheduler.counters.num_drafted_tokens,
            num_rows_by_accepted=tuple(scheduler.counters.num_rows_by_accepted),
            num_emitted_tokens=scheduler.counters.num_emitted_tokens,
            num_skipped_tokens=scheduler.counters.num_skipped_tokens,
            num_rows_by_skipped=tuple(scheduler.counters.num_rows_by_skipped),
            num_adapters=len(self._client.info.adapters),
            running_adapters=self._adapters_of(scheduler.running),
            waiting_adapters=self._adapters_of(scheduler.waiting),
            cpu_s=time.thread_time(),
        )

    def _adapters_of(self, sequences: Iterable[Sequence]) -> tuple[str, ...]:
        numbers = {sequence.request.adapter for sequence in sequences}
        return tuple(name for number, name in enumerate(self._client.info.adapters, 1) if number in numbers)

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
        generation = self._queue(request) if request.beams is None else self._search(request, request.beams)
        self._empty.clear()
        self._metrics.count("tgi_request_count")
        self._metrics.observe("tgi_request_input_length", len(request.prompt))
        self._metrics.observe("tgi_request_max_new_tokens", request.max_new_tokens)
        return generation

    def _queue(self, request: Request, *, is_part: bool = False) -> Generation:
        sequence = self._scheduler.add(request)
        generation = Generation(request, self._cancel)
        text = OutputText(self._tokenizer, request.prompt, request.stop, request.keep_stop)
        self._runs[sequence] = _Run(generation, text, is_part=is_part)
        self._sequences[generation] = sequence
        self.wake()
        return generation

    def _search(self, request: Request, beams: BeamSettings) -> Generation:
        generation = BeamGeneration(request, beams, self._queue_part, self._tokenizer, self._end_search)
        self._num_searches += 1
        return generation

    def _queue_part(self, request: Request) -> Generation:
        """What a search that runs already needs is queued in a shutdown too. Raises `NotReady` behind its end."""
        if self._is_over:
            raise NotReady(SHUTTING_DOWN)
        return self._queue(request, is_part=True)

    def _end_search(self, generation: Generation, outcome: Finish | RouterError | None) -> None:
        self._num_searches -= 1
        self._note_ended(generation, outcome)
        self._note_idle()

    def _cancel(self, generation: Generation) -> None:
        sequence = self._sequences.get(generation)
        if sequence is None:
            return
        self._scheduler.cancel(sequence)
        generation.drop()
        self._forget(sequence, None)
        self.wake()

    def _forget(self, sequence: Sequence, outcome: Finish | RouterError | None) -> None:
        """Its end is counted; None: its client left."""
        run = self._runs.pop(sequence)
        del self._sequences[run.generation]
        if not run.is_part:
            self._note_ended(run.generation, outcome)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._runs and not self._num_searches:
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
        self._lost_at = time.monotonic()
        self._metrics.count("shardstream_group_restarts_count")
        for sent in self._sent:
            self._metrics.count("tgi_batch_inference_failure", label=sent.method)
        self._sent.clear()
        self._pace = Pace()
        self._publish(self._scheduler.reset(self._scheduler.limits, died=True))

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
        self._away_s = time.monotonic() - self._lost_at
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
            plan = self._scheduler.plan(self._pace.max_prompt_tokens, self._pace.max_repeats)
            planned_s = time.perf_counter() - begun_at
            if plan is None:
                return
            self._note_plan(plan)
            await self._client.send(plan, self._settings.step_timeout_s)
            self._metrics.count("shardstream_router_step_seconds_sum", planned_s + self._client.codec_s - codec_s)

    def _note_plan(self, plan: StepPlan) -> None:
        sent = _Sent(time.monotonic(), plan.num_tokens, _method(plan), joined=0 < len(plan.opens) < len(plan.rows))
        self._sent.extend(repeat(sent, plan.num_steps))
        self._metrics.count("tgi_batch_inference_count", plan.num_steps, sent.method)
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
        self._supervisor.note_served()
        self._publish(emissions)
        meters, commit_s = self._meters[sent.method], committed_at - begun_at
        meters.commit.observe(commit_s)
        meters.host_s.value += commit_s + self._client.codec_s - codec_s
        meters.publish_s.value += time.perf_counter() - committed_at

    def _note_output(self, sent: _Sent, timings: Timings) -> None:
        now = time.monotonic()
        step_s = now - max(sent.at, self._returned_at)
        self._returned_at = now
        self._pace.note(step_s, sent.num_tokens, timings.forward_us * 1e-6)
        self._meters[sent.method].note(step_s, timings)
        if sent.joined:
            self._metrics.observe("tgi_batch_concat_duration", timings.inputs_us * 1e-6, "decode")

    def _publish(self, emissions: Iterable[Emission]) -> None:
        """Turns what the scheduler committed into events. Never awaits, never raises: a sequence fails alone."""
        for emission in emissions:
            try:
                self._publish_events(emission)
            except Exception:
                logger.exception("a token could not be published")
                if emission.sequence in self._runs:
                    self._scheduler.cancel(emission.sequence)
                    self._fail(emission.sequence, GenerationFailed("a token of it could not be told"))

    def _publish_events(self, emission: Emission) -> None:
        sequence = emission.sequence
        run = self._runs[sequence]
        if emission.prompt_logprobs:
            run.prompt_logprobs += emission.prompt_logprobs
            run.prompt_tops += map(self._top_tokens, emission.prompt_tops)
        if emission.fault is not None:
            self._fail(sequence, GenerationFailed(emission.fault))
            return
        for sampled in emission.tokens:
            reason = emission.finish if sampled is emission.tokens[-1] else None
            if self._publish_token(sequence, run, sampled, reason):
                return

    def _publish_token(self, sequence: Sequence, run: _Run, sampled: SampledToken, reason: FinishReason | None) -> bool:
        """Whether the sequence ended with this token, which its text may decide too."""
        token_id, logprob, likeliest = sampled
        text, is_special, is_stopped = run.text.push(token_id, last=reason is not None)
        if is_stopped and (reason is None or not sequence.request.keep_stop):
            reason = FinishReason.STOP_SEQUENCE  # at the last token allowed, TGI's clients expect `length`
            self._scheduler.finish(sequence, reason)
        run.num_events = index = run.num_events + 1
        finish = None if reason is None else Finish(reason, run.text.text, index)
        top_tokens = self._top_tokens(likeliest) if likeliest else ()
        event = TokenEvent(index, Token(token_id, text, logprob, is_special), top_tokens, finish)
        if index == 1 and sequence.request.prompt_logprobs:
            event = _with_prompt(event, run, has_tops=sequence.request.sampling.prompt_top_n_tokens > 0)
        run.generation.publish(event)
        self._num_published.value += 1
        if finish is None:
            return False
        self._forget(sequence, finish)
        return True

    def _top_tokens(self, top_tokens: TopTokens) -> tuple[Token, ...]:
        tokenizer = self._tokenizer
        return tuple(
            Token(id_, tokenizer.token_text(id_), logprob, tokenizer.is_special(id_)) for id_, logprob in top_tokens
        )

    def _note_ended(self, generation: Generation, outcome: Finish | RouterError | None) -> None:
        count, observe = self._metrics.count, self._metrics.observe
        if outcome is None:
            count("shardstream_cancelled_count")
            count("tgi_request_failure", label="dropped")
        elif isinstance(outcome, RouterError):
            count("tgi_request_failure", label=outcome.error_type or "internal")
            request = generation.request
            logger.warning(
                "Failure request_id=%s trace_id=%s: %s", request.request_id, request.trace_id or None, outcome
            )
        else:
            count("tgi_request_success")
            observe("tgi_request_duration", generation.queue_s + generation.inference_s)
            observe("tgi_request_queue_duration", generation.queue_s)
            observe("tgi_request_inference_duration", generation.inference_s)
            observe("tgi_request_mean_time_per_token_duration", generation.inference_s / outcome.num_generated)
            observe("tgi_request_generated_tokens", outcome.num_generated)

    def _fail(self, sequence: Sequence, error: RouterError) -> None:
        """Never raises either."""
        try:
            self._runs[sequence].generation.fail(error)
        except Exception:
            logger.exception("a failure could not be told")
        self._forget(sequence, error)

    def refuse(self, cause: str) -> None:
        """From now on every submit raises `NotReady`."""
        self._refusal = cause

    def fail_all(self, cause: str) -> None:
        """Ends every sequence with `NotReady`, for good."""
        self._is_over = True
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


def _with_prompt(event: TokenEvent, run: _Run, *, has_tops: bool) -> TokenEvent:
    tops = tuple(run.prompt_tops) if has_tops else ()
    return event._replace(prompt_logprobs=tuple(run.prompt_logprobs), prompt_tops=tops)


def _method(plan: StepPlan) -> str:
    """TGI's label: a step with prompt tokens in it is a prefill."""
    return "prefill" if plan.has_prompts else "decode"


class Pace:
    """How long steps take, and what follows from it.

    How long one may take before the group counts as hung: twenty times the usual step or four times the usual time per
    token, whichever is longer. A long prompt after many short steps must not look like a hang. Before anything is known
    the configured limit holds.

    How many tokens of prompts a step may have in which others wait for their next token: as many as take `MAX_STALL_S`.

    How many steps may repeat another without a plan of their own: as many as take `MAX_REPEATED_S`.
    """

    def __init__(self) -> None:
        self._step_s: float | None = None
        self._token_s = 0.0
        self._prompt_token_s: float | None = None

    def note(self, step_s: float, num_tokens: int, forward_s: float) -> None:
        """`step_s` from when it could begin to its output, `forward_s` of that in the model."""
        self._step_s = step_s if self._step_s is None else 0.9 * self._step_s + 0.1 * step_s
        self._token_s = max(step_s / max(1, num_tokens), 0.99 * self._token_s)
        if num_tokens >= MIN_CHUNK_TOKENS:
            token_s = forward_s / num_tokens
            known_s = self._prompt_token_s
            self._prompt_token_s = token_s if known_s is None else 0.8 * known_s + 0.2 * token_s

    @property
    def max_prompt_tokens(self) -> int | None:
        """None: not known yet, or too many to be of any use."""
        if not self._prompt_token_s:
            return None
        return max(MIN_CHUNK_TOKENS, int(MAX_STALL_S / self._prompt_token_s))

    @property
    def max_repeats(self) -> int:
        if not self._step_s:
            return 0
        return min(MAX_REPEATS, int(MAX_REPEATED_S / self._step_s))

    def deadline_s(self, num_tokens: int, limit_s: float) -> float:
        """Seconds to wait for a step of `num_tokens`."""
        if self._step_s is None:
            return limit_s
        expected_s = max(20.0 * self._step_s, 4.0 * self._token_s * num_tokens)
        return min(limit_s, max(MIN_DEADLINE_S, expected_s))
