"""The Dispatch link to the scheduler: one stream for all requests of this process, and calls about single requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from lmesh.scheduler.v1 import dispatch_pb2, dispatch_pb2_grpc, model_pb2
from lmesh_chassis import tracing
from lmesh_chassis.channel import connect
from lmesh_chassis.errors import RemoteError, from_rpc_error
from lmesh_chassis.links import Link
from lmesh_chassis.tls import PLAIN, Tls

from lmesh_gateway.adapters import PublishedAdapter
from lmesh_gateway.dispatch_batch import Announce, DispatchBatch, TakeOver
from lmesh_gateway.dispatch_session import DispatchSession
from lmesh_gateway.errors import (
    DOMAIN,
    CancelledError,
    RequestEndedError,
    RequestNotFoundError,
    SchedulerUnavailableError,
)
from lmesh_gateway.models import CatalogModel
from lmesh_gateway.placement import Leg, Outcome, PlacementListener, Report, RequestEvent, RequestRecord
from lmesh_gateway.plan import Plan

_CALL_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
# Nobody waits to hear that a request has started: it goes along with what is said next, and is not in the way of the
# first token.
_STARTED_S = 0.02
# A message costs this loop and the scheduler's, and by its answer the worker's, as much as the requests in it do. So a
# process with many gathers them for a moment after each: the last of 16 that came at once had reached the engine after
# 40 ms, by messages of one or two, and after 31 ms so. A lone request finds no message just before it.
_REST_S, _LONGEST_REST_S = 0.0003, 0.003  # for each live request; however many there are


class DispatchLink:
    """Requests up, placements down. `on_catalog` hears of every change of what is served.

    A link that breaks is opened again; requests that wait for a worker survive that for `grace_s`, placed ones as
    long as it takes.
    """

    def __init__(
        self,
        address: str,
        gateway_id: str,
        *,
        grace_s: float,
        on_catalog: Callable[[list[CatalogModel]], None],
        tls: Tls = PLAIN,
    ) -> None:
        self._gateway_id = gateway_id
        self._grace_s = grace_s
        self._on_catalog = on_catalog
        self._session = DispatchSession()
        self._grace: asyncio.TimerHandle | None = None
        self._wake_later: asyncio.TimerHandle | None = None
        self._channel = connect(address, domain=DOMAIN, retries=False, tls=tls)
        self._stub = dispatch_pb2_grpc.DispatchServiceStub(self._channel)
        self._link: Link[dispatch_pb2.DispatchRequest, dispatch_pb2.DispatchResponse] = Link(
            self._stub.Dispatch,
            name="dispatch",
            hello=self._hello,
            collect=self._collect,
            on_connected=self._on_connected,
            on_message=self._on_message,
            on_broken=self._on_broken,
            rest_s=lambda: min(_REST_S * self._session.count, _LONGEST_REST_S),
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the scheduler is there."""
        return self._link.connected

    def open(self) -> None:
        """Begins to keep the link up."""
        self._task = asyncio.create_task(self._link.run())

    async def close(self) -> None:
        """Sends what is left to say and ends the link; reports that nobody takes are dropped."""
        self._link.close()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_CLOSE_TIMEOUT_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for timer in (self._grace, self._wake_later):
            if timer is not None:
                timer.cancel()
        await self._channel.close()

    def submit(self, plan: Plan, listener: PlacementListener) -> None:
        """Asks for admission. Raises DuplicateRequestIdError or SchedulerUnavailableError."""
        if not self.connected:
            raise SchedulerUnavailableError("the scheduler cannot be reached now; try again", retry_after_ms=1000)
        self._session.submit(plan, listener)
        self._link.wake()

    def take_over(self, plan: Plan, listener: PlacementListener, owner_epoch: int) -> None:
        """Asks for a request that another gateway held. It was admitted before, and waits for a scheduler as those do.

        Raises DuplicateRequestIdError, or SchedulerUnavailableError when none has been there for longer than the grace.
        """
        if self._session.given_up:
            raise SchedulerUnavailableError("the scheduler cannot be reached now; try again", retry_after_ms=1000)
        self._session.take_over(plan, listener, owner_epoch)
        self._link.wake()

    def disown(self, request_id: str) -> None:
        """The request is another gateway's now."""
        self._session.disown(request_id)

    def withdraw(self, request_id: str) -> None:
        """A request that is not placed now is no longer wanted."""
        self._session.withdraw(request_id)
        self._link.wake()

    def started(self, request_id: str, lease: int) -> None:
        """The first output of a request has come."""
        self._session.started(request_id, lease)
        if self._wake_later is None:
            self._wake_later = asyncio.get_running_loop().call_later(_STARTED_S, self._wake_now)

    def _wake_now(self) -> None:
        self._wake_later = None
        self._link.wake()

    def leg_lost(self, request_id: str, lease: int, reason: str) -> None:
        """A placement is lost and its request goes on."""
        self._session.leg_lost(request_id, lease, reason)
        self._link.wake()

    def finished(self, report: Report) -> None:
        """A placed request has ended."""
        self._session.finished(report)
        self._link.wake()

    def worker_lost(self, worker_id: str, epoch: str) -> None:
        """A Run link was given up."""
        self._session.worker_lost(worker_id, epoch)
        self._link.wake()

    async def cancel(self, request_id: str, tenant: str) -> None:
        """Cancels a live request of the tenant's, of any gateway. Raises RequestNotFoundError or RequestEndedError."""
        entry = self._session.live(request_id)
        if entry is not None:
            if entry.plan.tenant != tenant:
                raise _unknown(request_id)
            entry.listener.on_ended(CancelledError("the request was cancelled"), Outcome.CANCELLED)
            return
        # Asked even about what ended here, for the record says whose it is. Its report may still be on its way.
        if (await self.describe(request_id, tenant)).ended or self._session.ended_lately(request_id):
            raise RequestEndedError(f"request {request_id} has ended already", field="request_id")
        self._session.cancel(request_id)
        self._link.wake()

    async def describe(self, request_id: str, tenant: str) -> RequestRecord:
        """A record of the tenant's. Raises RequestNotFoundError, of another's too, or SchedulerUnavailableError."""
        request = dispatch_pb2.DescribeRequestRequest(request_id=request_id)
        try:
            record = await self._stub.DescribeRequest(
                request, timeout=_CALL_TIMEOUT_S, metadata=tracing.outgoing_metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise _call_error(from_rpc_error(error), request_id) from error
        if record.tenant != tenant:
            raise _unknown(request_id)
        return _record(record)

    def _hello(self) -> dispatch_pb2.DispatchRequest:
        return dispatch_pb2.DispatchRequest(hello=dispatch_pb2.GatewayHello(gateway_id=self._gateway_id))

    def _collect(self) -> dispatch_pb2.DispatchRequest | None:
        batch = self._session.collect()
        return None if batch is None else _request(batch)

    def _on_connected(self, first: dispatch_pb2.DispatchResponse) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        self._session.connected(first.hello.incarnation)
        self._on_message(first)

    def _on_message(self, message: dispatch_pb2.DispatchResponse) -> None:
        if message.HasField("catalog"):
            self._on_catalog([_model(entry) for entry in message.catalog.entries])
        # Placed first: what has a worker starts before clients are told that it was admitted.
        for placed in message.placed:
            self._session.on_placed(placed.request_id, _leg(placed.legs[0]))
        for queued in message.queued:
            self._session.on_queued(queued.request_id)
        for revoked in message.revoked:
            self._session.on_revoked(revoked.request_id, revoked.lease, revoked.reason, revoked.requeued)
        for expired in message.expired:
            self._session.on_expired(expired.request_id, expired.queued)
        for refused in message.refused:
            self._session.on_refused(refused.request_id, refused.reason, refused.message, refused.retry_after_ms)
        self._link.wake()

    def _on_broken(self, error: RemoteError | None) -> bool:
        del error  # the link has logged it
        self._session.broken()
        if self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(self._grace_s, self._session.give_up)
        return True


def _request(batch: DispatchBatch) -> dispatch_pb2.DispatchRequest:
    return dispatch_pb2.DispatchRequest(
        submits=[_submit(plan) for plan in batch.submits],
        cancels=[
            *(dispatch_pb2.Cancel(request_id=request_id) for request_id in batch.cancels),
            *(dispatch_pb2.Cancel(request_id=request_id, withdrawn=True) for request_id in batch.withdrawals),
        ],
        started=[dispatch_pb2.Started(request_id=request_id, lease=lease) for request_id, lease in batch.started],
        finished=[_finished(report) for report in batch.finished],
        workers_lost=[dispatch_pb2.WorkerLost(worker_id=w, epoch=epoch) for w, epoch in batch.workers_lost],
        legs_lost=[
            dispatch_pb2.LegLost(request_id=lost.request_id, lease=lost.lease, reason=lost.reason)
            for lost in batch.legs_lost
        ],
        announces=[_announce(announce) for announce in batch.announces],
        takeovers=[_takeover(takeover) for takeover in batch.takeovers],
    )


def _announce(announce: Announce) -> dispatch_pb2.Announce:
    leg = announce.leg
    return dispatch_pb2.Announce(
        submit=_submit(announce.plan, delivered_tokens=announce.delivered_tokens, waits=False),
        leg=dispatch_pb2.Leg(
            role=dispatch_pb2.ROLE_UNIFIED,
            worker_id=leg.worker_id,
            epoch=leg.epoch,
            address=leg.address,
            lease=leg.lease,
        ),
        started=announce.started,
    )


def _takeover(takeover: TakeOver) -> dispatch_pb2.TakeOver:
    submit = _submit(takeover.plan, delivered_tokens=takeover.delivered_tokens)
    return dispatch_pb2.TakeOver(submit=submit, owner_epoch=takeover.owner_epoch)


def _submit(plan: Plan, *, delivered_tokens: int = 0, waits: bool = True) -> dispatch_pb2.Submit:
    """`waits`: its queue timeout still counts; what was placed once is not to be dropped for waiting again."""
    return dispatch_pb2.Submit(
        request_id=plan.request_id,
        model=plan.model.base,
        adapter=plan.model.adapter,
        prompt_ids=plan.prompt_ids,
        max_tokens=plan.params.max_tokens,
        n=plan.n,
        deadline_ms=_remaining_ms(plan.deadline_at),
        queue_timeout_ms=_remaining_ms(plan.queue_deadline_at) if waits else 0,
        tenant=plan.tenant,
        priority=plan.priority,
        traceparent=plan.traceparent,
        cache_salt=plan.cache_salt,
        delivered_tokens=delivered_tokens,
    )


def _remaining_ms(deadline_at: float) -> int:
    # 0 would mean no deadline; the field has 32 bits.
    return min(max(1, round((deadline_at - time.monotonic()) * 1000)), 2**32 - 1)


def _finished(report: Report) -> dispatch_pb2.Finished:
    return dispatch_pb2.Finished(
        request_id=report.request_id,
        lease=report.lease,
        outcome=dispatch_pb2.Outcome.ValueType(report.outcome),
        reason=report.reason,
        completion_tokens=report.completion_tokens,
        cached_tokens=report.cached_tokens,
        events=[
            dispatch_pb2.Event(time=_timestamp(event.time), event=event.event, detail=event.detail)
            for event in report.events
        ],
    )


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(round(seconds * 1e9))
    return stamp


def _seconds(stamp: Timestamp) -> float:
    return stamp.ToNanoseconds() / 1e9


def _leg(leg: dispatch_pb2.Leg) -> Leg:
    return Leg(worker_id=leg.worker_id, epoch=leg.epoch, address=leg.address, lease=leg.lease)


def _model(entry: model_pb2.CatalogEntry) -> CatalogModel:
    model = entry.model
    return CatalogModel(
        id=model.id,
        source=model.source,
        digest=model.digest,
        text_digest=model.text_digest,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        workers=entry.workers,
        created=_seconds(entry.created),
        adapters=tuple(
            PublishedAdapter(
                tenant=adapter.tenant,
                name=adapter.name,
                version=adapter.version,
                digest=adapter.digest,
                created=_seconds(adapter.created),
            )
            for adapter in entry.adapters
        ),
    )


def _record(record: dispatch_pb2.DescribeRequestResponse) -> RequestRecord:
    return RequestRecord(
        request_id=record.request_id,
        state=record.state,
        model=record.model,
        worker_id=record.worker_id,
        timeline=tuple(
            RequestEvent(time=_seconds(event.time), event=event.event, detail=dict(event.detail))
            for event in record.timeline
        ),
        failure_reason=record.failure_reason,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        cached_tokens=record.cached_tokens,
        durable=record.durable,
        tenant=record.tenant,
    )


def _unknown(request_id: str) -> RequestNotFoundError:
    return RequestNotFoundError(f"no request {request_id} is known", field="request_id")


def _call_error(error: RemoteError, request_id: str) -> RequestNotFoundError | SchedulerUnavailableError:
    if error.code is grpc.StatusCode.NOT_FOUND:
        return _unknown(request_id)
    return SchedulerUnavailableError("the scheduler cannot be reached now; try again", retry_after_ms=1000)
