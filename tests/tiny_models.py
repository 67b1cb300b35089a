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

SETTINGS: Mapping[str, Settings] = {
    "arcee": _BASE,
    "cohere": {**_BASE, "use_qk_norm": True},
    "cohere2": {**_BASE, **_SLIDING},
    "deepseek_v3": {
        **_BASE,
        **_MHA,
        "moe_intermediate_size": 20,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 10,
    },
    "ernie4_5": _BASE,
    "exaone4": {**_BASE, **_SLIDING},
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
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
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
    "granite": {**_BASE, "logits_scaling": 3.0, "attention_multiplier": 0.2},
    "helium": {**_BASE, "head_dim": 8},
    "llama": _BASE,
    "ministral": {**_BASE, **_SLIDING, "head_dim": 8},
    "mistral": {**_BASE, "sliding_window": 7},
    "mixtral": {**_BASE, "num_local_experts": 4},
    "nemotron": {**_BASE, "head_dim": 8},
    "olmo": _BASE,
    "olmo2": _BASE,
    "olmo3": {**_BASE, **_SLIDING},
    "olmoe": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        **{name: _BASE[name] for name in _BASE if name not in ("intermediate_size", "num_key_value_heads")},
        "ffn_dim": 72,
        "word_embed_proj_dim": 40,
        "init_std": 0.3,
    },
    "phi": _BASE,
    "phi3": {**_BASE, "sliding_window": 7},
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
    "starcoder2": {**_BASE, "sliding_window": 7},
}
"""By family: small, with KV heads that do not divide by two, and windows shorter than the tests' sequences."""


def tiny_config(family: str, **overrides: Setting) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **{**SETTINGS[family], **overrides})


def tiny_model(family: str, **overrides: Setting) -> PreTrainedModel:
    """A random model in float32 with transformers' eager attention: the oracle of what is saved from it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for tensor in model.parameters():
            # What starts as zeros or ones (biases, norms, sinks) would hide being lost or doubled.
            if tensor.ndim == 1 or not tensor.any():
                tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return model


def save_tiny(directory: Path, family: str, **overrides: Setting) -> PreTrainedModel:
    """Saves a tiny model as a checkpoint; returns it."""
    model = tiny_model(family, **overrides)
    model.save_pretrained(directory)
    return model
