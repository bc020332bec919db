"""What a scheduler finds in Redis of the one before it."""

from __future__ import annotations

from dataclasses import dataclass, field

from redis.asyncio import Redis

from lmesh_scheduler.adapters.registry import Published
from lmesh_scheduler.adapters.store import read_adapters
from lmesh_scheduler.fleet_store import read_fleet
from lmesh_scheduler.index_store import read_index
from lmesh_scheduler.prefix_index import Boot
from lmesh_scheduler.training.jobs import Job
from lmesh_scheduler.training.store import read_jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Inheritance:
    """Workers that were there a moment ago, what was known of their caches, published adapters, and jobs."""

    fleet: dict[Boot, str] = field(default_factory=dict)
    index: dict[Boot, set[bytes]] = field(default_factory=dict)
    adapters: list[Published] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)


async def read_inheritance(redis: Redis) -> Inheritance:
    """Reads it. Raises RedisError or OSError."""
    fleet = await read_fleet(redis)
    index = {boot: await read_index(redis, boot) for boot in fleet}
    return Inheritance(fleet=fleet, index=index, adapters=await read_adapters(redis), jobs=await read_jobs(redis))
