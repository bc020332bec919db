"""A scheduler and a worker that do what a test says, over real sockets: the gateway's peers, without their inside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.scheduler.v1 import dispatch_pb2_grpc, model_pb2
from lmesh.worker.v1 import run_pb2 as rp
from lmesh.worker.v1 import run_pb2_grpc
from lmesh_chassis.server import GrpcServer


class Changes:
    """Lets a test wait for what it wants to be true, without polling."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def note(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await self._changed.wait()


@dataclass(eq=False)
class Running:
    """A start as the worker took it."""

    start: rp.Start
    next_pos: int
    worker: ScriptedWorker
    gateway_id: str
    ended: bool = False

    def give(self, ids: Sequence[int], finish: Any = rp.SEQUENCE_FINISH_UNSPECIFIED, **columns: Any) -> None:
        self.worker.step([(self, ids, finish)], **columns)


class ScriptedWorker(run_pb2_grpc.RunServiceServicer):
    """Takes starts and aborts like a worker; gives the outputs that the test scripts."""

    def __init__(self, worker_id: str = "worker-1", epoch: str = "epoch-1") -> None:
        self.worker_id, self.epoch = worker_id, epoch
        self.changes = Changes()
        self.sequences: list[Running] = []
        self.aborts: list[tuple[int, int]] = []
        self.hellos: list[rp.RunHello] = []
        self.acked = 0
        self._steps: dict[str, list[rp.StepOutputs]] = {}  # by gateway
        self.refuse: grpc.StatusCode | None = None
        self.lost = 0
        self.deaf = False  # takes what comes and loses it, as a connection does that is about to break
        self._break = asyncio.Event()
        self._attached = 0
        self.server = GrpcServer("127.0.0.1:0", domain="lmesh.worker", reflection=False)

    async def open(self) -> None:
        self.server.add(run_pb2_grpc.add_RunServiceServicer_to_server, self, "lmesh.worker.v1.RunService")
        self.port = await self.server.start()

    async def close(self) -> None:
        await self.break_stream()
        await self.server.drain(0)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def break_stream(self) -> None:
        """Returns once nothing more goes out on the stream that there was."""
        self._break.set()
        self._break = asyncio.Event()
        await self.changes.until(lambda: not self._attached)

    async def sequence(self, index: int) -> Running:
        await self.changes.until(lambda: len(self.sequences) > index)
        return self.sequences[index]

    def step(
        self, parts: Sequence[tuple[Running, Sequence[int], Any]], *, lease: int | None = None, **columns: Any
    ) -> None:
        steps = self._steps[parts[0][0].gateway_id]
        outputs = rp.StepOutputs(step_seq=len(steps) + 1, weights_version=1)
        for sequence, ids, finish in parts:
            outputs.slot.append(sequence.start.slot)
            outputs.lease.append(sequence.start.lease if lease is None else lease)
            outputs.start_pos.append(sequence.next_pos)
            outputs.n_new.append(len(ids))
            outputs.ids.extend(ids)
            outputs.finish.append(finish)
            if lease is None:
                sequence.next_pos += len(ids)
                sequence.ended = finish != rp.SEQUENCE_FINISH_UNSPECIFIED
        for name, values in columns.items():
            getattr(outputs, name).extend(values)
        steps.append(outputs)
        self.changes.note()

    def forget_steps(self) -> None:
        """As when a session was dropped: the next one counts from 1."""
        for steps in self._steps.values():
            steps.clear()

    async def Run(self, request_iterator: Any, context: Any) -> None:
        hello = (await context.read()).hello
        self.hellos.append(hello)
        if self.refuse is not None:
            await context.abort(self.refuse, "scripted")
        broken = self._break
        await context.write(rp.RunResponse(hello=rp.WorkerRunHello(worker_id=self.worker_id, epoch=self.epoch)))
        self._attached += 1
        self.changes.note()
        tasks = [
            asyncio.create_task(self._read(context, hello.gateway_id)),
            asyncio.create_task(self._write(context, hello)),
            asyncio.create_task(broken.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._attached -= 1
            self.changes.note()
        if broken.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted break")

    async def _read(self, context: Any, gateway_id: str) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            if self.deaf:
                self.lost += len(request.starts)
            else:
                self._take(request, gateway_id)
            self.changes.note()

    def _take(self, request: rp.RunRequest, gateway_id: str) -> None:
        own = [sequence for sequence in self.sequences if sequence.gateway_id == gateway_id and not sequence.ended]
        self.acked = max(self.acked, request.acked_step_seq)
        for start in request.starts:
            assert start.slot not in [sequence.start.slot for sequence in own], f"slot {start.slot} is in use"
            own.append(Running(start, len(start.ids), self, gateway_id))
            self.sequences.append(own[-1])
        for abort in request.aborts:
            self.aborts.append((abort.slot, abort.lease))
            for sequence in own:
                if (sequence.start.slot, sequence.start.lease) == (abort.slot, abort.lease):
                    sequence.give([], rp.SEQUENCE_FINISH_ABORTED)

    async def _write(self, context: Any, hello: rp.RunHello) -> None:
        steps, cursor = self._steps.setdefault(hello.gateway_id, []), hello.resume_after_step_seq
        while True:
            await self.changes.until(lambda after=cursor: len(steps) > after, 60.0)
            due = steps[cursor:] if hello.takes_later else steps[cursor : cursor + 1]
            cursor += len(due)
            await context.write(rp.RunResponse(outputs=due[0], later=due[1:]))


@dataclass(frozen=True)
class ServedText:
    """The model that the scripted scheduler announces."""

    id: str
    source: str
    text_digest: str
    max_model_len: int = 8192
    vocab_size: int = 49152


@dataclass(eq=False)
class Record:
    """What the scheduler keeps of a request."""

    submit: dp.Submit
    gateway_id: str = ""
    lease: int = 0
    state: str = "QUEUED"
    finished: list[dp.Finished] = field(default_factory=list)
    started: int = 0


class ScriptedScheduler(dispatch_pb2_grpc.DispatchServiceServicer):
    """Places each submission on `worker` at once, unless `react` does something else with it."""

    def __init__(self, model: ServedText, worker: ScriptedWorker) -> None:
        self.model, self.worker = model, worker
        self.changes = Changes()
        self.records: dict[str, Record] = {}
        self.cancels: list[str] = []
        self.withdrawals: list[str] = []
        self.workers_lost: list[str] = []
        self.legs_lost: list[dp.LegLost] = []
        self.announces: list[dp.Announce] = []
        self.takeovers: list[dp.TakeOver] = []
        self.incarnation = 1
        self.adapters: list[model_pb2.CatalogAdapter] = []
        self.react: Callable[[Record], None] = self.place
        self._outboxes: dict[str, list[dp.DispatchResponse]] = {}  # by gateway
        self._break = asyncio.Event()
        self._leases = 100
        self.server = GrpcServer("127.0.0.1:0", domain="lmesh.scheduler", reflection=False)

    async def open(self) -> None:
        self.server.add(
            dispatch_pb2_grpc.add_DispatchServiceServicer_to_server, self, "lmesh.scheduler.v1.DispatchService"
        )
        self.port = await self.server.start()

    async def close(self) -> None:
        self.break_stream()
        await self.server.drain(0)

    def break_stream(self) -> None:
        self._break.set()
        self._break = asyncio.Event()

    async def record(self, index: int = 0) -> Record:
        await self.changes.until(lambda: len(self.records) > index)
        return list(self.records.values())[index]

    async def begun(self, index: int = 0) -> Record:
        record = await self.record(index)
        await self.changes.until(lambda: record.started)
        return record

    async def ended(self, index: int = 0) -> dp.Finished:
        record = await self.record(index)
        await self.changes.until(lambda: record.finished)
        return record.finished[0]

    def tell(self, gateway_id: str = "", **parts: Any) -> None:
        """Tells one gateway, or all."""
        for known, outbox in self._outboxes.items():
            if gateway_id in ("", known):
                outbox.append(dp.DispatchResponse(**parts))
        self.changes.note()

    def queue(self, record: Record) -> None:
        self.tell(record.gateway_id, queued=[dp.Queued(request_id=record.submit.request_id, position=1)])

    def place(self, record: Record) -> None:
        if not record.lease:
            self._leases += 1
            record.lease, record.state, record.started = self._leases, "PLACED", 0
        leg = dp.Leg(
            role=dp.ROLE_UNIFIED,
            worker_id=self.worker.worker_id,
            epoch=self.worker.epoch,
            address=self.worker.address,
            lease=record.lease,
        )
        self.tell(record.gateway_id, placed=[dp.Placed(request_id=record.submit.request_id, legs=[leg])])

    def requeue(self, record: Record, reason: str = "WORKER_LOST") -> None:
        """Takes the lease back; `place` gives the next one."""
        request_id = record.submit.request_id
        revoked = dp.Revoked(request_id=request_id, lease=record.lease, reason=reason, requeued=True)
        record.lease, record.state = 0, "QUEUED"
        self.tell(record.gateway_id, revoked=[revoked])

    def restart(self) -> None:
        """As after a kill -9: it knows no request, and begins under a new incarnation."""
        self.incarnation += 1
        self.records.clear()
        self._outboxes.clear()
        self.break_stream()

    def publish(self, tenant: str, name: str, *versions: int) -> None:
        """An adapter has these versions from now on; each one's digest is `<tenant>-<name>-<version>`."""
        self.adapters = [adapter for adapter in self.adapters if (adapter.tenant, adapter.name) != (tenant, name)]
        for version in versions:
            created = Timestamp(seconds=1_700_000_000 + version)
            digest = f"{tenant}-{name}-{version}"
            adapter = model_pb2.CatalogAdapter(
                tenant=tenant, name=name, version=version, digest=digest, created=created
            )
            self.adapters.append(adapter)
        self.tell(catalog=self.catalog())

    def catalog(self) -> model_pb2.ModelCatalog:
        model = self.model
        descriptor = model_pb2.ModelDescriptor(
            id=model.id,
            source=model.source,
            digest="d" * 64,
            text_digest=model.text_digest,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            block_size=16,
        )
        entry = model_pb2.CatalogEntry(model=descriptor, workers=1, created=Timestamp(seconds=1_700_000_000))
        entry.adapters.extend(self.adapters)
        return model_pb2.ModelCatalog(entries=[entry])

    async def Dispatch(self, request_iterator: Any, context: Any) -> None:
        gateway_id = (await context.read()).hello.gateway_id
        broken = self._break
        await context.write(dp.DispatchResponse(hello=dp.SchedulerHello(incarnation=self.incarnation)))
        self._outboxes.setdefault(gateway_id, []).insert(0, dp.DispatchResponse(catalog=self.catalog()))
        for record in self.records.values():  # the standing of what lives, as the real one tells it
            if record.gateway_id == gateway_id and record.state == "PLACED" and not record.finished:
                self.place(record)
        tasks = [
            asyncio.create_task(self._read(context, gateway_id)),
            asyncio.create_task(self._write(context, gateway_id)),
            asyncio.create_task(broken.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if broken.is_set():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted break")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, context: Any, gateway_id: str) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            self._take(request, gateway_id)
            self.changes.note()

    def _take(self, request: dp.DispatchRequest, gateway_id: str) -> None:
        for announce in request.announces:
            self.announces.append(announce)
            record = Record(announce.submit, gateway_id, announce.leg.lease, "PLACED")
            self.records.setdefault(announce.submit.request_id, record)
        for takeover in request.takeovers:
            self.takeovers.append(takeover)
            self.records.pop(takeover.submit.request_id, None)
            self._submit(takeover.submit, gateway_id)
        for submit in request.submits:
            self._submit(submit, gateway_id)
        for started in request.started:
            self.records[started.request_id].started += 1
        for lost in request.legs_lost:
            self._lose(lost)
        for finished in request.finished:
            self.records[finished.request_id].finished.append(finished)
        self.cancels += [cancel.request_id for cancel in request.cancels if not cancel.withdrawn]
        self.withdrawals += [cancel.request_id for cancel in request.cancels if cancel.withdrawn]
        self.workers_lost += [lost.worker_id for lost in request.workers_lost]

    def _lose(self, lost: dp.LegLost) -> None:
        self.legs_lost.append(lost)
        record = self.records[lost.request_id]
        if record.lease == lost.lease:
            record.lease, record.state = 0, "QUEUED"

    def _submit(self, submit: dp.Submit, gateway_id: str) -> None:
        known = self.records.get(submit.request_id)
        if known is not None and known.gateway_id == gateway_id and known.state == "QUEUED":
            self.tell(gateway_id, queued=[dp.Queued(request_id=submit.request_id)])  # said again on a new link
            return
        if known is not None:
            refused = dp.Refused(request_id=submit.request_id, reason="DUPLICATE_REQUEST_ID", message="it is live")
            self.tell(gateway_id, refused=[refused])
            return
        record = Record(submit, gateway_id)
        self.records[submit.request_id] = record
        self.react(record)

    async def _write(self, context: Any, gateway_id: str) -> None:
        outbox = self._outboxes[gateway_id]
        while True:
            await self.changes.until(lambda: outbox, 60.0)
            await context.write(outbox.pop(0))

    async def DescribeRequest(self, request: Any, context: Any) -> dp.DescribeRequestResponse:
        record = self.records.get(request.request_id)
        if record is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown")
        assert record is not None
        state = dp.Outcome.Name(record.finished[0].outcome).removeprefix("OUTCOME_") if record.finished else None
        response = dp.DescribeRequestResponse(
            request_id=request.request_id,
            state=state or record.state,
            model=record.submit.model,
            tenant=record.submit.tenant,
            worker_id=self.worker.worker_id,
            prompt_tokens=len(record.submit.prompt_ids),
            durable=True,
        )
        for finished in record.finished:
            response.completion_tokens = finished.completion_tokens
            response.timeline.extend(finished.events)
        return response
