"""From logits to tokens, by all rules of a batch's rows. There are two ways:

    native   one call, on CPUs that have it
    torch    anywhere else: what follows

    logits ──► masks ► repetition ► frequency, presence ► bias ► forbidden tokens ──► scores
                   ├─ greedy   the largest score
                   ├─ free     no truncation: a draw from the whole vocabulary, without looking for its likeliest tokens
                   └─ cut      truncation: a draw among the likeliest tokens; rows that would have kept more are
                               looked at again, wider

Rows are chosen in groups that share one of the three. Which it is depends on a row's own parameters alone, and within a
group every operation is row by row, so a row's token never depends on its batch mates. Candidates come in a canonical
order and their masses are summed from the left, so a wider look gives the same token.

Penalties, bias, greedy choice and free draws follow a device without waiting for it. These wait: top tokens (how many
tie) and truncation (whether the candidates were enough).

The module knows no sequence: what it is asked for is (seed, position), numbers, and rows of a table of known tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shard.draw import draw, draw_from_vocabulary, uniform
from shard.kernels import native
from shard.kernels.native import Change, ChoiceRules, Chosen, Mask, Rule
from shard.known_tokens import KnownTokens
from shard.logits import argmax, block_maxima, likeliest, likeliest_with_ties, log_probabilities
from shard.processors import Truncation, penalise_counts, penalise_repetition, truncate
from shard.sampling_params import SamplingParams
from shard.transfer import to_device

_MIN_WIDTH = 64
"""Fewest candidates looked at; the nucleus of most distributions is inside."""

_TIE_ROOM = 14
"""Candidates beyond the k-th, so that ordinary ties with it (bfloat16 logits have many) need no second look."""

_WIDENING = 16
"""Factor by which the candidates grow when they were not enough."""


@dataclass(frozen=True, slots=True)
class Greedy:
    rows: list[int]


@dataclass(frozen=True, slots=True)
class Free:
    rows: list[int]
    temperature: Tensor  # [R, 1] float32


@dataclass(frozen=True, slots=True)
class Cut:
    """Either all rows have a top-k, and `width` has room for it, or none has one."""

    rows: list[int]
    truncation: Truncation
    width: int
    has_top_k: bool


Group = Greedy | Free | Cut


@dataclass(frozen=True, slots=True)
class _Penalised:
    """Rows whose known tokens have a penalty or are forbidden; columns [R, 1], neutral where a row lacks a rule."""

    rows: Tensor  # [R], like the next
    seats: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    forbids: Tensor  # bool
    any_counts: bool


def native_rules(params: Sequence[SamplingParams], seats: Sequence[int], vocab_size: int) -> ChoiceRules:
    """How all rows of a batch are chosen, natively."""
    return ChoiceRules([_rule(p) for p in params], [p.seed for p in params], seats, _biases(params, vocab_size))


def _rule(params: SamplingParams) -> Rule:
    rule = Rule(
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        forbids_known=params.forbids_known,
        num_top=params.top_n_tokens,
    )
    if not params.do_sample:
        return rule
    return rule._replace(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
    )


def _biases(params: Sequence[SamplingParams], vocab_size: int) -> list[Change]:
    return [
        Change(row, token, value)
        for row, p in enumerate(params)
        for token, value in zip(p.bias_token_ids, p.bias_values, strict=True)
        if token < vocab_size
    ]


class TorchRules:
    """How all rows of a batch are chosen, by torch."""

    def __init__(
        self, params: Sequence[SamplingParams], seats: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self._device = device
        self._seeds = [p.seed for p in params]
        self._num_top = [p.top_n_tokens for p in params]
        self._groups = group_rows(params, vocab_size, device)
        self._penalised = _penalised(params, seats, device)
        biases = _biases(params, vocab_size)
        self._biases = _entries(biases, device) if biases else None

    def choose(
        self,
        logits: Tensor,
        positions: Sequence[int],
        forbidden: Sequence[Change],
        masks: Sequence[Mask],
        known: KnownTokens,
    ) -> Chosen:
        """As `native.choose`."""
        maxima = block_maxima(logits)
        token_ids = self._choose(logits, maxima, positions, forbidden, masks, known)
        if (penalised := self._penalised) is not None:
            known.note(penalised.seats, token_ids[penalised.rows], counting=penalised.any_counts)
        num_top, top_ids = likeliest_with_ties(logits, maxima, self._num_top)
        logprobs = log_probabilities(logits, torch.cat([token_ids.unsqueeze(1), top_ids], dim=1))
        faults = ~maxima.amax(-1).isfinite()
        return Chosen(token_ids, logprobs[:, 0], faults, torch.tensor(num_top), top_ids, logprobs[:, 1:])

    def _choose(
        self,
        logits: Tensor,
        maxima: Tensor,
        positions: Sequence[int],
        forbidden: Sequence[Change],
        masks: Sequence[Mask],
        known: KnownTokens,
    ) -> Tensor:
        masked = _masked(logits, masks)
        scores = self._changed(masked, forbidden, known)
        score_maxima = maxima if scores is logits else block_maxima(scores)
        chosen = choose_scores(scores, score_maxima, self._groups, self._seeds, positions)
        if scores is logits:
            return chosen
        # Where the rules leave no token, the model's own choice stands: among those that masks leave, if there are any.
        own = argmax(logits, maxima)
        if masked is not logits:
            masked_maxima = score_maxima if scores is masked else block_maxima(masked)
            own = torch.where(masked_maxima.amax(-1).isfinite(), argmax(masked, masked_maxima), own)
        return torch.where(score_maxima.amax(-1).isfinite(), chosen, own)

    def _changed(self, logits: Tensor, forbidden: Sequence[Change], known: KnownTokens) -> Tensor:
        """The logits after every rule that is not a truncation; `logits` itself if there was none to apply."""
        if not forbidden and self._penalised is None and self._biases is None:
            return logits
        scores = logits.clone()
        if self._penalised is not None:
            _penalise(scores, self._penalised, known)
        if self._biases is not None:
            _add(scores, *self._biases)
        if forbidden:
            _add(scores, *_entries(forbidden, self._device))
        return scores


def choose(
    rules: ChoiceRules | TorchRules,
    logits: Tensor,
    positions: Sequence[int],
    forbidden: Sequence[Change],
    masks: Sequence[Mask],
    known: KnownTokens,
) -> Chosen:
    """One token per row of logits [E, V], noted among those that are known where a row has a penalty. `positions` are
    those of the tokens in their sequences; masks come first and what is forbidden last.
    """
    if isinstance(rules, TorchRules):
        return rules.choose(logits, positions, forbidden, masks, known)
    given = rules.arguments(positions, forbidden, masks, known.known, known.counts)
    chosen = native.choose(logits, given, native.threads(torch.get_num_threads()))
    if not rules.max_top:
        return chosen
    top = slice(int(chosen.num_top.max()))  # there was room for more ties
    return chosen._replace(top_ids=chosen.top_ids[:, top], top_logprobs=chosen.top_logprobs[:, top])


def _entries(changes: Sequence[Change], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, tokens, and what is added."""
    rows, tokens, added = zip(*changes, strict=True)
    ids = to_device(torch.tensor([rows, tokens], dtype=torch.int64), device)
    return ids[0], ids[1], to_device(torch.tensor(added, dtype=torch.float32), device)


def _add(scores: Tensor, rows: Tensor, tokens: Tensor, added: Tensor) -> None:
    scores.index_put_((rows, tokens), added, accumulate=True)


def _masked(logits: Tensor, masks: Sequence[Mask]) -> Tensor:
    """`logits` itself if there is no mask."""
    if not masks:
        return logits
    unpacked = [np.unpackbits(mask.bits.view(np.uint8), count=logits.shape[1], bitorder="little") for mask in masks]
    is_set = to_device(torch.from_numpy(np.stack(unpacked)), logits.device).bool()
    if_set = column([mask.if_set for mask in masks], torch.float32, logits.device)
    if_unset = column([mask.if_unset for mask in masks], torch.float32, logits.device)
    rows = to_device(torch.tensor([mask.row for mask in masks]), logits.device)
    return logits.index_add(0, rows, torch.where(is_set, if_set, if_unset))


def _penalised(params: Sequence[SamplingParams], seats: Sequence[int], device: torch.device) -> _Penalised | None:
    rows = [row for row, p in enumerate(params) if p.penalises]
    if not rows:
        return None
    alike = [params[row] for row in rows]
    return _Penalised(
        rows=to_device(torch.tensor(rows), device),
        seats=to_device(torch.tensor([seats[row] for row in rows]), device),
        repetition=column([p.repetition_penalty for p in alike], torch.float32, device),
        frequency=column([p.frequency_penalty for p in alike], torch.float32, device),
        presence=column([p.presence_penalty for p in alike], torch.float32, device),
        forbids=column([p.forbids_known for p in alike], torch.bool, device),
        any_counts=any(p.penalises_counts for p in alike),
    )


def _penalise(scores: Tensor, rule: _Penalised, known: KnownTokens) -> None:
    assert known.known is not None, "a penalty without known tokens"
    before = scores[rule.rows]
    after = penalise_repetition(before, rule.repetition)
    if rule.any_counts:
        assert known.counts is not None, "a penalty without counts"
        after = penalise_counts(after, known.counts[rule.seats], rule.frequency, rule.presence)
    after = after.masked_fill(rule.forbids, -torch.inf)
    scores[rule.rows] = torch.where(known.known[rule.seats], after, before)


def group_rows(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> list[Group]:
    """The ways in which the rows of a batch are chosen, with their parameters as tensors."""
    greedy = [row for row, p in enumerate(params) if not p.do_sample]
    free = [row for row, p in enumerate(params) if p.do_sample and not p.truncates]
    cut: dict[tuple[int, bool, bool], list[int]] = {}
    for row, p in enumerate(params):
        if p.do_sample and p.truncates:
            key = _width(p.top_k + _TIE_ROOM, vocab_size), p.top_k > 0, p.typical_p < 1.0
            cut.setdefault(key, []).append(row)
    return [
        *([Greedy(greedy)] if greedy else []),
        *([Free(free, column([params[row].temperature for row in free], torch.float32, device))] if free else []),
        *(
            Cut(rows, _truncation([params[row] for row in rows], vocab_size, device), width, has_top_k)
            for (width, has_top_k, _), rows in cut.items()
        ),
    ]


def column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A parameter per row, [R, 1], to be broadcast over tokens."""
    return to_device(torch.tensor(values, dtype=dtype), device).unsqueeze(1)


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


def choose_scores(
    scores: Tensor, maxima: Tensor, groups: Sequence[Group], seeds: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """One token per row: scores [E, V] and their block maxima [E, B] -> [E]."""
    if len(groups) == 1 and len(groups[0].rows) == len(scores):
        return _choose_group(scores, maxima, groups[0], seeds, positions)
    token_ids = torch.zeros(scores.shape[0], dtype=torch.int64, device=scores.device)
    for group in groups:
        rows = to_device(torch.tensor(group.rows, dtype=torch.int64), scores.device)
        token_ids[rows] = _choose_group(scores[rows], maxima[rows], group, seeds, positions)
    return token_ids


def _choose_group(
    scores: Tensor, maxima: Tensor, group: Group, seeds: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """The rows of one group, packed, [R, V], [R, B] -> [R]; seeds and positions are the batch's."""
    if isinstance(group, Greedy):
        return argmax(scores, maxima)
    numbers = [uniform(seeds[row], positions[row]) for row in group.rows]
    u = to_device(torch.tensor(numbers, dtype=torch.float64), scores.device)
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
