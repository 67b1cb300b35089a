"""What every test may lean on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports huggingface_hub, which reads it once: a test that asked the hub would depend on the weather.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the real model, SmolLM2-135M-Instruct in float32 (converted by `make setup`, else now)."""
    from shard.checkpoint import resolve

    return resolve("smollm2-135m-instruct").directory
