"""Counters, gauges and histograms: TGI's under TGI's exact names, ours as `shardstream_*` beside them.

prometheus_client would append `_total` to a counter's name, and TGI's dashboards would find nothing; so counters are
plain numbers here, exposed by a collector of our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.registry import Collector

DURATION_BUCKETS_S: Final = tuple(0.0001 * 1.5**k for k in range(1, 36))
BATCH_BUCKETS: Final = tuple(float(2**k) for k in range(11))

COUNTERS: Final[Mapping[str, tuple[str, str | None]]] = {
    "tgi_request_count": ("Sequences submitted.", None),
    "tgi_request_success": ("Sequences that ended by a rule.", None),
    "tgi_request_failure": ("Requests that failed, by cause.", "err"),
    "tgi_batch_inference_count": ("Steps sent to the shards.", "method"),
    "tgi_batch_inference_success": ("Steps that returned.", "method"),
    "tgi_batch_inference_failure": ("Steps lost with their group.", "method"),
    "tgi_batch_concat": ("Sequences that joined running ones, by reason.", "reason"),
    "shardstream_step_count": ("Steps that returned.", None),
    "shardstream_router_step_seconds_sum": ("Router time to plan, encode, decode and commit steps.", None),
    "shardstream_router_publish_seconds_sum": ("Router time to detokenise and publish tokens.", None),
    "shardstream_generated_tokens_count": ("Tokens generated.", None),
    "shardstream_prompt_tokens_count": ("Prompt tokens of admitted sequences.", None),
    "shardstream_prefix_hit_tokens_count": ("Prompt tokens found in the prefix index.", None),
    "shardstream_preemptions_count": ("Sequences sent back to the queue for want of blocks.", None),
    "shardstream_cancelled_count": ("Sequences ended by their client.", None),
    "shardstream_group_restarts_count": ("Epochs lost and begun anew.", None),
    "shardstream_shard_wait_seconds_sum": ("Rank 0: idle between steps.", None),
    "shardstream_shard_inputs_seconds_sum": ("Rank 0: building tensors.", None),
    "shardstream_shard_forward_seconds_sum": ("Rank 0: forward passes.", None),
    "shardstream_shard_sample_seconds_sum": ("Rank 0: choosing and exchanging tokens.", None),
}

DURATIONS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "tgi_request_duration": ("Submit to last token, seconds.", ()),
    "tgi_request_validation_duration": ("Arrival to submit, seconds.", ()),
    "tgi_request_queue_duration": ("Submit to first plan, seconds.", ()),
    "tgi_request_inference_duration": ("First plan to last token, seconds.", ()),
    "tgi_request_mean_time_per_token_duration": ("Inference time per generated token, seconds.", ()),
    "tgi_batch_inference_duration": ("Plan sent to output decoded, seconds.", ("method",)),
    "tgi_batch_forward_duration": ("Forward pass on rank 0, seconds.", ("method",)),
    "tgi_batch_decode_duration": ("Choosing tokens on rank 0, seconds.", ("method",)),
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


@dataclass(slots=True)
class Counter:
    """A number that only grows, under one label value or none."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, amount: float = 1.0, label: str = "") -> None:
        self.values[label] = self.values.get(label, 0.0) + amount


class Metrics(Collector):
    """One process's measurements. Counting costs a dictionary update; all formatting happens at the scrape."""

    def __init__(self, *, max_input_tokens: int, max_total_tokens: int) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.gauges = Gauges()
        self._counters = {name: Counter({} if label else {"": 0.0}) for name, (_, label) in COUNTERS.items()}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._histograms = {
            name: Histogram(name, help_, labels, buckets=DURATION_BUCKETS_S, registry=self._registry)
            for name, (help_, labels) in DURATIONS.items()
        }
        for name, help_, buckets in (
            ("tgi_request_input_length", "Prompt tokens.", _hundredths(max_input_tokens)),
            ("tgi_request_max_new_tokens", "Tokens asked for.", _hundredths(max_total_tokens)),
            ("tgi_request_generated_tokens", "Tokens generated.", _hundredths(max_total_tokens)),
            ("tgi_batch_next_size", "Sequences admitted by a step.", BATCH_BUCKETS),
        ):
            self._histograms[name] = Histogram(name, help_, buckets=buckets, registry=self._registry)

    def count(self, name: str, amount: float = 1.0, label: str = "") -> None:
        self._counters[name].add(amount, label)

    def observe(self, name: str, value: float, label: str = "") -> None:
        histogram = self._histograms[name]
        if label:
            histogram = histogram.labels(label)
        histogram.observe(value)

    def value(self, name: str, label: str = "") -> float:
        """A counter's value so far."""
        return self._counters[name].values.get(label, 0.0)

    def render(self, gauges: Gauges) -> bytes:
        """Prometheus text, format 0.0.4."""
        self.gauges = gauges
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        for name, (help_, label) in COUNTERS.items():
            family = UnknownMetricFamily(name, help_, labels=[label] if label else [])
            for value, amount in self._counters[name].values.items():
                family.add_metric([value] if label else [], amount)
            yield family
        yield from self._gauge_families()

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


def _hundredths(limit: int) -> tuple[float, ...]:
    return tuple(limit / 100 * k for k in range(1, 101))
