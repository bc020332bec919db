"""The queue of one model: bounded; by priority, then by tenants' shares, then by deadline."""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Callable

from lmesh_scheduler.requests import Request
from lmesh_scheduler.shares import Shares

FIRST_GUESS_MS, LEAST_MS, MOST_MS = 1000, 100, 30_000
_NEWEST = 0.2  # weight of the newest interval in the queue's pace

_Entry = tuple[int, float, int, Request]  # 0 for those placed before, deadline, order of arrival


class QueueFullError(RuntimeError):
    """As many requests wait as may; `retry_after_ms` is when a place is likely to be free."""

    def __init__(self, waiting: int, retry_after_ms: int) -> None:
        super().__init__(f"{waiting} requests wait already")
        self.retry_after_ms = retry_after_ms


class AdmissionQueue:
    """Requests that wait for a worker; `clock` in seconds."""

    def __init__(self, limit: int, shares: Shares, clock: Callable[[], float]) -> None:
        self._limit, self._shares, self._clock = limit, shares, clock
        self._classes: dict[int, dict[str, list[_Entry]]] = {}  # by priority and tenant, each in order
        self._waiting = 0
        self._arrivals = itertools.count(1)
        self._taken_at: float | None = None
        self._pace_s: float | None = None  # between two requests taken, of late

    def __len__(self) -> int:
        return self._waiting

    def of_tenant(self, tenant: str) -> int:
        """How many of a tenant's requests wait."""
        return sum(len(tenants.get(tenant, ())) for tenants in self._classes.values())

    def add(self, request: Request) -> None:
        """Queues a request: before its tenant's later deadlines, behind the earlier ones. Raises QueueFullError."""
        if self._waiting >= self._limit:
            raise QueueFullError(self._waiting, self._retry_after_ms())
        self._insert(request, (1, request.deadline, next(self._arrivals), request))

    def add_first(self, request: Request) -> None:
        """Queues a request before its tenant's others. It was admitted before, so the bound is not asked."""
        self._insert(request, (0, 0.0, -next(self._arrivals), request))

    def _insert(self, request: Request, entry: _Entry) -> None:
        self._waiting += 1
        tenants = self._classes.setdefault(request.submission.priority, {})
        insort(tenants.setdefault(request.submission.tenant, []), entry)

    def remove(self, request: Request) -> None:
        """Takes out a request that ended in the queue, or is placed."""
        priority, tenant = request.submission.priority, request.submission.tenant
        own = self._classes[priority][tenant]
        own.pop(self._rank(own, request))
        self._waiting -= 1
        if not own:
            del self._classes[priority][tenant]
        if not self._classes[priority]:
            del self._classes[priority]

    def next(self, eligible: Callable[[Request], bool]) -> Request | None:
        """The first request that may be placed now, left in its place."""
        for priority in sorted(self._classes):
            for tenant in self._turns(priority):
                for *_, request in self._classes[priority][tenant]:
                    if eligible(request):
                        return request
        return None

    def _turns(self, priority: int) -> list[str]:
        return sorted(self._classes[priority], key=lambda tenant: (self._shares.spent(tenant), tenant))

    def take(self, request: Request) -> None:
        """Takes out a request to place it."""
        self.remove(request)
        self._note_pace()

    def waiting(self) -> list[Request]:
        """All that wait, in no order that matters."""
        return [entry[-1] for tenants in self._classes.values() for own in tenants.values() for entry in own]

    def position(self, request: Request) -> int:
        """About how many go before it, if nothing comes and nothing ends: tenants in turn, as if all cost the same."""
        priority, tenant = request.submission.priority, request.submission.tenant
        sooner = sum(len(own) for p, tenants in self._classes.items() if p < priority for own in tenants.values())
        tenants, turns = self._classes[priority], self._turns(priority)
        rank, turn = self._rank(tenants[tenant], request), turns.index(tenant)
        others = sum(min(len(tenants[t]), rank + (i < turn)) for i, t in enumerate(turns) if i != turn)
        return sooner + others + rank

    @staticmethod
    def _rank(own: list[_Entry], request: Request) -> int:
        return next(i for i, entry in enumerate(own) if entry[-1] is request)

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
