"""What is known about each model family: whether it can be served, and how its weights are split among ranks.

A family is transformers' `model_type`. Served are those whose packed, paged forward pass was found equal to their dense
one by the tests; any other is refused before anything is loaded, with the reason. A family that is not listed may well
work: add its row here and a tiny configuration to the tests.

A plan says for every matrix which of its units each rank keeps. Its keys are the tails of parameter or module names,
`*` standing for a layer's number:

    Split("out", "q")         output features, by query heads             column-parallel
    Split("out", "q+kv+kv")   several stacked outputs in one matrix
    Split("out", "group")     for one KV head after the other, its query heads, its key, its value
    Split("in", "q")          input features, by query heads              row-parallel: the ranks' outputs are summed
    Split("out", "ffn")       output features, evenly
    EMBEDDING, HEAD           rows of the vocabulary
    Split(..., wide=True)     the weight of a norm over all heads together: the ranks' squares are summed
    SUM                       a module whose ranks' outputs are summed
    FIRST                     kept by rank 0, zero elsewhere: a bias that is added before the sum
    WHOLE                     kept by every rank

Vectors that no key names are kept whole; a matrix that no key names is an error, so that a plan cannot rot unnoticed.
This module imports nothing and knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from shard.errors import LoadError

JsonValue = str | int | float | bool | None | list["JsonValue"] | dict[str, "JsonValue"]
JsonObject = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Split:
    """How a matrix is divided.

    `units` names what is stacked along the axis: `q` query heads, `kv` KV heads, `ffn` single features, `pair` features
    two by two, joined by `+`; or it is `group`. `transposed` matrices keep inputs before outputs. `wide` is for norms
    over all heads.
    """

    axis: Literal["out", "in"]
    units: str
    transposed: bool = False
    wide: bool = False


class Rule:
    """A rule that needs no parameters."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


EMBEDDING: Final = Rule("EMBEDDING")
HEAD: Final = Rule("HEAD")
SUM: Final = Rule("SUM")
FIRST: Final = Rule("FIRST")
WHOLE: Final = Rule("WHOLE")

Plan = Mapping[str, Split | Rule]

Q: Final = Split("out", "q")
KV: Final = Split("out", "kv")
O: Final = Split("in", "q")  # noqa: E741 (the usual name of the output projection)
UP: Final = Split("out", "ffn")
GATE_UP: Final = Split("out", "ffn+ffn")
DOWN: Final = Split("in", "ffn")

_EMBED: Final[Plan] = {"embed_tokens": EMBEDDING, "lm_head": HEAD}

_ATTENTION: Final[Plan] = {
    "layers.*.self_attn.q_proj": Q,
    "layers.*.self_attn.k_proj": KV,
    "layers.*.self_attn.v_proj": KV,
    "layers.*.self_attn.o_proj": O,
}

_MLP: Final[Plan] = {
    "layers.*.mlp.gate_proj": UP,
    "layers.*.mlp.up_proj": UP,
    "layers.*.mlp.down_proj": DOWN,
}

_FUSED_MLP: Final[Plan] = {"layers.*.mlp.gate_up_proj": GATE_UP, "layers.*.mlp.down_proj": DOWN}

_EXPERTS: Final[Plan] = {
    "layers.*.mlp.gate": WHOLE,
    "layers.*.mlp.experts.gate_up_proj": GATE_UP,
    "layers.*.mlp.experts.down_proj": DOWN,
    "layers.*.mlp.experts": SUM,
}

_SHARED_EXPERTS: Final[Plan] = {
    "layers.*.mlp.shared_experts.gate_proj": UP,
    "layers.*.mlp.shared_experts.up_proj": UP,
    "layers.*.mlp.shared_experts.down_proj": DOWN,
}

_LLAMA: Final[Plan] = {**_EMBED, **_ATTENTION, **_MLP}

_HEAD_NORMS: Final[Plan] = {"layers.*.self_attn.q_norm": Q, "layers.*.self_attn.k_norm": KV}
"""Norms with weights of their own for every head."""

_WIDE_NORMS: Final[Plan] = {
    "layers.*.self_attn.q_norm": Split("out", "q", wide=True),
    "layers.*.self_attn.k_norm": Split("out", "kv", wide=True),
}

_GPT2: Final[Plan] = {
    "wte": EMBEDDING,
    "wpe": WHOLE,
    "lm_head": HEAD,
    "h.*.attn.c_attn": Split("out", "q+q+q", transposed=True),
    "h.*.attn.c_proj": Split("in", "q", transposed=True),
    "h.*.mlp.c_fc": Split("out", "ffn", transposed=True),
    "h.*.mlp.c_proj": Split("in", "ffn", transposed=True),
}

_GPT_BIGCODE: Final[Plan] = {
    "wte": EMBEDDING,
    "wpe": WHOLE,
    "lm_head": HEAD,
    "h.*.attn.c_attn": Split("out", "q+kv+kv"),
    "h.*.attn.c_proj": O,
    "h.*.mlp.c_fc": UP,
    "h.*.mlp.c_proj": DOWN,
}

_GPT_NEOX: Final[Plan] = {
    "embed_in": EMBEDDING,
    "lm_head": HEAD,
    "layers.*.attention.query_key_value": Q,  # each head's query, key and value lie together
    "layers.*.attention.dense": O,
    "layers.*.mlp.dense_h_to_4h": UP,
    "layers.*.mlp.dense_4h_to_h": DOWN,
}

_GPT_NEO: Final[Plan] = {
    "wte": EMBEDDING,
    "wpe": WHOLE,
    "lm_head": HEAD,
    "h.*.attn.attention.q_proj": Q,
    "h.*.attn.attention.k_proj": Q,
    "h.*.attn.attention.v_proj": Q,
    "h.*.attn.attention.out_proj": O,
    "h.*.mlp.c_fc": UP,
    "h.*.mlp.c_proj": DOWN,
}

_GPTJ: Final[Plan] = {
    "wte": EMBEDDING,
    "lm_head": HEAD,
    "h.*.attn.q_proj": Q,
    "h.*.attn.k_proj": Q,
    "h.*.attn.v_proj": Q,
    "h.*.attn.out_proj": O,
    "h.*.mlp.fc_in": UP,
    "h.*.mlp.fc_out": DOWN,
}

_MPT: Final[Plan] = {
    "wte": EMBEDDING,
    "lm_head": HEAD,
    "blocks.*.attn.Wqkv": Split("out", "q+q+q"),
    "blocks.*.attn.out_proj": O,
    "blocks.*.ffn.up_proj": UP,
    "blocks.*.ffn.down_proj": DOWN,
}

_OPT: Final[Plan] = {
    **_EMBED,
    "embed_positions": WHOLE,
    "project_in": WHOLE,
    "project_out": WHOLE,
    "layers.*.self_attn.q_proj": Q,
    "layers.*.self_attn.k_proj": Q,
    "layers.*.self_attn.v_proj": Q,
    "layers.*.self_attn.out_proj": O,
    "layers.*.fc1": UP,
    "layers.*.fc2": DOWN,
}

_PHI: Final[Plan] = {
    **_EMBED,
    **_ATTENTION,
    "layers.*.self_attn.dense": O,
    "layers.*.mlp.fc1": UP,
    "layers.*.mlp.fc2": DOWN,
}

_PHI3: Final[Plan] = {
    **_EMBED,
    **_FUSED_MLP,
    "layers.*.self_attn.qkv_proj": Split("out", "q+kv+kv"),
    "layers.*.self_attn.o_proj": O,
}

_STARCODER2: Final[Plan] = {**_EMBED, **_ATTENTION, "layers.*.mlp.c_fc": UP, "layers.*.mlp.c_proj": DOWN}

_NEMOTRON: Final[Plan] = {
    **_EMBED,
    **_ATTENTION,
    "layers.*.mlp.up_proj": UP,
    "layers.*.mlp.down_proj": DOWN,
}

_BLOOM: Final[Plan] = {
    "word_embeddings": EMBEDDING,
    "lm_head": HEAD,
    "h.*.self_attention.query_key_value": Q,  # each head's query, key and value lie together
    "h.*.self_attention.dense": O,
    "h.*.mlp.dense_h_to_4h": UP,
    "h.*.mlp.dense_4h_to_h": DOWN,
}

_FALCON: Final[Plan] = {**_BLOOM, "h.*.self_attention.query_key_value": Split("out", "q+kv+kv")}

_DEEPSEEK: Final[Plan] = {
    **_EMBED,
    **_MLP,
    **_EXPERTS,
    **_SHARED_EXPERTS,
    "layers.*.self_attn.q_proj": Q,
    "layers.*.self_attn.q_a_proj": WHOLE,
    "layers.*.self_attn.q_b_proj": Q,
    "layers.*.self_attn.kv_a_proj_with_mqa": WHOLE,
    "layers.*.self_attn.kv_b_proj": Q,
    "layers.*.self_attn.o_proj": O,
}

_GPT_OSS: Final[Plan] = {
    **_EMBED,
    **_ATTENTION,
    "layers.*.self_attn.sinks": Q,
    "layers.*.mlp.router": WHOLE,
    "layers.*.mlp.experts.gate_up_proj": Split("out", "pair", transposed=True),
    "layers.*.mlp.experts.gate_up_proj_bias": Split("out", "pair", transposed=True),
    "layers.*.mlp.experts.down_proj": Split("in", "ffn", transposed=True),
    "layers.*.mlp.experts.down_proj_bias": FIRST,
    "layers.*.mlp.experts": SUM,
}

_QWEN2_MOE: Final[Plan] = {
    **_LLAMA,
    **_EXPERTS,
    "layers.*.mlp.shared_expert.gate_proj": UP,
    "layers.*.mlp.shared_expert.up_proj": UP,
    "layers.*.mlp.shared_expert.down_proj": DOWN,
    "layers.*.mlp.shared_expert_gate": WHOLE,
}

_GRANITE_MOE: Final[Plan] = {
    **_EMBED,
    **_ATTENTION,
    "layers.*.block_sparse_moe.router": WHOLE,
    "layers.*.block_sparse_moe.experts.gate_up_proj": GATE_UP,
    "layers.*.block_sparse_moe.experts.down_proj": DOWN,
    "layers.*.block_sparse_moe.experts": SUM,
    "layers.*.shared_mlp.input_linear": GATE_UP,
    "layers.*.shared_mlp.output_linear": DOWN,
}

_HUNYUAN_MOE: Final[Plan] = {
    **_EMBED,
    **_ATTENTION,
    **_EXPERTS,
    "layers.*.mlp.gate.wg": WHOLE,
    "layers.*.mlp.shared_mlp.gate_proj": UP,
    "layers.*.mlp.shared_mlp.up_proj": UP,
    "layers.*.mlp.shared_mlp.down_proj": DOWN,
}

_PERSIMMON: Final[Plan] = {
    **_EMBED,
    "layers.*.self_attn.query_key_value": Q,
    "layers.*.self_attn.dense": O,
    "layers.*.mlp.dense_h_to_4h": UP,
    "layers.*.mlp.dense_4h_to_h": DOWN,
}

_SHARING_MOE: Final[Plan] = {**_LLAMA, **_EXPERTS, **_SHARED_EXPERTS}
"""Mixtures of experts of which some take part in every token, after layers that have none."""

_OLMOE: Final[Plan] = {**_EMBED, **_ATTENTION, **_EXPERTS, **_WIDE_NORMS}

PLANS: Final[Mapping[str, Plan]] = {
    "afmoe": {**_SHARING_MOE, "layers.*.self_attn.gate_proj": Q, "layers.*.mlp.router.gate": WHOLE},
    "apertus": _NEMOTRON,
    "arcee": _NEMOTRON,
    "biogpt": {**_OPT, "output_projection": HEAD},
    "bloom": _BLOOM,
    "cohere": {**_LLAMA, **_HEAD_NORMS},
    "cohere2": _LLAMA,
    "cohere2_moe": _SHARING_MOE,
    "cwm": _LLAMA,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "dots1": _SHARING_MOE,
    "ernie4_5": _LLAMA,
    "ernie4_5_moe": {**_SHARING_MOE, "layers.*.mlp.gate.moe_statics": WHOLE},
    "exaone4": _LLAMA,
    "exaone_moe": _SHARING_MOE,
    "falcon": _FALCON,
    "flex_olmo": _OLMOE,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "glm": {**_EMBED, **_ATTENTION, **_FUSED_MLP},
    "glm4": {**_EMBED, **_ATTENTION, **_FUSED_MLP},
    "glm4_moe": _SHARING_MOE,
    "glm4_moe_lite": _DEEPSEEK,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT_BIGCODE,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "gpt_oss": _GPT_OSS,
    "gptj": _GPTJ,
    "granite": _LLAMA,
    "granite_swa": {**_LLAMA, "layers.*.self_attn.sinks": Q},
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "helium": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "hunyuan_v1_moe": _HUNYUAN_MOE,
    "hy_v3": _SHARING_MOE,
    "hyperclovax": _LLAMA,
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "jais2": _NEMOTRON,
    "llama": _LLAMA,
    "mellum": _SHARING_MOE,
    "minicpm3": _DEEPSEEK,
    "minimax_m2": _OLMOE,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": {**_EMBED, **_ATTENTION, **_EXPERTS},
    "mpt": _MPT,
    "nanochat": _PHI,
    "nemotron": _NEMOTRON,
    "olmo": _LLAMA,
    "olmo2": {**_LLAMA, **_WIDE_NORMS},
    "olmo3": {**_LLAMA, **_WIDE_NORMS},
    "olmoe": _OLMOE,
    "opt": _OPT,
    "persimmon": _PERSIMMON,
    "phi": _PHI,
    "phi3": _PHI3,
    "phimoe": {**_EMBED, **_ATTENTION, **_EXPERTS, "layers.*.mlp.router": WHOLE},
    "qwen2": _LLAMA,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": {**_LLAMA, **_EXPERTS},
    "seed_oss": _LLAMA,
    "smollm3": _LLAMA,
    "solar_open": _SHARING_MOE,
    "stablelm": _LLAMA,
    "starcoder2": _STARCODER2,
    "vaultgemma": _LLAMA,
    "youtu": _DEEPSEEK,
}
"""The families that are served, and how each is split among ranks."""


def plan_for(model_type: str, *, multi_query: bool = True) -> Plan:
    """Without `multi_query`, gpt_bigcode's and falcon's query heads lie together with their key and value."""
    if model_type == "gpt_bigcode" and not multi_query:
        return {**_GPT_BIGCODE, "h.*.attn.c_attn": Q}
    if model_type == "falcon" and not multi_query:
        return {**_FALCON, "h.*.self_attention.query_key_value": Split("out", "group")}
    return PLANS[model_type]


_OWN_ATTENTION: Final = "its attention does not pass through transformers' attention interface"
_RECURRENT: Final = "its layers carry a recurrent state beside attention, which paged KV memory does not keep"
_ATTENDS_TWICE: Final = "its layers attend more than once, each time to other keys, which KV memory does not keep apart"
_OWN_MASK: Final = "its attention mask is made of its values, which does not pass through the attention interface"
_SHARED_KV: Final = "its later layers reuse the keys and values of earlier ones, which paged KV memory does not do"

REFUSED: Final[Mapping[str, str]] = {
    "bamba": _RECURRENT,
    "codegen": _OWN_ATTENTION,
    "diffllama": _ATTENDS_TWICE,
    "doge": _OWN_MASK,
    "falcon_h1": _RECURRENT,
    "falcon_mamba": _RECURRENT,
    "gemma3n": _SHARED_KV,
    "gemma3n_text": _SHARED_KV,
    "gemma4": _SHARED_KV,
    "gemma4_text": _SHARED_KV,
    "gpt_neox_japanese": _OWN_ATTENTION,
    "granitemoehybrid": _RECURRENT,
    "jamba": _RECURRENT,
    "kimi_linear": _RECURRENT,
    "lfm2": _RECURRENT,
    "lfm2_moe": _RECURRENT,
    "llama4": "its chunked attention mask does not pass through transformers' attention interface",
    "llama4_text": "its chunked attention mask does not pass through transformers' attention interface",
    "longcat_flash": _ATTENDS_TWICE,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "minimax": _RECURRENT,
    "nemotron_h": _RECURRENT,
    "olmo_hybrid": _RECURRENT,
    "openai-gpt": _OWN_ATTENTION,
    "qwen3_5_moe_text": _RECURRENT,
    "qwen3_5_text": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "recurrent_gemma": _RECURRENT,
    "rwkv": _RECURRENT,
    "xglm": _OWN_ATTENTION,
    "xlstm": _RECURRENT,
    "zamba": _RECURRENT,
    "zamba2": _RECURRENT,
}

_UNREAD: Final[Mapping[str, Mapping[str, JsonValue]]] = {
    "mpt": {
        "expansion_ratio": 4,
        "logit_scale": None,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "attn_config.alibi": True,
        "attn_config.alibi_bias_max": 8,
        "attn_config.attn_type": "multihead_attention",
        "attn_config.prefix_lm": False,
        "attn_config.qk_ln": False,
    }
}
"""By family, what transformers' code takes for granted, whatever the checkpoint says."""

_ATTENTION_LAYERS: Final = frozenset(("full_attention", "sliding_attention"))

_CODE_KEYS: Final = frozenset(
    (
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
        "slow_but_exact",  # bloom's way around its modules, and so around the sums of several ranks
    )
)

_OUTPUT_KEYS: Final = frozenset(("return_dict", "output_attentions", "output_hidden_states", "output_router_logits"))
"""What a forward pass returns is our choice, not the checkpoint's."""

_STORAGE_KEYS: Final = frozenset(("quantization_config", "compression_config"))
"""How weights are stored is `shard.dequantize`'s business; the modules never know."""


def served_config(config: JsonObject) -> dict[str, JsonValue]:
    """A checkpoint's `config.json` as it may take effect: it says what the model is, not what is run or returned.

    Raises `LoadError` with one sentence when the model cannot be served.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise LoadError("config.json names no model_type")
    if "auto_map" in config and model_type not in PLANS:
        raise LoadError(f"model type {model_type!r} brings its own code (auto_map), which is never run")
    _refuse_family(model_type, config)
    return {key: value for key, value in config.items() if key not in _CODE_KEYS | _OUTPUT_KEYS | _STORAGE_KEYS}


def _refuse_family(model_type: str, config: JsonObject) -> None:
    if model_type in REFUSED:
        raise LoadError(f"model type {model_type!r} would be silently wrong: {REFUSED[model_type]}")
    if config.get("is_encoder_decoder"):
        raise LoadError(f"model type {model_type!r} is an encoder-decoder, and only decoders are served")
    if "text_config" in config or "vision_config" in config:
        raise LoadError(f"model type {model_type!r} takes more than text, and only text models are served")
    if model_type not in PLANS:
        raise LoadError(f"model type {model_type!r} has not been verified against transformers and is not served")
    layer_types = config.get("layer_types")
    unknown = set(map(str, layer_types)) - _ATTENTION_LAYERS if isinstance(layer_types, list) else set()
    if unknown:
        raise LoadError(f"layers of type {', '.join(sorted(unknown))} are not known here")
    for path, right in _UNREAD.get(model_type, {}).items():
        section, _, key = path.rpartition(".")
        values = config.get(section) if section else config
        if isinstance(values, Mapping) and values.get(key, right) != right:
            raise LoadError(f"{path} is {values[key]}, and transformers' {model_type} takes it for {right}")
