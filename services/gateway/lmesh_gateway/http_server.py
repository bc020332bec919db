"""uvicorn as one part of a process that has its own loop, signals and socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn

from lmesh_gateway.http_protocol import bounded

Asgi = Any  # an ASGI application, in uvicorn's own loose sense


def bind(address: str, *, reuse_port: bool) -> socket.socket:
    """A listening-to-be socket on host:port; OSError when the port is taken.

    With `reuse_port` several processes may share it; without, a second mesh on the same port is refused.
    """
    host, _, port = address.rpartition(":")
    family, kind, protocol, _, target = socket.getaddrinfo(
        host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(target)
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen on {address}: {error.strerror}") from error
    return sock


class HttpServer:
    """Serves one ASGI application on a bound socket."""

    def __init__(
        self,
        app: Asgi,
        sock: socket.socket,
        *,
        drain_timeout_s: float,
        head_timeout_s: float = 10.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=bounded(head_timeout_s),
            ssl_context_factory=None if tls is None else lambda config, default: tls,
            ws="none",
            lifespan="off",
            log_config=None,  # the process's JSON logs
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
        )
        self._server = _Server(config)
        self._socket = sock
        self.port: int = sock.getsockname()[1]
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listens."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        up = asyncio.create_task(self._server.up.wait())
        await asyncio.wait({up, self._task}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if self._task.done():
            self._task.result()

    async def drain(self) -> None:
        """Stops listening, lets open responses end within the drain timeout, then cancels them."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tells that it listens."""
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the process's own lifecycle."""
        yield
