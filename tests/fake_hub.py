"""A small Hugging Face hub over real HTTP: one repository, its files, and the answers that a client asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO, COMMIT = "owner/tiny", "c0ffee" + "0" * 34


class FakeHub(ThreadingHTTPServer):
    """Serves `files` as REPO at COMMIT; `status` other than 200 answers everything with it."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.status = 200
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        file = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if self.server.status != 200:
            self._send(self.server.status, b"{}", body)
        elif path == f"/api/models/{REPO}/revision/main":
            self._send(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode(), body)
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            self._send(200, json.dumps([_entry(n, c) for n, c in self.server.files.items()]).encode(), body)
        elif file in self.server.files:
            if body:
                self.server.fetched.append(file)
            self._send(200, self.server.files[file], body, ETag=f'"{_blob(self.server.files[file])}"')
        else:
            self._send(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": _blob(content)}


@contextmanager
def fake_hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    hub = FakeHub(files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
