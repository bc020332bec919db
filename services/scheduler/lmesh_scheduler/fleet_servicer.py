"""The Fleet link: protos on one side, the core on the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from lmesh.scheduler.v1 import fleet_pb2 as pb
from lmesh.scheduler.v1 import fleet_pb2_grpc, model_pb2

from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.errors import HelloRequiredError
from lmesh_scheduler.fleet import Heartbeat, Held, Hello, ModelDescriptor, Worker
from lmesh_scheduler.prefix_index import Delta, boot_of
from lmesh_scheduler.scheduler import Scheduler

SERVICE_NAME = "lmesh.scheduler.v1.FleetService"
_MAX_LEASES = 4096  # of one message

RpcContext = Any  # grpc's own type leaves its messages open


class FleetServicer(fleet_pb2_grpc.FleetServiceServicer):
    """One call a worker."""

    def __init__(
        self,
        scheduler: Scheduler,
        settings: SchedulerSettings,
        *,
        clock: Callable[[], float],
        journal_ok: Callable[[], bool],
    ) -> None:
        self._scheduler, self._settings = scheduler, settings
        self._clock, self._journal_ok = clock, journal_ok
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Lets every link end."""
        self._closing.set()

    async def Fleet(  # type: ignore[override]  # a coroutine that writes through its context
        self, request_iterator: object, context: RpcContext
    ) -> None:
        """The link; ends when the worker ends its side or goes silent for longer than its lease."""
        first = await context.read()
        if first is grpc.aio.EOF or not _full(first.hello):
            raise HelloRequiredError(
                "the first message must be a hello with worker_id, epoch, address, model.id and capacity.max_seqs",
                field="hello",
            )
        worker = self._scheduler.worker_joined(_hello(first.hello))
        awake = asyncio.Event()
        worker.wake = awake.set
        try:
            await context.write(pb.FleetResponse(hello=self._greeting()))
            await self._serve(worker, awake, context)
        finally:
            # A newer link of the same boot may have taken over meanwhile; then the worker is not gone.
            if self._scheduler.fleet.current(worker):
                self._scheduler.worker_unlinked(worker)

    async def _serve(self, worker: Worker, awake: asyncio.Event, context: RpcContext) -> None:
        reader = asyncio.create_task(self._read(worker, context))
        writer = asyncio.create_task(self._write(worker, awake, context))
        closing = asyncio.create_task(self._closing.wait())
        tasks: tuple[asyncio.Task[Any], ...] = (reader, writer, closing)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for link in (reader, writer):
                if link.done():
                    link.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _greeting(self) -> pb.FleetHello:
        return pb.FleetHello(
            incarnation=self._scheduler.incarnation,
            heartbeat_interval_ms=round(self._settings.heartbeat_interval_s * 1e3),
            lease_ttl_ms=round(self._settings.lease_ttl_s * 1e3),
        )

    async def _read(self, worker: Worker, context: RpcContext) -> None:
        while True:
            try:
                async with asyncio.timeout(self._settings.lease_ttl_s):
                    message = await context.read()
            except TimeoutError:
                return
            if message is grpc.aio.EOF:
                return
            if message.HasField("hello"):
                raise HelloRequiredError("a link has one hello, at its beginning", field="hello")
            beat = _heartbeat(message.heartbeat) if message.HasField("heartbeat") else worker.heartbeat
            self._scheduler.worker_beat(worker, beat, draining=message.draining)
            if message.HasField("kv"):
                self._take_delta(worker, message.kv)
            for state in message.adapters:
                self._scheduler.residency.told(
                    worker, state.digest, held=state.held, reason=state.reason, message=state.message
                )
            if message.adapters:
                self._scheduler.placements.place(worker.hello.model.id)

    async def _write(self, worker: Worker, awake: asyncio.Event, context: RpcContext) -> None:
        """Tells a worker what gathers for it; the first look is for what an earlier link could not tell."""
        while True:
            awake.clear()
            message = self._next(worker)
            if message is None:
                await awake.wait()
            else:
                await context.write(message)

    def _next(self, worker: Worker) -> pb.FleetResponse | None:
        shelf = self._scheduler.residency.shelf(worker)
        if not (worker.revoked or worker.snapshot_due or shelf.loads or shelf.drops):
            return None
        leases = worker.revoked[:_MAX_LEASES]
        message = pb.FleetResponse(
            revoked_leases=leases,
            kv_snapshot=worker.snapshot_due,
            load_adapters=[pb.LoadAdapter(digest=digest, artifact=artifact) for digest, artifact in shelf.loads],
            drop_adapters=shelf.drops,
        )
        worker.snapshot_due = False
        del worker.revoked[: len(leases)]
        shelf.loads, shelf.drops = [], []
        return message

    def _take_delta(self, worker: Worker, kv: pb.KvDelta) -> None:
        delta = Delta(kv.seq, kv.snapshot, kv.added, kv.removed)
        if not self._scheduler.index.apply(boot_of(worker.hello), delta) and not worker.snapshot_asked:
            worker.snapshot_due = worker.snapshot_asked = True
            worker.wake()
        elif kv.snapshot:
            worker.snapshot_asked = False

    async def DescribeFleet(self, request: pb.DescribeFleetRequest, context: RpcContext) -> pb.DescribeFleetResponse:
        """The fleet as the scheduler sees it."""
        scheduler = self._scheduler
        return pb.DescribeFleetResponse(
            incarnation=scheduler.incarnation,
            queued=scheduler.placements.queued,
            live=len(scheduler.requests) - scheduler.placements.queued,
            gateways=len(scheduler.gateways),
            workers=[self._status(worker) for worker in scheduler.fleet.workers()],
            journal_ok=self._journal_ok(),
        )

    def _status(self, worker: Worker) -> pb.WorkerStatus:
        return pb.WorkerStatus(
            hello=_hello_message(worker.hello),
            heartbeat=_heartbeat_message(worker.heartbeat),
            heartbeat_age_ms=round(max(0.0, self._clock() - worker.seen) * 1e3),
            placements=len(worker.placements),
            draining=worker.draining,
            kv_granules=self._scheduler.index.size(boot_of(worker.hello)),
            adapters=sorted(self._scheduler.residency.shelf(worker).held),
        )


def _full(hello: pb.WorkerHello) -> bool:
    named = hello.worker_id and hello.epoch and hello.address and hello.model.id
    return bool(named) and hello.capacity.max_seqs > 0


def _hello(hello: pb.WorkerHello) -> Hello:
    model = hello.model
    return Hello(
        worker_id=hello.worker_id,
        epoch=hello.epoch,
        address=hello.address,
        model=ModelDescriptor(
            id=model.id,
            source=model.source,
            digest=model.digest,
            text_digest=model.text_digest,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            block_size=model.block_size,
            weights_version=model.weights_version,
            kv_format=model.kv_format,
            kv_granule_blocks=model.kv_granule_blocks,
        ),
        max_seqs=hello.capacity.max_seqs,
        max_step_tokens=hello.capacity.max_step_tokens,
        kv_blocks=hello.capacity.kv_blocks,
        device=hello.device,
        adapters=tuple(hello.adapters),
        held=tuple(Held(request_id=h.request_id, lease=h.lease, sequences=h.sequences) for h in hello.held),
    )


def _heartbeat(beat: pb.Heartbeat) -> Heartbeat:
    return Heartbeat(
        running=beat.running,
        waiting=beat.waiting,
        kv_blocks_used=beat.kv_blocks_used,
        steps=beat.steps,
        prefix_query_tokens=beat.prefix_query_tokens,
        prefix_hit_tokens=beat.prefix_hit_tokens,
        preemptions=beat.preemptions,
        generated_tokens=beat.generated_tokens,
        stuck=beat.progress == pb.PROGRESS_STUCK,
        progress=beat.progress,
    )


def _hello_message(hello: Hello) -> pb.WorkerHello:
    model = hello.model
    return pb.WorkerHello(
        worker_id=hello.worker_id,
        epoch=hello.epoch,
        address=hello.address,
        model=model_pb2.ModelDescriptor(
            id=model.id,
            source=model.source,
            digest=model.digest,
            text_digest=model.text_digest,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            block_size=model.block_size,
        ),
        capacity=pb.Capacity(max_seqs=hello.max_seqs, max_step_tokens=hello.max_step_tokens, kv_blocks=hello.kv_blocks),
        device=hello.device,
    )


def _heartbeat_message(beat: Heartbeat) -> pb.Heartbeat:
    return pb.Heartbeat(
        running=beat.running,
        waiting=beat.waiting,
        kv_blocks_used=beat.kv_blocks_used,
        steps=beat.steps,
        prefix_query_tokens=beat.prefix_query_tokens,
        prefix_hit_tokens=beat.prefix_hit_tokens,
        preemptions=beat.preemptions,
        generated_tokens=beat.generated_tokens,
        progress=beat.progress,  # type: ignore[arg-type]  # the numbers are those of Progress
    )
