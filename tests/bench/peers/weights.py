"""The checkpoint in the form that each engine reads: `python -m tests.bench.peers.weights q8_0.gguf`.

Everybody gets the same weights, rounded by the engine's own tool at the tool's own defaults. vLLM has no tool of its
own; what its documentation calls W8A8 is written here: weights as 8-bit integers with a scale for each output,
activations rounded token by token while it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tests.bench.peers.engines import BUILD, LLAMA_SERVER, MODEL_ID, WEIGHTS

CONVERTER: Final = BUILD / "llamacpp" / "source" / "convert_hf_to_gguf.py"
CONVERTER_PYTHON: Final = BUILD / "transformers" / "bin" / "python"
"""Where torch, transformers and sentencepiece are installed, which it imports."""
QUANTIZE: Final = LLAMA_SERVER.with_name("llama-quantize")
OPTIMUM: Final = BUILD / "openvino" / "bin" / "optimum-cli"

MAX_INT8: Final = 127
LINEAR_WEIGHTS: Final = "_proj.weight"
INT8: Final[Mapping[str, object]] = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8: Final[Mapping[str, object]] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def main() -> None:
    from shard.checkpoint import resolve

    target = sys.argv[1]
    checkpoint = resolve(MODEL_ID).directory
    unfinished = WEIGHTS / f"unfinished-{target}"
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.unlink(missing_ok=True)
    FORMS[target](checkpoint, unfinished)
    unfinished.rename(WEIGHTS / target)


def _gguf(checkpoint: Path, target: Path) -> None:
    _run(CONVERTER_PYTHON, CONVERTER, checkpoint, "--outtype", "bf16", "--outfile", target)


def _quantized_gguf(kind: str) -> Callable[[Path, Path], None]:
    return lambda _, target: _run(QUANTIZE, WEIGHTS / "bf16.gguf", target, kind)


def _openvino(*options: str) -> Callable[[Path, Path], None]:
    task = ("--task", "text-generation-with-past")
    return lambda checkpoint, target: _run(OPTIMUM, "export", "openvino", "-m", checkpoint, *task, *options, target)


def _w8a8(checkpoint: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    rounded: dict[str, torch.Tensor] = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if not name.endswith(LINEAR_WEIGHTS):
            rounded[name] = weight.bfloat16()
            continue
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / MAX_INT8  # [outputs, 1]
        rounded[name] = (weight / scale).round().to(torch.int8)
        rounded[f"{name}_scale"] = scale
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(rounded, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": W8A8}))


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


FORMS: Final[Mapping[str, Callable[[Path, Path], None]]] = {
    "bf16.gguf": _gguf,
    "q8_0.gguf": _quantized_gguf("q8_0"),
    "q4_0.gguf": _quantized_gguf("q4_0"),
    # Stored as 16 bits; it computes in bfloat16 where the processor does.
    "openvino-bf16": _openvino("--weight-format", "fp16"),
    "openvino-int8": _openvino("--weight-format", "int8"),
    # Its groups of 128 do not divide a width of 576.
    "openvino-int4": _openvino("--weight-format", "int4", "--group-size", "64", "--ratio", "1.0"),
    "vllm-w8a8": _w8a8,
}

if __name__ == "__main__":
    main()
