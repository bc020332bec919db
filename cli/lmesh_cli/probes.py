"""Whether a service is ready: asked of the service itself, never guessed from its process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from lmesh_cli import access, mesh_link

Probe = Callable[[], Awaitable[bool]]
_TIMEOUT_S = 2.0


def grpc_health(address: str) -> Probe:
    """Ready when grpc.health.v1 at host:port says SERVING."""

    async def probe() -> bool:
        return await mesh_link.is_serving(address)

    return probe


def http_health(address: str) -> Probe:
    """Ready when GET /health at host:port answers 200."""

    async def probe() -> bool:
        return await _status_line(address, "/health") == 200

    return probe


def models(address: str, ids: frozenset[str]) -> Probe:
    """Ready when the gateway at host:port serves all of `ids`."""

    async def probe() -> bool:
        served = await mesh_link.served_models(address)
        # Without a key nobody can ask; then the gateway's own health has to do.
        return served is None or ids <= served

    return probe


def everywhere(probe: Probe, processes: int) -> Probe:
    """Ready when all of so many processes that share a port are.

    The kernel chooses who answers a connection, so each round asks far more often than there are processes.
    """

    async def asked() -> bool:
        return all(await asyncio.gather(*(probe() for _ in range(1 if processes == 1 else 5 * processes))))

    return asked


def all_of(*probes: Probe) -> Probe:
    """Ready when all are, asked in order."""

    async def probe() -> bool:
        for one in probes:
            if not await one():
                return False
        return True

    return probe


async def _status_line(address: str, path: str) -> int:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            tls = access.http_context()
            name = (access.server_name() or host) if tls is not None else None
            reader, writer = await asyncio.open_connection(host, int(port), ssl=tls, server_hostname=name)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
                return int((await reader.readline()).split()[1])
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError, IndexError):
        return 0
