"""The fleet in Redis: one hash a worker, gone by itself when the worker is silent, and the set of their ids."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import cast

from redis.asyncio import Redis

from lmesh_scheduler.fleet import Worker
from lmesh_scheduler.prefix_index import Boot
from lmesh_scheduler.scripts import FENCE, INCARNATION_KEY, PREFIX, Call, Script, run

FLEET_KEY = f"{PREFIX}fleet"

# KEYS: the incarnation, the set or hash. ARGV: incarnation, TTL in ms, then members, or fields and values.
_PUT = "redis.call('DEL', KEYS[2])\nif #ARGV < 3 then return 1 end\nredis.call('%s', KEYS[2], unpack(ARGV, 3))\n"
_EXPIRE = "redis.call('PEXPIRE', KEYS[2], ARGV[2])\nreturn 1\n"
PUT_SET = Script(FENCE + _PUT % "SADD" + _EXPIRE)
PUT_HASH = Script(FENCE + _PUT % "HSET" + _EXPIRE)


def worker_key(worker_id: str) -> str:
    """The key of a worker's hash."""
    return f"{PREFIX}worker:{worker_id}"


class FleetStore:
    """Writes the registry for other readers, and for the next scheduler, which then knows whom to expect."""

    def __init__(self, redis: Redis, *, incarnation: int, ttl_s: float) -> None:
        self._redis, self._head = redis, (incarnation, round(ttl_s * 1e3))

    async def write(self, workers: list[Worker]) -> None:
        """Writes all workers in one round trip. Raises FencedError, RedisError or OSError."""
        ids = [worker.hello.worker_id for worker in workers]
        calls = [Call(PUT_SET, [INCARNATION_KEY, FLEET_KEY], [*self._head, *ids])]
        for worker in workers:
            items = (item for pair in _fields(worker).items() for item in pair)
            keys = [INCARNATION_KEY, worker_key(worker.hello.worker_id)]
            calls.append(Call(PUT_HASH, keys, [*self._head, *items]))
        await run(self._redis, calls)


async def read_fleet(redis: Redis) -> dict[Boot, str]:
    """The model of each worker's boot that was there a moment ago. Raises RedisError or OSError."""
    members = await cast("Awaitable[set[bytes]]", redis.smembers(FLEET_KEY))
    ids = sorted(member.decode() for member in members)
    async with redis.pipeline(transaction=False) as pipe:
        for worker_id in ids:
            pipe.hmget(worker_key(worker_id), "epoch", "model")
        found = await pipe.execute()
    return {(i, epoch.decode()): model.decode() for i, (epoch, model) in zip(ids, found, strict=True) if epoch}


def _fields(worker: Worker) -> dict[str, str | int]:
    hello, beat = worker.hello, worker.heartbeat
    return {
        "epoch": hello.epoch,
        "address": hello.address,
        "model": hello.model.id,
        "digest": hello.model.digest,
        "device": hello.device,
        "max_seqs": hello.max_seqs,
        "kv_blocks": hello.kv_blocks,
        "running": beat.running,
        "waiting": beat.waiting,
        "kv_blocks_used": beat.kv_blocks_used,
        "draining": int(worker.draining),
        "placed": worker.placed,
    }
