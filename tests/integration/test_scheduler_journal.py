"""The journal's scripts and its writer, against a real Redis."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.fleet import Hello, ModelDescriptor, Worker
from lmesh_scheduler.fleet_store import FleetStore
from lmesh_scheduler.journal import COMPARE_AND_SET, LIVE_KEY, Journal, request_key
from lmesh_scheduler.requests import LIVE, Request, State, Submission
from lmesh_scheduler.scripts import INCARNATION_KEY, Call, FencedError, next_incarnation, run
from lmesh_scheduler.service import open_redis
from redis.asyncio import Redis

from tests.redis_server import RedisServer, running_redis
from tests.scheduler_links import until

KEY = request_key("r")


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with running_redis() as server:
        yield server


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    settings = SchedulerSettings(redis_url=server.url, redis_timeout_s=1.0)
    client, _, _ = await open_redis(settings)
    await client.delete(INCARNATION_KEY)
    yield client
    await client.aclose()


def request(request_id: str = "r") -> Request:
    submission = Submission(request_id=request_id, model="m", prompt_ids=(), max_tokens=1)
    return Request(submission=submission, gateway_id="g", prompt_tokens=3)


class Changing:
    """Requests that change as the table changes them."""

    def __init__(self, journal: Journal) -> None:
        self._journal, self._versions = journal, itertools.count(1)

    def __call__(self, request: Request, state: State = State.QUEUED) -> Request:
        request.state, request.version = state, next(self._versions)
        self._journal.note(request)
        return request


@asynccontextmanager
async def writing(journal: Journal) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(journal.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def make_journal(redis: Redis, *, incarnation: int = 10, limit: int = 1000) -> Journal:
    return Journal(redis, incarnation=incarnation, limit=limit, live_ttl_s=500, ended_ttl_s=50)


class TestCompareAndSet:
    async def write(self, redis: Redis, incarnation: int, version: int, state: str) -> int:
        arguments = [incarnation, version, 60_000, int(state in LIVE), "r", "state", state]
        return (await run(redis, [Call(COMPARE_AND_SET, [INCARNATION_KEY, KEY, LIVE_KEY], arguments)]))[0]

    async def held(self, redis: Redis) -> tuple[bytes | None, ...]:
        return tuple(await redis.hmget(KEY, ["incarnation", "version", "state"]))

    async def test_versions_only_grow(self, redis: Redis) -> None:
        assert await self.write(redis, 10, 3, "QUEUED") == 1
        assert await self.write(redis, 10, 7, "PLACED") == 1
        assert await self.write(redis, 10, 5, "stale") == 0
        assert await self.held(redis) == (b"10", b"7", b"PLACED")

    async def test_the_index_has_live_ones_by_who_wrote_them_last(self, redis: Redis) -> None:
        async def index() -> list[tuple[bytes, float]]:
            return await redis.zrange(LIVE_KEY, 0, -1, withscores=True)

        await self.write(redis, 10, 1, "QUEUED")
        assert await index() == [(b"r", 10)]
        assert 0 < await redis.pttl(LIVE_KEY) <= 60_000
        await self.write(redis, 11, 1, "RUNNING")
        with pytest.raises(FencedError):
            await self.write(redis, 10, 2, "FINISHED")
        assert await index() == [(b"r", 11)]
        await self.write(redis, 11, 3, "FINISHED")
        assert await self.write(redis, 11, 2, "RUNNING") == 0  # late
        assert await index() == []

    async def test_the_same_write_again_is_the_same(self, redis: Redis) -> None:
        for _ in range(2):
            assert await self.write(redis, 10, 3, "QUEUED") == 1
        assert await self.held(redis) == (b"10", b"3", b"QUEUED")

    async def test_an_older_incarnation_is_fenced(self, redis: Redis) -> None:
        await self.write(redis, 11, 1, "RUNNING")
        with pytest.raises(FencedError):
            await self.write(redis, 10, 99, "stale")
        assert await self.held(redis) == (b"11", b"1", b"RUNNING")

    async def test_an_older_incarnation_is_fenced_from_records_it_never_wrote(self, redis: Redis) -> None:
        await redis.set(INCARNATION_KEY, 11)
        with pytest.raises(FencedError):
            await self.write(redis, 10, 1, "stale")
        assert not await redis.exists(KEY)

    async def test_a_newer_incarnation_takes_over_whatever_the_version(self, redis: Redis) -> None:
        await self.write(redis, 10, 99, "RUNNING")
        assert await self.write(redis, 11, 1, "QUEUED") == 1
        assert await self.held(redis) == (b"11", b"1", b"QUEUED")

    async def test_an_empty_redis_learns_who_writes(self, redis: Redis) -> None:
        await redis.flushall()
        assert await self.write(redis, 10, 4, "RUNNING") == 1
        assert await redis.get(INCARNATION_KEY) == b"10"

    async def test_forgotten_scripts_are_loaded_again(self, redis: Redis) -> None:
        await self.write(redis, 10, 1, "QUEUED")
        await redis.script_flush()
        assert await self.write(redis, 10, 2, "PLACED") == 1


async def test_incarnations_grow_even_over_an_empty_redis(redis: Redis) -> None:
    first, second = await next_incarnation(redis), await next_incarnation(redis)
    seconds, _ = await redis.time()
    assert first < second
    assert abs(second - seconds) < 60
    await redis.flushall()
    assert await next_incarnation(redis) >= first
    assert await redis.ttl(INCARNATION_KEY) == -1


class TestWriter:
    async def test_records_have_a_ttl_and_become_durable(self, redis: Redis) -> None:
        journal = make_journal(redis)
        change = Changing(journal)
        live, ended = change(request("live")), change(request("ended"), State.FINISHED)
        assert not live.durable
        async with writing(journal):
            await until(lambda: live.durable and ended.durable)
        assert 400_000 < await redis.pttl(request_key("live")) <= 500_000
        assert 40_000 < await redis.pttl(request_key("ended")) <= 50_000
        assert (await journal.read("ended") or {})["state"] == "FINISHED"
        assert await journal.read("unknown") is None

    async def test_changes_of_a_request_are_written_as_one(self, redis: Redis) -> None:
        journal = make_journal(redis)
        change = Changing(journal)
        await redis.config_resetstat()
        one = change(request())
        for state in (State.PLACED, State.RUNNING, State.FINISHED):
            change(one, state)
        async with writing(journal):
            await until(lambda: one.durable)
        assert await redis.hget(KEY, "version") == b"4"
        stats = await redis.info("commandstats")
        assert stats["cmdstat_hset"]["calls"] == 1

    async def test_many(self, redis: Redis) -> None:
        journal = make_journal(redis)
        change = Changing(journal)
        requests = [change(request(str(i))) for i in range(1000)]
        assert await journal.drain(10)
        assert all(one.durable for one in requests)
        assert await redis.dbsize() == 1002  # and the incarnation and the index

    async def test_waits_for_a_redis_that_is_away_within_its_bound(self, server: RedisServer, redis: Redis) -> None:
        journal = make_journal(redis, limit=3)
        change = Changing(journal)
        await server.kill()
        requests = [change(request(str(i))) for i in range(5)]
        async with writing(journal):
            await until(lambda: not journal.ok)
            change(requests[4], State.PLACED)
            assert not any(one.durable for one in requests)
            await server.start()
            await until(lambda: requests[4].durable)
        assert journal.ok
        assert journal.dropped == 2
        assert [one.durable for one in requests] == [False, False, True, True, True]
        assert await redis.hget(request_key("4"), "state") == b"PLACED"

    async def test_a_change_after_a_lost_state_makes_it_durable_again(self, redis: Redis) -> None:
        journal = make_journal(redis, limit=1)
        change = Changing(journal)
        lost = change(request("lost"))
        change(request("other"))
        assert await journal.drain(10)
        assert not lost.durable
        change(lost, State.FINISHED)
        assert await journal.drain(10)
        assert lost.durable

    async def test_stops_when_a_newer_scheduler_writes(self, redis: Redis) -> None:
        journal = make_journal(redis, incarnation=10)
        await redis.set(INCARNATION_KEY, 11)
        one = Changing(journal)(request())
        async with writing(journal) as task:
            with pytest.raises(FencedError):
                await task
        assert not one.durable
        assert not await redis.exists(KEY)

    async def test_an_undrained_journal_says_so(self, server: RedisServer, redis: Redis) -> None:
        journal = make_journal(redis)
        Changing(journal)(request())
        await server.kill()
        assert not await journal.drain(2)


class TestFleetStore:
    def worker(self, worker_id: str) -> Worker:
        model = ModelDescriptor(
            id="m", source="s", digest="d", text_digest="t", max_model_len=1, vocab_size=1, block_size=1
        )
        hello = Hello(
            worker_id=worker_id,
            epoch="e1",
            address="a:1",
            model=model,
            max_seqs=1,
            max_step_tokens=1,
            kv_blocks=1,
            device="cpu",
        )
        return Worker(hello=hello, seen=0.0)

    async def test_registry_has_a_ttl_and_forgets_who_left(self, redis: Redis) -> None:
        store = FleetStore(redis, incarnation=10, ttl_s=30)
        await store.write([self.worker("a"), self.worker("b")])
        assert await redis.smembers("lmesh:fleet") == {b"a", b"b"}
        assert await redis.hget("lmesh:worker:a", "epoch") == b"e1"
        for key in ("lmesh:fleet", "lmesh:worker:a", "lmesh:worker:b"):
            assert 0 < await redis.pttl(key) <= 30_000
        await store.write([self.worker("b")])
        assert await redis.smembers("lmesh:fleet") == {b"b"}
        await store.write([])
        assert not await redis.exists("lmesh:fleet")

    async def test_is_fenced(self, redis: Redis) -> None:
        await redis.set(INCARNATION_KEY, 11)
        with pytest.raises(FencedError):
            await FleetStore(redis, incarnation=10, ttl_s=30).write([self.worker("a")])
        assert not await redis.exists("lmesh:fleet")
