"""The boot scan: which requests Redis has as live of an earlier scheduler."""

from __future__ import annotations

import logging
from typing import cast

from redis.asyncio import Redis

from lmesh_scheduler.journal import BATCH, LIVE_KEY, parse_timeline, request_key
from lmesh_scheduler.orphans import Orphans
from lmesh_scheduler.requests import LIVE, Request, State, Submission
from lmesh_scheduler.scripts import FENCE, INCARNATION_KEY, Call, Script, run

log = logging.getLogger(__name__)

# KEYS: the incarnation, the index, the record. ARGV: incarnation, the request's id.
# Takes an id out of the index whose record has lapsed.
FORGET = Script(
    FENCE
    + """
if redis.call('EXISTS', KEYS[3]) == 0 then redis.call('ZREM', KEYS[2], ARGV[2]) end
return 1
"""
)


class OrphanStore:
    """Reads once for all, at most `limit` records, batch by batch."""

    def __init__(self, redis: Redis, orphans: Orphans, *, incarnation: int, limit: int) -> None:
        self._redis, self._orphans = redis, orphans
        self._incarnation, self._limit = incarnation, limit
        self._done = False

    async def read(self) -> None:
        """Nothing once it got through; after a failure it begins anew. Raises FencedError, RedisError or OSError."""
        if self._done:
            return
        older = f"({self._incarnation}"
        found = await self._redis.zrangebyscore(LIVE_KEY, "-inf", older, start=0, num=self._limit)
        ids = [member.decode() for member in cast("list[bytes]", found)]
        for start in range(0, len(ids), BATCH):
            await self._read(ids[start : start + BATCH])
        self._done = True
        if found:
            log.info("live requests of an earlier scheduler", extra={"found": len(found), "await": len(self._orphans)})
        if len(found) == self._limit:
            log.warning("the others are left to the next scheduler", extra={"limit": self._limit})

    async def _read(self, ids: list[str]) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            for request_id in ids:
                pipe.hgetall(request_key(request_id))
            records = cast("list[dict[bytes, bytes]]", await pipe.execute())
        pairs = list(zip(ids, records, strict=True))
        self._orphans.learn(request for i, record in pairs if record and (request := _request(i, record)) is not None)
        if lapsed := [request_id for request_id, record in pairs if not record]:
            await run(self._redis, [self._forget(request_id) for request_id in lapsed])

    def _forget(self, request_id: str) -> Call:
        keys = [INCARNATION_KEY, LIVE_KEY, request_key(request_id)]
        return Call(FORGET, keys, [self._incarnation, request_id])


def _request(request_id: str, record: dict[bytes, bytes]) -> Request | None:
    """The request as far as its record tells; None if it is not live, or another version's that cannot be read."""
    fields = {key.decode(): value.decode() for key, value in record.items()}
    try:
        submission = Submission(
            request_id=request_id,
            model=fields["model"],
            prompt_ids=(),
            max_tokens=0,
            n=int(fields["n"]),
            tenant=fields["tenant"],
        )
        request = Request(
            submission=submission,
            gateway_id=fields["gateway_id"],
            prompt_tokens=int(fields["prompt_tokens"]),
            expires_at=float(fields["deadline"]),
            state=State(fields["state"]),
            worker_id=fields["worker_id"],
            epoch=fields["epoch"],
            lease=int(fields["lease"]),
            owner_epoch=int(fields.get("owner_epoch", 0)),
            timeline=parse_timeline(fields["timeline"]),
        )
    except (KeyError, ValueError) as error:
        log.warning("unreadable record", extra={"request_id": request_id, "detail": repr(error)})
        return None
    return request if request.state in LIVE else None
