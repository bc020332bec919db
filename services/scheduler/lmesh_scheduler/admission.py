"""The queue of one model: bounded, by priority, and within a priority one request of each tenant in turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from lmesh_scheduler.requests import Request

FIRST_GUESS_MS, LEAST_MS, MOST_MS = 1000, 100, 30_000
_NEWEST = 0.2  # weight of the newest interval in the queue's pace

Tenants = OrderedDict[str, OrderedDict[str, Request]]  # tenants in turn, each with its requests by id in order


class QueueFullError(RuntimeError):
    """As many requests wait as may; `retry_after_ms` is when a place is likely to be free."""

    def __init__(self, waiting: int, retry_after_ms: int) -> None:
        super().__init__(f"{waiting} requests wait already")
        self.retry_after_ms = retry_after_ms


class AdmissionQueue:
    """Requests that wait for a worker; `clock` in seconds."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit, clock
        self._classes: dict[int, Tenants] = {}
        self._waiting = 0
        self._taken_at: float | None = None
        self._pace_s: float | None = None  # between two requests taken, of late

    def __len__(self) -> int:
        return self._waiting

    def add(self, request: Request) -> None:
        """Queues a request at its tenant's end. Raises QueueFullError."""
        if self._waiting >= self._limit:
            raise QueueFullError(self._waiting, self._retry_after_ms())
        self._waiting += 1
        tenants = self._classes.setdefault(request.submission.priority, OrderedDict())
        tenants.setdefault(request.submission.tenant, OrderedDict())[request.id] = request

    def add_first(self, request: Request) -> None:
        """Queues a request before all others of its priority. It was admitted before, so the bound is not asked."""
        self._waiting += 1
        tenants = self._classes.setdefault(request.submission.priority, OrderedDict())
        own = tenants.setdefault(request.submission.tenant, OrderedDict())
        own[request.id] = request
        own.move_to_end(request.id, last=False)
        tenants.move_to_end(request.submission.tenant, last=False)

    def remove(self, request: Request) -> None:
        """Takes out a request that ended in the queue."""
        priority, tenant = request.submission.priority, request.submission.tenant
        tenants = self._classes[priority]
        del tenants[tenant][request.id]
        self._waiting -= 1
        if not tenants[tenant]:
            del tenants[tenant]
        if not tenants:
            del self._classes[priority]

    def next(self, eligible: Callable[[Request], bool]) -> Request | None:
        """The first request that may be placed now, left in its place."""
        for priority in sorted(self._classes):
            for own in self._classes[priority].values():
                for request in own.values():
                    if eligible(request):
                        return request
        return None

    def take(self, request: Request) -> None:
        """Takes out a request to place it; its tenant goes behind the others."""
        self._classes[request.submission.priority].move_to_end(request.submission.tenant)
        self.remove(request)
        self._note_pace()

    def waiting(self) -> list[Request]:
        """All that wait, in no order that matters."""
        return [r for tenants in self._classes.values() for own in tenants.values() for r in own.values()]

    def position(self, request: Request) -> int:
        """How many go before it, if nothing comes and nothing ends meanwhile."""
        priority, tenant = request.submission.priority, request.submission.tenant
        sooner = sum(len(own) for p, ts in self._classes.items() if p < priority for own in ts.values())
        tenants = self._classes[priority]
        rank = next(i for i, other in enumerate(tenants[tenant]) if other == request.id)
        turn = list(tenants).index(tenant)
        others = sum(min(len(own), rank + (i < turn)) for i, own in enumerate(tenants.values()) if i != turn)
        return sooner + others + rank

    def _note_pace(self) -> None:
        now = self._clock()
        if self._taken_at is not None:
            interval = now - self._taken_at
            before = interval if self._pace_s is None else self._pace_s
            self._pace_s = (1 - _NEWEST) * before + _NEWEST * interval
        self._taken_at = now

    def _retry_after_ms(self) -> int:
        """When half of what waits now has gone, at the pace of late: sooner, the place is likely lost to another."""
        if self._pace_s is None:
            return FIRST_GUESS_MS
        return round(min(max(self._pace_s * self._waiting / 2 * 1e3, LEAST_MS), MOST_MS))
