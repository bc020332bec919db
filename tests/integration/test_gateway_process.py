"""The gateway as a process: several on one port, one metrics page, a drain on SIGTERM, bad settings."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.worker.v1 import run_pb2 as rp
from lmesh_chassis.lifecycle import Shutdown
from lmesh_gateway.config import GatewaySettings
from lmesh_gateway.gateway import Gateway

from tests.gateway_scene import app, collect, failure, opened, request, served_text
from tests.mesh import free_ports
from tests.scripted_peers import ScriptedScheduler, ScriptedWorker

LENGTH = rp.SEQUENCE_FINISH_LENGTH


class Process:
    """One started gateway and the lines that it logged."""

    def __init__(self, process: asyncio.subprocess.Process, grpc_port: int, http_port: int) -> None:
        self.process = process
        self.target, self.url = f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}"
        self.lines: list[dict[str, Any]] = []

    async def logged(self, message: str, times: int = 1) -> None:
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            while sum(line["message"] == message for line in self.lines) < times:
                line = await self.process.stderr.readline()
                assert line, f"the gateway ended: {self.lines[-3:]}"
                if line.startswith(b"{"):  # gRPC's own core writes plain lines
                    self.lines.append(json.loads(line))


@asynccontextmanager
async def started(scheduler: ScriptedScheduler, **settings: str) -> AsyncIterator[Process]:
    grpc_port, http_port = free_ports(2)
    names = {
        "SCHEDULER": f"127.0.0.1:{scheduler.port}",
        "GRPC_ADDRESS": f"127.0.0.1:{grpc_port}",
        "HTTP_ADDRESS": f"127.0.0.1:{http_port}",
        **settings,
    }
    environment = os.environ | {f"LMESH_GATEWAY_{name}": value for name, value in names.items()}
    environment["LMESH_DIE_WITH_PARENT"] = "1"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "lmesh_gateway", env=environment, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield Process(process, grpc_port, http_port)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def peers() -> AsyncIterator[tuple[ScriptedScheduler, ScriptedWorker]]:
    worker = ScriptedWorker()
    scheduler = ScriptedScheduler(served_text(), worker)
    await worker.open()
    await scheduler.open()
    yield scheduler, worker
    await scheduler.close()
    await worker.close()


async def test_sigterm_lets_a_live_stream_end(peers: tuple[ScriptedScheduler, ScriptedWorker]) -> None:
    scheduler, worker = peers
    async with started(scheduler, DRAIN_TIMEOUT_S="20s") as gateway:
        await gateway.logged("ready")
        async with grpc.aio.insecure_channel(gateway.target) as channel, httpx.AsyncClient(timeout=30) as http:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            assert (await http.get(f"{gateway.url}/health")).status_code == 200
            over_grpc = asyncio.create_task(collect(stub.Generate(request())))
            first = await worker.sequence(0)
            body = {"model": scheduler.model.id, "prompt": "Hello", "max_tokens": 5}
            over_http = asyncio.create_task(http.post(f"{gateway.url}/v1/completions", json=body))
            second = await worker.sequence(1)
            gateway.process.send_signal(signal.SIGTERM)
            await gateway.logged("draining")
            first.give([5, 6], LENGTH)
            second.give([5, 6], LENGTH)
            assert (await over_grpc).ids[0] == [5, 6]
            answer = await over_http
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
        assert await gateway.process.wait() == 0
        assert [(await scheduler.ended(i)).outcome for i in (0, 1)] == [dp.OUTCOME_FINISHED] * 2


async def test_two_processes_on_one_port(peers: tuple[ScriptedScheduler, ScriptedWorker]) -> None:
    scheduler, worker = peers
    async with started(scheduler, PROCESSES="2", DRAIN_TIMEOUT_S="5s") as gateway:
        await gateway.logged("ready", times=2)
        for index in range(8):  # each from a connection of its own, which the kernel gives to one of the two
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(gateway.target, options=options) as channel:
                call = asyncio.create_task(
                    collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request()))
                )
                (await worker.sequence(index)).give([index], LENGTH)
                assert (await call).ids[0] == [index]
        async with httpx.AsyncClient() as http:
            page = (await http.get(f"{gateway.url}/metrics")).text
        counted = [line for line in page.splitlines() if line.startswith("vllm:request_success_total")]
        assert [line.split()[-1] for line in counted] == ["8.0"]  # over both, whichever answered
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.process.wait() == 0


async def test_a_taken_port_is_refused(peers: tuple[ScriptedScheduler, ScriptedWorker]) -> None:
    scheduler, worker = peers
    for processes in ("1", "2"):
        taken = {"GRPC_ADDRESS": f"127.0.0.1:{worker.port}", "PROCESSES": processes}
        async with started(scheduler, **taken) as gateway:
            await gateway.logged("cannot serve")
            assert await gateway.process.wait() == 1


async def test_bad_setting(peers: tuple[ScriptedScheduler, ScriptedWorker]) -> None:
    scheduler, _ = peers
    async with started(scheduler, PROCESSES="0") as gateway:
        assert gateway.process.stderr is not None
        said = (await gateway.process.stderr.read()).decode()
        assert await gateway.process.wait() == 2 and "LMESH_GATEWAY" in said
    async with started(scheduler, PROCESES="2") as gateway:
        assert gateway.process.stderr is not None
        assert "LMESH_GATEWAY_PROCESES" in (await gateway.process.stderr.read()).decode()
        assert await gateway.process.wait() == 2


async def test_drain_timeout_cancels_what_is_left(peers: tuple[ScriptedScheduler, ScriptedWorker]) -> None:
    scheduler, worker = peers
    async with started(scheduler, DRAIN_TIMEOUT_S="300ms") as gateway:
        await gateway.logged("ready")
        async with grpc.aio.insecure_channel(gateway.target) as channel:
            call = asyncio.create_task(failure(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request())))
            await worker.sequence(0)
            gateway.process.send_signal(signal.SIGTERM)
            assert (await call)[0].code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert await gateway.process.wait() == 0
        assert (await scheduler.ended()).outcome == dp.OUTCOME_CANCELLED
        await worker.changes.until(lambda: worker.aborts)


async def test_one_of_several_listens_once_it_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that the kernel gives to a new process is no client's bad luck."""
    listening: list[bool] = []
    start = Gateway.start

    async def noted(gateway: Gateway) -> None:
        await start(gateway)
        listening.append(gateway.ready)

    monkeypatch.setattr(Gateway, "start", noted)
    for shared in (False, True):
        async with opened(served_text(), reuse_port=shared):
            pass
    assert listening == [False, True]


async def test_one_of_several_that_cannot_serve_leaves_when_asked() -> None:
    (nobody,) = free_ports(1)
    settings = GatewaySettings(
        grpc_address="127.0.0.1:0",
        http_address="127.0.0.1:0",
        scheduler=f"127.0.0.1:{nobody}",
        reuse_port=True,
        drain_linger_s=0.0,
        drain_timeout_s=1.0,
    )
    shutdown = Shutdown()
    serving = asyncio.create_task(Gateway(settings, app(settings)).run(shutdown))
    await asyncio.sleep(0)
    assert not serving.done()
    shutdown.request()
    async with asyncio.timeout(30):
        assert await serving == 0
