"""A gRPC server with health, reflection, keepalive and a drain in the right order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection as grpc_reflection

from lmesh_chassis.health import HealthServicer
from lmesh_chassis.interceptors import standard_interceptors
from lmesh_chassis.keepalive import DEFAULT_MAX_MESSAGE_BYTES, Keepalive, server_options
from lmesh_chassis.tls import PLAIN, Tls

_log = logging.getLogger(__name__)


class GrpcServer:
    """One listening gRPC server.

    `address` is host:port (port 0 picks one) or unix:path; `domain` is the ErrorInfo domain such as `lmesh.worker`.
    Nothing serves until `set_serving`.
    """

    def __init__(
        self,
        address: str,
        *,
        domain: str,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        reuse_port: bool = False,
        reflection: bool = True,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_send_bytes: int | None = None,
        keepalive: Keepalive | None = None,
        tls: Tls = PLAIN,
    ) -> None:
        self._tls = tls
        self._address = address
        self._reflection = reflection
        self._names: list[str] = []
        self._health = HealthServicer()
        options = [
            *server_options(keepalive or Keepalive(), max_message_bytes, max_send_bytes),
            ("grpc.so_reuseport", 1 if reuse_port else 0),
        ]
        self._server = grpc.aio.server(interceptors=[*standard_interceptors(domain), *interceptors], options=options)
        self.port = 0

    def add(self, adder: Callable[[Any, Any], None], servicer: object, service_full_name: str) -> None:
        """Adds a service, `adder` being the generated add_XServicer_to_server; it starts NOT_SERVING."""
        adder(servicer, self._server)
        self._names.append(service_full_name)
        self._health.set(service_full_name, False)

    async def start(self) -> int:
        """Listens; returns the bound port (0 for a unix socket). OSError when the address cannot be bound."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._reflection:
            names = [*self._names, health.SERVICE_NAME, grpc_reflection.SERVICE_NAME]
            grpc_reflection.enable_server_reflection(names, self._server)
        try:
            bound = self._listen()
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}") from error
        await self._server.start()
        self.port = 0 if self._address.startswith("unix:") else bound
        return self.port

    def _listen(self) -> int:
        credentials = self._tls.server_credentials()
        if credentials is None:
            return self._server.add_insecure_port(self._address)
        return self._server.add_secure_port(self._address, credentials)

    def set_serving(self, name: str, serving: bool) -> None:
        """Sets the health of one service by its full name, or of the server as a whole by ""."""
        self._health.set(name, serving)

    def set_all_serving(self, serving: bool) -> None:
        """Sets the health of every service and of the server as a whole."""
        for name in ("", *self._names):
            self._health.set(name, serving)

    def stop_serving(self) -> None:
        """Everything is NOT_SERVING from here on, for good; health watches hear it and end. Calls go on."""
        self._health.close()

    def serving(self, name: str = "") -> bool:
        """Whether health says SERVING for `name`."""
        return self._health.serving(name)

    async def drain(self, timeout_s: float) -> None:
        """NOT_SERVING, then no new calls, then wait for the open ones up to `timeout_s`, then cancel them and stop.

        A link that never ends by itself must be ended by its owner before, or it costs the whole timeout.
        """
        self._health.close()
        # grpc.aio's stop closes the listener at once, waits for the calls in flight and cancels what is left.
        await self._server.stop(timeout_s)
        _log.info("server stopped", extra={"address": self._address})
