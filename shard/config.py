"""What a shard process is told when it starts. Nothing here imports torch."""

from __future__ import annotations

import argparse
import os
from dataclasses import Field, dataclass, field, fields
from typing import Any, Final, NoReturn, TypeVar

ENV_PREFIX: Final = "SHARDSTREAM_"
DEFAULT_MODEL_ID: Final = "smollm2-135m-instruct"
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
DEVICES: Final = ("auto", "cpu", "cuda")
METHODS: Final = (
    *("awq", "bitsandbytes", "bitsandbytes-fp4", "bitsandbytes-nf4", "compressed-tensors", "eetq", "exl2", "fp8"),
    *("gptq", "marlin"),
)
"""TGI's names of what a checkpoint may be quantised by."""
QUANTIZE: Final = ("none", "bf16", "int8", "int4", *METHODS)
NATIVE: Final = ("auto", "off")

T = TypeVar("T")


def _option(default: T, help_: str, choices: tuple[str, ...] | None = None) -> T:
    option: T = field(default=default, metadata={"help": help_, "choices": choices})
    return option


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """One rank's settings; every field is a flag, and `SHARDSTREAM_<FIELD>` in the environment."""

    model_id: str = _option(DEFAULT_MODEL_ID, f"folder, hub id, or the bundled {DEFAULT_MODEL_ID}")
    revision: str = _option("", "hub revision")
    rank: int = _option(0, "index of this process in its group")
    world_size: int = _option(1, "processes in the group")
    address: str = _option("unix:/tmp/shardstream-0", "where to listen: unix:/path or host:port")
    store_path: str = _option("", "file through which the ranks of one life of a group meet; a new one each time")
    join_timeout_s: float = _option(60.0, "how long to wait for the other ranks at start")
    step_timeout_s: float = _option(300.0, "a step that takes longer ends the process")
    dtype: str = _option("auto", "of weights and activations; auto: bfloat16 where the device computes in it", DTYPES)
    quantize: str = _option(
        "none",
        "weights in fewer bits; int8 and int4: with the native operations; others: how the checkpoint is quantised",
        QUANTIZE,
    )
    lora_adapters: str = _option("", "LoRA adapters as name=folder, with commas")
    native: str = _option("auto", "native operations for the CPU where they are built; off: torch alone", NATIVE)
    device: str = _option("auto", "where the model runs; auto: cuda if there is one", DEVICES)
    kv_cache_bytes: int = _option(0, "KV memory of this rank; 0: a share of what is free")
    cuda_memory_fraction: float = _option(0.9, "share of the device's memory the process may take")
    num_threads: int = _option(0, "torch threads; 0: the cores divided among the ranks")
    json_output: bool = _option(False, "log as JSON lines")
    parent_pid: int = _option(0, "end when this process is gone; 0: stand alone")
    report: bool = _option(False, "write start-up events to stdout as JSON lines, for a launcher")


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of every flag before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None = None) -> ShardConfig:
    """Flags before environment before defaults. Exits with 2 and one line on a bad value."""
    parser = _OneLineParser(prog="python -m shard", description="One rank of a shard group.")
    for spec in fields(ShardConfig):
        _add_argument(parser, spec)
    config = ShardConfig(**vars(parser.parse_args(argv)))
    if not 0 <= config.rank < config.world_size:
        parser.error(f"--rank {config.rank} is not below --world-size {config.world_size}")
    if config.world_size > 1 and not config.store_path:
        parser.error("--store-path is needed for more than one rank")
    if config.dtype not in DTYPES or config.device not in DEVICES:
        parser.error(f"dtype {config.dtype!r} or device {config.device!r} is not known")
    if config.quantize not in QUANTIZE or config.native not in NATIVE:
        parser.error(f"quantize {config.quantize!r} or native {config.native!r} is not known")
    return config


def _add_argument(parser: argparse.ArgumentParser, spec: Field[Any]) -> None:
    env = ENV_PREFIX + spec.name.upper()
    flag = "--" + spec.name.replace("_", "-")
    help_ = f"{spec.metadata['help']} (default: {spec.default!r}, env: {env})"
    given = os.environ.get(env)
    if isinstance(spec.default, bool):
        on = spec.default if given is None else given.lower() in ("1", "true")
        parser.add_argument(flag, action="store_true", default=on, help=help_)
        return
    default = spec.default if given is None else given
    choices = spec.metadata["choices"]
    parser.add_argument(flag, type=type(spec.default), default=default, choices=choices, metavar="X", help=help_)
