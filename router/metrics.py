"""Counters, gauges and histograms: TGI's under TGI's exact names, ours as `shardstream_*` beside them.

prometheus_client would append `_total` to a counter's name, and TGI's dashboards would find nothing; and its histograms
take locks and build label tuples, several times in a step of a few milliseconds. So all of them are plain numbers here,
exposed by a collector of our own.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

DURATION_BUCKETS_S: Final = tuple(0.0001 * 1.5**k for k in range(1, 36))
BATCH_BUCKETS: Final = tuple(float(size) for size in range(1, 1025))
METHODS: Final = ("prefill", "decode")


class Family(NamedTuple):
    """A metric: its help, its label if it has one, and the values of that label that are shown before they occur."""

    help: str
    label: str | None = None
    values: tuple[str, ...] = ()


COUNTERS: Final[Mapping[str, Family]] = {
    "tgi_request_count": Family("Sequences submitted."),
    "tgi_request_success": Family("Sequences that ended by a rule."),
    "tgi_request_failure": Family(
        "Requests that failed, by cause.",
        "err",
        ("overloaded", "validation", "template", "incomplete", "dropped", "generation"),
    ),
    "tgi_batch_inference_count": Family("Steps sent to the shards.", "method", METHODS),
    "tgi_batch_inference_success": Family("Steps that returned.", "method", METHODS),
    "tgi_batch_inference_failure": Family("Steps lost with their group.", "method", METHODS),
    "tgi_batch_concat": Family("Steps in which sequences joined running ones.", "reason", ("chunking",)),
    "shardstream_step_count": Family("Steps that returned."),
    "shardstream_router_step_seconds_sum": Family("Router time to plan, encode, decode and commit steps."),
    "shardstream_router_publish_seconds_sum": Family("Router time to detokenise tokens and write them to streams."),
    "shardstream_generated_tokens_count": Family("Tokens generated."),
    "shardstream_response_cache_count": Family(
        "Requests that the response cache answered, shared a running answer for, or had computed.",
        "outcome",
        ("hit", "joined", "miss"),
    ),
    "shardstream_cancelled_count": Family("Sequences ended by their client."),
    "shardstream_group_restarts_count": Family("Epochs lost and begun anew."),
    "shardstream_shard_wait_seconds_sum": Family("Rank 0: idle between steps."),
    "shardstream_shard_inputs_seconds_sum": Family("Rank 0: building tensors."),
    "shardstream_shard_forward_seconds_sum": Family("Rank 0: forward passes."),
    "shardstream_shard_sample_seconds_sum": Family("Rank 0: choosing and exchanging tokens."),
}

HISTOGRAMS: Final[Mapping[str, Family]] = {
    "tgi_request_duration": Family("Submit to last token, seconds."),
    "tgi_request_validation_duration": Family("Arrival to submit, seconds."),
    "tgi_request_queue_duration": Family("Submit to first plan, seconds."),
    "tgi_request_inference_duration": Family("First plan to last token, seconds."),
    "tgi_request_mean_time_per_token_duration": Family("Inference time per generated token, seconds."),
    "tgi_batch_inference_duration": Family(
        "Plan, or the output before if later, to output decoded, seconds.", "method", METHODS
    ),
    "tgi_batch_forward_duration": Family("Forward pass on rank 0, seconds.", "method", METHODS),
    "tgi_batch_decode_duration": Family("Choosing tokens on rank 0, seconds.", "method", METHODS),
    "tgi_batch_filter_duration": Family(
        "Committing a step and dropping the sequences that ended with it, seconds.", "method", METHODS
    ),
    "tgi_batch_concat_duration": Family(
        "Building the tensors of a step that sequences joined, on rank 0, seconds; the label says decode, as TGI's.",
        "method",
        ("decode",),
    ),
    "tgi_request_input_length": Family("Prompt tokens."),
    "tgi_request_max_new_tokens": Family("Tokens asked for."),
    "tgi_request_generated_tokens": Family("Tokens generated."),
    "tgi_batch_next_size": Family("Sequences admitted by a step."),
}


@dataclass(frozen=True, slots=True)
class Gauges:
    """What the engine looks like at the moment of a scrape."""

    num_waiting: int = 0
    num_running: int = 0
    num_running_tokens: int = 0
    capacity_tokens: int = 0
    kv_cache_utilization: float = 0.0
    ready: bool = False
    num_admitted_tokens: int = 0
    """This and the following are totals that the scheduler keeps."""
    num_hit_tokens: int = 0
    num_preemptions: int = 0
    num_forced_tokens: int = 0
    num_drafted_tokens: int = 0
    num_rows_by_accepted: tuple[int, ...] = (0,)
    """Of rows with drafts, how many had 0, 1, ... of them accepted."""
    num_emitted_tokens: int = 0
    num_skipped_tokens: int = 0
    """Of them those that no row of their own was needed for."""
    num_rows_by_skipped: tuple[int, ...] = (0, 0)
    """Of rows that emitted several tokens, how many skipped 0, 1, ... of them, or as many as the last or more."""
    num_adapters: int = 0
    """Loaded; 0: there is nothing to tell of them."""
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    cpu_s: float = 0.0
    """CPU time of the event loop's thread since it began: all that the router does for steps, and for requests."""


class Counter:
    """A total that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Histogram:
    """How many observations fell between which bounds, and their sum."""

    __slots__ = ("_bounds", "_nums", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._nums = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """A value on a bound counts as below it."""
        self._nums[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        names = map(floatToGoString, (*self._bounds, math.inf))
        family.add_metric(labels, list(zip(names, accumulate(self._nums), strict=True)), self._sum)


class Metrics(Collector):
    """One process's measurements; all formatting happens at the scrape. Who counts in every step keeps what it counts
    with: finding it by its name costs more than adding to it."""

    def __init__(self, *, max_input_tokens: int, max_total_tokens: int) -> None:
        self.gauges = Gauges()
        self._counters = {
            name: {value: Counter() for value in family.values or ("",)} for name, family in COUNTERS.items()
        }
        bounds = {
            "tgi_request_input_length": _hundredths(max_input_tokens),
            "tgi_request_max_new_tokens": _hundredths(max_total_tokens),
            "tgi_request_generated_tokens": _hundredths(max_total_tokens),
            "tgi_batch_next_size": BATCH_BUCKETS,
        }
        self._histograms = {
            name: {value: Histogram(bounds.get(name, DURATION_BUCKETS_S)) for value in family.values or ("",)}
            for name, family in HISTOGRAMS.items()
        }
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count(self, name: str, amount: float = 1.0, label: str = "") -> None:
        self.counter(name, label).value += amount

    def counter(self, name: str, label: str = "") -> Counter:
        counters = self._counters[name]
        if label not in counters:
            counters[label] = Counter()
        return counters[label]

    def observe(self, name: str, value: float, label: str = "") -> None:
        self.histogram(name, label).observe(value)

    def histogram(self, name: str, label: str = "") -> Histogram:
        return self._histograms[name][label]

    def value(self, name: str, label: str = "") -> float:
        """A counter's value so far."""
        counter = self._counters[name].get(label)
        return 0.0 if counter is None else counter.value

    def render(self, gauges: Gauges) -> bytes:
        """Prometheus text, format 0.0.4."""
        self.gauges = gauges
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        for name, (help_, label, _) in COUNTERS.items():
            family = UnknownMetricFamily(name, help_, labels=[label] if label else [])
            for value, counter in self._counters[name].items():
                family.add_metric([value] if label else [], counter.value)
            yield family
        yield from self._engine_families()
        yield self._skipped_tokens()
        yield from self._gauge_families()
        if self.gauges.num_adapters:
            yield self._adapters()
        yield from self._histogram_families()

    def _engine_families(self) -> Iterator[Metric]:
        gauges = self.gauges
        for name, help_, value in (
            ("shardstream_router_cpu_seconds_sum", "Router: CPU time of the event loop's thread.", gauges.cpu_s),
            ("shardstream_prompt_tokens_count", "Tokens of sequences when admitted.", gauges.num_admitted_tokens),
            ("shardstream_prefix_hit_tokens_count", "Of them found in the prefix index.", gauges.num_hit_tokens),
            (
                "shardstream_preemptions_count",
                "Sequences sent back to the queue for want of blocks.",
                gauges.num_preemptions,
            ),
            ("shardstream_forced_tokens_count", "Tokens a grammar left no choice about.", gauges.num_forced_tokens),
            ("shardstream_drafted_tokens_count", "Tokens guessed ahead.", gauges.num_drafted_tokens),
            ("shardstream_accepted_tokens_count", "Of them those that were right.", _num_accepted(gauges)),
        ):
            yield UnknownMetricFamily(name, help_, value=value)

    def _skipped_tokens(self) -> Metric:
        """Of every row that emitted, as TGI counts: one less than the tokens it gave. Forced tokens spare rows as much
        as accepted guesses do."""
        gauges = self.gauges
        num_rows = gauges.num_emitted_tokens - gauges.num_skipped_tokens
        by_skipped = gauges.num_rows_by_skipped
        buckets = [(f"{num}.0", num_rows - sum(by_skipped[num + 1 :])) for num in range(len(by_skipped) - 1)]
        family = HistogramMetricFamily("tgi_request_skipped_tokens", "Tokens a row emitted beyond its first.")
        family.add_metric([], buckets=[*buckets, ("+Inf", num_rows)], sum_value=gauges.num_skipped_tokens)
        return family

    def _gauge_families(self) -> Iterator[Metric]:
        gauges = self.gauges
        for name, help_, value in (
            ("tgi_queue_size", "Sequences waiting.", gauges.num_waiting),
            ("tgi_batch_current_size", "Sequences running.", gauges.num_running),
            ("tgi_batch_current_max_tokens", "Tokens the running sequences hold.", gauges.num_running_tokens),
            ("tgi_batch_max_total_tokens", "Tokens KV memory holds.", gauges.capacity_tokens),
            ("shardstream_kv_cache_utilization", "Part of KV memory held by sequences.", gauges.kv_cache_utilization),
            ("shardstream_ready", "1 while the group serves.", float(gauges.ready)),
        ):
            yield GaugeMetricFamily(name, help_, value=value)

    def _adapters(self) -> Metric:
        """Under the name by which gateways choose a server that has an adapter in use; the value is the time."""
        gauges = self.gauges
        names = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters with sequences that run or wait.", labels=names)
        running, waiting = ",".join(gauges.running_adapters), ",".join(gauges.waiting_adapters)
        family.add_metric([str(gauges.num_adapters), running, waiting], time.time_ns() / 1e9)
        return family

    def _histogram_families(self) -> Iterator[Metric]:
        for name, (help_, label, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(name, help_, labels=[label] if label else [])
            for value, histogram in self._histograms[name].items():
                histogram.add_to(family, [value] if label else [])
            yield family


def _num_accepted(gauges: Gauges) -> int:
    return sum(num * num_rows for num, num_rows in enumerate(gauges.num_rows_by_accepted))


def _hundredths(limit: int) -> tuple[float, ...]:
    return tuple(limit / 100 * k for k in range(1, 101))
