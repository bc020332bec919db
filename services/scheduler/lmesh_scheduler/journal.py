"""Redis as the journal of requests: one compare-and-set a change, fenced by incarnation, written behind in batches.

The scheduler's memory is the truth; this is what outlives it. Only a request's last state is kept for writing, so
what waits for a Redis that is away is bounded by the number of requests, and nothing that runs waits for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from lmesh_scheduler.requests import Request, TimelineEvent

log = logging.getLogger(__name__)

PREFIX = "lmesh:"
INCARNATION_KEY = f"{PREFIX}incarnation"  # has no TTL: it must only ever grow

# KEYS[1] the record; ARGV: incarnation, expected version, new version, TTL in ms, then fields and values.
# Returns 1 (written, or written before by a call whose answer was lost), 0 (another version), -1 (fenced).
COMPARE_AND_SET = """
local held = redis.call('HMGET', KEYS[1], 'incarnation', 'version')
local incarnation, version = tonumber(held[1] or 0), tonumber(held[2] or 0)
if incarnation > tonumber(ARGV[1]) then return -1 end
if incarnation == tonumber(ARGV[1]) and version == tonumber(ARGV[3]) then return 1 end
if version ~= tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'version', ARGV[3], unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""

BATCH = 256
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0


def request_key(request_id: str) -> str:
    """The key of a request's record."""
    return f"{PREFIX}req:{request_id}"


class FencedError(RuntimeError):
    """A newer scheduler writes this journal; this one must stop."""


class Journal:
    """Writes requests' states to Redis, and reads them back when memory has forgotten them."""

    def __init__(self, redis: Redis, *, incarnation: int, limit: int, live_ttl_s: float, ended_ttl_s: float) -> None:
        self._redis, self._incarnation, self._limit = redis, incarnation, limit
        self._live_ttl_ms, self._ended_ttl_ms = round(live_ttl_s * 1e3), round(ended_ttl_s * 1e3)
        self._dirty: OrderedDict[str, Request] = OrderedDict()
        self._wake = asyncio.Event()
        self._sha = ""
        self.ok = True  # the last write got through
        self.dropped = 0  # states that the bound pushed out
        self.conflicts = 0  # records that were not as this scheduler left them

    def note(self, request: Request) -> None:
        """A request changed; its last state will be written. Never waits."""
        self._dirty[request.id] = request
        if len(self._dirty) > self._limit:
            self._dirty.popitem(last=False)
            self.dropped += 1
        self._wake.set()

    async def run(self) -> None:
        """Writes until it is cancelled. Raises FencedError when a newer scheduler has taken over."""
        delay = FIRST_RETRY_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty:
                if await self._flush():
                    delay = FIRST_RETRY_S
                else:
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, LAST_RETRY_S)

    async def drain(self, timeout_s: float) -> bool:
        """Writes what is left; False when Redis did not take it in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._dirty and await self._flush():
                    pass
        except TimeoutError:
            log.error("journal not drained", extra={"left": len(self._dirty)})
        return not self._dirty

    async def _flush(self) -> bool:
        """Writes one batch; False (and nothing lost) when Redis does not answer."""
        batch = [(r, r.version) for _, r in zip(range(BATCH), self._dirty.values(), strict=False)]
        try:
            answers = await self._write([request for request, _ in batch])
        except (RedisError, OSError, TimeoutError) as error:
            if self.ok:
                log.error("journal unreachable", extra={"detail": str(error), "waiting": len(self._dirty)})
            self.ok = False
            return False
        if not self.ok:
            log.warning("journal answers again", extra={"waiting": len(self._dirty)})
        self.ok = True
        for (request, version), answer in zip(batch, answers, strict=True):
            self._settle(request, version, answer)
        return True

    async def _write(self, requests: list[Request]) -> list[int]:
        if not self._sha:
            self._sha = await self._redis.script_load(COMPARE_AND_SET)
        async with self._redis.pipeline(transaction=False) as pipe:
            for request in requests:
                pipe.evalsha(self._sha, 1, request_key(request.id), *self._arguments(request))
            answers: list[Any] = await pipe.execute(raise_on_error=False)
        if any(isinstance(a, NoScriptError) for a in answers):
            self._sha = ""  # a restarted Redis has forgotten it
            return await self._write(requests)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _arguments(self, request: Request) -> list[str | int]:
        ttl = self._live_ttl_ms if request.live else self._ended_ttl_ms
        head: list[str | int] = [self._incarnation, request.durable_version, request.version, ttl]
        return [*head, *(item for pair in _fields(request).items() for item in pair)]

    def _settle(self, request: Request, version: int, answer: int) -> None:
        if answer == -1:
            raise FencedError("a newer scheduler writes this journal")
        if request.version == version:
            self._dirty.pop(request.id, None)
        if answer == 1:
            request.durable_version = version
            return
        self.conflicts += 1
        self._dirty.pop(request.id, None)
        log.error("journal record is not as it was left", extra={"request_id": request.id, "version": version})

    async def read(self, request_id: str) -> dict[str, str] | None:
        """A record's fields, or None. Raises RedisError when Redis does not answer."""
        found = cast("dict[bytes, bytes]", await self._redis.hgetall(request_key(request_id)))
        return {k.decode(): v.decode() for k, v in found.items()} or None


def _fields(request: Request) -> dict[str, str | int]:
    submission = request.submission
    return {
        "state": request.state.value,
        "model": submission.model,
        "tenant": submission.tenant,
        "n": submission.n,
        "gateway_id": request.gateway_id,
        "worker_id": request.worker_id,
        "epoch": request.epoch,
        "lease": request.lease,
        "reason": request.reason,
        "prompt_tokens": len(submission.prompt_ids),
        "completion_tokens": request.completion_tokens,
        "cached_tokens": request.cached_tokens,
        "timeline": json.dumps([[e.time, e.event, e.detail] for e in request.timeline]),
    }


def parse_timeline(text: str) -> list[TimelineEvent]:
    """The timeline of a record's field."""
    return [TimelineEvent(time, event, detail) for time, event, detail in json.loads(text)]


async def next_incarnation(redis: Redis) -> int:
    """A number larger than any scheduler of this journal had before. Raises RedisError."""
    return int(await redis.incr(INCARNATION_KEY))
