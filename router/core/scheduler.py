"""Which sequences take part in the next step, with which tokens and blocks, and what the answer means for them.

The scheduler is pure: requests and answers in, plans and emissions out; no clock, no I/O, no chance. Its whole rule is

    a running sequence feeds n = min(len(tokens) + num_in_flight - num_planned, budget) tokens; those already known
    travel as literals, and the row emits if it reaches the end of that range.

Prefill, chunked prefill, decode, prefix hits, recompute after a preemption and replay after a crash are all this rule
with other numbers. With a plan outstanding, the token being sampled is counted but not known: the next row carries no
literal and the shard feeds what it sampled itself. How many plans are outstanding is the caller's choice.

Plans run in the order they were sent, so a block or a seat that is given back now may be given away in the very next
plan: whatever earlier plans still write there happens before. The one thing this does not cover is a sequence that
comes back with a token still on the device, and so nothing is preempted while a plan is outstanding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from router.core.blocks import BlockPool
from router.core.line import Line
from router.core.plan import Open, Row, RowOutput, SampledToken, StepOutput, StepPlan, TopTokens
from router.core.prefix import PrefixHasher
from router.core.request import FinishReason, Request, Sequence, SequenceState

NUM_DEATHS_BEFORE_PROBATION: Final = 2
POISON_FAULT: Final = "the shards died each time they worked on it"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a group can hold, as agreed at connect. Block 0 is padding's, so `num_blocks - 1` can be used.

    `max_step_tokens` bounds the tokens of all rows of a plan. Sequences that feed one token go first, so it should be
    well above `max_seats`, or prompts wait until seats are empty.
    """

    num_blocks: int
    block_size: int
    max_seats: int
    max_step_tokens: int

    def __post_init__(self) -> None:
        if self.num_blocks < 2 or min(self.block_size, self.max_seats, self.max_step_tokens) < 1:
            raise ValueError(f"nothing can run within {self}")

    @property
    def capacity_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size


class Emission(NamedTuple):
    """What a step gave one sequence. `finish` and `fault` are final; at most one of them is set."""

    sequence: Sequence
    token: SampledToken | None = None
    finish: FinishReason | None = None
    prompt_logprobs: tuple[float, ...] = ()
    """Scores of the next prompt tokens; the first ever received is that of the prompt's second token."""
    fault: str | None = None
    """Why this sequence alone cannot go on, in words for its client."""
    prompt_tops: tuple[TopTokens, ...] = ()
    """The likeliest tokens in those tokens' places, if the request asked for them."""


@dataclass(slots=True)
class Counters:
    """Totals since the scheduler was made; they only grow."""

    num_steps: int = 0
    num_rows: int = 0
    num_fed_tokens: int = 0
    num_emitted_tokens: int = 0
    num_dropped_tokens: int = 0
    """Emitted by rows whose sequence had ended before they came back."""
    num_admissions: int = 0
    num_admitted_tokens: int = 0
    """Known tokens of sequences when admitted; `num_hit_tokens` of them were found in the prefix index."""
    num_hit_tokens: int = 0
    num_preemptions: int = 0
    num_drains: int = 0
    """Times planning stopped until no plan was outstanding, because a sequence would have to be preempted."""
    num_replays: int = 0
    """Sequences that ran when an epoch ended."""
    num_poisoned: int = 0


class _Sent(NamedTuple):
    """A plan that was handed out and has not come back; `sequences` are those of its rows."""

    plan: StepPlan
    sequences: list[Sequence]


@dataclass(slots=True)
class _Draft:
    """A plan being built."""

    budget: int
    opens: list[Open] = field(default_factory=list)
    opened: list[Sequence] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns the queue, the seats and the blocks of one group.

    The caller keeps a pipeline filled: `plan()` while it wants another plan outstanding, `commit()` with each answer,
    in order. `plan()` returning None with nothing outstanding means that there is nothing to do.
    """

    def __init__(self, limits: Limits, *, prefix_seed: bytes = b"", prefix_caching: bool = True) -> None:
        self.counters = Counters()
        self._prefix_seed = prefix_seed
        self._prefix_caching = prefix_caching
        self._waiting = Line()
        self._running = Line()
        self._probation = Line()  # those of them that may have killed the group
        self._num_arrived = 0
        self._begin_epoch(limits)

    def _begin_epoch(self, limits: Limits) -> None:
        self._limits = limits
        self._pool = BlockPool(limits.num_blocks)
        self._hasher = PrefixHasher(self._prefix_seed, limits.block_size) if self._prefix_caching else None
        self._free_seats = list(range(limits.max_seats - 1, -1, -1))
        self._closes: list[int] = []
        self._outstanding: deque[_Sent] = deque()
        self._last_opened: list[Sequence] = []
        self._step = 0

    # What there is to know from outside

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> Iterable[Sequence]:
        """In the order of service."""
        return self._running

    @property
    def last_opened(self) -> Iterable[Sequence]:
        """Sequences that the last plan admitted, in the order of its opens."""
        return self._last_opened

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def utilization(self) -> float:
        """Fraction of KV memory held by running sequences, 0 to 1."""
        return 1.0 - self._pool.num_free / self._pool.num_usable

    @property
    def num_running_tokens(self) -> int:
        """Known tokens of the running sequences."""
        return sum(len(sequence.tokens) for sequence in self._running)

    # The life of a sequence

    def add(self, request: Request) -> Sequence:
        """Queues a sequence for the request. Raises `ValueError` for one that could never run."""
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones: nothing to do"
            )
        sequence = Sequence(request, list(request.prompt), arrival=self._num_arrived)
        if not self._fits_alone(sequence):
            raise ValueError(f"{sequence.max_num_tokens} tokens never fit into {self._limits.capacity_tokens}")
        self._num_arrived += 1
        self._waiting.join(sequence)
        return sequence

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence by a rule. Harmless if it has ended already."""
        if sequence.state is not SequenceState.FINISHED:
            sequence.finish_reason = reason
            self._end(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence because its client left. Harmless if it has ended already."""
        if sequence.state is not SequenceState.FINISHED:
            self._end(sequence)

    def _fits_alone(self, sequence: Sequence) -> bool:
        return sequence.max_num_tokens <= self._limits.capacity_tokens

    def _end(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.RUNNING:
            self._running.leave(sequence)
            self._vacate(sequence)
        else:
            self._waiting.leave(sequence)
        self._acquit(sequence)
        sequence.state = SequenceState.FINISHED

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, at its old place; its tokens will be fed again."""
        assert not self._outstanding, f"preempting with {len(self._outstanding)} plans outstanding"
        self._running.leave(sequence)
        self._vacate(sequence)
        sequence.state = SequenceState.WAITING
        sequence.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._waiting.join(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.seat is not None, f"sequence {sequence.arrival} runs without a seat"
        self._pool.release(sequence.blocks)
        self._free_seats.append(sequence.seat)
        self._closes.append(sequence.seat)
        _forget_place(sequence)

    # Planning

    def plan(self) -> StepPlan | None:
        """Decides the next step. None: there is nothing to send before the next answer or request."""
        suspect = self._probation.first
        if suspect is not None:
            return self._plan_alone(suspect)
        decodes, prompts = self._split_running()
        while self._is_short_of_blocks(decodes):
            if not self._may_preempt():
                return None
            self._preempt(next(reversed(self._running)))
            decodes, prompts = self._split_running()
        draft = _Draft(self._limits.max_step_tokens)
        for sequence in decodes:
            self._add_row(draft, sequence)
        self._add_prompts(draft, prompts)
        return self._send(draft)

    def _split_running(self) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that have one token to feed, as many as the budget allows, and those that have more.

        Left out are those that certainly end with what is in flight: another row would be wasted. Runs over every
        running sequence in every step.
        """
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self._running:
            num_tokens = len(sequence.tokens) + sequence.num_in_flight
            if num_tokens >= sequence.max_num_tokens:
                continue
            (decodes if num_tokens - sequence.num_planned == 1 else prompts).append(sequence)
        return decodes[: self._limits.max_step_tokens], prompts

    def _is_short_of_blocks(self, decodes: list[Sequence]) -> bool:
        """Prompts have all their blocks since they were admitted, so only decodes can ask for more."""
        block_size = self._limits.block_size
        num_needed = sum(sequence.num_planned == len(sequence.blocks) * block_size for sequence in decodes)
        return num_needed > self._pool.num_free

    def _may_preempt(self) -> bool:
        if self._outstanding:
            self.counters.num_drains += 1
        return not self._outstanding

    def _plan_alone(self, suspect: Sequence) -> StepPlan | None:
        """Steps with only the rows of a sequence on probation: if the group dies again, it is to blame, and alone.

        With its next token on the way there is nothing more to plan: either it is acquitted or the group dies.
        """
        if any(sent.sequences != [suspect] for sent in self._outstanding):
            return None
        draft = _Draft(self._limits.max_step_tokens)
        if suspect.state is SequenceState.WAITING:
            while not self._admit(draft, suspect):
                self._preempt(next(reversed(self._running)))
        elif suspect.num_in_flight == 0:
            self._add_row(draft, suspect)
        return self._send(draft)

    def _add_prompts(self, draft: _Draft, prompts: list[Sequence]) -> None:
        """Gives what is left of the budget to prompts, in the order of service, be they admitted already or not.

        A waiting sequence that cannot be admitted holds up those behind it: passing it by would starve large ones.
        """
        upcoming = deque(prompts)
        may_admit = True
        while draft.budget > 0:
            head = self._waiting.first if may_admit else None
            if head is not None and (not upcoming or head.order < upcoming[0].order):
                may_admit = self._admit(draft, head)
            elif upcoming:
                self._add_row(draft, upcoming.popleft())
            else:
                return

    def _admit(self, draft: _Draft, sequence: Sequence) -> bool:
        """Gives a waiting sequence a seat, blocks for all its known tokens and its first row. False: there is no room.

        All blocks at once: two prompts admitted on the strength of their first chunks would meet in the middle, and
        one of them would have been computed for nothing. For the same reason some blocks stay free for the sequences
        that run. When none does, everything is free and the sequence fits.
        """
        if not self._free_seats:
            return False
        hits = self._find_hits(sequence)
        num_new = -(-len(sequence.tokens) // self._limits.block_size) - len(hits)
        num_taken = num_new + sum(self._pool.is_free(block) for block in hits)
        if num_taken + self._num_kept_free() > self._pool.num_free:
            return False
        self._pool.share(hits)
        new_blocks = [self._pool.take() for _ in range(num_new)]
        self._seat(draft, sequence, hits)
        self._add_row(draft, sequence, new_blocks)
        return True

    def _num_kept_free(self) -> int:
        """A block for the growth of each running sequence, but not a large part of memory where blocks are large.

        With memory for a third of the seats and long generations this halves the preemptions and saves a sixth of the
        tokens fed, for one or two steps more in a hundred.
        """
        return min(len(self._running), self._pool.num_usable // 20)

    def _seat(self, draft: _Draft, sequence: Sequence, hits: list[int]) -> None:
        self._waiting.leave(sequence)
        self._running.join(sequence)
        num_cached = len(hits) * self._limits.block_size
        sequence.state = SequenceState.RUNNING
        sequence.seat = self._free_seats.pop()
        sequence.blocks = list(hits)
        sequence.num_planned = num_cached
        sequence.num_registered_blocks = len(hits)
        if sequence.num_admissions == 0:
            sequence.num_hit_tokens = num_cached
        sequence.num_admissions += 1
        self.counters.num_admissions += 1
        self.counters.num_admitted_tokens += len(sequence.tokens)
        self.counters.num_hit_tokens += num_cached
        sampling = sequence.request.sampling
        history = sequence.tokens[:num_cached] if sampling.looks_back else []
        draft.opened.append(sequence)
        draft.opens.append(Open(sequence.seat, hits, num_cached, sequence.num_prompt_tokens, sampling, history))

    def _add_row(self, draft: _Draft, sequence: Sequence, new_blocks: list[int] | None = None) -> None:
        """The planning rule, for one sequence. `new_blocks` are given by an admission; else one is taken if needed."""
        assert sequence.seat is not None, f"sequence {sequence.arrival} is planned without a seat"
        tokens, start = sequence.tokens, sequence.num_planned
        if new_blocks is None:
            is_full = start == len(sequence.blocks) * self._limits.block_size
            new_blocks = [self._pool.take()] if is_full else []
        sequence.blocks += new_blocks
        num_tokens = len(tokens) + sequence.num_in_flight
        end = min(num_tokens, start + draft.budget)
        targets: list[int] = []
        if sequence.request.prompt_logprobs:
            end, targets = _scored_part(sequence, start, end)
        emit = end == num_tokens
        draft.rows.append(Row(sequence.seat, end - start, tokens[start:end], new_blocks, emit, targets))
        draft.sequences.append(sequence)
        draft.budget -= end - start
        sequence.num_planned = end
        sequence.num_in_flight += emit
        self._register_blocks(sequence)

    def _send(self, draft: _Draft) -> StepPlan | None:
        """Closes wait for a plan with rows: a seat nobody feeds costs nothing."""
        if not draft.rows:
            return None
        self._step += 1
        plan = StepPlan(self._step, self._closes, draft.opens, draft.rows)
        self._closes = []
        self._last_opened = draft.opened
        self._outstanding.append(_Sent(plan, draft.sequences))
        self.counters.num_steps += 1
        self.counters.num_rows += len(draft.rows)
        self.counters.num_fed_tokens += self._limits.max_step_tokens - draft.budget
        return plan

    # The prefix index

    def _find_hits(self, sequence: Sequence) -> list[int]:
        """The longest run of leading blocks that are in memory. At least one token is left to feed, or nothing would
        be emitted; and a prompt whose tokens are to be scored has to feed those it has no score of."""
        if self._hasher is None:
            return []
        max_tokens = len(sequence.tokens) - 1
        if sequence.request.prompt_logprobs and sequence.num_prompt_scored < sequence.num_prompt_tokens - 1:
            max_tokens = sequence.num_prompt_scored
        hits: list[int] = []
        for index in range(max_tokens // self._limits.block_size):
            block = self._pool.find(self._block_key(sequence, index, self._hasher))
            if block is None:
                break
            hits.append(block)
        return hits

    def _register_blocks(self, sequence: Sequence) -> None:
        """Names the blocks that are full of known tokens and whose KV is written by a plan already made.

        So a prompt can be hit by the next sequence of the same plan: in a step, all rows write before any row reads.
        """
        if self._hasher is None:
            return
        num_full = min(sequence.num_planned, len(sequence.tokens)) // self._limits.block_size
        while sequence.num_registered_blocks < num_full:
            index = sequence.num_registered_blocks
            self._pool.register(sequence.blocks[index], self._block_key(sequence, index, self._hasher))
            sequence.num_registered_blocks += 1

    def _block_key(self, sequence: Sequence, index: int, hasher: PrefixHasher) -> bytes:
        if index == len(sequence.block_keys):
            hasher.extend(sequence.block_keys, sequence.tokens, sequence.request.cache_salt)
        return sequence.block_keys[index]

    # Answers

    def commit(self, output: StepOutput) -> list[Emission]:
        """Takes the answer to the oldest outstanding plan. What comes for a sequence that has ended is dropped."""
        plan, sequences = self._outstanding.popleft()
        assert output.step == plan.step, f"step {output.step} came back instead of {plan.step}"
        emissions: list[Emission] = []
        for sequence, row, answer in zip(sequences, plan.rows, output.rows, strict=True):
            if sequence.state is SequenceState.FINISHED:
                self.counters.num_dropped_tokens += len(answer.tokens)
                continue
            sequence.num_in_flight -= row.emit
            emission = self._commit_row(sequence, answer)
            if emission is not None:
                emissions.append(emission)
        return emissions

    def _commit_row(self, sequence: Sequence, answer: RowOutput) -> Emission | None:
        if answer.fault is not None:
            return self._fail(sequence, answer.fault)
        scores = answer.target_logprobs
        sequence.num_prompt_scored += len(scores)
        if not answer.tokens:
            return Emission(sequence, prompt_logprobs=scores, prompt_tops=answer.target_tops) if scores else None
        (token,) = answer.tokens
        sequence.tokens.append(token.token_id)
        self.counters.num_emitted_tokens += 1
        if sequence.num_deaths:
            self._acquit(sequence)
        self._register_blocks(sequence)
        finish = _finish_reason(sequence)
        if finish is not None:
            self.finish(sequence, finish)
        return Emission(sequence, token, finish, scores, prompt_tops=answer.target_tops)

    def _fail(self, sequence: Sequence, fault: str) -> Emission:
        """Ends a sequence whose row failed. Its blocks may hold what made it fail, so nobody may find them again."""
        self._pool.forget(sequence.blocks)
        self._end(sequence)
        return Emission(sequence, fault=fault)

    # Deaths

    def reset(self, limits: Limits, *, died: bool) -> list[Emission]:
        """Begins a new epoch: nothing is planned any more and everything that ran waits again, in its old place.

        `died` tells a death of the group from a reconnect that nobody is to blame for. A sequence that was in flight
        at two deaths in a row, without a token in between, is on probation: it is planned alone until it emits a
        token. If the group dies even then, the sequence is what kills it. Returns the ends of such sequences, and of
        those that no longer fit.
        """
        culprits = self._blame() if died else []
        for sequence in self._running:
            _forget_place(sequence)
            sequence.num_in_flight = 0
            sequence.state = SequenceState.WAITING
            self._waiting.join(sequence)
        self.counters.num_replays += len(self._running)
        self._running = Line()
        if limits.block_size != self._limits.block_size:
            for sequence in self._waiting:
                sequence.block_keys.clear()
        self._begin_epoch(limits)
        too_large = [s for s in self._waiting if s not in culprits and not self._fits_alone(s)]
        no_room = f"its tokens no longer fit into {limits.capacity_tokens}"
        self.counters.num_poisoned += len(culprits)
        return [
            *(self._expel(sequence, POISON_FAULT) for sequence in culprits),
            *(self._expel(sequence, no_room) for sequence in too_large),
        ]

    def _blame(self) -> list[Sequence]:
        """Counts a death against every sequence that was in flight; returns those that died alone on probation."""
        in_flight = {s.arrival: s for sent in self._outstanding for s in sent.sequences}
        suspects = [s for s in in_flight.values() if s.state is SequenceState.RUNNING]
        culprits = [s for s in suspects if s.num_deaths >= NUM_DEATHS_BEFORE_PROBATION]
        for sequence in suspects:
            sequence.num_deaths += 1
            if sequence.num_deaths == NUM_DEATHS_BEFORE_PROBATION:
                self._probation.join(sequence)
        return culprits

    def _acquit(self, sequence: Sequence) -> None:
        if sequence.num_deaths >= NUM_DEATHS_BEFORE_PROBATION:
            self._probation.leave(sequence)
        sequence.num_deaths = 0

    def _expel(self, sequence: Sequence, fault: str) -> Emission:
        self._end(sequence)
        return Emission(sequence, fault=fault)

    # Self-check

    def check_empty(self) -> None:
        """When no sequence is left nothing may be held. Raises `AssertionError` if something is; costs nothing."""
        held = (len(self._running), len(self._waiting), self._pool.num_usable - self._pool.num_free)
        assert held == (0, 0, 0), f"{held} running, waiting and blocks are left of no sequence"
        assert len(self._free_seats) == self._limits.max_seats, f"{len(self._free_seats)} seats are free"

    def check_integrity(self) -> None:
        """Raises `AssertionError` if blocks, seats or states do not add up. Looks at each one: milliseconds."""
        self._pool.check_integrity(sequence.blocks for sequence in self._running)
        seats = [sequence.seat for sequence in self._running]
        assert sorted([*self._free_seats, *(seat for seat in seats if seat is not None)]) == list(
            range(self._limits.max_seats)
        ), f"seats {seats} are taken, {self._free_seats} are free"
        for sequence in self._running:
            _check_running(sequence, self._limits.block_size)
        for sequence in self._waiting:
            held = (sequence.seat, sequence.blocks, sequence.num_planned, sequence.num_in_flight)
            assert held == (None, [], 0, 0), f"waiting sequence {sequence.arrival} holds {held}"
            assert sequence.state is SequenceState.WAITING, f"{sequence.state} among the waiting"
        if not self._outstanding:
            in_flight = [sequence.arrival for sequence in self._running if sequence.num_in_flight]
            assert not in_flight, f"{in_flight} are in flight, but no plan is outstanding"


def _forget_place(sequence: Sequence) -> None:
    """Of a sequence without a seat nothing is planned, and it has no blocks."""
    sequence.seat = None
    sequence.blocks = []
    sequence.num_planned = 0
    sequence.num_registered_blocks = 0


def _scored_part(sequence: Sequence, start: int, end: int) -> tuple[int, list[int]]:
    """Where a row from `start` to at most `end` ends, and the prompt tokens to score: those that follow the row's.

    Scored tokens lead their row, so a row that feeds tokens whose successors were scored in an earlier life stops where
    those end.
    """
    num_scored = sequence.num_prompt_scored
    if start >= num_scored:
        return end, sequence.tokens[start + 1 : min(end + 1, sequence.num_prompt_tokens)]
    all_scored = num_scored == sequence.num_prompt_tokens - 1
    return end if all_scored else min(end, num_scored), []


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    if len(sequence.tokens) >= sequence.max_num_tokens:
        return FinishReason.LENGTH
    if sequence.tokens[-1] in sequence.request.eos_token_ids:
        return FinishReason.EOS_TOKEN
    return None


def _check_running(sequence: Sequence, block_size: int) -> None:
    name = f"running sequence {sequence.arrival}"
    assert sequence.state is SequenceState.RUNNING, f"{name} is {sequence.state}"
    num_slots = len(sequence.blocks) * block_size
    assert sequence.num_planned <= num_slots, f"{name}: {sequence.num_planned} tokens planned in {num_slots} slots"
    num_tokens = len(sequence.tokens) + sequence.num_in_flight
    assert sequence.num_planned < num_tokens, f"{name}: {sequence.num_planned} planned of {num_tokens} tokens"
    assert len(sequence.tokens) < sequence.max_num_tokens, f"{name} should have ended"
