"""What a client asked for, and the one sequence of tokens that grows out of it.

A `Request` is frozen: validation has filled in every default. A `Sequence` is the only mutable thing the scheduler
works on, and the only record of a generation: a shard's state can be rebuilt from it at any time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from router.core.speculation import Speculation


class FinishReason(Enum):
    """Why a sequence ended; the values are the native API's words."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Defaults are neutral: each rule is off."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    watermark_gamma: float = 0.0
    watermark_delta: float = 0.0
    top_n_tokens: int = 0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    prompt_top_n_tokens: int = 0
    """Likeliest tokens to return with each scored prompt token."""

    @property
    def looks_back(self) -> bool:
        """Whether choosing a token needs the tokens before it, beyond the model's own logits."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or self.watermark_delta != 0.0
            or self.no_repeat_ngram_size > 0
            or bool(self.bad_words)
        )


@dataclass(frozen=True, slots=True)
class BeamSettings:
    """Of a beam search, with transformers' meaning."""

    num_beams: int
    length_penalty: float = 1.0
    """Beams are compared by their log-probability divided by their length to this power."""
    early_stopping: bool | Literal["never"] = False
    """Whether the search ends with the `num_beams`-th beam that ended, or when a better one is unlikely (False), or
    when it is as good as impossible ("never")."""


@dataclass(frozen=True, slots=True)
class Request:
    """A client's validated demand for one sequence (best_of and n make several)."""

    request_id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    keep_stop: bool = True
    """Whether the text up to and including a stop string is kept (native API) or ends before it (OpenAI's)."""
    prompt_logprobs: bool = False
    priority: int = 0
    """Higher is served first."""
    cache_salt: bytes = b""
    """Prefix-cache blocks are shared only between requests of equal salt."""
    trace_id: str = ""
    """The client's trace that this is part of, for logs; empty: none."""
    grammar: str = ""
    """What the generated tokens must conform to, in the shards' own notation; empty: no restriction."""
    beams: BeamSettings | None = None
    """Search for the likeliest sequence; None: take its tokens one by one."""
    adapter: int = 0
    """Which of the group's adapters changes the model for it, counted from 1; 0: none."""

    @property
    def prefix_salt(self) -> bytes:
        """What requests must have in common to share blocks: the adapter too, which made what is in them."""
        return self.adapter.to_bytes(4, "little") + self.cache_salt


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One growing list of tokens and where the scheduler stands with it.

    tokens   [ prompt ............ | generated .. | forced ] (in flight: sampled on the device, not yet known here)
             [ num_scored ....................... ]           nothing is left to learn of these
             [ num_planned ............. ]                    KV written by plans already sent

    Forced tokens are known before a row has come to them, because a grammar leaves no other choice. They are fed like
    any known token; what the model thinks of them is learnt meanwhile.
    """

    request: Request
    tokens: list[int]
    state: SequenceState = SequenceState.WAITING
    arrival: int = 0
    """Order of arrival among the scheduler's sequences; ties of priority are broken by it."""
    seat: int | None = None
    blocks: list[int] = field(default_factory=list)
    num_planned: int = 0
    num_in_flight: int = 0
    """Tokens being sampled by plans whose step has not returned; those that are forced are known and do not count."""
    num_scored: int = field(init=False)
    """Leading tokens whose log-probability is known or was not asked for. Those of a prompt have none or are received
    in order, and so a replay does not ask twice."""
    num_drafts: int = 0
    """Guessed tokens that the row in flight verifies."""
    speculation: Speculation | None = None
    """Where the guesses come from; made when first needed."""
    num_registered_blocks: int = 0
    """Leading blocks already in the prefix index."""
    block_keys: list[bytes] = field(default_factory=list)
    """Prefix-index keys of the leading full blocks, computed once."""
    num_hit_tokens: int = 0
    """Tokens found in the prefix index when first admitted."""
    num_admissions: int = 0
    num_admitted_tokens: int = 0
    """Tokens known when last admitted: there are blocks for all of them."""
    num_preemptions: int = 0
    num_deaths: int = 0
    """Group deaths in a row at which this sequence was in flight, without a token in between."""
    finish_reason: FinishReason | None = None
    max_num_tokens: int = field(init=False)
    """Length at which the sequence ends by itself, as far as is known."""
    order: tuple[int, int] = field(init=False)
    """Place in the order of service, smallest first: higher priority, then earlier arrival. Unique."""

    def __post_init__(self) -> None:
        self.max_num_tokens = len(self.request.prompt) + self.request.max_new_tokens
        self.num_scored = 1 if self.request.prompt_logprobs else len(self.request.prompt)
        self.order = (-self.request.priority, self.arrival)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def num_to_feed(self) -> int:
        """Known or sampled tokens that another row would feed; 0 if what is in flight certainly ends the sequence."""
        end = len(self.tokens) + self.num_in_flight
        if end >= self.max_num_tokens:  # the last token is never fed
            end = self.max_num_tokens - 1
        return end - self.num_planned if end > self.num_planned else 0
