"""Runs requests on the mesh: checked, turned into ids, submitted, streamed."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from lmesh_chassis import logs
from lmesh_chassis.errors import ServiceError

from lmesh_gateway.cache_salt import cache_salt
from lmesh_gateway.errors import DrainingError, QueueFullError
from lmesh_gateway.generation import Event, GenerationRequest, ModelDirectory, ServedModel
from lmesh_gateway.live_request import LiveRequest
from lmesh_gateway.metrics import LIVE, RequestMetrics
from lmesh_gateway.placement import SchedulerPort
from lmesh_gateway.plan import Plan, SequenceParams
from lmesh_gateway.prompts import PromptBuilder
from lmesh_gateway.running_leg import WorkerPort
from lmesh_gateway.spans import RequestSpan
from lmesh_gateway.validation import check_against_model, check_request


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
        scheduler: SchedulerPort,
        workers: WorkerPort,
        limits: Limits,
        cache_salt_key: str = "",
    ) -> None:
        self._directory = directory
        self._prompts = prompts
        self._scheduler = scheduler
        self._workers = workers
        self._limits = limits
        self._cache_salt_key = cache_salt_key
        self._live = 0
        self.draining = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """See `generation.Generator.generate`."""
        self._admit()
        metrics, span = RequestMetrics(), RequestSpan(request)
        self._live += 1
        LIVE.inc()
        try:
            live = await self._submitted(request, metrics, span)
            try:
                async with aclosing(live.outbox.events()) as events:
                    async for event in events:
                        yield event
            finally:
                live.leave()
        finally:
            self._live -= 1
            LIVE.dec()
            span.end()

    def _admit(self) -> None:
        if self.draining:
            raise DrainingError("this gateway is leaving; try again", retry_after_ms=1000)
        if self._live >= self._limits.max_requests:
            raise QueueFullError(f"this gateway runs {self._live} requests already; try again", retry_after_ms=1000)

    async def _submitted(self, request: GenerationRequest, metrics: RequestMetrics, span: RequestSpan) -> LiveRequest:
        try:
            plan = await self._plan(request, metrics, span)
            span.planned(plan)
            live = LiveRequest(plan, scheduler=self._scheduler, workers=self._workers, metrics=metrics, span=span)
            live.submit()
        except ServiceError as error:
            metrics.failed(error.reason)
            span.failed(error.reason)
            raise
        return live

    async def _plan(self, request: GenerationRequest, metrics: RequestMetrics, span: RequestSpan) -> Plan:
        now, created = time.monotonic(), time.time()
        check_request(request)
        model = self._directory.get(request.model)
        metrics.named(model.id)
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
            traceparent=span.traceparent,
            created=created,
            cache_salt=cache_salt(request.tenant, key=self._cache_salt_key, model_digest=model.digest),
        )


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
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
