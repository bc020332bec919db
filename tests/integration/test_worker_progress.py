"""A worker whose engine stands still: told at once, mended by itself, and never mistaken for one that compiles."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from lmesh.scheduler.v1 import fleet_pb2
from lmesh.worker.v1 import run_pb2_grpc
from lmesh_chassis.channel import connect

from tests.tiny_model import save_tiny_llama
from tests.worker_process import (
    ABORTED,
    LENGTH,
    FakeScheduler,
    Gateway,
    child_of,
    running_worker,
    start,
    until,
    worker_process,
)

OK, COMPILING, STUCK = fleet_pb2.PROGRESS_OK, fleet_pb2.PROGRESS_COMPILING, fleet_pb2.PROGRESS_STUCK


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


async def progress(scheduler: FakeScheduler, wanted: int) -> None:
    await until(lambda: scheduler.heartbeat.progress == wanted)


async def test_a_real_engine_that_is_stopped_and_goes_on(model: Path) -> None:
    async with worker_process(model, step_bound_s="1", kv_blocks="512") as (scheduler, process):
        await until(lambda: bool(scheduler.hellos) or process.returncode is not None, timeout_s=90)
        (hello,) = scheduler.hellos
        engine = child_of(process.pid)
        async with connect(hello.address, retries=False) as channel:
            gateway = Gateway(run_pb2_grpc.RunServiceStub(channel).Run(timeout=120))
            await gateway.attach(hello.epoch)
            await gateway.start(*(start(slot, ids=[slot], max_tokens=500) for slot in range(1, 9)))
            await gateway.read()
            os.kill(engine, signal.SIGSTOP)
            await progress(scheduler, STUCK)
            await gateway.start(start(9, ids=[9], max_tokens=500), start(10, ids=[10], max_tokens=20))
            # The scheduler moves what it had placed here, all but the last one.
            scheduler.commands.put_nowait(fleet_pb2.FleetResponse(revoked_leases=range(101, 110)))
            await gateway.read_until_finished(*((slot, 100 + slot) for slot in range(1, 10)))
            assert {gateway.received[slot, 100 + slot].finish for slot in range(1, 10)} == {ABORTED}
            count = len(scheduler.requests)
            await until(lambda: len(scheduler.requests) > count + 5)
            assert scheduler.heartbeat.progress == STUCK
            os.kill(engine, signal.SIGCONT)
            await progress(scheduler, OK)
            await gateway.read_until_finished((10, 110))
            await gateway.start(start(1, ids=[1], lease=200, max_tokens=5))
            await gateway.read_until_finished((1, 200))
            assert (gateway.received[1, 200].finish, gateway.received[10, 110].finish) == (LENGTH, LENGTH)
            assert gateway.received[10, 110].ids
            await until(lambda: scheduler.heartbeat.running == 0 and scheduler.heartbeat.kv_blocks_used == 0)
            assert scheduler.heartbeat.progress == OK


async def test_work_taken_from_a_stopped_engine_does_not_make_it_well() -> None:
    async with running_worker(step_bound_s=0.2) as running:
        gateway = await running.attached()
        await gateway.start(start(1, "hold", max_tokens=9))
        await gateway.read()
        os.kill(running.engine.pid, signal.SIGSTOP)
        await progress(running.scheduler, STUCK)
        await until(lambda: not running.worker.server.serving())
        assert running.metric("lmesh:engine_stuck") == 1
        running.scheduler.commands.put_nowait(fleet_pb2.FleetResponse(revoked_leases=[101]))
        await gateway.read_until_finished((1, 101))
        count = len(running.scheduler.requests)
        await until(lambda: len(running.scheduler.requests) > count + 20)
        assert running.scheduler.heartbeat.progress == STUCK
        assert not running.worker.server.serving()
        os.kill(running.engine.pid, signal.SIGCONT)
        await progress(running.scheduler, OK)
        await until(lambda: running.worker.server.serving())
        assert running.metric("lmesh:engine_stuck") == 0
        await gateway.start(start(1, lease=7))
        await gateway.read_until_finished((1, 7))
        assert gateway.received[1, 7].finish == LENGTH


async def test_a_worker_with_a_stopped_engine_can_still_be_ended() -> None:
    async with running_worker(step_bound_s=0.2, drain_timeout_s=0.3) as running:
        gateway = await running.attached()
        await gateway.start(start(1, "hold", max_tokens=9))
        await gateway.read()
        os.kill(running.engine.pid, signal.SIGSTOP)
        await progress(running.scheduler, STUCK)
        running.shutdown.request()
        assert await asyncio.wait_for(running.done, 30) == 0


async def test_compiling_is_not_stuck() -> None:
    async with running_worker(step_bound_s=0.1) as running:
        gateway = await running.attached()
        await gateway.start(start(1, "compile"))
        await progress(running.scheduler, COMPILING)
        begin = len(running.scheduler.requests)
        await until(lambda: len(running.scheduler.requests) > begin + 20)  # of 20 ms each, so long past the bound
        told = {r.heartbeat.progress for r in running.scheduler.requests[begin:] if r.HasField("heartbeat")}
        assert told == {COMPILING}
        assert running.worker.server.serving()
        await gateway.abort(1, 101)
        await progress(running.scheduler, OK)


async def test_compiling_has_a_bound_of_its_own() -> None:
    async with running_worker(step_bound_s=0.1, compile_bound_s=0.3) as running:
        gateway = await running.attached()
        await gateway.start(start(1, "compile"))
        await progress(running.scheduler, STUCK)
        await gateway.abort(1, 101)
        await progress(running.scheduler, OK)
