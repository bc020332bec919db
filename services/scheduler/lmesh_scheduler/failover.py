"""Requests that outlive a worker, a gateway or a scheduler: placed again, adopted, handed over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from lmesh_scheduler import errors
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.deadlines import Deadlines
from lmesh_scheduler.fleet import Fleet, Held, Worker
from lmesh_scheduler.gateways import Event, Gateway, Queued, Refused, Revoked
from lmesh_scheduler.orphans import Orphans
from lmesh_scheduler.placements import Placements
from lmesh_scheduler.requests import Request, RequestTable, State
from lmesh_scheduler.shares import Shares

Tell = Callable[[Request, Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A placement as its gateway holds it."""

    worker_id: str
    epoch: str
    lease: int


@dataclass(slots=True)
class _Awaited:
    """Adopted requests whose worker has not joined this scheduler yet."""

    since: float
    requests: list[Request] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Unannounced:
    """What a worker runs and no gateway has claimed yet."""

    worker: Worker
    held: Held
    since: float


class Failover:
    """Belongs to the scheduler, as synchronous as it is. `tell` reaches a request's own gateway."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        requests: RequestTable,
        orphans: Orphans,
        fleet: Fleet,
        placements: Placements,
        deadlines: Deadlines,
        shares: Shares,
        clock: Callable[[], float],
        tell: Tell,
        end: Callable[[Request, State, str], None],
    ) -> None:
        self._settings, self._orphans = settings, orphans
        self._requests, self._fleet, self._placements, self._deadlines = requests, fleet, placements, deadlines
        self._shares, self._clock, self._tell, self._end = shares, clock, tell, end
        self._awaited: dict[tuple[str, str], _Awaited] = {}
        self._unannounced: dict[int, _Unannounced] = {}  # by lease
        self.replaced = 0  # placements that were lost and their requests queued again

    # -- workers that are lost

    def replace(self, request: Request, reason: str) -> None:
        """A placed request has lost its worker: it waits for another, before all others, or ends after too many."""
        lease = request.lease
        if request.placements >= self._settings.max_placements:
            self._end(request, State.FAILED, reason)
            self._tell(request, Revoked(request.id, lease, reason))
            return
        worker = self._fleet.find(request.worker_id, request.epoch)
        if worker is not None:
            worker.take_back(request.id)
        self._shares.release(request)
        self.replaced += 1
        self._requests.move(request, State.QUEUED, {"reason": reason, "worker_id": request.worker_id})
        request.lost_lease, request.lost_reason = lease, reason
        request.lease, request.worker_id, request.epoch = 0, "", ""
        request.queue_deadline = math.inf  # it has waited once; its own deadline goes on
        self._placements.add_first(request)
        self._tell(request, Revoked(request.id, lease, reason, requeued=True))

    def replace_all(self, worker: Worker, reason: str, *, revoke: bool = False) -> None:
        """All of a worker's placements; with `revoke` it is told to drop them, for it may still live."""
        # The last placed first: each goes before the others, and so they keep their order.
        for request_id in reversed(list(worker.placements)):
            request = self._requests.find(request_id)
            if request is None or not request.live:
                continue
            if revoke:
                worker.revoke(request.lease)
            self.replace(request, reason)

    def leg_lost(self, request_id: str, lease: int, reason: str) -> None:
        """A gateway cannot hear a placement any more. A repeat, or one under an older lease, is dropped."""
        request = self._requests.find(request_id)
        if request is None or request.lease != lease or request.state not in (State.PLACED, State.RUNNING):
            return
        worker = self._fleet.find(request.worker_id, request.epoch)
        if worker is not None:
            worker.revoke(lease)
        self.replace(request, reason)
        self._placements.place(request.submission.model)

    # -- a scheduler that has just begun

    def adopt(self, request: Request, leg: Leg, *, started: bool) -> None:
        """A request that its gateway announced goes on under the lease of an earlier scheduler."""
        request.lease, request.worker_id, request.epoch, request.placements = leg.lease, leg.worker_id, leg.epoch, 1
        self._orphans.claim(request)
        self._requests.adopt(request, started=started)
        self._shares.enter(request.submission.tenant)
        self._shares.charge(request)
        self._deadlines.add(request)
        worker = self._fleet.find(leg.worker_id, leg.epoch)
        if worker is not None:
            self._claim(worker, request)
        elif self._fleet.find(leg.worker_id) is not None:
            self.replace(request, errors.WORKER_LOST)  # a newer boot has its place
            self._placements.place(request.submission.model)
        else:
            awaited = self._awaited.setdefault((leg.worker_id, leg.epoch), _Awaited(self._clock()))
            awaited.requests.append(request)

    def joined(self, worker: Worker) -> None:
        """A worker has come: what it holds counts, what was adopted for it is its own, for another boot of it lost."""
        hello = worker.hello
        for lease, one in list(self._unannounced.items()):
            if one.worker.hello.worker_id == hello.worker_id:  # an earlier link's: told anew below, if it still runs
                del self._unannounced[lease]
                worker.take_back(_unclaimed(lease))
        for held in hello.held:
            request = self._requests.find(held.request_id)
            if request is None or request.lease != held.lease:
                worker.give(_unclaimed(held.lease), held.sequences)
                self._unannounced[held.lease] = _Unannounced(worker, held, self._clock())
        for worker_id, epoch in [key for key in self._awaited if key[0] == hello.worker_id]:
            for request in self._awaited.pop((worker_id, epoch)).requests:
                if not request.live or (request.worker_id, request.epoch) != (worker_id, epoch):
                    continue
                if epoch == hello.epoch:
                    self._claim(worker, request)
                else:
                    self.replace(request, errors.WORKER_LOST)

    def _claim(self, worker: Worker, request: Request) -> None:
        self._unannounced.pop(request.lease, None)
        worker.take_back(_unclaimed(request.lease))
        worker.give(request.id, request.submission.n)

    def tick(self) -> None:
        """Workers that did not come back are lost; what nobody announced is dropped where it runs."""
        now = self._clock()
        for key, awaited in list(self._awaited.items()):
            if now - awaited.since >= self._settings.lease_ttl_s:
                del self._awaited[key]
                self._give_up(key, awaited.requests)
        for lease, one in list(self._unannounced.items()):
            if now - one.since >= self._settings.gateway_grace_s or not self._fleet.current(one.worker):
                self._drop_unannounced(lease)

    def _drop_unannounced(self, lease: int) -> None:
        one = self._unannounced.pop(lease, None)
        if one is not None:
            one.worker.take_back(_unclaimed(lease))
            one.worker.revoke(lease)

    def _give_up(self, key: tuple[str, str], requests: list[Request]) -> None:
        for request in requests:
            if request.live and (request.worker_id, request.epoch) == key:
                self.replace(request, errors.WORKER_LOST)
        for model in {request.submission.model for request in requests}:
            self._placements.place(model)

    # -- a gateway that carries on

    def take_over(self, gateway: Gateway, request: Request) -> None:
        """`request` takes the place of whatever is known under its id, live or lost with its gateway."""
        known = self._requests.find(request.id)
        old = known or self._orphan(gateway, request)
        if old is not None and (fault := _not_taken(old, request)) is not None:
            gateway.tell(Refused(request.id, *fault, 0))
            return
        if known is not None and known.live:
            self._part(known, gateway)
        else:
            self._shares.enter(request.submission.tenant)
        if (orphan := self._orphans.find(request.id)) is not None:
            self._drop_unannounced(orphan.lease)
            self._orphans.claim(request)
        self._requests.hand_over(known, request, {"gateway_id": gateway.id})
        self._deadlines.add(request)
        self._placements.add_first(request)
        gateway.tell(Queued(request.id, 0))
        self._placements.place(request.submission.model)

    def _orphan(self, gateway: Gateway, request: Request) -> Request | None:
        """What an earlier scheduler had under its id, unless it was this very take-over, said again to this one."""
        orphan = self._orphans.find(request.id)
        if orphan is None or (orphan.gateway_id, orphan.owner_epoch) == (gateway.id, request.owner_epoch):
            return None
        return orphan

    def _part(self, old: Request, new_owner: Gateway) -> None:
        """Takes a live request from its worker or the queue, and from its gateway, unless that asked for it."""
        if old.state is State.QUEUED:
            self._placements.withdraw(old)
        else:
            self._shares.release(old)
        worker = self._fleet.find(old.worker_id, old.epoch) if old.lease else None
        if worker is not None:
            worker.take_back(old.id)
            worker.revoke(old.lease)
        if old.gateway_id != new_owner.id:
            self._tell(old, Revoked(old.id, old.lease, errors.RESUMED_ELSEWHERE))


def _unclaimed(lease: int) -> str:
    """Under this name a worker's placements hold what no gateway has claimed; no request's id looks like it."""
    return f"lease {lease}"


def _not_taken(old: Request, new: Request) -> tuple[str, str] | None:
    if new.owner_epoch <= old.owner_epoch:
        return errors.RESUMED_ELSEWHERE, f"request {old.id} was resumed elsewhere meanwhile"
    # Of a finished one the end got lost on its way to the ledger: the epoch shows that it was not there.
    if not old.live and old.reason != errors.GATEWAY_LOST and old.state is not State.FINISHED:
        return errors.REQUEST_ENDED, f"request {old.id} has ended: {old.state}"
    if old.submission.tenant != new.submission.tenant:
        return errors.DUPLICATE_REQUEST_ID, f"request id {old.id} is another's; choose another"
    return None
