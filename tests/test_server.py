"""The router as its users start it: real processes, real weights, HTTP from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server import PATIENCE_S, WITHOUT_TORCH, Server, is_alive, run_to_its_end, serving, until
from tests.tiny_tokenizers import byte_level

QUESTION = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 20}}


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    with serving("--model-id", str(smollm2), "--dtype", "float32") as running:
        yield running


def stream(url: str, body: object) -> list[dict[str, object]]:
    answer = httpx.post(f"{url}/generate_stream", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"
    frames = answer.text.split("\n\n")
    assert frames.pop() == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def get(server: Server, path: str) -> httpx.Response:
    return httpx.get(server.url + path, timeout=PATIENCE_S)


def test_the_first_request_of_the_readme_streams_tokens(server: Server) -> None:
    events = stream(server.url, QUESTION)

    assert [event["index"] for event in events] == [*range(1, 21)]
    assert events[0]["token"]["text"] == " Paris"
    text = "".join(event["token"]["text"] for event in events)
    assert events[-1]["generated_text"] == text
    assert [event["generated_text"] for event in events[:-1]] == [None] * 19


def test_streaming_and_not_streaming_say_the_same(server: Server) -> None:
    events = stream(server.url, QUESTION)
    answer = httpx.post(f"{server.url}/generate", json=QUESTION, timeout=PATIENCE_S)
    listed = httpx.post(server.url, json=QUESTION, timeout=PATIENCE_S)

    assert answer.json() == {"generated_text": events[-1]["generated_text"]}
    assert listed.json() == [{"generated_text": QUESTION["inputs"] + events[-1]["generated_text"]}]


def test_a_ready_server_says_where_and_what_it_serves(server: Server) -> None:
    log = server.read_log()
    assert "float32 on cpu, 1 rank" in log
    assert "KV capacity" in log
    assert f"curl -N {server.url.removeprefix('http://')}/generate_stream" in log
    assert get(server, "/health").status_code == 200
    assert get(server, "/info").json()["max_total_tokens"] == 8192
    assert "shardstream_step_count" in get(server, "/metrics").text


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="the shards may compute on a GPU")
def test_nothing_of_a_server_on_cpus_interrupts_its_computing_threads(server: Server) -> None:
    processes = [server.process.pid, *server.children()]
    threads = [int(task.name) for pid in processes for task in Path(f"/proc/{pid}/task").iterdir()]

    assert {policy for thread in threads for policy in scheduling_of(thread)} == {os.SCHED_BATCH}


def scheduling_of(thread: int) -> Iterator[int]:
    """Nothing if it has ended since we heard of it."""
    with contextlib.suppress(ProcessLookupError):
        yield os.sched_getscheduler(thread)


def test_clients_that_leave_free_what_they_held(server: Server) -> None:
    endless = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 4000}}
    for _ in range(10):
        with httpx.stream("POST", f"{server.url}/generate_stream", json=endless, timeout=PATIENCE_S) as answer:
            next(answer.iter_lines())

    held = ("tgi_batch_current_size", "tgi_queue_size", "shardstream_kv_cache_utilization")
    until(lambda: _metric(server, "shardstream_cancelled_count") >= 10)
    until(lambda: not any(_metric(server, name) for name in held))


def _metric(server: Server, name: str) -> float:
    text = get(server, "/metrics").text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def test_a_stopped_server_finishes_its_streams_and_leaves_no_shard(smollm2: Path) -> None:
    with serving("--model-id", str(smollm2), "--num-shard", "2") as server:
        shards = server.children()
        results: list[list[dict[str, object]]] = []
        body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 60}}
        client = threading.Thread(target=lambda: results.append(stream(server.url, body)))
        client.start()
        until(lambda: _metric(server, "shardstream_generated_tokens_count") > 0)
        exit_code = server.stop()
        client.join()

        assert exit_code == 0
        assert results[0][-1]["generated_text"]
        assert len(shards) == 2
        assert not any(map(is_alive, shards))


def test_no_shard_outlives_a_router_that_is_killed(smollm2: Path, sockets: Path) -> None:
    where = ("--shard-uds-path", str(sockets))  # which it cannot remove
    with serving("--model-id", str(smollm2), "--num-shard", "2", *where) as server:
        shards = server.children()
        server.stop(signal.SIGKILL)

        assert len(shards) == 2
        until(lambda: not any(map(is_alive, shards)))


@contextlib.contextmanager
def ghost_at(address: Path, vocab_size: int) -> Iterator[None]:
    """A shard without a model, in a process of its own."""
    flags = ("--uds", str(address), "--num-blocks", "256", "--vocab-size", str(vocab_size))
    ghost = subprocess.Popen([sys.executable, "-m", "tests.ghost", *flags], stdout=subprocess.PIPE)
    try:
        assert ghost.stdout is not None
        assert ghost.stdout.readline() == b"ready\n"
        yield
    finally:
        ghost.kill()
        ghost.wait()
        ghost.stdout.close()


def test_the_router_serves_without_torch(tmp_path: Path, sockets: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    address = sockets / "ghost"
    flags = ("--model-id", str(tmp_path), "--shard-addresses", f"unix:{address}")

    with ghost_at(address, vocab_size=402), serving(*flags, code=WITHOUT_TORCH) as server:
        events = stream(server.url, QUESTION)

    assert len(events) == 20


def test_shards_elsewhere_may_serve_the_bundled_model_by_its_name(smollm2: Path, sockets: Path) -> None:
    address = sockets / "ghost"
    flags = ("--model-id", smollm2.name, "--shard-addresses", f"unix:{address}")

    with ghost_at(address, vocab_size=49_152), serving(*flags) as server:
        answer = httpx.post(f"{server.url}/tokenize", json=QUESTION, timeout=PATIENCE_S)
        info = get(server, "/info")

    assert [token["text"] for token in answer.json()] == ["The", " capital", " of", " France", " is"]
    assert info.json()["model_id"] == smollm2.name


def test_a_shard_starts_without_fastapi(smollm2: Path, sockets: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['fastapi', 'starlette', 'uvicorn', 'pydantic', 'router']));"
        "from shard.__main__ import main; main()"
    )
    flags = ("--model-id", str(smollm2), "--address", f"unix:{sockets}/rank-0", "--report")
    shard = subprocess.Popen([sys.executable, "-c", code, *flags], stdout=subprocess.PIPE)
    try:
        assert shard.stdout is not None
        events = (json.loads(line)["event"] for line in shard.stdout)
        assert next(event for event in events if event != "loading") == "ready"
    finally:
        shard.kill()
        shard.wait()
        shard.stdout.close()


def test_a_router_that_is_stopped_while_it_loads_leaves_nothing(smollm2: Path) -> None:
    command = [sys.executable, "-m", "router", "--model-id", str(smollm2), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    server = Server(process, "", log=None)
    until(lambda: bool(server.children()))
    time.sleep(1.0)  # so that it mostly loads; whatever it does by then, the same holds
    children = server.children()

    assert server.stop() == 0
    assert not any(map(is_alive, children))


def assert_one_line_cause(done: subprocess.CompletedProcess[str], cause: str) -> None:
    assert done.returncode not in (0, -signal.SIGKILL)
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert cause in last
    assert "Traceback" not in done.stderr


def test_a_wrong_model_path_is_named() -> None:
    assert_one_line_cause(run_to_its_end("--model-id", "/nowhere/at/all"), "/nowhere/at/all")


@pytest.mark.parametrize("damage", ["truncated", "garbage header"])
def test_damaged_weights_are_named(smollm2: Path, tmp_path: Path, damage: str) -> None:
    for file in smollm2.iterdir():
        if file.suffix != ".safetensors":
            os.symlink(file, tmp_path / file.name)
    weights = next(smollm2.glob("*.safetensors"))
    with weights.open("rb") as source:
        head = source.read(1_000_000)
    (tmp_path / weights.name).write_bytes(head if damage == "truncated" else b"\xff" * 1000)

    assert_one_line_cause(run_to_its_end("--model-id", str(tmp_path)), weights.name)


def test_a_taken_port_is_named_before_anything_is_loaded(smollm2: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_to_its_end("--model-id", str(smollm2), "--hostname", "127.0.0.1", "--port", port)

        assert_one_line_cause(done, port)
        assert "loaded" not in done.stderr


def test_adapters_that_shards_elsewhere_do_not_have_are_named(smollm2: Path, sockets: Path) -> None:
    address = sockets / "ghost"
    flags = ("--model-id", str(smollm2), "--shard-addresses", f"unix:{address}", "--lora-adapters", "poet")

    with ghost_at(address, vocab_size=49_152):
        assert_one_line_cause(run_to_its_end(*flags), "the shards have the LoRA adapters [], not ['poet']")


def test_a_missing_rank_is_named(smollm2: Path, sockets: Path) -> None:
    address = f"unix:{sockets}/nobody"
    done = run_to_its_end("--model-id", str(smollm2), "--shard-addresses", address)

    assert_one_line_cause(done, address)
