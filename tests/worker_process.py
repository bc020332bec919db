"""A worker's server around a scripted engine, a fake scheduler and Run clients, all over real sockets."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from lmesh.scheduler.v1 import fleet_pb2, fleet_pb2_grpc
from lmesh.worker.v1 import run_pb2, run_pb2_grpc
from lmesh_chassis.channel import connect
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.server import GrpcServer
from lmesh_worker.config import WorkerSettings
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine_client import EngineClient
from lmesh_worker.worker import ModelIdentity, Worker
from prometheus_client import CollectorRegistry

ENGINE = (sys.executable, "-P", str(Path(__file__).with_name("scripted_engine.py")))
ERROR = run_pb2.SEQUENCE_FINISH_ERROR
LENGTH = run_pb2.SEQUENCE_FINISH_LENGTH
ABORTED = run_pb2.SEQUENCE_FINISH_ABORTED


async def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    """Polls a condition that another task brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is watched is another process
            await asyncio.sleep(0.005)


class FakeScheduler(fleet_pb2_grpc.FleetServiceServicer):
    """Takes hellos and heartbeats; `commands` go down to the worker."""

    def __init__(self) -> None:
        self.hellos: list[fleet_pb2.WorkerHello] = []
        self.requests: list[fleet_pb2.FleetRequest] = []
        self.commands: asyncio.Queue[fleet_pb2.FleetResponse | None] = asyncio.Queue()  # None breaks the stream

    async def Fleet(self, request_iterator: Any, context: Any) -> None:
        first = await context.read()
        self.hellos.append(first.hello)
        hello = fleet_pb2.FleetHello(incarnation=7, heartbeat_interval_ms=20, lease_ttl_ms=5000)
        await context.write(fleet_pb2.FleetResponse(hello=hello))
        reader = asyncio.create_task(self._read(context))
        writer = asyncio.create_task(self._write(context))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            writer.cancel()

    async def _read(self, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            self.requests.append(request)

    async def _write(self, context: Any) -> None:
        while (command := await self.commands.get()) is not None:
            await context.write(command)

    @property
    def heartbeat(self) -> fleet_pb2.Heartbeat:
        beats = (request.heartbeat for request in reversed(self.requests) if request.HasField("heartbeat"))
        return next(beats, fleet_pb2.Heartbeat())

    @property
    def deltas(self) -> list[fleet_pb2.KvDelta]:
        return [r.kv for r in self.requests if r.HasField("kv")]


@dataclass
class Received:
    """What one sequence got."""

    ids: list[int] = field(default_factory=list)
    start_pos: int | None = None
    finish: int = 0
    reason: str = ""
    timing: run_pb2.SlotTiming | None = None
    logprobs: list[float] = field(default_factory=list)


class Gateway:
    """One Run stream; keeps what came by (slot, lease)."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.step_seqs: list[int] = []
        self.messages = 0
        self.received: dict[tuple[int, int], Received] = defaultdict(Received)

    async def attach(
        self, epoch: str, gateway_id: str = "g", resume_after: int = 0, *, takes_later: bool = False
    ) -> run_pb2.WorkerRunHello:
        hello = run_pb2.RunHello(
            gateway_id=gateway_id, epoch=epoch, resume_after_step_seq=resume_after, takes_later=takes_later
        )
        await self.call.write(run_pb2.RunRequest(hello=hello))
        response = await self.call.read()
        if response is grpc.aio.EOF:
            raise AssertionError(f"no hello: {await self.call.code()}")
        return response.hello

    async def start(self, *starts: run_pb2.Start) -> None:
        await self.call.write(run_pb2.RunRequest(starts=starts))

    async def abort(self, slot: int, lease: int) -> None:
        await self.call.write(run_pb2.RunRequest(aborts=[run_pb2.Abort(slot=slot, lease=lease)]))

    async def ack(self, step_seq: int) -> None:
        await self.call.write(run_pb2.RunRequest(acked_step_seq=step_seq))

    async def read(self) -> run_pb2.StepOutputs | None:
        """One message's steps, taken in; the last of them, or None at the stream's end."""
        async with asyncio.timeout(30):
            response = await self.call.read()
        if response is grpc.aio.EOF:
            return None
        self.messages += 1
        for outputs in (response.outputs, *response.later):
            self.step_seqs.append(outputs.step_seq)
            self._take(outputs)
        return outputs

    def _take(self, outputs: run_pb2.StepOutputs) -> None:
        entries = [self.received[key] for key in zip(outputs.slot, outputs.lease, strict=True)]
        begin = 0
        for i, entry in enumerate(entries):
            entry.start_pos = outputs.start_pos[i] if entry.start_pos is None else entry.start_pos
            entry.ids += outputs.ids[begin : begin + outputs.n_new[i]]
            entry.finish = outputs.finish[i]
            begin += outputs.n_new[i]
        for error in outputs.errors:
            entries[error.entry].reason = error.reason
        for timing in outputs.timings:
            entries[timing.entry].timing = timing
        for logprobs in outputs.logprobs:
            entries[logprobs.entry].logprobs += logprobs.chosen

    async def read_until_finished(self, *keys: tuple[int, int]) -> None:
        while not all(self.received[key].finish for key in keys):
            assert await self.read() is not None, f"stream ended: {await self.call.code()}"


def start(slot: int, request_id: str = "count", *, lease: int = 0, max_tokens: int = 5, **kwargs: Any) -> run_pb2.Start:
    """A start of ids 1, 2, 3; its lease is 100 + slot unless told."""
    params = {"max_tokens": max_tokens, "top_p": 1.0, "logprobs": -1, "prompt_logprobs": -1, **kwargs.pop("params", {})}
    ids = kwargs.pop("ids", [1, 2, 3])
    values = {"prompt_len": len(ids), **kwargs}
    return run_pb2.Start(
        slot=slot,
        lease=lease or 100 + slot,
        request_id=request_id,
        ids=ids,
        params=run_pb2.SequenceParams(**params),
        **values,
    )


@dataclass
class RunningWorker:
    """A worker in this process; `done` resolves to its exit status."""

    worker: Worker
    engine: EngineClient
    scheduler: FakeScheduler
    shutdown: Shutdown
    registry: CollectorRegistry
    done: asyncio.Task[int]
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    @property
    def epoch(self) -> str:
        return self.worker.epoch

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.worker.server.port}"

    def gateway(self) -> Gateway:
        """An unattached stream over a connection of its own."""
        self.channels.append(connect(self.address, retries=False))
        return Gateway(run_pb2_grpc.RunServiceStub(self.channels[-1]).Run(timeout=120))

    async def attached(self, gateway_id: str = "g") -> Gateway:
        gateway = self.gateway()
        await gateway.attach(self.epoch, gateway_id)
        return gateway

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value(name, {"model_name": "scripted"})


@asynccontextmanager
async def running_worker(source: str = "normal", *, wait: bool = True, **settings: Any) -> AsyncIterator[RunningWorker]:
    """A worker that has joined a fake scheduler; stopped at the end if it still runs."""
    scheduler = FakeScheduler()
    control = GrpcServer("127.0.0.1:0", domain="lmesh.scheduler")
    control.add(fleet_pb2_grpc.add_FleetServiceServicer_to_server, scheduler, "lmesh.scheduler.v1.FleetService")
    port = await control.start()
    values = {"drain_linger_s": 0.05, "drain_timeout_s": 20.0, **settings}
    options = WorkerSettings(model=source, scheduler=f"127.0.0.1:{port}", id="w", **values)
    engine = EngineClient.spawn(source, EngineConfig(), ENGINE)
    registry, shutdown = CollectorRegistry(), Shutdown()
    identity = ModelIdentity(model_id="scripted", source=source, digest="d1", text_digest="d2")
    worker = Worker(options, identity, engine, registry=registry)
    done = asyncio.create_task(worker.run(shutdown))
    running = RunningWorker(worker, engine, scheduler, shutdown, registry, done)
    try:
        if wait:
            await until(lambda: worker.server.serving() or done.done())
        yield running
    finally:
        for channel in running.channels:
            await channel.close()
        shutdown.request()
        await asyncio.wait_for(done, 30)
        await control.drain(0)


@asynccontextmanager
async def worker_process(
    model: Path, **settings: str
) -> AsyncIterator[tuple[FakeScheduler, asyncio.subprocess.Process]]:
    scheduler = FakeScheduler()
    control = GrpcServer("127.0.0.1:0", domain="lmesh.scheduler")
    control.add(fleet_pb2_grpc.add_FleetServiceServicer_to_server, scheduler, "lmesh.scheduler.v1.FleetService")
    port = await control.start()
    variables = {
        "model": str(model),
        "model_id": "tiny",
        "device": "cpu",
        "threads": "1",
        "kv_blocks": "64",
        **settings,
    }
    variables["scheduler"] = f"127.0.0.1:{port}"
    env = {**os.environ, **{f"LMESH_WORKER_{name.upper()}": value for name, value in variables.items()}}
    process = await asyncio.create_subprocess_exec(sys.executable, "-P", "-m", "lmesh_worker", env=env, stderr=-1)
    try:
        yield scheduler, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
        await control.drain(0)


def child_of(pid: int) -> int:
    """The only child process of `pid`."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
