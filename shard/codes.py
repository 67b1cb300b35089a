"""How quantised checkpoints code weights: from a few bits each back to numbers, any part of a parameter at a time.

In most formats

    weight = (code - zero) * scale

with a zero and a scale for every group of weights; what differs is in which order codes lie in words, and which
weights make up a group. bitsandbytes' four bits and mxfp4 look values up in a table instead. A matrix is [outputs,
inputs] here, whichever way it is stored. Arithmetic is float32.

Nothing here knows of names, files or settings: `shard.dequantize` finds out what is stored how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

_EVEN_FIRST: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in one of awq's words each of its eight codes lies."""

_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of OCP's four-bit floating point."""


class Part(Protocol):
    """Reads one of a parameter's tensors: of its first dimensions the given ranges, all where None or nothing is."""

    def __call__(self, name: str, *index: range | None) -> Tensor: ...


class Coding(Protocol):
    """How a parameter is stored."""

    def decode(self, part: Part, *index: range) -> Tensor:
        """The part of the parameter that `index` spans, in float32. Raises what it likes if its tensors do not fit."""


def _words(codes: range, bits: int) -> tuple[range, slice]:
    """The 32-bit words that hold these codes of a row of them, and where the codes are among those in the words.

    32 codes of any width fill as many words as each has bits.
    """
    first, last = codes.start // 32, -(-codes.stop // 32)
    return range(first * bits, last * bits), slice(codes.start - 32 * first, codes.stop - 32 * first)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The codes in the last dimension's words, which they fill from the lowest bits on: uint8."""
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        return ((packed[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8)) & mask).flatten(-2)
    words = pad(words, (0, -words.shape[-1] % bits))
    words = words.reshape(*words.shape[:-1], -1, bits).long() & 0xFFFFFFFF
    at = torch.arange(32) * bits
    pairs = words[..., at // 32] | pad(words, (0, 1))[..., at // 32 + 1] << 32
    return ((pairs >> at % 32) & mask).flatten(-2).to(torch.uint8)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """`codes` [rows, columns] by zeros and scales [rows, groups], column i being of group `groups[i]`.

    Raises ValueError where torch would repeat what is missing, or count groups from the last one.
    """
    if codes.shape != (len(scales), len(groups)) or zeros.shape != scales.shape:
        raise ValueError(f"codes are {[*codes.shape]}, zeros {[*zeros.shape]} and scales {[*scales.shape]}")
    if (groups < 0).any():
        raise ValueError("there is a group below 0")
    return (codes.float() - zeros.float()[:, groups]) * scales.float()[:, groups]


def _arange(of: range) -> Tensor:
    return torch.arange(of.start, of.stop)


@dataclass(frozen=True, slots=True)
class Gptq:
    """qweight [inputs in words, outputs], qzeros [groups, outputs in words], scales [groups, outputs]; g_idx [inputs]
    says of which group each input is."""

    bits: int
    group_size: int
    """Where g_idx is missing or was never filled in."""
    has_groups: bool
    zero_offset: int
    """What the format's first version takes off zeros."""

    def decode(self, part: Part, *index: range) -> Tensor:
        rows, columns = index
        words, kept = _words(columns, self.bits)
        codes = _unpack(part("qweight", words, rows).T, self.bits)[:, kept]
        words, kept = _words(rows, self.bits)
        zeros = _unpack(part("qzeros", None, words), self.bits)[:, kept].T
        zeros = (zeros.int() + self.zero_offset) % (1 << self.bits)
        return _scaled(codes, zeros, part("scales", None, rows).T, self._groups(part, columns))

    def _groups(self, part: Part, columns: range) -> Tensor:
        groups = part("g_idx").long() if self.has_groups else torch.zeros(1)
        return groups[columns.start : columns.stop] if groups.any() else _arange(columns) // self.group_size


@dataclass(frozen=True, slots=True)
class Awq:
    """qweight [inputs, outputs in words], qzeros [groups, outputs in words], scales [groups, outputs]; 4 bits."""

    group_size: int

    def decode(self, part: Part, *index: range) -> Tensor:
        rows, columns = index
        words, kept = _words(rows, 4)
        codes = self._unpack(part("qweight", columns, words))[:, kept].T
        zeros = self._unpack(part("qzeros", None, words))[:, kept].T
        return _scaled(codes, zeros, part("scales", None, rows).T, _arange(columns) // self.group_size)

    def _unpack(self, words: Tensor) -> Tensor:
        return _unpack(words, 4).reshape(len(words), -1, 8)[..., _EVEN_FIRST].flatten(-2)


@dataclass(frozen=True, slots=True)
class Scaled:
    """weight [outputs, inputs] or weight_packed [outputs, inputs in words], and a scale for every block of weights."""

    block: tuple[int, int]
    """Outputs and inputs that share a scale."""
    scale: str
    bits: int = 0
    """Of a code in words; 0: codes are numbers of a type of their own."""
    zero_dtype: torch.dtype | None = None
    """int32: zeros lie in words too, down the outputs. None: there are none."""
    has_groups: bool = False
    """weight_g_idx says which columns share a scale."""
    factor: float = 1.0
    is_inverse: bool = False
    """Codes are divided by what is stored as scales."""

    def decode(self, part: Part, *index: range) -> Tensor:
        rows, columns = index
        height, width = self.block
        held = range(rows.start // height, -(-rows.stop // height))
        scales = self._scales(part, held)
        zeros = self._zeros(part, held).expand_as(scales)
        groups = part("weight_g_idx", columns).long() if self.has_groups else _arange(columns) // width
        spread = _arange(rows) // height - held.start
        return _scaled(self._codes(part, rows, columns), zeros[spread], scales[spread], groups)

    def _scales(self, part: Part, held: range) -> Tensor:
        """Bytes are OCP's scales: exponents of two."""
        stored = part(self.scale)
        if stored.dtype == torch.uint8:
            stored = stored.view(torch.float8_e8m0fnu)
        scales = _matrix(stored, held)
        return 1 / scales if self.is_inverse else scales * self.factor

    def _codes(self, part: Part, rows: range, columns: range) -> Tensor:
        if not self.bits:
            return part("weight", rows, columns)
        words, kept = _words(columns, self.bits)
        return _unpack(part("weight_packed", rows, words), self.bits)[:, kept]

    def _zeros(self, part: Part, held: range) -> Tensor:
        """In words all numbers are raised by half of what their bits can hold."""
        middle = (1 << self.bits) // 2
        if self.zero_dtype is None:
            return torch.tensor([[float(middle)]])
        if self.zero_dtype != torch.int32:
            return _matrix(part("weight_zero_point"), held) + middle
        words, kept = _words(held, self.bits)
        return _unpack(part("weight_zero_point", words).T, self.bits)[:, kept].T


def _matrix(values: Tensor, held: range) -> Tensor:
    """Rows of what may be stored as one column or a single number too, in float32."""
    return values.reshape(values.shape[0] if values.ndim else 1, -1)[held.start : held.stop].float()


@dataclass(frozen=True, slots=True)
class Flat:
    """bitsandbytes' four bits: all weights in one row of blocks, whose largest values may be coded in turn."""

    num_columns: int
    blocksize: int
    nested_blocksize: int
    """0: the blocks' largest values are there as they are."""
    nested_offset: float

    def decode(self, part: Part, *index: range) -> Tensor:
        rows, columns = index
        flat = range(rows.start * self.num_columns, rows.stop * self.num_columns)
        packed = part("weight", range(flat.start // 2, -(-flat.stop // 2))).flatten()
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[flat.start % 2 :][: len(flat)]
        blocks = range(flat.start // self.blocksize, -(-flat.stop // self.blocksize))
        largest = self._largest(part, blocks)[_arange(flat) // self.blocksize - blocks.start]
        weights = part("weight.quant_map").float()[codes.int()] * largest
        return weights.reshape(len(rows), -1)[:, columns.start : columns.stop]

    def _largest(self, part: Part, blocks: range) -> Tensor:
        largest = part("weight.absmax", blocks)
        if not self.nested_blocksize:
            return largest.float()
        scales = part("weight.nested_absmax").float()[_arange(blocks) // self.nested_blocksize]
        return part("weight.nested_quant_map").float()[largest.int()] * scales + self.nested_offset


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """_blocks [experts, outputs, blocks, 16] with two weights a byte, _scales [experts, outputs, blocks], exponents.

    The parameter is [experts, inputs, outputs].
    """

    def decode(self, part: Part, *index: range) -> Tensor:
        experts, inputs, outputs = index
        blocks = range(inputs.start // 32, -(-inputs.stop // 32))
        packed = part("_blocks", experts, outputs, blocks)
        values = torch.tensor(_E2M1)[torch.stack((packed & 15, packed >> 4), dim=-1).int()].flatten(-2)
        exponents = part("_scales", experts, outputs, blocks).int() - 127
        weights = torch.ldexp(values, exponents[..., None]).flatten(-2)
        return weights[..., inputs.start % 32 :][..., : len(inputs)].transpose(1, 2)
