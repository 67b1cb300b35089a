"""The attention function alone, against attention written out sequence by sequence."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from shard import attention
from shard.attention import Alibi, AttentionBatch, AttentionOptions, PagedAttention, attending
from shard.errors import LoadError
from shard.kv_cache import KVCache, LayerShape

CPU = torch.device("cpu")
BLOCK_SIZE = 4


def dense(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """Causal attention of one sequence, head by head and query by query: [n, heads, dim] each."""
    group = query.shape[1] // key.shape[1]
    output = torch.zeros(*query.shape[:2], value.shape[2], dtype=torch.float64)
    for head in range(query.shape[1]):
        for position in range(len(query)):
            first = 0 if options.window is None else max(0, position - options.window + 1)
            scores = key[first : position + 1, head // group].double() @ query[position, head].double()
            scores = scores * options.scaling
            if options.alibi is not None:
                distances = torch.arange(position - first, -1, -1)
                scores = scores - options.alibi.slopes[head].double() * options.alibi.factor * distances
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            sink = torch.zeros(0) if options.sinks is None else options.sinks[head : head + 1]
            weights = torch.cat((scores, sink.double())).softmax(0)[: len(scores)]
            output[position, head] = weights @ value[first : position + 1, head // group].double()
    return output.float()


@dataclass
class Sequence:
    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor
    fed: int = 0

    def __len__(self) -> int:
        return len(self.query)


def make_sequences(lengths: list[int], heads: int, shape: LayerShape, seed: int) -> tuple[list[Sequence], KVCache]:
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // BLOCK_SIZE) for n in lengths]
    blocks = torch.randperm(sum(needed), generator=generator) + 1
    sequences = [
        Sequence(
            torch.randn(n, heads, shape.key_dim, generator=generator),
            torch.randn(n, shape.kv_heads, shape.key_dim, generator=generator),
            torch.randn(n, shape.kv_heads, shape.value_dim, generator=generator),
            table,
        )
        for n, table in zip(lengths, blocks.split(needed), strict=True)
    ]
    cache = KVCache([shape], num_blocks=sum(needed) + 1, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU)
    return sequences, cache


def make_batch(rows: list[tuple[Sequence, int]]) -> AttentionBatch:
    """The next `n` tokens of every sequence."""
    spans = [torch.arange(s.fed, s.fed + n) for s, n in rows]
    slots = [
        s.table[span // BLOCK_SIZE] * BLOCK_SIZE + span % BLOCK_SIZE for (s, _), span in zip(rows, spans, strict=True)
    ]
    starts = [0]
    for span in spans:
        starts.append(starts[-1] + len(span))
    tables = torch.zeros(len(rows), max(len(s.table) for s, _ in rows), dtype=torch.int32)
    for row, (s, _) in enumerate(rows):
        tables[row, : len(s.table)] = s.table
    return AttentionBatch.build(
        slots=torch.cat(slots),
        query_starts=starts,
        context_lens=[s.fed + n for s, n in rows],
        block_tables=tables,
        block_size=BLOCK_SIZE,
        device=CPU,
    )


def feed(rows: list[tuple[Sequence, int]], cache: KVCache, options: AttentionOptions) -> list[Tensor]:
    packed = (torch.cat([getattr(s, name)[s.fed : s.fed + n] for s, n in rows]) for name in ("query", "key", "value"))
    query, key, value = packed
    output = PagedAttention(make_batch(rows), cache)(0, query, key, value, options)
    for s, n in rows:
        s.fed += n
    return list(output.split([n for _, n in rows]))


OPTIONS = {
    "plain": AttentionOptions(scaling=0.4),
    "window": AttentionOptions(scaling=0.4, window=6),
    "window of one": AttentionOptions(scaling=0.4, window=1),
    "softcap": AttentionOptions(scaling=0.9, softcap=1.5),
    "sinks": AttentionOptions(scaling=0.4, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])),
    "alibi": AttentionOptions(
        scaling=0.4, alibi=Alibi(torch.tensor([0.5, 0.3, 0.1, 0.02, 1.0, 0.0]), torch.float32, factor=0.7)
    ),
    "all": AttentionOptions(scaling=0.9, window=5, softcap=1.5, sinks=torch.linspace(-1, 1, 6)),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [LayerShape(6, 8, 8), LayerShape(2, 8, 8), LayerShape(1, 8, 8), LayerShape(3, 8, 5)])
def test_chunks_of_interleaved_sequences_equal_dense(
    name: str, shape: LayerShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MAX_QUERIES", 8)  # so that chunks are cut
    monkeypatch.setattr(attention, "MAX_EXPLICIT_QUERIES", 3)
    options = OPTIONS[name]
    sequences, cache = make_sequences([37, 21, 9, 30, 1], 6, shape, seed=3)
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    draw = random.Random(5)

    while waiting := [i for i, s in enumerate(sequences) if s.fed < len(s)]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        rows = [
            (sequences[i], min(draw.choice((1, 1, 2, 5, 13)), len(sequences[i]) - sequences[i].fed)) for i in chosen
        ]
        for i, part in zip(chosen, feed(rows, cache, options), strict=True):
            outputs[i].append(part)

    for s, parts in zip(sequences, outputs, strict=True):
        torch.testing.assert_close(torch.cat(parts), dense(s.query, s.key, s.value, options), rtol=1e-5, atol=1e-5)


def test_rows_of_very_different_lengths_are_not_padded_to_the_longest() -> None:
    lengths = [400, 9, 17, 380, 12]
    sequences, _ = make_sequences(lengths, 2, LayerShape(2, 4, 4), seed=0)
    for s in sequences:
        s.fed = len(s) - 1

    work = make_batch([(s, 1) for s in sequences]).work(None, torch.float32, explicit=False)

    gathered = sum(len(rows.blocks) for rows in work.decode)
    needed = sum(-(-n // BLOCK_SIZE) for n in lengths)
    assert len(work.decode) > 1
    assert gathered <= attention.MAX_PADDING * needed


def test_a_window_gathers_only_the_blocks_it_reaches() -> None:
    sequences, _ = make_sequences([400], 2, LayerShape(2, 4, 4), seed=0)
    sequences[0].fed = 399

    work = make_batch([(sequences[0], 1)]).work(10, torch.float32, explicit=False)

    assert len(work.decode[0].blocks) <= 10 // BLOCK_SIZE + 2


def test_layers_with_the_same_window_share_one_layout() -> None:
    sequences, _ = make_sequences([5], 2, LayerShape(2, 4, 4), seed=0)
    batch = make_batch([(sequences[0], 5)])

    assert batch.work(None, torch.float32, explicit=False) is batch.work(None, torch.float32, explicit=False)
    assert batch.work(3, torch.float32, explicit=False) is not batch.work(None, torch.float32, explicit=False)


@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_a_sequence_of_nan_does_not_reach_the_next_owner_of_its_blocks(name: str) -> None:
    (first, second), cache = make_sequences([8, 6], 6, LayerShape(2, 8, 8), seed=1)
    first.key[:] = float("nan")
    first.value[:] = float("inf")
    feed([(first, 8)], cache, OPTIONS[name])
    second.table = first.table

    outputs = [feed([(second, 5)], cache, OPTIONS[name])[0], feed([(second, 1)], cache, OPTIONS[name])[0]]

    expected = dense(second.query, second.key, second.value, OPTIONS[name])
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-5, atol=1e-5)


class _Layer(nn.Module):
    layer_idx = 0
    is_causal = True


def call(module: nn.Module, mask: Tensor | None = None, **kwargs: object) -> AttentionOptions:
    """Calls the registered function as model code does; returns what reaches attention."""
    seen: list[AttentionOptions] = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        seen.append(options)
        return query

    states = torch.zeros(1, 2, 3, 16)
    with attending(attend):
        output, weights = attention.interface(module, states, states, states, mask, **kwargs)
    assert output.shape == (1, 3, 2, 16)
    assert weights is None
    return seen[0]


def test_options_the_model_code_asks_for_reach_attention() -> None:
    sinks = torch.zeros(2)

    options = call(_Layer(), scaling=0.3, sliding_window=5, softcap=30.0, s_aux=sinks, dropout=0.0, position_ids=sinks)

    assert options == AttentionOptions(scaling=0.3, window=5, softcap=30.0, sinks=sinks)
    assert call(_Layer(), sliding_window=None) == AttentionOptions(scaling=0.25)


def test_alibi_within_a_window_is_refused() -> None:
    with pytest.raises(LoadError, match="ALiBi within a window"):
        call(_Layer(), sliding_window=5, alibi=Alibi(torch.zeros(2), torch.float32))


def test_an_option_nobody_knows_is_refused() -> None:
    with pytest.raises(LoadError, match="alibi_slopes"):
        call(_Layer(), scaling=0.3, alibi_slopes=torch.zeros(2))


def test_a_mask_of_the_models_own_is_refused() -> None:
    with pytest.raises(LoadError, match="mask"):
        call(_Layer(), mask=torch.zeros(1, 1, 3, 3))


def test_attention_that_is_not_causal_is_refused() -> None:
    layer = _Layer()
    layer.is_causal = False

    with pytest.raises(LoadError, match="not causal"):
        call(layer)
    with pytest.raises(LoadError, match="not causal"):
        call(_Layer(), is_causal=False)


def test_a_module_without_a_layer_number_is_refused() -> None:
    with pytest.raises(LoadError, match="which layer"):
        call(nn.Identity())
