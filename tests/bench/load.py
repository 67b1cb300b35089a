"""Measures a running server: `python -m tests.bench.load --url http://127.0.0.1:8080`.

For each number of streams: that many clients at once, each asking /generate_stream for one greedy text after another.
Prompts are made-up words, cut to their length by the server's own /tokenize, and all different, so that the prefix
cache does not help; end tokens are forbidden, so that all texts are equally long. Rounds alternate (1, 8, 32, 1, 8,
32, ...), so that a machine that slows down slows all of them.

With --grammar each of these is measured twice, as free text and as a JSON object of twenty fields, which ends or is cut
at the same length.

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
from typing import Final, NamedTuple

import uvloop

from tests.bench.client import BenchError, Recording, call, record
from tests.bench.prompts import Prompts, TokenEnds
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

WARM_UP_TOKENS: Final = 16
FIELDS: Final = {
    f"{name}_{index}": schema
    for index in range(4)
    for name, schema in (
        ("customer_name", {"type": "string", "maxLength": 20}),
        ("number_of_items", {"type": "integer", "minimum": 0, "maximum": 999}),
        ("is_delivered", {"type": "boolean"}),
        ("colour", {"enum": ["red", "green", "blue"]}),
        ("price", {"type": "number", "minimum": 0, "maximum": 999}),
    )
}
SCHEMA: Final = {"type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False}


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
    compares_grammar: bool = False

    @property
    def cases(self) -> list[Case]:
        kinds = (False, True) if self.compares_grammar else (False,)
        return [Case(n, is_json) for n in self.num_streams for is_json in kinds]


class Case(NamedTuple):
    """What a round is about."""

    num_streams: int
    is_json: bool = False

    def __str__(self) -> str:
        return f"{self.num_streams} json" if self.is_json else str(self.num_streams)


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
        rounds = uvloop.run(measure(load, Prompts(_asking(load.url), random.Random(seed))))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(table(SPEED_HEADER, [speed_row(str(case), rounds[case]) for case in load.cases]))
    print()
    print(table(COST_HEADER, [cost_row(str(case), rounds[case]) for case in load.cases]))
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
    parser.add_argument("--grammar", action="store_true", help="compare free text with structured output")
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
        compares_grammar=args.grammar,
    )
    return load, args.seed


async def measure(load: Load, prompts: Prompts) -> dict[Case, list[Round]]:
    """After one short round of each kind that is thrown away."""
    shared = prompts.text(load.num_shared_tokens) if load.num_shared_tokens else ""

    def texts(num_texts: int) -> list[str]:
        return [prompts.text(load.num_prompt_tokens, shared) for _ in range(num_texts)]

    most = max(load.num_streams)
    for is_json in {case.is_json: None for case in load.cases}:
        await _run(load, Case(most, is_json), [texts(1) for _ in range(most)], WARM_UP_TOKENS)
    rounds: dict[Case, list[Round]] = {case: [] for case in load.cases}
    for _ in range(load.num_rounds):
        for case in load.cases:
            rounds[case].append(await _round(load, case, [texts(load.num_requests) for _ in range(case.num_streams)]))
    return rounds


def _asking(url: str) -> TokenEnds:
    """The server's own tokenizer."""
    return lambda text: [token["stop"] for token in json.loads(call(url, "/tokenize", {"inputs": text}))]


async def _round(load: Load, case: Case, prompts: list[list[str]]) -> Round:
    """One measurement: `prompts[i]` are asked one after the other on stream i."""
    before = parse_counters(call(load.url, "/metrics").decode())
    cpu_s = time.process_time()
    recordings = await _run(load, case, prompts, load.num_new_tokens)
    cpu_s = time.process_time() - cpu_s
    after = parse_counters(call(load.url, "/metrics").decode())
    return Round([recording.understood() for recording in recordings], growth(before, after), cpu_s)


async def _run(load: Load, case: Case, prompts: list[list[str]], num_new_tokens: int) -> list[Recording]:
    length = {"grammar": {"type": "json", "value": SCHEMA}} if case.is_json else {"min_new_tokens": num_new_tokens}
    parameters = {"max_new_tokens": num_new_tokens, "do_sample": False, **length}

    async def client(texts: list[str]) -> list[Recording]:
        return [await record(load.url, {"inputs": text, "parameters": parameters}) for text in texts]

    answered = await asyncio.gather(*(client(texts) for texts in prompts))
    return [recording for one in answered for recording in one]


if __name__ == "__main__":
    sys.exit(main())
