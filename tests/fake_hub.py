"""A model hub on a local port: the few routes huggingface_hub needs to describe and download one repository."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

MODEL_ID = "somebody/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Holds `files` of `MODEL_ID` at `COMMIT`, known as the branches main and v1, and remembers what was asked."""

    files: Mapping[str, bytes]
    token: str | None = None
    url: str = ""
    downloads: list[str] = field(default_factory=list)
    status: int = 200
    """What /api answers with if not 200."""

    def answer(self, path: str, authorization: str | None) -> tuple[int, Mapping[str, str], bytes]:
        if self.token is not None and authorization != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        match path.partition("?")[0].removeprefix("/").split("/", 5):
            case ["api", "models", "somebody", "some-model", *rest]:
                return self._describe(rest)
            case ["somebody", "some-model", "resolve", commit, *name] if commit == COMMIT:
                return self._file("/".join(name))
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _describe(self, rest: list[str]) -> tuple[int, Mapping[str, str], bytes]:
        if self.status != 200:
            return self.status, {}, b"{}"
        if rest[:1] == ["tree"]:
            listing = [{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in self.files.items()]
            return 200, {}, json.dumps(listing).encode()
        if rest not in ([], ["revision", "main"], ["revision", "v1"], ["revision", COMMIT]):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        siblings = [{"rfilename": name} for name in self.files]
        return 200, {}, json.dumps({"id": MODEL_ID, "sha": COMMIT, "siblings": siblings}).encode()

    def _file(self, name: str) -> tuple[int, Mapping[str, str], bytes]:
        self.downloads.append(name)
        body = self.files[name]
        return 200, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": COMMIT}, body


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._reply(with_body=False)

        def do_GET(self) -> None:
            self._reply(with_body=True)

        def _reply(self, *, with_body: bool) -> None:
            status, headers, body = hub.answer(self.path, self.headers["Authorization"])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
