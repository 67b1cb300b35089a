"""Writes quantised checkpoints, each format by its plainest packer: codes of a row are digits of one long number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny_models import Setting, tiny_model

Parts = Mapping[str, Tensor]
Packer = Callable[[int, int, torch.Generator], tuple[Parts, Tensor]]
"""Random weights of so many outputs and inputs: how they are stored, by the ends of names, and the weights."""

# Everything a rank may keep in one format or another begins inside a word.
SIZES: Mapping[str, Setting] = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16}
_MATRIX = re.compile(r"\.((q|k|v|o|qkv|q_b|kv_b|up|gate|gate_up|down)_proj|w[123])\.weight$")
_STACK = re.compile(r"\.experts\.(gate_up|down)_proj$")


@dataclass(frozen=True, slots=True)
class Format:
    packer: Packer
    settings: Mapping[str, object]
    names: re.Pattern[str] = _MATRIX


def save_quantized(directory: Path, family: str, by: Format, **overrides: Setting) -> PreTrainedModel:
    """A tiny checkpoint with quantised attention and MLPs; returns transformers' model of the very same weights."""
    tiny_model(family, **overrides).save_pretrained(directory)
    path = directory / "model.safetensors"
    exact = load_file(path)
    stored: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(7)
    for name, tensor in exact.items():
        if not by.names.search(name):
            stored[name] = tensor
            continue
        parts, exact[name] = by.packer(*_outputs_and_inputs(tensor), generator)
        stored |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in exact.items()}, path, metadata={"format": "pt"})
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": by.settings}))
    return oracle


def _outputs_and_inputs(tensor: Tensor) -> tuple[int, int]:
    return (tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 else (tensor.shape[2], tensor.shape[1])


def packed(codes: Tensor, bits: int) -> Tensor:
    """[rows, n] codes → [rows, words] int32."""
    num_words = -(-codes.shape[1] * bits // 32)
    rows = [
        sum(code << bits * i for i, code in enumerate(row)).to_bytes(4 * num_words, "little") for row in codes.tolist()
    ]
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32).reshape(len(rows), num_words)


def _codes(limit: int, *shape: int, generator: torch.Generator, least: int = 0) -> Tensor:
    return torch.randint(least, limit, shape, generator=generator)


def _scales(*shape: int, bits: int, generator: torch.Generator) -> Tensor:
    """Such that weights are about 0.3 wide, in what float16 can hold."""
    return (torch.rand(shape, generator=generator) + 0.5).mul(0.9 / 2**bits).half()


def _groups(inputs: int, size: int) -> Tensor:
    return torch.arange(inputs) // size


def gptq(
    bits: int,
    size: int = 32,
    *,
    is_second: bool = False,
    symmetric: bool = False,
    act_order: bool = False,
    g_idx: bool = True,
) -> Format:
    def pack(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        groups = _groups(inputs, size if size > 0 else inputs)
        if act_order:
            groups = groups[torch.randperm(inputs, generator=generator)]
        num_groups = int(groups.max()) + 1
        codes = _codes(1 << bits, outputs, inputs, generator=generator)
        zeros = _codes(1 << bits, num_groups, outputs, generator=generator)
        if symmetric:
            zeros.fill_(1 << bits - 1)
        scales = _scales(num_groups, outputs, bits=bits, generator=generator)
        parts = {
            "qweight": packed(codes, bits).T,
            "qzeros": packed((zeros - int(not is_second)) % (1 << bits), bits),
            "scales": scales,
        }
        if g_idx:
            parts["g_idx"] = groups.int() if act_order or num_groups == 1 else torch.zeros(inputs, dtype=torch.int32)
        return parts, (codes - zeros.T[:, groups]) * scales.float().T[:, groups]

    form = {"checkpoint_format": "gptq_v2"} if is_second else {}
    return Format(pack, {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order, **form})


def awq(size: int = 32) -> Format:
    def interleaved(codes: Tensor) -> Tensor:
        return codes.reshape(len(codes), -1, 4, 2).transpose(2, 3).flatten(1)

    def pack(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        groups = _groups(inputs, size)
        codes = _codes(16, inputs, outputs, generator=generator)
        zeros = _codes(16, inputs // size, outputs, generator=generator)
        scales = _scales(inputs // size, outputs, bits=4, generator=generator)
        parts = {"qweight": packed(interleaved(codes), 4), "qzeros": packed(interleaved(zeros), 4), "scales": scales}
        return parts, ((codes - zeros[groups]) * scales.float()[groups]).T

    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "GEMM"}
    return Format(pack, {**settings, "modules_to_not_convert": ["lm_head"]})


def scaled(
    method: Mapping[str, object],
    block: tuple[int, int],
    scale_name: str,
    *,
    asymmetric: bool = False,
    act_order: bool = False,
    scales_are: Literal["factors", "divisors", "exponents"] = "factors",
) -> Format:
    """8 bits, float8 or with zeros int8, that share a scale in blocks; (0, 0) is one for all, as a number."""

    def pack(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        rows, columns = _groups(outputs, block[0] or outputs), _groups(inputs, block[1] or inputs)
        if act_order:
            columns = columns[torch.randperm(inputs, generator=generator)]
        shape = (int(rows.max()) + 1, int(columns.max()) + 1)
        scales = _scales(*shape, bits=8 if asymmetric else 4, generator=generator).float()
        stored = 1 / scales if scales_are == "divisors" else scales
        if scales_are == "exponents":
            stored = _codes(126, *shape, generator=generator, least=122).to(torch.uint8)
            scales = 2.0 ** (stored.int() - 127)
        parts = {scale_name: stored if any(block) else stored[0, 0]}
        if act_order:
            parts["weight_g_idx"] = columns.int()
        if asymmetric:
            codes = _codes(128, outputs, inputs, generator=generator, least=-128).to(torch.int8)
            zeros = _codes(20, *shape, generator=generator, least=-20).to(torch.int8)
            parts["weight_zero_point"] = zeros
            exact = codes.float() - zeros.float()[rows][:, columns]
        else:
            codes = torch.randn(outputs, inputs, generator=generator).mul(8).to(torch.float8_e4m3fn)
            exact = codes.float()
        parts |= {"weight": codes, "input_scale": torch.tensor(0.1)}
        return parts, exact * scales[rows][:, columns]

    return Format(pack, method)


def compressed(form: str, **weights: object) -> dict[str, object]:
    """The settings of a checkpoint of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"0": group}, "ignore": ["lm_head"]}


def pack_quantized(bits: int, size: int, *, asymmetric: bool = False, act_order: bool = False) -> Format:
    def pack(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        groups = _groups(inputs, size or inputs)
        if act_order:
            groups = groups[torch.randperm(inputs, generator=generator)]
        num_groups, middle = int(groups.max()) + 1, 1 << bits - 1
        codes = _codes(1 << bits, outputs, inputs, generator=generator)
        scales = _scales(outputs, num_groups, bits=bits, generator=generator).bfloat16()
        parts = {
            "weight_packed": packed(codes, bits),
            "weight_shape": torch.tensor([outputs, inputs]),
            "weight_scale": scales,
        }
        zeros = torch.full((outputs, num_groups), middle)
        if asymmetric:
            zeros = _codes(1 << bits, outputs, num_groups, generator=generator)
            parts["weight_zero_point"] = packed(zeros.T, bits).T
        if act_order:
            parts["weight_g_idx"] = groups.int()
        return parts, (codes - zeros[:, groups]) * scales.float()[:, groups]

    return Format(pack, compressed("pack-quantized", num_bits=bits, type="int", group_size=size))


def int8_of_bitsandbytes() -> Format:
    def pack(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        codes = _codes(128, outputs, inputs, generator=generator, least=-127).to(torch.int8)
        largest = torch.rand(outputs, generator=generator) + 0.3
        parts = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, codes.float() * largest[:, None] / 127

    return Format(pack, {"quant_method": "bitsandbytes", "load_in_8bit": True})


def four_bits_of_bitsandbytes(kind: str, *, is_nested: bool) -> Format:
    def pack(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        codes = _codes(16, outputs * inputs, generator=generator)
        values = torch.rand(16, generator=generator) - 0.5
        largest = torch.rand(-(-len(codes) // 64), generator=generator) + 0.5
        state: dict[str, object] = {"quant_type": kind, "blocksize": 64, "shape": [outputs, inputs]}
        parts = {"weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], "weight.quant_map": values}
        if is_nested:
            coded = _codes(256, len(largest), generator=generator).to(torch.uint8)
            table = torch.linspace(-1, 1, 256)
            scales = torch.rand(-(-len(coded) // 8), generator=generator) + 0.5
            largest = table[coded.int()] * scales.repeat_interleave(8)[: len(coded)] + 1.25
            parts |= {"weight.nested_quant_map": table, "weight.nested_absmax": scales, "weight.absmax": coded}
            state |= {"nested_blocksize": 8, "nested_offset": 1.25}
        else:
            parts["weight.absmax"] = largest
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode())).to(
            torch.uint8
        )
        return parts, (values[codes] * largest.repeat_interleave(64)[: len(codes)]).reshape(outputs, inputs)

    return Format(pack, {"quant_method": "bitsandbytes", "load_in_4bit": True})


def mxfp4(num_experts: int) -> Format:
    def pack(outputs: int, inputs: int, generator: torch.Generator) -> tuple[Parts, Tensor]:
        codes = _codes(16, num_experts, outputs, inputs, generator=generator)
        exponents = _codes(125, num_experts, outputs, inputs // 32, generator=generator, least=122)
        halves = codes.reshape(num_experts, outputs, inputs // 32, 16, 2)
        parts = {
            "_blocks": (halves[..., 0] + 16 * halves[..., 1]).to(torch.uint8),
            "_scales": exponents.to(torch.uint8),
        }
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes % 8]
        values = torch.where(codes < 8, magnitudes, -magnitudes)
        return parts, (values * 2.0 ** (exponents - 127).repeat_interleave(32, dim=2)).transpose(1, 2)

    return Format(pack, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, _STACK)
