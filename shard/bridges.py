"""Families that do without transformers' attention interface, or tell it too little, led to our attention.

Most of their modules multiply queries with keys themselves. `bridge` replaces one method of each, the innermost there
is: in a step it takes the module's own queries, keys and values to our attention; at any other time it is what it was,
so that the dense pass of the self-test remains transformers' code.

    bloom    ALiBi
    falcon   rotated, or ALiBi; keys and values are kept once for each KV head, not repeated for its query heads
    gpt_neo  neither rotated nor scaled; every other layer attends within a window
    gptj     rotated by its own code
    mpt      ALiBi; what reaches attention may be clipped
    phimoe   goes through the interface, but tells only its mask of its window

On several ranks a module has its rank's heads, while its backbone makes the bias of all: both ways take their part of
it. This module knows how these families name their parts, and nothing of how attention is done.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from shard.attention import Alibi, interface, is_attending
from shard.tensor_parallel import Sharding

Result = tuple[Tensor, Tensor | None]
"""What the methods return: attention's output, and weights that nobody looks at."""


@dataclass(frozen=True, slots=True)
class Part:
    """What concerns attention on this rank."""

    heads: slice
    """Of the model's query heads, those that are here."""
    alibi: Alibi | None


class Bridge(ABC):
    """Stands for a method of one attention module."""

    module_class: ClassVar[str]
    method: ClassVar = "forward"
    implementation: ClassVar = "eager"
    """Which of transformers' own is right."""

    def __init__(self, module: nn.Module, part: Part) -> None:
        self.module: Any = module  # its parts and methods are those of its family
        self.part = part
        self.own: Callable[..., Result] = getattr(module, self.method)
        setattr(module, self.method, self)

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> Result:
        return self.in_step(*args, **kwargs) if is_attending() else self.dense(*args, **kwargs)

    @abstractmethod
    def in_step(self, *args: Any, **kwargs: Any) -> Result: ...

    def dense(self, *args: Any, **kwargs: Any) -> Result:
        return self.own(*args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None) -> Tensor:
        """[1, heads or KV heads, T, dim] each → [1, T, heads, dim]"""
        output, _ = interface(
            self.module, query, key, value, None, scaling=scaling, sliding_window=window, alibi=self.part.alibi
        )
        return output


class BloomBridge(Bridge):
    module_class = "BloomAttention"

    def in_step(self, hidden_states: Tensor, residual: Tensor, **_: object) -> Result:
        module = self.module
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        attended = self.attend(query, key, value, module.inv_norm_factor)
        return module.dense(attended.flatten(2)) + residual, None

    def dense(self, hidden_states: Tensor, residual: Tensor, *, alibi: Tensor, **kwargs: Any) -> Result:
        return self.own(hidden_states, residual, alibi=alibi[self.part.heads], **kwargs)


class FalconBridge(Bridge):
    module_class = "FalconAttention"
    implementation = "sdpa"  # the eager one adds ALiBi twice

    def in_step(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_: object) -> Result:
        module = self.module
        group = module.num_heads // module.num_kv_heads
        # All of falcon's architectures: the query heads of a KV head, its key, its value, then the next KV head's.
        fused = module.query_key_value(hidden_states).unflatten(2, (-1, group + 2, module.head_dim))
        query = fused[:, :, :, :-2].flatten(2, 3).transpose(1, 2)
        key, value = (fused[:, :, :, which].transpose(1, 2) for which in (-2, -1))
        if self.part.alibi is None:
            query, key = (_rotated(states, *position_embeddings) for states in (query, key))
        attended = self.attend(query, key, value, module.inv_norm_factor)
        return module.dense(attended.flatten(2)), None

    def dense(self, hidden_states: Tensor, *, alibi: Tensor | None, attention_mask: Tensor, **kwargs: Any) -> Result:
        if alibi is not None:
            attention_mask = attention_mask[:, self.part.heads]  # holds the bias
        return self.own(hidden_states, alibi=alibi, attention_mask=attention_mask, **kwargs)


def _rotated(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """The halves of `states` [1, heads, T, dim] rotated by angles [1, T, dim]."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines[:, None] + torch.cat((-second, first), dim=-1) * sines[:, None]


class GptNeoBridge(Bridge):
    module_class = "GPTNeoSelfAttention"
    method = "_attn"

    def __init__(self, module: nn.Module, part: Part) -> None:
        super().__init__(module, part)
        self.module.layer_idx = self.module.layer_id

    def in_step(self, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None) -> Result:
        window = self.module.config.window_size if self.module.attention_type == "local" else None
        return self.attend(query, key, value, 1.0, window).transpose(1, 2), None


class GptJBridge(Bridge):
    module_class = "GPTJAttention"
    method = "_attn"

    def in_step(self, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None) -> Result:
        return self.attend(query, key, value, 1 / self.module.scale_attn).transpose(1, 2), None


class MptBridge(Bridge):
    module_class = "MptAttention"

    def in_step(self, hidden_states: Tensor, **_: object) -> Result:
        module = self.module
        fused = module.Wqkv(hidden_states)
        if module.clip_qkv:
            fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        query, key, value = fused.unflatten(2, (3, module.n_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
        attended = self.attend(query, key, value, module.softmax_scale)
        return module.out_proj(attended.flatten(2)), None

    def dense(self, hidden_states: Tensor, *, position_bias: Tensor, **kwargs: Any) -> Result:
        return self.own(hidden_states, position_bias=position_bias[self.part.heads], **kwargs)


class PhimoeBridge(Bridge):
    module_class = "PhimoeAttention"

    def in_step(self, *args: Any, **kwargs: Any) -> Result:
        return self.own(*args, sliding_window=self.module.config.sliding_window, **kwargs)


BRIDGES: Final[Mapping[str, type[Bridge]]] = {
    "bloom": BloomBridge,
    "falcon": FalconBridge,
    "gpt_neo": GptNeoBridge,
    "gptj": GptJBridge,
    "mpt": MptBridge,
    "phimoe": PhimoeBridge,
}
"""By family."""


def own_attention(model_type: str) -> str | None:
    """By which of transformers' implementations a family attends in a dense pass; None: by whichever is asked for."""
    return BRIDGES[model_type].implementation if model_type in BRIDGES else None


def bridge(backbone: nn.Module, model_type: str, sharding: Sharding) -> None:
    """Leads a loaded backbone's attention modules, which hold this rank's heads, to our attention."""
    if model_type not in BRIDGES:
        return
    make = BRIDGES[model_type]
    here = slice(sharding.kept.query.start, sharding.kept.query.stop)
    slopes = alibi_slopes(sharding.heads.query)[here].to(_parameter(backbone).device)
    part = Part(here, _alibi(backbone, model_type, slopes))
    for module in list(backbone.modules()):
        if type(module).__name__ == make.module_class:
            make(module, part)
    if model_type == "mpt":
        backbone.register_forward_pre_hook(_give_a_mask, with_kwargs=True)


def _parameter(backbone: nn.Module) -> nn.Parameter:
    return next(backbone.parameters())


def _alibi(backbone: nn.Module, model_type: str, slopes: Tensor) -> Alibi | None:
    """With each family's own roundings."""
    config: Any = backbone.config
    match model_type:
        case "bloom":
            return Alibi(slopes, _parameter(backbone).dtype)
        case "mpt":
            return Alibi(slopes, torch.float32)
        case "falcon" if config.alibi:
            return Alibi(slopes.bfloat16(), _parameter(backbone).dtype, config.head_dim**-0.5)
    return None


def alibi_slopes(num_heads: int) -> Tensor:
    """[num_heads] powers of 2**-8, evenly spaced; of the next power of two if it is none, every second one first.

    Press, Smith and Lewis 2022, "Train short, test long", https://arxiv.org/abs/2108.12409.
    """
    among = 2 ** math.ceil(math.log2(num_heads))
    slopes = 2.0 ** (torch.arange(1, among + 1) * (-8 / among))
    return slopes if among == num_heads else torch.cat((slopes[1::2], slopes[::2]))[:num_heads]


def _give_a_mask(
    backbone: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """mpt's backbone converts the mask, which it takes for granted; a mask of four dimensions is handed on as it is."""
    if not is_attending():
        return None
    return args, {**kwargs, "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}
