"""From scores to tokens: the largest, or a draw from what temperature and truncation leave.

Rows are chosen in groups that share a way of choosing. Which way depends on a row's own parameters alone, and within a
group every operation is row by row, so a row's token never depends on its batch mates:

    greedy   the largest score
    free     no truncation: a draw from the whole vocabulary, without looking for its likeliest tokens
    cut      truncation: a draw among the likeliest tokens; rows that would have kept more are looked at again, wider

Candidates come in a canonical order and their masses are summed from the left, so a wider look gives the same token.

Rows without typical-p need not even be grouped: one native call chooses for all of them (`plain_rules`).
The module knows no sequence: what it is asked for is (seed, position) and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shard.draw import draw, draw_from_vocabulary, uniform
from shard.kernels import ops
from shard.kernels.native import ChoiceRules, Limits
from shard.logits import argmax, likeliest, native_threads
from shard.processors import Truncation, truncate
from shard.sampling_params import SamplingParams

_MIN_WIDTH = 64
"""Fewest candidates looked at; the nucleus of most distributions is inside."""

_TIE_ROOM = 14
"""Candidates beyond the k-th, so that ordinary ties with it (bfloat16 logits have many) need no second look."""

_WIDENING = 16
"""Factor by which the candidates grow when they were not enough."""

_CPU_ROWS = 8
"""Rows whose whole vocabulary is normalised at once on a CPU: more would leave the cache, and the allocator's pool."""


@dataclass(frozen=True, slots=True)
class Greedy:
    rows: list[int]


@dataclass(frozen=True, slots=True)
class Free:
    rows: list[int]
    rules: ChoiceRules
    temperature: Tensor  # [R, 1] float32


@dataclass(frozen=True, slots=True)
class Cut:
    """Either all rows have a top-k, and `width` has room for it, or none has one."""

    rows: list[int]
    rules: ChoiceRules | None
    """None: there is a typical-p, which these do not know."""
    truncation: Truncation
    width: int
    has_top_k: bool


Group = Greedy | Free | Cut


def group_rows(
    params: Sequence[SamplingParams], rows: Sequence[int], vocab_size: int, device: torch.device
) -> list[Group]:
    """The ways in which some rows of a batch are chosen, with their parameters as tensors."""
    greedy = [row for row in rows if not params[row].do_sample]
    free = [row for row in rows if params[row].do_sample and not params[row].truncates]
    cut: dict[tuple[int, bool, bool], list[int]] = {}
    for row in rows:
        p = params[row]
        if p.do_sample and p.truncates:
            key = _width(p.top_k + _TIE_ROOM, vocab_size), p.top_k > 0, p.typical_p < 1.0
            cut.setdefault(key, []).append(row)

    def free_group(rows: list[int]) -> Free:
        alike = [params[row] for row in rows]
        return Free(rows, plain_rules(alike), column([p.temperature for p in alike], torch.float32, device))

    def cut_group(rows: list[int], width: int, has_top_k: bool, has_typical_p: bool) -> Cut:
        alike = [params[row] for row in rows]
        rules = None if has_typical_p else plain_rules(alike)
        return Cut(rows, rules, _truncation(alike, vocab_size, device), width, has_top_k)

    return [
        *([Greedy(greedy)] if greedy else []),
        *(free_group(rows) for rows in _batched(free, device)),
        *(
            cut_group(rows, width, has_top_k, has_typical_p)
            for (width, has_top_k, has_typical_p), alike in cut.items()
            for rows in ([alike] if has_top_k else _batched(alike, device))
        ),
    ]


def plain_rules(params: Sequence[SamplingParams]) -> ChoiceRules:
    """The ways in which all rows of a batch are chosen, none of them with typical-p."""
    temperatures = [p.temperature if p.do_sample else 0.0 for p in params]
    return ChoiceRules(temperatures, [Limits(p.top_k, p.top_p, p.min_p) for p in params], [p.seed for p in params])


def _batched(rows: list[int], device: torch.device) -> list[list[int]]:
    size = _CPU_ROWS if device.type == "cpu" else max(1, len(rows))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A parameter per row, [R, 1], to be broadcast over tokens."""
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)


def _truncation(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Truncation:
    return Truncation(
        temperature=column([p.temperature for p in params], torch.float64, device),
        top_k=column([p.top_k or vocab_size for p in params], torch.int64, device),
        top_p=column([p.top_p if p.top_p < 1.0 else torch.inf for p in params], torch.float64, device),
        min_p=column([p.min_p for p in params], torch.float64, device),
        typical_p=column([p.typical_p if p.typical_p < 1.0 else torch.inf for p in params], torch.float64, device),
        any_typical=any(p.typical_p < 1.0 for p in params),
    )


def _width(count: int, vocab_size: int) -> int:
    """How many candidates to look at to see `count` of them: a power of two, so that there are few groups, or the whole
    vocabulary where sorting it costs less than searching it."""
    width = max(_MIN_WIDTH, 1 << (count - 1).bit_length())
    return width if width <= vocab_size // 16 else vocab_size


def choose(
    scores: Tensor, maxima: Tensor, groups: Sequence[Group], seeds: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """One token per row: scores [E, V] and their block maxima [E, B] -> [E]. Rows that are in no group get token 0."""
    if len(groups) == 1 and len(groups[0].rows) == len(scores):
        return _choose_group(scores, maxima, groups[0], seeds, positions)
    token_ids = torch.zeros(scores.shape[0], dtype=torch.int64, device=scores.device)
    for group in groups:
        rows = torch.tensor(group.rows, dtype=torch.int64, device=scores.device)
        token_ids[rows] = _choose_group(scores[rows], maxima[rows], group, seeds, positions)
    return token_ids


def _choose_group(
    scores: Tensor, maxima: Tensor, group: Group, seeds: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """The rows of one group, packed, [R, V], [R, B] -> [R]; seeds and positions are the batch's."""
    if isinstance(group, Greedy):
        return argmax(scores, maxima)
    if group.rules is not None and (threads := native_threads(scores)) is not None:
        # As where all rows of a batch are plain: a row's company must not change its rounding.
        return ops.choose(group.rules, scores, [positions[row] for row in group.rows], [], threads.count)[0]
    u = torch.tensor(
        [uniform(seeds[row], positions[row]) for row in group.rows], dtype=torch.float64, device=scores.device
    )
    if isinstance(group, Free):
        return draw_from_vocabulary(_probabilities(scores, maxima, group.temperature), u)
    mass = None
    if not group.has_top_k:
        probabilities = _probabilities(scores, maxima, group.truncation.temperature.float())
        mass = probabilities.amax(-1, keepdim=True).double().reciprocal()
    return _draw_cut(scores, maxima, group.truncation, mass, u, group.width)


def _probabilities(scores: Tensor, maxima: Tensor, temperature: Tensor) -> Tensor:
    """Softmax at a temperature: [R, V], [R, B], [R, 1] -> [R, V].

    The largest score is taken off first: whatever the temperature, the division then overflows to minus infinity only.
    """
    return (scores - maxima.amax(-1, keepdim=True)).div_(temperature).softmax(-1)


def _draw_cut(
    scores: Tensor, maxima: Tensor, truncation: Truncation, mass: Tensor | None, u: Tensor, width: int
) -> Tensor:
    """Draws among `width` candidates, and again among more in the rows where these were not enough."""
    vocab_size = scores.shape[1]
    candidates = likeliest(scores, maxima, width)
    truncated = truncate(candidates, truncation, mass)
    token_ids = candidates.ids.gather(1, draw(truncated.weights, u).unsqueeze(1)).squeeze(1)
    if width >= vocab_size:
        return token_ids
    short = (~truncated.enough).nonzero().squeeze(1)
    if short.numel():
        token_ids[short] = _draw_cut(
            scores[short],
            maxima[short],
            truncation.of_rows(short),
            None if mass is None else mass[short],
            u[short],
            _width(width * _WIDENING, vocab_size),
        )
    return token_ids
