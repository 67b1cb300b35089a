"""The native operations as torch operators: their schemas and shapes hold, and code that calls them can be traced."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from shard.kernels import native, ops
from shard.kernels.native import (
    Activation,
    Change,
    ChoiceArguments,
    ChoiceRules,
    Decoder,
    DecoderLayer,
    DecoderModel,
    Heads,
    Mask,
    Norm,
    Options,
    Rotation,
    Rule,
    StepRows,
    library,
    memory_of,
    threads,
)
from shard.kernels.packing import Arena, Kind, PackedMatrix, pack, pack_gated

pytestmark = pytest.mark.skipif(library() is None, reason="the native operations are not built for this machine")

ROWS = StepRows(
    slots=torch.arange(16, 21),
    starts=torch.tensor([0, 5]),
    contexts=torch.tensor([5]),
    tables=torch.tensor([[1]]),
)
"""One sequence of five tokens, in block 1."""

OPTIONS = Options(0.25, window=4, softcap=3.0, sinks=torch.tensor([0.5, -0.5]))

WIDTH = 32


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(outputs: int = 40, inputs: int = WIDTH) -> PackedMatrix:
    return pack(numbers(outputs, inputs), Kind.FLOAT32, Arena(), numbers(outputs))


def choice() -> ChoiceArguments:
    """Of a greedy row with a mask and likeliest tokens, and one with a penalty that draws; [2, 131]."""
    rules = [Rule(num_top=3), Rule(0.7, top_k=5, top_p=0.9, frequency_penalty=1.0)]
    known, counts = torch.zeros(3, 131, dtype=torch.bool), torch.zeros(3, 131, dtype=torch.int32)
    return ChoiceRules(rules, [0, (1 << 64) - 1], [1, 2], [Change(1, 7, 0.5)]).arguments(
        [3, 4], [Change(0, 7, -math.inf)], [Mask(0, np.full(5, 7, dtype=np.uint32), 0.0, -math.inf)], known, counts
    )


def least_choice() -> ChoiceArguments:
    return ChoiceRules([Rule()] * 2, [0, 0]).arguments([3, 4])


def memory() -> tuple[Tensor, Tensor]:
    """Of one layer: two blocks of one head of 16."""
    return torch.zeros(2, 256), torch.zeros(2, 256)


def decoder() -> Decoder:
    """One layer with two query heads and one KV head of 16."""
    ones = Norm(torch.ones(WIDTH))
    layer = DecoderLayer(
        query_key_value=packed(64),
        output=packed(WIDTH),
        gate_up=pack_gated(numbers(48, WIDTH), numbers(48, WIDTH), Kind.FLOAT32, Arena()),
        down=packed(WIDTH, 48),
        before_attention=ones,
        after_attention=None,
        before_mlp=ones,
        after_mlp=None,
        of_query=None,
        of_key=None,
        rotation=0,
        options=OPTIONS,
    )
    model = DecoderModel(
        layers=[layer],
        rotations=[Rotation(torch.linspace(1, 0.1, 8), 1.0)],
        last_norm=ones,
        heads=Heads(query=2, key_value=1, width=16),
        all_heads_widths=None,
        kind=Kind.FLOAT32,
        activation=Activation.SILU,
        has_gates=True,
        is_centered=False,
        is_parallel=False,
        epsilon=1e-5,
        residual_factor=1.0,
        embedding_factor=1.0,
    )
    return Decoder(model, threads(1), None)


def test_operators_do_what_the_library_does() -> None:
    x, matrix, rows = numbers(3, WIDTH), packed(), numbers(2, 131)
    query, key, value = numbers(5, 2, 16), numbers(5, 1, 16), numbers(5, 1, 16)
    written, expected_written = memory(), memory()

    attended = ops.attention(query, key, value, written, ROWS, OPTIONS, 1)

    assert torch.equal(ops.linear(x, matrix, 2), native.linear(x, matrix, threads(2)))
    expected = native.attention(query, key, value, expected_written, ROWS, OPTIONS, threads(1))
    assert torch.equal(attended, expected)
    assert all(map(torch.equal, written, expected_written))
    assert written[0][1].any()
    assert torch.equal(ops.block_maxima(rows, 1), native.block_maxima(rows, threads(1)))
    assert all(map(torch.equal, ops.log_sums(rows, 1), native.log_sums(rows, threads(1))))
    given = choice()
    chosen = ops.choose(rows, given, 1)
    assert all(map(torch.equal, chosen, native.choose(rows, choice(), threads(1))))
    assert given.counts is not None
    assert given.counts[2, chosen.token_ids[1]] == 1


def test_operators_keep_what_their_schemas_promise() -> None:
    """torch's own check: nothing but what is marked is written, results are new, shapes agree, traces give the same."""
    matrix, whole, blocks, rows = packed(), decoder(), memory(), numbers(2, 131)
    step = (ROWS.slots, ROWS.starts, ROWS.contexts, ROWS.tables)
    calls: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (
            torch.ops.shardstream.linear.default,
            (numbers(3, WIDTH), matrix.lines, matrix.scales, matrix.bias, int(matrix.kind), 40, WIDTH, 1),
        ),
        (
            torch.ops.shardstream.attention.default,
            (numbers(5, 2, 16), numbers(5, 1, 16), numbers(5, 1, 16), *memory(), *step, 0.25, 4, 3.0, None, 1),
        ),
        (
            torch.ops.shardstream.decode.default,
            (numbers(5, WIDTH), torch.arange(5), *step, memory_of([blocks]), whole.address),
        ),
        (torch.ops.shardstream.block_maxima.default, (rows, 1)),
        (torch.ops.shardstream.log_sums.default, (rows, 1)),
        (torch.ops.shardstream.choose.default, (rows, *choice(), 1)),
        (torch.ops.shardstream.choose.default, (rows, *least_choice(), 1)),
    ]

    for operator, args in calls:
        torch.library.opcheck(operator, args)


def test_shapes_are_known_without_computing() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = ops.linear(torch.empty(7, WIDTH, dtype=torch.bfloat16), packed(), 1)
        attended = ops.attention(
            *(torch.empty(5, heads, 16, dtype=torch.bfloat16) for heads in (2, 1, 1)), memory(), ROWS, OPTIONS, 1
        )
        maxima, (peaks, sums) = ops.block_maxima(torch.empty(2, 131), 1), ops.log_sums(torch.empty(2, 131), 1)
        chosen = ops.choose(torch.empty(2, 131), choice(), 1)

    assert (out.shape, out.dtype) == ((7, 40), torch.float32)
    assert (attended.shape, attended.dtype) == ((5, 2, 16), torch.bfloat16)
    assert (maxima.shape, peaks.shape, sums.shape) == ((2, 3), (2,), (2,))
    shapes = [(2,)] * 4 + [(2, 11)] * 2
    dtypes = [torch.int64, torch.float32, torch.bool, torch.int64, torch.int64, torch.float32]
    assert [(column.shape, column.dtype) for column in chosen] == list(zip(shapes, dtypes, strict=True))


def test_a_traced_step_gives_what_the_step_gives() -> None:
    whole, blocks, head = decoder(), memory(), packed()
    addresses = memory_of([blocks])

    def step(hidden: Tensor, positions: Tensor) -> Tensor:
        ops.decode(whole, hidden, positions, ROWS, addresses)
        return ops.linear(hidden, head, 1)

    hidden = numbers(5, WIDTH)
    expected = step(hidden.clone(), torch.arange(5))

    traced = torch.fx.experimental.proxy_tensor.make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(
        hidden.clone(), torch.arange(5)
    )

    assert [str(node.target) for node in traced.graph.nodes if "shardstream" in str(node.target)] == [
        "shardstream.decode.default",
        "shardstream.linear.default",
    ]
    assert torch.equal(traced(hidden.clone(), torch.arange(5)), expected)
