"""What an operator sees on the terminal: weights being loaded, and where the server is once it is ready."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from router.config import Config
from router.group.client import GroupInfo

PLAIN_INTERVAL_S: Final = 2.0


class LoadingDisplay:
    """One bar per rank on a terminal, plain lines elsewhere; with bytes and rate."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._begun_at: dict[int, float] = {}
        self._said_at: dict[int, float] = {}
        self._tasks: dict[int, TaskID] = {}
        columns = (TextColumn("rank {task.fields[rank]}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bars = Progress(*columns, console=self._console)

    def update(self, rank: int, done_bytes: int, total_bytes: int) -> None:
        if self._console.is_terminal:
            self._draw(rank, done_bytes, total_bytes)
        else:
            self._say(rank, done_bytes, total_bytes)

    def _draw(self, rank: int, done_bytes: int, total_bytes: int) -> None:
        if not self._tasks:
            self._bars.start()
        if rank not in self._tasks:
            self._tasks[rank] = self._bars.add_task("weights", total=total_bytes, rank=rank)
        self._bars.update(self._tasks[rank], completed=done_bytes, total=total_bytes)
        if self._bars.finished:
            self.close()

    def _say(self, rank: int, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        begun_at = self._begun_at.setdefault(rank, now)
        if done_bytes < total_bytes and now - self._said_at.get(rank, 0.0) < PLAIN_INTERVAL_S:
            return
        self._said_at[rank] = now
        rate = done_bytes / max(now - begun_at, 1e-3)
        self._console.print(
            f"rank {rank}: loaded {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s"
        )

    def close(self) -> None:
        """Leaves the bars as they are; a later restart of the group draws new ones."""
        self._bars.stop()
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        self._begun_at.clear()
        self._said_at.clear()


def ready_message(config: Config, info: GroupInfo, port: int) -> str:
    """Where the server is, what it serves, and a first request to paste."""
    host = "localhost" if config.hostname in ("0.0.0.0", "::") else config.hostname
    url = f"{host}:{port}"
    ranks = "1 rank" if info.world_size == 1 else f"{info.world_size} ranks"
    adapters = f"  adapters     {', '.join(info.adapters)}\n" if info.adapters else ""
    key = " -H 'authorization: Bearer <your key>'" if config.api_key else ""
    body = '{"inputs":"The capital of France is","parameters":{"max_new_tokens":20}}'
    return (
        f"Ready at http://{url}\n"
        f"  model        {config.model_name}, {info.dtype} on {info.device}, {ranks}\n"
        f"{adapters}"
        f"  KV capacity  {info.capacity_tokens:,} tokens in blocks of {info.block_size}\n"
        f"  try          curl -N {url}/generate_stream -H 'content-type: application/json'{key} -d '{body}'\n"
    )


class JsonFormatter(logging.Formatter):
    """One JSON object per record; control characters cannot forge another one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "timestamp": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(config: Config) -> None:
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if config.json_output else plain)
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def say(message: str) -> None:
    """To stderr, where the log goes too, so that stdout stays free."""
    sys.stderr.write(message)
    sys.stderr.flush()
