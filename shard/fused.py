"""The decoder layers of the common shape as one native call, taken from the loaded modules of transformers.

    (norm) ─ q, k, v ─ (norm of heads) ─ rotate ─ attend ─ o ─ (norm) ─ +
    (norm) ─ (gate,) up ─ act ─ down ─ (norm) ─ +

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
    Norm,
    Peers,
    Rotation,
    Threads,
    linear,
    memory_of,
)
from shard.kernels.packing import LANES, Arena, Kind, PackedMatrix, pack, pack_gated, take_turns
from shard.kv_cache import KVCache, LayerShape
from shard.tensor_parallel import WideNorm, deal, is_shared_at_most

FAMILIES: Final = frozenset(
    (
        *("arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4"),
        *("granite", "granite_swa", "helium", "internlm3", "iquestcoder", "jais2", "llama", "ministral", "mistral"),
        *("nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm"),
        *("starcoder2", "vaultgemma"),
    )
)
"""Families whose layers have the shape above; one that is not listed may have it too, which its tests would show."""

_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": Activation.SILU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "relu2": Activation.RELU2,
}

_NEIGHBOURS_ROTATE: Final = frozenset(("cohere", "cohere2", "ernie4_5", "glm", "glm4", "helium"))
"""Families that rotate each even number of a head with the odd one after it, not the first half with the second."""

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

    def __init__(self, source: Source, decoder: Decoder, peers: Peers | None) -> None:
        self._embedded = _lookup(_embedding(source.backbone), peers)
        self._decoder = decoder
        self._cache: KVCache | None = None
        self._memory = torch.empty(0)

    def hidden(self, input_ids: Tensor, positions: Tensor, batch: AttentionBatch, cache: KVCache) -> Tensor:
        """As `Model.hidden`: `input_ids` and `positions` [T] -> [T, width]. Raises `PeerError`."""
        hidden = self._embedded(input_ids)
        self._decoder.run(hidden, positions.contiguous(), batch.step_rows(), self._memory_of(cache))
        return hidden

    def forget(self) -> None:
        """Lets go of the memory of an epoch that has ended."""
        self._cache = None

    def _memory_of(self, cache: KVCache) -> Tensor:
        if self._cache is not cache:
            self._cache, self._memory = cache, memory_of(cache.tensors)
        return self._memory


class PackedHead(nn.Module):
    """Stands for the linear layer that makes logits, which come out as float32."""

    def __init__(self, head: nn.Linear, matrix: PackedMatrix, threads: Threads) -> None:
        super().__init__()
        self._matrix = matrix
        self._threads = threads
        self._forward_hooks.update(head._forward_hooks)  # ranks joining their columns

    @property
    def num_outputs(self) -> int:
        """Of this rank alone."""
        return self._matrix.num_outputs

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., outputs] float32"""
        return linear(hidden.flatten(0, -2), self._matrix, self._threads).view(*hidden.shape[:-1], -1)


def fuse(source: Source, kind: Kind, threads: Threads, peers: Peers | None) -> FusedDecoder:
    """Packs the layers' weights as `kind`. Raises `NotFusable`."""
    if source.model_type not in FAMILIES:
        raise NotFusable(f"the layers of {source.model_type} have another shape")
    return FusedDecoder(source, Decoder(_decoder_model(source, _Packer(kind)), threads, peers), peers)


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
    _check(source, heads, layers)
    rotations, rotation_of = _rotations(source)
    norms = [module for module in backbone.modules() if type(module).__name__.endswith(("Norm", "Norm1P"))]
    has_gates = _one_of({_has_gates(_child(layer, "mlp")) for layer in layers}, "kinds of MLP")
    if source.model_type in _NEIGHBOURS_ROTATE:
        packer.order = rotated_first(heads.width, rotations[0].frequencies.numel())
    return DecoderModel(
        layers=[
            _layer(layer, packer, heads, rotation_of(layer), source.probe.options[index])
            for index, layer in enumerate(layers)
        ],
        rotations=rotations,
        last_norm=_norm(_last_norm(backbone)),
        heads=heads,
        all_heads_widths=_one_of({_all_heads_widths(_attention(layer), heads) for layer in layers}, "norms"),
        kind=packer.kind,
        activation=_activation(backbone),
        has_gates=has_gates,
        is_centered=_one_of({_is_centered(norm) for norm in norms}, "kinds of norm"),
        is_parallel=_one_of({_is_parallel(layer) for layer in layers}, "stackings"),
        epsilon=_one_of({_epsilon(norm) for norm in norms}, "epsilons"),
        residual_factor=_one_of({float(getattr(layer, "residual_multiplier", 1.0)) for layer in layers}, "factors"),
        embedding_factor=float(getattr(backbone, "embedding_multiplier", 1.0)),
    )


def _check(source: Source, heads: Heads, layers: Sequence[nn.Module]) -> None:
    if source.block_size != PLACES:
        raise NotFusable(f"blocks have {source.block_size} places, not {PLACES}")
    if heads.width % LANES or heads.width > MAX_HEAD_WIDTH:
        raise NotFusable(f"heads are {heads.width} wide, not a multiple of {LANES} up to {MAX_HEAD_WIDTH}")
    width = _norm_width(_last_norm(source.backbone))
    for what, inputs in (("hidden states", width), ("heads together", heads.query * heads.width)):
        if inputs % LANES:
            raise NotFusable(f"its {what} are {inputs} wide, not a multiple of {LANES}")
    for option in ("clip_qkv", "use_qk_norm", "qk_layernorm"):
        if getattr(source.backbone.config, option, None):
            raise NotFusable(f"{option} is not known here")
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
    attention, mlp = _attention(layer), _child(layer, "mlp")
    before_attention, after_attention, before_mlp, after_mlp = (_norm_in(layer, name) for name in _norm_names(layer))
    return DecoderLayer(
        query_key_value=packer.query_key_value(attention),
        output=packer.matrix(_linear(attention, "o_proj", "dense")),
        gate_up=packer.gate_up(mlp) if _has_gates(mlp) else packer.up(mlp),
        down=packer.matrix(_linear(mlp, "down_proj", "c_proj", "fc2")),
        before_attention=before_attention,
        after_attention=after_attention,
        before_mlp=before_mlp,
        after_mlp=after_mlp,
        of_query=_head_norm_in(attention, "q_norm"),
        of_key=_head_norm_in(attention, "k_norm"),
        rotation=rotation,
        options=options.native(),
    )


_NormNames = tuple[str, str, str, str]

# Norms before and after attention, before and after the MLP, by the one that tells the stackings apart; empty where
# there is none.
_STACKINGS: Final[Mapping[str, _NormNames]] = {
    "pre_feedforward_layernorm": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "post_feedforward_layernorm": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "post_mlp_layernorm": (
        *("input_layernorm", "post_self_attn_layernorm"),
        *("post_attention_layernorm", "post_mlp_layernorm"),
    ),
    "post_attention_layernorm": ("input_layernorm", "", "post_attention_layernorm", ""),
    "input_layernorm": ("input_layernorm", "", "input_layernorm", ""),
}


def _norm_names(layer: nn.Module) -> _NormNames:
    names = next((names for name, names in _STACKINGS.items() if getattr(layer, name, None) is not None), None)
    if names is None:
        raise NotFusable(f"the norms of {type(layer).__name__} are not known here")
    return names


def _is_parallel(layer: nn.Module) -> bool:
    """Where the MLP has attention's norm, it has attention's input too."""
    before_attention, _, before_mlp, _ = _norm_names(layer)
    return before_attention == before_mlp != ""


def _has_gates(mlp: nn.Module) -> bool:
    return hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj")


class _Packer:
    """Packs linear modules, one behind the other as a step reads them."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.order: Tensor | None = None
        """[head width] a head's queries and keys in the order in which halves rotate; None: as they are."""
        self._arena = Arena()

    def matrix(self, module: nn.Linear) -> PackedMatrix:
        return pack(module.weight, self.kind, self._arena, module.bias)

    def query_key_value(self, attention: nn.Module) -> PackedMatrix:
        if hasattr(attention, "qkv_proj"):
            return self.matrix(_linear(attention, "qkv_proj"))
        modules = [_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        weight, bias = torch.cat([m.weight for m in modules]), _joined_bias(modules)
        if self.order is not None:
            num_rotated = sum(len(module.weight) for module in modules[:2])
            rows = torch.cat([_by_head(num_rotated, self.order), torch.arange(num_rotated, len(weight))])
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return pack(weight, self.kind, self._arena, bias)

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

    def up(self, mlp: nn.Module) -> PackedMatrix:
        module = _linear(mlp, "up_proj", "c_fc", "fc1")
        bias = None if module.bias is None else take_turns([module.bias], self.kind.group)
        return pack(take_turns([module.weight], self.kind.group), self.kind, self._arena, bias)


def rotated_first(width: int, num_pairs: int) -> Tensor:
    """[width] the even and then the odd of the first `num_pairs` pairs of a head's numbers, and the rest.

    Queries and keys in this order have the same products, and rotate as halves where they rotated as neighbours.
    """
    pairs = torch.arange(2 * num_pairs).view(-1, 2).T.flatten()
    return torch.cat([pairs, torch.arange(2 * num_pairs, width)])


def _by_head(num_rows: int, order: Tensor) -> Tensor:
    """[num_rows] rows of heads that follow each other, in that order within each."""
    return (torch.arange(0, num_rows, len(order))[:, None] + order).flatten()


def _joined_bias(modules: Sequence[nn.Linear]) -> Tensor | None:
    if all(module.bias is None for module in modules):
        return None
    return torch.cat([torch.zeros(len(m.weight)) if m.bias is None else m.bias.float() for m in modules])


def _rotations(source: Source) -> tuple[list[Rotation], Callable[[nn.Module], int | None]]:
    """The model's rotations, and which of them a layer uses."""
    if hasattr(source.backbone, "rotary_embs"):
        return _rotations_by_base(source.backbone)
    rotary = _child(source.backbone, "rotary_emb")
    if hasattr(rotary, "inv_freq"):
        _check_rope(rotary.rope_type)
        return [_rotation(rotary, "")], lambda layer: 0 if _rotates(source.model_type, _attention(layer)) else None
    if not hasattr(rotary, "layer_types"):
        raise NotFusable("its rotary angles come from elsewhere")
    kinds: list[str] = list(rotary.layer_types)  # type: ignore[arg-type]
    for kind in kinds:
        _check_rope(rotary.rope_type[kind])  # type: ignore[index]
    return [_rotation(rotary, f"{kind}_") for kind in kinds], lambda layer: _kind_index(kinds, _attention(layer))


def _rotations_by_base(backbone: nn.Module) -> tuple[list[Rotation], Callable[[nn.Module], int | None]]:
    """granite_swa says of every layer by which base it rotates, 0 if it does not."""
    rotaries = list(_child(backbone, "rotary_embs").children())
    bases = [rotary.config.rope_parameters["rope_theta"] for rotary in rotaries]  # type: ignore[union-attr, index]
    by_layer: list[float] = backbone.config.layer_rope_theta  # type: ignore[assignment, union-attr]
    for rotary in rotaries:
        _check_rope(rotary.rope_type)

    def rotation_of(layer: nn.Module) -> int | None:
        base = by_layer[_attention(layer).layer_idx]  # type: ignore[index]
        return bases.index(base) if base else None

    return [_rotation(rotary, "") for rotary in rotaries], rotation_of


def _kind_index(kinds: Sequence[str], attention: nn.Module) -> int:
    kind = str(getattr(attention, "layer_type", None) or getattr(attention, "attention_type", None))
    if kind not in kinds:
        raise NotFusable(f"it has no rotary angles for attention of the type {kind}")
    return kinds.index(kind)


def _rotates(model_type: str, attention: nn.Module) -> bool:
    """smollm3 says so; cohere2 and, where some layers have windows, exaone4 rotate in those alone."""
    if model_type == "cohere2":
        return attention.sliding_window is not None
    if model_type == "exaone4":
        return attention.sliding_window is None or bool(attention.is_sliding)
    return bool(getattr(attention, "use_rope", True))


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


def _last_norm(backbone: nn.Module) -> nn.Module:
    return _child(backbone, "norm", "final_layernorm")


def _norm_in(parent: nn.Module, name: str) -> Norm | None:
    norm = getattr(parent, name, None)
    return None if norm is None else _norm(norm)


def _head_norm_in(attention: nn.Module, name: str) -> Tensor | None:
    norm = _norm_in(attention, name)
    if norm is None:
        return None
    if norm.bias is not None:
        raise NotFusable("a norm of its heads takes the mean off")
    return norm.weight


def _norm(module: nn.Module) -> Norm:
    """What it multiplies by, whether it keeps that or, as gemma, one less; and what it adds, if that is not zero."""
    if isinstance(module, WideNorm):
        return Norm(module.weight.float().contiguous())
    exact = copy.deepcopy(module).float()
    signs = torch.ones(1, _norm_width(module))  # as numbers are whose mean is 0 and whose mean square is 1
    signs[:, 1::2] = -1
    above, below = exact(signs)[0], exact(-signs)[0]
    weight = (above - below) / 2 * signs[0] * math.sqrt(1 + _epsilon(module))
    bias = (above + below) / 2
    return Norm(weight.contiguous(), bias.contiguous() if bias.any() else None)


def _is_centered(module: nn.Module) -> bool:
    """Whether the mean is taken away before: then numbers that are all the same become none."""
    if isinstance(module, WideNorm):
        return False
    exact, ones = copy.deepcopy(module).float(), torch.ones(1, _norm_width(module))
    return torch.equal(exact(ones), exact(-ones))


def _all_heads_widths(attention: nn.Module, heads: Heads) -> tuple[int, int] | None:
    """How many queries and keys of all ranks share a norm; None: each head has its own, or there are no norms."""
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    queries, keys = (heads.width if norm is None else _norm_width(norm) for norm in norms)
    return None if queries == keys == heads.width else (queries, keys)


def _norm_width(norm: nn.Module) -> int:
    """Numbers that are normed together, on all ranks."""
    if isinstance(norm, WideNorm):
        return norm.width
    weight: Tensor | None = getattr(norm, "weight", None)
    if weight is not None:
        return weight.numel()
    (width,) = norm.normalized_shape  # type: ignore[misc]
    return int(width)


def _epsilon(norm: nn.Module) -> float:
    if type(norm).__name__ == "OlmoLayerNorm":
        return 1e-5  # which it keeps to itself
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


def _attention(layer: nn.Module) -> nn.Module:
    return _child(layer, "self_attn")


def _embedding(backbone: nn.Module) -> nn.Module:
    return _child(backbone, "embed_tokens")


def _lookup(embedding: nn.Module, peers: Peers | None) -> Callable[[Tensor], Tensor]:
    """From tokens [T] to their embeddings [T, width], in memory of their own."""
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None or not is_shared_at_most(embedding):
        return lambda ids: embedding(ids[None])[0].contiguous()
    # Saves 30 µs of Python, whose code a step's weights push out of the caches; with hooks 200.
    table = embedding.weight
    if peers is None:
        return lambda ids: table.index_select(0, ids)
    starts = [deal(embedding.num_embeddings, rank, peers.count).start for rank in range(peers.count)]
    return lambda ids: peers.look_up(table, [*starts, embedding.num_embeddings], ids)


def _child(parent: nn.Module, *names: str) -> nn.Module:
    """The first there is of these names."""
    for name in names:
        child = getattr(parent, name, None)
        if isinstance(child, nn.Module):
            return child
    raise NotFusable(f"{type(parent).__name__} has no {' or '.join(names)}")


def _linear(parent: nn.Module, *names: str) -> nn.Linear:
    child = _child(parent, *names)
    if not isinstance(child, nn.Linear):
        raise NotFusable(f"{' or '.join(names)} is not linear")
    return child
