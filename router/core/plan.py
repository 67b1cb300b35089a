"""One step of a group as plain data: what the scheduler decides and what comes back.

What exists once per row and step is a named tuple: they are made twice as fast as frozen dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.core.request import Sampling


@dataclass(frozen=True, slots=True)
class Open:
    """A seat begins: `blocks` are the prefix hits at the head of its table, holding `num_cached_tokens` tokens."""

    seat: int
    blocks: list[int]
    num_cached_tokens: int
    num_prompt_tokens: int
    sampling: Sampling
    history: list[int]
    grammar: str = ""
    request_id: str = ""
    trace_id: str = ""
    adapter: int = 0


class Row(NamedTuple):
    """One sequence's part in a step.

    `literals` holds the row's `num_tokens` token ids, or is empty when the row feeds the seat's last sampled token. The
    last `num_drafts` of them are guesses: the row emits as many tokens as agree with them, and one more.
    `targets` are the tokens that follow the row's leading tokens, whose log-probabilities are asked for.
    """

    seat: int
    num_tokens: int
    literals: list[int]
    new_blocks: list[int]
    emit: bool
    targets: list[int]
    num_drafts: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What all ranks do in one step, in this order: closes, opens, then every row in one forward pass.

    And then in `num_repeats` steps more: every row feeds its seat's last sampled token and emits the next.
    """

    step: int
    """Number of the first of them."""
    closes: list[int]
    opens: list[Open]
    rows: list[Row]
    has_prompts: bool = False
    """Whether a row feeds more of what its sequence was admitted with than the last token."""
    has_drafts: bool = False
    num_repeats: int = 0

    @property
    def num_tokens(self) -> int:
        """Of each of its steps."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_steps(self) -> int:
        return 1 + self.num_repeats


TopTokens = tuple[tuple[int, float], ...]
"""Token ids with their log-probabilities, most likely first."""


class SampledToken(NamedTuple):
    """A generated token with log-probabilities (natural log) under the model's raw logits."""

    token_id: int
    logprob: float
    top_tokens: TopTokens = ()


class RowOutput(NamedTuple):
    """What one row of the plan gave. A row with a `fault` emits nothing and its sequence cannot go on.

    `target_tops` has an entry per target, like `target_logprobs`, or none at all if no entry would hold a token.
    `forced` are the only tokens that can follow the emitted ones, as far as the shard looked ahead.
    """

    tokens: tuple[SampledToken, ...] = ()
    target_logprobs: tuple[float, ...] = ()
    fault: str | None = None
    target_tops: tuple[TopTokens, ...] = ()
    forced: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a step's time went on rank 0, in microseconds."""

    wait_us: int = 0
    inputs_us: int = 0
    forward_us: int = 0
    sample_us: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Rank 0's answer to a step: one `RowOutput` per row, in the plan's order."""

    step: int
    rows: list[RowOutput]
    timings: Timings = Timings()
