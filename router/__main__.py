"""`python -m router`: starts local shards unless told where some are, joins the group, serves HTTP until told to stop.

    bind the port ─► find the model ─► start shards ─► connect ─► load the tokenizer ─► serve ─► drain ─► stop shards

The first SIGTERM or SIGINT refuses new requests and lets running ones finish within `--drain-timeout`; the second ends
everything at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, TypeVar

import uvicorn
import uvloop
from fastapi import FastAPI

from router.api.app import create_app
from router.config import Config, load_config
from router.console import LoadingDisplay, configure_logging, ready_message, say
from router.engine import Engine, EngineSettings
from router.errors import GroupLost, NotReady, StartupError
from router.group.client import Demands, GroupClient, GroupInfo
from router.launch import LaunchSettings, LocalGroup, find_checkpoint
from router.metrics import Metrics
from router.models import find_text_files
from router.text.tokenizer import Tokenizer
from router.validate import Capacity, Limits, Validator

logger = logging.getLogger(__name__)

FIND_TIMEOUT_S: Final = 8.0
"""A rank that does not even listen for this long is missing."""

LOAD_TIMEOUT_S: Final = 3600.0
"""A rank that listens may take this long to load its weights."""

CLOSE_TIMEOUT_S: Final = 5
"""After the drain nothing should be left to send; connections that are still open are cut."""

T = TypeVar("T")


def main() -> None:
    loaded = load_config(sys.argv[1:], os.environ)
    configure_logging(loaded.config)
    for notice in loaded.notices:
        logger.warning("%s", notice)
    try:
        uvloop.run(_run(loaded.config))
    except StartupError as error:
        say(f"error: {error}\n")
        sys.exit(1)
    except asyncio.CancelledError:
        sys.exit(1)


async def _run(config: Config) -> None:
    """Raises `StartupError` if the server cannot start or its group is given up, `CancelledError` if told to hurry."""
    stop = asyncio.Event()
    _stop_on_signals(stop)
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(_listen(config))
        engine, server, message = await _start(config, listener, stack)
        loop = stack.enter_context(_task(engine.run()))
        http = stack.enter_context(_task(server.serve(sockets=[listener])))
        stopping = stack.enter_context(_task(stop.wait()))
        if not stop.is_set():
            say(message)
        await asyncio.wait((stopping, loop, http), return_when=asyncio.FIRST_COMPLETED)
        await _drain(config, engine)
        server.should_exit = True
        await http
        if loop.done():
            loop.result()


def _stop_on_signals(stop: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT asks, the second insists."""
    loop, main_task = asyncio.get_running_loop(), asyncio.current_task()
    assert main_task is not None

    def on_signal() -> None:
        if stop.is_set():
            main_task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


@contextmanager
def _task(work: Coroutine[object, object, T]) -> Iterator[asyncio.Task[T]]:
    """A task that is cancelled on the way out."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()


@contextmanager
def _listen(config: Config) -> Iterator[socket.socket]:
    """The HTTP socket, bound before anything slow is started. Raises `StartupError` if the port is taken."""
    family = socket.AF_INET6 if ":" in config.hostname else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.hostname, config.port))
        except OSError as error:
            raise StartupError(f"cannot listen on {config.hostname}:{config.port}: {error.strerror}") from error
        yield listener


async def _start(config: Config, listener: socket.socket, stack: AsyncExitStack) -> tuple[Engine, HttpServer, str]:
    """Everything up to the moment when requests can be served; `stack` undoes it. The string is for the operator."""
    restart = _nobody_restarts
    addresses = list(config.shard_addresses)
    if addresses:
        directory = await asyncio.to_thread(find_text_files, config.model_id, config.revision)
    else:
        directory = await find_checkpoint(config.model_id, config.revision)
        group = await stack.enter_async_context(_local_group(config, directory))
        addresses, restart = group.addresses, group.restart
    client = GroupClient(addresses, _demands(config))
    stack.push_async_callback(client.close, goodbye=True)
    try:
        info = await client.connect(find_s=FIND_TIMEOUT_S, load_s=LOAD_TIMEOUT_S)
    except GroupLost as error:
        raise StartupError(str(error)) from error
    tokenizer = Tokenizer.load(directory, workers=config.validation_workers)
    stack.callback(tokenizer.close)
    limits = Limits.derive(config, _capacity(info), tokenizer)
    metrics = Metrics(max_input_tokens=limits.max_input_tokens, max_total_tokens=limits.max_total_tokens)
    settings = EngineSettings(
        lookahead=config.lookahead,
        step_timeout_s=config.step_timeout,
        load_timeout_s=LOAD_TIMEOUT_S,
        prefix_caching=config.prefix_caching,
    )
    engine = Engine(client, tokenizer, metrics, settings, prefix_seed=secrets.token_bytes(16), restart=restart)
    app = create_app(config, engine, Validator(limits, tokenizer), tokenizer, metrics)
    return engine, HttpServer(app), ready_message(config, info, listener.getsockname()[1])


@asynccontextmanager
async def _local_group(config: Config, directory: Path) -> AsyncIterator[LocalGroup]:
    flags = (
        *("--dtype", config.dtype, "--device", config.device),
        *("--kv-cache-bytes", str(config.kv_cache_bytes)),
        *("--cuda-memory-fraction", str(config.cuda_memory_fraction)),
    )
    run_directory = Path(config.shard_uds_path) if config.shard_uds_path else None
    display = LoadingDisplay()
    settings = LaunchSettings(directory, config.num_shard or 1, flags, run_directory)
    group = LocalGroup(settings, on_progress=display.update)
    try:
        await group.start()
        display.close()
        yield group
    finally:
        display.close()
        await group.stop()


async def _nobody_restarts() -> None:
    """Shards that run elsewhere are brought back by whoever started them; connecting waits for them."""


def _demands(config: Config) -> Demands:
    return Demands(config.max_batch_size, config.max_batch_prefill_tokens, config.max_batch_total_tokens)


def _capacity(info: GroupInfo) -> Capacity:
    return Capacity(info.vocab_size, info.eos_token_ids, info.capacity_tokens, info.max_positions or None)


async def _drain(config: Config, engine: Engine) -> None:
    """Refuses new requests and lets running ones end."""
    engine.refuse(NotReady("the server is shutting down"))
    logger.info("draining for at most %.0f s", config.drain_timeout)
    await engine.drain(config.drain_timeout)


class HttpServer(uvicorn.Server):
    """uvicorn inside our loop; the signals are ours."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


if __name__ == "__main__":
    main()
