"""The Dispatch link: protos on one side, the core on the other."""

from __future__ import annotations

import asyncio
from array import array
from typing import Any

import grpc
from lmesh.scheduler.v1 import dispatch_pb2 as pb
from lmesh.scheduler.v1 import dispatch_pb2_grpc, model_pb2
from redis.exceptions import RedisError

from lmesh_scheduler.catalog_wire import catalog, timestamp
from lmesh_scheduler.errors import HelloRequiredError, JournalUnavailableError, RequestNotFoundError, SlowLinkError
from lmesh_scheduler.failover import Leg
from lmesh_scheduler.gateways import Event, Expired, Gateway, Placed, Queued, Refused, Revoked
from lmesh_scheduler.journal import Journal, parse_timeline
from lmesh_scheduler.requests import Ending, Request, State, Submission, TimelineEvent
from lmesh_scheduler.scheduler import Scheduler

SERVICE_NAME = "lmesh.scheduler.v1.DispatchService"
MAX_EVENTS = 100_000  # events that a gateway may leave unread
BATCH = 4096  # events of one message; a few hundred bytes each

RpcContext = Any  # grpc's own type leaves its messages open
_OUTCOMES = {
    pb.OUTCOME_FINISHED: State.FINISHED,
    pb.OUTCOME_CANCELLED: State.CANCELLED,
    pb.OUTCOME_EXPIRED: State.EXPIRED,
    pb.OUTCOME_FAILED: State.FAILED,
}


class DispatchServicer(dispatch_pb2_grpc.DispatchServiceServicer):
    """One call a gateway process."""

    def __init__(self, scheduler: Scheduler, journal: Journal) -> None:
        self._scheduler, self._journal = scheduler, journal
        self._closing = False

    def close(self) -> None:
        """Lets every link end once it has told what there is to tell."""
        self._closing = True
        for gateway in self._scheduler.gateways.all():
            gateway.wake()

    async def Dispatch(  # type: ignore[override]  # a coroutine that writes through its context
        self, request_iterator: object, context: RpcContext
    ) -> None:
        """The link; ends when the gateway ends its side, opens another, or the scheduler leaves."""
        first = await context.read()
        if first is grpc.aio.EOF or not first.hello.gateway_id:
            raise HelloRequiredError("the first message must be a hello with a gateway_id", field="hello")
        awake = asyncio.Event()
        gateway = self._scheduler.gateway_joined(first.hello.gateway_id, awake.set)
        try:
            hello = pb.SchedulerHello(incarnation=self._scheduler.incarnation)
            await context.write(pb.DispatchResponse(hello=hello))
            self._obey(gateway, first)
            await self._serve(gateway, awake, context)
        finally:
            self._scheduler.gateway_left(gateway)

    async def _serve(self, gateway: Gateway, awake: asyncio.Event, context: RpcContext) -> None:
        reader = asyncio.create_task(self._read(gateway, context))
        writer = asyncio.create_task(self._write(gateway, awake, context))
        try:
            done, _ = await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, gateway: Gateway, context: RpcContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            if message.HasField("hello"):
                raise HelloRequiredError("a link has one hello, at its beginning", field="hello")
            self._obey(gateway, message)

    async def _write(self, gateway: Gateway, awake: asyncio.Event, context: RpcContext) -> None:
        """One message for all that gathers while the one before is being written."""
        while self._scheduler.gateways.current(gateway):
            awake.clear()
            message = self._next(gateway)
            if message is not None:
                await context.write(message)
            elif self._closing:
                return
            else:
                await awake.wait()

    def _next(self, gateway: Gateway) -> pb.DispatchResponse | None:
        events = gateway.take(BATCH)
        catalog_due = gateway.catalog_due and self._scheduler.fleet.settled
        if catalog_due:
            gateway.catalog_due = False
        if not events and not catalog_due:
            return None
        return _response(events, catalog(self._scheduler.fleet, self._scheduler.adapters) if catalog_due else None)

    def _obey(self, gateway: Gateway, message: pb.DispatchRequest) -> None:
        if len(gateway.events) > MAX_EVENTS:
            raise SlowLinkError(f"{len(gateway.events)} events wait to be read")
        for announce in message.announces:
            leg = Leg(worker_id=announce.leg.worker_id, epoch=announce.leg.epoch, lease=announce.leg.lease)
            self._scheduler.announce(gateway, _submission(announce.submit), leg, started=announce.started)
        for withdrawn in [cancel for cancel in message.cancels if cancel.withdrawn]:
            # Before the submissions: what is withdrawn was submitted by an earlier message, and its id may come again.
            self._scheduler.withdraw(gateway, withdrawn.request_id)
        for takeover in message.takeovers:
            self._scheduler.take_over(gateway, _submission(takeover.submit), takeover.owner_epoch)
        for submit in message.submits:
            self._scheduler.submit(gateway, _submission(submit))
        for cancel in [cancel for cancel in message.cancels if not cancel.withdrawn]:
            self._scheduler.cancel(cancel.request_id)
        for started in message.started:
            self._scheduler.started(started.request_id, started.lease)
        for finished in message.finished:
            self._scheduler.finished(_ending(finished))
        for leg_lost in message.legs_lost:
            self._scheduler.failover.leg_lost(leg_lost.request_id, leg_lost.lease, leg_lost.reason)
        for lost in message.workers_lost:
            self._scheduler.worker_unreachable(lost.worker_id, lost.epoch)

    async def DescribeRequest(
        self, request: pb.DescribeRequestRequest, context: RpcContext
    ) -> pb.DescribeRequestResponse:
        """A record from memory, else from the journal."""
        found = self._scheduler.requests.find(request.request_id)
        if found is not None:
            return _described(found)
        try:
            fields = await self._journal.read(request.request_id)
        except (RedisError, OSError) as error:
            raise JournalUnavailableError("the request is not in memory, and the journal does not answer") from error
        if fields is None:
            raise RequestNotFoundError(f"no record of request {request.request_id!r}", field="request_id")
        return _described_from(request.request_id, fields)


def _submission(submit: pb.Submit) -> Submission:
    return Submission(
        request_id=submit.request_id,
        model=submit.model,
        prompt_ids=array("I", submit.prompt_ids[:]),  # of a slice: ids one by one take half as long again
        max_tokens=submit.max_tokens,
        n=max(1, submit.n),
        deadline_s=submit.deadline_ms / 1e3,
        queue_timeout_s=submit.queue_timeout_ms / 1e3,
        tenant=submit.tenant,
        priority=submit.priority,
        traceparent=submit.traceparent,
        cache_salt=submit.cache_salt,
        delivered_tokens=submit.delivered_tokens,
        adapter=submit.adapter,
    )


def _ending(finished: pb.Finished) -> Ending:
    return Ending(
        request_id=finished.request_id,
        lease=finished.lease,
        state=_OUTCOMES.get(finished.outcome, State.FAILED),
        reason=finished.reason,
        completion_tokens=finished.completion_tokens,
        cached_tokens=finished.cached_tokens,
        events=[TimelineEvent(e.time.ToMicroseconds() / 1e6, e.event, dict(e.detail)) for e in finished.events],
    )


def _response(events: list[Event], models: model_pb2.ModelCatalog | None) -> pb.DispatchResponse:
    response = pb.DispatchResponse(catalog=models)
    for event in events:
        _add(response, event)
    return response


def _add(response: pb.DispatchResponse, event: Event) -> None:
    if isinstance(event, Queued):
        response.queued.add(request_id=event.request_id, position=event.position)
    elif isinstance(event, Placed):
        leg = pb.Leg(
            role=pb.ROLE_UNIFIED,
            worker_id=event.worker_id,
            epoch=event.epoch,
            address=event.address,
            lease=event.lease,
        )
        response.placed.add(request_id=event.request_id, legs=[leg])
    elif isinstance(event, Revoked):
        response.revoked.add(
            request_id=event.request_id, lease=event.lease, reason=event.reason, requeued=event.requeued
        )
    elif isinstance(event, Expired):
        response.expired.add(request_id=event.request_id, queued=event.queued)
    elif isinstance(event, Refused):
        response.refused.add(
            request_id=event.request_id,
            reason=event.reason,
            message=event.message,
            retry_after_ms=event.retry_after_ms,
        )


def _events(timeline: list[TimelineEvent]) -> list[pb.Event]:
    return [pb.Event(time=timestamp(e.time), event=e.event, detail=e.detail) for e in timeline]


def _described(request: Request) -> pb.DescribeRequestResponse:
    return pb.DescribeRequestResponse(
        request_id=request.id,
        state=request.state.value,
        model=request.submission.model,
        tenant=request.submission.tenant,
        worker_id=request.worker_id,
        timeline=_events(request.timeline),
        failure_reason=request.reason,
        prompt_tokens=request.prompt_tokens,
        completion_tokens=request.completion_tokens,
        cached_tokens=request.cached_tokens,
        durable=request.durable,
    )


def _described_from(request_id: str, fields: dict[str, str]) -> pb.DescribeRequestResponse:
    return pb.DescribeRequestResponse(
        request_id=request_id,
        state=fields["state"],
        model=fields["model"],
        tenant=fields["tenant"],
        worker_id=fields["worker_id"],
        timeline=_events(parse_timeline(fields["timeline"])),
        failure_reason=fields["reason"],
        prompt_tokens=int(fields["prompt_tokens"]),
        completion_tokens=int(fields["completion_tokens"]),
        cached_tokens=int(fields["cached_tokens"]),
        durable=True,
    )
