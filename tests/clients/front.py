"""Hosts that clients have written into their code, on this machine: a proxy that ends TLS itself, whomever a client
wants to reach, and hands what it reads to a server of ours.

    client ─► HTTPS_PROXY: CONNECT host ─► TLS, in the host's name ─► the server
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

HOSTS = ("api-inference.huggingface.co", "router.huggingface.co", "huggingface.co")
PIECE_BYTES = 65_536


def make_certificate(folder: Path) -> Path:
    """A file with a key and a certificate for all hosts, which vouches for itself. Needs openssl."""
    path = folder / "hosts.pem"
    names = ",".join(f"DNS:{host}" for host in HOSTS)
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=tests"
    files = ("-keyout", path, "-out", path, "-addext", f"subjectAltName={names}")
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return path


@contextlib.contextmanager
def fronting(url: str, certificate: Path) -> Iterator[str]:
    """The proxy's URL; behind it every host is the server at `url`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    port = urlsplit(url).port
    assert port is not None
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    ports: list[int] = []

    async def serve() -> None:
        host = await asyncio.start_server(lambda r, w: _join(r, w, port), "127.0.0.1", 0, ssl=context)
        async with host, await asyncio.start_server(lambda r, w: _connect(r, w, _port(host)), "127.0.0.1", 0) as proxy:
            ports.append(_port(proxy))
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(timeout=60)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def _port(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


async def _connect(reader: StreamReader, writer: StreamWriter, port: int) -> None:
    request = await reader.readuntil(b"\r\n\r\n")
    assert request.startswith(b"CONNECT "), request
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
    await _join(reader, writer, port)


async def _join(reader: StreamReader, writer: StreamWriter, port: int) -> None:
    """Hands everything on, both ways, until both have said all."""
    behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.gather(_pump(reader, behind_writer), _pump(behind_reader, writer))


async def _pump(reader: StreamReader, writer: StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while data := await reader.read(PIECE_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()
