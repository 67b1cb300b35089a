"""What `varlen_attn` means, for tests: torch has its kernel for CUDA only, this stands in its place on the CPU.

It is as strict as FlashAttention 2 about what it is given, but takes any floating-point numbers.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.attention.varlen  # registers the operation
from torch import Tensor

PLACES = 256


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row: its queries are the last of the keys that the table names, and see so many before and after their
    own."""
    assert cu_seq_k is not None
    assert seqused_k is not None
    assert block_table is not None
    assert window_size is not None
    num_rows, num_pages, width = len(seqused_k), len(key), query.shape[2]
    check_shapes(query, key, value, block_table)
    for lengths, count in ((cu_seq_q, num_rows + 1), (cu_seq_k, num_rows + 1), (seqused_k, num_rows)):
        assert (lengths.dtype, lengths.shape, lengths.is_contiguous()) == (torch.int32, (count,), True)
    starts, contexts = cu_seq_q.tolist(), seqused_k.tolist()
    assert (starts[0], starts[-1]) == (0, len(query))
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == max(contexts)
    assert cu_seq_k.diff().tolist() == contexts
    assert num_splits == 1, "the kernel's own choice may be wrong over blocks"
    assert is_causal == (window_size == [-1, 0])
    output = torch.full_like(query, torch.nan)
    for row, context in enumerate(contexts):
        blocks = block_table[row, : -(-context // PLACES)].long()
        assert int(blocks.max()) < num_pages
        keys, values = (of[blocks].flatten(0, 1)[:context] for of in (key, value))
        own = slice(starts[row], starts[row + 1])
        output[own] = attend_row(query[own], keys, values, scale or width**-0.5, window_size)
    return output, torch.empty(0), torch.empty(0)


def check_shapes(query: Tensor, key: Tensor, value: Tensor, block_table: Tensor) -> None:
    width = query.shape[2]
    assert width % 8 == 0
    assert width <= 256
    assert key.shape == value.shape == (len(key), key.shape[1], key.shape[2], width)
    assert key.shape[1] % PLACES == 0
    assert query.shape[1] % key.shape[2] == 0
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == block_table.stride(-1) == 1
    assert block_table.dtype == torch.int32


def attend_row(query: Tensor, keys: Tensor, values: Tensor, scale: float, window_size: list[int]) -> Tensor:
    """`query` [n, heads, dim], `keys` and `values` [context, kv_heads, dim] -> [n, heads, dim]"""
    group = query.shape[1] // keys.shape[1]
    keys, values = (of.repeat_interleave(group, dim=1).double() for of in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    places = torch.arange(len(keys))
    own = places[len(keys) - len(query) :, None]
    left, right = window_size
    hidden = (places > own + right) if right >= 0 else torch.zeros(len(query), len(keys), dtype=torch.bool)
    if left >= 0:
        hidden |= places < own - left
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)


@cache
def provide() -> None:
    """From now on the CPU has the kernel."""
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", attend)
