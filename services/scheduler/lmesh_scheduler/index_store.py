"""The prefix index in Redis: one set of hashes a worker's boot, written behind, gone by itself with the boot."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Iterator
from itertools import islice
from typing import cast

from redis.asyncio import Redis

from lmesh_scheduler.prefix_index import Boot, Changes, PrefixIndex
from lmesh_scheduler.scripts import FENCE, INCARNATION_KEY, PREFIX, Call, Script, run

_CHUNK = 4096  # hashes of one call; Lua unpacks at most some 8000

# KEYS: the incarnation, the set. ARGV: incarnation, TTL in ms, then hashes.
_DROP = Script(FENCE + "redis.call('DEL', KEYS[2])\nreturn 1\n")
_ADD = Script(
    FENCE + "redis.call('SADD', KEYS[2], unpack(ARGV, 3))\nredis.call('PEXPIRE', KEYS[2], ARGV[2])\nreturn 1\n"
)
_REMOVE = Script(FENCE + "redis.call('SREM', KEYS[2], unpack(ARGV, 3))\nreturn 1\n")
_KEEP = Script(FENCE + "redis.call('PEXPIRE', KEYS[2], ARGV[2])\nreturn 1\n")


def index_key(boot: Boot) -> str:
    """The key of a boot's set."""
    return f"{PREFIX}kv:{boot[0]}:{boot[1]}"


class IndexStore:
    """Writes what has changed since the last time; a write that fails is made good by writing all of it."""

    def __init__(self, redis: Redis, index: PrefixIndex, *, incarnation: int, ttl_s: float) -> None:
        self._redis, self._index = redis, index
        self._head = (incarnation, round(ttl_s * 1e3))
        self._known: set[Boot] = set()

    async def write(self) -> None:
        """Brings Redis up to date. Raises FencedError, RedisError or OSError."""
        boots = set(self._index.boots())
        calls = [self._call(_DROP, boot, ()) for boot in self._known - boots]
        for boot in boots:
            changes = self._index.take_changes(boot)
            calls += self._calls(boot, changes) if changes else [self._call(_KEEP, boot, ())]
        try:
            await run(self._redis, calls)
        except BaseException:
            for boot in boots:
                self._index.retell(boot)
            raise
        self._known = boots

    def _calls(self, boot: Boot, changes: Changes) -> list[Call]:
        calls = [self._call(_DROP, boot, ())] if changes.whole else []
        calls += [self._call(_REMOVE, boot, part) for part in _parts(changes.removed)]
        return calls + [self._call(_ADD, boot, part) for part in _parts(changes.added)]

    def _call(self, script: Script, boot: Boot, hashes: Iterable[bytes]) -> Call:
        return Call(script, [INCARNATION_KEY, index_key(boot)], [*self._head, *hashes])


async def read_index(redis: Redis, boot: Boot) -> set[bytes]:
    """What an earlier scheduler wrote of a boot. Raises RedisError or OSError."""
    return await cast("Awaitable[set[bytes]]", redis.smembers(index_key(boot)))


def _parts(hashes: set[bytes]) -> Iterator[list[bytes]]:
    rest = iter(hashes)
    while part := list(islice(rest, _CHUNK)):
        yield part
