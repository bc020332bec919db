"""Prometheus metrics: the RPC metrics of every service, and a small HTTP page for services without HTTP."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

RPCS = Counter("lmesh:grpc_requests", "gRPC calls served, by method and final code.", ["method", "code"])
RPC_SECONDS = Histogram("lmesh:grpc_request_seconds", "Duration of gRPC calls served.", ["method"])

CONTENT_TYPE = CONTENT_TYPE_LATEST
_MAX_HEAD_BYTES = 16 * 1024
_READ_TIMEOUT_S = 5.0


def render(registry: CollectorRegistry = REGISTRY) -> bytes:
    """The /metrics page; over all processes of the service when PROMETHEUS_MULTIPROC_DIR is set."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_process(pid: int) -> None:
    """Drops a dead process's live gauges in multiprocess mode; its counters stay."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        mark_process_dead(pid)  # type: ignore[no-untyped-call]


async def serve(
    port: int,
    *,
    host: str = "127.0.0.1",
    healthy: Callable[[], bool] = lambda: True,
    registry: CollectorRegistry = REGISTRY,
) -> MetricsServer:
    """Serves /metrics, /health and /healthz (200 or 503); port 0 picks one, see `MetricsServer.port`."""
    server = MetricsServer(healthy, registry)
    await server.start(host, port)
    return server


class MetricsServer:
    """A page for scrapers and probes: GET only, one request a connection."""

    def __init__(self, healthy: Callable[[], bool], registry: CollectorRegistry) -> None:
        self._healthy = healthy
        self._registry = registry
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listens; OSError when the port is taken."""
        self._server = await asyncio.start_server(self._answer, host, port, limit=_MAX_HEAD_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stops listening."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
            writer.write(self._respond(head.split(b"\r\n", 1)[0].decode("latin-1")))
            await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # a scraper that went away or does not speak HTTP
        finally:
            writer.close()

    def _respond(self, request_line: str) -> bytes:
        method, _, rest = request_line.partition(" ")
        path = rest.split(" ")[0].split("?")[0]
        if method != "GET":
            return _response("405 Method Not Allowed", b"GET only\n")
        if path == "/metrics":
            return _response("200 OK", render(self._registry), CONTENT_TYPE)
        if path in ("/health", "/healthz"):
            return _response("200 OK", b"ok\n") if self._healthy() else _response("503 Service Unavailable", b"no\n")
        return _response("404 Not Found", b"try /metrics or /health\n")


def _response(status: str, body: bytes, content_type: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
