"""The compiled library, called through ctypes: its structs (as in `cpu/`), and a class for each thing that lives in it.

Calls release the interpreter's lock, so the event loop of the process goes on while a step is computed. Everything here
is used by the model thread alone.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shard.kernels.build import best_variant, built_library
from shard.kernels.packing import Kind, PackedMatrix

log = logging.getLogger(__name__)

PLACES: Final = 16
"""Places of a block: the library knows no other number."""

MAX_HEAD_WIDTH: Final = 256

LOGITS_BLOCK: Final = 64
"""Neighbours of which `block_maxima` takes one maximum."""

MAX_TOP_TIES: Final = 8
"""Most tokens as likely as the last of the likeliest that are returned with it."""


class Activation(IntEnum):
    """Of the gate in an MLP, or of all it has; the values are the library's."""

    SILU = 0
    GELU_TANH = 1
    RELU2 = 2


class PeerError(RuntimeError):
    """Another rank died, or did not come in time."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads on this rank; `width` is a multiple of 16 up to `MAX_HEAD_WIDTH`."""

    query: int
    key_value: int
    width: int


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary angles: position times frequency; cosines and sines are multiplied by `factor`."""

    frequencies: Tensor  # [num] float32
    factor: float


@dataclass(frozen=True, slots=True)
class Options:
    """How a layer attends, as `shard.attention.AttentionOptions` has it."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [heads] float32


@dataclass(frozen=True, slots=True)
class Norm:
    """What a norm multiplies by and adds."""

    weight: Tensor  # [width] float32
    bias: Tensor | None = None  # [width] float32


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Norms are None where the layer has none; those of queries and keys have no bias."""

    query_key_value: PackedMatrix
    output: PackedMatrix
    gate_up: PackedMatrix  # as by `pack_gated`, or ups alone
    down: PackedMatrix
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    of_query: Tensor | None
    of_key: Tensor | None
    rotation: int | None
    options: Options


@dataclass(frozen=True, slots=True)
class DecoderModel:
    layers: Sequence[DecoderLayer]
    rotations: Sequence[Rotation]
    last_norm: Norm
    heads: Heads
    all_heads_widths: tuple[int, int] | None
    """Of all ranks' queries and of their keys, where these are normed over all heads together."""
    kind: Kind
    activation: Activation
    has_gates: bool
    is_centered: bool
    """Norms take the mean away first."""
    is_parallel: bool
    """The MLP gets what attention gets, not what comes of it."""
    epsilon: float
    residual_factor: float
    embedding_factor: float


@dataclass(frozen=True, slots=True)
class StepRows:
    """Where a step's tokens stand. All int64 and contiguous."""

    slots: Tensor  # [T]
    starts: Tensor  # [R + 1] rows' ranges in the tokens
    contexts: Tensor  # [R] tokens of each row's sequence, this step's included
    tables: Tensor  # [R, table width] block ids


class _Matrix(Structure):
    _fields_: ClassVar = [
        ("lines", c_void_p),
        ("num_blocks", c_uint64),
        ("num_steps", c_uint64),
        ("scales", c_void_p),
        ("bias", c_void_p),
    ]


class _Heads(Structure):
    _fields_: ClassVar = [("query", c_uint64), ("key_value", c_uint64), ("width", c_uint64)]


class _Rotation(Structure):
    _fields_: ClassVar = [("frequencies", c_void_p), ("num", c_uint64), ("factor", c_float), ("unused", c_float)]


class _Norm(Structure):
    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p)]


class _Options(Structure):
    _fields_: ClassVar = [
        ("scaling", c_double),
        ("softcap", c_double),
        ("window", c_uint64),
        ("sinks", c_void_p),
    ]


class _Layer(Structure):
    _fields_: ClassVar = [
        ("query_key_value", _Matrix),
        ("output", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("before_attention", _Norm),
        ("after_attention", _Norm),
        ("before_mlp", _Norm),
        ("after_mlp", _Norm),
        ("of_query", c_void_p),
        ("of_key", c_void_p),
        ("rotation", c_int64),
        ("options", _Options),
    ]


class _Model(Structure):
    _fields_: ClassVar = [
        ("num_layers", c_uint64),
        ("layers", POINTER(_Layer)),
        ("rotations", POINTER(_Rotation)),
        ("num_rotations", c_uint64),
        ("last_norm", _Norm),
        ("width", c_uint64),
        ("heads", _Heads),
        ("all_queries_width", c_uint64),
        ("all_keys_width", c_uint64),
        ("inner_width", c_uint64),
        ("activation", c_int64),
        ("has_gates", c_int64),
        ("is_centered", c_int64),
        ("is_parallel", c_int64),
        ("epsilon", c_double),
        ("residual_factor", c_double),
        ("embedding_factor", c_double),
    ]


class _Step(Structure):
    _fields_: ClassVar = [
        ("num_tokens", c_uint64),
        ("num_rows", c_uint64),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("starts", c_void_p),
        ("contexts", c_void_p),
        ("tables", c_void_p),
        ("table_width", c_uint64),
    ]


class _ScoreRules(Structure):
    _fields_: ClassVar = [
        ("rules", c_void_p),
        ("seats", c_void_p),
        ("known", c_void_p),
        ("counts", c_void_p),
        ("masks", c_void_p),
        ("mask_bits", c_void_p),
        ("mask_stride", c_uint64),
        ("num_masks", c_uint64),
        ("biases", c_void_p),
        ("num_biases", c_uint64),
        ("forbidden", c_void_p),
        ("num_forbidden", c_uint64),
    ]


class _Draws(Structure):
    _fields_: ClassVar = [("seeds", c_void_p), ("positions", c_void_p)]


class _Choice(Structure):
    _fields_: ClassVar = [
        ("tokens", c_void_p),
        ("logprobs", c_void_p),
        ("faults", c_void_p),
        ("max_top", c_uint64),
        ("num_top", c_void_p),
        ("top_tokens", c_void_p),
        ("top_logprobs", c_void_p),
    ]


class Library:
    """The functions of one loaded library, with their types."""

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))
        self.kinds: frozenset[Kind] = frozenset(
            kind for kind in Kind if functions.shardstream_has_bytes() or not kind.is_quantized
        )
        """What matrices it multiplies."""
        self.threads = functions.shardstream_threads
        self.threads.argtypes, self.threads.restype = [c_uint64], c_void_p
        self.end_threads = functions.shardstream_end_threads
        self.end_threads.argtypes, self.end_threads.restype = [c_void_p], None
        self.decoder = functions.shardstream_decoder
        self.decoder.argtypes, self.decoder.restype = [POINTER(_Model), c_int64, c_void_p, c_void_p], c_void_p
        self.end_decoder = functions.shardstream_end_decoder
        self.end_decoder.argtypes, self.end_decoder.restype = [c_void_p], None
        self.decode = functions.shardstream_decode
        self.decode.argtypes, self.decode.restype = [c_void_p, POINTER(_Step), c_void_p, c_void_p], c_int
        self.linear = functions.shardstream_linear
        self.linear.argtypes = [
            *(c_void_p, c_int64, POINTER(_Matrix), c_void_p, c_int64),
            *(c_uint64, c_uint64, c_uint64, c_void_p),
        ]
        self.linear.restype = None
        self.attention = functions.shardstream_attention
        self.attention.argtypes = [
            *(c_void_p, c_int64, c_void_p, POINTER(_Heads), POINTER(_Step)),
            *(POINTER(_Options), c_void_p, c_void_p, c_void_p, c_void_p),
        ]
        self.attention.restype = None
        self.block_maxima = functions.shardstream_block_maxima
        self.block_maxima.argtypes = [c_void_p, c_void_p, c_uint64, c_uint64, c_void_p]
        self.block_maxima.restype = None
        self.log_sums = functions.shardstream_log_sums
        self.log_sums.argtypes = [c_void_p, c_void_p, c_uint64, c_uint64, c_void_p, c_void_p]
        self.log_sums.restype = None
        self.choose = functions.shardstream_choose
        self.choose.argtypes = [
            *(c_void_p, c_void_p, c_uint64, c_uint64),
            *(POINTER(_ScoreRules), POINTER(_Draws), POINTER(_Choice)),
        ]
        self.choose.restype = None
        self.choose_together = functions.shardstream_choose_together
        self.choose_together.argtypes = [
            *(c_void_p, c_void_p, c_uint64, c_void_p, c_uint64, c_uint64),
            *(POINTER(_ScoreRules), POINTER(_Draws), POINTER(_Choice)),
        ]
        self.choose_together.restype = c_int
        self.peers = functions.shardstream_peers
        self.peers.argtypes, self.peers.restype = [c_char_p, c_uint64, c_uint64, c_uint64, c_double], c_void_p
        self.leave_peers = functions.shardstream_leave_peers
        self.leave_peers.argtypes, self.leave_peers.restype = [c_void_p], None
        self.sum = functions.shardstream_sum
        self.sum.argtypes, self.sum.restype = [c_void_p, c_void_p, c_uint64], c_int
        self.gather = functions.shardstream_gather
        self.gather.argtypes, self.gather.restype = [c_void_p, c_void_p, c_uint64, c_void_p], c_int
        self.look_up = functions.shardstream_look_up
        self.look_up.argtypes = [c_void_p, c_void_p, POINTER(c_int64), c_uint64, c_void_p, c_uint64, c_void_p]
        self.look_up.restype = c_int
        self.join_rows = functions.shardstream_join_rows
        self.join_rows.argtypes = [c_void_p, c_void_p, POINTER(c_uint64), c_uint64, c_void_p]
        self.join_rows.restype = c_int


@cache
def library() -> Library | None:
    """The library, or None: it was not built, or this processor cannot run it."""
    variant = best_variant()
    path = None if variant is None else built_library(variant)
    if path is None:
        why = "this processor lacks AVX2" if variant is None else "not built, python -m shard.kernels.build does that"
        log.info("native operations are not used: %s", why)
        return None
    try:
        return Library(path)
    except OSError as error:  # built on a newer system than this one, or kept where nothing may be executed
        log.warning("native operations are not used: %s", error)
        return None


class Threads:
    """Threads that share out the work of one operation; they end with this object."""

    def __init__(self, native: Library, count: int) -> None:
        self.native = native
        self.count = count
        self.address: int = native.threads(count)
        weakref.finalize(self, native.end_threads, self.address)


@cache
def threads(count: int) -> Threads:
    """The process's threads: one set for each number of them that is asked for."""
    native = library()
    assert native is not None, "native threads without the library"
    return Threads(native, count)


class Peers:
    """This rank's end of the memory that the ranks on this host share. All ranks make the same calls."""

    def __init__(self, native: Library, path: str, rank: int, count: int, slot_bytes: int, timeout_s: float) -> None:
        """Maps the file at `path`, which every rank gives and none has used before. Raises `OSError`."""
        self._native = native
        self.rank = rank
        self.count = count
        self.slot_bytes = slot_bytes
        address = native.peers(path.encode(), rank, count, slot_bytes, timeout_s)
        if not address:
            raise OSError(f"rank {rank} cannot map {path}")
        self.address: int = address
        self._leave = weakref.finalize(self, native.leave_peers, address)

    def sum(self, tensor: Tensor) -> None:
        """Replaces a contiguous float32 tensor by its sum over the ranks, the same bits on all. Raises `PeerError`."""
        assert tensor.dtype == torch.float32, tensor.dtype
        assert tensor.is_contiguous(), tensor.stride()
        check(self._native.sum(self.address, tensor.data_ptr(), tensor.numel()))

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors of one shape, stacked in the order of the ranks. Raises `PeerError`."""
        own = tensor.contiguous()
        stacked = own.new_empty(self.count, *own.shape)
        check(self._native.gather(self.address, own.data_ptr(), own.nbytes, stacked.data_ptr()))
        return stacked

    def join_columns(self, tensor: Tensor, widths: Sequence[int]) -> Tensor:
        """All ranks' tensors, `widths` wide, side by side on rank 0; on others their own. Raises `PeerError`."""
        own = tensor.contiguous()
        is_first = self.rank == 0
        joined = own.new_empty(*own.shape[:-1], sum(widths)) if is_first else own
        num_bytes = (c_uint64 * self.count)(*(width * own.itemsize for width in widths))
        num_rows, to = own.shape[:-1].numel(), joined.data_ptr() if is_first else None
        check(self._native.join_rows(self.address, own.data_ptr(), num_bytes, num_rows, to))
        return joined

    def look_up(self, table: Tensor, starts: Sequence[int], rows: Tensor) -> Tensor:
        """Rows [T] of a table of which this rank holds those from `starts[rank]` to `starts[rank + 1]`: [T, width].
        Raises `PeerError`."""
        ids, row_bytes = rows.contiguous(), table.shape[1] * table.itemsize
        assert table.is_contiguous(), table.stride()
        assert row_bytes <= self.slot_bytes, row_bytes
        found = table.new_empty(len(ids), table.shape[1])
        places = (c_int64 * (self.count + 1))(*starts)
        check(
            self._native.look_up(
                *(self.address, table.data_ptr(), places, row_bytes, ids.data_ptr(), len(ids), found.data_ptr())
            )
        )
        return found

    def leave(self) -> None:
        self._leave()


def check(fault: int) -> None:
    """Raises `PeerError` for what the library returns when another rank is missing."""
    if fault:
        raise PeerError("another rank ended" if fault == 1 else "another rank did not come in time")


class Decoder:
    """All decoder layers of a model, run as one call."""

    def __init__(self, model: DecoderModel, threads: Threads, peers: Peers | None) -> None:
        self.model = model
        self._peers = peers
        self._native = threads.native
        self._threads = threads
        self._layers = (_Layer * len(model.layers))(*map(_layer, model.layers))
        self._rotations = (_Rotation * len(model.rotations))(*map(_rotation, model.rotations))
        all_queries_width, all_keys_width = model.all_heads_widths or (0, 0)
        struct = _Model(
            num_layers=len(model.layers),
            layers=self._layers,
            rotations=self._rotations,
            num_rotations=len(model.rotations),
            last_norm=_norm(model.last_norm),
            width=model.last_norm.weight.numel(),
            heads=_heads(model.heads),
            all_queries_width=all_queries_width,
            all_keys_width=all_keys_width,
            inner_width=model.layers[0].down.width,
            activation=model.activation,
            has_gates=model.has_gates,
            is_centered=model.is_centered,
            is_parallel=model.is_parallel,
            epsilon=model.epsilon,
            residual_factor=model.residual_factor,
            embedding_factor=model.embedding_factor,
        )
        self.address: int = self._native.decoder(
            byref(struct), model.kind, threads.address, None if peers is None else peers.address
        )
        weakref.finalize(self, self._native.end_decoder, self.address)

    def run(self, hidden: Tensor, positions: Tensor, rows: StepRows, memory: Tensor) -> None:
        """As `decode`."""
        decode(self._native, self.address, hidden, positions, rows, memory)


def decode(native: Library, decoder: int, hidden: Tensor, positions: Tensor, rows: StepRows, memory: Tensor) -> None:
    """Embeddings [T, width] become the last layer's normed hidden states, in place.

    `decoder` is a living one's address, `positions` [T] int64, `memory` as by `memory_of`. Raises `PeerError`.
    """
    assert hidden.is_contiguous(), hidden.stride()
    step = _step(rows, positions)
    check(native.decode(decoder, byref(step), memory.data_ptr(), hidden.data_ptr()))


def memory_of(layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[layers, 2] int64: where every layer's keys and values begin; whoever calls keeps the tensors alive."""
    return torch.tensor([[keys.data_ptr(), values.data_ptr()] for keys, values in layers])


def linear(x: Tensor, matrix: PackedMatrix, threads: Threads) -> Tensor:
    """[rows, inputs] float32 or bfloat16 times a packed matrix -> [rows, outputs] float32."""
    width = matrix.width
    if x.shape[1] != width:
        x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
    x = x.contiguous()
    out = torch.empty(len(x), matrix.num_outputs)
    struct = _matrix(matrix)
    threads.native.linear(
        *(threads.address, matrix.kind, byref(struct), x.data_ptr(), x.dtype == torch.bfloat16),
        *(len(x), width, matrix.num_outputs, out.data_ptr()),
    )
    return out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: tuple[Tensor, Tensor],
    rows: StepRows,
    options: Options,
    threads: Threads,
) -> Tensor:
    """Remembers a layer's keys and values and attends to what the rows' tables name.

    `query` [T, heads, width], `key` and `value` [T, kv_heads, width] -> [T, heads, width], all of the memory's type,
    float32 or bfloat16.
    """
    assert query.dtype == key.dtype == value.dtype == memory[0].dtype, (query.dtype, memory[0].dtype)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    heads = _Heads(query.shape[1], key.shape[1], query.shape[2])
    kind = Kind.BFLOAT16 if memory[0].dtype == torch.bfloat16 else Kind.FLOAT32
    step, addresses = _step(rows), (c_void_p * 2)(memory[0].data_ptr(), memory[1].data_ptr())
    threads.native.attention(
        *(threads.address, kind, addresses),
        *(byref(heads), byref(step), byref(_options(options))),
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()),
    )
    return out


def block_maxima(rows: Tensor, threads: Threads) -> Tensor:
    """[R, V] contiguous float32 -> [R, ceil(V / LOGITS_BLOCK)]. A NaN is its block's maximum."""
    num_rows, width = rows.shape
    maxima = torch.empty(num_rows, -(-width // LOGITS_BLOCK))
    threads.native.block_maxima(threads.address, rows.data_ptr(), num_rows, width, maxima.data_ptr())
    return maxima


def log_sums(rows: Tensor, threads: Threads) -> tuple[Tensor, Tensor]:
    """[R, V] contiguous float32 -> each row's largest number, and log(sum(exp(row - largest))): [R], [R]."""
    num_rows, width = rows.shape
    peaks, sums = torch.empty(num_rows), torch.empty(num_rows)
    threads.native.log_sums(threads.address, rows.data_ptr(), num_rows, width, peaks.data_ptr(), sums.data_ptr())
    return peaks, sums


class Rule(NamedTuple):
    """How a row's token is chosen, and what else is asked of the row; each number as it is here is off."""

    temperature: float = 0.0
    """0: the largest score is taken, and what follows up to `typical_p` does not matter."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    forbids_known: bool = False
    num_top: int = 0
    """How many of the likeliest tokens are wanted too, by logit."""


class Change(NamedTuple):
    """What is added to a token's score; minus infinity forbids it."""

    row: int
    token: int
    added: float


class Mask(NamedTuple):
    """What is added to all scores of a row, by a bit per token."""

    row: int
    bits: npt.NDArray[np.uint32]  # [at least ceil(V / 32)]
    if_set: float
    if_unset: float


class ChoiceRules:
    """How a token is chosen in each of some rows."""

    def __init__(
        self,
        rules: Sequence[Rule],
        seeds: Sequence[int],
        seats: Sequence[int] = (),
        biases: Sequence[Change] = (),
    ) -> None:
        """`seeds`, of 64 bits, are for the rows that draw; `seats`, in the tables of known tokens, for those with a
        penalty."""
        self.rules = torch.tensor(rules, dtype=torch.float64)  # [R, 10]
        self.seeds = torch.tensor([seed - (seed >> 63 << 64) for seed in seeds], dtype=torch.int64)  # [R]
        self.seats = torch.tensor(seats, dtype=torch.int64)  # [R]
        self.biases = _changes(biases)
        self.max_top = max((rule.num_top + MAX_TOP_TIES for rule in rules if rule.num_top), default=0)
        self._any_draws = any(rule.temperature for rule in rules)

    def arguments(
        self,
        positions: Sequence[int],
        forbidden: Sequence[Change] = (),
        masks: Sequence[Mask] = (),
        known: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> ChoiceArguments:
        """What `choose` is given beside the logits. `positions` [R] are those of the tokens in their sequences,
        `forbidden` is added last, `masks` first. `known` [seats, V] bool are the tokens that seats have, `counts` in
        int32 how often they have generated them: of rows with a penalty, and the chosen ones are added."""
        return ChoiceArguments(
            self.rules,
            self.seeds,
            torch.tensor(positions, dtype=torch.int64) if self._any_draws else None,
            torch.tensor([(row, *added) for row, _, *added in masks], dtype=torch.float64) if masks else None,
            _joined_bits(masks) if masks else None,
            self.seats,
            known,
            counts,
            self.biases,
            _changes(forbidden),
            self.max_top,
        )


def _joined_bits(masks: Sequence[Mask]) -> Tensor:
    """[M, words] int32: those of a vocabulary that all of the masks have."""
    num_words = min(len(mask.bits) for mask in masks)
    return torch.from_numpy(np.stack([mask.bits[:num_words] for mask in masks]).view(np.int32))


def _changes(changes: Sequence[Change]) -> Tensor | None:
    """By row, then by token: [C, 3]."""
    return torch.tensor(sorted(changes), dtype=torch.float64) if changes else None


class ChoiceArguments(NamedTuple):
    """The fields of `ChoiceRules`, and what is new in a step."""

    rules: Tensor
    seeds: Tensor
    positions: Tensor | None
    masks: Tensor | None  # [M, 3] row, if_set, if_unset
    mask_bits: Tensor | None  # [M, words] int32
    seats: Tensor
    known: Tensor | None
    counts: Tensor | None
    biases: Tensor | None  # [C, 3]
    forbidden: Tensor | None  # [C, 3]
    max_top: int


class Chosen(NamedTuple):
    """Of a row with a fault, that is a NaN or no finite maximum, the rest means nothing."""

    token_ids: Tensor  # [R] int64
    logprobs: Tensor  # [R] float32, log-softmax of the logits
    faults: Tensor  # [R] bool
    num_top: Tensor  # [R] int64, those as likely as the last included
    top_ids: Tensor  # [R, max_top] int64, most likely first
    top_logprobs: Tensor  # [R, max_top] float32


def choose(
    logits: Tensor, given: ChoiceArguments, threads: Threads, peers: Peers | None = None, first: int = 0
) -> Chosen:
    """[R, V] contiguous float32. Where the rules leave no token, the largest logit is taken, if possible of those that
    masks leave.

    With `peers`, each rank gives its own columns, those from `first` on and in the order of the ranks, and `given` is
    of these. All get the answer; no row may ask for more than its largest score. Raises `PeerError`.
    """
    num_rows, width = logits.shape
    assert given.known is None or given.known.shape[1] == width, (given.known.shape, width)
    assert given.mask_bits is None or given.mask_bits.shape[1] * 32 >= width, (given.mask_bits.shape, width)
    chosen = Chosen(
        torch.empty(num_rows, dtype=torch.int64),
        torch.empty(num_rows),
        torch.empty(num_rows, dtype=torch.bool),
        torch.empty(num_rows, dtype=torch.int64),
        torch.empty(num_rows, given.max_top, dtype=torch.int64),
        torch.empty(num_rows, given.max_top),
    )
    rules = _ScoreRules(
        *(given.rules.data_ptr(), given.seats.data_ptr(), _address(given.known), _address(given.counts)),
        *(_address(given.masks), _address(given.mask_bits)),
        *((0, 0) if given.mask_bits is None else (given.mask_bits.shape[1], given.mask_bits.shape[0])),
        *(_address(given.biases), 0 if given.biases is None else len(given.biases)),
        *(_address(given.forbidden), 0 if given.forbidden is None else len(given.forbidden)),
    )
    draws = _Draws(given.seeds.data_ptr(), _address(given.positions))
    choice = _Choice(
        *(chosen.token_ids.data_ptr(), chosen.logprobs.data_ptr(), chosen.faults.data_ptr(), given.max_top),
        *(chosen.num_top.data_ptr(), chosen.top_ids.data_ptr(), chosen.top_logprobs.data_ptr()),
    )
    structs = byref(rules), byref(draws), byref(choice)
    if peers is None:
        threads.native.choose(threads.address, logits.data_ptr(), num_rows, width, *structs)
    else:
        rows = logits.data_ptr(), num_rows, width
        check(threads.native.choose_together(threads.address, peers.address, first, *rows, *structs))
    return chosen


def _step(rows: StepRows, positions: Tensor | None = None) -> _Step:
    return _Step(
        num_tokens=len(rows.slots),
        num_rows=len(rows.contexts),
        positions=_address(positions),
        slots=rows.slots.data_ptr(),
        starts=rows.starts.data_ptr(),
        contexts=rows.contexts.data_ptr(),
        tables=rows.tables.data_ptr(),
        table_width=rows.tables.shape[1],
    )


def _heads(heads: Heads) -> _Heads:
    return _Heads(heads.query, heads.key_value, heads.width)


def _matrix(packed: PackedMatrix) -> _Matrix:
    return _Matrix(
        lines=packed.lines.data_ptr(),
        num_blocks=packed.num_blocks,
        num_steps=packed.num_steps,
        scales=_address(packed.scales),
        bias=_address(packed.bias),
    )


def _rotation(rotation: Rotation) -> _Rotation:
    return _Rotation(rotation.frequencies.data_ptr(), rotation.frequencies.numel(), rotation.factor, 0.0)


def _layer(layer: DecoderLayer) -> _Layer:
    return _Layer(
        query_key_value=_matrix(layer.query_key_value),
        output=_matrix(layer.output),
        gate_up=_matrix(layer.gate_up),
        down=_matrix(layer.down),
        before_attention=_norm(layer.before_attention),
        after_attention=_norm(layer.after_attention),
        before_mlp=_norm(layer.before_mlp),
        after_mlp=_norm(layer.after_mlp),
        of_query=_address(layer.of_query),
        of_key=_address(layer.of_key),
        rotation=-1 if layer.rotation is None else layer.rotation,
        options=_options(layer.options),
    )


def _norm(norm: Norm | None) -> _Norm:
    return _Norm() if norm is None else _Norm(_address(norm.weight), _address(norm.bias))


def _options(options: Options) -> _Options:
    return _Options(
        scaling=options.scaling,
        softcap=options.softcap or 0,
        window=options.window or 0,
        sinks=_address(options.sinks),
    )


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.stride()
    return tensor.data_ptr()
