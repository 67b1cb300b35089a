"""What a rank says while it starts: a bar on a terminal, plain lines elsewhere, JSON lines for a launcher."""

from __future__ import annotations

import json
import sys
import time
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

MIN_INTERVAL_S: Final = 0.2
PLAIN_INTERVAL_S: Final = 2.0


class StartReporter:
    """Start-up events of one rank. `loading` is called from the model thread, the rest from the event loop."""

    def __init__(self, rank: int, *, as_json: bool) -> None:
        self._rank = rank
        self._as_json = as_json
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._begun_at = time.monotonic()
        self._last_at = 0.0

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """Bytes of this rank's weights read so far."""
        now = time.monotonic()
        interval_s = PLAIN_INTERVAL_S if not self._as_json and not self._console.is_terminal else MIN_INTERVAL_S
        if done_bytes < total_bytes and now - self._last_at < interval_s:
            return
        self._last_at = now
        if self._as_json:
            self._event("loading", done_bytes=done_bytes, total_bytes=total_bytes)
        elif self._console.is_terminal:
            self._draw(done_bytes, total_bytes)
        else:
            rate = done_bytes / max(now - self._begun_at, 1e-3) / 1e6
            self._console.print(
                f"rank {self._rank}: {done_bytes / 1e6:.0f} of {total_bytes / 1e6:.0f} MB ({rate:.0f} MB/s)"
            )

    def _draw(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None:
            columns = (TextColumn("rank {task.fields[rank]}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("weights", total=total_bytes, rank=self._rank)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done_bytes)
        if done_bytes >= total_bytes:
            self._bar.stop()

    def ready(self, address: str) -> None:
        if self._as_json:
            self._event("ready", address=address)
        else:
            self._console.print(f"rank {self._rank}: ready at {address}")

    def failed(self, cause: str) -> None:
        """`cause` is one line."""
        if self._bar is not None:
            self._bar.stop()
        if self._as_json:
            self._event("failed", cause=cause)
        else:
            self._console.print(f"rank {self._rank}: {cause}", style="red", markup=False, soft_wrap=True)

    def _event(self, name: str, **values: str | int) -> None:
        sys.stdout.write(json.dumps({"event": name, "rank": self._rank, **values}) + "\n")
        sys.stdout.flush()
