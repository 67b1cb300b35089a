"""What is measured: which texts are asked for, and what number is read off the answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tests.bench.peers.dialects import Answer
from tests.bench.peers.engines import MAX_STREAMS
from tests.bench.prompts import Prompts

NUM_PROMPT_TOKENS: Final = 64
NUM_NEW_TOKENS: Final = 128
NUM_LONG_PROMPT_TOKENS: Final = 512
NUM_CACHED_TOKENS: Final = 496
NUM_SHARED_TOKENS: Final = 2000
NUM_NEW_TOKENS_AFTER_SHARED: Final = 64

Groups = list[list[str]]
"""Prompts: the inner lists one after the other, the texts of each at once."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that is read, and how to read it. Of seconds and bytes little is good, of tokens per second much."""

    name: str
    title: str
    unit: str
    more_is_better: bool


@dataclass(frozen=True, slots=True)
class Case:
    """A measurement: `prompts` makes the texts, `value` reads the measure off the answers to each group."""

    measure: Measure
    num_new_tokens: int
    prompts: Callable[[Prompts], Groups]
    value: Callable[[Sequence[Sequence[Answer]]], float]
    once: bool = False
    """In the first turn only: who keeps no prefixes takes a minute for it, and then differences are large."""


READY: Final = Measure("ready", "seconds to the first answer", "s", more_is_better=False)
PEAK_RSS: Final = Measure("peak_rss", "peak RSS", "MB", more_is_better=False)


def cases(num_streams: Sequence[int]) -> list[Case]:
    """Everything that is asked of an engine, in order."""
    return [
        *(_throughput(n) for n in num_streams),
        Case(Measure("ttft_512", "TTFT, 512 new", "ms", more_is_better=False), 2, _unseen, _first_token_ms),
        Case(Measure("ttft_cached", "TTFT, 496 of 512 cached", "ms", more_is_better=False), 2, _seen, _second_time_ms),
        Case(
            Measure("shared_2000", f"{MAX_STREAMS} streams after 2,000 shared", "tokens/s", more_is_better=True),
            NUM_NEW_TOKENS_AFTER_SHARED,
            _sharing,
            lambda groups: tokens_per_s(groups[-1]),
            once=True,
        ),
    ]


def tokens_per_s(answers: Sequence[Answer]) -> float:
    """Of texts asked for at once: from the first question to the last token, prompts included."""
    took_s = max(answer.event_at[-1] for answer in answers) - min(answer.sent_at for answer in answers)
    return sum(answer.num_tokens for answer in answers) / took_s


def _throughput(num_streams: int) -> Case:
    measure = Measure(
        f"streams_{num_streams}", f"{num_streams} stream{'s'[: num_streams > 1]}", "tokens/s", more_is_better=True
    )
    # Few texts are over too soon to say what else the machine did meanwhile.
    num_groups = max(1, min(3, 16 // num_streams))

    def prompts(source: Prompts) -> Groups:
        return [[source.text(NUM_PROMPT_TOKENS) for _ in range(num_streams)] for _ in range(num_groups)]

    return Case(measure, NUM_NEW_TOKENS, prompts, lambda groups: statistics.median(map(tokens_per_s, groups)))


def _unseen(source: Prompts) -> Groups:
    return [[source.text(NUM_LONG_PROMPT_TOKENS)] for _ in range(5)]


def _seen(source: Prompts) -> Groups:
    """The ends differ, so that what is cached is the prefix and not the answer."""
    beginning = source.text(NUM_CACHED_TOKENS)
    return [[source.text(NUM_LONG_PROMPT_TOKENS, beginning)] for _ in range(13)]


def _sharing(source: Prompts) -> Groups:
    """One text first, as when a system prompt has been seen before."""
    beginning = source.text(NUM_SHARED_TOKENS)
    texts = [source.text(NUM_SHARED_TOKENS + NUM_PROMPT_TOKENS, beginning) for _ in range(MAX_STREAMS + 1)]
    return [texts[:1], texts[1:]]


def _first_token_ms(groups: Sequence[Sequence[Answer]]) -> float:
    return statistics.median(answer.first_token_s for answers in groups for answer in answers) * 1e3


def _second_time_ms(groups: Sequence[Sequence[Answer]]) -> float:
    return _first_token_ms(groups[1:])
