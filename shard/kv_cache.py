"""KV memory: for every layer one tensor of key blocks and one of value blocks, with the same block ids.

A block is a fixed run of token places; a slot is one place, `block * block_size + offset`. Which block belongs to whom
is the router's knowledge: this module neither hands blocks out nor takes them back. Layers may differ in their heads
and in the width of their keys and values (multi-head latent attention has wider keys than values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shard.memory import zeros


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores per token on this rank."""

    kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


def bytes_per_block(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    return block_size * sum(layer.bytes_per_token(dtype) for layer in layers)


class KVCache:
    """The blocks of one epoch. Block 0 belongs to padding rows.

    Memory starts as zeros: places behind a sequence's end are read with weight zero, and zero times whatever an
    allocation held before may be NaN.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = tuple(layers)
        self.num_blocks = num_blocks
        self.block_size = block_size
        # One row per block: gathering whole blocks is one memory copy each.
        self._keys = [
            zeros((num_blocks, block_size * layer.kv_heads * layer.key_dim), dtype, device) for layer in layers
        ]
        self._values = [
            zeros((num_blocks, block_size * layer.kv_heads * layer.value_dim), dtype, device) for layer in layers
        ]

    @property
    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values, for operations that lay out blocks in their own way."""
        return list(zip(self._keys, self._values, strict=True))

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """The blocks' keys [num_blocks, block_size, kv_heads, key_dim], and values with value_dim, in place."""
        shape = (self.num_blocks, self.block_size, self.layers[layer].kv_heads, -1)
        return self._keys[layer].view(shape), self._values[layer].view(shape)

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores `key` [T, kv_heads, key_dim] and `value` [T, kv_heads, value_dim] at `slots` [T] int64.

        What is not finite is stored as zero. Its own sequence is lost anyway (its queries are not finite either), but
        the slot will be read, with weight zero, by the sequence that gets the block next.
        """
        self._places(self._keys[layer]).index_copy_(0, slots, _finite(key))
        self._places(self._values[layer]).index_copy_(0, slots, _finite(value))

    def read(self, layer: int, blocks: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `blocks` [num_rows * n] int64, the same n for every row.

        Returns [num_rows, n * block_size, kv_heads, key_dim] and the same with value_dim.
        """
        shape = self.layers[layer]
        keys = self._keys[layer].index_select(0, blocks)
        values = self._values[layer].index_select(0, blocks)
        return (
            keys.view(num_rows, -1, shape.kv_heads, shape.key_dim),
            values.view(num_rows, -1, shape.kv_heads, shape.value_dim),
        )

    def _places(self, blocks: Tensor) -> Tensor:
        """[num_blocks * block_size, numbers per token]"""
        return blocks.view(self.num_blocks * self.block_size, -1)


def _finite(tensor: Tensor) -> Tensor:
    """[T, heads, dim] as [T, heads * dim] with NaN and infinities replaced by zero."""
    return tensor.flatten(1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
