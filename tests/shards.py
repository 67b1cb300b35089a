"""Real shard processes, for tests that need true tokens."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shard.checkpoint import resolve
from shard.config import DEFAULT_MODEL_ID


def real_model() -> Path:
    """The bundled model's directory (converted by `make setup`, else now)."""
    return resolve(DEFAULT_MODEL_ID).directory


class ShardProcesses:
    """The ranks of one group as children of the test, without a launcher; several epochs may be served."""

    def __init__(self, model: Path, world_size: int, *flags: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="shards-")
        root = Path(self._directory.name)
        self.addresses = [f"unix:{root}/rank-{rank}" for rank in range(world_size)]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "shard", "--model-id", str(model), "--rank", str(rank)),
                    *("--world-size", str(world_size), "--address", address, "--store-path", str(root / "store")),
                    *("--parent-pid", str(os.getpid()), "--report", *flags),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, address in enumerate(self.addresses)
        ]

    def wait_until_ready(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            for line in process.stdout:
                event = json.loads(line)
                assert event["event"] != "failed", event["cause"]
                if event["event"] == "ready":
                    break
            else:
                raise AssertionError(f"a rank ended with {process.wait()}")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._directory.cleanup()


@contextlib.contextmanager
def shard_processes(model: Path, world_size: int, *flags: str) -> Iterator[ShardProcesses]:
    shards = ShardProcesses(model, world_size, *flags)
    try:
        shards.wait_until_ready()
        yield shards
    finally:
        shards.close()
