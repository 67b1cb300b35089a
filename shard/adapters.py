"""LoRA adapters: small matrices that change what a model's linear layers do, for those rows that ask for them.

    y = W x + B (A x)        A [rank, inputs], B [outputs, rank], with the adapter's scaling in B

Any number of adapters share a step with each other and with rows of the model itself. A layer does what it always does
for all tokens; then each adapter adds its part to the outputs of its own tokens. Nothing is done to the others, so they
are bit for bit what they would be without.

On several ranks, a layer that holds some of the outputs holds those rows of B, and one that holds some of the inputs
those columns of A: it adds its part of the sum before the ranks add up theirs.

A folder is one of PEFT's: adapter_config.json and adapter_model.safetensors. What is in it beyond the formula above is
refused when it is loaded, and so is a layer that does not see all tokens of a step. This module knows nothing of seats.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from shard.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, resolve_adapter
from shard.errors import LoadError
from shard.families import JsonObject, JsonValue
from shard.tensor_parallel import Cut, Sharding

log = logging.getLogger(__name__)

_TENSOR: Final = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])\.weight")

_REFUSED: Final = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config"),
)
"""Settings of PEFT's under which a layer computes something else, or something else than layers is changed."""

_HARMLESS_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the model's own weights as they are: the others start from weights of which
a part was taken away, which the adapter does not say."""

TokensOf = Mapping[int, Tensor]
"""By number of an adapter, from 1: which of a step's tokens are its, [n] int64 in ascending order."""

NOBODYS: Final[TokensOf] = MappingProxyType({})


class AdapterFolder(NamedTuple):
    name: str
    folder: Path


def find_adapters(text: str) -> list[AdapterFolder]:
    """Those of a list `name=folder`, with commas; a hub id may stand for a folder. Raises `LoadError`."""
    pairs = [item.strip().partition("=") for item in text.split(",") if item.strip()]
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise LoadError(f"two LoRA adapters have one name: {text}")
    return [AdapterFolder(name, resolve_adapter(place or name)) for name, _, place in pairs]


@dataclass(frozen=True, slots=True)
class _Change:
    """What an adapter adds to a layer's outputs."""

    path: str
    down: Tensor  # A: [rank, inputs]
    up: Tensor  # B with the scaling: [outputs, rank]

    def of(self, inputs: Tensor) -> Tensor:
        """[n, inputs] → [n, outputs], in the same dtype."""
        return linear(linear(inputs.to(self.down.dtype), self.down), self.up).to(inputs.dtype)


class Adapters:
    """Those of a model on one rank."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """In the order in which they are numbered, from 1."""
        self._changes: dict[nn.Module, dict[int, _Change]] = {}
        self._tokens_of = NOBODYS

    def load(self, source: AdapterFolder, model: nn.Module, sharding: Sharding) -> None:
        """Joins an adapter to the layers below `model`, under the next number. Raises `LoadError`."""
        self.names.append(source.name)
        num_bytes = 0
        try:
            for change in _read_changes(source.folder):
                module = _linear_layer(model, change.path)
                change = _placed(change, module, sharding)
                self._join(module, change)
                num_bytes += change.down.nbytes + change.up.nbytes
        except LoadError as error:
            raise LoadError(f"adapter {source.name!r}: {error}") from error
        log.info("adapter %s: %.1f MB", source.name, num_bytes / 1e6)

    def _join(self, module: nn.Module, change: _Change) -> None:
        if module not in self._changes:
            self._changes[module] = {}
            # Before the hook that sums over the ranks.
            module.register_forward_hook(partial(self._change, self._changes[module]), prepend=True)
        self._changes[module][len(self.names)] = change

    @contextmanager
    def heard(self, tokens_of: TokensOf) -> Iterator[None]:
        """Adapters change what their tokens become while this lasts."""
        self._tokens_of = tokens_of
        try:
            yield
        finally:
            self._tokens_of = NOBODYS

    def _change(
        self, changes: Mapping[int, _Change], module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        """Runs behind a layer, in every step."""
        for number, tokens in self._tokens_of.items():
            change = changes.get(number)
            if change is not None:
                inputs = args[0].reshape(-1, args[0].shape[-1])
                output.view(-1, output.shape[-1]).index_add_(0, tokens, change.of(inputs[tokens]))

    def check(self, run: Callable[[], object], num_tokens: int) -> None:
        """Refuses layers that do not once give an output for every token of a step: an expert's, say, or a router.

        `run` is such a step, and is left out if there are no adapters. Raises `LoadError`.
        """
        if not self._changes:
            return
        nums_given: dict[nn.Module, list[int]] = {module: [] for module in self._changes}

        def note(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
            nums_given[module].append(output.shape[:-1].numel() if isinstance(output, Tensor) else 0)

        handles = [module.register_forward_hook(note) for module in nums_given]
        run()
        for handle in handles:
            handle.remove()
        for module, nums in nums_given.items():
            if nums != [num_tokens]:
                number, change = next(iter(self._changes[module].items()))
                raise LoadError(
                    f"adapter {self.names[number - 1]!r}: {change.path} is no layer that all tokens go through, and "
                    "nothing else is served"
                )


def _read_changes(folder: Path) -> Iterator[_Change]:
    """As they are in the files, whole, in float32. Raises `LoadError` for what is more than linear layers' A and B."""
    config = _read_config(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name)
        is_matrix = tensor.ndim == 2 and tensor.is_floating_point() and tensor.itemsize > 1  # 8 bits would be codes
        if match is None or not is_matrix:
            raise LoadError(f"{name} is not a matrix of a linear layer's LoRA, and nothing else is served")
        sides.setdefault(match["path"], {})[match["side"]] = tensor.float()
    for layer, matrices in sides.items():
        if sorted(matrices) != ["A", "B"]:
            raise LoadError(f"{layer} has no lora_{'A' if 'B' in matrices else 'B'}")
        down, up = matrices["A"], matrices["B"]
        if not len(down) == up.shape[1] > 0:
            raise LoadError(f"{layer} has matrices of rank {len(down)} and {up.shape[1]}")
        up = up * _scaling(config, layer, len(down))
        if not (down.isfinite().all() and up.isfinite().all()):
            raise LoadError(f"{layer} has numbers that are not finite")
        yield _Change(layer, down, up)


def _read_config(path: Path) -> JsonObject:
    try:
        config: JsonValue = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise LoadError(f"{path} does not describe a LoRA adapter")
    used = [name for name in _REFUSED if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if config.get("init_lora_weights", True) not in _HARMLESS_STARTS:
        used.append("init_lora_weights")
    if used:
        raise LoadError(f"{path} has `{used[0]}`: {json.dumps(config[used[0]])[:60]}, which is not served")
    return config


def _scaling(config: JsonObject, layer: str, rank: int) -> float:
    """lora_alpha / rank, or with `use_rslora` by its root; the first of `alpha_pattern` that ends the layer's path has
    an alpha of its own. https://huggingface.co/docs/peft/package_reference/lora"""
    alphas = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha", 8)
    if isinstance(alphas, dict):
        try:
            alpha = next((own for key, own in alphas.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), alpha)
        except re.error as error:
            raise LoadError(f"`alpha_pattern` cannot be read: {error}") from error
    if not isinstance(alpha, int | float):
        raise LoadError(f"lora_alpha is {alpha!r} for {layer}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _linear_layer(model: nn.Module, path: str) -> nn.Module:
    """One of transformers' or torch's, by its path in the model. Raises `LoadError`."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise LoadError(f"the model has no {path}") from None
    if not (isinstance(module, nn.Linear) or _is_transposed(module)):
        raise LoadError(f"{path} is no linear layer, and nothing else is served")
    return module


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's kind, which keeps inputs before outputs."""
    return hasattr(module, "nf")


def _placed(change: _Change, module: nn.Module, sharding: Sharding) -> _Change:
    """This rank's part, where and as what the layer's weight is. Raises `LoadError` if it is for another layer."""
    weight = module.weight
    assert isinstance(weight, Tensor), change.path
    transposed = _is_transposed(module)
    down, up = change.down, change.up
    whole = (down.shape[1], len(up)) if transposed else (len(up), down.shape[1])
    cut: Cut | None = sharding.cut(f"{change.path}.weight", whole)
    if cut is not None and (cut.dim == 0) != transposed:
        up = Cut(0, cut.ranges).apply(up)
    elif cut is not None:
        down = Cut(1, cut.ranges).apply(down)
    part = (down.shape[1], len(up)) if transposed else (len(up), down.shape[1])
    if part != tuple(weight.shape):
        kept = list(weight.shape)
        raise LoadError(f"{change.path} has matrices for a weight of {list(part)}, the model's is {kept}")
    # On a CPU a product this small takes 13 µs in bfloat16 and 2 in float32.
    dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
    return _Change(change.path, down.to(weight.device, dtype), up.to(weight.device, dtype))


def load_adapters(sources: Sequence[AdapterFolder], model: nn.Module, sharding: Sharding) -> Adapters:
    """All of them on the layers of a causal model whose weights are in place. Raises `LoadError`."""
    adapters = Adapters()
    for source in sources:
        adapters.load(source, model, sharding)
    return adapters
