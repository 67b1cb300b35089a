"""Chooses tokens, on rank 0 unless `shard.greedy` does it: raw logits in, token ids and log-probabilities out.

    open, feed ──► what a seat knows: tokens, counts, n-grams, a grammar ──► masks, forbidden tokens ─┐
    logits ─────────────────────────────────────────────────────────────────────────────────────► choice ──► tokens
       └──► log-softmax ────────────────────► logprobs, top tokens (of the RAW logits)

A grammar stands before all other rules: what it leaves no room for is as good as not in the vocabulary.

What a seat needs to look back at is built by `open` and `feed` and kept up to date by `sample`; a seat whose rules do
not look back keeps nothing. A rule that nobody in the batch uses costs nothing.

How rules make scores of logits, and tokens of scores, is in `shard.choice`; it also says what waits for a device.
Here a seat with a watermark, n-gram or bad-words rule or a grammar does, because these are kept on the host.

The module knows nothing of plans, blocks or the wire.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shard.choice import TorchRules, choose, native_rules
from shard.grammar import Grammars
from shard.kernels.native import Change, ChoiceRules, Mask
from shard.known_tokens import KnownTokens
from shard.logits import block_maxima, likeliest_with_ties, log_probabilities, native_threads
from shard.processors import RepeatedNGrams, completed_bad_words, green_bits
from shard.sampling_params import SamplingParams
from shard.transfer import to_host

__all__ = ["Sampled", "Sampler", "SamplingParams", "Scored", "score"]


@dataclass(slots=True)
class Sampled:
    """One entry per row of logits; of `top_*`, row i holds `num_top[i]` tokens and the rest is padding."""

    token_ids: Tensor  # [E] int64
    logprobs: Tensor  # [E] float32, log-softmax of the raw logits
    num_top: list[int]
    top_ids: Tensor  # [E, N] int64, most likely first; N is the largest num_top
    top_logprobs: Tensor  # [E, N] float32
    faults: Tensor  # [E] bool: the logits have a NaN or no finite maximum; the row's other entries mean nothing
    forced: list[Sequence[int]] = field(default_factory=list)
    """For each row, the tokens that alone can follow; empty if no row has any."""
    refusals: dict[int, str] = field(default_factory=dict)
    """Why rows have no token, in words for a client; their other entries mean nothing."""

    def on_host(self) -> Sampled:
        """What this will be when a `Mark` set behind this is reached."""
        return replace(
            self,
            token_ids=to_host(self.token_ids),
            logprobs=to_host(self.logprobs),
            top_ids=to_host(self.top_ids),
            top_logprobs=to_host(self.top_logprobs),
            faults=to_host(self.faults),
        )


@dataclass(slots=True)
class Scored:
    """One entry per target; of `top_*`, row i holds `num_top[i]` tokens and the rest is padding."""

    logprobs: Tensor  # [S] float32, log-softmax of the raw logits
    num_top: list[int]
    top_ids: Tensor  # [S, N] int64, most likely first; N is the largest num_top
    top_logprobs: Tensor  # [S, N] float32

    def on_host(self) -> Scored:
        """What this will be when a `Mark` set behind this is reached."""
        return Scored(to_host(self.logprobs), self.num_top, to_host(self.top_ids), to_host(self.top_logprobs))


@dataclass(slots=True, eq=False)
class _Seat:
    """One sequence, as far as choosing its next token needs it."""

    index: int
    params: SamplingParams
    num_prompt_tokens: int
    num_tokens: int = 0
    """Tokens known, sampled ones included. Kept, like the rest below, only if the parameters look back."""
    ends_sampled: bool = False
    """Whether the last known token was sampled here and may come back as a literal."""
    tokens: list[int] = field(default_factory=list)
    ngrams: RepeatedNGrams | None = None
    grammars: Grammars | None = None
    """Where the seat's grammar is kept; None: it has none."""
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def first_end(self) -> int:
        """Position before which no end token may stand."""
        return self.num_prompt_tokens + self.params.min_new_tokens

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.ngrams is not None:
            self.ngrams.append(token)

    def num_top(self, position: int) -> int:
        """Likeliest tokens to return in the place of a known token."""
        is_prompt = position < self.num_prompt_tokens
        return self.params.prompt_top_n_tokens if is_prompt else self.params.top_n_tokens

    def forbidden(self) -> list[int]:
        """Tokens that must not stand behind those that are known."""
        forbidden = completed_bad_words(self.tokens, self.bad_words)
        if self.ngrams is not None:
            forbidden.extend(self.ngrams.forbidden())
        return forbidden


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some rows' parameters; lists hold rows."""

    seats: list[_Seat]
    rules: ChoiceRules | TorchRules
    constrained: list[int]
    watermarked: list[int]
    first_ends: list[tuple[int, int]]
    """Rows with a minimum length, and the first position where they may end."""
    forbidding: list[int]
    """Rows whose tokens forbid others."""
    looking_back: list[int]
    needing_tokens: list[int]


class Sampler:
    """Per-seat sampling state and the choice of tokens. Runs on the model thread only."""

    def __init__(
        self,
        *,
        vocab_size: int,
        max_seats: int,
        eos_token_ids: Sequence[int],
        device: torch.device,
        grammars: Grammars | None = None,
    ) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        self._device = device
        self._seats: dict[int, _Seat] = {}
        # The batch of the last step: decoding brings the same seats again and again.
        self._batch: _Batch | None = None
        self._batch_key: tuple[bool, tuple[int, ...]] = (False, ())
        self._known = KnownTokens(max_seats, vocab_size, device)

    def open(
        self, seat: int, params: SamplingParams, history: Sequence[int], num_prompt_tokens: int, grammar: str = ""
    ) -> None:
        """Begins a seat. `history` holds the tokens before its first row, generated ones included in a replay; it may
        be empty if neither the parameters nor a grammar look back."""
        assert seat not in self._seats, f"seat {seat} is open"
        state = _Seat(seat, params, num_prompt_tokens, bad_words=self._possible_bad_words(params))
        if grammar:
            assert self._grammars is not None, "this sampler knows no grammars"
            self._grammars.open(seat, grammar, history, num_prompt_tokens)
            state.grammars = self._grammars
        if params.no_repeat_ngram_size > 1:  # a single token is forbidden by the table of known ones
            state.ngrams = RepeatedNGrams(params.no_repeat_ngram_size)
        if params.penalises:
            self._known.open(seat, counting=params.penalises_counts)
        self._seats[seat] = state
        self._learn(state, history)

    def feed(self, seat: int, tokens: Sequence[int]) -> None:
        """Takes the literals of a row, in sequence order.

        The first may be the token that was sampled last: once the router has heard of it, it comes back as a literal.
        """
        state = self._seats[seat]
        if state.grammars is not None:
            state.grammars.feed(seat, tokens)
        if tokens and state.ends_sampled:
            state.ends_sampled = False
            tokens = tokens[1:]
        self._learn(state, tokens)

    def close(self, seat: int) -> None:
        state = self._seats.pop(seat)
        if state.grammars is not None:
            state.grammars.close(seat)
        self._batch = None

    def num_target_top(self, seats: Sequence[int], positions: Sequence[int]) -> list[int]:
        """How many likeliest tokens are wanted in the place of each scored token, by seat and position."""
        return [self._seats[seat].num_top(position) for seat, position in zip(seats, positions, strict=True)]

    def sample(self, logits: Tensor, seats: Sequence[int], positions: Sequence[int]) -> Sampled:
        """Chooses one token per row and counts it as known.

        `logits` [E, V] are the model's, in float32, and stay as they are. Row i belongs to `seats[i]`;
        `positions[i]` is the index in its sequence of the token to be chosen. Only a seat that neither looks back nor
        has a grammar may come more than once: whether its later tokens count is for the caller to say.
        """
        batch = self._batch_of(seats, natively=native_threads(logits) is not None)
        for row in batch.looking_back:
            known = batch.seats[row].num_tokens
            assert known == positions[row], f"token {positions[row]} is to be chosen, but {known} before it are known"
        refusals = self._prepare_grammars(batch, positions)
        forbidden, masks = self._forbidden(batch, positions), self._masks(batch, refusals)
        chosen = choose(batch.rules, logits, positions, forbidden, masks, self._known)
        forced = self._advance_grammars(batch, chosen.token_ids)
        self._remember(batch, chosen.token_ids)
        return Sampled(
            *(chosen.token_ids, chosen.logprobs, chosen.num_top.tolist(), chosen.top_ids, chosen.top_logprobs),
            *(chosen.faults, forced, refusals),
        )

    # ---- what seats know -------------------------------------------------------------------------------------------

    def _possible_bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """As in transformers, an end token alone is not a bad word."""
        ends = {(token,) for token in self._eos_token_ids}
        return tuple(run for run in params.bad_words if run and run[-1] < self._vocab_size and run not in ends)

    def _learn(self, state: _Seat, tokens: Sequence[int]) -> None:
        """Adds tokens that came from the router to what a seat knows."""
        if not tokens or not state.params.looks_back:
            return
        start, state.num_tokens = state.num_tokens, state.num_tokens + len(tokens)
        if state.params.needs_tokens:
            for token in tokens:
                state.append(token)
        if state.params.penalises:
            num_from_prompt = max(0, state.num_prompt_tokens - start)
            self._known.learn(state.index, tokens, num_from_prompt, counting=state.params.penalises_counts)

    def _remember(self, batch: _Batch, token_ids: Tensor) -> None:
        """Adds sampled tokens to what their seats know, beyond the tables of known tokens."""
        for row in batch.looking_back:
            batch.seats[row].num_tokens += 1
            batch.seats[row].ends_sampled = True
        if batch.needing_tokens:
            known = token_ids.tolist()
            for row in batch.needing_tokens:
                batch.seats[row].append(known[row])

    # ---- what seats rule out or favour -----------------------------------------------------------------------------

    def _forbidden(self, batch: _Batch, positions: Sequence[int]) -> list[Change]:
        forbidden = [
            Change(row, token, -math.inf)
            for row, first_end in batch.first_ends
            if positions[row] < first_end
            for token in self._eos_token_ids
        ]
        for row in batch.forbidding:
            forbidden += [Change(row, token, -math.inf) for token in batch.seats[row].forbidden()]
        return forbidden

    def _masks(self, batch: _Batch, refusals: Mapping[int, str]) -> list[Mask]:
        """What grammars allow, and the tokens that watermarks favour."""
        masks: list[Mask] = []
        for row in batch.constrained:
            if row not in refusals:
                assert self._grammars is not None
                masks.append(Mask(row, self._grammars.allowed(batch.seats[row].index), 0.0, -math.inf))
        for row in batch.watermarked:
            state = batch.seats[row]
            green = green_bits(state.tokens[-1], state.params.watermark_gamma, self._vocab_size)
            masks.append(Mask(row, green, state.params.watermark_delta, 0.0))
        return masks

    # ---- grammars --------------------------------------------------------------------------------------------------

    def _prepare_grammars(self, batch: _Batch, positions: Sequence[int]) -> dict[int, str]:
        """Waits for what is allowed. Returns the rows that cannot go on."""
        if not batch.constrained:
            return {}
        assert self._grammars is not None
        seats = [batch.seats[row].index for row in batch.constrained]
        faults = self._grammars.prepare(seats, [positions[row] for row in batch.constrained])
        return {row: faults[seat] for row, seat in zip(batch.constrained, seats, strict=True) if seat in faults}

    def _advance_grammars(self, batch: _Batch, token_ids: Tensor) -> list[Sequence[int]]:
        """Tells the grammars what was chosen. Returns what must follow in each row; nothing if nobody has one."""
        if not batch.constrained:
            return []
        assert self._grammars is not None
        chosen = token_ids.tolist()
        seats = [batch.seats[row].index for row in batch.constrained]
        runs = self._grammars.advance(seats, [chosen[row] for row in batch.constrained])
        forced: list[Sequence[int]] = [()] * len(batch.seats)
        for row, run in zip(batch.constrained, runs, strict=True):
            forced[row] = run
        return forced

    # ---- parameters of a batch -------------------------------------------------------------------------------------

    def _batch_of(self, seats: Sequence[int], *, natively: bool) -> _Batch:
        key = natively, tuple(seats)
        if self._batch is None or self._batch_key != key:
            self._batch = self._gather([self._seats[seat] for seat in seats], natively=natively)
            self._batch_key = key
        return self._batch

    def _gather(self, seats: list[_Seat], *, natively: bool) -> _Batch:
        params, indices = [state.params for state in seats], [state.index for state in seats]
        rules: ChoiceRules | TorchRules
        if natively:
            rules = native_rules(params, indices, self._vocab_size)
        else:
            rules = TorchRules(params, indices, self._vocab_size, self._device)
        return _Batch(
            seats=seats,
            rules=rules,
            constrained=[row for row, state in enumerate(seats) if state.grammars is not None],
            watermarked=[row for row, p in enumerate(params) if p.watermarks],
            first_ends=[(row, state.first_end) for row, state in enumerate(seats) if state.params.min_new_tokens],
            forbidding=[row for row, p in enumerate(params) if p.forbids],
            looking_back=[row for row, p in enumerate(params) if p.looks_back],
            needing_tokens=[row for row, p in enumerate(params) if p.needs_tokens],
        )


def score(logits: Tensor, targets: Tensor, asked: Sequence[int]) -> Scored:
    """Scores each row of logits [S, V] at its target [S], and finds the `asked` number of likeliest tokens of it."""
    num_top, top_ids = likeliest_with_ties(logits, block_maxima(logits), asked)
    logprobs = log_probabilities(logits, torch.cat([targets.unsqueeze(1), top_ids], dim=1))
    return Scored(logprobs[:, 0], num_top, top_ids, logprobs[:, 1:])
