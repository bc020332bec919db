"""Requests that outlive workers, gateways and schedulers, over real links and a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.scheduler.v1 import fleet_pb2 as fp
from redis.asyncio import Redis

from tests.redis_server import running_redis
from tests.scheduler_links import GatewayEnd, running_scheduler, until, worker_hello


@pytest.fixture
async def redis_url() -> AsyncIterator[str]:
    async with running_redis() as server:
        yield server.url


def submit(request_id: str) -> dp.Submit:
    return dp.Submit(request_id=request_id, model="m", prompt_ids=[1, 2, 3], max_tokens=8, n=1)


def announce(request_id: str, lease: int) -> dp.DispatchRequest:
    leg = dp.Leg(role=dp.ROLE_UNIFIED, worker_id="w1", epoch="e1", address="127.0.0.1:1", lease=lease)
    return dp.DispatchRequest(announces=[dp.Announce(submit=submit(request_id), leg=leg, started=True)])


def leases(gateway: GatewayEnd, request_id: str) -> list[int]:
    return [placed.legs[0].lease for placed in gateway.heard("placed") if placed.request_id == request_id]


async def test_a_lost_leg_is_placed_again(redis_url: str) -> None:
    async with running_scheduler(redis_url) as (_, links):
        gateway, worker = await links.gateway(), await links.worker()
        lease = await gateway.place("r")
        lost = dp.LegLost(request_id="r", lease=lease, reason="WORKER_LOST")
        await gateway.send(dp.DispatchRequest(legs_lost=[lost]))
        await until(lambda: len(leases(gateway, "r")) == 2)
        assert leases(gateway, "r")[1] > lease
        await until(lambda: worker.revoked == [lease])
        assert gateway.by_id("revoked", "r").requeued


async def test_a_stuck_worker_is_told_what_it_lost(redis_url: str) -> None:
    async with running_scheduler(redis_url) as (_, links):
        gateway, stuck = await links.gateway(), await links.worker()
        lease = await gateway.place("r")
        stuck.fall_silent()
        await stuck.send(fp.FleetRequest(heartbeat=fp.Heartbeat(progress=fp.PROGRESS_STUCK)))
        await until(lambda: stuck.revoked == [lease])
        assert leases(gateway, "r") == [lease]
        await links.worker(worker_hello("w2"))
        await until(lambda: len(leases(gateway, "r")) == 2)
        assert (await links.describe("r")).worker_id == "w2"


async def test_a_new_scheduler_takes_up_what_runs(redis_url: str) -> None:
    async with running_scheduler(redis_url) as (_, links):
        gateway, _ = await links.gateway(), await links.worker()
        lease = await gateway.place("r")
        await until_written(redis_url)
    async with running_scheduler(redis_url) as (service, links):
        gateway = await links.gateway()
        await gateway.send(announce("r", lease))
        await gateway.submit("new")  # its model is known, though nobody serves it yet
        await until(lambda: gateway.by_id("queued", "new"))
        assert gateway.catalog == []
        held = worker_hello()
        held.held.add(request_id="r", lease=lease, sequences=1)
        held.held.add(request_id="gone", lease=lease + 1, sequences=1)
        worker = await links.worker(held)
        await until(lambda: gateway.lease("new"))
        assert gateway.lease("new") > lease + 1
        await until(lambda: gateway.catalog)
        assert leases(gateway, "r") == []
        done = dp.Finished(request_id="r", lease=lease, outcome=dp.OUTCOME_FINISHED)
        await gateway.send(dp.DispatchRequest(finished=[done]))
        record = await links.described("r", lambda found: found.state == "FINISHED")
        assert record.worker_id == "w1"
        assert worker.revoked == []  # another gateway may still announce what is left
        assert service.scheduler.fleet.workers()[0].placed == 2


async def until_written(redis_url: str) -> None:
    """The fleet is in Redis."""
    async with Redis.from_url(redis_url) as redis:
        members: set[bytes] = set()
        while not members:
            members = await redis.smembers("lmesh:fleet")


async def test_a_gateway_carries_on_what_another_held(redis_url: str) -> None:
    async with running_scheduler(redis_url) as (_, links):
        before, worker = await links.gateway("g1"), await links.worker()
        lease = await before.place("r")
        after = await links.gateway("g2")
        taken = dp.TakeOver(submit=submit("r"), owner_epoch=2)
        await after.send(dp.DispatchRequest(takeovers=[taken]))
        await until(lambda: after.lease("r"))
        await until(lambda: before.by_id("revoked", "r"))
        assert before.by_id("revoked", "r").reason == "RESUMED_ELSEWHERE"
        await until(lambda: worker.revoked == [lease])
        late = dp.TakeOver(submit=submit("r"), owner_epoch=1)
        await before.send(dp.DispatchRequest(takeovers=[late]))
        await until(lambda: before.by_id("refused", "r"))
        assert before.by_id("refused", "r").reason == "RESUMED_ELSEWHERE"
