"""Who waits for which model, and who was given which lease on which worker."""

from __future__ import annotations

from collections.abc import Callable

from lmesh_scheduler.adapters.residency import Residency
from lmesh_scheduler.admission import AdmissionQueue
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.fleet import Fleet, Worker
from lmesh_scheduler.placement import RequestView, WorkerView, place
from lmesh_scheduler.prefix_index import PrefixIndex, boot_of, granules_of
from lmesh_scheduler.requests import Request
from lmesh_scheduler.shares import Shares


class Placements:
    """The models' queues, and the leases. It changes no request's state: that is the caller's, told by `grant`."""

    def __init__(
        self,
        settings: SchedulerSettings,
        fleet: Fleet,
        *,
        incarnation: int,
        clock: Callable[[], float],
        index: PrefixIndex,
        shares: Shares,
        residency: Residency,
        eligible: Callable[[Request], bool],
        grant: Callable[[Request, Worker], None],
    ) -> None:
        self._settings, self._fleet, self._clock, self._index = settings, fleet, clock, index
        self._shares, self._residency = shares, residency
        # With several tenants a worker gets no more than it can run at once: what waits, waits here, where it is fair.
        self._slots_factor = min(1.0, settings.slots_factor) if shares.shared else settings.slots_factor
        self._eligible, self._grant = eligible, grant
        self._queues: dict[str, AdmissionQueue] = {}
        # Incarnations are not behind the clock's seconds and grow with every boot, so even a count that runs over
        # 32 bits does not meet a later boot's leases: no two of one mesh are ever alike.
        self._first_lease = incarnation << 32
        self.made = 0

    @property
    def queued(self) -> int:
        """Requests that wait for a worker."""
        return sum(len(queue) for queue in self._queues.values())

    def models(self) -> list[str]:
        """Models that requests wait for."""
        return [model for model, queue in self._queues.items() if len(queue)]

    def waiting(self, model: str) -> list[Request]:
        """Requests that wait for a model."""
        queue = self._queues.get(model)
        return [] if queue is None else queue.waiting()

    def add(self, request: Request) -> int:
        """Queues a request; returns how many go before it. Raises QueueFullError."""
        self._queue(request).add(request)
        return self.position(request)

    def add_first(self, request: Request) -> None:
        """Queues a request again that has lost its worker, before the others."""
        self._queue(request).add_first(request)

    def _queue(self, request: Request) -> AdmissionQueue:
        model = request.submission.model
        if model not in self._queues:
            self._queues[model] = AdmissionQueue(self._settings.max_queue, self._shares, self._clock)
        return self._queues[model]

    def waiting_of(self, tenant: str) -> int:
        """How many requests of a tenant wait."""
        return sum(queue.of_tenant(tenant) for queue in self._queues.values())

    def position(self, request: Request) -> int:
        """How many go before a queued request."""
        return self._queues[request.submission.model].position(request)

    def withdraw(self, request: Request) -> None:
        """A queued request has ended."""
        self._queues[request.submission.model].remove(request)

    def place(self, model: str) -> None:
        """Grants leases to one model's requests in order, as far as its workers have room."""
        if self._fleet.gathering(model):
            return
        queue = self._queues.get(model)
        # Tenants whose next request of an adapter (or none) finds no room, though another's may.
        blocked: set[tuple[str, str]] = set()
        while queue is not None and (request := queue.next(lambda r: self._next(r, blocked))) is not None:
            worker = self._choose(request)
            if worker is None:
                blocked.add(_kind(request))
                continue
            queue.take(request)
            self._lease(request, worker)
            self._grant(request, worker)

    def _next(self, request: Request, blocked: set[tuple[str, str]]) -> bool:
        return _kind(request) not in blocked and self._eligible(request)

    def _choose(self, request: Request) -> Worker | None:
        model = request.submission.model
        workers = self._fleet.serving(model)
        if len(workers) > 1 and request.granules is None:  # with one there is no choice, so nothing to hash
            request.granules = granules_of(request.submission, workers[0].hello.model)
        view = RequestView(
            model=model,
            sequences=request.submission.n,
            prompt_tokens=request.prompt_tokens,
            reserve=self._settings.reserved_slots if self._shares.yields(request.submission.tenant) else 0,
        )
        worker_id = place(view, (self._view(w, request) for w in workers))
        if worker_id is None and request.submission.adapter:
            self._residency.want(model, request.submission.adapter)
        return None if worker_id is None else self._fleet.find(worker_id)

    def _view(self, worker: Worker, request: Request) -> WorkerView:
        model = worker.hello.model
        found = self._index.leading(boot_of(worker.hello), request.granules or ())
        cached = found * model.kv_granule_blocks * model.block_size
        holds = self._residency.holds(worker, request.submission.adapter)
        return worker.view(self._slots_factor, holds_adapter=holds, cached_tokens=cached)

    def _lease(self, request: Request, worker: Worker) -> None:
        self.made += 1
        request.lease = self._first_lease + self.made
        self._index.placed(boot_of(worker.hello), request.granules or ())
        request.placements += 1
        request.worker_id, request.epoch = worker.hello.worker_id, worker.hello.epoch
        worker.give(request.id, request.submission.n)
        self._residency.used(worker, request.submission.adapter)
        self._shares.charge(request)


def _kind(request: Request) -> tuple[str, str]:
    return request.submission.tenant, request.submission.adapter
