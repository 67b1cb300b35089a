"""`python -m router`: starts local shards unless told where some are, joins the group, serves HTTP until told to stop.

    bind the port ─► find the model ─► load the tokenizer ─► start shards ─► connect ─► serve ─► drain ─► stop shards

The first SIGTERM or SIGINT refuses new requests and lets running ones finish within `--drain-timeout`; the second ends
everything at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import uvicorn
import uvloop
from fastapi import FastAPI

from router.adapters import parse_adapters
from router.api.app import create_app
from router.api.connection import Connection
from router.config import BUNDLED_MODEL_ID, Config, load_config
from router.console import LoadingDisplay, configure_logging, ready_message, say
from router.engine import SHUTTING_DOWN, Elsewhere, Engine, EngineSettings, Supervisor
from router.errors import GroupLost, StartupError
from router.group.client import Demands, GroupClient
from router.launch import LaunchSettings, LocalGroup, find_checkpoint
from router.metrics import Metrics
from router.models import find_text_files
from router.text.chat import ChatTemplate
from router.text.tokenizer import Tokenizer
from router.validate import Capacity, Limits, Validator

logger = logging.getLogger(__name__)

FIND_TIMEOUT_S: Final = 8.0
"""A rank that does not even listen for this long is missing."""

LOAD_TIMEOUT_S: Final = 3600.0
"""A rank that listens may take this long to load its weights."""

BACKLOG: Final = 2048
CLOSE_TIMEOUT_S: Final = 5
"""After the drain nothing should be left to send; connections that are still open are cut."""

T = TypeVar("T")


def main() -> None:
    loaded = load_config(sys.argv[1:], os.environ)
    configure_logging(loaded.config)
    if loaded.config.huggingface_hub_cache:
        os.environ["HF_HUB_CACHE"] = loaded.config.huggingface_hub_cache
    os.environ["LOG_LEVEL"] = loaded.config.log_level  # for the shards
    for notice in loaded.notices:
        logger.warning("%s", notice)
    _share_cores(loaded.config)
    try:
        uvloop.run(_run(loaded.config))
    except StartupError as error:
        say(f"error: {error}\n")
        sys.exit(1)
    except asyncio.CancelledError:
        sys.exit(1)


def _share_cores(config: Config) -> None:
    """Where local shards compute on the same cores, has Linux not interrupt a thread of ours for another that wakes up.

    A step's threads wait for each other, so that what interrupts one holds up all; behind the step, where one thread
    samples, a core is free anyway. Holds for this process and all that it starts.
    """
    computes_here = config.device == "cpu" or (config.device == "auto" and not Path("/dev/nvidiactl").exists())
    if not computes_here or config.shard_addresses:
        return
    with suppress(OSError):  # a sandbox may forbid it or not know it; it is only a matter of speed
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


async def _run(config: Config) -> None:
    """Serves until told to stop; also returns if that comes while the model loads.

    Raises `StartupError` if the server cannot start or its group is given up, `CancelledError` if told to hurry.
    """
    signals = _Signals()
    with _listen(config) as listener:
        starting = asyncio.create_task(_start_and_serve(config, listener, signals))
        signals.cancel_instead = starting
        try:
            await starting
        except asyncio.CancelledError:
            if signals.num_received != 1:
                raise


class _Signals:
    """The first SIGTERM or SIGINT asks to stop, a second one insists."""

    def __init__(self) -> None:
        self.num_received = 0
        self.stop = asyncio.Event()
        self.cancel_instead: asyncio.Task[None] | None = None
        """What a signal cancels, while there is nothing to drain or when it is the second."""
        self.is_serving = False
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        self.num_received += 1
        self.stop.set()
        if self.cancel_instead is not None and (not self.is_serving or self.num_received > 1):
            self.cancel_instead.cancel()


async def _start_and_serve(config: Config, listener: socket.socket, signals: _Signals) -> None:
    """Each part is undone in the reverse order: HTTP, engine, client, shards."""
    directory = await _find_model(config)
    adapters = await _find_adapters(config)
    tokenizer = Tokenizer.load(directory, workers=config.validation_workers)
    template = ChatTemplate.load(directory, workers=config.validation_workers)
    begun_at = time.monotonic()
    async with (
        _group(config, directory, adapters) as (addresses, supervisor),
        _connected(config, addresses) as client,
    ):
        loaded_s = time.monotonic() - begun_at
        engine, server = _assemble(config, client, tokenizer, template, supervisor, loaded_s)
        async with (
            _background(engine.run()) as loop,
            _background(server.serve(sockets=[listener])) as http,
            _background(signals.stop.wait()) as stopping,
        ):
            signals.is_serving = True
            gc.collect()
            gc.freeze()  # what was imported and loaded stays; looking through it again would hold up a step for 15 ms
            say(ready_message(config, client.info, listener.getsockname()[1]))
            await asyncio.wait((stopping, loop, http), return_when=asyncio.FIRST_COMPLETED)
            await _drain(config, engine)
            server.should_exit = True
            await http
            if loop.done():
                loop.result()


@contextmanager
def _listen(config: Config) -> Iterator[socket.socket]:
    """The HTTP socket, listening before anything slow is started: whoever connects meanwhile waits in the backlog.

    Raises `StartupError` if the port is taken.
    """
    family = socket.AF_INET6 if ":" in config.hostname else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.hostname, config.port))
            listener.listen(BACKLOG)
        except OSError as error:
            raise StartupError(f"cannot listen on {config.hostname}:{config.port}: {error.strerror}") from error
        yield listener


async def _find_model(config: Config) -> Path:
    """The model's directory: with weights if they are loaded here or are the bundled ones, else with the small files at
    least."""
    if config.shard_addresses and config.model_id != BUNDLED_MODEL_ID:
        return await asyncio.to_thread(find_text_files, config.model_id, config.revision)
    return await find_checkpoint(config.model_id, config.revision)


async def _find_adapters(config: Config) -> dict[str, Path]:
    """The folder of each that is loaded here, by name."""
    sources = [] if config.shard_addresses else parse_adapters(config.lora_adapters)
    return {name: await find_checkpoint(place, revision, is_adapter=True) for name, place, revision in sources}


@asynccontextmanager
async def _group(
    config: Config, directory: Path, adapters: Mapping[str, Path]
) -> AsyncIterator[tuple[list[str], Supervisor]]:
    """Where the shards are and who keeps them alive; local ones are started and, at the end, stopped."""
    if config.shard_addresses:
        yield list(config.shard_addresses), Elsewhere()
        return
    flags = (
        *("--dtype", config.dtype, "--device", config.device),
        *("--quantize", config.quantize),
        *("--kv-cache-bytes", str(config.kv_cache_bytes)),
        *("--cuda-memory-fraction", str(config.cuda_memory_fraction)),
        *("--step-timeout-s", str(config.step_timeout)),
        *("--lora-adapters", ",".join(f"{name}={folder}" for name, folder in adapters.items())),
        *(("--json-output",) if config.json_output else ()),
    )
    run_directory = Path(config.shard_uds_path) if config.shard_uds_path else None
    display = LoadingDisplay()
    settings = LaunchSettings(directory, config.num_shard or 1, flags, run_directory)
    group = LocalGroup(settings, on_progress=display.update)
    try:
        await group.start()
        display.close()
        yield group.addresses, group
    finally:
        display.close()
        await group.stop()


@asynccontextmanager
async def _connected(config: Config, addresses: list[str]) -> AsyncIterator[GroupClient]:
    demands = Demands(config.max_batch_size, config.max_batch_prefill_tokens, config.max_batch_total_tokens)
    client = GroupClient(addresses, demands)
    try:
        await client.connect(find_s=FIND_TIMEOUT_S, load_s=LOAD_TIMEOUT_S)
        yield client
    except GroupLost as error:
        raise StartupError(str(error)) from error
    finally:
        await client.close(goodbye=True)


def _assemble(
    config: Config,
    client: GroupClient,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    supervisor: Supervisor,
    loaded_s: float,
) -> tuple[Engine, HttpServer]:
    """Raises `StartupError` for limits that the group cannot hold, or adapters that it does not have."""
    info = client.info
    wanted = tuple(adapter.name for adapter in parse_adapters(config.lora_adapters))
    if wanted not in ((), info.adapters):
        raise StartupError(f"the shards have the LoRA adapters {list(info.adapters)}, not {list(wanted)}")
    max_positions = info.max_positions or None
    capacity = Capacity(info.vocab_size, info.eos_token_ids, info.capacity_tokens, max_positions, info.adapters)
    limits = Limits.derive(config, capacity, tokenizer)
    metrics = Metrics(max_input_tokens=limits.max_input_tokens, max_total_tokens=limits.max_total_tokens)
    settings = EngineSettings(
        lookahead=config.lookahead,
        step_timeout_s=config.step_timeout,
        find_timeout_s=FIND_TIMEOUT_S,
        load_timeout_s=LOAD_TIMEOUT_S,
        prefix_caching=config.prefix_caching,
        max_drafts=config.speculate,
        loaded_s=loaded_s,
    )
    seed = secrets.token_bytes(16)
    engine = Engine(client, tokenizer, metrics, settings, prefix_seed=seed, supervisor=supervisor)
    validator = Validator(limits, tokenizer)
    if limits.allows_grammars:
        validator.grammars.start()
    sha = info.revision or None
    app = create_app(config, engine, validator, tokenizer, metrics, template=template, model_sha=sha)
    return engine, HttpServer(app)


@asynccontextmanager
async def _background(work: Coroutine[object, object, T]) -> AsyncIterator[asyncio.Task[T]]:
    """A task that is ended on the way out, whatever it was doing."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _drain(config: Config, engine: Engine) -> None:
    """Refuses new requests and lets running ones end."""
    engine.refuse(SHUTTING_DOWN)
    logger.info("draining for at most %.0f s", config.drain_timeout)
    await engine.drain(config.drain_timeout)


class HttpServer(uvicorn.Server):
    """uvicorn inside our loop; the signals are ours."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
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
