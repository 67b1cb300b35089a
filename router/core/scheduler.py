"""Which sequences take part in the next step, with which tokens and blocks, and what the answer means for them.

The scheduler is pure: requests and answers in, plans and emissions out; no clock, no I/O, no chance. Its whole rule is

    a running sequence feeds n = min(len(tokens) + num_in_flight - num_planned, budget) tokens; those already known
    travel as literals, and the row emits if it reaches the end of that range.

Prefill, chunked prefill, decode, prefix hits, recompute after a preemption and replay after a crash are all this rule
with other numbers. With a step outstanding, the token being sampled is counted but not known: the next row carries no
literal and the shard feeds what it sampled itself. How many steps are outstanding is the caller's choice.

Where every row does nothing but that and nobody waits, a plan may stand for several steps, as many as the caller wants.
They count as outstanding one by one, and what is known of a sequence is as if each had had a plan of its own. All their
blocks are taken at once, and so only as long as there are enough of them: nobody is preempted for a repeat.

A grammar may leave one choice for many tokens. The shard then says so ahead of time, and they are known tokens from
that moment on, fed as literals in one row. What they do not have yet is a log-probability, and no token is handed on
without one: a row that was in flight already comes to the first of them as to any other token, and rows that feed them
ask for the scores of those that follow. If they end the sequence, only those scores are waited for.

While few sequences run, a row may also feed guesses at the tokens to come. It samples behind each of them and emits as
many as agree. A guess needs every token before it to be known, and how many it brings is known only when it returns: so
while there are good ones, nothing is planned ahead, for anybody. Sequences that took turns would lose more than that.

Plans run in the order they were sent, so a block or a seat that is given back now may be given away in the very next
plan: whatever earlier plans still write there happens before. The one thing this does not cover is a sequence that
comes back with a token still on the device, and so nothing is preempted while a step is outstanding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat
from typing import Final, NamedTuple

from router.core.blocks import BlockPool
from router.core.line import Line
from router.core.plan import Open, Row, RowOutput, SampledToken, StepOutput, StepPlan, TopTokens
from router.core.prefix import PrefixHasher
from router.core.request import FinishReason, Request, Sequence, SequenceState
from router.core.speculation import Speculation

NUM_DEATHS_BEFORE_PROBATION: Final = 2
MAX_GUESSING_ROWS: Final = 4
"""In a larger batch a row's guesses cost as much as tokens that are certain to be used."""
MAX_OPENS_BYTES: Final = 16 << 20
"""Of all opens of a plan, unless one alone is larger, on the wire, where a message has room for 64 MiB. Many clients
may send their longest lists of forbidden words at once, or share a prefix of a hundred thousand tokens under rules that
look back at it."""
MAX_OPEN_NAMES_BYTES: Final = 1024
"""An open's names and numbers."""
CONTRADICTION_FAULT: Final = "another token came than the grammar had left"
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
    """What a step gave one sequence. `finish` and `fault` are final; at most one of them is set.

    `finish` is that of the last of the tokens.
    """

    sequence: Sequence
    tokens: tuple[SampledToken, ...] = ()
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
    num_forced_tokens: int = 0
    """Of them known before a row came to them."""
    num_dropped_tokens: int = 0
    """Emitted by rows whose sequence had ended before they came back."""
    num_admissions: int = 0
    num_admitted_tokens: int = 0
    """Known tokens of sequences when admitted; `num_hit_tokens` of them were found in the prefix index."""
    num_hit_tokens: int = 0
    num_preemptions: int = 0
    num_drains: int = 0
    """Times planning stopped until no step was outstanding, because a sequence would have to be preempted."""
    num_replays: int = 0
    """Sequences that ran when an epoch ended."""
    num_poisoned: int = 0
    num_rows_by_accepted: list[int] = field(default_factory=list)
    """Of rows with drafts, how many had 0, 1, ... of them accepted."""
    num_skipped_tokens: int = 0
    """Emitted tokens that no row of their own was needed for: accepted drafts and forced ones."""
    num_rows_by_skipped: list[int] = field(default_factory=list)
    """Of rows that emitted several tokens, how many skipped as many as the index says, or, at the last, more."""
    num_drafted_tokens: int = 0


class _Sent(NamedTuple):
    """A step that was handed out and has not come back; `sequences` are those of its plan's rows."""

    step: int
    plan: StepPlan
    sequences: list[Sequence]


@dataclass(slots=True)
class _Draft:
    """A plan being built."""

    budget: int
    num_spare_blocks: int = 0
    """Free ones beyond those that the rows to come need."""
    num_repeats: int = 0
    num_open_bytes: int = 0
    """What the opens take on the wire, at most."""
    has_prompts: bool = False
    has_drafts: bool = False
    opens: list[Open] = field(default_factory=list)
    opened: list[Sequence] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Owns the queue, the seats and the blocks of one group.

    The caller keeps a pipeline filled: `plan()` while it wants another step outstanding, `commit()` with each answer,
    in order. `plan()` returning None with nothing outstanding means that there is nothing to do.
    """

    def __init__(
        self, limits: Limits, *, prefix_seed: bytes = b"", prefix_caching: bool = True, max_drafts: int = 0
    ) -> None:
        self.counters = Counters(
            num_rows_by_accepted=[0] * (max_drafts + 1), num_rows_by_skipped=[0] * (max_drafts + 2)
        )
        self._max_drafts = max_drafts
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
    def waiting(self) -> Iterable[Sequence]:
        """In the order of service."""
        return self._waiting

    @property
    def last_opened(self) -> Iterable[Sequence]:
        """Sequences that the last plan admitted, in the order of its opens."""
        return self._last_opened

    @property
    def num_outstanding(self) -> int:
        """Steps planned whose answer has not come."""
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
        assert not self._outstanding, f"preempting with {len(self._outstanding)} steps outstanding"
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

    def plan(self, max_prompt_tokens: int | None = None, max_repeats: int = 0) -> StepPlan | None:
        """Decides the next step. None: there is nothing to send before the next answer or request.

        `max_prompt_tokens` bounds what prompts and forced runs may feed in a step in which other sequences decode, and
        wait for it. `max_repeats` is how many steps more it may stand for, where it can.
        """
        suspect = self._probation.first
        if suspect is not None:
            return self._plan_alone(suspect)
        if self._outstanding and self._outstanding[-1].plan.has_drafts:
            return None
        decodes, prompts = self._split_running()
        if self._outstanding and any(self._guess(sequence, self._max_drafts) for sequence in self._guessing(decodes)):
            return None
        while (num_spare_blocks := self._num_spare_blocks(decodes)) < 0:
            if not self._may_preempt():
                return None
            self._preempt(next(reversed(self._running)))
            decodes, prompts = self._split_running()
        draft = _Draft(self._limits.max_step_tokens, num_spare_blocks)
        if max_repeats and not prompts:
            draft.num_repeats = self._num_repeats(decodes, max_repeats)
        if max_prompt_tokens is None or not decodes:
            max_prompt_tokens = draft.budget
        max_prompt_tokens -= self._add_decodes(draft, decodes, max_prompt_tokens)
        num_withheld = max(0, draft.budget - max_prompt_tokens)
        draft.budget -= num_withheld
        self._add_prompts(draft, prompts)
        draft.budget += num_withheld
        return self._send(draft)

    def _split_running(self) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that have come to the end of what they were admitted with, and those that have more of it
        to feed.

        Left out are those that certainly end with what is in flight: another row would be wasted. Runs over every
        running sequence in every step.
        """
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self._running:
            if not sequence.num_to_feed:
                continue
            if sequence.num_planned < sequence.num_admitted_tokens - 1:
                prompts.append(sequence)
            else:
                decodes.append(sequence)
        return decodes, prompts

    def _num_spare_blocks(self, decodes: list[Sequence]) -> int:
        """Free blocks that the decodes do not need; below 0: that many are missing. Prompts have all their blocks since
        they were admitted."""
        block_size = self._limits.block_size
        growing = [s for s in decodes if s.num_planned + s.num_to_feed > len(s.blocks) * block_size]
        return self._pool.num_free - sum(self._num_lacking(s, s.num_planned + s.num_to_feed) for s in growing)

    def _num_repeats(self, decodes: list[Sequence], max_repeats: int) -> int:
        """How many steps may repeat one in which only these have rows.

        None, unless each feeds a token that is on the device and nobody may have more to say before the next step: no
        prompts that wait, no grammar that forces tokens, no guesses. And none that would emit behind a sequence's
        certain end, or need blocks beyond those that are free.
        """
        if self._waiting or self._guessing(decodes):
            return 0
        num = max_repeats
        for sequence in decodes:
            if sequence.request.grammar or sequence.num_planned < len(sequence.tokens):
                return 0
            num = min(num, sequence.max_num_tokens - sequence.num_planned - 2)
        num_lacking = sum(self._num_lacking(s, s.num_planned + 1 + num) for s in decodes)
        return num if num_lacking <= self._pool.num_free else 0

    def _num_lacking(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to add to a sequence's table so that it holds so many tokens."""
        block_size = self._limits.block_size
        num_homeless = num_tokens - len(sequence.blocks) * block_size
        return -(-num_homeless // block_size) if num_homeless > 0 else 0

    def _add_decodes(self, draft: _Draft, decodes: list[Sequence], max_run_tokens: int) -> int:
        """A row for each, as far as the budget goes, with drafts where there is something to guess.

        A forced run may be as long as a prompt. Beside others it leaves a token of the budget to each row behind it,
        and all runs together feed at most `max_run_tokens` beyond one per row. Returns how many those are.
        """
        guessing = [] if self._outstanding else self._guessing(decodes)
        num_behind, num_run_tokens = len(decodes), 0
        for sequence in decodes:
            if draft.budget == 0:
                break
            num_behind -= 1
            if sequence.request.grammar and len(decodes) > 1:
                max_more = min(max_run_tokens - num_run_tokens, draft.budget - 1 - num_behind)
                num_run_tokens += self._add_row(draft, sequence, max_tokens=1 + max(0, max_more)) - 1
            else:
                drafts = self._find_drafts(draft, sequence) if sequence in guessing else []
                self._add_row(draft, sequence, drafts=drafts)
        return num_run_tokens

    def _guessing(self, decodes: list[Sequence]) -> list[Sequence]:
        """Those of the rows to come that may have drafts.

        Rules that look back change with every token emitted, and a grammar rules guesses out: those rows have none.
        """
        if not self._max_drafts or len(decodes) > MAX_GUESSING_ROWS:
            return []
        return [s for s in decodes if not (s.request.grammar or s.request.sampling.looks_back)]

    def _find_drafts(self, draft: _Draft, sequence: Sequence) -> list[int]:
        """As many as there is room for. Blocks that others need are not taken."""
        num_tokens = len(sequence.tokens)
        drafts = self._guess(sequence, min(self._max_drafts, draft.budget - sequence.num_to_feed))
        num_lacking = self._num_lacking(sequence, num_tokens)
        num_more_blocks = self._num_lacking(sequence, num_tokens + len(drafts)) - num_lacking
        if num_more_blocks > draft.num_spare_blocks:
            return []
        draft.num_spare_blocks -= num_more_blocks
        return drafts

    def _guess(self, sequence: Sequence, max_drafts: int) -> list[int]:
        """What may follow the known tokens, one less than may come: a row emits a token beyond its drafts."""
        if sequence.speculation is None:
            sequence.speculation = Speculation()
        num_to_come = sequence.max_num_tokens - len(sequence.tokens) - sequence.num_in_flight
        return sequence.speculation.drafts(sequence.tokens, min(max_drafts, num_to_come - 1))

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
        elif suspect.num_in_flight == 0 and suspect.num_to_feed:
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
        num_open_bytes = _open_bytes(sequence, len(hits), self._limits.block_size)
        if draft.opens and draft.num_open_bytes + num_open_bytes > MAX_OPENS_BYTES:
            return False
        draft.num_open_bytes += num_open_bytes
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
        sequence.num_admitted_tokens = len(sequence.tokens)
        if sequence.num_admissions == 0:
            sequence.num_hit_tokens = num_cached
        sequence.num_admissions += 1
        self.counters.num_admissions += 1
        self.counters.num_admitted_tokens += len(sequence.tokens)
        self.counters.num_hit_tokens += num_cached
        request = sequence.request
        history = sequence.tokens[:num_cached] if _needs_history(request) else []
        num_prompt_tokens = sequence.num_prompt_tokens
        draft.opened.append(sequence)
        draft.opens.append(
            Open(
                *(sequence.seat, hits, num_cached, num_prompt_tokens, request.sampling, history, request.grammar),
                *(request.request_id, request.trace_id, request.adapter),
            )
        )

    def _add_row(
        self,
        draft: _Draft,
        sequence: Sequence,
        new_blocks: list[int] | None = None,
        drafts: list[int] | None = None,
        max_tokens: int | None = None,
    ) -> int:
        """The planning rule, for one sequence. `new_blocks` are given by an admission; else those needed are taken.
        Returns how many tokens the row feeds: at most `max_tokens`, if given, instead of all that the budget allows.

        Drafts follow known tokens and nothing else: what is planned ends before them until they have proven right.
        """
        assert sequence.seat is not None, f"sequence {sequence.arrival} is planned without a seat"
        tokens, start = sequence.tokens, sequence.num_planned
        end = start + min(sequence.num_to_feed, draft.budget if max_tokens is None else max_tokens)
        targets: list[int] = []
        if sequence.num_scored < len(tokens):
            end, targets = _scored_part(sequence, start, end)
        literals = tokens[start:end]
        num_fed = end - start
        if drafts:
            literals += drafts
            num_fed += len(drafts)
            sequence.num_drafts = len(drafts)
            draft.has_drafts = True
        if new_blocks is None:
            num_lacking = self._num_lacking(sequence, start + num_fed + draft.num_repeats)
            new_blocks = [self._pool.take() for _ in range(num_lacking)] if num_lacking else []
        sequence.blocks += new_blocks
        emit = end == len(tokens) + sequence.num_in_flight
        draft.rows.append(Row(sequence.seat, num_fed, literals, new_blocks, emit, targets, sequence.num_drafts))
        draft.sequences.append(sequence)
        draft.budget -= num_fed
        draft.has_prompts |= start < sequence.num_admitted_tokens - 1
        sequence.num_planned = end + draft.num_repeats
        sequence.num_in_flight += emit + draft.num_repeats
        self._register_blocks(sequence)
        return num_fed

    def _send(self, draft: _Draft) -> StepPlan | None:
        """Closes wait for a plan with rows: a seat nobody feeds costs nothing."""
        if not draft.rows:
            return None
        num_steps = 1 + draft.num_repeats
        plan = StepPlan(
            *(self._step + 1, self._closes, draft.opens, draft.rows),
            *(draft.has_prompts, draft.has_drafts, draft.num_repeats),
        )
        self._closes = []
        self._last_opened = draft.opened
        for _ in range(num_steps):
            self._step += 1
            self._outstanding.append(_Sent(self._step, plan, draft.sequences))
        self.counters.num_steps += num_steps
        self.counters.num_rows += num_steps * len(draft.rows)
        self.counters.num_fed_tokens += num_steps * (self._limits.max_step_tokens - draft.budget)
        return plan

    # The prefix index

    def _find_hits(self, sequence: Sequence) -> list[int]:
        """The longest run of leading blocks that are in memory. At least one token is left to feed, or nothing would
        be emitted; and the tokens before those that are to be scored have to be fed."""
        if self._hasher is None:
            return []
        hits: list[int] = []
        for index in range((sequence.num_scored - 1) // self._limits.block_size):
            block = self._pool.find(self._block_key(sequence, index, self._hasher))
            if block is None:
                break
            hits.append(block)
        return hits

    def _register_blocks(self, sequence: Sequence) -> None:
        """Names the blocks that are full of known tokens and whose KV is written by a plan already made.

        So a prompt can be hit by the next sequence of the same plan: in a step, all rows write before any row reads.
        """
        block_size = self._limits.block_size
        if self._hasher is None or sequence.num_planned < (sequence.num_registered_blocks + 1) * block_size:
            return  # as in nearly every step
        num_full = min(sequence.num_planned, len(sequence.tokens)) // block_size
        while sequence.num_registered_blocks < num_full:
            index = sequence.num_registered_blocks
            self._pool.register(sequence.blocks[index], self._block_key(sequence, index, self._hasher))
            sequence.num_registered_blocks += 1

    def _block_key(self, sequence: Sequence, index: int, hasher: PrefixHasher) -> bytes:
        if index == len(sequence.block_keys):
            hasher.extend(sequence.block_keys, sequence.tokens, sequence.request.prefix_salt)
        return sequence.block_keys[index]

    # Answers

    def commit(self, output: StepOutput) -> list[Emission]:
        """Takes the answer to the oldest outstanding step. What comes for a sequence that has ended is dropped."""
        step, _, sequences = self._outstanding.popleft()
        assert output.step == step, f"step {output.step} came back instead of {step}"
        emissions: list[Emission] = []
        for sequence, answer in zip(sequences, output.rows, strict=True):
            if sequence.state is SequenceState.FINISHED:
                self.counters.num_dropped_tokens += len(answer.tokens)
                continue
            emission = self._commit_row(sequence, answer)
            if emission is not None:
                emissions.append(emission)
        return emissions

    def _commit_row(self, sequence: Sequence, answer: RowOutput) -> Emission | None:
        if answer.fault is not None:
            return self._fail(sequence, answer.fault)
        tokens, scores, tops = answer.tokens, answer.target_logprobs, answer.target_tops
        if scores and sequence.num_scored >= sequence.num_prompt_tokens:
            tokens, scores, tops = (*_scored_tokens(sequence, scores, tops), *tokens), (), ()
        sequence.num_scored += len(scores)
        if not tokens:
            return Emission(sequence, prompt_logprobs=scores, prompt_tops=tops) if scores else None
        if sequence.num_drafts:
            self._take_drafts(sequence, len(tokens) - 1)
        finish = None
        for num_taken, token in enumerate(tokens, start=1):
            if not self._take_token(sequence, token.token_id):
                return self._fail(sequence, CONTRADICTION_FAULT)
            finish = _finish_reason(sequence)
            if finish is not None and num_taken < len(tokens):
                self.counters.num_dropped_tokens += len(tokens) - num_taken
                tokens = tokens[:num_taken]
                break
        if len(tokens) > 1:
            self._count_skipped(len(tokens) - 1)
        if sequence.num_deaths:
            self._acquit(sequence)
        if finish is None and answer.forced:
            _take_forced(sequence, answer.forced)
        self._register_blocks(sequence)
        if finish is not None:
            self.finish(sequence, finish)
        return Emission(sequence, tokens, finish, scores, prompt_tops=tops)

    def _take_drafts(self, sequence: Sequence, num_accepted: int) -> None:
        """Those that agree with what was sampled are in KV memory; so many tokens more were sampled than planned."""
        sequence.num_planned += num_accepted
        sequence.num_in_flight += num_accepted
        self.counters.num_drafted_tokens += sequence.num_drafts
        self.counters.num_rows_by_accepted[num_accepted] += 1
        sequence.num_drafts = 0

    def _count_skipped(self, num_tokens: int) -> None:
        by_skipped = self.counters.num_rows_by_skipped
        self.counters.num_skipped_tokens += num_tokens
        by_skipped[min(num_tokens, len(by_skipped) - 1)] += 1

    def _take_token(self, sequence: Sequence, token_id: int) -> bool:
        """Counts the next token as scored. False: it was forced, and then another one came."""
        index = sequence.num_scored
        if index == len(sequence.tokens):
            sequence.tokens.append(token_id)
            sequence.num_in_flight -= 1
        else:
            self.counters.num_forced_tokens += 1
            if sequence.tokens[index] != token_id:
                return False
        sequence.num_scored = index + 1
        self.counters.num_emitted_tokens += 1
        return True

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
            assert not in_flight, f"{in_flight} are in flight, but no step is outstanding"


def _needs_history(request: Request) -> bool:
    """Whether a shard has to know tokens that it is not fed."""
    return request.sampling.looks_back or bool(request.grammar)


def _open_bytes(sequence: Sequence, num_hits: int, block_size: int) -> int:
    """No less than the sequence's open takes on the wire: ids of up to five bytes, floats of four."""
    request, sampling = sequence.request, sequence.request.sampling
    num_ids = num_hits + (num_hits * block_size if _needs_history(request) else 0) + len(sampling.logit_bias)
    num_ids += sum(2 + len(run) for run in sampling.bad_words)  # a run has a tag and two lengths
    return MAX_OPEN_NAMES_BYTES + 5 * num_ids + 4 * len(sampling.logit_bias) + 4 * len(request.grammar)


def _forget_place(sequence: Sequence) -> None:
    """Of a sequence without a seat nothing is planned, and it has no blocks."""
    sequence.seat = None
    sequence.blocks = []
    sequence.num_planned = 0
    sequence.num_drafts = 0
    sequence.num_registered_blocks = 0


def _scored_part(sequence: Sequence, start: int, end: int) -> tuple[int, list[int]]:
    """Where a row from `start` to at most `end` ends, and the known tokens to score: those that follow the row's.

    Targets lead their row, so a row that feeds tokens whose successors were scored in an earlier life stops where
    those end.
    """
    last_with_scored_successor = sequence.num_scored - 2
    if start > last_with_scored_successor:
        return end, sequence.tokens[start + 1 : end + 1]
    return min(end, last_with_scored_successor + 1), []


def _scored_tokens(
    sequence: Sequence, logprobs: tuple[float, ...], tops: tuple[TopTokens, ...]
) -> Iterable[SampledToken]:
    """The next forced tokens, with what the model thinks of them."""
    start = sequence.num_scored
    token_ids = sequence.tokens[start : start + len(logprobs)]
    return map(SampledToken, token_ids, logprobs, tops or repeat(()))


def _take_forced(sequence: Sequence, forced: tuple[int, ...]) -> None:
    """Makes tokens known that can only follow the last scored one, up to one that ends the sequence."""
    tokens = sequence.tokens
    num_known = len(tokens)
    for token_id in forced[num_known - sequence.num_scored :]:
        if len(tokens) == sequence.max_num_tokens:
            break
        tokens.append(token_id)
        if token_id in sequence.request.eos_token_ids:
            sequence.max_num_tokens = len(tokens)
    sequence.num_in_flight = max(0, sequence.num_in_flight - (len(tokens) - num_known))


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    num_generated = sequence.num_scored - sequence.num_prompt_tokens
    if num_generated == sequence.request.max_new_tokens:
        return FinishReason.LENGTH
    if sequence.tokens[sequence.num_scored - 1] in sequence.request.eos_token_ids:
        return FinishReason.EOS_TOKEN
    return None


def _check_running(sequence: Sequence, block_size: int) -> None:
    name = f"running sequence {sequence.arrival}"
    assert sequence.state is SequenceState.RUNNING, f"{name} is {sequence.state}"
    num_slots = len(sequence.blocks) * block_size
    assert sequence.num_planned <= num_slots, f"{name}: {sequence.num_planned} tokens planned in {num_slots} slots"
    num_tokens = len(sequence.tokens) + sequence.num_in_flight
    assert sequence.num_planned < num_tokens, f"{name}: {sequence.num_planned} planned of {num_tokens} tokens"
    assert sequence.num_scored < sequence.max_num_tokens, f"{name} should have ended"
    assert sequence.num_scored <= len(sequence.tokens), f"{name}: {sequence.num_scored} scored of {num_tokens} tokens"
