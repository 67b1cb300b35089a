"""Numbers to read: percentiles, counters and tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.bench.client import StreamTimes

Counters = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Round:
    """All streams of one measurement, and what it cost the server and this client."""

    streams: list[StreamTimes]
    counted: Counters
    client_cpu_s: float

    @property
    def num_tokens(self) -> int:
        return sum(len(stream.token_at) for stream in self.streams)

    @property
    def tokens_per_s(self) -> float:
        begun = min(stream.sent_at for stream in self.streams)
        return self.num_tokens / (max(stream.token_at[-1] for stream in self.streams) - begun)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def parse_counters(text: str) -> dict[str, float]:
    """The samples of a Prometheus page that have no labels."""
    samples = (line.split() for line in text.splitlines() if line and not line.startswith("#") and "{" not in line)
    return {sample[0]: float(sample[1]) for sample in samples if len(sample) >= 2}


def growth(before: Counters, after: Counters) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned so that it also reads well in a terminal."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    rule = " | ".join("-" * (width - 1) + ":" for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def speed_row(name: str, rounds: Sequence[Round]) -> list[str]:
    """Throughput is the median round's; times are of all rounds together."""
    streams = [stream for round_ in rounds for stream in round_.streams]
    first = [stream.first_token_s * 1e3 for stream in streams]
    gaps = [gap * 1e3 for stream in streams for gap in stream.gaps_s]
    times = [percentile(values, percent) for values in (first, gaps) for percent in (50, 99)]
    rates = [round_.tokens_per_s for round_ in rounds]
    return [
        name,
        f"{statistics.median(rates):.0f}",
        f"{min(rates):.0f}-{max(rates):.0f}",
        *(f"{time_ms:.1f}" for time_ms in times),
    ]


SPEED_HEADER = ("streams", "tok/s", "range", "TTFT p50 ms", "p99", "ITL p50 ms", "p99")


def cost_row(name: str, rounds: Sequence[Round]) -> list[str]:
    """What the server says it spent; `-` where it does not count."""

    def counted(name: str) -> float:
        return sum(round_.counted.get(f"shardstream_{name}", float("nan")) for round_ in rounds)

    num_steps, num_tokens = counted("step_count"), counted("generated_tokens_count")
    publish_s, router_s = counted("router_publish_seconds_sum"), counted("router_cpu_seconds_sum")
    shard_s = [counted(f"shard_{part}_seconds_sum") for part in ("wait", "inputs", "forward", "sample")]
    client_s, num_events = sum(r.client_cpu_s for r in rounds), sum(r.num_tokens for r in rounds)
    return [
        name,
        _ratio(num_steps, len(rounds), 1.0, 0),
        _ratio(num_tokens, num_steps, 1.0, 1),
        _ratio(router_s, num_steps, 1e6, 0),
        _ratio(router_s, num_tokens, 1e6, 1),
        _ratio(publish_s, num_tokens, 1e6, 1),
        *(_ratio(seconds, num_steps, 1e3, 2) for seconds in shard_s),
        _ratio(client_s, num_events, 1e6, 1),
    ]


COST_HEADER = (
    "streams",
    "steps",
    "tok/step",
    "router cpu us/step",
    "us/token",
    "publish us/token",
    "shard wait ms/step",
    "inputs",
    "forward",
    "sample",
    "client us/token",
)


def _ratio(amount: float, per: float, scale: float, digits: int) -> str:
    if not per > 0 or amount != amount:
        return "-"
    return f"{amount / per * scale:.{digits}f}"
