"""Local shards: started, watched, restarted, stopped.

A group lives and dies as one: when any rank ends, all of them are killed and started anew, with growing pauses, until
too many deaths in a row say that it makes no sense. The kernel kills the ranks with this process (`PR_SET_PDEATHSIG` in
the shard), however it dies. What a rank has to say while it starts comes as JSON lines on its stdout; its log goes to
our stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from router.errors import StartupError

logger = logging.getLogger(__name__)

MAX_PAUSE_S: Final = 30.0
MAX_UNIX_PATH_BYTES: Final = 107
MAX_LINE_BYTES: Final = 1 << 20
STOP_GRACE_S: Final = 5.0
DEATH_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """How to start one group on this machine. `flags` go to every rank as they are."""

    model_directory: Path
    world_size: int
    flags: tuple[str, ...] = ()
    run_directory: Path | None = None
    """Where the sockets lie; None: a fresh private directory."""
    max_restarts: int = 5
    module: str = "shard"


OnProgress = Callable[[int, int, int], None]
"""rank, bytes done, bytes in all."""


@dataclass(slots=True)
class _Process:
    rank: int
    process: asyncio.subprocess.Process
    listener: asyncio.Task[None] = field(init=False)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    cause: str | None = None


async def find_checkpoint(model_id: str, revision: str | None, *, is_adapter: bool = False) -> Path:
    """The model's or adapter's directory, fetched or converted if need be, by the shard's own resolver in a process of
    its own.

    Raises `StartupError` with the resolver's one line. Its progress bars go to our stderr.
    """
    command = [sys.executable, "-m", "shard.checkpoint", model_id, "--parent-pid", str(os.getpid()), "--report"]
    if revision:
        command += ["--revision", revision]
    if is_adapter:
        command.append("--adapter")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    try:
        answer = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        raise StartupError(f"the model was not found: exit code {process.returncode}") from None
    if "failed" in answer:
        raise StartupError(answer["failed"])
    return Path(answer["directory"])


class LocalGroup:
    """The ranks of one group as child processes: the engine's `Supervisor`. Runs on the main thread's event loop."""

    def __init__(self, settings: LaunchSettings, on_progress: OnProgress) -> None:
        self._settings = settings
        self._on_progress = on_progress
        self._own_directory = settings.run_directory is None
        self._directory = _run_directory(settings.run_directory)
        self._processes: list[_Process] = []
        self._num_deaths = 0
        self._life = 0
        if len(os.fsencode(self._socket(settings.world_size))) > MAX_UNIX_PATH_BYTES:
            raise StartupError(f"{self._directory} is too long a path for a Unix socket")

    @property
    def addresses(self) -> list[str]:
        return [f"unix:{self._socket(rank)}" for rank in range(self._settings.world_size)]

    @property
    def process_ids(self) -> list[int]:
        return [entry.process.pid for entry in self._processes]

    def _socket(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}"

    def _store(self) -> Path:
        """The file through which the ranks of this life meet."""
        return self._directory / f"store-{self._life}"

    async def start(self) -> None:
        """Starts every rank and waits until all have loaded. Raises `StartupError` with the first rank's cause."""
        self._life += 1
        store = self._store()
        store.unlink(missing_ok=True)
        self._processes = [await self._spawn(rank, store) for rank in range(self._settings.world_size)]
        loaded = asyncio.create_task(self._wait_until_loaded())
        death = asyncio.create_task(self.wait_for_death())
        try:
            await asyncio.wait((loaded, death), return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise StartupError(death.result())
        except BaseException:
            await self.kill()
            raise
        finally:
            loaded.cancel()
            death.cancel()

    async def _wait_until_loaded(self) -> None:
        for entry in self._processes:
            await entry.ready.wait()

    async def _spawn(self, rank: int, store: Path) -> _Process:
        self._socket(rank).unlink(missing_ok=True)
        command: Sequence[str] = (
            *(sys.executable, "-m", self._settings.module),
            *("--model-id", str(self._settings.model_directory)),
            *("--rank", str(rank), "--world-size", str(self._settings.world_size)),
            *("--address", f"unix:{self._socket(rank)}", "--store-path", str(store)),
            *("--parent-pid", str(os.getpid()), "--report"),
            *self._settings.flags,
        )
        # A session of its own: Ctrl-C in the terminal reaches us alone, and we let the streams finish first.
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, start_new_session=True, limit=MAX_LINE_BYTES
        )
        entry = _Process(rank, process)
        entry.listener = asyncio.create_task(self._listen(entry))
        return entry

    async def _listen(self, entry: _Process) -> None:
        assert entry.process.stdout is not None
        async for line in _lines(entry.process.stdout):
            try:
                event = json.loads(line)
                name = event["event"]
            except (ValueError, KeyError, TypeError):
                logger.info("rank %d: %s", entry.rank, line.decode(errors="replace").rstrip())
                continue
            if name == "loading":
                self._on_progress(entry.rank, int(event["done_bytes"]), int(event["total_bytes"]))
            elif name == "ready":
                entry.ready.set()
            elif name == "failed":
                entry.cause = str(event["cause"])

    async def wait_for_death(self) -> str:
        """Returns when any rank has ended, with the cause in one line."""
        waits = {asyncio.create_task(p.process.wait()): p for p in self._processes}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        entries = sorted((waits[task] for task in done), key=lambda p: (p.cause is None, p.rank))
        await asyncio.wait((entries[0].listener,), timeout=1.0)  # its last words may still be in the pipe
        return _describe_death(entries[0])

    async def restart(self) -> None:
        """Kills what is left and starts anew, until the group is up.

        Raises `StartupError` after too many deaths in a row, that is without `note_served` in between.
        """
        await self._log_death()
        while True:
            await self.kill()
            self._num_deaths += 1
            if self._num_deaths > self._settings.max_restarts:
                raise StartupError(f"the shards died {self._num_deaths} times in a row")
            await asyncio.sleep(self._pause_s())
            try:
                await self.start()
            except StartupError as error:
                logger.error("the group did not start: %s", error)
                continue
            return

    async def _log_death(self) -> None:
        """Why the group is lost, if a rank ended: its connection, whose end brought us here, ends somewhat earlier."""
        if not self._processes:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEATH_S):
                logger.error("%s", await self.wait_for_death())

    def note_served(self) -> None:
        """The group did some work since it was started."""
        self._num_deaths = 0

    def _pause_s(self) -> float:
        """Nothing after the first death, then 1, 2, 4 ... seconds."""
        return 0.0 if self._num_deaths == 1 else min(MAX_PAUSE_S, 2.0 ** (self._num_deaths - 2))

    async def kill(self) -> None:
        """SIGKILL to every rank; returns when none is left."""
        for entry in self._processes:
            _send(entry, signal.SIGKILL)
        await self._reap()

    async def stop(self) -> None:
        """Asks every rank to end, kills those that do not, and removes the sockets."""
        for entry in self._processes:
            _send(entry, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE_S):
                await self._reap()
        await self.kill()
        if self._own_directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            return
        for path in (*map(self._socket, range(self._settings.world_size)), self._store()):
            path.unlink(missing_ok=True)

    async def _reap(self) -> None:
        for entry in self._processes:
            await entry.process.wait()
            await asyncio.wait((entry.listener,), timeout=1.0)
            entry.listener.cancel()
        self._processes = []


def _run_directory(chosen: Path | None) -> Path:
    """Only the owner may reach the sockets in it. Raises `StartupError` if it cannot be made."""
    try:
        if chosen is None:
            return Path(tempfile.mkdtemp(prefix="shardstream-"))
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"no folder for the shards' sockets at {chosen}: {error.strerror}") from error
    return chosen


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Lines until the end; one that is longer than `MAX_LINE_BYTES` is left out."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return
        yield line


def _send(entry: _Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        entry.process.send_signal(number)


def _describe_death(entry: _Process) -> str:
    if entry.cause is not None:
        return entry.cause
    code = entry.process.returncode
    if code is not None and code < 0:
        return f"rank {entry.rank} was ended by {signal.Signals(-code).name}"
    return f"rank {entry.rank} ended with exit code {code}"
