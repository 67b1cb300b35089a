"""The decoder layers of the common shape as one native call, taken from the loaded modules of transformers.

    norm ─ q, k, v ─ (norm of heads) ─ rotate ─ attend ─ o ─ (norm) ─ + ─ norm ─ gate, up ─ act ─ down ─ (norm) ─ +

That is llama, and with the parts in brackets, other factors or other stackings of the same matrices, what stands in
`FAMILIES`. Nothing here is trusted: whoever takes a fused decoder into service first compares it with the modules it
was made from, on the loaded weights (`shard.model`). A model of another shape keeps its modules, for the reason that
`NotFusable` gives.

On several ranks each holds its part of the weights, as its modules do, and the sums between happen inside the call.
This module knows how the modules of these families are named, and nothing of steps, seats or sampling.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from ctypes import Array
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from shard.attention import AttentionBatch, AttentionOptions, ShapeProbe
from shard.kernels.native import (
    MAX_HEAD_WIDTH,
    PLACES,
    Activation,
    Decoder,
    DecoderLayer,
    DecoderModel,
    Heads,
    Memory,
    Peers,
    Rotation,
    StepRows,
    Threads,
    linear,
    memory_of,
)
from shard.kernels.packing import LANES, Arena, Kind, PackedMatrix, pack, pack_gated
from shard.kv_cache import KVCache, LayerShape

FAMILIES: Final = frozenset(
    (
        *("gemma", "gemma3_text", "granite", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3", "seed_oss"),
        "smollm3",
    )
)
"""Families whose layers have the shape above; one that is not listed may have it too, which its tests would show."""

_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}

# Rotary angles that are a frequency times the position, whatever else is in the step.
_FIXED_ROPE: Final = frozenset(("default", "linear", "llama3", "yarn"))


T = TypeVar("T")


class NotFusable(Exception):
    """The model keeps its modules; the message says why."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a fused decoder is made from."""

    model_type: str
    backbone: nn.Module
    probe: ShapeProbe
    dtype: torch.dtype
    block_size: int


class FusedDecoder:
    """Stands for a backbone: embeddings by its module, everything after in one native call."""

    def __init__(self, source: Source, decoder: Decoder) -> None:
        self._embed = _embedding(source.backbone)
        self._decoder = decoder
        self._cache: KVCache | None = None
        self._memory: Array[Memory] | None = None

    def hidden(self, input_ids: Tensor, positions: Tensor, batch: AttentionBatch, cache: KVCache) -> Tensor:
        """As `Model.hidden`: `input_ids` and `positions` [T] -> [T, width]. Raises `PeerError`."""
        hidden: Tensor = self._embed(input_ids[None])[0].contiguous()
        rows = StepRows(
            positions=positions.contiguous(),
            slots=batch.slots.contiguous(),
            starts=torch.tensor(batch.query_starts, dtype=torch.int64),
            contexts=torch.tensor(batch.context_lens, dtype=torch.int64),
            tables=batch.block_tables.contiguous(),
        )
        self._decoder.run(hidden, rows, self._memory_of(cache))
        return hidden

    def forget(self) -> None:
        """Lets go of the memory of an epoch that has ended."""
        self._cache = self._memory = None

    def _memory_of(self, cache: KVCache) -> Array[Memory]:
        if self._memory is None or self._cache is not cache:
            self._cache, self._memory = cache, memory_of(cache.tensors)
        return self._memory


class PackedHead(nn.Module):
    """Stands for the linear layer that makes logits, which come out as float32."""

    def __init__(self, head: nn.Linear, matrix: PackedMatrix, threads: Threads) -> None:
        super().__init__()
        self._matrix = matrix
        self._threads = threads
        self._forward_hooks.update(head._forward_hooks)  # ranks joining their columns

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., outputs] float32"""
        return linear(hidden.flatten(0, -2), self._matrix, self._threads).view(*hidden.shape[:-1], -1)


def fuse(source: Source, kind: Kind, threads: Threads, peers: Peers | None) -> FusedDecoder:
    """Packs the layers' weights as `kind`. Raises `NotFusable`."""
    if source.model_type not in FAMILIES:
        raise NotFusable(f"the layers of {source.model_type} have another shape")
    return FusedDecoder(source, Decoder(_decoder_model(source, _Packer(kind)), threads, peers))


def pack_head(head: nn.Module | None, kind: Kind, threads: Threads) -> PackedHead:
    """Raises `NotFusable`."""
    if not isinstance(head, nn.Linear):
        raise NotFusable("its logits do not come from a linear layer")
    return PackedHead(head, _Packer(kind).matrix(head), threads)


def release_layers(backbone: nn.Module) -> None:
    """Gives back the memory of the matrices that were packed."""
    for layer in _layers(backbone):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def _decoder_model(source: Source, packer: _Packer) -> DecoderModel:
    backbone, layers = source.backbone, _layers(source.backbone)
    heads = _heads(source)
    _check(source, packer.kind, heads, layers)
    rotations, rotation_of = _rotations(backbone)
    norms = [module for module in backbone.modules() if type(module).__name__.endswith("RMSNorm")]
    return DecoderModel(
        layers=[
            _layer(layer, packer, heads, rotation_of(layer), source.probe.options[index])
            for index, layer in enumerate(layers)
        ],
        rotations=rotations,
        last_norm=_norm_weight(_child(backbone, "norm")),
        heads=heads,
        kind=packer.kind,
        activation=_activation(backbone),
        epsilon=_one_of({_epsilon(norm) for norm in norms}, "epsilons"),
        residual_factor=_one_of({float(getattr(layer, "residual_multiplier", 1.0)) for layer in layers}, "factors"),
        embedding_factor=float(getattr(backbone, "embedding_multiplier", 1.0)),
    )


def _check(source: Source, kind: Kind, heads: Heads, layers: Sequence[nn.Module]) -> None:
    if source.block_size != PLACES:
        raise NotFusable(f"blocks have {source.block_size} places, not {PLACES}")
    if heads.width % LANES or heads.width > MAX_HEAD_WIDTH:
        raise NotFusable(f"heads are {heads.width} wide, not a multiple of {LANES} up to {MAX_HEAD_WIDTH}")
    width = _norm_weight(_child(source.backbone, "norm")).numel()
    for what, inputs in (("hidden states", width), ("heads together", heads.query * heads.width)):
        if inputs % kind.group:
            raise NotFusable(f"its {what} are {inputs} wide, not a multiple of {kind.group}")
    if any(options.explicit for options in source.probe.options.values()):
        raise NotFusable("its attention has a soft cap or sinks")
    if len(layers) != len(source.probe.layers):
        raise NotFusable(f"{len(source.probe.layers)} layers attend, of {len(layers)}")


def _heads(source: Source) -> Heads:
    shape: LayerShape = _one_of(set(source.probe.layers.values()), "shapes of keys and values")
    if shape.key_dim != shape.value_dim:
        raise NotFusable("keys and values are not equally wide")
    return Heads(_one_of(set(source.probe.query_heads.values()), "numbers of heads"), shape.kv_heads, shape.key_dim)


def _layer(
    layer: nn.Module, packer: _Packer, heads: Heads, rotation: int | None, options: AttentionOptions
) -> DecoderLayer:
    attention, mlp = _child(layer, "self_attn"), _child(layer, "mlp")
    around = hasattr(layer, "pre_feedforward_layernorm")  # norms before and after both halves of the layer
    return DecoderLayer(
        query_key_value=packer.query_key_value(attention),
        output=packer.matrix(_linear(attention, "o_proj")),
        gate_up=packer.gate_up(mlp),
        down=packer.matrix(_linear(mlp, "down_proj")),
        before_attention=_norm_weight(_child(layer, "input_layernorm")),
        after_attention=_norm_weight(_child(layer, "post_attention_layernorm")) if around else None,
        before_mlp=_norm_weight(_child(layer, "pre_feedforward_layernorm" if around else "post_attention_layernorm")),
        after_mlp=_norm_weight(_child(layer, "post_feedforward_layernorm")) if around else None,
        of_query=_head_norm(attention, "q_norm", heads),
        of_key=_head_norm(attention, "k_norm", heads),
        rotation=rotation,
        window=options.window,
        scaling=options.scaling,
    )


class _Packer:
    """Packs linear modules, one behind the other as a step reads them."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._arena = Arena()

    def matrix(self, module: nn.Linear) -> PackedMatrix:
        return pack(module.weight, self.kind, self._arena, module.bias)

    def query_key_value(self, attention: nn.Module) -> PackedMatrix:
        if hasattr(attention, "qkv_proj"):
            return self.matrix(_linear(attention, "qkv_proj"))
        modules = [_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        return pack(torch.cat([m.weight for m in modules]), self.kind, self._arena, _joined_bias(modules))

    def gate_up(self, mlp: nn.Module) -> PackedMatrix:
        if hasattr(mlp, "gate_up_proj"):
            both = _linear(mlp, "gate_up_proj")
            gate, up = both.weight.chunk(2)
            bias = _joined_bias([both])
        else:
            modules = _linear(mlp, "gate_proj"), _linear(mlp, "up_proj")
            gate, up = (module.weight for module in modules)
            bias = _joined_bias(modules)
        biases = None if bias is None else (bias.chunk(2)[0], bias.chunk(2)[1])
        return pack_gated(gate, up, self.kind, self._arena, biases)


def _joined_bias(modules: Sequence[nn.Linear]) -> Tensor | None:
    if all(module.bias is None for module in modules):
        return None
    return torch.cat([torch.zeros(len(m.weight)) if m.bias is None else m.bias.float() for m in modules])


def _rotations(backbone: nn.Module) -> tuple[list[Rotation], Callable[[nn.Module], int | None]]:
    """The model's rotations, and which of them a layer uses."""
    rotary = _child(backbone, "rotary_emb")
    if hasattr(rotary, "inv_freq"):
        _check_rope(rotary.rope_type)
        return [_rotation(rotary, "")], lambda layer: 0 if getattr(layer.self_attn, "use_rope", True) else None
    if not hasattr(rotary, "layer_types"):
        raise NotFusable("its rotary angles come from elsewhere")
    kinds: list[str] = list(rotary.layer_types)  # type: ignore[arg-type]
    for kind in kinds:
        _check_rope(rotary.rope_type[kind])  # type: ignore[index]
    return [_rotation(rotary, f"{kind}_") for kind in kinds], lambda layer: kinds.index(str(layer.self_attn.layer_type))


def _check_rope(rope_type: object) -> None:
    if rope_type not in _FIXED_ROPE:
        raise NotFusable(f"its rotary angles ({rope_type}) depend on more than the position")


def _rotation(rotary: nn.Module, prefix: str) -> Rotation:
    frequencies, factor = getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")
    return Rotation(frequencies.float().contiguous(), float(factor))


def _activation(backbone: nn.Module) -> Activation:
    config = backbone.config
    name = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None))
    if name not in _ACTIVATIONS:
        raise NotFusable(f"its activation is {name}")
    return _ACTIVATIONS[name]


def _norm_weight(norm: nn.Module) -> Tensor:
    """[width] float32: what the norm multiplies by, whether it keeps that or, as gemma, one less."""
    exact = copy.deepcopy(norm).float()
    width = next(exact.parameters()).numel()
    scaled: Tensor = exact(torch.ones(1, width))[0]
    return (scaled * math.sqrt(1 + _epsilon(norm))).contiguous()


def _head_norm(attention: nn.Module, name: str, heads: Heads) -> Tensor | None:
    norm = getattr(attention, name, None)
    if norm is None:
        return None
    weight = _norm_weight(norm)
    if weight.numel() != heads.width:
        raise NotFusable("a norm spans several heads")
    return weight


def _epsilon(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            return float(getattr(norm, name))
    raise NotFusable(f"{type(norm).__name__} is not a norm that is known here")


def _one_of(values: set[T], what: str) -> T:
    if len(values) != 1:
        raise NotFusable(f"its layers have {len(values)} {what}")
    return next(iter(values))


def _layers(backbone: nn.Module) -> list[nn.Module]:
    return list(_child(backbone, "layers").children())


def _embedding(backbone: nn.Module) -> nn.Module:
    return _child(backbone, "embed_tokens")


def _child(parent: nn.Module, name: str) -> nn.Module:
    child = getattr(parent, name, None)
    if not isinstance(child, nn.Module):
        raise NotFusable(f"{type(parent).__name__} has no {name}")
    return child


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    child = _child(parent, name)
    if not isinstance(child, nn.Linear):
        raise NotFusable(f"{name} is not linear")
    return child
