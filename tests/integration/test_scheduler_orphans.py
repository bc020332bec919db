"""A restarted scheduler finds in a real Redis what the one before it left live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh_scheduler.journal import LIVE_KEY, Journal, request_key
from lmesh_scheduler.orphan_store import OrphanStore
from lmesh_scheduler.orphans import Orphans
from lmesh_scheduler.requests import Request, RequestTable, State, Submission, TimelineEvent
from lmesh_scheduler.scripts import INCARNATION_KEY, FencedError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.redis_server import RedisServer, running_redis
from tests.scheduler_links import SchedulerLinks, eventually, running_scheduler, until

LOST_S = {"gateway_grace_s": 1.0, "gateway_lost_s": 1.0}
PATIENT = {"gateway_lost_s": 600.0}


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with running_redis() as server:
        yield server


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(server.url) as client:
        yield client


def submit(request_id: str, **fields: object) -> dp.Submit:
    return dp.Submit(request_id=request_id, model="m", prompt_ids=[1, 2, 3], max_tokens=8, n=1, **fields)


def announce(request_id: str, lease: int) -> dp.DispatchRequest:
    leg = dp.Leg(role=dp.ROLE_UNIFIED, worker_id="w1", epoch="e1", address="127.0.0.1:1", lease=lease)
    return dp.DispatchRequest(announces=[dp.Announce(submit=submit(request_id), leg=leg, started=True)])


async def placed_once(url: str, *request_ids: str, **fields: object) -> list[int]:
    """What a scheduler placed for gateway g1 before it ended, with all records written."""
    async with running_scheduler(url) as (_, links):
        gateway, _ = await links.gateway("g1"), await links.worker()
        leases = [await gateway.place(request_id, **fields) for request_id in request_ids]
        for request_id in request_ids:
            await links.described(request_id, lambda record: record.durable)
        return leases


async def ended(links: SchedulerLinks, request_id: str, redis: Redis) -> tuple[str, str, bytes | None]:
    """How a request ended: as the scheduler says, and the reason in Redis."""
    record = await links.described(request_id, lambda r: r.state not in ("QUEUED", "PLACED", "RUNNING") and r.durable)
    return record.state, record.failure_reason, await redis.hget(request_key(request_id), "reason")


async def test_what_no_gateway_comes_back_for_ends(server: RedisServer, redis: Redis) -> None:
    _, lease = await placed_once(server.url, "lost", "kept")
    assert await redis.zcard(LIVE_KEY) == 2
    async with running_scheduler(server.url, **LOST_S) as (_, links):
        gateway = await links.gateway("g1")
        await gateway.send(announce("kept", lease))
        await links.worker()
        assert await ended(links, "lost", redis) == ("FAILED", "GATEWAY_LOST", b"GATEWAY_LOST")
        record = await links.describe("lost")
        assert [e.event for e in record.timeline] == ["queued", "placed", "failed"]
        assert (await links.describe("kept")).state == "RUNNING"
        assert await redis.zrange(LIVE_KEY, 0, -1) == [b"kept"]


async def test_until_then_it_is_live_to_everybody(server: RedisServer, redis: Redis) -> None:
    (lease,) = await placed_once(server.url, "r", tenant="a")
    async with running_scheduler(server.url, **PATIENT) as (_, links):
        other, _ = await links.gateway("g2"), await links.worker()
        assert (await links.describe("r")).state == "PLACED"
        await other.submit("r", tenant="a")
        await until(lambda: other.heard("refused"))
        stranger = await links.gateway("g3")
        await stranger.send(dp.DispatchRequest(takeovers=[dp.TakeOver(submit=submit("r", tenant="b"), owner_epoch=1)]))
        await until(lambda: stranger.heard("refused"))
        refused = [*other.heard("refused"), *stranger.heard("refused")]
        assert [r.reason for r in refused] == ["DUPLICATE_REQUEST_ID"] * 2
        await other.send(dp.DispatchRequest(takeovers=[dp.TakeOver(submit=submit("r", tenant="a"), owner_epoch=1)]))
        await until(lambda: other.lease("r"))
        assert other.lease("r") > lease
        before = await links.gateway("g1")
        await before.send(announce("r", lease))
        await until(lambda: before.by_id("revoked", "r"))
        assert before.by_id("revoked", "r").reason == "RESUMED_ELSEWHERE"
    assert await redis.hmget(request_key("r"), "gateway_id", "owner_epoch") == [b"g2", b"1"]


async def test_a_redis_that_lost_its_memory_has_nothing_to_find(server: RedisServer, redis: Redis) -> None:
    await placed_once(server.url, "r")
    await server.kill()
    await server.start()
    async with running_scheduler(server.url, **PATIENT) as (service, links):
        gateway, _ = await links.gateway("g2"), await links.worker()
        assert await gateway.place("r")
        assert len(service.scheduler.orphans) == 0


def record(request_id: str, state: State = State.RUNNING) -> Request:
    submission = Submission(request_id=request_id, model="m", prompt_ids=(), max_tokens=1, n=3, tenant="t")
    return Request(
        submission=submission,
        gateway_id="g",
        prompt_tokens=3,
        state=state,
        version=1,
        worker_id="w",
        epoch="e",
        lease=5,
        owner_epoch=2,
        expires_at=70.5,
        timeline=[TimelineEvent(1.5, "queued", {"a": "b"})],
    )


async def written(redis: Redis, *requests: Request, incarnation: int = 10) -> None:
    journal = Journal(redis, incarnation=incarnation, limit=10_000, live_ttl_s=500, ended_ttl_s=50)
    for request in requests:
        journal.note(request)
    assert await journal.drain(10)


def found_in(redis: Redis, *, limit: int = 10_000, incarnation: int = 11) -> tuple[Orphans, OrphanStore]:
    table = RequestTable(ended_kept=10, wall=lambda: 0.0, journal=lambda _: None)
    orphans = Orphans(table, lost_s=60.0, clock=lambda: 0.0)
    return orphans, OrphanStore(redis, orphans, incarnation=incarnation, limit=limit)


class TestScan:
    @pytest.fixture(autouse=True)
    async def begins_low(self, redis: Redis) -> None:
        await redis.set(INCARNATION_KEY, 10)

    async def test_finds_live_records_of_earlier_incarnations(self, redis: Redis) -> None:
        await written(redis, record("old"), record("ended", State.FINISHED), *(record(str(i)) for i in range(600)))
        await written(redis, record("mine"), incarnation=11)
        orphans, store = found_in(redis)
        await store.read()
        assert len(orphans) == 601
        one, was = orphans.find("old"), record("old")
        assert one is not None
        for name in ("state", "gateway_id", "worker_id", "epoch", "lease", "owner_epoch", "expires_at", "timeline"):
            assert getattr(one, name) == getattr(was, name)
        assert (one.submission.tenant, one.submission.n, one.prompt_tokens) == ("t", 3, 3)
        await redis.set(INCARNATION_KEY, 10)
        await written(redis, record("late"))  # a scan that got through is not made again
        await store.read()
        assert orphans.find("late") is None

    async def test_is_bounded(self, redis: Redis) -> None:
        await written(redis, *(record(str(i)) for i in range(10)))
        orphans, store = found_in(redis, limit=4)
        await store.read()
        assert len(orphans) == 4

    async def test_forgets_lapsed_records_and_passes_by_unreadable_ones(self, redis: Redis) -> None:
        await written(redis, record("lapsed"), record("odd"), record("r"))
        await redis.delete(request_key("lapsed"))
        await redis.hset(request_key("odd"), "state", "ELSEWHERE")
        orphans, store = found_in(redis)
        await store.read()
        assert (len(orphans), set(await redis.zrange(LIVE_KEY, 0, -1))) == (1, {b"odd", b"r"})

    async def test_is_fenced(self, redis: Redis) -> None:
        await written(redis, record("lapsed"))
        await redis.delete(request_key("lapsed"))
        await redis.set(INCARNATION_KEY, 12)
        with pytest.raises(FencedError):
            await found_in(redis)[1].read()
        assert await redis.zcard(LIVE_KEY) == 1

    async def test_is_made_again_when_redis_was_away(self, server: RedisServer, redis: Redis) -> None:
        orphans, store = found_in(redis)
        await server.kill()
        with pytest.raises((RedisError, OSError)):
            await store.read()
        await server.start()
        await written(redis, record("r"))
        await store.read()
        assert len(orphans) == 1


async def test_a_service_that_could_not_ask_at_its_boot_asks_again(
    server: RedisServer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await placed_once(server.url, "r")
    failing = asyncio.Event()
    monkeypatch.setattr(OrphanStore, "read", _first_fails(OrphanStore.read, failing))
    async with running_scheduler(server.url, **LOST_S) as (_, links):
        assert failing.is_set()
        assert (await ended(links, "r", redis))[1] == "GATEWAY_LOST"
        await eventually(lambda: redis.zcard(LIVE_KEY), lambda live: live == 0)


def _first_fails(read: Callable[..., object], failing: asyncio.Event) -> Callable[..., object]:
    async def instead(store: OrphanStore) -> None:
        if not failing.is_set():
            failing.set()
            raise RedisError("away")
        await read(store)  # type: ignore[misc]

    return instead
