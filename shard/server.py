"""The gRPC face of a rank: one Execute stream at a time, plans handed to the model thread in order.

The event loop never touches a tensor, but shares the interpreter with the model thread, which needs it between two
forward passes and hardly ever within one. So the answer of a step is handed over when the next pass begins. Where the
device works by itself, the model thread starts steps as their plans come, and another waits for the device and hands
answers over: neither a plan nor an answer waits for the other.

The port is open before the weights are loaded, so that a router can tell a rank
that is loading (Describe waits, health says NOT_SERVING) from one that is missing (connection refused).

An epoch ends in one of two ways. The router says Bye: the rank waits for the next epoch. Anything else (a lost stream,
a step that raises or hangs) ends the process, and until it is gone nobody is let in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from proto import shard_pb2 as pb
from proto import shard_pb2_grpc

if TYPE_CHECKING:
    from shard.worker import StartedStep, Worker

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 64 << 20
LAST_WORDS_S: Final = 0.1
"""How long a dying rank lives on, so that its Fault reaches the router."""

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["Shard"].full_name
HEALTH_NAMES: Final = ("", "liveness", "readiness", SERVICE_NAME)
SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # A router whose machine is gone sends no FIN: without pings its epoch would last for ever.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

Plans = SimpleQueue[tuple[pb.StepPlan, float] | None]
"""Plans and when they arrived (`time.perf_counter`), in their order; None after the last."""

Started: TypeAlias = "SimpleQueue[StartedStep | None]"
"""Steps that the device was told to do, in their order; None after the last."""

Answers = asyncio.Queue[pb.FromShard | None]

HandOver = Callable[[pb.FromShard | None], None]


@dataclass(slots=True)
class Waiting:
    """Steps without an answer."""

    num_steps: int = 0
    since: float = 0.0
    """When the step that is to be answered next could begin (`time.perf_counter`)."""

    def plan_came(self, num_steps: int, at: float) -> None:
        if not self.num_steps:
            self.since = at
        self.num_steps += num_steps

    def answer_came(self) -> None:
        self.num_steps -= 1
        self.since = time.perf_counter()


class ShardServicer(shard_pb2_grpc.ShardServicer):  # type: ignore[misc]
    """Serves a worker that may still be loading."""

    def __init__(self, model_thread: ThreadPoolExecutor, step_timeout_s: float) -> None:
        self._model_thread = model_thread
        self._step_timeout_s = step_timeout_s
        self._worker: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._epoch = 0
        self._is_executing = False
        self._is_ending = False

    def serve(self, worker: Worker) -> None:
        self._worker.set_result(worker)

    async def _admit(self, context: Any) -> Worker:
        """The worker, once it has loaded."""
        if self._is_ending:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this rank is ending")
        return await asyncio.shield(self._worker)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.ShardInfo:
        worker = await self._admit(context)
        return worker.describe()

    async def Configure(self, request: pb.ConfigureRequest, context: Any) -> pb.ConfigureReply:
        worker = await self._admit(context)
        if self._is_executing:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another router drives this rank")
        if request.epoch <= self._epoch:
            cause = f"epoch {request.epoch} is not above {self._epoch}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, cause)
        self._epoch = request.epoch
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, worker.configure, request)

    async def Execute(self, _requests: Any, context: Any) -> None:
        worker = await self._admit(context)
        first = await context.read()
        epoch = first.hello.epoch if isinstance(first, pb.ToShard) else 0
        if epoch != self._epoch or self._is_executing:
            cause = f"epoch {epoch} is not the configured {self._epoch}, or it is being served already"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, cause)
        self._is_executing = True
        try:
            await context.write(pb.FromShard(welcome=pb.Welcome(epoch=epoch)))
            await self._serve_epoch(worker, context)
            self._is_executing = False
        except Exception as error:
            logger.exception("the epoch ends; its sequences: %s", ", ".join(worker.owners) or "none")
            await context.write(
                pb.FromShard(fault=pb.Fault(message=f"{type(error).__name__}: {error}".splitlines()[0]))
            )
        finally:
            if self._is_executing:
                self._end("the epoch ended: its stream or a step was lost")

    async def _serve_epoch(self, worker: Worker, context: Any) -> None:
        """Answers plans in their order until Bye; they wait for the model thread as they arrive."""
        loop = asyncio.get_running_loop()
        plans: Plans = SimpleQueue()
        answers: Answers = asyncio.Queue()
        waiting = Waiting()

        def hand_over(answer: pb.FromShard | None) -> None:
            loop.call_soon_threadsafe(answers.put_nowait, answer)

        run = start_plans if worker.starts_ahead else run_plans
        steps = loop.run_in_executor(self._model_thread, run, worker, plans, hand_over)
        tasks = [
            asyncio.create_task(_read_plans(context, plans, waiting)),
            asyncio.create_task(_write_answers(context, answers, waiting)),
            asyncio.create_task(_watch(waiting, self._step_timeout_s)),
        ]
        reader, writer, watch = tasks
        try:
            await asyncio.wait((writer, watch), return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                await watch
            await writer
            await steps
            await reader
        finally:
            for task in tasks:
                task.cancel()

    def _end(self, cause: str) -> None:
        """Ends the process even if the model thread hangs in a collective."""
        logger.error("%s", cause)
        self._is_ending = True
        asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)


def run_plans(worker: Worker, plans: Plans, hand_over: HandOver) -> None:
    """Runs plans on the model thread until there are no more, and hands the answers to their steps over, in order; None
    is the last.

    Whoever takes an answer wakes up and works, and would hold up the inputs of the next step if one is waiting already.
    Its answer waits until these are made, a tenth of a millisecond, unless sequences come or go, for which making ready
    may take long; nor is it lost if that step fails.
    """
    held: list[pb.FromShard] = []  # one, or none

    def deliver() -> None:
        while held:
            hand_over(held.pop())

    try:
        while True:
            if plans.empty():
                deliver()
            if (next_plan := plans.get()) is None:
                return
            plan, arrived_at = next_plan
            if plan.opens or plan.closes:
                deliver()
            step = worker.prepare(plan, arrived_at)
            deliver()
            held.append(worker.run(step))
            for _ in range(plan.num_repeats):
                step = worker.prepare_repeat(step)
                deliver()
                held.append(worker.run(step))
    finally:
        deliver()
        hand_over(None)


def start_plans(worker: Worker, plans: Plans, hand_over: HandOver) -> None:
    """As `run_plans`, but starts each step while those before it run; their answers are made and handed over on a
    thread of their own. Raises what either thread raises, once all is answered that was started before.

    How far it gets ahead is for the router to say, which sends no more plans than it can foresee.
    """
    started: Started = SimpleQueue()
    with ThreadPoolExecutor(1, thread_name_prefix="answers") as answers:
        answering = answers.submit(_answer_steps, worker, started, plans, hand_over)
        try:
            while (next_plan := plans.get()) is not None:
                plan, arrived_at = next_plan
                step = worker.prepare(plan, arrived_at)
                started.put(worker.start(step))
                for _ in range(plan.num_repeats):
                    step = worker.prepare_repeat(step)
                    started.put(worker.start(step))
        finally:
            started.put(None)
            try:
                answering.result()
            finally:
                hand_over(None)


def _answer_steps(worker: Worker, started: Started, plans: Plans, hand_over: HandOver) -> None:
    try:
        while (step := started.get()) is not None:
            hand_over(worker.finish(step))
    finally:
        plans.put(None)  # if a step failed, the model thread may be waiting for a plan


async def _read_plans(context: Any, plans: Plans, waiting: Waiting) -> None:
    """Returns when the router says Bye. Raises `ConnectionError` if it goes without."""
    try:
        while True:
            message = await context.read()
            if message is grpc.aio.EOF:
                raise ConnectionError("the router went away without a goodbye")
            if message.HasField("bye"):
                return
            arrived_at = time.perf_counter()
            waiting.plan_came(1 + message.plan.num_repeats, arrived_at)
            plans.put((message.plan, arrived_at))
    finally:
        plans.put(None)


async def _write_answers(context: Any, answers: Answers, waiting: Waiting) -> None:
    while (answer := await answers.get()) is not None:
        waiting.answer_came()
        await context.write(answer)


async def _watch(waiting: Waiting, step_timeout_s: float) -> None:
    """Raises `TimeoutError` when a step takes too long. Looks only as often as one could have."""
    while True:
        waited_s = time.perf_counter() - waiting.since if waiting.num_steps else 0.0
        if waited_s >= step_timeout_s:
            raise TimeoutError(f"a step has not ended within {step_timeout_s:g} s")
        await asyncio.sleep(step_timeout_s - waited_s)


async def open_port(address: str, servicer: ShardServicer) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """Listens at `address` (`unix:/path` or `host:port`). Raises `OSError` when it is taken."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    shard_pb2_grpc.add_ShardServicer_to_server(servicer, server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await set_health(health_servicer, serving=False)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen at {address}") from error
    if bound == 0:
        raise OSError(f"cannot listen at {address}")
    await server.start()
    return server, health_servicer


async def set_health(servicer: health.aio.HealthServicer, *, serving: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in HEALTH_NAMES:
        alive = health_pb2.HealthCheckResponse.SERVING if name == "liveness" else status
        await servicer.set(name, alive)
