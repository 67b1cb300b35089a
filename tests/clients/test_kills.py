"""Clients that die in the middle of a stream."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.server import PATIENCE_S, Server

NUM_CLIENTS = 50
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: close() sends a reset, as the kernel of a machine that lost the process does."""
GROWTH_BYTES = 32 << 20
"""Of 150 killed clients, and noise: 200 kB each would show."""


def test_row_65_killed_clients_leave_nothing_behind(plain_server: Server) -> None:
    kill_clients(plain_server)
    before = resident_bytes(plain_server)

    for _ in range(3):
        kill_clients(plain_server)

    assert resident_bytes(plain_server) - before < GROWTH_BYTES
    answer = httpx.post(
        f"{plain_server.url}/generate",
        json={"inputs": "Hello", "parameters": {"max_new_tokens": 5}},
        timeout=PATIENCE_S,
    )
    assert answer.status_code == 200


def kill_clients(server: Server) -> None:
    """Half of them close in order, half with a reset; all while they are written to."""
    cancelled = metric(server, "shardstream_cancelled_count")
    with ExitStack() as open_clients:
        clients = [open_clients.enter_context(begin_stream(server, index)) for index in range(NUM_CLIENTS)]
        for client in clients:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        for client in clients[::2]:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    wait_until_idle(server)
    assert metric(server, "tgi_queue_size") == 0
    assert metric(server, "shardstream_kv_cache_utilization") == 0
    assert metric(server, "shardstream_cancelled_count") - cancelled == NUM_CLIENTS


def begin_stream(server: Server, index: int) -> socket.socket:
    body = json.dumps({"inputs": f"Story {index}", "parameters": {"max_new_tokens": 1000}, "stream": True}).encode()
    url = urlsplit(server.url)
    path = "/generate_stream" if index % 4 < 2 else "/"
    client = socket.create_connection((url.hostname, url.port), timeout=PATIENCE_S)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while metric(server, "tgi_batch_current_size") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(server, "tgi_batch_current_size") == 0


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def resident_bytes(server: Server) -> int:
    """Of the router."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
