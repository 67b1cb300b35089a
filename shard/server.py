"""The gRPC face of a rank: one Execute stream at a time, plans handed to the model thread in order.

The event loop never touches a tensor. The port is open before the weights are loaded, so that a router can tell a rank
that is loading (Describe waits, health says NOT_SERVING) from one that is missing (connection refused).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from proto import shard_pb2 as pb
from proto import shard_pb2_grpc

if TYPE_CHECKING:
    from shard.worker import Worker

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 64 << 20
SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["Shard"].full_name
HEALTH_NAMES: Final = ("", "liveness", "readiness", SERVICE_NAME)


class ShardServicer(shard_pb2_grpc.ShardServicer):  # type: ignore[misc]
    """Serves a worker that may still be loading."""

    def __init__(self, model_thread: ThreadPoolExecutor, step_timeout_s: float) -> None:
        self._model_thread = model_thread
        self._step_timeout_s = step_timeout_s
        self._worker: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._epoch = 0
        self._executing = False
        self._next_deadline = float("inf")

    def serve(self, worker: Worker) -> None:
        self._worker.set_result(worker)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.ShardInfo:
        worker = await asyncio.shield(self._worker)
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, worker.describe)

    async def Configure(self, request: pb.ConfigureRequest, context: Any) -> pb.ConfigureReply:
        worker = await asyncio.shield(self._worker)
        if self._executing:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another router drives this rank")
        if request.epoch <= self._epoch:
            cause = f"epoch {request.epoch} is not above {self._epoch}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, cause)
        self._epoch = request.epoch
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, worker.configure, request)

    async def Execute(self, requests: AsyncIterator[pb.ToShard], context: Any) -> AsyncIterator[pb.FromShard]:
        worker = await asyncio.shield(self._worker)
        hello = (await anext(requests)).hello
        if hello.epoch != self._epoch or self._executing:
            cause = f"epoch {hello.epoch} is not the configured {self._epoch}, or it is being served already"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, cause)
        self._executing = True
        left_on_purpose = False
        try:
            yield pb.FromShard(welcome=pb.Welcome(epoch=hello.epoch))
            async for answer in self._answers(worker, requests):
                yield answer
            left_on_purpose = True
        except Exception as error:
            logger.exception("the epoch ends")
            yield pb.FromShard(fault=pb.Fault(message=f"{type(error).__name__}: {error}".splitlines()[0]))
        finally:
            self._executing = False
            if not left_on_purpose:
                _exit_soon("the epoch ended: its stream or a step was lost")

    async def _answers(self, worker: Worker, requests: AsyncIterator[pb.ToShard]) -> AsyncIterator[pb.FromShard]:
        """Answers in the order of the plans; plans are queued on the model thread as they arrive."""
        steps: asyncio.Queue[asyncio.Future[pb.FromShard] | None] = asyncio.Queue()
        reader = asyncio.create_task(self._read_plans(worker, requests, steps))
        try:
            while (step := await steps.get()) is not None:
                async with asyncio.timeout(self._step_timeout_s):
                    answer = await step
                yield answer
            await reader
        finally:
            reader.cancel()

    async def _read_plans(
        self,
        worker: Worker,
        requests: AsyncIterator[pb.ToShard],
        steps: asyncio.Queue[asyncio.Future[pb.FromShard] | None],
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for message in requests:
                if message.HasField("bye"):
                    return
                arrived_at = time.perf_counter()
                steps.put_nowait(loop.run_in_executor(self._model_thread, worker.step, message.plan, arrived_at))
            raise ConnectionError("the router went away without a goodbye")
        finally:
            steps.put_nowait(None)


def _exit_soon(cause: str) -> None:
    """Ends the process even if the model thread hangs in a collective; the delay lets the Fault reach the router."""
    logger.error("%s", cause)
    asyncio.get_running_loop().call_later(0.1, os._exit, 1)


async def open_port(address: str, servicer: ShardServicer) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """Listens at `address` (`unix:/path` or `host:port`). Raises `OSError` when it is taken."""
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(options=options)
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
