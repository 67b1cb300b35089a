"""`python -m tests.bench.peers`: measures everybody who is installed and writes the report under build/peers."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

import uvloop
from tokenizers import Tokenizer

from shard.checkpoint import resolve
from tests.bench.peers import machine
from tests.bench.peers.cases import PEAK_RSS, READY, cases
from tests.bench.peers.engines import BUILD, KV_TOKENS, MODEL_ID, NUM_THREADS, engines, versions
from tests.bench.peers.report import Run, as_json, markdown
from tests.bench.peers.turns import Bench, Plan
from tests.bench.prompts import Prompts

RESULTS: Final = BUILD / "results.json"
REPORT: Final = BUILD / "results.md"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    checkpoint = resolve(MODEL_ID).directory
    everybody = {engine.name: engine for engine in engines(checkpoint)}
    everything = {case.measure.name: case for case in cases(arguments.streams)}
    plan = Plan(_chosen(everything, arguments.cases), arguments.repeats, BUILD / "logs")
    plan.logs.mkdir(parents=True, exist_ok=True)
    run = Run(_chosen(everybody, arguments.engines), [*(case.measure for case in plan.cases), PEAK_RSS, READY])
    run.failures.update({e.name: f"not installed: {', '.join(map(str, e.missing))}" for e in run.engines if e.missing})
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    begun_at = time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt):  # What has been measured by then is told.
        bench = Bench(plan, run, _prompts(checkpoint, arguments.seed), lambda line: print(line, flush=True))
        uvloop.run(bench.take_turns())
    _write(run, time.perf_counter() - begun_at)
    return 0 if run.turns else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("--engines", type=_names, default=[], help="names with commas, as in engines.py; default: all")
    parser.add_argument("--cases", type=_names, default=[], help="names with commas, as in cases.py; default: all")
    parser.add_argument("--streams", type=_numbers, default=[1, 8, 32], help="numbers with commas (default: 1,8,32)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every engine (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    return parser.parse_args(argv)


Thing = TypeVar("Thing")


def _chosen(things: Mapping[str, Thing], names: Sequence[str]) -> list[Thing]:
    """Those named, or all; in their own order."""
    unknown = set(names) - things.keys()
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(things)}")
    return [thing for name, thing in things.items() if not names or name in names]


def _prompts(checkpoint: Path, seed: int) -> Prompts:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return Prompts(lambda text: [end for _, end in tokenizer.encode(text).offsets], random.Random(seed))


def _write(run: Run, took_s: float) -> None:
    facts = {
        "model": MODEL_ID,
        "machine": machine.describe(),
        "load": f"greedy, to the full length; KV memory for {KV_TOKENS:,} tokens; {NUM_THREADS} threads",
        "run": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {took_s / 60:.0f} minutes",
        "versions": ", ".join(versions()),
    }
    RESULTS.write_text(json.dumps(as_json(run, facts), indent=1))
    REPORT.write_text(report := markdown(run, facts))
    print(f"\n{report}\nwritten to {REPORT} and {RESULTS}")


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
