"""The rules that stand between a model's logits and the choice of a token.

Three kinds, in the order in which they run:

1. rules that change logits: watermark, repetition, frequency and presence penalties, bias;
2. rules that forbid tokens: repeated n-grams, bad words (end tokens before a minimum length need no code here);
3. rules that cut the tail of the distribution: temperature, top-k, top-p, min-p, typical-p. They work on `Candidates`,
   the likeliest tokens only, and say when these were too few to know.

Each equals the class of transformers' `generation.logits_process` that its docstring names. All are pure functions of
one row's own numbers; the module knows neither seats nor batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shard.logits import Candidates

WATERMARK_HASHING_KEY = 15485863
"""The millionth prime: the key of the reference implementation, of TGI and of transformers."""


def green_list(last_token: int, gamma: float, vocab_size: int) -> Tensor:
    """The tokens a watermark favours after `last_token`: [int(gamma * vocab_size)] on the CPU.

    `WatermarkLogitsProcessor`; Kirchenbauer et al., "A watermark for large language models" (2023). Detect it with
    transformers' `WatermarkDetector` on device "cpu" (another device permutes differently) and `WatermarkingConfig(
    greenlist_ratio=gamma, bias=delta, hashing_key=15485863, seeding_scheme="lefthash", context_width=1)`.
    """
    generator = torch.Generator().manual_seed(WATERMARK_HASHING_KEY * last_token % (2**64 - 1))
    # gamma was a float32 on the wire: 0.7 came as 0.69999999, which would make the list one token too short.
    return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * round(gamma, 6))]


@lru_cache(maxsize=1024)
def green_bits(last_token: int, gamma: float, vocab_size: int) -> npt.NDArray[np.uint32]:
    """`green_list` as a bit per token. The permutation takes half a millisecond, and text comes back to its tokens."""
    is_green = np.zeros(-(-vocab_size // 32) * 32, dtype=np.bool_)
    is_green[green_list(last_token, gamma, vocab_size).numpy()] = True
    return np.packbits(is_green, bitorder="little").view(np.uint32)


def penalise_repetition(logits: Tensor, penalty: Tensor) -> Tensor:
    """`RepetitionPenaltyLogitsProcessor` (CTRL), on the logits of known tokens only: [R, V], [R, 1] -> [R, V]."""
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def penalise_counts(logits: Tensor, counts: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    """OpenAI's: count * frequency + [count > 0] * presence off each logit: [R, V], [R, V] int, 2 x [R, 1] -> [R, V].

    Counts are of generated tokens.
    """
    return logits - counts * frequency - (counts > 0) * presence


class RepeatedNGrams:
    """`NoRepeatNGramLogitsProcessor` for one sequence, kept up to date token by token."""

    __slots__ = ("_followers", "_recent")

    def __init__(self, size: int) -> None:
        self._recent: deque[int] = deque(maxlen=size - 1)
        self._followers: dict[tuple[int, ...], set[int]] = {}

    def append(self, token: int) -> None:
        if len(self._recent) == self._recent.maxlen:
            self._followers.setdefault(tuple(self._recent), set()).add(token)
        self._recent.append(token)

    def forbidden(self) -> Collection[int]:
        """Tokens that would end an n-gram a second time, each once."""
        return self._followers.get(tuple(self._recent), ())


def completed_bad_words(tokens: Sequence[int], bad_words: Sequence[Sequence[int]]) -> list[int]:
    """`NoBadWordsLogitsProcessor`: the last tokens of those runs whose other tokens the sequence ends with."""
    return [run[-1] for run in bad_words if _ends_with(tokens, run[:-1])]


def _ends_with(tokens: Sequence[int], run: Sequence[int]) -> bool:
    return len(run) <= len(tokens) and all(a == b for a, b in zip(reversed(run), reversed(tokens), strict=False))


@dataclass(frozen=True, slots=True)
class Truncation:
    """Where each row's distribution is cut: columns [R, 1] in float64, top_k in int64.

    A rule that is off has the limit that cuts nothing: `top_k` the size of the vocabulary, `min_p` 0, `top_p` and
    `typical_p` infinity, because 1.0 is a sum that rounding may reach too early.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    any_typical: bool

    def of_rows(self, rows: Tensor) -> Truncation:
        return Truncation(
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.typical_p[rows],
            self.any_typical,
        )


@dataclass(frozen=True, slots=True)
class Truncated:
    """What the cut leaves of the candidates."""

    weights: Tensor  # [R, W] float64, proportional to the probabilities; 0 for dropped tokens
    enough: Tensor  # [R] bool: no token outside the candidates would have been kept


def truncate(candidates: Candidates, truncation: Truncation, mass: Tensor | None) -> Truncated:
    """`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`, `MinPLogitsWarper`, `TypicalLogitsWarper`.

    `mass` [R, 1] is the sum over the whole vocabulary of exp((logit - largest logit) / temperature), the total that
    top-p is a fraction of where no top-k leaves less; None if the candidates hold all that top-k leaves in every row.
    """
    values = candidates.values.double()
    scaled = (values - values[:, :1]) / truncation.temperature
    weights = scaled.exp()
    kept = _within_top_k(scaled, truncation.top_k)
    total = _row_sum(weights * kept)
    lacks_ties = kept[:, -1:] & truncation.top_p.isfinite()  # of the k-th, which the total that top-p cuts must have
    if mass is not None:
        has_top_k = truncation.top_k < scaled.shape[1]
        total = torch.where(has_top_k, total, mass)
        lacks_ties &= has_top_k
    kept &= weights.cumsum(-1) - weights < truncation.top_p * total
    kept &= weights >= truncation.min_p
    # Up to here whatever follows a dropped token is dropped too, beyond the candidates as well.
    enough = ~(kept[:, -1:] | lacks_ties).squeeze(1)
    weights = weights * kept
    if truncation.any_typical:
        weights = weights * _typical(weights, truncation.typical_p)
    return Truncated(weights, enough)


def _within_top_k(scaled: Tensor, top_k: Tensor) -> Tensor:
    """Ties with the k-th are kept. [R, W], [R, 1] -> [R, W] bool."""
    kth = scaled.gather(1, top_k.clamp(max=scaled.shape[1]) - 1)
    return scaled >= kth


def _typical(weights: Tensor, mass: Tensor) -> Tensor:
    """Tokens whose surprise is nearest the entropy, until their mass is reached: [R, W], [R, 1] -> [R, W] bool.

    Meister et al., "Locally typical sampling" (2023).
    """
    probabilities = weights / _row_sum(weights)
    entropy = _row_sum(torch.special.entr(probabilities))
    distance = (-probabilities.log() - entropy).abs()  # infinite for dropped tokens
    nearest, order = distance.sort(dim=-1, stable=True)
    num_below = (probabilities.gather(1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    return distance <= nearest.gather(1, num_below.clamp(max=weights.shape[1] - 1))


def _row_sum(values: Tensor) -> Tensor:
    """Sum of each row, term by term, so that a longer tail of zeros gives the same bits: [R, W] -> [R, 1]."""
    return values.cumsum(-1)[:, -1:]
