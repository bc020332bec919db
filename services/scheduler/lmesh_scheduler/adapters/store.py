"""The registry in Redis: one hash, a field a version. It has no TTL: what is published stays until it is deleted."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Sequence
from dataclasses import asdict
from typing import cast

from redis.asyncio import Redis

from lmesh_scheduler.adapters.registry import Published
from lmesh_scheduler.scripts import FENCE, INCARNATION_KEY, PREFIX, Call, Script, run

ADAPTERS_KEY = f"{PREFIX}adapters"

# KEYS: the incarnation, the hash. ARGV: incarnation, then fields and values, or fields.
_PUT = Script(FENCE + "redis.call('HSET', KEYS[2], unpack(ARGV, 2))\nreturn 1\n")
_DELETE = Script(FENCE + "redis.call('HDEL', KEYS[2], unpack(ARGV, 2))\nreturn 1\n")


def _field(entry: Published) -> str:
    return json.dumps([entry.tenant, entry.model, entry.name, entry.version])


class AdapterStore:
    """Written before a publication or a deletion is confirmed. All raise FencedError, RedisError or OSError."""

    def __init__(self, redis: Redis, *, incarnation: int) -> None:
        self._redis, self._incarnation = redis, incarnation

    async def put(self, entry: Published) -> None:
        """Writes a version."""
        arguments: list[str | int | bytes] = [self._incarnation, _field(entry), json.dumps(asdict(entry))]
        await run(self._redis, [Call(_PUT, [INCARNATION_KEY, ADAPTERS_KEY], arguments)])

    async def delete(self, entries: Sequence[Published]) -> None:
        """Forgets versions."""
        arguments: list[str | int | bytes] = [self._incarnation, *map(_field, entries)]
        await run(self._redis, [Call(_DELETE, [INCARNATION_KEY, ADAPTERS_KEY], arguments)])


async def read_adapters(redis: Redis) -> list[Published]:
    """What was published. Raises RedisError or OSError."""
    found = await cast("Awaitable[dict[bytes, bytes]]", redis.hgetall(ADAPTERS_KEY))
    return [Published(**json.loads(text)) for text in found.values()]
