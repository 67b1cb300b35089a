"""The native operations as torch's own, `torch.ops.shardstream`: with schemas, so that torch knows what they read and
write, and with shapes, so that code that calls them can be traced without being run.

    linear         rows times a packed matrix
    attention      one layer's, over paged memory, which it writes
    decode         all layers of a model; the model and its memory are addresses, which torch does not look behind
    block_maxima   what sampling asks of logits
    log_sums
    choose         sampling itself, by all its rules; it writes what seats know of their tokens

Torch's dispatcher takes 2 µs of a call, and ten times as long when a step's weights have just passed through the
caches: a served model's layers and head and its sampler call `shard.kernels.native` themselves. Each has a function
here that calls it with types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from shard.kernels import native
from shard.kernels.native import LOGITS_BLOCK, ChoiceArguments, Chosen, Decoder, Library, Options, StepRows
from shard.kernels.packing import Kind, PackedMatrix

_NAMESPACE: Final = torch.library.Library("shardstream", "DEF")  # type: ignore[no-untyped-call]
"""The operators live as long as it does."""


def linear(x: Tensor, matrix: PackedMatrix, num_threads: int) -> Tensor:
    """[rows, inputs] float32 or bfloat16 times a packed matrix -> [rows, outputs] float32."""
    out: Tensor = torch.ops.shardstream.linear.default(
        *(x, matrix.lines, matrix.scales, matrix.bias),
        *(int(matrix.kind), matrix.num_outputs, matrix.num_inputs, num_threads),
    )
    return out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: tuple[Tensor, Tensor],
    rows: StepRows,
    options: Options,
    num_threads: int,
) -> Tensor:
    """As `native.attention`."""
    out: Tensor = torch.ops.shardstream.attention.default(
        *(query, key, value, *memory, rows.slots, rows.starts, rows.contexts, rows.tables),
        *(options.scaling, options.window, options.softcap, options.sinks, num_threads),
    )
    return out


def decode(decoder: Decoder, hidden: Tensor, positions: Tensor, rows: StepRows, memory: Tensor) -> None:
    """As `native.decode`; `decoder` must outlive a graph that was traced with it."""
    torch.ops.shardstream.decode.default(
        hidden, positions, rows.slots, rows.starts, rows.contexts, rows.tables, memory, decoder.address
    )


def block_maxima(rows: Tensor, num_threads: int) -> Tensor:
    """As `native.block_maxima`."""
    maxima: Tensor = torch.ops.shardstream.block_maxima.default(rows, num_threads)
    return maxima


def log_sums(rows: Tensor, num_threads: int) -> tuple[Tensor, Tensor]:
    """As `native.log_sums`."""
    both: tuple[Tensor, Tensor] = torch.ops.shardstream.log_sums.default(rows, num_threads)
    return both


def choose(logits: Tensor, given: ChoiceArguments, num_threads: int) -> Chosen:
    """As `native.choose`."""
    return Chosen(*torch.ops.shardstream.choose.default(logits, *given, num_threads))


def _library() -> Library:
    library = native.library()
    assert library is not None, "a native operation without the library"
    return library


def _linear(
    x: Tensor,
    lines: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    kind: int,
    num_outputs: int,
    num_inputs: int,
    num_threads: int,
) -> Tensor:
    matrix = PackedMatrix(Kind(kind), num_outputs, num_inputs, lines, scales, bias)
    return native.linear(x, matrix, native.threads(num_threads))


def _linear_shape(
    x: Tensor, lines: Tensor, scales: Tensor | None, bias: Tensor | None, kind: int, num_outputs: int, *_: object
) -> Tensor:
    return x.new_empty(x.shape[0], num_outputs, dtype=torch.float32)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    contexts: Tensor,
    tables: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    num_threads: int,
) -> Tensor:
    rows, options = StepRows(slots, starts, contexts, tables), Options(scaling, window, softcap, sinks)
    return native.attention(query, key, value, (keys, values), rows, options, native.threads(num_threads))


def _attention_shape(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


def _decode(
    hidden: Tensor,
    positions: Tensor,
    slots: Tensor,
    starts: Tensor,
    contexts: Tensor,
    tables: Tensor,
    memory: Tensor,
    decoder: int,
) -> None:
    native.decode(_library(), decoder, hidden, positions, StepRows(slots, starts, contexts, tables), memory)


def _decode_shape(*_: object) -> None:
    return None


def _block_maxima(rows: Tensor, num_threads: int) -> Tensor:
    return native.block_maxima(rows, native.threads(num_threads))


def _block_maxima_shape(rows: Tensor, *_: object) -> Tensor:
    return rows.new_empty(rows.shape[0], (rows.shape[1] + LOGITS_BLOCK - 1) // LOGITS_BLOCK)


def _log_sums(rows: Tensor, num_threads: int) -> tuple[Tensor, Tensor]:
    return native.log_sums(rows, native.threads(num_threads))


def _log_sums_shape(rows: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0]), rows.new_empty(rows.shape[0])


def _choose(logits: Tensor, *given_and_threads: Any) -> Chosen:
    *given, num_threads = given_and_threads
    return native.choose(logits, ChoiceArguments(*given), native.threads(num_threads))


def _choose_shape(logits: Tensor, *given_and_threads: Any) -> Chosen:
    max_top = ChoiceArguments(*given_and_threads[:-1]).max_top
    num_rows = logits.shape[0]
    return Chosen(
        logits.new_empty(num_rows, dtype=torch.int64),
        logits.new_empty(num_rows),
        logits.new_empty(num_rows, dtype=torch.bool),
        logits.new_empty(num_rows, dtype=torch.int64),
        logits.new_empty(num_rows, max_top, dtype=torch.int64),
        logits.new_empty(num_rows, max_top),
    )


def _register(schema: str, compute: Callable[..., object], shape: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    _NAMESPACE.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _NAMESPACE.impl(name, compute, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"shardstream::{name}", shape, lib=_NAMESPACE)


_register(
    "linear(Tensor x, Tensor lines, Tensor? scales, Tensor? bias, int kind, int num_outputs, int num_inputs, "
    "int num_threads) -> Tensor",
    _linear,
    _linear_shape,
)
_register(
    "attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor slots, Tensor starts, Tensor contexts, Tensor tables, "
    "float scaling, int? window, float? softcap, Tensor? sinks, int num_threads) -> Tensor",
    _attention,
    _attention_shape,
)
_register(
    "decode(Tensor(a!) hidden, Tensor positions, Tensor slots, Tensor starts, Tensor contexts, Tensor tables, "
    "Tensor memory, int decoder) -> ()",
    _decode,
    _decode_shape,
)
_register("block_maxima(Tensor rows, int num_threads) -> Tensor", _block_maxima, _block_maxima_shape)
_register("log_sums(Tensor rows, int num_threads) -> (Tensor, Tensor)", _log_sums, _log_sums_shape)
_register(
    "choose(Tensor logits, Tensor rules, Tensor seeds, Tensor? positions, Tensor? masks, Tensor? mask_bits, "
    "Tensor seats, Tensor(a!)? known, Tensor(b!)? counts, Tensor? biases, Tensor? forbidden, int max_top, "
    "int num_threads) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _choose,
    _choose_shape,
)
