"""Real clients, unmodified, row by row of the acceptance matrix.

Each client has an environment of its own, which `make test-clients` installs from `pins/`, and a script in `drivers/`
that uses it as its users do and reports one line per row; `drivers/rows.py` says how. A test here is one row. The rows
of clients that this project depends on anyway run in every `make test`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.clients.drivers.rows import Servers

DRIVERS = Path(__file__).parent / "drivers"
ENVIRONMENTS = Path("build/clients").resolve()
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Driver:
    """A script, and the environment it runs in: a folder of `ENVIRONMENTS` or, for None, our own."""

    script: str
    environment: str | None
    needs: str | None = None
    """A command that its servers need."""

    def rows(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(re.findall(r"\brow_\d+_\w+", (DRIVERS / self.script).read_text())))

    def report(self, servers: Servers) -> dict[str, str | None]:
        """What went wrong by row, None where nothing did."""
        directory, interpreter = self._home()
        command = [interpreter, str(DRIVERS / self.script), json.dumps(asdict(servers))]
        # Clients would heed a proxy, and a hub token or the offline mode of these tests.
        environment = {
            name: value for name, value in os.environ.items() if not name.lower().startswith(("hf_", "http"))
        }
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return {line["row"]: line["problem"] for line in lines}

    def _home(self) -> tuple[Path, str]:
        """Working directory and interpreter."""
        if self.environment is None:
            return DRIVERS, sys.executable
        home = ENVIRONMENTS / self.environment
        assert home.is_dir(), f"{home} is missing: run `make test-clients`"
        return home, "node" if self.script.endswith(".mjs") else str(home / "bin" / "python")


DRIVEN: Mapping[str, Driver] = {
    "hub-2.4": Driver("hub_rows.py", None),
    "hub-2.4-chat": Driver("hub_chat_rows.py", None),
    "openai": Driver("openai_rows.py", None),
    "hub-2.4-hosted": Driver("hub_hosted_rows.py", None, "openssl"),
    "hub-0.27": Driver("hub_rows.py", "hub_0_27"),
    "hub-0.27-hosted": Driver("hub_endpoint_rows.py", "hub_0_27"),
    "text-generation": Driver("text_generation_rows.py", "text_generation"),
    "text-generation-hosted": Driver("text_generation_hosted_rows.py", "text_generation", "openssl"),
    "langchain": Driver("langchain_rows.py", "langchain"),
    "llama-index": Driver("llama_index_rows.py", "llama_index"),
    "litellm": Driver("litellm_rows.py", "litellm"),
    "haystack": Driver("haystack_rows.py", "haystack"),
    "smolagents": Driver("smolagents_rows.py", "smolagents"),
    "transformers-chat": Driver("transformers_chat_rows.py", None),
    "lorax": Driver("lorax_rows.py", "lorax"),
    "axflow": Driver("axflow_rows.mjs", "node"),
    "ai-sdk": Driver("ai_sdk_rows.mjs", "node"),
    "openai-js": Driver("openai_rows.mjs", "node"),
    "hf-inference-js-2.8.1": Driver("hf_inference_v2_rows.mjs", "node"),
    "hf-inference-js-4.13.16": Driver("hf_inference_rows.mjs", "node"),
    "hf-inference-js-4.13.30": Driver("hf_inference_v1_rows.mjs", "node"),
}


def every_row() -> Iterator[object]:
    for name, driver in DRIVEN.items():
        marks = [] if driver.environment is None else [pytest.mark.clients]
        if driver.needs is not None:
            marks.append(pytest.mark.skipif(shutil.which(driver.needs) is None, reason=f"needs {driver.needs}"))
        for row in driver.rows():
            yield pytest.param(name, row, id=f"{name}-{row}", marks=marks)


@pytest.fixture(scope="module")
def report_of(servers: Servers) -> Callable[[str], dict[str, str | None]]:
    """Runs a driver once, whichever of its rows asks first."""
    return functools.cache(lambda name: DRIVEN[name].report(servers))


@pytest.mark.parametrize(("name", "row"), list(every_row()))
def test_a_client_finds_what_it_expects(report_of: Callable[[str], dict[str, str | None]], name: str, row: str) -> None:
    report = report_of(name)

    assert row in report, "the driver has not run this row"
    assert report[row] is None, report[row]
