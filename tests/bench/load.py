"""Measures a running server: `python -m tests.bench.load --url http://127.0.0.1:8080`.

For each number of streams: that many clients at once, each asking /generate_stream for one greedy text after another.
Prompts are made-up words, cut to their length by the server's own /tokenize, and all different, so that the prefix
cache does not help; end tokens are forbidden, so that all texts are equally long. Rounds alternate (1, 8, 32, 1, 8,
32, ...), so that a machine that slows down slows all of them.

Prints what the clients saw, and what the server's counters say about its host cost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import uvloop

from tests.bench.client import BenchError, Json, Recording, call, record
from tests.bench.report import (
    COST_HEADER,
    SPEED_HEADER,
    Round,
    cost_row,
    growth,
    parse_counters,
    speed_row,
    table,
)

MAX_PROMPT_ATTEMPTS: Final = 20
WARM_UP_TOKENS: Final = 16
CONSONANTS: Final = "bdfgklmnprstvz"
VOWELS: Final = "aeiou"


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the server."""

    url: str
    num_streams: list[int]
    num_prompt_tokens: int
    num_new_tokens: int
    num_shared_tokens: int
    num_requests: int
    num_rounds: int


class Prompts:
    """Texts of an exact number of tokens, no two alike except for a shared beginning."""

    def __init__(self, load: Load, rng: random.Random) -> None:
        self._load = load
        self._rng = rng
        self._shared = self._text("", load.num_shared_tokens) if load.num_shared_tokens else ""

    def next(self) -> str:
        return self._text(self._shared, self._load.num_prompt_tokens)

    def _text(self, beginning: str, num_tokens: int) -> str:
        for _ in range(MAX_PROMPT_ATTEMPTS):
            words = (self._word() for _ in range(num_tokens))
            text = f"{beginning} {' '.join(words)}".strip()
            text = text[: self._tokens(text)[num_tokens - 1]["stop"]]
            if len(self._tokens(text)) == num_tokens:
                return text
        raise BenchError(f"no text of {num_tokens} tokens found in {MAX_PROMPT_ATTEMPTS} attempts")

    def _word(self) -> str:
        return "".join(self._rng.choice(CONSONANTS) + self._rng.choice(VOWELS) for _ in range(3))

    def _tokens(self, text: str) -> Json:
        return json.loads(call(self._load.url, "/tokenize", {"inputs": text}))


def main(argv: Sequence[str] | None = None) -> int:
    load, seed = parse(argv)
    try:
        info = json.loads(call(load.url, "/info"))
        shared = f" ({load.num_shared_tokens} shared)" if load.num_shared_tokens else ""
        print(
            f"{load.url}: {info['model_id']}; prompts of {load.num_prompt_tokens} tokens{shared}, "
            f"{load.num_new_tokens} new, greedy; {load.num_rounds} rounds, {load.num_requests} per stream; seed {seed}",
            flush=True,
        )
        rounds = uvloop.run(measure(load, Prompts(load, random.Random(seed))))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(table(SPEED_HEADER, [speed_row(n, rounds[n]) for n in load.num_streams]))
    print()
    print(table(COST_HEADER, [cost_row(n, rounds[n]) for n in load.num_streams]))
    return 0


def parse(argv: Sequence[str] | None) -> tuple[Load, int]:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description="Measures a running server.")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--streams", default="1,8,32", help="numbers of streams, with commas (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--shared-prefix", type=int, default=0, help="prompt tokens that all prompts share")
    parser.add_argument("--requests", type=int, default=2, help="requests of each stream, one after the other")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each number of streams")
    # A second run with the same prompts would find them in the prefix cache.
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6, help="of the prompts; default: the clock")
    args = parser.parse_args(argv)
    if not 0 <= args.shared_prefix < args.prompt_tokens:
        parser.error("--shared-prefix must be less than --prompt-tokens")
    load = Load(
        url=args.url.rstrip("/"),
        num_streams=[int(n) for n in args.streams.split(",")],
        num_prompt_tokens=args.prompt_tokens,
        num_new_tokens=args.new_tokens,
        num_shared_tokens=args.shared_prefix,
        num_requests=args.requests,
        num_rounds=args.repeats,
    )
    return load, args.seed


async def measure(load: Load, prompts: Prompts) -> dict[int, list[Round]]:
    """Rounds by number of streams, after one short round that is thrown away."""
    widest = max(load.num_streams)
    await _run(load, [[prompts.next()] for _ in range(widest)], WARM_UP_TOKENS)
    rounds: dict[int, list[Round]] = {n: [] for n in load.num_streams}
    for _ in range(load.num_rounds):
        for n in load.num_streams:
            rounds[n].append(await _round(load, [[prompts.next() for _ in range(load.num_requests)] for _ in range(n)]))
    return rounds


async def _round(load: Load, prompts: list[list[str]]) -> Round:
    """One measurement: `prompts[i]` are asked one after the other on stream i."""
    before = parse_counters(call(load.url, "/metrics").decode())
    cpu_s = time.process_time()
    recordings = await _run(load, prompts, load.num_new_tokens)
    cpu_s = time.process_time() - cpu_s
    after = parse_counters(call(load.url, "/metrics").decode())
    return Round([recording.understood() for recording in recordings], growth(before, after), cpu_s)


async def _run(load: Load, prompts: list[list[str]], num_new_tokens: int) -> list[Recording]:
    parameters = {"max_new_tokens": num_new_tokens, "min_new_tokens": num_new_tokens, "do_sample": False}

    async def client(texts: list[str]) -> list[Recording]:
        return [await record(load.url, {"inputs": text, "parameters": parameters}) for text in texts]

    answered = await asyncio.gather(*(client(texts) for texts in prompts))
    return [recording for one in answered for recording in one]


if __name__ == "__main__":
    sys.exit(main())
