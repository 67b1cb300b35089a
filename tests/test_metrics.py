"""/metrics: TGI's names and buckets, and numbers that mean what they say."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from router.engine import Engine
from router.metrics import Gauges, Metrics
from tests import grafana
from tests.engines import collect, engine_over, greedy
from tests.ghost import GhostSettings, ghost_group
from tests.tiny_tokenizers import byte_level, tokenizer_of

DURATION_BOUNDS = [0.0001 * 1.5**k for k in range(1, 36)]
INPUT_BOUNDS = [2.0 * k for k in range(1, 101)]
TOTAL_BOUNDS = [3.0 * k for k in range(1, 101)]

COUNTERS = {
    "tgi_request_count": [""],
    "tgi_request_success": [""],
    "tgi_request_failure": [
        f'{{err="{cause}"}}'
        for cause in ("overloaded", "validation", "template", "incomplete", "dropped", "generation")
    ],
    "tgi_batch_inference_count": ['{method="prefill"}', '{method="decode"}'],
    "tgi_batch_inference_success": ['{method="prefill"}', '{method="decode"}'],
    "tgi_batch_inference_failure": ['{method="prefill"}', '{method="decode"}'],
    "tgi_batch_concat": ['{reason="chunking"}'],
}
GAUGES = (
    *("tgi_queue_size", "tgi_batch_current_size", "tgi_batch_current_max_tokens", "tgi_batch_max_total_tokens"),
    *("shardstream_kv_cache_utilization", "shardstream_ready"),
)
HISTOGRAMS: dict[str, tuple[list[float], tuple[str, ...]]] = {
    "tgi_request_duration": (DURATION_BOUNDS, ()),
    "tgi_request_validation_duration": (DURATION_BOUNDS, ()),
    "tgi_request_queue_duration": (DURATION_BOUNDS, ()),
    "tgi_request_inference_duration": (DURATION_BOUNDS, ()),
    "tgi_request_mean_time_per_token_duration": (DURATION_BOUNDS, ()),
    "tgi_request_input_length": (INPUT_BOUNDS, ()),
    "tgi_request_max_new_tokens": (TOTAL_BOUNDS, ()),
    "tgi_request_generated_tokens": (TOTAL_BOUNDS, ()),
    "tgi_request_skipped_tokens": ([0.0], ()),
    "tgi_batch_next_size": ([float(size) for size in range(1, 1025)], ()),
    "tgi_batch_inference_duration": (DURATION_BOUNDS, ("prefill", "decode")),
    "tgi_batch_forward_duration": (DURATION_BOUNDS, ("prefill", "decode")),
    "tgi_batch_decode_duration": (DURATION_BOUNDS, ("prefill", "decode")),
    "tgi_batch_filter_duration": (DURATION_BOUNDS, ("prefill", "decode")),
    "tgi_batch_concat_duration": (DURATION_BOUNDS, ("decode",)),
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(max_input_tokens=200, max_total_tokens=300)


def text_of(metrics: Metrics, gauges: Gauges | None = None) -> str:
    return metrics.render(gauges or Gauges()).decode()


def value(text: str, series: str) -> float:
    [line] = [line for line in text.splitlines() if line.rpartition(" ")[0] == series]
    return float(line.rpartition(" ")[2])


def bounds(text: str, name: str, method: str) -> list[float]:
    label = f'method="{method}"' if method else ""
    found = [
        re.search(r'le="([^"]+)"', line)
        for line in text.splitlines()
        if line.startswith(f"{name}_bucket")
        if label in line
    ]
    return [float(match[1]) for match in found if match]


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms_have_tgis_buckets_before_anything_is_observed(metrics: Metrics, name: str) -> None:
    text = text_of(metrics)
    expected, methods = HISTOGRAMS[name]

    assert f"# TYPE {name} histogram" in text
    for method in methods or ("",):
        assert bounds(text, name, method) == pytest.approx([*expected, float("inf")])
        labels = f'{{method="{method}"}}' if method else ""
        assert value(text, f"{name}_count{labels}") == 0


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_have_tgis_names_and_show_every_label_from_the_start(metrics: Metrics, name: str) -> None:
    series = [line.rpartition(" ")[0] for line in text_of(metrics).splitlines() if re.match(rf"{name}[ {{]", line)]

    assert series == [name + labels for labels in COUNTERS[name]]


@pytest.mark.parametrize("name", GAUGES)
def test_gauges_are_gauges(metrics: Metrics, name: str) -> None:
    assert f"# TYPE {name} gauge\n{name} 0.0\n" in text_of(metrics)


def test_the_engines_numbers_are_shown_as_they_are_at_the_scrape(metrics: Metrics) -> None:
    gauges = Gauges(1, 2, 3, 4, 0.5, True, num_admitted_tokens=7, num_hit_tokens=6, num_preemptions=5)

    text = text_of(metrics, gauges)

    assert [value(text, name) for name in GAUGES] == [1, 2, 3, 4, 0.5, 1]
    assert value(text, "shardstream_prompt_tokens_count") == 7
    assert value(text, "shardstream_prefix_hit_tokens_count") == 6
    assert value(text, "shardstream_preemptions_count") == 5


def test_skipped_tokens_are_counted_by_rows(metrics: Metrics) -> None:
    """Ten rows gave one token each, two gave two, one three and one nine."""
    gauges = Gauges(num_emitted_tokens=10 + 4 + 3 + 9, num_skipped_tokens=2 + 2 + 8, num_rows_by_skipped=(0, 2, 1, 1))

    text = text_of(metrics, gauges)

    name = "tgi_request_skipped_tokens"
    assert [value(text, f'{name}_bucket{{le="{le}"}}') for le in ("0.0", "1.0", "2.0", "+Inf")] == [10, 12, 13, 14]
    assert (value(text, f"{name}_count"), value(text, f"{name}_sum")) == (14, 12)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_promtool_finds_nothing_to_complain_about(metrics: Metrics) -> None:
    metrics.count("tgi_request_failure", label="healthcheck")

    done = subprocess.run(["promtool", "check", "metrics"], input=metrics.render(Gauges()), capture_output=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_metric_of_tgis_dashboard_is_there(metrics: Metrics) -> None:
    shown = set(re.findall(r"^(\w+)", text_of(metrics), re.MULTILINE))

    assert grafana.metric_names() - shown == set()
    assert len(grafana.metric_names()) >= 20


def test_the_known_expressions_are_those_of_a_dashboard() -> None:
    panel = {"panels": [{"targets": [{"expr": "a"}, {"refId": "B"}]}, {"panels": [{"targets": [{"expr": "b"}]}]}]}

    assert list(grafana.expressions_of(panel)) == ["a", "b"]


# What the engine counts


def scrape(engine: Engine, metrics: Metrics) -> str:
    return text_of(metrics, engine.gauges)


def serve(metrics: Metrics, **settings: int) -> Iterator[str]:
    """Scrapes of an engine over a ghost, after each of three groups of requests."""
    tokenizer = tokenizer_of(byte_level())

    async def run() -> list[str]:
        async with (
            ghost_group(GhostSettings(**settings)) as group,
            engine_over(group.addresses, tokenizer, max_step_tokens=32, max_seats=16, metrics=metrics) as engine,
        ):
            alone = engine.submit(greedy([*range(1, 10)], 12))
            await anext(aiter(alone))
            joining = engine.submit(greedy([*range(1, 10)], 3))
            await asyncio.gather(collect(alone), collect(joining))
            first = scrape(engine, metrics)
            await asyncio.gather(*(collect(engine.submit(greedy([n] * 20, 30))) for n in range(1, 9)))
            return [first, scrape(engine, metrics)]

    yield from asyncio.run(run())


def test_the_life_of_sequences_is_counted(metrics: Metrics) -> None:
    first, second = serve(metrics, num_blocks=40)

    assert value(first, "tgi_request_success") == 2
    assert value(first, 'tgi_batch_concat{reason="chunking"}') == 1
    assert value(first, 'tgi_batch_concat_duration_count{method="decode"}') == 1
    assert value(first, "shardstream_prompt_tokens_count") == 18
    assert value(first, "shardstream_prefix_hit_tokens_count") == 8
    assert value(first, "shardstream_preemptions_count") == 0
    assert value(first, "tgi_request_skipped_tokens_count") == value(first, "shardstream_generated_tokens_count") == 15
    steps = sum(
        value(first, f'tgi_batch_filter_duration_count{{method="{method}"}}') for method in ("prefill", "decode")
    )
    assert steps == value(first, "shardstream_step_count")

    assert value(second, "shardstream_preemptions_count") > 0
    assert value(second, "tgi_request_success") == 10


def test_an_observation_counts_in_every_bucket_that_reaches_up_to_it(metrics: Metrics) -> None:
    for length in (1, 2, 2.5, 1000):
        metrics.observe("tgi_request_input_length", length)

    text = text_of(metrics)
    counts = [value(text, f'tgi_request_input_length_bucket{{le="{bound}"}}') for bound in ("2.0", "4.0", "200.0")]
    assert counts == [2, 3, 3]
    assert value(text, 'tgi_request_input_length_bucket{le="+Inf"}') == 4
    assert value(text, "tgi_request_input_length_sum") == 1005.5


def test_the_threads_cpu_time_is_told(metrics: Metrics) -> None:
    assert value(text_of(metrics, Gauges(cpu_s=1.5)), "shardstream_router_cpu_seconds_sum") == 1.5
