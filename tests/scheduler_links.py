"""A scheduler in this process, and the ends of its links that a gateway and a worker hold, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.scheduler.v1 import dispatch_pb2_grpc, fleet_pb2_grpc, model_pb2
from lmesh.scheduler.v1 import fleet_pb2 as fp
from lmesh_chassis.channel import connect
from lmesh_chassis.lifecycle import Shutdown
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.service import SchedulerService, open_redis

WAIT_S = 30.0


async def until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Waits for what other tasks bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is watched is another process
            await asyncio.sleep(0.005)


async def eventually(ask: Callable[[], Awaitable[Any]], condition: Callable[[Any], object] = bool) -> Any:
    """Asks until the answer is as wanted, and returns it."""
    async with asyncio.timeout(WAIT_S):
        while not condition(answer := await ask()):  # noqa: ASYNC110 - what is asked is another process
            await asyncio.sleep(0.01)
        return answer


class Stream:
    """One end of a link: says hello, collects what comes until the stream ends with `error` or without."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.messages: list[Any] = []
        self.error: grpc.aio.AioRpcError | None = None
        self._reader = asyncio.create_task(self._read())

    @property
    def ended(self) -> bool:
        return self._reader.done()

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self.messages.append(message)
            if await self._call.code() is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    await self._call.code(),
                    await self._call.initial_metadata(),
                    await self._call.trailing_metadata(),
                    await self._call.details(),
                )
        except grpc.aio.AioRpcError as error:
            self.error = error

    async def send(self, message: Any) -> None:
        await self._call.write(message)

    async def end(self) -> None:
        """Half-closes and waits for the other side."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.RpcError):
            await self._call.done_writing()
        async with asyncio.timeout(WAIT_S):
            await self._reader

    def cut(self) -> None:
        """Drops the stream at once."""
        self._call.cancel()


class GatewayEnd(Stream):
    """What a gateway hears, by kind."""

    def heard(self, kind: str) -> list[Any]:
        return [item for message in self.messages for item in getattr(message, kind)]

    def by_id(self, kind: str, request_id: str) -> Any | None:
        return next((item for item in self.heard(kind) if item.request_id == request_id), None)

    def lease(self, request_id: str) -> int:
        placed = self.by_id("placed", request_id)
        return 0 if placed is None else placed.legs[0].lease

    @property
    def catalog(self) -> list[Any]:
        catalogs = [message.catalog for message in self.messages if message.HasField("catalog")]
        return list(catalogs[-1].entries) if catalogs else []

    async def submit(self, *request_ids: str, model: str = "m", **fields: Any) -> None:
        fields = {"prompt_ids": [1, 2, 3], "max_tokens": 8, "n": 1, **fields}
        submits = [dp.Submit(request_id=request_id, model=model, **fields) for request_id in request_ids]
        await self.send(dp.DispatchRequest(submits=submits))

    async def place(self, request_id: str, **fields: Any) -> int:
        await self.submit(request_id, **fields)
        await until(lambda: self.lease(request_id))
        return self.lease(request_id)

    async def finish(self, request_id: str, **fields: Any) -> None:
        outcome = fields.pop("outcome", dp.OUTCOME_FINISHED)
        report = dp.Finished(request_id=request_id, lease=self.lease(request_id), outcome=outcome, **fields)
        await self.send(dp.DispatchRequest(finished=[report]))


class WorkerEnd(Stream):
    """Sends a heartbeat as often as it is told to."""

    beats: asyncio.Task[None]

    def begin_beating(self, interval_s: float = 0.05) -> None:
        self.beats = asyncio.create_task(self._beat(interval_s))

    async def _beat(self, interval_s: float) -> None:
        with contextlib.suppress(asyncio.InvalidStateError, grpc.RpcError):
            while not self.ended:
                await self.send(fp.FleetRequest(heartbeat=fp.Heartbeat(running=1, progress=fp.PROGRESS_OK)))
                await asyncio.sleep(interval_s)

    @property
    def revoked(self) -> list[int]:
        """Leases that it was told to drop."""
        return [lease for message in self.messages for lease in message.revoked_leases]

    def fall_silent(self) -> None:
        self.beats.cancel()


def worker_hello(worker_id: str = "w1", *, epoch: str = "e1", digest: str = "d", max_seqs: int = 8) -> fp.WorkerHello:
    model = model_pb2.ModelDescriptor(
        id="m", source="s", digest=digest, text_digest="t", max_model_len=512, vocab_size=1000, block_size=16
    )
    capacity = fp.Capacity(max_seqs=max_seqs, max_step_tokens=512, kv_blocks=64)
    return fp.WorkerHello(
        worker_id=worker_id, epoch=epoch, address="127.0.0.1:1", model=model, capacity=capacity, device="cpu"
    )


class SchedulerLinks:
    """Stubs of one scheduler."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.channel = connect(f"127.0.0.1:{port}", retries=False)
        self.dispatch = dispatch_pb2_grpc.DispatchServiceStub(self.channel)
        self.fleet = fleet_pb2_grpc.FleetServiceStub(self.channel)
        self._streams: list[Stream] = []

    async def gateway(self, gateway_id: str = "g1") -> GatewayEnd:
        end = GatewayEnd(self.dispatch.Dispatch())
        self._streams.append(end)
        await end.send(dp.DispatchRequest(hello=dp.GatewayHello(gateway_id=gateway_id)))
        await until(lambda: end.messages or end.ended)
        return end

    async def worker(self, hello: fp.WorkerHello | None = None) -> WorkerEnd:
        """A link that got its hello, and beats, or one that was refused."""
        end = WorkerEnd(self.fleet.Fleet())
        self._streams.append(end)
        await end.send(fp.FleetRequest(hello=worker_hello() if hello is None else hello))
        await until(lambda: end.messages or end.ended)
        end.begin_beating()
        return end

    async def describe(self, request_id: str) -> Any:
        return await self.dispatch.DescribeRequest(dp.DescribeRequestRequest(request_id=request_id), timeout=WAIT_S)

    async def described(self, request_id: str, condition: Callable[[Any], object]) -> Any:
        """The record, once it is as wanted."""
        return await eventually(lambda: self.describe(request_id), condition)

    async def close(self) -> None:
        for stream in self._streams:
            stream.cut()
        await self.channel.close()


@asynccontextmanager
async def running_scheduler(redis_url: str, **changes: Any) -> AsyncIterator[tuple[SchedulerService, SchedulerLinks]]:
    """A scheduler that serves, and links to it; drained at the end."""
    fields = {
        "drain_timeout_s": 0.5,
        "heartbeat_interval_s": 1.0,
        "lease_ttl_s": 2.0,
        "redis_timeout_s": 1.0,
        **changes,
    }
    settings = SchedulerSettings(address="127.0.0.1:0", redis_url=redis_url, **fields)
    redis, incarnation, inherited = await open_redis(settings)
    service, shutdown = SchedulerService(settings, redis, incarnation, inherited), Shutdown()
    task = asyncio.create_task(service.run(shutdown))
    await until(lambda: service.server.serving() or task.done())
    links = SchedulerLinks(service.server.port)
    try:
        yield service, links
    finally:
        await links.close()
        shutdown.request()
        await task
        await redis.aclose()
