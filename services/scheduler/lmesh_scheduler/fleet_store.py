"""The fleet in Redis: one hash a worker, gone by itself when the worker is silent, and the set of their ids."""

from __future__ import annotations

import logging
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from lmesh_scheduler.fleet import Worker
from lmesh_scheduler.journal import PREFIX

log = logging.getLogger(__name__)

FLEET_KEY = f"{PREFIX}fleet"


def worker_key(worker_id: str) -> str:
    """The key of a worker's hash."""
    return f"{PREFIX}worker:{worker_id}"


class FleetStore:
    """Writes the registry for other readers; nothing here is read back by the scheduler."""

    def __init__(self, redis: Redis, *, ttl_s: float) -> None:
        self._redis, self._ttl_ms = redis, round(ttl_s * 1e3)

    async def write(self, workers: list[Worker]) -> bool:
        """Writes all workers in one round trip; False when Redis does not answer."""
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.delete(FLEET_KEY)
                if workers:
                    pipe.sadd(FLEET_KEY, *(w.hello.worker_id for w in workers))
                    pipe.pexpire(FLEET_KEY, self._ttl_ms)
                for worker in workers:
                    key = worker_key(worker.hello.worker_id)
                    pipe.hset(key, mapping=_fields(worker))
                    pipe.pexpire(key, self._ttl_ms)
                await pipe.execute()
        except (RedisError, OSError, TimeoutError) as error:
            log.debug("fleet not written", extra={"detail": str(error)})
            return False
        return True


def _fields(worker: Worker) -> dict[Any, Any]:  # redis-py's mapping is invariant in its key and value
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
