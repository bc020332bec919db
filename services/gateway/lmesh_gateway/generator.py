"""Runs requests on the mesh: checked, turned into ids, submitted, streamed."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from lmesh_chassis import logs
from lmesh_chassis.errors import ServiceError

from lmesh_gateway.cache_salt import cache_salt
from lmesh_gateway.errors import DrainingError, LedgerDisabledError, QueueFullError
from lmesh_gateway.generation import Event, GenerationRequest, ModelDirectory, ResumeRequest, ServedModel
from lmesh_gateway.ledger import Ledger
from lmesh_gateway.live_request import LiveRequest, Parts
from lmesh_gateway.live_table import LiveTable
from lmesh_gateway.metrics import RequestMetrics
from lmesh_gateway.outbox import ClientOutbox
from lmesh_gateway.placement import SchedulerPort
from lmesh_gateway.plan import Plan, SequenceParams
from lmesh_gateway.prompts import PromptBuilder
from lmesh_gateway.resume import Ended, Records, Resumer
from lmesh_gateway.running_leg import WorkerPort
from lmesh_gateway.spans import RequestSpan
from lmesh_gateway.validation import check_against_model, check_request


class Scheduler(SchedulerPort, Records, Protocol):
    """Places requests, and keeps records of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`deadline_s` and `queue_timeout_s` are the defaults and the most that a request may ask for."""

    deadline_s: float
    queue_timeout_s: float
    max_requests: int  # live ones in this process


class MeshGenerator:
    """Implements `generation.Generator`."""

    def __init__(
        self,
        *,
        directory: ModelDirectory,
        prompts: PromptBuilder,
        scheduler: Scheduler,
        workers: WorkerPort,
        ledger: Ledger,
        limits: Limits,
        cache_salt_key: str = "",
    ) -> None:
        self._directory = directory
        self._prompts = prompts
        self._limits = limits
        self._cache_salt_key = cache_salt_key
        self._table = LiveTable()
        self._parts = Parts(scheduler=scheduler, workers=workers, ledger=ledger, on_closed=self._table.closed)
        self._resumer = Resumer(
            self._parts,
            self._table,
            directory,
            scheduler,
            queue_timeout_s=limits.queue_timeout_s,
            salt_key=cache_salt_key,
        )
        self.draining = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `generation.Generator.generate`."""
        self._admit()
        live, outbox = await self._submitted(request)
        async with aclosing(_streamed(live, outbox)) as events:
            async for event in events:
                yield event

    async def resume(self, request: ResumeRequest) -> AsyncGenerator[Event, None]:
        """See `generation.Generator.resume`."""
        self._admit()
        found = await self._resumer.take_up(request)
        if isinstance(found, Ended):
            for event in found.events:
                yield event
            if found.error is not None:
                raise found.error
            return
        async with aclosing(_streamed(found.request, found.outbox)) as events:
            async for event in events:
                yield event

    def abandon(self) -> None:
        """This process leaves, and no client is left: what was detached goes on at whichever gateway resumes it."""
        self._table.abandon()

    def _admit(self) -> None:
        if self.draining:
            raise DrainingError("this gateway is leaving; try again", retry_after_ms=1000)
        if len(self._table) >= self._limits.max_requests:
            text = f"this gateway runs {len(self._table)} requests already; try again"
            raise QueueFullError(text, retry_after_ms=1000)

    async def _submitted(self, request: GenerationRequest) -> tuple[LiveRequest, ClientOutbox]:
        metrics, span = RequestMetrics(), RequestSpan(request)
        self._table.enter()
        try:
            plan = await self._plan(request, metrics, span)
            span.planned(plan)
            live = LiveRequest(plan, self._parts, metrics=metrics, span=span)
            outbox = live.attach()
            live.submit()
        except BaseException as error:
            if isinstance(error, ServiceError):
                metrics.failed(error.reason)
                span.failed(error.reason)
            span.end()
            self._table.leave()
            raise
        self._table.put(live)
        return live, outbox

    async def _plan(self, request: GenerationRequest, metrics: RequestMetrics, span: RequestSpan) -> Plan:
        now, created = time.monotonic(), time.time()
        check_request(request)
        if request.sync and not self._parts.ledger.enabled:
            raise LedgerDisabledError(
                "durability: SYNC needs a ledger, and this gateway keeps none", field="durability"
            )
        model = self._directory.get(request.model, request.tenant)
        metrics.named(model.base)
        request_id = request.request_id or str(uuid.uuid4())
        logs.request_id.set(request_id)
        ids = await self._prompts.ids(request.prompt, model)
        check_against_model(request, ids, model)
        deadline_s = _least(request.deadline_s, self._limits.deadline_s)
        return Plan(
            request_id=request_id,
            model=model,
            prompt_ids=tuple(ids),
            params=_params(request, ids, model),
            n=request.sampling.n,
            stop=request.stops.stop,
            keep_special_tokens=request.output.keep_special_tokens,
            deadline_at=now + deadline_s,
            queue_deadline_at=now + min(deadline_s, _least(request.queue_timeout_s, self._limits.queue_timeout_s)),
            tenant=request.tenant,
            priority=request.priority,
            traceparent=span.traceparent,
            created=created,
            cache_salt=cache_salt(request.tenant, key=self._cache_salt_key, model_digest=model.digest),
            detach_ttl_s=request.detach_ttl_s,
            sync=request.sync,
        )


async def _streamed(live: LiveRequest, outbox: ClientOutbox) -> AsyncGenerator[Event, None]:
    """One client's events; it leaves when it has them, or when it goes away."""
    try:
        async with aclosing(outbox.events()) as events:
            async for event in events:
                yield event
    finally:
        live.leave(outbox)


def _least(wanted: float | None, most: float) -> float:
    return most if wanted is None else min(wanted, most)


def _params(request: GenerationRequest, ids: Sequence[int], model: ServedModel) -> SequenceParams:
    sampling, stops, defaults = request.sampling, request.stops, model.defaults
    eos = () if stops.ignore_eos else model.tokenizer.eos_ids
    room = model.max_model_len - len(ids)
    return SequenceParams(
        temperature=_first(sampling.temperature, defaults.temperature, 1.0),
        top_p=_first(sampling.top_p, defaults.top_p, 1.0),
        top_k=int(_first(sampling.top_k, defaults.top_k, 0)),
        # 63 bits: a drawn seed is told to clients, some of which have signed integers.
        seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
        # "At most": where the context ends sooner, so does the choice, with reason length.
        max_tokens=room if stops.max_tokens is None else min(stops.max_tokens, room),
        stop_token_ids=tuple(dict.fromkeys((*stops.stop_token_ids, *eos))),
        logprobs=-1 if request.output.logprobs is None else request.output.logprobs,
        prompt_logprobs=-1 if request.output.prompt_logprobs is None else request.output.prompt_logprobs,
        min_p=_first(sampling.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(sampling.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=_first(sampling.presence_penalty, 0.0),
        frequency_penalty=_first(sampling.frequency_penalty, 0.0),
        logit_bias=tuple(sorted(sampling.logit_bias)),
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
