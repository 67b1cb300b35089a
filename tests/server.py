"""`python -m router` as a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

READY = re.compile(r"^Ready at (http://\S+)$", re.MULTILINE)
PATIENCE_S = 120.0
"""What nothing takes unless it is broken, on whatever machine. No test is slower for it."""
PATIENT = (
    "from router.text import chat, grammar_compiler\n"
    f"grammar_compiler.MAX_WAIT_S = chat.MAX_SECONDS = {PATIENCE_S}\n"
    "from router.__main__ import main\n"
    "main()"
)
"""For clients that are not prepared to be told that the machine is busy."""
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from router.__main__ import main; main()"
)


@dataclass
class Server:
    """A router that is serving."""

    process: subprocess.Popen[bytes]
    url: str
    log: IO[bytes] | None

    def read_log(self) -> str:
        assert self.log is not None
        return Path(self.log.name).read_text()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def children(self) -> list[int]:
        """Process ids of the shards it started."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


def run_to_its_end(*flags: str) -> subprocess.CompletedProcess[str]:
    """A router that is expected not to start."""
    port = () if "--port" in flags else ("--port", "0")
    command = [sys.executable, "-m", "router", *port, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@contextlib.contextmanager
def serving(*flags: str, code: str | None = None) -> Iterator[Server]:
    """A router on a free port, ready; `code` is run in place of the module."""
    start: Sequence[str] = ("-m", "router") if code is None else ("-c", code)
    with tempfile.NamedTemporaryFile(prefix="router-", suffix=".log") as log:
        command = [sys.executable, *start, "--hostname", "127.0.0.1", "--port", "0", *flags]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        server = Server(process, "", log)
        try:
            server.url = _wait_until_ready(server)
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _wait_until_ready(server: Server) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        has_ended = server.process.poll() is not None
        log = server.read_log()
        ready = READY.search(log)
        if ready:
            return ready[1]
        assert not has_ended, f"the router ended:\n{log}"
        time.sleep(0.05)
    raise AssertionError(f"the router is not ready:\n{server.read_log()}")


def until(condition: Callable[[], bool]) -> None:
    """Waits for what the test holds to come true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
