"""Plans to tensors: this rank's small mirror of the router's bookkeeping.

A seat is a sequence's row in a table of block ids and its number of tokens fed so far; everything else about a sequence
stays in the router. Each rank applies the same plans in the same order and so holds the same mirror.

Most steps do what the step before did, one place further on: each row feeds its seat's last sampled token and chooses
the next. On a CPU, where the model reads the host's memory, their tensors are moved on and not made again. On a device
that works by itself all numbers of a step get there in one copy, for which nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from proto import shard_pb2 as pb
from shard.adapters import TokensOf
from shard.attention import AttentionBatch
from shard.sampler import SamplingParams
from shard.transfer import Int64Array, all_to_device, to_device, works_by_itself

Int32Array = npt.NDArray[np.int32]

TABLE_STEP: Final = 16
"""Tables are a multiple of so many blocks wide, so that a step's rows find room in them for a while."""

_NOTHING: Final[Int64Array] = np.zeros(0, dtype=np.int64)


class PlanError(Exception):
    """A plan that contradicts the ones before it. The epoch cannot go on."""


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """One step as tensors. T tokens fed, E places where a token is chosen, S known tokens to be scored.

    Good until the next step's are made, which may be the same tensors with other numbers.

    A row that emits has one such place, behind its last token, and one more before each of its drafts.
    """

    num_rows: int
    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    batch: AttentionBatch
    emit_rows: list[int]  # [E] index of the row in the plan
    emit_seats: list[int]  # [E]
    emit_positions: list[int]  # [E] index in its sequence of the token to be chosen
    emit_drafts: list[int | None]  # [E] the draft in that token's place, None at a row's end; [] if there are none
    emit_index: Tensor  # [E] int64, into the T tokens; in ascending order
    emit_seat_index: Tensor  # [E] int64
    target_index: Tensor  # [S] int64, into the T tokens
    targets: Tensor  # [S] int64
    target_seats: list[int]  # [S]
    target_positions: list[int]  # [S] index in its sequence of the target
    adapters: TokensOf


@dataclass(slots=True)
class _Decoding:
    """A step in which every row feeds one token and chooses one; the arrays are the memory of its tensors."""

    inputs: ModelInputs
    seats: Int64Array  # [R]
    positions: Int64Array  # [R]
    contexts: Int64Array  # [R] each one above its position
    slots: Int64Array  # [R]
    tables: Int64Array  # [R, width]
    num_left: int
    """Further steps for which the tables are wide enough."""

    @classmethod
    def of(cls, inputs: ModelInputs) -> _Decoding:
        batch = inputs.batch
        rows = batch.step_rows()
        return cls(
            inputs=replace(inputs, batch=replace(batch, native_rows=rows)),
            seats=inputs.emit_seat_index.numpy(),
            positions=inputs.positions.numpy(),
            contexts=rows.contexts.numpy(),
            slots=batch.slots.numpy(),
            tables=batch.block_tables.numpy(),
            num_left=batch.block_tables.shape[1] * batch.block_size - max(batch.context_lens),
        )

    def is_continued_by(self, plan: pb.StepPlan) -> bool:
        num_rows = self.inputs.num_rows
        return (
            self.num_left > 0
            and plan.row_seat == self.inputs.emit_seats
            and plan.row_num_tokens == [1] * num_rows
            and plan.row_emit == [True] * num_rows
            and not (plan.literals or plan.targets or plan.row_num_drafts)
        )


class Seats:
    """Block tables, lengths and last sampled tokens of the sequences of one epoch."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_seats: int,
        max_positions: int,
        device: torch.device,
        num_adapters: int = 0,
    ) -> None:
        max_blocks = num_blocks
        if max_positions:
            max_blocks = min(num_blocks, -(-max_positions // block_size) + 1)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self._tables: Int32Array = np.zeros((max_seats, max_blocks), dtype=np.int32)
        self._num_blocks: Int64Array = np.zeros(max_seats, dtype=np.int64)
        self._num_tokens: Int64Array = np.zeros(max_seats, dtype=np.int64)
        self._is_open = np.zeros(max_seats, dtype=np.bool_)
        self._num_adapters = num_adapters
        self._adapters: Int64Array = np.zeros(max_seats, dtype=np.int64)
        self.last_token = torch.zeros(max_seats, dtype=torch.int64, device=device)
        """[max_seats] each seat's last sampled token; never leaves the device before it is fed."""
        self._decoding: _Decoding | None = None
        """The step before, if the next may be like it."""

    def close(self, seat: int) -> None:
        if not self._is_open[seat]:
            raise PlanError(f"seat {seat} is closed but was not open")
        self._is_open[seat] = False
        self._decoding = None

    def open(self, seat: int, blocks: Sequence[int], num_cached_tokens: int, adapter: int = 0) -> None:
        if self._is_open[seat]:
            raise PlanError(f"seat {seat} is opened twice")
        if num_cached_tokens > len(blocks) * self.block_size:
            raise PlanError(f"seat {seat} starts at {num_cached_tokens} tokens with {len(blocks)} blocks")
        if adapter > self._num_adapters:
            raise PlanError(f"seat {seat} wants adapter {adapter} of {self._num_adapters}")
        self._is_open[seat] = True
        self._adapters[seat] = adapter
        self._num_blocks[seat] = 0
        self._num_tokens[seat] = num_cached_tokens
        self._append_blocks(seat, blocks)

    def _append_blocks(self, seat: int, blocks: Sequence[int]) -> None:
        start = self._num_blocks[seat]
        end = start + len(blocks)
        if end > self._tables.shape[1] or max(blocks, default=1) >= self.num_blocks or min(blocks, default=1) < 1:
            raise PlanError(f"seat {seat} cannot take blocks {list(blocks)} after {start}")
        self._tables[seat, start:end] = blocks
        self._num_blocks[seat] = end

    def build(self, plan: pb.StepPlan) -> ModelInputs:
        """Applies the plan's rows and returns their tensors, which are good until the next plan's are built.

        Raises `PlanError`; then the mirror is spoilt.
        """
        if (decoding := self._decoding) is not None and decoding.is_continued_by(plan):
            if plan.new_blocks:
                self._append_new_blocks(plan)
                decoding.tables[:] = self._tables[decoding.seats, : decoding.tables.shape[1]]
            return self._move_on(decoding)
        seats = np.fromiter(plan.row_seat, dtype=np.int64, count=len(plan.row_seat))
        num_tokens = np.fromiter(plan.row_num_tokens, dtype=np.int64, count=len(seats))
        if not self._is_open[seats].all():
            raise PlanError(f"a row continues a closed seat: {seats[~self._is_open[seats]].tolist()}")
        self._append_new_blocks(plan)
        query_starts: Int64Array = np.concatenate(([0], np.cumsum(num_tokens)))
        starts = self._num_tokens[seats]
        context_lens = starts + num_tokens
        if (context_lens > self._num_blocks[seats] * self.block_size).any():
            raise PlanError("a row reaches past its block table")
        self._num_tokens[seats] = context_lens

        token_seats, positions = seats, starts  # [T]
        one_each = bool((num_tokens == 1).all())  # as in most steps
        if not one_each:
            row_of_token = np.repeat(np.arange(len(seats)), num_tokens)
            token_seats = seats[row_of_token]
            positions = np.arange(query_starts[-1]) - query_starts[row_of_token] + starts[row_of_token]
        blocks = self._tables[token_seats, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        tables = self._tables[seats, : self._table_width(context_lens)].astype(np.int64)
        emit_rows, num_before_end = _emit_places(plan)
        emit_index = query_starts[1:][emit_rows] - num_before_end
        emit_seats = seats[emit_rows]
        target_index, target_rows = _target_index(plan, query_starts)
        targets = np.fromiter(plan.targets, dtype=np.int64, count=len(plan.targets))
        of_step = [slots, tables.reshape(-1), positions, emit_index, emit_seats, target_index, targets]
        d_slots, d_tables, d_positions, d_emit_index, d_emit_seats, d_target_index, d_targets, *d_fed = all_to_device(
            [*of_step, *_fed(plan, seats, query_starts, one_each)], self.device
        )
        batch = AttentionBatch(
            slots=d_slots,
            query_starts=query_starts.tolist(),
            context_lens=context_lens.tolist(),
            block_tables=d_tables.view(tables.shape),
            block_size=self.block_size,
        )
        inputs = ModelInputs(
            num_rows=len(seats),
            input_ids=self._input_ids(*d_fed),
            positions=d_positions,
            batch=batch,
            emit_rows=emit_rows.tolist(),
            emit_seats=emit_seats.tolist(),
            emit_positions=(context_lens[emit_rows] - num_before_end + 1).tolist(),
            emit_drafts=_emit_drafts(plan) if plan.row_num_drafts else [],
            emit_index=d_emit_index,
            emit_seat_index=d_emit_seats,
            target_index=d_target_index,
            targets=d_targets,
            target_seats=seats[target_rows].tolist(),
            target_positions=(positions[target_index] + 1).tolist(),
            adapters=self._tokens_of_adapters(token_seats),
        )
        self._decoding = None
        if one_each and len(emit_rows) == len(seats) and not plan.targets and not works_by_itself(self.device):
            self._decoding = _Decoding.of(inputs)
            return self._decoding.inputs
        return inputs

    def repeat(self, plan: pb.StepPlan) -> ModelInputs:
        """The inputs of a further step of the plan that was built last. Raises `PlanError` if it is not a plan for
        several."""
        if (decoding := self._decoding) is not None and decoding.num_left > 0:
            return self._move_on(decoding)
        return self.build(_repeated(plan))

    def _move_on(self, step: _Decoding) -> ModelInputs:
        """The inputs of a step in which the rows of the last one feed their next tokens."""
        step.num_left -= 1
        for array in (step.positions, step.contexts, step.slots):
            array += 1
        for row in (step.positions % self.block_size == 0).nonzero()[0]:
            index, seat = step.positions[row] // self.block_size, step.seats[row]
            if index >= self._num_blocks[seat]:
                raise PlanError("a row reaches past its block table")
            step.slots[row] = self._tables[seat, index] * self.block_size
        self._num_tokens[step.seats] = step.contexts
        inputs = step.inputs
        torch.index_select(self.last_token, 0, inputs.emit_seat_index, out=inputs.input_ids)
        inputs.batch.move_on(step.contexts.tolist())
        inputs.emit_positions[:] = inputs.batch.context_lens
        return inputs

    def _tokens_of_adapters(self, token_seats: Int64Array) -> TokensOf:
        if not self._num_adapters:
            return {}
        adapters = self._adapters[token_seats]  # [T]
        numbers = np.unique(adapters[adapters > 0]).tolist()
        return {
            number: to_device(torch.from_numpy((adapters == number).nonzero()[0]), self.device) for number in numbers
        }

    def rewind(self, seat: int, num_tokens: int) -> None:
        """Counts a seat's last tokens as never fed; the next ones take their places."""
        self._num_tokens[seat] -= num_tokens

    def _table_width(self, context_lens: Int64Array) -> int:
        """In blocks: those of the longest row, and some more."""
        num_blocks = int(-(-context_lens.max(initial=1) // self.block_size))
        return -(-num_blocks // TABLE_STEP) * TABLE_STEP

    def _append_new_blocks(self, plan: pb.StepPlan) -> None:
        start = 0
        for seat, count in zip(plan.row_seat, plan.row_num_new_blocks, strict=True):
            if count:
                self._append_blocks(seat, plan.new_blocks[start : start + count])
                start += count

    def _input_ids(self, literals: Tensor, fed_places: Tensor, fed_seats: Tensor) -> Tensor:
        """[T] the literals, and in the other places the last sampled tokens of their seats."""
        if not len(fed_places):
            return literals
        if not len(literals):
            return self.last_token[fed_seats]
        literals[fed_places] = self.last_token[fed_seats]
        return literals


def _fed(
    plan: pb.StepPlan, seats: Int64Array, query_starts: Int64Array, one_each: bool
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """[T] the literals, [F] where in them a token is missing, and [F] whose last sampled one that is; no literals at
    all if every token is missing."""
    if one_each and not plan.literals and not any(plan.row_num_literals):
        return _NOTHING, query_starts[:-1], seats
    num_literals = np.fromiter(plan.row_num_literals, dtype=np.int64, count=len(seats))
    num_tokens = np.diff(query_starts)
    fed = num_literals == 0
    if (num_tokens[fed] != 1).any() or (num_literals[~fed] != num_tokens[~fed]).any():
        raise PlanError("a row's literals are not all of its tokens")
    is_literal = np.repeat(~fed, num_tokens)
    if int(is_literal.sum()) != len(plan.literals):
        raise PlanError(f"{len(plan.literals)} literals for {int(is_literal.sum())} places")
    literals = np.zeros(len(is_literal), dtype=np.int64)
    literals[is_literal] = plan.literals
    return literals, query_starts[:-1][fed], seats[fed]


def _repeated(plan: pb.StepPlan) -> pb.StepPlan:
    """The rows of a plan's repeats as a plan of their own, without the blocks, which came with the first step."""
    num_rows = len(plan.row_seat)
    are_plain = plan.row_num_tokens == [1] * num_rows and plan.row_emit == [True] * num_rows
    if not are_plain or plan.targets or plan.row_num_drafts:
        raise PlanError("a step is repeated in which rows do not feed and sample one token each")
    return pb.StepPlan(
        row_seat=plan.row_seat,
        row_num_tokens=plan.row_num_tokens,
        row_num_literals=[0] * num_rows,
        row_num_new_blocks=[0] * num_rows,
        row_emit=plan.row_emit,
    )


def num_drafts(plan: pb.StepPlan) -> Int64Array:
    """[rows] how many of each row's last literals are drafts."""
    if not plan.row_num_drafts:
        return np.zeros(len(plan.row_seat), dtype=np.int64)
    return np.fromiter(plan.row_num_drafts, dtype=np.int64, count=len(plan.row_seat))


def _emit_places(plan: pb.StepPlan) -> tuple[Int64Array, Int64Array | int]:
    """[E] the row of each token to be chosen; how far before the row's end it is chosen, 1 behind its last token.

    Raises `PlanError` for drafts that follow nothing.
    """
    emit = np.fromiter(plan.row_emit, dtype=np.int64, count=len(plan.row_seat))
    if not plan.row_num_drafts:
        return emit.nonzero()[0], 1
    drafts = num_drafts(plan)
    num_literals = np.fromiter(plan.row_num_literals, dtype=np.int64, count=len(emit))
    if ((drafts > 0) & ((emit == 0) | (drafts >= num_literals))).any():
        raise PlanError("a row has drafts, but does not emit or has no token before them")
    num_chosen = emit * (1 + drafts)
    rows = np.repeat(np.arange(len(emit)), num_chosen)
    return rows, np.repeat(np.cumsum(num_chosen), num_chosen) - np.arange(len(rows))


def _emit_drafts(plan: pb.StepPlan) -> list[int | None]:
    """[E] for each token to be chosen the draft in its place, if there is one."""
    drafts: list[int | None] = []
    end = 0
    for num_literals, num, emit in zip(plan.row_num_literals, plan.row_num_drafts, plan.row_emit, strict=True):
        end += num_literals
        if emit:
            drafts += [*plan.literals[end - num : end], None]
    return drafts


def _target_index(plan: pb.StepPlan, query_starts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """[S] where in the packed tokens each scored token lies, the leading tokens of its row; [S] that row."""
    if not plan.targets:
        return _NOTHING, _NOTHING
    counts = np.fromiter(plan.row_num_targets, dtype=np.int64, count=len(plan.row_num_targets))
    rows = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return query_starts[rows] + np.arange(len(rows)) - starts[rows], rows


def sampling_params(sampling: pb.Sampling) -> SamplingParams:
    """The wire's message as plain data."""
    return SamplingParams(
        do_sample=sampling.do_sample,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        typical_p=sampling.typical_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        seed=sampling.seed,
        bias_token_ids=tuple(sampling.bias_token_ids),
        bias_values=tuple(sampling.bias_values),
        watermark_gamma=sampling.watermark_gamma,
        watermark_delta=sampling.watermark_delta,
        top_n_tokens=sampling.top_n_tokens,
        no_repeat_ngram_size=sampling.no_repeat_ngram_size,
        min_new_tokens=sampling.min_new_tokens,
        bad_words=tuple(tuple(run.token_ids) for run in sampling.bad_words),
        prompt_top_n_tokens=sampling.prompt_top_n_tokens,
    )
