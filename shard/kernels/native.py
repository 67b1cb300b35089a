"""The compiled library, called through ctypes: its structs (as in `cpu/`), and a class for each thing that lives in it.

Calls release the interpreter's lock, so the event loop of the process goes on while a step is computed. Everything here
is used by the model thread alone.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Array, Structure, byref, c_char_p, c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import ClassVar, Final

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


class Activation(IntEnum):
    """Of the gate in an MLP; the values are the library's."""

    SILU = 0
    GELU_TANH = 1


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
class DecoderLayer:
    """Weights of norms are float32, None where the layer has none."""

    query_key_value: PackedMatrix
    output: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix
    before_attention: Tensor | None
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None
    of_query: Tensor | None
    of_key: Tensor | None
    rotation: int | None
    window: int | None
    scaling: float


@dataclass(frozen=True, slots=True)
class DecoderModel:
    layers: Sequence[DecoderLayer]
    rotations: Sequence[Rotation]
    last_norm: Tensor
    heads: Heads
    kind: Kind
    activation: Activation
    epsilon: float
    residual_factor: float
    embedding_factor: float


@dataclass(frozen=True, slots=True)
class StepRows:
    """Where a step's tokens stand. All int64 and contiguous."""

    positions: Tensor  # [T]
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


class _Layer(Structure):
    _fields_: ClassVar = [
        ("query_key_value", _Matrix),
        ("output", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("before_attention", c_void_p),
        ("after_attention", c_void_p),
        ("before_mlp", c_void_p),
        ("after_mlp", c_void_p),
        ("of_query", c_void_p),
        ("of_key", c_void_p),
        ("rotation", c_int64),
        ("window", c_int64),
        ("scaling", c_double),
    ]


class _Model(Structure):
    _fields_: ClassVar = [
        ("num_layers", c_uint64),
        ("layers", POINTER(_Layer)),
        ("rotations", POINTER(_Rotation)),
        ("num_rotations", c_uint64),
        ("last_norm", c_void_p),
        ("width", c_uint64),
        ("heads", _Heads),
        ("inner_width", c_uint64),
        ("activation", c_int64),
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


class Memory(Structure):
    _fields_: ClassVar = [("keys", c_void_p), ("values", c_void_p)]


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
        self.decode.argtypes, self.decode.restype = [c_void_p, POINTER(_Step), POINTER(Memory), c_void_p], c_int
        self.linear = functions.shardstream_linear
        self.linear.argtypes = [
            *(c_void_p, c_int64, POINTER(_Matrix), c_void_p, c_int64),
            *(c_uint64, c_uint64, c_uint64, c_void_p),
        ]
        self.linear.restype = None
        self.attention = functions.shardstream_attention
        self.attention.argtypes = [
            *(c_void_p, c_int64, POINTER(Memory), POINTER(_Heads), POINTER(_Step)),
            *(c_uint64, c_double, c_void_p, c_void_p, c_void_p, c_void_p),
        ]
        self.attention.restype = None
        self.block_maxima = functions.shardstream_block_maxima
        self.block_maxima.argtypes = [c_void_p, c_void_p, c_uint64, c_uint64, c_void_p]
        self.block_maxima.restype = None
        self.log_sums = functions.shardstream_log_sums
        self.log_sums.argtypes = [c_void_p, c_void_p, c_uint64, c_uint64, c_void_p, c_void_p]
        self.log_sums.restype = None
        self.peers = functions.shardstream_peers
        self.peers.argtypes, self.peers.restype = [c_char_p, c_uint64, c_uint64, c_uint64, c_double], c_void_p
        self.leave_peers = functions.shardstream_leave_peers
        self.leave_peers.argtypes, self.leave_peers.restype = [c_void_p], None
        self.sum = functions.shardstream_sum
        self.sum.argtypes, self.sum.restype = [c_void_p, c_void_p, c_uint64], c_int
        self.gather = functions.shardstream_gather
        self.gather.argtypes, self.gather.restype = [c_void_p, c_void_p, c_uint64, c_void_p], c_int


@cache
def library() -> Library | None:
    """The library, or None: it was not built, or this processor cannot run it."""
    variant = best_variant()
    path = None if variant is None else built_library(variant)
    if path is None:
        log.info("native operations are not used: %s", "this processor lacks AVX2" if variant is None else "not built")
        return None
    return Library(path)


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
        struct = _Model(
            num_layers=len(model.layers),
            layers=self._layers,
            rotations=self._rotations,
            num_rotations=len(model.rotations),
            last_norm=model.last_norm.data_ptr(),
            width=model.last_norm.numel(),
            heads=_heads(model.heads),
            inner_width=model.layers[0].down.width,
            activation=model.activation,
            epsilon=model.epsilon,
            residual_factor=model.residual_factor,
            embedding_factor=model.embedding_factor,
        )
        self._address: int = self._native.decoder(
            byref(struct), model.kind, threads.address, None if peers is None else peers.address
        )
        weakref.finalize(self, self._native.end_decoder, self._address)

    def run(self, hidden: Tensor, rows: StepRows, memory: Array[Memory]) -> None:
        """Embeddings [T, width] become the last layer's normed hidden states, in place. Raises `PeerError`."""
        assert hidden.is_contiguous(), hidden.stride()
        step = _step(rows)
        check(self._native.decode(self._address, byref(step), memory, hidden.data_ptr()))


def memory_of(layers: Sequence[tuple[Tensor, Tensor]]) -> Array[Memory]:
    """Every layer's keys and values, as `Decoder.run` wants them; whoever calls keeps the tensors alive."""
    return (Memory * len(layers))(*(Memory(keys.data_ptr(), values.data_ptr()) for keys, values in layers))


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
    *,
    window: int | None,
    scaling: float,
    threads: Threads,
) -> Tensor:
    """Remembers a layer's keys and values and attends to what the rows' tables name.

    `query` [T, heads, width], `key` and `value` [T, kv_heads, width], all float32 -> [T, heads, width] float32. The
    memory's number type, float32 or bfloat16, is the one that is multiplied in.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    heads = _Heads(query.shape[1], key.shape[1], query.shape[2])
    kind = Kind.BFLOAT16 if memory[0].dtype == torch.bfloat16 else Kind.FLOAT32
    step = _step(rows)
    threads.native.attention(
        *(threads.address, kind, memory_of([memory]), byref(heads), byref(step), window or 0, scaling),
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


def _step(rows: StepRows) -> _Step:
    return _Step(
        num_tokens=len(rows.positions),
        num_rows=len(rows.contexts),
        positions=rows.positions.data_ptr(),
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
        before_attention=_address(layer.before_attention),
        after_attention=_address(layer.after_attention),
        before_mlp=_address(layer.before_mlp),
        after_mlp=_address(layer.after_mlp),
        of_query=_address(layer.of_query),
        of_key=_address(layer.of_key),
        rotation=-1 if layer.rotation is None else layer.rotation,
        window=layer.window or 0,
        scaling=layer.scaling,
    )


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.stride()
    return tensor.data_ptr()
