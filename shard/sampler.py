"""Chooses tokens on rank 0: raw logits in, token ids and log-probabilities out.

    logits ──► log-softmax ────────────────────────────────────────► logprobs, top tokens (of the RAW logits)
       └─────► watermark ► repetition ► frequency, presence ► bias ► forbidden tokens
                   ├─ greedy ─────────────────────────────────────► argmax
                   └─ sampled ► temperature ► top-k ► top-p ► min-p ► typical-p ► draw by (seed, position)

A grammar stands before all of this: what it leaves no room for is as good as not in the vocabulary. Where it leaves one
choice that choice is taken; where the likeliest token is among those it allows, nothing else is looked at; only the
rows left over are chosen from a masked copy of their scores.

What a seat needs to look back at (tokens, counts, n-grams) is built by `open` and `feed` and kept up to date by
`sample`; a seat whose rules do not look back keeps nothing. A rule that nobody in the batch uses costs nothing.

Where nobody in the batch has a rule that changes logits, typical-p, a grammar or a wish for top tokens, all of this is
one native call, on CPUs that have it.

Penalties, bias and greedy choice follow the device without waiting for it. These wait: a seat with a watermark, n-gram
or bad-words rule or a grammar (kept on the host), top tokens (how many tie), truncation (whether the candidates were
enough).

The module knows nothing of plans, blocks or the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shard.choice import Group, choose, column, group_rows, plain_rules
from shard.grammar import Grammars
from shard.kernels import ops
from shard.kernels.native import ChoiceRules
from shard.logits import argmax, block_maxima, likeliest, log_probabilities, native_threads
from shard.processors import (
    RepeatedNGrams,
    completed_bad_words,
    green_list,
    penalise_counts,
    penalise_repetition,
)
from shard.sampling_params import SamplingParams

__all__ = ["Sampled", "Sampler", "SamplingParams", "Scored", "score"]

_MAX_TOP_TIES = 8
"""Most tokens as likely as the last top token that are returned with it."""


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


@dataclass(slots=True)
class Scored:
    """One entry per target; of `top_*`, row i holds `num_top[i]` tokens and the rest is padding."""

    logprobs: Tensor  # [S] float32, log-softmax of the raw logits
    num_top: list[int]
    top_ids: Tensor  # [S, N] int64, most likely first; N is the largest num_top
    top_logprobs: Tensor  # [S, N] float32


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


class _KnownTokens:
    """The tokens of seats on the device, [max_seats, capacity], so that penalties touch only these and not all of V."""

    def __init__(self, max_seats: int, device: torch.device) -> None:
        self._table = torch.zeros(max_seats, 256, dtype=torch.int32, device=device)

    def write(self, seats: Tensor, starts: Tensor, tokens: Tensor, end: int) -> None:
        """Writes tokens [R, L] from index `starts` [R, 1] on; `end` is the largest index written, plus one."""
        if end > self._table.shape[1]:
            grown = self._table.new_zeros(self._table.shape[0], max(end, 2 * self._table.shape[1]))
            grown[:, : self._table.shape[1]] = self._table
            self._table = grown
        indices = starts + torch.arange(tokens.shape[1], device=tokens.device)
        self._table[seats, indices] = tokens.int()

    def read(self, seats: Tensor, counts: Tensor, longest: int) -> Tensor:
        """The first `counts` [R, 1] tokens of seats [R, 1], padded with a row's first one: [R, longest] int64."""
        tokens = self._table[seats.squeeze(1), :longest].long()
        return torch.where(torch.arange(longest, device=tokens.device) < counts, tokens, tokens[:, :1])


@dataclass(frozen=True, slots=True)
class _Penalised:
    """Rows with a repetition, frequency or presence penalty; columns [R, 1], neutral where a row lacks one of them."""

    seats: list[_Seat]
    rows: Tensor
    seat_indices: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    any_counts: bool

    @property
    def longest(self) -> int:
        return max(state.num_tokens for state in self.seats)


@dataclass(frozen=True, slots=True)
class _Bias:
    """One entry per biased token, all rows together."""

    rows: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class _Batch:
    """The parameters of some rows as tensors. None or empty where nobody uses the rule; lists hold rows."""

    seats: list[_Seat]
    seeds: list[int]
    plain: ChoiceRules | None
    """Of all rows, where one native call can choose for them."""
    groups: list[Group]
    """Of all rows but those that draw from what a grammar allows."""
    constrained: list[int]
    penalised: _Penalised | None
    bias: _Bias | None
    watermarked: list[int]
    first_ends: list[tuple[int, int]]
    """Rows with a minimum length, and the first position where they may end."""
    forbidding: list[int]
    """Rows whose tokens forbid others."""
    looking_back: list[int]
    needing_tokens: list[int]
    num_top: list[int]

    @property
    def changes_logits(self) -> bool:
        return bool(self.penalised or self.bias or self.watermarked)


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
        self._max_seats = max_seats
        self._eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        self._device = device
        self._seats: dict[int, _Seat] = {}
        # The batch of the last step: decoding brings the same seats again and again.
        self._batch: _Batch | None = None
        self._batch_seats: tuple[int, ...] = ()
        # Made when first needed: many deployments never see a penalty.
        self._known: _KnownTokens | None = None
        self._counts: Tensor | None = None  # [max_seats, V] int32: how often each token was generated

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
        if params.no_repeat_ngram_size > 0:
            state.ngrams = RepeatedNGrams(params.no_repeat_ngram_size)
        if params.penalises and self._known is None:
            self._known = _KnownTokens(self._max_seats, self._device)
        if params.penalises_counts:
            self._clear_counts(seat)
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
        batch = self._batch_of(seats)
        for row in batch.looking_back:
            known = batch.seats[row].num_tokens
            assert known == positions[row], f"token {positions[row]} is to be chosen, but {known} before it are known"
        forbidden = self._forbidden(batch, positions)
        if batch.plain is not None and (threads := native_threads(logits)) is not None:
            token_ids, logprobs, faults = ops.choose(batch.plain, logits, positions, forbidden, threads.count)
            self._remember(batch, token_ids)
            return Sampled(token_ids, logprobs, batch.num_top, *_no_top(len(token_ids), self._device), faults)
        refusals = self._prepare_grammars(batch, positions)
        maxima = block_maxima(logits)
        token_ids = self._choose(logits, maxima, batch, positions, forbidden, refusals)
        forced = self._advance_grammars(batch, token_ids)
        self._remember(batch, token_ids)
        num_top, top_ids = _top_ids(logits, maxima, batch.num_top)
        logprobs = log_probabilities(logits, torch.cat([token_ids.unsqueeze(1), top_ids], dim=1))
        faults = ~maxima.amax(-1).isfinite()
        return Sampled(token_ids, logprobs[:, 0], num_top, top_ids, logprobs[:, 1:], faults, forced, refusals)

    # ---- what seats know -------------------------------------------------------------------------------------------

    def _clear_counts(self, seat: int) -> None:
        if self._counts is None:
            self._counts = torch.zeros(self._max_seats, self._vocab_size, dtype=torch.int32, device=self._device)
        self._counts[seat].zero_()

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
            assert self._known is not None
            seat, first = self._ints([[state.index]]), self._ints([[start]])
            self._known.write(seat, first, self._ints([tokens]), state.num_tokens)
        generated = tokens[max(0, state.num_prompt_tokens - start) :]
        if state.params.penalises_counts and generated:
            assert self._counts is not None
            ids = self._ints(generated)
            self._counts[state.index].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def _remember(self, batch: _Batch, token_ids: Tensor) -> None:
        """Adds sampled tokens to what their seats know."""
        for row in batch.looking_back:
            batch.seats[row].num_tokens += 1
            batch.seats[row].ends_sampled = True
        if (penalised := batch.penalised) is not None:
            assert self._known is not None
            tokens = token_ids[penalised.rows]  # [R, 1]
            starts = self._ints([[state.num_tokens - 1] for state in penalised.seats])
            self._known.write(penalised.seat_indices, starts, tokens, penalised.longest)
            if penalised.any_counts:
                assert self._counts is not None
                self._counts[penalised.seat_indices, tokens] += 1
        if batch.needing_tokens:
            known = token_ids.tolist()
            for row in batch.needing_tokens:
                batch.seats[row].append(known[row])

    # ---- rules on logits -------------------------------------------------------------------------------------------

    def _forbidden(self, batch: _Batch, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Rows, in order, and tokens that must not be chosen there."""
        forbidden = [
            (row, token)
            for row, first_end in batch.first_ends
            if positions[row] < first_end
            for token in self._eos_token_ids
        ]
        if batch.forbidding:
            forbidden += [(row, token) for row in batch.forbidding for token in batch.seats[row].forbidden()]
            forbidden.sort()
        return forbidden

    def _choose(
        self,
        logits: Tensor,
        maxima: Tensor,
        batch: _Batch,
        positions: Sequence[int],
        forbidden: Sequence[tuple[int, int]],
        refusals: Mapping[int, str],
    ) -> Tensor:
        """[E, V], [E, B] -> [E]."""
        scores = self._processed(logits, batch, forbidden)
        if scores is logits:
            chosen = choose(logits, maxima, batch.groups, batch.seeds, positions)
        else:
            score_maxima = block_maxima(scores)
            chosen = choose(scores, score_maxima, batch.groups, batch.seeds, positions)
            # Where the rules leave no token, the model's own choice stands.
            chosen = torch.where(score_maxima.amax(-1).isfinite(), chosen, argmax(logits, maxima))
        constrained = [row for row in batch.constrained if row not in refusals]
        if constrained:
            self._constrain(chosen, constrained, logits, scores, batch, positions)
        return chosen

    def _processed(self, logits: Tensor, batch: _Batch, forbidden: Sequence[tuple[int, int]]) -> Tensor:
        """The logits after every rule that is not a truncation; `logits` itself if there was none to apply."""
        if not (forbidden or batch.changes_logits):
            return logits
        scores = logits.clone()
        for row in batch.watermarked:
            self._favour_green(scores[row], batch.seats[row])
        if batch.penalised is not None:
            self._penalise(scores, batch.penalised)
        if (bias := batch.bias) is not None:
            scores.index_put_((bias.rows, bias.token_ids), bias.values, accumulate=True)
        if forbidden:
            rows, tokens = zip(*forbidden, strict=True)
            scores[self._ints(rows), self._ints(tokens)] = -torch.inf
        return scores

    def _favour_green(self, scores: Tensor, state: _Seat) -> None:
        green = green_list(state.tokens[-1], state.params.watermark_gamma, self._vocab_size)
        scores[green.to(self._device)] += state.params.watermark_delta

    def _penalise(self, scores: Tensor, rule: _Penalised) -> None:
        """A token that occurs several times is written several times, always with the same value."""
        assert self._known is not None
        counts = self._ints([[state.num_tokens] for state in rule.seats])
        ids = self._known.read(rule.seat_indices, counts, rule.longest)  # [R, L]
        values = penalise_repetition(scores[rule.rows, ids], rule.repetition)
        if rule.any_counts:
            assert self._counts is not None
            values = penalise_counts(values, self._counts[rule.seat_indices, ids], rule.frequency, rule.presence)
        scores[rule.rows, ids] = values

    # ---- grammars --------------------------------------------------------------------------------------------------

    def _prepare_grammars(self, batch: _Batch, positions: Sequence[int]) -> dict[int, str]:
        """Waits for what is allowed. Returns the rows that cannot go on."""
        if not batch.constrained:
            return {}
        assert self._grammars is not None
        seats = [batch.seats[row].index for row in batch.constrained]
        faults = self._grammars.prepare(seats, [positions[row] for row in batch.constrained])
        return {row: faults[seat] for row, seat in zip(batch.constrained, seats, strict=True) if seat in faults}

    def _constrain(
        self,
        token_ids: Tensor,
        rows: Sequence[int],
        logits: Tensor,
        scores: Tensor,
        batch: _Batch,
        positions: Sequence[int],
    ) -> None:
        """Replaces the tokens [E] of some rows by what is promised, or where they are not allowed or not drawn yet."""
        assert self._grammars is not None
        likeliest_ids = token_ids.tolist()
        masked: list[int] = []
        for row in rows:
            state = batch.seats[row]
            promised = self._grammars.promised(state.index)
            if promised is not None:
                token_ids[row] = promised
            elif state.params.do_sample or not self._grammars.allows(state.index, likeliest_ids[row]):
                masked.append(row)
        if masked:
            token_ids[self._ints(masked)] = self._choose_allowed(masked, logits, scores, batch, positions)

    def _choose_allowed(
        self, rows: list[int], logits: Tensor, scores: Tensor, batch: _Batch, positions: Sequence[int]
    ) -> Tensor:
        """One token per row of `rows`, of those that its grammar allows: [R]."""
        assert self._grammars is not None
        states = [batch.seats[row] for row in rows]
        indices = self._ints(rows)
        penalties = self._grammars.penalties([state.index for state in states], self._vocab_size, self._device)
        masked = scores[indices].add_(penalties)
        maxima = block_maxima(masked)
        groups = group_rows([state.params for state in states], range(len(rows)), self._vocab_size, self._device)
        chosen = choose(masked, maxima, groups, [batch.seeds[row] for row in rows], [positions[row] for row in rows])
        is_left = maxima.amax(-1).isfinite()
        if bool(is_left.all()):
            return chosen
        # Where the other rules forbid all that the grammar allows, the grammar stands.
        allowed = logits[indices].add_(penalties)
        return torch.where(is_left, chosen, argmax(allowed, block_maxima(allowed)))

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

    def _batch_of(self, seats: Sequence[int]) -> _Batch:
        key = tuple(seats)
        if self._batch is None or self._batch_seats != key:
            self._batch = self._gather([self._seats[seat] for seat in key])
            self._batch_seats = key
        return self._batch

    def _gather(self, seats: list[_Seat]) -> _Batch:
        params = [state.params for state in seats]
        chosen_freely = [row for row, state in enumerate(seats) if state.grammars is None or not state.params.do_sample]
        is_plain = all(p.is_plain for p in params) and not any(state.grammars for state in seats)
        return _Batch(
            seats=seats,
            seeds=[p.seed for p in params],
            plain=plain_rules(params) if is_plain else None,
            groups=group_rows(params, chosen_freely, self._vocab_size, self._device),
            constrained=[row for row, state in enumerate(seats) if state.grammars is not None],
            penalised=self._penalised(seats),
            bias=self._bias(params),
            watermarked=[row for row, p in enumerate(params) if p.watermarks],
            first_ends=[(row, state.first_end) for row, state in enumerate(seats) if state.params.min_new_tokens],
            forbidding=[row for row, p in enumerate(params) if p.forbids],
            looking_back=[row for row, p in enumerate(params) if p.looks_back],
            needing_tokens=[row for row, p in enumerate(params) if p.needs_tokens],
            num_top=[p.top_n_tokens for p in params],
        )

    def _penalised(self, seats: list[_Seat]) -> _Penalised | None:
        rows = [row for row, state in enumerate(seats) if state.params.penalises]
        if not rows:
            return None
        params = [seats[row].params for row in rows]
        return _Penalised(
            seats=[seats[row] for row in rows],
            rows=column(rows, torch.int64, self._device),
            seat_indices=column([seats[row].index for row in rows], torch.int64, self._device),
            repetition=column([p.repetition_penalty for p in params], torch.float32, self._device),
            frequency=column([p.frequency_penalty for p in params], torch.float32, self._device),
            presence=column([p.presence_penalty for p in params], torch.float32, self._device),
            any_counts=any(p.penalises_counts for p in params),
        )

    def _bias(self, params: list[SamplingParams]) -> _Bias | None:
        entries = [
            (row, token, value)
            for row, p in enumerate(params)
            for token, value in zip(p.bias_token_ids, p.bias_values, strict=True)
            if token < self._vocab_size
        ]
        if not entries:
            return None
        rows, tokens, values = zip(*entries, strict=True)
        biases = torch.tensor(values, dtype=torch.float32, device=self._device)
        return _Bias(self._ints(rows), self._ints(tokens), biases)

    def _ints(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def score(logits: Tensor, targets: Tensor, asked: Sequence[int]) -> Scored:
    """Scores each row of logits [S, V] at its target [S], and finds the `asked` number of likeliest tokens of it."""
    num_top, top_ids = _top_ids(logits, block_maxima(logits), asked)
    logprobs = log_probabilities(logits, torch.cat([targets.unsqueeze(1), top_ids], dim=1))
    return Scored(logprobs[:, 0], num_top, top_ids, logprobs[:, 1:])


def _top_ids(logits: Tensor, maxima: Tensor, asked: Sequence[int]) -> tuple[list[int], Tensor]:
    """The likeliest tokens of the rows that ask for some, with those as likely as the last: counts, ids [E, N]."""
    num_top = [0] * len(asked)
    asking = [row for row, count in enumerate(asked) if count > 0]
    if not asking:
        return num_top, _no_top(len(asked), logits.device)[0]
    rows = torch.tensor(asking, dtype=torch.int64, device=logits.device)
    candidates = likeliest(logits[rows], maxima[rows], max(asked) + _MAX_TOP_TIES)
    for row, values in zip(asking, candidates.values.tolist(), strict=True):
        num_top[row] = _count_with_ties(values[: asked[row] + _MAX_TOP_TIES], asked[row])
    top_ids = torch.zeros(len(asked), max(num_top), dtype=torch.int64, device=logits.device)
    top_ids[rows] = candidates.ids[:, : max(num_top)]
    return num_top, top_ids


def _no_top(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ids and log-probabilities of no top tokens."""
    return torch.empty(num_rows, 0, dtype=torch.int64, device=device), torch.empty(num_rows, 0, device=device)


def _count_with_ties(values: list[float], count: int) -> int:
    """How many of some descending values are among the first `count` or equal the last of them."""
    last = values[min(count, len(values)) - 1]
    return sum(value >= last for value in values)
