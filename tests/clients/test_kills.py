"""Clients that die in the middle of a stream."""

from __future__ import annotations

import json
import os
import socket
import struct
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.server import PATIENCE_S, Server, until

NUM_CLIENTS = 50
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: close() sends a reset, as the kernel of a machine that lost the process does."""
NUM_ROUNDS = 3
GROWTH_BYTES = 1 << 20
"""Of a round of killed clients: 20 kB of each would show."""


def test_row_65_killed_clients_leave_nothing_behind(plain_server: Server) -> None:
    """Memory grows now and then for reasons of its own; what is left behind is so in every round."""
    kill_clients(plain_server)
    resident = [resident_bytes(plain_server)]

    for _ in range(NUM_ROUNDS):
        kill_clients(plain_server)
        resident.append(resident_bytes(plain_server))

    assert min(after - before for before, after in pairwise(resident)) < GROWTH_BYTES
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

    held = ("tgi_batch_current_size", "tgi_queue_size", "shardstream_kv_cache_utilization")
    until(lambda: not any(metric(server, name) for name in held))
    assert metric(server, "shardstream_cancelled_count") - cancelled == NUM_CLIENTS


def begin_stream(server: Server, index: int) -> socket.socket:
    parameters = {"min_new_tokens": 1000, "max_new_tokens": 1000}
    body = json.dumps({"inputs": f"Story {index}", "parameters": parameters, "stream": True}).encode()
    url = urlsplit(server.url)
    path = "/generate_stream" if index % 4 < 2 else "/"
    client = socket.create_connection((url.hostname, url.port), timeout=PATIENCE_S)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def resident_bytes(server: Server) -> int:
    """Of the router."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
