"""A shard group as the engine sees it: connect, send plans, receive outputs, or lose the epoch.

One Execute stream per rank carries the same plans in the same order. Rank 0 answers with tokens, the others with a
digest of the tokens they were told; whatever does not fit ends the epoch with `GroupLost`. The client never repairs
a group: it connects anew, in a higher epoch.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeVar

import grpc

from proto import shard_pb2 as pb
from proto import shard_pb2_grpc
from router.core.plan import StepOutput, StepPlan
from router.errors import GroupLost, StartupError
from router.group.codec import decode_output, encode_plan
from router.group.deadline import Deadline

MAX_MESSAGE_BYTES: Final = 64 << 20
GOODBYE_S: Final = 1.0
GRACE_S: Final = 0.25
"""After a deadline answers are looked for once more: it may have been this process that was held up."""
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # a channel must not inherit another's broken connection
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A shard whose machine is gone sends no FIN: without pings an idle router would not notice.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Demands:
    """What the router wants of a group, before it knows what the group can give."""

    max_seats: int
    max_step_tokens: int
    max_kv_tokens: int | None = None
    """Upper bound on KV capacity in tokens, whatever the memory."""


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """What was agreed with all ranks at connect."""

    epoch: int
    world_size: int
    model_id: str
    revision: str
    model_type: str
    dtype: str
    device: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_positions: int
    num_blocks: int
    block_size: int
    max_seats: int
    max_step_tokens: int
    adapters: tuple[str, ...] = ()

    @property
    def capacity_tokens(self) -> int:
        """Tokens all sequences together can hold; block 0 belongs to padding."""
        return (self.num_blocks - 1) * self.block_size


@dataclass(slots=True)
class _Rank:
    """One rank's connection in one epoch."""

    address: str
    channel: grpc.aio.Channel
    stub: shard_pb2_grpc.ShardStub
    stream: Any = None
    reader: asyncio.Task[None] | None = None
    answers: deque[pb.FromShard] = field(default_factory=deque)


class _Step(NamedTuple):
    """A step that was sent and not answered."""

    plan: StepPlan
    repeat: int
    """Which of its plan's repeats it is; 0: the first step."""

    @property
    def number(self) -> int:
        return self.plan.step + self.repeat


class GroupClient:
    """Drives the ranks at `addresses` (rank order), for one caller at a time."""

    def __init__(self, addresses: Sequence[str], demands: Demands) -> None:
        self._addresses = list(addresses)
        self._demands = demands
        self.on_lost: Callable[[], None] | None = None
        """Called on the event loop when the epoch ends, also while nothing is outstanding."""
        self._lost: GroupLost | None = None
        self._answered = asyncio.Event()
        self._deadline = Deadline()
        self.codec_s = 0.0
        """Seconds spent turning plans and outputs into bytes and back, all epochs."""
        self._ranks: list[_Rank] = []
        self._answers: list[deque[pb.FromShard]] = []
        """Of each rank, those that were not received yet."""
        self._outstanding: deque[_Step] = deque()
        self._epoch = 0
        self._num_blocks: int | None = None
        self._info: GroupInfo | None = None

    @property
    def info(self) -> GroupInfo:
        assert self._info is not None, "the group was never connected"
        return self._info

    async def connect(self, *, find_s: float, load_s: float) -> GroupInfo:
        """Begins an epoch: every rank described, capacity agreed, streams open.

        `find_s` bounds the wait for a rank that does not listen, `load_s` for one that listens but still loads.
        Raises `GroupLost` when a rank cannot be reached or refuses, `StartupError` when the ranks do not belong
        together or are too small, which trying again would not change.
        """
        await self.close(goodbye=False)
        for address in self._addresses:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            self._ranks.append(_Rank(address, channel, shard_pb2_grpc.ShardStub(channel)))
        self._answers = [rank.answers for rank in self._ranks]
        await self._each_rank(self._find(rank, find_s) for rank in self._ranks)
        describe = pb.DescribeRequest()
        infos = await self._each_rank(_call(r.address, r.stub.Describe(describe, timeout=load_s)) for r in self._ranks)
        self._check_belong_together(infos)
        self._check_same_model(infos[0])
        configure = self._agree(infos)
        await self._each_rank(_call(r.address, r.stub.Configure(configure, timeout=load_s)) for r in self._ranks)
        await self._each_rank(self._open_stream(rank, load_s) for rank in self._ranks)
        self._info = _group_info(infos[0], configure)
        return self._info

    async def _each_rank(self, calls: Iterable[Awaitable[T]]) -> list[T]:
        """All ranks at once; the first failure is raised after every call has ended."""
        results = await asyncio.gather(*calls, return_exceptions=True)
        answers: list[T] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            answers.append(result)
        return answers

    async def _find(self, rank: _Rank, find_s: float) -> None:
        try:
            async with asyncio.timeout(find_s):
                await rank.channel.channel_ready()
        except TimeoutError:
            raise GroupLost(f"no shard listens at {rank.address}") from None

    def _check_belong_together(self, infos: list[pb.ShardInfo]) -> None:
        """One group has ranks 0..n-1 in the order of the addresses, of one model and one type."""
        found = [info.rank for info in infos]
        size = infos[0].world_size
        if size != len(infos):
            raise StartupError(f"the group has {size} ranks but {len(infos)} shard addresses are given")
        if found != list(range(size)):
            raise StartupError(f"the shard addresses lead to ranks {found}, not {list(range(size))}")
        for name in ("world_size", "model_type", "dtype", "vocab_size", "block_size", "revision", "adapters"):
            values = [getattr(info, name) for info in infos]
            if any(value != values[0] for value in values):
                raise StartupError(f"the ranks disagree on {name}: {values}")

    def _check_same_model(self, info: pb.ShardInfo) -> None:
        """Sequences of an earlier epoch can only go on with the model they began with."""
        if self._info is None:
            return
        names = ("model_id", "revision", "model_type", "dtype", "vocab_size", "max_positions", "block_size")
        changed = [name for name in names if getattr(info, name) != getattr(self._info, name)]
        lists = ("eos_token_ids", "adapters")
        changed += [name for name in lists if tuple(getattr(info, name)) != getattr(self._info, name)]
        if changed:
            raise StartupError(f"the shards came back with another model: {', '.join(changed)}")

    def _agree(self, infos: list[pb.ShardInfo]) -> pb.ConfigureRequest:
        """The smallest rank's capacity, by measured bytes. Later epochs keep the first one's, so nothing admitted
        before can become too large."""
        if self._num_blocks is None:
            num_blocks = min(info.kv_budget_bytes // max(info.bytes_per_block, 1) for info in infos)
            if self._demands.max_kv_tokens is not None:
                num_blocks = min(num_blocks, 1 + -(-self._demands.max_kv_tokens // infos[0].block_size))
            if num_blocks < 2:
                raise StartupError(f"KV memory holds {num_blocks} blocks of {infos[0].block_size} tokens: too little")
            self._num_blocks = num_blocks
        self._epoch = max(self._epoch, *(info.last_epoch for info in infos)) + 1
        return pb.ConfigureRequest(
            epoch=self._epoch,
            num_blocks=self._num_blocks,
            block_size=infos[0].block_size,
            max_seats=self._demands.max_seats,
            max_step_tokens=self._demands.max_step_tokens,
        )

    async def _open_stream(self, rank: _Rank, timeout_s: float) -> None:
        rank.stream = rank.stub.Execute()
        await _call(rank.address, rank.stream.write(pb.ToShard(hello=pb.Hello(epoch=self._epoch))))
        try:
            async with asyncio.timeout(timeout_s):
                answer = await _call(rank.address, rank.stream.read())
        except TimeoutError:
            raise GroupLost(f"{rank.address} did not answer Hello") from None
        if answer is grpc.aio.EOF or answer.welcome.epoch != self._epoch:
            raise GroupLost(f"{rank.address} did not welcome epoch {self._epoch}")
        rank.reader = asyncio.create_task(self._read(rank))

    async def _read(self, rank: _Rank) -> None:
        """Collects a rank's answers until its stream ends, which ends the epoch."""
        try:
            while True:
                answer = await rank.stream.read()
                if answer is grpc.aio.EOF:
                    raise GroupLost(f"{rank.address}: the stream has ended")
                if answer.HasField("fault"):
                    raise GroupLost(f"{rank.address}: {answer.fault.message}")
                rank.answers.append(answer)
                if self._has_answers():
                    self._answered.set()
        except GroupLost as error:
            self._lose(error)
        except Exception as error:  # bytes that are no message, say: whatever it is, this rank is of no use any more
            self._lose(_lost(rank.address, error))

    def _lose(self, error: GroupLost) -> None:
        if self._lost is None:
            self._lost = error
            self._answered.set()
            if self.on_lost is not None:
                self.on_lost()

    def raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    async def send(self, plan: StepPlan, timeout_s: float) -> None:
        """Sends the plan to every rank. Raises `GroupLost`, also when a rank does not take it within `timeout_s`."""
        self.raise_if_lost()
        begun_at = time.perf_counter()
        message = pb.ToShard(plan=encode_plan(plan))
        self.codec_s += time.perf_counter() - begun_at
        self._outstanding.extend(_Step(plan, repeat) for repeat in range(plan.num_steps))
        try:
            await self._deadline.within(timeout_s, self._write(message))
        except TimeoutError:
            raise GroupLost(f"step {plan.step} was not taken within {timeout_s:.1f} s") from None

    async def _write(self, message: pb.ToShard) -> None:
        for rank in self._ranks:
            await _call(rank.address, rank.stream.write(message))

    async def receive(self, timeout_s: float) -> StepOutput:
        """The answer to the oldest step sent. Raises `GroupLost` on any failure, also past `timeout_s`."""
        step = self._outstanding[0]
        if not await self._have_answers(timeout_s) and not await self._have_answers(GRACE_S):
            raise GroupLost(f"step {step.number} did not return within {timeout_s:.1f} s")
        self._outstanding.popleft()
        begun_at = time.perf_counter()
        output = self._decode(step, [answers.popleft() for answers in self._answers])
        self.codec_s += time.perf_counter() - begun_at
        return output

    async def _have_answers(self, timeout_s: float) -> bool:
        """Whether every rank has answered, within the time given."""
        try:
            await self._deadline.within(timeout_s, self._wait_for_answers())
        except TimeoutError:
            return False
        return True

    async def _wait_for_answers(self) -> None:
        while not self._has_answers():
            self.raise_if_lost()
            self._answered.clear()
            await self._answered.wait()

    def _has_answers(self) -> bool:
        return all(self._answers)

    def _decode(self, step: _Step, answers: list[pb.FromShard]) -> StepOutput:
        first = answers[0].output
        for rank, answer in zip(self._ranks[1:], answers[1:], strict=True):
            if (answer.ack.step, answer.ack.digest) != (step.number, first.digest):
                raise GroupLost(f"step {step.number}: {rank.address} does not hold the tokens that rank 0 chose")
        return decode_output(first, step.plan, self.info.vocab_size, repeat=step.repeat)

    async def close(self, *, goodbye: bool) -> None:
        """Leaves the ranks; with a goodbye they wait for the next epoch, without one they end."""
        ranks, self._ranks = self._ranks, []
        self._outstanding.clear()
        self._deadline.close()
        for rank in ranks:
            if goodbye:
                await _say_goodbye(rank)
            if rank.reader is not None:
                rank.reader.cancel()
            if rank.stream is not None:
                rank.stream.cancel()
            await rank.channel.close()
        self._lost = None


async def _say_goodbye(rank: _Rank) -> None:
    """Waits until the rank has closed its side, so that it sees the goodbye before the connection goes."""
    if rank.reader is None or rank.reader.done():
        return
    try:
        async with asyncio.timeout(GOODBYE_S):
            await rank.stream.write(pb.ToShard(bye=pb.Bye()))
            await rank.stream.done_writing()
            await rank.reader
    except (TimeoutError, grpc.RpcError, asyncio.InvalidStateError):
        return  # it is gone already, which is what we wanted


async def _call(address: str, call: Awaitable[T]) -> T:
    try:
        return await call
    except (grpc.RpcError, asyncio.InvalidStateError) as error:
        raise _lost(address, error) from error


def _lost(address: str, error: Exception) -> GroupLost:
    if isinstance(error, grpc.aio.AioRpcError):
        return GroupLost(f"{address}: {error.code().name}: {error.details()}")
    if isinstance(error, asyncio.InvalidStateError):  # grpc.aio: the stream has ended already
        return GroupLost(f"{address}: the stream has ended")
    return GroupLost(f"{address}: {error!r}")


def _group_info(info: pb.ShardInfo, configure: pb.ConfigureRequest) -> GroupInfo:
    return GroupInfo(
        epoch=configure.epoch,
        world_size=info.world_size,
        model_id=info.model_id,
        revision=info.revision,
        model_type=info.model_type,
        dtype=info.dtype,
        device=info.device,
        vocab_size=info.vocab_size,
        eos_token_ids=tuple(info.eos_token_ids),
        max_positions=info.max_positions,
        num_blocks=configure.num_blocks,
        block_size=configure.block_size,
        max_seats=configure.max_seats,
        max_step_tokens=configure.max_step_tokens,
        adapters=tuple(info.adapters),
    )
