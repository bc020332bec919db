"""The queue of one model: bounded, by priority, and within a priority one request of each tenant in turn."""

from __future__ import annotations

from collections import OrderedDict, deque

from lmesh_scheduler.requests import Request, State


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


class AdmissionQueue:
    """Requests that wait for a worker. Ended ones are skipped when their turn comes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._classes: dict[int, OrderedDict[str, deque[Request]]] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def add(self, request: Request) -> None:
        """Queues a request at its tenant's end. Raises QueueFullError."""
        if self._waiting >= self._limit:
            raise QueueFullError(f"{self._waiting} requests wait already")
        self._waiting += 1
        tenants = self._classes.setdefault(request.submission.priority, OrderedDict())
        tenants.setdefault(request.submission.tenant, deque()).append(request)

    def drop(self) -> None:
        """Notes that a queued request ended; its entry goes when its turn comes."""
        self._waiting -= 1

    def peek(self) -> Request | None:
        """The next request, left in its place."""
        while self._classes:
            priority = min(self._classes)
            tenants = self._classes[priority]
            tenant, requests = next(iter(tenants.items()))
            while requests and requests[0].state is not State.QUEUED:
                requests.popleft()
            if requests:
                return requests[0]
            del tenants[tenant]
            if not tenants:
                del self._classes[priority]
        return None

    def pop(self) -> Request:
        """Takes the request that `peek` gave; its tenant goes behind the others."""
        request = self.peek()
        assert request is not None, "peek first"
        tenants = self._classes[request.submission.priority]
        tenants[request.submission.tenant].popleft()
        tenants.move_to_end(request.submission.tenant)
        self._waiting -= 1
        return request
