"""What TGI's Grafana dashboard asks Prometheus, so that it can be asked without the dashboard.

Where the variable TGI_DASHBOARD names the dashboard's own JSON file, its expressions are taken instead.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

SERVICE = "shardstream"
"""Value of the label `container` that every expression selects by."""

QUANTILES = ("0.5", "0.9", "0.99")
PREFILL, DECODE = 'method="prefill", ', 'method="decode", '

REQUEST_HISTOGRAMS = (
    *("tgi_request_input_length", "tgi_request_generated_tokens", "tgi_request_skipped_tokens"),
    *("tgi_request_duration", "tgi_request_queue_duration", "tgi_request_mean_time_per_token_duration"),
)
STEP_HISTOGRAMS = (
    *(("tgi_batch_inference_duration", PREFILL), ("tgi_batch_inference_duration", DECODE)),
    *(("tgi_batch_forward_duration", DECODE), ("tgi_batch_decode_duration", DECODE)),
    *(("tgi_batch_filter_duration", DECODE), ("tgi_batch_concat_duration", DECODE)),
)


def expressions() -> list[str]:
    """PromQL, with the dashboard's variable filled in."""
    path = os.environ.get("TGI_DASHBOARD")
    found = known_expressions() if path is None else expressions_of(json.loads(Path(path).read_text()))
    return [expression.replace("$service", SERVICE) for expression in found]


def metric_names() -> set[str]:
    return {name for expression in expressions() for name in re.findall(r"tgi_\w+", expression)}


def known_expressions() -> Iterator[str]:
    yield 'sum(increase(tgi_request_success{container="$service"}[1m]))'
    yield 'sum(increase(tgi_request_failure{container="$service"}[1m])) by (err)'
    yield 'sum(increase(tgi_batch_concat{container="$service"}[1m])) by (reason)'
    yield 'count(tgi_request_count{container="$service"})'
    yield 'sum(tgi_queue_size{container="$service"})'
    yield 'avg(tgi_batch_current_size{container="$service"})'
    yield 'avg(tgi_batch_current_max_tokens{container="$service"})'
    lengths = [f'rate(tgi_request_generated_tokens_{part}{{container="$service"}}[10m])' for part in ("sum", "count")]
    yield f"sum(({lengths[0]} / {lengths[1]})>0)"
    for name, method in (*((name, "") for name in REQUEST_HISTOGRAMS), *STEP_HISTOGRAMS):
        series = f'{name}_bucket{{{method}container="$service"}}'
        for quantile in QUANTILES:
            yield f"histogram_quantile({quantile}, sum by (le) (rate({series}[10m])))"
        yield f"sum(increase({series}[5m])) by (le)"


def expressions_of(node: object) -> Iterator[str]:
    """Every `expr` in a dashboard's JSON."""
    if isinstance(node, list):
        for item in node:
            yield from expressions_of(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "expr":
                yield value
            else:
                yield from expressions_of(value)
