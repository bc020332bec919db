"""Finds what a client wants to go on with: here, at another gateway, or ended; the ledger knows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmesh_chassis import logs
from lmesh_chassis.errors import ServiceError

from lmesh_gateway.cache_salt import cache_salt
from lmesh_gateway.errors import (
    DeadlineExceededError,
    LedgerBehindError,
    LedgerDisabledError,
    LedgerUnavailableError,
    ModelNotFoundError,
    RequestEndedError,
    RequestNotFoundError,
    ResumedElsewhereError,
)
from lmesh_gateway.generation import (
    Event,
    Finish,
    GenerationRequest,
    ModelDirectory,
    ResumeRequest,
    ServedModel,
    TokenPrompt,
)
from lmesh_gateway.ledger_record import FailedEnd, Record
from lmesh_gateway.live_request import Claimed, LiveRequest, Parts, accepted
from lmesh_gateway.live_table import LiveTable
from lmesh_gateway.metrics import RESUMED, RequestMetrics
from lmesh_gateway.outbox import ClientOutbox
from lmesh_gateway.placement import Outcome, RequestRecord
from lmesh_gateway.plan import Plan
from lmesh_gateway.replay import check_cursor, rest_of
from lmesh_gateway.spans import RequestSpan

_ATTEMPTS = 5
# An ASYNC ledger follows within milliseconds; a gateway that has died writes nothing more.
_BEHIND_WAIT_S, _BEHIND_POLL_S = 1.0, 0.05


class Records(Protocol):
    """The scheduler's records."""

    async def describe(self, request_id: str, tenant: str) -> RequestRecord:
        """A record of the tenant's; RequestNotFoundError when there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A request that runs here, and its new client."""

    request: LiveRequest
    outbox: ClientOutbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What is left of an ended one for this client, and how it ended when it did not complete."""

    events: tuple[Event, ...]
    error: ServiceError | None


class Resumer:
    """`queue_timeout_s` bounds the wait for a worker of what is claimed; `salt_key` is the setting cache_salt_key."""

    def __init__(
        self,
        parts: Parts,
        table: LiveTable,
        directory: ModelDirectory,
        records: Records,
        *,
        queue_timeout_s: float,
        salt_key: str,
    ) -> None:
        self._parts, self._table, self._directory, self._records = parts, table, directory, records
        self._queue_timeout_s, self._salt_key = queue_timeout_s, salt_key

    async def take_up(self, request: ResumeRequest) -> Live | Ended:
        """For one client. Raises LedgerBehindError, RequestNotFoundError and what else keeps it from going on."""
        logs.request_id.set(request.request_id)
        for _ in range(_ATTEMPTS):
            live = self._table.find(request.request_id)
            if live is not None and live.attachable:
                if live.plan.tenant != request.tenant:
                    raise _unknown(request)
                outbox = live.attach(request.cursor)
                RESUMED.labels("live").inc()
                return Live(request=live, outbox=outbox)
            if not self._parts.ledger.enabled:
                raise LedgerDisabledError("this gateway keeps no ledger, and has no such request of its own")
            await self._parts.ledger.settled(request.request_id)
            record = await self._record(request)
            if record.end is not None:
                return await self._ended(record, request.cursor)
            claimed = await self._claim(record, request)
            if claimed is not None:
                return self._taken_over(claimed, request.cursor)
        raise LedgerUnavailableError("several clients resume the request at once; try again", retry_after_ms=1000)

    async def _record(self, request: ResumeRequest) -> Record:
        give_up_at = time.monotonic() + _BEHIND_WAIT_S
        while True:
            record = await self._parts.ledger.read(request.request_id)
            if record is not None and record.tenant != request.tenant:
                raise _unknown(request)
            try:
                if record is None:
                    await self._check_lives(request)
                else:
                    check_cursor(request.request_id, request.cursor, record.counts())
                    return record
            except LedgerBehindError:
                if (record is not None and record.end is not None) or time.monotonic() >= give_up_at:
                    raise
                await asyncio.sleep(_BEHIND_POLL_S)

    async def _check_lives(self, request: ResumeRequest) -> None:
        """Raises what a request is that the ledger does not have: not there yet, or nowhere."""
        known = await self._records.describe(request.request_id, request.tenant)
        if known.ended and known.state != "FINISHED":
            raise RequestEndedError(f"request {request.request_id} has ended: {known.state}", field="request_id")
        raise LedgerBehindError(f"the ledger does not have request {request.request_id} yet; try again")

    async def _ended(self, record: Record, cursor: Sequence[int]) -> Ended:
        plan = self._plan(record)
        # A long text takes a while to be made again, and the event loop is everybody's.
        events = await asyncio.to_thread(_events, plan, record, cursor)
        RESUMED.labels("ended").inc()
        if isinstance(record.end, FailedEnd):
            return Ended(events=events, error=record.end.error())
        assert record.end is not None
        ends = tuple(end for end in record.ends if end is not None)
        return Ended(events=(*events, Finish(choices=ends, usage=record.end, durable=True)), error=None)

    async def _claim(self, record: Record, request: ResumeRequest) -> Record | None:
        """The record, as this gateway's; None when it has changed hands or ended meanwhile."""
        self._model(record)
        if float(record.plan["deadline"]) <= time.time():
            raise DeadlineExceededError("the request's deadline passed")
        try:
            known = await self._records.describe(request.request_id, request.tenant)
        except RequestNotFoundError:
            known = None  # a scheduler that has lost its memory too
        if known is not None and known.state == "FINISHED":
            # Its end is on its way to the ledger; or its gateway died with it, and it is computed once more.
            if await self._end_comes(request):
                return None
        elif known is not None and known.ended and known.failure_reason != "GATEWAY_LOST":
            raise RequestEndedError(f"request {request.request_id} has ended: {known.state}", field="request_id")
        return await self._parts.ledger.claim(record)

    async def _end_comes(self, request: ResumeRequest) -> bool:
        give_up_at = time.monotonic() + _BEHIND_WAIT_S
        while time.monotonic() < give_up_at:
            record = await self._parts.ledger.read(request.request_id)
            if record is None or record.end is not None:
                return True
            await asyncio.sleep(_BEHIND_POLL_S)
        return False

    def _taken_over(self, record: Record, cursor: Sequence[int]) -> Live:
        check_cursor(record.request_id, cursor, record.counts())
        plan = self._plan(record)
        metrics, span = RequestMetrics(), RequestSpan(_described(plan))
        metrics.named(plan.model.base)
        span.planned(plan)
        self._part_with(plan.request_id)
        claimed = Claimed(nonce=record.nonce, epoch=record.epoch, ids=record.ids, ends=record.ends)
        live = LiveRequest(plan, self._parts, metrics=metrics, span=span, claimed=claimed)
        self._table.enter()
        self._table.put(live)
        outbox = live.attach(cursor)
        try:
            live.take_over()
        except ServiceError:
            self._table.closed(live)
            raise
        RESUMED.labels("claimed").inc()
        return Live(request=live, outbox=outbox)

    def _part_with(self, request_id: str) -> None:
        """What is still here of it was claimed by another gateway before, and is now claimed back."""
        held = self._table.find(request_id)
        if held is not None and not held.ended:
            self._parts.scheduler.disown(request_id)
            held.on_ended(ResumedElsewhereError("the request goes on in another stream"), Outcome.CANCELLED)

    def _plan(self, record: Record) -> Plan:
        model = self._model(record)
        salt = cache_salt(record.tenant, key=self._salt_key, model_digest=model.digest)
        return record.restore(model, queue_timeout_s=self._queue_timeout_s, cache_salt=salt)

    def _model(self, record: Record) -> ServedModel:
        # By content: a version that was published since, or this one's deletion, changes nothing of what it began with.
        model = self._directory.pinned(record.base, adapter=record.adapter, shown=record.model)
        if model.digest != record.plan["digest"]:
            raise ModelNotFoundError(f"the weights of {record.model} that gave it are not served any more")
        return model


def _events(plan: Plan, record: Record, cursor: Sequence[int]) -> tuple[Event, ...]:
    events: list[Event] = [accepted(plan)]
    for i, (ids, end) in enumerate(zip(record.ids, record.ends, strict=True)):
        events += rest_of(plan, i, ids, end, cursor[i] if i < len(cursor) else 0)
    return tuple(events)


def _described(plan: Plan) -> GenerationRequest:
    """For its span."""
    prompt = TokenPrompt(ids=plan.prompt_ids)
    return GenerationRequest(model=plan.model.id, prompt=prompt, traceparent=plan.traceparent)


def _unknown(request: ResumeRequest) -> RequestNotFoundError:
    return RequestNotFoundError(f"no request {request.request_id} is known", field="request_id")
