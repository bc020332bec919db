"""The scheduler's core: events in, state changes and messages out. Synchronous, on a clock that is handed in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping

from lmesh_chassis.tenants import Tenant

from lmesh_scheduler import errors, queue_span
from lmesh_scheduler.adapters.registry import AdapterRegistry
from lmesh_scheduler.adapters.residency import Residency
from lmesh_scheduler.admission import QueueFullError
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.deadlines import Deadlines
from lmesh_scheduler.errors import WorkerIdInUseError
from lmesh_scheduler.failover import Failover, Leg
from lmesh_scheduler.fleet import Fleet, Heartbeat, Hello, Worker
from lmesh_scheduler.gatekeeper import Gatekeeper
from lmesh_scheduler.gateways import Event, Expired, Gateway, Gateways, Queued, Refused, Revoked
from lmesh_scheduler.inheritance import Inheritance
from lmesh_scheduler.limits import Limits
from lmesh_scheduler.orphans import Orphans
from lmesh_scheduler.placements import Placements
from lmesh_scheduler.prefix_index import PrefixIndex, boot_of
from lmesh_scheduler.requests import LIVE, Ending, Request, RequestTable, State, Submission, TransitionError
from lmesh_scheduler.shares import Shares
from lmesh_scheduler.standing import placed, tell_standing

log = logging.getLogger(__name__)


class Scheduler:
    """Admits, places, fences and accounts. Every method runs to its end before another begins.

    `inherited` is what the scheduler before it left in Redis.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        incarnation: int,
        clock: Callable[[], float],
        wall: Callable[[], float],
        journal: Callable[[Request], None],
        inherited: Inheritance | None = None,
        tenants: Mapping[str, Tenant] | None = None,
    ) -> None:
        self._settings = settings
        self._clock, self._wall = clock, wall
        self.incarnation = incarnation
        self.requests = RequestTable(ended_kept=settings.ended_kept, wall=wall, journal=journal)
        self.orphans = Orphans(self.requests, lost_s=settings.gateway_lost_s, clock=clock)
        self.fleet = Fleet(
            lease_ttl_s=settings.lease_ttl_s, alive_s=2 * settings.heartbeat_interval_s, clock=clock, wall=wall
        )
        inherited = inherited or Inheritance()
        self.adapters = AdapterRegistry(inherited.adapters)
        self.residency = Residency(self.adapters, self.fleet, clock=clock, in_use=self._adapters_in_use)
        self.index = PrefixIndex(clock)
        self.shares, self.limits = Shares(tenants or {}), Limits(tenants or {}, clock)
        self.gateways = Gateways(grace_s=settings.gateway_grace_s, lost_s=settings.gateway_lost_s, clock=clock)
        self.placements = Placements(
            settings,
            self.fleet,
            incarnation=incarnation,
            clock=clock,
            index=self.index,
            shares=self.shares,
            residency=self.residency,
            eligible=self._owner_listens,
            grant=self._granted,
        )
        self._deadlines = Deadlines()
        self.gatekeeper = Gatekeeper(
            settings,
            requests=self.requests,
            fleet=self.fleet,
            placements=self.placements,
            shares=self.shares,
            limits=self.limits,
            adapters=self.adapters,
            clock=clock,
            wall=wall,
        )
        self.failover = Failover(
            settings,
            requests=self.requests,
            orphans=self.orphans,
            fleet=self.fleet,
            placements=self.placements,
            deadlines=self._deadlines,
            shares=self.shares,
            clock=clock,
            tell=self._tell_owner,
            end=self._end,
        )
        self.fleet.expect({worker_id: model for (worker_id, _), model in inherited.fleet.items()})
        for boot, hashes in inherited.index.items():
            self.index.restore(boot, hashes)
        self._settled = self.fleet.settled
        self.refused_by_reason: Counter[str] = Counter()

    # -- gateways

    def gateway_joined(self, gateway_id: str, wake: Callable[[], None]) -> Gateway:
        """A Dispatch link opens. What a broken one may have swallowed is said again: a gateway ignores repeats."""
        gateway = self.gateways.join(gateway_id, wake)
        for request in self.requests.of_gateway(gateway_id):
            self._tell_standing(gateway, request)
        for model in self.placements.models():
            self.placements.place(model)
        return gateway

    def _tell_standing(self, gateway: Gateway, request: Request) -> None:
        tell_standing(gateway, request, self.placements, self.fleet)

    def gateway_left(self, gateway: Gateway) -> None:
        """A Dispatch link broke; its requests go on until the grace period ends."""
        self.gateways.leave(gateway)

    def submit(self, gateway: Gateway, submission: Submission) -> None:
        """Admits a request or refuses it; places it at once if a worker has room."""
        known = self.requests.find(submission.request_id)
        if known is not None and known.gateway_id == gateway.id:
            # Said again on a new link: the gateway did not hear where it stands.
            if known.live:
                self._tell_standing(gateway, known)
                return
            if known.reason == errors.GATEWAY_LOST and not known.reported:
                gateway.tell(Revoked(known.id, known.lease, known.reason))
                return
        refusal = (
            self.orphans.refusal(gateway, submission.request_id)
            or self.gatekeeper.refusal(submission)
            or self._admit(gateway, submission)
        )
        if refusal is not None:
            self.refused_by_reason[refusal.reason] += 1
            gateway.tell(refusal)

    def _admit(self, gateway: Gateway, submission: Submission) -> Refused | None:
        request = self.gatekeeper.request(gateway, submission)
        try:
            position = self.placements.add(request)
        except QueueFullError as error:
            return Refused(request.id, errors.QUEUE_FULL, f"{error}; try again later", error.retry_after_ms)
        self.orphans.claim(request)
        self.requests.add(request)
        self.shares.enter(submission.tenant)
        self.limits.admitted(submission.tenant, request.prompt_tokens)
        self._deadlines.add(request)
        queue_span.begin(request)
        gateway.tell(Queued(request.id, position))
        self.placements.place(submission.model)
        return None

    def announce(self, gateway: Gateway, submission: Submission, leg: Leg, *, started: bool) -> None:
        """A gateway tells a request that an earlier scheduler placed; what is known already is told back."""
        self.orphans.restore(gateway, submission.request_id)
        known = self.requests.find(submission.request_id)
        if known is None and not self.orphans.overtaken(gateway, submission.request_id, leg.lease):
            self.failover.adopt(self.gatekeeper.request(gateway, submission), leg, started=started)
        elif known is not None and known.gateway_id == gateway.id:
            self._tell_standing(gateway, known)
        else:
            gateway.tell(Revoked(submission.request_id, leg.lease, errors.RESUMED_ELSEWHERE))

    def take_over(self, gateway: Gateway, submission: Submission, owner_epoch: int) -> None:
        """A gateway carries on what another one held, or itself without a client."""
        known = self.requests.find(submission.request_id)
        admitted = known or self.orphans.find(submission.request_id)
        if self.gatekeeper.draining and (admitted is None or not admitted.live):  # what was admitted may go on
            gateway.tell(self.gatekeeper.leaving(submission.request_id))
            return
        if known is not None and known.gateway_id == gateway.id and known.owner_epoch == owner_epoch:
            self._tell_standing(gateway, known)  # said again on a new link
            return
        request = self.gatekeeper.request(gateway, submission)
        request.owner_epoch = owner_epoch
        self.failover.take_over(gateway, request)

    def cancel(self, request_id: str, *, tell: bool = True) -> bool:
        """Ends a live request for a client; its gateway hears of it, for it may have come there after the client asked.

        False when there is nothing to cancel; a request that has ended stays as it ended, and that is counted.
        """
        request = self.requests.find(request_id)
        if request is None:
            return self.orphans.cancel(request_id)
        try:
            self._end(request, State.CANCELLED, "")
        except TransitionError:
            return False
        if tell:
            self._tell_owner(request, Revoked(request_id, request.lease, errors.CANCELLED))
        return True

    def withdraw(self, gateway: Gateway, request_id: str) -> bool:
        """A gateway no longer wants its own request; one of that id that is (by now) another's goes on."""
        request = self.requests.find(request_id) or self.orphans.find(request_id)
        return request is not None and request.gateway_id == gateway.id and self.cancel(request_id, tell=False)

    def started(self, request_id: str, lease: int) -> None:
        """The worker's first output has come. A repeat, or one under an older lease, is dropped."""
        request = self.requests.find(request_id)
        if request is not None and request.lease == lease and request.state is State.PLACED:
            self.requests.move(request, State.RUNNING)

    def finished(self, ending: Ending) -> None:
        """A gateway's report on a placed request. A repeat, or one under an older lease, is dropped.

        A request that the scheduler ended keeps that end; its counts and its events are taken from here.
        """
        request = self.requests.find(ending.request_id)
        if request is None or request.lease != ending.lease or not ending.lease:
            return
        first = not request.reported
        self.requests.report(
            request,
            completion_tokens=ending.completion_tokens,
            cached_tokens=ending.cached_tokens,
            events=ending.events,
        )
        if first:
            self.shares.settle(request)
            self.limits.generated(request.submission.tenant, ending.completion_tokens)
        if request.live:
            self._end(request, ending.state, ending.reason)

    def worker_unreachable(self, worker_id: str, epoch: str) -> None:
        """A gateway lost its Run link. The worker is lost when it is silent here too; else its lease decides."""
        worker = self.fleet.find(worker_id, epoch)
        if worker is not None and not worker.linked:
            self._lose(worker)

    # -- workers

    def worker_joined(self, hello: Hello) -> Worker:
        """A Fleet link opens. Placements of an older boot are lost. Raises ModelConflictError or WorkerIdInUseError."""
        worker, replaced = self.fleet.join(hello)
        log.info("worker joined", extra={"worker_id": hello.worker_id, "epoch": hello.epoch, "model": hello.model.id})
        if replaced is not None:
            log.warning("worker replaced", extra={"worker_id": hello.worker_id, "epoch": replaced.hello.epoch})
            self.failover.replace_all(replaced, errors.WORKER_LOST)
            self.index.left(boot_of(replaced.hello))
        self.index.joined(boot_of(hello))
        self.residency.joined(worker, hello.adapters)
        self.failover.joined(worker)
        self.catalog_changed()
        self.placements.place(hello.model.id)
        return worker

    def worker_beat(self, worker: Worker, heartbeat: Heartbeat, *, draining: bool) -> None:
        """A heartbeat; renews the worker's lease and those of its placements.

        Raises WorkerIdInUseError when the worker was lost or replaced: its link must end, and a new one begin.
        """
        if not self.fleet.current(worker):
            raise WorkerIdInUseError(
                f"worker {worker.hello.worker_id} is lost here: its lease lapsed, or another link took its place",
                field="worker_id",
            )
        self.fleet.beat(worker, heartbeat)
        if heartbeat.stuck:
            self.failover.replace_all(worker, errors.WORKER_STUCK, revoke=True)
        worker.draining = worker.draining or draining
        self.placements.place(worker.hello.model.id)

    def _adapters_in_use(self, worker: Worker) -> set[str]:
        placed = (self.requests.find(request_id) for request_id in worker.placements)
        return {request.submission.adapter for request in placed if request is not None}

    def worker_unlinked(self, worker: Worker) -> None:
        """A Fleet link ended: a drained worker is gone, another has until its lease lapses to come back."""
        worker.linked = False
        self._leave_if_drained(worker)

    def _leave_if_drained(self, worker: Worker) -> None:
        if worker.draining and not worker.linked and not worker.placements and self.fleet.current(worker):
            self._lose(worker)

    def _lose(self, worker: Worker) -> None:
        self.fleet.leave(worker)
        self.index.left(boot_of(worker.hello))
        level = logging.INFO if worker.draining and not worker.placements else logging.WARNING
        extra = {"worker_id": worker.hello.worker_id, "epoch": worker.hello.epoch, "placements": len(worker.placements)}
        log.log(level, "worker left" if level == logging.INFO else "worker lost", extra=extra)
        self.failover.replace_all(worker, errors.WORKER_LOST)
        self.catalog_changed()
        self.placements.place(worker.hello.model.id)

    def _revoke(self, request: Request, reason: str) -> None:
        self._end(request, State.FAILED, reason)
        self._tell_owner(request, Revoked(request.id, request.lease, reason))

    def catalog_changed(self) -> None:
        """Models or adapters came or went."""
        for gateway in self.gateways.all():
            gateway.tell_catalog()

    # -- leases and ends

    def _owner_listens(self, request: Request) -> bool:
        """A lease that nobody hears of would only keep others from the worker."""
        gateway = self.gateways.find(request.gateway_id)
        return gateway is not None and gateway.linked

    def _granted(self, request: Request, worker: Worker) -> None:
        self.requests.move(request, State.PLACED, {"worker_id": worker.hello.worker_id})
        queue_span.end(request, "placed")
        self._tell_owner(request, placed(request, worker))

    def _end(self, request: Request, state: State, reason: str) -> None:
        """Ends a live request and gives its place to another. Raises TransitionError."""
        was_queued = request.state is State.QUEUED
        if request.live:
            request.reason = reason
        self.requests.move(request, state, {"reason": reason} if reason else {})
        queue_span.end(request, state.value.lower())
        self.shares.leave(request)
        if was_queued:
            self.placements.withdraw(request)
            return
        self.shares.release(request)
        worker = self.fleet.find(request.worker_id, request.epoch)
        if worker is not None:
            worker.take_back(request.id)
            self._leave_if_drained(worker)
            self.placements.place(request.submission.model)

    def _tell_owner(self, request: Request, event: Event) -> None:
        gateway = self.gateways.find(request.gateway_id)
        if gateway is not None:
            gateway.tell(event)

    # -- time

    def tick(self) -> None:
        """Ends what is overdue: deadlines, workers' leases, gateways' grace, models that nobody serves."""
        for worker in self.fleet.overdue():
            self._lose(worker)
        for gateway in self.gateways.given_up():
            self._drop_requests_of(gateway, frozenset({State.QUEUED}))
        for gateway in self.gateways.lost():
            self._drop_requests_of(gateway, LIVE)
        self.failover.tick()
        self.orphans.tick()
        self.residency.tick()
        if not self._settled:
            for model in self.placements.models():
                self.placements.place(model)
        if self.fleet.settled and not self._settled:
            self._settled = True
            self.catalog_changed()
            for boot in self.index.boots():
                if self.fleet.find(*boot) is None:
                    self.index.left(boot)
        for request in self._deadlines.due(self._clock()):
            self._expire(request)
        for model in self.placements.models():
            if self.gatekeeper.abandoned(model):
                self._revoke_waiting(model, errors.WORKER_LOST)
            for request in [r for r in self.placements.waiting(model) if r.submission.adapter]:
                if (fault := self.residency.hopeless(model, request.submission.adapter)) is not None:
                    self._revoke(request, fault.reason)

    def _expire(self, request: Request) -> None:
        queued = request.state is State.QUEUED
        self._end(request, State.EXPIRED, "")
        self._tell_owner(request, Expired(request.id, queued))

    def _drop_requests_of(self, gateway: Gateway, states: frozenset[State]) -> None:
        for request in self.requests.of_gateway(gateway.id):
            if request.state in states:
                self._end(request, State.FAILED, errors.GATEWAY_LOST)

    # -- leaving

    def drain(self) -> None:
        """Nothing new from here on; what was admitted is still placed and ends by itself."""
        self.gatekeeper.draining = True

    def revoke_queued(self) -> None:
        """Ends what no worker took while draining; what runs goes on without a scheduler."""
        for model in self.placements.models():
            self._revoke_waiting(model, errors.DRAINING)

    def _revoke_waiting(self, model: str, reason: str) -> None:
        for request in self.placements.waiting(model):
            self._revoke(request, reason)
