"""grpc.health.v1 for one server; unlike the stock servicer its watches end when the server drains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Status = health_pb2.HealthCheckResponse
# grpc_health ships no type stubs: these name what its messages are.
Request = Any
Response = Any
RpcContext = Any


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Serving status by service name; "" stands for the whole server."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {"": False}
        self._changed = asyncio.Event()
        self._closed = False

    def set(self, name: str, serving: bool) -> None:
        """Sets one service's status and wakes its watchers. After `close` nothing serves any more."""
        self._serving[name] = serving and not self._closed
        self._wake()

    def close(self) -> None:
        """Everything is NOT_SERVING from here on; watches say so and end."""
        self._closed = True
        self._serving = dict.fromkeys(self._serving, False)
        self._wake()

    def serving(self, name: str = "") -> bool:
        """Whether `name` serves."""
        return self._serving.get(name, False)

    async def Check(self, request: Request, context: RpcContext) -> Response:
        """Status of one service; NOT_FOUND for a name that this server does not have."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return self._response(request.service)

    async def List(self, request: Request, context: RpcContext) -> Response:
        """Status of all services."""
        return health_pb2.HealthListResponse(statuses={name: self._response(name) for name in self._serving})

    async def Watch(self, request: Request, context: RpcContext) -> AsyncIterator[Response]:
        """Status of one service now and on each change; ends when the server drains."""
        last = None
        while True:
            changed, response, closed = self._changed, self._response(request.service), self._closed
            if response != last:
                yield response
                last = response
            if closed:
                return
            await changed.wait()

    def _response(self, name: str) -> Response:
        if name not in self._serving:
            return _Status(status=_Status.SERVICE_UNKNOWN)
        return _Status(status=_Status.SERVING if self._serving[name] else _Status.NOT_SERVING)

    def _wake(self) -> None:
        # A fresh event for each change: a watcher that is busy writing still sees that its old one fired.
        self._changed.set()
        self._changed = asyncio.Event()
