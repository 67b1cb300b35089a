"""The model thread's work: load, configure, and run one plan after the other.

A step is first prepared, which is work for the interpreter, and then run, most of which is native or on a device.
Whoever has other work for the interpreter does it between the two, so that it falls into the second.

A device that works by itself is told to do a step (`start`), and the step is answered (`finish`) once it is done. The
next one is prepared and started meanwhile: what it feeds never leaves the device. Where the host must know what was
chosen before it can go on (grammars, rules that look at tokens, truncation, top tokens, drafts), starting waits for it.

Everything here that touches the device runs on one thread, because collectives must be entered in the same order on
every rank; only `finish`, which reads the host's memory alone, may run on another, and then always on that. A rank that
raises is lost: it never repairs itself, the router replays.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from proto import shard_pb2 as pb
from shard.adapters import find_adapters
from shard.attention import AttentionBatch
from shard.checkpoint import resolve
from shard.config import METHODS, ShardConfig
from shard.cores import num_allowed_cores
from shard.distributed import RankGroup, connect
from shard.errors import LoadError
from shard.grammar import GrammarCompiler, Grammars
from shard.greedy import GreedySeats
from shard.inputs import ModelInputs, PlanError, Seats, num_drafts, sampling_params
from shard.kernels.packing import Kind
from shard.memory import default_kv_bytes
from shard.model import Model, load_model
from shard.sampler import Sampled, Sampler, Scored, score
from shard.transfer import Mark, to_device, to_host, works_by_itself

logger = logging.getLogger(__name__)

_QUANTIZED: Final = {"int8": Kind.INT8, "int4": Kind.INT4}

NOT_FINITE: Final = "the model's logits are not finite"
SCORE_ROWS: Final = 128
"""Positions scored at once: 128 rows of a 150k vocabulary in float32 are 77 MB."""


def start(config: ShardConfig, on_progress: Callable[[int, int], None]) -> Worker:
    """Joins the group and loads this rank's part. Raises `LoadError` with a one-line cause."""
    device = _device(config)
    num_cores = num_allowed_cores(torch.get_num_threads())
    torch.set_num_threads(config.num_threads or max(1, num_cores // config.world_size))
    checkpoint = resolve(config.model_id, revision=config.revision or None)
    group = connect(config.rank, config.world_size, config.store_path, device, config.join_timeout_s)
    model = load_model(
        checkpoint.directory,
        dtype=_dtype(config, device),
        device=device,
        group=group,
        on_progress=on_progress,
        use_native=config.native == "auto",
        quantize=_QUANTIZED.get(config.quantize),
        named_method=config.quantize if config.quantize in METHODS else None,
        adapters=find_adapters(config.lora_adapters),
    )
    grammars = None
    if group.rank == 0:
        grammars = GrammarCompiler(
            checkpoint.directory / "tokenizer.json", vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
        )
    return Worker(config, model, group, checkpoint.revision, grammars)


def _device(config: ShardConfig) -> torch.device:
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LoadError("there is no CUDA device here")
    device = torch.device("cuda", config.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _dtype(config: ShardConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it natively and float32 elsewhere."""
    if config.quantize == "bf16":
        return torch.bfloat16
    if config.dtype != "auto":
        named: torch.dtype = getattr(torch, config.dtype)
        return named
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step whose turn has come."""

    step: int
    plan: pb.StepPlan
    seats: Seats
    inputs: ModelInputs | None
    """None: the plan has no rows."""
    owners: Mapping[int, str]
    """Whose sequence has a seat, for the log."""
    arrived_at: float | None
    """When its plan came (`time.perf_counter`). None: it repeats the step before."""
    inputs_s: float


@dataclass(slots=True)
class StartedStep:
    """A step that the device was told to do. Its tensors are the host's, and hold what they say once `ended` is
    reached."""

    prepared: PreparedStep
    begun: Mark
    forwarded: Mark
    scores: Sequence[Scored] = ()
    chosen: Tensor | None = None  # [E] int64, on every rank; None: nothing was to be chosen
    sampled: Sampled | None = None
    """What is said of the chosen, on rank 0."""
    emitted: Sequence[int] = ()
    """Which of the chosen count."""
    ended: Mark | None = None
    """None: it ends with its answer, as the host has done it itself."""


class Worker:
    """One rank's model and the state of the epoch it is in."""

    def __init__(
        self, config: ShardConfig, model: Model, group: RankGroup, revision: str, grammars: GrammarCompiler | None
    ) -> None:
        self._config = config
        self._model = model
        self.starts_ahead = works_by_itself(model.device)
        """Whether a step can run while the next is prepared and started."""
        self._marked = model.device if self.starts_ahead else None
        """The device to be asked how far it is."""
        self._group = group
        self._revision = revision
        self._grammars = grammars  # where rules are kept: on rank 0
        self._epoch = 0
        self._next_step = 1
        self._ended_at = 0.0
        # Measured before any KV memory is taken: later epochs get the same.
        self._kv_budget_bytes = config.kv_cache_bytes or default_kv_bytes(
            model.device, group.world_size, config.cuda_memory_fraction
        )
        self._seats: Seats | None = None
        self._owners: Mapping[int, str] = {}
        """Whose sequence has a seat, for the log. Never changed, but replaced: steps keep theirs."""
        self._sampler: Sampler | None = None
        self._greedy: GreedySeats | None = None
        """None: the ranks choose nothing together."""

    @property
    def owners(self) -> list[str]:
        """Whose sequences have seats. May be asked on any thread."""
        return list(self._owners.values())

    def describe(self) -> pb.ShardInfo:
        model = self._model
        return pb.ShardInfo(
            rank=self._group.rank,
            world_size=self._group.world_size,
            model_id=self._config.model_id,
            revision=self._revision,
            model_type=model.model_type,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device.type,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            max_positions=model.max_positions,
            block_size=model.block_size,
            bytes_per_block=model.bytes_per_block,
            kv_budget_bytes=self._kv_budget_bytes,
            last_epoch=self._epoch,
            adapters=model.adapters.names,
        )

    def configure(self, request: pb.ConfigureRequest) -> pb.ConfigureReply:
        """Begins an epoch with empty KV memory. Raises `PlanError` for an epoch that is not newer."""
        if request.epoch <= self._epoch:
            raise PlanError(f"epoch {request.epoch} is not above {self._epoch}")
        if request.block_size != self._model.block_size:
            raise PlanError(f"block size {request.block_size} is not this rank's {self._model.block_size}")
        self._epoch, self._next_step = request.epoch, 1
        self._owners = {}
        self._model.allocate(request.num_blocks)
        self._seats = Seats(
            num_blocks=request.num_blocks,
            block_size=request.block_size,
            max_seats=request.max_seats,
            max_positions=self._model.max_positions,
            device=self._model.device,
            num_adapters=len(self._model.adapters.names),
        )
        if self._grammars is not None:
            self._sampler = Sampler(
                vocab_size=self._model.vocab_size,
                max_seats=request.max_seats,
                eos_token_ids=self._model.eos_token_ids,
                device=self._model.device,
                grammars=Grammars(self._grammars, max_seats=request.max_seats),
            )
        if self._group.peers is not None and self._model.own_columns is not None:
            self._greedy = GreedySeats(self._group.peers, self._model.own_columns, self._model.eos_token_ids)
        self._warm_up()
        return pb.ConfigureReply(epoch=request.epoch, kv_bytes=request.num_blocks * self._model.bytes_per_block)

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """One token through every layer in the padding block, so that the first step is as quick as the others."""
        model, zero = self._model, torch.zeros(1, dtype=torch.int64, device=self._model.device)
        batch = AttentionBatch.build(
            slots=zero,
            query_starts=[0, 1],
            context_lens=[1],
            block_tables=zero[None],
            block_size=model.block_size,
            device=model.device,
        )
        model.logits(model.hidden(zero, zero, batch))

    @torch.inference_mode()
    def prepare(self, plan: pb.StepPlan, arrived_at: float) -> PreparedStep:
        """Takes the next plan, received when `time.perf_counter` was `arrived_at`. Any exception ends the epoch."""
        begun_at = time.perf_counter()
        seats = self._take_turns(plan)
        inputs = seats.build(plan) if plan.row_seat else None
        return PreparedStep(plan.step, plan, seats, inputs, self._owners, arrived_at, time.perf_counter() - begun_at)

    @torch.inference_mode()
    def prepare_repeat(self, last: PreparedStep) -> PreparedStep:
        """Takes the next step of the same plan. Any exception ends the epoch."""
        begun_at = time.perf_counter()
        if last.inputs is None:
            raise PlanError("a step is repeated that has no rows")
        self._next_step += 1
        inputs = last.seats.repeat(last.plan)
        inputs_s = time.perf_counter() - begun_at
        return replace(last, step=last.step + 1, inputs=inputs, arrived_at=None, inputs_s=inputs_s)

    def run(self, step: PreparedStep) -> pb.FromShard:
        """Runs the step that was prepared last. Any exception ends the epoch."""
        return self.finish(self.start(step))

    @torch.inference_mode()
    def start(self, step: PreparedStep) -> StartedStep:
        """Tells the device to do the step that was prepared last. Any exception ends the epoch."""
        inputs = step.inputs
        begun = Mark(self._marked)
        if inputs is None:
            started = StartedStep(step, begun, begun)
        else:
            hidden = self._model.hidden(inputs.input_ids, inputs.positions, inputs.batch, inputs.adapters)
            scores = list(self._score_targets(hidden, inputs)) if inputs.target_seats else ()
            greedy = self._greedy if self._greedy is not None and self._greedy.hold(inputs.emit_seats) else None
            logits_of = self._model.logits if greedy is None else self._model.own_logits
            logits = logits_of(_emitting(hidden, inputs)) if inputs.emit_rows else None
            started = StartedStep(step, begun, Mark(self._marked), scores)
            if logits is not None:
                self._choose(logits, inputs, started, greedy)
        if self.starts_ahead:
            started.ended = Mark(self._marked)
        return started

    def finish(self, started: StartedStep) -> pb.FromShard:
        """Waits for the step that was started first of those that are not finished, and answers it. Any exception ends
        the epoch."""
        if started.ended is not None:
            started.ended.wait()
        step, answer = started.prepared, pb.FromShard()
        plan, inputs, output = step.plan, step.inputs, answer.output
        token_ids: list[int] = [] if started.chosen is None else started.chosen.tolist()
        for scored in started.scores:
            _fill_scores(output, scored)
        if inputs is not None and started.sampled is not None:
            _fill_output(output, started.sampled, inputs, token_ids, started.emitted)
        for fault in output.row_faults:
            logger.warning("step %d: %s: %s", step.step, step.owners[plan.row_seat[fault.row]], fault.message)
        digest = token_digest(token_ids)
        wait_s = self._waited_s(step)
        ended = started.ended or Mark(None)
        self._ended_at = time.perf_counter()
        if self._group.rank:
            return pb.FromShard(ack=pb.StepAck(step=step.step, digest=digest))
        output.step = step.step
        output.digest = digest
        if not output.row_num_emitted:
            output.row_num_emitted.extend([0] * len(plan.row_seat))
        timings = output.timings
        timings.wait_us = _microseconds(wait_s)
        timings.inputs_us = _microseconds(step.inputs_s)
        timings.forward_us = _microseconds(started.forwarded.seconds_since(started.begun))
        timings.sample_us = _microseconds(ended.seconds_since(started.forwarded))
        return answer

    def _waited_s(self, step: PreparedStep) -> float:
        """From the end of the step before to the arrival of the plan."""
        if step.arrived_at is None or not self._ended_at:
            return 0.0
        return max(0.0, step.arrived_at - self._ended_at)

    def _take_turns(self, plan: pb.StepPlan) -> Seats:
        """Closes and opens seats, and shows the sampler the literals of the rows to come."""
        seats, sampler, greedy = self._seats, self._sampler, self._greedy
        if seats is None:
            raise PlanError("a plan came before the first epoch was configured")
        if plan.step != self._next_step:
            raise PlanError(f"step {plan.step} came instead of {self._next_step}")
        self._next_step += 1
        if plan.closes or plan.opens:
            closed = set(plan.closes)
            kept = {seat: owner for seat, owner in self._owners.items() if seat not in closed}
            self._owners = kept | {open_.seat: _owner(open_) for open_ in plan.opens}
        for seat in plan.closes:
            seats.close(seat)
            if sampler is not None:
                sampler.close(seat)
            if greedy is not None:
                greedy.close(seat)
        for open_ in plan.opens:
            seats.open(open_.seat, open_.blocks, open_.num_cached_tokens, open_.adapter)
            logger.debug("step %d: seat %d begins for %s", plan.step, open_.seat, self._owners[open_.seat])
            params = sampling_params(open_.sampling)
            if sampler is not None:
                sampler.open(open_.seat, params, open_.history, open_.num_prompt_tokens, open_.grammar)
            if greedy is not None:
                greedy.open(open_.seat, params, open_.num_prompt_tokens, open_.grammar)
        if sampler is not None and plan.literals:
            start = 0
            for seat, count, drafts in zip(plan.row_seat, plan.row_num_literals, num_drafts(plan), strict=True):
                if count:
                    sampler.feed(seat, plan.literals[start : start + count - drafts])
                    start += count
        return seats

    def _score_targets(self, hidden: Tensor, inputs: ModelInputs) -> Iterator[Scored]:
        """Logprobs of known tokens, lm_head in chunks; every rank takes part, rank 0 has the result."""
        for start in range(0, len(inputs.targets), SCORE_ROWS):
            chunk = slice(start, start + SCORE_ROWS)
            logits = self._model.logits(hidden[inputs.target_index[chunk]])
            if self._sampler is not None:
                asked = self._sampler.num_target_top(inputs.target_seats[chunk], inputs.target_positions[chunk])
                yield score(logits, inputs.targets[chunk], asked).on_host()

    def _choose(self, logits: Tensor, inputs: ModelInputs, started: StartedStep, greedy: GreedySeats | None) -> None:
        """All ranks choose together, or rank 0 samples; every rank then holds the same tokens and accepts the same
        drafts."""
        seats, chooser = started.prepared.seats, greedy or self._sampler
        sampled: Sampled | None = None
        if chooser is not None:
            sampled = chooser.sample(logits, inputs.emit_seats, inputs.emit_positions)
            chosen = sampled.token_ids
        else:
            chosen = torch.empty(len(inputs.emit_rows), dtype=torch.int64, device=seats.device)
        if self._group.world_size > 1 and greedy is None:
            self._group.broadcast(chosen)
        if sampled is not None:
            sampled = sampled.on_host() if self.starts_ahead else sampled
        started.chosen = to_host(chosen) if sampled is None else sampled.token_ids
        started.sampled = sampled if self._group.rank == 0 else None
        started.emitted = range(len(inputs.emit_rows))
        if not inputs.emit_drafts:
            seats.last_token[inputs.emit_seat_index] = chosen
            return
        # Where the rows of the next step begin depends on what counts: here the host waits.
        started.emitted = emitted = _emitted(chosen.tolist(), inputs.emit_drafts)
        last_of_seat = {inputs.emit_seats[index]: index for index in emitted}
        last_seats = to_device(torch.tensor(list(last_of_seat)), seats.device)
        seats.last_token[last_seats] = chosen[to_device(torch.tensor(list(last_of_seat.values())), seats.device)]
        _rewind(seats, inputs.emit_seats, emitted)


def _emitting(hidden: Tensor, inputs: ModelInputs) -> Tensor:
    """Of hidden states [T, width] those behind which a token is chosen: [E, width]."""
    return hidden if len(inputs.emit_rows) == len(hidden) else hidden[inputs.emit_index]


def _emitted(token_ids: Sequence[int], drafts: Sequence[int | None]) -> list[int]:
    """Which of the chosen tokens count: those of a row up to the first that is not its draft, and this one too.

    What was chosen behind a wrong draft was chosen after a text that is not the sequence's.
    """
    emitted: list[int] = []
    is_after_truth = True
    for index, (token, draft) in enumerate(zip(token_ids, drafts, strict=True)):
        if is_after_truth:
            emitted.append(index)
        is_after_truth = draft is None or (is_after_truth and draft == token)
    return emitted


def _rewind(seats: Seats, emit_seats: Sequence[int], emitted: Sequence[int]) -> None:
    """Takes back the drafts that were wrong: there is one before each chosen token that does not count."""
    for seat, num_vain in (Counter(emit_seats) - Counter(emit_seats[index] for index in emitted)).items():
        seats.rewind(seat, num_vain)


def _fill_output(
    output: pb.StepOutput, sampled: Sampled, inputs: ModelInputs, token_ids: list[int], emitted: Sequence[int]
) -> None:
    emit_rows, faults = inputs.emit_rows, sampled.faults.tolist()
    if True in faults or sampled.refusals:
        failed = {emit_rows[index]: NOT_FINITE for index in emitted if faults[index]}
        failed |= {emit_rows[index]: message for index, message in sampled.refusals.items()}
        for row, message in failed.items():
            output.row_faults.add(row=row, message=message)
        emitted = [index for index in emitted if emit_rows[index] not in failed]
    num_emitted = [0] * inputs.num_rows
    for index in emitted:
        num_emitted[emit_rows[index]] += 1
    logprobs, num_top = sampled.logprobs.tolist(), sampled.num_top
    output.row_num_emitted.extend(num_emitted)
    output.token_ids.extend([token_ids[index] for index in emitted])
    output.logprobs.extend([logprobs[index] for index in emitted])
    output.num_top.extend([num_top[index] for index in emitted])
    if sampled.top_ids.shape[1]:
        top_ids, top_logprobs = sampled.top_ids.tolist(), sampled.top_logprobs.tolist()
        for index in emitted:
            output.top_token_ids.extend(top_ids[index][: num_top[index]])
            output.top_logprobs.extend(top_logprobs[index][: num_top[index]])
    if any(sampled.forced):
        _fill_forced(output, sampled.forced, emit_rows)


def _fill_forced(output: pb.StepOutput, forced: Sequence[Sequence[int]], emit_rows: Sequence[int]) -> None:
    """What certainly follows the tokens that were emitted; a row that failed has nothing to say."""
    num_forced = [0] * len(output.row_num_emitted)
    for row, run in zip(emit_rows, forced, strict=True):
        if output.row_num_emitted[row]:
            num_forced[row] = len(run)
            output.forced_token_ids.extend(run)
    output.row_num_forced.extend(num_forced)


def _fill_scores(output: pb.StepOutput, scored: Scored) -> None:
    output.target_logprobs.extend(scored.logprobs.tolist())
    output.target_num_top.extend(scored.num_top)
    top_ids, top_logprobs = scored.top_ids.tolist(), scored.top_logprobs.tolist()
    for index, num_top in enumerate(scored.num_top):
        output.target_top_token_ids.extend(top_ids[index][:num_top])
        output.target_top_logprobs.extend(top_logprobs[index][:num_top])


def _owner(open_: pb.Open) -> str:
    return f"request {open_.request_id}" + (f" of trace {open_.trace_id}" if open_.trace_id else "")


def token_digest(token_ids: Sequence[int]) -> int:
    """64 bits of BLAKE2b over the ids as little-endian uint32: equal on every rank that was told the same tokens."""
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def _microseconds(seconds: float) -> int:
    return min(int(seconds * 1e6), 2**32 - 1)
