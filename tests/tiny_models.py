"""Tiny random checkpoints of every served family, saved by transformers itself and so in each family's real layout.

Weights are drawn wider than usual: with the usual 0.02 a tiny model's attention is flat and its errors invisible.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

Setting = int | float | bool | str | None | list[str] | dict[str, object]
Settings = Mapping[str, Setting]

VOCAB_SIZE = 131  # prime: never divides evenly among ranks

_BASE: Settings = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}

_SLIDING: Settings = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}

_GPT: Settings = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 48,
    "n_inner": 72,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}

_MHA: Settings = {"num_key_value_heads": 6}

_PLAIN: Settings = {name: _BASE[name] for name in _BASE if name not in ("intermediate_size", "num_key_value_heads")}

_HEADS_OF_8: Settings = {**_BASE, "head_dim": 8}

_MOE: Settings = {
    **_HEADS_OF_8,
    "moe_intermediate_size": 20,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "first_k_dense_replace": 1,
}
"""Under the names that one family or another has for it."""

_MLA: Settings = {
    **_BASE,
    **_MHA,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
}
"""Multi-head latent attention."""

FALCON_7B: Settings = {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": None}
FALCON_RW: Settings = {
    "new_decoder_architecture": False,
    "multi_query": False,
    "num_kv_heads": None,
    "alibi": True,
    "parallel_attn": False,
    "bias": True,
}

SETTINGS: Mapping[str, Settings] = {
    "afmoe": {**_MOE, **_SLIDING},
    "apertus": _BASE,
    "arcee": _BASE,
    "biogpt": {**_PLAIN, "intermediate_size": 72},
    "bloom": {name: _PLAIN[name] for name in _PLAIN if name != "max_position_embeddings"},  # it has no positions
    "cohere": {**_BASE, "use_qk_norm": True},
    "cohere2": {**_BASE, **_SLIDING},
    "cohere2_moe": {**_MOE, **_SLIDING},
    "cwm": {**_HEADS_OF_8, **_SLIDING},
    "deepseek_v2": {**_MOE, **_MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {
        **_MLA,
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "dots1": {**_MOE, **_SLIDING},
    "ernie4_5": _BASE,
    "ernie4_5_moe": {
        **_BASE,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 20,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 2,
    },
    "exaone4": {**_BASE, **_SLIDING},
    "exaone_moe": {**_MOE, **_SLIDING},
    "falcon": {**_PLAIN, "new_decoder_architecture": True, "num_kv_heads": 3},
    "flex_olmo": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {**_BASE, "head_dim": 8},
    "gemma2": {
        **_BASE,
        **_SLIDING,
        "head_dim": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_BASE, **_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 16},
    "glm": {**_BASE, "head_dim": 8},
    "glm4": {**_BASE, "head_dim": 8},
    "glm4_moe": _MOE,
    "glm4_moe_lite": {**_MOE, **_MLA},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        **{name: _PLAIN[name] for name in _PLAIN if name not in ("num_attention_heads", "num_hidden_layers")},
        "num_layers": 2,
        "num_heads": 6,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 7,
    },
    "gpt_neox": {**_BASE, "rotary_pct": 0.5},
    "gpt_oss": {
        **_BASE,
        **_SLIDING,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.1,  # its experts multiply what they add up, and rounding errors with it
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gptj": {**_GPT, "rotary_dim": 4},
    "granite": {**_BASE, "logits_scaling": 3.0, "attention_multiplier": 0.2},
    "granite_swa": {**_BASE, **_SLIDING},
    "granitemoe": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 36},
    "helium": {**_BASE, "head_dim": 8},
    "hunyuan_v1_dense": _HEADS_OF_8,
    "hunyuan_v1_moe": {**_HEADS_OF_8, "num_experts": 4, "moe_topk": 2},
    "hy_v3": _MOE,
    "hyperclovax": _BASE,
    "internlm3": _HEADS_OF_8,
    "iquestcoder": _HEADS_OF_8,
    "jais2": _BASE,
    "llama": _BASE,
    "mellum": {**_MOE, **_SLIDING},
    "minicpm3": _MLA,
    "minimax_m2": _MOE,
    "ministral": {**_BASE, **_SLIDING, "head_dim": 8},
    "ministral3": _HEADS_OF_8,
    "mistral": {**_BASE, "sliding_window": 7},
    "mixtral": {**_BASE, "num_local_experts": 4},
    "mpt": {
        "vocab_size": VOCAB_SIZE,
        "d_model": 48,
        "n_layers": 2,
        "n_heads": 6,
        "max_seq_len": 128,
        "attn_config": {"clip_qkv": 1.5},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    },
    "nanochat": _BASE,
    "nemotron": {**_BASE, "head_dim": 8},
    "olmo": _BASE,
    "olmo2": _BASE,
    "olmo3": {**_BASE, **_SLIDING},
    "olmoe": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_PLAIN, "ffn_dim": 72, "word_embed_proj_dim": 40, "init_std": 0.3},
    "persimmon": _BASE,
    "phi": _BASE,
    "phi3": {**_BASE, "sliding_window": 7},
    "phimoe": {**_BASE, "num_local_experts": 4, "sliding_window": 7},
    "qwen2": {**_BASE, **_SLIDING, "use_sliding_window": True},
    "qwen2_moe": {
        **_BASE,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3": {**_BASE, **_SLIDING, "head_dim": 8, "use_sliding_window": True},
    "qwen3_moe": {
        **_BASE,
        "head_dim": 8,
        "moe_intermediate_size": 20,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "seed_oss": {**_BASE, "head_dim": 8},
    "smollm3": _BASE,
    "solar_open": _MOE,
    "stablelm": _BASE,
    "starcoder2": {**_BASE, "sliding_window": 7},
    "vaultgemma": {**_HEADS_OF_8, **_SLIDING, "query_pre_attn_scalar": 16},
    "youtu": _MLA,
}
"""By family: small, with KV heads that do not divide by two, and windows shorter than the tests' sequences."""


def tiny_config(family: str, **overrides: Setting) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**SETTINGS[family], **overrides})


def tiny_model(family: str, **overrides: Setting) -> PreTrainedModel:
    """A random model in float32 with transformers' own attention: the oracle of what is saved from it."""
    torch.manual_seed(0)
    attention = "sdpa" if family == "falcon" else "eager"  # falcon's eager code adds ALiBi twice
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), attn_implementation=attention)
    model = model.float().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            # What starts as zeros or ones (biases, norms, sinks, corrections) would hide being lost or doubled.
            if tensor.ndim == 1 or not tensor.any():
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return model


def save_tiny(directory: Path, family: str, **overrides: Setting) -> PreTrainedModel:
    """Saves a tiny model as a checkpoint; returns it."""
    model = tiny_model(family, **overrides)
    model.save_pretrained(directory)
    return model
