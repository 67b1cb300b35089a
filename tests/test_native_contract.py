"""The native contract on real weights: numbers equal transformers', watermarks show, killed clients leave nothing,
and TGI's dashboard finds its data.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, WatermarkDetector, WatermarkingConfig

from tests import grafana
from tests.server import PATIENCE_S, Server, serving, until

Json = dict[str, Any]

TOLERANCE = 1e-4
GAMMA, DELTA = 0.25, 4.0
NUM_CLIENTS = 50
PROMPT = "The lighthouse keeper wrote every evening into the same book:"
MAX_ROUNDS = 8
MAX_GROWTH_BYTES = 1 << 20
"""Of a round of killed clients: 20 kB of each would show."""
MAX_STEPS = 100
"""Behind the death of clients whose sequences would take 2,000."""


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    limits = ("--max-concurrent-requests", str(NUM_CLIENTS), "--max-total-tokens", "2048")
    watermark = ("--watermark-gamma", str(GAMMA), "--watermark-delta", str(DELTA))
    with serving("--model-id", str(smollm2), "--dtype", "float32", *limits, *watermark) as running:
        yield running


def generate(server: Server, inputs: str, **parameters: object) -> Json:
    answer = httpx.post(
        f"{server.url}/generate",
        json={"inputs": inputs, "parameters": {"details": True, **parameters}},
        timeout=PATIENCE_S,
    )
    assert answer.status_code == 200, answer.text
    details: Json = answer.json()["details"]
    return details


def metrics_of(server: Server) -> str:
    return httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text


def metric(server: Server, name: str) -> float:
    return value_in(metrics_of(server), name)


def value_in(metrics: str, name: str) -> float:
    return next(float(line.split()[1]) for line in metrics.splitlines() if line.startswith(f"{name} "))


# Numbers


def forward_logprobs(model: Path, token_ids: list[int]) -> Tensor:
    """[len(token_ids), vocabulary]: what transformers says of the token behind each."""
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: Tensor = causal_lm(torch.tensor([token_ids])).logits[0]
    return logits.log_softmax(-1)


def test_details_agree_with_a_forward_pass(server: Server, smollm2: Path) -> None:
    """Of the model's own logits, whatever the request does to them before it draws."""
    shaping = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    wanted = {"seed": 2**64 - 1, "max_new_tokens": 24, "top_n_tokens": 5}

    details = generate(server, PROMPT, decoder_input_details=True, **shaping, **wanted)

    prefill, tokens = details["prefill"], details["tokens"]
    assert details["seed"] == 2**64 - 1
    assert prefill[0]["logprob"] is None
    assert "".join(token["text"] for token in prefill) == PROMPT
    ids = [token["id"] for token in (*prefill, *tokens)]
    logprobs = forward_logprobs(smollm2, ids)[:-1]
    expected = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert [token["logprob"] for token in (*prefill[1:], *tokens)] == pytest.approx(expected, abs=TOLERANCE)
    best = logprobs[len(prefill) - 1 :].topk(5)
    for top_tokens, likeliest, scores in zip(details["top_tokens"], best.indices, best.values, strict=True):
        assert [token["id"] for token in top_tokens] == likeliest.tolist()
        assert [token["logprob"] for token in top_tokens] == pytest.approx(scores.tolist(), abs=TOLERANCE)


def test_streams_say_the_same_as_details(server: Server) -> None:
    parameters = {"do_sample": True, "seed": 11, "max_new_tokens": 16, "top_n_tokens": 2}
    details = generate(server, PROMPT, **parameters)

    body = {"inputs": PROMPT, "parameters": parameters | {"details": True}}
    stream = httpx.post(f"{server.url}/generate_stream", json=body, timeout=PATIENCE_S)

    events = [json.loads(event.removeprefix("data: ")) for event in stream.text.split("\n\n")[:-1]]
    assert [event["token"]["id"] for event in events] == [token["id"] for token in details["tokens"]]
    streamed = [event["token"]["logprob"] for event in events]
    assert streamed == pytest.approx([token["logprob"] for token in details["tokens"]], abs=TOLERANCE)
    assert [len(event["top_tokens"]) for event in events] == [len(tops) for tops in details["top_tokens"]]
    assert events[-1]["details"]["seed"] == 11
    assert events[-1]["details"]["input_length"] == details["prompt_tokens"]


# Watermark


def test_transformers_detects_the_watermark(server: Server, smollm2: Path) -> None:
    documented = WatermarkingConfig(
        greenlist_ratio=GAMMA, bias=DELTA, hashing_key=15485863, seeding_scheme="lefthash", context_width=1
    )
    detector = WatermarkDetector(AutoConfig.from_pretrained(smollm2), "cpu", documented)
    drawn = {"do_sample": True, "temperature": 1.2, "seed": 5, "max_new_tokens": 48}

    marked = generate(server, PROMPT, watermark=True, **drawn)
    plain = generate(server, PROMPT, **drawn)

    def is_detected(details: Json) -> bool:
        return bool(detector(torch.tensor([[token["id"] for token in details["tokens"]]]))[0])

    assert is_detected(marked)
    assert not is_detected(plain)


# Clients that are killed


class StreamingClient:
    """A client that has read its first token and is about to die."""

    def __init__(self, server: Server) -> None:
        url = httpx.URL(server.url)
        self._socket = socket.create_connection((url.host, url.port), timeout=PATIENCE_S)
        body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 2000}})
        headers = ("host: x", "content-type: application/json", f"content-length: {len(body)}")
        self._socket.sendall("\r\n".join(("POST /generate_stream HTTP/1.1", *headers, "", body)).encode())

    def read_first_event(self) -> None:
        received = b""
        while b"\n\n" not in received.partition(b"\r\n\r\n")[2]:
            part = self._socket.recv(4096)
            assert part, received
            received += part
        assert received.startswith(b"HTTP/1.1 200"), received

    def die(self, *, reset: bool) -> None:
        """With an RST, as a killed process with unread data, or with a FIN, as one that ends."""
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


def kill_clients(server: Server) -> int:
    """Returns when nothing of them is left, and how many steps that took. Every permit is taken meanwhile, so a lost
    one shows in the next round."""
    cancelled_before = metric(server, "shardstream_cancelled_count")
    clients = [StreamingClient(server) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.read_first_event()
    num_steps_before = metric(server, "shardstream_step_count")
    for index, client in enumerate(clients):
        client.die(reset=index % 2 == 0)
    until(lambda: is_idle(server))
    assert metric(server, "shardstream_cancelled_count") - cancelled_before == NUM_CLIENTS
    return int(metric(server, "shardstream_step_count") - num_steps_before)


def is_idle(server: Server) -> bool:
    metrics = metrics_of(server)
    names = ("tgi_batch_current_size", "tgi_queue_size", "shardstream_kv_cache_utilization")
    return not any(value_in(metrics, name) for name in names)


def resident_bytes(server: Server) -> int:
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def num_open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def test_clients_killed_inside_their_streams_leave_nothing(server: Server) -> None:
    """In the best of some rounds: while a busy machine holds up the clients or the test, steps go on, and memory grows
    now and then for reasons of its own. What is really left behind, or waited for, is so in every round."""
    num_open = num_open_files(server)
    kill_clients(server)
    num_steps, growth_bytes = [], []

    for _ in range(MAX_ROUNDS):
        resident = resident_bytes(server)
        num_steps.append(kill_clients(server))
        growth_bytes.append(resident_bytes(server) - resident)
        if min(num_steps) < MAX_STEPS and min(growth_bytes) < MAX_GROWTH_BYTES:
            break

    assert min(num_steps) < MAX_STEPS
    assert min(growth_bytes) < MAX_GROWTH_BYTES
    until(lambda: num_open_files(server) <= num_open)
    assert generate(server, PROMPT, max_new_tokens=4)["generated_tokens"] == 4


# The dashboard


class Prometheus:
    """A Prometheus that scrapes the server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[float]:
        """Values now. Raises AssertionError when the expression does not parse."""
        response = httpx.get(f"{self._url}/api/v1/query", params={"query": expression}, timeout=PATIENCE_S)
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            response.raise_for_status()  # it still starts, and says so in plain text
        answer = response.json()
        assert answer["status"] == "success", answer
        return [float(series["value"][1]) for series in answer["data"]["result"]]

    def is_up(self) -> bool:
        try:
            return self.query("up") == [1.0]
        except httpx.HTTPError:
            return False


@contextlib.contextmanager
def scraping(server: Server, directory: Path) -> Iterator[Prometheus]:
    url = httpx.URL(server.url)
    target = {"targets": [f"{url.host}:{url.port}"], "labels": {"container": grafana.SERVICE}}
    config = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
        "scrape_configs": [{"job_name": "router", "static_configs": [target]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    process, prometheus = start_prometheus(directory)
    try:
        yield prometheus
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def start_prometheus(directory: Path) -> tuple[subprocess.Popen[bytes], Prometheus]:
    """On a port that nobody has; it ends at once if somebody has taken it in between."""
    for _ in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"),
                *(f"--web.listen-address={address}", "--log.level=error"),
            ]
        )
        prometheus = Prometheus(f"http://{address}")
        until(lambda ended=process.poll, is_up=prometheus.is_up: ended() is not None or is_up())
        if process.poll() is None:
            return process, prometheus
    raise AssertionError("Prometheus does not start")


def put_under_mixed_load(server: Server) -> None:
    """Long and short, drawn and greedy, invalid, and ended by their clients; some join while others run."""
    bodies: list[Json] = [
        {"inputs": PROMPT, "parameters": {"max_new_tokens": 20}},
        {"inputs": "a", "parameters": {"max_new_tokens": 12, "do_sample": True}},
        {"inputs": PROMPT * 4, "parameters": {"max_new_tokens": 5}},
        {"inputs": PROMPT, "parameters": {"best_of": 2, "do_sample": True, "max_new_tokens": 6}},
        {"inputs": "a", "parameters": {"temperature": -1}},
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        calls = [pool.submit(httpx.post, f"{server.url}/generate", json=b, timeout=PATIENCE_S) for b in bodies * 2]
        statuses = {call.result().status_code for call in calls}
    assert statuses == {200, 422}
    client = StreamingClient(server)
    client.read_first_event()
    client.die(reset=True)


def expressions_without_data(prometheus: Prometheus) -> list[str]:
    wanted = [*grafana.expressions(), f'sum(increase(tgi_request_success{{container="{grafana.SERVICE}"}}[1m])) > 0']
    answers = {expression: prometheus.query(expression) for expression in wanted}
    return [e for e, values in answers.items() if not values or all(value != value for value in values)]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus, of Debian's package of that name")
def test_tgis_dashboard_shows_data(server: Server, tmp_path: Path) -> None:
    """Sooner or later: a scrape that a busy machine was too slow for leaves a hole, and a minute later there must have
    been other requests."""
    assert len(grafana.expressions()) >= 45
    with scraping(server, tmp_path) as prometheus:
        put_under_mixed_load(server)

        deadline = time.monotonic() + PATIENCE_S
        while (missing := expressions_without_data(prometheus)) and time.monotonic() < deadline:
            time.sleep(0.5)
            put_under_mixed_load(server)

    assert missing == []
