"""Beam search as arithmetic: which beams go on, which have ended, and when no beam can win any more.

    running ──► each beam's likeliest next tokens ──► the best continuations of all beams together
       ▲                                                   │                    │
       └──────────── the best that have not ended ◄────────┘                    └──► the best that have, by score

The rules are those of transformers' beam search (`generation/utils.py`, `_beam_search`), for one prompt and without
sampling, so that the same log-probabilities give the same winner. Where beams come from, and how the likeliest tokens
of one are found, is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from router.core.plan import TopTokens
from router.core.request import BeamSettings


@dataclass(frozen=True, slots=True)
class Beam:
    """One way on from the prompt."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    sources: tuple[int, ...] = ()
    """For each token, the place of the beam it was added to among the beams that ran then."""
    total_logprob: float = 0.0


class _Continuation(NamedTuple):
    """A beam and one more token."""

    total_logprob: float
    source: int
    token_id: int
    logprob: float


class _Ended(NamedTuple):
    score: float
    beam: Beam


class BeamSearch:
    """The search behind one prompt. Ask `running` and `advance` until `is_done`; then there is a `winner`."""

    def __init__(self, settings: BeamSettings, max_new_tokens: int, eos_token_ids: Sequence[int]) -> None:
        self._settings = settings
        self._max_new_tokens = max_new_tokens
        self._eos_token_ids = eos_token_ids
        self._num_generated = 0
        self._running = [Beam()]
        self._ended: list[_Ended] = []

    @property
    def num_candidates(self) -> int:
        """Continuations that are looked at in a step. Even if every end token is among the likeliest of every beam,
        as many others are left as there are beams."""
        return max(2, 1 + len(self._eos_token_ids)) * self._settings.num_beams

    @property
    def running(self) -> Sequence[Beam]:
        """Beams to go on with, best first. At the start there is one, without tokens."""
        return self._running

    @property
    def winner(self) -> Beam:
        """Of the beams that have ended, the one with the best score."""
        return self._ended[0].beam

    @property
    def is_done(self) -> bool:
        if not self._running:
            return True
        if len(self._ended) < self._settings.num_beams:
            return False
        return self._settings.early_stopping is True or not self._may_improve()

    def _may_improve(self) -> bool:
        """Whether the best running beam may still beat the worst of those that have ended. An estimate, as scores may
        grow with the length: only "never" looks as far ahead as a beam can go."""
        looks_ahead = self._settings.early_stopping == "never" and self._settings.length_penalty > 0.0
        length = self._max_new_tokens if looks_ahead else self._num_generated
        return self._score(self._running[0].total_logprob, length) > self._ended[-1].score

    def _score(self, total_logprob: float, length: int) -> float:
        """A positive penalty favours long beams, for log-probabilities are negative. End tokens count as length."""
        return float(total_logprob / length**self._settings.length_penalty)

    def advance(self, tops: Sequence[TopTokens]) -> None:
        """Takes at least `num_candidates` of the likeliest next tokens of every running beam, in their order."""
        continuations = self._best_continuations(tops)
        self._num_generated += 1
        ended, running = [], []
        for rank, continuation in enumerate(continuations):
            if not self._is_end(continuation):
                running.append(continuation)
            elif rank < self._settings.num_beams:  # a worse one only shows that its beam has ended
                ended.append(continuation)
        num_beams = self._settings.num_beams
        newly_ended = [_Ended(self._score(c.total_logprob, self._num_generated), self._extend(c)) for c in ended]
        self._ended = sorted(self._ended + newly_ended, key=lambda e: -e.score)[:num_beams]
        self._running = [self._extend(c) for c in running[:num_beams]]

    def _best_continuations(self, tops: Sequence[TopTokens]) -> list[_Continuation]:
        """Best first; of equal ones that of the better beam, then the lower token id."""
        continuations = [
            _Continuation(beam.total_logprob + logprob, source, token_id, logprob)
            for source, (beam, top_tokens) in enumerate(zip(self._running, tops, strict=True))
            for token_id, logprob in top_tokens
        ]
        continuations.sort(key=lambda c: (-c.total_logprob, c.source, c.token_id))
        return continuations[: self.num_candidates]

    def _is_end(self, continuation: _Continuation) -> bool:
        return self._num_generated == self._max_new_tokens or continuation.token_id in self._eos_token_ids

    def _extend(self, continuation: _Continuation) -> Beam:
        beam = self._running[continuation.source]
        return Beam(
            (*beam.token_ids, continuation.token_id),
            (*beam.logprobs, continuation.logprob),
            (*beam.sources, continuation.source),
            continuation.total_logprob,
        )
