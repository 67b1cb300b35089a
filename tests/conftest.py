"""What every test may lean on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from router.config import ENV_PREFIX, Config
from router.group import client
from router.text import chat, grammar_compiler
from tests.server import PATIENCE_S

COLOURS = {"FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}


def forget_the_surroundings() -> None:
    """Settings of whoever runs the tests: the server's own, proxies that would be asked for 127.0.0.1, the hub's, which
    would make tests depend on the weather, and colours for what tests read. Before anything imports huggingface_hub,
    which reads them once."""
    settings = {ENV_PREFIX + spec.name.upper() for spec in fields(Config)}
    settings.update(COLOURS, *(spec.metadata["option"].env for spec in fields(Config)))
    for name in list(os.environ):
        if name in settings or name.startswith("HF_") or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"


forget_the_surroundings()


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """What a server owes its clients by the clock, a busy machine that runs tests does not: tests of such limits set
    their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_compiler, "MAX_WAIT_S", PATIENCE_S)
        patch.setattr(chat, "MAX_SECONDS", PATIENCE_S)
        patch.setattr(client, "GOODBYE_S", PATIENCE_S)
        yield


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a path that is short enough for Unix sockets, wherever pytest keeps its own."""
    with tempfile.TemporaryDirectory(prefix="sockets-") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small that handing them out takes longer."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of the real model, SmolLM2-135M-Instruct in float32."""
    from tests.shards import real_model

    return real_model()
