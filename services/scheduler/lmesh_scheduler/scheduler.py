"""The scheduler's core: events in, state changes and messages out. Synchronous, on a clock that is handed in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from lmesh_chassis import tracing

from lmesh_scheduler import errors
from lmesh_scheduler.admission import AdmissionQueue, QueueFullError
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.fleet import Fleet, Heartbeat, Hello, Worker
from lmesh_scheduler.gateways import Event, Expired, Gateway, Gateways, Placed, Queued, Refused, Revoked
from lmesh_scheduler.placement import RequestView, place
from lmesh_scheduler.requests import LIVE, Request, RequestTable, State, Submission, TimelineEvent


class Ending(NamedTuple):
    """A gateway's terminal report."""

    request_id: str
    lease: int
    state: State
    reason: str
    completion_tokens: int
    cached_tokens: int
    events: list[TimelineEvent]


class Scheduler:
    """Admits, places, fences and accounts. Every method runs to its end before another begins."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        incarnation: int,
        clock: Callable[[], float],
        wall: Callable[[], float],
        journal: Callable[[Request], None],
    ) -> None:
        self._settings = settings
        self._clock, self._wall = clock, wall
        self.incarnation = incarnation
        self.requests = RequestTable(ended_kept=settings.ended_kept, wall=wall, journal=journal)
        self.fleet = Fleet(lease_ttl_s=settings.lease_ttl_s, clock=clock, wall=wall)
        self.gateways = Gateways(grace_s=settings.gateway_grace_s, clock=clock)
        self._queues: dict[str, AdmissionQueue] = {}
        self._arrivals = 0
        self._leases = 0
        self.draining = False
        self.placements_made = 0

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return sum(len(queue) for queue in self._queues.values())

    # -- gateways

    def gateway_joined(self, gateway_id: str, wake: Callable[[], None]) -> Gateway:
        """A Dispatch link opens. What a broken one may have swallowed is said again: a gateway ignores repeats."""
        gateway = self.gateways.join(gateway_id, wake)
        for request in self.requests.live():
            if request.gateway_id == gateway_id:
                gateway.tell(self._standing(request))
        return gateway

    def _standing(self, request: Request) -> Event:
        if request.state is State.QUEUED:
            return Queued(request.id, 0)
        worker = self.fleet.find(request.worker_id, request.epoch)
        address = worker.hello.address if worker else ""
        return Placed(request.id, request.worker_id, request.epoch, address, request.lease)

    def gateway_left(self, gateway: Gateway) -> None:
        """A Dispatch link broke; its requests go on until the grace period ends."""
        self.gateways.leave(gateway)

    def submit(self, gateway: Gateway, submission: Submission) -> None:
        """Admits a request or refuses it; places it at once if a worker has room."""
        refusal = self._refusal(submission)
        if refusal is not None:
            gateway.tell(refusal)
            return
        request = self._request(gateway, submission)
        queue = self._queues.setdefault(submission.model, AdmissionQueue(self._settings.max_queue))
        try:
            queue.add(request)
        except QueueFullError as error:
            gateway.tell(Refused(request.id, errors.QUEUE_FULL, f"{error}; try again later", 1000))
            return
        self.requests.add(request)
        gateway.tell(Queued(request.id, len(queue) - 1))
        self._place(submission.model)

    def _refusal(self, submission: Submission) -> Refused | None:
        request_id, model = submission.request_id, submission.model
        if self.draining:
            return Refused(request_id, errors.DRAINING, "the scheduler is leaving; try again", 1000)
        found = self.requests.find(request_id)
        if found is not None and found.live:
            return Refused(request_id, errors.DUPLICATE_REQUEST_ID, f"request id {request_id} is live", 0)
        if not self.fleet.serves(model) and not self.fleet.awaited(model, self._settings.model_grace_s):
            known = ", ".join(e.model.id for e in self.fleet.catalog()) or "none"
            return Refused(request_id, errors.MODEL_NOT_FOUND, f"no worker serves {model!r}; served: {known}", 0)
        return None

    def _request(self, gateway: Gateway, submission: Submission) -> Request:
        now = self._clock()
        self._arrivals += 1
        return Request(
            submission=submission,
            gateway_id=gateway.id,
            deadline=now + submission.deadline_s if submission.deadline_s else math.inf,
            queue_deadline=now + submission.queue_timeout_s if submission.queue_timeout_s else math.inf,
            order=self._arrivals,
            span=tracing.start_span(tracing.SCHEDULER_QUEUE, traceparent=submission.traceparent),
        )

    def cancel(self, gateway: Gateway, request_id: str) -> None:
        """Ends a live request for its client; its gateway hears of it unless it asked itself."""
        request = self.requests.find(request_id)
        if request is None or not request.live:
            return
        owner = self.gateways.find(request.gateway_id)
        lease = request.lease
        self._end(request, State.CANCELLED, "")
        if owner is not None and owner is not gateway:
            owner.tell(Revoked(request_id, lease, errors.CANCELLED))

    def started(self, request_id: str, lease: int) -> None:
        """The worker's first output has come."""
        request = self.requests.find(request_id)
        if request is not None and request.lease == lease and request.state is State.PLACED:
            self.requests.move(request, State.RUNNING)

    def finished(self, ending: Ending) -> None:
        """A gateway's report on a placed request. One under an older lease is dropped."""
        request = self.requests.find(ending.request_id)
        if request is None or request.lease != ending.lease:
            return
        request.completion_tokens, request.cached_tokens = ending.completion_tokens, ending.cached_tokens
        if ending.events:
            self.requests.record(request, ending.events)
        if request.live:
            self._end(request, ending.state, ending.reason)

    def worker_unreachable(self, worker_id: str, epoch: str) -> None:
        """A gateway lost its Run link. The worker is lost when it is silent here too: its lease decides."""
        worker = self.fleet.find(worker_id, epoch)
        if worker is not None and not worker.linked:
            self._lose(worker)

    # -- workers

    def worker_joined(self, hello: Hello) -> Worker:
        """A Fleet link opens. Raises ModelConflictError or WorkerIdInUseError."""
        replaced = self.fleet.join(hello)
        if replaced is not None:
            self._revoke_placements(replaced)
        worker = self.fleet.find(hello.worker_id, hello.epoch)
        assert worker is not None
        self._catalog_changed()
        self._place(hello.model.id)
        return worker

    def worker_beat(self, worker: Worker, heartbeat: Heartbeat, *, draining: bool) -> None:
        """A heartbeat; renews the worker's lease and those of its placements."""
        self.fleet.beat(worker, heartbeat)
        worker.draining = worker.draining or draining
        self._place(worker.hello.model.id)

    def worker_unlinked(self, worker: Worker) -> None:
        """A Fleet link ended: a drained worker is gone, another has until its lease lapses to come back."""
        worker.linked = False
        if worker.draining and not worker.placements:
            self._lose(worker)

    def _lose(self, worker: Worker) -> None:
        self.fleet.leave(worker)
        self._revoke_placements(worker)
        self._catalog_changed()

    def _revoke_placements(self, worker: Worker) -> None:
        for request_id in list(worker.placements):
            request = self.requests.find(request_id)
            if request is not None and request.live:
                self._revoke(request, errors.WORKER_LOST)
        worker.placements.clear()

    def _revoke(self, request: Request, reason: str) -> None:
        lease = request.lease
        self._end(request, State.FAILED, reason)
        gateway = self.gateways.find(request.gateway_id)
        if gateway is not None:
            gateway.tell(Revoked(request.id, lease, reason))

    def _catalog_changed(self) -> None:
        for gateway in self.gateways.all():
            gateway.tell_catalog()

    # -- placing and ending

    def _place(self, model: str) -> None:
        """Places queued requests of one model in order, as far as its workers have room."""
        queue = self._queues.get(model)
        while queue is not None and (request := queue.peek()) is not None:
            submission = request.submission
            view = RequestView(model=model, sequences=submission.n, prompt_tokens=len(submission.prompt_ids))
            worker_id = place(view, (w.view(self._settings.slots_factor) for w in self.fleet.workers()))
            worker = self.fleet.find(worker_id) if worker_id is not None else None
            if worker is None:
                return
            queue.pop()
            self._grant(request, worker)

    def _grant(self, request: Request, worker: Worker) -> None:
        self._leases += 1
        self.placements_made += 1
        # The incarnation in the high bits: no two leases of one mesh are ever alike.
        request.lease = (self.incarnation << 40) | self._leases
        request.worker_id, request.epoch = worker.hello.worker_id, worker.hello.epoch
        worker.placements[request.id] = request.submission.n
        self.requests.move(request, State.PLACED, {"worker_id": worker.hello.worker_id})
        self._end_span(request, "placed")
        gateway = self.gateways.find(request.gateway_id)
        if gateway is not None:
            hello = worker.hello
            gateway.tell(Placed(request.id, hello.worker_id, hello.epoch, hello.address, request.lease))

    def _end(self, request: Request, state: State, reason: str) -> None:
        was_queued = request.state is State.QUEUED
        request.reason = reason
        self.requests.move(request, state, {"reason": reason} if reason else {})
        self._end_span(request, state.value.lower())
        if was_queued:
            self._queues[request.submission.model].drop()
            return
        worker = self.fleet.find(request.worker_id, request.epoch)
        if worker is None:
            return
        worker.placements.pop(request.id, None)
        if worker.draining and not worker.linked and not worker.placements:
            self._lose(worker)
        self._place(request.submission.model)

    def _end_span(self, request: Request, outcome: str) -> None:
        if request.span is not None:
            request.span.set_attribute("lmesh.outcome", outcome)
            request.span.end()
            request.span = None

    # -- time

    def tick(self) -> None:
        """Ends what is overdue: deadlines, workers' leases, gateways' grace, models that nobody serves."""
        now = self._clock()
        for worker in self.fleet.overdue():
            self._lose(worker)
        for gateway in self.gateways.lost():
            self._drop_requests_of(gateway)
        for request in self.requests.live():
            if request.state in LIVE:
                self._expire_if_due(request, now)

    def _expire_if_due(self, request: Request, now: float) -> None:
        queued = request.state is State.QUEUED
        if now >= request.deadline or (queued and now >= request.queue_deadline):
            self._end(request, State.EXPIRED, "")
            self._tell_owner(request, Expired(request.id, queued))
        elif queued and self._abandoned(request.submission.model):
            self._end(request, State.FAILED, errors.MODEL_NOT_FOUND)
            self._tell_owner(request, Revoked(request.id, 0, errors.WORKER_LOST))

    def _abandoned(self, model: str) -> bool:
        return not self.fleet.serves(model) and not self.fleet.awaited(model, self._settings.model_grace_s)

    def _tell_owner(self, request: Request, event: Event) -> None:
        gateway = self.gateways.find(request.gateway_id)
        if gateway is not None:
            gateway.tell(event)

    def _drop_requests_of(self, gateway: Gateway) -> None:
        for request in self.requests.live():
            if request.gateway_id == gateway.id:
                self._end(request, State.FAILED, errors.GATEWAY_LOST)
