"""The scheduler as a service: real links, a real Redis that goes and comes, a real SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.scheduler.v1 import fleet_pb2 as fp
from lmesh_chassis.errors import from_rpc_error
from lmesh_chassis.lifecycle import Shutdown
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.scripts import next_incarnation
from lmesh_scheduler.service import SchedulerService, open_redis

from tests.redis_server import RedisServer, running_redis
from tests.scheduler_links import WAIT_S, SchedulerLinks, eventually, running_scheduler, until, worker_hello


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with running_redis() as server:
        yield server


@pytest.fixture
async def links(server: RedisServer) -> AsyncIterator[SchedulerLinks]:
    async with running_scheduler(server.url) as (_, links):
        yield links


def reason(stream: Any) -> str:
    assert stream.error is not None
    return from_rpc_error(stream.error).reason


class TestDispatch:
    async def test_life_of_a_request(self, links: SchedulerLinks) -> None:
        gateway = await links.gateway()
        assert gateway.messages[0].hello.incarnation > 0
        await links.worker()
        await until(lambda: gateway.catalog)
        assert [(e.model.id, e.workers) for e in gateway.catalog] == [("m", 1)]
        lease = await gateway.place("r", n=2)
        leg = gateway.by_id("placed", "r").legs[0]
        assert (leg.role, leg.worker_id, leg.epoch, leg.address) == (dp.ROLE_UNIFIED, "w1", "e1", "127.0.0.1:1")
        assert lease >> 32 == gateway.messages[0].hello.incarnation
        assert gateway.by_id("queued", "r").position == 0
        await gateway.send(dp.DispatchRequest(started=[dp.Started(request_id="r", lease=lease)]))
        await gateway.finish("r", completion_tokens=7, cached_tokens=2)
        record = await links.described("r", lambda r: r.state == "FINISHED" and r.durable)
        assert [e.event for e in record.timeline] == ["queued", "placed", "running", "finished"]
        assert dict(record.timeline[1].detail) == {"worker_id": "w1"}
        counts = (record.model, record.prompt_tokens, record.completion_tokens, record.cached_tokens)
        assert counts == ("m", 3, 7, 2)

    async def test_refusals(self, links: SchedulerLinks) -> None:
        gateway = await links.gateway()
        await gateway.submit("r", model="nobody's")
        await until(lambda: gateway.heard("refused"))
        refused = gateway.by_id("refused", "r")
        assert (refused.reason, refused.retry_after_ms) == ("MODEL_NOT_FOUND", 0)
        await links.worker()
        await gateway.place("live")
        other = await links.gateway("g2")
        await other.submit("live")
        await until(lambda: other.by_id("refused", "live"))
        assert other.by_id("refused", "live").reason == "DUPLICATE_REQUEST_ID"

    async def test_a_burst_is_told_in_few_messages_and_in_order(self, links: SchedulerLinks) -> None:
        gateway = await links.gateway()
        await links.worker(worker_hello(max_seqs=400))
        names = [f"r{i}" for i in range(800)]
        before = len(gateway.messages)
        await gateway.submit(*names)
        await until(lambda: len(gateway.heard("placed")) == 800)
        assert [item.request_id for item in gateway.heard("placed")] == names
        assert len(gateway.messages) - before < 40

    async def test_expiry_in_the_queue_and_running(self, links: SchedulerLinks) -> None:
        gateway = await links.gateway()
        await links.worker(worker_hello(max_seqs=1))
        await gateway.submit("runs", n=2, deadline_ms=400)
        await gateway.submit("waits", deadline_ms=150)
        await until(lambda: len(gateway.heard("expired")) == 2)
        assert [(item.request_id, item.queued) for item in gateway.heard("expired")] == [
            ("waits", True),
            ("runs", False),
        ]

    async def test_cancel_from_another_gateway(self, links: SchedulerLinks) -> None:
        owner, other = await links.gateway("g1"), await links.gateway("g2")
        await links.worker()
        lease = await owner.place("r")
        await other.send(dp.DispatchRequest(cancels=[dp.Cancel(request_id="r")]))
        await until(lambda: owner.heard("revoked"))
        (revoked,) = owner.heard("revoked")
        assert (revoked.request_id, revoked.lease, revoked.reason) == ("r", lease, "CANCELLED")
        assert (await links.describe("r")).state == "CANCELLED"

    async def test_a_withdrawal_leaves_another_gateways_request(self, links: SchedulerLinks) -> None:
        owner, other = await links.gateway("g1"), await links.gateway("g2")
        await links.worker()
        await owner.place("r")
        await other.submit("r")
        await other.send(dp.DispatchRequest(cancels=[dp.Cancel(request_id="r", withdrawn=True)]))
        await other.submit("later")
        await until(lambda: other.lease("later"))  # the withdrawal has been read
        assert (await links.describe("r")).state == "PLACED"
        withdrawn = dp.Cancel(request_id="later", withdrawn=True)
        again = dp.Submit(request_id="later", model="m", prompt_ids=[1], max_tokens=8, n=1)
        await other.send(dp.DispatchRequest(cancels=[withdrawn], submits=[again]))
        await until(lambda: other.by_id("refused", "later"))  # its id came again in the very message that withdrew it
        assert (await links.describe("later")).state == "CANCELLED"

    async def test_a_broken_link_comes_back_to_its_requests(self, links: SchedulerLinks) -> None:
        gateway = await links.gateway()
        await links.worker()
        lease = await gateway.place("r")
        gateway.cut()
        back = await links.gateway()
        await until(lambda: back.lease("r") == lease and back.catalog)
        await back.finish("r")
        assert (await links.described("r", lambda r: r.state != "PLACED")).state == "FINISHED"

    async def test_hello_comes_first_and_once(self, links: SchedulerLinks) -> None:
        nameless = await links.gateway("")
        await until(lambda: nameless.ended)
        assert reason(nameless) == "HELLO_REQUIRED"
        gateway = await links.gateway()
        await gateway.send(dp.DispatchRequest(hello=dp.GatewayHello(gateway_id="again")))
        await until(lambda: gateway.ended)
        assert reason(gateway) == "HELLO_REQUIRED"

    async def test_unknown_record(self, links: SchedulerLinks) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await links.describe("nobody's")
        error = from_rpc_error(failed.value)
        assert (error.code, error.reason, error.field) == (
            grpc.StatusCode.NOT_FOUND,
            "REQUEST_NOT_FOUND",
            "request_id",
        )


class TestFleet:
    async def test_hello_and_status(self, links: SchedulerLinks) -> None:
        worker = await links.worker()
        hello = worker.messages[0].hello
        assert (hello.heartbeat_interval_ms, hello.lease_ttl_ms) == (1000, 2000)
        gateway = await links.gateway()
        await gateway.place("r")
        await until(lambda: gateway.lease("r"))
        fleet = await links.fleet.DescribeFleet(fp.DescribeFleetRequest(), timeout=WAIT_S)
        assert (fleet.incarnation, fleet.queued, fleet.live, fleet.gateways) == (hello.incarnation, 0, 1, 1)
        assert fleet.journal_ok
        (status,) = fleet.workers
        assert status.hello == worker_hello()
        assert (status.heartbeat.running, status.heartbeat.progress) == (1, fp.PROGRESS_OK)
        assert (status.placements, status.draining) == (1, False)
        assert status.heartbeat_age_ms < 2000

    async def test_disagreement_on_a_model_is_refused(self, links: SchedulerLinks) -> None:
        await links.worker()
        second = await links.worker(worker_hello("w2", digest="other"))
        await until(lambda: second.ended)
        assert second.error is not None
        assert second.error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert reason(second) == "MODEL_CONFLICT"
        third = await links.worker(worker_hello("w3"))
        assert third.messages

    async def test_an_incomplete_hello_is_refused(self, links: SchedulerLinks) -> None:
        worker = await links.worker(fp.WorkerHello(worker_id="w1", epoch="e1"))
        await until(lambda: worker.ended)
        assert reason(worker) == "HELLO_REQUIRED"

    async def test_silence_and_a_broken_link_lose_the_worker(self, links: SchedulerLinks) -> None:
        gateway, worker = await links.gateway(), await links.worker()
        lease = await gateway.place("r")
        worker.fall_silent()
        worker.cut()
        await until(lambda: gateway.heard("revoked"))
        (revoked,) = gateway.heard("revoked")
        assert (revoked.lease, revoked.reason, revoked.requeued) == (lease, "WORKER_LOST", True)
        await until(lambda: gateway.catalog == [])
        assert (await links.describe("r")).state == "QUEUED"

    async def test_a_new_boot_loses_the_old_ones_placements(self, links: SchedulerLinks) -> None:
        gateway, worker = await links.gateway(), await links.worker()
        await gateway.place("r")
        worker.fall_silent()
        await worker.end()
        await links.worker(worker_hello(epoch="e2"))
        await until(lambda: gateway.heard("revoked"))
        await gateway.submit("s")
        await until(lambda: gateway.by_id("placed", "s"))
        assert gateway.by_id("placed", "s").legs[0].epoch == "e2"

    async def test_an_id_in_use_is_refused(self, links: SchedulerLinks) -> None:
        await links.worker()
        second = await links.worker(worker_hello(epoch="e2"))
        await until(lambda: second.ended)
        assert reason(second) == "WORKER_ID_IN_USE"

    async def test_registry_in_redis(self, server: RedisServer, links: SchedulerLinks) -> None:
        await links.worker()
        async with server.client() as redis:
            assert await eventually(lambda: redis.smembers("lmesh:fleet")) == {"w1"}
            assert await redis.hget("lmesh:worker:w1", "running") == "1"
            assert 0 < await redis.pttl("lmesh:worker:w1") <= 10_000


class TestRedisGoesAway:
    async def test_streams_go_on_and_the_gap_is_filled(self, server: RedisServer, links: SchedulerLinks) -> None:
        gateway, worker = await links.gateway(), await links.worker()
        await gateway.place("before")
        await links.described("before", lambda r: r.durable)
        await server.kill()
        await gateway.place("meanwhile")
        await gateway.finish("before")
        for request_id, state in (("before", "FINISHED"), ("meanwhile", "PLACED")):
            record = await links.described(request_id, lambda r, state=state: r.state == state)
            assert not record.durable
        await until_journal(links, ok=False)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await links.describe("only Redis would know")
        assert from_rpc_error(failed.value).reason == "JOURNAL_UNAVAILABLE"
        await server.start()  # empty
        for request_id, state in (("before", "FINISHED"), ("meanwhile", "PLACED")):
            assert (await links.described(request_id, lambda r: r.durable)).state == state
        async with server.client() as redis:
            assert await redis.hget("lmesh:req:before", "state") == "FINISHED"
            assert await redis.get("lmesh:incarnation") == str(worker.messages[0].hello.incarnation)
        await until_journal(links, ok=True)
        await gateway.place("after")
        assert not gateway.ended
        assert not worker.ended
        assert gateway.heard("revoked") == []


async def until_journal(links: SchedulerLinks, *, ok: bool) -> None:
    await eventually(lambda: links.fleet.DescribeFleet(fp.DescribeFleetRequest()), lambda fleet: fleet.journal_ok is ok)


class TestMemoryAndRedis:
    async def test_what_memory_forgot_redis_knows(self, server: RedisServer) -> None:
        async with running_scheduler(server.url, ended_kept=0) as (service, links):
            gateway = await links.gateway()
            await links.worker()
            await gateway.place("r")
            await gateway.finish("r", completion_tokens=4)
            await until(lambda: service.scheduler.requests.find("r") is None)
            async with server.client() as redis:
                await eventually(lambda: redis.hget("lmesh:req:r", "state"), lambda state: state == "FINISHED")
                assert 0 < await redis.pttl("lmesh:req:r") <= 3_600_000
            record = await links.describe("r")
            assert (record.state, record.completion_tokens, record.worker_id) == ("FINISHED", 4, "w1")
            assert [e.event for e in record.timeline] == ["queued", "placed", "finished"]
            assert record.durable
            lease = gateway.lease("r")
            await gateway.submit("r")  # forgotten, so the id may be used again
            await until(lambda: len({item.legs[0].lease for item in gateway.heard("placed")} - {lease}) == 1)
            assert (await links.described("r", lambda r: r.durable)).state == "PLACED"

    async def test_a_second_scheduler_fences_the_first(self, server: RedisServer) -> None:
        settings = SchedulerSettings(address="127.0.0.1:0", redis_url=server.url)
        redis, incarnation, _ = await open_redis(settings)
        service = SchedulerService(settings, redis, incarnation)
        task = asyncio.create_task(service.run(Shutdown()))
        await until(service.server.serving)
        assert await next_incarnation(redis) > incarnation
        async with asyncio.timeout(WAIT_S):
            assert await task == 1
        await redis.aclose()


@dataclass
class Process:
    """The scheduler as its own process, and its log."""

    process: asyncio.subprocess.Process
    lines: list[dict[str, Any]] = field(default_factory=list)

    async def read_log(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            if line.startswith(b"{"):  # gRPC's own library may add a line of its own
                self.lines.append(json.loads(line))

    def logged(self, message: str) -> dict[str, Any] | None:
        return next((line for line in self.lines if line["message"] == message), None)


@asynccontextmanager
async def scheduler_process(redis_url: str, address: str = "127.0.0.1:0") -> AsyncIterator[Process]:
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("LMESH_")},
        "LMESH_SCHEDULER_ADDRESS": address,
        "LMESH_SCHEDULER_REDIS_URL": redis_url,
        "LMESH_DIE_WITH_PARENT": "1",
    }
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "lmesh_scheduler", env=env, stderr=subprocess.PIPE
    )
    process = Process(started)
    log = asyncio.create_task(process.read_log())
    try:
        yield process
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()
        await log


class TestProcess:
    async def test_sigterm_drains_and_flushes(self, server: RedisServer) -> None:
        async with scheduler_process(server.url) as scheduler:
            await until(lambda: scheduler.logged("ready"))
            links = SchedulerLinks((scheduler.logged("ready") or {})["port"])
            health = health_pb2_grpc.HealthStub(links.channel)
            check = health_pb2.HealthCheckRequest(service="lmesh.scheduler.v1.DispatchService")
            assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
            gateway = await links.gateway()
            await links.worker()
            await gateway.place("r")
            scheduler.process.send_signal(signal.SIGTERM)
            await until(lambda: scheduler.logged("draining"))
            assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await gateway.submit("late")
            await until(lambda: gateway.heard("refused"))
            assert gateway.by_id("refused", "late").reason == "DRAINING"
            assert scheduler.process.returncode is None
            await gateway.finish("r")
            async with asyncio.timeout(WAIT_S):
                assert await scheduler.process.wait() == 0
            assert gateway.error is None  # the link ended well
            await links.close()
        assert [line for line in scheduler.lines if line["level"] == "error"] == []
        async with server.client() as redis:
            assert await redis.hget("lmesh:req:r", "state") == "FINISHED"

    async def test_redis_must_answer_at_boot(self, server: RedisServer) -> None:
        await server.kill()
        async with scheduler_process(server.url) as scheduler, asyncio.timeout(WAIT_S):
            assert await scheduler.process.wait() == 2
        line = scheduler.logged("Redis does not answer") or {}
        assert line["setting"] == "LMESH_SCHEDULER_REDIS_URL"

    async def test_a_taken_address_is_named(self, server: RedisServer, links: SchedulerLinks) -> None:
        address = f"127.0.0.1:{links.port}"
        async with scheduler_process(server.url, address) as scheduler, asyncio.timeout(WAIT_S):
            assert await scheduler.process.wait() == 2
        line = scheduler.logged("cannot listen") or {}
        assert address in line["detail"]
