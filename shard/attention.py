"""Attention over paged KV memory, called by transformers' model code in place of its own.

The model code is registered one function (`install`), which finds the step it belongs to in a context variable: some
families drop unknown keyword arguments on the way down, so metadata cannot travel in them. Only the attention registry
is used, not the mask registry: then transformers builds no mask at all and causality is ours.

    slots      where each fed token's key and value are written      all layers: same slots
    DecodeWork rows that feed one token, batched: their blocks are gathered side by side, padded to the longest
    PromptWork one run of a longer row's queries, against all the blocks it may look at

On GPUs FlashAttention reads the blocks where they are instead, if it knows the model's heads and options.

A step's work is laid out once per (window, dtype) and reused by every layer with that window. Queries of one KV head's
group are folded into the query axis where they share a mask, so that keys are never repeated.

This module knows nothing of seats, plans or sampling, and nothing of how the model is split among ranks: it sees as
many heads as reach it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from shard.errors import LoadError
from shard.kernels import ops
from shard.kernels.native import MAX_HEAD_WIDTH, PLACES, Options, StepRows
from shard.kernels.packing import LANES
from shard.kv_cache import KVCache, LayerShape
from shard.transfer import to_device

NAME: Final = "shardstream"
"""What our function is called in transformers' registry."""

MAX_QUERIES: Final = 512
"""Queries of a prompt attended at once when a mask is needed: 512 x 32k places of bfloat16 mask are 32 MB."""

MAX_EXPLICIT_QUERIES: Final = 128
"""The same where the scores themselves are held, for every head: 32 heads x 128 x 8k of float32 are 128 MB."""

MAX_PADDING: Final = 1.5
"""Rows share a decode group while the longest has at most this many times the blocks of the shortest."""

MAX_SCORES_ALONE: Final = 8192
"""Up to so many, one thread attends sooner than two: between torch's operations it takes 0.1 ms to wake the second."""

# Arguments model code passes along that cannot change what attention computes.
_HARMLESS: Final = frozenset(
    ("dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_router_logits")
)


@dataclass(frozen=True, slots=True, eq=False)
class Alibi:
    """Attention with linear biases: nearer keys score higher, by a slope of each head's. All layers share one.

    The bias grows with a key's position instead of falling with its distance, which for a softmax is the same.
    """

    slopes: Tensor  # [heads]
    dtype: torch.dtype
    """Slope times position is rounded to it, as the model code does it and the model was trained."""
    factor: float = 1.0

    def bias(self, num_keys: int) -> Tensor:
        """[heads, num_keys] float32, added to the scores of keys at positions 0, 1, ..."""
        positions = torch.arange(num_keys, device=self.slopes.device)
        return (self.slopes[:, None] * positions).to(self.dtype).float() * self.factor


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How a layer attends."""

    scaling: float
    window: int | None = None
    """Keys a query sees, itself included; None: all before it."""
    softcap: float | None = None
    """Scores are squeezed into ±softcap by tanh before the mask."""
    sinks: Tensor | None = None
    """[heads] a logit per head that takes part in the softmax and adds nothing."""
    alibi: Alibi | None = None

    @property
    def explicit(self) -> bool:
        """Whether the scores must be held, because no fused kernel knows the option."""
        return self.softcap is not None or self.sinks is not None or self.alibi is not None

    def native(self) -> Options:
        assert self.alibi is None, "native attention knows no ALiBi"
        sinks = None if self.sinks is None else self.sinks.float().contiguous()
        return Options(self.scaling, self.window, self.softcap, sinks)


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Rows that feed one token each, and the blocks they look at."""

    tokens: Tensor | None  # [rows] int64 into the step's tokens; None: all of them in order
    blocks: Tensor  # [rows * n] int64
    num_rows: int
    bias: Tensor | None  # [rows, 1, 1, n * block_size]: 0 or -inf; None: every place is seen


@dataclass(frozen=True, slots=True)
class PromptWork:
    """A run of one row's queries."""

    tokens: slice  # into the step's tokens
    blocks: Tensor  # [n] int64
    num_keys: int  # places of those blocks up to the run's last token
    bias: Tensor | None  # [queries, num_keys]: 0 or -inf; None: queries and keys end together at position 0


@dataclass(frozen=True, slots=True)
class StepWork:
    decode: list[DecodeWork]
    prompt: list[PromptWork]


@dataclass(frozen=True, slots=True)
class _Row:
    """One row on the host: its tokens are `start:stop` of the step, the last of them at position `context - 1`."""

    index: int
    start: int
    stop: int
    context: int


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One step as attention sees it: R rows, T tokens; on every rank the same."""

    slots: Tensor  # [T] int64
    query_starts: list[int]  # [R + 1] rows' ranges in the packed tokens
    context_lens: list[int]  # [R] tokens of each row's sequence, this step's included
    block_tables: Tensor  # [R, max_blocks] int64, padded with 0
    block_size: int
    native_rows: StepRows | None = field(default=None, repr=False)
    """`step_rows`, if its owner keeps them with the tensors."""
    _work: dict[tuple[int | None, torch.dtype, bool], StepWork] = field(default_factory=dict, repr=False)
    _key_biases: dict[Alibi, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        *,
        slots: Tensor,
        query_starts: list[int],
        context_lens: list[int],
        block_tables: Tensor,
        block_size: int,
        device: torch.device,
    ) -> AttentionBatch:
        """Rows with no tokens are not allowed; `block_tables` is [R, max_blocks] of any integer type."""
        return cls(
            slots=to_device(slots, device),
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables=to_device(block_tables.long(), device),
            block_size=block_size,
        )

    def work(self, window: int | None, dtype: torch.dtype, explicit: bool) -> StepWork:
        """The layers' common part, laid out at the first layer that asks for it."""
        key = (window, dtype, explicit)
        if key not in self._work:
            self._work[key] = _Layout(self, window, dtype, explicit).step_work()
        return self._work[key]

    def key_bias(self, alibi: Alibi) -> Tensor:
        """[heads, all places of the longest block table]"""
        if alibi not in self._key_biases:
            self._key_biases[alibi] = alibi.bias(self.block_tables.shape[1] * self.block_size)
        return self._key_biases[alibi]

    def rows(self) -> list[_Row]:
        spans = zip(pairwise(self.query_starts), self.context_lens, strict=True)
        return [_Row(index, start, stop, context) for index, ((start, stop), context) in enumerate(spans)]

    def num_scores(self) -> int:
        """Pairs of a token and a place it may look at, at most."""
        return sum((row.stop - row.start) * row.context for row in self.rows())

    def step_rows(self) -> StepRows:
        """The same for native operations."""
        if self.native_rows is not None:
            return self.native_rows
        return StepRows(
            slots=self.slots.contiguous(),
            starts=torch.tensor(self.query_starts, dtype=torch.int64),
            contexts=torch.tensor(self.context_lens, dtype=torch.int64),
            tables=self.block_tables.contiguous(),
        )

    def move_on(self, context_lens: Sequence[int]) -> None:
        """Makes of it a later step with the same rows. The tensors' owner has moved these on in their place."""
        self.context_lens[:] = context_lens
        self._work.clear()


class _Layout:
    """Lays out a step's work for the layers with one window."""

    def __init__(self, batch: AttentionBatch, window: int | None, dtype: torch.dtype, explicit: bool) -> None:
        self.batch = batch
        self.window = window
        self.dtype = dtype
        self.max_queries = MAX_EXPLICIT_QUERIES if explicit else MAX_QUERIES
        self.always_bias = explicit
        self.device = batch.slots.device

    def step_work(self) -> StepWork:
        rows = self.batch.rows()
        single = [row for row in rows if row.stop - row.start == 1]
        longer = [row for row in rows if row.stop - row.start > 1]
        return StepWork(
            decode=[self._decode(group, len(rows)) for group in self._groups(single)],
            prompt=[work for row in longer for work in self._prompt(row)],
        )

    def _first_block(self, first_query: int) -> int:
        """Index in the table of the first block the query at that position sees."""
        if self.window is None:
            return 0
        return max(0, first_query - self.window + 1) // self.batch.block_size

    def _end_block(self, context: int) -> int:
        return -(-context // self.batch.block_size)

    def _num_blocks(self, row: _Row) -> int:
        return self._end_block(row.context) - self._first_block(row.context - 1)

    def _groups(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Rows of similar length together; within a group they keep the step's order."""
        group: list[_Row] = []
        for row in sorted(rows, key=self._num_blocks, reverse=True):
            if group and self._num_blocks(group[0]) > MAX_PADDING * self._num_blocks(row):
                yield sorted(group, key=lambda member: member.index)
                group = []
            group.append(row)
        if group:
            yield sorted(group, key=lambda member: member.index)

    def _decode(self, group: list[_Row], num_rows: int) -> DecodeWork:
        n = max(self._num_blocks(row) for row in group)
        contexts = self._tensor([row.context for row in group])[:, None]
        firsts = self._tensor([self._first_block(row.context - 1) for row in group])[:, None]
        columns = firsts + torch.arange(n, device=self.device)  # [rows, n]
        # Padding reads some block of the table's last column; the bias hides it.
        columns = columns.clamp_(max=self.batch.block_tables.shape[1] - 1)
        # Every row of the step feeds one token: rows and tokens have the same index.
        everything = len(group) == num_rows
        tables = self.batch.block_tables
        tables = tables if everything else tables[self._tensor([row.index for row in group])]
        places = firsts * self.batch.block_size + torch.arange(n * self.batch.block_size, device=self.device)
        seen = places < contexts
        if self.window is not None:
            seen &= places >= contexts - self.window
        return DecodeWork(
            tokens=None if everything else self._tensor([row.start for row in group]),
            blocks=tables.gather(1, columns).flatten(),
            num_rows=len(group),
            bias=self._bias(seen)[:, None, None, :],
        )

    def _prompt(self, row: _Row) -> Iterator[PromptWork]:
        """One run without a mask if the row starts its sequence and sees all of it; else runs of bounded size."""
        begin = row.context - (row.stop - row.start)  # position of the row's first query
        whole = begin == 0 and not self.always_bias and (self.window is None or row.context <= self.window)
        size = row.stop - row.start if whole else self.max_queries
        for start in range(row.start, row.stop, size):
            stop = min(start + size, row.stop)
            first, end = begin + start - row.start, begin + stop - row.start  # positions
            first_block = self._first_block(first)
            num_keys = end - first_block * self.batch.block_size
            yield PromptWork(
                tokens=slice(start, stop),
                blocks=self.batch.block_tables[row.index, first_block : self._end_block(end)],
                num_keys=num_keys,
                bias=None if whole else self._prompt_bias(first, end, num_keys),
            )

    def _prompt_bias(self, first: int, end: int, num_keys: int) -> Tensor:
        """[end - first, num_keys] for queries at positions first..end and keys that end with them."""
        queries = torch.arange(first, end, device=self.device)[:, None]
        keys = torch.arange(end - num_keys, end, device=self.device)[None]
        seen = keys <= queries
        if self.window is not None:
            seen &= keys > queries - self.window
        return self._bias(seen)

    def _bias(self, seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)


class Attend(Protocol):
    """What a layer calls. `query` [T, heads, key_dim], `key` and `value` [T, kv_heads, dim] → [T, heads, value_dim]."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor: ...


class PagedAttention:
    """Writes a layer's keys and values into the cache and attends to what the rows' block tables name."""

    def __init__(self, batch: AttentionBatch, cache: KVCache) -> None:
        self._batch = batch
        self._cache = cache

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self._cache.write(layer, self._batch.slots, key, value)
        work = self._batch.work(options.window, query.dtype, options.explicit)
        if len(work.decode) == 1 and not work.prompt:
            return self._decode(layer, query, work.decode[0], options)
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        for rows in work.decode:
            assert rows.tokens is not None, "a group that is the whole step is its only work"
            output.index_copy_(0, rows.tokens, self._decode(layer, query[rows.tokens], rows, options))
        for run in work.prompt:
            output[run.tokens] = self._prompt(layer, query[run.tokens], run, options)
        return output

    def _decode(self, layer: int, query: Tensor, work: DecodeWork, options: AttentionOptions) -> Tensor:
        """`query` [rows, heads, key_dim] → [rows, heads, value_dim]"""
        keys, values = (kv.transpose(1, 2) for kv in self._cache.read(layer, work.blocks, work.num_rows))
        query = query.view(work.num_rows, keys.shape[1], -1, query.shape[2])  # [rows, kv_heads, group, key_dim]
        if options.explicit:
            return self._explicit(query[:, :, :, None], keys, values, work.bias, options)[:, :, :, 0].flatten(1, 2)
        output = F.scaled_dot_product_attention(query, keys, values, attn_mask=work.bias, scale=options.scaling)
        return output.flatten(1, 2)

    def _prompt(self, layer: int, query: Tensor, work: PromptWork, options: AttentionOptions) -> Tensor:
        """`query` [queries, heads, key_dim] → [queries, heads, value_dim]"""
        keys, values = (
            kv[:, : work.num_keys].transpose(1, 2) for kv in self._cache.read(layer, work.blocks, num_rows=1)
        )  # [1, kv_heads, num_keys, dim]
        query = query.transpose(0, 1)  # [heads, queries, key_dim]
        if options.explicit:
            grouped = query.view(1, keys.shape[1], -1, *query.shape[1:])  # [1, kv_heads, group, queries, key_dim]
            return self._explicit(grouped, keys, values, work.bias, options)[0].flatten(0, 1).transpose(0, 1)
        output = F.scaled_dot_product_attention(
            query[None],
            keys,
            values,
            attn_mask=work.bias,
            is_causal=work.bias is None,
            scale=options.scaling,
            enable_gqa=query.shape[0] != keys.shape[1],
        )
        return output[0].transpose(0, 1)

    def _explicit(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, options: AttentionOptions
    ) -> Tensor:
        key_bias = None if options.alibi is None else self._batch.key_bias(options.alibi)[:, : keys.shape[2]]
        return _explicit(query, keys, values, bias, key_bias, options)


def flash_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The numbers in which FlashAttention is made for a device, if it is at all."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return ()
    return torch.float16, torch.bfloat16


class VarlenAttention:
    """The same by torch's FlashAttention, which reads the blocks through the tables.

    Its queries are the last of their row's keys (`seqused_k` says how many there are): FlashAttention aligns causality
    and windows with the ends of both (bottom right, as its README has it since version 2.1), so that a chunk's first
    query sees what is before the chunk and itself. A window of (w, 0) is w keys before a query's own.

    With `num_splits=1` a row's numbers do not depend on its company. And it must be: what torch 2.13 chooses itself
    over paged keys may leave rows unwritten (pytorch issue 194167) or not finite (torchtitan issue 3235).

    Not run on a GPU yet: tests run the same call with a plain kernel of the same meaning in FlashAttention's place.
    """

    PLACES: Final = 256
    """Places of a block: FlashAttention 2 takes multiples of it only."""
    MAX_HEAD_WIDTH: Final = 256

    def __init__(self, batch: AttentionBatch, cache: KVCache) -> None:
        self._cache = cache
        self._slots = batch.slots
        self._tables = batch.block_tables.int()
        starts, contexts = batch.query_starts, batch.context_lens
        # All in one copy. The keys' ends say nothing that the contexts don't, but the kernel insists on them.
        lengths = torch.tensor([*starts, *accumulate(contexts, initial=0), *contexts], dtype=torch.int32)
        sizes = [len(starts), len(starts), len(contexts)]
        on_device = torch.split(to_device(lengths, batch.slots.device), sizes)
        self._query_starts, self._key_starts, self._contexts = on_device
        self._max_queries = max(stop - start for start, stop in pairwise(starts))
        self._max_keys = max(contexts)

    @classmethod
    def suits(
        cls, layers: Iterable[LayerShape], options: Iterable[AttentionOptions], dtype: torch.dtype, device: torch.device
    ) -> bool:
        """Whether the kernel is made for the device, and knows such heads, options and numbers."""
        return (
            dtype in flash_dtypes(device)
            and not any(option.explicit for option in options)
            and all(
                layer.key_dim == layer.value_dim <= cls.MAX_HEAD_WIDTH and layer.key_dim % 8 == 0 for layer in layers
            )
        )

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self._cache.write(layer, self._slots, key, value)
        keys, values = self._cache.pages(layer)
        attended = varlen_attn(
            query,
            keys,
            values,
            self._query_starts,
            self._key_starts,
            self._max_queries,
            self._max_keys,
            scale=options.scaling,
            window_size=(-1 if options.window is None else options.window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=self._contexts,
            block_table=self._tables,
            num_splits=1,
        )
        assert isinstance(attended, Tensor), "log-sum-exps come only if they are asked for"
        return attended


class NativeAttention:
    """The same in one native call a layer. It lays out blocks in its own way: an epoch has one kind of attention."""

    def __init__(self, batch: AttentionBatch, cache: KVCache, num_threads: int) -> None:
        self._rows = batch.step_rows()
        self._memory = cache.tensors
        self._num_threads = num_threads if batch.num_scores() > MAX_SCORES_ALONE else 1

    @staticmethod
    def suits(
        layers: Iterable[LayerShape], options: Iterable[AttentionOptions], block_size: int, dtype: torch.dtype
    ) -> bool:
        """Whether the native operation knows such blocks, heads, options and numbers."""
        return (
            block_size == PLACES
            and dtype in (torch.float32, torch.bfloat16)
            and all(option.alibi is None for option in options)
            and all(
                layer.key_dim == layer.value_dim <= MAX_HEAD_WIDTH and layer.key_dim % LANES == 0 for layer in layers
            )
        )

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        return ops.attention(query, key, value, self._memory[layer], self._rows, options.native(), self._num_threads)


def _explicit(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Attention with the scores in hand, softmax in float32.

    `query` [B, kv_heads, group, queries, key_dim], `keys` and `values` [B, kv_heads, num_keys, dim], `bias`
    broadcastable to [B, 1, queries, num_keys], `key_bias` [heads, num_keys]
    → [B, kv_heads, group, queries, value_dim].
    """
    batch, kv_heads, group, queries, _ = query.shape
    folded = query.flatten(2, 3)  # [B, kv_heads, group * queries, key_dim]
    scores = (folded @ keys.transpose(2, 3)).float() * options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    scores = scores.view(batch, kv_heads, group, queries, -1)
    if bias is not None:
        scores = scores + (bias.unsqueeze(-3) if bias.ndim > 2 else bias)
    if key_bias is not None:
        scores = scores + key_bias.view(kv_heads, group, 1, -1)
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, kv_heads, group, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[2]].to(values.dtype)
    attended: Tensor = weights.flatten(2, 3) @ values
    return attended.view(batch, kv_heads, group, queries, -1)


class ShapeProbe:
    """Stands in for attention once, to learn what reaches it: heads, widths and windows of every layer."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self.query_heads: dict[int, int] = {}
        self.options: dict[int, AttentionOptions] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        if layer in self.layers:
            raise LoadError(f"layer {layer} attends twice in one pass, so its keys and values need two caches")
        self.layers[layer] = LayerShape(kv_heads=key.shape[1], key_dim=key.shape[2], value_dim=value.shape[2])
        self.query_heads[layer] = query.shape[1]
        self.options[layer] = options
        return query.new_zeros(*query.shape[:2], value.shape[2])


_attend: ContextVar[Attend] = ContextVar("attend")


def is_attending() -> bool:
    """Whether model code that runs now is part of a step."""
    return _attend.get(None) is not None


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Model code run inside attends through `attend`."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def install() -> None:
    """Makes `NAME` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, interface)


def interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' calling convention: [1, heads, T, dim] in, [1, T, heads, value_dim] out."""
    if attention_mask is not None or query.shape[0] != 1:
        raise LoadError("the model code builds its own attention mask or batch, which packed rows cannot have")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise LoadError(f"{type(module).__name__} does not say which layer it is")
    attend = _attend.get()
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(layer, query, key, value, _options(module, query, kwargs))[None], None


def _options(module: nn.Module, query: Tensor, kwargs: Mapping[str, object]) -> AttentionOptions:
    """Honours what is known. Raises `LoadError` for anything else that is set: ignored, it would be silently wrong."""
    given = {name: value for name, value in kwargs.items() if value is not None and name not in _HARMLESS}
    causal = given.pop("is_causal", None)
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise LoadError(f"{type(module).__name__} is not causal")
    scaling = given.pop("scaling", query.shape[-1] ** -0.5)
    window = given.pop("sliding_window", None)
    softcap = given.pop("softcap", None)
    sinks = given.pop("s_aux", None)
    alibi = given.pop("alibi", None)
    if given:
        raise LoadError(f"{type(module).__name__} asks attention for {', '.join(sorted(given))}, unknown here")
    assert isinstance(scaling, float | int), scaling
    assert window is None or isinstance(window, int), window
    assert softcap is None or isinstance(softcap, float | int), softcap
    assert sinks is None or isinstance(sinks, Tensor), sinks
    assert alibi is None or isinstance(alibi, Alibi), alibi
    if alibi is not None and window is not None:
        raise LoadError(f"{type(module).__name__} has ALiBi within a window, which is not known here")
    return AttentionOptions(float(scaling), window, None if softcap is None else float(softcap), sinks, alibi)
