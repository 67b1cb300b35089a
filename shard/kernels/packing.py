"""Weights as the native operations read them: lines of 16 outputs times 4 bytes of inputs (`cpu/tile.h`).

    FLOAT32   [outputs / 16, inputs,     16, 1]   float32
    BFLOAT16  [outputs / 16, inputs / 2, 16, 2]   bfloat16
    INT8      [outputs / 16, inputs / 4, 16, 4]   int8 plus 128, with a float32 scale for every output
    INT4      [outputs / 16, inputs / 32, 5, 64]  bytes: groups of 32 inputs, each a line of 16 steps and 16 leasts in
              float16 and four lines of pairs of n, where a weight is (least + step * n) * its output's float32 scale

Outputs are padded with zeros to multiples of 16, inputs to what `Kind.group` says. Packed weights lie in memory that is
asked for in huge pages, because a step reads all of it once and would otherwise spend its time in page tables.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

LANES: Final = 16

INT4_GROUP: Final = 32

_CACHE_LINE: Final = 64
_HUGE_PAGE: Final = 2 << 20
_CHUNK_BYTES: Final = 64 << 20


class Kind(IntEnum):
    """What numbers a matrix holds and is multiplied by; the values are the library's."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3

    @property
    def dtype(self) -> torch.dtype:
        return (torch.float32, torch.bfloat16, torch.uint8, torch.uint8)[self]

    @property
    def is_quantized(self) -> bool:
        return self in (Kind.INT8, Kind.INT4)

    @property
    def group(self) -> int:
        """Inputs come in multiples of this: what quantised weights are multiplied by shares a scale."""
        return {Kind.INT8: 64, Kind.INT4: INT4_GROUP}.get(self, LANES)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix of `num_outputs` x `num_inputs`, both padded inside."""

    kind: Kind
    num_outputs: int
    num_inputs: int
    lines: Tensor  # as above, but [num_blocks, num_steps, 64] of INT4
    scales: Tensor | None = None  # [16 * num_blocks] float32, of INT8 and INT4
    bias: Tensor | None = None  # [16 * num_blocks] float32

    @property
    def width(self) -> int:
        """Inputs with their padding."""
        return padded(self.num_inputs, self.kind.group)

    @property
    def num_blocks(self) -> int:
        return self.lines.shape[0]

    @property
    def num_steps(self) -> int:
        return self.lines.shape[1]


class Arena:
    """Memory in huge pages, handed out piece by piece; a chunk of it ends with the last tensor that lies in it.

    Matrices of common models are smaller than a huge page, so each in pages of its own would have small ones.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = padded(torch.Size(shape).numel() * dtype.itemsize, _CACHE_LINE)
        if self._used + num_bytes > len(self._chunk):
            self._chunk, self._used = _huge_pages(max(num_bytes, _CHUNK_BYTES)), 0
        piece = self._chunk[self._used : self._used + torch.Size(shape).numel() * dtype.itemsize]
        self._used += num_bytes
        return piece.view(dtype).view(*shape)


def _huge_pages(num_bytes: int) -> Tensor:
    """[num_bytes] zeros that begin with a huge page."""
    pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the mapping alive
    start = -memory.data_ptr() % _HUGE_PAGE
    return memory[start : start + num_bytes]


def padded(count: int, multiple: int = LANES) -> int:
    return -(-count // multiple) * multiple


def pack(weight: Tensor, kind: Kind, arena: Arena, bias: Tensor | None = None) -> PackedMatrix:
    """`weight` [outputs, inputs] and `bias` [outputs] of any float type; the lines come to lie in `arena`."""
    outputs, inputs = weight.shape
    whole = weight.new_zeros(padded(outputs), padded(inputs, kind.group))
    whole[:outputs, :inputs] = weight
    ordered, scales = _ordered(whole, kind)
    lines = arena.zeros(ordered.shape, kind.dtype)
    lines.copy_(ordered)
    return PackedMatrix(kind, outputs, inputs, lines, scales, _padded_bias(bias, padded(outputs)))


def _ordered(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """Padded [outputs, inputs] in the order of lines, and the scales of the outputs where the kind has such."""
    if kind is Kind.INT8:
        whole, scales = quantize(weight)
        return _in_words((whole.short() + 128).to(torch.uint8)), scales
    if kind is Kind.INT4:
        return _in_groups(weight)
    return _in_words(weight.to(kind.dtype)), None


def _in_words(weight: Tensor) -> Tensor:
    """[outputs, inputs] -> [outputs / 16, inputs / per word, 16, per word]"""
    per_word = 4 // weight.element_size()
    return weight.view(-1, LANES, weight.shape[1] // per_word, per_word).transpose(1, 2)


def _in_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[outputs, inputs] -> bytes [outputs / 16, 5 * groups, 64] and the outputs' scales."""
    numbers, steps, leasts, scales = quantize_in_groups(weight)
    blocks, groups = len(weight) // LANES, weight.shape[1] // INT4_GROUP
    # Of each 8 inputs a byte takes one of the first four as its lower half and one of the last four as its upper half.
    parts = numbers.view(blocks, LANES, groups, 4, 2, 4).permute(0, 2, 3, 4, 1, 5)  # [blocks, groups, 4, 2, 16, 4]
    pairs = (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).flatten(3)  # [blocks, groups, 4, 64]
    both = torch.stack([steps, leasts], dim=-1).view(blocks, LANES, groups, 2).permute(0, 2, 3, 1)  # [b, g, 2, 16]
    first = both.contiguous().view(torch.uint8).view(blocks, groups, 1, 64)
    return torch.cat([first, pairs], dim=2).flatten(1, 2), scales


def pack_gated(
    gate: Tensor, up: Tensor, kind: Kind, arena: Arena, biases: tuple[Tensor, Tensor] | None = None
) -> PackedMatrix:
    """Two matrices of one shape, of which blocks of 16 outputs take turns; their outputs are inputs of the next."""
    bias = None if biases is None else take_turns(biases, kind.group)
    return pack(take_turns((gate, up), kind.group), kind, arena, bias)


def take_turns(matrices: Sequence[Tensor], multiple: int) -> Tensor:
    """[outputs, ...] each -> [blocks, matrices, 16, ...] flattened, with outputs padded to that multiple before."""
    blocks = []
    for matrix in matrices:
        whole = matrix.new_zeros(padded(matrix.shape[0], multiple), *matrix.shape[1:])
        whole[: matrix.shape[0]] = matrix
        blocks.append(whole.view(-1, LANES, *matrix.shape[1:]))
    return torch.stack(blocks, dim=1).flatten(0, 2)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[outputs, inputs] -> int8 of the same shape within ±127 and a float32 scale per output."""
    exact = weight.float()
    scales = (exact.abs().amax(dim=1) / 127).clamp_(min=1e-30)
    return (exact / scales[:, None]).round_().to(torch.int8), scales


def quantize_in_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[outputs, inputs] -> whole numbers n from 0 to 15, steps and leasts of groups of inputs, scales of outputs.

    A weight is nearly (least + step * n) * scale: uint8 [outputs, inputs], float16 [outputs, groups] twice, float32
    [outputs]. An output's scale is its largest weight, so that float16 has room for what is left.
    """
    scales = weight.float().abs().amax(dim=1).clamp_(min=1e-30)
    groups = (weight.float() / scales[:, None]).view(len(weight), -1, INT4_GROUP)
    leasts = groups.amin(dim=-1).half()
    steps = ((groups.amax(dim=-1) - leasts) / 15).half()
    numbers = (groups - leasts[..., None]) / steps[..., None].float().clamp(min=1e-7)
    return numbers.round_().clamp_(0, 15).to(torch.uint8).flatten(1), steps, leasts, scales


def _padded_bias(bias: Tensor | None, num_outputs: int) -> Tensor | None:
    if bias is None:
        return None
    whole = torch.zeros(num_outputs)
    whole[: len(bias)] = bias
    return whole
