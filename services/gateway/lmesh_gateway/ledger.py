"""The token ledger in Redis: what clients were given, so that any gateway can go on where another one was.

Written behind what runs, in batches; only a SYNC request waits for it. While Redis is away what is to be written waits,
within bounds, and is written when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from lmesh_chassis.tasks import end
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from lmesh_gateway.errors import LedgerDisabledError, LedgerUnavailableError
from lmesh_gateway.ledger_entry import Keeper, KeptChoice, LedgerEntry, Standing
from lmesh_gateway.ledger_record import Record, choice_key, parse, record_key
from lmesh_gateway.ledger_scripts import CLAIM, FENCED, WHOLE_NEEDED, Call, run
from lmesh_gateway.metrics import LEDGER_DROPPED, LEDGER_OK
from lmesh_gateway.plan import Plan

log = logging.getLogger(__name__)

BATCH = 256
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 1.0
_SETTLE_S = 2.0
# What changes is gathered for this long, for the loop is the streams': written as fast as Redis took it, with a rest of
# three times as long as that took, a lone stream cost its gateway 0.75 ms a token, and 0.55 ms so; and the writing of a
# prompt was in the way of the request's start.
_GATHER_S = 0.05
# What somebody waits for is not gathered, yet it rests as long as the batch before took, this many times: the loop is
# not the ledger's. With 3 the Finish of a burst's streams came 13 to 35 ms after their last ids, so 2 to 14 ms.
_REST = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """`ttl_s` is from a request's last change; the rest bounds what waits for a Redis that is away."""

    ttl_s: float
    max_entries: int
    max_bytes: int
    timeout_s: float


class Ledger:
    """Of one gateway process; without a URL it keeps nothing."""

    def __init__(self, url: str, gateway_id: str, limits: LedgerLimits) -> None:
        self._redis: Redis | None = _connect(url, limits.timeout_s) if url else None
        self._gateway_id, self._limits = gateway_id, limits
        self._ttl_ms = round(limits.ttl_s * 1e3)
        self._dirty: OrderedDict[str, LedgerEntry] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()  # somebody waits for what is to be written
        self._flushed = asyncio.Event()  # of the flush that comes next
        self._task: asyncio.Task[None] | None = None
        self.ok = True  # the last write got through

    @property
    def enabled(self) -> bool:
        """Whether anything is kept."""
        return self._redis is not None

    def start(self) -> None:
        """Begins to write."""
        if self.enabled:
            LEDGER_OK.set(1)
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Writes what is left, if Redis takes it in time."""
        if self._redis is None:
            return
        if self._task is not None:
            await end(self._task)
        try:
            async with asyncio.timeout(_SETTLE_S):
                while self._dirty and await self._flush():
                    pass
        except TimeoutError:
            self._heard(False, "it did not answer in time")
        if self._dirty:
            log.error("ledger not written to its end", extra={"left": len(self._dirty)})
        await self._redis.aclose()

    def open(self, plan: Plan, choices: Sequence[KeptChoice], keeper: Keeper) -> LedgerEntry:
        """Begins to keep a new request."""
        entry = LedgerEntry(plan, choices, keeper, note=self._note)
        if self.enabled:
            entry.grown()
        else:
            entry.standing = Standing.DROPPED
        return entry

    def go_on(
        self, plan: Plan, choices: Sequence[KeptChoice], keeper: Keeper, *, nonce: str, epoch: int
    ) -> LedgerEntry:
        """Goes on with a request that was claimed; the ledger has what its choices have."""
        return LedgerEntry(plan, choices, keeper, note=self._note, nonce=nonce, epoch=epoch, written=True)

    async def settled(self, request_id: str) -> None:
        """What this gateway has to write of a request is written. Raises LedgerUnavailableError."""
        try:
            async with asyncio.timeout(_SETTLE_S):
                while request_id in self._dirty:
                    self._urgent.set()
                    await self._flushed.wait()
        except TimeoutError:
            raise _unavailable() from None

    async def read(self, request_id: str) -> Record | None:
        """A request's record, of any gateway. Raises LedgerDisabledError or LedgerUnavailableError."""
        return (await self._read(request_id, None))[1]

    async def claim(self, record: Record) -> Record | None:
        """Makes a live request this gateway's; the record from then on. None when another one was faster.

        Raises LedgerUnavailableError.
        """
        epoch = record.epoch + 1
        arguments: list[str | int | bytes] = [record.nonce, record.epoch, epoch, self._gateway_id, self._ttl_ms]
        claimed, found = await self._read(record.request_id, Call(CLAIM, [record_key(record.request_id)], arguments))
        return found if claimed and found is not None and found.epoch == epoch else None

    async def _read(self, request_id: str, first: Call | None) -> tuple[int, Record | None]:
        """Runs a script, then reads the record, which nobody writes in between once it is claimed."""
        if self._redis is None:
            raise LedgerDisabledError("this gateway keeps no ledger: set LMESH_GATEWAY_REDIS_URL")
        try:
            done = 1 if first is None else (await run(self._redis, [first]))[0]
            fields = cast("dict[bytes, bytes]", await self._redis.hgetall(record_key(request_id)))
            if not fields:
                return done, None
            keys = [choice_key(request_id, i) for i in range(int(fields[b"n"]))]
            ids = cast("list[bytes | None]", await self._redis.mget(keys))
            return done, parse(request_id, fields, ids)
        except (RedisError, OSError, TimeoutError) as error:
            raise _unavailable() from error
        except (KeyError, TypeError, ValueError) as error:
            log.error("a record of another make", extra={"request_id": request_id, "detail": repr(error)})
            text = f"the ledger's record of request {request_id} is of a make that this gateway does not know"
            raise LedgerUnavailableError(text) from error

    def _note(self, entry: LedgerEntry) -> None:
        """An entry has something to write. Never waits."""
        request_id, size = entry.request_id, entry.waiting_bytes
        self._waiting_bytes += size - self._sizes.get(request_id, 0)
        self._sizes[request_id] = size
        self._dirty[request_id] = entry
        while self._dirty and (
            len(self._dirty) > self._limits.max_entries or self._waiting_bytes > self._limits.max_bytes
        ):
            oldest = next(iter(self._dirty.values()))
            self._clean(oldest)
            LEDGER_DROPPED.inc()
            log.error("dropped from the ledger", extra={"request_id": oldest.request_id})
            oldest.drop()
        self._wake.set()
        if entry.awaited:
            self._urgent.set()

    def _clean(self, entry: LedgerEntry) -> None:
        if self._dirty.get(entry.request_id) is entry:
            del self._dirty[entry.request_id]
            self._waiting_bytes -= self._sizes.pop(entry.request_id)

    async def _run(self) -> None:
        delay = FIRST_RETRY_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty:
                await self._gather()
                began = time.monotonic()
                if await self._flush():
                    delay = FIRST_RETRY_S
                    await asyncio.sleep(min(_REST * (time.monotonic() - began), _GATHER_S))
                else:
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, LAST_RETRY_S)

    async def _gather(self) -> None:
        """Lets more come, unless somebody waits for what is there or it fills a batch."""
        if len(self._dirty) >= BATCH:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_S):
                await self._urgent.wait()
        self._urgent.clear()

    async def _flush(self) -> bool:
        """Writes one batch; False (and nothing lost) when Redis does not take it."""
        assert self._redis is not None
        batch = [entry for _, entry in zip(range(BATCH), self._dirty.values(), strict=False)]
        versions = [entry.version for entry in batch]
        calls = [entry.call(self._gateway_id, self._ttl_ms) for entry in batch]
        try:
            answers = await run(self._redis, [call for call, _ in calls])
        except (RedisError, OSError, TimeoutError) as error:
            self._heard(False, str(error))
            return False
        self._heard(True)
        for entry, version, (_, counts), answer in zip(batch, versions, calls, answers, strict=True):
            self._settle(entry, version, counts, answer)
        self._flushed.set()
        self._flushed = asyncio.Event()
        return True

    def _settle(self, entry: LedgerEntry, version: int, counts: list[int], answer: int) -> None:
        if entry.standing is not Standing.KEPT:
            return
        if answer == WHOLE_NEEDED:
            entry.forgotten()  # and it stays to be written
            self._size(entry)
        elif answer == FENCED:
            self._clean(entry)
            entry.fence()
        else:
            entry.wrote(version, counts)
            if entry.version == version:
                self._clean(entry)
            else:
                self._size(entry)

    def _size(self, entry: LedgerEntry) -> None:
        if self._dirty.get(entry.request_id) is entry:
            size = entry.waiting_bytes
            self._waiting_bytes += size - self._sizes[entry.request_id]
            self._sizes[entry.request_id] = size

    def _heard(self, ok: bool, detail: str = "") -> None:
        if self.ok and not ok:
            log.error("ledger unreachable", extra={"detail": detail, "waiting": len(self._dirty)})
        elif ok and not self.ok:
            log.warning("ledger answers again", extra={"waiting": len(self._dirty)})
        self.ok = ok
        LEDGER_OK.set(int(ok))


def _connect(url: str, timeout_s: float) -> Redis:
    # The ledger has its own pace, and must notice at once.
    return Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0))


def _unavailable() -> LedgerUnavailableError:
    return LedgerUnavailableError("the ledger does not answer now; try again", retry_after_ms=1000)
