"""An engine as a process: started, asked, stopped.

Asking is all the bench knows of an engine. Two kinds exist, one that listens and one at the other end of a pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.client import BenchError, Json, record
from tests.bench.peers.dialects import Answer
from tests.bench.peers.engines import HOST, ROOT, Engine
from tests.bench.peers.machine import process_tree

READY_TIMEOUT_S: Final = 300.0
READY_POLL_S: Final = 0.05
STOP_TIMEOUT_S: Final = 20.0
ANSWER_TIMEOUT_S: Final = 300.0
"""Of one group of prompts; nobody needs half of it."""
LOG_TAIL_LINES: Final = 3


@dataclass(frozen=True, slots=True)
class Group:
    """What came of prompts that were asked at once, and the processor time that asking took in this process."""

    answers: list[Answer]
    client_cpu_s: float


class Server:
    """A running engine."""

    def __init__(self, engine: Engine, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self._engine = engine
        self._process = process
        self._url = f"http://{HOST}:{port}"
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, prompts: Sequence[str], num_new_tokens: int) -> Group:
        """All prompts at once. Raises `BenchError` unless every answer has `num_new_tokens` tokens."""
        asking = self._through_pipe if self._engine.dialect is None else self._over_http
        try:
            group = await asyncio.wait_for(asking(prompts, num_new_tokens), ANSWER_TIMEOUT_S)
        except TimeoutError:
            raise BenchError(f"no answer within {ANSWER_TIMEOUT_S:.0f} s; {self.last_words()}") from None
        for answer in group.answers:
            if answer.num_tokens != num_new_tokens:
                raise BenchError(f"{answer.num_tokens} tokens came, not {num_new_tokens}")
        return group

    async def wait_until_ready(self, prompt: str) -> None:
        """Until it answers with a first token. Raises `BenchError` if it ends or takes too long."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                await self.ask([prompt], 1)
                return
            except BenchError as error:
                if self._process.poll() is not None:
                    raise BenchError(f"ended with code {self._process.returncode}; {self.last_words()}") from None
                if time.monotonic() > deadline:
                    raise BenchError(f"not ready within {READY_TIMEOUT_S:.0f} s: {error}") from None
            await asyncio.sleep(READY_POLL_S)

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return f"{self._log}: {' / '.join(line.strip() for line in lines[-LOG_TAIL_LINES:])}"

    def stop(self) -> None:
        """Politely, then whatever of it is left."""
        pids = process_tree(self.pid)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            # What was not read by then closes as broken.
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    async def _over_http(self, prompts: Sequence[str], num_new_tokens: int) -> Group:
        dialect = self._engine.dialect
        assert dialect is not None, self._engine.name
        bodies = [dialect.body(prompt, num_new_tokens) for prompt in prompts]
        cpu_s = time.process_time()
        recordings = await asyncio.gather(*(record(self._url, body, dialect.path) for body in bodies))
        cpu_s = time.process_time() - cpu_s
        return Group([dialect.understood(recording.sent_at, recording.arrivals) for recording in recordings], cpu_s)

    async def _through_pipe(self, prompts: Sequence[str], num_new_tokens: int) -> Group:
        answer = await asyncio.to_thread(self._exchange, {"prompts": prompts, "num_new_tokens": num_new_tokens})
        answers = [
            Answer(answer["sent_at"], times, len(times), num_prompt_tokens)
            for times, num_prompt_tokens in zip(answer["token_at"], answer["num_prompt_tokens"], strict=True)
        ]
        return Group(answers, 0.0)

    def _exchange(self, question: Json) -> Json:
        """A line there, a line back; waits without spending anything."""
        there, back = self._process.stdin, self._process.stdout
        assert there is not None, self._engine.name
        assert back is not None, self._engine.name
        try:
            there.write(json.dumps(question).encode() + b"\n")
            there.flush()
            return json.loads(back.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self._process.wait()
            raise BenchError("the pipe closed") from None


@contextlib.contextmanager
def running(engine: Engine, logs: Path) -> Iterator[Server]:
    """Starts the engine, not yet ready; stops it at the end. What it prints goes to a file in `logs`."""
    port = _free_port()
    command = [part.replace("{port}", str(port)) for part in engine.command]
    log = logs / f"{engine.name}.log"
    pipe = subprocess.PIPE if engine.dialect is None else None
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or output,
            stderr=output,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **engine.environment},
        )
    server = Server(engine, process, port, log)
    try:
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
