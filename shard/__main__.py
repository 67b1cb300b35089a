"""`python -m shard`: one rank of a group. Opens its port, loads its part of the weights, serves until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import uvloop

from shard.config import ShardConfig, parse
from shard.errors import LoadError
from shard.logs import configure_logging
from shard.parent import end_with
from shard.progress import StartReporter
from shard.server import ShardServicer, open_port, set_health

if TYPE_CHECKING:
    from shard.worker import Worker

logger = logging.getLogger(__name__)


def main() -> None:
    config = parse()
    end_with(config.parent_pid)
    configure_logging(config.rank, as_json=config.json_output)
    code = uvloop.run(_serve(config))
    sys.stdout.flush()
    os._exit(code)  # the model thread may hang in a collective; nothing is left to tidy up


async def _serve(config: ShardConfig) -> int:
    """Exit code: 0 when told to stop, 1 when the rank could not start."""
    reporter = StartReporter(config.rank, as_json=config.report)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
    servicer = ShardServicer(model_thread, config.step_timeout_s)
    try:
        server, health_servicer = await open_port(config.address, servicer)
    except OSError as error:
        reporter.failed(_one_line(error))
        return 1
    try:
        loading = asyncio.get_running_loop().run_in_executor(model_thread, _load, config, reporter)
        servicer.serve(await _unless(stop, loading))
    except asyncio.CancelledError:
        return 0
    except Exception as error:  # whatever keeps a rank from starting is for its launcher to show
        logger.debug("the rank cannot start", exc_info=True)
        reporter.failed(_one_line(error))
        await server.stop(grace=None)
        return 1
    await set_health(health_servicer, serving=True)
    reporter.ready(config.address)
    await stop.wait()
    await server.stop(grace=None)
    return 0


def _one_line(error: Exception) -> str:
    """Errors of ours are sentences; others need their type to be understood."""
    message = (str(error).splitlines() or [""])[0]
    return message if isinstance(error, LoadError | OSError) else f"{type(error).__name__}: {message}"


async def _unless(stop: asyncio.Event, loading: asyncio.Future[Worker]) -> Worker:
    """The loaded worker. Raises `CancelledError` when the process is told to stop first."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((stopping, loading), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        raise asyncio.CancelledError
    stopping.cancel()
    return loading.result()


def _load(config: ShardConfig, reporter: StartReporter) -> Worker:
    """On the model thread: torch is imported here, after the port is open."""
    # Threads that wait for each other by spinning take the cores from those they wait for. Measured with one other busy
    # process on two cores: 12 ms instead of up to 38 for 60 small products, for 5.3 instead of 4.9 ms alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from shard.worker import start

    return start(config, reporter.loading)


if __name__ == "__main__":
    main()
