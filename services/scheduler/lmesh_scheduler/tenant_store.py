"""Tenants' buckets in Redis, so that a restarted scheduler does not begin with full ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from redis.asyncio import Redis

from lmesh_scheduler.limits import Limits
from lmesh_scheduler.scripts import FENCE, INCARNATION_KEY, PREFIX, Call, Script, run

_TTL_MS = 120_000  # after two minutes every bucket is full again
_PUT = Script(
    FENCE + "redis.call('HSET', KEYS[2], unpack(ARGV, 3))\nredis.call('PEXPIRE', KEYS[2], ARGV[2])\nreturn 1\n"
)


def tenant_key(tenant: str) -> str:
    """The key of a tenant's hash."""
    return f"{PREFIX}tenant:{tenant}"


class TenantStore:
    """Levels with the wall clock's time: `wall` in Unix seconds."""

    def __init__(self, redis: Redis, limits: Limits, *, incarnation: int, wall: Callable[[], float]) -> None:
        self._redis, self._limits, self._incarnation, self._wall = redis, limits, incarnation, wall

    async def write(self) -> None:
        """Writes all levels. Raises FencedError, RedisError or OSError."""
        now = self._wall()
        calls = [
            Call(_PUT, [INCARNATION_KEY, tenant_key(tenant)], [self._incarnation, _TTL_MS, what, f"{b.level} {now}"])
            for (tenant, what), b in self._limits.buckets.items()
        ]
        if calls:
            await run(self._redis, calls)

    async def read(self) -> None:
        """Takes over what an earlier scheduler left. Raises RedisError or OSError."""
        now = self._wall()
        for (tenant, what), bucket in self._limits.buckets.items():
            found = cast("bytes | None", await self._redis.hget(tenant_key(tenant), what))  # type: ignore[misc]
            if found is not None:
                level, at = map(float, found.split())
                bucket.level = level + max(0.0, now - at) * bucket.rate  # the next look caps it
