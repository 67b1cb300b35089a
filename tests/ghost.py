"""A shard group without a model, behind the real protobuf interface.

Where a shard keeps keys and values, the ghost keeps which token was written at which position; where a shard runs a
model, the ghost hashes the whole history that the row's block table really shows, together with the sampling it was
given. So a wrong block, position, literal, order of steps or lost sampling state changes the tokens, in microseconds
and without torch. `oracle` says what they must be. A slot that was never written, or holds another position or what
another adapter made, gives `BAD_TOKEN`. Whatever a real shard relies on without checking is checked here: `BrokenPlan`.

`GhostState` is one rank's memory and can be driven directly; `ghost_group` serves whole groups over gRPC, in this
process, with scripted faults; `python -m tests.ghost --uds PATH --rank R --world-size W` is one rank as a process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from proto import shard_pb2 as pb
from proto import shard_pb2_grpc
from router.core.request import Sampling
from tests.clock import Clock, let_time_fly

BAD_TOKEN: Final = 0
"""What a row emits whose history is not what was written; no good token has this id."""
BAD_SCORE: Final = 1.0
"""Its log-probability, which no good token has."""
DEFAULT_VOCAB_SIZE: Final = 97
SERVICE_NAME: Final = "shardstream.v1.Shard"
BYTES_PER_BLOCK: Final = 1024
PR_SET_PDEATHSIG: Final = 1
COPYING_SEED: Final = 2**32
"""Seeds from here on make the ghost repeat itself."""


COPYING: Final = b"copying"
"""How rules begin under such a seed."""


# What the ghost says, as functions of what it sees


def _pack(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def choose(history: Sequence[int], rules: bytes, vocab_size: int) -> int:
    """Under rules that copy, mostly what followed the latest earlier occurrence of the last two tokens."""
    drawn = _hash(rules + _pack(history))
    if rules.startswith(COPYING) and drawn % 8:
        pairs = zip(history, history[1:], history[2:], strict=False)
        followers = [token for *pair, token in pairs if pair == list(history[-2:])]
        if followers:
            return followers[-1]
        return 1 + drawn // 8 % 4
    return 1 + drawn % (vocab_size - 1)


def score(history: Sequence[int], token: int) -> float:
    """The log-probability of a token after the history; a multiple of 1/256, so float32 holds it exactly."""
    return -(_hash(b"score" + _pack([*history, token])) % 4096) / 256


def likeliest(history: Sequence[int], num_tokens: int, vocab_size: int) -> list[tuple[int, float]]:
    first = _hash(b"top" + _pack(history))
    tokens = [(first + i) % vocab_size for i in range(num_tokens)]
    return sorted(((token, score(history, token)) for token in tokens), key=lambda pair: -pair[1])


def make_rules(sampling: pb.Sampling, num_prompt_tokens: int, grammar: str, adapter: int = 0) -> bytes:
    """All that choosing depends on besides the history; whatever is lost of it changes every token."""
    numbers = [num_prompt_tokens, adapter] if adapter else [num_prompt_tokens]
    rules = sampling.SerializeToString(deterministic=True) + _pack(numbers) + grammar.encode()
    return COPYING + rules if sampling.seed >= COPYING_SEED else rules


def forced_run(history: Sequence[int], rules: bytes, grammar: str, vocab_size: int) -> list[int]:
    """What the ghost says ahead of time after the history: under the grammar "force:P/Q", the next few tokens in P of Q
    cases. They are those it would choose one by one, so the oracle need not know."""
    if not grammar:
        return []
    parts, cases = map(int, grammar.removeprefix("force:").split("/"))
    drawn = _hash(b"force" + _pack(history))
    tokens = list(history)
    if drawn % cases < parts:
        for _ in range(1 + drawn // cases % 9):
            tokens.append(choose(tokens, rules, vocab_size))
    return tokens[len(history) :]


def digest_of(token_ids: Sequence[int]) -> int:
    """64 bits of BLAKE2b over the emitted ids, packed as little-endian uint32: what all ranks of a step agree on."""
    return _hash(_pack(token_ids))


# The serial reference


def sampling_message(sampling: Sampling) -> pb.Sampling:
    """Written apart from the router's codec, so that a field the codec forgets is missed."""
    plain = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(sampling)}
    bias, bad_words = plain.pop("logit_bias"), plain.pop("bad_words")
    message = pb.Sampling(**plain)
    for token, value in bias:
        message.bias_token_ids.append(token)
        message.bias_values.append(value)
    for run in bad_words:
        message.bad_words.add(token_ids=run)
    return message


def oracle(
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    eos_token_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    grammar: str = "",
    adapter: int = 0,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> list[int]:
    """The tokens a ghost group must generate, one after the other and alone."""
    rules = make_rules(sampling_message(sampling or Sampling()), len(prompt), grammar, adapter)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(choose(tokens, rules, vocab_size))
        if tokens[-1] in eos_token_ids:
            break
    return tokens[len(prompt) :]


def oracle_prompt_logprobs(prompt: Sequence[int]) -> list[float]:
    """Scores of the prompt's tokens from the second on."""
    return [score(prompt[:i], prompt[i]) for i in range(1, len(prompt))]


# One rank's memory


class BrokenPlan(Exception):
    """A plan that a real shard could not run, or would run wrongly without noticing."""


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise BrokenPlan(complaint)


@dataclass(slots=True)
class _Seat:
    table: list[int]
    num_tokens: int
    num_prompt_tokens: int
    sampling: pb.Sampling
    grammar: str
    rules: bytes
    history: list[int]
    num_hit_tokens: int
    adapter: int
    last: int | None = None
    forced: list[int] = field(default_factory=list)
    """Tokens it promised to emit next, or to be fed with."""
    faulted: bool = False


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the plan, cut out of the columns. `first` is the position of its first token."""

    seat: _Seat
    first: int
    num_tokens: int
    emit: bool
    targets: list[int]
    drafts: list[int]


class GhostState:
    """Runs plans in order. `num_steps` steps were run in this epoch."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_seats: int,
        max_step_tokens: int,
        vocab_size: int = DEFAULT_VOCAB_SIZE,
        num_adapters: int = 0,
    ) -> None:
        self.num_steps = 0
        self.seats: dict[int, _Seat] = {}
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_seats = max_seats
        self._max_step_tokens = max_step_tokens
        self._vocab_size = vocab_size
        self._num_adapters = num_adapters
        self._slots: list[tuple[int, int, int] | None] = [None] * (num_blocks * block_size)
        self._num_tables: Counter[int] = Counter()  # how many open seats have a block in their table

    def run_steps(self, plan: pb.StepPlan) -> list[pb.StepOutput]:
        """The plan's first step and those that repeat it. Raises `BrokenPlan`."""
        return [self.run(step) for step in steps_of(plan)]

    def run(self, plan: pb.StepPlan, *, fault_rows: Iterable[int] = ()) -> pb.StepOutput:
        """Closes, opens, writes of all rows, then what each row sees. Raises `BrokenPlan`."""
        _require(plan.step == self.num_steps + 1, f"step {plan.step} after {self.num_steps}")
        self.num_steps += 1
        _check_repeats(plan)
        for seat in plan.closes:
            self._close(seat)
        self._check_new_blocks(list(plan.new_blocks))
        for open_ in plan.opens:
            self._open(open_)
        rows = self._write_rows(plan)
        for index in fault_rows:
            rows[index].seat.faulted = True
        output = pb.StepOutput(step=plan.step)
        forced = [self._answer_row(output, index, row) for index, row in enumerate(rows)]
        if any(forced):
            output.row_num_forced.extend(map(len, forced))
            output.forced_token_ids.extend(chain.from_iterable(forced))
        output.digest = digest_of(output.token_ids)
        return output

    def _close(self, number: int) -> None:
        _require(number in self.seats, f"seat {number} is closed but not open")
        self._num_tables.subtract(self.seats.pop(number).table)

    def _open(self, open_: pb.Open) -> None:
        _require(open_.seat < self._max_seats, f"seat {open_.seat} of {self._max_seats}")
        _require(open_.seat not in self.seats, f"seat {open_.seat} is opened twice")
        num_cached, blocks = open_.num_cached_tokens, list(open_.blocks)
        _require(num_cached == len(blocks) * self._block_size, f"{num_cached} cached tokens in {len(blocks)} blocks")
        _require(open_.num_prompt_tokens > 0, "a sequence without a prompt")
        num_history = num_cached if _looks_back(open_.sampling) or open_.grammar else 0
        _require(len(open_.history) == num_history, f"{len(open_.history)} tokens of history, expected {num_history}")
        self._check_blocks(blocks)
        self._num_tables.update(blocks)
        _require(open_.adapter <= self._num_adapters, f"adapter {open_.adapter} of {self._num_adapters}")
        rules = make_rules(open_.sampling, open_.num_prompt_tokens, open_.grammar, open_.adapter)
        self.seats[open_.seat] = _Seat(
            blocks,
            num_cached,
            open_.num_prompt_tokens,
            open_.sampling,
            open_.grammar,
            rules,
            list(open_.history),
            num_cached,
            open_.adapter,
        )

    def _check_new_blocks(self, blocks: list[int]) -> None:
        """Before the opens, because a hit may be on a block that another row of this plan is about to fill."""
        self._check_blocks(blocks)
        owned = [b for b in blocks if self._num_tables[b] > 0]
        _require(not owned, f"blocks {owned} are new to a table but in another")

    def _check_blocks(self, blocks: list[int]) -> None:
        _require(all(0 < b < self._num_blocks for b in blocks), f"blocks {blocks} of {self._num_blocks}")
        _require(len(dict.fromkeys(blocks)) == len(blocks), f"a block twice in {blocks}")

    def _write_rows(self, plan: pb.StepPlan) -> list[_Row]:
        num_rows = len(plan.row_seat)
        columns = (
            plan.row_num_tokens, plan.row_num_literals, plan.row_num_new_blocks, plan.row_emit, plan.row_num_targets
        )  # fmt: skip
        _require(num_rows > 0, "a plan without rows")
        _require(all(len(column) == num_rows for column in columns), "columns of unequal length")
        num_drafts = list(plan.row_num_drafts) or [0] * num_rows
        _require(len(num_drafts) == num_rows, "drafts of other rows")
        _require(len(dict.fromkeys(plan.row_seat)) == num_rows, "two rows of one seat")
        num_tokens = sum(plan.row_num_tokens)
        _require(num_tokens <= self._max_step_tokens, f"{num_tokens} tokens, at most {self._max_step_tokens}")
        literals, new_blocks, targets = iter(plan.literals), iter(plan.new_blocks), iter(plan.targets)
        rows = [
            self._write_row(
                number,
                num_tokens,
                list(islice(literals, num_literals)),
                list(islice(new_blocks, num_new_blocks)),
                emit,
                list(islice(targets, num_targets)),
                drafts,
            )
            for number, num_tokens, num_literals, num_new_blocks, emit, num_targets, drafts in zip(
                plan.row_seat, *columns, num_drafts, strict=True
            )
        ]
        rest = [*literals, *new_blocks, *targets]
        _require(not rest, f"{len(rest)} entries too many in the ragged columns")
        return rows

    def _write_row(
        self,
        number: int,
        num_tokens: int,
        literals: list[int],
        new_blocks: list[int],
        emit: bool,
        targets: list[int],
        num_drafts: int,
    ) -> _Row:
        _require(number in self.seats, f"a row of seat {number}, which is not open")
        seat = self.seats[number]
        seat.table += new_blocks
        self._num_tables.update(new_blocks)
        first, end = seat.num_tokens, seat.num_tokens + num_tokens
        _require(num_tokens > 0, f"an empty row of seat {number}")
        _require(end <= len(seat.table) * self._block_size, f"{end} tokens in a table of {len(seat.table)} blocks")
        _require(len(literals) in (0, num_tokens), f"{len(literals)} literals for {num_tokens} tokens")
        for position, token in enumerate(literals or self._last_token(seat, num_tokens), start=first):
            _require(token < self._vocab_size, f"token {token} in a vocabulary of {self._vocab_size}")
            self._slots[self._slot(seat, position)] = (token, position, seat.adapter)
        known, drafts = literals[: len(literals) - num_drafts], literals[len(literals) - num_drafts :]
        if drafts:
            _check_drafts(seat, known, emit)
        if known and not seat.faulted:
            _keep_promise(seat, known)
        seat.num_tokens = end
        _check_targets(seat, first, known, targets)
        return _Row(seat, first, num_tokens, emit, targets, drafts)

    def _last_token(self, seat: _Seat, num_tokens: int) -> list[int]:
        _require(num_tokens == 1, f"{num_tokens} tokens without literals")
        if seat.faulted:
            return [BAD_TOKEN]  # rows planned before the router heard of the fault; nobody looks at them
        _require(seat.last is not None, "a row without literals before anything was sampled")
        assert seat.last is not None
        return [seat.last]

    def _slot(self, seat: _Seat, position: int) -> int:
        return seat.table[position // self._block_size] * self._block_size + position % self._block_size

    def _answer_row(self, output: pb.StepOutput, index: int, row: _Row) -> list[int]:
        """Returns the tokens it promises."""
        seat = row.seat
        history = self._see(seat, row.first + row.num_tokens)
        if history is not None and seat.history:
            _require(seat.history == history[: seat.num_hit_tokens], "the history is not what the hit blocks hold")
        for position, target in enumerate(row.targets, start=row.first + 1):
            output.target_logprobs.append(BAD_SCORE if history is None else score(history[:position], target))
            is_prompt = position < seat.num_prompt_tokens
            num_tops = seat.sampling.prompt_top_n_tokens if is_prompt else seat.sampling.top_n_tokens
            tops = likeliest((history or [])[:position], num_tops, self._vocab_size)
            output.target_num_top.append(len(tops))
            output.target_top_token_ids.extend(token for token, _ in tops)
            output.target_top_logprobs.extend(logprob for _, logprob in tops)
        if seat.faulted:
            output.row_num_emitted.append(0)
            output.row_faults.add(row=index, message=f"row {index} failed")
            return []
        if row.drafts:
            self._verify(output, row)
            return []
        output.row_num_emitted.append(int(row.emit))
        return self._emit(output, seat, history) if row.emit else []

    def _verify(self, output: pb.StepOutput, row: _Row) -> None:
        """Emits behind the last known token and behind each draft that was right; forgets the others."""
        seat, num_known = row.seat, row.first + row.num_tokens - len(row.drafts)
        num_right = 0
        self._emit(output, seat, self._see(seat, num_known))
        while num_right < len(row.drafts) and seat.last == row.drafts[num_right]:
            num_right += 1
            self._emit(output, seat, self._see(seat, num_known + num_right))
        seat.num_tokens = num_known + num_right
        output.row_num_emitted.append(1 + num_right)

    def _see(self, seat: _Seat, num_tokens: int) -> list[int] | None:
        """The tokens that the table shows from the start to here; None if any slot is not what it should be."""
        size = self._block_size
        shown = [slot for block in seat.table for slot in self._slots[block * size : (block + 1) * size]][:num_tokens]
        history = [
            slot[0] for position, slot in enumerate(shown) if slot is not None and slot[1:] == (position, seat.adapter)
        ]
        return history if len(history) == num_tokens else None

    def _emit(self, output: pb.StepOutput, seat: _Seat, history: list[int] | None) -> list[int]:
        token = BAD_TOKEN if history is None else choose(history, seat.rules, self._vocab_size)
        seat.last = token
        output.token_ids.append(token)
        output.logprobs.append(BAD_SCORE if history is None else score(history, token))
        tops = likeliest(history or [], seat.sampling.top_n_tokens, self._vocab_size)
        output.num_top.append(len(tops))
        output.top_token_ids.extend(token for token, _ in tops)
        output.top_logprobs.extend(logprob for _, logprob in tops)
        return self._promise(seat, [*(history or []), token])

    def _promise(self, seat: _Seat, history: list[int]) -> list[int]:
        """Once in a while, says what will follow; not again before that has come."""
        if seat.forced:
            _require(history[-1] == seat.forced.pop(0), "another token was emitted than was promised")
            return []
        seat.forced = forced_run(history, seat.rules, seat.grammar, self._vocab_size)
        return list(seat.forced)


def steps_of(plan: pb.StepPlan) -> list[pb.StepPlan]:
    """A plan, and one for each of its repeats."""
    num_rows = len(plan.row_seat)
    repeats = [
        pb.StepPlan(
            step=plan.step + repeat,
            row_seat=plan.row_seat,
            row_num_tokens=[1] * num_rows,
            row_num_literals=[0] * num_rows,
            row_num_new_blocks=[0] * num_rows,
            row_emit=[True] * num_rows,
            row_num_targets=[0] * num_rows,
        )
        for repeat in range(1, 1 + plan.num_repeats)
    ]
    return [plan, *repeats]


def _check_repeats(plan: pb.StepPlan) -> None:
    if plan.num_repeats:
        ones = [1] * len(plan.row_seat)
        _require(plan.row_num_tokens == plan.row_emit == ones, "a repeated row that does not feed and emit one token")
        _require(not (plan.targets or plan.row_num_drafts), "a repeated row with targets or drafts")


def _looks_back(sampling: pb.Sampling) -> bool:
    neutral = pb.Sampling(repetition_penalty=1.0)
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty", "watermark_delta", "no_repeat_ngram_size")
    return any(getattr(sampling, n) != getattr(neutral, n) for n in names) or bool(sampling.bad_words)


def _keep_promise(seat: _Seat, literals: list[int]) -> None:
    """Literals go on where the seat is: with the last sampled token, if that was not fed, and then with forced ones."""
    known = [*([] if seat.last is None else [seat.last]), *seat.forced]
    _require(not known or literals == known[: len(literals)], f"literals {literals}, but {known} were to come")
    seat.forced = known[len(literals) :]
    seat.last = None


def _check_drafts(seat: _Seat, known: list[int], emit: bool) -> None:
    _require(bool(known) and emit, "drafts behind nothing, or in a row that does not emit")
    _require(not (seat.grammar or _looks_back(seat.sampling)), "drafts under rules that change with every token")


def _check_targets(seat: _Seat, first: int, literals: list[int], targets: list[int]) -> None:
    if not targets:
        return
    _require(len(targets) <= len(literals), f"{len(targets)} targets for {len(literals)} literals")
    is_prompt = first + len(targets) < seat.num_prompt_tokens
    _require(is_prompt or bool(seat.grammar), "a target behind the prompt that nothing forced")
    known = literals[1 : 1 + len(targets)]
    _require(targets[: len(known)] == known, f"targets {targets} do not follow the literals {literals}")


# One rank behind gRPC


class FaultKind(Enum):
    """What goes wrong at a step."""

    DELAY = "delay"  # answers `delay_s` late
    DROP = "drop"  # never answers this step; who waits for it need not wait long: time flies
    DUPLICATE = "duplicate"  # answers it twice
    DIE = "die"  # the process is gone: the stream breaks and the address refuses, until `revive`
    GIVE_UP = "give_up"  # says why, then dies
    HANG = "hang"  # reads and answers nothing any more, as time flies
    GARBAGE_TOKENS = "garbage_tokens"  # token ids outside the vocabulary
    GARBAGE_ROWS = "garbage_rows"  # a row too many
    WRONG_DIGEST = "wrong_digest"  # claims other tokens than it has
    WRONG_STEP = "wrong_step"  # the right tokens under the next step's number
    ROW_FAULT = "row_fault"  # the first row fails alone, on every rank


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong once, the first time the rank comes to the step, in whatever epoch."""

    rank: int
    step: int
    kind: FaultKind
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GhostSettings:
    """What a ghost group pretends to be."""

    world_size: int = 1
    num_blocks: int = 64
    block_size: int = 4
    vocab_size: int = DEFAULT_VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = ()
    max_positions: int = 0
    adapters: tuple[str, ...] = ()
    model_id: str = "ghost"
    step_delay_s: float = 0.0
    poison_token: int | None = None
    """A plan with this literal kills every rank that reads it, each time."""


class GhostShard(shard_pb2_grpc.ShardServicer):  # type: ignore[misc]
    """One rank's life, from a start to a death. `die` is called at most once and must end the process it plays;
    `fall_silent` when somebody waits in vain."""

    def __init__(
        self,
        settings: GhostSettings,
        rank: int,
        faults: list[Fault],
        die: Callable[[], None],
        fall_silent: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._rank = rank
        self._faults = faults
        self._die = die
        self._fall_silent = fall_silent
        self._epoch = 0
        self._is_executing = False
        self._state: GhostState | None = None

    async def Describe(self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext) -> pb.ShardInfo:
        settings = self._settings
        return pb.ShardInfo(
            rank=self._rank,
            world_size=settings.world_size,
            model_id=settings.model_id,
            model_type="ghost",
            dtype="float32",
            device="cpu",
            vocab_size=settings.vocab_size,
            eos_token_ids=settings.eos_token_ids,
            max_positions=settings.max_positions,
            block_size=settings.block_size,
            bytes_per_block=BYTES_PER_BLOCK,
            kv_budget_bytes=settings.num_blocks * BYTES_PER_BLOCK,
            last_epoch=self._epoch,
            adapters=settings.adapters,
        )

    async def Configure(self, request: pb.ConfigureRequest, context: grpc.aio.ServicerContext) -> pb.ConfigureReply:
        if self._is_executing:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another router drives this rank")
        if request.epoch <= self._epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"epoch {request.epoch} is over")
        self._epoch = request.epoch
        self._state = GhostState(
            request.num_blocks,
            request.block_size,
            request.max_seats,
            request.max_step_tokens,
            self._settings.vocab_size,
            len(self._settings.adapters),
        )
        return pb.ConfigureReply(epoch=self._epoch, kv_bytes=request.num_blocks * BYTES_PER_BLOCK)

    async def Execute(
        self, requests: AsyncIterator[pb.ToShard], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.FromShard]:
        try:
            async for message in requests:
                match message.WhichOneof("message"):
                    case "hello" if message.hello.epoch == self._epoch and self._state is not None:
                        self._is_executing = True
                        yield pb.FromShard(welcome=pb.Welcome(epoch=self._epoch))
                    case "plan":
                        for step in steps_of(message.plan):
                            async for answer in self._answer(step):
                                yield answer
                    case "bye":
                        return
                    case _:
                        cause = f"not in epoch {self._epoch}: {message}"
                        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, cause)
        finally:
            self._is_executing = False

    async def _answer(self, plan: pb.StepPlan) -> AsyncIterator[pb.FromShard]:
        if self._settings.step_delay_s:
            await asyncio.sleep(self._settings.step_delay_s)
        fault = self._pop_fault(plan.step)
        kind = fault.kind if fault else None
        if self._settings.poison_token in plan.literals or kind is FaultKind.DIE:
            await self._end()
        assert self._state is not None, "a plan before Configure"
        try:
            output = self._state.run(plan, fault_rows=[0] if kind is FaultKind.ROW_FAULT else [])
        except BrokenPlan as error:
            yield pb.FromShard(fault=pb.Fault(message=f"broken plan: {error}"))
            await self._end()
            return
        if kind in (FaultKind.DROP, FaultKind.HANG):
            self._fall_silent()
        match kind:
            case FaultKind.GIVE_UP:
                yield pb.FromShard(fault=pb.Fault(message=f"rank {self._rank} gives up"))
                await self._end()
            case FaultKind.HANG:
                await asyncio.Event().wait()
            case FaultKind.DELAY if fault is not None:
                await asyncio.sleep(fault.delay_s)
        for _ in range({FaultKind.DROP: 0, FaultKind.DUPLICATE: 2}.get(kind, 1) if kind else 1):
            yield self._wrap(_spoil(output, kind, self._settings.vocab_size))

    def _pop_fault(self, step: int) -> Fault | None:
        for fault in self._faults:
            if fault.step == step:
                self._faults.remove(fault)
                return fault
        return None

    async def _end(self) -> None:
        self._die()
        await asyncio.Event().wait()

    def _wrap(self, output: pb.StepOutput) -> pb.FromShard:
        if self._rank == 0:
            return pb.FromShard(output=output)
        return pb.FromShard(ack=pb.StepAck(step=output.step, digest=output.digest))


def _spoil(output: pb.StepOutput, kind: FaultKind | None, vocab_size: int) -> pb.StepOutput:
    spoilt = pb.StepOutput()
    spoilt.CopyFrom(output)
    if kind is FaultKind.GARBAGE_TOKENS:
        spoilt.token_ids[:] = [vocab_size + 1] * len(spoilt.token_ids)
    elif kind is FaultKind.GARBAGE_ROWS:
        spoilt.row_num_emitted.append(0)
    elif kind is FaultKind.WRONG_DIGEST:
        spoilt.digest ^= 1
    elif kind is FaultKind.WRONG_STEP:
        spoilt.step += 1
    return spoilt


# Groups


async def start_server(shard: GhostShard, address: str) -> grpc.aio.Server:
    """Serves the rank and the standard health service."""
    server = grpc.aio.server()
    shard_pb2_grpc.add_ShardServicer_to_server(shard, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", SERVICE_NAME):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(address)
    await server.start()
    return server


@dataclass(slots=True)
class _Host:
    """The place of one rank: an address at which ranks live one after the other."""

    settings: GhostSettings
    rank: int
    address: str
    faults: list[Fault]
    server: grpc.aio.Server | None = None
    dying: asyncio.Task[None] | None = None
    flying: asyncio.Task[None] | None = None
    """Time, from when the rank falls silent until it is stopped."""
    num_deaths: int = 0

    async def start(self) -> None:
        self.dying = None
        shard = GhostShard(self.settings, self.rank, self.faults, self._die, self._fall_silent)
        self.server = await start_server(shard, self.address)

    def _die(self) -> None:
        self.num_deaths += 1
        self.dying = asyncio.create_task(self.stop())

    def _fall_silent(self) -> None:
        self.flying = asyncio.create_task(let_time_fly(Clock()))

    async def stop(self) -> None:
        if self.flying is not None:
            self.flying.cancel()
        server, self.server = self.server, None
        if server is not None:
            await server.stop(grace=None)


@dataclass(slots=True)
class GhostGroup:
    """A served group: where its ranks listen, and the strings to pull."""

    hosts: list[_Host]
    revive_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def addresses(self) -> list[str]:
        return [host.address for host in self.hosts]

    @property
    def num_deaths(self) -> int:
        """Ranks that died, in all."""
        return sum(host.num_deaths for host in self.hosts)

    def inject(self, fault: Fault) -> None:
        for host in self.hosts:
            if fault.rank == host.rank or fault.kind is FaultKind.ROW_FAULT:
                host.faults.append(fault)

    async def kill(self, rank: int) -> None:
        """SIGKILL, as it were."""
        host = self.hosts[rank]
        host._die()
        assert host.dying is not None
        await host.dying

    async def revive(self) -> None:
        """Ends what is left of the group and starts every rank anew, as a launcher would."""
        async with self.revive_lock:
            for host in self.hosts:
                if host.dying is not None:
                    await host.dying
                await host.stop()
                await host.start()


@contextlib.asynccontextmanager
async def ghost_group(settings: GhostSettings | None = None, faults: Iterable[Fault] = ()) -> AsyncIterator[GhostGroup]:
    """A group of ghosts on Unix sockets in a directory of their own."""
    settings = settings or GhostSettings()
    with tempfile.TemporaryDirectory(prefix="ghost-") as directory:
        hosts = [_Host(settings, r, f"unix:{directory}/rank-{r}", []) for r in range(settings.world_size)]
        group = GhostGroup(hosts)
        for fault in faults:
            group.inject(fault)
        await group.revive()
        try:
            yield group
        finally:
            for host in group.hosts:
                await host.stop()


# One rank as a process


def main(argv: Sequence[str] | None = None) -> None:
    """Takes the flags of a real shard and ignores those that tell of a model."""
    parser = argparse.ArgumentParser(description="A shard without a model.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uds", help="path of the Unix socket")
    where.add_argument("--address", help="gRPC address")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--num-blocks", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE)
    parser.add_argument("--step-delay-s", type=float, default=0.0)
    parser.add_argument("--poison-token", type=int)
    parser.add_argument("--parent-pid", type=int, help="die with this process")
    parser.add_argument("--report", action="store_true", help="JSON lines on stdout")
    options, _ = parser.parse_known_args(argv)
    if options.parent_pid is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    settings = GhostSettings(
        world_size=options.world_size,
        num_blocks=options.num_blocks,
        block_size=options.block_size,
        vocab_size=options.vocab_size,
        step_delay_s=options.step_delay_s,
        poison_token=options.poison_token,
    )
    address = options.address or f"unix:{Path(options.uds).resolve()}"
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(settings, options.rank, address, "ready" if not options.report else json.dumps(READY)))


READY: Final = {"event": "ready"}


async def _serve(settings: GhostSettings, rank: int, address: str, greeting: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    server = await start_server(GhostShard(settings, rank, [], lambda: os._exit(1)), address)
    print(greeting, flush=True)
    await ended.wait()
    await server.stop(grace=None)


if __name__ == "__main__":
    main()
