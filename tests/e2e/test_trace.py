"""One trace from the client to the engine step, received by a real OTLP/HTTP endpoint."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.mesh import MODEL, SOURCE, running_mesh

WANTED = {"gateway.generate", "scheduler.queue", "worker.generate", "engine.step"}


class Collector(ThreadingHTTPServer):
    """Keeps the spans that services export."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, bytes, bytes, bytes]] = []  # name, trace id, span id, parent id
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += [(s.name, s.trace_id, s.span_id, s.parent_span_id) for s in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Quiet."""


def test_one_trace_from_client_to_engine_step(tmp_path: Path) -> None:
    collector = Collector()
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = {f"LMESH_{service}_OTLP_ENDPOINT": collector.endpoint for service in ("GATEWAY", "SCHEDULER", "WORKER")}
    trace_id, client_span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with running_mesh(tmp_path, "--model", f"{MODEL}={SOURCE}", **endpoint) as mesh:
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "temperature": 0}
        headers = {"traceparent": f"00-{trace_id}-{client_span}-01"}
        assert httpx.post(f"{mesh.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    # `lmesh down` flushed every exporter; what is still in a socket arrives at once.
    deadline = time.monotonic() + 20
    while not {s[0] for s in collector.spans} >= WANTED and time.monotonic() < deadline:
        time.sleep(0.05)
    collector.shutdown()

    ours = {name: (span, parent) for name, trace, span, parent in collector.spans if trace.hex() == trace_id}
    assert set(ours) >= WANTED
    known = {span for span, _ in ours.values()} | {bytes.fromhex(client_span)}
    assert all(parent in known for _, parent in ours.values())
    assert ours["engine.step"][1] == ours["worker.generate"][0]
