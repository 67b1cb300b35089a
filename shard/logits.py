"""Questions to rows of logits, answered without sorting them.

A row is a model's whole vocabulary, so each pass over it counts. One pass takes the maximum of every block of 64
neighbours; the largest logit, and the n largest, are then found among the few blocks that can hold them:

    logits    [ ........ | ........ | ...X.... | ........ | .Y...... ]     V
    maxima    [    a     |    b     |    X     |    c     |    Y     ]     V / 64, the last block may be short

Order is canonical: by logit, equal ones by token id. So is every answer: a row's does not depend on how many are asked
for, nor on the other rows of the batch.

On a CPU the passes are native where they can be: torch's are slower, and wait for threads that others may hold up.

The module knows neither seats nor sampling parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shard.kernels import native, ops
from shard.kernels.native import MAX_TOP_TIES
from shard.transfer import to_device

BLOCK = native.LOGITS_BLOCK
"""Tokens per block: at V = 49,152, the middle of a flat optimum between scanning maxima and scanning winning blocks."""

_SOFTMAX_ROWS = 32
"""Rows normalised at once, so that the scratch of a large batch or a long prompt stays small."""

_SIGN_FREE = 0x7FFFFFFF
_LAST_ID = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens of each row, most likely first, equal ones by id."""

    values: Tensor  # [R, W] float32
    ids: Tensor  # [R, W] int64


def block_maxima(logits: Tensor) -> Tensor:
    """Largest logit of each block: [R, V] -> [R, ceil(V / BLOCK)]. A NaN is its block's maximum."""
    if (threads := native_threads(logits)) is not None:
        return ops.block_maxima(logits, threads.count)
    num_whole = logits.shape[1] // BLOCK * BLOCK
    maxima = logits[:, :num_whole].view(logits.shape[0], num_whole // BLOCK, BLOCK).amax(-1)
    if num_whole == logits.shape[1]:
        return maxima
    return torch.cat([maxima, logits[:, num_whole:].amax(-1, keepdim=True)], dim=1)


def argmax(logits: Tensor, maxima: Tensor) -> Tensor:
    """Id of each row's largest logit, the lowest of equal ones: [R, V], [R, B] -> [R]."""
    start = maxima.argmax(-1, keepdim=True) * BLOCK
    ids = (start + torch.arange(BLOCK, device=logits.device)).clamp_(max=logits.shape[1] - 1)  # [R, BLOCK]
    return ids.gather(1, logits.gather(1, ids).argmax(-1, keepdim=True)).squeeze(1)


def likeliest(logits: Tensor, maxima: Tensor, width: int) -> Candidates:
    """The `width` likeliest tokens of each row: [R, V], [R, B] -> [R, min(width, V)].

    None of them can be outside the `width` blocks of largest maximum: those blocks alone hold `width` tokens that come
    before it.
    """
    if width >= logits.shape[1]:
        return Candidates(*logits.sort(dim=-1, descending=True, stable=True))
    blocks = _first(maxima, torch.arange(maxima.shape[1], device=logits.device), min(width, maxima.shape[1]))
    ids = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    values = logits.gather(1, ids.clamp(max=logits.shape[1] - 1))
    if logits.shape[1] % BLOCK:
        ids = ids.masked_fill(ids >= logits.shape[1], _LAST_ID)
        values = values.masked_fill(ids == _LAST_ID, -torch.inf)
    top = _first(values, ids, width)
    return Candidates(values.gather(1, top), ids.gather(1, top))


def likeliest_with_ties(logits: Tensor, maxima: Tensor, asked: Sequence[int]) -> tuple[list[int], Tensor]:
    """The likeliest tokens of the rows that ask for some, with those as likely as the last: counts, ids [R, N].

    N is the largest count; the rest of a row is padding.
    """
    num_top = [0] * len(asked)
    asking = [row for row, count in enumerate(asked) if count > 0]
    if not asking:
        return num_top, torch.empty(len(asked), 0, dtype=torch.int64, device=logits.device)
    rows = to_device(torch.tensor(asking, dtype=torch.int64), logits.device)
    candidates = likeliest(logits[rows], maxima[rows], max(asked) + MAX_TOP_TIES)
    for row, values in zip(asking, candidates.values.tolist(), strict=True):
        num_top[row] = _count_with_ties(values[: asked[row] + MAX_TOP_TIES], asked[row])
    top_ids = torch.zeros(len(asked), max(num_top), dtype=torch.int64, device=logits.device)
    top_ids[rows] = candidates.ids[:, : max(num_top)]
    return num_top, top_ids


def _count_with_ties(values: list[float], count: int) -> int:
    """How many of some descending values are among the first `count` or equal the last of them."""
    last = values[min(count, len(values)) - 1]
    return sum(value >= last for value in values)


def _first(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """Indices of the `count` first in canonical order. Unequal keys make the answer independent of topk's algorithm."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0, which equals 0.0, into 0.0
    ordered = bits ^ ((bits >> 31) & _SIGN_FREE)  # integers in the order of the floats
    keys = (ordered.to(torch.int64) << 32) | (_LAST_ID - ids)
    return keys.topk(count, dim=-1).indices


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-softmax of each row at some of its tokens: [R, V], [R, N] -> [R, N]."""
    if (threads := native_threads(logits)) is not None:
        peaks, log_sums = ops.log_sums(logits, threads.count)
        return (logits.gather(1, ids) - peaks[:, None]).sub_(log_sums[:, None])
    chunks = zip(torch.split(logits, _SOFTMAX_ROWS), torch.split(ids, _SOFTMAX_ROWS), strict=True)
    return torch.cat([rows.log_softmax(-1).gather(1, wanted) for rows, wanted in chunks])


def native_threads(logits: Tensor) -> native.Threads | None:
    """Who works on these logits where native operations can, else None."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or not logits.is_contiguous():
        return None
    return None if native.library() is None else native.threads(torch.get_num_threads())
