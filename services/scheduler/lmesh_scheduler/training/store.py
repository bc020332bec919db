"""Jobs in Redis: a hash a job, its events as a stream, and the set of ids; written behind, in order, fenced."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

from redis.asyncio import Redis

from lmesh_scheduler.scripts import FENCE, INCARNATION_KEY, PREFIX, Call, Script, run
from lmesh_scheduler.training.jobs import Job, JobState, StoredEvent, Wish

log = logging.getLogger(__name__)

JOBS_KEY = f"{PREFIX}jobs"  # has no TTL: ids leave it when their job's hash has gone
MOST_EVENTS = 200_000  # of a job; the oldest go first
_BATCH = 500  # events of one call

# KEYS: the incarnation, the job, its events, the ids. ARGV: incarnation, TTL in ms (0: none), the id, how many of what
# follows are fields and values, those, then (seq, time, body) of events. Events that are there already stay.
_WRITE = Script(
    FENCE
    + f"""
local fields = tonumber(ARGV[4])
redis.call('HSET', KEYS[2], unpack(ARGV, 5, 4 + fields))
redis.call('SADD', KEYS[4], ARGV[3])
for i = 5 + fields, #ARGV, 3 do
  redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', {MOST_EVENTS}, ARGV[i] .. '-1', 't', ARGV[i + 1], 'b', ARGV[i + 2])
end
for _, key in ipairs({{KEYS[2], KEYS[3]}}) do
  if ARGV[2] == '0' then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ARGV[2]) end
end
return 1
"""
)
_NUMBERS = ("lease", "lease_seq", "attempts", "last_event")
_NEW_NUMBERS = {"nodes": 1, "port": 0}  # and what they are in records of before there were any
_TIMES = ("created", "changed")
_TEXTS = ("tenant", "model", "source", "start", "publish_as", "reason", "message", "trainer_id")
_MADE = ("artifact", "adapter_digest", "manifest")
_BYTES = ("spec", "last_step")


def job_key(job_id: str) -> str:
    """The key of a job's hash."""
    return f"{PREFIX}job:{job_id}"


def events_key(job_id: str) -> str:
    """The key of a job's events."""
    return f"{PREFIX}job:{job_id}:metrics"


class JobStore:
    """`written(job id, lease, seq)` is called when all reports up to `seq` are kept."""

    def __init__(self, redis: Redis, *, incarnation: int, ended_ttl_s: float) -> None:
        self._redis, self._incarnation, self._ttl_ms = redis, incarnation, round(ended_ttl_s * 1e3)
        self._dirty: dict[str, Job] = {}
        self.written: Callable[[str, int, int], None] = lambda job_id, lease, seq: None

    def changed(self, job: Job) -> None:
        """A job is to be written; never waits."""
        self._dirty[job.id] = job

    async def write(self) -> None:
        """Brings Redis up to date. Raises FencedError, RedisError or OSError; nothing is lost then."""
        for job in list(self._dirty.values()):
            version, lease, seq, events = job.version, job.lease, job.lease_seq, job.unwritten[:_BATCH]
            await run(self._redis, [self._call(job, events)])
            job.written(len(events))
            if job.version == version and not job.unwritten:
                self._dirty.pop(job.id, None)
            if not job.unwritten:
                self.written(job.id, lease, seq)

    def _call(self, job: Job, events: list[StoredEvent]) -> Call:
        fields = [item for pair in _fields(job).items() for item in pair]
        told = [item for event in events for item in (event.seq, repr(event.time), event.body)]
        ttl = 0 if job.live else self._ttl_ms
        keys = [INCARNATION_KEY, job_key(job.id), events_key(job.id), JOBS_KEY]
        return Call(_WRITE, keys, [self._incarnation, ttl, job.id, len(fields), *fields, *told])

    async def events(self, job_id: str, after: int, count: int = _BATCH) -> list[StoredEvent]:
        """Events with a larger seq than `after`, in order. Raises RedisError or OSError."""
        range_ = self._redis.xrange(events_key(job_id), min=f"{after + 1}-0", count=count)
        found = cast("list[tuple[bytes, dict[bytes, bytes]]]", await range_)
        return [StoredEvent(int(i.split(b"-")[0]), float(f[b"t"]), f[b"b"]) for i, f in found]


def _fields(job: Job) -> dict[str, str | int | bytes]:
    fields: dict[str, str | int | bytes] = {name: getattr(job, name) for name in (*_NUMBERS, *_TEXTS, *_MADE, *_BYTES)}
    fields |= {name: repr(getattr(job, name)) for name in _TIMES}
    fields |= {name: getattr(job, name) for name in _NEW_NUMBERS} | {"members": "\n".join(job.members)}
    return {**fields, "state": job.state.value, "wish": job.wish.value}


async def read_jobs(redis: Redis) -> list[Job]:
    """What an earlier scheduler wrote. Raises RedisError or OSError."""
    ids = sorted(await cast("Awaitable[set[bytes]]", redis.smembers(JOBS_KEY)))
    async with redis.pipeline(transaction=False) as pipe:
        for job_id in ids:
            pipe.hgetall(job_key(job_id.decode()))
        found: list[dict[bytes, bytes]] = await pipe.execute()
    expired = [job_id for job_id, fields in zip(ids, found, strict=True) if not fields]
    if expired:
        await redis.srem(JOBS_KEY, *expired)
    return [_job(job_id.decode(), fields) for job_id, fields in zip(ids, found, strict=True) if fields]


def _job(job_id: str, fields: dict[bytes, bytes]) -> Job:
    told: dict[str, Any] = {name: fields[name.encode()].decode() for name in (*_TEXTS, *_MADE)}
    told |= {name: int(fields[name.encode()]) for name in _NUMBERS}
    told |= {name: float(fields[name.encode()]) for name in _TIMES}
    told |= {name: fields[name.encode()] for name in _BYTES}
    told |= {name: int(fields.get(name.encode(), default)) for name, default in _NEW_NUMBERS.items()}
    told["members"] = tuple(fields.get(b"members", b"").decode().split())
    told["durable_event"] = told["last_event"]
    return Job(id=job_id, state=JobState(fields[b"state"].decode()), wish=Wish(fields[b"wish"].decode()), **told)
