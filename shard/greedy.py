"""Greedy tokens of several ranks: each looks through its own columns of the logits, and what it has found goes round
instead of the columns.

A step is chosen so if all its rows are plain: the largest logit and its log-probability are all that is wanted, at most
with a minimum length. Which rows these are every rank reads in the plans, so all go the same way without asking, and
all have the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shard.kernels import native
from shard.kernels.native import Change, ChoiceRules, Peers, Rule
from shard.sampler import Sampled
from shard.sampling_params import SamplingParams


class GreedySeats:
    """The seats whose tokens can be chosen so."""

    def __init__(self, peers: Peers, columns: range, eos_token_ids: Sequence[int]) -> None:
        """`columns` of the vocabulary are this rank's; all ranks' follow each other."""
        self._peers = peers
        self._first_column = columns.start
        self._ends = [token - columns.start for token in eos_token_ids if token in columns]
        self._first_ends: dict[int, int] = {}
        """For each seat the position before which no end token may stand."""
        self._rules = ChoiceRules([], [])

    def open(self, seat: int, params: SamplingParams, num_prompt_tokens: int, grammar: str = "") -> None:
        """Begins a seat, whatever its rules."""
        if params.is_plain and not grammar:
            self._first_ends[seat] = num_prompt_tokens + params.min_new_tokens

    def close(self, seat: int) -> None:
        self._first_ends.pop(seat, None)

    def hold(self, seats: Sequence[int]) -> bool:
        """Whether rows of these seats can all be chosen so."""
        return all(seat in self._first_ends for seat in seats)

    def sample(self, logits: Tensor, seats: Sequence[int], positions: Sequence[int]) -> Sampled:
        """As `Sampler.sample`, on every rank and from its columns of the logits. Raises `PeerError`."""
        if len(self._rules.rules) != len(seats):
            self._rules = ChoiceRules([Rule()] * len(seats), [0] * len(seats))
        forbidden = [
            Change(row, end, -math.inf)
            for row, (seat, position) in enumerate(zip(seats, positions, strict=True))
            if position < self._first_ends[seat]
            for end in self._ends
        ]
        given = self._rules.arguments(positions, forbidden)
        threads = native.threads(torch.get_num_threads())
        chosen = native.choose(logits, given, threads, self._peers, self._first_column)
        return Sampled(
            *(chosen.token_ids, chosen.logprobs, chosen.num_top.tolist(), chosen.top_ids, chosen.top_logprobs),
            chosen.faults,
        )
